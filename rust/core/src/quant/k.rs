//! Formats of super-blocks of 256 columns, which hold the numbers of Q4_K, Q5_K, Q6_K (and so those
//! of Q3_K), Q2_K and IQ4_XS.
//!
//! [`W4K`], 4.625 bits a weight: weight = d a code - m b, with d and m one f16 each per row and
//! super-block, a and b one byte each per row and group of 32, codes of 4 bits. A super-block (16
//! rows, 256 columns) is 2368 bytes:
//!
//!     16 x f16       d of rows 0..16
//!     16 x f16       m
//!     8 x 16 B       a: of group 0 rows 0..16, of group 1 ...
//!     8 x 16 B       b
//!     8 x 4 x 64 B   codes of a group in the order of W4
//!
//! [`W5K`], 5.625 bits, is the same with codes of 5 bits: a super-block is 2880 bytes and ends in
//!
//!     8 x 5 x 64 B   codes of a group in the order of [`super::codes`]
//!
//! [`W6K`], 6.625 bits: weight = d a (code - 32), with one signed byte a per row and 16 columns. A
//! super-block is 3392 bytes:
//!
//!     16 x f16       d
//!     32 B           zeros, so that what follows stays at whole cache lines
//!     16 x 16 B      a
//!     16 x 3 x 64 B  codes of half a group in the order of [`super::codes`]
//!
//! [`W4NlK`], 4.375 bits: weight = d a TABLE[code] with the table of W4NL, one signed byte a per row
//! and group. A super-block is 2240 bytes:
//!
//!     16 x f16       d
//!     32 B           zeros
//!     8 x 16 B       a
//!     8 x 4 x 64 B   codes of a group in the order of W4
//!
//! [`W2K`], 2.625 bits: weight = d a code - m b, with d and m one f16 each per row and super-block,
//! a and b four bits each per row and 16 columns, codes of 2 bits. A super-block is 1344 bytes:
//!
//!     16 x f16       d
//!     16 x f16       m
//!     16 x 16 B      of 16 columns each: a of rows 0..16 in the low nibbles, b in the high ones
//!     16 x 64 B      codes of 16 columns each, row r at bytes 4r..4r+4: bits 2t, 2t + 1 of byte i
//!                    are column 4t + i
//!
//! All is in the order in which the kernels read it: the hardware that asks for the next lines of a
//! stream gives up if a line is read before an earlier one. With high bits behind the low ones a core
//! of a Zen 5 read W5K and W6K at 17 GB/s in place of 38.

use super::codes::{
    self, FIVE_BITS_BYTES, FiveBits, NIBBLES_BYTES, Nibbles, SIX_BITS_BYTES, SixBits, TwoBits,
    nibble,
};
use super::ggml::HALF;
use super::search::{self, Integers, Numbers};
use super::w4_nl;
use super::{Encode, GROUP, Group, Layout, Packed, STEP, UnpackedGroup, add_offsets};
use crate::simd::{Isa, LANES, Starts, unpack};
use half::f16;

/// Columns of a super-block, and the groups in it.
pub const SUPER: usize = 256;
pub(super) const GROUPS: usize = SUPER / GROUP;
const HALVES: usize = 2 * GROUPS;

/// The scales of W4K and W5K.
pub(super) const A: usize = 2 * 2 * LANES;
pub(super) const B: usize = A + GROUPS * LANES;
pub(super) const AFFINE: usize = B + GROUPS * LANES;
/// Those of W6K.
pub(super) const A6: usize = 64;
pub(super) const SIGNED: usize = A6 + HALVES * LANES;
const ZERO6: i32 = 32;

pub const W4K_BYTES: usize = AFFINE + GROUPS * NIBBLES_BYTES;
pub const W5K_BYTES: usize = AFFINE + GROUPS * FIVE_BITS_BYTES;
/// The scales of W4NlK.
pub(super) const TABLED: usize = A6 + GROUPS * LANES;

pub const W4NLK_BYTES: usize = TABLED + GROUPS * NIBBLES_BYTES;
pub const W6K_BYTES: usize = SIGNED + HALVES * SIX_BITS_BYTES;

/// The scales of W2K.
pub(super) const PAIRED: usize = A + HALVES * LANES;

pub const W2K_BYTES: usize = PAIRED + HALVES * STEP;

pub struct W2K;
pub struct W4NlK;
pub struct W4K;
pub struct W5K;
pub struct W6K;

