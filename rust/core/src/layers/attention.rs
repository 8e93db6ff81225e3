//! Gated full attention with grouped queries and partial rotary embedding.
//!
//! q_proj gives each head a query and a gate, side by side. Query and key heads are RMS-normalised,
//! their first dimensions rotated; the softmax is causal, scaled by head_dim^(-1/2); the result is
//! multiplied by sigmoid(gate) before the output projection. Query head h reads KV head
//! h / (h_q / h_kv).

use super::Context;
use super::linear::{Input, Matrix, project, project_named};
use crate::config::Config;
use crate::kernels::activation::sigmoid;
use crate::kernels::attention::{Partial, ROWS, attend_isa};
use crate::kernels::attention_q8::{self, Q8Rows};
use crate::kernels::{Ask, FEW_TOKENS};
use crate::kernels::{load_some, norm, rope, store_some};
use crate::profile::Part;
use crate::quant::Format;
use crate::quant::float::{F16, F32};
use crate::simd::{Cpu, Isa, Kernel, LANES};
use crate::state::{KV_CHUNK, KvChunk, KvHead, lock};
use crate::tensor::resize;
use std::ops::Range;
use std::sync::{Arc, Mutex};

pub struct Attention {
    pub q_proj: Matrix,
    pub k_proj: Matrix,
    pub v_proj: Matrix,
    pub o_proj: Matrix,
    pub q_norm: Vec<f32>, // [head_dim], 1 + the stored weight
    pub k_norm: Vec<f32>, // [head_dim], 1 + the stored weight
    pub heads: Heads,
}

/// Numbers and sizes of heads.
#[derive(Clone, Copy)]
pub struct Heads {
    pub kv: usize,
    pub queries_per_kv: usize,
    pub dim: usize,
    pub eps: f32,
}

/// Where the tokens of a call lie in the sequence.
#[derive(Clone, Copy)]
pub struct Positions<'a> {
    /// Tokens before the call.
    pub past: usize,
    /// Cosines and sines per token: [tokens, rotary_dim / 2].
    pub angles: &'a [[f32; 2]],
    /// rotary_dim / 2
    pub rotary: usize,
}

impl Positions<'_> {
    /// Those of some of the tokens.
    pub fn of(self, tokens: Range<usize>) -> Self {
        let angles = &self.angles[tokens.start * self.rotary..tokens.end * self.rotary];
        Positions { past: self.past + tokens.start, angles, ..self }
    }

    /// The angles of a token of the call.
    fn angles_of(&self, token: usize) -> &[[f32; 2]] {
        &self.angles[token * self.rotary..][..self.rotary]
    }
}

/// Work space of one thread.
#[derive(Default)]
pub struct TileScratch {
    head: Vec<f32>,            // [dim]
    queries: Vec<[f32; ROWS]>, // [groups, dim]
    queries_q8: Vec<Q8Rows>,   // by group, if the cache is q8
    scores: Vec<f32>,          // [ROWS, KV_CHUNK]
    probabilities: Q8Rows,     // [ROWS, KV_CHUNK], if the cache is q8
    partials: Vec<Partial>,    // by group of ROWS query rows
}

/// Work space of a call; what it held before does not matter.
pub struct Workspace<'a> {
    pub projected: &'a mut Vec<f32>, // [tokens, widths of the first projections]
    pub mixed: &'a mut Input,        // [tokens, h_q head_dim]
    pub parts: &'a mut Vec<f32>,     // see `parts_len`
    pub tiles: &'a [Mutex<TileScratch>],
}

/// Tokens that share a pass over the cache in prefill.
const TILE_TOKENS: usize = 8;
/// Chunks of the cache in one unit of work when the tokens are few.
const SPLIT_CHUNKS: usize = 4;

impl Attention {
    /// Leaves the keys and values of `x` in the cache, which has room for them, and computes nothing
    /// else. `projected` is work space.
    pub fn remember(
        &self,
        ctx: Context<'_>,
        x: &mut Input,
        cache: &mut [KvHead],
        positions: Positions<'_>,
        projected: &mut Vec<f32>,
    ) {
        let projections = [("k_proj", &self.k_proj), ("v_proj", &self.v_proj)];
        let width = project_named(ctx, projections, x, projected);
        self.append(ctx.under(Part::Attention), cache, positions, (width, 0), projected);
    }

