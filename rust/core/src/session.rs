//! One timeline of tokens on a model.

use crate::budget::Held;
use crate::error::{Error, Result};
use crate::kernels::select;
use crate::layers::PIECE;
use crate::layers::block::Scratch;
use crate::layers::head::Head;
use crate::layers::linear::Input;
use crate::model::forward::{Model, Rows};
use crate::profile::Profile;
use crate::state::{KV_CHUNK, LayerState, State, lock};
use crate::trace::{Recorded, Trace};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A sequence of tokens and what the model remembers of it.
pub struct Session {
    model: Arc<Model>,
    state: State,
    held: Held, // the bytes of the buffers
    scratch: Scratch,
    head: Input,      // rows of the last piece that the head was asked for
    logits: Vec<f32>, // [rows, vocab] of the last feed
    /// The row in `head` has no logits yet: they are computed when they are asked for.
    deferred: bool,
    screen: Vec<f32>, // work buffer
    /// A feed ended in the middle, so the state fits no number of tokens.
    broken: bool,
    profile: Option<Profile>,
}

/// The state of a session at some token. Cheap to keep: the KV cache is shared until it is written.
pub struct Snapshot {
    model: Arc<Model>,
    state: State,
}

impl Snapshot {
    pub fn n_tokens(&self) -> usize {
        self.state.tokens.len()
    }

    /// Bytes it keeps alive, those shared with sessions and other snapshots included.
    pub fn bytes(&self) -> usize {
        self.state.bytes()
    }
}

/// What screening one row of logits took, and what it got wrong.
pub struct Screening {
    /// Logits that were computed; all of them if there was nothing to gain.
    pub scored: usize,
    /// Tokens among the best that were not found.
    pub missed: usize,
}

/// More candidates than this are taken from all logits.
pub const MOST_SCREENED: usize = 256;

