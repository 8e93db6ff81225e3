//! Softmax attention of a few query rows over a chunk of cached positions.
//!
//! Keys lie in blocks of 16 positions, [head_dim, 16], so that the scores of 16 positions are one
//! vector and need no horizontal sum; values are rows, [head_dim]. The softmax is computed chunk by
//! chunk with a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867). Keys and
//! values are f16 or f32, the arithmetic is f32.

use super::activation::exp;
use super::{Columns, load_some};
use crate::quant::float::Float;
use crate::simd::{Isa, LANES};

/// Bytes that keys and values are asked for ahead of their use: the hardware does not follow
/// several streams of so few bytes. Half or twice as far is worse.
pub(super) const PREFETCH_AHEAD: usize = 8192;
/// Query rows that share each load of a key or value.
pub const ROWS: usize = 4;

/// Attention of up to `ROWS` query rows, as far as the chunks seen so far.
#[derive(Clone)]
pub struct Partial {
    /// Largest score and sum of exp(score - largest), per row.
    pub largest: [f32; ROWS],
    pub sum: [f32; ROWS],
    /// Sum of exp(score - largest) value: [ROWS, head_dim padded].
    pub out: Vec<f32>,
}

impl Partial {
    pub fn new(padded_dim: usize) -> Partial {
        Partial {
            largest: [f32::NEG_INFINITY; ROWS],
            sum: [0.0; ROWS],
            out: vec![0.0; ROWS * padded_dim],
        }
    }

    pub fn reset(&mut self) {
        self.largest = [f32::NEG_INFINITY; ROWS];
        self.sum = [0.0; ROWS];
        self.out.fill(0.0);
    }
}

/// Adds a chunk of positions.
///
/// q: [head_dim, ROWS], scaled by head_dim^(-1/2); k: [positions / 16, head_dim, 16] and
/// v: [positions, padded head_dim] in the format of the cache; seen: how many of the chunk's first
/// positions each row attends to; scores: work space of at least [ROWS, positions].
#[inline(always)]
pub fn attend_isa<S: Isa, F: Float>(
    s: S,
    q: &[[f32; ROWS]],
    k: &[u8],
    v: &[u8],
    seen: &[usize; ROWS],
    scores: &mut [f32],
    partial: &mut Partial,
) {
    let positions = seen.iter().copied().max().unwrap_or(0);
    if positions == 0 {
        return;
    }
    let stride = scores.len() / ROWS;
    let blocks = positions.div_ceil(LANES);
    let block_bytes = q.len() * LANES * F::BYTES;
    let mut b = 0;
    while b + 2 <= blocks {
        scores_isa::<S, F, 2>(s, q, &k[b * block_bytes..], b * LANES, stride, scores);
        b += 2;
    }
    if b < blocks {
        scores_isa::<S, F, 1>(s, q, &k[b * block_bytes..], b * LANES, stride, scores);
    }
    softmax_isa(s, seen, blocks * LANES, scores, partial);
    let probabilities = Columns { data: scores, width: positions, stride };
    let padded_dim = partial.out.len() / ROWS;
    let mut d = 0;
    if S::REGISTERS >= 32 {
        while d + 4 * LANES <= padded_dim {
            values_isa::<S, F, 4>(s, probabilities, v, padded_dim, d, &mut partial.out);
            d += 4 * LANES;
        }
    }
    while d < padded_dim {
        values_isa::<S, F, 1>(s, probabilities, v, padded_dim, d, &mut partial.out);
        d += LANES;
    }
}

