//! W4 with the values of IQ4_NL: 4-bit codes that are places in a table, one f16 scale per row and
//! group of 32; 4.5 bits a weight.
//!
//! A block is laid out as one of [`super::w4`]; weight = scale TABLE[code]. The table is finer
//! around zero, where most weights are.

use super::search::{Entries, Table};
use super::w4::{self, SCALE_BYTES, W4};
use super::{Encode, GROUP_STEPS, Group, Layout, Packed, STEP, UnpackedGroup, add_scaled};
use crate::simd::{Isa, LANES, unpack};

/// The values of the codes, as ggml defines them for IQ4_NL.
pub const TABLE: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
pub(super) const BYTES: [u8; 16] = bytes(&TABLE, 128);

/// A table as codes of a byte, which stand for themselves less `zero`.
pub(super) const fn bytes(table: &[i8; 16], zero: i16) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = (table[i] as i16 + zero) as u8;
        i += 1;
    }
    bytes
}

pub struct W4Nl;

impl Packed for W4Nl {
    type Block = <W4 as Packed>::Block;
    const GROUPS: usize = W4::GROUPS;
    const LAYOUT: Option<Layout> = Some(Layout::Scaled { bits: 8 });

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
        let (codes, _) = block[SCALE_BYTES..].as_chunks().0.as_chunks();
        let dots = dots(s, &BYTES, &codes[g], x);
        add_scaled(s, dots, (w4::scales(s, block, g), x.scales), acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let (codes, _) = block[SCALE_BYTES..].as_chunks().0.as_chunks();
        let codes = unpack::tabled(s, &BYTES, &codes[g]);
        out.put(s, codes, [w4::scales(s, block, g)]);
    }

    #[inline]
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let code = usize::from(w4::nibble(&block[SCALE_BYTES..], row, col));
        w4::scale(block, row, col) * f32::from(TABLE[code])
    }
}

/// Exact integer dot products of a group, whose codes are places in a table in the order of W4,
/// with M tokens. table: as of [`bytes`] with a zero of 128.
#[inline(always)]
pub(super) fn dots<S: Isa, const M: usize>(
    s: S,
    table: &[u8; 16],
    codes: &[[u8; STEP]; GROUP_STEPS / 2],
    x: Group<'_, M>,
) -> [S::I; M] {
    let mut dots = [s.splat_i32(0); M];
    for m in 0..M {
        dots[m] = s.start_bytes(x.starts_at_128()[m]);
    }
    for t in 0..GROUP_STEPS / 2 {
        let w = s.load_bytes(&codes[t]);
        let low = s.lookup(table, s.low_nibbles(w));
        let high = s.lookup(table, s.high_nibbles(w));
        for m in 0..M {
            dots[m] = s.dot_bytes(dots[m], low, s.splat_bytes(x.codes[2 * t][m]));
            dots[m] = s.dot_bytes(dots[m], high, s.splat_bytes(x.codes[2 * t + 1][m]));
        }
    }
    dots
}

impl Entries for W4Nl {
    const TABLE: [i8; 16] = TABLE;
}

impl Encode for W4Nl {
    #[inline(always)]
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block) {
        w4::encode_groups::<S, Table<W4Nl>>(s, w, importance, block, W4Nl::place);
    }
}
