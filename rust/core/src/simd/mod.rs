//! What a kernel may ask of a CPU.
//!
//! A kernel is written once, over [`Isa`]: vectors of 16 `f32` lanes, whatever number of registers
//! they take, and dot products of bytes in groups of four. One file per instruction set implements
//! it. A value of an instruction set's type is the proof that the machine has it: [`Cpu::all`]
//! hands out only those that were detected.
//!
//! A kernel is a struct of its arguments that implements [`Kernel`]; [`Cpu::run`] enters it through
//! one function that has the instruction set enabled. Everything in between is
//! `#[inline(always)]`: a function that is not inlined is compiled without the instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub use {avx2::Avx2, avx512::Avx512};

use crate::error::{Error, Result};

/// Lanes of a vector, rows of a panel, columns of a block of recurrent state.
pub const LANES: usize = 16;

/// Tokens of a tile in a quantised matrix product.
pub const TILE_TOKENS: usize = 12;

/// What an instruction set does with vectors of bytes, of a whole register or several.
pub trait Bytes<V: Copy>: Copy {
    fn low_nibbles(self, b: V) -> V;
    fn high_nibbles(self, b: V) -> V;
    /// Bytes whose halves are the low nibbles of `high` and `low`.
    fn join_low_nibbles(self, high: V, low: V) -> V;
    /// Bytes whose halves are the high nibbles of `high` and `low`.
    fn join_high_nibbles(self, high: V, low: V) -> V;
    /// The entries of a table at `nibbles`, which are up to 15.
    fn lookup(self, table: &[u8; 16], nibbles: V) -> V;
    /// The bits of `MASK` of `plane` shifted left by `SHIFT`, right if that is negative. `MASK` must have
    /// no bits but those that a byte keeps.
    fn take_bits<const SHIFT: i32, const MASK: u8>(self, plane: V) -> V;
    /// `low`, with those bits in it.
    fn insert_bits<const SHIFT: i32, const MASK: u8>(self, low: V, plane: V) -> V;
}

/// Codes of N steps of four columns as they lie in memory, for 16 rows.
pub trait Codes<const N: usize>: Copy {
    /// A code is below 2 to this power: 4, 5, 6 or 8.
    const BITS: u32;

    /// The codes of each step. load: the bytes of all rows, or of some, as a vector.
    ///
    /// Implementations do without `array::map` and `from_fn`: these are not always inlined, and then intrinsics
    /// become calls.
    fn steps<V: Copy, S: Bytes<V>>(self, s: S, load: impl Fn(&[u8; 4 * LANES]) -> V) -> [V; N];
}

/// What dot products of codes with M tokens begin with, so that a code may stand for itself less a zero:
/// minus the zero times the sum of each token's numbers.
#[derive(Clone, Copy)]
pub struct Starts<'a, const M: usize> {
    pub sums: &'a [i32; M],
    /// The same apart for the first and the last two columns of each step, an `i16` each, the first in the low
    /// half; of all columns or of each half of them. With it sums of products stay near zero: an instruction
    /// set that adds in 16 bits may go past them on the way, since what is left in the end fits. Empty if it
    /// does not, or if fewer bits are enough.
    pub pairs: &'a [[i32; M]],
}

impl<const M: usize> Starts<'_, M> {
    /// Of codes that stand for themselves.
    pub const ZERO: Self = Starts { sums: &[0; M], pairs: &[] };
}

/// The codes of all rows, a vector for each step.
#[inline(always)]
pub fn unpack<S: Isa, C: Codes<N>, const N: usize>(s: S, codes: C) -> [S::B; N] {
    codes.steps(s, |bytes| s.load_bytes(bytes))
}

