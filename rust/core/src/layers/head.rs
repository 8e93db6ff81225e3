//! The lm_head on one token: the best tokens of the vocabulary without all of its logits.
//!
//! The high plane of a matrix in two planes gives estimates of all logits, with the standard
//! deviation sigma of each error (see [`crate::kernels::planes`]). The k best estimates are scored
//! with both planes; the k-th best logit is at least the least of these. Every other row whose
//! estimate is less than 6 sigma below that is scored too, and the best are taken among all that
//! were: a row is missed only where its own error is above 6 sigma. Scored rows have the bits of
//! the whole product.

use super::Context;
use super::linear::{Input, Matrix, chunk_cols};
use crate::error::{Error, Result};
use crate::kernels::outputs::Outputs;
use crate::kernels::{planes, select};
use crate::quant::PANEL_ROWS;
use crate::quant::two_planes::Planes;
use std::str::FromStr;

/// How the best tokens are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Head {
    /// From all logits.
    #[default]
    Full,
    /// By screening, where few are asked for and the matrix is in two planes.
    Screened,
}

impl FromStr for Head {
    type Err = Error;
    fn from_str(name: &str) -> Result<Head> {
        match name {
            "full" => Ok(Head::Full),
            "screened" => Ok(Head::Screened),
            _ => Err(Error::Argument(format!("head is `{name}`, expected one of: full, screened"))),
        }
    }
}

impl Head {
    pub fn name(self) -> &'static str {
        match self {
            Head::Full => "full",
            Head::Screened => "screened",
        }
    }
}

/// Standard deviations by which a row may lie below and still be scored.
const SIGMAS: f32 = 6.0;
/// The variance of a row whose value is exact.
const EXACT: f32 = -1.0;
/// Panels that a chunk of a region scores.
const CHUNK_PANELS: usize = 4;

/// What screening found.
pub struct Screened {
    /// The best tokens, largest first, ties by smaller index.
    pub ids: Vec<i32>,
    pub values: Vec<f32>,
    /// Rows that were scored with both planes.
    pub scored: usize,
}

/// The `k` largest outputs among the first `limit` rows, when those of `changed` have the values
/// given there (the last one, of a row that is there twice).
///
/// w: in two planes; x: one token, prepared for `w`; work: a buffer. None if so many rows would
/// have to be scored that the whole product costs less.
pub fn screen(
    ctx: Context<'_>,
    w: &Matrix,
    x: &Input,
    (k, limit): (usize, usize),
    changed: &[(usize, f32)],
    work: &mut Vec<f32>,
) -> Option<Screened> {
    estimate(ctx, w, x, work);
    let (values, variances) = work.split_at_mut(w.rows);
    for &(row, value) in changed {
        (values[row], variances[row]) = (value, EXACT);
    }
    let (values, variances) = (&mut values[..limit], &mut variances[..limit]);
    let (best, _) = select::largest(ctx.cpu, values, k);
    let mut best: Vec<usize> = best.into_iter().map(|row| row as usize).collect();
    best.sort_unstable();
    let mut scored = score_in_place(ctx, w, x, &best, values, variances)?;
    // As in `select`, NaN counts as smallest.
    let least = |least: f32, row: &usize| match values[*row] {
        value if value.is_nan() => f32::NEG_INFINITY,
        value => least.min(value),
    };
    let threshold = best.iter().fold(f32::INFINITY, least);
    let mut reached: Vec<usize> = Vec::new();
    for (row, (value, variance)) in values.iter().zip(&*variances).enumerate() {
        let gap = threshold - value;
        // An estimate that is NaN may stand for any value.
        let below = gap > 0.0 && gap * gap > SIGMAS * SIGMAS * variance.max(0.0);
        if !below {
            reached.push(row);
        }
    }
    scored += score_in_place(ctx, w, x, &reached, values, variances)?;
    let found: Vec<f32> = reached.iter().map(|row| values[*row]).collect();
    let (places, values) = select::largest(ctx.cpu, &found, k);
    let ids = places.into_iter().map(|place| reached[place as usize] as i32).collect();
    Some(Screened { ids, values, scored })
}

