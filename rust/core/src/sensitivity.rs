//! What each matrix of a checkpoint would lose in each format.

use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::recipe::Storage;
use crate::model::tensors::TensorSpec;
use crate::quant::{Format, PANEL_ROWS, decode_row, encode_panel};
use crate::tensor::Tensor;
use crate::threads;
use rayon::prelude::*;
use std::collections::HashMap;

/// Panels of a matrix that are looked at, evenly spread.
const SAMPLES: usize = 32;

/// What a matrix loses in a format.
pub struct Loss {
    pub matrix: String,
    pub format: Format,
    /// Bytes in that format.
    pub bytes: usize,
    /// sum(i (w - d)^2) / sum(i w^2) over its weights w, what the format makes of them, d, and the
    /// importance i of their columns: the part of the power of the matrix's output that is noise, if
    /// i is the mean square of its inputs.
    pub error: f64,
}

/// The losses of all matrices that are floats in all formats that take them.
///
/// importance: by name of the matrix, 1 for those that are not there.
pub fn losses(
    source: &Checkpoint,
    formats: &[Format],
    importance: &HashMap<String, Vec<f32>>,
) -> Result<Vec<Loss>> {
    let mut jobs = Vec::new();
    for spec in source.matrices() {
        let Some(tensor) = source.tensor(&spec.name).filter(|t| t.dtype.is_float()) else {
            continue;
        };
        let cols = spec.shape[1];
        if importance.get(&spec.name).is_some_and(|importance| importance.len() != cols) {
            return Err(Error::Argument(format!(
                "importance of `{}`: expected {cols} numbers",
                spec.name
            )));
        }
        let formats = formats.iter().filter(|format| format.takes_cols(cols));
        jobs.extend(formats.map(|format| (spec, tensor, *format)));
    }
    let loss = |(spec, tensor, format): (&TensorSpec, &Tensor, Format)| {
        let importance = importance.get(&spec.name).map(Vec::as_slice);
        Loss {
            matrix: spec.name.clone(),
            format,
            bytes: Storage::Coded(format).shape(spec).iter().product(),
            error: error(spec, tensor, format, importance),
        }
    };
    let losses = threads::workers(None)?.install(|| jobs.into_par_iter().map(loss).collect());
    source.check_unchanged()?;
    Ok(losses)
}

fn error(spec: &TensorSpec, tensor: &Tensor, format: Format, importance: Option<&[f32]>) -> f64 {
    let (rows, cols) = spec.rows_cols();
    let panels = rows.div_ceil(PANEL_ROWS);
    let mut panel = vec![0; format.bytes(PANEL_ROWS, cols)];
    let (mut values, mut decoded) = (Vec::new(), vec![0.0; cols]);
    let (mut missed, mut size) = (0.0, 0.0);
    for sample in 0..panels.min(SAMPLES) {
        let first = sample * panels / panels.min(SAMPLES) * PANEL_ROWS;
        let end = (first + PANEL_ROWS).min(rows);
        values.resize((end - first) * cols, 0.0);
        tensor.widen_rows(cols, first, &mut values);
        encode_panel(format, &values, cols, importance, &mut panel);
        for (row, values) in values.chunks_exact(cols).enumerate() {
            decode_row(format, &panel, cols, row, &mut decoded);
            for (i, (w, d)) in values.iter().zip(&decoded).enumerate() {
                let weight = importance.map_or(1.0, |importance| f64::from(importance[i]));
                missed += weight * f64::from(w - d).powi(2);
                size += weight * f64::from(*w).powi(2);
            }
        }
    }
    if size > 0.0 { missed / size } else { 0.0 }
}
