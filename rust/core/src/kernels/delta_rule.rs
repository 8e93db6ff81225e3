//! Gated delta rule (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464).
//!
//! For each value head, with state S [d_k, d_v], per token:
//!
//!     S <- exp(g) S;  e = beta (v - S^T k);  S <- S + k e^T;  y = S^T q
//!
//! S is stored in blocks of 16 columns, [d_v / 16, d_k, 16]: columns are independent, a block stays
//! in the first-level cache for all tokens of a call, and no product needs a horizontal sum.
//!
//! The update is deferred. A window of up to [`WINDOW`] tokens is pending: S is as it was before them. A pass
//! over a block takes the next chunk of tokens, up to [`Isa::DELTA_TOKENS`]. If they fit into the window, it
//! only reads S; otherwise it adds the update of the window to each row while it reads S, and they
//! are a new window. So single tokens write S once in a while. With G_t = g_1 + .. + g_t inside a
//! window,
//!
//!     e_t = beta_t (v_t - exp(G_t) S^T k_t - sum_{s<t} exp(G_t - G_s) (k_t . k_s) e_s)
//!     y_t = exp(G_t) S^T q_t + sum_{s<=t} exp(G_t - G_s) (q_t . k_s) e_s
//!     S  <- exp(G_A) S + sum_s exp(G_A - G_s) k_s e_s^T          (with the next window's pass)
//!
//! q and k arrive normalised, q scaled by d_k^(-1/2). All arithmetic is f32.

use super::{Ask, Columns, ColumnsMut, dot, load_some, store_some};
use crate::simd::{Isa, LANES};

/// The most tokens in a window, and in a chunk on any instruction set. With eight, single tokens would write
/// the states half as often, but read more keys and errors: on an Emerald Rapids they then took longer.
pub const WINDOW: usize = 4;

/// Bytes between the row in work and the one that memory is asked for. Of 4 to 24 KiB this was best on a
/// Zen 5, by 0.94 of the time with 8 KiB.
const STATE_AHEAD: usize = 12288;

/// Rows of a block that are asked for at once, an even number.
const ASK_ROWS: usize = 8;

/// Columns of state that a value head's rows are padded to.
pub fn padded(d_v: usize) -> usize {
    d_v.next_multiple_of(LANES)
}

/// Keys and queries of some tokens of one key head, as each of its value heads reads them.
#[derive(Clone, Default)]
pub struct KeyQueries {
    chunks: Vec<Chunk>,
    keys: Vec<f32>, // [tokens, d_k]
    d_k: usize,
}

#[derive(Clone, Default)]
struct Chunk {
    tokens: usize,
    /// Tokens that are pending already and stay so: the chunk joins their window.
    kept: usize,
    /// [d_k, 2, tokens]: a row's keys, then its queries.
    rows: Vec<f32>,
    /// k_t . k_s and q_t . k_s, where s counts the tokens of the window.
    kk: [[f32; WINDOW]; WINDOW],
    qk: [[f32; WINDOW]; WINDOW],
}

impl KeyQueries {
    /// Bytes on the heap for `tokens` tokens, at most.
    pub fn bytes_of(tokens: usize, d_k: usize) -> usize {
        tokens * (size_of::<Chunk>() + 4 * 3 * d_k)
    }

