//! What a session remembers of its tokens: data only.

use crate::budget::{Budget, Held};
use crate::config::{Config, LayerType};
use crate::error::Result;
use crate::kernels::attention_q8::Q8Positions;
use crate::kernels::delta_rule::{PendingKeys, ValueHead};
use crate::quant::Format;
use crate::simd::LANES;
use crate::tensor::filled;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Positions of a chunk of the KV cache, the unit in which it grows.
pub const KV_CHUNK: usize = 256;

/// State of a gated delta net layer for one key head and its value heads.
#[derive(Clone)]
pub struct KeyHead {
    /// Last inputs of the convolution, oldest first: [kernel - 1, channels] of q, of k and of the v
    /// of each value head.
    pub conv: Vec<Vec<f32>>,
    pub pending: PendingKeys,
    pub values: Vec<ValueHead>,
}

impl KeyHead {
    fn new(config: &Config) -> KeyHead {
        let history = config.linear_conv_kernel_dim - 1;
        let (d_k, d_v) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let per_key = config.values_per_key();
        KeyHead {
            conv: [d_k, d_k]
                .into_iter()
                .chain(std::iter::repeat_n(d_v, per_key))
                .map(|channels| vec![0.0; history * channels])
                .collect(),
            pending: PendingKeys::new(d_k),
            values: vec![ValueHead::new(d_k, d_v); per_key],
        }
    }

    /// Adds what is pending to the recurrent state.
    pub fn commit(&mut self) {
        for value in &mut self.values {
            value.commit(&self.pending);
        }
        self.pending.clear();
    }
}

/// How keys and values are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvFormat {
    F16,
    F32,
    /// Signed bytes with scales, see [`kernels::attention_q8`](crate::kernels::attention_q8).
    Q8,
}

impl KvFormat {
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::F16 => "f16",
            KvFormat::F32 => "f32",
            KvFormat::Q8 => "q8",
        }
    }

    /// Bytes of a [`KvChunk`].
    pub fn chunk_bytes(self, head_dim: usize) -> usize {
        let float = |format: Format| {
            format.bytes(KV_CHUNK, head_dim)
                + format.bytes(KV_CHUNK, head_dim.next_multiple_of(LANES))
        };
        match self {
            KvFormat::F16 => float(Format::F16),
            KvFormat::F32 => float(Format::F32),
            KvFormat::Q8 => Q8Positions::bytes_of(KV_CHUNK, head_dim),
        }
    }
}

/// Keys and values of one head at [`KV_CHUNK`] positions.
#[derive(Clone)]
pub enum KvChunk {
    Float {
        format: Format,
        k: Vec<u8>, // [KV_CHUNK / 16, head_dim, 16]
        v: Vec<u8>, // [KV_CHUNK, head_dim padded to 16]
    },
    Q8(Q8Positions),
}

impl KvChunk {
    fn new(format: KvFormat, head_dim: usize) -> Result<KvChunk> {
        let float = |format: Format| {
            Ok(KvChunk::Float {
                format,
                k: filled(0, format.bytes(KV_CHUNK, head_dim))?,
                v: filled(0, format.bytes(KV_CHUNK, head_dim.next_multiple_of(LANES)))?,
            })
        };
        match format {
            KvFormat::F16 => float(Format::F16),
            KvFormat::F32 => float(Format::F32),
            KvFormat::Q8 => Ok(KvChunk::Q8(Q8Positions::new(KV_CHUNK, head_dim)?)),
        }
    }

    /// Keys of a float format, if they have one.
    pub fn float_keys(&self) -> &[u8] {
        match self {
            KvChunk::Float { k, .. } => k,
            KvChunk::Q8(_) => &[],
        }
    }

    /// Positions kept as bytes, if they are.
    pub fn q8(&self) -> Option<&Q8Positions> {
        match self {
            KvChunk::Float { .. } => None,
            KvChunk::Q8(positions) => Some(positions),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            KvChunk::Float { k, v, .. } => k.len() + v.len(),
            KvChunk::Q8(positions) => positions.bytes(),
        }
    }
}