    /// Adds the result for `x` to `residual`: [tokens, hidden]. The cache has room for the tokens.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: &mut Input,
        cache: &mut [KvHead],
        positions: Positions<'_>,
        work: Workspace<'_>,
        residual: &mut [f32],
    ) {
        let Workspace { projected, mixed, parts, tiles } = work;
        let projections =
            [("q_proj", &self.q_proj), ("k_proj", &self.k_proj), ("v_proj", &self.v_proj)];
        let width = project_named(ctx, projections, x, projected);
        let [norms, products] = [Part::Norms, Part::Matrices].map(|part| ctx.under(part));
        let ctx = ctx.under(Part::Attention);
        let tokens = x.tokens();
        self.append(ctx, cache, positions, (width, self.q_proj.width()), projected);

        let (cache, projected) = (&*cache, &projected[..]);
        let unit = |kv: usize, tokens: Range<usize>, chunks: Range<usize>| Unit {
            layer: self,
            ctx,
            cache: &cache[kv],
            kv,
            tokens,
            chunks,
            positions,
            width,
            projected,
        };
        let head_cols = self.heads.queries_per_kv * self.heads.dim;
        let mixed_width = self.heads.kv * head_cols;
        mixed.reshape(tokens, mixed_width);
        let init = |thread: usize| lock(&tiles[thread]);
        let n_chunks = (positions.past + tokens).div_ceil(KV_CHUNK);
        if tokens > FEW_TOKENS || n_chunks <= SPLIT_CHUNKS {
            let tile = (TILE_TOKENS.min(tokens), head_cols);
            ctx.run_tiles(&mut mixed.rows, mixed_width, tile, init, |scratch, mut y| {
                let kv = y.cols().start / head_cols;
                let unit = unit(kv, y.rows(), 0..n_chunks);
                ctx.cpu.run(Attend { unit: &unit, scratch });
                for t in y.rows() {
                    let local = t - y.rows().start;
                    unit.finish(t, local, scratch, y.row(t));
                }
            });
        } else {
            // Each unit of a few chunks leaves its maxima, sums and vectors; the caller joins them.
            let splits = n_chunks.div_ceil(SPLIT_CHUNKS);
            let row = self.heads.queries_per_kv * (self.heads.dim + 2);
            resize(parts, splits * tokens * self.heads.kv * row);
            let parts_width = self.heads.kv * row;
            ctx.run_tiles(parts, parts_width, (tokens, row), init, |scratch, mut y| {
                let (kv, split) = (y.cols().start / row, y.rows().start / tokens);
                let chunks = split * SPLIT_CHUNKS..((split + 1) * SPLIT_CHUNKS).min(n_chunks);
                let unit = unit(kv, 0..tokens, chunks);
                ctx.cpu.run(Attend { unit: &unit, scratch });
                for t in 0..tokens {
                    unit.save(t, scratch, y.row(split * tokens + t));
                }
            });
            ctx.alone(|| {
                for t in 0..tokens {
                    for kv in 0..self.heads.kv {
                        let saved = (0..splits).map(|split| {
                            &parts[(split * tokens + t) * parts_width + kv * row..][..row]
                        });
                        let y = &mut mixed.rows[t * mixed_width + kv * head_cols..][..head_cols];
                        unit(kv, t..t + 1, 0..n_chunks).join(t, saved, y);
                    }
                }
            });
        }
        if let Some(trace) = ctx.trace {
            let rows = mixed.rows.chunks_exact(mixed_width).enumerate();
            trace.layer_part("attn_gated", mixed_width, 0, rows);
        }
        mixed.prepare(norms, &[&self.o_proj]);
        project(products, &[&self.o_proj], mixed, true, residual);
    }

    /// Normalises, rotates and stores the new keys and values.
    ///
    /// projected: [tokens, width], of which `first` columns are before the keys.
    fn append(
        &self,
        ctx: Context<'_>,
        cache: &mut [KvHead],
        positions: Positions<'_>,
        (width, first): (usize, usize),
        projected: &[f32],
    ) {
        let append = |head: usize, cache: &mut KvHead| {
            self.append_head(ctx, head, cache, positions, (width, first), projected);
        };
        if projected.len() <= FEW_TOKENS * width {
            ctx.alone(|| {
                cache.iter_mut().enumerate().for_each(|(head, cache)| append(head, cache));
            });
        } else {
            ctx.run_each(cache, |_| (), |(), head, cache| append(head, cache));
        }
    }

    /// As [`Attention::append`], of one head.
    fn append_head(
        &self,
        ctx: Context<'_>,
        head: usize,
        cache: &mut KvHead,
        positions: Positions<'_>,
        (width, first): (usize, usize),
        projected: &[f32],
    ) {
        let dim = self.heads.dim;
        let k_col = first + head * dim;
        let v_col = first + self.k_proj.width() + head * dim;
        let mut key = vec![0.0; dim];
        for (t, row) in projected.chunks_exact(width).enumerate() {
            let position = positions.past + t;
            norm::rms_norm(
                ctx.cpu,
                &row[k_col..k_col + dim],
                &self.k_norm,
                self.heads.eps,
                &mut key,
            );
            if let Some(trace) = ctx.trace {
                let width = self.heads.kv * dim;
                trace.layer_part("k_norm", width, head * dim, std::iter::once((t, &key[..])));
            }
            rope::rotate(positions.angles_of(t), &mut key);
            if let Some(trace) = ctx.trace {
                let width = self.heads.kv * dim;
                trace.layer_part("k_rope", width, head * dim, std::iter::once((t, &key[..])));
            }
            let chunk = Arc::get_mut(&mut cache.chunks[position / KV_CHUNK])
                .expect("the cache grew for these positions, so nobody shares their chunks");
            chunk.put(ctx.cpu, position % KV_CHUNK, &key, &row[v_col..v_col + dim]);
        }
    }
}

