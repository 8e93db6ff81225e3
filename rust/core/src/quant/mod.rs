//! Weight formats: how a matrix lies in memory, and how a kernel reads it.
//!
//! Float matrices are row-major as the checkpoint holds them ([`float`], [`fp8`]), and so are the
//! blocks of GGUF files ([`ggml`]). The formats that kernels multiply with cut a matrix into panels of 16
//! output rows, so that one vector holds one value of each row and no product needs a horizontal
//! sum. The columns of a panel are cut into groups of 32, and some groups make a block: two in
//! [`w4`], [`w8`], [`w4_nl`] and [`w4_mx`], one in the formats of [`affine`], four in those of
//! [`row_scaled`], eight in those of [`k`]. Rows are padded to a whole panel and columns to a whole
//! block, with codes that mean zero. The formats of [`two_planes`] keep high and low bits of their
//! codes apart. [`reorder`] makes panels of a GGUF file's blocks.

pub mod affine;
pub mod codes;
pub mod float;
pub mod fp8;
pub mod ggml;
pub mod k;
pub mod reorder;
pub mod row_scaled;
mod search;
pub mod two_planes;
pub mod w4;
pub mod w4_mx;
pub mod w4_nl;
pub mod w8;

use crate::error::{Error, Result};
use crate::simd::{Cpu, Isa, Kernel, LANES, Starts};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::str::FromStr;

pub use ggml::BlockType;
use row_scaled::{EncodeRows, W4NlR, W4R, W5R};
use two_planes::Planes;

/// Output rows of a panel.
pub const PANEL_ROWS: usize = LANES;
/// Columns of a group.
pub const GROUP: usize = 32;
/// Columns of a block of two groups; activations are padded to as many.
pub const BLOCK: usize = 2 * GROUP;
/// Dot products of four columns in a group, and in a block.
pub const GROUP_STEPS: usize = GROUP / 4;
pub const BLOCK_STEPS: usize = BLOCK / 4;
/// Bytes of one vector of codes.
pub(crate) const STEP: usize = 4 * LANES;

/// What the weights of a model are turned into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quant {
    /// As the checkpoint has them.
    None,
    W8,
    W4,
    /// Recipes of mixed formats, see [`crate::model::recipe`].
    Small,
    Balanced,
    Fine,
    Best,
    /// As a GGUF file has them, in panels.
    Gguf,
    /// As somebody chose.
    Custom,
}

impl Quant {
    const ALL: [Quant; 9] = [
        Quant::None,
        Quant::W8,
        Quant::W4,
        Quant::Small,
        Quant::Balanced,
        Quant::Fine,
        Quant::Best,
        Quant::Gguf,
        Quant::Custom,
    ];
}

impl FromStr for Quant {
    type Err = Error;
    fn from_str(name: &str) -> Result<Quant> {
        Quant::ALL.into_iter().find(|quant| quant.to_string() == name).ok_or_else(|| {
            let names = Quant::ALL.map(|quant| quant.to_string()).join(", ");
            Error::Argument(format!("quant is `{name}`, expected one of: {names}"))
        })
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quant::None => "none",
            Quant::W8 => "w8",
            Quant::W4 => "w4",
            Quant::Small => "small",
            Quant::Balanced => "balanced",
            Quant::Fine => "fine",
            Quant::Best => "best",
            Quant::Gguf => "gguf",
            Quant::Custom => "custom",
        })
    }
}

/// How one matrix lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Bf16,
    F16,
    F32,
    /// With scales beside it.
    Fp8,
    W8,
    W8Planes,
    W5Planes,
    W4,
    W4Nl,
    W4Mx,
    W4Affine,
    W5Affine,
    W4NlK,
    W2K,
    W4K,
    W5K,
    W6K,
    W4R,
    W4NlR,
    W5R,
    /// Rows of blocks as a GGUF file has them.
    Blocks(BlockType),
}

impl Format {
    pub const PACKED: [Format; 16] = [
        Format::W8,
        Format::W8Planes,
        Format::W5Planes,
        Format::W4,
        Format::W4Nl,
        Format::W4Mx,
        Format::W4Affine,
        Format::W5Affine,
        Format::W4NlK,
        Format::W2K,
        Format::W4K,
        Format::W5K,
        Format::W6K,
        Format::W4R,
        Format::W4NlR,
        Format::W5R,
    ];