/// A chunk with the bytes that it holds of the model's budget.
pub struct HeldChunk {
    chunk: KvChunk,
    _held: Held,
}

impl Deref for HeldChunk {
    type Target = KvChunk;
    fn deref(&self) -> &KvChunk {
        &self.chunk
    }
}

impl DerefMut for HeldChunk {
    fn deref_mut(&mut self) -> &mut KvChunk {
        &mut self.chunk
    }
}

/// KV cache of one head. Snapshots share its chunks; [`KvHead::grow`] copies a shared chunk before
/// it is written.
#[derive(Clone, Default)]
pub struct KvHead {
    pub chunks: Vec<Arc<HeldChunk>>,
}

impl KvHead {
    /// Chunks that [`KvHead::grow`] allocates.
    fn missing(&self, past: usize, n: usize) -> usize {
        let written = past / KV_CHUNK..n.div_ceil(KV_CHUNK);
        let shared = |i: &usize| self.chunks.get(*i).is_none_or(|c| Arc::strong_count(c) > 1);
        written.filter(shared).count()
    }

    /// Makes room for positions from `past`, which all before are stored, to below `n`. held: the
    /// bytes of the chunks that this allocates.
    pub fn grow(
        &mut self,
        (past, n): (usize, usize),
        format: KvFormat,
        head_dim: usize,
        held: &mut Held,
    ) -> Result<()> {
        let mut hold = |chunk| {
            let held = held.split(format.chunk_bytes(head_dim));
            Arc::new(HeldChunk { chunk, _held: held })
        };
        for i in past / KV_CHUNK..n.div_ceil(KV_CHUNK) {
            let Some(chunk) = self.chunks.get_mut(i) else {
                self.chunks.push(hold(KvChunk::new(format, head_dim)?));
                continue;
            };
            if Arc::get_mut(chunk).is_none() {
                *chunk = hold(KvChunk::clone(chunk));
            }
        }
        Ok(())
    }
}

/// State of one layer.
pub enum LayerState {
    /// By key head. A region hands each to one thread, which locks it for the time of its chunk.
    Linear(Vec<Mutex<KeyHead>>),
    /// By KV head.
    Full(Vec<KvHead>),
}

impl LayerState {
    fn kv_heads(&mut self) -> &mut [KvHead] {
        match self {
            LayerState::Linear(_) => &mut [],
            LayerState::Full(heads) => heads,
        }
    }
}

impl Clone for LayerState {
    fn clone(&self) -> LayerState {
        match self {
            LayerState::Linear(heads) => {
                LayerState::Linear(heads.iter().map(|h| Mutex::new(lock(h).clone())).collect())
            }
            LayerState::Full(heads) => LayerState::Full(heads.clone()),
        }
    }
}

/// Locks a mutex whose holder cannot leave its data half-changed in a way that matters: after a
/// panic the session that owns it is marked as broken.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// State of all layers after some tokens.
pub struct State {
    pub layers: Vec<LayerState>,
    pub tokens: Vec<i32>,
    held: Held, // all but the chunks of the KV cache
}

impl State {
    /// The state before the first token.
    pub fn new(config: &Config, budget: &Arc<Budget>) -> Result<State> {
        let held = budget.hold(State::fixed_bytes(config))?;
        Ok(State { layers: layers(config).collect(), tokens: Vec::new(), held })
    }

    /// A copy that shares the chunks of the KV cache.
    pub fn copy(&self) -> Result<State> {
        let held = self.held.again()?;
        Ok(State { layers: self.layers.clone(), tokens: self.tokens.clone(), held })
    }

    /// Becomes equal to another state of the same model, whose chunks it shares.
    pub fn set(&mut self, other: &State) {
        self.layers.clone_from(&other.layers);
        self.tokens.clone_from(&other.tokens);
    }

