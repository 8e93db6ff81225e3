//! Recipes: in which format a converted file holds each tensor.

use super::tensors::{Role, TensorSpec};
use crate::error::{Error, Result};
use crate::quant::reorder::panel_format;
use crate::quant::{BlockType, Format, PANEL_ROWS, Quant, panel_bytes};
use crate::tensor::Dtype;
use std::collections::HashMap;

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
    /// By the name of a format; "keep" is the checkpoint's own.
    pub fn named(name: &str) -> Option<Storage> {
        match name {
            "keep" => Some(Storage::AsIs),
            _ => Format::encoded().find(|format| format.name() == name).map(Storage::Coded),
        }
    }

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
///
/// chosen: formats by name of the matrix, before those of `quant`.
pub fn storage(
    quant: Quant,
    chosen: &HashMap<String, Storage>,
    spec: &TensorSpec,
    dtype: Dtype,
) -> Result<Storage> {
    let (rows, cols) = spec.rows_cols();
    let floats = |quant| match chosen.get(&spec.name) {
        Some(storage) => *storage,
        None => recipe(quant, spec.role, (rows, cols)),
    };
    let storage = match (quant, dtype) {
        (Quant::None, _) => Storage::AsIs,
        (Quant::Gguf, Dtype::Blocks(block)) => as_gguf(spec.role, block),
        (Quant::Gguf, _) if spec.role != Role::Small => Storage::AsIs,
        (_, Dtype::Blocks(block)) => match floats(quant) {
            Storage::AsIs => Storage::Coded(Format::Blocks(block)),
            _ => {
                return Err(Error::Unsupported(format!(
                    "tensor `{}` is quantised already ({}), converting it to {quant} would round it \
                     a second time; keep its own types (quant \"auto\") or use the original BF16 \
                     weights",
                    spec.name,
                    block.name()
                )));
            }
        },
        // Where FP8 is to be kept, its numbers are: scales have no place in a converted file.
        (_, Dtype::Fp8) if floats(quant) == Storage::AsIs => Storage::F32,
        (quant, _) => floats(quant),
    };
    match storage {
        Storage::Coded(format) if !format.takes_cols(cols) => Err(Error::Unsupported(format!(
            "tensor `{}`: rows of {cols} columns cannot be {}",
            spec.name,
            format.name()
        ))),
        storage => Ok(storage),
    }
}

/// The numbers of W8 without panels.
const FEW_ROWS: Format = Format::Blocks(BlockType::Q8_0);

/// How a recipe stores floats. Of several formats the first that takes rows of `cols` is meant.
///
/// By what a part adds to the KL divergence of a trained model for its bytes: out_proj comes first,
/// then embedding and head, the inputs of linear attention, attention, and the MLP last. Decay and
/// write strength are a thousandth of the weights. In W4 and W8 embedding and head are in two
/// planes, so that rows can be screened with one of them.
fn recipe(quant: Quant, role: Role, (rows, cols): (usize, usize)) -> Storage {
    use Format::{W4, W4K, W4Nl, W4NlR, W4R, W5K, W5Planes, W5R, W6K, W8, W8Planes};
    let attention = matches!(role, Role::Query | Role::AttentionOutput);
    let mlp = matches!(role, Role::MlpGate | Role::MlpUp | Role::MlpDown);
    let narrow = attention || mlp || role == Role::LinearInput;
    let vocabulary = matches!(role, Role::Embedding | Role::Head);
    let formats: &[Format] = match (quant, role) {
        (_, Role::Vision) => return Storage::AsIs,
        (_, Role::LinearGate) => &[W8],
        (_, Role::Small) => return Storage::F32,
        (Quant::Small, _) if narrow => &[W4NlR, W4Nl],
        (Quant::Small, _) if vocabulary => &[W5K, W4Nl],
        (Quant::Small, _) => &[W5R, W4Nl],
        (Quant::Balanced | Quant::Custom, role) => match role {
            Role::MlpDown | Role::LinearInput | Role::KeyValue => &[W5R, W8],
            Role::LinearOutput | Role::MtpInput => &[W6K, W8],
            _ if vocabulary => &[W5K, W8Planes],
            _ => &[W4NlR, W4Nl],
        },
        (Quant::Fine, role) => match role {
            Role::MlpUp | Role::Query => &[W4K, W8],
            Role::LinearOutput | Role::MtpInput => &[W6K, W8],
            _ if vocabulary => &[W6K, W8Planes],
            _ => &[W5K, W8],
        },
        (Quant::Best, _) if narrow => &[W6K, W8],
        (Quant::Best, _) if vocabulary => &[W6K, W8Planes],
        (Quant::W4, _) if narrow => &[W4R, W4],
        (Quant::W4, Role::KeyValue) => &[W5R, W8],
        (Quant::W4, Role::LinearOutput | Role::MtpInput) => &[W6K, W8],
        (Quant::W4, _) => &[W5Planes],
        _ if vocabulary => &[W8Planes],
        _ => &[W8],
    };
    let format = formats.iter().find(|format| format.takes_cols(cols)).unwrap_or(&W8);
    // Most of a panel with few rows would be padding.
    let few = *format == W8 && 2 * rows <= PANEL_ROWS && FEW_ROWS.takes_cols(cols);
    Storage::Coded(if few { FEW_ROWS } else { *format })
}

