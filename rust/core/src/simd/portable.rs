//! Plain Rust: the twin that every other instruction set is tested against, and what runs where
//! nothing better was detected.

use super::{Bytes, Isa, Kernel, LANES};
use half::{bf16, f16};

/// No instruction set beyond the target's baseline.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn map<T: Copy, U>(a: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    a.map(f)
}

#[inline(always)]
fn zip<T: Copy, U>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> U) -> [U; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn dot4(codes: &[u8; 4 * LANES], lane: usize, x: [i8; 4], offset: i32) -> i32 {
    (0..4).map(|i| (i32::from(codes[4 * lane + i]) - offset) * i32::from(x[i])).sum()
}

impl Bytes<[u8; 4 * LANES]> for Portable {
    #[inline(always)]
    fn low_nibbles(self, b: [u8; 4 * LANES]) -> [u8; 4 * LANES] {
        b.map(|b| b & 15)
    }
    #[inline(always)]
    fn high_nibbles(self, b: [u8; 4 * LANES]) -> [u8; 4 * LANES] {
        b.map(|b| b >> 4)
    }
    #[inline(always)]
    fn join_low_nibbles(self, high: [u8; 4 * LANES], low: [u8; 4 * LANES]) -> [u8; 4 * LANES] {
        std::array::from_fn(|i| high[i] << 4 | low[i] & 15)
    }
    #[inline(always)]
    fn join_high_nibbles(self, high: [u8; 4 * LANES], low: [u8; 4 * LANES]) -> [u8; 4 * LANES] {
        std::array::from_fn(|i| high[i] & 0xf0 | low[i] >> 4)
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], nibbles: [u8; 4 * LANES]) -> [u8; 4 * LANES] {
        nibbles.map(|n| table[usize::from(n & 15)])
    }
    #[inline(always)]
    fn take_bits<const SHIFT: i32, const MASK: u8>(
        self,
        plane: [u8; 4 * LANES],
    ) -> [u8; 4 * LANES] {
        plane.map(|x| if SHIFT < 0 { x >> -SHIFT } else { x << SHIFT } & MASK)
    }
    #[inline(always)]
    fn insert_bits<const SHIFT: i32, const MASK: u8>(
        self,
        low: [u8; 4 * LANES],
        plane: [u8; 4 * LANES],
    ) -> [u8; 4 * LANES] {
        let bits = self.take_bits::<SHIFT, MASK>(plane);
        std::array::from_fn(|i| low[i] | bits[i])
    }
}

impl Isa for Portable {
    const FLOAT_TILE: (usize, usize) = (2, 2);
    const REGISTERS: usize = 8;
    const DELTA_TOKENS: usize = 2;
    const BYTE_BIAS: i32 = 0;
    const WIDENS_BYTES: bool = false;

    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 4 * LANES];
    type X = [i8; 4];
    type N = [i32; LANES];

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::F, y: &mut [f32; LANES]) {
        *y = v;
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        std::array::from_fn(|i| bf16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        std::array::from_fn(|i| f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn load_f32(self, x: &[u8; 4 * LANES]) -> Self::F {
        std::array::from_fn(|i| {
            f32::from_le_bytes([x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]])
        })
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        x.map(f32::from)
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::F {
        x.map(|x| f32::from(x as i8))
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, y: &mut [u8; 2 * LANES]) {
        for (y, v) in y.as_chunks_mut::<2>().0.iter_mut().zip(v) {
            *y = f16::from_f32(v).to_le_bytes();
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Two roundings: `f32::mul_add` is a library call where the CPU has no such instruction.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        map(a, f32::abs)
    }
    #[inline(always)]
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let a: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let a: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, a| if a > m { a } else { m })
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F) -> Self::I {
        // Adding and subtracting 1.5 2^23 rounds to nearest even; exact for |a| < 2^22.
        const MAGIC: f32 = 12_582_912.0;
        map(a, |a| if a.abs() < 4_194_304.0 { (a + MAGIC - MAGIC) as i32 } else { a as i32 })
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        map(a, |a| a as f32)
    }
    #[inline(always)]
    fn exp2i(self, n: Self::I) -> Self::F {
        map(n, |n| f32::from_bits(((n + 127) as u32) << 23))
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a.wrapping_add(b))
    }
    #[inline(always)]
    fn sum_pairs(self, a: Self::I) -> [i32; 2] {
        let mut sums = [0i32; 2];
        for (lane, a) in a.into_iter().enumerate() {
            sums[lane / 2 % 2] = sums[lane / 2 % 2].wrapping_add(a);
        }
        sums
    }
    #[inline(always)]
    fn store_i32(self, a: Self::I, y: &mut [i32; LANES]) {
        *y = a;
    }
    #[inline(always)]
    fn store_i8(self, a: Self::I, y: &mut [i8; LANES]) {
        *y = map(a, |a| a as i8);
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::B {
        *x
    }
    #[inline(always)]
    fn store_bytes(self, b: Self::B, y: &mut [u8; 4 * LANES]) {
        *y = b;
    }
    #[inline(always)]
    fn register_tokens(_: u32, _: bool) -> usize {
        4
    }
    #[inline(always)]
    fn splat_bytes(self, x: [i8; 4]) -> Self::X {
        x
    }
    #[inline(always)]
    fn start_nibbles(self, _: i32) -> Self::N {
        [0; LANES]
    }
    #[inline(always)]
    fn dot_nibbles(self, acc: Self::N, codes: Self::B, x: Self::X) -> Self::N {
        std::array::from_fn(|i| acc[i] + dot4(&codes, i, x, 0))
    }
    #[inline(always)]
    fn end_nibbles(self, acc: Self::N, start: i32) -> Self::I {
        map(acc, |a| a + start)
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        std::array::from_fn(|i| acc[i] + dot4(&codes, i, x, 128))
    }
    #[inline(always)]
    fn dot_codes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I {
        std::array::from_fn(|i| acc[i] + dot4(&codes, i, x, 0))
    }
    #[inline(always)]
    fn prefetch<T>(self, _: &[T], _: usize) {}
    #[inline(always)]
    fn prefetch_l2<T>(self, _: &[T], _: usize) {}
    #[inline(always)]
    fn prefetch_once<T>(self, _: &[T], _: usize) {}
}