    /// Returns to the state before the first token.
    pub fn reset(&mut self, config: &Config) {
        self.layers.clear();
        self.layers.extend(layers(config));
        self.tokens.clear();
    }

    /// Makes room for `n` tokens in all; an error before any is taken if they exceed the budget.
    pub fn grow(&mut self, n: usize, format: KvFormat, head_dim: usize) -> Result<()> {
        let past = self.tokens.len();
        let heads = self.layers.iter_mut().flat_map(LayerState::kv_heads);
        let missing: usize = heads.map(|head| head.missing(past, n)).sum();
        let mut held = self.held.budget().hold(missing * format.chunk_bytes(head_dim))?;
        let mut heads = self.layers.iter_mut().flat_map(LayerState::kv_heads);
        heads.try_for_each(|head| head.grow((past, n), format, head_dim, &mut held))
    }

    /// Bytes of the recurrent and convolution states.
    pub fn fixed_bytes(config: &Config) -> usize {
        let heads = config.layers_of(LayerType::LinearAttention) * config.linear_num_key_heads;
        heads * KeyHead::bytes_of(config)
    }

    /// Bytes of the KV cache with room for `n` tokens.
    pub fn kv_bytes(config: &Config, format: KvFormat, n: usize) -> usize {
        let heads = config.layers_of(LayerType::FullAttention) * config.num_key_value_heads;
        heads * n.div_ceil(KV_CHUNK) * format.chunk_bytes(config.head_dim)
    }

    /// Adds what is pending to the recurrent states.
    pub fn commit(&mut self) {
        for layer in &mut self.layers {
            if let LayerState::Linear(heads) = layer {
                heads.iter().for_each(|head| lock(head).commit());
            }
        }
    }

    /// Bytes on the heap, shared chunks included.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &LayerState| match layer {
            LayerState::Linear(heads) => heads.iter().map(|h| lock(h).bytes()).sum::<usize>(),
            LayerState::Full(heads) => {
                heads.iter().flat_map(|h| &h.chunks).map(|chunk| chunk.bytes()).sum()
            }
        };
        self.layers.iter().map(layer).sum::<usize>() + 4 * self.tokens.len()
    }
}

fn layers(config: &Config) -> impl Iterator<Item = LayerState> {
    config.layer_types.iter().map(|layer| match layer {
        LayerType::LinearAttention => LayerState::Linear(
            (0..config.linear_num_key_heads).map(|_| Mutex::new(KeyHead::new(config))).collect(),
        ),
        LayerType::FullAttention => {
            LayerState::Full(vec![KvHead::default(); config.num_key_value_heads])
        }
    })
}

impl KeyHead {
    fn bytes_of(config: &Config) -> usize {
        let (d_k, d_v) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let per_key = config.values_per_key();
        let history = config.linear_conv_kernel_dim - 1;
        let conv = 4 * history * (2 * d_k + per_key * d_v);
        conv + PendingKeys::bytes_of(d_k) + per_key * ValueHead::bytes_of(d_k, d_v)
    }

    fn bytes(&self) -> usize {
        let conv: usize = self.conv.iter().map(|c| 4 * c.len()).sum();
        let values: usize = self.values.iter().map(ValueHead::bytes).sum();
        conv + self.pending.bytes() + values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_takes_the_bytes_it_is_planned_with() {
        for format in [KvFormat::F16, KvFormat::F32, KvFormat::Q8] {
            for head_dim in [2, 30, 48, 256] {
                let chunk = KvChunk::new(format, head_dim).unwrap();
                assert_eq!(chunk.bytes(), format.chunk_bytes(head_dim), "{format:?} {head_dim}");
            }
        }
        // Codes of key and value, four scales of the key, one of the value.
        assert_eq!(KvFormat::Q8.chunk_bytes(256), KV_CHUNK * (256 + 256 + 16 + 4));
    }
}
