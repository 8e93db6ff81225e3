//! How the codes of a group lie, taken apart by the kernels in vectors, and one by one by their twins.
//!
//! A step is 64 bytes, row r at bytes 4r..4r+4, byte i of them a code of column 4t + i in step t: what one
//! dot product takes. Codes of less than eight bits are packed so that several steps share one:
//!
//! Nibbles, 4 bits: of each step the low halves of the bytes are one step of codes, the high ones the next.
//!
//! Five bits: eight steps c0 to c7 in five. The low five bits of v0 to v4 are c0 to c4, and
//!
//!     c5 = v0[5..8] + 8 v1[6..8]
//!     c6 = v2[5..8] + 8 v3[6..8]
//!     c7 = v4[5..8] + 8 v1[5] + 16 v3[5]
//!
//! Six bits: four steps in three. The low six bits are c0 to c2, and
//!
//!     c3 = v0[6..8] + 4 v1[6..8] + 16 v2[6..8]
//!
//! Five of eight, and three of four, are taken out by one mask. With the highest bits in a plane of their own
//! each code takes a shift, a mask and an or for them: with AVX2 half as many operations again.

use super::{GROUP_STEPS, STEP};
use crate::simd::{Bytes, Codes, LANES};

/// Codes of four bits.
#[derive(Clone, Copy)]
pub struct Nibbles<'a>(pub &'a [[u8; STEP]; GROUP_STEPS / 2]);

/// Places of four bits in a table of codes of `BITS`, 6 or 8.
#[derive(Clone, Copy)]
pub struct Tabled<'a, const BITS: u32> {
    pub table: &'a [u8; 16],
    pub places: Nibbles<'a>,
}

#[derive(Clone, Copy)]
pub struct FiveBits<'a>(pub &'a [[u8; STEP]; FIVE_BITS_STEPS]);

/// Codes of half a group.
#[derive(Clone, Copy)]
pub struct SixBits<'a>(pub &'a [[u8; STEP]; SIX_BITS_STEPS]);

/// Codes of half a group: bits 2t and 2t + 1 of the bytes are step t.
#[derive(Clone, Copy)]
pub struct TwoBits<'a>(pub &'a [u8; STEP]);

/// Codes of five bits: four in `high`, bit 0 of step t in bit t of the bytes of `low`.
#[derive(Clone, Copy)]
pub struct FiveBitsInPlanes<'a> {
    pub high: Nibbles<'a>,
    pub low: &'a [u8; STEP],
}

/// Codes of a byte whose halves lie apart.
#[derive(Clone, Copy)]
pub struct BytesInPlanes<'a> {
    pub high: Nibbles<'a>,
    pub low: Nibbles<'a>,
}

/// Codes of a byte.
#[derive(Clone, Copy)]
pub struct WholeBytes<'a>(pub &'a [[u8; STEP]; GROUP_STEPS]);

/// Bytes of a group's nibbles, of its codes of five bits, and of half of its codes of six.
pub const NIBBLES_BYTES: usize = GROUP_STEPS / 2 * STEP;
pub const FIVE_BITS_BYTES: usize = FIVE_BITS_STEPS * STEP;
pub const SIX_BITS_BYTES: usize = SIX_BITS_STEPS * STEP;

/// Steps of memory that eight steps of codes of five bits take, and four of six bits.
const FIVE_BITS_STEPS: usize = 5;
const SIX_BITS_STEPS: usize = 3;

impl Codes<GROUP_STEPS> for Nibbles<'_> {
    const BITS: u32 = 4;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS] {
        let mut out = [load(&self.0[0]); GROUP_STEPS];
        for t in 0..GROUP_STEPS / 2 {
            let w = load(&self.0[t]);
            (out[2 * t], out[2 * t + 1]) = (s.low_nibbles(w), s.high_nibbles(w));
        }
        out
    }
}

impl<const BITS: u32> Codes<GROUP_STEPS> for Tabled<'_, BITS> {
    const BITS: u32 = BITS;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS] {
        let mut out = self.places.steps(s, load);
        for t in 0..GROUP_STEPS {
            out[t] = s.lookup(self.table, out[t]);
        }
        out
    }
}

impl Codes<GROUP_STEPS> for FiveBits<'_> {
    const BITS: u32 = 5;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS] {
        let [v0, v1, v2, v3, v4] = self.0;
        let (v0, v1, v2, v3, v4) = (load(v0), load(v1), load(v2), load(v3), load(v4));
        let whole = |v: V| s.take_bits::<0, 0x1f>(v);
        let three = |v: V| s.take_bits::<-5, 0x07>(v);
        let c7 = s.insert_bits::<-2, 0x08>(three(v4), v1);
        [
            whole(v0),
            whole(v1),
            whole(v2),
            whole(v3),
            whole(v4),
            s.insert_bits::<-3, 0x18>(three(v0), v1),
            s.insert_bits::<-3, 0x18>(three(v2), v3),
            s.insert_bits::<-1, 0x10>(c7, v3),
        ]
    }
}

