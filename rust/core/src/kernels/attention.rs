//! Softmax attention of a few query rows over a chunk of cached positions.
//!
//! Keys lie in blocks of 16 positions, [head_dim, 16], so that the scores of 16 positions are one
//! vector and need no horizontal sum; values are rows, [head_dim]. The softmax is computed chunk by
//! chunk with a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867). Keys and
//! values are f16 or f32, the arithmetic is f32.

use super::activation::exp;
use super::{AHEAD, Ask, Columns, LINE, load_some};
use crate::quant::float::Float;
use crate::simd::{Isa, LANES};

/// Keys or values of a chunk, and what is read behind their end.
///
/// They are asked for ahead of their use, for the hardware does not follow several streams of so few
/// bytes: what comes [`AHEAD`] bytes later, and values while memory waits for the softmax.
#[derive(Clone, Copy)]
pub(super) struct Stream<'a, T> {
    pub items: &'a [T],
    pub next: &'a [T],
    pub ask: Ask,
}

impl<'a, T> Stream<'a, T> {
    /// What to ask for while `step` items from `at` are read, in whatever order.
    #[inline(always)]
    pub fn ahead(self, at: usize, step: usize) -> &'a [T] {
        let at = at + step.max(AHEAD / size_of::<T>());
        let beyond = at.checked_sub(self.items.len());
        beyond.map_or_else(|| &self.items[at..], |at| self.next.get(at..).unwrap_or_default())
    }
}

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
/// v: [positions, padded head_dim] in the format of the cache; next: keys that are read afterwards, if
/// any; ask: how to ask for keys and values; seen: how many of the chunk's first positions each row
/// attends to; scores: work space of at least [ROWS, positions].
#[inline(always)]
pub fn attend_isa<S: Isa, F: Float>(
    s: S,
    q: &[[f32; ROWS]],
    (k, v, next, ask): (&[u8], &[u8], &[u8], Ask),
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
    let padded_dim = partial.out.len() / ROWS;
    let v = &v[..positions * padded_dim * F::BYTES];
    let keys = Stream { items: &k[..blocks * LANES * q.len() * F::BYTES], next: v, ask };
    let mut b = 0;
    while b + 2 <= blocks {
        scores_isa::<S, F, 2>(s, q, keys, b, stride, scores);
        b += 2;
    }
    if b < blocks {
        scores_isa::<S, F, 1>(s, q, keys, b, stride, scores);
    }
    softmax_isa(s, seen, blocks * LANES, scores, partial);
    let values = Stream { items: v, next, ask };
    for first in (0..positions).step_by(LANES) {
        let width = (positions - first).min(LANES);
        let probabilities = Columns { data: &scores[first..], width, stride };
        let mut d = 0;
        if S::REGISTERS >= 32 {
            while d + 4 * LANES <= padded_dim {
                values_isa::<S, F, 4>(s, probabilities, values, (first, d), &mut partial.out);
                d += 4 * LANES;
            }
        }
        while d < padded_dim {
            values_isa::<S, F, 1>(s, probabilities, values, (first, d), &mut partial.out);
            d += LANES;
        }
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
        let (scores, unseen) = scores.split_at_mut(seen[r].next_multiple_of(LANES));
        unseen.fill(0.0);
        scores[seen[r]..].fill(f32::MIN);
        let scores = scores.as_chunks_mut().0;
        let mut largest = s.splat(partial.largest[r]);
        for part in &*scores {
            largest = s.max(largest, s.load(part));
        }
        let largest = s.largest(largest);
        let mut sum = s.splat(0.0);
        let shift = s.splat(largest);
        let (last, whole) = scores.split_last_mut().expect("a position is seen");
        for part in whole {
            let terms = exp(s, s.sub(s.load(part), shift));
            s.store(terms, part);
            sum = s.add(sum, terms);
        }
        s.store(exp(s, s.sub(s.load(last), shift)), last);
        last[(seen[r] - 1) % LANES + 1..].fill(0.0);
        sum = s.add(sum, s.load(last));
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

/// Scores of P blocks of 16 positions from block `b`: scores[r, 16 b + i] = q[.., r] . k[.., i].
#[inline(always)]
fn scores_isa<S: Isa, F: Float, const P: usize>(
    s: S,
    q: &[[f32; ROWS]],
    k: Stream<'_, u8>,
    b: usize,
    stride: usize,
    scores: &mut [f32],
) {
    let mut acc = [[s.splat(0.0); ROWS]; P];
    let row_bytes = LANES * F::BYTES;
    let block_bytes = q.len() * row_bytes;
    let mut blocks: [&[u8]; P] = [&[]; P];
    for (p, block) in blocks.iter_mut().enumerate() {
        *block = &k.items[(b + p) * block_bytes..][..block_bytes];
    }
    let ahead = k.ahead(b * block_bytes, P * block_bytes);
    for (i, q) in q.iter().enumerate() {
        for p in 0..P {
            let keys = F::load(s, &blocks[p][i * row_bytes..(i + 1) * row_bytes]);
            if (i * row_bytes).is_multiple_of(LINE) {
                k.ask.line(s, ahead, p * block_bytes + i * row_bytes);
            }
            for r in 0..ROWS {
                acc[p][r] = s.fma(keys, s.splat(q[r]), acc[p][r]);
            }
        }
    }
    for p in 0..P {
        for r in 0..ROWS {
            let out = &mut scores[r * stride + (b + p) * LANES..];
            s.store(acc[p][r], out.first_chunk_mut().expect("a block of scores is there"));
        }
    }
}

/// out[r, d ..] += sum over positions from `first` of probability[r, position] v[position, d ..], V
/// vectors wide.
#[inline(always)]
fn values_isa<S: Isa, F: Float, const V: usize>(
    s: S,
    probabilities: Columns<'_>,
    v: Stream<'_, u8>,
    (first, d): (usize, usize),
    out: &mut [f32],
) {
    let padded_dim = out.len() / ROWS;
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
    let block_bytes = probabilities.width * bytes;
    let ahead = v.ahead(first * bytes, block_bytes);
    // The passes over a block of positions ask for a part of the next each, in the order of memory.
    let part = V * LANES * F::BYTES;
    let asked = d * F::BYTES * probabilities.width;
    let (ask, v) = (v.ask, &v.items[first * bytes..][..block_bytes]);
    for (position, v) in v.chunks_exact(bytes).enumerate() {
        let v = &v[d * F::BYTES..][..part];
        for i in 0..V {
            if (i * LANES * F::BYTES).is_multiple_of(LINE) {
                ask.line(s, ahead, asked + position * part + i * LANES * F::BYTES);
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ahead_goes_on_behind_the_end() {
        let (items, next) = ([0u8; 3 * AHEAD], [1u8; AHEAD + 1]);
        let stream = Stream { items: &items, next: &next, ask: Ask::No };
        for (at, step, want) in [
            (0, 64, &items[AHEAD..]),
            (AHEAD, 2 * AHEAD, &next[..]),
            (2 * AHEAD, AHEAD, &next[..]),
            (2 * AHEAD + 64, 64, &next[64..]),
            (2 * AHEAD, 3 * AHEAD, &[]),
        ] {
            let got = stream.ahead(at, step);
            assert_eq!(got.len(), want.len(), "{at} {step}");
            assert!(got.is_empty() || got.as_ptr() == want.as_ptr(), "{at} {step}");
        }
    }
}
