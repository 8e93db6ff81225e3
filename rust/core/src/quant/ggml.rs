//! The block types of GGUF files, as ggml defines them.
//!
//! A row is cut into blocks of 32 or 256 columns, stored one after the other; a matrix is its rows.
//! Blocks have any address: fields are read byte by byte. In every type 16 neighbouring columns
//! share a scale and an offset, and a weight is scale times code plus offset.

use super::{w4_mx, w4_nl};
use half::f16;

/// The most columns of a block.
const MOST_COLS: usize = 256;
/// Columns with one scale and one offset, in every type.
pub const HALF: usize = 16;

/// How the numbers of a block are coded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
}

impl BlockType {
    pub const ALL: [BlockType; 13] = [
        BlockType::Q4_0,
        BlockType::Q4_1,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q8_0,
        BlockType::Q2K,
        BlockType::Q3K,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
        BlockType::Iq4Nl,
        BlockType::Iq4Xs,
        BlockType::Mxfp4,
    ];

    /// Name as GGUF tools spell it, the same in small letters, id in a file, columns and bytes of a
    /// block.
    const fn facts(self) -> (&'static str, &'static str, u32, usize, usize) {
        match self {
            BlockType::Q4_0 => ("Q4_0", "q4_0", 2, 32, 18),
            BlockType::Q4_1 => ("Q4_1", "q4_1", 3, 32, 20),
            BlockType::Q5_0 => ("Q5_0", "q5_0", 6, 32, 22),
            BlockType::Q5_1 => ("Q5_1", "q5_1", 7, 32, 24),
            BlockType::Q8_0 => ("Q8_0", "q8_0", 8, 32, 34),
            BlockType::Q2K => ("Q2_K", "q2_k", 10, 256, 84),
            BlockType::Q3K => ("Q3_K", "q3_k", 11, 256, 110),
            BlockType::Q4K => ("Q4_K", "q4_k", 12, 256, 144),
            BlockType::Q5K => ("Q5_K", "q5_k", 13, 256, 176),
            BlockType::Q6K => ("Q6_K", "q6_k", 14, 256, 210),
            BlockType::Iq4Nl => ("IQ4_NL", "iq4_nl", 20, 32, 18),
            BlockType::Iq4Xs => ("IQ4_XS", "iq4_xs", 23, 256, 136),
            BlockType::Mxfp4 => ("MXFP4", "mxfp4", 39, 32, 17),
        }
    }

