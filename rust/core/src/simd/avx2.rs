//! AVX2 with FMA and F16C, and the same with AVX-VNNI: a vector is two registers.
//!
//! Without VNNI a dot product of bytes is `vpmaddubsw`, which adds two products in 16 bits and
//! saturates. Codes up to 15 leave room for a whole group: 16 * 2 * 15 * 127 / 2 = 30 480 after
//! eight steps; up to 31 for four steps, up to 63 for two. Twice as many fit if the sums begin with minus the
//! zero times those of x (32 512 for codes from -16 to 15 after eight steps): sums of sums wrap around, so
//! only the last must fit. Codes of a byte are widened at once, as |w| and x with the sign of w.

use super::{
    Bytes, Codes, Isa, Kernel, LANES, StackLine, Starts, add_scaled, add_scaled_of, each_token,
};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2, FMA and F16C, and AVX-VNNI if `VNNI`.
#[derive(Clone, Copy)]
pub struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && (!VNNI || is_x86_feature_detected!("avxvnni")))
        .then_some(Avx2(()))
    }
}

/// # Safety
/// The CPU must have the features named: holding an [`Avx2`] proves it.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn enter<K: Kernel>(s: Avx2<false>, kernel: K) -> K::Output {
    std::hint::black_box(&mut StackLine(0));
    kernel.run(s)
}

/// # Safety
/// The CPU must have the features named: holding an [`Avx2`] with VNNI proves it.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn enter_vnni<K: Kernel>(s: Avx2<true>, kernel: K) -> K::Output {
    std::hint::black_box(&mut StackLine(0));
    kernel.run(s)
}

/// An intrinsic on values. Loads and stores are written out where they occur.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches no memory, and `self` proves the instruction set.
        unsafe { $e }
    };
}

/// The same intrinsic on both halves.
macro_rules! both {
    ($f:ident($a:expr)) => {
        op!([$f($a[0]), $f($a[1])])
    };
    ($f:ident($a:expr, $b:expr)) => {
        op!([$f($a[0], $b[0]), $f($a[1], $b[1])])
    };
    ($f:ident($a:expr, $b:expr, $c:expr)) => {
        op!([$f($a[0], $b[0], $c[0]), $f($a[1], $b[1], $c[1])])
    };
}

/// Steps whose products 16 bits hold: 127 (2^bits - 1) 2 run < 2^15, or 127 2^(bits - 1) 2 run if they begin
/// with the zero of the codes.
fn run<const M: usize>(bits: u32, starts: Starts<'_, M>) -> usize {
    if starts.pairs.is_empty() { 1 << (7 - bits) } else { 1 << (8 - bits) }
}

/// The first or the second eight rows of a vector of codes.
#[inline(always)]
fn eight_rows(codes: &[u8; 4 * LANES], half: usize) -> __m256i {
    let codes: &[u8; 2 * LANES] = &codes.as_chunks().0[half];
    // SAFETY: these are 32 readable bytes; the load needs no alignment, and this is part of functions
    // that have AVX2.
    unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// `dot_nibbles` of eight rows.
    #[inline(always)]
    fn add_nibbles(self, acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        if VNNI {
            op!(_mm256_dpbusd_avx_epi32(acc, codes, x))
        } else {
            op!(_mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x)))
        }
    }

    /// Dot products of eight rows with token `m`, whose codes stay in registers while the tokens pass.
    #[inline(always)]
    fn dots_of_eight<C: Codes<N>, const N: usize, const M: usize>(
        self,
        codes: [__m256i; N],
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        m: usize,
    ) -> __m256i {
        let mut sum = self.start_sum(starts, m);
        let length = run(C::BITS, starts);
        for first in (0..N).step_by(length) {
            let mut pairs = self.start_pairs(starts, first / length, m);
            for t in first..N.min(first + length) {
                pairs = self.add_nibbles(pairs, codes[t], self.splat_bytes(x[t][m]));
            }
            sum = op!(_mm256_add_epi32(sum, self.pairs_of_nibbles(pairs)));
        }
        sum
    }

    /// What sums of 32 bits begin with, which may be done by those of 16.
    #[inline(always)]
    fn start_sum<const M: usize>(self, starts: Starts<'_, M>, m: usize) -> __m256i {
        op!(_mm256_set1_epi32(if starts.pairs.is_empty() { starts.sums[m] } else { 0 }))
    }

    /// What the sums of 16 bits of a run of steps begin with.
    #[inline(always)]
    fn start_pairs<const M: usize>(self, starts: Starts<'_, M>, run: usize, m: usize) -> __m256i {
        op!(_mm256_set1_epi32(starts.pairs.get(run).map_or(0, |pairs| pairs[m])))
    }

    /// acc + dots times scales, of eight rows.
    #[inline(always)]
    fn scale_eight(self, dots: __m256i, weights: __m256, x: f32, acc: __m256) -> __m256 {
        op!({
            let scale = _mm256_mul_ps(weights, _mm256_set1_ps(x));
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, acc)
        })
    }

    /// The running sums of eight rows as i32.
    #[inline(always)]
    fn pairs_of_nibbles(self, acc: __m256i) -> __m256i {
        if VNNI { acc } else { op!(_mm256_madd_epi16(acc, _mm256_set1_epi16(1))) }
    }
}

