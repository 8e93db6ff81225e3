//! Causal depthwise convolution over time, then SiLU.
//!
//!     y[t, c] = silu(sum_j taps[j, c] e[t + j, c])
//!
//! where e is the last `kernel - 1` inputs of earlier tokens followed by the inputs x. The last tap
//! meets the current token. No bias.

use super::{Columns, ColumnsMut, activation::silu, load_some, store_some};
use crate::simd::{Isa, LANES};

/// Convolves `tokens` rows of some channels and moves the state on.
///
/// taps: [kernel, channels]; state: [kernel - 1, channels], oldest first; x, y: [tokens.., channels].
#[inline(always)]
pub fn conv1d_silu_isa<S: Isa>(
    s: S,
    tokens: usize,
    taps: &[f32],
    state: &mut [f32],
    x: Columns<'_>,
    y: ColumnsMut<'_>,
) {
    assert_eq!(x.width, y.width);
    if state.len() == 3 * x.width {
        four_taps(s, tokens, taps, state, x, y);
    } else {
        any_kernel(s, tokens, taps, state, x, y);
    }
}

/// As [`conv1d_silu_isa`], for a kernel of four, which every released model has: its window of inputs stays
/// in registers.
#[inline(always)]
fn four_taps<S: Isa>(
    s: S,
    tokens: usize,
    taps: &[f32],
    state: &mut [f32],
    x: Columns<'_>,
    mut y: ColumnsMut<'_>,
) {
    let channels = x.width;
    let mut c = 0;
    while c < channels {
        let end = (c + LANES).min(channels);
        let tap = |j: usize| load_some(s, &taps[j * channels..][c..end]);
        let (first, second, third, last) = (tap(0), tap(1), tap(2), tap(3));
        let before = |j: usize| load_some(s, &state[j * channels..][c..end]);
        let (mut x3, mut x2, mut x1) = (before(0), before(1), before(2));
        for t in 0..tokens {
            let row = x.part(t, c..end);
            // For the next channels: rows of a prompt lie too far apart for the hardware to follow.
            s.prefetch(row, LANES * size_of::<f32>());
            let x0 = load_some(s, row);
            let sum = s.fma(first, x3, s.splat(0.0));
            let sum = s.fma(last, x0, s.fma(third, x1, s.fma(second, x2, sum)));
            (x3, x2, x1) = (x2, x1, x0);
            store_some(s, silu(s, sum), y.part(t, c..end));
        }
        for (j, x) in [x3, x2, x1].into_iter().enumerate() {
            store_some(s, x, &mut state[j * channels..][c..end]);
        }
        c = end;
    }
}

/// As [`conv1d_silu_isa`], for any kernel.
#[inline(always)]
fn any_kernel<S: Isa>(
    s: S,
    tokens: usize,
    taps: &[f32],
    state: &mut [f32],
    x: Columns<'_>,
    mut y: ColumnsMut<'_>,
) {
    let channels = x.width;
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
                    Some(row) => x.part(row, c..end),
                };
                let tap = load_some(s, &taps[j * channels..][c..end]);
                sum = s.fma(tap, load_some(s, input), sum);
            }
            store_some(s, silu(s, sum), y.part(t, c..end));
        }
        c = end;
    }
    for j in 0..history {
        let (to, from) = (j * channels, j + tokens);
        match from.checked_sub(history) {
            None => state.copy_within(from * channels..(from + 1) * channels, to),
            Some(row) => {
                state[to..to + channels].copy_from_slice(x.part(row, 0..channels));
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
            let x = Columns { data: x, width: channels, stride: channels + 3 };
            let [ya, yb] =
                [ya, yb].map(|data| ColumnsMut { data, width: channels, stride: channels + 1 });
            conv1d_silu_isa(s, tokens, taps, a, x, ya);
            any_kernel(s, tokens, taps, b, x, yb);
        }
    }

    #[test]
    fn four_taps_have_the_bits_of_any_kernel() {
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
