//! Products with matrices in two planes ([`crate::quant::two_planes`]).
//!
//! [`product`] reads both planes: the operations, and so the bits, are those of a format in one plane
//! with the same codes in [`super::matmul`]. [`screen`] reads the high plane only. A code is
//! step high + low with `step` 16 or 2, less the zero 8 step. With the missing bits at the middle
//! of their range, (step - 1) / 2, the estimate of an output is
//!
//!     sum over groups of scale_w scale_x sum(x (step high + middle - 8 step))
//!
//! and its error the sum of scale_w (low - middle) x. Low bits are as good as random and evenly
//! spread, with variance (step^2 - 1) / 12, so that the variance of the error is
//!
//!     (step^2 - 1) / 12 sum over groups of scale_w^2 |x|^2
//!
//! which needs no more than the scales of the high plane.

use super::outputs::Outputs;
use super::quantize::QuantTile;
use super::{AHEAD, Ask, PanelProduct, Reading, ahead_in_panels, ask_ahead};
use crate::quant::two_planes::{HIGH_BYTES, InPlanes, Planes};
use crate::quant::{BLOCK, PANEL_ROWS, w4, with_planes};
use crate::simd::{Cpu, Isa, Kernel};
use std::marker::PhantomData;

/// Product of panels with the tokens of a tile.
///
/// planes: n panels of `cols` columns; y, reading: as for [`super::matmul::packed`].
/// Panics if the lengths disagree or the tokens are more than a few.
pub fn product(
    cpu: Cpu,
    planes: Planes<'_>,
    cols: usize,
    x: &QuantTile,
    reading: Reading,
    y: Outputs<'_>,
) {
    let blocks = blocks_of_a_panel(planes, cols);
    y.check(x.tokens(), planes.high.len() / blocks);
    with_planes!(planes.format, P => {
        cpu.run(Product::<P> { planes, blocks, x, reading, y, format: PhantomData })
    });
}

/// Estimates of a product with one token, and the variances of their errors.
///
/// planes: n panels of `cols` columns; ask: for them, ahead of their use; estimates, variances: [16 n].
/// Panics if the lengths disagree or the tile holds more than one token.
pub fn screen(
    cpu: Cpu,
    planes: Planes<'_>,
    cols: usize,
    x: &QuantTile,
    ask: Ask,
    (estimates, variances): (&mut [f32], &mut [f32]),
) {
    let blocks = blocks_of_a_panel(planes, cols);
    let rows = planes.high.len() / blocks * PANEL_ROWS;
    assert_eq!((estimates.len(), variances.len()), (rows, rows));
    assert_eq!(x.tokens(), 1);
    let low_bits = with_planes!(planes.format, P => P::LOW_BITS);
    let step = (1 << low_bits) as f32;
    cpu.run(Screen { planes, step, blocks, x, ask, estimates, variances });
}

fn blocks_of_a_panel(planes: Planes<'_>, cols: usize) -> usize {
    let blocks = cols.div_ceil(BLOCK);
    let low_bytes = with_planes!(planes.format, P => P::LOW_BYTES);
    assert_eq!(planes.low.len(), planes.high.len() * low_bytes);
    assert!(planes.high.len().is_multiple_of(blocks));
    blocks
}

struct Product<'a, P> {
    planes: Planes<'a>,
    blocks: usize,
    x: &'a QuantTile,
    reading: Reading,
    y: Outputs<'a>,
    format: PhantomData<P>,
}

impl<P: InPlanes> PanelProduct for Product<'_, P> {
    const MANY: bool = false;

    fn size(&self) -> (usize, usize) {
        (self.planes.high.len() / self.blocks, self.x.tokens())
    }

    fn abreast(&self) -> bool {
        self.reading.abreast
    }

    #[inline(always)]
    fn panels<S: Isa, const R: usize, const M: usize>(&mut self, s: S, first: usize, n: usize) {
        let Planes { high, low, .. } = self.planes;
        let (blocks, low_size) = (self.blocks, P::LOW_BYTES);
        let high_panels: [_; R] =
            std::array::from_fn(|r| &high[(first + r.min(n - 1)) * blocks..][..blocks]);
        let mut acc = [[s.splat(0.0); M]; R];
        for (i, x) in self.x.groups::<M>().blocks(2).enumerate().take(blocks) {
            for g in 0..2 {
                for r in 0..n {
                    let panel = first + r;
                    let ask = |plane: &[u8], size: usize| {
                        let from = ahead_in_panels(panel, blocks * size, i * size, n);
                        ask_ahead(s, self.reading.ask, plane, from, size, (g, 2));
                    };
                    ask(high.as_flattened(), HIGH_BYTES);
                    ask(low, low_size);
                    let low_block = &low[(panel * blocks + i) * low_size..][..low_size];
                    P::add(s, (&high_panels[r][i], low_block), g, x.get(g), &mut acc[r]);
                }
            }
        }
        for r in 0..n {
            for m in 0..M {
                self.y.put(s, m, (first + r) * PANEL_ROWS, acc[r][m]);
            }
        }
    }
}

impl<P: InPlanes> Kernel for Product<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        self.product(s);
    }
}

struct Screen<'a> {
    planes: Planes<'a>,
    /// Values of a high nibble's step.
    step: f32,
    blocks: usize,
    x: &'a QuantTile,
    ask: Ask,
    estimates: &'a mut [f32],
    variances: &'a mut [f32],
}

