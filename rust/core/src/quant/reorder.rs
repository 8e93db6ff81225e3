//! Panels from the blocks of a GGUF file: the same numbers in another order.
//!
//! [`panel_format`] says which format holds the numbers of a block type exactly. A group of 32 codes
//! is taken from its block as eight words of four columns each, a code a byte, which is how panels
//! have them: so all work is shifting and masking words.

use super::codes::{
    NIBBLES_BYTES, SIX_BITS_BYTES, join_five_bits, join_nibbles, join_six_bits, put_row,
};
use super::ggml::{HALF, affine_scales, iq4_xs_scale, q3_k_scale};
use super::k::{self, SUPER};
use super::{BlockType, Format, GROUP_STEPS, PANEL_ROWS, STEP, panel_bytes};
use super::{affine, two_planes, w4, w8};
use crate::simd::LANES;

/// The codes of a group, four columns a word, the first in the low byte.
type Words = [u32; GROUP_STEPS];

const LOW_NIBBLES: u32 = 0x0f0f_0f0f;
const LOW_PAIRS: u32 = 0x0303_0303;
const LOW_BITS: u32 = 0x0101_0101;

/// The panel format with the numbers of a block type.
pub fn panel_format(block: BlockType) -> Format {
    match block {
        BlockType::Q4_0 => Format::W4,
        BlockType::Q8_0 | BlockType::Q5_0 => Format::W8,
        BlockType::Iq4Nl => Format::W4Nl,
        BlockType::Q4_1 => Format::W4Affine,
        BlockType::Q5_1 => Format::W5Affine,
        BlockType::Q4K => Format::W4K,
        BlockType::Q5K => Format::W5K,
        BlockType::Q6K | BlockType::Q3K => Format::W6K,
        BlockType::Iq4Xs => Format::W4NlK,
        BlockType::Q2K => Format::W2K,
        BlockType::Mxfp4 => Format::W4Mx,
    }
}

/// Re-orders up to 16 rows of blocks into a panel of a format that holds their numbers: that of
/// [`panel_format`], or two planes in place of W8.
pub fn reorder_panel_to(
    block: BlockType,
    rows: &[u8],
    cols: usize,
    format: Format,
    out: &mut [u8],
) {
    match (panel_format(block), format) {
        (Format::W8, Format::W8Planes) => {
            let mut panel = vec![0; panel_bytes(Format::W8, cols)];
            reorder_panel(block, rows, cols, &mut panel);
            two_planes::split_panel(&panel, out);
        }
        (own, format) => {
            assert_eq!(own, format);
            reorder_panel(block, rows, cols, out);
        }
    }
}

