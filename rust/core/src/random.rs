//! Random numbers for synthetic weights, benchmarks and tests.

use crate::quant::row_scaled::UNIT_BYTES;
use crate::quant::{BlockType, Format, affine, k, panel_bytes, two_planes, w4, w8};
use crate::simd::LANES;
use half::{bf16, f16};

/// xorshift64* (Marsaglia 2003, Vigna 2016): fast, and good enough for weights nobody reads.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in 0..bound, nearly: for bounds far below 2^64.
    pub fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 11) % bound as u64) as usize
    }

    /// Uniform in -scale..scale.
    pub fn uniform(&mut self, scale: f32) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    }

    pub fn fill(&mut self, scale: f32, x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = self.uniform(scale));
    }

    /// Fills a plane of a matrix, or some of its panels, with weights of about -scale..scale.
    ///
    /// cols: of the matrix; bytes: whole panels, of other formats whole blocks or numbers.
    pub fn fill_plane(
        &mut self,
        (format, cols): (Format, usize),
        plane: usize,
        scale: f32,
        bytes: &mut [u8],
    ) {
        match format {
            Format::Bf16 => bytes.as_chunks_mut().0.iter_mut().for_each(|x| {
                *x = bf16::from_f32(self.uniform(scale)).to_le_bytes();
            }),
            Format::F16 => bytes.as_chunks_mut().0.iter_mut().for_each(|x| {
                *x = f16::from_f32(self.uniform(scale)).to_le_bytes();
            }),
            Format::F32 => bytes.as_chunks_mut().0.iter_mut().for_each(|x| {
                *x = self.uniform(scale).to_le_bytes();
            }),
            Format::W4 => self.fill_blocks(w4::BLOCK_BYTES, (w4::SCALE_BYTES, scale / 8.0), bytes),
            Format::W4Nl => {
                self.fill_blocks(w4::BLOCK_BYTES, (w4::SCALE_BYTES, scale / 128.0), bytes)
            }
            Format::W4Mx => {
                let exponent = (128.0 + (scale / 8.0).log2()) as u8;
                self.fill_codes(bytes);
                for block in bytes.chunks_exact_mut(w4::BLOCK_BYTES) {
                    block[..w4::SCALE_BYTES].fill(exponent);
                }
            }
            Format::W8 => {
                self.fill_blocks(w8::BLOCK_BYTES, (w4::SCALE_BYTES, scale / 128.0), bytes)
            }
            Format::W8Planes | Format::W5Planes if plane == 1 => self.fill_codes(bytes),
            Format::W8Planes | Format::W5Planes => {
                let scale = scale / if format == Format::W8Planes { 128.0 } else { 16.0 };
                self.fill_blocks(two_planes::HIGH_BYTES, (w4::SCALE_BYTES, scale), bytes);
            }
            // Factors of scales and offsets are random bytes, 128 in the mean.
            Format::W2K => self.fill_blocks(k::W2K_BYTES, (4 * LANES, scale / 16.0), bytes),
            Format::W4K => self.fill_blocks(k::W4K_BYTES, (4 * LANES, scale / 1024.0), bytes),
            Format::W5K => self.fill_blocks(k::W5K_BYTES, (4 * LANES, scale / 2048.0), bytes),
            Format::W6K => self.fill_blocks(k::W6K_BYTES, (2 * LANES, scale / 4096.0), bytes),
            Format::W4NlK => self.fill_blocks(k::W4NLK_BYTES, (2 * LANES, scale / 8192.0), bytes),
            // Factors are random bytes, 64 in the mean of their sizes.
            Format::W4R | Format::W4NlR | Format::W5R => {
                let largest = match format {
                    Format::W4R => 8.0,
                    Format::W5R => 16.0,
                    _ => 32.0,
                };
                let unit = (scale / (64.0 * largest)).to_le_bytes();
                self.fill_codes(bytes);
                for panel in bytes.chunks_exact_mut(panel_bytes(format, cols)) {
                    panel[..UNIT_BYTES].as_chunks_mut().0.fill(unit);
                }
            }
            // Codes with an offset of the same size are nine and seventeen scales in the mean.
            Format::W4Affine => {
                let first = affine::SCALE_BYTES;
                self.fill_blocks(affine::W4_BYTES, (first, scale / 16.0), bytes);
            }
            Format::W5Affine => {
                let first = affine::SCALE_BYTES;
                self.fill_blocks(affine::W5_BYTES, (first, scale / 32.0), bytes);
            }
            Format::Blocks(BlockType::Q8_0) => {
                self.fill_blocks(BlockType::Q8_0.bytes(), (2, scale / 128.0), bytes);
            }
            Format::Fp8 | Format::Blocks(_) => {
                panic!("random matrices are not made in {}", format.name())
            }
        }
    }

    /// Random bytes, and in each block one f16 for all of its first bytes.
    fn fill_blocks(&mut self, block_bytes: usize, (first, scale): (usize, f32), bytes: &mut [u8]) {
        let scale = f16::from_f32(scale).to_le_bytes();
        for block in bytes.chunks_exact_mut(block_bytes) {
            let (scales, codes) = block.split_at_mut(first);
            scales.as_chunks_mut().0.fill(scale);
            self.fill_codes(codes);
        }
    }

    fn fill_codes(&mut self, codes: &mut [u8]) {
        for codes in codes.as_chunks_mut().0 {
            *codes = self.next().to_le_bytes();
        }
    }
}
