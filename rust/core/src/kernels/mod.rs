//! Arithmetic on slices: each kernel once, for every instruction set. No kernel knows a file, a
//! layer or a thread.

pub mod activation;
pub mod attention;
pub mod attention_q8;
pub mod conv1d;
pub mod delta_rule;
pub mod matmul;
pub mod norm;
pub mod outputs;
pub mod planes;
pub mod quantize;
pub mod rope;
pub mod select;
#[cfg(test)]
pub mod testing;

use crate::simd::{Isa, LANES};
use std::ops::Range;

/// Bytes between what a kernel works on and what it asks memory for. Of 2 to 24 KiB this was best on a
/// Zen 5, for weights of every format and for states.
pub(crate) const AHEAD: usize = 8192;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks for the first `bytes` bytes of `x`, or all of it.
#[inline(always)]
pub(crate) fn ask<S: Isa>(s: S, x: &[f32], bytes: usize) {
    for line in x[..x.len().min(bytes / size_of::<f32>())].chunks(LANES) {
        s.prefetch(line, 0);
    }
}

/// How a product asks for its weights ahead of their use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    No,
    /// Into the first level of caches, and those behind it.
    ToL1,
    /// Into the second level. A core of a Granite Rapids keeps more requests there, and reads up to 1.2
    /// times as fast.
    ToL2,
    /// Into the first level alone, for they are read once. A Zen 5 reads up to 1.2 times as fast so,
    /// because nothing has to make room; a Granite Rapids half as fast.
    Once,
}

impl Ask {
    pub const ALL: [Ask; 4] = [Ask::No, Ask::ToL1, Ask::ToL2, Ask::Once];
}

/// Asks for a part of a block of `size` bytes, as long before its use as memory takes to answer.
///
/// at: where the present block starts; part: which one, of how many. A whole block at once is more than
/// a core keeps requests for. With one token a Zen 5 reads W4K, W5K and W6K at the rate of plain reading
/// so, and at 0.9, 0.7 and 0.7 of it without.
#[inline(always)]
pub(crate) fn ask_ahead<S: Isa>(
    s: S,
    ask: Ask,
    bytes: &[u8],
    at: usize,
    size: usize,
    (part, parts): (usize, usize),
) {
    // As many for each part, and one more for the first ones: loops of a known length are unrolled.
    let (each, rest) = (size / LINE / parts, size / LINE % parts);
    let first = at + AHEAD + (part * each + part.min(rest)) * LINE;
    macro_rules! lines {
        ($prefetch:ident) => {{
            for line in 0..each {
                s.$prefetch(bytes, first + line * LINE);
            }
            if part < rest {
                s.$prefetch(bytes, first + each * LINE);
            }
        }};
    }
    // Decided for each part: what the parts have in common the compiler would move together, and then it
    // reads the lines of several parts in turns, which the hardware does not follow.
    match ask {
        Ask::No => {}
        Ask::ToL1 => lines!(prefetch),
        Ask::ToL2 => lines!(prefetch_l2),
        Ask::Once => lines!(prefetch_once),
    }
}

/// Runs `tile` of a product for as many tokens as its tile of activations has.
macro_rules! run_tile {
    ($product:ident, $s:ident, $isa:ident) => {
        run_tile!(@ $product, $s, $isa; 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $product:ident, $s:ident, $isa:ident; $($m:literal)*) => {
        match $product.x.tokens() {
            0 => {}
            $($m if $m <= $isa::TILE_TOKENS => $product.tile::<$isa, $m>($s),)*
            m => panic!("a tile of {m} tokens, the limit is {}", $isa::TILE_TOKENS),
        }
    };
}
pub(crate) use run_tile;

/// Columns of a matrix: rows of `width` elements that begin `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    pub data: &'a [f32],
    pub width: usize,
    pub stride: usize,
}

/// [`Columns`] to be written.
pub struct ColumnsMut<'a> {
    pub data: &'a mut [f32],
    pub width: usize,
    pub stride: usize,
}

impl<'a> Columns<'a> {
    /// A whole matrix.
    #[inline(always)]
    pub fn all(data: &'a [f32], width: usize) -> Columns<'a> {
        Columns { data, width, stride: width }
    }

    /// A part of a row.
    #[inline(always)]
    fn part(&self, row: usize, columns: Range<usize>) -> &'a [f32] {
        &self.data[row * self.stride..][columns]
    }
}

impl<'a> ColumnsMut<'a> {
    /// A whole matrix.
    #[inline(always)]
    pub fn all(data: &'a mut [f32], width: usize) -> ColumnsMut<'a> {
        ColumnsMut { data, width, stride: width }
    }

    /// A part of a row.
    #[inline(always)]
    fn part(&mut self, row: usize, columns: Range<usize>) -> &mut [f32] {
        &mut self.data[row * self.stride..][columns]
    }
}

/// The first 16 elements of `x`, padded with zeros if there are fewer.
#[inline(always)]
pub(crate) fn load_some<S: Isa>(s: S, x: &[f32]) -> S::F {
    match x.first_chunk() {
        Some(x) => s.load(x),
        None => {
            let mut padded = [0.0; LANES];
            padded[..x.len()].copy_from_slice(x);
            s.load(&padded)
        }
    }
}

/// Stores as many lanes as `y` takes, at most 16.
#[inline(always)]
pub(crate) fn store_some<S: Isa>(s: S, v: S::F, y: &mut [f32]) {
    match y.first_chunk_mut() {
        Some(y) => s.store(v, y),
        None => {
            let mut padded = [0.0; LANES];
            s.store(v, &mut padded);
            let n = y.len();
            y.copy_from_slice(&padded[..n]);
        }
    }
}

/// Sum of x[i] y[i].
#[inline(always)]
pub(crate) fn dot<S: Isa>(s: S, x: &[f32], y: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    let mut i = 0;
    while i < x.len().min(y.len()) {
        sum = s.fma(load_some(s, &x[i..]), load_some(s, &y[i..]), sum);
        i += LANES;
    }
    s.sum(sum)
}
