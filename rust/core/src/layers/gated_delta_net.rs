//! Gated DeltaNet, the linear-attention mixer (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464).
//!
//! Per token: projections q, k, v, z, b, a; a causal convolution and SiLU over q, k and v; L2 norm
//! of q and k per head; the gated delta rule; a gated RMS norm per value head; the output
//! projection. Which value heads read a key head is a matter of [`ValueOrder`]. A key head with its
//! value heads is one unit of work: nothing is shared between units, the state included.

use super::Context;
use super::linear::{Input, Matrix, project, project_named};
use crate::config::Config;
use crate::kernels::activation::gates;
use crate::kernels::conv1d::conv1d_silu_isa;
use crate::kernels::delta_rule::{KeyQueries, MAX_TOKENS};
use crate::kernels::norm::{gated_rms_norm_isa, l2_norm_isa};
use crate::kernels::{Ask, Columns, ColumnsMut};
use crate::pool::Tile;
use crate::profile::Part;
use crate::simd::{Isa, Kernel};
use crate::state::{KeyHead, lock};
use crate::trace::Trace;
use std::ops::Range;
use std::sync::Mutex;

pub struct GatedDeltaNet {
    pub in_proj_qkv: Matrix,
    pub in_proj_z: Matrix,
    pub in_proj_b: Matrix,
    pub in_proj_a: Matrix,
    /// Taps of the convolution, by key head: [kernel, channels] of q, of k and of the v of each
    /// value head.
    pub conv1d: Vec<Vec<Vec<f32>>>,
    pub rate: Vec<f32>,    // [h_v], -exp(A_log)
    pub dt_bias: Vec<f32>, // [h_v]
    pub norm: Vec<f32>,    // [d_v], not zero-centred
    pub out_proj: Matrix,
    pub heads: Heads,
}

/// How the weights number value heads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ValueOrder {
    /// Those of a key head are neighbours: head h reads key head h / (h_v / h_k).
    Grouped,
    /// Head h reads key head h mod h_k.
    Tiled,
}

/// Numbers and sizes of heads.
#[derive(Clone, Copy)]
pub struct Heads {
    pub keys: usize,
    pub values_per_key: usize,
    pub order: ValueOrder,
    pub d_k: usize,
    pub d_v: usize,
    pub eps: f32,
}

impl Heads {
    /// The number of the i-th value head of a key head.
    pub fn value(&self, key: usize, i: usize) -> usize {
        match self.order {
            ValueOrder::Grouped => key * self.values_per_key + i,
            ValueOrder::Tiled => i * self.keys + key,
        }
    }

    /// The columns of the projections that a part of a key head's convolution reads: q, k, the v of each value
    /// head.
    fn convolved(&self, key: usize, part: usize) -> Range<usize> {
        let (start, width) = match part {
            0 => (key * self.d_k, self.d_k),
            1 => ((self.keys + key) * self.d_k, self.d_k),
            _ => (2 * self.keys * self.d_k + self.value(key, part - 2) * self.d_v, self.d_v),
        };
        start..start + width
    }

    /// Asks for these columns of a row. Rows of a prompt lie too far apart for the hardware to follow.
    #[inline(always)]
    fn ask_convolved<S: Isa>(&self, s: S, key: usize, row: &[f32]) {
        for part in 0..2 + self.values_per_key {
            Ask::ToL2.lines(s, &row[self.convolved(key, part)], usize::MAX);
        }
    }

    /// The outputs of a token are this many rows, in each of which those of a key head lie
    /// together.
    fn rows(&self) -> usize {
        match self.order {
            ValueOrder::Grouped => 1,
            ValueOrder::Tiled => self.values_per_key,
        }
    }
}

/// Work space of one thread.
#[derive(Default)]
pub struct UnitScratch {
    q: Vec<f32>,            // [MAX_TOKENS, d_k]
    k: Vec<f32>,            // [MAX_TOKENS, d_k]
    v: Vec<f32>,            // [MAX_TOKENS, values_per_key, d_v]
    y: Vec<f32>,            // [MAX_TOKENS, d_v]
    gates: Vec<(f32, f32)>, // [MAX_TOKENS]
    key_queries: KeyQueries,
}

/// Work space of a call; what it held before does not matter.
pub struct Workspace<'a> {
    pub projected: &'a mut Vec<f32>, // [tokens, widths of the first projections]
    pub mixed: &'a mut Input,        // [tokens, h_v d_v]
    pub units: &'a [Mutex<UnitScratch>],
}

