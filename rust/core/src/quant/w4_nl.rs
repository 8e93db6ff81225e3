//! W4 with the values of IQ4_NL: 4-bit codes that are places in a table, one f16 scale per row and
//! group of 32; 4.5 bits a weight.
//!
//! A block is laid out as one of [`super::w4`]; weight = scale TABLE[code]. The table is finer
//! around zero, where most weights are.

use super::codes::{Nibbles, Tabled, nibble};
use super::search::{Entries, Table};
use super::w4::{self, SCALE_BYTES, W4};
use super::{Encode, Group, Layout, Packed, UnpackedGroup};
use crate::simd::{Isa, LANES, unpack};

/// The values of the codes, as ggml defines them for IQ4_NL.
pub const TABLE: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const BYTES: [u8; 16] = bytes(&TABLE, 128);

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

/// Codes of a byte at their places in [`TABLE`].
#[inline(always)]
pub(super) fn tabled(places: Nibbles<'_>) -> Tabled<'_, 8> {
    Tabled { table: &BYTES, places }
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
        let scales = (w4::scales(s, block, g), x.scales);
        s.add_dots(tabled(w4::nibbles(block, g)), x.codes, x.starts_at_128(), scales, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let codes = unpack(s, tabled(w4::nibbles(block, g)));
        out.put(s, codes, [w4::scales(s, block, g)]);
    }

    #[inline]
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let code = usize::from(nibble(&block[SCALE_BYTES..], row, col));
        w4::scale(block, row, col) * f32::from(TABLE[code])
    }
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
