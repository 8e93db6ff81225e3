//! Block types of GGUF files against ggml's own bytes, numbers and products.
//! `tests/golden/README.md` says how they were made.

use qdelta_core::kernels::Reading;
use qdelta_core::kernels::matmul::packed;
use qdelta_core::kernels::outputs::Outputs;
use qdelta_core::kernels::quantize::QuantTile;
use qdelta_core::quant::reorder::{panel_format, reorder_panel_to};
use qdelta_core::quant::{BlockType, Format, GROUP, PANEL_ROWS, panel_bytes};
use qdelta_core::simd::Cpu;
use qdelta_core::tensor::{Dtype, widen};
use safetensors::SafeTensors;
use std::path::PathBuf;

/// Neighbouring columns that share a scale and an offset.
const HALF: usize = 16;

struct Golden(Vec<u8>);

impl Golden {
    fn open() -> Golden {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let path = root.join("gguf/quants.safetensors");
        Golden(std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")))
    }

    fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let tensors = SafeTensors::deserialize(&self.0).expect("a golden file is valid");
        Some(tensors.tensor(name).ok()?.data().to_vec())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name).unwrap_or_else(|| panic!("no golden tensor {name}"));
        bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
    }

    /// Rows of the matrix, and their columns.
    fn shape(&self) -> (usize, usize) {
        let tensors = SafeTensors::deserialize(&self.0).expect("a golden file is valid");
        let weight = tensors.tensor("weight").expect("the matrix");
        (weight.shape()[0], weight.shape()[1])
    }

    /// The types that the file holds, and their bytes.
    fn blocks(&self) -> Vec<(BlockType, Vec<u8>)> {
        let raw = |block: BlockType| Some((block, self.bytes(&format!("{}.raw", block.name()))?));
        let found: Vec<_> = BlockType::ALL.into_iter().filter_map(raw).collect();
        assert_eq!(found.len(), BlockType::ALL.len() - 1, "all types but MXFP4");
        found
    }
}

/// All bits are the same: minus zero is not zero.
fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{what}[{i}]: got {got}, expected {want}");
    }
}

#[test]
fn decoded_numbers_have_the_bits_of_ggml() {
    let golden = Golden::open();
    for (block, raw) in golden.blocks() {
        let want = golden.floats(&format!("{}.dequant", block.name()));
        let mut out = vec![f32::NAN; want.len()];
        block.decode(&raw, &mut out);
        assert!(block.is_finite(&raw));
        assert_same_bits(&out, &want, block.name());
        // The way embeddings are read.
        out.fill(f32::NAN);
        widen(Format::Blocks(block), &raw, &mut out);
        assert_same_bits(&out, &want, block.name());
    }
}

#[test]
fn floats_have_the_bits_of_ggml() {
    let golden = Golden::open();
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let name = dtype.name();
        let raw = golden.bytes(&format!("{name}.raw")).expect(name);
        let want = golden.floats(&format!("{name}.dequant"));
        let mut out = vec![f32::NAN; want.len()];
        widen(dtype.format().expect(name), &raw, &mut out);
        assert_same_bits(&out, &want, name);
    }
}

#[test]
fn encoded_blocks_have_the_bytes_of_ggml() {
    let golden = Golden::open();
    let weight = golden.floats("weight");
    for block in [BlockType::Q8_0, BlockType::Q4_0] {
        let want = golden.bytes(&format!("{}.raw", block.name())).expect("it is there");
        assert!(block.encode(&weight) == want, "{block:?}");
    }
}

/// Sizes of the two parts of each weight, which are added in f32.
fn parts(block: BlockType, raw: &[u8], cols: usize) -> Vec<f64> {
    let halves = block.cols() / HALF;
    let (mut scales, mut offsets) = (vec![0.0f32; halves], vec![0.0f32; halves]);
    let mut codes = vec![0; block.cols()];
    let mut out = Vec::new();
    for bytes in raw.chunks_exact(block.bytes()) {
        block.codes(bytes, &mut codes, &mut scales, &mut offsets);
        let part = |(i, code): (usize, &i8)| {
            let scaled = f64::from(scales[i / HALF]) * f64::from(*code);
            scaled.abs() + f64::from(offsets[i / HALF].abs())
        };
        out.extend(codes.iter().enumerate().map(part));
    }
    assert!(out.len().is_multiple_of(cols));
    out
}

/// How far a product with activations rounded to bytes may be from the exact one.
///
/// w: weights of a row; parts: see [`parts`]; x: activations of a token.
fn bound(w: &[f32], parts: &[f64], x: &[f32]) -> f64 {
    let mut bound = 0.0;
    let groups = w.chunks(GROUP).zip(parts.chunks(GROUP)).zip(x.chunks(GROUP));
    // One rounding for each group that is added, and a few for the scales.
    let roundings = (w.len() / GROUP + 6) as f64 * f64::from(f32::EPSILON);
    for ((w, parts), x) in groups {
        let largest = x.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
        let half_step = largest / 127.0 * (0.5 + 1e-5);
        bound += half_step * w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
        // Codes stand for no more than the largest activation of their group.
        bound += roundings * largest * parts.iter().sum::<f64>();
    }
    bound
}

#[test]
fn products_of_panels_are_near_the_exact_ones() {
    let golden = Golden::open();
    let (rows, cols) = golden.shape();
    assert!(rows <= PANEL_ROWS, "one panel");
    let x = golden.floats("x");
    let tokens = x.len() / cols;
    for (block, raw) in golden.blocks() {
        let want = golden.floats(&format!("{}.matmul", block.name()));
        let weights = golden.floats(&format!("{}.dequant", block.name()));
        let parts = parts(block, &raw, cols);
        let planes = (block == BlockType::Q8_0).then_some(Format::W8Planes);
        for format in [Some(panel_format(block)), planes].into_iter().flatten() {
            let mut panel = vec![0xa5; panel_bytes(format, cols)];
            reorder_panel_to(block, &raw, cols, format, &mut panel);
            for cpu in Cpu::all() {
                let mut tile = QuantTile::default();
                tile.quantize(cpu, &x, cols);
                let mut y = vec![f32::NAN; tokens * PANEL_ROWS];
                let out = Outputs::of(&mut y, PANEL_ROWS);
                packed(cpu, format, &panel, cols, &tile, Reading::PLAIN, out);
                for (token, (y, want)) in y.chunks(PANEL_ROWS).zip(want.chunks(rows)).enumerate() {
                    for (row, (got, want)) in y.iter().zip(want).enumerate() {
                        let at = row * cols..(row + 1) * cols;
                        let x = &x[token * cols..][..cols];
                        let bound = bound(&weights[at.clone()], &parts[at], x)
                            + f64::from(want.abs() * f32::EPSILON);
                        let error = f64::from((got - want).abs());
                        assert!(
                            error <= bound,
                            "{block:?} {format:?} {cpu:?} token {token} row {row}: got {got}, \
                             expected {want}, bound {bound}"
                        );
                    }
                    assert!(y[rows..].iter().all(|y| *y == 0.0), "rows of padding");
                }
            }
        }
    }
}
