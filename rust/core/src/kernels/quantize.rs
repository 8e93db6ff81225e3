//! Activations as int8, the way quantised matrix products read them.
//!
//! Each token has one f32 scale (absmax / 127) per group of 32, and the sum of its codes times what
//! formats need. Tokens
//! come in tiles of at most [`TILE_TOKENS`](crate::simd::TILE_TOKENS), and inside a tile the tokens are innermost: rows
//! a power of two apart would evict each other from the cache.

use super::load_some;
use crate::quant::{BLOCK, GROUP, GROUP_STEPS, Group, PAIR_ZEROS, START_ZEROS};
use crate::simd::{Cpu, Isa, Kernel, LANES};

/// Int8 values of a few tokens.
#[derive(Default)]
pub struct QuantTile {
    tokens: usize,
    codes: Vec<[i8; 4]>, // [cols / 4, tokens]
    starts: Vec<i32>,    // [cols / 32, 6, tokens], see START_ZEROS
    pairs: Vec<i32>,     // [cols / 32, 4, tokens], see PAIR_ZEROS
    scales: Vec<f32>,    // [cols / 32, tokens]
    totals: Vec<f32>,    // [cols / 32, tokens], scale times sum
}

/// Neighbouring groups of a tile with M tokens.
#[derive(Clone, Copy)]
pub(super) struct Groups<'a, const M: usize> {
    codes: &'a [[[[i8; 4]; M]; GROUP_STEPS]],
    starts: &'a [[[i32; M]; START_ZEROS.len()]],
    pairs: &'a [[[i32; M]; PAIR_ZEROS.len()]],
    scales: &'a [[f32; M]],
    totals: &'a [[f32; M]],
}

impl<'a, const M: usize> Groups<'a, M> {
    #[inline(always)]
    pub fn get(&self, g: usize) -> Group<'a, M> {
        Group {
            codes: &self.codes[g],
            starts: &self.starts[g],
            pairs: &self.pairs[g],
            scales: &self.scales[g],
            totals: &self.totals[g],
        }
    }

    /// Cuts them into blocks of `n` groups. There is a whole number of blocks.
    #[inline(always)]
    pub fn blocks(self, n: usize) -> impl Iterator<Item = Groups<'a, M>> {
        assert!(self.codes.len().is_multiple_of(n));
        let starts = self.starts.chunks_exact(n).zip(self.pairs.chunks_exact(n));
        let scales = self.scales.chunks_exact(n).zip(self.totals.chunks_exact(n));
        let rest = starts.zip(scales);
        self.codes.chunks_exact(n).zip(rest).map(|(codes, ((starts, pairs), (scales, totals)))| {
            Groups { codes, starts, pairs, scales, totals }
        })
    }
}

impl QuantTile {
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes on the heap for rows of `cols` columns.
    pub fn bytes_of(tokens: usize, cols: usize) -> usize {
        let padded = tokens * cols.next_multiple_of(BLOCK);
        padded + 4 * (START_ZEROS.len() + PAIR_ZEROS.len() + 2) * padded / GROUP
    }

    /// Quantises rows. x: [tokens, cols]; columns are padded with zeros to a whole block.
    pub fn quantize(&mut self, cpu: Cpu, x: &[f32], cols: usize) {
        assert!(cols > 0 && x.len().is_multiple_of(cols));
        self.tokens = x.len() / cols;
        let padded = cols.next_multiple_of(BLOCK) * self.tokens;
        self.codes.resize(padded / 4, [0; 4]);
        self.starts.resize(START_ZEROS.len() * padded / GROUP, 0);
        self.pairs.resize(PAIR_ZEROS.len() * padded / GROUP, 0);
        self.scales.resize(padded / GROUP, 0.0);
        self.totals.resize(padded / GROUP, 0.0);
        cpu.run(Quantize { x, cols, tile: self });
    }

    /// Sum of the squares of each group of a single token. [cols / 32]
    pub(super) fn squares(&self) -> Vec<f32> {
        assert_eq!(self.tokens, 1);
        let groups = self.codes.as_chunks::<GROUP_STEPS>().0.iter().zip(&self.scales);
        groups
            .map(|(codes, scale)| {
                let codes = codes.as_flattened().iter();
                let squares: i32 = codes.map(|code| i32::from(*code) * i32::from(*code)).sum();
                scale * scale * squares as f32
            })
            .collect()
    }

    /// All groups of a tile of exactly M tokens.
    #[inline(always)]
    pub(super) fn groups<const M: usize>(&self) -> Groups<'_, M> {
        assert_eq!(self.tokens, M);
        Groups {
            codes: self.codes.as_chunks::<M>().0.as_chunks().0,
            starts: self.starts.as_chunks().0.as_chunks().0,
            pairs: self.pairs.as_chunks().0.as_chunks().0,
            scales: self.scales.as_chunks().0,
            totals: self.totals.as_chunks().0,
        }
    }
}

/// Two numbers of 16 bits in one of 32.
fn join(low: i32, high: i32) -> i32 {
    low & 0xffff | high << 16
}

