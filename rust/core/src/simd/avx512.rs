//! AVX-512 with VNNI: a vector is one register, a panel of 16 rows fills it.

use super::{Bytes, Isa, Kernel, LANES, StackLine, TILE_TOKENS};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx512(()))
    }
}

/// # Safety
/// The CPU must have the features named: holding an [`Avx512`] proves it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn enter<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
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

/// Truth table of "where a: b, elsewhere c".
const SELECT: i32 = 0xca;
/// Truth table of "a and b, or c".
const AND_OR: i32 = 0xea;

/// Words shifted left, right if SHIFT is negative.
///
/// # Safety
/// The CPU must have AVX-512: holding an [`Avx512`] proves it.
#[inline(always)]
unsafe fn shift<const SHIFT: i32>(words: __m512i) -> __m512i {
    // SAFETY: the caller promises the instructions; they touch no memory.
    unsafe {
        let count = _mm_cvtsi32_si128(SHIFT.abs());
        if SHIFT < 0 { _mm512_srl_epi16(words, count) } else { _mm512_sll_epi16(words, count) }
    }
}

impl Bytes<__m512i> for Avx512 {
    #[inline(always)]
    fn low_nibbles(self, b: __m512i) -> __m512i {
        op!(_mm512_and_si512(b, _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, b: __m512i) -> __m512i {
        op!(_mm512_and_si512(_mm512_srli_epi16::<4>(b), _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn join_low_nibbles(self, high: __m512i, low: __m512i) -> __m512i {
        op!(_mm512_ternarylogic_epi32::<SELECT>(
            _mm512_set1_epi8(15),
            low,
            _mm512_slli_epi16::<4>(high)
        ))
    }
    #[inline(always)]
    fn join_high_nibbles(self, high: __m512i, low: __m512i) -> __m512i {
        op!(_mm512_ternarylogic_epi32::<SELECT>(
            _mm512_set1_epi8(15),
            _mm512_srli_epi16::<4>(low),
            high
        ))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], nibbles: __m512i) -> __m512i {
        // SAFETY: `table` is 16 readable bytes; the load needs no alignment.
        let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        op!(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles))
    }
    #[inline(always)]
    fn insert_bits<const SHIFT: i32, const MASK: u8>(
        self,
        low: __m512i,
        plane: __m512i,
    ) -> __m512i {
        op!({
            let mask = _mm512_set1_epi8(MASK as i8);
            _mm512_ternarylogic_epi32::<AND_OR>(shift::<SHIFT>(plane), mask, low)
        })
    }
    #[inline(always)]
    fn take_bits<const SHIFT: i32, const MASK: u8>(self, plane: __m512i) -> __m512i {
        op!(_mm512_and_si512(shift::<SHIFT>(plane), _mm512_set1_epi8(MASK as i8)))
    }
}

impl Isa for Avx512 {
    const FLOAT_TILE: (usize, usize) = (4, 4);
    const REGISTERS: usize = 32;
    const DELTA_TOKENS: usize = 4;
    const BYTE_BIAS: i32 = 128;
    const WIDENS_BYTES: bool = false;

    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type X = __m512i;
    type N = __m512i;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves the features.
        unsafe { enter(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes; the load needs no alignment.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: Self::F, y: &mut [f32; LANES]) {
        // SAFETY: `y` is 64 writable bytes; the store needs no alignment.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        // SAFETY: `x` is 32 readable bytes; the load needs no alignment.
        unsafe {
            let x = _mm256_loadu_si256(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        // SAFETY: `x` is 32 readable bytes; the load needs no alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_f32(self, x: &[u8; 4 * LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes; the load needs no alignment.
        unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        // SAFETY: `x` is 16 readable bytes; the load needs no alignment.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::F {
        // SAFETY: `x` is 16 readable bytes; the load needs no alignment.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, y: &mut [u8; 2 * LANES]) {
        // SAFETY: `y` is 32 writable bytes; the store needs no alignment.
        unsafe {
            let h = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(y.as_mut_ptr().cast(), h);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        op!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        op!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        op!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F) -> Self::I {
        op!(_mm512_cvtps_epi32(a))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        op!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn exp2i(self, n: Self::I) -> Self::F {
        op!({
            let biased = _mm512_add_epi32(n, _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sum_pairs(self, a: Self::I) -> [i32; 2] {
        op!({
            let high = _mm512_extracti64x4_epi64::<1>(a);
            let a = _mm256_add_epi32(_mm512_castsi512_si256(a), high);
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b10_11_00_01>(a));
            [_mm_cvtsi128_si32(a), _mm_extract_epi32::<2>(a)]
        })
    }
    #[inline(always)]
    fn store_i32(self, a: Self::I, y: &mut [i32; LANES]) {
        // SAFETY: `y` is 64 writable bytes; the store needs no alignment.
        unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), a) }
    }
    #[inline(always)]
    fn store_i8(self, a: Self::I, y: &mut [i8; LANES]) {
        // SAFETY: `y` is 16 writable bytes; the store needs no alignment.
        unsafe { _mm_storeu_si128(y.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(a)) }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::B {
        // SAFETY: `x` is 64 readable bytes; the load needs no alignment.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_bytes(self, b: Self::B, y: &mut [u8; 4 * LANES]) {
        // SAFETY: `y` is 64 writable bytes; the store needs no alignment.
        unsafe { _mm512_storeu_si512(y.as_mut_ptr().cast(), b) }
    }
    // Their integer and float accumulators leave 8 of 32 registers for weights and scales. 14 of each fit
    // too, but a Zen 5 reads prompts in w4 3 % slower with them, and a Zen 4 no faster.
    #[inline(always)]
    fn register_tokens(_: u32, _: bool) -> usize {
        TILE_TOKENS
    }
    #[inline(always)]
    fn splat_bytes(self, x: [i8; 4]) -> Self::X {
        op!(_mm512_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8))))
    }
    #[inline(always)]
    fn start_nibbles(self, start: i32) -> Self::N {
        self.splat_i32(start)
    }
    #[inline(always)]
    fn dot_nibbles(self, acc: Self::N, codes: Self::B, x: Self::X) -> Self::N {
        op!(_mm512_dpbusd_epi32(acc, codes, x))
    }
    #[inline(always)]
    fn end_nibbles(self, acc: Self::N, _: i32) -> Self::I {
        acc
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        op!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        op!(_mm512_dpbusd_epi32(acc, codes, x))
    }
    #[inline(always)]
    fn dot_codes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        op!(_mm512_dpbusd_epi32(acc, codes, x))
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
}
