//! One decoder layer: x += mixer(norm(x)); x += mlp(norm(x)).

use super::attention::{self, Attention, Positions, TileScratch};
use super::gated_delta_net::{self, GatedDeltaNet, UnitScratch};
use super::linear::{Input, Unpacking, unpacking_bytes};
use super::mlp::Mlp;
use super::{Context, per_thread};
use crate::config::Config;
use crate::profile::Part;
use crate::quant::PANEL_ROWS;
use crate::state::LayerState;
use std::sync::Mutex;

/// What mixes the tokens of a sequence.
pub enum Mixer {
    Linear(GatedDeltaNet),
    Full(Attention),
}

pub struct Block {
    pub input_layernorm: Vec<f32>, // [hidden], 1 + the stored weight
    pub mixer: Mixer,
    pub post_attention_layernorm: Vec<f32>, // [hidden], 1 + the stored weight
    pub mlp: Mlp,
    pub eps: f32,
}

/// Work buffers of a forward pass.
pub struct Scratch {
    pub x: Vec<f32>, // [tokens, hidden]: the residual stream
    input: Input,
    mixed: Input,
    hidden: Input,
    projected: Vec<f32>,
    parts: Vec<f32>,
    units: Vec<Mutex<UnitScratch>>,
    tiles: Vec<Mutex<TileScratch>>,
    /// Empty if no matrix reads activations of eight bits.
    pub unpacking: Unpacking,
}

impl Scratch {
    /// quantised: whether matrices read activations of eight bits.
    pub fn new(threads: usize, quantised: bool) -> Scratch {
        Scratch {
            x: Vec::new(),
            input: Input::default(),
            mixed: Input::default(),
            hidden: Input::default(),
            projected: Vec::new(),
            parts: Vec::new(),
            units: per_thread(threads),
            tiles: per_thread(threads),
            unpacking: per_thread(if quantised { threads } else { 0 }).into(),
        }
    }

    /// Bytes on the heap for pieces of `tokens` tokens in a sequence of `positions`.
    ///
    /// quantised: whether matrices read activations of eight bits.
    pub fn bytes_of(
        config: &Config,
        (tokens, positions): (usize, usize),
        threads: usize,
        quantised: bool,
    ) -> usize {
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let input = |cols| Input::bytes_of(tokens, cols, quantised);
        let gates = config.linear_num_value_heads.next_multiple_of(PANEL_ROWS);
        let (q, kv) = (config.num_attention_heads * head, config.num_key_value_heads * head);
        let projected = (config.conv_dim() + config.value_dim() + 2 * gates).max(2 * (q + kv));
        let rows =
            input(hidden) + input(config.value_dim().max(q)) + input(config.intermediate_size);
        let floats = tokens * (hidden + projected) + attention::parts_len(config, positions);
        let widest = config.intermediate_size.max(config.value_dim()).max(q).max(hidden);
        let unpacking = if quantised { unpacking_bytes(widest) } else { 0 };
        let thread = UnitScratch::bytes_of(config) + TileScratch::bytes_of(config) + unpacking;
        rows + 4 * floats + threads * thread
    }
}

impl Block {
    /// Takes tokens out of the residual stream `scratch.x` whose output nobody reads, the first
    /// `unread`: full attention keeps their keys and values, and is spared the rest. Returns how many
    /// it took; none if the mixer is linear, whose state needs most of the work.
    pub fn take_unread(
        &self,
        ctx: Context<'_>,
        state: &mut LayerState,
        positions: Positions<'_>,
        scratch: &mut Scratch,
        unread: usize,
    ) -> usize {
        let (Mixer::Full(mixer), LayerState::Full(cache)) = (&self.mixer, state) else { return 0 };
        if unread > 0 {
            let Scratch { x, input, projected, .. } = scratch;
            let end = unread * self.input_layernorm.len();
            input.set_normed(ctx.under(Part::Norms), &x[..end], &self.input_layernorm, self.eps);
            mixer.remember(ctx, input, cache, positions.of(0..unread), projected);
            x.drain(..end);
        }
        unread
    }

    /// Runs the layer on the residual stream `scratch.x`.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        state: &mut LayerState,
        positions: Positions<'_>,
        scratch: &mut Scratch,
    ) {
        let Scratch { x, input, mixed, hidden, projected, parts, units, tiles, .. } = scratch;
        input.set_normed(ctx.under(Part::Norms), x, &self.input_layernorm, self.eps);
        let before = self.trace_norm(ctx, "input_layernorm", input, x);
        match (&self.mixer, state) {
            (Mixer::Linear(mixer), LayerState::Linear(state)) => {
                let work = gated_delta_net::Workspace { projected, mixed, units };
                mixer.forward(ctx, input, state, work, x);
            }
            (Mixer::Full(mixer), LayerState::Full(cache)) => {
                let work = attention::Workspace { projected, mixed, parts, tiles };
                mixer.forward(ctx, input, cache, positions, work, x);
            }
            _ => unreachable!("a state is made from the config that the layers are made from"),
        }
        self.trace_difference(ctx, "mixer", before, x);
        input.set_normed(ctx.under(Part::Norms), x, &self.post_attention_layernorm, self.eps);
        let before = self.trace_norm(ctx, "post_attention_layernorm", input, x);
        self.mlp.forward(ctx, input, hidden, x);
        self.trace_difference(ctx, "mlp", before, x);
        if let Some(trace) = ctx.trace {
            let width = self.input_layernorm.len();
            trace.layer_part("output", width, 0, x.chunks_exact(width).enumerate());
        }
    }

    /// Records a norm's output, and keeps the residual stream to tell later what was added.
    fn trace_norm(
        &self,
        ctx: Context<'_>,
        name: &str,
        input: &Input,
        x: &[f32],
    ) -> Option<Vec<f32>> {
        let trace = ctx.trace?;
        let width = self.input_layernorm.len();
        trace.layer_part(name, width, 0, input.rows.chunks_exact(width).enumerate());
        Some(x.to_vec())
    }

    fn trace_difference(&self, ctx: Context<'_>, name: &str, before: Option<Vec<f32>>, x: &[f32]) {
        let Some((trace, before)) = ctx.trace.zip(before) else { return };
        let width = self.input_layernorm.len();
        let added: Vec<f32> = x.iter().zip(before).map(|(x, before)| x - before).collect();
        trace.layer_part(name, width, 0, added.chunks_exact(width).enumerate());
    }
}