/// d a and -m b of group `g`, a row a lane.
#[inline(always)]
fn affine<S: Isa>(s: S, block: &[u8], g: usize) -> (S::F, S::F) {
    let halves = block.as_chunks().0;
    let (d, m) = (s.load_f16(&halves[0]), s.load_f16(&halves[1]));
    let bytes = block[A..AFFINE].as_chunks().0;
    let offset = s.mul(m, s.load_u8(&bytes[GROUPS + g]));
    (s.mul(d, s.load_u8(&bytes[g])), s.sub(s.splat(0.0), offset))
}

fn decode_affine(block: &[u8], row: usize, g: usize, code: u8) -> f32 {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let byte = |at: usize| f32::from(block[at + g * LANES + row]);
    let (d, m) = (half(2 * row), half(2 * LANES + 2 * row));
    d * byte(A) * f32::from(code) - m * byte(B)
}

/// The codes of group `g` of a block of W4K.
#[inline(always)]
fn nibbles(block: &[u8; W4K_BYTES], g: usize) -> Nibbles<'_> {
    Nibbles(&block[AFFINE..].as_chunks().0.as_chunks().0[g])
}

/// The codes of group `g` of a block of W5K.
#[inline(always)]
fn five_bits(block: &[u8; W5K_BYTES], g: usize) -> FiveBits<'_> {
    FiveBits(&block[AFFINE..].as_chunks().0.as_chunks().0[g])
}

impl Packed for W4K {
    type Block = [u8; W4K_BYTES];
    const GROUPS: usize = GROUPS;
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
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let (scales, offsets) = affine(s, block, g);
        s.add_dots(nibbles(block, g), x.codes, Starts::ZERO, (scales, x.scales), acc);
        add_offsets(s, offsets, x.totals, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let (scales, offsets) = affine(s, block, g);
        out.put(s, unpack(s, nibbles(block, g)), [scales, offsets]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let g = col / GROUP;
        let code = nibble(&block[AFFINE + g * NIBBLES_BYTES..], row, col % GROUP);
        decode_affine(block, row, g, code)
    }
}

impl Packed for W5K {
    type Block = [u8; W5K_BYTES];
    const GROUPS: usize = GROUPS;
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
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    ) {
        let (scales, offsets) = affine(s, block, g);
        s.add_dots(five_bits(block, g), x.codes, Starts::ZERO, (scales, x.scales), acc);
        add_offsets(s, offsets, x.totals, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let (scales, offsets) = affine(s, block, g);
        out.put(s, unpack(s, five_bits(block, g)), [scales, offsets]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let g = col / GROUP;
        let code = codes::five_bits(&block[AFFINE + g * FIVE_BITS_BYTES..], row, col % GROUP);
        decode_affine(block, row, g, code)
    }
}

/// The low and the high nibbles of some bytes.
#[inline(always)]
fn split_nibbles<S: Isa>(s: S, bytes: &[u8; LANES]) -> (S::F, S::F) {
    let bytes = s.load_u8(bytes);
    // (16 high + low - 7.5) / 16 is less than a half away from high.
    let near = s.fma(bytes, s.splat(1.0 / 16.0), s.splat(-7.5 / 16.0));
    let high = s.to_f32(s.to_i32(near));
    (s.fma(high, s.splat(-16.0), bytes), high)
}

impl Packed for W2K {
    type Block = [u8; W2K_BYTES];
    const GROUPS: usize = GROUPS;
    const LAYOUT: Option<Layout> = None;

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
        let units = block.as_chunks().0;
        let (d, m_unit) = (s.load_f16(&units[0]), s.load_f16(&units[1]));
        let factors = block[A..PAIRED].as_chunks().0;
        let planes: &[[[u8; STEP]; 2]] = block[PAIRED..].as_chunks().0.as_chunks().0;
        let [first, second] = &planes[g];
        let [early, late] = x.halves();
        let first = s.dots(TwoBits(first), early, Starts::ZERO);
        let second = s.dots(TwoBits(second), late, Starts::ZERO);
        let (a0, b0) = split_nibbles(s, &factors[2 * g]);
        let (a1, b1) = split_nibbles(s, &factors[2 * g + 1]);
        // The starts are -32 times the sums of a half, and -8 times those of both.
        let step = s.mul(s.sub(b0, b1), s.splat(1.0 / 32.0));
        let rest = s.mul(b1, s.splat(1.0 / 8.0));
        for m in 0..M {
            // Both are exact: integers below 2^24; b0 half + b1 (sum - half), negative, is the latter.
            let dot = s.fma(a1, s.to_f32(second[m]), s.mul(a0, s.to_f32(first[m])));
            let half = s.splat(x.starts_of_half(0).sums[m] as f32);
            let sum = s.splat(x.starts_at_8().sums[m] as f32);
            let minus = s.fma(step, half, s.mul(rest, sum));
            let product = s.fma(d, dot, s.mul(m_unit, minus));
            acc[m] = s.fma(product, s.splat(x.scales[m]), acc[m]);
        }
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let _ = (s, block, g, out);
        unreachable!("products of W2K add up integers first");
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let (half, col) = (col / HALF, col % HALF);
        let unit = |i: usize| f16::from_le_bytes(block.as_chunks().0[i]).to_f32();
        let factors = block[A + half * LANES + row];
        let plane = &block[PAIRED + half * STEP..];
        let code = plane[4 * row + col % 4] >> (col / 4 * 2) & 3;
        let scale = unit(row) * f32::from(factors & 15);
        scale * f32::from(code) - unit(LANES + row) * f32::from(factors >> 4)
    }
}

/// The scales of group `g` of a block of W4NlK, a row a lane.
#[inline(always)]
fn tabled_scales<S: Isa>(s: S, block: &[u8], g: usize) -> S::F {
    let d = s.load_f16(&block.as_chunks().0[0]);
    s.mul(d, s.load_i8(&block[A6..TABLED].as_chunks().0[g]))
}

/// The codes of group `g` of a block of W4NlK.
#[inline(always)]
fn places(block: &[u8; W4NLK_BYTES], g: usize) -> Nibbles<'_> {
    Nibbles(&block[TABLED..].as_chunks().0.as_chunks().0[g])
}

