//! The whole model: embedding, layers, final norm, head.

use super::ahead::Ahead;
use super::checkpoint::Checkpoint;
use super::memory::{MemoryPlan, Needs, Stored};
use super::options::Options;
use super::weights::{Source, Weights};
use crate::budget::{Budget, Held};
use crate::config::Config;
use crate::error::Result;
use crate::kernels::rope::Rope;
use crate::layers::attention::Positions;
use crate::layers::block::Scratch;
use crate::layers::head::{self, Head, Screened};
use crate::layers::linear::{Input, Matrix, project};
use crate::layers::{Context, PIECE};
use crate::pool::Pool;
use crate::profile::{Part, Profile};
use crate::quant::{PANEL_ROWS, Quant, planes};
use crate::simd::Cpu;
use crate::state::{KvFormat, State};
use crate::tensor::resize;
use crate::trace::Trace;
use std::sync::Arc;

/// A loaded model: immutable, shared by its sessions.
pub struct Model {
    pub config: Config,
    pub quant: Quant,
    pub cpu: Cpu,
    pub context: usize,
    /// Format of the KV cache.
    pub kv: KvFormat,
    /// How sessions find the best tokens: full unless the head's matrix is in two planes.
    pub head: Head,
    pub(crate) pool: Pool,
    weights: Weights,
    stored: Stored,
    held: Held, // the bytes of the weights
    rope: Rope,
    ahead: Ahead,      // of the layers
    head_ahead: Ahead, // of the head
    source: Arc<dyn Source>,
}

/// Which tokens' logits a call computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rows {
    None,
    Last,
    All,
}

impl Model {
    /// Loads a checkpoint: its small tensors are read, its matrices stay where they lie.
    pub fn load(checkpoint: Arc<Checkpoint>, options: Options) -> Result<Model> {
        checkpoint.check_values()?;
        checkpoint.will_need();
        Model::new(checkpoint.config.clone(), checkpoint.quant, checkpoint, options)
    }

    /// Binds the weights and starts the threads.
    pub fn new(
        config: Config,
        quant: Quant,
        source: Arc<dyn Source>,
        options: Options,
    ) -> Result<Model> {
        let config = match options.yarn {
            Some(factor) => config.with_yarn(factor)?,
            None => config,
        };
        let stored = Stored::of_source(&config, quant, &*source)?;
        let needs = Needs::new(&config, stored, &options)?;
        let context = needs.context(&options)?;
        let Needs { kv, head, threads, .. } = needs;
        let cpu = match (options.cpu, std::env::var("QDELTA_ISA")) {
            (Some(cpu), _) => cpu,
            (None, Ok(name)) if !name.is_empty() => Cpu::named(&name)?,
            _ => Cpu::best(),
        };
        Ok(Model {
            weights: Weights::bind(&config, &*source)?,
            head,
            stored,
            held: Budget::new(options.memory_limit).hold(stored.bytes)?,
            rope: Rope::new(
                config.rope.theta,
                config.rope.rotary_dim,
                config.rope.mrope_section,
                config.rope.yarn.as_ref(),
            ),
            pool: Pool::new(threads),
            ahead: Ahead::default(),
            head_ahead: Ahead::default(),
            config,
            quant,
            cpu,
            context,
            kv,
            source,
        })
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Whether single tokens were enough to find out how weights are best read here.
    pub fn is_settled(&self) -> bool {
        let head = self.head == Head::Screened || self.head_ahead.is_settled();
        head && self.ahead.is_settled()
    }

    /// What counts the bytes that the weights, sessions and snapshots hold.
    pub fn budget(&self) -> &Arc<Budget> {
        self.held.budget()
    }

    /// Work buffers for [`Model::forward`].
    pub fn scratch(&self) -> Scratch {
        Scratch::new(self.threads(), self.stored.quantised)
    }

    /// An error if the files behind the weights have changed.
    pub fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }

    /// What decides how much memory sessions take.
    pub(crate) fn needs(&self) -> Needs<'_> {
        let Model { config, stored, kv, head, .. } = self;
        Needs { config, stored: *stored, kv: *kv, head: *head, threads: self.threads() }
    }

    /// Bytes for a session of `context` tokens.
    pub fn memory_plan(&self, context: usize) -> MemoryPlan {
        self.needs().plan(context)
    }

    /// Bytes of weights that a decoded token reads.
    pub fn weight_bytes(&self) -> usize {
        let all: usize = self.weights.matrices().map(|m| m.bytes.len()).sum();
        all - self.weights.lm_head.bytes.len() + self.head_bytes()
    }

    /// Those of them that the head reads; if it is screened, for the estimates of all rows.
    pub fn head_bytes(&self) -> usize {
        let Matrix { format, rows, cols, ref bytes, .. } = self.weights.lm_head;
        match self.head {
            Head::Full => bytes.len(),
            Head::Screened => {
                let high = planes(format, cols).next().expect("a format has a plane");
                rows.div_ceil(PANEL_ROWS) * high.len()
            }
        }
    }

    /// Runs at most [`PIECE`] tokens and leaves the wanted rows of the last hidden state in `head`,
    /// normed and prepared for the head's matrix: see [`Model::logits`].
    ///
    /// The ids are below the vocabulary's size and the state has room for them.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn forward(
        &self,
        tokens: &[i32],
        state: &mut State,
        scratch: &mut Scratch,
        head: &mut Input,
        rows: Rows,
        trace: Option<&Trace>,
        profile: Option<&Profile>,
    ) {
        assert!(!tokens.is_empty() && tokens.len() <= PIECE);
        let team = self.pool.team();
        let trial = self.ahead.begin(tokens.len());
        let unpacking = scratch.unpacking.clone();
        let ctx = Context {
            trace,
            profile,
            reading: trial.reading,
            unpacking: &unpacking,
            ..Context::new(self.cpu, &team)
        };
        let hidden = self.config.hidden_size;
        let past = state.tokens.len();

        resize(&mut scratch.x, tokens.len() * hidden);
        for (x, token) in scratch.x.chunks_exact_mut(hidden).zip(tokens) {
            self.weights.embed_tokens.row(*token as usize, x);
        }
        if let Some(trace) = trace {
            trace.part("embed", hidden, 0, scratch.x.chunks_exact(hidden).enumerate());
        }
        let mut angles = Vec::with_capacity(tokens.len() * self.rope.len());
        for position in past..past + tokens.len() {
            self.rope.angles([position; 3], &mut angles);
        }
        if let Some(trace) = trace {
            // Both halves of a rotation use the same angle; the reference lists it twice.
            for (name, part) in [("rope_cos", 0), ("rope_sin", 1)] {
                let values: Vec<f32> = angles.iter().map(|angle| angle[part]).collect();
                let n = self.rope.len();
                for half in 0..2 {
                    trace.part(name, 2 * n, half * n, values.chunks_exact(n).enumerate());
                }
            }
        }
        // The tokens before this one have no output of the last layer that anybody reads.
        let first = match rows {
            _ if trace.is_some() => 0,
            Rows::All => 0,
            Rows::Last => tokens.len() - 1,
            Rows::None => tokens.len(),
        };
        let mut positions = Positions { past, angles: &angles, rotary: self.rope.len() };
        let last = self.weights.blocks.len() - 1;
        let mut taken = 0;
        for (i, (block, state)) in self.weights.blocks.iter().zip(&mut state.layers).enumerate() {
            if let Some(trace) = trace {
                trace.enter_layer(i);
            }
            if i == last {
                taken = block.take_unread(ctx, state, positions, scratch, first);
                positions = positions.of(taken..tokens.len());
            }
            if taken < tokens.len() {
                block.forward(ctx, state, positions, scratch);
            }
        }
        self.ahead.end(&trial);
        state.tokens.extend_from_slice(tokens);

        if first == tokens.len() {
            return;
        }
        let ctx = ctx.under(Part::Head);
        head.set_normed(
            ctx,
            &scratch.x[(first - taken) * hidden..],
            &self.weights.norm,
            self.config.rms_norm_eps,
        );
        if let Some(trace) = trace {
            trace.part("final_norm", hidden, 0, head.rows.chunks_exact(hidden).enumerate());
        }
        if rows != Rows::None {
            head.prepare(ctx, &[&self.weights.lm_head]);
        }
    }

    /// Appends the logits of the rows of `head`. logits: [rows, vocab].
    pub(crate) fn logits(
        &self,
        head: &Input,
        scratch: &Scratch,
        logits: &mut Vec<f32>,
        profile: Option<&Profile>,
    ) {
        let team = self.pool.team();
        let start = logits.len();
        logits.resize(start + head.tokens() * self.config.vocab_size, 0.0);
        let trial = self.head_ahead.begin(head.tokens());
        let ctx = Context {
            profile,
            reading: trial.reading,
            unpacking: &scratch.unpacking,
            ..Context::new(self.cpu, &team)
        };
        let ctx = ctx.under(Part::Head);
        project(ctx, &[&self.weights.lm_head], head, false, &mut logits[start..]);
        self.head_ahead.end(&trial);
    }

    /// Some logits of the only row of `head`. ids: ascending.
    pub(crate) fn logits_of(&self, head: &Input, ids: &[usize]) -> Vec<f32> {
        let team = self.pool.team();
        let ctx = Context::new(self.cpu, &team);
        head::score(ctx, &self.weights.lm_head, head, ids)
    }

    /// The best of the only row of `head`; see [`head::screen`].
    pub(crate) fn screen(
        &self,
        head: &Input,
        (k, limit): (usize, usize),
        changed: &[(usize, f32)],
        work: &mut Vec<f32>,
    ) -> Option<Screened> {
        let team = self.pool.team();
        let ctx = Context { reading: self.ahead.chosen(), ..Context::new(self.cpu, &team) };
        head::screen(ctx, &self.weights.lm_head, head, (k, limit), changed, work)
    }

    /// One row of `head` on its own.
    pub(crate) fn head_row(&self, head: &Input, row: usize, alone: &mut Input) {
        let team = self.pool.team();
        let ctx = Context::new(self.cpu, &team);
        let hidden = self.config.hidden_size;
        alone.reshape(1, hidden);
        alone.rows.copy_from_slice(&head.rows[row * hidden..][..hidden]);
        alone.prepare(ctx, &[&self.weights.lm_head]);
    }
}
