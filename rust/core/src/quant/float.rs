//! Float matrices, row-major, read where they lie in the file at any address.

use crate::simd::{Isa, LANES};

/// A float format, as the kernels see it.
pub trait Float {
    /// Bytes of an element.
    const BYTES: usize;

    /// 16 elements at `x`, which holds at least that many.
    fn load<S: Isa>(s: S, x: &[u8]) -> S::F;

    /// Up to 15 elements, padded with zeros.
    #[inline(always)]
    fn load_tail<S: Isa>(s: S, x: &[u8]) -> S::F {
        let mut padded = [0; 4 * LANES];
        padded[..x.len()].copy_from_slice(x);
        Self::load(s, &padded)
    }
}

pub struct Bf16;
pub struct F16;
pub struct F32;

impl Float for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load<S: Isa>(s: S, x: &[u8]) -> S::F {
        s.load_bf16(first(x))
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load<S: Isa>(s: S, x: &[u8]) -> S::F {
        s.load_f16(first(x))
    }
}

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn load<S: Isa>(s: S, x: &[u8]) -> S::F {
        s.load_f32(first(x))
    }
}

#[inline(always)]
fn first<const N: usize>(x: &[u8]) -> &[u8; N] {
    x.first_chunk().expect("a vector of bytes is there")
}
