//! Weight formats: how a matrix lies in memory, and how a kernel reads it.
//!
//! Float matrices are row-major as the checkpoint holds them ([`float`]), and so are the blocks of
//! GGUF files ([`ggml`]). The formats that kernels multiply with cut a matrix into panels of 16
//! output rows, so that one vector holds one value of each row and no product needs a horizontal
//! sum. The columns of a panel are cut into groups of 32, and a few groups make a block: two in
//! [`w4`], [`w8`], [`w4_nl`] and [`w8_affine`], eight in those of [`k`]. Rows are padded to a whole
//! panel and columns to a whole block, with codes that mean zero. [`w8_planes`] keeps the high and
//! the low half of W8 codes apart. [`reorder`] makes panels of a GGUF file's blocks.

pub mod float;
pub mod ggml;
pub mod k;
pub mod reorder;
mod scale_search;
pub mod w4;
pub mod w4_nl;
pub mod w8;
pub mod w8_affine;
pub mod w8_planes;

use crate::error::{Error, Result};
use crate::simd::{Cpu, Isa, Kernel, LANES};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

pub use ggml::BlockType;

/// Output rows of a panel.
pub const PANEL_ROWS: usize = LANES;
/// Columns of a group.
pub const GROUP: usize = 32;
/// Columns of a block of two groups; activations are padded to as many.
pub const BLOCK: usize = 2 * GROUP;
/// Dot products of four columns in a group, and in a block.
pub const GROUP_STEPS: usize = GROUP / 4;
pub const BLOCK_STEPS: usize = BLOCK / 4;

/// What the weights of a model are turned into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quant {
    /// As the checkpoint has them.
    None,
    W8,
    W4,
    /// As a GGUF file has them, in panels.
    Gguf,
}

impl FromStr for Quant {
    type Err = Error;
    fn from_str(name: &str) -> Result<Quant> {
        match name {
            "none" => Ok(Quant::None),
            "w8" => Ok(Quant::W8),
            "w4" => Ok(Quant::W4),
            "gguf" => Ok(Quant::Gguf),
            _ => Err(Error::Argument(format!(
                "quant is `{name}`, expected one of: none, w8, w4, gguf"
            ))),
        }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quant::None => "none",
            Quant::W8 => "w8",
            Quant::W4 => "w4",
            Quant::Gguf => "gguf",
        })
    }
}

/// How one matrix lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Bf16,
    F16,
    F32,
    W8,
    W8Planes,
    W8Affine,
    W4,
    W4Nl,
    W4K,
    W5K,
    W6K,
    /// Rows of blocks as a GGUF file has them.
    Blocks(BlockType),
}

impl Format {
    pub const PACKED: [Format; 8] = [
        Format::W8,
        Format::W8Planes,
        Format::W8Affine,
        Format::W4,
        Format::W4Nl,
        Format::W4K,
        Format::W5K,
        Format::W6K,
    ];

    /// Whether the matrix is in panels of quantised blocks.
    pub fn is_packed(self) -> bool {
        Format::PACKED.contains(&self)
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
            Format::W8 => "w8",
            Format::W8Planes => "w8_planes",
            Format::W8Affine => "w8_affine",
            Format::W4 => "w4",
            Format::W4Nl => "w4_nl",
            Format::W4K => "w4_k",
            Format::W5K => "w5_k",
            Format::W6K => "w6_k",
            Format::Blocks(block) => block.format_name(),
        }
    }

    /// All formats whose codes have scales: panels, then rows of blocks.
    pub fn all_quantised() -> impl Iterator<Item = Format> {
        Format::PACKED.into_iter().chain(BlockType::ALL.map(Format::Blocks))
    }

    /// Whether rows of `cols` columns can have this format.
    pub fn takes_cols(self, cols: usize) -> bool {
        match self {
            Format::W4K | Format::W5K | Format::W6K => cols.is_multiple_of(k::SUPER),
            Format::Blocks(block) => cols.is_multiple_of(block.cols()),
            _ => true,
        }
    }

    /// Bytes of `rows` rows of `cols` columns, padding included.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            Format::Bf16 | Format::F16 => 2 * rows * cols,
            Format::F32 => 4 * rows * cols,
            Format::Blocks(block) => rows * block.row_bytes(cols),
            _ => rows.div_ceil(PANEL_ROWS) * panel_bytes(self, cols),
        }
    }

    /// The planes of a whole matrix.
    pub fn split(self, matrix: &mut [u8]) -> Vec<&mut [u8]> {
        match self {
            Format::W8Planes => {
                let high = matrix.len() / w8_planes::BLOCK_BYTES * w8_planes::HIGH_BYTES;
                let (high, low) = matrix.split_at_mut(high);
                vec![high, low]
            }
            _ => vec![matrix],
        }
    }
}

