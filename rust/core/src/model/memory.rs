//! How much memory a model and its sessions take, told before any is taken.
//!
//! Planned are the tensors of the text model, which are mapped from files where they lie in files,
//! and all buffers of a session that grow with the model's sizes. Not planned are the program and
//! its threads' stacks, the tokenizer, the scales of FP8 (a four-thousandth of its codes), and what is
//! converted or copied for a moment.

use super::checkpoint::Checkpoint;
use super::options::Options;
use super::recipe::{self, Storage};
use super::tensors::{Role, TensorSpec, text_tensors};
use super::weights::{Source, find_matrix};
use crate::config::Config;
use crate::error::{Error, Result, readable};
use crate::layers::PIECE;
use crate::layers::block::Scratch;
use crate::layers::head::Head;
use crate::layers::linear::Input;
use crate::quant::{Format, Quant};
use crate::state::{KvFormat, State};
use crate::tensor::Dtype;
use crate::threads;
use std::collections::HashMap;

/// Bytes by purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryPlan {
    /// All tensors of the text model; sessions share them.
    pub weights: usize,
    /// Keys and values of a session's tokens.
    pub kv: usize,
    /// Recurrent and convolution states of a session.
    pub state: usize,
    /// Work buffers of a session, for pieces of a prompt and the logits of one row.
    pub scratch: usize,
}

impl MemoryPlan {
    /// Bytes of a session.
    pub fn session(&self) -> usize {
        self.kv + self.state + self.scratch
    }

    /// Bytes of the model with one session.
    pub fn total(&self) -> usize {
        self.weights + self.session()
    }
}

/// The weights as far as memory depends on them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored {
    pub quant: Quant,
    pub bytes: usize,
    /// Whether matrices read activations of eight bits.
    pub quantised: bool,
    /// Whether the head can be screened.
    pub in_planes: bool,
}

impl Stored {
    /// As a source has them.
    pub fn of_source(config: &Config, quant: Quant, source: &dyn Source) -> Result<Stored> {
        Stored::new(config, quant, |spec| Ok(find_matrix(source, &spec.name)?.0))
    }

    /// As the conversion to `quant` makes them of tensors with a dtype.
    pub fn converted(
        config: &Config,
        quant: Quant,
        dtype: impl Fn(&TensorSpec) -> Dtype,
    ) -> Result<Stored> {
        Stored::new(config, quant, |spec| {
            match recipe::storage(quant, &HashMap::new(), spec, dtype(spec))? {
                Storage::Coded(format) => Ok(format),
                Storage::F32 => Ok(Format::F32),
                Storage::AsIs => dtype(spec).format().ok_or_else(|| {
                    let dtype = dtype(spec).name();
                    Error::File(format!("tensor `{}`: dtype {dtype}, expected a float", spec.name))
                }),
            }
        })
    }

    /// As the conversion to `quant` makes them of a release whose config.json is `config`.
    ///
    /// dtype: as config.json states it. Where that says FP8, the large matrices of the layers are.
    pub fn of_release(config: &Config, quant: Quant, dtype: Dtype) -> Result<Stored> {
        let large = |role| {
            use Role::{AttentionOutput, KeyValue, LinearInput, LinearOutput, Query};
            let attention = matches!(role, Query | KeyValue | AttentionOutput);
            let mlp = matches!(role, Role::MlpGate | Role::MlpUp | Role::MlpDown);
            attention || mlp || matches!(role, LinearInput | LinearOutput)
        };
        Stored::converted(config, quant, |spec| match config.fp8 && large(spec.role) {
            true => Dtype::Fp8,
            false => dtype,
        })
    }

    /// As a model of the format `quant` has them that is made from a checkpoint.
    pub fn of_checkpoint(checkpoint: &Checkpoint, quant: Quant) -> Result<Stored> {
        let config = &checkpoint.config;
        if quant == checkpoint.quant {
            return Stored::of_source(config, quant, checkpoint);
        }
        if checkpoint.quant != Quant::None {
            return Err(Error::Argument(format!(
                "{}: is already converted to {}, {quant} was asked for",
                checkpoint.name(),
                checkpoint.quant
            )));
        }
        let dtype =
            |spec: &TensorSpec| checkpoint.tensor(&spec.name).map_or(Dtype::U8, |t| t.dtype);
        Stored::converted(config, quant, dtype)
    }

    /// format: of each matrix.
    fn new(
        config: &Config,
        quant: Quant,
        format: impl Fn(&TensorSpec) -> Result<Format>,
    ) -> Result<Stored> {
        let mut stored = Stored { quant, bytes: 0, quantised: false, in_planes: false };
        for spec in text_tensors(config) {
            // Norms and the like are held as f32.
            let format = if spec.role == Role::Small { Format::F32 } else { format(&spec)? };
            let (rows, cols) = spec.rows_cols();
            stored.bytes += format.bytes(rows, cols);
            stored.quantised |= format.is_quantised();
            let head = if config.tie_word_embeddings { Role::Embedding } else { Role::Head };
            stored.in_planes |= spec.role == head && format.is_in_planes();
        }
        Ok(stored)
    }
}

