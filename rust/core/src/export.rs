//! Writes a checkpoint as a GGUF file that llama.cpp reads.

use crate::config::{Config, LayerType};
use crate::convert::{FileSink, Progress, Sink, Temporary};
use crate::error::{Error, Result};
use crate::files::Convention;
use crate::files::gguf_write::{ALIGNMENT, Entry, TensorInfo, header};
use crate::kernels::rope::Yarn;
use crate::model::checkpoint::Checkpoint;
use crate::model::gguf;
use crate::model::tensors::{Role, TensorSpec};
use crate::quant::BlockType;
use crate::tensor::{Dtype, Tensor};
use crate::threads;
use half::{bf16, f16};
use rayon::prelude::*;
use std::fs;
use std::ops::Range;
use std::path::Path;

/// Values that are made before they are written.
const SLAB_VALUES: usize = 4 << 20;

/// Writes the text model and the multi-token-prediction module of `source`.
///
/// dtype: of the matrices, BF16, F16, F32, Q8_0 or Q4_0. In a Q4_0 file embedding, head, decay and
/// write strength are Q8_0; rows that are no multiple of 32 are F16. Other tensors are F32. entries:
/// metadata beside that of the architecture, like the tokenizer's. threads: 1 to 1024, or
/// [`threads::default_threads`]. The file appears at `out`, which must be free, only when it is
/// whole; if `progress` returns false, the result is [`Error::Interrupted`].
pub fn to_gguf(
    source: &Checkpoint,
    dtype: Dtype,
    entries: Vec<(String, Entry)>,
    out: &Path,
    threads: Option<usize>,
    progress: &mut Progress,
) -> Result<()> {
    let file_type = file_type(dtype)?;
    let pool = threads::workers(threads)?;
    if fs::symlink_metadata(out).is_ok() {
        return Err(Error::Argument(format!("{}: exists, expected a free name", out.display())));
    }
    check_yarn(source)?;
    source.check_values()?;
    let specs = source.specs().iter().filter(|spec| spec.role != Role::Vision);
    let parts = specs.map(|spec| Part::new(source, spec, dtype)).collect::<Result<Vec<_>>>()?;
    let infos: Vec<TensorInfo> = parts.iter().map(Part::info).collect();
    let mut all = vec![("general.architecture".to_owned(), text("qwen35"))];
    let mtp_layers = if source.has_mtp() { source.config.mtp_num_hidden_layers } else { 0 };
    all.extend(architecture(&source.config, mtp_layers));
    all.push(("general.file_type".to_owned(), Entry::U32(file_type)));
    all.push(("general.quantization_version".to_owned(), Entry::U32(2)));
    all.extend(entries);
    let header = header(&all, &infos);

    let (file, temporary) = Temporary::create(out)?;
    let mut sink = FileSink { file, path: temporary.path().to_owned() };
    let total: usize = infos.iter().map(|info| info.bytes().next_multiple_of(ALIGNMENT)).sum();
    let mut done = 0;
    let mut step = |bytes: usize| {
        done += bytes as u64;
        if progress(done, total as u64) { Ok(()) } else { Err(Error::Interrupted) }
    };
    sink.reserve(header.len() + total)?;
    step(0)?;
    sink.write(&header)?;
    for (part, info) in parts.iter().zip(&infos) {
        let mut written = 0;
        for rows in part.slabs() {
            let bytes = pool.install(|| part.bytes(rows))?;
            sink.write(&bytes)?;
            written += bytes.len();
            step(bytes.len())?;
        }
        assert_eq!(written, info.bytes(), "a tensor has the size that the header states");
        let padding = written.next_multiple_of(ALIGNMENT) - written;
        sink.write(&vec![0; padding])?;
        step(padding)?;
        source.release(&part.tensor.bytes);
    }
    sink.finish(0, b"GGUF")?;
    source.check_unchanged()?;
    temporary.rename(out)
}

/// The factor of the attention is read differently by different programs: only the usual one is
/// safe, which is not written.
fn check_yarn(source: &Checkpoint) -> Result<()> {
    let Some(yarn) = &source.config.rope.yarn else { return Ok(()) };
    let usual = Yarn::new(yarn.factor, yarn.original_max_position_embeddings).attention_factor;
    if yarn.attention_factor == usual {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{}: `attention_factor` is {}, GGUF files have no place for another than {usual}",
        source.name(),
        yarn.attention_factor
    )))
}

/// As `general.file_type` numbers them.
fn file_type(dtype: Dtype) -> Result<u32> {
    match dtype {
        Dtype::F32 => Ok(0),
        Dtype::F16 => Ok(1),
        Dtype::Bf16 => Ok(32),
        Dtype::Blocks(BlockType::Q4_0) => Ok(2),
        Dtype::Blocks(BlockType::Q8_0) => Ok(7),
        _ => Err(Error::Argument(format!(
            "type {}, expected one of: BF16, F16, F32, Q8_0, Q4_0",
            dtype.name()
        ))),
    }
}

