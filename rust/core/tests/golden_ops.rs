//! Every kernel against values of the reference implementation, on every instruction set.
//! `tests/golden/README.md` says how they were made. Cases are found by name, none is listed here.

use qdelta_core::budget::Budget;
use qdelta_core::kernels::activation::{gates, swiglu};
use qdelta_core::kernels::conv1d::conv1d_silu_isa;
use qdelta_core::kernels::delta_rule::{KeyQueries, MAX_TOKENS, PendingKeys, ValueHead};
use qdelta_core::kernels::matmul;
use qdelta_core::kernels::norm::{gated_rms_norm_isa, l2_norm_isa, rms_norm};
use qdelta_core::kernels::outputs::Outputs;
use qdelta_core::kernels::rope::{Rope, rotate};
use qdelta_core::kernels::{Ask, Columns, ColumnsMut};
use qdelta_core::layers::attention::{self, Attention, Positions, Workspace};
use qdelta_core::layers::linear::{Input, Matrix};
use qdelta_core::layers::{Context, per_thread};
use qdelta_core::pool::Pool;
use qdelta_core::quant::Format;
use qdelta_core::simd::{Cpu, Isa, Kernel};
use qdelta_core::state::{KV_CHUNK, KvFormat, KvHead};
use qdelta_core::tensor::Bytes;
use qdelta_core::trace::Trace;
use safetensors::SafeTensors;
use std::collections::BTreeSet;
use std::path::PathBuf;

struct Golden {
    data: Vec<u8>,
}

impl Golden {
    fn open(name: &str) -> Golden {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/ops");
        let path = folder.join(format!("{name}.safetensors"));
        Golden { data: std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")) }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.data).expect("a golden file is valid")
    }

    fn get(&self, name: &str) -> Vec<f32> {
        self.find(name).unwrap_or_else(|| panic!("no golden tensor {name}"))
    }

    fn find(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = self.tensors();
        let data = tensors.tensor(name).ok()?.data();
        Some(data.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }

    fn ints(&self, name: &str) -> Vec<usize> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        tensor.data().as_chunks().0.iter().map(|x| i64::from_le_bytes(*x) as usize).collect()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors().tensor(name).expect("a golden tensor").shape().to_vec()
    }

    fn metadata(&self, key: &str) -> String {
        let (_, metadata) = SafeTensors::read_metadata(&self.data).expect("a valid header");
        metadata.metadata().as_ref().expect("metadata")[key].clone()
    }

    /// What stands before `suffix` in names that end in it.
    fn cases(&self, suffix: &str) -> Vec<String> {
        let tensors = self.tensors();
        let names = tensors.names().into_iter().filter_map(|n| n.strip_suffix(suffix));
        let cases: BTreeSet<String> = names.map(str::to_owned).collect();
        assert!(!cases.is_empty(), "no golden case ends in {suffix}");
        cases.into_iter().collect()
    }
}

/// Every |got - want| is at most `tolerance` of the largest |want|.
fn assert_near(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let bound = tolerance * largest.max(1e-3);
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let ok = (got - want).abs() <= bound;
        assert!(ok, "{what}: position {i}: got {got}, expected {want}, bound {bound:e}");
    }
}

/// Runs a block on an instruction set, with the values named before it.
macro_rules! on {
    ($cpu:expr, $($name:ident: $type:ty = $value:expr),* ; $s:ident => $body:block) => {{
        struct Run<'a> { $($name: $type,)* marker: std::marker::PhantomData<&'a ()> }
        impl Kernel for Run<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Isa>(self, $s: S) {
                let Run { $($name,)* .. } = self;
                $body
            }
        }
        $cpu.run(Run { $($name: $value,)* marker: std::marker::PhantomData })
    }};
}

#[test]
fn norms() {
    let golden = Golden::open("norms");
    for cpu in Cpu::all() {
        for case in golden.cases(".weight") {
            let get = |part: &str| golden.get(&format!("{case}.{part}"));
            let (mut w, x) = (get("weight"), get("x"));
            let mut y = x.clone();
            if let Some(gate) = golden.find(&format!("{case}.gate")) {
                for (y, z) in y.chunks_exact_mut(w.len()).zip(gate.chunks_exact(w.len())) {
                    on!(cpu, y: &'a mut [f32] = y, z: &'a [f32] = z, w: &'a [f32] = &w; s => {
                        gated_rms_norm_isa(s, z, w, 1e-6, y);
                    });
                }
            } else {
                w.iter_mut().for_each(|w| *w += 1.0);
                rms_norm(cpu, &x, &w, 1e-6, &mut y);
            }
            assert_near(&y, &get("out"), 1e-5, &format!("{cpu:?} {case}"));
        }
    }
}