/// Elements of what units of a few chunks leave to be joined, of few tokens among `positions`.
pub fn parts_len(config: &Config, positions: usize) -> usize {
    let splits = positions.div_ceil(KV_CHUNK).div_ceil(SPLIT_CHUNKS);
    let row = config.num_attention_heads * (config.head_dim + 2);
    if splits > 1 { splits * FEW_TOKENS * row } else { 0 }
}

impl KvChunk {
    /// Stores a key and a value at a position of the chunk.
    fn put(&mut self, cpu: Cpu, position: usize, key: &[f32], value: &[f32]) {
        let (format, k, v) = match self {
            KvChunk::Float { format, k, v } => (*format, k, v),
            KvChunk::Q8(positions) => return positions.put(cpu, position, key, value),
        };
        let bytes = format.bytes(1, 1);
        let padded = key.len().next_multiple_of(LANES);
        let write = |to: &mut [u8], x: f32| match format {
            Format::F16 => to.copy_from_slice(&half::f16::from_f32(x).to_le_bytes()),
            _ => to.copy_from_slice(&x.to_le_bytes()),
        };
        let block = position / LANES * key.len() * LANES + position % LANES;
        for (i, key) in key.iter().enumerate() {
            write(&mut k[(block + i * LANES) * bytes..][..bytes], *key);
        }
        for (to, v) in v[position * padded * bytes..].chunks_exact_mut(bytes).zip(value) {
            write(to, *v);
        }
    }

    /// The key and the value at a position of the chunk.
    pub fn get(&self, position: usize, key: &mut [f32], value: &mut [f32]) {
        let (format, k, v) = match self {
            KvChunk::Float { format, k, v } => (*format, k, v),
            KvChunk::Q8(positions) => return positions.get(position, key, value),
        };
        let bytes = format.bytes(1, 1);
        let padded = key.len().next_multiple_of(LANES);
        let block = position / LANES * key.len() * LANES + position % LANES;
        for (i, key) in key.iter_mut().enumerate() {
            let at = (block + i * LANES) * bytes;
            crate::tensor::widen(format, &k[at..at + bytes], std::slice::from_mut(key));
        }
        let row = &v[position * padded * bytes..][..value.len() * bytes];
        crate::tensor::widen(format, row, value);
    }
}

impl TileScratch {
    /// Bytes on the heap.
    pub fn bytes_of(config: &Config) -> usize {
        let dim = config.head_dim;
        let queries = config.num_attention_heads / config.num_key_value_heads;
        let rows = (TILE_TOKENS * queries).next_multiple_of(ROWS);
        4 * (rows * (dim + dim.next_multiple_of(LANES)) + ROWS * KV_CHUNK)
    }

