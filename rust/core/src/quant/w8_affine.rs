//! Bytes with an f32 scale and an f32 offset per row and 16 columns; 12 bits a weight.
//!
//! It holds the numbers of every block type of GGUF files, and is what those without a narrower
//! form are unpacked to while they are multiplied. A block (16 rows, 64 columns) is 1536 bytes:
//!
//!     4 x 2 x 16 x f32   of columns 0..16: scales of rows 0..16, offsets; of columns 16..32 ...
//!     16 x 64 B          codes in the order of W8
//!
//! weight = scale (code - 128) + offset

use super::ggml::HALF;
use super::{BLOCK_STEPS, GROUP_STEPS, Group, Packed};
use crate::simd::{Isa, LANES};

/// Bytes of the scales or offsets of 16 columns.
const VECTOR: usize = 4 * LANES;
/// Bytes of all of them at the start of a block.
pub const SCALE_BYTES: usize = 4 * 2 * VECTOR;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = SCALE_BYTES + BLOCK_STEPS * 4 * LANES;
const ZERO: i32 = 128;

pub struct W8Affine;

impl Packed for W8Affine {
    type Block = [u8; BLOCK_BYTES];
    const GROUPS: usize = 2;

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
        let (scales, codes) = block.split_at(SCALE_BYTES);
        let (scales, codes) = (scales.as_chunks().0, codes.as_chunks().0);
        for half in 0..2 {
            let at = 2 * (2 * g + half);
            let (scale, offset) = (s.load_f32(&scales[at]), s.load_f32(&scales[at + 1]));
            let mut dots = [s.splat_i32(0); M];
            for m in 0..M {
                dots[m] = s.splat_i32(-S::BYTE_BIAS * x.half_sum(half, m));
            }
            for t in 0..GROUP_STEPS / 2 {
                let step = half * GROUP_STEPS / 2 + t;
                let w = s.load_bytes(&codes[g * GROUP_STEPS + step]);
                for m in 0..M {
                    dots[m] = s.dot_bytes(dots[m], w, s.splat_bytes(x.codes[step][m]));
                }
            }
            for m in 0..M {
                let sum = x.half_sum(half, m) as f32;
                acc[m] = s.fma(s.to_f32(dots[m]), s.mul(scale, s.splat(x.scales[m])), acc[m]);
                acc[m] = s.fma(offset, s.splat(x.scales[m] * sum), acc[m]);
            }
        }
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let float = |vector: usize| {
            let at = vector * VECTOR + 4 * row;
            f32::from_le_bytes(*block[at..].first_chunk().expect("four bytes of a scale"))
        };
        let code = block[SCALE_BYTES + col / 4 * 4 * LANES + 4 * row + col % 4];
        let half = col / HALF;
        float(2 * half) * (i32::from(code) - ZERO) as f32 + float(2 * half + 1)
    }
}