/// Re-orders up to 16 rows of blocks into a panel of [`panel_format`].
///
/// rows: [n, bytes of a row]; out: the bytes of a panel of `cols` columns. Panics if the lengths
/// disagree.
pub fn reorder_panel(block: BlockType, rows: &[u8], cols: usize, out: &mut [u8]) {
    let format = panel_format(block);
    let row_bytes = block.row_bytes(cols);
    assert!(rows.len().is_multiple_of(row_bytes) && rows.len() / row_bytes <= PANEL_ROWS);
    assert_eq!(out.len(), panel_bytes(format, cols));
    // Rows and columns that are not there are zero, and so is what fills cache lines.
    out.fill(0);
    for (row, blocks) in rows.chunks_exact(row_bytes).enumerate() {
        let blocks = blocks.chunks_exact(block.bytes());
        match block {
            BlockType::Q4_0 | BlockType::Iq4Nl => {
                for (g, block) in blocks.enumerate() {
                    let out = &mut out[g / 2 * w4::BLOCK_BYTES..][..w4::BLOCK_BYTES];
                    let (scales, codes) = out.split_at_mut(w4::SCALE_BYTES);
                    put_half(scales, g % 2 * LANES + row, block);
                    let words = join_nibbles(split_nibbles(&block[2..]));
                    put_row(&mut codes[g % 2 * NIBBLES_BYTES..], row, &words);
                }
            }
            BlockType::Q8_0 | BlockType::Q5_0 => {
                for (g, bytes) in blocks.enumerate() {
                    let out = &mut out[g / 2 * w8::BLOCK_BYTES..][..w8::BLOCK_BYTES];
                    let (scales, codes) = out.split_at_mut(w4::SCALE_BYTES);
                    put_half(scales, g % 2 * LANES + row, bytes);
                    let words: Words = match block {
                        BlockType::Q8_0 => std::array::from_fn(|t| word(&bytes[2..], t)),
                        _ => code_words(block, bytes),
                    };
                    let words = words.map(|word| word ^ 0x8080_8080);
                    put_row(&mut codes[g % 2 * GROUP_STEPS * STEP..], row, &words);
                }
            }
            BlockType::Q4_1 | BlockType::Q5_1 => {
                let bytes =
                    if block == BlockType::Q4_1 { affine::W4_BYTES } else { affine::W5_BYTES };
                for (block, out) in blocks.zip(out.chunks_exact_mut(bytes)) {
                    let (scales, codes) = out.split_at_mut(affine::SCALE_BYTES);
                    put_half(scales, row, block);
                    put_half(scales, LANES + row, &block[2..]);
                    let (bits, nibbles) = block[4..].split_at(block.len() - 4 - HALF);
                    let high = bits.first_chunk().map(|bits| spread(u32::from_le_bytes(*bits)));
                    put_group(codes, row, split_nibbles(nibbles), high);
                }
            }
            BlockType::Q4K | BlockType::Q5K => {
                let bytes = if block == BlockType::Q4K { k::W4K_BYTES } else { k::W5K_BYTES };
                for (block, out) in blocks.zip(out.chunks_exact_mut(bytes)) {
                    reorder_affine(block, row, out);
                }
            }
            BlockType::Q6K => {
                for (block, out) in blocks.zip(out.chunks_exact_mut(k::W6K_BYTES)) {
                    reorder_q6_k(block, row, out);
                }
            }
            BlockType::Q3K => {
                for (block, out) in blocks.zip(out.chunks_exact_mut(k::W6K_BYTES)) {
                    reorder_q3_k(block, row, out);
                }
            }
            BlockType::Q2K => {
                for (block, out) in blocks.zip(out.chunks_exact_mut(k::W2K_BYTES)) {
                    reorder_q2_k(block, row, out);
                }
            }
            BlockType::Iq4Xs => {
                for (block, out) in blocks.zip(out.chunks_exact_mut(k::W4NLK_BYTES)) {
                    put_half(out, row, block);
                    for g in 0..k::GROUPS {
                        out[k::A6 + g * LANES + row] = iq4_xs_scale(block, g) as u8;
                        let words = join_nibbles(split_nibbles(&block[8 + 16 * g..]));
                        put_row(&mut out[k::TABLED + g * NIBBLES_BYTES..], row, &words);
                    }
                }
            }
            BlockType::Mxfp4 => {
                for (g, block) in blocks.enumerate() {
                    let out = &mut out[g / 2 * w4::BLOCK_BYTES..][..w4::BLOCK_BYTES];
                    let (exponents, codes) = out.split_at_mut(w4::SCALE_BYTES);
                    exponents[g % 2 * LANES + row] = block[0];
                    let words = join_nibbles(split_nibbles(&block[1..]));
                    put_row(&mut codes[g % 2 * NIBBLES_BYTES..], row, &words);
                }
            }
        }
    }
}

fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[i])
}

/// Copies the f16 at the start of `block`.
fn put_half(halves: &mut [u8], place: usize, block: &[u8]) {
    halves[2 * place..][..2].copy_from_slice(&block[..2]);
}

/// 16 bytes whose low nibbles are columns 0..16, the high ones 16..32.
fn split_nibbles(bytes: &[u8]) -> Words {
    std::array::from_fn(|t| word(bytes, t % 4) >> (t / 4 * 4) & LOW_NIBBLES)
}

/// Puts one row's codes of four or five bits into a group. high: the words of the fifth bits, where
/// there are some, as the lowest of their bytes; what is above them does not matter.
fn put_group(group: &mut [u8], row: usize, low: Words, high: Option<Words>) {
    match high {
        None => put_row(group, row, &join_nibbles(low)),
        Some(high) => {
            let words = std::array::from_fn(|t| low[t] | (high[t] & LOW_BITS) << 4);
            put_row(group, row, &join_five_bits(words));
        }
    }
}

/// The bits of 32 columns, a byte each.
fn spread(bits: u32) -> Words {
    // A product puts bit i of four at bit 8 i.
    std::array::from_fn(|t| (bits >> (4 * t) & 15).wrapping_mul(0x0020_4081) & LOW_BITS)
}

/// Q4_K and Q5_K: d and dmin (f16), twelve bytes of scales, high bits in Q5_K, nibbles.
fn reorder_affine(block: &[u8], row: usize, out: &mut [u8]) {
    let has_plane = block.len() == BlockType::Q5K.bytes();
    let (scales, rest) = block[4..].split_at(12);
    let (high, nibbles) = rest.split_at(if has_plane { 32 } else { 0 });
    put_half(out, row, block);
    put_half(out, LANES + row, &block[2..]);
    let group_bytes = (out.len() - k::AFFINE) / k::GROUPS;
    for g in 0..k::GROUPS {
        let (a, b) = affine_scales(scales, g);
        out[k::A + g * LANES + row] = a;
        out[k::B + g * LANES + row] = b;
        let bytes = &nibbles[g / 2 * 32..];
        let words: Words = std::array::from_fn(|t| word(bytes, t) >> (g % 2 * 4) & LOW_NIBBLES);
        let group = &mut out[k::AFFINE + g * group_bytes..][..group_bytes];
        let high = has_plane.then(|| std::array::from_fn(|t| word(high, t) >> g));
        put_group(group, row, words, high);
    }
}