    /// Whether the matrix is in panels of quantised blocks.
    pub fn is_packed(self) -> bool {
        Format::PACKED.contains(&self)
    }

    /// Whether the panels are in two planes, so that rows can be screened with one of them.
    pub fn is_in_planes(self) -> bool {
        matches!(self, Format::W8Planes | Format::W5Planes)
    }

    /// Whether the matrix is multiplied with activations of eight bits.
    pub fn is_quantised(self) -> bool {
        self.is_packed() || matches!(self, Format::Blocks(_))
    }

    pub fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::F32 => "f32",
            Format::Fp8 => "fp8",
            Format::W8 => "w8",
            Format::W8Planes => "w8_planes",
            Format::W5Planes => "w5_planes",
            Format::W4 => "w4",
            Format::W4Nl => "w4_nl",
            Format::W4Mx => "w4_mx",
            Format::W4Affine => "w4_affine",
            Format::W5Affine => "w5_affine",
            Format::W4NlK => "w4_nl_k",
            Format::W2K => "w2_k",
            Format::W4K => "w4_k",
            Format::W5K => "w5_k",
            Format::W6K => "w6_k",
            Format::W4R => "w4_r",
            Format::W4NlR => "w4_nl_r",
            Format::W5R => "w5_r",
            Format::Blocks(block) => block.format_name(),
        }
    }

    /// All formats whose codes have scales: panels, then rows of blocks.
    pub fn all_quantised() -> impl Iterator<Item = Format> {
        Format::PACKED.into_iter().chain(BlockType::ALL.map(Format::Blocks))
    }

    /// The packed formats that numbers can be rounded to. The others hold those of block types that
    /// no recipe rounds to.
    pub fn encoded() -> impl Iterator<Item = Format> {
        use Format::{W2K, W4Affine, W4Mx, W4NlK, W5Affine};
        let kept = [W4Mx, W4Affine, W5Affine, W4NlK, W2K];
        Format::PACKED.into_iter().filter(move |format| !kept.contains(format))
    }

    /// Whether rows of `cols` columns can have this format.
    pub fn takes_cols(self, cols: usize) -> bool {
        match self {
            Format::W4NlK | Format::W2K | Format::W4K | Format::W5K | Format::W6K => {
                cols.is_multiple_of(k::SUPER)
            }
            Format::W4R | Format::W4NlR | Format::W5R => {
                cols.is_multiple_of(row_scaled::BLOCK_COLS)
            }
            Format::Blocks(block) => cols.is_multiple_of(block.cols()),
            _ => true,
        }
    }

    /// Bytes of `rows` rows of `cols` columns, padding included, without the scales of FP8.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            Format::Bf16 | Format::F16 => 2 * rows * cols,
            Format::F32 => 4 * rows * cols,
            Format::Fp8 => rows * cols,
            Format::Blocks(block) => rows * block.row_bytes(cols),
            _ => rows.div_ceil(PANEL_ROWS) * panel_bytes(self, cols),
        }
    }

    /// The planes of a whole matrix.
    pub fn split(self, matrix: &mut [u8]) -> Vec<&mut [u8]> {
        if !self.is_in_planes() {
            return vec![matrix];
        }
        let (high, low) = matrix.split_at_mut(two_planes::high_bytes(self, matrix.len()));
        vec![high, low]
    }
}

/// The zeros of [`Starts::sums`] of a group: of all its columns, then of its two halves.
pub const START_ZEROS: [i32; 6] = [8, 16, 32, 128, 32, 32];
/// Of [`Starts::pairs`]: of all columns, then of the two halves.
pub const PAIR_ZEROS: [i32; 4] = [8, 16, 32, 32];

/// Int8 activations of a group of columns for M tokens, tokens innermost.
#[derive(Clone, Copy)]
pub struct Group<'a, const M: usize> {
    /// Four columns a step.
    pub codes: &'a [[[i8; 4]; M]; GROUP_STEPS],
    /// See [`START_ZEROS`].
    pub starts: &'a [[i32; M]; START_ZEROS.len()],
    /// See [`PAIR_ZEROS`].
    pub pairs: &'a [[i32; M]; PAIR_ZEROS.len()],
    pub scales: &'a [f32; M],
    /// The sum of what each token's codes stand for: scale times sum.
    pub totals: &'a [f32; M],
}