/// All that memory depends on, but the length of a context.
pub struct Needs<'a> {
    pub config: &'a Config,
    pub stored: Stored,
    pub kv: KvFormat,
    pub head: Head,
    pub threads: usize,
}

impl<'a> Needs<'a> {
    pub fn new(config: &'a Config, stored: Stored, options: &Options) -> Result<Needs<'a>> {
        let kv = if stored.quantised { KvFormat::F16 } else { KvFormat::F32 };
        if options.head == Head::Screened && stored.quantised && !stored.in_planes {
            return Err(Error::Argument(format!(
                "head is `screened`, which reads one of two planes; quant `{}` has none, w4 and w8 \
                 have, and a recipe with w5_planes or w8_planes for the head",
                stored.quant
            )));
        }
        Ok(Needs {
            config,
            stored,
            kv: options.kv.unwrap_or(kv),
            head: if stored.in_planes { options.head } else { Head::Full },
            threads: threads::checked(options.threads.unwrap_or_else(threads::default_threads))?,
        })
    }

    /// Bytes for sessions of `context` tokens.
    pub fn plan(&self, context: usize) -> MemoryPlan {
        let Needs { config, stored, kv, head, threads } = *self;
        let tokens = PIECE.min(context);
        let layers = Scratch::bytes_of(config, (tokens, context), threads, stored.quantised);
        // Estimates and variances of a screened row.
        let screen = if head == Head::Screened { 2 * 4 * config.vocab_size } else { 0 };
        MemoryPlan {
            weights: stored.bytes,
            kv: State::kv_bytes(config, kv, context),
            state: State::fixed_bytes(config),
            scratch: layers + screen + self.rows(1),
        }
    }

    /// Bytes of `rows` rows of logits and of what the head reads for them.
    pub fn rows(&self, rows: usize) -> usize {
        let hidden = self.config.hidden_size;
        let input = Input::bytes_of(rows.min(PIECE), hidden, self.stored.quantised);
        4 * rows * self.config.vocab_size + input
    }

    /// The context of sessions: the wanted one, else the largest of which one fits the limit.
    pub fn context(&self, options: &Options) -> Result<usize> {
        let Options { context: wanted, memory_limit: limit, .. } = *options;
        let most = self.config.context();
        let context = wanted.unwrap_or(most);
        if context == 0 || context > most {
            return Err(Error::Argument(format!(
                "context is {context}, expected 1 to {most} (a larger YaRN factor extends it)"
            )));
        }
        let Some(limit) = limit else { return Ok(context) };
        let largest = self.largest_context(limit);
        match wanted {
            None if largest > 0 => Ok(largest),
            Some(wanted) if wanted <= largest => Ok(wanted),
            _ => Err(self.refusal(wanted.unwrap_or(1), limit, options)),
        }
    }

    /// The most tokens that a session can have within a limit, 0 if it can have none.
    fn largest_context(&self, limit: usize) -> usize {
        let (mut fits, mut exceeds) = (0, self.config.context() + 1);
        while exceeds - fits > 1 {
            let middle = fits.midpoint(exceeds);
            if self.plan(middle).total() <= limit {
                fits = middle;
            } else {
                exceeds = middle;
            }
        }
        fits
    }

    /// The error that says what a context needs and what would fit.
    fn refusal(&self, context: usize, limit: usize, options: &Options) -> Error {
        let plan = self.plan(context);
        let parts = [
            ("weights", plan.weights),
            ("attention cache", plan.kv),
            ("states", plan.state),
            ("work buffers", plan.scratch),
        ];
        let parts = parts.map(|(name, bytes)| format!("{name} {}", readable(bytes)));
        let fits = self.what_fits(context, limit, options).join(", or ");
        let fits = if fits.is_empty() { "nothing of this model".to_owned() } else { fits };
        Error::MemoryLimit {
            limit,
            needed: plan.total(),
            text: format!(
                "a context of {context} takes {} ({} cache); what would fit: {fits}",
                parts.join(", "),
                self.kv.name()
            ),
        }
    }

    /// Settings near the present ones with which a session fits, as `load` takes them; those behind
    /// others have longer contexts, up to the wanted one.
    fn what_fits(&self, context: usize, limit: usize, options: &Options) -> Vec<String> {
        let floats = self.stored.quant == Quant::None && !self.stored.quantised;
        let wide = floats || matches!(self.stored.quant, Quant::W8 | Quant::Fine | Quant::Best);
        let balanced = |_: &TensorSpec| Dtype::Bf16;
        let balanced = wide.then(|| Stored::converted(self.config, Quant::Balanced, balanced).ok());
        let (mut fits, mut longest) = (Vec::new(), 0);
        for stored in [Some(self.stored), balanced.flatten()].into_iter().flatten() {
            for kv in [options.kv, Some(KvFormat::Q8)] {
                let other = Options { kv, ..options.clone() };
                let Ok(needs) = Needs::new(self.config, stored, &other) else { continue };
                let largest = needs.largest_context(limit).min(context);
                if largest <= longest {
                    continue;
                }
                longest = largest;
                let quant =
                    (stored.quant != self.stored.quant).then(|| "quant=\"balanced\"".to_owned());
                let kv = (kv != options.kv).then(|| "kv=\"q8\"".to_owned());
                let ctx = (largest < context).then(|| format!("ctx={largest}"));
                let settings: Vec<String> = [quant, kv, ctx].into_iter().flatten().collect();
                fits.push(settings.join(" with "));
            }
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let json = r#"{"model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 24,
            "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 256, "vocab_size": 248320, "linear_num_key_heads": 16,
            "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "tie_word_embeddings": true, "rope_parameters": {"rope_theta": 10000000,
            "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}}"#;
        Config::from_json(json, "config.json").expect("the published 0.8B")
    }

    fn needs<'a>(config: &'a Config, quant: Quant, options: &Options) -> Needs<'a> {
        let stored = Stored::converted(config, quant, |_| Dtype::Bf16).expect("a recipe");
        Needs::new(config, stored, options).expect("valid options")
    }