struct Quantize<'a> {
    x: &'a [f32],
    cols: usize,
    tile: &'a mut QuantTile,
}

impl Kernel for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let QuantTile { tokens, codes, starts, pairs, scales, totals } = self.tile;
        let tokens = (*tokens).max(1);
        let codes = codes.chunks_exact_mut(GROUP_STEPS * tokens);
        let starts = starts.chunks_exact_mut(START_ZEROS.len() * tokens);
        let starts = starts.zip(pairs.chunks_exact_mut(PAIR_ZEROS.len() * tokens));
        let scales = scales.chunks_exact_mut(tokens).zip(totals.chunks_exact_mut(tokens));
        let groups = codes.zip(starts.zip(scales));
        // All tokens of a group in turn, for their codes share cache lines.
        for (group, (codes, ((starts, pairs), (scales, totals)))) in groups.enumerate() {
            let first = (group * GROUP).min(self.cols);
            for (t, x) in self.x.chunks_exact(self.cols).enumerate() {
                let low = load_some(s, &x[first..]);
                let high = load_some(s, &x[(first + LANES).min(self.cols)..]);
                let largest = s.largest(s.max(s.abs(low), s.abs(high)));
                let inverse = s.splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
                let (low, high) = (s.to_i32(s.mul(low, inverse)), s.to_i32(s.mul(high, inverse)));
                let [early, late] = [s.sum_pairs(low), s.sum_pairs(high)];
                let halves = [early[0] + early[1], late[0] + late[1]];
                let sum = halves[0] + halves[1];
                for (i, sum) in [sum, sum, sum, sum, halves[0], halves[1]].into_iter().enumerate() {
                    starts[i * tokens + t] = -START_ZEROS[i] * sum;
                }
                let both = [early[0] + late[0], early[1] + late[1]];
                for (i, [first, last]) in [both, both, early, late].into_iter().enumerate() {
                    let zero = -PAIR_ZEROS[i];
                    pairs[i * tokens + t] = join(zero * first, zero * last);
                }
                scales[t] = largest / 127.0;
                totals[t] = scales[t] * sum as f32;
                let mut bytes = [[0i8; LANES]; 2];
                s.store_i8(low, &mut bytes[0]);
                s.store_i8(high, &mut bytes[1]);
                for (step, four) in bytes.as_flattened().as_chunks().0.iter().enumerate() {
                    codes[step * tokens + t] = *four;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::random;

    #[test]
    fn codes_scales_and_sums_match_their_definition() {
        for cpu in Cpu::all() {
            for (tokens, cols) in [(1, 1), (1, 64), (2, 31), (3, 160), (4, 256), (5, 97)] {
                let mut x = random(tokens * cols, 3);
                x[0] = 0.0;
                let mut tile = QuantTile::default();
                tile.quantize(cpu, &x, cols);
                for t in 0..tokens {
                    for group in 0..cols.next_multiple_of(BLOCK) / GROUP {
                        let value = |i: usize| if i < cols { x[t * cols + i] } else { 0.0 };
                        let values: Vec<f32> =
                            (0..GROUP).map(|i| value(group * GROUP + i)).collect();
                        let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        let scale = tile.scales[group * tokens + t];
                        assert!((scale - largest / 127.0).abs() <= largest * 1e-6);
                        let (mut sum, mut half) = (0, 0);
                        for (i, v) in values.iter().enumerate() {
                            let step = group * GROUP_STEPS + i / 4;
                            let code = tile.codes[step * tokens + t][i % 4];
                            sum += i32::from(code);
                            half += if i < 16 { i32::from(code) } else { 0 };
                            let error = (v - scale * f32::from(code)).abs();
                            assert!(error <= scale * 0.5001, "{cpu:?} {t} {group} {i}: {v} {code}");
                        }
                        let starts = &tile.starts[group * START_ZEROS.len() * tokens..];
                        for (i, sum) in
                            [8 * sum, 16 * sum, 32 * sum, 128 * sum, 32 * half, 32 * (sum - half)]
                                .into_iter()
                                .enumerate()
                        {
                            assert_eq!(starts[i * tokens + t], -sum);
                        }
                        // By half of the columns and place in a step.
                        let mut sums = [[0; 2]; 2];
                        for i in 0..GROUP {
                            let step = group * GROUP_STEPS + i / 4;
                            let code = tile.codes[step * tokens + t][i % 4];
                            sums[i / 16][i / 2 % 2] += i32::from(code);
                        }
                        let [early, late] = sums;
                        let both = [0, 1].map(|pair| early[pair] + late[pair]);
                        let pairs = &tile.pairs[group * PAIR_ZEROS.len() * tokens..];
                        for (i, (zero, sums)) in
                            [(8, both), (16, both), (32, early), (32, late)].into_iter().enumerate()
                        {
                            let pair = pairs[i * tokens + t];
                            assert_eq!(
                                [pair as i16, (pair >> 16) as i16],
                                sums.map(|sum| (-zero * sum) as i16)
                            );
                        }
                        assert_eq!(scale * sum as f32, tile.totals[group * tokens + t]);
                    }
                }
            }
        }
    }
}
