//! W4: 4-bit codes, one f16 scale per row and group of 32; 4.5 bits a weight.
//!
//! A block (16 rows, 64 columns) is 576 bytes:
//!
//!     32 x f16   scales: group 0 rows 0..16, group 1 rows 0..16                  64 bytes
//!     8 x 64 B   step t: row r at bytes 4r..4r+4; low nibble of byte i: column 8t + i,
//!                high nibble: column 8t + 4 + i
//!
//! weight = scale (code - 8). The scale may be negative: the extreme value of a group takes
//! code 0, so that the larger half of the code range is used.

use super::codes::{self, NIBBLES_BYTES, Nibbles, nibble};
use super::search::{self, Integers, Numbers};
use super::{Encode, GROUP, Group, Layout, Packed, UnpackedGroup};
use crate::simd::{Isa, LANES, unpack};
use half::f16;

/// Bytes of the scales at the start of a block.
pub const SCALE_BYTES: usize = 4 * LANES;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = SCALE_BYTES + 2 * NIBBLES_BYTES;
const ZERO: i32 = 8;

pub struct W4;

impl Packed for W4 {
    type Block = [u8; BLOCK_BYTES];
    const GROUPS: usize = 2;
    const LAYOUT: Option<Layout> = Some(Layout::Scaled { bits: 4 });

    #[inline(always)]
    fn blocks(panel: &[u8]) -> &[Self::Block] {
        panel.as_chunks().0
    }

    fn blocks_mut(panel: &mut [u8]) -> &mut [Self::Block] {
        panel.as_chunks_mut().0
    }

    #[inline(always)]
    fn add<S: Isa, const M: usize>(
        s: S,
        block: &Self::Block,
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let scales = (scales(s, block, g), x.scales);
        s.add_dots(nibbles(block, g), x.codes, x.starts_at_8(), scales, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        out.put(s, unpack(s, nibbles(block, g)), [scales(s, block, g)]);
    }

    #[inline]
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let code = i32::from(nibble(&block[SCALE_BYTES..], row, col));
        scale(block, row, col) * (code - ZERO) as f32
    }
}

/// The codes of group `g` (0 or 1) of a block.
#[inline(always)]
pub(super) fn nibbles(block: &[u8; BLOCK_BYTES], g: usize) -> Nibbles<'_> {
    Nibbles(&block[SCALE_BYTES..].as_chunks().0.as_chunks().0[g])
}

/// The scales of group `g` (0 or 1) of a block that starts with them, a row a lane.
#[inline(always)]
pub fn scales<S: Isa>(s: S, block: &[u8], g: usize) -> S::F {
    s.load_f16(&block.as_chunks().0[g])
}

/// The scale of a column in a row of a block that starts with the scales.
#[inline]
pub(super) fn scale(block: &[u8], row: usize, col: usize) -> f32 {
    f16::from_le_bytes(block.as_chunks().0[col / GROUP * LANES + row]).to_f32()
}

/// Exact integer dot products of group `g` of a block with M tokens.
#[inline(always)]
pub fn dots<S: Isa, const M: usize>(
    s: S,
    block: &[u8; BLOCK_BYTES],
    g: usize,
    x: Group<'_, M>,
) -> [S::I; M] {
    s.dots(nibbles(block, g), x.codes, x.starts_at_8())
}

impl Encode for W4 {
    #[inline(always)]
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block) {
        encode_groups::<S, Integers<-8, 7>>(s, w, importance, block, |q| (q as i32 + ZERO) as u8);
    }
}

/// Quantises a block with one scale for each group. code: of a number.
#[inline(always)]
pub(super) fn encode_groups<S: Isa, C: Numbers>(
    s: S,
    w: &[[f32; LANES]],
    importance: &[f32],
    block: &mut [u8; BLOCK_BYTES],
    code: impl Fn(f32) -> u8,
) {
    for g in 0..2 {
        let codes = encode_group::<S, C>(s, g, w, importance, block, &code);
        codes::put(&codes, &mut block[SCALE_BYTES + g * NIBBLES_BYTES..], codes::join_nibbles);
    }
}

/// Codes of group `g` of a block, which gets the scale among those that it starts with.
#[inline(always)]
pub(super) fn encode_group<S: Isa, C: Numbers>(
    s: S,
    g: usize,
    w: &[[f32; LANES]],
    importance: &[f32],
    block: &mut [u8],
    code: impl Fn(f32) -> u8,
) -> [[u8; LANES]; GROUP] {
    let (w, importance) = (&w[g * GROUP..][..GROUP], &importance[g * GROUP..][..GROUP]);
    // The codes are taken with the scale that is stored.
    s.store_f16(search::scale::<S, C>(s, w, importance), &mut block.as_chunks_mut().0[g]);
    let scale = scales(s, block, g);
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let divisor = s.select_gt(s.abs(scale), zero, scale, one);
    let mut codes = [[0; LANES]; GROUP];
    for (w, codes) in w.iter().zip(&mut codes) {
        let mut numbers = [0.0; LANES];
        s.store(C::nearest(s, s.div(s.load(w), divisor)), &mut numbers);
        *codes = numbers.map(&code);
    }
    codes
}