impl Packed for W4NlK {
    type Block = [u8; W4NLK_BYTES];
    const GROUPS: usize = GROUPS;
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
        let scales = (tabled_scales(s, block, g), x.scales);
        s.add_dots(w4_nl::tabled(places(block, g)), x.codes, x.starts_at_128(), scales, acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let codes = unpack(s, w4_nl::tabled(places(block, g)));
        out.put(s, codes, [tabled_scales(s, block, g)]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let (g, col) = (col / GROUP, col % GROUP);
        let code = nibble(&block[TABLED + g * NIBBLES_BYTES..], row, col);
        let d = f16::from_le_bytes([block[2 * row], block[2 * row + 1]]).to_f32();
        let a = f32::from(block[A6 + g * LANES + row] as i8);
        d * a * f32::from(w4_nl::TABLE[usize::from(code)])
    }
}

/// Codes and scales of one half of group `g` of a block of W6K.
#[inline(always)]
fn half<S: Isa>(s: S, block: &[u8; W6K_BYTES], g: usize, half: usize) -> (SixBits<'_>, S::F) {
    let (codes, _) = block[SIGNED..].as_chunks::<STEP>().0.as_chunks();
    let d = s.load_f16(&block.as_chunks().0[0]);
    let a = block[A6..SIGNED].as_chunks().0;
    (SixBits(&codes[2 * g + half]), s.mul(d, s.load_i8(&a[2 * g + half])))
}

impl Packed for W6K {
    type Block = [u8; W6K_BYTES];
    const GROUPS: usize = GROUPS;
    const LAYOUT: Option<Layout> = Some(Layout::ScaledHalves);

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
        let [early, late] = x.halves();
        let (codes, scales) = half(s, block, g, 0);
        s.add_dots(codes, early, x.starts_of_half(0), (scales, x.scales), acc);
        let (codes, scales) = half(s, block, g, 1);
        s.add_dots(codes, late, x.starts_of_half(1), (scales, x.scales), acc);
    }

    #[inline(always)]
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>) {
        let ((early, first), (late, second)) = (half(s, block, g, 0), half(s, block, g, 1));
        let ([a, b, c, d], [e, f, g, h]) = (unpack(s, early), unpack(s, late));
        out.put(s, [a, b, c, d, e, f, g, h], [first, second]);
    }

    fn decode(block: &Self::Block, row: usize, col: usize) -> f32 {
        let (half, col) = (col / HALF, col % HALF);
        let code = codes::six_bits(&block[SIGNED + half * SIX_BITS_BYTES..], row, col);
        let d = f16::from_le_bytes([block[2 * row], block[2 * row + 1]]).to_f32();
        let a = f32::from(block[A6 + half * LANES + row] as i8);
        d * a * (i32::from(code) - ZERO6) as f32
    }
}

impl Encode for W4K {
    #[inline(always)]
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block) {
        let put = |g: usize, codes: &[[u8; LANES]; GROUP], block: &mut [u8]| {
            codes::put(codes, &mut block[AFFINE + g * NIBBLES_BYTES..], codes::join_nibbles);
        };
        encode_affine(s, 15.0, w, importance, block, put);
    }
}

