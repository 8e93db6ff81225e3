//! W8: 8-bit codes, one f16 scale per row and group of 32; 8.5 bits a weight.
//!
//! A block (16 rows, 64 columns) is 1088 bytes:
//!
//!     32 x f16    scales: group 0 rows 0..16, group 1 rows 0..16       64 bytes
//!     16 x 64 B   step t: row r at bytes 4r..4r+4: columns 4t .. 4t+4
//!
//! weight = scale (code - 128). Codes that are encoded here are 1..=255; those of Q8_0 files may be 0.

use super::codes::WholeBytes;
use super::search::{self, Integers};
use super::w4::{SCALE_BYTES, scale, scales};
use super::{BLOCK_STEPS, Encode, GROUP, GROUP_STEPS, Group, Layout, Packed, UnpackedGroup};
use crate::simd::{Isa, LANES, unpack};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = SCALE_BYTES + BLOCK_STEPS * 4 * LANES;
const ZERO: i32 = 128;
const LARGEST: f32 = 127.0;

pub struct W8;

/// The codes of group `g` (0 or 1) of a block.
#[inline(always)]
fn bytes(block: &[u8; BLOCK_BYTES], g: usize) -> WholeBytes<'_> {
    WholeBytes(&block[SCALE_BYTES..].as_chunks().0.as_chunks().0[g])
}

impl Packed for W8 {
    type Block = [u8; BLOCK_BYTES];
    const GROUPS: usize = 2;
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
        let scales = (scales(s, block, g), x.scales);
        s.add_dots(bytes(block, g), x.codes, x.starts_at_128(), scales, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        out.put(s, unpack(s, bytes(block, g)), [scales(s, block, g)]);
    }

    #[inline]
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let code = block[SCALE_BYTES + col / 4 * 4 * LANES + 4 * row + col % 4];
        scale(block, row, col) * (i32::from(code) - ZERO) as f32
    }
}

impl Encode for W8 {
    #[inline(always)]
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block) {
        let groups = w.as_chunks::<GROUP>().0.iter().zip(importance.chunks_exact(GROUP));
        for (g, (w, importance)) in groups.enumerate() {
            let zero = s.splat(0.0);
            // The codes are symmetric, so the sign is theirs.
            let scale = s.abs(search::scale::<S, Integers<-127, 127>>(s, w, importance));
            s.store_f16(scale, &mut block.as_chunks_mut().0[g]);
            let scale = scales(s, block, g);
            let divisor = s.select_gt(scale, zero, scale, s.splat(1.0));
            // A group too small for an f16 scale is zero.
            let limit = s.select_gt(scale, zero, s.splat(LARGEST), zero);
            let (codes, _) = block[SCALE_BYTES..].as_chunks_mut::<{ 4 * LANES }>();
            for (k, w) in w.iter().enumerate() {
                let x = s.div(s.load(w), divisor);
                let x = s.max(s.min(x, limit), s.sub(zero, limit));
                let mut q = [0; LANES];
                s.store_i32(s.to_i32(x), &mut q);
                let step = &mut codes[g * GROUP_STEPS + k / 4];
                for (r, q) in q.iter().enumerate() {
                    step[4 * r + k % 4] = (q + ZERO) as u8;
                }
            }
        }
    }
}
