//! W4 with the numbers of MXFP4: codes of 4 bits that are floats of one bit of mantissa (E2M1), one
//! power of two per row and group of 32; 4.5 bits a weight.
//!
//! A block is laid out as one of [`super::w4`], but for the scales, which are bytes:
//!
//!     2 x 16 B   exponents: of group 0 rows 0..16, of group 1
//!     32 B       zeros, so that what follows stays at whole cache lines
//!     8 x 64 B   codes in the order of W4
//!
//! weight = 2^(exponent - 128) TABLE[code]. Exponents are up to 252, the last with which all
//! weights are finite.

use super::codes::{Tabled, nibble};
use super::w4::{SCALE_BYTES, W4};
use super::{GROUP, Group, Layout, Packed, UnpackedGroup, w4, w4_nl};
use crate::simd::{Isa, LANES, unpack};

/// Twice the values of the codes, as the Microscaling specification (OCP, 2023) defines E2M1.
pub const TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
const BYTES: [u8; 16] = w4_nl::bytes(&TABLE, 128);

pub struct W4Mx;

/// The scale that an exponent stands for.
pub fn scale(exponent: u8) -> f32 {
    2f64.powi(i32::from(exponent) - 128) as f32
}

/// The scales of group `g` of a block, a row a lane.
#[inline(always)]
fn scales<S: Isa>(s: S, block: &[u8], g: usize) -> S::F {
    let exponents = s.to_i32(s.load_u8(&block.as_chunks().0[g]));
    // In two steps, for the smallest scales are below the normal numbers that `exp2i` makes.
    let scales = s.exp2i(s.add_i32(exponents, s.splat_i32(-126)));
    s.mul(scales, s.splat(0.25))
}

/// The codes of group `g` (0 or 1) of a block.
#[inline(always)]
fn tabled(block: &[u8; w4::BLOCK_BYTES], g: usize) -> Tabled<'_, 8> {
    Tabled { table: &BYTES, places: w4::nibbles(block, g) }
}

impl Packed for W4Mx {
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
        let scales = (scales(s, block, g), x.scales);
        s.add_dots(tabled(block, g), x.codes, x.starts_at_128(), scales, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        out.put(s, unpack(s, tabled(block, g)), [scales(s, block, g)]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let code = nibble(&block[SCALE_BYTES..], row, col);
        scale(block[col / GROUP * LANES + row]) * f32::from(TABLE[usize::from(code)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Reading;
    use crate::kernels::matmul::packed;
    use crate::kernels::outputs::Outputs;
    use crate::kernels::quantize::QuantTile;
    use crate::quant::{Format, PANEL_ROWS, decode_row, panel_bytes};
    use crate::simd::Cpu;

    #[test]
    fn every_exponent_is_exact() {
        let exponents: Vec<u8> = (0..=252).collect();
        for cpu in Cpu::all() {
            for exponents in exponents.chunks(PANEL_ROWS) {
                let cols = 2 * GROUP;
                let mut panel = vec![0; panel_bytes(Format::W4Mx, cols)];
                for (row, exponent) in exponents.iter().enumerate() {
                    // The first column of the second group is 12 times the scale, all else zero.
                    panel[LANES + row] = *exponent;
                    panel[SCALE_BYTES + 4 * 4 * LANES + 4 * row] = 7;
                }
                // Of the largest scales the products are infinite, in f32 and here.
                let mut x = vec![0.0; cols];
                x[GROUP] = 127.0;
                let mut tile = QuantTile::default();
                tile.quantize(cpu, &x, cols);
                let mut y = vec![f32::NAN; PANEL_ROWS];
                let out = Outputs::of(&mut y, PANEL_ROWS);
                packed(cpu, Format::W4Mx, &panel, cols, &tile, Reading::PLAIN, out);
                for (row, exponent) in exponents.iter().enumerate() {
                    let scale = scale(*exponent);
                    assert_eq!(f64::from(scale), (f64::from(*exponent) - 128.0).exp2());
                    decode_row(Format::W4Mx, &panel, cols, row, &mut x);
                    assert_eq!(x[GROUP], 12.0 * scale, "{exponent}");
                    assert_eq!(y[row], 12.0 * 127.0 * scale, "{cpu:?} {exponent}");
                }
            }
        }
    }
}