    /// As GGUF tools spell it, like `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The name in small letters, as a matrix format of this program.
    pub const fn format_name(self) -> &'static str {
        self.facts().1
    }

    /// In the tensor table of a GGUF file.
    pub const fn id(self) -> u32 {
        self.facts().2
    }

    /// Columns of a block.
    pub const fn cols(self) -> usize {
        self.facts().3
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        self.facts().4
    }

    /// Bytes of a row of `cols` columns, a multiple of [`BlockType::cols`].
    pub fn row_bytes(self, cols: usize) -> usize {
        debug_assert!(cols.is_multiple_of(self.cols()));
        cols / self.cols() * self.bytes()
    }

    /// The type that a file calls `id`.
    pub fn from_id(id: u32) -> Option<BlockType> {
        BlockType::ALL.into_iter().find(|block| block.id() == id)
    }

    /// Where a block has its f16 scales.
    const fn halves(self) -> &'static [usize] {
        match self {
            BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
            BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
            BlockType::Iq4Nl | BlockType::Iq4Xs => &[0],
            BlockType::Q2K => &[80, 82],
            BlockType::Q3K => &[108],
            BlockType::Q6K => &[208],
            BlockType::Mxfp4 => &[],
        }
    }

    /// Whether all weights of some blocks are finite.
    pub fn is_finite(self, blocks: &[u8]) -> bool {
        // 12 times 2^(252 - 128) is the last power that fits.
        const MOST_EXPONENT: u8 = 252;
        blocks.chunks_exact(self.bytes()).all(|block| {
            self.halves().iter().all(|at| half(block, *at).is_finite())
                && (self != BlockType::Mxfp4 || block[0] <= MOST_EXPONENT)
        })
    }

    /// The weights of some blocks, to the bit as ggml computes them.
    ///
    /// out: [blocks, cols]. Panics if the lengths disagree.
    pub fn decode(self, blocks: &[u8], out: &mut [f32]) {
        assert_eq!(blocks.len(), self.row_bytes(out.len()));
        let mut codes = [0; MOST_COLS];
        let (mut scales, mut offsets) = ([0.0; MOST_COLS / HALF], [0.0; MOST_COLS / HALF]);
        let blocks = blocks.chunks_exact(self.bytes());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.cols())) {
            let halves = self.cols() / HALF;
            let codes = &mut codes[..self.cols()];
            self.codes(block, codes, &mut scales[..halves], &mut offsets[..halves]);
            for (i, (out, code)) in out.iter_mut().zip(codes).enumerate() {
                *out = scales[i / HALF] * f32::from(*code) + offsets[i / HALF];
            }
        }
    }

    /// The blocks of some numbers: Q8_0 or Q4_0, rounded as ggml's reference rounds them.
    ///
    /// Panics for another type, or if the numbers are no whole blocks.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        let (groups, rest) = values.as_chunks::<32>();
        assert!(rest.is_empty());
        let mut out = Vec::with_capacity(self.row_bytes(values.len()));
        for group in groups {
            match self {
                BlockType::Q8_0 => encode_q8_0(group, &mut out),
                BlockType::Q4_0 => encode_q4_0(group, &mut out),
                _ => panic!("{} is not encoded", self.name()),
            }
        }
        out
    }

    /// Codes, scales and offsets of a block. codes: [cols]; scales, offsets: [cols / 16].
    pub fn codes(self, b: &[u8], codes: &mut [i8], scales: &mut [f32], offsets: &mut [f32]) {
        // What changes no number when it is added: plus zero would make zero of minus zero.
        offsets.fill(-0.0);
        let d = self.halves().first().map_or(0.0, |at| half(b, *at));
        match self {
            BlockType::Q4_0 => {
                scales.fill(d);
                nibbles(&b[2..], codes, |code| code as i8 - 8);
            }
            BlockType::Q4_1 => {
                scales.fill(d);
                offsets.fill(half(b, 2));
                nibbles(&b[4..], codes, |code| code as i8);
            }
            BlockType::Q5_0 => {
                scales.fill(d);
                five_bits(&b[2..6], &b[6..], codes);
                codes.iter_mut().for_each(|code| *code -= 16);
            }
            BlockType::Q5_1 => {
                scales.fill(d);
                offsets.fill(half(b, 2));
                five_bits(&b[4..8], &b[8..], codes);
            }
            BlockType::Q8_0 => {
                scales.fill(d);
                codes.iter_mut().zip(&b[2..]).for_each(|(code, b)| *code = *b as i8);
            }
            BlockType::Iq4Nl => {
                scales.fill(d);
                nibbles(&b[2..], codes, |code| w4_nl::TABLE[usize::from(code)]);
            }
            BlockType::Mxfp4 => {
                scales.fill(w4_mx::scale(b[0]));
                nibbles(&b[1..], codes, |code| w4_mx::TABLE[usize::from(code)]);
            }
            BlockType::Q2K => {
                let d_min = half(b, 82);
                for i in 0..MOST_COLS / HALF {
                    scales[i] = d * f32::from(b[i] & 15);
                    offsets[i] = -(d_min * f32::from(b[i] >> 4));
                }
                pairs(&b[16..80], codes);
            }
            BlockType::Q3K => {
                for (i, scale) in scales.iter_mut().enumerate() {
                    *scale = d * f32::from(q3_k_scale(&b[96..108], i));
                }
                pairs(&b[32..96], codes);
                for (i, code) in codes.iter_mut().enumerate() {
                    // The bit of 32 columns, one byte a column.
                    *code -= if b[i % 32] >> (i / 32) & 1 == 0 { 4 } else { 0 };
                }
            }
            BlockType::Q4K => affine(b, &b[16..], codes, scales, offsets),
            BlockType::Q5K => {
                affine(b, &b[48..], codes, scales, offsets);
                for (i, code) in codes.iter_mut().enumerate() {
                    *code |= (b[16 + i % 32] >> (i / 32) & 1) as i8 * 16;
                }
            }
            BlockType::Q6K => {
                for (scale, b) in scales.iter_mut().zip(&b[192..208]) {
                    *scale = d * f32::from(*b as i8);
                }
                for (i, code) in codes.iter_mut().enumerate() {
                    // 128 columns share 64 bytes of nibbles and 32 of pairs.
                    let (n, s, l) = (i / 128, i % 128 / 32, i % 32);
                    let low = b[64 * n + 32 * (s % 2) + l] >> (s / 2 * 4) & 15;
                    let high = b[128 + 32 * n + l] >> (2 * s) & 3;
                    *code = (low | high << 4) as i8 - 32;
                }
            }
            BlockType::Iq4Xs => {
                for k in 0..8 {
                    scales[2 * k..][..2].fill(d * f32::from(iq4_xs_scale(b, k)));
                    let table = |code: u8| w4_nl::TABLE[usize::from(code)];
                    nibbles(&b[8 + 16 * k..][..16], &mut codes[32 * k..][..32], table);
                }
            }
        }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn encode_q8_0(x: &[f32; 32], out: &mut Vec<u8>) {
    let d = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(x.iter().map(|x| (x * inverse).round() as i8 as u8));
}

fn encode_q4_0(x: &[f32; 32], out: &mut Vec<u8>) {
    let extreme = x.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let d = extreme / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(f16::from_f32(d).to_le_bytes());
    let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    let (low, high) = x.split_at(16);
    out.extend(low.iter().zip(high).map(|(low, high)| code(*low) | code(*high) << 4));
}

/// 32 codes from the low nibbles of 16 bytes, then their high ones.
fn nibbles(bytes: &[u8], codes: &mut [i8], value: impl Fn(u8) -> i8) {
    let (low, high) = codes.split_at_mut(16);
    for ((low, high), b) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (value(b & 15), value(b >> 4));
    }
}

