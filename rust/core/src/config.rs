//! The sizes and rules of a model, named as in config.json.

use crate::error::{Error, Result};
use crate::kernels::rope::Yarn;

/// What mixes the tokens in a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayerType {
    LinearAttention,
    FullAttention,
}

/// Rotary position embedding.
#[derive(Clone, PartialEq, Debug)]
pub struct Rope {
    pub theta: f64,
    /// Dimensions of a head that rotate.
    pub rotary_dim: usize,
    /// Frequencies that follow time, height and width, interleaved.
    pub mrope_section: [usize; 3],
    /// Extension of the context, if the config asks for one.
    pub yarn: Option<Yarn>,
}

/// Sizes of the vision tower.
#[derive(Clone, PartialEq, Debug)]
pub struct VisionConfig {
    pub depth: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_heads: usize,
    pub out_hidden_size: usize,
    pub in_channels: usize,
    pub patch_size: usize,
    pub temporal_patch_size: usize,
    pub spatial_merge_size: usize,
    pub num_position_embeddings: usize,
}

/// Sizes and rules of the text model.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub intermediate_size: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub linear_conv_kernel_dim: usize,
    pub linear_num_key_heads: usize,
    pub linear_num_value_heads: usize,
    pub linear_key_head_dim: usize,
    pub linear_value_head_dim: usize,
    pub rms_norm_eps: f32,
    pub tie_word_embeddings: bool,
    pub layer_types: Vec<LayerType>,
    pub rope: Rope,
    pub mtp_num_hidden_layers: usize,
    pub vision: Option<VisionConfig>,
    /// Whether matrices may be FP8, see [`crate::quant::fp8`].
    pub fp8: bool,
}

/// No size in a config is larger. The largest that are published are a tenth of it.
pub(crate) const MOST_SIZE: u64 = 1 << 21;

impl Config {
    /// Positions that the model can tell apart as intended.
    pub fn context(&self) -> usize {
        self.rope.yarn.as_ref().map_or(self.max_position_embeddings, Yarn::context)
    }

    /// The same model with its context extended by a YaRN factor, instead of an extension that the
    /// file asks for; a factor of 1 is no extension.
    pub fn with_yarn(mut self, factor: f64) -> Result<Config> {
        if let Some(yarn) = &self.rope.yarn {
            self.max_position_embeddings = yarn.original_max_position_embeddings;
        }
        let original = self.max_position_embeddings;
        let most = most_yarn(original);
        if !(1.0..=most).contains(&factor) {
            return Err(Error::Argument(format!(
                "yarn is {factor}, expected a factor from 1 to {most}, of a context of {original}"
            )));
        }
        self.rope.yarn = (factor > 1.0).then(|| Yarn::new(factor, original));
        Ok(self)
    }

    /// Channels of the convolution: q, k and v of all heads.
    pub fn conv_dim(&self) -> usize {
        2 * self.key_dim() + self.value_dim()
    }

    /// Width of all linear keys.
    pub fn key_dim(&self) -> usize {
        self.linear_num_key_heads * self.linear_key_head_dim
    }

    /// Width of all linear values.
    pub fn value_dim(&self) -> usize {
        self.linear_num_value_heads * self.linear_value_head_dim
    }

    /// Value heads that share a key head.
    pub fn values_per_key(&self) -> usize {
        self.linear_num_value_heads / self.linear_num_key_heads
    }

    /// Number of layers of a type.
    pub fn layers_of(&self, layer: LayerType) -> usize {
        self.layer_types.iter().filter(|l| **l == layer).count()
    }
}

/// The largest factor for a context: its positions are a size, and f32 holds them exactly.
pub(crate) fn most_yarn(original: usize) -> f64 {
    MOST_SIZE as f64 / original as f64
}
