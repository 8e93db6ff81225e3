//! The converted file: a safetensors file whose matrices are laid out as the kernels read them.
//!
//! Names are those of the model's table; a quantised matrix ends in its format (`.w4`, `.w6_k`, …)
//! and is U8 [panels, bytes of a panel] or [rows, bytes of a row]. `file:NAME` holds the file NAME of the checkpoint folder. The
//! data starts at a multiple of 4096 and every tensor at a multiple of 64 after that; `padding.N`
//! fills the gaps, because the format allows no holes. `__metadata__` says where it comes from:
//!
//!     qdelta.hash      BLAKE3 of the data, hexadecimal
//!     qdelta.version   of this layout
//!     qdelta.quant     the recipe: w4, w8, …; gguf for the numbers of a GGUF file
//!     qdelta.convention  transformers or gguf: see [`Convention`]
//!     qdelta.creator   the program that wrote it
//!     qdelta.config    config.json
//!     qdelta.sources   [[name, bytes, nanoseconds since 1970 of the last change], …]

use super::mmap::Mapping;
use super::safetensors::read_header;
use super::{Convention, SourceFile, file_name};
use crate::error::{Error, Result, json_text, short};
use crate::quant::Quant;
use crate::tensor::Dtype;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Version of the layout. It counts every change of what the bytes mean, block formats included.
pub const VERSION: &str = "6";
/// Tensors start at multiples of this.
pub const ALIGNMENT: usize = 64;
const DATA_ALIGNMENT: usize = 4096;
const ATTACHMENT: &str = "file:";
const PADDING: &str = "padding.";
/// How every header starts. The hash is first, so that nothing before it can look like it.
const START: &str = "{\"__metadata__\":{\"qdelta.hash\":\"";
const HASH_DIGITS: usize = 64;
/// Bytes that are hashed before their memory is given back.
const VERIFY_BYTES: usize = 16 << 20;

/// What the metadata of a converted file says.
pub struct Info {
    pub quant: Quant,
    pub convention: Convention,
    pub config_json: String,
    /// The files it was made from.
    pub sources: Vec<SourceFile>,
}

/// One tensor to be written.
#[derive(Clone, Debug)]
pub struct Item {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: usize,
}

/// Where everything goes in a file to be written.
pub struct Layout {
    /// With a hash of zeros.
    pub header: Vec<u8>,
    /// Where the digits of the hash go in the header.
    pub hash_at: usize,
    /// Bytes of padding after each item.
    pub padding: Vec<usize>,
    /// Bytes of all items and their padding.
    pub data_bytes: usize,
}

/// Whether this is the metadata of a converted file, of whatever version.
pub fn is_converted(metadata: &BTreeMap<String, String>) -> bool {
    metadata.contains_key("qdelta.version")
}

/// Whether a file was written by this program, even if it is damaged or of another version.
pub fn starts_like_converted(bytes: &[u8]) -> bool {
    bytes.get(size_of::<u64>()..).is_some_and(|header| header.starts_with(START.as_bytes()))
}

/// The name of the attached file, if the tensor is one.
pub fn attachment_name(tensor: &str) -> Option<&str> {
    tensor.strip_prefix(ATTACHMENT)
}

pub fn attachment_tensor(name: &str) -> String {
    format!("{ATTACHMENT}{name}")
}

pub fn is_padding(tensor: &str) -> bool {
    tensor.starts_with(PADDING)
}

impl Info {
    /// Reads the metadata of a converted file. file: its name, for errors.
    pub fn from_metadata(metadata: &BTreeMap<String, String>, file: &str) -> Result<Info> {
        let get = |key: &str| {
            metadata
                .get(key)
                .ok_or_else(|| Error::File(format!("{file}: metadata `{key}` is missing")))
        };
        if !is_converted(metadata) {
            return Err(Error::File(format!(
                "{file}: not a file that qdelta converted; give the checkpoint folder that holds \
                 config.json"
            )));
        }
        let version = get("qdelta.version")?;
        if version != VERSION {
            return Err(Error::Unsupported(format!(
                "{file}: `qdelta.version` is \"{}\", this program reads {VERSION:?}; convert \
                 the checkpoint again",
                short(version)
            )));
        }
        let quant = match get("qdelta.quant")?.parse() {
            Ok(quant) if quant != Quant::None => quant,
            _ => {
                return Err(Error::File(format!(
                    "{file}: `qdelta.quant` is \"{}\", expected \"w4\", \"w8\" or another recipe",
                    short(&metadata["qdelta.quant"])
                )));
            }
        };
        let convention = get("qdelta.convention")?;
        let convention = Convention::named(convention).ok_or_else(|| {
            Error::File(format!(
                "{file}: `qdelta.convention` is \"{}\", expected \"transformers\" or \"gguf\"",
                short(convention)
            ))
        })?;
        let sources: Vec<(String, u64, u64)> = serde_json::from_str(get("qdelta.sources")?)
            .map_err(|e| {
                Error::File(format!("{file}: `qdelta.sources` is not valid: {}", json_text(&e)))
            })?;
        Ok(Info {
            quant,
            convention,
            config_json: get("qdelta.config")?.clone(),
            sources: sources
                .into_iter()
                .map(|(name, bytes, modified_ns)| SourceFile { name, bytes, modified_ns })
                .collect(),
        })
    }

