//! NEON, and the same with the dot product and the matrix product instructions: a vector is four
//! registers of four lanes.
//!
//! With the former `sdot` adds four products of signed bytes to each lane: codes up to 15 are signed bytes
//! already, larger ones become signed by their highest bit. Without it products are widened to
//! 16 bits and added in pairs, which holds a whole group of codes up to 15:
//! 2 * 8 * 15 * 127 = 30 480.
//!
//! With the latter `smmla` multiplies two rows by two tokens over eight columns, twice the work of
//! `sdot`. Two tokens then share their eight registers of sums:
//!
//!     acc[m][i]:      rows 4i, 4i+1 by tokens m, m+1      [r0 t0, r0 t1, r1 t0, r1 t1]
//!     acc[m+1][i]:    rows 4i+2, 4i+3 by the same
//!
//! A token left over takes `sdot`. `sdot`, `smmla` and `prfm` are written as assembly: there is no
//! stable intrinsic.

use super::{Bytes, Codes, Isa, Kernel, LANES, Starts, add_scaled_of, each_token, unpack};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

/// An intrinsic on values. Loads and stores are written out where they occur.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches no memory, and `self` proves the instruction set.
        unsafe { $e }
    };
}

/// The same intrinsic on all four quarters.
macro_rules! each {
    ($f:ident $(::<$n:literal>)? ($a:expr)) => {
        op!([$f$(::<$n>)?($a[0]), $f$(::<$n>)?($a[1]), $f$(::<$n>)?($a[2]), $f$(::<$n>)?($a[3])])
    };
    ($f:ident $(::<$n:literal>)? ($a:expr, $b:expr)) => {
        op!([
            $f$(::<$n>)?($a[0], $b[0]),
            $f$(::<$n>)?($a[1], $b[1]),
            $f$(::<$n>)?($a[2], $b[2]),
            $f$(::<$n>)?($a[3], $b[3]),
        ])
    };
    ($f:ident($a:expr, $b:expr, $c:expr)) => {
        op!([
            $f($a[0], $b[0], $c[0]),
            $f($a[1], $b[1], $c[1]),
            $f($a[2], $b[2], $c[2]),
            $f($a[3], $b[3], $c[3]),
        ])
    };
}

/// Proof that the CPU has NEON, the dot product instructions if `DOTPROD`, and both those and the
/// matrix product instructions if `I8MM`.
#[derive(Clone, Copy)]
pub struct Neon<const DOTPROD: bool, const I8MM: bool>(());

impl<const DOTPROD: bool, const I8MM: bool> Neon<DOTPROD, I8MM> {
    pub fn detect() -> Option<Self> {
        // Bytes are reinterpreted as wider lanes, in the order of the files.
        (cfg!(target_endian = "little")
            && is_aarch64_feature_detected!("neon")
            && (!(DOTPROD || I8MM) || is_aarch64_feature_detected!("dotprod"))
            && (!I8MM || is_aarch64_feature_detected!("i8mm")))
        .then_some(Neon(()))
    }

    /// Codes of up to `bits` bits as signed bytes, less 128 if they are whole bytes.
    #[inline(always)]
    fn numbers(self, bits: u32, codes: [uint8x16_t; 4]) -> [int8x16_t; 4] {
        if bits == 8 { self.signed(codes) } else { each!(vreinterpretq_s8_u8(codes)) }
    }

    /// Codes with the offset 128 as signed bytes.
    #[inline(always)]
    fn signed(self, codes: [uint8x16_t; 4]) -> [int8x16_t; 4] {
        let signed = each!(veorq_u8(codes, [vdupq_n_u8(128); 4]));
        each!(vreinterpretq_s8_u8(signed))
    }

    /// The sums of [`products_of_pairs`] by token, plus its number in `starts`.
    #[inline(always)]
    fn part_pairs<const M: usize>(
        self,
        acc: [[int32x4_t; 4]; M],
        starts: &[i32; M],
    ) -> [[int32x4_t; 4]; M] {
        let mut out = acc;
        for m in (0..M / 2 * 2).step_by(2) {
            out[m] = each!(vuzp1q_s32(acc[m], acc[m + 1]));
            out[m + 1] = each!(vuzp2q_s32(acc[m], acc[m + 1]));
        }
        for m in 0..M {
            out[m] = self.add_i32(out[m], self.splat_i32(starts[m]));
        }
        out
    }
}