impl<const M: usize> Group<'_, M> {
    /// The codes of each half of the columns.
    #[inline(always)]
    fn halves(&self) -> [&[[[i8; 4]; M]; GROUP_STEPS / 2]; 2] {
        let halves = self.codes.as_chunks().0;
        [&halves[0], &halves[1]]
    }

    /// For a zero of 8.
    #[inline(always)]
    pub fn starts_at_8(&self) -> Starts<'_, M> {
        self.starts_at_zero_of(4)
    }

    /// For a zero of 128.
    #[inline(always)]
    fn starts_at_128(&self) -> Starts<'_, M> {
        self.starts_at_zero_of(8)
    }

    /// For the zero of codes of so many bits, 2^(bits - 1).
    #[inline(always)]
    pub fn starts_at_zero_of(&self, bits: u32) -> Starts<'_, M> {
        match bits {
            4 => Starts { sums: &self.starts[0], pairs: &self.pairs[..1] },
            5 => Starts { sums: &self.starts[1], pairs: &self.pairs[1..2] },
            6 => Starts { sums: &self.starts[2], pairs: &self.pairs[2..] },
            8 => Starts { sums: &self.starts[3], pairs: &[] },
            _ => unreachable!("codes have 4, 5, 6 or 8 bits"),
        }
    }

    /// For a zero of 32, of one half of the columns.
    #[inline(always)]
    pub fn starts_of_half(&self, half: usize) -> Starts<'_, M> {
        Starts { sums: &self.starts[4 + half], pairs: &self.pairs[2 + half..3 + half] }
    }
}

/// What a group of 16 rows becomes for products with many tokens: a byte for each code, four columns a
/// step, and f32 factors, a row a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// A scale for each row; weight = scale (code - 2^(bits - 1)).
    Scaled { bits: u32 },
    /// The same for each half of the columns, with codes of six bits.
    ScaledHalves,
    /// A scale and an offset; weight = scale code + offset.
    Affine { bits: u32 },
}

impl Layout {
    /// Factors of each row.
    pub fn factors(self) -> usize {
        match self {
            Layout::Scaled { .. } => 1,
            Layout::ScaledHalves | Layout::Affine { .. } => 2,
        }
    }
}

/// Whole cache lines: vectors that cross two are read and written at half the rate.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Lines<T>(pub T);

/// Where an unpacked group goes: its codes, and as many factors as its [`Layout`] has.
pub struct UnpackedGroup<'a> {
    pub codes: &'a mut [[u8; STEP]; GROUP_STEPS],
    pub factors: &'a mut [Lines<[f32; LANES]>],
}

impl UnpackedGroup<'_> {
    /// Stores codes and factors.
    #[inline(always)]
    pub fn put<S: Isa, const F: usize>(self, s: S, codes: [S::B; GROUP_STEPS], factors: [S::F; F]) {
        for t in 0..GROUP_STEPS {
            s.store_bytes(codes[t], &mut self.codes[t]);
        }
        for f in 0..F {
            s.store(factors[f], &mut self.factors[f].0);
        }
    }
}

/// A format of quantised panels, as the kernels see it.
pub trait Packed {
    /// `[u8; N]`: 16 rows of `GROUPS` groups, scales included.
    type Block: AsRef<[u8]> + 'static;
    /// Groups of a block.
    const GROUPS: usize;
    /// Bytes of a panel before its blocks.
    const HEAD_BYTES: usize = 0;
    /// How groups lie that are unpacked; none of a format whose products need more than that.
    const LAYOUT: Option<Layout>;

    /// Cuts the bytes of a panel into blocks.
    fn blocks(panel: &[u8]) -> &[Self::Block];

    /// As [`Packed::blocks`].
    fn blocks_mut(panel: &mut [u8]) -> &mut [Self::Block];

    /// Adds the products of group `g` of a block with M tokens, a row a lane. Sums of codes are
    /// exact integers.
    fn add<S: Isa, const M: usize>(
        s: S,
        block: &Self::Block,
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    );

    /// Unpacks group `g` of a block. Only for formats with a layout.
    fn unpack<S: Isa>(s: S, block: &Self::Block, g: usize, out: UnpackedGroup<'_>);

    /// What is left to do with the sums over all blocks of a panel: the rows' units.
    #[inline(always)]
    fn end<S: Isa, const M: usize>(_: S, _panel: &[u8], _acc: &mut [S::F; M]) {}

    /// The value of a code, in units of its row.
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32;

    /// The unit of a row.
    fn unit(_panel: &[u8], _row: usize) -> f32 {
        1.0
    }
}

/// A format of quantised panels that numbers can be rounded to.
pub trait Encode: Packed {
    /// Quantises a block of up to 16 rows.
    ///
    /// w: its columns, a vector each, a row a lane; importance: how much each column matters.
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]], importance: &[f32], block: &mut Self::Block);
}