#[test]
fn l2_norm() {
    let golden = Golden::open("l2norm");
    let width = golden.shape("x")[1];
    for cpu in Cpu::all() {
        let mut y = golden.get("x");
        for y in y.chunks_exact_mut(width) {
            on!(cpu, y: &'a mut [f32] = y; s => { l2_norm_isa(s, 1.0, y); });
        }
        assert_near(&y, &golden.get("out"), 1e-5, &format!("{cpu:?}"));
    }
}

#[test]
fn gdn_gates() {
    let golden = Golden::open("gdn_gates");
    let (a, b) = (golden.get("a"), golden.get("b"));
    let (a_log, dt_bias) = (golden.get("A_log"), golden.get("dt_bias"));
    let rate: Vec<f32> = a_log.iter().map(|a| -a.exp()).collect();
    let heads = rate.len();
    let pairs = (0..a.len()).map(|i| gates(a[i], b[i], rate[i % heads], dt_bias[i % heads]));
    let (g, beta): (Vec<f32>, Vec<f32>) = pairs.unzip();
    assert_near(&g, &golden.get("g"), 1e-5, "g");
    assert_near(&beta, &golden.get("beta"), 1e-5, "beta");
}

#[test]
fn mlp() {
    let golden = Golden::open("mlp");
    let product = |cpu, name: &str, x: &[f32]| {
        let shape = golden.shape(name);
        let w: Vec<u8> = golden.get(name).iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut y = vec![0.0; x.len() / shape[1] * shape[0]];
        for (x, y) in x.chunks(4 * shape[1]).zip(y.chunks_mut(4 * shape[0])) {
            matmul::float(cpu, Format::F32, &w, shape[1], x, Outputs::of(y, shape[0]));
        }
        y
    };
    let x = golden.get("x");
    for cpu in Cpu::all() {
        let gate = product(cpu, "gate_proj.weight", &x);
        let mut hidden = product(cpu, "up_proj.weight", &x);
        swiglu(cpu, &gate, &mut hidden);
        let y = product(cpu, "down_proj.weight", &hidden);
        assert_near(&y, &golden.get("out"), 1e-5, &format!("{cpu:?}"));
    }
}

#[test]
fn conv1d_silu() {
    let golden = Golden::open("conv1d_silu");
    for cpu in Cpu::all() {
        for case in golden.cases(".x") {
            let kernel = case.split('.').next().expect("a name has parts");
            let weight = golden.get(&format!("{kernel}.weight"));
            let x = golden.get(&format!("{case}.x"));
            let channels = golden.shape(&format!("{case}.x"))[1];
            let taps = weight.len() / channels;
            // [channels, n] to [n - skip, channels].
            let turned = |w: &[f32], n: usize, skip: usize| -> Vec<f32> {
                let row = |j: usize| (0..channels).map(move |c| w[c * n + j]);
                (skip..n).flat_map(row).collect()
            };
            let weight = turned(&weight, taps, 0);
            for (state_in, out) in [(None, "out"), (Some("state_in"), "out_with_state")] {
                let mut state = match state_in {
                    None => vec![0.0; (taps - 1) * channels],
                    // The reference keeps one input more than matters.
                    Some(name) => turned(&golden.get(&format!("{case}.{name}")), taps, 1),
                };
                let tokens = x.len() / channels;
                let mut y = vec![f32::NAN; x.len()];
                on!(cpu, w: &'a [f32] = &weight, state: &'a mut [f32] = &mut state,
                    x: &'a [f32] = &x, y: &'a mut [f32] = &mut y, tokens: usize = tokens,
                    channels: usize = channels; s => {
                    let (x, y) = (Columns::all(x, channels), ColumnsMut::all(y, channels));
                    conv1d_silu_isa(s, tokens, w, state, x, y);
                });
                let what = format!("{cpu:?} {case} {out}");
                assert_near(&y, &golden.get(&format!("{case}.{out}")), 1e-5, &what);
                if state_in.is_some() {
                    let want = turned(&golden.get(&format!("{case}.state_out")), taps, 1);
                    assert_eq!(state, want, "{what}: the state is copied, not computed");
                }
            }
        }
    }
}

fn delta_rule_file(name: &str) {
    let golden = Golden::open(name);
    for cpu in Cpu::all() {
        for case in golden.cases(".beta") {
            let get = |part: &str| golden.get(&format!("{case}.{part}"));
            let (q, k, v, g, beta) = (get("q"), get("k"), get("v"), get("g"), get("beta"));
            let shape = |part: &str| golden.shape(&format!("{case}.{part}"));
            let (k_shape, v_shape) = (shape("k"), shape("v"));
            let (tokens, keys, d_k) = (k_shape[0], k_shape[1], k_shape[2]);
            let (values, d_v) = (v_shape[1], v_shape[2]);
            let initial = golden.find(&format!("{case}.initial_state"));
            let (mut out, mut state) = (vec![0.0; v.len()], Vec::new());
            for head in 0..values {
                let key = head / (values / keys);
                let take = |x: &[f32], n: usize, i: usize, d: usize| -> Vec<f32> {
                    (0..tokens).flat_map(|t| x[(t * n + i) * d..][..d].to_vec()).collect()
                };
                let (mut q, mut k) = (take(&q, keys, key, d_k), take(&k, keys, key, d_k));
                let v = take(&v, values, head, d_v);
                let gates: Vec<(f32, f32)> =
                    (0..tokens).map(|t| (g[t * values + head], beta[t * values + head])).collect();
                let mut value = ValueHead::new(d_k, d_v);
                if let Some(initial) = &initial {
                    value.set_matrix(&initial[head * d_k * d_v..][..d_k * d_v], d_v);
                }
                let mut pending = PendingKeys::new(d_k);
                let mut y = vec![0.0; tokens * d_v];
                on!(cpu, q: &'a mut [f32] = &mut q, k: &'a mut [f32] = &mut k, v: &'a [f32] = &v,
                    gates: &'a [(f32, f32)] = &gates, value: &'a mut ValueHead = &mut value,
                    pending: &'a mut PendingKeys = &mut pending, y: &'a mut [f32] = &mut y,
                    d_k: usize = d_k, d_v: usize = d_v; s => {
                    let scale = 1.0 / (d_k as f32).sqrt();
                    q.chunks_exact_mut(d_k).for_each(|q| l2_norm_isa(s, scale, q));
                    k.chunks_exact_mut(d_k).for_each(|k| l2_norm_isa(s, 1.0, k));
                    let mut next = KeyQueries::default();
                    for first in (0..gates.len()).step_by(MAX_TOKENS) {
                        let end = (first + MAX_TOKENS).min(gates.len());
                        let (k_part, v_part) = (first * d_k..end * d_k, first * d_v..end * d_v);
                        next.fill_isa(s, d_k, &q[k_part.clone()], &k[k_part], pending);
                        let gates = &gates[first..end];
                        let v = Columns::all(&v[v_part.clone()], d_v);
                        let y = ColumnsMut::all(&mut y[v_part], d_v);
                        value.step_isa(s, Ask::No, (&next, pending), gates, v, y);
                        pending.advance(&next);
                    }
                });
                for (t, y) in y.chunks_exact(d_v).enumerate() {
                    out[(t * values + head) * d_v..][..d_v].copy_from_slice(y);
                }
                value.commit(&pending);
                state.extend(value.matrix(d_v));
            }
            let what = format!("{cpu:?} {case}");
            assert_near(&out, &get("out"), 1e-5, &format!("{what} out"));
            assert_near(&state, &get("final_state"), 1e-5, &format!("{what} state"));
        }
    }
}

#[test]
fn delta_rule() {
    delta_rule_file("delta_rule");
}

#[test]
fn delta_rule_extreme() {
    delta_rule_file("delta_rule_extreme");
}

#[test]
fn mrope() {
    let golden = Golden::open("mrope");
    let theta: f64 = golden.metadata("rope_theta").parse().expect("a number");
    for case in golden.cases(".position_ids") {
        let head = case.split('.').next().expect("a name has parts");
        let get = |part: &str| golden.get(&format!("{case}.{part}"));
        let section: [usize; 3] =
            golden.ints(&format!("{head}.mrope_section")).try_into().expect("three sections");
        let inv_freq = golden.get(&format!("{head}.inv_freq"));
        let n = inv_freq.len();
        let rope = Rope::new(theta, 2 * n, section, None);
        for (got, want) in rope.frequencies().zip(&inv_freq) {
            assert_eq!(got, *want, "{case}");
        }
        let positions = golden.ints(&format!("{case}.position_ids"));
        let tokens = positions.len() / 3;
        let mut angles = Vec::new();
        for t in 0..tokens {
            let at = |axis: usize| positions[axis * tokens + t];
            rope.angles([at(0), at(1), at(2)], &mut angles);
        }
        let width = get("cos").len() / tokens;
        for (name, part) in [("cos", 0), ("sin", 1)] {
            for (i, want) in get(name).iter().enumerate() {
                let (t, i) = (i / width, i % width % n);
                let got = angles[t * n + i][part];
                let ok = (got - want).abs() <= 1e-6;
                assert!(ok, "{case} {name} token {t} frequency {i}: got {got}, expected {want}");
            }
        }
        for name in ["q", "k"] {
            let (mut x, want) = (get(name), get(&format!("{name}_rot")));
            let shape = golden.shape(&format!("{case}.{name}"));
            let dim = *shape.last().expect("a shape");
            // [tokens, heads, dim] or [heads, tokens, dim], as the file says.
            let tokens_first = shape[shape.len() - 3] == tokens;
            let heads = x.len() / dim / tokens;
            for (i, x) in x.chunks_exact_mut(dim).enumerate() {
                let t = if tokens_first { i / heads } else { i % tokens };
                rotate(&angles[t * n..][..n], x);
            }
            assert_near(&x, &want, 1e-5, &format!("{case} {name}"));
        }
    }
}

#[test]
fn attention_block() {
    let golden = Golden::open("attention");
    let number = |key: &str| golden.metadata(key).parse::<f64>().expect("a number");
    let count = |key: &str| number(key) as usize;
    let (heads, kv, dim) = (count("heads"), count("kv_heads"), count("head_dim"));
    let matrix = |name: &str| {
        let shape = golden.shape(name);
        let bytes: Vec<u8> = golden.get(name).iter().flat_map(|w| w.to_le_bytes()).collect();
        let (rows, cols, bytes) = (shape[0], shape[1], Bytes::from(bytes));
        Matrix { format: Format::F32, rows, cols, bytes, scales: None }
    };
    let norm = |name: &str| golden.get(name).iter().map(|w| w + 1.0).collect::<Vec<f32>>();
    let layer = Attention {
        q_proj: matrix("q_proj.weight"),
        k_proj: matrix("k_proj.weight"),
        v_proj: matrix("v_proj.weight"),
        o_proj: matrix("o_proj.weight"),
        q_norm: norm("q_norm.weight"),
        k_norm: norm("k_norm.weight"),
        heads: attention::Heads {
            kv,
            queries_per_kv: heads / kv,
            dim,
            eps: number("rms_norm_eps") as f32,
        },
    };
    let rotary = (dim as f64 * number("partial_rotary_factor")) as usize;
    let rope = Rope::new(number("rope_theta"), rotary, [rotary / 2, 0, 0], None);
    let (x, want) = (golden.get("x"), golden.get("out"));
    let hidden = golden.shape("x")[1];
    let want_before_gate = golden.get("attn_out_before_gate");
    for cpu in Cpu::all() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let team = pool.team();
            let mut cache = vec![KvHead::default(); kv];
            let tiles = per_thread(threads);
            let (mut out, mut before_gate, mut past) = (vec![0.0; x.len()], Vec::new(), 0);
            for call in golden.ints("calls") {
                let trace = Trace::default();
                let ctx = Context { trace: Some(&trace), ..Context::new(cpu, &team) };
                let mut angles = Vec::new();
                (past..past + call).for_each(|p| rope.angles([p; 3], &mut angles));
                for head in &mut cache {
                    let bytes = (past + call).div_ceil(KV_CHUNK) * KvFormat::F32.chunk_bytes(dim);
                    let mut held = Budget::new(None).hold(bytes).expect("no limit");
                    head.grow((past, past + call), KvFormat::F32, dim, &mut held).expect("memory");
                }
                let mut input = Input::default();
                input.reshape(call, hidden);
                input.rows.copy_from_slice(&x[past * hidden..(past + call) * hidden]);
                layer.forward(
                    ctx,
                    &mut input,
                    &mut cache,
                    Positions { past, angles: &angles, rotary: rope.len() },
                    Workspace {
                        projected: &mut Vec::new(),
                        mixed: &mut Input::default(),
                        parts: &mut Vec::new(),
                        tiles: &tiles,
                    },
                    &mut out[past * hidden..(past + call) * hidden],
                );
                before_gate.extend_from_slice(&trace.into_values()["layer.0.attn_out"].data);
                past += call;
            }
            let what = format!("{cpu:?} {threads} threads");
            assert_near(&out, &want, 1e-4, &what);
            assert_near(&before_gate, &want_before_gate, 1e-4, &what);
            let (keys, values) = (golden.get("cache_key"), golden.get("cache_value"));
            let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
            let rows = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
            for (i, (want_key, want_value)) in rows.enumerate() {
                cache[i / past].chunks[0].get(i % past, &mut key, &mut value);
                assert_near(&key, want_key, 1e-4, &what);
                assert_near(&value, want_value, 1e-4, &what);
            }
        }
    }
}