impl Codes<{ GROUP_STEPS / 2 }> for SixBits<'_> {
    const BITS: u32 = 6;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS / 2] {
        let [v0, v1, v2] = self.0;
        let (v0, v1, v2) = (load(v0), load(v1), load(v2));
        let whole = |v: V| s.take_bits::<0, 0x3f>(v);
        let c3 = s.insert_bits::<-4, 0x0c>(s.take_bits::<-6, 0x03>(v0), v1);
        [whole(v0), whole(v1), whole(v2), s.insert_bits::<-2, 0x30>(c3, v2)]
    }
}

impl Codes<{ GROUP_STEPS / 2 }> for TwoBits<'_> {
    const BITS: u32 = 4;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS / 2] {
        let v = load(self.0);
        [
            s.take_bits::<0, 3>(v),
            s.take_bits::<-2, 3>(v),
            s.take_bits::<-4, 3>(v),
            s.take_bits::<-6, 3>(v),
        ]
    }
}

impl Codes<GROUP_STEPS> for FiveBitsInPlanes<'_> {
    const BITS: u32 = 5;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS] {
        let low = load(self.low);
        let mut out = [
            s.take_bits::<0, 1>(low),
            s.take_bits::<-1, 1>(low),
            s.take_bits::<-2, 1>(low),
            s.take_bits::<-3, 1>(low),
            s.take_bits::<-4, 1>(low),
            s.take_bits::<-5, 1>(low),
            s.take_bits::<-6, 1>(low),
            s.take_bits::<-7, 1>(low),
        ];
        for t in 0..GROUP_STEPS / 2 {
            let high = load(&self.high.0[t]);
            // Bits 0 to 3, and bits 4 to 7, become bits 1 to 4.
            out[2 * t] = s.insert_bits::<1, 0x1e>(out[2 * t], high);
            out[2 * t + 1] = s.insert_bits::<-3, 0x1e>(out[2 * t + 1], high);
        }
        out
    }
}

impl Codes<GROUP_STEPS> for BytesInPlanes<'_> {
    const BITS: u32 = 8;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        s: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS] {
        let mut out = [load(&self.high.0[0]); GROUP_STEPS];
        for t in 0..GROUP_STEPS / 2 {
            let (high, low) = (load(&self.high.0[t]), load(&self.low.0[t]));
            out[2 * t] = s.join_low_nibbles(high, low);
            out[2 * t + 1] = s.join_high_nibbles(high, low);
        }
        out
    }
}

impl Codes<GROUP_STEPS> for WholeBytes<'_> {
    const BITS: u32 = 8;

    #[inline(always)]
    fn steps<V: Copy, S: Bytes<V>>(
        self,
        _: S,
        load: impl Fn(&[u8; STEP]) -> V,
    ) -> [V; GROUP_STEPS] {
        let mut out = [load(&self.0[0]); GROUP_STEPS];
        for t in 1..GROUP_STEPS {
            out[t] = load(&self.0[t]);
        }
        out
    }
}

/// Four codes of a row, of four columns, one a byte.
pub type Word = u32;

const fn each_byte(byte: u8) -> u32 {
    byte as u32 * 0x0101_0101
}

/// Bits `FROM..FROM + COUNT` of each byte, as the lowest.
const fn field<const FROM: u32, const COUNT: u32>(word: Word) -> Word {
    word >> FROM & each_byte((1 << COUNT) - 1)
}

/// One row's codes of a group as its bytes in four steps; their bits above the fourth do not matter.
pub fn join_nibbles(codes: [Word; GROUP_STEPS]) -> [Word; GROUP_STEPS / 2] {
    std::array::from_fn(|t| field::<0, 4>(codes[2 * t]) | field::<0, 4>(codes[2 * t + 1]) << 4)
}

/// One row's codes of a group as its bytes in five steps; their bits above the fifth do not matter.
pub fn join_five_bits(codes: [Word; GROUP_STEPS]) -> [Word; FIVE_BITS_STEPS] {
    let [c0, c1, c2, c3, c4, c5, c6, c7] = codes;
    let [v0, v1, v2, v3, v4] = [c0, c1, c2, c3, c4].map(field::<0, 5>);
    [
        v0 | field::<0, 3>(c5) << 5,
        v1 | field::<3, 2>(c5) << 6 | field::<3, 1>(c7) << 5,
        v2 | field::<0, 3>(c6) << 5,
        v3 | field::<3, 2>(c6) << 6 | field::<4, 1>(c7) << 5,
        v4 | field::<0, 3>(c7) << 5,
    ]
}

