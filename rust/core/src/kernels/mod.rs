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
pub mod unpacked;

use crate::simd::{Isa, LANES};
use std::ops::Range;

/// Bytes between what a kernel works on and what it asks memory for. Of 2 to 24 KiB this was best on a
/// Zen 5, for weights of every format and for states.
pub(crate) const AHEAD: usize = 8192;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// How a kernel asks for what it reads from memory ahead of its use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    No,
    /// Into the first level of caches, and those behind it.
    ToL1,
    /// Into the second level. Cores of a Granite Rapids and of a Zen 4 keep more requests there, and read
    /// up to 1.2 and 1.4 times as fast.
    ToL2,
    /// Into the first level alone, for they are read once. A Zen 5 reads up to 1.2 times as fast so,
    /// because nothing has to make room; a Granite Rapids half as fast.
    Once,
}

impl Ask {
    pub const ALL: [Ask; 4] = [Ask::No, Ask::ToL1, Ask::ToL2, Ask::Once];

    /// Asks for the line at `x[at..]`, which may lie outside of `x`. at: in bytes.
    #[inline(always)]
    pub(crate) fn line<S: Isa, T>(self, s: S, x: &[T], at: usize) {
        match self {
            Ask::No => {}
            Ask::ToL1 => s.prefetch(x, at),
            Ask::ToL2 => s.prefetch_l2(x, at),
            Ask::Once => s.prefetch_once(x, at),
        }
    }

    /// Asks for the first `bytes` bytes of `x`, or all of it.
    #[inline(always)]
    pub(crate) fn lines<S: Isa>(self, s: S, x: &[f32], bytes: usize) {
        self.lines_from(s, x, 0, size_of_val(x).min(bytes).div_ceil(LINE));
    }

    /// Asks for some lines from `x[at..]`, which may lie outside of `x`. at: in bytes.
    #[inline(always)]
    pub(crate) fn lines_from<S: Isa, T>(self, s: S, x: &[T], at: usize, lines: usize) {
        // The way is chosen once: a jump for each line takes as long as four rows of a state in cache.
        macro_rules! each {
            ($ask:ident) => {
                for line in 0..lines {
                    s.$ask(x, at + line * LINE);
                }
            };
        }
        match self {
            Ask::No => {}
            Ask::ToL1 => each!(prefetch),
            Ask::ToL2 => each!(prefetch_l2),
            Ask::Once => each!(prefetch_once),
        }
    }
}

/// How a product reads weights that are in no cache. The results are the same bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reading {
    pub ask: Ask,
    /// Whether few tokens go through several panels side by side, not through one after another. The
    /// hardware then follows several streams: with one token a core of a Granite Rapids reads formats of
    /// 4 to 6 bits 1.2 to 1.35 times as fast so.
    pub abreast: bool,
}

impl Reading {
    /// Without asking, one panel after another: for weights that are in a cache.
    pub const PLAIN: Reading = Reading { ask: Ask::No, abreast: false };

    /// How to ask for states and the cache of attention, streams too short for the hardware to follow
    /// them. A Zen 4 reads weights fastest unasked, and these up to 1.6 times as fast with asking into the
    /// second level.
    pub fn of_short_streams(&self) -> Ask {
        if self.ask == Ask::No { Ask::ToL2 } else { self.ask }
    }

    /// Every way.
    #[cfg(test)]
    pub fn all() -> impl Iterator<Item = Reading> {
        [false, true].into_iter().flat_map(|abreast| Ask::ALL.map(|ask| Reading { ask, abreast }))
    }
}

/// Panels that few tokens read side by side at most.
pub const ABREAST: usize = 4;

/// Up to this many tokens weights are read as they lie, in panels, where more unpack them; and the caller
/// prepares a region's input alone, for it takes less time than another region.
pub const FEW_TOKENS: usize = 4;

/// A product of panels with a tile of tokens.
pub(crate) trait PanelProduct {
    /// Whether there is code for more than a few tokens.
    const MANY: bool;

