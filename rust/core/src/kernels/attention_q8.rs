//! Softmax attention over cached positions kept as signed bytes, with integer dot products.
//!
//! A number is scale x code with codes -127..=127 and scale = absmax / 127, in f32. A key has a scale
//! for each [`GROUP`] of dimensions (the last group is shorter if head_dim is no multiple of it), a
//! value one for the whole head. Keys lie in blocks of 16 positions, four dimensions of each in
//! turn, so that a vector of dot products is 16 scores; values lie in fours of positions, so that
//! it is 16 dimensions of the output. Nothing needs a horizontal sum, and a new position changes
//! no older one.
//!
//! Queries are quantised as keys are. A value's scale is multiplied into its probabilities, which
//! are then quantised in blocks of [`BLOCK`] positions; the sum that divides the result is that of
//! the exact ones.

use super::attention::{Partial, ROWS, Stream, softmax_isa};
use super::{Ask, load_some};
use crate::error::Result;
use crate::simd::{Cpu, Isa, Kernel, LANES};
use crate::tensor::filled;

/// Dimensions of a key or query that share a scale.
pub const GROUP: usize = 64;
/// Positions whose probabilities share a scale.
pub const BLOCK: usize = 32;
const LARGEST: f32 = 127.0;
/// Turns the bits of a signed code into those of an unsigned one, see [`Isa::BYTE_BIAS`].
const FLIP: u8 = 128;

/// 64 bytes that one load takes: it crosses no cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 4 * LANES]);

/// Keys and values of one head at a number of positions.
#[derive(Clone)]
pub struct Q8Positions {
    head_dim: usize,
    k: Vec<Line>,                // [positions / 16, head_dim / 4, 16 positions, 4 dims]
    k_scales: Vec<[f32; LANES]>, // [positions / 16, groups, 16]
    v: Vec<Line>,                // [positions / 4, head_dim / 16, 16 dims, 4 positions]
    v_scales: Vec<[f32; LANES]>, // [positions / 16, 16]
}

/// Vectors of `Q8Positions`, in the order of its fields. Divisions are rounded up.
fn lengths(positions: usize, head_dim: usize) -> [usize; 4] {
    let blocks = positions / LANES;
    [
        blocks * head_dim.div_ceil(4),
        blocks * head_dim.div_ceil(GROUP),
        positions / 4 * head_dim.div_ceil(LANES),
        blocks,
    ]
}

impl Q8Positions {
    /// Room for a number of positions, a multiple of [`BLOCK`].
    pub fn new(positions: usize, head_dim: usize) -> Result<Q8Positions> {
        assert!(positions.is_multiple_of(BLOCK));
        let [k, k_scales, v, v_scales] = lengths(positions, head_dim);
        Ok(Q8Positions {
            head_dim,
            k: filled(Line([FLIP; 4 * LANES]), k)?,
            k_scales: filled([0.0; LANES], k_scales)?,
            v: filled(Line([FLIP; 4 * LANES]), v)?,
            v_scales: filled([0.0; LANES], v_scales)?,
        })
    }

    /// Bytes on the heap with room for `positions`.
    pub fn bytes_of(positions: usize, head_dim: usize) -> usize {
        64 * lengths(positions, head_dim).iter().sum::<usize>()
    }

    pub fn bytes(&self) -> usize {
        64 * (self.k.len() + self.k_scales.len() + self.v.len() + self.v_scales.len())
    }

    /// Stores the key and the value of a position: [head_dim] each.
    pub fn put(&mut self, cpu: Cpu, position: usize, key: &[f32], value: &[f32]) {
        assert!(key.len() == self.head_dim && value.len() == self.head_dim);
        cpu.run(Put { positions: self, position, key, value });
    }

    /// The key and the value of a position, as the codes have them: [head_dim] each.
    pub fn get(&self, position: usize, key: &mut [f32], value: &mut [f32]) {
        let (block, lane) = (position / LANES, position % LANES);
        let number = |scale: f32, byte: u8| scale * f32::from((byte ^ FLIP) as i8);
        let lines = &self.k[block * self.head_dim.div_ceil(4)..];
        let scales = &self.k_scales[block * self.head_dim.div_ceil(GROUP)..];
        for (d, key) in key.iter_mut().enumerate() {
            *key = number(scales[d / GROUP][lane], lines[d / 4].0[4 * lane + d % 4]);
        }
        let lines = &self.v[position / 4 * self.head_dim.div_ceil(LANES)..];
        for (d, value) in value.iter_mut().enumerate() {
            let byte = lines[d / LANES].0[4 * (d % LANES) + position % 4];
            *value = number(self.v_scales[block][lane], byte);
        }
    }
}

