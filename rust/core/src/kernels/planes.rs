//! Products with W8 in two planes ([`crate::quant::w8_planes`]).
//!
//! [`product`] reads both planes: the operations, and so the bits, are those of W8 in
//! [`super::matmul`]. [`screen`] reads the high plane only. With the missing nibble at the middle
//! of its range the estimate of an output is
//!
//!     sum over groups of scale_w scale_x sum(x (16 high + 7.5 - 128))
//!
//! and its error the sum of scale_w (low - 7.5) x. Low nibbles are as good as random and evenly
//! spread, with variance (16^2 - 1) / 12, so that the variance of the error is
//!
//!     21.25 sum over groups of scale_w^2 |x|^2
//!
//! which needs no more than the scales of the high plane.

use super::quantize::QuantTile;
use super::{ask_ahead, run_tile};
use crate::quant::w8_planes::{self, HIGH_BYTES, LOW_BYTES, Planes};
use crate::quant::{BLOCK, PANEL_ROWS, w4};
use crate::simd::{Cpu, Isa, Kernel};

/// Values of a high nibble's step, and the middle of the low nibble.
const STEP: f32 = 16.0;
const MIDDLE: f32 = 7.5;
/// Variance of a low nibble.
const VARIANCE: f32 = 21.25;

/// Product of whole panels with the tokens of a tile.
///
/// planes: n panels of `cols` columns; y: [tokens, 16 n]; ahead: as for [`super::matmul::packed`].
/// Panics if the lengths disagree or the tile holds more tokens than the instruction set takes.
pub fn product(
    cpu: Cpu,
    planes: Planes<'_>,
    cols: usize,
    x: &QuantTile,
    ahead: bool,
    y: &mut [f32],
) {
    let blocks = blocks_of_a_panel(planes, cols);
    assert_eq!(y.len(), planes.high.len() / blocks * PANEL_ROWS * x.tokens());
    cpu.run(Product { planes, blocks, x, ahead, y });
}

/// Estimates of a product with one token, and the variances of their errors.
///
/// planes: n panels of `cols` columns; estimates, variances: [16 n].
pub fn screen(
    cpu: Cpu,
    planes: Planes<'_>,
    cols: usize,
    x: &QuantTile,
    (estimates, variances): (&mut [f32], &mut [f32]),
) {
    let blocks = blocks_of_a_panel(planes, cols);
    let rows = planes.high.len() / blocks * PANEL_ROWS;
    assert_eq!((estimates.len(), variances.len()), (rows, rows));
    assert_eq!(x.tokens(), 1);
    cpu.run(Screen { planes, blocks, x, estimates, variances });
}

fn blocks_of_a_panel(planes: Planes<'_>, cols: usize) -> usize {
    let blocks = cols.div_ceil(BLOCK);
    assert!(planes.high.len() == planes.low.len() && planes.high.len().is_multiple_of(blocks));
    blocks
}

struct Product<'a> {
    planes: Planes<'a>,
    blocks: usize,
    x: &'a QuantTile,
    ahead: bool,
    y: &'a mut [f32],
}

impl Product<'_> {
    #[inline(always)]
    fn tile<S: Isa, const M: usize>(self, s: S) {
        let width = self.y.len() / M;
        let Planes { high, low } = self.planes;
        let panels = high.chunks_exact(self.blocks).zip(low.chunks_exact(self.blocks));
        for (p, (high_panel, low_panel)) in panels.enumerate() {
            let mut acc = [s.splat(0.0); M];
            let blocks = high_panel.iter().zip(low_panel).zip(self.x.groups::<M>().blocks(2));
            for (i, (block, x)) in blocks.enumerate() {
                let at = p * self.blocks + i;
                for g in 0..2 {
                    // One token is so little work that a core runs ahead by itself.
                    if self.ahead && M > 1 {
                        ask_ahead(s, high.as_flattened(), at * HIGH_BYTES, HIGH_BYTES, (g, 2));
                        ask_ahead(s, low.as_flattened(), at * LOW_BYTES, LOW_BYTES, (g, 2));
                    }
                    w8_planes::add(s, block, g, x.get(g), &mut acc);
                }
            }
            for m in 0..M {
                let y = &mut self.y[m * width + p * PANEL_ROWS..];
                s.store(acc[m], y.first_chunk_mut().expect("a panel of outputs is there"));
            }
        }
    }
}

impl Kernel for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        run_tile!(self, s, S)
    }
}

struct Screen<'a> {
    planes: Planes<'a>,
    blocks: usize,
    x: &'a QuantTile,
    estimates: &'a mut [f32],
    variances: &'a mut [f32],
}