/// One row's codes of half a group as its bytes in three steps; their bits above the sixth do not matter.
pub fn join_six_bits(codes: [Word; GROUP_STEPS / 2]) -> [Word; SIX_BITS_STEPS] {
    let [c0, c1, c2, c3] = codes;
    let [v0, v1, v2] = [c0, c1, c2].map(field::<0, 6>);
    [v0 | field::<0, 2>(c3) << 6, v1 | field::<2, 2>(c3) << 6, v2 | field::<4, 2>(c3) << 6]
}

/// Puts a row's words into the steps at the start of `bytes`.
pub fn put_row(bytes: &mut [u8], row: usize, words: &[Word]) {
    let steps = bytes.as_chunks_mut::<STEP>().0;
    for (step, word) in steps[..words.len()].iter_mut().zip(words) {
        step[4 * row..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Puts the codes of N steps, packed as `join` does, at the start of `bytes`. codes: of a column, by row.
pub fn put<const N: usize, const PACKED: usize>(
    codes: &[[u8; LANES]],
    bytes: &mut [u8],
    join: impl Fn([Word; N]) -> [Word; PACKED],
) {
    for row in 0..LANES {
        let word = |t: usize| Word::from_le_bytes(std::array::from_fn(|i| codes[4 * t + i][row]));
        put_row(bytes, row, &join(std::array::from_fn(word)));
    }
}

/// Code of a column among nibbles.
#[inline]
pub fn nibble(codes: &[u8], row: usize, col: usize) -> u8 {
    let byte = codes[col / 8 * STEP + 4 * row + col % 4];
    if col % 8 < 4 { byte & 15 } else { byte >> 4 }
}

/// Code of a column among those of five bits of its group.
pub fn five_bits(codes: &[u8], row: usize, col: usize) -> u8 {
    let v = |t: usize| codes[t * STEP + 4 * row + col % 4];
    match col / 4 {
        5 => v(0) >> 5 | v(1) >> 6 << 3,
        6 => v(2) >> 5 | v(3) >> 6 << 3,
        7 => v(4) >> 5 | (v(1) >> 5 & 1) << 3 | (v(3) >> 5 & 1) << 4,
        t => v(t) & 31,
    }
}

/// Code of a column among those of six bits of half a group.
pub fn six_bits(codes: &[u8], row: usize, col: usize) -> u8 {
    let v = |t: usize| codes[t * STEP + 4 * row + col % 4];
    match col / 4 {
        3 => v(0) >> 6 | v(1) >> 6 << 2 | v(2) >> 6 << 4,
        t => v(t) & 63,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::GROUP;

    /// Step and bit of memory of each bit of the codes of steps 5 to 7 of five bits, and of step 3 of six.
    const FIVES: [[(usize, u32); 5]; 3] = [
        [(0, 5), (0, 6), (0, 7), (1, 6), (1, 7)],
        [(2, 5), (2, 6), (2, 7), (3, 6), (3, 7)],
        [(4, 5), (4, 6), (4, 7), (1, 5), (3, 5)],
    ];
    const SIXES: [(usize, u32); 6] = [(0, 6), (0, 7), (1, 6), (1, 7), (2, 6), (2, 7)];

    #[test]
    fn every_bit_of_packed_codes_has_the_place_that_the_layout_says() {
        for row in [0, 7, 15] {
            for col in 0..GROUP {
                for bit in 0..5u32 {
                    let mut codes = [[0; LANES]; GROUP];
                    codes[col][row] = 1 << bit;
                    let mut steps = [[0xee; STEP]; FIVE_BITS_STEPS];
                    put(&codes, steps.as_flattened_mut(), join_five_bits);
                    let ones: u32 = steps.as_flattened().iter().map(|v| v.count_ones()).sum();
                    assert_eq!(ones, 1, "row {row} column {col} bit {bit}");
                    let t = col / 4;
                    let (step, at) = if t < 5 { (t, bit) } else { FIVES[t - 5][bit as usize] };
                    assert_eq!(steps[step][4 * row + col % 4], 1 << at);
                    for (col, codes) in codes.iter().enumerate() {
                        assert_eq!(five_bits(steps.as_flattened(), row, col), codes[row]);
                    }
                }
                for bit in 0..if col < GROUP / 2 { 6u32 } else { 0 } {
                    let mut codes = [[0; LANES]; GROUP / 2];
                    codes[col][row] = 1 << bit;
                    let mut steps = [[0xee; STEP]; SIX_BITS_STEPS];
                    put(&codes, steps.as_flattened_mut(), join_six_bits);
                    let ones: u32 = steps.as_flattened().iter().map(|v| v.count_ones()).sum();
                    assert_eq!(ones, 1, "row {row} column {col} bit {bit}");
                    let t = col / 4;
                    let (step, at) = if t < 3 { (t, bit) } else { SIXES[bit as usize] };
                    assert_eq!(steps[step][4 * row + col % 4], 1 << at);
                    for (col, codes) in codes.iter().enumerate() {
                        assert_eq!(six_bits(steps.as_flattened(), row, col), codes[row]);
                    }
                }
            }
        }
    }
}