/// Largest |x|; x of any length.
#[inline(always)]
fn largest<S: Isa>(s: S, x: &[f32]) -> f32 {
    let mut largest = s.splat(0.0);
    for x in x.chunks(LANES) {
        largest = s.max(largest, s.abs(load_some(s, x)));
    }
    s.largest(largest)
}

/// Scale of numbers up to `largest`, and what to multiply them by to get codes. Both are zero where
/// the scale would leave the normal numbers.
#[inline(always)]
fn scale(largest: f32) -> (f32, f32) {
    if largest >= LARGEST * f32::MIN_POSITIVE {
        (largest / LARGEST, LARGEST / largest)
    } else {
        (0.0, 0.0)
    }
}

/// Up to 16 codes, padded with zeros.
#[inline(always)]
fn codes<S: Isa>(s: S, x: &[f32], inverse: f32) -> (S::I, [i8; LANES]) {
    let q = s.to_i32(s.mul(load_some(s, x), s.splat(inverse)));
    let mut codes = [0; LANES];
    s.store_i8(q, &mut codes);
    (q, codes)
}

struct Put<'a> {
    positions: &'a mut Q8Positions,
    position: usize,
    key: &'a [f32],
    value: &'a [f32],
}

impl Kernel for Put<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Put { positions: Q8Positions { head_dim, k, k_scales, v, v_scales }, position, .. } =
            self;
        let (block, lane) = (position / LANES, position % LANES);
        let lines = &mut k[block * head_dim.div_ceil(4)..][..head_dim.div_ceil(4)];
        let scales = &mut k_scales[block * head_dim.div_ceil(GROUP)..];
        let groups = self.key.chunks(GROUP).zip(lines.chunks_mut(GROUP / 4));
        for ((key, lines), scales) in groups.zip(scales) {
            let inverse;
            (scales[lane], inverse) = scale(largest(s, key));
            for (key, lines) in key.chunks(LANES).zip(lines.chunks_mut(LANES / 4)) {
                let (_, codes) = codes(s, key, inverse);
                for (four, line) in codes.as_chunks::<4>().0.iter().zip(lines) {
                    line.0.as_chunks_mut().0[lane] = four.map(|code| code as u8 ^ FLIP);
                }
            }
        }
        let lines = &mut v[position / 4 * head_dim.div_ceil(LANES)..];
        let inverse;
        (v_scales[block][lane], inverse) = scale(largest(s, self.value));
        for (value, line) in self.value.chunks(LANES).zip(lines) {
            let (_, codes) = codes(s, value, inverse);
            for (code, four) in codes.iter().zip(line.0.as_chunks_mut::<4>().0) {
                four[position % 4] = *code as u8 ^ FLIP;
            }
        }
    }
}

/// Up to `ROWS` rows of numbers as codes, in groups that share a scale. Unused rows are zero.
#[derive(Default)]
pub struct Q8Rows {
    codes: Vec<[[i8; 4]; ROWS]>, // [n / 4]
    sums: Vec<[i32; ROWS]>,      // [groups]
    scales: Vec<[f32; ROWS]>,    // [groups]
}

impl Q8Rows {
    /// Makes room for rows of `n` numbers, all zero.
    pub fn reset(&mut self, n: usize, group: usize) {
        self.codes.clear();
        self.codes.resize(n.div_ceil(4), [[0; 4]; ROWS]);
        self.sums.clear();
        self.sums.resize(n.div_ceil(group), [0; ROWS]);
        self.scales.clear();
        self.scales.resize(n.div_ceil(group), [0.0; ROWS]);
    }

