//! Kernels on their own, timed on one thread.

use crate::error::{Error, Result};
use crate::kernels::delta_rule::{KeyQueries, MAX_TOKENS, PendingKeys, ValueHead};
use crate::kernels::matmul;
use crate::kernels::quantize::QuantTile;
use crate::quant::{Format, PANEL_ROWS};
use crate::random::Random;
use crate::simd::{Cpu, Isa, Kernel};
use crate::tensor::AlignedBuf;
use std::time::{Duration, Instant};

/// The matrix format called `name`.
pub fn format_named(name: &str) -> Result<Format> {
    [Format::Bf16, Format::F16, Format::F32, Format::W8, Format::W4]
        .into_iter()
        .find(|format| format.name() == name)
        .ok_or_else(|| {
            Error::Argument(format!("format is `{name}`, expected one of: bf16, f16, f32, w8, w4"))
        })
}

/// Time of `repeats` products of a random matrix with `tokens` rows.
pub fn matmul(
    cpu: Cpu,
    format: Format,
    rows: usize,
    cols: usize,
    tokens: usize,
    repeats: usize,
) -> Duration {
    let mut random = Random::new(1);
    let rows = rows.next_multiple_of(PANEL_ROWS);
    let mut w = AlignedBuf::new(format.bytes(rows, cols));
    random.fill_matrix(format, 0.02, &mut w);
    let mut x = vec![0.0; tokens * cols];
    random.fill(1.0, &mut x);
    if !format.is_packed() {
        let mut y = vec![0.0; tokens * rows];
        let start = Instant::now();
        for _ in 0..repeats {
            matmul::float(cpu, format, &w, cols, &x, &mut y);
            std::hint::black_box(&mut y);
        }
        return start.elapsed();
    }
    let tile_tokens = cpu.tile_tokens();
    let tiles: Vec<QuantTile> = x
        .chunks(tile_tokens * cols)
        .map(|x| {
            let mut tile = QuantTile::default();
            tile.quantize(cpu, x, cols);
            tile
        })
        .collect();
    let mut y = vec![0.0; tile_tokens * rows];
    let start = Instant::now();
    for _ in 0..repeats {
        for tile in &tiles {
            let y = &mut y[..tile.tokens() * rows];
            matmul::packed(cpu, format, &w, cols, tile, y);
            std::hint::black_box(y);
        }
    }
    start.elapsed()
}

/// Time of `repeats` steps of `tokens` tokens on `heads` states of 128 x 128, each with its own
/// keys and queries.
pub fn delta_rule(cpu: Cpu, heads: usize, tokens: usize, repeats: usize) -> Duration {
    const D: usize = 128;
    let tokens = tokens.clamp(1, MAX_TOKENS);
    let mut random = Random::new(2);
    let mut draw = |n: usize| {
        let mut x = vec![0.0; n];
        random.fill(0.1, &mut x);
        x
    };
    let mut step = Step {
        heads: (0..heads).map(|_| (ValueHead::new(D, D), PendingKeys::default())).collect(),
        q: draw(tokens * D),
        k: draw(tokens * D),
        v: draw(tokens * D),
        y: vec![0.0; tokens * D],
        gates: vec![(-0.1, 0.5); tokens],
    };
    let start = Instant::now();
    for _ in 0..repeats {
        cpu.run(&mut step);
    }
    start.elapsed()
}

struct Step {
    heads: Vec<(ValueHead, PendingKeys)>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    y: Vec<f32>,
    gates: Vec<(f32, f32)>,
}

impl Kernel for &mut Step {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let mut next = KeyQueries::default();
        for (head, pending) in &mut self.heads {
            let d = self.v.len() / self.gates.len();
            next.fill_isa(s, d, &self.q, &self.k);
            head.step_isa(s, &next, pending, &self.gates, d, &self.v, d, &mut self.y, d);
            pending.advance(&next);
        }
    }
}
