//! Formats in two planes: the high four bits of codes, and what is left of them, lie apart.
//!
//! The high plane alone is a coarse matrix in fewer bytes, with which the rows of a head can be
//! screened. A matrix is the high plane of all its panels, then the low plane of all its panels. A
//! block (16 rows, 64 columns) is
//!
//!     high   576 bytes, as a block of W4: scales, then the high four bits of the codes
//!     low    the low bits of the codes
//!
//! [`W8Planes`], 8.5 bits a weight: the codes and scales of [`super::w8`]. Both planes together are
//! W8, to the bit. weight = scale (16 high + low - 128), and a low block is
//!
//!     512 bytes, as the codes of a block of W4
//!
//! [`W5Planes`], 5.5 bits a weight: codes of five bits, weight = scale (2 high + low - 16). The scale may
//! be negative: the extreme value of a group takes code 0. A low block is 128 bytes:
//!
//!     2 x 64 B   codes of a group, row r at bytes 4r..4r+4: bit t of byte i is column 4t + i

use super::codes::{self, BytesInPlanes, FiveBitsInPlanes, NIBBLES_BYTES, Nibbles, nibble};
use super::search::Integers;
use super::w4::{self, SCALE_BYTES};
use super::w8::W8;
use super::{
    BLOCK, Format, GROUP, GROUP_STEPS, Group, PANEL_ROWS, Packed, Rows, STEP, with_planes,
};
use crate::simd::{Codes, Isa, Kernel, LANES, Starts};
use std::ops::Range;

/// Bytes of a block of the high plane.
pub const HIGH_BYTES: usize = w4::BLOCK_BYTES;

pub type High = [u8; HIGH_BYTES];

/// A format in two planes, as the kernels see it.
pub trait InPlanes {
    /// Bits of a code in the low plane.
    const LOW_BITS: usize;
    /// Bits of a code, unpacked.
    const BITS: u32 = 4 + Self::LOW_BITS as u32;
    /// Bytes of a block of the low plane.
    const LOW_BYTES: usize = PANEL_ROWS * BLOCK * Self::LOW_BITS / 8;
    type Codes<'a>: Codes<GROUP_STEPS>;

    /// The codes of group `g` of a block.
    fn codes<'a>(block: (&'a High, &'a [u8]), g: usize) -> Self::Codes<'a>;

    /// Adds the products of group `g` of a block with M tokens, as [`Packed::add`].
    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        block: (&High, &[u8]),
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let scales = (w4::scales(s, block.0, g), x.scales);
        s.add_dots(Self::codes(block, g), x.codes, x.starts_at_zero_of(Self::BITS), scales, acc);
    }

    /// The low bits of a code.
    fn low(block: &[u8], row: usize, col: usize) -> u8;
}

pub struct W8Planes;
pub struct W5Planes;

impl InPlanes for W8Planes {
    const LOW_BITS: usize = 4;
    type Codes<'a> = BytesInPlanes<'a>;

    #[inline(always)]
    fn codes<'a>((high, low): (&'a High, &'a [u8]), g: usize) -> BytesInPlanes<'a> {
        let low = Nibbles(&low.as_chunks().0.as_chunks().0[g]);
        BytesInPlanes { high: w4::nibbles(high, g), low }
    }

    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        block: (&High, &[u8]),
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let codes = Self::codes(block, g);
        let scales = w4::scales(s, block.0, g);
        if !S::WIDENS_BYTES {
            return s.add_dots(codes, x.codes, x.starts_at_128(), (scales, x.scales), acc);
        }
        let high = s.dots(codes.high, x.codes, Starts::ZERO);
        let low = s.dots(codes.low, x.codes, x.starts_at_128());
        for m in 0..M {
            // Exact: an integer below 2^24.
            let dot = s.fma(s.to_f32(high[m]), s.splat(16.0), s.to_f32(low[m]));
            acc[m] = s.fma(dot, s.mul(scales, s.splat(x.scales[m])), acc[m]);
        }
    }

    fn low(block: &[u8], row: usize, col: usize) -> u8 {
        nibble(block, row, col)
    }
}

impl InPlanes for W5Planes {
    const LOW_BITS: usize = 1;
    type Codes<'a> = FiveBitsInPlanes<'a>;

    #[inline(always)]
    fn codes<'a>((high, low): (&'a High, &'a [u8]), g: usize) -> FiveBitsInPlanes<'a> {
        FiveBitsInPlanes { high: w4::nibbles(high, g), low: &low.as_chunks().0[g] }
    }

    fn low(block: &[u8], row: usize, col: usize) -> u8 {
        block[col / GROUP * STEP + 4 * row + col % 4] >> (col % GROUP / 4) & 1
    }
}

/// Bytes of a block of both planes. `format` must be in planes.
pub fn block_bytes(format: Format) -> usize {
    HIGH_BYTES + with_planes!(format, P => P::LOW_BYTES)
}

/// Those that are the high plane, of the bytes of whole panels.
pub fn high_bytes(format: Format, bytes: usize) -> usize {
    bytes / block_bytes(format) * HIGH_BYTES
}

/// Whole panels of a matrix in both planes.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
    pub format: Format,
    pub high: &'a [High],
    /// As many blocks.
    pub low: &'a [u8],
}