    /// Quantises row `r`: [n].
    #[inline(always)]
    pub fn set_isa<S: Isa>(&mut self, s: S, r: usize, x: &[f32], group: usize) {
        for (g, x) in x.chunks(group).enumerate() {
            let inverse;
            (self.scales[g][r], inverse) = scale(largest(s, x));
            let mut sum = s.splat_i32(0);
            let fours = &mut self.codes[g * group / 4..];
            for (x, fours) in x.chunks(LANES).zip(fours.chunks_mut(LANES / 4)) {
                let (q, codes) = codes(s, x, inverse);
                sum = s.add_i32(sum, q);
                for (four, to) in codes.as_chunks().0.iter().zip(fours) {
                    to[r] = *four;
                }
            }
            self.sums[g][r] = s.sum_i32(sum);
        }
    }

    /// What a product with group `g` begins with.
    #[inline(always)]
    fn start<S: Isa>(&self, s: S, g: usize) -> [S::I; ROWS] {
        let mut start = [s.splat_i32(0); ROWS];
        for r in 0..ROWS {
            start[r] = s.splat_i32(self.sums[g][r].wrapping_mul(-S::BYTE_BIAS));
        }
        start
    }
}

/// Adds a chunk of positions.
///
/// q: rows of head_dim, scaled by head_dim^(-1/2), in groups of [`GROUP`]; next: the chunk that is read
/// afterwards, if any; ask: how to ask for keys and values; seen: how many of the first positions each row
/// attends to; scores: work space of [ROWS, positions]; probabilities: work space.
#[inline(always)]
pub fn attend_isa<S: Isa>(
    s: S,
    q: &Q8Rows,
    (cache, next, ask): (&Q8Positions, Option<&Q8Positions>, Ask),
    seen: &[usize; ROWS],
    scores: &mut [f32],
    probabilities: &mut Q8Rows,
    partial: &mut Partial,
) {
    let positions = seen.iter().copied().max().unwrap_or(0).next_multiple_of(BLOCK);
    if positions == 0 {
        return;
    }
    let stride = scores.len() / ROWS;
    let blocks = positions / LANES;
    let vectors = cache.head_dim.div_ceil(LANES);
    let v = &cache.v[..positions / 4 * vectors];
    let k = Stream { items: &cache.k[..blocks * q.codes.len()], next: v, ask };
    let mut b = 0;
    while b < blocks {
        if S::REGISTERS >= 32 {
            scores_isa::<S, 2>(s, q, (k, &cache.k_scales), b, stride, scores);
            b += 2;
        } else {
            scores_isa::<S, 1>(s, q, (k, &cache.k_scales), b, stride, scores);
            b += 1;
        }
    }
    softmax_isa(s, seen, positions, scores, partial);
    probabilities.reset(positions, BLOCK);
    for r in 0..ROWS {
        let row = &mut scores[r * stride..][..positions];
        for (p, scale) in row.as_chunks_mut().0.iter_mut().zip(&cache.v_scales) {
            s.store(s.mul(s.load(p), s.load(scale)), p);
        }
        probabilities.set_isa(s, r, row, BLOCK);
    }
    let v = Stream { items: v, next: next.map_or(&[], |next| &next.k), ask };
    for block in 0..positions / BLOCK {
        let mut i = 0;
        if S::REGISTERS >= 32 {
            while i + 4 <= vectors {
                values_isa::<S, 4>(s, probabilities, v, (block, i), &mut partial.out);
                i += 4;
            }
        }
        while i < vectors {
            values_isa::<S, 1>(s, probabilities, v, (block, i), &mut partial.out);
            i += 1;
        }
    }
}