/// acc += what an offset of some weights adds. totals: of their activations.
#[inline(always)]
pub(crate) fn add_offsets<S: Isa, const M: usize>(
    s: S,
    offsets: S::F,
    totals: &[f32; M],
    acc: &mut [S::F; M],
) {
    for m in 0..M {
        acc[m] = s.fma(offsets, s.splat(totals[m]), acc[m]);
    }
}

/// Runs `$body` with `$p` naming the type of a format whose panels lie in one plane.
macro_rules! with_packed {
    ($format:expr, $p:ident => $body:expr) => {
        with_packed!(@ $format, $p => $body; W8 w8, W4 w4, W4Nl w4_nl, W4Mx w4_mx,
            W4Affine affine, W5Affine affine, W4NlK k, W2K k, W4K k, W5K k, W6K k,
            W4R row_scaled, W4NlR row_scaled, W5R row_scaled)
    };
    (@ $format:expr, $p:ident => $body:expr; $($name:ident $module:ident),*) => {
        match $format {
            $($crate::quant::Format::$name => {
                type $p = $crate::quant::$module::$name;
                $body
            })*
            other => unreachable!("{} has no panels in one plane", other.name()),
        }
    };
}
pub(crate) use with_packed;

/// Runs `$body` with `$p` naming the type of a format in two planes.
macro_rules! with_planes {
    ($format:expr, $p:ident => $body:expr) => {
        with_planes!(@ $format, $p => $body; W8Planes, W5Planes)
    };
    (@ $format:expr, $p:ident => $body:expr; $($name:ident),*) => {
        match $format {
            $($crate::quant::Format::$name => {
                type $p = $crate::quant::two_planes::$name;
                $body
            })*
            other => unreachable!("{} is not in two planes", other.name()),
        }
    };
}
pub(crate) use with_planes;

/// Bytes of a panel: 16 rows of `cols` columns. `format` must be packed.
pub fn panel_bytes(format: Format, cols: usize) -> usize {
    assert!(format.is_packed() && format.takes_cols(cols), "{} x {cols}", format.name());
    if format.is_in_planes() {
        return cols.div_ceil(BLOCK) * two_planes::block_bytes(format);
    }
    with_packed!(format, P => {
        P::HEAD_BYTES + cols.div_ceil(P::GROUPS * GROUP) * size_of::<<P as Packed>::Block>()
    })
}

/// The planes of a packed format, as ranges of the bytes of a panel. A matrix is the first plane
/// of all its panels, then the second.
pub fn planes(format: Format, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let bytes = panel_bytes(format, cols);
    let first = if format.is_in_planes() { two_planes::high_bytes(format, bytes) } else { bytes };
    [0..first, first..bytes].into_iter().filter(|plane| !plane.is_empty())
}

/// Quantises up to 16 rows.
///
/// rows: [n, cols], n <= 16; importance: how much each column matters, [cols], not negative; out:
/// `panel_bytes(format, cols)` bytes. Panics if the lengths disagree. The values must be finite.
pub fn encode_panel(
    format: Format,
    rows: &[f32],
    cols: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    encode_panel_on(Cpu::best(), format, rows, cols, importance, out);
}