/// Int8 activations of a group of columns for M tokens, tokens innermost.
#[derive(Clone, Copy)]
pub struct Group<'a, const M: usize> {
    /// Four columns a step.
    pub codes: &'a [[[i8; 4]; M]; GROUP_STEPS],
    /// The sum of each token's codes.
    pub sums: &'a [i32; M],
    /// The sum of the first 16 of them.
    pub halves: &'a [i32; M],
    pub scales: &'a [f32; M],
}

impl<const M: usize> Group<'_, M> {
    /// The sum of the codes of one half of the columns.
    #[inline(always)]
    fn half_sum(&self, half: usize, token: usize) -> i32 {
        if half == 0 { self.halves[token] } else { self.sums[token] - self.halves[token] }
    }
}

/// A format of quantised panels, as the kernels see it.
pub trait Packed {
    /// `[u8; N]`: 16 rows of `GROUPS` groups, scales included.
    type Block: AsRef<[u8]> + 'static;
    /// Groups of a block.
    const GROUPS: usize;

    /// Cuts the bytes of a panel into blocks.
    fn blocks(panel: &[u8]) -> &[Self::Block];

    /// Adds the products of group `g` of a block with M tokens, a row a lane. Sums of codes are
    /// exact integers.
    fn add<S: Isa, const M: usize>(
        s: S,
        block: &Self::Block,
        g: usize,
        x: Group<'_, M>,
        acc: &mut [S::F; M],
    );

    /// The value of a code.
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32;
}

/// A format of quantised panels that numbers can be rounded to.
pub trait Encode: Packed {
    /// Quantises one group of up to 16 rows into a block. w: 32 vectors, a row a lane.
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]; GROUP], block: &mut [u8], g: usize);
}

/// acc += dots times the scales of weights and activations.
#[inline(always)]
fn add_scaled<S: Isa, const M: usize>(
    s: S,
    dots: [S::I; M],
    scales: S::F,
    x: &[f32; M],
    acc: &mut [S::F; M],
) {
    for m in 0..M {
        acc[m] = s.fma(s.to_f32(dots[m]), s.mul(scales, s.splat(x[m])), acc[m]);
    }
}

/// acc -= what an offset below all weights of a group takes away.
#[inline(always)]
fn subtract_offsets<S: Isa, const M: usize>(
    s: S,
    offsets: S::F,
    x: Group<'_, M>,
    acc: &mut [S::F; M],
) {
    for m in 0..M {
        acc[m] = s.fma(offsets, s.splat(-x.scales[m] * x.sums[m] as f32), acc[m]);
    }
}

/// acc += the products of 16 columns, one half of a group, with codes up to 127 less `zero`.
#[inline(always)]
fn add_halves<S: Isa, const M: usize>(
    s: S,
    half: usize,
    codes: [S::B; GROUP_STEPS / 2],
    zero: i32,
    scales: S::F,
    x: Group<'_, M>,
    acc: &mut [S::F; M],
) {
    let mut dots = [s.splat_i32(0); M];
    for m in 0..M {
        dots[m] = s.splat_i32(-zero * x.half_sum(half, m));
    }
    for t in 0..GROUP_STEPS / 2 {
        for m in 0..M {
            let x = s.splat_bytes(x.codes[half * GROUP_STEPS / 2 + t][m]);
            dots[m] = s.dot_codes(dots[m], codes[t], x);
        }
    }
    add_scaled(s, dots, scales, x.scales, acc);
}