impl Kernel for Screen<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let (step, middle) = (self.step, 0.5 * (self.step - 1.0));
        let low_variance = (step * step - 1.0) / 12.0;
        let squares = self.x.squares();
        let out = self.estimates.as_chunks_mut().0.iter_mut();
        let out = out.zip(self.variances.as_chunks_mut().0);
        let high = self.planes.high;
        let panels = high.chunks_exact(self.blocks).zip(out).enumerate();
        for (p, (panel, (estimates, variances))) in panels {
            let (mut estimate, mut variance) = (s.splat(0.0), s.splat(0.0));
            let groups = self.x.groups::<1>().blocks(2);
            let blocks = panel.iter().zip(groups).zip(squares.as_chunks::<2>().0);
            for (i, ((block, x), squares)) in blocks.enumerate() {
                let from = (p * self.blocks + i) * HIGH_BYTES + AHEAD;
                for g in 0..2 {
                    ask_ahead(s, self.ask, high.as_flattened(), from, HIGH_BYTES, (g, 2));
                    let x = x.get(g);
                    let scales = w4::scales(s, block, g);
                    let [dots] = w4::dots(s, block, g, x);
                    let middle = s.splat(-middle / (8.0 * step) * x.starts_at_8().sums[0] as f32);
                    let dots = s.add(s.to_f32(dots), middle);
                    let scale = s.mul(scales, s.splat(x.scales[0]));
                    estimate = s.fma(dots, scale, estimate);
                    variance = s.fma(s.mul(scales, scales), s.splat(squares[g]), variance);
                }
            }
            s.store(s.mul(estimate, s.splat(step)), estimates);
            s.store(s.mul(variance, s.splat(low_variance)), variances);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, random};
    use crate::quant::{Format, GROUP, decode_row, encode_panel_on, panel_bytes};

    /// Formats, bytes of low bits of both codes in the middle, and the variance of low bits.
    const FORMATS: [(Format, [u8; 2], f64); 2] =
        [(Format::W8Planes, [0x77, 0x88], 21.25), (Format::W5Planes, [0x00, 0xff], 0.25)];

    /// The planes of 16 random rows.
    fn panel(cpu: Cpu, format: Format, w: &[f32], cols: usize) -> Vec<u8> {
        let mut out = vec![0; panel_bytes(format, cols)];
        encode_panel_on(cpu, format, w, cols, None, &mut out);
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
        for (cpu, (format, middle, low_variance)) in
            Cpu::all().into_iter().flat_map(|cpu| FORMATS.map(|format| (cpu, format)))
        {
            for cols in [1, 31, 64, 100, 1024] {
                let bytes = panel(cpu, format, &random(PANEL_ROWS * cols, 20), cols);
                let x = random(cols, 21);
                let mut tile = QuantTile::default();
                tile.quantize(cpu, &x, cols);
                let mut out = [[f32::NAN; PANEL_ROWS]; 2];
                let [estimates, variances] = &mut out;
                screen(
                    cpu,
                    Planes::new(format, &bytes),
                    cols,
                    &tile,
                    Ask::Once,
                    (estimates, variances),
                );

                // With the low bits just below and above the middle the mean of both products is the
                // estimate.
                let high = cols.div_ceil(BLOCK) * HIGH_BYTES;
                let x = rounded(&x);
                let mut row = vec![0.0; cols];
                let mut sides = middle.map(|low| {
                    let mut bytes = bytes.clone();
                    bytes[high..].fill(low);
                    bytes
                });
                let mut want = [[0.0; PANEL_ROWS]; 2];
                let mut size = [0.0; PANEL_ROWS];
                for r in 0..PANEL_ROWS {
                    for side in &mut sides {
                        decode_row(format, side, cols, r, &mut row);
                        for (w, x) in row.iter().zip(&x) {
                            want[0][r] += 0.5 * f64::from(*w) * x;
                            size[r] += (f64::from(*w) * x).abs();
                        }
                    }
                    // The two sides are a scale apart.
                    let mut other = vec![0.0; cols];
                    decode_row(format, &sides[0], cols, r, &mut other);
                    for ((w, other), x) in row.iter().zip(&other).zip(&x) {
                        want[1][r] += low_variance * (f64::from(w - other) * x).powi(2);
                    }
                }
                let epsilon = f64::from(f32::EPSILON) * (cols as f64 + 8.0);
                let what = format!("{cpu:?} {format:?} {cols}");
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
        for (format, ..) in FORMATS {
            let (mut sum, mut largest) = (0.0, 0.0f32);
            for p in 0..panels {
                let bytes = panel(cpu, format, &random(PANEL_ROWS * cols, 23 + p), cols);
                let planes = Planes::new(format, &bytes);
                let mut y = [0.0; PANEL_ROWS];
                product(cpu, planes, cols, &tile, Reading::PLAIN, Outputs::of(&mut y, PANEL_ROWS));
                let (mut estimates, mut variances) = ([0.0; PANEL_ROWS], [0.0; PANEL_ROWS]);
                screen(cpu, planes, cols, &tile, Ask::Once, (&mut estimates, &mut variances));
                for ((y, estimate), variance) in y.iter().zip(estimates).zip(variances) {
                    let sigmas = (y - estimate) / variance.sqrt();
                    sum += sigmas * sigmas;
                    largest = largest.max(sigmas.abs());
                }
            }
            // Of 2000 squares with mean 1 and variance 2, the mean is within 5 of its deviations.
            let n = (panels as usize * PANEL_ROWS) as f32;
            assert!((sum / n - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{format:?} {}", sum / n);
            assert!(largest < 6.0, "{format:?} {largest}");
        }
    }
}