/// As [`encode_panel`], on a given instruction set.
pub fn encode_panel_on(
    cpu: Cpu,
    format: Format,
    rows: &[f32],
    cols: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    assert_eq!(out.len(), panel_bytes(format, cols));
    assert!(cols > 0 && rows.len().is_multiple_of(cols) && rows.len() / cols <= PANEL_ROWS);
    assert!(importance.is_none_or(|importance| importance.len() == cols));
    if format == Format::W8Planes {
        let mut panel = vec![0; panel_bytes(Format::W8, cols)];
        encode_panel_on(cpu, Format::W8, rows, cols, importance, &mut panel);
        return two_planes::split_panel(&panel, out);
    }
    let rows = Rows { values: rows, cols, importance };
    match format {
        Format::W4 => cpu.run(EncodePanel::<w4::W4>::new(rows, out)),
        Format::W4Nl => cpu.run(EncodePanel::<w4_nl::W4Nl>::new(rows, out)),
        Format::W4K => cpu.run(EncodePanel::<k::W4K>::new(rows, out)),
        Format::W5K => cpu.run(EncodePanel::<k::W5K>::new(rows, out)),
        Format::W6K => cpu.run(EncodePanel::<k::W6K>::new(rows, out)),
        Format::W8 => cpu.run(EncodePanel::<w8::W8>::new(rows, out)),
        Format::W4R => cpu.run(EncodeRows::<W4R> { rows, out, format: PhantomData }),
        Format::W4NlR => cpu.run(EncodeRows::<W4NlR> { rows, out, format: PhantomData }),
        Format::W5R => cpu.run(EncodeRows::<W5R> { rows, out, format: PhantomData }),
        Format::W5Planes => cpu.run(two_planes::EncodeFiveBits { rows, out }),
        _ => panic!("{} is not encoded from floats", format.name()),
    }
}

/// Rows to be quantised.
struct Rows<'a> {
    values: &'a [f32],
    cols: usize,
    importance: Option<&'a [f32]>,
}

impl Rows<'_> {
    /// The columns from `first`, a vector each, a row a lane, zeros where there are none; weights:
    /// how much those matter that are there, 1 before if nobody says.
    fn columns(&self, first: usize, w: &mut [[f32; LANES]], weights: &mut [f32]) {
        let Rows { values, cols, importance } = *self;
        let width = cols.saturating_sub(first).min(w.len());
        w.fill([0.0; LANES]);
        for (lane, row) in values.chunks_exact(cols).enumerate() {
            for i in 0..width {
                w[i][lane] = row[first + i];
            }
        }
        if let Some(importance) = importance {
            weights[..width].copy_from_slice(&importance[first..first + width]);
        }
    }
}

struct EncodePanel<'a, P> {
    rows: Rows<'a>,
    out: &'a mut [u8],
    format: PhantomData<P>,
}

impl<'a, P> EncodePanel<'a, P> {
    fn new(rows: Rows<'a>, out: &'a mut [u8]) -> Self {
        EncodePanel { rows, out, format: PhantomData }
    }
}

impl<P: Encode> Kernel for EncodePanel<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let block_cols = P::GROUPS * GROUP;
        let mut w = vec![[0.0; LANES]; block_cols];
        let mut weights = vec![1.0; block_cols];
        for (b, block) in P::blocks_mut(self.out).iter_mut().enumerate() {
            self.rows.columns(b * block_cols, &mut w, &mut weights);
            P::encode(s, &w, &weights, block);
        }
    }
}

/// Decodes one row of a packed matrix. out: [cols].
pub fn decode_row(format: Format, matrix: &[u8], cols: usize, row: usize, out: &mut [f32]) {
    assert_eq!(out.len(), cols);
    if format.is_in_planes() {
        let first = row / PANEL_ROWS;
        let panel = Planes::new(format, matrix).panels(first..first + 1, cols);
        for (col, out) in out.iter_mut().enumerate() {
            *out = panel.decode(col / BLOCK, row % PANEL_ROWS, col % BLOCK);
        }
        return;
    }
    let bytes = panel_bytes(format, cols);
    let panel = &matrix[row / PANEL_ROWS * bytes..][..bytes];
    with_packed!(format, P => decode_panel_row::<P>(panel, row % PANEL_ROWS, out));
}