fn text(text: &str) -> Entry {
    Entry::Text(text.to_owned())
}

/// Metadata of the architecture.
fn architecture(config: &Config, mtp_layers: usize) -> Vec<(String, Entry)> {
    let layers = config.num_hidden_layers;
    let count = |n: usize| Entry::U32(n as u32);
    let [time, height, width] = config.rope.mrope_section.map(|n| n as i32);
    let mut out = vec![
        ("block_count", count(layers + mtp_layers)),
        ("context_length", count(config.max_position_embeddings)),
        ("embedding_length", count(config.hidden_size)),
        ("feed_forward_length", count(config.intermediate_size)),
        ("attention.head_count", count(config.num_attention_heads)),
        ("attention.head_count_kv", count(config.num_key_value_heads)),
        ("attention.key_length", count(config.head_dim)),
        ("attention.value_length", count(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Entry::F32(config.rms_norm_eps)),
        ("rope.dimension_count", count(config.rope.rotary_dim)),
        ("rope.dimension_sections", Entry::I32s(vec![time, height, width, 0])),
        ("rope.freq_base", Entry::F32(config.rope.theta as f32)),
        ("ssm.conv_kernel", count(config.linear_conv_kernel_dim)),
        ("ssm.state_size", count(config.linear_key_head_dim)),
        ("ssm.group_count", count(config.linear_num_key_heads)),
        ("ssm.time_step_rank", count(config.linear_num_value_heads)),
        ("ssm.inner_size", count(config.value_dim())),
    ];
    if mtp_layers > 0 {
        out.push(("nextn_predict_layers", count(mtp_layers)));
    }
    let first_full = config.layer_types.iter().position(|l| *l == LayerType::FullAttention);
    let interval = first_full.map_or(layers + 1, |i| i + 1);
    let regular = |(i, layer): (usize, &LayerType)| {
        (*layer == LayerType::FullAttention) == (i + 1).is_multiple_of(interval)
    };
    out.push(("full_attention_interval", count(interval)));
    if !config.layer_types.iter().enumerate().all(regular) {
        let mut recurrent: Vec<bool> =
            config.layer_types.iter().map(|l| *l == LayerType::LinearAttention).collect();
        recurrent.resize(layers + mtp_layers, false);
        out.push(("attention.recurrent_layers", Entry::Bools(recurrent)));
    }
    if let Some(yarn) = &config.rope.yarn {
        out.push(("rope.scaling.type", text("yarn")));
        out.push(("rope.scaling.factor", Entry::F32(yarn.factor as f32)));
        let original = count(yarn.original_max_position_embeddings);
        out.push(("rope.scaling.original_context_length", original));
        out.push(("rope.scaling.yarn_beta_fast", Entry::F32(yarn.beta_fast as f32)));
        out.push(("rope.scaling.yarn_beta_slow", Entry::F32(yarn.beta_slow as f32)));
    }
    out.into_iter().map(|(key, entry)| (format!("qwen35.{key}"), entry)).collect()
}

/// How the numbers of a tensor change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    /// Norms that are stored around zero.
    AddOne,
    /// A_log.
    MinusExp,
}

/// A tensor and what it becomes.
struct Part<'a> {
    spec: &'a TensorSpec,
    tensor: &'a Tensor,
    dtype: Dtype,
    change: Change,
    heads: Option<Heads>,
    name: String,
    /// As errors say it.
    place: String,
}