impl UnitScratch {
    /// Bytes on the heap.
    pub fn bytes_of(config: &Config) -> usize {
        let (d_k, d_v) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let row = 2 * d_k + (config.values_per_key() + 1) * d_v + 2;
        4 * MAX_TOKENS * row + KeyQueries::bytes_of(MAX_TOKENS, d_k)
    }
}

impl GatedDeltaNet {
    /// Adds the result for `x` to `residual`: [tokens, hidden].
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: &mut Input,
        state: &[Mutex<KeyHead>],
        work: Workspace<'_>,
        residual: &mut [f32],
    ) {
        let Workspace { projected, mixed, units } = work;
        let projections = [
            ("in_proj_qkv", &self.in_proj_qkv),
            ("in_proj_z", &self.in_proj_z),
            ("in_proj_b", &self.in_proj_b),
            ("in_proj_a", &self.in_proj_a),
        ];
        let width = project_named(ctx, projections, x, projected);
        let tokens = x.tokens();
        let [norms, products] = [Part::Norms, Part::Matrices].map(|part| ctx.under(part));
        let ctx = ctx.under(Part::DeltaRule);

        let Heads { keys, values_per_key, d_v, .. } = self.heads;
        mixed.reshape(tokens, keys * values_per_key * d_v);
        let rows = self.heads.rows();
        let unit_cols = values_per_key * d_v / rows;
        let (unit, projected) = ((tokens * rows, unit_cols), &projected[..]);
        let init = |thread: usize| lock(&units[thread]);
        ctx.run_tiles(&mut mixed.rows, keys * unit_cols, unit, init, |unit, y| {
            let key = y.cols().start / unit_cols;
            let mut state = lock(&state[key]);
            let unit = &mut **unit;
            ctx.cpu.run(Unit {
                layer: self,
                ctx,
                key,
                width,
                projected,
                state: &mut state,
                unit,
                y,
            });
        });
        mixed.prepare(norms, &[&self.out_proj]);
        project(products, &[&self.out_proj], mixed, true, residual);
    }
}

/// One key head and its value heads, all tokens of a call.
struct Unit<'a> {
    layer: &'a GatedDeltaNet,
    ctx: Context<'a>,
    key: usize,
    width: usize,
    projected: &'a [f32],
    state: &'a mut KeyHead,
    unit: &'a mut UnitScratch,
    y: Tile<'a>,
}

impl Kernel for Unit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Isa>(mut self, s: S) {
        let tokens = self.y.rows().len() / self.layer.heads.rows();
        let ask = self.ctx.reading.of_short_streams();
        // What is read from memory comes while the first of it is worked on.
        for (taps, state) in self.layer.conv1d[self.key].iter().zip(&self.state.conv) {
            ask.lines(s, taps, usize::MAX);
            ask.lines(s, state, usize::MAX);
        }
        self.state.pending.ask_isa(s, ask);
        for value in &self.state.values {
            value.ask_isa(s, ask, &self.state.pending);
        }
        for row in self.projected.chunks_exact(self.width).take(MAX_TOKENS) {
            self.layer.heads.ask_convolved(s, self.key, row);
        }
        let mut first = 0;
        while first < tokens {
            let n = MAX_TOKENS.min(tokens - first);
            self.tokens(s, first, n);
            first += n;
        }
    }
}