/// Q6_K: low nibbles, pairs of high bits, signed scales, d (f16).
fn reorder_q6_k(block: &[u8], row: usize, out: &mut [u8]) {
    let (nibbles, rest) = block.split_at(128);
    let (pairs, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    put_half(out, row, d);
    for g in 0..k::GROUPS {
        // Four groups share 32 bytes of high bits, and two by two 32 bytes of nibbles.
        let (low, high) = (&nibbles[64 * (g / 4) + 32 * (g % 2)..], &pairs[32 * (g / 4)..]);
        let words: Words = std::array::from_fn(|t| word(low, t) >> (g % 4 / 2 * 4) & LOW_NIBBLES);
        let pairs: Words = std::array::from_fn(|t| word(high, t) >> (g % 4 * 2));
        for i in 0..2 {
            let codes =
                std::array::from_fn(|t| words[4 * i + t] | (pairs[4 * i + t] & LOW_PAIRS) << 4);
            put_half_group(out, row, 2 * g + i, scales[2 * g + i], codes);
        }
    }
}

/// Q3_K: a mask of high bits, pairs of low ones, scales in twelve bytes, d (f16). Its codes of -4 to
/// 3 are among those of W6K.
fn reorder_q3_k(block: &[u8], row: usize, out: &mut [u8]) {
    put_half(out, row, &block[108..]);
    let words: [u32; SUPER / 4] = code_words(BlockType::Q3K, block);
    for (half, words) in words.chunks_exact(4).enumerate() {
        // A code plus 32, in each byte: none carries into the next.
        let codes = std::array::from_fn(|t| (words[t] ^ 0x8080_8080).wrapping_sub(0x6060_6060));
        put_half_group(out, row, half, q3_k_scale(&block[96..108], half) as u8, codes);
    }
}

/// Q2_K: scales and offsets in a byte each, pairs of bits, d and dmin (f16).
fn reorder_q2_k(block: &[u8], row: usize, out: &mut [u8]) {
    let (factors, rest) = block.split_at(16);
    let (pairs, units) = rest.split_at(64);
    put_half(out, row, units);
    put_half(out, LANES + row, &units[2..]);
    for (half, factors) in factors.iter().enumerate() {
        out[k::A + half * LANES + row] = *factors;
        // Four groups share 32 bytes.
        let (g, first) = (half / 2, half % 2 * 4);
        let pairs = &pairs[32 * (g / 4)..];
        let step = (0..4).fold(0, |step, t| {
            step | (word(pairs, first + t) >> (g % 4 * 2) & LOW_PAIRS) << (2 * t)
        });
        put_row(&mut out[k::PAIRED + half * STEP..], row, &[step]);
    }
}

/// Puts one row's scale and codes of a half of a group into a super-block of W6K.
fn put_half_group(out: &mut [u8], row: usize, half: usize, scale: u8, codes: [u32; 4]) {
    out[k::A6 + half * LANES + row] = scale;
    put_row(&mut out[k::SIGNED + half * SIX_BITS_BYTES..], row, &join_six_bits(codes));
}

/// The codes of a block as signed bytes, four columns a word.
fn code_words<const WORDS: usize>(block: BlockType, bytes: &[u8]) -> [u32; WORDS] {
    let mut codes = [[0i8; 4]; WORDS];
    let (mut scales, mut offsets) = ([0.0; SUPER / HALF], [0.0; SUPER / HALF]);
    let halves = block.cols() / HALF;
    let (scales, offsets) = (&mut scales[..halves], &mut offsets[..halves]);
    block.codes(bytes, codes.as_flattened_mut(), scales, offsets);
    codes.map(|four| u32::from_le_bytes(four.map(|code| code as u8)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Made, Panels};
    use crate::quant::decode_row;
    use crate::simd::Cpu;

    #[test]
    fn panels_hold_the_numbers_of_blocks() {
        for block in BlockType::ALL {
            for (rows, blocks) in [(1, 1), (16, 2), (33, 3), (5, 7)] {
                let made = Made::Reordered(block);
                let cols = blocks * block.cols();
                let Panels { format, bytes, decoded } = made.matrix(Cpu::best(), rows, cols, 3);
                assert_eq!(format, panel_format(block));
                for row in 0..rows.next_multiple_of(PANEL_ROWS) {
                    let mut out = vec![f32::NAN; cols];
                    decode_row(format, &bytes, cols, row, &mut out);
                    let want = decoded.get(row * cols..(row + 1) * cols);
                    let want = want.map_or(vec![0.0; cols], <[f32]>::to_vec);
                    // -0 and 0 are one number.
                    assert_eq!(out, want, "{block:?} {rows}x{cols} row {row}");
                }
            }
        }
    }
}