/// Scores of P blocks of 16 positions from block `b`.
#[inline(always)]
fn scores_isa<S: Isa, const P: usize>(
    s: S,
    q: &Q8Rows,
    (k, k_scales): (Stream<'_, Line>, &[[f32; LANES]]),
    b: usize,
    stride: usize,
    scores: &mut [f32],
) {
    let (steps, groups) = (q.codes.len(), q.scales.len());
    let ahead = k.ahead(b * steps, P * steps);
    let mut total = [[s.splat(0.0); ROWS]; P];
    for (g, codes) in q.codes.chunks(GROUP / 4).enumerate() {
        let mut acc = [q.start(s, g); P];
        let mut lines: [&[Line]; P] = [&[]; P];
        for (p, lines) in lines.iter_mut().enumerate() {
            *lines = &k.items[(b + p) * steps + g * GROUP / 4..][..codes.len()];
        }
        for (t, codes) in codes.iter().enumerate() {
            for p in 0..P {
                let keys = s.load_bytes(&lines[p][t].0);
                k.ask.line(s, ahead, (p * steps + g * GROUP / 4 + t) * size_of::<Line>());
                for r in 0..ROWS {
                    acc[p][r] = s.dot_bytes(acc[p][r], keys, s.splat_bytes(codes[r]));
                }
            }
        }
        for p in 0..P {
            let scales = s.load(&k_scales[(b + p) * groups + g]);
            for r in 0..ROWS {
                let scale = s.mul(scales, s.splat(q.scales[g][r]));
                total[p][r] = s.fma(s.to_f32(acc[p][r]), scale, total[p][r]);
            }
        }
    }
    for p in 0..P {
        for r in 0..ROWS {
            let out = &mut scores[r * stride + (b + p) * LANES..];
            s.store(total[p][r], out.first_chunk_mut().expect("a block of scores is there"));
        }
    }
}

/// Adds a block of positions to V vectors of each row of `out`, from vector `first` of each.
#[inline(always)]
fn values_isa<S: Isa, const V: usize>(
    s: S,
    probabilities: &Q8Rows,
    v: Stream<'_, Line>,
    (block, first): (usize, usize),
    out: &mut [f32],
) {
    const STEPS: usize = BLOCK / 4;
    let vectors = out.len() / ROWS / LANES;
    let start = probabilities.start(s, block);
    let mut acc = [[s.splat_i32(0); V]; ROWS];
    for r in 0..ROWS {
        acc[r] = [start[r]; V];
    }
    let ahead = v.ahead(block * STEPS * vectors, STEPS * vectors);
    let (ask, lines) = (v.ask, &v.items[block * STEPS * vectors..][..STEPS * vectors]);
    let codes = &probabilities.codes[block * STEPS..][..STEPS];
    for (t, (codes, lines)) in codes.iter().zip(lines.chunks_exact(vectors)).enumerate() {
        let lines = &lines[first..][..V];
        for i in 0..V {
            let v = s.load_bytes(&lines[i].0);
            // The passes over a block ask for a part of the next each, in the order of memory.
            ask.line(s, ahead, (first * STEPS + t * V + i) * size_of::<Line>());
            for r in 0..ROWS {
                acc[r][i] = s.dot_bytes(acc[r][i], v, s.splat_bytes(codes[r]));
            }
        }
    }
    for r in 0..ROWS {
        let scale = s.splat(probabilities.scales[block][r]);
        let out = out[r * vectors * LANES + first * LANES..].as_chunks_mut().0;
        for (acc, out) in acc[r].iter().zip(out) {
            s.store(s.fma(s.to_f32(*acc), scale, s.load(out)), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, random};

    const CHUNK: usize = 256;

    /// Chunks with keys and values: [positions, dim] each.
    fn cache(cpu: Cpu, dim: usize, keys: &[f32], values: &[f32]) -> Vec<Q8Positions> {
        let chunks = (keys.len() / dim).div_ceil(CHUNK);
        let mut chunks: Vec<_> =
            (0..chunks).map(|_| Q8Positions::new(CHUNK, dim).unwrap()).collect();
        for (i, (key, value)) in keys.chunks(dim).zip(values.chunks(dim)).enumerate() {
            chunks[i / CHUNK].put(cpu, i % CHUNK, key, value);
        }
        chunks
    }

    struct Attend<'a> {
        dim: usize,
        queries: &'a [(usize, &'a [f32], usize)], // row, query, positions seen
        cache: &'a [Q8Positions],
    }

    impl Kernel for Attend<'_> {
        type Output = Partial;
        #[inline(always)]
        fn run<S: Isa>(self, s: S) -> Partial {
            let (mut q, mut probabilities) = (Q8Rows::default(), Q8Rows::default());
            q.reset(self.dim, GROUP);
            for (row, query, _) in self.queries {
                q.set_isa(s, *row, query, GROUP);
            }
            // What an earlier call left in the work space.
            let mut scores = vec![7.0; ROWS * CHUNK];
            let mut partial = Partial::new(self.dim.next_multiple_of(LANES));
            for (c, chunk) in self.cache.iter().enumerate() {
                let mut seen = [0; ROWS];
                for (row, _, n) in self.queries {
                    seen[*row] = n.saturating_sub(c * CHUNK).min(CHUNK);
                }
                let p = &mut probabilities;
                let chunks = (chunk, self.cache.get(c + 1), Ask::ALL[c % Ask::ALL.len()]);
                attend_isa(s, &q, chunks, &seen, &mut scores, p, &mut partial);
            }
            partial
        }
    }

    /// Row `row` of the result.
    fn finish(partial: &Partial, row: usize, dim: usize) -> Vec<f32> {
        let out = &partial.out[row * dim.next_multiple_of(LANES)..][..dim];
        out.iter().map(|x| x / partial.sum[row]).collect()
    }

    /// Codes of a group and their scale, by definition.
    fn quantized(x: &[f32]) -> (Vec<f64>, f64) {
        let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let codes = x.iter().map(|x| f64::from((x * (127.0 / largest)).round_ties_even()));
        (codes.collect(), f64::from(largest / 127.0))
    }

    /// Attention of one query in f64 with the same codes, and how far an evaluation in f32 may be
    /// from it: [dim] each.
    fn twin(query: &[f32], cache: &[Q8Positions], n: usize) -> (Vec<f64>, Vec<f64>) {
        const EPS: f64 = f32::EPSILON as f64 / 2.0;
        let dim = query.len();
        let groups = dim.div_ceil(GROUP);
        let (mut values, mut value_scales) = (Vec::new(), Vec::new());
        let (mut scores, mut score_error) = (Vec::new(), 0.0f64);
        for position in 0..n {
            let chunk = &cache[position / CHUNK];
            let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
            chunk.get(position % CHUNK, &mut key, &mut value);
            let scale = chunk.v_scales[position % CHUNK / LANES][position % LANES];
            value_scales.push(f64::from(scale));
            values.push(value.iter().map(|v| f64::from(*v / scale).round()).collect::<Vec<_>>());
            let (mut score, mut total) = (0.0, 0.0);
            for (query, key) in query.chunks(GROUP).zip(key.chunks(GROUP)) {
                let (codes, scale) = quantized(query);
                let part: f64 = codes.iter().zip(key).map(|(q, k)| q * f64::from(*k)).sum();
                score += part * scale;
                total += (part * scale).abs();
            }
            // Four roundings of each group's product, and its addition.
            score_error = score_error.max((groups as f64 + 4.0) * EPS * total);
            scores.push(score);
        }
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let smallest = scores.iter().copied().fold(f64::INFINITY, f64::min);
        let p: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = p.iter().sum();
        // Of an exponential, relative: score and maximum, their difference, `exp` itself, and one
        // rescaling for each chunk.
        let chunks = n.div_ceil(CHUNK) as f64;
        let p_error = 2.0 * score_error + EPS * (largest - smallest + 8.0 + 4.0 * chunks);
        let sum_error = p_error + EPS * (CHUNK as f64 / LANES as f64 + 4.0 + chunks);
        let blocks = n.div_ceil(BLOCK) as f64;
        let (mut out, mut size, mut flips) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]);
        for first in (0..n).step_by(CHUNK).flat_map(|c| (c..n.min(c + CHUNK)).step_by(BLOCK)) {
            let block = first..n.min(first + BLOCK);
            let folded: Vec<f64> = block.clone().map(|i| p[i] * value_scales[i]).collect();
            let step = folded.iter().copied().fold(0.0, f64::max) / 127.0;
            for (i, folded) in block.zip(&folded) {
                let code = (folded / step).round_ties_even();
                // A number this close to the middle between two codes may become either.
                let middle = 0.5 - (folded / step - code).abs();
                let may_flip = middle < 127.0 * (2.0 * p_error + 4.0 * EPS);
                for d in 0..dim {
                    let part = step * values[i][d] / sum;
                    out[d] += code * part;
                    size[d] += (code * part).abs();
                    flips[d] += if may_flip { part.abs() } else { 0.0 };
                }
            }
        }
        let error = p_error + sum_error + EPS * (blocks + 8.0);
        let bound = size.iter().zip(&flips).map(|(size, flips)| size * error + flips);
        (out, bound.collect())
    }

    #[test]
    fn attention_matches_the_twin_on_the_same_codes() {
        for dim in [2, 30, 32, 48, 64, 66, 256] {
            for n in [1, 3, 4, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025] {
                let scale = 3.0 / (dim as f32).sqrt();
                let (keys, values) = (random(n * dim, 1), random(n * dim, 2));
                let queries: Vec<f32> =
                    random(ROWS * dim, 3).iter().map(|x| 3.0 * scale * x).collect();
                // As tokens of one call: the last row sees all, each before it one less.
                let queries: Vec<_> = (0..ROWS.min(n))
                    .map(|row| (row, &queries[row * dim..][..dim], n - (ROWS.min(n) - 1 - row)))
                    .collect();
                for cpu in Cpu::all() {
                    let cache = cache(cpu, dim, &keys, &values);
                    let got = cpu.run(Attend { dim, queries: &queries, cache: &cache });
                    for (row, query, n) in &queries {
                        let (want, bound) = twin(query, &cache, *n);
                        let what = format!("{cpu:?} {dim} dims, {n} positions");
                        assert_close(&finish(&got, *row, dim), &want, |d| bound[d], &what);
                        let alone = [(0, *query, *n)];
                        let alone = cpu.run(Attend { dim, queries: &alone, cache: &cache });
                        assert_eq!(finish(&alone, 0, dim), finish(&got, *row, dim), "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn codes_are_within_half_a_step_and_the_same_on_every_instruction_set() {
        for dim in [2, 32, 48, 64, 66, 256] {
            let n = 21;
            let (mut keys, mut values) = (random(n * dim, 4), random(n * dim, 5));
            keys[..dim].fill(0.0);
            keys[dim] = 1e4;
            values[2 * dim..3 * dim].fill(1e-42);
            values[3 * dim..4 * dim].fill(-0.25);
            let first = cache(Cpu::best(), dim, &keys, &values);
            for cpu in Cpu::all() {
                let cache = cache(cpu, dim, &keys, &values);
                let bytes = |lines: &[Line]| lines.iter().flat_map(|l| l.0).collect::<Vec<_>>();
                assert_eq!(bytes(&cache[0].k), bytes(&first[0].k), "{cpu:?}");
                assert_eq!(bytes(&cache[0].v), bytes(&first[0].v), "{cpu:?}");
                assert_eq!(cache[0].k_scales, first[0].k_scales, "{cpu:?}");
                assert_eq!(cache[0].v_scales, first[0].v_scales, "{cpu:?}");
                for position in 0..n {
                    let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
                    cache[0].get(position, &mut key, &mut value);
                    let check = |want: &[f32], got: &[f32]| {
                        let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let bound = largest / 127.0 * 0.5001 + 2.0 * f32::MIN_POSITIVE * 127.0;
                        let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
                        assert_close(got, &want, |_| bound.into(), &format!("{cpu:?} {position}"));
                    };
                    let at = position * dim;
                    for (want, got) in keys[at..at + dim].chunks(GROUP).zip(key.chunks(GROUP)) {
                        check(want, got);
                    }
                    check(&values[at..at + dim], &value);
                }
            }
        }
    }

    #[test]
    fn a_new_position_changes_no_older_one() {
        let (dim, n) = (48, 40);
        let (keys, values) = (random(n * dim, 6), random(n * dim, 7));
        let all = cache(Cpu::best(), dim, &keys, &values);
        let mut grown = Q8Positions::new(CHUNK, dim).unwrap();
        for i in (0..n).rev() {
            grown.put(Cpu::best(), i, &keys[i * dim..][..dim], &values[i * dim..][..dim]);
        }
        for (a, b) in all[0].k.iter().zip(&grown.k).chain(all[0].v.iter().zip(&grown.v)) {
            assert_eq!(a.0, b.0);
        }
        assert_eq!(all[0].k_scales, grown.k_scales);
        assert_eq!(all[0].v_scales, grown.v_scales);
        assert_eq!(grown.bytes(), Q8Positions::bytes_of(CHUNK, dim));
    }
}