/// One instruction set.
pub trait Isa: Bytes<Self::B> + Send + Sync + 'static {
    /// Rows and tokens of a tile in a float matrix product.
    const FLOAT_TILE: (usize, usize);
    /// Vectors that the registers hold.
    const REGISTERS: usize;
    /// Tokens that one pass over a block of recurrent state takes.
    const DELTA_TOKENS: usize;
    /// 0 or 128: a product of `dot_bytes` is sum((code - 128 + BYTE_BIAS) x).
    const BYTE_BIAS: i32;
    /// Whether two dot products of halves of bytes are cheaper than one of bytes.
    const WIDENS_BYTES: bool;

    /// 16 `f32`.
    type F: Copy;
    /// 16 `i32`.
    type I: Copy;
    /// 64 bytes: four consecutive ones for each of the 16 lanes.
    type B: Copy;
    /// Four signed bytes from -127 to 127, the same for each lane.
    type X: Copy;
    /// Running dot products of codes up to 15 with signed bytes, at most 32 of them a lane.
    type N: Copy;

    /// Runs a kernel with the instruction set enabled.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, y: &mut [f32; LANES]);
    /// 16 bfloat16, little-endian.
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F;
    /// 16 IEEE half floats, little-endian.
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F;
    /// 16 `f32`, little-endian, at any address.
    fn load_f32(self, x: &[u8; 4 * LANES]) -> Self::F;
    /// 16 bytes from 0 to 255.
    fn load_u8(self, x: &[u8; LANES]) -> Self::F;
    /// 16 signed bytes.
    fn load_i8(self, x: &[u8; LANES]) -> Self::F;
    /// Rounds to nearest even; the inverse of `load_f16` on its values.
    fn store_f16(self, v: Self::F, y: &mut [u8; 2 * LANES]);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a b + c; one rounding where the CPU has it.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// Where a > b: x, elsewhere y.
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Sum over the lanes.
    fn sum(self, a: Self::F) -> f32;
    /// Largest lane.
    fn largest(self, a: Self::F) -> f32;

    /// Rounds to nearest even. The values must fit an `i32`.
    fn to_i32(self, a: Self::F) -> Self::I;
    fn to_f32(self, a: Self::I) -> Self::F;
    /// 2^n for n in -126..=127.
    fn exp2i(self, n: Self::I) -> Self::F;
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// Sums over the first two lanes of each four, and over the last two.
    fn sum_pairs(self, a: Self::I) -> [i32; 2];
    /// Sum over the lanes.
    #[inline(always)]
    fn sum_i32(self, a: Self::I) -> i32 {
        let [first, last] = self.sum_pairs(a);
        first.wrapping_add(last)
    }
    fn store_i32(self, a: Self::I, y: &mut [i32; LANES]);
    /// The lanes as signed bytes. They must fit.
    fn store_i8(self, a: Self::I, y: &mut [i8; LANES]);

    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::B;
    fn store_bytes(self, b: Self::B, y: &mut [u8; 4 * LANES]);
    fn splat_bytes(self, x: [i8; 4]) -> Self::X;
    /// No products yet. start: what `end_nibbles` will be given; like it, from memory (see
    /// `start_bytes`), for one of the two adds it.
    fn start_nibbles(self, start: i32) -> Self::N;
    /// acc + sum of codes x over the four bytes of each lane, codes up to 15.
    fn dot_nibbles(self, acc: Self::N, codes: Self::B, x: Self::X) -> Self::N;
    /// The running products plus `start`.
    fn end_nibbles(self, acc: Self::N, start: i32) -> Self::I;
    fn splat_i32(self, x: i32) -> Self::I;
    /// acc + sum of (code - 128 + BYTE_BIAS) x over the four bytes of each lane.
    fn dot_bytes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I;
    /// acc + sum of codes x over the four bytes of each lane, codes up to 127.
    fn dot_codes(self, acc: Self::I, codes: Self::B, x: Self::X) -> Self::I;
    /// Asks for the cache line at `x[at..]`, which may lie outside of `x`.
    fn prefetch<T>(self, x: &[T], at: usize);
    /// As `prefetch`, into the second level of caches and no further.
    fn prefetch_l2<T>(self, x: &[T], at: usize);
    /// As `prefetch`, for what is read once: it needs no place in caches but the first.
    fn prefetch_once<T>(self, x: &[T], at: usize);

    /// Dot products of N steps of codes with M tokens, each begun with the token's number in `starts`. Of codes
    /// of 4, 5 and 6 bits they are sums of code x; of 8 bits of (code - 128) x, and the starts are -128 times
    /// the sum of each token's x.
    ///
    /// x: of four columns a step, tokens innermost.
    #[inline(always)]
    fn dots<C: Codes<N>, const N: usize, const M: usize>(
        self,
        codes: C,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
    ) -> [Self::I; M] {
        each_token::dots(self, codes, x, starts)
    }
    /// acc += scales times what `dots` gives. scales: of the weights, and of each token.
    #[inline(always)]
    fn add_dots<C: Codes<N>, const N: usize, const M: usize>(
        self,
        codes: C,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        scales: (Self::F, &[f32; M]),
        acc: &mut [Self::F; M],
    ) {
        add_scaled(self, self.dots(codes, x, starts), scales, acc);
    }
    /// As `add_dots` of codes of up to BITS bits that lie in bytes, for as many tokens as a tile has.
    #[inline(always)]
    fn add_codes<const BITS: u32, const N: usize, const M: usize>(
        self,
        codes: &[[u8; 4 * LANES]; N],
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        scales: (Self::F, &[f32; M]),
        acc: &mut [Self::F; M],
    ) {
        let most = Self::register_tokens(BITS, !starts.pairs.is_empty());
        if M <= most {
            return self.add_codes_of::<BITS, N, M, M>(codes, x, starts, scales, acc, 0);
        }
        for first in (0..M).step_by(most) {
            macro_rules! tokens {
                ($($t:literal)*) => {
                    match most.min(M - first) {
                        $($t => {
                            self.add_codes_of::<BITS, N, M, $t>(codes, x, starts, scales, acc, first);
                        })*
                        _ => unreachable!("where registers hold more than six tokens, they hold a tile"),
                    }
                };
            }
            tokens!(1 2 3 4 5 6);
        }
    }
    /// Tokens whose dot products with codes of so many bits fit the registers: up to six, or a tile.
    /// centred: whether sums of pairs begin with the codes' zero.
    fn register_tokens(bits: u32, centred: bool) -> usize;
    /// `add_codes` for the T tokens from `first`.
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
        let dots = each_token::unpacked::<Self, BITS, N, M, T>(self, codes, x, starts, first);
        add_scaled_of(self, dots, scales, acc, first);
    }
    /// What `dot_bytes` begins with for codes with a zero of 128.
    ///
    /// start: -128 times the sum of x, from memory: a number from there is in all lanes for
    /// nothing, while one that was just computed costs as much as a dot product.
    #[inline(always)]
    fn start_bytes(self, start: i32) -> Self::I {
        self.splat_i32(if Self::BYTE_BIAS == 0 { 0 } else { start })
    }
}

