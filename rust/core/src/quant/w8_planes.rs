//! W8 in two planes: the codes and scales of [`super::w8`], cut into nibbles.
//!
//! The high plane alone is a coarse matrix in half the bytes, with which the rows of a head can be
//! screened; both planes together are W8, to the bit. A matrix is the high plane of all its
//! panels, then the low plane of all its panels. A block (16 rows, 64 columns) is
//!
//!     high   576 bytes, as a block of W4: scales, then code >> 4
//!     low    512 bytes, as the codes of a block of W4: code & 15
//!
//! and weight = scale (16 high + low - 128).

use super::w4::{self, SCALE_BYTES};
use super::w8::{self, W8};
use super::{BLOCK, Group, Packed, add_scaled};
use crate::simd::{Isa, LANES};
use std::ops::Range;

/// Bytes of a block of each plane.
pub const HIGH_BYTES: usize = w4::BLOCK_BYTES;
pub const LOW_BYTES: usize = HIGH_BYTES - SCALE_BYTES;
/// Bytes of a block of both planes.
pub const BLOCK_BYTES: usize = HIGH_BYTES + LOW_BYTES;

pub type High = [u8; HIGH_BYTES];
pub type Low = [u8; LOW_BYTES];

/// Whole panels of a matrix in both planes.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
    pub high: &'a [High],
    pub low: &'a [Low],
}

impl<'a> Planes<'a> {
    /// A whole matrix.
    pub fn new(matrix: &'a [u8]) -> Planes<'a> {
        let (high, low) = matrix.split_at(matrix.len() / BLOCK_BYTES * HIGH_BYTES);
        Planes { high: high.as_chunks().0, low: low.as_chunks().0 }
    }

    /// The panels `panels`, each of `cols` columns.
    pub fn panels(self, panels: Range<usize>, cols: usize) -> Planes<'a> {
        let blocks = cols.div_ceil(BLOCK);
        let range = panels.start * blocks..panels.end * blocks;
        Planes { high: &self.high[range.clone()], low: &self.low[range] }
    }

    /// Rows of these panels, padding included.
    pub fn rows(&self, cols: usize) -> usize {
        self.high.len() / cols.div_ceil(BLOCK) * LANES
    }

    /// The value of a code. row: of the first panel; col: of the block `block`.
    pub fn decode(self, block: usize, row: usize, col: usize) -> f32 {
        let at = col / 8 * 4 * LANES + 4 * row + col % 4;
        let shift = if col % 8 < 4 { 0 } else { 4 };
        let nibble = |byte: u8| byte >> shift & 15;
        let code = nibble(self.high[block][SCALE_BYTES + at]) << 4 | nibble(self.low[block][at]);
        w8::value(&self.high[block], row, col, code)
    }
}

/// Cuts a panel of W8 into its two planes. out: the high blocks, then the low ones.
pub fn split_panel(panel: &[u8], out: &mut [u8]) {
    let (high, low) = out.split_at_mut(out.len() / BLOCK_BYTES * HIGH_BYTES);
    let planes = high.as_chunks_mut::<HIGH_BYTES>().0.iter_mut().zip(low.as_chunks_mut().0);
    for (block, (high, low)) in W8::blocks(panel).iter().zip(planes) {
        let low: &mut Low = low;
        let (scales, codes) = block.split_at(SCALE_BYTES);
        let (high_scales, high) = high.split_at_mut(SCALE_BYTES);
        high_scales.copy_from_slice(scales);
        // Two steps of codes share the bytes of a step of nibbles.
        let steps = codes.as_chunks::<{ 4 * LANES }>().0.as_chunks::<2>().0;
        let nibbles = high.as_chunks_mut().0.iter_mut().zip(low.as_chunks_mut().0);
        for ([first, second], (high, low)) in steps.iter().zip(nibbles) {
            let (high, low): (&mut [u8; 4 * LANES], &mut [u8; 4 * LANES]) = (high, low);
            for i in 0..4 * LANES {
                high[i] = first[i] >> 4 | second[i] & 0xf0;
                low[i] = first[i] & 15 | second[i] << 4;
            }
        }
    }
}

/// Adds the products of group `g` of a block with M tokens, as [`Packed::add`].
#[inline(always)]
pub fn add<S: Isa, const M: usize>(
    s: S,
    (high, low): (&High, &Low),
    g: usize,
    x: Group<'_, M>,
    acc: &mut [S::F; M],
) {
    let scales = w4::scales(s, high, g);
    let (high, _) = high[SCALE_BYTES..].as_chunks().0.as_chunks();
    let (low, _) = low.as_chunks().0.as_chunks();
    let dots = s.dot_planes_group(&high[g], &low[g], x.codes, x.starts_at_128());
    add_scaled(s, dots, scales, x.scales, acc);
}

#[cfg(test)]
mod tests {
    use super::super::{Format, PANEL_ROWS, decode_row, encode_panel_on, panel_bytes};
    use super::*;
    use crate::kernels::testing::random;
    use crate::simd::Cpu;

    #[test]
    fn both_planes_hold_the_numbers_of_w8() {
        for cpu in Cpu::all() {
            for (rows, cols) in [(1, 1), (16, 64), (7, 65), (16, 200), (15, 320)] {
                let mut w = random(rows * cols, 4);
                w[0] = -3.0;
                let mut whole = vec![0; panel_bytes(Format::W8, cols)];
                let mut planes = vec![0xee; panel_bytes(Format::W8Planes, cols)];
                encode_panel_on(cpu, Format::W8, &w, cols, None, &mut whole);
                encode_panel_on(cpu, Format::W8Planes, &w, cols, None, &mut planes);
                for row in 0..PANEL_ROWS {
                    let (mut want, mut got) = (vec![0.0; cols], vec![f32::NAN; cols]);
                    decode_row(Format::W8, &whole, cols, row, &mut want);
                    decode_row(Format::W8Planes, &planes, cols, row, &mut got);
                    assert_eq!(got, want, "{cpu:?} {rows}x{cols} row {row}");
                }
                // Each byte of the layout by its definition.
                let (high, low) = planes.split_at(whole.len() / w8::BLOCK_BYTES * HIGH_BYTES);
                for (b, block) in whole.chunks_exact(w8::BLOCK_BYTES).enumerate() {
                    let (high, low) = (&high[b * HIGH_BYTES..], &low[b * LOW_BYTES..]);
                    assert_eq!(high[..SCALE_BYTES], block[..SCALE_BYTES]);
                    for (i, code) in block[SCALE_BYTES..].iter().enumerate() {
                        let (step, at) = (i / 64, i / 128 * 64 + i % 64);
                        let shift = step % 2 * 4;
                        assert_eq!(high[SCALE_BYTES + at] >> shift & 15, code >> 4);
                        assert_eq!(low[at] >> shift & 15, code & 15);
                    }
                }
            }
        }
    }
}