    /// Panels in all, and tokens.
    fn size(&self) -> (usize, usize);

    /// See [`Reading::abreast`].
    fn abreast(&self) -> bool;

    /// Computes `n` panels from `first`, up to R, side by side for M tokens, which are all.
    fn panels<S: Isa, const R: usize, const M: usize>(&mut self, s: S, first: usize, n: usize);

    /// Computes all panels for M tokens, up to R side by side.
    #[inline(always)]
    fn all<S: Isa, const R: usize, const M: usize>(&mut self, s: S) {
        let (panels, _) = self.size();
        let most = if self.abreast() { R } else { 1 };
        let mut first = 0;
        while first < panels {
            // Known where R is 1, so that the sums stay in registers. Those of several panels take turns in
            // memory, which few tokens do not notice.
            let n = if R == 1 { 1 } else { most.min(panels - first) };
            self.panels::<S, R, M>(s, first, n);
            first += n;
        }
    }

    /// Computes all panels for all tokens.
    #[inline(always)]
    fn product<S: Isa>(mut self, s: S)
    where
        Self: Sized,
    {
        macro_rules! tokens {
            (few: $($few:literal)*; many: $($many:literal)*) => {
                match self.size().1 {
                    0 => {}
                    // Code for one panel at a time is there where it counts.
                    1 if !self.abreast() => self.all::<S, 1, 1>(s),
                    $($few => self.all::<S, ABREAST, $few>(s),)*
                    $($many if Self::MANY => self.all::<S, 1, $many>(s),)*
                    m => panic!("a tile of {m} tokens for panels that are read as they lie"),
                }
            };
        }
        tokens!(few: 1 2 3 4; many: 5 6 7 8 9 10 11 12);
    }
}

/// Where to ask from, [`AHEAD`] bytes after what is read now: in the panel itself, or in the one that is
/// read after it, `abreast` panels later.
///
/// panel: which one, of `bytes` bytes each; within: bytes from its start to what is read.
#[inline(always)]
pub(crate) fn ahead_in_panels(panel: usize, bytes: usize, within: usize, abreast: usize) -> usize {
    let within = within + AHEAD.min(bytes);
    let skipped = if within < bytes { 0 } else { (abreast - 1) * bytes };
    panel * bytes + within + skipped
}

/// Asks for a part of a block of `size` bytes, as long before its use as memory takes to answer.
///
/// from: where the block starts; part: which one, of how many. A whole block at once is more than
/// a core keeps requests for. With one token a Zen 5 reads W4K, W5K and W6K at the rate of plain reading
/// so, and at 0.9, 0.7 and 0.7 of it without.
#[inline(always)]
pub(crate) fn ask_ahead<S: Isa>(
    s: S,
    ask: Ask,
    bytes: &[u8],
    from: usize,
    size: usize,
    (part, parts): (usize, usize),
) {
    // As many for each part, and one more for the first ones: loops of a known length are unrolled.
    let (each, rest) = (size / LINE / parts, size / LINE % parts);
    let first = from + (part * each + part.min(rest)) * LINE;
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
        None => s.load(&padded(x)),
    }
}

/// A call where loops hardly ever go: without it a loop that may call memcpy keeps its vectors in memory.
#[cold]
#[inline(never)]
fn padded(x: &[f32]) -> [f32; LANES] {
    let mut padded = [0.0; LANES];
    padded[..x.len()].copy_from_slice(x);
    padded
}

/// Stores as many lanes as `y` takes, at most 16.
#[inline(always)]
pub(crate) fn store_some<S: Isa>(s: S, v: S::F, y: &mut [f32]) {
    match y.first_chunk_mut() {
        Some(y) => s.store(v, y),
        None => {
            let mut lanes = [0.0; LANES];
            s.store(v, &mut lanes);
            copy_first(&lanes, y);
        }
    }
}

/// See [`padded`].
#[cold]
#[inline(never)]
fn copy_first(lanes: &[f32; LANES], y: &mut [f32]) {
    y.copy_from_slice(&lanes[..y.len()]);
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