/// The outputs of some rows of any matrix. x: one token, prepared for `w`; rows: ascending.
pub fn score(ctx: Context<'_>, w: &Matrix, x: &Input, rows: &[usize]) -> Vec<f32> {
    let panels = panels_of(rows);
    let mut y = vec![0.0; panels.len() * PANEL_ROWS];
    if panels.is_empty() {
        return y;
    }
    ctx.run_tiles(
        &mut y,
        PANEL_ROWS,
        (CHUNK_PANELS, PANEL_ROWS),
        |_| Vec::new(),
        |buffer, mut y| {
            for i in y.rows() {
                let first = panels[i] * PANEL_ROWS;
                let rows = first..(first + PANEL_ROWS).min(w.rows);
                let y = &mut y.row(i)[..rows.len()];
                let y = Outputs::of(y, rows.len());
                x.product(ctx, &w.weights(rows, buffer), 0..1, y);
            }
        },
    );
    let mut place = 0;
    rows.iter()
        .map(|row| {
            while panels[place] != row / PANEL_ROWS {
                place += 1;
            }
            y[place * PANEL_ROWS + row % PANEL_ROWS]
        })
        .collect()
}

fn panels_of(rows: &[usize]) -> Vec<usize> {
    let mut panels: Vec<usize> = rows.iter().map(|row| row / PANEL_ROWS).collect();
    panels.dedup();
    panels
}

/// Scores those of `rows` that are not exact yet, and returns how many these were; None if they
/// lie in more than half of the panels.
fn score_in_place(
    ctx: Context<'_>,
    w: &Matrix,
    x: &Input,
    rows: &[usize],
    values: &mut [f32],
    variances: &mut [f32],
) -> Option<usize> {
    let open: Vec<usize> = rows.iter().copied().filter(|row| variances[*row] != EXACT).collect();
    if panels_of(&open).len() > w.rows.div_ceil(PANEL_ROWS) / 2 {
        return None;
    }
    for (row, value) in open.iter().zip(score(ctx, w, x, &open)) {
        (values[*row], variances[*row]) = (value, EXACT);
    }
    Some(open.len())
}