impl Kernel for Screen<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let squares = self.x.squares();
        let out = self.estimates.as_chunks_mut().0.iter_mut();
        let out = out.zip(self.variances.as_chunks_mut().0);
        for (panel, (estimates, variances)) in self.planes.high.chunks_exact(self.blocks).zip(out) {
            let (mut estimate, mut variance) = (s.splat(0.0), s.splat(0.0));
            let groups = self.x.groups::<1>().blocks(2);
            let blocks = panel.iter().zip(groups).zip(squares.as_chunks::<2>().0);
            for ((block, x), squares) in blocks {
                for g in 0..2 {
                    let x = x.get(g);
                    let scales = w4::scales(s, block, g);
                    let [dots] = w4::dots(s, block, g, x);
                    let middle = s.splat(-MIDDLE / (8.0 * STEP) * x.starts_at_8()[0] as f32);
                    let dots = s.add(s.to_f32(dots), middle);
                    let scale = s.mul(scales, s.splat(x.scales[0]));
                    estimate = s.fma(dots, scale, estimate);
                    variance = s.fma(s.mul(scales, scales), s.splat(squares[g]), variance);
                }
            }
            s.store(s.mul(estimate, s.splat(STEP)), estimates);
            s.store(s.mul(variance, s.splat(VARIANCE)), variances);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, random};
    use crate::quant::{Format, GROUP, decode_row, encode_panel_on, panel_bytes};

    /// The planes of 16 random rows.
    fn panel(cpu: Cpu, w: &[f32], cols: usize) -> Vec<u8> {
        let mut out = vec![0; panel_bytes(Format::W8Planes, cols)];
        encode_panel_on(cpu, Format::W8Planes, w, cols, None, &mut out);
        out
    }

    /// The activations as a tile holds them, by definition.
    fn rounded(x: &[f32]) -> Vec<f64> {
        let group = |x: &[f32]| {
            let scale = f64::from(x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0);
            let code = |x: &f32| if scale > 0.0 { (f64::from(*x) / scale).round() } else { 0.0 };
            x.iter().map(|x| code(x) * scale).collect::<Vec<_>>()
        };
        x.chunks(GROUP).flat_map(group).collect()
    }

    #[test]
    fn estimates_and_variances_match_their_definition() {
        for cpu in Cpu::all() {
            for cols in [1, 31, 64, 100, 1024] {
                let bytes = panel(cpu, &random(PANEL_ROWS * cols, 20), cols);
                let x = random(cols, 21);
                let mut tile = QuantTile::default();
                tile.quantize(cpu, &x, cols);
                let mut out = [[f32::NAN; PANEL_ROWS]; 2];
                let [estimates, variances] = &mut out;
                screen(cpu, Planes::new(&bytes), cols, &tile, (estimates, variances));

                // With the low nibbles at 7 and at 8 the mean of both products is the estimate.
                let high = cols.div_ceil(BLOCK) * HIGH_BYTES;
                let x = rounded(&x);
                let mut row = vec![0.0; cols];
                let mut sides = [0x77, 0x88].map(|nibbles| {
                    let mut bytes = bytes.clone();
                    bytes[high..].fill(nibbles);
                    bytes
                });
                let mut want = [[0.0; PANEL_ROWS]; 2];
                let mut size = [0.0; PANEL_ROWS];
                for r in 0..PANEL_ROWS {
                    for side in &mut sides {
                        decode_row(Format::W8Planes, side, cols, r, &mut row);
                        for (w, x) in row.iter().zip(&x) {
                            want[0][r] += 0.5 * f64::from(*w) * x;
                            size[r] += (f64::from(*w) * x).abs();
                        }
                    }
                    // The two sides are a scale apart.
                    let mut other = vec![0.0; cols];
                    decode_row(Format::W8Planes, &sides[0], cols, r, &mut other);
                    for ((w, other), x) in row.iter().zip(&other).zip(&x) {
                        want[1][r] += 21.25 * (f64::from(w - other) * x).powi(2);
                    }
                }
                let epsilon = f64::from(f32::EPSILON) * (cols as f64 + 8.0);
                let what = format!("{cpu:?} {cols}");
                assert_close(&out[0], &want[0], |r| epsilon * size[r] + 1e-12, &what);
                // w - other loses the bits that both codes have in common.
                let bound = |r: usize| (epsilon + 1e-4) * want[1][r] + 1e-12;
                assert_close(&out[1], &want[1], bound, &what);
            }
        }
    }

    #[test]
    fn errors_are_as_large_as_their_variance_says() {
        let (cpu, cols, panels) = (Cpu::best(), 512, 125);
        let mut tile = QuantTile::default();
        tile.quantize(cpu, &random(cols, 22), cols);
        let (mut sum, mut largest) = (0.0, 0.0f32);
        for p in 0..panels {
            let bytes = panel(cpu, &random(PANEL_ROWS * cols, 23 + p), cols);
            let planes = Planes::new(&bytes);
            let mut y = [0.0; PANEL_ROWS];
            product(cpu, planes, cols, &tile, true, &mut y);
            let (mut estimates, mut variances) = ([0.0; PANEL_ROWS], [0.0; PANEL_ROWS]);
            screen(cpu, planes, cols, &tile, (&mut estimates, &mut variances));
            for ((y, estimate), variance) in y.iter().zip(estimates).zip(variances) {
                let sigmas = (y - estimate) / variance.sqrt();
                sum += sigmas * sigmas;
                largest = largest.max(sigmas.abs());
            }
        }
        // Of 2000 squares with mean 1 and variance 2, the mean is within 5 of its deviations.
        let n = (panels as usize * PANEL_ROWS) as f32;
        assert!((sum / n - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{}", sum / n);
        assert!(largest < 6.0, "{largest}");
    }
}