/// 32 codes of five bits: nibbles, and their high bits in the order of the columns.
fn five_bits(high: &[u8], low: &[u8], codes: &mut [i8]) {
    nibbles(low, codes, |code| code as i8);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (high[i / 8] >> (i % 8) & 1) as i8 * 16;
    }
}

/// 256 codes of two bits: 128 columns share 32 bytes.
fn pairs(bytes: &[u8], codes: &mut [i8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code = (bytes[32 * (i / 128) + i % 32] >> (i % 128 / 32 * 2) & 3) as i8;
    }
}

/// Scale `i` of Q3_K, six bits in twelve bytes.
pub(super) fn q3_k_scale(s: &[u8], i: usize) -> i8 {
    let low = if i < 8 { s[i] & 15 } else { s[i - 8] >> 4 };
    (low | (s[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) as i8 - 32
}

/// Scale of group `g` of IQ4_XS: four bits in one place, two in another.
pub(super) fn iq4_xs_scale(b: &[u8], g: usize) -> i8 {
    let high = u16::from_le_bytes([b[2], b[3]]) >> (2 * g) & 3;
    let low = b[4 + g / 2] >> (g % 2 * 4) & 15;
    (low | (high as u8) << 4) as i8 - 32
}

/// Scale and offset of group `g` of Q4_K and Q5_K, six bits each in twelve bytes.
pub(super) fn affine_scales(s: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        (s[g] & 63, s[g + 4] & 63)
    } else {
        (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4)
    }
}

/// The nibbles, scales and offsets of Q4_K and Q5_K.
fn affine(b: &[u8], low: &[u8], codes: &mut [i8], scales: &mut [f32], offsets: &mut [f32]) {
    let (d, d_min) = (half(b, 0), half(b, 2));
    for g in 0..8 {
        let (scale, offset) = affine_scales(&b[4..16], g);
        scales[2 * g..][..2].fill(d * f32::from(scale));
        offsets[2 * g..][..2].fill(-(d_min * f32::from(offset)));
        for (code, b) in codes[32 * g..][..32].iter_mut().zip(&low[g / 2 * 32..]) {
            *code = (b >> (g % 2 * 4) & 15) as i8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of the weights w, and of w (1 + i mod 7), of blocks with bytes 37 i + 11 and simple
    /// scales, by hand from the definitions.
    #[test]
    fn known_blocks() {
        for (block, sum, weighted) in [
            (BlockType::Q4_0, -2.625, 3.5),
            (BlockType::Q4_1, 32.625, 119.625),
            (BlockType::Q5_0, 1.875, 14.0),
            (BlockType::Q5_1, 65.125, 234.0),
            (BlockType::Q8_0, -22.0, -77.25),
            (BlockType::Q2K, 257.375, 1003.9375),
            (BlockType::Q3K, 119.75, 370.5),
            (BlockType::Q4K, 6805.0, 26268.625),
            (BlockType::Q5K, 14527.0, 57419.625),
            (BlockType::Q6K, 576.5, 1234.625),
            (BlockType::Iq4Nl, -32.125, 76.625),
            (BlockType::Iq4Xs, -1375.625, -18049.0),
            (BlockType::Mxfp4, 1.5625, 5.3125),
        ] {
            let mut bytes: Vec<u8> = (0..block.bytes()).map(|i| (37 * i + 11) as u8).collect();
            for (at, scale) in block.halves().iter().zip([0.125, 0.0625]) {
                bytes[*at..][..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
            if block == BlockType::Mxfp4 {
                bytes[0] = 124;
            }
            assert!(block.is_finite(&bytes));
            let mut w = vec![f32::NAN; block.cols()];
            block.decode(&bytes, &mut w);
            let terms = w.iter().enumerate().map(|(i, w)| f64::from(*w) * (1 + i % 7) as f64);
            let sums = (w.iter().map(|w| f64::from(*w)).sum::<f64>(), terms.sum::<f64>());
            assert_eq!(sums, (sum, weighted), "{block:?}");
        }
    }

    #[test]
    fn scales_that_are_no_numbers_are_found() {
        for block in BlockType::ALL {
            let blocks = vec![0; 3 * block.bytes()];
            assert!(block.is_finite(&blocks));
            for at in block.halves() {
                for scale in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                    let mut blocks = blocks.clone();
                    blocks[2 * block.bytes() + at..][..2].copy_from_slice(&scale.to_le_bytes());
                    assert!(!block.is_finite(&blocks), "{block:?}");
                }
            }
        }
        let mut block = [7; 17];
        for exponent in 0..=255 {
            block[0] = exponent;
            let mut w = [0.0; 32];
            BlockType::Mxfp4.decode(&block, &mut w);
            let finite = w.iter().all(|w| w.is_finite());
            assert_eq!(BlockType::Mxfp4.is_finite(&block), finite, "{exponent}");
        }
    }
}
