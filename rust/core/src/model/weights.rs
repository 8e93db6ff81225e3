//! Binds tensors by name to the parts of the model.

use super::checkpoint::Checkpoint;
use super::recipe::coded_name;
use crate::config::{Config, LayerType};
use crate::error::{Error, Result};
use crate::files::Convention;
use crate::layers::attention::{self, Attention};
use crate::layers::block::{Block, Mixer};
use crate::layers::gated_delta_net::{self, GatedDeltaNet, ValueOrder};
use crate::layers::linear::Matrix;
use crate::layers::mlp::Mlp;
use crate::quant::Format;
use crate::tensor::Tensor;

/// Where tensors come from: a checkpoint, or a generator.
///
/// Names are those of the table in [`super::tensors`]; a packed matrix has the name of its format,
/// like `w4`, in place of `weight`. Shapes were checked by the source.
pub trait Source: Send + Sync {
    fn tensor(&self, name: &str) -> Option<Tensor>;

    /// What the numbers of the tensors mean.
    fn convention(&self) -> Convention {
        Convention::Transformers
    }

    /// An error if the files behind the tensors are not what they were.
    fn check_unchanged(&self) -> Result<()>;
}

impl Source for Checkpoint {
    fn tensor(&self, name: &str) -> Option<Tensor> {
        self.tensor(name).cloned()
    }

    fn convention(&self) -> Convention {
        self.convention
    }

    fn check_unchanged(&self) -> Result<()> {
        self.check_unchanged()
    }
}

/// All weights of the text model.
pub struct Weights {
    pub embed_tokens: Matrix,
    pub blocks: Vec<Block>,
    pub norm: Vec<f32>, // [hidden], 1 added
    pub lm_head: Matrix,
}

impl Weights {
    pub fn bind(config: &Config, source: &dyn Source) -> Result<Weights> {
        let binder = Binder { config, source };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed_tokens = binder.matrix("embed_tokens", vocab, hidden)?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            binder.matrix("lm_head", vocab, hidden)?
        };
        let blocks =
            (0..config.num_hidden_layers).map(|i| binder.block(i)).collect::<Result<_>>()?;
        Ok(Weights { embed_tokens, blocks, norm: binder.zero_centred("norm.weight")?, lm_head })
    }

    /// All matrices that a decoded token reads.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.blocks
            .iter()
            .flat_map(|block| {
                let mut matrices = match &block.mixer {
                    Mixer::Linear(m) => {
                        vec![&m.in_proj_qkv, &m.in_proj_z, &m.in_proj_b, &m.in_proj_a, &m.out_proj]
                    }
                    Mixer::Full(m) => vec![&m.q_proj, &m.k_proj, &m.v_proj, &m.o_proj],
                };
                matrices.extend([&block.mlp.gate_proj, &block.mlp.up_proj, &block.mlp.down_proj]);
                matrices
            })
            .chain([&self.lm_head])
    }
}

fn find(source: &dyn Source, name: &str) -> Result<Tensor> {
    source.tensor(name).ok_or_else(|| Error::File(format!("tensor `{name}` is missing")))
}

/// The matrix that the table calls `name`, and the format in which the source has it.
pub fn find_matrix(source: &dyn Source, name: &str) -> Result<(Format, Tensor)> {
    for format in Format::all_quantised() {
        if let Some(tensor) = source.tensor(&coded_name(name, format)) {
            return Ok((format, tensor));
        }
    }
    let tensor = find(source, name)?;
    let format = tensor.dtype.format().ok_or_else(|| {
        let dtype = tensor.dtype.name();
        Error::File(format!("tensor `{name}`: dtype {dtype}, expected a float"))
    })?;
    Ok((format, tensor))
}

struct Binder<'a> {
    config: &'a Config,
    source: &'a dyn Source,
}