    /// Places items one after the other.
    pub fn layout(&self, items: &[Item]) -> Layout {
        let sources: Vec<_> =
            self.sources.iter().map(|s| (&s.name, s.bytes, s.modified_ns)).collect();
        let zeros = "0".repeat(HASH_DIGITS);
        let metadata = [
            ("qdelta.version", VERSION),
            ("qdelta.quant", &self.quant.to_string()),
            ("qdelta.convention", self.convention.name()),
            ("qdelta.creator", concat!("qdelta ", env!("CARGO_PKG_VERSION"))),
            ("qdelta.config", &self.config_json),
            ("qdelta.sources", &json(&sources)),
        ]
        .map(|(key, value)| format!("{}:{}", json(key), json(value)));

        let mut header = format!("{START}{zeros}\",{}}}", metadata.join(","));
        let mut at = 0;
        let mut add = |name: &str, dtype: Dtype, shape: &[usize], bytes: usize| {
            write!(
                header,
                ",{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{at},{}]}}",
                json(name),
                dtype.name(),
                json(shape),
                at + bytes
            )
            .expect("a string takes all that is written");
            at += bytes;
        };
        let mut padding = Vec::with_capacity(items.len());
        for (i, item) in items.iter().enumerate() {
            add(&item.name, item.dtype, &item.shape, item.bytes);
            let gap = item.bytes.next_multiple_of(ALIGNMENT) - item.bytes;
            if gap > 0 {
                add(&format!("{PADDING}{i}"), Dtype::U8, &[gap], gap);
            }
            padding.push(gap);
        }
        header.push('}');

        let prefix = size_of::<u64>();
        let length = (prefix + header.len()).next_multiple_of(DATA_ALIGNMENT) - prefix;
        let mut bytes = (length as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(prefix + length, b' ');
        Layout { header: bytes, hash_at: prefix + START.len(), padding, data_bytes: at }
    }
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("strings and numbers have a JSON form")
}

/// Reads all of a converted file and compares its data with the hash in its header.
pub fn verify(path: &Path) -> Result<()> {
    let (mapping, file) = (Mapping::open(path)?, file_name(path));
    let bytes = mapping.bytes();
    let header = read_header(&bytes, &file)?;
    Info::from_metadata(&header.metadata, &file)?;
    let expected = header.metadata.get("qdelta.hash").map_or("none", String::as_str);
    let mut hasher = blake3::Hasher::new();
    for part in bytes[header.data_start..].chunks(VERIFY_BYTES) {
        hasher.update(part);
        mapping.release(part);
    }
    let found = hasher.finalize().to_hex();
    if found.as_str() != expected {
        return Err(Error::File(format!(
            "{file}: hash of the data is {found}, expected {expected}; the file is damaged, \
             convert the checkpoint again"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> Info {
        Info {
            quant: Quant::W4,
            convention: Convention::Gguf,
            config_json: "{\"qdelta.hash\":\"0\", \"x\": \"é\"}".to_owned(),
            sources: vec![SourceFile { name: "a \"b\"".to_owned(), bytes: 5, modified_ns: 1 }],
        }
    }

    #[test]
    fn round_trip() {
        let items: Vec<Item> = [("a.w4", 576), ("b", 3), ("c", 64), ("d", 65), ("e", 0)]
            .map(|(name, bytes)| Item {
                name: name.to_owned(),
                dtype: Dtype::U8,
                shape: vec![bytes],
                bytes,
            })
            .to_vec();
        let layout = info().layout(&items);
        assert_eq!(layout.header.len() % DATA_ALIGNMENT, 0);
        assert_eq!(layout.header[layout.hash_at..][..HASH_DIGITS], [b'0'; HASH_DIGITS]);
        let mut bytes = layout.header;
        bytes.resize(bytes.len() + layout.data_bytes, 0);
        let header = read_header(&bytes, "a").expect("a valid file");
        assert_eq!(header.data_start % DATA_ALIGNMENT, 0);
        for item in &items {
            let entry = header.entries.iter().find(|e| e.name == item.name).expect("the item");
            assert_eq!(entry.range.start % ALIGNMENT, 0);
            assert_eq!(entry.range.len(), item.bytes);
        }
        let read = Info::from_metadata(&header.metadata, "a").expect("valid metadata");
        assert_eq!((read.quant, read.convention), (Quant::W4, Convention::Gguf));
        assert_eq!(read.config_json, info().config_json);
        assert_eq!(read.sources, info().sources);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let bytes = info().layout(&[]).header;
        let good = read_header(&bytes, "a").expect("a valid file").metadata;
        for (key, value, expected) in [
            ("qdelta.version", Some("7"), "this program reads \"6\"; convert the checkpoint again"),
            ("qdelta.version", None, "not a file that qdelta converted"),
            ("qdelta.convention", Some("bold"), "`qdelta.convention` is \"bold\""),
            ("qdelta.quant", Some("none"), "`qdelta.quant` is \"none\", expected \"w4\""),
            ("qdelta.config", None, "metadata `qdelta.config` is missing"),
            ("qdelta.sources", Some("[[1]]"), "`qdelta.sources` is not valid"),
        ] {
            let mut metadata = good.clone();
            match value {
                Some(value) => metadata.insert(key.to_owned(), value.to_owned()),
                None => metadata.remove(key),
            };
            let error = Info::from_metadata(&metadata, "a").err().expect(key).to_string();
            assert!(error.starts_with("a: ") && error.contains(expected), "{error}");
        }
    }
}