/// The largest number that a type takes.
fn largest(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::MAX.to_f32(),
        Dtype::Bf16 => bf16::MAX.to_f32(),
        // Codes and an f16 scale.
        Dtype::Blocks(BlockType::Q8_0) => 127.0 * f16::MAX.to_f32(),
        Dtype::Blocks(BlockType::Q4_0) => 8.0 * f16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Value heads that move from grouped to tiled order: those of rows, or of columns.
#[derive(Clone, Copy)]
struct Heads {
    keys: usize,
    per_key: usize,
    /// Rows or columns of a head.
    size: usize,
    /// Rows before the first head.
    first: usize,
    columns: bool,
}

impl Heads {
    /// Where row or column `i` of the tiled order comes from.
    fn source(&self, i: usize) -> usize {
        let Some(i) = i.checked_sub(self.first) else { return i };
        let (head, within) = (i / self.size, i % self.size);
        let (key, t) = (head % self.keys, head / self.keys);
        self.first + (key * self.per_key + t) * self.size + within
    }
}

impl<'a> Part<'a> {
    fn new(source: &'a Checkpoint, spec: &'a TensorSpec, dtype: Dtype) -> Result<Self> {
        let place = source.place(&spec.name);
        let floats = source.tensor(&spec.name).filter(|tensor| tensor.dtype.is_float());
        let tensor = floats.ok_or_else(|| {
            Error::Unsupported(format!(
                "{place}: quantised already; give the original weights, or use the file as it is"
            ))
        })?;
        let config = &source.config;
        let transformers = source.convention == Convention::Transformers;
        let stem = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        let ends = |end: &str| stem.ends_with(end);
        let change = match spec.role {
            _ if !transformers => Change::None,
            Role::Small if ends("A_log") => Change::MinusExp,
            Role::Small if ends("linear_attn.norm") || ends("conv1d") || ends("dt_bias") => {
                Change::None
            }
            Role::Small => Change::AddOne,
            _ => Change::None,
        };
        let (keys, per_key) = (config.linear_num_key_heads, config.values_per_key());
        let d_v = config.linear_value_head_dim;
        let moved = |size, first, columns| Some(Heads { keys, per_key, size, first, columns });
        let heads = match stem.split_once("linear_attn.").map(|(_, part)| part) {
            _ if !transformers || per_key == 1 => None,
            Some("in_proj_qkv" | "conv1d") => moved(d_v, 2 * config.key_dim(), false),
            Some("in_proj_z") => moved(d_v, 0, false),
            Some("in_proj_a" | "in_proj_b" | "A_log" | "dt_bias") => moved(1, 0, false),
            Some("out_proj") => moved(d_v, 0, true),
            _ => None,
        };
        let dtype = match (spec.role, dtype) {
            (Role::Small, _) => Dtype::F32,
            (_, Dtype::Blocks(_)) if !spec.rows_cols().1.is_multiple_of(32) => Dtype::F16,
            (Role::Embedding | Role::Head | Role::LinearGate, Dtype::Blocks(BlockType::Q4_0)) => {
                Dtype::Blocks(BlockType::Q8_0)
            }
            (_, dtype) => dtype,
        };
        let name = gguf::gguf_name(&spec.name, config.num_hidden_layers);
        Ok(Part { spec, tensor, dtype, change, heads, name, place })
    }

    /// Rows and columns: a vector is a column where its heads move.
    fn rows_cols(&self) -> (usize, usize) {
        match self.spec.shape[..] {
            [rows, cols] => (rows, cols),
            [rows, 1, taps] => (rows, taps),
            _ => (self.spec.shape.iter().product(), 1),
        }
    }

    fn info(&self) -> TensorInfo {
        let shape = match self.spec.shape[..] {
            [rows, 1, taps] => vec![rows, taps],
            _ => self.spec.shape.clone(),
        };
        TensorInfo { name: self.name.clone(), dtype: self.dtype, shape }
    }

    /// Ranges of rows to be made at a time.
    fn slabs(&self) -> impl Iterator<Item = Range<usize>> {
        let (rows, cols) = self.rows_cols();
        let slab = (SLAB_VALUES / cols).max(1);
        (0..rows).step_by(slab).map(move |first| first..(first + slab).min(rows))
    }

    /// The bytes of some rows.
    fn bytes(&self, rows: Range<usize>) -> Result<Vec<u8>> {
        let cols = self.rows_cols().1;
        let rows: Result<Vec<_>> = rows.into_par_iter().map(|row| self.row(row, cols)).collect();
        Ok(rows?.concat())
    }

    /// One row as it is written.
    fn row(&self, row: usize, cols: usize) -> Result<Vec<u8>> {
        let from = match self.heads {
            Some(heads) if !heads.columns => heads.source(row),
            _ => row,
        };
        let mut values = vec![0.0; cols];
        self.tensor.widen_rows(cols, from, &mut values);
        if let Some(heads) = self.heads.filter(|heads| heads.columns) {
            values = (0..cols).map(|i| values[heads.source(i)]).collect();
        }
        match self.change {
            Change::None => {}
            Change::AddOne => values.iter_mut().for_each(|x| *x += 1.0),
            Change::MinusExp => values.iter_mut().for_each(|x| *x = -x.exp()),
        }
        let largest = largest(self.dtype);
        // Not a number is not within.
        let within = |x: f32| x.abs() <= largest;
        if let Some(x) = values.iter().find(|x| !within(**x)) {
            let (place, dtype) = (&self.place, self.dtype.name());
            return Err(Error::File(format!(
                "{place}: row {from} holds {x}, expected finite numbers, as {dtype} up to {largest}"
            )));
        }
        Ok(match self.dtype {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::Blocks(block) => block.encode(&values),
            Dtype::Fp8 | Dtype::U8 => unreachable!("a tensor of a GGUF file is of another type"),
        })
    }
}