/// Turns the scores of a chunk into exp(score - largest), and what was added before into the same
/// terms. positions: those of the chunk that matter, a multiple of 16; what a row does not attend
/// to becomes zero.
#[inline(always)]
pub(super) fn softmax_isa<S: Isa>(
    s: S,
    seen: &[usize; ROWS],
    positions: usize,
    scores: &mut [f32],
    partial: &mut Partial,
) {
    let stride = scores.len() / ROWS;
    let padded_dim = partial.out.len() / ROWS;
    for r in 0..ROWS {
        let scores = &mut scores[r * stride..][..positions];
        if seen[r] == 0 {
            scores.fill(0.0);
            continue;
        }
        let mut largest = partial.largest[r];
        for score in &scores[..seen[r]] {
            largest = largest.max(*score);
        }
        scores[seen[r]..].fill(f32::MIN);
        let mut sum = s.splat(0.0);
        let shift = s.splat(largest);
        for (i, part) in scores.as_chunks_mut().0.iter_mut().enumerate() {
            s.store(exp(s, s.sub(s.load(part), shift)), part);
            let first_unseen = seen[r].saturating_sub(i * LANES);
            if first_unseen < LANES {
                part[first_unseen..].fill(0.0);
            }
            sum = s.add(sum, s.load(part));
        }
        let keep = (partial.largest[r] - largest).exp();
        partial.largest[r] = largest;
        partial.sum[r] = partial.sum[r] * keep + s.sum(sum);
        if keep != 1.0 {
            let keep = s.splat(keep);
            for out in partial.out[r * padded_dim..][..padded_dim].as_chunks_mut().0 {
                s.store(s.mul(s.load(out), keep), out);
            }
        }
    }
}

/// Scores of P blocks of 16 positions: scores[r, first + i] = q[.., r] . k[.., i].
#[inline(always)]
fn scores_isa<S: Isa, F: Float, const P: usize>(
    s: S,
    q: &[[f32; ROWS]],
    k: &[u8],
    first: usize,
    stride: usize,
    scores: &mut [f32],
) {
    let mut acc = [[s.splat(0.0); ROWS]; P];
    let row_bytes = LANES * F::BYTES;
    let mut blocks: [&[u8]; P] = [&[]; P];
    for (p, block) in blocks.iter_mut().enumerate() {
        *block = &k[p * q.len() * row_bytes..][..q.len() * row_bytes];
    }
    for (i, q) in q.iter().enumerate() {
        for p in 0..P {
            let k = F::load(s, &blocks[p][i * row_bytes..(i + 1) * row_bytes]);
            s.prefetch(blocks[p], i * row_bytes + PREFETCH_AHEAD);
            for r in 0..ROWS {
                acc[p][r] = s.fma(k, s.splat(q[r]), acc[p][r]);
            }
        }
    }
    for p in 0..P {
        for r in 0..ROWS {
            let out = &mut scores[r * stride + first + p * LANES..];
            s.store(acc[p][r], out.first_chunk_mut().expect("a block of scores is there"));
        }
    }
}

/// out[r, d ..] += sum over positions of probability[r, position] v[position, d ..], V vectors wide.
#[inline(always)]
fn values_isa<S: Isa, F: Float, const V: usize>(
    s: S,
    probabilities: Columns<'_>,
    v: &[u8],
    padded_dim: usize,
    d: usize,
    out: &mut [f32],
) {
    let mut acc = [[s.splat(0.0); V]; ROWS];
    for r in 0..ROWS {
        for i in 0..V {
            acc[r][i] = load_some(s, &out[r * padded_dim + d + i * LANES..]);
        }
    }
    let mut rows: [&[f32]; ROWS] = [&[]; ROWS];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = probabilities.part(r, 0..probabilities.width);
    }
    let bytes = padded_dim * F::BYTES;
    for (position, v) in v[..probabilities.width * bytes].chunks_exact(bytes).enumerate() {
        let v = &v[d * F::BYTES..][..V * LANES * F::BYTES];
        for i in 0..V {
            s.prefetch(v, i * LANES * F::BYTES + PREFETCH_AHEAD);
            let v = F::load(s, &v[i * LANES * F::BYTES..(i + 1) * LANES * F::BYTES]);
            for r in 0..ROWS {
                acc[r][i] = s.fma(v, s.splat(rows[r][position]), acc[r][i]);
            }
        }
    }
    for r in 0..ROWS {
        for i in 0..V {
            let out = &mut out[r * padded_dim + d + i * LANES..];
            s.store(acc[r][i], out.first_chunk_mut().expect("padded to whole vectors"));
        }
    }
}
