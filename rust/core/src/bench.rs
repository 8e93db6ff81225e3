//! Kernels on their own, and what the machine could do at best.

use crate::error::{Error, Result};
use crate::kernels::attention::{self, Partial, ROWS};
use crate::kernels::attention_q8::{self, Q8Positions, Q8Rows};
use crate::kernels::delta_rule::{KeyQueries, MAX_TOKENS, PendingKeys, ValueHead, WINDOW};
use crate::kernels::matmul;
use crate::kernels::outputs::Outputs;
use crate::kernels::quantize::QuantTile;
use crate::kernels::unpacked::{self, Unpacked};
use crate::kernels::{AHEAD, Ask, Columns, ColumnsMut, FEW_TOKENS, Reading, ask_ahead};
use crate::pool::Pool;
use crate::quant::float::F16;
use crate::quant::two_planes::Planes;
use crate::quant::{Format, PANEL_ROWS};
use crate::random::Random;
use crate::simd::{Cpu, Isa, Kernel, LANES, TILE_TOKENS};
use crate::state::KV_CHUNK;
use crate::tensor::AlignedBuf;
use std::time::{Duration, Instant};

/// The matrix format called `name`.
pub fn format_named(name: &str) -> Result<Format> {
    let formats = || [Format::Bf16, Format::F16, Format::F32].into_iter().chain(Format::PACKED);
    formats().find(|format| format.name() == name).ok_or_else(|| {
        let names = formats().map(Format::name).collect::<Vec<_>>().join(", ");
        Error::Argument(format!("format is `{name}`, expected one of: {names}"))
    })
}

/// The way to ask for weights called `name`.
pub fn ask_named(name: &str) -> Result<Ask> {
    match name {
        "no" => Ok(Ask::No),
        "l1" => Ok(Ask::ToL1),
        "l2" => Ok(Ask::ToL2),
        "once" => Ok(Ask::Once),
        _ => Err(Error::Argument(format!("ask is `{name}`, expected one of: no, l1, l2, once"))),
    }
}

/// Time of `repeats` products of a random matrix with `tokens` rows. reading: of the weights, by the
/// first tile of tokens.
pub fn matmul(
    cpu: Cpu,
    format: Format,
    (rows, cols): (usize, usize),
    tokens: usize,
    reading: Reading,
    repeats: usize,
) -> Duration {
    let mut random = Random::new(1);
    let rows = rows.next_multiple_of(PANEL_ROWS);
    let mut w = AlignedBuf::new(format.bytes(rows, cols));
    for (plane, bytes) in format.split(&mut w).into_iter().enumerate() {
        random.fill_plane((format, cols), plane, 0.02, bytes);
    }
    let mut x = vec![0.0; tokens * cols];
    random.fill(1.0, &mut x);
    let mut y = vec![0.0; TILE_TOKENS * rows];
    if !format.is_packed() {
        let start = Instant::now();
        for _ in 0..repeats {
            for x in x.chunks(TILE_TOKENS * cols) {
                let y = &mut y[..x.len() / cols * rows];
                matmul::float(cpu, format, &w, cols, x, Outputs::of(y, rows));
                std::hint::black_box(y);
            }
        }
        return start.elapsed();
    }
    let tiles: Vec<QuantTile> = x
        .chunks(TILE_TOKENS * cols)
        .map(|x| {
            let mut tile = QuantTile::default();
            tile.quantize(cpu, x, cols);
            tile
        })
        .collect();
    let start = Instant::now();
    let many = tokens > FEW_TOKENS && unpacked::layout(format).is_some();
    let mut panels = Unpacked::default();
    for _ in 0..repeats {
        if many && format.is_in_planes() {
            panels.set_planes(cpu, Planes::new(format, &w), cols, reading.ask);
        } else if many {
            panels.set(cpu, format, &w, cols, reading.ask);
        }
        for (i, tile) in tiles.iter().enumerate() {
            let y = &mut y[..tile.tokens() * rows];
            if many {
                unpacked::product(cpu, &panels, tile, Outputs::of(y, rows));
                std::hint::black_box(y);
                continue;
            }
            let reading = if i == 0 { reading } else { Reading::PLAIN };
            matmul::packed(cpu, format, &w, cols, tile, reading, Outputs::of(y, rows));
            std::hint::black_box(y);
        }
    }
    start.elapsed()
}

/// Time of `repeats` steps of `tokens` tokens on `heads` states of 128 x 128, each with its own
/// keys and queries.
pub fn delta_rule(cpu: Cpu, heads: usize, tokens: usize, ask: Ask, repeats: usize) -> Duration {
    const D: usize = 128;
    let tokens = tokens.clamp(1, MAX_TOKENS);
    let mut random = Random::new(2);
    let mut draw = |n: usize| {
        let mut x = vec![0.0; n];
        random.fill(0.1, &mut x);
        x
    };
    let mut step = Step {
        heads: (0..heads).map(|_| (ValueHead::new(D, D), PendingKeys::new(D))).collect(),
        q: draw(tokens * D),
        k: draw(tokens * D),
        v: draw(tokens * D),
        y: vec![0.0; tokens * D],
        gates: vec![(-0.1, 0.5); tokens],
        ask,
    };
    // Once through the window, so that all memory has been written.
    for _ in 0..WINDOW + 1 {
        cpu.run(&mut step);
    }
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
    ask: Ask,
}

