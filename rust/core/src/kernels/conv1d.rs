//! Causal depthwise convolution over time, then SiLU.
//!
//!     y[t, c] = silu(sum_j taps[j, c] e[t + j, c])
//!
//! where e is the last `kernel - 1` inputs of earlier tokens followed by the inputs x. The last tap
//! meets the current token. No bias.

use super::{activation::silu, load_some, store_some};
use crate::simd::{Isa, LANES};

/// Convolves `tokens` rows of a range of channels and moves the state on.
///
/// taps: [kernel, channels]; state: [kernel - 1, channels], oldest first; x: rows of `x_stride`,
/// of which the first `channels` elements count; y: rows of `y_stride`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn conv1d_silu_isa<S: Isa>(
    s: S,
    channels: usize,
    tokens: usize,
    taps: &[f32],
    state: &mut [f32],
    x: &[f32],
    x_stride: usize,
    y: &mut [f32],
    y_stride: usize,
) {
    let history = state.len() / channels;
    let mut c = 0;
    while c < channels {
        let end = (c + LANES).min(channels);
        for t in 0..tokens {
            let mut sum = s.splat(0.0);
            for j in 0..=history {
                // Row t + j of the state followed by the inputs.
                let input = match (t + j).checked_sub(history) {
                    None => &state[(t + j) * channels..][c..end],
                    Some(row) => &x[row * x_stride..][c..end],
                };
                let tap = load_some(s, &taps[j * channels..][c..end]);
                sum = s.fma(tap, load_some(s, input), sum);
            }
            store_some(s, silu(s, sum), &mut y[t * y_stride..][c..end]);
        }
        c = end;
    }
    for j in 0..history {
        let (to, from) = (j * channels, j + tokens);
        match from.checked_sub(history) {
            None => state.copy_within(from * channels..(from + 1) * channels, to),
            Some(row) => {
                state[to..to + channels].copy_from_slice(&x[row * x_stride..][..channels]);
            }
        }
    }
}