impl Binder<'_> {
    /// The matrix `name`, in whatever format the source has it.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let (format, tensor) = find_matrix(self.source, &format!("{name}.weight"))?;
        Ok(Matrix { format, rows, cols, bytes: tensor.bytes, scales: tensor.scales })
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(find(self.source, name)?.to_f32())
    }

    /// A norm weight that a checkpoint stores around zero: 1 + w.
    fn zero_centred(&self, name: &str) -> Result<Vec<f32>> {
        let mut w = self.vector(name)?;
        if self.source.convention() == Convention::Transformers {
            w.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(w)
    }

    /// -exp(A_log).
    fn rate(&self, name: &str) -> Result<Vec<f32>> {
        let mut a = self.vector(name)?;
        if self.source.convention() == Convention::Transformers {
            a.iter_mut().for_each(|a| *a = -a.exp());
        }
        Ok(a)
    }

    fn block(&self, i: usize) -> Result<Block> {
        let config = self.config;
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let mlp =
            |name: &str, rows, cols| self.matrix(&format!("layers.{i}.mlp.{name}"), rows, cols);
        Ok(Block {
            input_layernorm: self.zero_centred(&format!("layers.{i}.input_layernorm.weight"))?,
            mixer: match config.layer_types[i] {
                LayerType::LinearAttention => Mixer::Linear(self.gated_delta_net(i)?),
                LayerType::FullAttention => Mixer::Full(self.attention(i)?),
            },
            post_attention_layernorm: self
                .zero_centred(&format!("layers.{i}.post_attention_layernorm.weight"))?,
            mlp: Mlp {
                gate_proj: mlp("gate_proj", ff, hidden)?,
                up_proj: mlp("up_proj", ff, hidden)?,
                down_proj: mlp("down_proj", hidden, ff)?,
            },
            eps: config.rms_norm_eps,
        })
    }

    fn gated_delta_net(&self, i: usize) -> Result<GatedDeltaNet> {
        let config = self.config;
        let hidden = config.hidden_size;
        let name = |part: &str| format!("layers.{i}.linear_attn.{part}");
        let value_heads = config.linear_num_value_heads;
        let heads = gated_delta_net::Heads {
            keys: config.linear_num_key_heads,
            values_per_key: config.values_per_key(),
            order: match self.source.convention() {
                Convention::Transformers => ValueOrder::Grouped,
                Convention::Gguf => ValueOrder::Tiled,
            },
            d_k: config.linear_key_head_dim,
            d_v: config.linear_value_head_dim,
            eps: config.rms_norm_eps,
        };
        Ok(GatedDeltaNet {
            in_proj_qkv: self.matrix(&name("in_proj_qkv"), config.conv_dim(), hidden)?,
            in_proj_z: self.matrix(&name("in_proj_z"), config.value_dim(), hidden)?,
            in_proj_b: self.matrix(&name("in_proj_b"), value_heads, hidden)?,
            in_proj_a: self.matrix(&name("in_proj_a"), value_heads, hidden)?,
            conv1d: self.taps(heads, &self.vector(&name("conv1d.weight"))?),
            rate: self.rate(&name("A_log"))?,
            dt_bias: self.vector(&name("dt_bias"))?,
            norm: self.vector(&name("norm.weight"))?,
            out_proj: self.matrix(&name("out_proj"), hidden, config.value_dim())?,
            heads,
        })
    }

    /// Convolution weights [conv_dim, kernel] by key head, as [kernel, channels] of q, of k and of
    /// the v of each value head.
    fn taps(&self, heads: gated_delta_net::Heads, weight: &[f32]) -> Vec<Vec<Vec<f32>>> {
        let kernel = self.config.linear_conv_kernel_dim;
        let gated_delta_net::Heads { keys, values_per_key, d_k, d_v, .. } = heads;
        let part = |first: usize, channels: usize| {
            let mut taps = vec![0.0; kernel * channels];
            for (j, taps) in taps.chunks_exact_mut(channels).enumerate() {
                for (c, tap) in taps.iter_mut().enumerate() {
                    *tap = weight[(first + c) * kernel + j];
                }
            }
            taps
        };
        (0..keys)
            .map(|key| {
                let mut parts = vec![part(key * d_k, d_k), part((keys + key) * d_k, d_k)];
                let first = |i| 2 * keys * d_k + heads.value(key, i) * d_v;
                parts.extend((0..values_per_key).map(|i| part(first(i), d_v)));
                parts
            })
            .collect()
    }

    fn attention(&self, i: usize) -> Result<Attention> {
        let config = self.config;
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        let (queries, kv) = (config.num_attention_heads, config.num_key_value_heads);
        let name = |part: &str| format!("layers.{i}.self_attn.{part}");
        Ok(Attention {
            q_proj: self.matrix(&name("q_proj"), 2 * queries * dim, hidden)?,
            k_proj: self.matrix(&name("k_proj"), kv * dim, hidden)?,
            v_proj: self.matrix(&name("v_proj"), kv * dim, hidden)?,
            o_proj: self.matrix(&name("o_proj"), hidden, queries * dim)?,
            q_norm: self.zero_centred(&name("q_norm.weight"))?,
            k_norm: self.zero_centred(&name("k_norm.weight"))?,
            heads: attention::Heads {
                kv,
                queries_per_kv: queries / kv,
                dim,
                eps: config.rms_norm_eps,
            },
        })
    }
}