    /// Fills `queries_q8` from `queries`.
    #[inline(always)]
    fn quantize_queries_isa<S: Isa>(&mut self, s: S, dim: usize) {
        let groups = self.queries.chunks_exact(dim);
        self.queries_q8.resize_with(groups.len(), Q8Rows::default);
        for (queries, q8) in groups.zip(&mut self.queries_q8) {
            q8.reset(dim, attention_q8::GROUP);
            for r in 0..ROWS {
                self.head.iter_mut().zip(queries).for_each(|(x, q)| *x = q[r]);
                q8.set_isa(s, r, &self.head, attention_q8::GROUP);
            }
        }
    }
}

/// Some tokens, one KV head, some chunks of the cache.
struct Unit<'a> {
    layer: &'a Attention,
    ctx: Context<'a>,
    cache: &'a KvHead,
    kv: usize,
    tokens: Range<usize>,
    chunks: Range<usize>,
    positions: Positions<'a>,
    width: usize,
    projected: &'a [f32],
}

struct Attend<'a> {
    unit: &'a Unit<'a>,
    scratch: &'a mut TileScratch,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Attend { unit, scratch } = self;
        let Heads { queries_per_kv, dim, .. } = unit.layer.heads;
        unit.load_queries(scratch);
        let groups = scratch.partials.len();
        scratch.scores.resize(ROWS * KV_CHUNK, 0.0);
        if let Some(KvChunk::Q8(_)) = unit.cache.chunks.first().map(|chunk| &***chunk) {
            scratch.quantize_queries_isa(s, dim);
        }
        let chunks = &unit.cache.chunks[unit.chunks.clone()];
        for (i, chunk) in chunks.iter().enumerate() {
            let (c, next) = (unit.chunks.start + i, chunks.get(i + 1).map(|chunk| &***chunk));
            for group in 0..groups {
                let mut seen = [0; ROWS];
                for (r, seen) in seen.iter_mut().enumerate() {
                    let row = group * ROWS + r;
                    if row < unit.tokens.len() * queries_per_kv {
                        let token = unit.tokens.start + row / queries_per_kv;
                        let past = unit.positions.past + token + 1;
                        *seen = past.saturating_sub(c * KV_CHUNK).min(KV_CHUNK);
                    }
                }
                // The first group's asking serves all.
                let ask = if group == 0 { unit.ctx.reading.of_short_streams() } else { Ask::No };
                let q = &scratch.queries[group * dim..][..dim];
                let (scores, partial) = (&mut scratch.scores, &mut scratch.partials[group]);
                match &***chunk {
                    KvChunk::Float { format, k, v } => {
                        let next = next.map_or(&[][..], KvChunk::float_keys);
                        let cache = (&k[..], &v[..], next, ask);
                        match format {
                            Format::F16 => {
                                attend_isa::<S, F16>(s, q, cache, &seen, scores, partial)
                            }
                            _ => attend_isa::<S, F32>(s, q, cache, &seen, scores, partial),
                        }
                    }
                    KvChunk::Q8(positions) => {
                        let (q, p) = (&scratch.queries_q8[group], &mut scratch.probabilities);
                        let cache = (positions, next.and_then(KvChunk::q8), ask);
                        attention_q8::attend_isa(s, q, cache, &seen, scores, p, partial)
                    }
                }
            }
        }
    }
}

