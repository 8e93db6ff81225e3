//! One decoder layer: x += mixer(norm(x)); x += mlp(norm(x)).

use super::Context;
use super::attention::{Attention, Positions, TileScratch};
use super::gated_delta_net::{GatedDeltaNet, UnitScratch};
use super::linear::Input;
use super::mlp::Mlp;
use crate::profile::Part;
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
}

impl Scratch {
    pub fn new(threads: usize) -> Scratch {
        Scratch {
            x: Vec::new(),
            input: Input::default(),
            mixed: Input::default(),
            hidden: Input::default(),
            projected: Vec::new(),
            parts: Vec::new(),
            units: super::gated_delta_net::units(threads),
            tiles: super::attention::tiles(threads),
        }
    }
}

impl Block {
    /// Runs the layer on the residual stream `scratch.x`.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        state: &mut LayerState,
        positions: Positions<'_>,
        scratch: &mut Scratch,
    ) {
        let Scratch { x, input, mixed, hidden, projected, parts, units, tiles } = scratch;
        input.set_normed(ctx.under(Part::Norms), x, &self.input_layernorm, self.eps);
        let before = self.trace_norm(ctx, "input_layernorm", input, x);
        match (&self.mixer, state) {
            (Mixer::Linear(mixer), LayerState::Linear(state)) => {
                mixer.forward(ctx, input, state, projected, mixed, units, x);
            }
            (Mixer::Full(mixer), LayerState::Full(cache)) => {
                mixer.forward(ctx, input, cache, positions, projected, mixed, parts, tiles, x);
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
