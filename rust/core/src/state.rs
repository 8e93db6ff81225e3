//! What a session remembers of its tokens: data only.

use crate::error::Result;
use crate::kernels::attention_q8::Q8Positions;
use crate::kernels::delta_rule::{PendingKeys, ValueHead};
use crate::model::config::{Config, LayerType};
use crate::quant::Format;
use crate::simd::LANES;
use crate::tensor::filled;
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
            pending: PendingKeys::default(),
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

    fn bytes(&self) -> usize {
        match self {
            KvChunk::Float { k, v, .. } => k.len() + v.len(),
            KvChunk::Q8(positions) => positions.bytes(),
        }
    }
}

/// KV cache of one head. Snapshots share its chunks; a chunk is copied when it is written while
/// shared.
#[derive(Clone, Default)]
pub struct KvHead {
    pub chunks: Vec<Arc<KvChunk>>,
}

impl KvHead {
    /// Makes room for positions below `n`.
    pub fn grow(&mut self, n: usize, format: KvFormat, head_dim: usize) -> Result<()> {
        while self.chunks.len() * KV_CHUNK < n {
            self.chunks.push(Arc::new(KvChunk::new(format, head_dim)?));
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
#[derive(Clone)]
pub struct State {
    pub layers: Vec<LayerState>,
    pub tokens: Vec<i32>,
}

impl State {
    /// The state before the first token.
    pub fn new(config: &Config) -> State {
        let layers = config.layer_types.iter().map(|layer| match layer {
            LayerType::LinearAttention => LayerState::Linear(
                (0..config.linear_num_key_heads)
                    .map(|_| Mutex::new(KeyHead::new(config)))
                    .collect(),
            ),
            LayerType::FullAttention => {
                LayerState::Full(vec![KvHead::default(); config.num_key_value_heads])
            }
        });
        State { layers: layers.collect(), tokens: Vec::new() }
    }

    /// Makes room for `n` tokens in all.
    pub fn grow(&mut self, n: usize, format: KvFormat, head_dim: usize) -> Result<()> {
        for layer in &mut self.layers {
            if let LayerState::Full(heads) = layer {
                for head in heads {
                    head.grow(n, format, head_dim)?;
                }
            }
        }
        Ok(())
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

impl KeyHead {
    fn bytes(&self) -> usize {
        let conv: usize = self.conv.iter().map(|c| 4 * c.len()).sum();
        conv + self.values.iter().map(ValueHead::bytes).sum::<usize>()
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
