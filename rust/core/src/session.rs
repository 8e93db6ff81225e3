//! One timeline of tokens on a model.

use crate::error::{Error, Result};
use crate::kernels::select;
use crate::layers::block::Scratch;
use crate::layers::linear::Input;
use crate::model::forward::{Model, PIECE, Rows};
use crate::state::{KV_CHUNK, LayerState, State, lock};
use crate::trace::{Recorded, Trace};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A sequence of tokens and what the model remembers of it.
pub struct Session {
    model: Arc<Model>,
    state: State,
    scratch: Scratch,
    head: Input,
    logits: Vec<f32>, // [rows, vocab] of the last feed
    /// A feed ended in the middle, so the state fits no number of tokens.
    broken: bool,
}

/// The state of a session at some token. Cheap to keep: the KV cache is shared until it is written.
#[derive(Clone)]
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

/// Name, shape and data of a part of a layer's state.
pub type StateArray = (&'static str, Vec<usize>, Vec<f32>);

impl Session {
    pub fn new(model: Arc<Model>) -> Session {
        Session {
            state: State::new(&model.config),
            scratch: model.scratch(),
            head: Input::default(),
            logits: Vec::new(),
            broken: false,
            model,
        }
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

    fn run(&mut self, tokens: &[i32], rows: Rows, trace: Option<&Trace>) -> Result<()> {
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
        self.logits.clear();
        self.logits
            .try_reserve(kept * vocab)
            .map_err(|_| Error::Memory { bytes: 4 * kept * vocab })?;

        self.broken = true;
        let pieces = tokens.len().div_ceil(PIECE);
        for (i, piece) in tokens.chunks(PIECE).enumerate() {
            let rows = if rows == Rows::Last && i + 1 < pieces { Rows::None } else { rows };
            let Session { model, state, scratch, head, logits, .. } = self;
            catch_unwind(AssertUnwindSafe(|| {
                model.forward(piece, state, scratch, head, rows, logits, trace);
            }))
            .map_err(|panic| Error::Internal(panic_text(&*panic)))?;
        }
        self.broken = false;
        Ok(())
    }

    /// Logits kept by the last feed: [rows, vocab].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Logits of the last token, [vocab], or an error if the last feed kept none.
    pub fn last_row(&self) -> Result<&[f32]> {
        let vocab = self.model.config.vocab_size;
        self.logits
            .rchunks_exact(vocab)
            .next()
            .ok_or_else(|| Error::Argument("no logits: the last feed computed none".into()))
    }

    /// The `k` largest logits of the last token among the first `limit` ids, largest first, after
    /// the entries `ids` are replaced by `values` for the time of the call.
    pub fn candidates(
        &mut self,
        k: usize,
        limit: usize,
        ids: &[i32],
        values: &[f32],
    ) -> Result<(Vec<i32>, Vec<f32>)> {
        let start = self.logits.len() - self.last_row()?.len();
        let row = &mut self.logits[start..];
        if ids.len() != values.len() {
            return Err(Error::Argument(format!("{} ids and {} values", ids.len(), values.len())));
        }
        let vocab = row.len();
        let index = |id: i32| {
            usize::try_from(id).ok().filter(|id| *id < vocab).ok_or_else(|| {
                Error::Argument(format!("token id {id}, expected 0 to {}", vocab - 1))
            })
        };
        let indices: Vec<usize> = ids.iter().map(|id| index(*id)).collect::<Result<_>>()?;
        let originals: Vec<f32> = indices.iter().map(|i| row[*i]).collect();
        for (i, value) in indices.iter().zip(values) {
            row[*i] = *value;
        }
        let found = select::largest(self.model.cpu, &row[..limit.min(vocab)], k);
        // In reverse: an id given twice gets its first, original value back.
        for (i, original) in indices.iter().zip(&originals).rev() {
            row[*i] = *original;
        }
        Ok(found)
    }

    /// The state as of now.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        if self.broken {
            return Err(Error::Internal("the session is unusable after an internal error".into()));
        }
        self.state.commit();
        Ok(Snapshot { model: self.model.clone(), state: self.state.clone() })
    }

    /// Returns to a snapshot of this or another session of the same model.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        if !Arc::ptr_eq(&self.model, &snapshot.model) {
            return Err(Error::Argument("the snapshot belongs to another model".into()));
        }
        self.state = snapshot.state.clone();
        self.logits.clear();
        self.broken = false;
        Ok(())
    }

    /// Returns to the state before the first token.
    pub fn reset(&mut self) {
        self.state = State::new(&self.model.config);
        self.logits.clear();
        self.broken = false;
    }

    /// The state of a layer as plain arrays with their shapes, by name: `conv` [channels,
    /// kernel - 1] and `recurrent` [h_v, d_k, d_v], or `key` and `value` [h_kv, tokens, head_dim].
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
                for part in 0..3 {
                    for head in heads {
                        let rows = &lock(head).conv[part];
                        let channels = rows.len() / history.max(1);
                        for c in 0..channels {
                            conv.extend((0..history).map(|j| rows[j * channels + c]));
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

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
