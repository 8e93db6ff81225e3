//! Recipes: in which format a converted file holds each tensor.

use super::tensors::{Role, TensorSpec};
use crate::error::{Error, Result};
use crate::quant::reorder::panel_format;
use crate::quant::{BlockType, Format, PANEL_ROWS, Quant, panel_bytes};
use crate::tensor::Dtype;

/// How a tensor is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// With the dtype that the checkpoint has.
    AsIs,
    F32,
    /// In a quantised format, with bytes in place of numbers.
    Coded(Format),
}

impl Storage {
    /// The name of a tensor in a converted file: coded matrices end in their format.
    pub fn name(self, spec: &TensorSpec) -> String {
        match self {
            Storage::Coded(format) => coded_name(&spec.name, format),
            Storage::AsIs | Storage::F32 => spec.name.clone(),
        }
    }

    /// The shape in a converted file: panels are [panels, bytes of a panel in all planes], blocks
    /// [rows, bytes of a row].
    pub fn shape(self, spec: &TensorSpec) -> Vec<usize> {
        let (rows, cols) = spec.rows_cols();
        match self {
            Storage::Coded(Format::Blocks(block)) => vec![rows, block.row_bytes(cols)],
            Storage::Coded(format) => {
                vec![rows.div_ceil(PANEL_ROWS), panel_bytes(format, cols)]
            }
            Storage::AsIs | Storage::F32 => spec.shape.clone(),
        }
    }
}

/// The name of a matrix in a format, `…weight` being that of the matrix.
pub fn coded_name(name: &str, format: Format) -> String {
    let stem = name.strip_suffix(".weight").expect("a coded tensor is called weight");
    format!("{stem}.{}", format.name())
}

/// How `quant` stores a tensor that the source has as `dtype`; an error if that loses numbers that
/// nobody asked to lose.
pub fn storage(quant: Quant, spec: &TensorSpec, dtype: Dtype) -> Result<Storage> {
    let storage = match (quant, dtype) {
        (Quant::None, _) => Storage::AsIs,
        (_, Dtype::Blocks(block)) if quant == Quant::Gguf => as_gguf(spec.role, block),
        (_, Dtype::Blocks(block)) => {
            return Err(Error::Unsupported(format!(
                "tensor `{}` is quantised already ({}), converting it to {quant} would round it a \
                 second time; keep its own types (quant \"auto\") or use the original BF16 weights",
                spec.name,
                block.name()
            )));
        }
        (Quant::Gguf, _) if spec.role == Role::Small => Storage::F32,
        (Quant::Gguf, _) => Storage::AsIs,
        (Quant::W8, _) => balanced(spec.role, Format::W8),
        (Quant::W4, _) => balanced(spec.role, Format::W4),
    };
    match storage {
        Storage::Coded(format) if !format.takes_cols(spec.rows_cols().1) => {
            Err(Error::Unsupported(format!(
                "tensor `{}`: rows of {} columns cannot be {}",
                spec.name,
                spec.rows_cols().1,
                format.name()
            )))
        }
        storage => Ok(storage),
    }
}

/// The recipe "balanced". out_proj moves the output most, attention next, gate and up least; decay
/// and write strength are a thousandth of the weights.
fn balanced(role: Role, narrow: Format) -> Storage {
    match role {
        Role::Mlp | Role::LinearInput | Role::Query => Storage::Coded(narrow),
        Role::LinearOutput | Role::KeyValue | Role::MtpInput => Storage::Coded(Format::W8),
        // In two planes, so that rows can be screened with one of them.
        Role::Embedding | Role::Head => Storage::Coded(Format::W8Planes),
        Role::LinearGate | Role::Vision => Storage::AsIs,
        Role::Small => Storage::F32,
    }
}

/// The numbers of a GGUF file's blocks, in panels where those are about as narrow.
fn as_gguf(role: Role, block: BlockType) -> Storage {
    Storage::Coded(match (panel_format(block), role) {
        (Format::W8, Role::Embedding | Role::Head) => Format::W8Planes,
        (Format::W8Affine, _) => Format::Blocks(block),
        (format, _) => format,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: [usize; 2], role: Role) -> TensorSpec {
        TensorSpec { name: format!("{name}.weight"), shape: shape.to_vec(), role }
    }

    /// Name and shape of a tensor that the source has as `dtype`.
    fn stored(quant: Quant, spec: &TensorSpec, dtype: Dtype) -> (String, Vec<usize>) {
        let storage = storage(quant, spec, dtype).expect("the recipe has an answer");
        (storage.name(spec), storage.shape(spec))
    }

    #[test]
    fn balanced_by_role() {
        for (spec, name, shape) in [
            (spec("up_proj", [3584, 1024], Role::Mlp), "up_proj.w4", [3584 / 16, 1024 / 64 * 576]),
            (spec("out_proj", [100, 70], Role::LinearOutput), "out_proj.w8", [7, 2 * 1088]),
            (spec("in_proj_a", [16, 1024], Role::LinearGate), "in_proj_a.weight", [16, 1024]),
            (spec("embed", [32, 64], Role::Embedding), "embed.w8_planes", [2, 1088]),
        ] {
            let found = stored(Quant::W4, &spec, Dtype::Bf16);
            assert_eq!(found, (name.to_owned(), shape.to_vec()));
        }
    }

    #[test]
    fn blocks_keep_their_numbers_or_stay() {
        let up = spec("up", [40, 512], Role::Mlp);
        let head = spec("head", [40, 512], Role::Head);
        for (spec, block, name, shape) in [
            (&up, BlockType::Q4_0, "up.w4", [3, 8 * 576]),
            (&up, BlockType::Q8_0, "up.w8", [3, 8 * 1088]),
            (&head, BlockType::Q8_0, "head.w8_planes", [3, 8 * 1088]),
            (&head, BlockType::Q6K, "head.w6_k", [3, 2 * 3392]),
            (&up, BlockType::Iq4Xs, "up.iq4_xs", [40, 2 * 136]),
        ] {
            let found = stored(Quant::Gguf, spec, Dtype::Blocks(block));
            assert_eq!(found, (name.to_owned(), shape.to_vec()));
        }
        let small = spec("norm", [1, 512], Role::Small);
        assert_eq!(storage(Quant::Gguf, &small, Dtype::F16).unwrap(), Storage::F32);
        let error = storage(Quant::W4, &up, Dtype::Blocks(BlockType::Q6K)).unwrap_err();
        assert!(error.to_string().contains("is quantised already (Q6_K)"), "{error}");
    }
}