/// Estimates of all outputs, then the variances of their errors. out: becomes [2, w.rows].
fn estimate(ctx: Context<'_>, w: &Matrix, x: &Input, out: &mut Vec<f32>) {
    assert_eq!(x.tokens(), 1);
    out.resize(2 * w.rows, 0.0);
    let matrix = Planes::new(w.format, &w.bytes);
    ctx.run_tiles(
        out,
        w.rows,
        (2, chunk_cols(ctx, &[w])),
        |_| (Vec::new(), Vec::new()),
        |(estimates, variances), mut out| {
            let (rows, n) = (out.cols(), out.cols().len());
            let panels = rows.start / PANEL_ROWS..rows.end.div_ceil(PANEL_ROWS);
            estimates.resize(panels.len() * PANEL_ROWS, 0.0);
            variances.resize(panels.len() * PANEL_ROWS, 0.0);
            let panels = matrix.panels(panels, w.cols);
            let found = (&mut estimates[..], &mut variances[..]);
            planes::screen(ctx.cpu, panels, w.cols, x.first_tile(), ctx.reading.ask, found);
            out.row(0).copy_from_slice(&estimates[..n]);
            out.row(1).copy_from_slice(&variances[..n]);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::random;
    use crate::layers::linear::project;
    use crate::pool::Pool;
    use crate::quant::two_planes::HIGH_BYTES;
    use crate::quant::w4::SCALE_BYTES;
    use crate::quant::{Format, encode_panel, panel_bytes, planes};
    use crate::simd::Cpu;
    use crate::tensor::{AlignedBuf, Bytes};
    use half::f16;

    fn matrix(format: Format, rows: usize, cols: usize) -> Matrix {
        let w = random(rows * cols, 30);
        let mut bytes = AlignedBuf::new(format.bytes(rows, cols));
        let mut panel = vec![0; panel_bytes(format, cols)];
        let mut rest = &mut bytes[..];
        for plane in planes(format, cols) {
            for w in w.chunks(PANEL_ROWS * cols) {
                encode_panel(format, w, cols, None, &mut panel);
                let (out, after) = rest.split_at_mut(plane.len());
                out.copy_from_slice(&panel[plane.clone()]);
                rest = after;
            }
        }
        Matrix { format, rows, cols, bytes: Bytes::from(bytes), scales: None }
    }

    fn input(ctx: Context<'_>, w: &Matrix, seed: u64) -> Input {
        let mut x = Input::default();
        x.reshape(1, w.cols);
        x.rows.copy_from_slice(&random(w.cols, seed));
        x.prepare(ctx, &[w]);
        x
    }

    /// Screens, and holds the result against all logits. Returns the rows that were scored.
    fn check(
        ctx: Context<'_>,
        w: &Matrix,
        x: &Input,
        (k, limit): (usize, usize),
        changed: &[(usize, f32)],
    ) -> Option<usize> {
        let mut row = vec![0.0; w.rows];
        project(ctx, &[w], x, false, &mut row);
        for (i, value) in changed {
            row[*i] = *value;
        }
        let (ids, values) = select::largest(ctx.cpu, &row[..limit], k);
        let found = screen(ctx, w, x, (k, limit), changed, &mut Vec::new())?;
        assert_eq!((found.ids, found.values), (ids, values), "{:?} {k} {limit}", ctx.cpu);
        Some(found.scored)
    }

    #[test]
    fn screening_finds_the_best_of_all() {
        let shapes = [(4000, 256), (4001, 100), (6000, 1024)];
        let matrices: Vec<_> = [Format::W8Planes, Format::W5Planes]
            .into_iter()
            .flat_map(|format| shapes.map(|(rows, cols)| matrix(format, rows, cols)))
            .collect();
        for cpu in Cpu::all() {
            for threads in [1, 2, 3] {
                let pool = Pool::new(threads);
                let team = pool.team();
                let ctx = Context::new(cpu, &team);
                for w in &matrices {
                    for seed in 31..35 {
                        let x = input(ctx, w, seed);
                        for k in [1, 5, 20] {
                            for limit in [w.rows, w.rows - 500] {
                                let scored = check(ctx, w, &x, (k, limit), &[]);
                                assert!(scored.is_some_and(|n| n < w.rows / 10), "{scored:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn changed_rows_count_with_their_values() {
        let w = matrix(Format::W5Planes, 4000, 256);
        let pool = Pool::new(2);
        let team = pool.team();
        let ctx = Context::new(Cpu::best(), &team);
        let x = input(ctx, &w, 40);
        let best = screen(ctx, &w, &x, (10, w.rows), &[], &mut Vec::new()).expect("few rows");
        let row = |i: usize| best.ids[i] as usize;
        let changed = [
            (row(0), f32::NEG_INFINITY),
            (row(1), best.values[1] - 0.5),
            (row(2), 0.0),
            (row(2), best.values[2] + 1.0), // given twice: the last one counts
            (3, 100.0),
            (3999, f32::NAN),
            (1000, best.values[5]),
        ];
        for limit in [w.rows, 3000] {
            assert!(check(ctx, &w, &x, (10, limit), &changed).is_some());
        }
        // The best of all banned, one after the other.
        let banned: Vec<_> = best.ids.iter().map(|id| (*id as usize, f32::NEG_INFINITY)).collect();
        assert!(check(ctx, &w, &x, (10, w.rows), &banned).is_some());
    }

    #[test]
    fn nothing_to_gain() {
        let w = matrix(Format::W8Planes, 100, 64);
        let pool = Pool::new(1);
        let team = pool.team();
        let ctx = Context::new(Cpu::best(), &team);
        let x = input(ctx, &w, 41);
        for (k, limit) in [(0, 100), (1, 0), (0, 0)] {
            let found = screen(ctx, &w, &x, (k, limit), &[], &mut Vec::new()).expect("no row");
            assert!(found.ids.is_empty() && found.scored == 0);
        }
        assert!(screen(ctx, &w, &x, (100, 100), &[], &mut Vec::new()).is_none());
        // Estimates that are no numbers rule out no row.
        let mut bytes = AlignedBuf::new(w.bytes.len());
        bytes.copy_from_slice(&w.bytes);
        for block in Format::W8Planes.split(&mut bytes)[0].as_chunks_mut::<HIGH_BYTES>().0 {
            block[..SCALE_BYTES].as_chunks_mut().0.fill(f16::NAN.to_le_bytes());
        }
        let w = Matrix { bytes: Bytes::from(bytes), ..w };
        assert!(screen(ctx, &w, &x, (3, 100), &[], &mut Vec::new()).is_none());
    }

    #[test]
    fn scored_rows_have_the_bits_of_the_whole_product() {
        for cpu in Cpu::all() {
            let pool = Pool::new(2);
            let team = pool.team();
            let ctx = Context::new(cpu, &team);
            for format in [Format::W8Planes, Format::W5Planes] {
                let w = matrix(format, 1003, 200);
                let x = input(ctx, &w, 42);
                let mut all = vec![0.0; w.rows];
                project(ctx, &[&w], &x, false, &mut all);
                let some = vec![15, 16, 17, 500, 1000, 1002];
                for rows in [vec![], vec![0], some, (0..1003).collect()] {
                    let want: Vec<f32> = rows.iter().map(|row| all[*row]).collect();
                    assert_eq!(score(ctx, &w, &x, &rows), want, "{cpu:?} {format:?}");
                }
            }
        }
    }
}