impl Unit<'_> {
    /// Normalises, rotates and scales the queries: row t * queries_per_kv + head of the unit.
    fn load_queries(&self, scratch: &mut TileScratch) {
        let Heads { queries_per_kv, dim, eps, kv } = self.layer.heads;
        let rows = self.tokens.len() * queries_per_kv;
        let groups = rows.div_ceil(ROWS);
        scratch.queries.clear();
        scratch.queries.resize(groups * dim, [0.0; ROWS]);
        scratch.head.resize(dim, 0.0);
        let padded = dim.next_multiple_of(LANES);
        scratch.partials.resize_with(groups, || Partial::new(padded));
        scratch.partials.iter_mut().for_each(Partial::reset);
        let scale = 1.0 / (dim as f32).sqrt();
        for row in 0..rows {
            let token = self.tokens.start + row / queries_per_kv;
            let head = self.kv * queries_per_kv + row % queries_per_kv;
            let q = &self.projected[token * self.width + 2 * head * dim..][..dim];
            let query = &mut scratch.head;
            norm::rms_norm(self.ctx.cpu, q, &self.layer.q_norm, eps, query);
            if let Some(trace) = self.ctx.trace {
                let width = kv * queries_per_kv * dim;
                trace.layer_part("q_norm", width, head * dim, std::iter::once((token, &query[..])));
            }
            rope::rotate(self.positions.angles_of(token), query);
            if let Some(trace) = self.ctx.trace {
                let width = kv * queries_per_kv * dim;
                trace.layer_part("q_rope", width, head * dim, std::iter::once((token, &query[..])));
            }
            let group = &mut scratch.queries[row / ROWS * dim..][..dim];
            for (to, q) in group.iter_mut().zip(&*query) {
                to[row % ROWS] = q * scale;
            }
        }
    }

    /// Divides by the sums and applies the gates, for token `t` of the call and `local` of the
    /// unit. y: [queries_per_kv, dim].
    fn finish(&self, t: usize, local: usize, scratch: &TileScratch, y: &mut [f32]) {
        let Heads { queries_per_kv, dim, .. } = self.layer.heads;
        let padded = dim.next_multiple_of(LANES);
        for (i, y) in y.chunks_exact_mut(dim).enumerate() {
            let row = local * queries_per_kv + i;
            let partial = &scratch.partials[row / ROWS];
            let sum = partial.sum[row % ROWS];
            let out = &partial.out[row % ROWS * padded..][..dim];
            y.iter_mut().zip(out).for_each(|(y, out)| *y = out / sum);
        }
        self.gate(t, y);
    }

    /// Stores what `join` needs: [queries_per_kv, dim + 2].
    fn save(&self, t: usize, scratch: &TileScratch, y: &mut [f32]) {
        let Heads { queries_per_kv, dim, .. } = self.layer.heads;
        let padded = dim.next_multiple_of(LANES);
        for (i, y) in y.chunks_exact_mut(dim + 2).enumerate() {
            let row = t * queries_per_kv + i;
            let partial = &scratch.partials[row / ROWS];
            y[..dim].copy_from_slice(&partial.out[row % ROWS * padded..][..dim]);
            y[dim] = partial.largest[row % ROWS];
            y[dim + 1] = partial.sum[row % ROWS];
        }
    }

    /// Joins what the units of one token saved, in order of positions.
    fn join<'a>(&self, t: usize, saved: impl Iterator<Item = &'a [f32]> + Clone, y: &mut [f32]) {
        let dim = self.layer.heads.dim;
        for (i, y) in y.chunks_exact_mut(dim).enumerate() {
            let parts = saved.clone().map(|saved| &saved[i * (dim + 2)..][..dim + 2]);
            let largest = parts.clone().fold(f32::NEG_INFINITY, |m, part| m.max(part[dim]));
            let weight = |part: &[f32]| (part[dim] - largest).exp();
            let sum: f32 = parts.clone().map(|part| part[dim + 1] * weight(part)).sum();
            y.fill(0.0);
            for part in parts {
                let weight = weight(part) / sum;
                y.iter_mut().zip(part).for_each(|(y, out)| *y += weight * out);
            }
        }
        self.gate(t, y);
    }

    /// y *= sigmoid(gate) for the heads of this unit and token `t`.
    fn gate(&self, t: usize, y: &mut [f32]) {
        let Heads { queries_per_kv, dim, kv, .. } = self.layer.heads;
        if let Some(trace) = self.ctx.trace {
            let width = kv * queries_per_kv * dim;
            let first = self.kv * queries_per_kv * dim;
            trace.layer_part("attn_out", width, first, std::iter::once((t, &y[..])));
        }
        for (i, y) in y.chunks_exact_mut(dim).enumerate() {
            let head = self.kv * queries_per_kv + i;
            let gate = &self.projected[t * self.width + (2 * head + 1) * dim..][..dim];
            self.ctx.cpu.run(Gate { gate, y });
        }
    }
}

struct Gate<'a> {
    gate: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let mut i = 0;
        while i < self.y.len() {
            let gate = sigmoid(s, load_some(s, &self.gate[i..]));
            store_some(s, s.mul(load_some(s, &self.y[i..]), gate), &mut self.y[i..]);
            i += LANES;
        }
    }
}
