//! What a caller may choose about a model.

use crate::layers::head::Head;
use crate::simd::Cpu;
use crate::state::KvFormat;

/// Choices that [`Model::load`](super::Model::load) takes; the default leaves all to the model.
#[derive(Clone, Default)]
pub struct Options {
    /// Positions a session may hold; all that the model has if not given.
    pub context: Option<usize>,
    /// Factor by which YaRN extends the context; what the config says if not given.
    pub yarn: Option<f64>,
    /// Threads, the caller's included; [`crate::threads::default_threads`] if not given.
    pub threads: Option<usize>,
    /// Format of the KV cache; f32 if no weights are quantised, and f16 otherwise if not given.
    pub kv: Option<KvFormat>,
    /// Instruction set; `QDELTA_ISA` or the best of the machine if not given.
    pub cpu: Option<Cpu>,
    /// How sessions find the best tokens.
    pub head: Head,
    /// Bytes that the weights, sessions and snapshots may take together, see [`super::memory`].
    pub memory_limit: Option<usize>,
}