/// Eight rows.
impl<const VNNI: bool> Bytes<__m256i> for Avx2<VNNI> {
    #[inline(always)]
    fn low_nibbles(self, b: __m256i) -> __m256i {
        self.take_bits::<0, 0x0f>(b)
    }
    #[inline(always)]
    fn high_nibbles(self, b: __m256i) -> __m256i {
        self.take_bits::<-4, 0x0f>(b)
    }
    #[inline(always)]
    fn join_low_nibbles(self, high: __m256i, low: __m256i) -> __m256i {
        self.insert_bits::<4, 0xf0>(self.low_nibbles(low), high)
    }
    #[inline(always)]
    fn join_high_nibbles(self, high: __m256i, low: __m256i) -> __m256i {
        self.insert_bits::<0, 0xf0>(self.high_nibbles(low), high)
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], nibbles: __m256i) -> __m256i {
        // SAFETY: `table` is 16 readable bytes; the load needs no alignment.
        let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        op!(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles))
    }
    #[inline(always)]
    fn take_bits<const SHIFT: i32, const MASK: u8>(self, plane: __m256i) -> __m256i {
        op!({
            let count = _mm_cvtsi32_si128(SHIFT.abs());
            let shifted = if SHIFT < 0 {
                _mm256_srl_epi16(plane, count)
            } else {
                _mm256_sll_epi16(plane, count)
            };
            _mm256_and_si256(shifted, _mm256_set1_epi8(MASK as i8))
        })
    }
    #[inline(always)]
    fn insert_bits<const SHIFT: i32, const MASK: u8>(
        self,
        low: __m256i,
        plane: __m256i,
    ) -> __m256i {
        op!(_mm256_or_si256(low, self.take_bits::<SHIFT, MASK>(plane)))
    }
}

/// Sixteen rows: the same twice.
impl<const VNNI: bool> Bytes<[__m256i; 2]> for Avx2<VNNI> {
    #[inline(always)]
    fn low_nibbles(self, b: [__m256i; 2]) -> [__m256i; 2] {
        [self.low_nibbles(b[0]), self.low_nibbles(b[1])]
    }
    #[inline(always)]
    fn high_nibbles(self, b: [__m256i; 2]) -> [__m256i; 2] {
        [self.high_nibbles(b[0]), self.high_nibbles(b[1])]
    }
    #[inline(always)]
    fn join_low_nibbles(self, high: [__m256i; 2], low: [__m256i; 2]) -> [__m256i; 2] {
        [self.join_low_nibbles(high[0], low[0]), self.join_low_nibbles(high[1], low[1])]
    }
    #[inline(always)]
    fn join_high_nibbles(self, high: [__m256i; 2], low: [__m256i; 2]) -> [__m256i; 2] {
        [self.join_high_nibbles(high[0], low[0]), self.join_high_nibbles(high[1], low[1])]
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], nibbles: [__m256i; 2]) -> [__m256i; 2] {
        [self.lookup(table, nibbles[0]), self.lookup(table, nibbles[1])]
    }
    #[inline(always)]
    fn take_bits<const SHIFT: i32, const MASK: u8>(self, plane: [__m256i; 2]) -> [__m256i; 2] {
        [self.take_bits::<SHIFT, MASK>(plane[0]), self.take_bits::<SHIFT, MASK>(plane[1])]
    }
    #[inline(always)]
    fn insert_bits<const SHIFT: i32, const MASK: u8>(
        self,
        low: [__m256i; 2],
        plane: [__m256i; 2],
    ) -> [__m256i; 2] {
        [
            self.insert_bits::<SHIFT, MASK>(low[0], plane[0]),
            self.insert_bits::<SHIFT, MASK>(low[1], plane[1]),
        ]
    }
}