    fn within(config: &Config, quant: Quant, options: Options) -> Result<usize> {
        let options = Options { threads: Some(2), ..options };
        needs(config, quant, &options).context(&options)
    }

    fn limited(context: Option<usize>, limit: usize) -> Options {
        Options { context, memory_limit: Some(limit), ..Options::default() }
    }

    #[test]
    fn the_published_0_8b() {
        let config = config();
        let plan = needs(&config, Quant::None, &Options::default()).plan(4096);
        // Parameters, two bytes each but for the small ones.
        let parameters = 752_393_024;
        assert!((2 * parameters..2 * parameters + 2_000_000).contains(&plan.weights));
        assert_eq!(plan.kv, 4096 * 24_576);
        // States, pending updates and keys, inputs of the convolution.
        let head = 4 * (128 * 128 + 128 * 4 + 128 * 4 + 3 * 3 * 128);
        assert_eq!(plan.state, 18 * 16 * head);
        let plan = needs(&config, Quant::W4, &Options::default()).plan(262_144);
        assert_eq!(plan.kv, 262_144 * 12_288);
        let q8 = Options { kv: Some(KvFormat::Q8), ..Options::default() };
        assert_eq!(needs(&config, Quant::W4, &q8).plan(100).kv, 256 * 6_384);
    }

    #[test]
    fn the_largest_context_is_the_last_that_fits() {
        let config = config();
        let context = |options| within(&config, Quant::W4, options).expect("it fits");
        let two = Options { threads: Some(2), ..Options::default() };
        let bytes = |n| needs(&config, Quant::W4, &two).plan(n).total();
        for n in [1, 100, 512, 4096, 262_143, 262_144] {
            let found = context(limited(None, bytes(n)));
            assert!(found >= n && bytes(found) <= bytes(n));
            assert!(found == config.context() || bytes(found + 1) > bytes(n));
            assert_eq!(context(limited(Some(n), bytes(n))), n);
        }
        assert_eq!(context(Options::default()), 262_144);
    }

    #[test]
    fn a_refusal_says_what_fits() {
        let config = config();
        let refusal = |quant, context, limit| {
            let error = within(&config, quant, limited(context, limit));
            error.expect_err("too little memory").to_string()
        };
        let text = refusal(Quant::W4, Some(262_144), 2 << 30);
        assert!(text.starts_with("memory_limit is 2.00 GiB, 3."), "{text}");
        assert!(text.contains("attention cache 3.00 GiB"), "{text}");
        let q8 = Options { kv: Some(KvFormat::Q8), ..limited(None, 2 << 30) };
        let [own, q8] = [limited(None, 2 << 30), q8]
            .map(|options| within(&config, Quant::W4, options).expect("some context fits"));
        let fits = format!("what would fit: ctx={own}, or kv=\"q8\" with ctx={q8}");
        assert!(text.ends_with(&fits), "{text}");
        let text = refusal(Quant::W4, Some(200_000), 2 << 30);
        assert!(text.ends_with(", or kv=\"q8\""), "{text}");
        let text = refusal(Quant::W8, Some(4096), 700 << 20);
        assert!(text.ends_with("what would fit: quant=\"balanced\""), "{text}");
        let text = refusal(Quant::None, None, 1 << 30);
        assert!(text.ends_with("what would fit: quant=\"balanced\""), "{text}");
        let text = refusal(Quant::W4, None, 1 << 20);
        assert!(text.ends_with("what would fit: nothing of this model"), "{text}");
    }
}
