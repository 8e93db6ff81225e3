//! Intermediate values of a forward pass, for tests and for looking inside.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Named matrices, filled row range by row range and column range by column range.
#[derive(Default)]
pub struct Trace {
    layer: Mutex<usize>,
    values: Mutex<BTreeMap<String, Recorded>>,
}

/// A matrix [rows, width].
#[derive(Default)]
pub struct Recorded {
    pub width: usize,
    pub data: Vec<f32>,
}

impl Trace {
    /// Values recorded from now on by [`Trace::layer_part`] belong to this layer.
    pub fn enter_layer(&self, layer: usize) {
        *self.layer.lock().unwrap_or_else(PoisonError::into_inner) = layer;
    }

    /// Records columns of a matrix of the current layer, as `layer.{i}.{name}`.
    ///
    /// rows: row number and columns of each row, the first at column `col`; width: of the matrix.
    pub fn layer_part<'a>(
        &self,
        name: &str,
        width: usize,
        col: usize,
        rows: impl Iterator<Item = (usize, &'a [f32])>,
    ) {
        let layer = *self.layer.lock().unwrap_or_else(PoisonError::into_inner);
        self.part(&format!("layer.{layer}.{name}"), width, col, rows);
    }

    /// Records columns of a matrix.
    pub fn part<'a>(
        &self,
        name: &str,
        width: usize,
        col: usize,
        rows: impl Iterator<Item = (usize, &'a [f32])>,
    ) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let value = values.entry(name.to_owned()).or_default();
        value.width = width;
        for (row, columns) in rows {
            let start = row * width + col;
            if value.data.len() < (row + 1) * width {
                value.data.resize((row + 1) * width, f32::NAN);
            }
            value.data[start..start + columns.len()].copy_from_slice(columns);
        }
    }

    /// What was recorded.
    pub fn into_values(self) -> BTreeMap<String, Recorded> {
        self.values.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
