//! What the tests of kernels share.

use super::matmul::packed;
use super::outputs::Outputs;
use super::quantize::QuantTile;
use super::unpacked::{self, Unpacked};
use super::{Ask, FEW_TOKENS, Reading};
use crate::quant::reorder::{panel_format, reorder_panel};
use crate::quant::two_planes::Planes;
use crate::quant::{
    BlockType, Format, PANEL_ROWS, decode_row, encode_panel_on, panel_bytes, planes,
};
use crate::simd::Cpu;
use half::f16;

/// Where the numbers of a matrix in panels come from.
#[derive(Clone, Copy, Debug)]
pub enum Made {
    /// Rounded from floats.
    Encoded(Format),
    /// Re-ordered from blocks.
    Reordered(BlockType),
}

/// A matrix in panels and its numbers, [rows, cols], as its slow twin reads them.
pub struct Panels {
    pub format: Format,
    pub bytes: Vec<u8>,
    pub decoded: Vec<f32>,
}

impl Made {
    /// All ways to fill the formats of panels.
    pub fn all() -> impl Iterator<Item = Made> {
        let encoded = Format::encoded();
        encoded.map(Made::Encoded).chain(BlockType::ALL.map(Made::Reordered))
    }

    /// How the matrix lies.
    pub fn format(self) -> Format {
        match self {
            Made::Encoded(format) => format,
            Made::Reordered(block) => panel_format(block),
        }
    }

    /// About `cols` columns, as many as the format takes.
    pub fn cols(self, cols: usize) -> usize {
        match self {
            Made::Encoded(format) => {
                (cols..).find(|cols| format.takes_cols(*cols)).expect("a multiple of 256")
            }
            Made::Reordered(block) => cols.next_multiple_of(block.cols()),
        }
    }

    /// A random matrix.
    pub fn matrix(self, cpu: Cpu, rows: usize, cols: usize, seed: u64) -> Panels {
        let mut decoded = vec![0.0; rows * cols];
        match self {
            Made::Encoded(format) => {
                let bytes = pack(cpu, format, &random(rows * cols, seed), cols);
                for (row, out) in decoded.chunks_exact_mut(cols).enumerate() {
                    decode_row(format, &bytes, cols, row, out);
                }
                Panels { format, bytes, decoded }
            }
            Made::Reordered(block) => {
                let blocks = random_blocks(block, rows * cols / block.cols(), seed);
                block.decode(&blocks, &mut decoded);
                let format = panel_format(block);
                let row_bytes = block.row_bytes(cols);
                let mut bytes = vec![0; format.bytes(rows, cols)];
                let panels = bytes.chunks_exact_mut(panel_bytes(format, cols));
                for (rows, panel) in blocks.chunks(PANEL_ROWS * row_bytes).zip(panels) {
                    panel.fill(0xa5);
                    reorder_panel(block, rows, cols, panel);
                }
                Panels { format, bytes, decoded }
            }
        }
    }
}

/// Product of a whole matrix in panels with a tile, in the way that is taken for so many tokens.
pub fn multiply(
    cpu: Cpu,
    format: Format,
    panels: &[u8],
    cols: usize,
    x: &QuantTile,
    reading: Reading,
    y: Outputs<'_>,
) {
    if x.tokens() <= FEW_TOKENS || unpacked::layout(format).is_none() {
        return packed(cpu, format, panels, cols, x, reading, y);
    }
    unpacked::product(cpu, &unpack(cpu, format, panels, cols, reading.ask), x, y);
}

/// A whole matrix in panels, unpacked.
pub fn unpack(cpu: Cpu, format: Format, panels: &[u8], cols: usize, ask: Ask) -> Unpacked {
    let mut unpacked = Unpacked::default();
    if format.is_in_planes() {
        unpacked.set_planes(cpu, Planes::new(format, panels), cols, ask);
    } else {
        unpacked.set(cpu, format, panels, cols, ask);
    }
    unpacked
}

/// Quantises rows x cols weights.
pub fn pack(cpu: Cpu, format: Format, w: &[f32], cols: usize) -> Vec<u8> {
    let mut panel = vec![0; panel_bytes(format, cols)];
    let mut bytes = Vec::new();
    for plane in planes(format, cols) {
        for rows in w.chunks(PANEL_ROWS * cols) {
            encode_panel_on(cpu, format, rows, cols, None, &mut panel);
            bytes.extend_from_slice(&panel[plane.clone()]);
        }
    }
    bytes
}

/// Blocks with random codes and scales of ordinary size.
pub fn random_blocks(block: BlockType, n: usize, seed: u64) -> Vec<u8> {
    let halves: &[usize] = match block {
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q2K => &[80, 82],
        BlockType::Q3K => &[108],
        BlockType::Q6K => &[208],
        BlockType::Mxfp4 => &[],
        _ => &[0],
    };
    let values = random(n * block.bytes(), seed);
    let mut bytes: Vec<u8> = values.iter().map(|x| (x * 1e6) as i32 as u8).collect();
    for (block_bytes, x) in bytes.chunks_exact_mut(block.bytes()).zip(&values) {
        for at in halves {
            block_bytes[*at..][..2].copy_from_slice(&f16::from_f32(x * 0.1).to_le_bytes());
        }
        if block == BlockType::Mxfp4 {
            block_bytes[0] = 120 + (x.abs() * 10.0) as u8;
        }
    }
    bytes
}

/// Random values in -1..1, the same for the same seed.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            // xorshift64* (Marsaglia 2003, Vigna 2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
            bits as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Panics, naming position, value and bound, unless every |got - want| <= bound.
pub fn assert_close(got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let bound = bound(i);
        assert!(
            (f64::from(got) - want).abs() <= bound,
            "{what}: position {i}: got {got}, expected {want}, bound {bound:e}"
        );
    }
}