/// Runs `$body` with `$p` naming the type of a format whose panels lie in one plane.
macro_rules! with_packed {
    ($format:expr, $p:ident => $body:expr) => {
        with_packed!(@ $format, $p => $body; W8 w8, W8Affine w8_affine, W4 w4, W4Nl w4_nl, W4K k, W5K k, W6K k)
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

/// Bytes of a panel: 16 rows of `cols` columns. `format` must be packed.
pub fn panel_bytes(format: Format, cols: usize) -> usize {
    assert!(format.is_packed() && format.takes_cols(cols), "{} x {cols}", format.name());
    if format == Format::W8Planes {
        return cols.div_ceil(BLOCK) * w8_planes::BLOCK_BYTES;
    }
    with_packed!(format, P => {
        cols.div_ceil(P::GROUPS * GROUP) * size_of::<<P as Packed>::Block>()
    })
}

/// The planes of a packed format, as ranges of the bytes of a panel. A matrix is the first plane
/// of all its panels, then the second.
pub fn planes(format: Format, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let bytes = panel_bytes(format, cols);
    let first = match format {
        Format::W8Planes => cols.div_ceil(BLOCK) * w8_planes::HIGH_BYTES,
        _ => bytes,
    };
    [0..first, first..bytes].into_iter().filter(|plane| !plane.is_empty())
}

/// Quantises up to 16 rows.
///
/// rows: [n, cols], n <= 16; out: `panel_bytes(format, cols)` bytes. Panics if the lengths
/// disagree. The values must be finite.
pub fn encode_panel(format: Format, rows: &[f32], cols: usize, out: &mut [u8]) {
    encode_panel_on(Cpu::best(), format, rows, cols, out);
}

/// As [`encode_panel`], on a given instruction set.
pub fn encode_panel_on(cpu: Cpu, format: Format, rows: &[f32], cols: usize, out: &mut [u8]) {
    assert_eq!(out.len(), panel_bytes(format, cols));
    assert!(cols > 0 && rows.len().is_multiple_of(cols) && rows.len() / cols <= PANEL_ROWS);
    match format {
        Format::W4 => {
            cpu.run(EncodePanel::<w4::W4> { rows, cols, out, format: Default::default() })
        }
        Format::W8 => {
            cpu.run(EncodePanel::<w8::W8> { rows, cols, out, format: Default::default() })
        }
        Format::W8Planes => {
            let mut panel = vec![0; panel_bytes(Format::W8, cols)];
            encode_panel_on(cpu, Format::W8, rows, cols, &mut panel);
            w8_planes::split_panel(&panel, out);
        }
        _ => panic!("{} is not encoded from floats", format.name()),
    }
}

struct EncodePanel<'a, P> {
    rows: &'a [f32],
    cols: usize,
    out: &'a mut [u8],
    format: std::marker::PhantomData<P>,
}

impl<P: Encode> Kernel for EncodePanel<'_, P> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let block_bytes = self.out.len() / self.cols.div_ceil(BLOCK);
        for (b, block) in self.out.chunks_exact_mut(block_bytes).enumerate() {
            for g in 0..2 {
                let first = b * BLOCK + g * GROUP;
                let width = self.cols.saturating_sub(first).min(GROUP);
                let mut w = [[0.0; LANES]; GROUP];
                for (lane, row) in self.rows.chunks_exact(self.cols).enumerate() {
                    for i in 0..width {
                        w[i][lane] = row[first + i];
                    }
                }
                P::encode(s, &w, block, g);
            }
        }
    }
}

/// Decodes one row of a packed matrix. out: [cols].
pub fn decode_row(format: Format, matrix: &[u8], cols: usize, row: usize, out: &mut [f32]) {
    assert_eq!(out.len(), cols);
    if format == Format::W8Planes {
        let first = row / PANEL_ROWS;
        let panel = w8_planes::Planes::new(matrix).panels(first..first + 1, cols);
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
    for (block, out) in P::blocks(panel).iter().zip(out.chunks_mut(P::GROUPS * GROUP)) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = P::decode(block, row, col);
        }
    }
}
