//! Formats whose scales have a unit for each row: the scale of a group is a signed byte times an f32
//! of the row. A quarter of a bit a weight less than an f16 for each group, with the same error.
//!
//! A panel (16 rows) is
//!
//!     16 x f32       units of rows 0..16
//!     blocks of four groups, in column order
//!
//! and a block (16 rows, 128 columns)
//!
//!     4 x 16 B       factors: of group 0 rows 0..16, of group 1 ...
//!     4 groups of    codes
//!
//! [`W4R`], 4.25 bits a weight: weight = unit (factor (code - 8)), the codes in the order of W4; a
//! block is 1088 bytes. The factor may be negative: the extreme value of a group takes code 0.
//!
//! [`W4NlR`], 4.25 bits: weight = unit (factor TABLE\[code\]), with a [`TABLE`] that is finer around
//! zero, where most weights are.
//!
//! [`W5R`], 5.25 bits: weight = unit (factor (code - 16)) with codes of five bits in the order of
//! [`super::codes`]; a block is 1344 bytes.
//!
//! The sums of a product are multiplied with the units once, when a panel has been read.

use super::codes::{self, FIVE_BITS_BYTES, FiveBits, NIBBLES_BYTES, Nibbles, Tabled, nibble};
use super::search::{self, Entries, Integers, Numbers, Table};
use super::w4_nl;
use super::{GROUP, GROUP_STEPS, Group, Layout, Packed, Rows, UnpackedGroup};
use crate::simd::{Codes, Isa, Kernel, LANES, unpack};
use std::marker::PhantomData;

/// Bytes of the units at the start of a panel.
pub const UNIT_BYTES: usize = 4 * LANES;
const GROUPS: usize = 4;
/// Columns of a block.
pub const BLOCK_COLS: usize = GROUPS * GROUP;
/// Bytes of the factors at the start of a block.
const FACTOR_BYTES: usize = GROUPS * LANES;

const W4R_BYTES: usize = FACTOR_BYTES + GROUPS * NIBBLES_BYTES;
const W5R_BYTES: usize = FACTOR_BYTES + GROUPS * FIVE_BITS_BYTES;

pub type W4R = RowScaled<Fours, W4R_BYTES>;
pub type W4NlR = RowScaled<Places, W4R_BYTES>;
pub type W5R = RowScaled<Fives, W5R_BYTES>;

/// N: bytes of a block.
pub struct RowScaled<C, const N: usize>(PhantomData<C>);

/// How the codes of a group lie, and what they stand for.
trait GroupCodes {
    /// Bytes of the codes of a group.
    const BYTES: usize;
    type Codes<'a>: Codes<GROUP_STEPS>;
    type Numbers: Numbers;

    /// As the kernels see them.
    fn codes(bytes: &[u8]) -> Self::Codes<'_>;

    /// What a code stands for.
    fn number(codes: &[u8], row: usize, col: usize) -> f32;

    /// The code of a number.
    fn code(number: f32) -> u8;

    /// Puts the codes of a group in their order.
    fn put(codes: &[[u8; LANES]; GROUP], out: &mut [u8]);
}

/// The values of W4NlR's codes. Of all tables of 16 integers of six bits that a search from that of
/// IQ4_NL found, this left the least error in sum on trained, normal and Student-t weights. With zero
/// at 32 they are codes of six bits, which AVX2 multiplies at twice the rate of codes of a byte.
pub const TABLE: [i8; 16] = [-32, -27, -21, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 21, 27];
const BYTES: [u8; 16] = w4_nl::bytes(&TABLE, 32);

pub struct Fours;
pub struct Places;
pub struct Fives;

impl GroupCodes for Fours {
    const BYTES: usize = NIBBLES_BYTES;
    type Codes<'a> = Nibbles<'a>;
    type Numbers = Integers<-8, 7>;

    #[inline(always)]
    fn codes(bytes: &[u8]) -> Nibbles<'_> {
        Nibbles(bytes.as_chunks().0.first_chunk().expect("four steps"))
    }

    fn number(codes: &[u8], row: usize, col: usize) -> f32 {
        f32::from(nibble(codes, row, col)) - 8.0
    }

    fn code(number: f32) -> u8 {
        (number as i32 + 8) as u8
    }

    fn put(codes: &[[u8; LANES]; GROUP], out: &mut [u8]) {
        codes::put(codes, out, codes::join_nibbles);
    }
}