impl Kernel for &mut Step {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let mut next = KeyQueries::default();
        for (head, pending) in &mut self.heads {
            let d = self.v.len() / self.gates.len();
            pending.ask_isa(s, self.ask);
            head.ask_isa(s, self.ask, pending);
            next.fill_isa(s, d, &self.q, &self.k, pending);
            let (v, y) = (Columns::all(&self.v, d), ColumnsMut::all(&mut self.y, d));
            head.step_isa(s, self.ask, (&next, pending), &self.gates, v, y);
            pending.advance(&next);
        }
    }
}

/// Time of `repeats` passes of four queries over `chunks` chunks of [`KV_CHUNK`] positions of one head
/// of 256 dimensions, kept as bytes or as f16.
pub fn attention(
    cpu: Cpu,
    bytes: bool,
    chunks: usize,
    ask: Ask,
    repeats: usize,
) -> Result<Duration> {
    const D: usize = 256;
    let mut random = Random::new(3);
    let mut row = || {
        let mut x = vec![0.0; D];
        random.fill(1.0, &mut x);
        x
    };
    let (mut q8, mut float) = (Vec::new(), Vec::new());
    for _ in 0..chunks {
        if bytes {
            let mut chunk = Q8Positions::new(KV_CHUNK, D)?;
            (0..KV_CHUNK).for_each(|position| chunk.put(cpu, position, &row(), &row()));
            q8.push(chunk);
        } else {
            let f16s = |x: f32| half::f16::from_f32(x).to_le_bytes();
            float.push((0..2 * KV_CHUNK).flat_map(|_| row()).flat_map(f16s).collect());
        }
    }
    let queries: [Vec<f32>; ROWS] = std::array::from_fn(|_| row());
    let mut work = Attend {
        q8,
        float,
        queries: (0..D).map(|d| std::array::from_fn(|r| queries[r][d] / 16.0)).collect(),
        queries_q8: Q8Rows::default(),
        scores: vec![0.0; ROWS * KV_CHUNK],
        probabilities: Q8Rows::default(),
        partial: Partial::new(D),
        ask,
    };
    let start = Instant::now();
    for _ in 0..repeats {
        cpu.run(&mut work);
    }
    Ok(start.elapsed())
}

struct Attend {
    q8: Vec<Q8Positions>,
    float: Vec<Vec<u8>>, // keys, then values
    queries: Vec<[f32; ROWS]>,
    queries_q8: Q8Rows,
    scores: Vec<f32>,
    probabilities: Q8Rows,
    partial: Partial,
    ask: Ask,
}

impl Kernel for &mut Attend {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, s: S) {
        let Attend { q8, float, queries, queries_q8, scores, probabilities, partial, ask } = self;
        partial.reset();
        let seen = [KV_CHUNK; ROWS];
        queries_q8.reset(queries.len(), attention_q8::GROUP);
        for r in 0..ROWS {
            let query: Vec<f32> = queries.iter().map(|q| q[r]).collect();
            queries_q8.set_isa(s, r, &query, attention_q8::GROUP);
        }
        for (i, chunk) in q8.iter().enumerate() {
            let cache = (chunk, q8.get(i + 1), *ask);
            attention_q8::attend_isa(s, queries_q8, cache, &seen, scores, probabilities, partial);
        }
        for (i, chunk) in float.iter().enumerate() {
            let (k, v) = chunk.split_at(chunk.len() / 2);
            let cache = (k, v, float.get(i + 1).map_or(&[][..], |next| next), *ask);
            attention::attend_isa::<S, F16>(s, queries, cache, &seen, scores, partial);
        }
        std::hint::black_box(&partial.out);
    }
}

/// What a region costs beside its work: the median, over many regions in which each thread has one
/// chunk of 5 us, of the time beyond these 5 us.
pub fn fork_join(threads: usize) -> Duration {
    const REGIONS: usize = 1000;
    const WORK: Duration = Duration::from_micros(5);
    let pool = Pool::new(threads);
    let team = pool.team();
    let work = |(): &mut (), _| {
        let start = Instant::now();
        while start.elapsed() < WORK {}
    };
    let mut times: Vec<Duration> = (0..REGIONS)
        .map(|_| {
            let start = Instant::now();
            team.run(threads, |_| (), work);
            start.elapsed()
        })
        .collect();
    *times.select_nth_unstable(REGIONS / 2).1 - WORK
}

/// What the machine could do at best, measured on memory and on registers.
pub struct Limits {
    /// Bytes per second that one thread reads from memory, and all of them together.
    pub read_one: f64,
    pub read_all: f64,
    /// Operations per second of one thread, two for a multiplication with its addition: dot
    /// products of bytes, and f32.
    pub int8_peak: f64,
    pub f32_peak: f64,
}

/// More than any last-level cache of a laptop, by far.
const READ_BYTES: usize = 384 << 20;

