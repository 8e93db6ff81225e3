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
    // The kernel of every released model: its window of inputs stays in registers.
    if state.len() == 3 * channels {
        windows::<S, 3>(s, channels, tokens, taps, state, x, x_stride, y, y_stride);
    } else {
        any_kernel(s, channels, tokens, taps, state, x, x_stride, y, y_stride);
    }
}

/// As [`conv1d_silu_isa`], for a kernel of `HISTORY` + 1.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn windows<S: Isa, const HISTORY: usize>(
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
    let mut c = 0;
    while c < channels {
        let end = (c + LANES).min(channels);
        let mut tap = [s.splat(0.0); HISTORY];
        let mut window = [s.splat(0.0); HISTORY];
        for j in 0..HISTORY {
            tap[j] = load_some(s, &taps[j * channels..][c..end]);
            window[j] = load_some(s, &state[j * channels..][c..end]);
        }
        let last_tap = load_some(s, &taps[HISTORY * channels..][c..end]);
        for t in 0..tokens {
            let input = load_some(s, &x[t * x_stride..][c..end]);
            let mut sum = s.splat(0.0);
            for j in 0..HISTORY {
                sum = s.fma(tap[j], window[j], sum);
            }
            sum = s.fma(last_tap, input, sum);
            for j in 1..HISTORY {
                window[j - 1] = window[j];
            }
            window[HISTORY - 1] = input;
            store_some(s, silu(s, sum), &mut y[t * y_stride..][c..end]);
        }
        for j in 0..HISTORY {
            store_some(s, window[j], &mut state[j * channels..][c..end]);
        }
        c = end;
    }
}

/// As [`conv1d_silu_isa`], for any kernel.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn any_kernel<S: Isa>(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::random;
    use crate::simd::{Cpu, Kernel};

    struct Both<'a> {
        channels: usize,
        tokens: usize,
        taps: &'a [f32],
        x: &'a [f32],
        states: [&'a mut [f32]; 2],
        ys: [&'a mut [f32]; 2],
    }

    impl Kernel for Both<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Isa>(self, s: S) {
            let Both { channels, tokens, taps, x, states: [a, b], ys: [ya, yb] } = self;
            let (x_stride, y_stride) = (channels + 3, channels + 1);
            conv1d_silu_isa(s, channels, tokens, taps, a, x, x_stride, ya, y_stride);
            any_kernel(s, channels, tokens, taps, b, x, x_stride, yb, y_stride);
        }
    }

    #[test]
    fn windows_have_the_bits_of_any_kernel() {
        for cpu in Cpu::all() {
            for (channels, tokens) in [(1, 1), (16, 2), (20, 3), (128, 1), (48, 7)] {
                let (taps, x) = (random(4 * channels, 1), random(tokens * (channels + 3), 2));
                let mut states = [(); 2].map(|()| random(3 * channels, 3));
                let mut ys = [(); 2].map(|()| vec![0.5; tokens * (channels + 1)]);
                let [a, b] = &mut states;
                let [ya, yb] = &mut ys;
                let (taps, x) = (&taps[..], &x[..]);
                cpu.run(Both { channels, tokens, taps, x, states: [a, b], ys: [ya, yb] });
                assert_eq!(states[0], states[1], "{cpu:?} {channels}x{tokens}");
                assert_eq!(ys[0], ys[1], "{cpu:?} {channels}x{tokens}");
            }
        }
    }
}
