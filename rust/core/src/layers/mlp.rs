//! The feed-forward part of a layer: down(silu(gate x) (up x)).

use super::Context;
use super::linear::{Input, Matrix, project, project_swiglu};
use crate::profile::Part;

pub struct Mlp {
    pub gate_proj: Matrix,
    pub up_proj: Matrix,
    pub down_proj: Matrix,
}

impl Mlp {
    /// Adds the result for `x` to `residual`: [tokens, hidden]. `hidden` is work space.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        x: &mut Input,
        hidden: &mut Input,
        residual: &mut [f32],
    ) {
        let (norms, ctx) = (ctx.under(Part::Norms), ctx.under(Part::Matrices));
        x.prepare(norms, &[&self.gate_proj, &self.up_proj]);
        hidden.reshape(x.tokens(), self.gate_proj.rows);
        project_swiglu(ctx, &self.gate_proj, &self.up_proj, x, &mut hidden.rows);
        if let Some(trace) = ctx.trace {
            let rows = hidden.rows.chunks_exact(self.gate_proj.rows).enumerate();
            trace.layer_part("mlp_hidden", self.gate_proj.rows, 0, rows);
        }
        hidden.prepare(norms, &[&self.down_proj]);
        project(ctx, &[&self.down_proj], hidden, true, residual);
    }
}
