//! Formats with one f16 scale and one f16 offset per row and group of 32, which hold the numbers of
//! Q4_1 and Q5_1: weight = scale code + offset.
//!
//! [`W4Affine`] has codes of 4 bits, 5 bits a weight. A block (16 rows, 32 columns) is 320 bytes:
//!
//!     16 x f16   scales of rows 0..16
//!     16 x f16   offsets
//!     4 x 64 B   codes in the order of W4
//!
//! [`W5Affine`] has codes of 5 bits, 6 bits a weight. A block is 384 bytes and ends in
//!
//!     5 x 64 B   codes in the order of [`super::codes`]

use super::codes::{self, FIVE_BITS_BYTES, FiveBits, NIBBLES_BYTES, Nibbles, nibble};
use super::{Group, Layout, Packed, UnpackedGroup, add_offsets};
use crate::simd::{Isa, LANES, Starts, unpack};
use half::f16;

/// Bytes of scales and offsets at the start of a block.
pub const SCALE_BYTES: usize = 2 * 2 * LANES;

pub const W4_BYTES: usize = SCALE_BYTES + NIBBLES_BYTES;
pub const W5_BYTES: usize = SCALE_BYTES + FIVE_BITS_BYTES;

pub struct W4Affine;
pub struct W5Affine;

/// Scales and offsets of a block, a row a lane.
#[inline(always)]
fn affine<S: Isa>(s: S, block: &[u8]) -> (S::F, S::F) {
    let halves = block.as_chunks().0;
    (s.load_f16(&halves[0]), s.load_f16(&halves[1]))
}

#[inline(always)]
fn nibbles(block: &[u8; W4_BYTES]) -> Nibbles<'_> {
    Nibbles(&block[SCALE_BYTES..].as_chunks().0.as_chunks().0[0])
}

#[inline(always)]
fn five_bits(block: &[u8; W5_BYTES]) -> FiveBits<'_> {
    FiveBits(&block[SCALE_BYTES..].as_chunks().0.as_chunks().0[0])
}

fn decode(block: &[u8], row: usize, code: u8) -> f32 {
    let half = |i: usize| f16::from_le_bytes(block.as_chunks().0[i]).to_f32();
    half(row) * f32::from(code) + half(LANES + row)
}

impl Packed for W4Affine {
    type Block = [u8; W4_BYTES];
    const GROUPS: usize = 1;
    const LAYOUT: Option<Layout> = Some(Layout::Affine { bits: 4 });

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
        _: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let (scales, offsets) = affine(s, block);
        s.add_dots(nibbles(block), x.codes, Starts::ZERO, (scales, x.scales), acc);
        add_offsets(s, offsets, x.totals, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, _: usize, out: UnpackedGroup<'_>) {
        let (scales, offsets) = affine(s, block);
        out.put(s, unpack(s, nibbles(block)), [scales, offsets]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        decode(block, row, nibble(&block[SCALE_BYTES..], row, col))
    }
}

impl Packed for W5Affine {
    type Block = [u8; W5_BYTES];
    const GROUPS: usize = 1;
    const LAYOUT: Option<Layout> = Some(Layout::Affine { bits: 5 });

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
        _: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let (scales, offsets) = affine(s, block);
        s.add_dots(five_bits(block), x.codes, Starts::ZERO, (scales, x.scales), acc);
        add_offsets(s, offsets, x.totals, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, _: usize, out: UnpackedGroup<'_>) {
        let (scales, offsets) = affine(s, block);
        out.put(s, unpack(s, five_bits(block)), [scales, offsets]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        decode(block, row, codes::five_bits(&block[SCALE_BYTES..], row, col))
    }
}