/// acc += dots times scales, for all M tokens. scales: of the weights, and of each token.
#[inline(always)]
pub fn add_scaled<S: Isa, const M: usize>(
    s: S,
    dots: [S::I; M],
    scales: (S::F, &[f32; M]),
    acc: &mut [S::F; M],
) {
    add_scaled_of(s, dots, scales, acc, 0);
}

/// The same for the T tokens from `first`.
#[inline(always)]
fn add_scaled_of<S: Isa, const M: usize, const T: usize>(
    s: S,
    dots: [S::I; T],
    (weights, x): (S::F, &[f32; M]),
    acc: &mut [S::F; M],
    first: usize,
) {
    for t in 0..T {
        let scale = s.mul(weights, s.splat(x[first + t]));
        acc[first + t] = s.fma(s.to_f32(dots[t]), scale, acc[first + t]);
    }
}

/// Products of codes with several tokens, one after the other.
pub mod each_token {
    use super::{Codes, Isa, LANES, Starts, unpack};

    /// See [`Isa::dots`].
    #[inline(always)]
    pub fn dots<S: Isa, C: Codes<N>, const N: usize, const M: usize>(
        s: S,
        codes: C,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
    ) -> [S::I; M] {
        let codes = unpack(s, codes);
        of_steps::<S, N, M, M>(s, C::BITS, |t| codes[t], x, starts, 0)
    }

    /// Of codes that lie in bytes with the T tokens from `first`, see [`Isa::add_codes`].
    #[inline(always)]
    pub fn unpacked<S: Isa, const BITS: u32, const N: usize, const M: usize, const T: usize>(
        s: S,
        codes: &[[u8; 4 * LANES]; N],
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        first: usize,
    ) -> [S::I; T] {
        of_steps(s, BITS, |t| s.load_bytes(&codes[t]), x, starts, first)
    }

    #[inline(always)]
    fn of_steps<S: Isa, const N: usize, const M: usize, const T: usize>(
        s: S,
        bits: u32,
        codes: impl Fn(usize) -> S::B,
        x: &[[[i8; 4]; M]; N],
        starts: Starts<'_, M>,
        first: usize,
    ) -> [S::I; T] {
        let mut out = [s.splat_i32(0); T];
        macro_rules! products {
            ($acc:ident, $dot:ident) => {
                for t in 0..N {
                    let w = codes(t);
                    for m in 0..T {
                        $acc[m] = s.$dot($acc[m], w, s.splat_bytes(x[t][first + m]));
                    }
                }
            };
        }
        if bits == 4 {
            let mut acc = [s.start_nibbles(0); T];
            for m in 0..T {
                acc[m] = s.start_nibbles(starts.sums[first + m]);
            }
            products!(acc, dot_nibbles);
            for m in 0..T {
                out[m] = s.end_nibbles(acc[m], starts.sums[first + m]);
            }
        } else if bits < 8 {
            for m in 0..T {
                out[m] = s.splat_i32(starts.sums[first + m]);
            }
            products!(out, dot_codes);
        } else {
            for m in 0..T {
                out[m] = s.start_bytes(starts.sums[first + m]);
            }
            products!(out, dot_bytes);
        }
        out
    }
}

