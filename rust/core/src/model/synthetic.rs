//! Random weights at the shapes of a config, for benchmarks that need no files.

use super::recipe::{self, Storage};
use super::tensors::{Role, TensorSpec, text_tensors};
use super::weights::Source;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::quant::{Format, Quant, planes};
use crate::random::Random;
use crate::tensor::{AlignedBuf, Bytes, Dtype, Tensor};
use crate::threads;
use rayon::prelude::*;
use std::collections::HashMap;

/// Bytes that one thread fills at a time, about.
const PART_BYTES: usize = 512 << 10;

/// Tensors that were never trained: their products stay of moderate size, their text is noise.
pub struct Synthetic {
    tensors: HashMap<String, Tensor>,
}

impl Synthetic {
    /// Fills all text tensors, in the formats of `quant`; unquantised matrices are bf16.
    pub fn new(config: &Config, quant: Quant, seed: u64) -> Result<Synthetic> {
        let specs = text_tensors(config);
        let tensors = specs.iter().enumerate().map(|(i, spec)| {
            let seed = seed ^ ((i as u64) << 32);
            let storage = recipe::storage(quant, &HashMap::new(), spec, Dtype::Bf16)?;
            Ok((storage.name(spec), random_tensor(spec, storage, seed)?))
        });
        let tensors = threads::workers(None)?.install(|| tensors.collect::<Result<_>>())?;
        Ok(Synthetic { tensors })
    }
}

fn random_tensor(spec: &TensorSpec, storage: Storage, seed: u64) -> Result<Tensor> {
    let (format, dtype) = match storage {
        Storage::Coded(format) => (format, Dtype::U8),
        Storage::AsIs => (Format::Bf16, Dtype::Bf16),
        Storage::F32 => (Format::F32, Dtype::F32),
    };
    let (rows, cols) = spec.rows_cols();
    let elements = spec.elements().ok_or_else(|| {
        Error::Argument(format!("tensor `{}`: shape {:?} is too large", spec.name, spec.shape))
    })?;
    // Uniform with the standard deviation that keeps the length of a vector of `cols` elements.
    let scale = match spec.role {
        Role::Small => 0.5,
        _ => (3.0 / cols as f32).sqrt(),
    };
    let bytes =
        if format.is_packed() { format.bytes(rows, cols) } else { format.bytes(1, elements) };
    let mut buffer = AlignedBuf::new(bytes);
    for (plane, bytes) in format.split(&mut buffer).into_iter().enumerate() {
        let seed = seed ^ ((plane as u64) << 24);
        // Parts are whole panels or blocks, so that no block is cut.
        let unit = match format {
            Format::Blocks(block) => block.bytes(),
            format if format.is_packed() => {
                planes(format, cols).nth(plane).map_or(1, |bytes| bytes.len())
            }
            _ => size_of::<f32>(),
        };
        bytes.par_chunks_mut((PART_BYTES / unit).max(1) * unit).enumerate().for_each(
            |(part, bytes)| {
                let mut random = Random::new(seed.wrapping_add(part as u64));
                random.fill_plane((format, cols), plane, scale, bytes);
            },
        );
    }
    Ok(Tensor { dtype, shape: storage.shape(spec), bytes: Bytes::from(buffer), scales: None })
}

impl Source for Synthetic {
    fn tensor(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::decode_row;

    #[test]
    fn matrices_of_many_parts_hold_moderate_numbers() {
        let (rows, cols) = (512, 2048);
        for format in Format::PACKED {
            let shape = vec![rows, cols];
            let spec = TensorSpec { name: "up.weight".into(), shape, role: Role::MlpUp };
            let matrix = random_tensor(&spec, Storage::Coded(format), 1).expect("small");
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                decode_row(format, &matrix.bytes, cols, r, &mut row);
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                assert!((0.3..3.0).contains(&length), "{} row {r}: {length}", format.name());
            }
        }
    }
}