fn decode_panel_row<P: Packed>(panel: &[u8], row: usize, out: &mut [f32]) {
    let unit = P::unit(panel, row);
    for (block, out) in P::blocks(panel).iter().zip(out.chunks_mut(P::GROUPS * GROUP)) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = unit * P::decode(block, row, col);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{pack, random};

    /// Weights with the tails of a trained matrix: sums of three uniform numbers, cubed in part.
    fn weights(n: usize, seed: u64) -> Vec<f32> {
        let parts: Vec<_> = (0..3).map(|i| random(n, seed + i)).collect();
        (0..n).map(|i| parts[0][i] + parts[1][i] + parts[2][i].powi(3)).collect()
    }

    /// Root of the weighted mean square of what a format misses, as a part of the weights' own.
    fn error(cpu: Cpu, format: Format, w: &[f32], cols: usize, importance: Option<&[f32]>) -> f64 {
        let mut panel = vec![0; panel_bytes(format, cols)];
        encode_panel_on(cpu, format, w, cols, importance, &mut panel);
        let (mut missed, mut size) = (0.0, 0.0);
        let mut decoded = vec![0.0; cols];
        for (row, w) in w.chunks_exact(cols).enumerate() {
            decode_row(format, &panel, cols, row, &mut decoded);
            for (i, (w, d)) in w.iter().zip(&decoded).enumerate() {
                let weight = importance.map_or(1.0, |importance| f64::from(importance[i]));
                missed += weight * f64::from(w - d).powi(2);
                size += weight * f64::from(*w).powi(2);
            }
        }
        (missed / size).sqrt()
    }

    #[test]
    fn more_bits_leave_less_error() {
        let (rows, cols) = (16, 1024);
        let w = weights(rows * cols, 30);
        for cpu in Cpu::all() {
            use Format::{W4, W4K, W4Nl, W4NlR, W4R, W5K, W5Planes, W5R, W6K, W8};
            let formats = [W4, W4Nl, W4K, W5Planes, W5K, W6K, W8];
            let errors = formats.map(|format| error(cpu, format, &w, cols, None));
            // A unit for a whole row costs nothing.
            for (by_row, group) in [(W4R, W4), (W4NlR, W4Nl)] {
                let [by_row, group] =
                    [by_row, group].map(|format| error(cpu, format, &w, cols, None));
                assert!(by_row < 1.02 * group, "{cpu:?} {by_row} {group}");
            }
            assert!(error(cpu, W5R, &w, cols, None) < 0.55 * error(cpu, W4R, &w, cols, None));
            // A step of s leaves s / sqrt(12). Extremes of 32 such weights are 2.3 deviations away.
            for (format, (error, steps)) in
                formats.iter().zip(errors.into_iter().zip([7.5, 7.5, 7.5, 15.5, 15.5, 31.5, 127.0]))
            {
                let expected = 2.3 / steps / 12f64.sqrt();
                assert!(error < 1.1 * expected, "{cpu:?} {format:?} {error} {expected}");
                assert!(error > 0.5 * expected, "{cpu:?} {format:?} {error} {expected}");
            }
            assert!(errors.is_sorted_by(|a, b| a > b), "{cpu:?} {errors:?}");
        }
    }

    #[test]
    fn important_columns_are_missed_less() {
        let (rows, cols) = (16, 512);
        let w = weights(rows * cols, 33);
        let importance: Vec<f32> = random(cols, 36).iter().map(|x| (4.0 * x).exp()).collect();
        use Format::{W4, W4K, W4Nl, W4NlR, W4R, W5K, W5Planes, W5R, W6K};
        for format in [W4, W4R, W4Nl, W4NlR, W4K, W5R, W5K, W5Planes, W6K] {
            let weighted = |encoded: Option<&[f32]>| {
                let mut panel = vec![0; panel_bytes(format, cols)];
                encode_panel(format, &w, cols, encoded, &mut panel);
                let mut missed = 0.0;
                let mut decoded = vec![0.0; cols];
                for (row, w) in w.chunks_exact(cols).enumerate() {
                    decode_row(format, &panel, cols, row, &mut decoded);
                    let terms = w.iter().zip(&decoded).zip(&importance);
                    missed += terms.map(|((w, d), i)| i * (w - d).powi(2)).sum::<f32>();
                }
                missed
            };
            let (with, without) = (weighted(Some(&importance)), weighted(None));
            assert!(with < 0.95 * without, "{format:?} {with} {without}");
        }
    }

    #[test]
    fn extreme_groups_stay_finite() {
        let cols = 256;
        for format in Format::encoded() {
            for fill in [0.0, 1e-30, -1e-8, 65504.0, -65504.0] {
                let mut w = vec![fill; 16 * cols];
                w[cols] = -fill;
                w[2 * cols..3 * cols].fill(0.0);
                let bytes = pack(Cpu::best(), format, &w, cols);
                let mut out = vec![f32::NAN; cols];
                for row in 0..16 {
                    decode_row(format, &bytes, cols, row, &mut out);
                    for (w, out) in w[row * cols..].iter().zip(&out) {
                        // The table has 113 opposite to -127.
                        let bound = 0.1 * w.abs() + 1e-5;
                        assert!((w - out).abs() <= bound, "{format:?} {w} {out}");
                    }
                }
            }
        }
    }
}