/// A local variable that makes its function align the stack to a cache line.
///
/// The compiler spills vectors at the stack's alignment, 16 bytes, unless a variable needs more;
/// then half of the spilled ones of 32 bytes cross a line, or not, as the caller's stack falls. Matrix
/// products of AVX2 ran at 200 or 262 billion operations per second for that.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct StackLine(#[expect(dead_code, reason = "only its place matters")] u8);

/// A computation that runs on any instruction set. `run` must be `#[inline(always)]`.
pub trait Kernel {
    type Output;
    fn run<S: Isa>(self, s: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy)]
pub enum Cpu {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon<false, false>),
    #[cfg(target_arch = "aarch64")]
    NeonDotprod(Neon<true, false>),
    #[cfg(target_arch = "aarch64")]
    NeonI8mm(Neon<true, true>),
}

/// Runs `$body` with `$s` bound to the instruction set of `$cpu`.
macro_rules! dispatch {
    ($cpu:expr, $s:ident => $body:expr) => {
        match $cpu {
            Cpu::Portable($s) => $body,
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx2($s) => $body,
            #[cfg(target_arch = "x86_64")]
            Cpu::AvxVnni($s) => $body,
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx512($s) => $body,
            #[cfg(target_arch = "aarch64")]
            Cpu::Neon($s) => $body,
            #[cfg(target_arch = "aarch64")]
            Cpu::NeonDotprod($s) => $body,
            #[cfg(target_arch = "aarch64")]
            Cpu::NeonI8mm($s) => $body,
        }
    };
}

