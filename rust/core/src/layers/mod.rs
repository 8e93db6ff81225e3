//! The parts of a decoder layer, each over any number of tokens.
//!
//! A layer is a handful of regions (see [`crate::pool`]): all projections of a mixer as one row
//! range, the mixer itself, the output projection with the residual, gate and up with SwiGLU, down
//! with the residual. Norms and the quantisation of a few rows are done by the caller between
//! regions, where they cost less than a region's start.

pub mod attention;
pub mod block;
pub mod gated_delta_net;
pub mod head;
pub mod linear;
pub mod mlp;

use crate::pool::Team;
use crate::simd::Cpu;
use crate::trace::Trace;

/// What every layer needs to work.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub cpu: Cpu,
    pub team: &'a Team<'a>,
    /// Where intermediate values are recorded, if anybody wants them.
    pub trace: Option<&'a Trace>,
}

/// Up to this many tokens the caller prepares a region's input alone; it takes less time than
/// another region.
const FEW_TOKENS: usize = 4;