impl Entries for Places {
    const TABLE: [i8; 16] = TABLE;
}

impl GroupCodes for Places {
    const BYTES: usize = NIBBLES_BYTES;
    type Codes<'a> = Tabled<'a, 6>;
    type Numbers = Table<Places>;

    #[inline(always)]
    fn codes(bytes: &[u8]) -> Tabled<'_, 6> {
        Tabled { table: &BYTES, places: Fours::codes(bytes) }
    }

    fn number(codes: &[u8], row: usize, col: usize) -> f32 {
        f32::from(TABLE[usize::from(nibble(codes, row, col))])
    }

    fn code(number: f32) -> u8 {
        Places::place(number)
    }

    fn put(codes: &[[u8; LANES]; GROUP], out: &mut [u8]) {
        Fours::put(codes, out);
    }
}

impl GroupCodes for Fives {
    const BYTES: usize = FIVE_BITS_BYTES;
    type Codes<'a> = FiveBits<'a>;
    type Numbers = Integers<-16, 15>;

    #[inline(always)]
    fn codes(bytes: &[u8]) -> FiveBits<'_> {
        FiveBits(bytes.as_chunks().0.first_chunk().expect("five steps"))
    }

    fn number(codes: &[u8], row: usize, col: usize) -> f32 {
        f32::from(codes::five_bits(codes, row, col)) - 16.0
    }

    fn code(number: f32) -> u8 {
        (number as i32 + 16) as u8
    }

    fn put(codes: &[[u8; LANES]; GROUP], out: &mut [u8]) {
        codes::put(codes, out, codes::join_five_bits);
    }
}

/// The factors of group `g` of a block, a row a lane.
#[inline(always)]
fn factors<S: Isa>(s: S, block: &[u8], g: usize) -> S::F {
    s.load_i8(&block.as_chunks().0[g])
}