impl Unit<'_> {
    /// `n` tokens from `first`.
    #[inline(always)]
    fn tokens<S: Isa>(&mut self, s: S, first: usize, n: usize) {
        let (heads, ask) = (self.layer.heads, self.ctx.reading.of_short_streams());
        let Heads { values_per_key, d_k, d_v, eps, .. } = heads;
        let (key, width) = (self.key, self.width);
        let rows = &self.projected[first * width..];
        let mut later = rows[n * width..].chunks_exact(width).take(MAX_TOKENS);
        let v_width = values_per_key * d_v;
        let UnitScratch { q, k, v, y, gates: gate_values, key_queries } = &mut *self.unit;
        q.resize(n * d_k, 0.0);
        k.resize(n * d_k, 0.0);
        v.resize(n * v_width, 0.0);
        y.resize(n * d_v, 0.0);

        for (part, (taps, state)) in
            self.layer.conv1d[key].iter().zip(&mut self.state.conv).enumerate()
        {
            let y = match part {
                0 => ColumnsMut::all(q, d_k),
                1 => ColumnsMut::all(k, d_k),
                _ => {
                    let data = &mut v[(part - 2) * d_v..];
                    ColumnsMut { data, width: d_v, stride: v_width }
                }
            };
            let data = &rows[heads.convolved(key, part).start..];
            let x = Columns { data, width: y.width, stride: width };
            conv1d_silu_isa(s, n, taps, state, x, y);
        }
        if let Some(trace) = self.ctx.trace {
            trace_conv(trace, heads, key, first, [q, k, v]);
        }
        for (q, k) in q.chunks_exact_mut(d_k).zip(k.chunks_exact_mut(d_k)) {
            l2_norm_isa(s, 1.0 / (d_k as f32).sqrt(), q);
            l2_norm_isa(s, 1.0, k);
        }
        key_queries.fill_isa(s, d_k, q, k, &self.state.pending);

        let z_col = self.layer.in_proj_qkv.width();
        let b_col = z_col + self.layer.in_proj_z.width();
        let a_col = b_col + self.layer.in_proj_b.width();
        for (i, value_head) in self.state.values.iter_mut().enumerate() {
            let head = heads.value(key, i);
            let (rate, dt_bias) = (self.layer.rate[head], self.layer.dt_bias[head]);
            gate_values.clear();
            for row in rows.chunks_exact(width).take(n) {
                gate_values.push(gates(row[a_col + head], row[b_col + head], rate, dt_bias));
                // Rows lie too far apart for the hardware to follow.
                Ask::ToL2.lines(s, &row[z_col + head * d_v..][..d_v], usize::MAX);
                if let Some(row) = later.next() {
                    heads.ask_convolved(s, key, row);
                }
            }
            let v = Columns { data: &v[i * d_v..], width: d_v, stride: v_width };
            let out = ColumnsMut::all(y, d_v);
            let keys = (&*key_queries, &self.state.pending);
            value_head.step_isa(s, ask, keys, gate_values, v, out);
            if let Some(trace) = self.ctx.trace {
                let n_heads = self.layer.rate.len();
                let numbered = |rows| (first..).zip(rows);
                trace.layer_part(
                    "delta_out",
                    n_heads * d_v,
                    head * d_v,
                    numbered(y.chunks_exact(d_v)),
                );
                for (t, (g, beta)) in (first..).zip(&*gate_values) {
                    trace.layer_part("g", n_heads, head, std::iter::once((t, &[*g][..])));
                    trace.layer_part("beta", n_heads, head, std::iter::once((t, &[*beta][..])));
                }
            }
            for (t, y) in y.chunks_exact_mut(d_v).enumerate() {
                let z = &rows[t * width + z_col + head * d_v..][..d_v];
                gated_rms_norm_isa(s, z, &self.layer.norm, eps, y);
                let out = match heads.order {
                    ValueOrder::Grouped => &mut self.y.row(first + t)[i * d_v..][..d_v],
                    ValueOrder::Tiled => self.y.row((first + t) * values_per_key + i),
                };
                out.copy_from_slice(y);
            }
            if let Some(trace) = self.ctx.trace {
                let n_heads = self.layer.rate.len();
                let rows = (first..).zip(y.chunks_exact(d_v));
                trace.layer_part("gated_norm", n_heads * d_v, head * d_v, rows);
            }
        }
        self.state.pending.advance(key_queries);
    }
}

/// Records the convolved q, k and v of a key head, each alone and side by side.
fn trace_conv(trace: &Trace, heads: Heads, key: usize, first: usize, parts: [&[f32]; 3]) {
    let Heads { keys, values_per_key, d_k, d_v, .. } = heads;
    let conv_dim = (2 * d_k + values_per_key * d_v) * keys;
    let [q, k, v] = parts;
    for (name, data, column) in [("q", q, 0), ("k", k, keys * d_k)] {
        let rows = || (first..).zip(data.chunks_exact(d_k));
        trace.layer_part(name, keys * d_k, key * d_k, rows());
        trace.layer_part("conv_silu", conv_dim, column + key * d_k, rows());
    }
    for i in 0..values_per_key {
        let at = heads.value(key, i) * d_v;
        let rows = || {
            let rows = v.chunks_exact(values_per_key * d_v).map(|row| &row[i * d_v..][..d_v]);
            (first..).zip(rows)
        };
        trace.layer_part("v", keys * values_per_key * d_v, at, rows());
        trace.layer_part("conv_silu", conv_dim, 2 * keys * d_k + at, rows());
    }
}