/// The numbers of a GGUF file's blocks, in panels.
fn as_gguf(role: Role, block: BlockType) -> Storage {
    Storage::Coded(match (panel_format(block), role) {
        (Format::W8, Role::Embedding | Role::Head) => Format::W8Planes,
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
        let storage = storage(quant, &HashMap::new(), spec, dtype).expect("the recipe's answer");
        (storage.name(spec), storage.shape(spec))
    }

    #[test]
    fn formats_by_role() {
        for (spec, name, shape) in [
            (spec("up_proj", [3584, 1024], Role::MlpUp), "up_proj.w4_r", [224, 64 + 8 * 1088]),
            (spec("up_proj", [3584, 192], Role::MlpUp), "up_proj.w4", [224, 3 * 576]),
            (spec("k_proj", [64, 256], Role::KeyValue), "k_proj.w5_r", [4, 64 + 2 * 1344]),
            (spec("out_proj", [100, 70], Role::LinearOutput), "out_proj.w8", [7, 2 * 1088]),
            (spec("in_proj_a", [16, 1024], Role::LinearGate), "in_proj_a.w8", [1, 16 * 1088]),
            (spec("in_proj_a", [8, 1024], Role::LinearGate), "in_proj_a.q8_0", [8, 32 * 34]),
            (spec("embed", [32, 64], Role::Embedding), "embed.w5_planes", [2, 704]),
        ] {
            let found = stored(Quant::W4, &spec, Dtype::Bf16);
            assert_eq!(found, (name.to_owned(), shape.to_vec()));
        }
    }

    #[test]
    fn rows_that_a_format_does_not_take_get_another() {
        for (quant, cols, format) in [
            (Quant::Balanced, 128, "w4_nl_r"),
            (Quant::Balanced, 64, "w4_nl"),
            (Quant::Fine, 256, "w4_k"),
            (Quant::Fine, 128, "w8"),
            (Quant::Best, 512, "w6_k"),
            (Quant::Best, 70, "w8"),
            (Quant::Small, 70, "w4_nl"),
        ] {
            let spec = spec("up", [16, cols], Role::MlpUp);
            assert_eq!(stored(quant, &spec, Dtype::Bf16).0, format!("up.{format}"));
        }
    }

    #[test]
    fn fp8_is_rounded_as_floats_are_and_never_kept() {
        let up = spec("up", [256, 256], Role::MlpUp);
        assert_eq!(stored(Quant::Balanced, &up, Dtype::Fp8).0, "up.w4_nl_r");
        let kept = HashMap::from([("up.weight".to_owned(), Storage::AsIs)]);
        assert_eq!(storage(Quant::W8, &kept, &up, Dtype::Fp8).unwrap(), Storage::F32);
        assert_eq!(storage(Quant::None, &HashMap::new(), &up, Dtype::Fp8).unwrap(), Storage::AsIs);
    }

    #[test]
    fn blocks_keep_their_numbers() {
        let up = spec("up", [40, 512], Role::MlpUp);
        let head = spec("head", [40, 512], Role::Head);
        for (spec, block, name, shape) in [
            (&up, BlockType::Q4_0, "up.w4", [3, 8 * 576]),
            (&up, BlockType::Q8_0, "up.w8", [3, 8 * 1088]),
            (&head, BlockType::Q8_0, "head.w8_planes", [3, 8 * 1088]),
            (&head, BlockType::Q6K, "head.w6_k", [3, 2 * 3392]),
            (&up, BlockType::Iq4Xs, "up.w4_nl_k", [3, 2 * 2240]),
            (&up, BlockType::Q3K, "up.w6_k", [3, 2 * 3392]),
            (&up, BlockType::Q4_1, "up.w4_affine", [3, 16 * 320]),
            (&up, BlockType::Mxfp4, "up.w4_mx", [3, 8 * 576]),
            (&head, BlockType::Q5_1, "head.w5_affine", [3, 16 * 384]),
            (&up, BlockType::Q2K, "up.w2_k", [3, 2 * 1344]),
        ] {
            let found = stored(Quant::Gguf, spec, Dtype::Blocks(block));
            assert_eq!(found, (name.to_owned(), shape.to_vec()));
        }
        let small = spec("norm", [1, 512], Role::Small);
        let none = HashMap::new();
        assert_eq!(storage(Quant::Gguf, &none, &small, Dtype::F16).unwrap(), Storage::F32);
        let error = storage(Quant::W4, &none, &up, Dtype::Blocks(BlockType::Q6K)).unwrap_err();
        assert!(error.to_string().contains("is quantised already (Q6_K)"), "{error}");
    }
}