    /// Takes normalised keys and queries that follow those of `before`. q, k: [tokens, d_k].
    #[inline(always)]
    pub fn fill_isa<S: Isa>(
        &mut self,
        s: S,
        d_k: usize,
        q: &[f32],
        k: &[f32],
        before: &PendingKeys,
    ) {
        self.d_k = d_k;
        self.keys.clear();
        self.keys.extend_from_slice(k);
        let tokens = k.len() / d_k;
        self.chunks.resize_with(tokens.div_ceil(S::DELTA_TOKENS), Chunk::default);
        let joins = tokens <= S::DELTA_TOKENS && before.tokens + tokens <= WINDOW;
        for (c, chunk) in self.chunks.iter_mut().enumerate() {
            let first = c * S::DELTA_TOKENS;
            let n = S::DELTA_TOKENS.min(tokens - first);
            chunk.tokens = n;
            chunk.kept = if joins { before.tokens } else { 0 };
            chunk.rows.resize(2 * n * d_k, 0.0);
            let (k, q) = (&k[first * d_k..], &q[first * d_k..]);
            match n {
                1 => interleave::<1>(k, q, &mut chunk.rows),
                2 => interleave::<2>(k, q, &mut chunk.rows),
                3 => interleave::<3>(k, q, &mut chunk.rows),
                _ => interleave::<4>(k, q, &mut chunk.rows),
            }
            for t in 0..n {
                let (kt, qt) = (&k[t * d_k..][..d_k], &q[t * d_k..][..d_k]);
                let kept = before.keys.chunks_exact(d_k).take(chunk.kept);
                let own = k.chunks_exact(d_k).take(t + 1);
                for (u, ku) in kept.chain(own).enumerate() {
                    chunk.kk[t][u] = dot(s, kt, ku);
                    chunk.qk[t][u] = dot(s, qt, ku);
                }
            }
        }
    }
}

/// k, q: [T.., d_k]; out: [d_k, 2, T].
#[inline(always)]
fn interleave<const T: usize>(k: &[f32], q: &[f32], out: &mut [f32]) {
    let out: &mut [[[f32; T]; 2]] = out.as_chunks_mut::<T>().0.as_chunks_mut().0;
    let d_k = out.len();
    let mut k_rows: [&[f32]; T] = [&[]; T];
    let mut q_rows: [&[f32]; T] = [&[]; T];
    for t in 0..T {
        (k_rows[t], q_rows[t]) = (&k[t * d_k..][..d_k], &q[t * d_k..][..d_k]);
    }
    for (i, [k, q]) in out.iter_mut().enumerate() {
        for t in 0..T {
            (k[t], q[t]) = (k_rows[t][i], q_rows[t][i]);
        }
    }
}

/// The keys of the tokens that the state of a key head's value heads does not hold yet.
#[derive(Clone)]
pub struct PendingKeys {
    tokens: usize,
    keys: Vec<f32>, // [WINDOW, d_k]
}

impl PendingKeys {
    /// None yet.
    pub fn new(d_k: usize) -> PendingKeys {
        PendingKeys { tokens: 0, keys: vec![0.0; WINDOW * d_k] }
    }

    /// Asks for what [`KeyQueries::fill_isa`] reads.
    #[inline(always)]
    pub fn ask_isa<S: Isa>(&self, s: S, ask: Ask) {
        ask.lines(s, &self.keys[..self.keys.len() / WINDOW * self.tokens], usize::MAX);
    }

    /// To be called when all value heads have taken `next`.
    pub fn advance(&mut self, next: &KeyQueries) {
        if let Some(last) = next.chunks.last() {
            let keys = &next.keys[next.keys.len() - last.tokens * next.d_k..];
            self.keys[last.kept * next.d_k..][..keys.len()].copy_from_slice(keys);
            self.tokens = last.kept + last.tokens;
        }
    }

    /// To be called when all value heads have committed.
    pub fn clear(&mut self) {
        self.tokens = 0;
    }

    /// Bytes on the heap.
    pub fn bytes_of(d_k: usize) -> usize {
        4 * WINDOW * d_k
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&self.keys[..])
    }
}

/// Recurrent state of one value head.
#[derive(Clone)]
pub struct ValueHead {
    state: Vec<[f32; LANES]>,             // [d_v / 16, d_k]
    pending: Vec<[[f32; LANES]; WINDOW]>, // e_s of the window, [d_v / 16, WINDOW]
    /// exp(G_A - G_s) of the window.
    since: [f32; WINDOW],
    /// exp(G_A) of the window.
    decay: f32,
}

/// Factors of one chunk that do not depend on the column. s counts the tokens of the window.
#[derive(Clone, Copy, Default)]
struct Factors {
    decay: [f32; WINDOW],        // exp(G_t), from the start of the chunk
    kk: [[f32; WINDOW]; WINDOW], // exp(G_t - G_s) k_t . k_s
    qk: [[f32; WINDOW]; WINDOW], // exp(G_t - G_s) q_t . k_s
    since: [f32; WINDOW],        // exp(G_T - G_s)
}

