//! Text between added tokens to ids: byte-level BPE by the `tokenizers` library.
//!
//! The library reads a whole tokenizer.json by trying kinds of models in turn, which takes twice as long and
//! keeps twice as much as reading each part as what it is.

use ahash::AHashMap;
use qdelta_core::{Error, Result};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessor, PostProcessorWrapper,
    PreTokenizerWrapper, SplitDelimiterBehavior, TokenizerImpl,
};

/// Ids are 32-bit integers with a sign elsewhere.
const MAX_ID: u32 = i32::MAX as u32;

type Library = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A tokenizer without its added tokens.
pub struct Encoder {
    library: Library,
    /// The largest id + 1.
    pub size: u32,
    file: &'static str, // what errors name
}

/// A token that is found in text as a whole, as tokenizer.json states it.
#[derive(Debug, Deserialize)]
pub struct AddedToken {
    pub id: u32,
    pub content: String,
    pub special: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub single_word: bool,
}

#[derive(Deserialize)]
struct TokenizerJson {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    model: BPE,
}

impl Encoder {
    /// The tokenizer of a tokenizer.json, and the added tokens that it states.
    pub fn from_tokenizer_json(content: &[u8]) -> Result<(Encoder, Vec<AddedToken>)> {
        guarded("tokenizer.json", || read(content))
    }

    /// The tokenizer of a vocabulary and its merges, by rank. `pattern` splits text into words.
    pub fn from_vocab_and_merges(
        vocab: HashMap<String, u32>,
        merges: Vec<(String, String)>,
        pattern: &str,
    ) -> Result<Encoder> {
        const FILES: &str = "vocab.json, merges.txt";
        let build = || {
            let bpe =
                BPE::builder().vocab_and_merges(AHashMap::from_iter(vocab), merges).build()?;
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            let bytes = ByteLevel::new(false, true, false);
            let splitter = Sequence::new(vec![split.into(), bytes.into()]);
            Encoder::new(bpe, Some(NFC.into()), Some(splitter.into()), FILES)
        };
        guarded(FILES, || build().map_err(|error| unusable(FILES, error)))
    }

    fn new(
        bpe: BPE,
        normalizer: Option<NormalizerWrapper>,
        splitter: Option<PreTokenizerWrapper>,
        file: &'static str,
    ) -> tokenizers::Result<Encoder> {
        let mut library = Library::new(bpe);
        library.with_normalizer(normalizer)?;
        library.with_pre_tokenizer(splitter);
        let size = size(library.get_model());
        Ok(Encoder { library, size, file })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        guarded(self.file, || {
            let encoding = self.library.encode_fast(text, false);
            let encoding = encoding.map_err(|error| unusable(self.file, error))?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// The token `id` as the file spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.library.get_model().id_to_token(id)
    }

    /// Ids of all tokens.
    pub fn tokens(&self) -> HashMap<String, u32> {
        self.library.get_model().get_vocab()
    }

    /// Pairs of tokens that become one, by rank.
    pub fn merges(&self) -> Result<Vec<(String, String)>> {
        #[derive(Deserialize)]
        struct Ranked {
            merges: Vec<(String, String)>,
        }
        let model = serde_json::to_value(self.library.get_model());
        let ranked = model.and_then(serde_json::from_value::<Ranked>);
        Ok(ranked.map_err(|error| Error::Internal(format!("merges: {error}")))?.merges)
    }
}

/// The largest id + 1.
fn size(model: &BPE) -> u32 {
    let count = model.get_vocab_size() as u32;
    if (0..count).all(|id| model.id_to_token(id).is_some()) {
        return count;
    }
    // Where an id is missing, a larger one is there.
    model.get_vocab().into_values().max().map_or(0, |id| id.saturating_add(1))
}

fn read(content: &[u8]) -> Result<(Encoder, Vec<AddedToken>)> {
    const FILE: &str = "tokenizer.json";
    let unsupported = |what: &str| Err(Error::Unsupported(format!("{FILE}: {what}")));
    let file = match serde_json::from_slice::<TokenizerJson>(content) {
        Ok(file) => file,
        Err(error) => match kind_of(content).filter(|kind| kind != "BPE") {
            Some(kind) => {
                return unsupported(&format!("model type {kind}, only BPE is supported"));
            }
            None => return Err(unusable(FILE, error)),
        },
    };
    if let Some(version) = file.version.filter(|version| version != "1.0") {
        return unsupported(&format!("version {version}, only 1.0 is supported"));
    }
    if file.post_processor.is_some_and(|processor| processor.added_tokens(false) > 0) {
        return unsupported("post_processor adds tokens; none are expected");
    }
    check_added(&file.added_tokens, &file.model).map_err(|error| unusable(FILE, error))?;
    let encoder = Encoder::new(file.model, file.normalizer, file.pre_tokenizer, FILE)
        .map_err(|error| unusable(FILE, error))?;
    match encoder.size {
        size if size > MAX_ID => Err(unusable(FILE, format!("a token has the id {}", size - 1))),
        _ => Ok((encoder, file.added_tokens)),
    }
}

/// Added tokens may be in the vocabulary, under the same ids.
fn check_added(added: &[AddedToken], model: &BPE) -> std::result::Result<(), String> {
    let texts: HashMap<u32, &str> = added.iter().map(|t| (t.id, t.content.as_str())).collect();
    for AddedToken { id, content, .. } in added {
        let in_vocabulary = model.token_to_id(content);
        let contradicts = texts[id] != content
            || in_vocabulary.is_some_and(|other| other != *id)
            || model.id_to_token(*id).is_some_and(|other| other != *content);
        if content.is_empty() || *id > MAX_ID || contradicts {
            return Err(format!("added token {content:?} cannot have the id {id}"));
        }
    }
    Ok(())
}

/// The type of the model in a tokenizer.json, whatever its tables are.
fn kind_of(content: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Typed {
        r#type: Option<String>,
    }
    #[derive(Deserialize)]
    struct File {
        model: Typed,
    }
    serde_json::from_slice::<File>(content).ok()?.model.r#type
}

fn unusable(file: &str, error: impl Display) -> Error {
    let text: String = error.to_string().chars().take(300).collect();
    Error::File(format!("{file}: not a usable tokenizer: {text}"))
}

/// Runs `work`; the library panics where a pattern takes too many steps.
fn guarded<T>(file: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    // A panic leaves nothing behind: what is being built is dropped, and encoding only adds to the
    // library's cache of words, whole entries at a time.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Err(unusable(file, text.unwrap_or("it cannot be used")))
    })
}