/// # Safety
/// The CPU must have NEON: holding a [`Neon`] proves it.
#[target_feature(enable = "neon")]
unsafe fn enter<K: Kernel>(s: Neon<false, false>, kernel: K) -> K::Output {
    kernel.run(s)
}

/// # Safety
/// The CPU must have the features named: holding a [`Neon`] with `DOTPROD` proves it.
#[target_feature(enable = "neon,dotprod")]
unsafe fn enter_dotprod<K: Kernel>(s: Neon<true, false>, kernel: K) -> K::Output {
    kernel.run(s)
}

/// # Safety
/// The CPU must have the features named: holding a [`Neon`] with `I8MM` proves it.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn enter_i8mm<K: Kernel>(s: Neon<true, true>, kernel: K) -> K::Output {
    kernel.run(s)
}

/// acc + sum of a b over the four bytes of each lane.
///
/// # Safety
/// The CPU must have the dot product instructions.
#[inline(always)]
unsafe fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the caller promises the instruction; it touches registers only.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// acc + a b^T for two rows of eight bytes each: [a0 b0, a0 b1, a1 b0, a1 b1].
///
/// # Safety
/// The CPU must have the matrix product instructions.
#[inline(always)]
unsafe fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the caller promises the instruction; it touches registers only.
    unsafe {
        asm!(
            "smmla {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// Sums of two neighbouring products of bytes. They must fit 16 bits: two of -128 by -128 do not.
///
/// # Safety
/// The CPU must have NEON.
#[inline(always)]
unsafe fn pairs(a: int8x16_t, b: int8x16_t) -> int16x8_t {
    // SAFETY: the caller promises NEON; the intrinsics touch no memory.
    unsafe { vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)) }
}

/// acc + the products of two steps with M tokens, two tokens at once.
///
/// first, second: four columns each of 16 rows, as signed bytes.
///
/// # Safety
/// The CPU must have the dot product and the matrix product instructions.
#[inline(always)]
unsafe fn products_of_pairs<const M: usize>(
    acc: &mut [[int32x4_t; 4]; M],
    first: [int8x16_t; 4],
    second: [int8x16_t; 4],
    x: [&[[i8; 4]; M]; 2],
) {
    let word = |x: [i8; 4]| i32::from_ne_bytes(x.map(|x| x as u8));
    // SAFETY: the caller promises the instructions; all work is on registers.
    unsafe {
        let pair = |i: usize| (vreinterpretq_s32_s8(first[i]), vreinterpretq_s32_s8(second[i]));
        for m in (0..M / 2 * 2).step_by(2) {
            let tokens = [word(x[0][m]), word(x[1][m]), word(x[0][m + 1]), word(x[1][m + 1])];
            let tokens = vreinterpretq_s8_s32(vld1q_s32(tokens.as_ptr()));
            for i in 0..4 {
                let (first, second) = pair(i);
                let rows = vreinterpretq_s8_s32(vzip1q_s32(first, second));
                acc[m][i] = smmla(acc[m][i], rows, tokens);
                let rows = vreinterpretq_s8_s32(vzip2q_s32(first, second));
                acc[m + 1][i] = smmla(acc[m + 1][i], rows, tokens);
            }
        }
        if M % 2 == 1 {
            for (codes, x) in [first, second].into_iter().zip(x) {
                let x = vreinterpretq_s8_s32(vdupq_n_s32(word(x[M - 1])));
                for i in 0..4 {
                    acc[M - 1][i] = sdot(acc[M - 1][i], codes[i], x);
                }
            }
        }
    }
}

/// Asks for the cache line at `$x[$at..]` as `$kind` says.
macro_rules! prefetch {
    ($kind:literal, $x:ident, $at:ident) => {
        // SAFETY: a prefetch never faults, whatever the address, and changes nothing.
        unsafe {
            asm!(
                concat!("prfm ", $kind, ", [{}]"),
                in(reg) $x.as_ptr().wrapping_add($at),
                options(readonly, nostack, preserves_flags),
            );
        }
    };
}