impl Factors {
    /// gates: (g, beta) of the chunk's tokens; before: exp(G_t - G_s) of what is kept, up to the chunk.
    fn new(chunk: &Chunk, gates: &[(f32, f32)], before: &[f32; WINDOW]) -> Factors {
        let mut f = Factors::default();
        let mut product = 1.0;
        let mut since = [0.0; WINDOW];
        since[..chunk.kept].copy_from_slice(&before[..chunk.kept]);
        for t in 0..chunk.tokens {
            let decay = gates[t].0.exp();
            let now = chunk.kept + t;
            product *= decay;
            since[..now].iter_mut().for_each(|x| *x *= decay);
            since[now] = 1.0;
            f.decay[t] = product;
            for s in 0..=now {
                f.kk[t][s] = since[s] * chunk.kk[t][s];
                f.qk[t][s] = since[s] * chunk.qk[t][s];
            }
        }
        f.since = since;
        f
    }
}

impl ValueHead {
    /// The zero state.
    pub fn new(d_k: usize, d_v: usize) -> ValueHead {
        let blocks = padded(d_v) / LANES;
        ValueHead {
            state: vec![[0.0; LANES]; blocks * d_k],
            pending: vec![[[0.0; LANES]; WINDOW]; blocks],
            since: [0.0; WINDOW],
            decay: 1.0,
        }
    }

    /// Asks for what [`ValueHead::step_isa`] reads first. before: the pending keys from earlier.
    #[inline(always)]
    pub fn ask_isa<S: Isa>(&self, s: S, ask: Ask, before: &PendingKeys) {
        for pending in &self.pending {
            ask.lines(s, pending[..before.tokens].as_flattened(), usize::MAX);
        }
        ask.lines(s, self.state.as_flattened(), STATE_AHEAD);
    }

    /// Takes some tokens.
    ///
    /// ask: how to ask for the state; next: their keys and queries; before: the pending keys from
    /// earlier; gates: (g, beta) per token; v, y: [tokens.., d_v].
    #[inline(always)]
    pub fn step_isa<S: Isa>(
        &mut self,
        s: S,
        ask: Ask,
        (next, before): (&KeyQueries, &PendingKeys),
        gates: &[(f32, f32)],
        v: Columns<'_>,
        mut y: ColumnsMut<'_>,
    ) {
        const MAX_CHUNKS: usize = MAX_TOKENS;
        let d_k = next.d_k;
        assert!(next.chunks.len() <= MAX_CHUNKS && v.width == y.width);
        let mut factors = [Factors::default(); MAX_CHUNKS];
        let mut first = 0;
        for (f, chunk) in factors.iter_mut().zip(&next.chunks) {
            *f = Factors::new(chunk, &gates[first..], &self.since);
            first += chunk.tokens;
        }
        for (b, pending) in self.pending.iter_mut().enumerate() {
            let block = &mut self.state[b * d_k..][..d_k];
            let cols = b * LANES..((b + 1) * LANES).min(v.width);
            // Of the state before the window, until the update is added.
            let (mut decay, mut since) = (self.decay, &self.since);
            let (mut earlier, mut first) = ((before.tokens, &before.keys[..]), 0);
            for (c, (chunk, f)) in next.chunks.iter().zip(&factors).enumerate() {
                let (kept, n) = (chunk.kept, chunk.tokens);
                let update = if kept > 0 { 0 } else { earlier.0 };
                let window =
                    Window { decay, tokens: update, keys: earlier.1, errors: pending, since };
                // What the first pass has asked for is there for the next ones.
                let ask = if c == 0 { ask } else { Ask::No };
                let mut p = [s.splat(0.0); WINDOW];
                let mut o = [s.splat(0.0); WINDOW];
                // A window of more tokens than a chunk takes the code of a full one.
                let code = if update <= S::DELTA_TOKENS { update } else { WINDOW };
                macro_rules! passes {
                    ($($a:literal: $($t:literal)*;)*) => {
                        match (code, n) {
                            $($(($a, $t) if usize::max($a % WINDOW, $t) <= S::DELTA_TOKENS => {
                                pass::<S, $a, $t>(
                                    s, block, &window, &chunk.rows, ask,
                                    (&mut p[..$t]).try_into().expect("t products"),
                                    (&mut o[..$t]).try_into().expect("t products"),
                                )
                            })*)*
                            _ => unreachable!("chunks have 1 to DELTA_TOKENS tokens"),
                        }
                    };
                }
                passes!(0: 1 2 3 4; 1: 1 2 3 4; 2: 1 2 3 4; 3: 1 2 3 4; 4: 1 2 3 4;);
                if update > 0 {
                    decay = 1.0;
                }
                let mut e = [s.splat(0.0); WINDOW];
                for (e, kept) in e.iter_mut().zip(&pending[..kept]) {
                    *e = s.load(kept);
                }
                for t in 0..n {
                    let row = first + t;
                    let v = load_some(s, v.part(row, cols.clone()));
                    let decay = decay * f.decay[t];
                    let mut error = s.fma(p[t], s.splat(-decay), v);
                    let mut out = s.mul(o[t], s.splat(decay));
                    for u in 0..kept + t {
                        error = s.fma(e[u], s.splat(-f.kk[t][u]), error);
                        out = s.fma(e[u], s.splat(f.qk[t][u]), out);
                    }
                    let now = s.mul(error, s.splat(gates[row].1));
                    e[kept + t] = now;
                    out = s.fma(now, s.splat(f.qk[t][kept + t]), out);
                    store_some(s, out, y.part(row, cols.clone()));
                }
                for u in kept..kept + n {
                    s.store(e[u], &mut pending[u]);
                }
                (decay, since) = (decay * f.decay[n - 1], &f.since);
                earlier = (n, &next.keys[first * d_k..]);
                first += n;
            }
        }
        let mut tokens = before.tokens;
        for (chunk, f) in next.chunks.iter().zip(&factors) {
            if chunk.kept == 0 && tokens > 0 {
                self.decay = 1.0;
            }
            self.decay *= f.decay[chunk.tokens - 1];
            self.since = f.since;
            tokens = chunk.tokens;
        }
    }