impl<'a> Planes<'a> {
    /// A whole matrix. `format` must be in planes.
    pub fn new(format: Format, matrix: &'a [u8]) -> Planes<'a> {
        let (high, low) = matrix.split_at(high_bytes(format, matrix.len()));
        Planes { format, high: high.as_chunks().0, low }
    }

    /// The panels `panels`, each of `cols` columns.
    pub fn panels(self, panels: Range<usize>, cols: usize) -> Planes<'a> {
        let blocks = cols.div_ceil(BLOCK);
        let range = panels.start * blocks..panels.end * blocks;
        let size = with_planes!(self.format, P => P::LOW_BYTES);
        let low = &self.low[range.start * size..range.end * size];
        Planes { high: &self.high[range], low, ..self }
    }

    /// The value of a code. row: of the first panel; col: of the block `block`.
    pub fn decode(self, block: usize, row: usize, col: usize) -> f32 {
        let high = &self.high[block];
        let code = nibble(&high[SCALE_BYTES..], row, col);
        let number = with_planes!(self.format, P => {
            let low = P::low(&self.low[block * P::LOW_BYTES..], row, col);
            i32::from(code << P::LOW_BITS | low) - (8 << P::LOW_BITS)
        });
        w4::scale(high, row, col) * number as f32
    }
}

/// Cuts a panel of W8 into the planes of [`W8Planes`]. out: the high blocks, then the low ones.
pub fn split_panel(panel: &[u8], out: &mut [u8]) {
    let (high, low) = out.split_at_mut(high_bytes(Format::W8Planes, out.len()));
    let low = low.chunks_exact_mut(W8Planes::LOW_BYTES);
    let planes = high.as_chunks_mut::<HIGH_BYTES>().0.iter_mut().zip(low);
    for (block, (high, low)) in W8::blocks(panel).iter().zip(planes) {
        let (scales, codes) = block.split_at(SCALE_BYTES);
        let (high_scales, high) = high.split_at_mut(SCALE_BYTES);
        high_scales.copy_from_slice(scales);
        // Two steps of codes share the bytes of a step of nibbles.
        let steps = codes.as_chunks::<STEP>().0.as_chunks::<2>().0;
        let nibbles = high.as_chunks_mut().0.iter_mut().zip(low.as_chunks_mut().0);
        for ([first, second], (high, low)) in steps.iter().zip(nibbles) {
            let (high, low): (&mut [u8; STEP], &mut [u8; STEP]) = (high, low);
            for i in 0..STEP {
                high[i] = first[i] >> 4 | second[i] & 0xf0;
                low[i] = first[i] & 15 | second[i] << 4;
            }
        }
    }
}

/// Quantises up to 16 rows to a panel of [`W5Planes`].
pub(super) struct EncodeFiveBits<'a> {
    pub rows: Rows<'a>,
    /// The high blocks, then the low ones.
    pub out: &'a mut [u8],
}

impl Kernel for EncodeFiveBits<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let (high, low) = self.out.split_at_mut(high_bytes(Format::W5Planes, self.out.len()));
        low.fill(0);
        let low = low.chunks_exact_mut(W5Planes::LOW_BYTES);
        let (mut w, mut weights) = (vec![[0.0; LANES]; BLOCK], vec![1.0; BLOCK]);
        for (b, (high, low)) in high.chunks_exact_mut(HIGH_BYTES).zip(low).enumerate() {
            self.rows.columns(b * BLOCK, &mut w, &mut weights);
            for (g, plane) in low.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
                let code = |q: f32| (q as i32 + 16) as u8;
                let codes =
                    w4::encode_group::<S, Integers<-16, 15>>(s, g, &w, &weights, high, code);
                let nibbles = codes.map(|codes| codes.map(|code| code >> 1));
                let high = &mut high[SCALE_BYTES + g * NIBBLES_BYTES..];
                codes::put(&nibbles, high, codes::join_nibbles);
                for (col, codes) in codes.iter().enumerate() {
                    for (row, code) in codes.iter().enumerate() {
                        plane[4 * row + col % 4] |= (code & 1) << (col / 4);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{decode_row, encode_panel_on, panel_bytes, w8};
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
                    let (high, low) = (&high[b * HIGH_BYTES..], &low[b * W8Planes::LOW_BYTES..]);
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

    #[test]
    fn codes_of_five_bits_lie_where_the_layout_says() {
        let cols = 100;
        let w = random(PANEL_ROWS * cols, 5);
        let mut panel = vec![0xee; panel_bytes(Format::W5Planes, cols)];
        encode_panel_on(Cpu::best(), Format::W5Planes, &w, cols, None, &mut panel);
        assert_eq!(panel.len(), 2 * (576 + 128));
        let (high, low) = panel.split_at(2 * 576);
        for (row, w) in w.chunks_exact(cols).enumerate() {
            let mut got = vec![f32::NAN; cols];
            decode_row(Format::W5Planes, &panel, cols, row, &mut got);
            let mut largest = 0.0f32;
            for (col, (w, got)) in w.iter().zip(&got).enumerate() {
                let (block, at) = (col / BLOCK, col % BLOCK);
                let (high, low) = (&high[576 * block..], &low[128 * block..]);
                let scale = w4::scale(high, row, at);
                let nibble = high[64 + at / 8 * 64 + 4 * row + at % 4] >> (at % 8 / 4 * 4) & 15;
                let bit = low[at / 32 * 64 + 4 * row + at % 4] >> (at % 32 / 4) & 1;
                let number = i32::from(2 * nibble + bit) - 16;
                assert_eq!(*got, scale * number as f32, "row {row} column {col}");
                assert!((w - got).abs() <= 1.3 * scale.abs(), "{w} {got} {scale}");
                largest = largest.max(number.unsigned_abs() as f32);
            }
            assert!(largest >= 15.0, "the extremes of row {row} take the largest codes");
        }
    }
}