impl<const DOTPROD: bool, const I8MM: bool> Bytes<[uint8x16_t; 4]> for Neon<DOTPROD, I8MM> {
    #[inline(always)]
    fn low_nibbles(self, b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        each!(vandq_u8(b, [vdupq_n_u8(15); 4]))
    }
    #[inline(always)]
    fn high_nibbles(self, b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        each!(vshrq_n_u8::<4>(b))
    }
    #[inline(always)]
    fn join_low_nibbles(self, high: [uint8x16_t; 4], low: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        each!(vsliq_n_u8::<4>(low, high))
    }
    #[inline(always)]
    fn join_high_nibbles(self, high: [uint8x16_t; 4], low: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        each!(vsriq_n_u8::<4>(high, low))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], nibbles: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        // SAFETY: `table` is 16 readable bytes.
        let table = unsafe { vld1q_u8(table.as_ptr()) };
        each!(vqtbl1q_u8([table; 4], nibbles))
    }
    #[inline(always)]
    fn take_bits<const SHIFT: i32, const MASK: u8>(
        self,
        plane: [uint8x16_t; 4],
    ) -> [uint8x16_t; 4] {
        // A negative shift goes right.
        let (shift, mask) = op!((vdupq_n_s8(SHIFT as i8), vdupq_n_u8(MASK)));
        let shifted = each!(vshlq_u8(plane, [shift; 4]));
        each!(vandq_u8(shifted, [mask; 4]))
    }
    #[inline(always)]
    fn insert_bits<const SHIFT: i32, const MASK: u8>(
        self,
        low: [uint8x16_t; 4],
        plane: [uint8x16_t; 4],
    ) -> [uint8x16_t; 4] {
        let bits = self.take_bits::<SHIFT, MASK>(plane);
        each!(vorrq_u8(low, bits))
    }
}

