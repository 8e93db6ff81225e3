//! Reading a tokenizer.json.

use crate::bpe::{Bpe, MAX_ID};
use crate::{Encoder, unusable};
use qdelta_core::{Error, Result};
use serde::Deserialize;
use serde::de::Unexpected::Str;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use tokenizers::{NormalizerWrapper, PostProcessor, PostProcessorWrapper, PreTokenizerWrapper};

const FILE: &str = "tokenizer.json";

/// A token that is found in text as a whole.
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
struct TokenizerJson<'a> {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    #[serde(borrow)]
    model: BpeJson<'a>,
}

/// The model's part; older files lack some of it.
#[derive(Deserialize)]
struct BpeJson<'a> {
    r#type: Option<String>,
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    #[serde(borrow)]
    vocab: Vocab<'a>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
}

/// A text of the file, where it stands unless it has escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Entries of an object: texts and ids.
struct Vocab<'a>(Vec<(Text<'a>, u32)>);

/// Two tokens that become one: a list of them, or in older files one text with a space between them.
struct Merge<'a>(Text<'a>, Text<'a>);

/// The tokenizer in the file `content`, and its added tokens.
pub fn read(content: &[u8]) -> Result<(Encoder, Vec<AddedToken>)> {
    let file = match serde_json::from_slice::<TokenizerJson>(content) {
        Ok(file) => file,
        Err(error) => return Err(not_bpe(content).unwrap_or_else(|| unusable(FILE, error))),
    };
    if let Some(what) = unsupported(&file) {
        return Err(Error::Unsupported(format!("{FILE}: {what}")));
    }
    let vocab = file.model.vocab.0.iter().map(|(text, id)| (&*text.0, *id));
    let merges = file.model.merges.iter().map(|Merge(left, right)| (&*left.0, &*right.0));
    let bpe = Bpe::new(vocab, merges).map_err(|error| unusable(FILE, error))?;
    check_added(&file.added_tokens, &bpe).map_err(|error| unusable(FILE, error))?;
    let (normalizer, splitter) = (file.normalizer, file.pre_tokenizer);
    Ok((Encoder { normalizer, splitter, bpe, file: FILE }, file.added_tokens))
}

/// What the file asks for that is not done.
fn unsupported(file: &TokenizerJson) -> Option<String> {
    let model = &file.model;
    if let Some(version) = file.version.as_ref().filter(|version| *version != "1.0") {
        return Some(format!("version {version}, only 1.0 is supported"));
    }
    if let Some(kind) = model.r#type.as_ref().filter(|kind| *kind != "BPE") {
        return Some(only_bpe(kind));
    }
    if file.post_processor.as_ref().is_some_and(|processor| processor.added_tokens(false) > 0) {
        return Some("post_processor adds tokens; none are expected".to_owned());
    }
    let text = |value: &Option<String>| value.as_ref().is_some_and(|text| !text.is_empty());
    let options = [
        ("dropout", model.dropout.is_some_and(|share| share != 0.0)),
        ("unk_token", model.unk_token.is_some()),
        ("continuing_subword_prefix", text(&model.continuing_subword_prefix)),
        ("end_of_word_suffix", text(&model.end_of_word_suffix)),
        ("byte_fallback", model.byte_fallback == Some(true)),
        ("ignore_merges", model.ignore_merges == Some(true)),
    ];
    let used = options.iter().find(|(_, used)| *used);
    used.map(|(option, _)| format!("model.{option} is set, byte-level BPE without it is supported"))
}

fn only_bpe(kind: &str) -> String {
    format!("model type {kind}, only BPE is supported")
}

/// The error for a model of another type, whose tables are something else.
fn not_bpe(content: &[u8]) -> Option<Error> {
    #[derive(Deserialize)]
    struct Typed {
        r#type: Option<String>,
    }
    #[derive(Deserialize)]
    struct File {
        model: Typed,
    }
    let kind = serde_json::from_slice::<File>(content).ok()?.model.r#type?;
    (kind != "BPE").then(|| Error::Unsupported(format!("{FILE}: {}", only_bpe(&kind))))
}

/// Added tokens may be in the vocabulary, under the same ids.
fn check_added(added: &[AddedToken], bpe: &Bpe) -> std::result::Result<(), String> {
    let texts: HashMap<u32, &str> = added.iter().map(|t| (t.id, t.content.as_str())).collect();
    for AddedToken { id, content, .. } in added {
        let contradicts = texts[id] != content
            || bpe.id(content).is_some_and(|other| other != *id)
            || bpe.token(*id).is_some_and(|other| other != content);
        if content.is_empty() || *id > MAX_ID || contradicts {
            return Err(format!("added token {content:?} cannot have the id {id}"));
        }
    }
    Ok(())
}

impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of ids by token")
            }

            fn visit_map<A>(self, mut map: A) -> std::result::Result<Vocab<'de>, A::Error>
            where
                A: MapAccess<'de>,
            {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Vocab(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Two;
        impl<'de> Visitor<'de> for Two {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("two tokens, in a list or in a text")
            }

            fn visit_seq<A>(self, list: A) -> std::result::Result<Merge<'de>, A::Error>
            where
                A: SeqAccess<'de>,
            {
                let (left, right) = Deserialize::deserialize(SeqAccessDeserializer::new(list))?;
                Ok(Merge(left, right))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Merge<'de>, E> {
                let halves = text.split_once(' ').filter(|(_, right)| !right.contains(' '));
                let (left, right) = halves.ok_or_else(|| E::invalid_value(Str(text), &self))?;
                let [left, right] = [left, right].map(|text| Text(Cow::Owned(text.to_owned())));
                Ok(Merge(left, right))
            }
        }
        deserializer.deserialize_any(Two)
    }
}