impl Cpu {
    /// All instruction sets of this machine, best first.
    pub fn all() -> Vec<Cpu> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx512::detect().map(Cpu::Avx512));
            all.extend(Avx2::<true>::detect().map(Cpu::AvxVnni));
            all.extend(Avx2::<false>::detect().map(Cpu::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        {
            all.extend(Neon::<true, true>::detect().map(Cpu::NeonI8mm));
            all.extend(Neon::<true, false>::detect().map(Cpu::NeonDotprod));
            all.extend(Neon::<false, false>::detect().map(Cpu::Neon));
        }
        all.push(Cpu::Portable(Portable));
        all
    }

    /// The best instruction set of this machine.
    pub fn best() -> Cpu {
        Cpu::all()[0]
    }

    /// The instruction set called `name`, or an error that lists what the machine has.
    pub fn named(name: &str) -> Result<Cpu> {
        let all = Cpu::all();
        all.iter().copied().find(|cpu| cpu.name() == name).ok_or_else(|| {
            let names: Vec<_> = all.iter().map(|cpu| cpu.name()).collect();
            Error::Argument(format!(
                "instruction set `{name}` is not available here, this machine has: {}",
                names.join(", ")
            ))
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Cpu::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Cpu::AvxVnni(_) => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Cpu::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Cpu::NeonDotprod(_) => "neon_dotprod",
            #[cfg(target_arch = "aarch64")]
            Cpu::NeonI8mm(_) => "neon_i8mm",
        }
    }

    /// Runs a kernel on this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        dispatch!(self, s => s.run(kernel))
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes of `BITS` bits, a byte each.
    #[derive(Clone, Copy)]
    struct Plain<'a, const BITS: u32, const N: usize>(&'a [[u8; 4 * LANES]; N]);

    impl<const BITS: u32, const N: usize> Codes<N> for Plain<'_, BITS, N> {
        const BITS: u32 = BITS;

        #[inline(always)]
        fn steps<V: Copy, S: Bytes<V>>(self, _: S, load: impl Fn(&[u8; 4 * LANES]) -> V) -> [V; N] {
            let mut steps = [load(&self.0[0]); N];
            for t in 1..N {
                steps[t] = load(&self.0[t]);
            }
            steps
        }
    }

    struct Dots<'a, const BITS: u32, const N: usize, const M: usize> {
        codes: &'a [[u8; 4 * LANES]; N],
        x: &'a [[[i8; 4]; M]; N],
        starts: Starts<'a, M>,
    }

    impl<const BITS: u32, const N: usize, const M: usize> Kernel for Dots<'_, BITS, N, M> {
        /// As `dots`, `add_dots` and `add_codes` have them.
        type Output = [[[f32; LANES]; M]; 3];
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Self::Output {
            let Dots { codes, x, starts } = self;
            let plain = Plain::<BITS, N>(codes);
            let mut sums = [[s.splat(0.0); M]; 3];
            let dots = s.dots(plain, x, starts);
            for m in 0..M {
                sums[0][m] = s.to_f32(dots[m]);
            }
            let scales = (s.splat(1.0), &[1.0; M]);
            s.add_dots(plain, x, starts, scales, &mut sums[1]);
            s.add_codes::<BITS, N, M>(codes, x, starts, scales, &mut sums[2]);
            let mut out = [[[0.0; LANES]; M]; 3];
            for (sums, out) in sums.iter().zip(&mut out) {
                for m in 0..M {
                    s.store(sums[m], &mut out[m]);
                }
            }
            out
        }
    }

    /// Compares products of the least and the greatest codes and numbers with sums of integers.
    ///
    /// zero: what a code of 0 stands for, negated.
    fn check_extremes<const BITS: u32, const N: usize, const M: usize>(cpu: Cpu, zero: i32) {
        let greatest = ((1u32 << BITS) - 1) as u8;
        // A code of 8 bits with its zero stands for -127 to 127.
        let least = if BITS == 8 { 1 } else { 0 };
        for pattern in 0..256 {
            // Signs by place in a step and by step, other ones in each row and token.
            let sign = |t: usize, i: usize, k: usize| {
                pattern >> (i % 4) & 1 ^ pattern >> (4 + t / 2 % 4) & 1 ^ k & 1
            };
            let codes: [[u8; 4 * LANES]; N] = std::array::from_fn(|t| {
                std::array::from_fn(|i| if sign(t, i, i / 4) == 0 { least } else { greatest })
            });
            let x: [[[i8; 4]; M]; N] = std::array::from_fn(|t| {
                std::array::from_fn(|m| {
                    std::array::from_fn(|i| match (m / 2, sign(t, i, m)) {
                        (0, 0) | (1, _) => 127,
                        _ => -127,
                    })
                })
            });
            let columns = |t: usize, m: usize| x[t][m].map(i32::from);
            let sums =
                std::array::from_fn(|m| -zero * (0..N).flat_map(|t| columns(t, m)).sum::<i32>());
            // Of six bits half a group at a time, of fewer all of it.
            let runs = match (BITS, zero) {
                (8, _) | (_, 0) => 0,
                (6, _) => N / 4,
                _ => 1,
            };
            let pairs: Vec<[i32; M]> = (0..runs)
                .map(|run| {
                    std::array::from_fn(|m| {
                        let steps = || N * run / runs..N * (run + 1) / runs;
                        let sum = |i: usize| {
                            let sum: i32 =
                                steps().map(|t| columns(t, m)[i] + columns(t, m)[i + 1]).sum();
                            i16::try_from(-zero * sum).expect("16 bits are enough")
                        };
                        i32::from(sum(0)) & 0xffff | i32::from(sum(2)) << 16
                    })
                })
                .collect();
            let starts = Starts { sums: &sums, pairs: &pairs };
            let got = cpu.run(Dots::<BITS, N, M> { codes: &codes, x: &x, starts });
            for (m, row) in (0..M).flat_map(|m| (0..LANES).map(move |row| (m, row))) {
                let want: i32 = (0..N)
                    .flat_map(|t| (0..4).map(move |i| (t, i)))
                    .map(|(t, i)| (i32::from(codes[t][4 * row + i]) - zero) * i32::from(x[t][m][i]))
                    .sum();
                for (way, got) in got.iter().enumerate() {
                    let what = format!("{cpu:?}, {BITS} bits, way {way}, pattern {pattern:#x}");
                    assert_eq!(got[m][row], want as f32, "{what}, token {m}, row {row}");
                }
            }
        }
    }

    #[test]
    fn dot_products_of_the_largest_numbers_are_exact() {
        fn check<const M: usize>(cpu: Cpu) {
            for zero in [0, 8] {
                check_extremes::<4, 8, M>(cpu, zero);
            }
            for zero in [0, 16] {
                check_extremes::<5, 8, M>(cpu, zero);
            }
            for zero in [0, 32] {
                check_extremes::<6, 8, M>(cpu, zero);
                check_extremes::<6, 4, M>(cpu, zero);
            }
            check_extremes::<8, 8, M>(cpu, 128);
        }
        for cpu in Cpu::all() {
            check::<1>(cpu);
            check::<2>(cpu);
            check::<5>(cpu);
            check::<12>(cpu);
        }
    }
}
