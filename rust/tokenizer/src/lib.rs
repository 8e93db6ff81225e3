//! Text between added tokens to ids: normalised and split by the `tokenizers` library, and encoded by
//! byte-level BPE.

mod bpe;
mod file;

pub use file::AddedToken;

use bpe::{Bpe, Scratch};
use qdelta_core::{Error, Result};
use std::collections::HashMap;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior,
};

/// A tokenizer without its added tokens.
pub struct Encoder {
    normalizer: Option<NormalizerWrapper>,
    splitter: Option<PreTokenizerWrapper>,
    bpe: Bpe,
    file: &'static str, // what errors name
}

impl Encoder {
    /// The tokenizer of a tokenizer.json, and the added tokens that it states.
    pub fn from_tokenizer_json(content: &[u8]) -> Result<(Encoder, Vec<AddedToken>)> {
        guarded("tokenizer.json", || file::read(content))
    }

    /// The tokenizer of a vocabulary and its merges, by rank. `pattern` splits text into words.
    pub fn from_vocab_and_merges(
        vocab: &HashMap<String, u32>,
        merges: &[(String, String)],
        pattern: &str,
    ) -> Result<Encoder> {
        const FILES: &str = "vocab.json, merges.txt";
        guarded(FILES, || {
            let vocab = vocab.iter().map(|(text, id)| (text.as_str(), *id));
            let merges = merges.iter().map(|(left, right)| (left.as_str(), right.as_str()));
            let bpe = Bpe::new(vocab, merges).map_err(|error| unusable(FILES, error))?;
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|error| unusable(FILES, error))?;
            let bytes = ByteLevel::new(false, true, false);
            let splitter = Sequence::new(vec![split.into(), bytes.into()]);
            let (normalizer, splitter) = (Some(NFC.into()), Some(splitter.into()));
            Ok(Encoder { normalizer, splitter, bpe, file: FILES })
        })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        guarded(self.file, || {
            let words = self.words(text).map_err(|error| unusable(self.file, error))?;
            let mut ids = Vec::new();
            let mut scratch = Scratch::default();
            for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::None) {
                self.bpe.encode(word, &mut scratch, &mut ids);
            }
            Ok(ids)
        })
    }

    /// Parts of `text` that are encoded on their own.
    fn words(&self, text: &str) -> tokenizers::Result<PreTokenizedString> {
        let mut text = NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer {
            normalizer.normalize(&mut text)?;
        }
        let mut words = PreTokenizedString::from(text);
        if let Some(splitter) = &self.splitter {
            splitter.pre_tokenize(&mut words)?;
        }
        Ok(words)
    }

    /// The largest id + 1.
    pub fn size(&self) -> u32 {
        self.bpe.size()
    }

    /// The token `id` as the file spells it.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.bpe.token(id)
    }

    /// All tokens with their ids.
    pub fn tokens(&self) -> HashMap<&str, u32> {
        self.bpe.tokens().collect()
    }

    /// Pairs of tokens that become one, by rank.
    pub fn merges(&self) -> Vec<(&str, &str)> {
        self.bpe.merges()
    }
}

fn unusable(file: &str, error: impl Display) -> Error {
    let text: String = error.to_string().chars().take(300).collect();
    Error::File(format!("{file}: not a usable tokenizer: {text}"))
}

/// Runs `work`; the library panics where a pattern takes too many steps.
fn guarded<T>(file: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    // A panic leaves nothing behind: what is being built is dropped, and encoding changes nothing.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Err(unusable(file, text.unwrap_or("it cannot be used")))
    })
}