impl<const DOTPROD: bool, const I8MM: bool> Isa for Neon<DOTPROD, I8MM> {
    const FLOAT_TILE: (usize, usize) = (2, 2);
    const REGISTERS: usize = 8;
    const DELTA_TOKENS: usize = 2;
    const BYTE_BIAS: i32 = 0;
    const WIDENS_BYTES: bool = false;

    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type B = [uint8x16_t; 4];
    type X = int8x16_t;
    /// Without `DOTPROD` eight lanes of 16 bits in each register.
    type N = [int32x4_t; 4];

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        if I8MM {
            // SAFETY: `self` proves the features.
            unsafe { enter_i8mm(Neon(()), kernel) }
        } else if DOTPROD {
            // SAFETY: `self` proves the features.
            unsafe { enter_dotprod(Neon(()), kernel) }
        } else {
            // SAFETY: `self` proves NEON.
            unsafe { enter(Neon(()), kernel) }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        op!([vdupq_n_f32(x); 4])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes.
        unsafe {
            let x = vld1q_f32_x4(x.as_ptr());
            [x.0, x.1, x.2, x.3]
        }
    }
    #[inline(always)]
    fn store(self, v: Self::F, y: &mut [f32; LANES]) {
        // Not `vst1q_f32_x4`: it wants four neighbouring registers, and accumulators are moved.
        // SAFETY: `y` is 64 writable bytes.
        unsafe {
            vst1q_f32(y.as_mut_ptr(), v[0]);
            vst1q_f32(y.as_mut_ptr().add(4), v[1]);
            vst1q_f32(y.as_mut_ptr().add(8), v[2]);
            vst1q_f32(y.as_mut_ptr().add(12), v[3]);
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        // SAFETY: `x` is 32 readable bytes; a load of bytes needs no alignment.
        let x = unsafe { vld1q_u8_x2(x.as_ptr()) };
        op!({
            let (low, high) = (vreinterpretq_u16_u8(x.0), vreinterpretq_u16_u8(x.1));
            let zero = vdupq_n_u16(0);
            [
                vreinterpretq_f32_u16(vzip1q_u16(zero, low)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, low)),
                vreinterpretq_f32_u16(vzip1q_u16(zero, high)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, high)),
            ]
        })
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        // SAFETY: `x` is 32 readable bytes; a load of bytes needs no alignment.
        let x = unsafe { vld1q_u8_x2(x.as_ptr()) };
        op!({
            let (low, high) = (vreinterpretq_f16_u8(x.0), vreinterpretq_f16_u8(x.1));
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        })
    }
    #[inline(always)]
    fn load_f32(self, x: &[u8; 4 * LANES]) -> Self::F {
        let x = self.load_bytes(x);
        each!(vreinterpretq_f32_u8(x))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        // SAFETY: `x` is 16 readable bytes.
        let x = unsafe { vld1q_u8(x.as_ptr()) };
        op!({
            let (low, high) = (vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_high_u16(high)),
            ]
        })
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::F {
        // SAFETY: `x` is 16 readable bytes.
        let x = unsafe { vld1q_s8(x.as_ptr().cast()) };
        op!({
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        })
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, y: &mut [u8; 2 * LANES]) {
        let halves = op!([
            vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(v[0]), v[1])),
            vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(v[2]), v[3])),
        ]);
        // SAFETY: `y` is 32 writable bytes; a store of bytes needs no alignment.
        unsafe {
            vst1q_u8(y.as_mut_ptr(), halves[0]);
            vst1q_u8(y.as_mut_ptr().add(16), halves[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // The number where the other is NaN: `fmin` would give NaN, which no other set does.
        each!(vminnmq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each!(vmaxnmq_f32(a, b))
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        each!(vabsq_f32(a))
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        let greater = each!(vcgtq_f32(a, b));
        each!(vbslq_f32(greater, x, y))
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        // The order of the other instruction sets: lanes 8 apart, 4, 2, 1.
        op!({
            let a = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vpadds_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a)))
        })
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        op!(vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a[0], a[1]), vmaxnmq_f32(a[2], a[3]))))
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F) -> Self::I {
        each!(vcvtnq_s32_f32(a))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        each!(vcvtq_f32_s32(a))
    }
    #[inline(always)]
    fn exp2i(self, n: Self::I) -> Self::F {
        let biased = self.add_i32(n, self.splat_i32(127));
        let bits = each!(vshlq_n_s32::<23>(biased));
        each!(vreinterpretq_f32_s32(bits))
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        each!(vaddq_s32(a, b))
    }
    #[inline(always)]
    fn sum_pairs(self, a: Self::I) -> [i32; 2] {
        op!({
            let fours = vaddq_s32(vaddq_s32(a[0], a[1]), vaddq_s32(a[2], a[3]));
            let pairs = vpadd_s32(vget_low_s32(fours), vget_high_s32(fours));
            [vget_lane_s32::<0>(pairs), vget_lane_s32::<1>(pairs)]
        })
    }
    #[inline(always)]
    fn store_i32(self, a: Self::I, y: &mut [i32; LANES]) {
        // SAFETY: `y` is 64 writable bytes.
        unsafe {
            vst1q_s32(y.as_mut_ptr(), a[0]);
            vst1q_s32(y.as_mut_ptr().add(4), a[1]);
            vst1q_s32(y.as_mut_ptr().add(8), a[2]);
            vst1q_s32(y.as_mut_ptr().add(12), a[3]);
        }
    }
    #[inline(always)]
    fn store_i8(self, a: Self::I, y: &mut [i8; LANES]) {
        let bytes = op!({
            let low = vmovn_high_s32(vmovn_s32(a[0]), a[1]);
            let high = vmovn_high_s32(vmovn_s32(a[2]), a[3]);
            vmovn_high_s16(vmovn_s16(low), high)
        });
        // SAFETY: `y` is 16 writable bytes.
        unsafe { vst1q_s8(y.as_mut_ptr(), bytes) }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::B {
        // SAFETY: `x` is 64 readable bytes; a load of bytes needs no alignment.
        unsafe {
            let x = vld1q_u8_x4(x.as_ptr());
            [x.0, x.1, x.2, x.3]
        }
    }
    #[inline(always)]
    fn store_bytes(self, b: Self::B, y: &mut [u8; 4 * LANES]) {
        // SAFETY: `y` is 64 writable bytes; a store of bytes needs no alignment.
        unsafe { vst1q_u8_x4(y.as_mut_ptr(), uint8x16x4_t(b[0], b[1], b[2], b[3])) }
    }
    #[inline(always)]
    fn splat_bytes(self, x: [i8; 4]) -> Self::X {
        op!(vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(x.map(|x| x as u8)))))
    }
    #[inline(always)]
    fn start_nibbles(self, _: i32) -> Self::N {
        op!([vdupq_n_s32(0); 4])
    }
    #[inline(always)]
    fn dot_nibbles(self, acc: Self::N, codes: Self::B, x: Self::X) -> Self::N {
        let codes = each!(vreinterpretq_s8_u8(codes));
        if DOTPROD {
            each!(sdot(acc, codes, [x; 4]))
        } else {
            let acc = each!(vreinterpretq_s16_s32(acc));
            let products = each!(pairs(codes, [x; 4]));
            let acc = each!(vaddq_s16(acc, products));
            each!(vreinterpretq_s32_s16(acc))
        }
    }
    #[inline(always)]
    fn end_nibbles(self, acc: Self::N, start: i32) -> Self::I {
        let start = self.splat_i32(start);
        if DOTPROD {
            self.add_i32(acc, start)
        } else {
            let acc = each!(vreinterpretq_s16_s32(acc));
            each!(vpadalq_s16(start, acc))
        }
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        op!([vdupq_n_s32(x); 4])
    }
    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        let signed = self.signed(codes);
        if DOTPROD {
            each!(sdot(acc, signed, [x; 4]))
        } else {
            let products = each!(pairs(signed, [x; 4]));
            each!(vpadalq_s16(acc, products))
        }
    }
    #[inline(always)]
    fn dot_codes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        let signed = each!(vreinterpretq_s8_u8(codes));
        if DOTPROD {
            each!(sdot(acc, signed, [x; 4]))
        } else {
            let products = each!(pairs(signed, [x; 4]));
            each!(vpadalq_s16(acc, products))
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, x: &[T], at: usize) {
        prefetch!("pldl1keep", x, at);
    }
    #[inline(always)]
    fn prefetch_l2<T>(self, x: &[T], at: usize) {
        prefetch!("pldl2keep", x, at);
    }
    #[inline(always)]
    fn prefetch_once<T>(self, x: &[T], at: usize) {
        prefetch!("pldl1strm", x, at);
    }

    #[inline(always)]
    fn dots<C: Codes<N>, const N: usize, const M: usize>(
        self,
        codes: C,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
    ) -> [Self::I; M] {
        if !I8MM || M == 1 {
            return each_token::dots(self, codes, x, starts);
        }
        let codes = unpack(self, codes);
        let mut acc = [self.splat_i32(0); M];
        for t in (0..N).step_by(2) {
            let first = self.numbers(C::BITS, codes[t]);
            let second = self.numbers(C::BITS, codes[t + 1]);
            // SAFETY: `self` proves the instructions.
            unsafe { products_of_pairs(&mut acc, first, second, [&x[t], &x[t + 1]]) };
        }
        self.part_pairs(acc, if C::BITS == 8 { &[0; M] } else { starts.sums })
    }
    // Running products are four registers of 32 a token: two pairs of tokens leave 16. The float accumulators
    // of a tile are in the cache.
    #[inline(always)]
    fn register_tokens(_: u32, _: bool) -> usize {
        4
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
        let dots = if I8MM && T > 1 {
            let mut acc = [self.splat_i32(0); T];
            let tokens = |t: usize| x[t][first..].first_chunk::<T>().expect("T tokens");
            for t in (0..N).step_by(2) {
                let first = self.numbers(BITS, self.load_bytes(&codes[t]));
                let second = self.numbers(BITS, self.load_bytes(&codes[t + 1]));
                let x = [tokens(t), tokens(t + 1)];
                // SAFETY: `self` proves the instructions.
                unsafe { products_of_pairs(&mut acc, first, second, x) };
            }
            let starts = starts.sums[first..].first_chunk::<T>().expect("T tokens");
            self.part_pairs(acc, if BITS == 8 { &[0; T] } else { starts })
        } else {
            each_token::unpacked::<Self, BITS, N, M, T>(self, codes, x, starts, first)
        };
        add_scaled_of(self, dots, scales, acc, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::random;
    use crate::simd::{Cpu, Portable};
    use half::f16;

    #[test]
    fn the_expected_instruction_set_is_tested() {
        // `scripts/test_arm` names it: the other tests take what the machine has.
        if let Ok(name) = std::env::var("QDELTA_TEST_ISA") {
            assert_eq!(Cpu::best().name(), name);
        }
    }

    /// Every operation that has the same answer everywhere, on two vectors, as bits.
    struct Exact<'a>(&'a [f32; LANES], &'a [f32; LANES]);

    impl Kernel for Exact<'_> {
        type Output = Vec<[u32; LANES]>;
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Self::Output {
            let (a, b) = (s.load(self.0), s.load(self.1));
            let (zero, whole) = (s.splat(0.0), s.to_i32(a));
            let clamped = s.to_i32(s.max(s.min(a, s.splat(120.0)), s.splat(-120.0)));
            let floats = [
                a,
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.min(a, b),
                s.max(a, b),
                s.abs(a),
                s.select_gt(a, b, a, zero),
                s.to_f32(whole),
                s.exp2i(clamped),
                s.splat(s.sum(a)),
                s.splat(s.largest(a)),
            ];
            let mut out = Vec::new();
            for v in floats {
                let mut y = [0.0; LANES];
                s.store(v, &mut y);
                out.push(y.map(f32::to_bits));
            }
            let mut bytes = [0; LANES];
            s.store_i8(clamped, &mut bytes);
            out.push(bytes.map(|y| y as u32));
            for v in [whole, s.add_i32(whole, clamped), s.splat_i32(s.sum_i32(whole))] {
                let mut y = [0; LANES];
                s.store_i32(v, &mut y);
                out.push(y.map(|y| y as u32));
            }
            out
        }
    }

    #[test]
    fn operations_have_the_bits_of_the_portable_twin() {
        let mut values = vec![0.5, 1.5, -0.5, -2.5, 0.0, 1e-40, 3e4, -3e4, 126.5, -119.5, 7.0];
        values.extend(random(501, 1).iter().map(|x| 300.0 * x));
        let other = random(512, 2);
        for (a, b) in values.as_chunks().0.iter().zip(other.as_chunks().0) {
            let want = Cpu::Portable(Portable).run(Exact(a, b));
            for cpu in Cpu::all() {
                assert_eq!(cpu.run(Exact(a, b)), want, "{cpu:?} {a:?} {b:?}");
            }
        }
    }

    struct Fma<'a>(&'a [f32; LANES], &'a [f32; LANES]);

    impl Kernel for Fma<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Self::Output {
            let (mut y, a, b) = ([0.0; LANES], s.load(self.0), s.load(self.1));
            s.store(s.fma(a, b, s.splat(-0.25)), &mut y);
            y
        }
    }

    #[test]
    fn multiply_add_rounds_once() {
        let (a, b) = (random(LANES, 4), random(LANES, 5));
        let (a, b) = (a.first_chunk().unwrap(), b.first_chunk().unwrap());
        let want: [f32; LANES] = std::array::from_fn(|i| a[i].mul_add(b[i], -0.25));
        for cpu in Cpu::all().into_iter().filter(|cpu| cpu.name() != "portable") {
            assert_eq!(cpu.run(Fma(a, b)), want, "{cpu:?}");
        }
    }

    struct Narrow<'a>(&'a [f32; LANES]);

    impl Kernel for Narrow<'_> {
        type Output = [u8; 2 * LANES];
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Self::Output {
            let mut y = [0; 2 * LANES];
            s.store_f16(s.load(self.0), &mut y);
            y
        }
    }

    /// The same bytes as f16, as bf16, and half of them as f32.
    struct Widen<'a>(&'a [u8; 2 * LANES]);

    impl Kernel for Widen<'_> {
        type Output = [[f32; LANES]; 3];
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Self::Output {
            let mut wide = [0; 4 * LANES];
            wide[1..=2 * LANES].copy_from_slice(self.0);
            let mut y = [[0.0; LANES]; 3];
            s.store(s.load_f16(self.0), &mut y[0]);
            s.store(s.load_bf16(self.0), &mut y[1]);
            s.store(s.load_f32(&wide), &mut y[2]);
            y
        }
    }

    #[test]
    fn every_half_float_is_converted_as_the_twin_does() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for cpu in Cpu::all() {
            for (i, bytes) in all.as_chunks().0.iter().enumerate() {
                let want = Cpu::Portable(Portable).run(Widen(bytes));
                for (got, want) in cpu.run(Widen(bytes)).iter().flatten().zip(want.iter().flatten())
                {
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same, "{cpu:?} halves {}..: {got} {want}", i * LANES);
                }
                // Itself, the values halfway to its neighbours, and a little beside those.
                let halves: [u16; LANES] =
                    std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
                if halves.iter().any(|h| h & 0x7c00 == 0x7c00) {
                    continue;
                }
                for shift in [0i32, 0xfff, 0x1000, 0x1001, -0xfff, -0x1000] {
                    let x = halves.map(|h| {
                        let bits = f16::from_bits(h).to_f32().to_bits();
                        f32::from_bits(bits.wrapping_add_signed(shift))
                    });
                    let x = x.map(|x| if x.is_nan() { 0.0 } else { x });
                    let want: Vec<u8> =
                        x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
                    assert_eq!(cpu.run(Narrow(&x))[..], want, "{cpu:?} {x:?}");
                }
            }
            let x =
                [65519.0, 65520.0, -65520.0, 1e30, f32::INFINITY, f32::NEG_INFINITY, 2e-8, -0.0]
                    .repeat(2);
            let want: Vec<u8> = x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
            assert_eq!(cpu.run(Narrow(x[..].try_into().unwrap()))[..], want, "{cpu:?}");
        }
    }

    /// A group of nibbles, low and high ones of four vectors, and of bytes.
    struct Dots<'a>(&'a [[u8; 4 * LANES]; 8], &'a [[i8; 4]; 8]);

    impl Kernel for Dots<'_> {
        type Output = [[i32; LANES]; 2];
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Self::Output {
            let mut nibbles = s.start_nibbles(-77);
            let sum: i32 = self.1.iter().flatten().map(|x| i32::from(*x)).sum();
            let mut bytes = s.splat_i32(-S::BYTE_BIAS * sum);
            for t in 0..8 {
                let (w, x) = (s.load_bytes(&self.0[t]), s.splat_bytes(self.1[t]));
                let codes = if t % 2 == 0 { s.low_nibbles(w) } else { s.high_nibbles(w) };
                nibbles = s.dot_nibbles(nibbles, codes, x);
                bytes = s.dot_bytes(bytes, w, x);
                s.prefetch(&self.0[t], 1 << 40);
                s.prefetch_l2(&self.0[t], 1 << 40);
                s.prefetch_once(&self.0[t], 1 << 40);
            }
            let mut y = [[0; LANES]; 2];
            s.store_i32(s.end_nibbles(nibbles, -77), &mut y[0]);
            s.store_i32(bytes, &mut y[1]);
            y
        }
    }

    #[test]
    fn integer_dot_products_are_exact_at_the_limits() {
        let limits = [[127; 4], [-127; 4], [127, -127, 127, -127], [0, 1, -1, 64]];
        let some: Vec<u8> = random(512, 3).iter().map(|x| (x * 1e4) as i32 as u8).collect();
        let mut codes = vec![[[0u8; 4 * LANES]; 8], [[255; 4 * LANES]; 8]];
        codes.push(std::array::from_fn(|t| std::array::from_fn(|i| some[4 * LANES * t + i])));
        for codes in &codes {
            for x in limits {
                let x = [x; 8];
                let want = Cpu::Portable(Portable).run(Dots(codes, &x));
                for cpu in Cpu::all() {
                    assert_eq!(cpu.run(Dots(codes, &x)), want, "{cpu:?} {x:?}");
                }
            }
        }
    }
}