impl<const VNNI: bool> Isa for Avx2<VNNI> {
    const FLOAT_TILE: (usize, usize) = (2, 2);
    const REGISTERS: usize = 8;
    const DELTA_TOKENS: usize = 2;
    const BYTE_BIAS: i32 = if VNNI { 128 } else { 0 };
    const WIDENS_BYTES: bool = !VNNI;

    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    type X = __m256i;
    type N = [__m256i; 2];

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe { if VNNI { enter_vnni(Avx2(()), kernel) } else { enter(Avx2(()), kernel) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        op!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes; the loads need no alignment.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: Self::F, y: &mut [f32; LANES]) {
        // SAFETY: `y` is 64 writable bytes; the stores need no alignment.
        unsafe {
            _mm256_storeu_ps(y.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(y.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        // SAFETY: `x` is 32 readable bytes; the loads need no alignment.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(16).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        // SAFETY: `x` is 32 readable bytes; the loads need no alignment.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(16).cast())),
            ]
        }
    }
    #[inline(always)]
    fn load_f32(self, x: &[u8; 4 * LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes; the loads need no alignment.
        unsafe { [_mm256_loadu_ps(x.as_ptr().cast()), _mm256_loadu_ps(x.as_ptr().add(32).cast())] }
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        // SAFETY: `x` is 16 readable bytes; the load needs no alignment.
        let x = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
        op!([_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(x))]
            .map(|x| _mm256_cvtepi32_ps(x)))
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::F {
        // SAFETY: `x` is 16 readable bytes; the load needs no alignment.
        let x = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
        op!([_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(x))]
            .map(|x| _mm256_cvtepi32_ps(x)))
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, y: &mut [u8; 2 * LANES]) {
        // SAFETY: `y` is 32 writable bytes; the stores need no alignment.
        unsafe {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
            _mm_storeu_si128(y.as_mut_ptr().cast(), _mm256_cvtps_ph::<NEAREST>(v[0]));
            _mm_storeu_si128(y.as_mut_ptr().add(16).cast(), _mm256_cvtps_ph::<NEAREST>(v[1]));
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        let sign = op!(_mm256_set1_ps(-0.0));
        op!([_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])])
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        op!([
            _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])),
        ])
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        op!({
            let a = _mm256_add_ps(a[0], a[1]);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        op!({
            let a = _mm256_max_ps(a[0], a[1]);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F) -> Self::I {
        both!(_mm256_cvtps_epi32(a))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        both!(_mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn exp2i(self, n: Self::I) -> Self::F {
        let biased = self.add_i32(n, self.splat_i32(127));
        op!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased[0])),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased[1])),
        ])
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        both!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sum_pairs(self, a: Self::I) -> [i32; 2] {
        op!({
            let a = _mm256_add_epi32(a[0], a[1]);
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b10_11_00_01>(a));
            [_mm_cvtsi128_si32(a), _mm_extract_epi32::<2>(a)]
        })
    }
    #[inline(always)]
    fn store_i32(self, a: Self::I, y: &mut [i32; LANES]) {
        // SAFETY: `y` is 64 writable bytes; the stores need no alignment.
        unsafe {
            _mm256_storeu_si256(y.as_mut_ptr().cast(), a[0]);
            _mm256_storeu_si256(y.as_mut_ptr().add(8).cast(), a[1]);
        }
    }
    #[inline(always)]
    fn store_i8(self, a: Self::I, y: &mut [i8; LANES]) {
        // SAFETY: `y` is 16 writable bytes; the store needs no alignment.
        unsafe {
            // Packing works within 128-bit halves; the permutation restores the order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a[0], a[1]));
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(y.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::B {
        // SAFETY: `x` is 64 readable bytes; the loads need no alignment.
        unsafe {
            [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(32).cast())]
        }
    }
    #[inline(always)]
    fn store_bytes(self, b: Self::B, y: &mut [u8; 4 * LANES]) {
        // SAFETY: `y` is 64 writable bytes; the stores need no alignment.
        unsafe {
            _mm256_storeu_si256(y.as_mut_ptr().cast(), b[0]);
            _mm256_storeu_si256(y.as_mut_ptr().add(32).cast(), b[1]);
        }
    }
    #[inline(always)]
    fn splat_bytes(self, x: [i8; 4]) -> Self::X {
        op!(_mm256_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8))))
    }
    #[inline(always)]
    fn start_nibbles(self, _: i32) -> Self::N {
        op!([_mm256_setzero_si256(); 2])
    }
    #[inline(always)]
    fn dot_nibbles(self, acc: Self::N, codes: Self::B, x: Self::X) -> Self::N {
        [self.add_nibbles(acc[0], codes[0], x), self.add_nibbles(acc[1], codes[1], x)]
    }
    #[inline(always)]
    fn end_nibbles(self, acc: Self::N, start: i32) -> Self::I {
        self.add_i32(acc.map(|acc| self.pairs_of_nibbles(acc)), self.splat_i32(start))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        op!([_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        if VNNI {
            both!(_mm256_dpbusd_avx_epi32(acc, codes, [x; 2]))
        } else {
            let flip = op!(_mm256_set1_epi8(-128));
            let one = op!(_mm256_set1_epi16(1));
            let w = both!(_mm256_xor_si256(codes, [flip; 2]));
            let signed = both!(_mm256_sign_epi8([x; 2], w));
            let size = both!(_mm256_abs_epi8(w));
            let pairs = both!(_mm256_maddubs_epi16(size, signed));
            let products = both!(_mm256_madd_epi16(pairs, [one; 2]));
            self.add_i32(acc, products)
        }
    }
    #[inline(always)]
    fn dot_codes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        if VNNI {
            both!(_mm256_dpbusd_avx_epi32(acc, codes, [x; 2]))
        } else {
            let pairs = both!(_mm256_maddubs_epi16(codes, [x; 2]));
            let one = op!(_mm256_set1_epi16(1));
            self.add_i32(acc, both!(_mm256_madd_epi16(pairs, [one; 2])))
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, x: &[T], at: usize) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().wrapping_add(at)) }
    }
    #[inline(always)]
    fn prefetch_l2<T>(self, x: &[T], at: usize) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().cast::<i8>().wrapping_add(at)) }
    }
    #[inline(always)]
    fn prefetch_once<T>(self, x: &[T], at: usize) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(x.as_ptr().cast::<i8>().wrapping_add(at)) }
    }

    // Without VNNI eight rows at a time, whose codes stay in registers while a few tokens pass. Codes of a
    // byte are widened at once, which leaves no room for that.
    #[inline(always)]
    fn dots<C: Codes<N>, const N: usize, const M: usize>(
        self,
        codes: C,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
    ) -> [Self::I; M] {
        if VNNI || C::BITS == 8 {
            return each_token::dots(self, codes, x, starts);
        }
        let mut out = [self.splat_i32(0); M];
        for half in 0..2 {
            let w = codes.steps(self, |bytes| eight_rows(bytes, half));
            for m in 0..M {
                out[m][half] = self.dots_of_eight::<C, N, M>(w, x, starts, m);
            }
        }
        out
    }
    #[inline(always)]
    fn add_dots<C: Codes<N>, const N: usize, const M: usize>(
        self,
        codes: C,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        scales: (Self::F, &[f32; M]),
        acc: &mut [Self::F; M],
    ) {
        if VNNI || C::BITS == 8 {
            return add_scaled(self, each_token::dots(self, codes, x, starts), scales, acc);
        }
        for half in 0..2 {
            let w = codes.steps(self, |bytes| eight_rows(bytes, half));
            for m in 0..M {
                let dots = self.dots_of_eight::<C, N, M>(w, x, starts, m);
                acc[m][half] = self.scale_eight(dots, scales.0[half], scales.1[m], acc[m][half]);
            }
        }
    }

    // Running products are two registers of 16 a token, or more where sums of 16 bits become sums of 32 on
    // the way; the float accumulators of a tile are in the cache.
    #[inline(always)]
    fn register_tokens(bits: u32, centred: bool) -> usize {
        match bits {
            _ if VNNI => 4,
            4 => 6,
            5 if centred => 6,
            _ => 3,
        }
    }
    #[inline(always)]
    fn add_codes_of<const BITS: u32, const N: usize, const M: usize, const T: usize>(
        self,
        codes: &[[u8; 4 * LANES]; N],
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        scales: (Self::F, &[f32; M]),
        acc: &mut [Self::F; M],
        first: usize,
    ) {
        if VNNI || BITS == 8 {
            let dots = each_token::unpacked::<Self, BITS, N, M, T>(self, codes, x, starts, first);
            return add_scaled_of(self, dots, scales, acc, first);
        }
        let mut sums = [[op!(_mm256_setzero_si256()); 2]; T];
        for i in 0..T {
            sums[i] = [self.start_sum(starts, first + i); 2];
        }
        let length = run(BITS, starts);
        for begin in (0..N).step_by(length) {
            let mut pairs = sums;
            for i in 0..T {
                pairs[i] = [self.start_pairs(starts, begin / length, first + i); 2];
            }
            for t in begin..N.min(begin + length) {
                let w = [eight_rows(&codes[t], 0), eight_rows(&codes[t], 1)];
                for i in 0..T {
                    let x = self.splat_bytes(x[t][first + i]);
                    for half in 0..2 {
                        pairs[i][half] = self.add_nibbles(pairs[i][half], w[half], x);
                    }
                }
            }
            for i in 0..T {
                for half in 0..2 {
                    let dots = self.pairs_of_nibbles(pairs[i][half]);
                    sums[i][half] = op!(_mm256_add_epi32(sums[i][half], dots));
                }
            }
        }
        for i in 0..T {
            for half in 0..2 {
                let (acc, x) = (&mut acc[first + i][half], scales.1[first + i]);
                *acc = self.scale_eight(sums[i][half], scales.0[half], x, *acc);
            }
        }
    }
}
