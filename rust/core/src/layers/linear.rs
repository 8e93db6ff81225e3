//! Matrices and their products with rows of activations, over threads.

use super::Context;
use crate::kernels::outputs::Outputs;
use crate::kernels::quantize::QuantTile;
use crate::kernels::unpacked::{self, Unpacked};
use crate::kernels::{ABREAST, Ask, FEW_TOKENS, Reading, activation, matmul, norm, planes};
use crate::profile::Part;
use crate::quant::reorder::{panel_format, reorder_panel};
use crate::quant::two_planes::Planes;
use crate::quant::{Format, PANEL_ROWS, decode_row, panel_bytes};
use crate::simd::TILE_TOKENS;
use crate::tensor::{Bytes, Tensor, resize, widen_rows};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Weights [rows, cols] in some format.
#[derive(Clone)]
pub struct Matrix {
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    pub bytes: Bytes,
    /// Of FP8, see [`Tensor::scales`].
    pub scales: Option<Arc<Tensor>>,
}

impl Matrix {
    /// Columns of output that the matrix takes in a joint buffer: its rows, to a whole panel.
    pub fn width(&self) -> usize {
        self.rows.next_multiple_of(PANEL_ROWS)
    }

    /// One row as f32. out: [cols].
    pub fn row(&self, row: usize, out: &mut [f32]) {
        if self.format.is_packed() {
            decode_row(self.format, &self.bytes, self.cols, row, out);
            return;
        }
        widen_rows(self.format, &self.bytes, self.scales.as_deref(), self.cols, row, out);
    }
}

/// Some rows of a matrix in the form that a kernel reads.
pub(super) enum Weights<'a> {
    Rows { format: Format, bytes: &'a [u8] },
    Panels { format: Format, bytes: &'a [u8] },
    Planes(Planes<'a>),
    Unpacked(&'a Unpacked),
}

/// Work space of each thread of a session for weights that many tokens read: two matrices, as gate and up
/// are read together.
pub type Unpacking = Arc<[Mutex<[Unpacked; 2]>]>;

/// Bytes on the heap of one thread's, for matrices of up to `cols` columns.
pub fn unpacking_bytes(cols: usize) -> usize {
    2 * Unpacked::bytes_of(cols)
}

impl Matrix {
    /// Some rows, from a multiple of 16. Panels are whole. Blocks of a GGUF file become panels in
    /// `buffer`, so that their products have the bits of a matrix that was re-ordered before; FP8
    /// becomes f32 there, so that they have those of a matrix of its numbers.
    pub(super) fn weights<'a>(
        &'a self,
        rows: Range<usize>,
        buffer: &'a mut Vec<u8>,
    ) -> Weights<'a> {
        let panels = rows.start / PANEL_ROWS..rows.end.div_ceil(PANEL_ROWS);
        match self.format {
            format if format.is_in_planes() => {
                Weights::Planes(Planes::new(format, &self.bytes).panels(panels, self.cols))
            }
            Format::Blocks(block) => {
                let row_bytes = block.row_bytes(self.cols);
                let format = panel_format(block);
                let bytes = panel_bytes(format, self.cols);
                buffer.resize(panels.len() * bytes, 0);
                for (panel, out) in panels.zip(buffer.chunks_exact_mut(bytes)) {
                    let first = panel * PANEL_ROWS;
                    let end = (first + PANEL_ROWS).min(self.rows);
                    let rows = &self.bytes[first * row_bytes..end * row_bytes];
                    reorder_panel(block, rows, self.cols, out);
                }
                Weights::Panels { format, bytes: buffer }
            }
            Format::Fp8 => {
                let mut values = vec![0.0; self.cols];
                buffer.clear();
                for row in rows {
                    self.row(row, &mut values);
                    buffer.extend(values.iter().flat_map(|x| x.to_le_bytes()));
                }
                Weights::Rows { format: Format::F32, bytes: buffer }
            }
            format if format.is_packed() => {
                let bytes = panel_bytes(format, self.cols);
                let bytes = &self.bytes[panels.start * bytes..panels.end * bytes];
                Weights::Panels { format, bytes }
            }
            format => {
                let bytes = format.bytes(1, self.cols);
                let bytes = &self.bytes[rows.start * bytes..rows.end * bytes];
                Weights::Rows { format, bytes }
            }
        }
    }

    /// Cuts rows into what products with so many tokens take at once.
    fn spans(&self, rows: Range<usize>, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let step = match self.is_unpacked_for(tokens) {
            true => unpacked::panels_at_once(self.cols) * PANEL_ROWS,
            false => rows.len(),
        };
        let end = rows.end;
        rows.step_by(step.max(1)).map(move |start| start..(start + step).min(end))
    }

    /// Whether products with so many tokens unpack the panels.
    fn is_unpacked_for(&self, tokens: usize) -> bool {
        let format = match self.format {
            Format::Blocks(block) => panel_format(block),
            format => format,
        };
        tokens > FEW_TOKENS && format.is_packed() && unpacked::layout(format).is_some()
    }

    /// As [`Matrix::weights`], in the form that is best for so many tokens. work: none if they are few.
    fn weights_for<'a>(
        &'a self,
        ctx: Context<'_>,
        tokens: usize,
        rows: Range<usize>,
        bytes: &'a mut Vec<u8>,
        work: Option<&'a mut Unpacked>,
    ) -> Weights<'a> {
        let weights = self.weights(rows, bytes);
        if !self.is_unpacked_for(tokens) {
            return weights;
        }
        let unpacked = work.expect("contexts of many tokens have work space");
        let ask = match ctx.reading.ask {
            Ask::No | Ask::Once => Ask::ToL1,
            ask => ask,
        };
        match weights {
            Weights::Panels { format, bytes } => {
                unpacked.set(ctx.cpu, format, bytes, self.cols, ask);
            }
            Weights::Planes(planes) => unpacked.set_planes(ctx.cpu, planes, self.cols, ask),
            _ => unreachable!("what is unpacked is in panels"),
        }
        Weights::Unpacked(unpacked)
    }
}