    /// Adds the pending tokens to the state.
    pub fn commit(&mut self, before: &PendingKeys) {
        let d_k = self.state.len() / self.pending.len();
        for (block, pending) in self.state.chunks_exact_mut(d_k).zip(&mut self.pending) {
            for (i, row) in block.iter_mut().enumerate() {
                row.iter_mut().for_each(|x| *x *= self.decay);
                for t in 0..before.tokens {
                    let k = before.keys[t * d_k + i] * self.since[t];
                    row.iter_mut().zip(&pending[t]).for_each(|(x, e)| *x += k * e);
                }
            }
            *pending = [[0.0; LANES]; WINDOW];
        }
        self.decay = 1.0;
    }

    /// Bytes on the heap.
    pub fn bytes_of(d_k: usize, d_v: usize) -> usize {
        4 * padded(d_v) * (d_k + WINDOW)
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&self.state[..]) + size_of_val(&self.pending[..])
    }

    /// The committed state as [d_k, d_v].
    pub fn matrix(&self, d_v: usize) -> Vec<f32> {
        let d_k = self.state.len() / self.pending.len();
        let mut matrix = vec![0.0; d_k * d_v];
        for (i, row) in matrix.chunks_exact_mut(d_v).enumerate() {
            for (b, cols) in row.chunks_mut(LANES).enumerate() {
                cols.copy_from_slice(&self.state[b * d_k + i][..cols.len()]);
            }
        }
        matrix
    }

    /// Takes the state from [d_k, d_v]. There must be nothing pending.
    pub fn set_matrix(&mut self, matrix: &[f32], d_v: usize) {
        let d_k = self.state.len() / self.pending.len();
        assert_eq!(matrix.len(), d_k * d_v);
        for (i, row) in matrix.chunks_exact(d_v).enumerate() {
            for (b, cols) in row.chunks(LANES).enumerate() {
                self.state[b * d_k + i][..cols.len()].copy_from_slice(cols);
            }
        }
    }
}