/// Measures for about a second.
pub fn limits(cpu: Cpu, threads: usize) -> Limits {
    let mut buffer = AlignedBuf::new(READ_BYTES);
    // Written, so that each page is its own and not the system's page of zeros.
    buffer.chunks_exact_mut(64).for_each(|line| line[0] = 1);
    // What the hardware does by itself, and what a program asks for: the fastest way is the limit.
    let read = |pool: &Pool| {
        let ways = Ask::ALL.into_iter().cycle().take(5 * Ask::ALL.len());
        let best = ways.map(|ask| read_time(cpu, pool, &buffer, ask)).min();
        READ_BYTES as f64 / best.unwrap_or(Duration::MAX).as_secs_f64()
    };
    let peak = |kernel: &dyn Fn(usize) -> f64| {
        let rate = |_| {
            let start = Instant::now();
            kernel(PEAK_ROUNDS) / start.elapsed().as_secs_f64()
        };
        (0..5).map(rate).fold(0.0, f64::max)
    };
    Limits {
        read_one: read(&Pool::new(1)),
        read_all: read(&Pool::new(threads)),
        int8_peak: peak(&|rounds| cpu.run(Int8Peak { rounds })),
        f32_peak: peak(&|rounds| cpu.run(F32Peak { rounds })),
    }
}

const PEAK_ROUNDS: usize = 1 << 20;

fn read_time(cpu: Cpu, pool: &Pool, buffer: &[u8], ask: Ask) -> Duration {
    const PART: usize = 1 << 20;
    let parts = buffer.len() / PART;
    let start = Instant::now();
    pool.team().run(
        parts,
        |_| (),
        |(), part| {
            std::hint::black_box(cpu.run(Read { bytes: &buffer[part * PART..][..PART], ask }));
        },
    );
    start.elapsed()
}

struct Read<'a> {
    bytes: &'a [u8],
    ask: Ask,
}

impl Kernel for Read<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Isa>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        let lines: &[[u8; 4 * LANES]] = self.bytes.as_chunks().0;
        for (n, lines) in lines.as_chunks::<4>().0.iter().enumerate() {
            let size = size_of_val(lines);
            ask_ahead(s, self.ask, self.bytes, n * size + AHEAD, size, (0, 1));
            for i in 0..4 {
                sums[i] = s.add(sums[i], s.load_f32(&lines[i]));
            }
        }
        s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

/// Calls `$self.$sums::<S, n>` with as many independent sums as hide an instruction's latency on two ports
/// and fit the registers. A vector of narrow registers is several sums by itself.
macro_rules! with_sums {
    ($self:ident.$sums:ident($s:ident, $isa:ident)) => {
        if $isa::REGISTERS >= 32 { $self.$sums::<$isa, 12>($s) } else { $self.$sums::<$isa, 6>($s) }
    };
}

struct Int8Peak {
    rounds: usize,
}

impl Int8Peak {
    #[inline(always)]
    fn sums<S: Isa, const N: usize>(&self, s: S) -> f64 {
        let codes = s.load_bytes(std::hint::black_box(&[1; 4 * LANES]));
        // Other factors in each product, so that none is taken out of the loop.
        let x: [[i8; 4]; 64] = std::hint::black_box(std::array::from_fn(|i| [i as i8; 4]));
        let mut acc = [s.start_nibbles(0); N];
        for round in 0..self.rounds {
            for i in 0..N {
                let x = s.splat_bytes(x[(round + i) % x.len()]);
                acc[i] = s.dot_nibbles(acc[i], codes, x);
            }
        }
        for acc in acc {
            std::hint::black_box(s.sum_i32(s.end_nibbles(acc, 0)));
        }
        (self.rounds * N * LANES * 4 * 2) as f64
    }
}

impl Kernel for Int8Peak {
    /// Operations done.
    type Output = f64;
    #[inline(always)]
    fn run<S: Isa>(self, s: S) -> f64 {
        with_sums!(self.sums(s, S))
    }
}

struct F32Peak {
    rounds: usize,
}

impl F32Peak {
    #[inline(always)]
    fn sums<S: Isa, const N: usize>(&self, s: S) -> f64 {
        let a = s.splat(std::hint::black_box(1.0));
        let b = s.splat(std::hint::black_box(1e-9));
        let mut acc = [a; N];
        for _ in 0..self.rounds {
            for i in 0..N {
                acc[i] = s.fma(acc[i], a, b);
            }
        }
        for acc in acc {
            std::hint::black_box(s.sum(acc));
        }
        (self.rounds * N * LANES * 2) as f64
    }
}

impl Kernel for F32Peak {
    /// Operations done.
    type Output = f64;
    #[inline(always)]
    fn run<S: Isa>(self, s: S) -> f64 {
        with_sums!(self.sums(s, S))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_plausible_on_every_instruction_set() {
        for cpu in Cpu::all() {
            let limits = limits(cpu, 2);
            for rate in [limits.read_one, limits.read_all, limits.int8_peak, limits.f32_peak] {
                // Slower or faster than any computer of this century is a defect of the probe.
                assert!(rate > 1e6 && rate < 1e15, "{cpu:?} {rate:e}");
            }
        }
    }
}
