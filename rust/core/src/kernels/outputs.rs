//! Where matrix products put their outputs.

use super::{load_some, store_some};
use crate::quant::PANEL_ROWS;
use crate::simd::{Isa, LANES};

/// Where the outputs of a product go: a row for each token, all of one width.
pub struct Outputs<'a> {
    pub(super) rows: [&'a mut [f32]; LANES],
    pub(super) tokens: usize,
    pub(super) width: usize,
    pub(super) add: bool,
}

impl<'a> Outputs<'a> {
    /// At most 16 rows; add: to what they hold, which is replaced otherwise.
    pub fn new(rows: impl Iterator<Item = &'a mut [f32]>, add: bool) -> Outputs<'a> {
        let mut y = Outputs { rows: Default::default(), tokens: 0, width: 0, add };
        for row in rows {
            assert!(y.tokens == 0 || row.len() == y.width);
            y.width = row.len();
            y.rows[y.tokens] = row;
            y.tokens += 1;
        }
        y
    }

    /// Rows that follow each other in `y`, to be replaced.
    pub fn of(y: &'a mut [f32], width: usize) -> Outputs<'a> {
        Outputs::new(y.chunks_exact_mut(width), false)
    }

    /// Panics unless a product of `tokens` tokens with `panels` panels, the last of which may be cut,
    /// fills this.
    pub(super) fn check(&self, tokens: usize, panels: usize) {
        assert_eq!((self.tokens, self.width.div_ceil(PANEL_ROWS)), (tokens, panels));
    }

    /// The outputs of a token from `first`, as many as the row has.
    #[inline(always)]
    pub(super) fn put<S: Isa>(&mut self, s: S, token: usize, first: usize, v: S::F) {
        let y = &mut self.rows[token][first..];
        let v = if self.add { s.add(load_some(s, y), v) } else { v };
        store_some(s, v, y);
    }
}