/// Name, shape and data of a part of a layer's state.
pub type StateArray = (&'static str, Vec<usize>, Vec<f32>);

impl Session {
    /// An empty timeline; an error if the model's memory limit leaves no room for its buffers.
    pub fn new(model: Arc<Model>) -> Result<Session> {
        let plan = model.memory_plan(model.context);
        Ok(Session {
            held: model.budget().hold(plan.scratch)?,
            state: State::new(&model.config, model.budget())?,
            scratch: model.scratch(),
            head: Input::default(),
            logits: Vec::new(),
            deferred: false,
            screen: Vec::new(),
            broken: false,
            profile: None,
            model,
        })
    }

    /// The tokens fed so far.
    pub fn tokens(&self) -> &[i32] {
        &self.state.tokens
    }

    /// Appends tokens and keeps the logits of the wanted rows.
    ///
    /// An error leaves the session as it was, with the exception of [`Error::Internal`], after
    /// which only `reset` and `restore` work.
    pub fn feed(&mut self, tokens: &[i32], rows: Rows) -> Result<()> {
        self.run(tokens, rows, None)
    }

    /// As [`Session::feed`] without logits, and returns all intermediate values by name.
    pub fn trace(&mut self, tokens: &[i32]) -> Result<BTreeMap<String, Recorded>> {
        if tokens.len() > PIECE {
            return Err(Error::Argument(format!(
                "{} tokens to trace, expected at most {PIECE}",
                tokens.len()
            )));
        }
        let trace = Trace::default();
        self.run(tokens, Rows::None, Some(&trace))?;
        Ok(trace.into_values())
    }

    /// Counts times of the calls from now on, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(Profile::new(self.model.threads()));
    }

    /// Counts no times any more. Returns those since [`Session::start_profile`], if it was called.
    pub fn stop_profile(&mut self) -> Option<Profile> {
        self.profile.take()
    }

    fn run(&mut self, tokens: &[i32], rows: Rows, trace: Option<&Trace>) -> Result<()> {
        // Aside for the time of the call, which has the session for itself.
        let profile = self.profile.take();
        let result = {
            let _call = profile.as_ref().map(Profile::call);
            self.run_pieces(tokens, rows, trace, profile.as_ref())
        };
        self.profile = profile;
        result
    }

    fn run_pieces(
        &mut self,
        tokens: &[i32],
        rows: Rows,
        trace: Option<&Trace>,
        profile: Option<&Profile>,
    ) -> Result<()> {
        if self.broken {
            return Err(Error::Internal("the session is unusable after an internal error".into()));
        }
        let vocab = self.model.config.vocab_size;
        if let Some(token) = tokens.iter().find(|t| !(0..vocab as i64).contains(&i64::from(**t))) {
            return Err(Error::Argument(format!("token id {token}, expected 0 to {}", vocab - 1)));
        }
        let (past, context) = (self.state.tokens.len(), self.model.context);
        if tokens.len() > context - past {
            return Err(Error::Context { needed: past + tokens.len(), available: context });
        }
        self.model.check_unchanged()?;
        self.state.grow(past + tokens.len(), self.model.kv, self.model.config.head_dim)?;
        let kept = match rows {
            Rows::None => 0,
            Rows::Last => usize::from(!tokens.is_empty()),
            Rows::All => tokens.len(),
        };
        let defer = self.model.head == Head::Screened && rows == Rows::Last;
        self.forget_logits();
        if !defer {
            self.reserve_logits(kept)?;
        }

        self.broken = true;
        let pieces = tokens.len().div_ceil(PIECE);
        for (i, piece) in tokens.chunks(PIECE).enumerate() {
            let rows = if rows == Rows::Last && i + 1 < pieces { Rows::None } else { rows };
            let Session { model, state, scratch, head, logits, .. } = self;
            caught(|| {
                model.forward(piece, state, scratch, head, rows, trace, profile);
                if rows != Rows::None && !defer {
                    model.logits(head, scratch, logits, profile);
                }
            })?;
        }
        self.deferred = defer && kept > 0;
        self.broken = false;
        Ok(())
    }

    fn forget_logits(&mut self) {
        self.logits.clear();
        self.deferred = false;
    }

    fn reserve_logits(&mut self, rows: usize) -> Result<()> {
        let n = rows * self.model.config.vocab_size;
        let needs = self.model.needs();
        let others = needs.plan(self.model.context).scratch - needs.rows(1);
        self.held.grow_to(others + needs.rows(rows))?;
        self.logits.try_reserve_exact(n).map_err(|_| Error::Memory { bytes: 4 * n })
    }

    /// Computes the logits that were put off.
    fn complete(&mut self) -> Result<()> {
        if self.deferred {
            self.model.check_unchanged()?;
            self.reserve_logits(1)?;
            let Session { model, scratch, head, logits, .. } = self;
            caught(|| model.logits(head, scratch, logits, None))?;
            self.deferred = false;
        }
        Ok(())
    }

    /// Logits kept by the last feed: [rows, vocab].
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.complete()?;
        Ok(&self.logits)
    }

    /// Where the logits of the last token start, or an error if the last feed kept none.
    fn last_row(&self) -> Result<usize> {
        let start = self.logits.len().checked_sub(self.model.config.vocab_size);
        start.ok_or_else(|| Error::Argument("no logits: the last feed computed none".into()))
    }

    /// Token ids as indices into a row of logits.
    fn indices(&self, ids: &[i32]) -> Result<Vec<usize>> {
        let vocab = self.model.config.vocab_size;
        let index = |id: &i32| usize::try_from(*id).ok().filter(|index| *index < vocab);
        ids.iter()
            .map(|id| {
                index(id).ok_or_else(|| {
                    Error::Argument(format!("token id {id}, expected 0 to {}", vocab - 1))
                })
            })
            .collect()
    }

    /// The logits of some tokens after the last one.
    pub fn gather(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let indices = self.indices(ids)?;
        if !self.deferred {
            let row = &self.logits[self.last_row()?..];
            return Ok(indices.iter().map(|i| row[*i]).collect());
        }
        self.model.check_unchanged()?;
        let mut sorted = indices.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let values = caught(|| self.model.logits_of(&self.head, &sorted))?;
        let value = |i: &usize| values[sorted.binary_search(i).expect("all are there")];
        Ok(indices.iter().map(value).collect())
    }

    /// The `k` largest logits of the last token among the first `limit` ids, largest first, after
    /// the entries `ids` are replaced by `values` for the time of the call.
    ///
    /// A screened head computes no more logits than it must for up to [`MOST_SCREENED`].
    pub fn candidates(
        &mut self,
        k: usize,
        limit: usize,
        ids: &[i32],
        values: &[f32],
    ) -> Result<(Vec<i32>, Vec<f32>)> {
        if ids.len() != values.len() {
            return Err(Error::Argument(format!("{} ids and {} values", ids.len(), values.len())));
        }
        let indices = self.indices(ids)?;
        let limit = limit.min(self.model.config.vocab_size);
        if self.deferred && k <= MOST_SCREENED {
            self.model.check_unchanged()?;
            let changed: Vec<_> = indices.iter().copied().zip(values.iter().copied()).collect();
            let Session { model, head, screen, .. } = self;
            if let Some(found) = caught(|| model.screen(head, (k, limit), &changed, screen))? {
                return Ok((found.ids, found.values));
            }
        }
        self.complete()?;
        let start = self.last_row()?;
        let row = &mut self.logits[start..];
        let originals: Vec<f32> = indices.iter().map(|i| row[*i]).collect();
        for (i, value) in indices.iter().zip(values) {
            row[*i] = *value;
        }
        let found = select::largest(self.model.cpu, &row[..limit], k);
        // In reverse: an id given twice gets its first, original value back.
        for (i, original) in indices.iter().zip(&originals).rev() {
            row[*i] = *original;
        }
        Ok(found)
    }

    /// Screens each row of the last feed, which had at most [`PIECE`] tokens and kept all logits,
    /// and compares what it finds with the `k` largest of all logits among the first `limit` ids.
    pub fn screening(&mut self, k: usize, limit: usize) -> Result<Vec<Screening>> {
        if self.model.head != Head::Screened {
            return Err(Error::Argument("the model's head is full, expected screened".into()));
        }
        let vocab = self.model.config.vocab_size;
        if self.logits.is_empty() || self.logits.len() != self.head.tokens() * vocab {
            return Err(Error::Argument(format!(
                "expected a feed of at most {PIECE} tokens that kept all logits"
            )));
        }
        self.model.check_unchanged()?;
        let (limit, mut alone) = (limit.min(vocab), Input::default());
        let Session { model, head, screen, logits, .. } = self;
        caught(|| {
            let row = |(i, row): (usize, &[f32])| {
                model.head_row(head, i, &mut alone);
                let found = model.screen(&alone, (k, limit), &[], screen);
                let (best, _) = select::largest(model.cpu, &row[..limit], k);
                match found {
                    Some(found) => Screening {
                        scored: found.scored,
                        missed: best.iter().filter(|id| !found.ids.contains(id)).count(),
                    },
                    None => Screening { scored: vocab, missed: 0 },
                }
            };
            logits.chunks_exact(vocab).enumerate().map(row).collect()
        })
    }

    /// The state as of now.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        if self.broken {
            return Err(Error::Internal("the session is unusable after an internal error".into()));
        }
        self.state.commit();
        Ok(Snapshot { model: self.model.clone(), state: self.state.copy()? })
    }

    /// Returns to a snapshot of this or another session of the same model.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        if !Arc::ptr_eq(&self.model, &snapshot.model) {
            return Err(Error::Argument("the snapshot belongs to another model".into()));
        }
        self.state.set(&snapshot.state);
        self.forget_logits();
        self.broken = false;
        Ok(())
    }

    /// Returns to the state before the first token.
    pub fn reset(&mut self) {
        self.state.reset(&self.model.config);
        self.forget_logits();
        self.broken = false;
    }

    /// The state of a layer as plain arrays with their shapes, by name: `conv` [channels,
    /// kernel - 1] and `recurrent` [h_v, d_k, d_v], value heads grouped by key head, or `key` and `value` [h_kv, tokens, head_dim].
    pub fn layer_state(&mut self, layer: usize) -> Result<Vec<StateArray>> {
        let config = &self.model.config;
        self.state.commit();
        match self.state.layers.get(layer) {
            None => Err(Error::Argument(format!(
                "layer {layer}, expected 0 to {}",
                config.num_hidden_layers - 1
            ))),
            Some(LayerState::Linear(heads)) => {
                let history = config.linear_conv_kernel_dim - 1;
                let (mut conv, mut recurrent) = (Vec::new(), Vec::new());
                for parts in [0..1, 1..2, 2..2 + config.values_per_key()] {
                    for head in heads {
                        for rows in &lock(head).conv[parts.clone()] {
                            let channels = rows.len() / history.max(1);
                            for c in 0..channels {
                                conv.extend((0..history).map(|j| rows[j * channels + c]));
                            }
                        }
                    }
                }
                for head in heads {
                    for value in &lock(head).values {
                        recurrent.extend(value.matrix(config.linear_value_head_dim));
                    }
                }
                let (d_k, d_v) = (config.linear_key_head_dim, config.linear_value_head_dim);
                Ok(vec![
                    ("conv", vec![config.conv_dim(), history], conv),
                    ("recurrent", vec![config.linear_num_value_heads, d_k, d_v], recurrent),
                ])
            }
            Some(LayerState::Full(heads)) => {
                let (n, dim) = (self.state.tokens.len(), config.head_dim);
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                let (mut key, mut value) = (vec![0.0; dim], vec![0.0; dim]);
                for head in heads {
                    for position in 0..n {
                        let chunk = &head.chunks[position / KV_CHUNK];
                        chunk.get(position % KV_CHUNK, &mut key, &mut value);
                        keys.extend_from_slice(&key);
                        values.extend_from_slice(&value);
                    }
                }
                let shape = vec![heads.len(), n, dim];
                Ok(vec![("key", shape.clone(), keys), ("value", shape, values)])
            }
        }
    }

    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }
}

/// Runs `f`; a panic becomes an error.
fn caught<T>(f: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| Error::Internal(panic_text(&*panic)))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
