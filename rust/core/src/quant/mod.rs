//! Weight formats: how a matrix lies in memory, and how a kernel reads it.
//!
//! Float matrices are row-major as the checkpoint holds them ([`float`]). The quantised formats
//! [`w4`] and [`w8`] cut a matrix into panels of 16 output rows, so that one vector holds one
//! value of each row and no product needs a horizontal sum. The columns of a panel are cut into
//! groups of 32 with one scale per row and group; two groups make a block. Rows are padded to a
//! whole panel and columns to a whole block, with codes that mean zero. [`w8_planes`] keeps the
//! high and the low half of W8 codes apart.

pub mod float;
pub mod ggml;
mod scale_search;
pub mod w4;
pub mod w8;
pub mod w8_planes;

use crate::error::{Error, Result};
use crate::simd::{Cpu, Isa, Kernel, LANES};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

pub use ggml::BlockType;

/// Output rows of a panel.
pub const PANEL_ROWS: usize = LANES;
/// Columns that share a scale.
pub const GROUP: usize = 32;
/// Columns of a block.
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
}

impl FromStr for Quant {
    type Err = Error;
    fn from_str(name: &str) -> Result<Quant> {
        match name {
            "none" => Ok(Quant::None),
            "w8" => Ok(Quant::W8),
            "w4" => Ok(Quant::W4),
            _ => Err(Error::Argument(format!("quant is `{name}`, expected one of: none, w8, w4"))),
        }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quant::None => "none",
            Quant::W8 => "w8",
            Quant::W4 => "w4",
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
    W4,
    /// Rows of blocks as a GGUF file has them.
    Blocks(BlockType),
}

impl Format {
    pub const PACKED: [Format; 3] = [Format::W8, Format::W8Planes, Format::W4];

    /// Whether the matrix is in panels of quantised blocks.
    pub fn is_packed(self) -> bool {
        Format::PACKED.contains(&self)
    }

    pub fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::F32 => "f32",
            Format::W8 => "w8",
            Format::W8Planes => "w8_planes",
            Format::W4 => "w4",
            Format::Blocks(block) => block.format_name(),
        }
    }

    /// Bytes of `rows` rows of `cols` columns, padding included.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            Format::Bf16 | Format::F16 => 2 * rows * cols,
            Format::F32 => 4 * rows * cols,
            Format::W8 | Format::W8Planes | Format::W4 => packed_bytes(self, rows, cols),
            Format::Blocks(block) => rows * block.row_bytes(cols),
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

/// A format of quantised panels, as the kernels see it.
pub trait Packed {
    /// `[u8; N]`: 16 rows x 64 columns, scales included.
    type Block: AsRef<[u8]> + 'static;

    /// Cuts the bytes of a panel into blocks.
    fn blocks(panel: &[u8]) -> &[Self::Block];

    /// The scales of group `g` (0 or 1) of a block, a row a lane.
    fn scales<S: Isa>(s: S, block: &Self::Block, g: usize) -> S::F;

    /// Exact integer dot products of group `g` of a block with M tokens.
    ///
    /// x: the block's columns, four a step, tokens innermost; sums: the sum of each token's 32
    /// values in this group.
    fn dot<S: Isa, const M: usize>(
        s: S,
        block: &Self::Block,
        g: usize,
        x: &[[[i8; 4]; M]; BLOCK_STEPS],
        sums: &[i32; M],
    ) -> [S::I; M];

    /// Quantises one group of up to 16 rows into a block. w: 32 vectors, a row a lane.
    fn encode<S: Isa>(s: S, w: &[[f32; LANES]; GROUP], block: &mut [u8], g: usize);

    /// The value of a code.
    fn decode(block: &Self::Block, row: usize, col: usize) -> f32;
}

/// Bytes of a panel: 16 rows of `cols` columns. `format` must be packed.
pub fn panel_bytes(format: Format, cols: usize) -> usize {
    let block = match format {
        Format::W4 => w4::BLOCK_BYTES,
        Format::W8 => w8::BLOCK_BYTES,
        Format::W8Planes => w8_planes::BLOCK_BYTES,
        _ => panic!("{} has no panels", format.name()),
    };
    cols.div_ceil(BLOCK) * block
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

/// Bytes of a packed matrix, padding included.
pub fn packed_bytes(format: Format, rows: usize, cols: usize) -> usize {
    rows.div_ceil(PANEL_ROWS) * panel_bytes(format, cols)
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
        _ => unreachable!("panel_bytes accepts packed formats only"),
    }
}

struct EncodePanel<'a, P> {
    rows: &'a [f32],
    cols: usize,
    out: &'a mut [u8],
    format: std::marker::PhantomData<P>,
}

impl<P: Packed> Kernel for EncodePanel<'_, P> {
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
    match format {
        Format::W4 => decode_panel_row::<w4::W4>(panel, row % PANEL_ROWS, out),
        Format::W8 => decode_panel_row::<w8::W8>(panel, row % PANEL_ROWS, out),
        _ => unreachable!("panel_bytes accepts packed formats only"),
    }
}

fn decode_panel_row<P: Packed>(panel: &[u8], row: usize, out: &mut [f32]) {
    for (block, out) in P::blocks(panel).iter().zip(out.chunks_mut(BLOCK)) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = P::decode(block, row, col);
        }
    }
}