/// The most tokens of one call of [`ValueHead::step_isa`].
pub const MAX_TOKENS: usize = 32;

/// The pending tokens, as a block of state takes them up.
struct Window<'a> {
    decay: f32,
    tokens: usize,
    keys: &'a [f32], // [tokens.., d_k]
    errors: &'a [[f32; LANES]; WINDOW],
    since: &'a [f32; WINDOW],
}

/// One pass over a block: adds the update of a window of up to A tokens to each row, if there are any, and
/// sums the row times the keys (p) and queries (o) of T tokens. ask: for what lies behind the block, as the
/// first pass does: of states from memory it takes 0.86 of the time.
#[inline(always)]
fn pass<S: Isa, const A: usize, const T: usize>(
    s: S,
    block: &mut [[f32; LANES]],
    window: &Window<'_>,
    next: &[f32],
    ask: Ask,
    p: &mut [S::F; T],
    o: &mut [S::F; T],
) {
    let d_k = block.len();
    let decay = s.splat(window.decay);
    let mut e = [decay; A];
    let mut keys: [&[f32]; A] = [&[]; A];
    for a in 0..A {
        // Those that are missing add nothing of the last key.
        let since = if a < window.tokens { window.since[a] } else { 0.0 };
        let last = a.min(window.tokens - 1);
        e[a] = s.mul(s.load(&window.errors[last]), s.splat(since));
        keys[a] = &window.keys[last * d_k..][..d_k];
    }
    let next: &[[[f32; T]; 2]] = next.as_chunks::<T>().0.as_chunks().0;
    // k: a row's number of each pending key.
    macro_rules! row {
        ($row:expr, $next:expr, $k:expr, $sums:expr) => {{
            let ([k, q], [p, o], row) = ($next, $sums, $row);
            let mut x = s.load(row);
            if A > 0 {
                x = s.mul(x, decay);
                for a in 0..A {
                    x = s.fma(e[a], s.splat($k(a)), x);
                }
                s.store(x, row);
            }
            for t in 0..T {
                p[t] = s.fma(x, s.splat(k[t]), p[t]);
                o[t] = s.fma(x, s.splat(q[t]), o[t]);
            }
        }};
    }
    // The two sums of one token would wait for themselves: those of even and odd rows are apart.
    let mut sums = [[[s.splat(0.0); T]; 2]; 2];
    let odd = usize::from(T == 1);
    let (pieces, rest) = block.as_chunks_mut::<ASK_ROWS>();
    let (next, next_rest) = next[..d_k].as_chunks::<ASK_ROWS>();
    let mut key_pieces: [&[[f32; ASK_ROWS]]; A] = [&[]; A];
    for a in 0..A {
        key_pieces[a] = &keys[a].as_chunks().0[..pieces.len()];
    }
    for (piece, (rows, next)) in pieces.iter_mut().zip(next).enumerate() {
        ask.lines_from(s, rows, STATE_AHEAD, ASK_ROWS);
        for even in (0..ASK_ROWS).step_by(2) {
            let k = |a: usize| key_pieces[a][piece][even];
            row!(&mut rows[even], &next[even], k, &mut sums[0]);
            let k = |a: usize| key_pieces[a][piece][even + 1];
            row!(&mut rows[even + 1], &next[even + 1], k, &mut sums[odd]);
        }
    }
    let first = d_k / ASK_ROWS * ASK_ROWS;
    for (i, (row, next)) in rest.iter_mut().zip(next_rest).enumerate() {
        row!(row, next, |a: usize| keys[a][first + i], &mut sums[0]);
    }
    for t in 0..T {
        p[t] = s.add(sums[0][0][t], sums[1][0][t]);
        o[t] = s.add(sums[0][1][t], sums[1][1][t]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, random};
    use crate::simd::{Cpu, Kernel};

    struct Step<'a> {
        d_k: usize,
        d_v: usize,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
        gates: &'a [(f32, f32)],
        ask: Ask,
        head: &'a mut ValueHead,
        pending: &'a mut PendingKeys,
        y: &'a mut [f32],
    }

    impl Kernel for Step<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Isa>(self, s: S) {
            let mut next = KeyQueries::default();
            next.fill_isa(s, self.d_k, self.q, self.k, self.pending);
            let (v, y) = (Columns::all(self.v, self.d_v), ColumnsMut::all(self.y, self.d_v));
            self.head.step_isa(s, self.ask, (&next, self.pending), self.gates, v, y);
            self.pending.advance(&next);
        }
    }

    /// The recurrence as it is defined, in f64.
    struct Twin {
        d_v: usize,
        s: Vec<f64>,
    }

    impl Twin {
        fn step(&mut self, q: &[f32], k: &[f32], v: &[f32], (g, beta): (f32, f32)) -> Vec<f64> {
            let d_v = self.d_v;
            self.s.iter_mut().for_each(|x| *x *= f64::from(g).exp());
            let read = |s: &[f64], x: &[f32], j: usize| -> f64 {
                x.iter().enumerate().map(|(i, x)| s[i * d_v + j] * f64::from(*x)).sum()
            };
            for j in 0..d_v {
                let e = f64::from(beta) * (f64::from(v[j]) - read(&self.s, k, j));
                for (i, k) in k.iter().enumerate() {
                    self.s[i * d_v + j] += f64::from(*k) * e;
                }
            }
            (0..d_v).map(|j| read(&self.s, q, j)).collect()
        }
    }

    fn unit_rows(mut x: Vec<f32>, d: usize) -> Vec<f32> {
        for row in x.chunks_exact_mut(d) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
        x
    }

    #[test]
    fn any_split_of_the_tokens_matches_the_recurrence() {
        for cpu in Cpu::all() {
            for (d_k, d_v) in [(4, 4), (128, 128), (32, 64), (24, 20), (600, 16)] {
                let tokens = 29;
                let k = unit_rows(random(tokens * d_k, 1), d_k);
                let q = unit_rows(random(tokens * d_k, 2), d_k);
                let v = random(tokens * d_v, 3);
                let gates: Vec<(f32, f32)> = random(tokens, 4)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| match i % 5 {
                        0 => (0.0, 1.0),
                        1 => (-1000.0, 0.5),
                        _ => (-x.abs(), 0.5 + 0.5 * x),
                    })
                    .collect();
                let mut twin = Twin { d_v, s: vec![0.0; d_k * d_v] };
                let mut want = Vec::new();
                for t in 0..tokens {
                    let row = |x: &[f32], d: usize| x[t * d..(t + 1) * d].to_vec();
                    want.extend(twin.step(&row(&q, d_k), &row(&k, d_k), &row(&v, d_v), gates[t]));
                }
                let splits = [
                    vec![29],
                    vec![1; 29],
                    vec![1, 2, 3, 4, 5, 6, 7, 1],
                    vec![3, 26],
                    // Windows of every size that one, several or many more tokens find.
                    vec![2, 2, 2, 1, 1, 1, 2, 2, 3, 13],
                    vec![1, 1, 1, 4, 1, 1, 3, 1, 2, 14],
                ];
                for split in splits {
                    let mut head = ValueHead::new(d_k, d_v);
                    let mut pending = PendingKeys::new(d_k);
                    let mut y = vec![f32::NAN; tokens * d_v];
                    let mut at = 0;
                    for n in split {
                        cpu.run(Step {
                            d_k,
                            d_v,
                            q: &q[at * d_k..(at + n) * d_k],
                            k: &k[at * d_k..(at + n) * d_k],
                            v: &v[at * d_v..(at + n) * d_v],
                            gates: &gates[at..at + n],
                            ask: Ask::ALL[at % Ask::ALL.len()],
                            head: &mut head,
                            pending: &mut pending,
                            y: &mut y[at * d_v..(at + n) * d_v],
                        });
                        at += n;
                    }
                    let what = format!("{cpu:?} {d_k}x{d_v}");
                    // States stay below 2; each of d_k terms rounds, and the tokens add up.
                    let bound = |_| 2e-6 * (d_k as f64).sqrt();
                    assert_close(&y, &want, bound, &what);
                    head.commit(&pending);
                    assert_close(&head.matrix(d_v), &twin.s, bound, &what);
                }
            }
        }
    }
}