/// Rows of activations in the forms that matrix formats read.
#[derive(Default)]
pub struct Input {
    tokens: usize,
    cols: usize,
    pub rows: Vec<f32>, // [tokens, cols]
    tiles: Vec<QuantTile>,
}

impl Input {
    /// Takes the shape [tokens, cols]; the rows are whatever they were.
    pub fn reshape(&mut self, tokens: usize, cols: usize) {
        (self.tokens, self.cols) = (tokens, cols);
        resize(&mut self.rows, tokens * cols);
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes on the heap for rows of `cols` columns.
    pub fn bytes_of(tokens: usize, cols: usize, quantised: bool) -> usize {
        let codes = if quantised { QuantTile::bytes_of(tokens, cols) } else { 0 };
        4 * tokens * cols + codes
    }

    /// Becomes the RMS norm of x: [tokens, w.len()].
    pub fn set_normed(&mut self, ctx: Context<'_>, x: &[f32], w: &[f32], eps: f32) {
        self.reshape(x.len() / w.len(), w.len());
        if self.tokens <= FEW_TOKENS {
            ctx.alone(|| norm::rms_norm(ctx.cpu, x, w, eps, &mut self.rows));
        } else {
            ctx.run_tiles(
                &mut self.rows,
                w.len(),
                (1, w.len()),
                |_| (),
                |(), mut y| {
                    let row = y.rows().start;
                    norm::rms_norm(ctx.cpu, &x[row * w.len()..][..w.len()], w, eps, y.row(row));
                },
            );
        }
    }

    /// Quantises the rows, if one of the matrices that will read them wants it.
    pub fn prepare(&mut self, ctx: Context<'_>, matrices: &[&Matrix]) {
        debug_assert!(matrices.iter().all(|m| m.cols == self.cols));
        if !matrices.iter().any(|m| m.format.is_quantised()) {
            return;
        }
        let (cols, tile) = (self.cols, TILE_TOKENS);
        let n = self.tokens.div_ceil(tile);
        if self.tiles.len() < n {
            self.tiles.resize_with(n, QuantTile::default);
        }
        let rows = &self.rows;
        let quantize = |i: usize, out: &mut QuantTile| {
            let end = ((i + 1) * tile * cols).min(rows.len());
            out.quantize(ctx.cpu, &rows[i * tile * cols..end], cols);
        };
        if self.tokens <= FEW_TOKENS {
            ctx.alone(|| {
                self.tiles[..n].iter_mut().enumerate().for_each(|(i, tile)| quantize(i, tile));
            });
        } else {
            ctx.run_each(&mut self.tiles[..n], |_| (), |(), i, tile| quantize(i, tile));
        }
    }

    /// The first tokens, quantised.
    pub(super) fn first_tile(&self) -> &QuantTile {
        &self.tiles[0]
    }

    /// Products of some rows of a matrix with the tokens of one tile. y: [tokens of the tile, rows].
    pub(super) fn product(
        &self,
        ctx: Context<'_>,
        weights: &Weights<'_>,
        tokens: Range<usize>,
        y: Outputs<'_>,
    ) {
        let cols = self.cols;
        let tile = || &self.tiles[tokens.start / TILE_TOKENS];
        // The tiles take a chunk of weights in turn, and all but the first find it in a cache.
        let ask = match ctx.reading.ask {
            Ask::No if tokens.len() >= FEW_TOKENS => Ask::ToL1,
            Ask::Once if tokens.len() < self.tokens => Ask::ToL1,
            ask => ask,
        };
        let first = Reading { ask, ..ctx.reading };
        let reading = if tokens.start == 0 { first } else { Reading::PLAIN };
        match *weights {
            Weights::Unpacked(panels) => unpacked::product(ctx.cpu, panels, tile(), y),
            Weights::Planes(panels) => planes::product(ctx.cpu, panels, cols, tile(), reading, y),
            Weights::Panels { format, bytes } => {
                matmul::packed(ctx.cpu, format, bytes, cols, tile(), reading, y);
            }
            Weights::Rows { format, bytes } => {
                let x = &self.rows[tokens.start * cols..tokens.end * cols];
                matmul::float(ctx.cpu, format, bytes, cols, x, y);
            }
        }
    }
}

/// Output columns that one chunk of a region computes: enough weights to be worth claiming, few
/// enough that the threads end together.
pub(super) fn chunk_cols(ctx: Context<'_>, matrices: &[&Matrix]) -> usize {
    const LEAST_BYTES: usize = 32 << 10;
    const MOST_BYTES: usize = 256 << 10;
    const CHUNKS_PER_THREAD: usize = 16;
    let total: usize = matrices.iter().map(|m| m.bytes.len()).sum();
    let panels: usize = matrices.iter().map(|m| m.width() / PANEL_ROWS).sum();
    let panel = (total / panels).max(1);
    let bytes = (total / (CHUNKS_PER_THREAD * ctx.team.threads())).clamp(LEAST_BYTES, MOST_BYTES);
    // Few tokens read so many panels side by side; many find their activations in a cache for all but the
    // first panel of a chunk.
    (bytes / panel).max(1).next_multiple_of(ABREAST) * PANEL_ROWS
}

/// y = W x, or y += W x if `add`, for matrices side by side.
///
/// y: [x.tokens(), width], where width is the sum of the matrices' [`Matrix::width`], or of a
/// single matrix its number of rows. Columns of padding are left as they are.
pub fn project(ctx: Context<'_>, matrices: &[&Matrix], x: &Input, add: bool, y: &mut [f32]) {
    let width = match matrices {
        [matrix] => matrix.rows,
        _ => matrices.iter().map(|m| m.width()).sum(),
    };
    let tokens = x.tokens();
    assert_eq!(y.len(), tokens * width);
    let cols = chunk_cols(ctx, matrices);
    ctx.run_tiles(
        y,
        width,
        (tokens, cols),
        |thread| (Vec::new(), ctx.unpacking_of(thread)),
        |(bytes, work), mut y| {
            let mut first = 0;
            for matrix in matrices {
                // None if the matrix lies elsewhere.
                let end = y.cols().end.clamp(first, first + matrix.rows) - first;
                let rows = y.cols().start.saturating_sub(first)..end;
                for rows in matrix.spans(rows, tokens) {
                    let work = work.as_mut().map(|work| &mut work[0]);
                    let weights = matrix.weights_for(ctx, tokens, rows.clone(), bytes, work);
                    let place = first + rows.start - y.cols().start;
                    let part = place..place + rows.len();
                    for t in (0..tokens).step_by(TILE_TOKENS) {
                        let tile = t..(t + TILE_TOKENS).min(tokens);
                        let rows = y.some_rows(tile.clone()).map(|row| &mut row[part.clone()]);
                        x.product(ctx, &weights, tile, Outputs::new(rows, add));
                    }
                }
                first += matrix.width();
            }
        },
    );
}

/// Products of `x` with the matrices, two or more, that begin a mixer, recorded by their names.
///
/// y: becomes [x.tokens(), width], which is returned; see [`project`].
pub fn project_named<const N: usize>(
    ctx: Context<'_>,
    matrices: [(&str, &Matrix); N],
    x: &mut Input,
    y: &mut Vec<f32>,
) -> usize {
    let alone = matrices.map(|(_, matrix)| matrix);
    x.prepare(ctx.under(Part::Norms), &alone);
    let width = alone.iter().map(|m| m.width()).sum();
    resize(y, x.tokens() * width);
    project(ctx.under(Part::Matrices), &alone, x, false, y);
    if let Some(trace) = ctx.trace {
        let mut first = 0;
        for (name, matrix) in matrices {
            let rows = y.chunks_exact(width).map(|row| &row[first..first + matrix.rows]);
            trace.layer_part(name, matrix.rows, 0, rows.enumerate());
            first += matrix.width();
        }
    }
    width
}

/// y = silu(gate x) (up x), rows of both matrices together. y: [x.tokens(), gate.rows].
pub fn project_swiglu(ctx: Context<'_>, gate: &Matrix, up: &Matrix, x: &Input, y: &mut [f32]) {
    let tokens = x.tokens();
    assert_eq!(gate.rows, up.rows);
    assert_eq!(y.len(), tokens * gate.rows);
    // A chunk reads both matrices, so half the columns hold the same bytes.
    let cols = (chunk_cols(ctx, &[gate, up]) / 2).next_multiple_of(ABREAST * PANEL_ROWS);
    let init = |thread| ([Vec::new(), Vec::new()], ctx.unpacking_of(thread), Vec::new());
    ctx.run_tiles(y, gate.rows, (tokens, cols), init, |(bytes, work, gates), mut y| {
        let [gate_bytes, up_bytes] = bytes;
        // Both have as many columns, so either's spans do, if it is unpacked at all.
        let spanned = if gate.is_unpacked_for(tokens) { gate } else { up };
        for rows in spanned.spans(y.cols(), tokens) {
            let width = rows.len();
            let part = rows.start - y.cols().start..rows.end - y.cols().start;
            gates.resize(TILE_TOKENS * width, 0.0);
            let (gate_work, up_work) = match work.as_mut() {
                Some(work) => {
                    let [gate, up] = &mut **work;
                    (Some(gate), Some(up))
                }
                None => (None, None),
            };
            let gate = gate.weights_for(ctx, tokens, rows.clone(), gate_bytes, gate_work);
            let up = up.weights_for(ctx, tokens, rows, up_bytes, up_work);
            for t in (0..tokens).step_by(TILE_TOKENS) {
                let tile = t..(t + TILE_TOKENS).min(tokens);
                let gates = &mut gates[..tile.len() * width];
                x.product(ctx, &gate, tile.clone(), Outputs::of(gates, width));
                let out = y.some_rows(tile.clone()).map(|row| &mut row[part.clone()]);
                x.product(ctx, &up, tile.clone(), Outputs::new(out, false));
                for (gates, y) in gates.chunks_exact(width).zip(y.some_rows(tile)) {
                    activation::swiglu(ctx.cpu, gates, &mut y[part.clone()]);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Made, Panels, random, random_blocks};
    use crate::layers::per_thread;
    use crate::pool::Pool;
    use crate::quant::BlockType;
    use crate::simd::Cpu;

    #[test]
    fn blocks_are_multiplied_as_their_panels_are() {
        let rows = 41;
        for block in BlockType::ALL {
            let cols = 3 * block.cols();
            let blocks = random_blocks(block, 3 * rows, 3);
            let matrix = |format, bytes: Vec<u8>| Matrix {
                format,
                rows,
                cols,
                bytes: bytes.into(),
                scales: None,
            };
            let in_place = matrix(Format::Blocks(block), blocks);
            let Panels { format, bytes, .. } =
                Made::Reordered(block).matrix(Cpu::best(), rows, cols, 3);
            let in_panels = matrix(format, bytes);
            let [mut first, mut second] = [Vec::new(), Vec::new()];
            for range in [0..rows, 16..32, 32..rows] {
                let [first, second] =
                    [(&in_place, &mut first), (&in_panels, &mut second)].map(|(matrix, buffer)| {
                        match matrix.weights(range.clone(), buffer) {
                            Weights::Panels { format, bytes } => (format, bytes),
                            _ => panic!("{block:?}: no panels"),
                        }
                    });
                assert!(first == second, "{block:?} {range:?}");
            }
            let [mut first, mut second] = [(); 2].map(|()| vec![f32::NAN; cols]);
            for row in 0..rows {
                in_place.row(row, &mut first);
                in_panels.row(row, &mut second);
                assert_eq!(first, second, "{block:?} row {row}");
            }
        }
    }

    fn made(format: Format, rows: usize, cols: usize, seed: u64) -> Matrix {
        let Panels { bytes, .. } = Made::Encoded(format).matrix(Cpu::best(), rows, cols, seed);
        Matrix { format, rows, cols, bytes: bytes.into(), scales: None }
    }

    #[test]
    fn many_tokens_have_the_bits_of_single_ones() {
        // Wide enough that a chunk of work is unpacked in several spans, of matrices side by side, one of them not a
        // whole number of panels, and of one format that is not unpacked next to one that is.
        let (cols, tokens) = (8192, 26);
        assert!(unpacked::panels_at_once(cols) < ABREAST);
        let [first, second] = [(Format::W4R, 200), (Format::W8Planes, 168)]
            .map(|(format, rows)| made(format, rows, cols, rows as u64));
        let up = made(Format::W5K, 200, cols, 3);
        let floats = random(200 * cols, 4).iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
        let gate =
            Matrix { format: Format::F32, rows: 200, cols, bytes: floats.into(), scales: None };
        let x = random(tokens * cols, 5);
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let team = pool.team();
            let unpacking = per_thread(threads);
            let ctx = Context { unpacking: &unpacking, ..Context::new(Cpu::best(), &team) };
            let products = |x: &[f32]| {
                let mut input = Input::default();
                input.reshape(x.len() / cols, cols);
                input.rows.copy_from_slice(x);
                input.prepare(ctx, &[&first, &second]);
                let width = first.width() + second.width();
                let mut y = [width, 200, 200, 200].map(|width| vec![0.25; input.tokens() * width]);
                project(ctx, &[&first, &second], &input, false, &mut y[0]);
                project(ctx, &[&first], &input, true, &mut y[1]);
                project_swiglu(ctx, &first, &up, &input, &mut y[2]);
                project_swiglu(ctx, &gate, &up, &input, &mut y[3]);
                y
            };
            let together = products(&x);
            for (t, x) in x.chunks_exact(cols).enumerate() {
                for (i, (alone, together)) in products(x).iter().zip(&together).enumerate() {
                    let width = alone.len();
                    let row = &together[t * width..][..width];
                    assert!(alone == row, "{threads} threads, product {i}, token {t}");
                }
            }
        }
    }
}