impl<C: GroupCodes, const N: usize> Packed for RowScaled<C, N> {
    type Block = [u8; N];
    const GROUPS: usize = GROUPS;
    const HEAD_BYTES: usize = UNIT_BYTES;
    const LAYOUT: Option<Layout> = Some(Layout::Scaled { bits: <C::Codes<'static>>::BITS });

    #[inline(always)]
    fn blocks(panel: &[u8]) -> &[Self::Block] {
        panel[UNIT_BYTES..].as_chunks().0
    }

    fn blocks_mut(panel: &mut [u8]) -> &mut [Self::Block] {
        panel[UNIT_BYTES..].as_chunks_mut().0
    }

    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        block: &Self::Block,
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let codes = C::codes(&block[FACTOR_BYTES + g * C::BYTES..][..C::BYTES]);
        let starts = x.starts_at_zero_of(<C::Codes<'static>>::BITS);
        s.add_dots(codes, x.codes, starts, (factors(s, block, g), x.scales), acc);
    }

    #[inline(always)]
    fn end<S: Isa, const M: usize>(s: S, panel: &[u8], acc: &mut [S::F; M]) {
        let units = s.load_f32(panel.first_chunk().expect("units are there"));
        for m in 0..M {
            acc[m] = s.mul(acc[m], units);
        }
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let codes = C::codes(&block[FACTOR_BYTES + g * C::BYTES..][..C::BYTES]);
        out.put(s, unpack(s, codes), [factors(s, block, g)]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let (g, col) = (col / GROUP, col % GROUP);
        let factor = f32::from(block[g * LANES + row] as i8);
        factor * C::number(&block[FACTOR_BYTES + g * C::BYTES..], row, col)
    }

    fn unit(panel: &[u8], row: usize) -> f32 {
        f32::from_le_bytes(panel.as_chunks().0[row])
    }
}

/// Quantises up to 16 rows to a panel.
pub(super) struct EncodeRows<'a, P> {
    pub rows: Rows<'a>,
    pub out: &'a mut [u8],
    pub format: PhantomData<P>,
}

/// The largest factor.
const FACTOR: f32 = 127.0;

impl<C: GroupCodes, const N: usize> Kernel for EncodeRows<'_, RowScaled<C, N>> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let (zero, never) = (s.splat(0.0), s.splat(f32::INFINITY));
        let (mut w, mut weights) = (vec![[0.0; LANES]; BLOCK_COLS], vec![1.0; BLOCK_COLS]);
        let blocks = (self.out.len() - UNIT_BYTES) / N;
        let mut scales = Vec::with_capacity(blocks * GROUPS);
        let mut largest = zero;
        for b in 0..blocks {
            self.rows.columns(b * BLOCK_COLS, &mut w, &mut weights);
            for (w, weights) in w.as_chunks::<GROUP>().0.iter().zip(weights.chunks_exact(GROUP)) {
                let scale = search::scale::<S, C::Numbers>(s, w, weights);
                largest = s.max(largest, s.abs(scale));
                scales.push(scale);
            }
        }
        let units = s.mul(largest, s.splat(1.0 / FACTOR));
        let mut stored = [0.0; LANES];
        s.store(units, &mut stored);
        let head = self.out.as_chunks_mut().0.iter_mut();
        head.zip(stored).for_each(|(bytes, unit)| *bytes = unit.to_le_bytes());

        let used = s.select_gt(units, zero, units, never);
        let blocks = RowScaled::<C, N>::blocks_mut(self.out).iter_mut();
        for (b, (block, scales)) in blocks.zip(scales.as_chunks::<GROUPS>().0).enumerate() {
            self.rows.columns(b * BLOCK_COLS, &mut w, &mut weights);
            for (g, w) in w.as_chunks::<GROUP>().0.iter().enumerate() {
                let mut bytes = [0; LANES];
                s.store_i8(s.to_i32(s.div(scales[g], used)), &mut bytes);
                block[g * LANES..][..LANES].copy_from_slice(&bytes.map(|x| x as u8));
                // The codes are taken with the scale that is stored.
                let scale = s.mul(units, factors(s, block, g));
                let divisor = s.select_gt(s.abs(scale), zero, scale, never);
                let mut codes = [[0; LANES]; GROUP];
                for (w, codes) in w.iter().zip(&mut codes) {
                    let mut numbers = [0.0; LANES];
                    s.store(C::Numbers::nearest(s, s.div(s.load(w), divisor)), &mut numbers);
                    *codes = numbers.map(C::code);
                }
                C::put(&codes, &mut block[FACTOR_BYTES + g * C::BYTES..][..C::BYTES]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Format, decode_row, encode_panel_on, panel_bytes};
    use super::*;
    use crate::kernels::testing::random;
    use crate::simd::Cpu;

    #[test]
    fn codes_and_scales_lie_where_the_layout_says() {
        let cols = 256;
        let w = random(16 * cols, 8);
        for (format, size) in [(Format::W4R, 1088), (Format::W4NlR, 1088), (Format::W5R, 1344)] {
            let mut panel = vec![0xee; panel_bytes(format, cols)];
            encode_panel_on(Cpu::best(), format, &w, cols, None, &mut panel);
            assert_eq!(panel.len(), 64 + 2 * size);
            for (row, w) in w.chunks_exact(cols).enumerate() {
                let unit = f32::from_le_bytes(panel[4 * row..][..4].try_into().unwrap());
                let mut got = vec![f32::NAN; cols];
                decode_row(format, &panel, cols, row, &mut got);
                let mut most = 0;
                for (col, (w, got)) in w.iter().zip(&got).enumerate() {
                    let block = &panel[64 + col / 128 * size..][..size];
                    let (g, at) = (col % 128 / 32, col % 32);
                    let factor = block[16 * g + row] as i8;
                    let codes = &block[64 + (size - 64) / 4 * g..];
                    let number = if format == Format::W5R {
                        f32::from(codes::five_bits(codes, row, at)) - 16.0
                    } else {
                        let byte = codes[at / 8 * 64 + 4 * row + at % 4];
                        let code = byte >> (at % 8 / 4 * 4) & 15;
                        match format {
                            Format::W4R => f32::from(code) - 8.0,
                            _ => f32::from(TABLE[usize::from(code)]),
                        }
                    };
                    assert_eq!(*got, unit * (f32::from(factor) * number), "{format:?} {row} {col}");
                    let step = if format == Format::W4NlR { 6.0 } else { 1.0 };
                    let scale = unit * f32::from(factor).abs();
                    assert!((w - got).abs() <= 1.3 * step * scale, "{format:?} {w} {got}");
                    most = most.max(factor.unsigned_abs());
                }
                assert_eq!(most, 127, "the largest scale of row {row} has the largest factor");
            }
        }
    }
}