impl Encode for W5K {
    #[inline(always)]
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block) {
        let put = |g: usize, codes: &[[u8; LANES]; GROUP], block: &mut [u8]| {
            codes::put(codes, &mut block[AFFINE + g * FIVE_BITS_BYTES..], codes::join_five_bits);
        };
        encode_affine(s, 31.0, w, importance, block, put);
    }
}

/// Quantises a super-block of W4K or W5K. put: stores the codes of a group in the block.
#[inline(always)]
fn encode_affine<S: Isa>(
    s: S,
    levels: f32,
    w: &[[f32; LANES]],
    importance: &[f32],
    block: &mut [u8],
    put: impl Fn(usize, &[[u8; LANES]; GROUP], &mut [u8]),
) {
    let zero = s.splat(0.0);
    let groups = || w.as_chunks::<GROUP>().0.iter().zip(importance.chunks_exact(GROUP));
    let mut pairs = [(zero, zero); GROUPS];
    let mut largest = (zero, zero);
    for (pair, (w, importance)) in pairs.iter_mut().zip(groups()) {
        *pair = search::scale_and_offset(s, levels, w, importance);
        largest = (s.max(largest.0, pair.0), s.max(largest.1, pair.1));
    }
    for (place, largest) in [largest.0, largest.1].into_iter().enumerate() {
        let unit = s.mul(largest, s.splat(1.0 / BYTE));
        s.store_f16(unit, &mut block.as_chunks_mut().0[place]);
    }
    for (g, (d, m)) in pairs.into_iter().enumerate() {
        for (place, value) in [d, m].into_iter().enumerate() {
            let unit = s.load_f16(&block.as_chunks().0[place]);
            let used = s.select_gt(unit, zero, unit, s.splat(f32::INFINITY));
            let factor = search::level(s, BYTE, s.div(value, used));
            let mut bytes = [0.0; LANES];
            s.store(factor, &mut bytes);
            let at = [A, B][place] + g * LANES;
            block[at..at + LANES].copy_from_slice(&bytes.map(|x| x as u8));
        }
    }
    for (g, (w, _)) in groups().enumerate() {
        let (d, m) = affine(s, block, g);
        let divisor = s.select_gt(d, zero, d, s.splat(f32::INFINITY));
        let mut codes = [[0u8; LANES]; GROUP];
        for (w, codes) in w.iter().zip(&mut codes) {
            let mut q = [0.0; LANES];
            s.store(search::level(s, levels, s.div(s.sub(s.load(w), m), divisor)), &mut q);
            *codes = q.map(|q| q as u8);
        }
        put(g, &codes, block);
    }
}

/// The largest factor of an unsigned and of a signed byte.
const BYTE: f32 = 255.0;
const SIGNED_BYTE: f32 = 127.0;

impl Encode for W6K {
    #[inline(always)]
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block) {
        type Codes = Integers<-32, 31>;
        let zero = s.splat(0.0);
        let halves = || w.as_chunks::<HALF>().0.iter().zip(importance.chunks_exact(HALF));
        let mut scales = [zero; HALVES];
        let mut largest = zero;
        for (scale, (w, importance)) in scales.iter_mut().zip(halves()) {
            *scale = search::scale::<S, Codes>(s, w, importance);
            largest = s.max(largest, s.abs(*scale));
        }
        block[..A6].fill(0);
        s.store_f16(s.mul(largest, s.splat(1.0 / SIGNED_BYTE)), &mut block.as_chunks_mut().0[0]);
        let d = s.load_f16(&block.as_chunks().0[0]);
        let used = s.select_gt(d, zero, d, s.splat(f32::INFINITY));
        for (half, (scale, (w, _))) in scales.into_iter().zip(halves()).enumerate() {
            let factor = s.to_i32(s.div(scale, used));
            let mut a = [0; LANES];
            s.store_i8(factor, &mut a);
            let at = A6 + half * LANES;
            block[at..at + LANES].copy_from_slice(&a.map(|a| a as u8));
            let scale = s.mul(d, s.to_f32(factor));
            let divisor = s.select_gt(s.abs(scale), zero, scale, s.splat(f32::INFINITY));
            let mut codes = [[0; LANES]; HALF];
            for (w, codes) in w.iter().zip(&mut codes) {
                let mut q = [0.0; LANES];
                s.store(Codes::nearest(s, s.div(s.load(w), divisor)), &mut q);
                *codes = q.map(|q| (q as i32 + ZERO6) as u8);
            }
            let at = SIGNED + half * SIX_BITS_BYTES;
            codes::put(&codes, &mut block[at..], codes::join_six_bits);
        }
    }
}
