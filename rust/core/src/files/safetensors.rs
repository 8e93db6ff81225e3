//! The header of a safetensors file.
//!
//!     u64      n, little-endian
//!     n bytes  JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}; optionally
//!              "__metadata__" -> {string: string}
//!     the data; offsets count from here
//!
//! Tensors fill the data without overlap and without holes, as the format demands.

use super::shape_text;
use crate::error::{Error, Result, json_text, short};
use safetensors::tensor::TensorInfo;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

/// The longest header that the format allows.
const MOST_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// What a header says, checked against the length of the file.
#[derive(Debug)]
pub struct Header {
    /// In the order of their data.
    pub entries: Vec<Entry>,
    pub metadata: BTreeMap<String, String>,
    /// Where the data starts in the file.
    pub data_start: usize,
}

/// One tensor of a header.
#[derive(Debug)]
pub struct Entry {
    pub name: String,
    /// As the file spells it.
    pub dtype: String,
    pub shape: Vec<usize>,
    /// In the file.
    pub range: Range<usize>,
}

/// Reads and checks the header. bytes: the whole file; file: its name, for errors.
pub fn read_header(bytes: &[u8], file: &str) -> Result<Header> {
    let wrong = |text: String| Error::File(format!("{file}: {text}"));
    let (length, rest) = bytes.split_first_chunk().ok_or_else(|| {
        wrong(format!("{} bytes, expected at least 8 of a safetensors file", bytes.len()))
    })?;
    let length = u64::from_le_bytes(*length);
    if length > MOST_HEADER {
        return Err(wrong(format!(
            "header of {length} bytes, expected at most {MOST_HEADER}; \
             the file is damaged or no safetensors file"
        )));
    }
    // At most 100 million, so it fits.
    let length = length as usize;
    let json = rest.get(..length).ok_or_else(|| {
        wrong(format!("header of {length} bytes, the file has {} after its length", rest.len()))
    })?;
    let json = std::str::from_utf8(json)
        .map_err(|e| wrong(format!("header is not UTF-8 text at byte {}", e.valid_up_to())))?;
    let RawHeader { tensors, metadata } = serde_json::from_str(json)
        .map_err(|e| wrong(format!("header is not valid: {}", json_text(&e))))?;

    let data = rest.len() - length;
    let mut names = HashSet::with_capacity(tensors.len());
    for (name, info) in &tensors {
        let wrong = |text: String| wrong(format!("tensor `{}`: {text}", short(name)));
        if !names.insert(name) {
            return Err(wrong("named twice".to_owned()));
        }
        let (begin, end) = info.data_offsets;
        if begin > end {
            return Err(wrong(format!("begins at {begin}, ends at {end}")));
        }
        if end > data {
            return Err(wrong(format!(
                "ends at {end}, the file has {data} bytes of data; it is cut short or damaged"
            )));
        }
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, dim| n.checked_mul(*dim));
        match bits {
            Some(bits) if bits.is_multiple_of(8) && bits / 8 == end - begin => {}
            Some(bits) => {
                return Err(wrong(format!(
                    "{} bytes, expected {} for {} {}",
                    end - begin,
                    bits.div_ceil(8),
                    info.dtype,
                    shape_text(&info.shape)
                )));
            }
            None => {
                let shape = shape_text(&info.shape);
                return Err(wrong(format!("shape {shape} has more elements than fit")));
            }
        }
    }

    let mut tensors = tensors;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut covered = 0;
    for (name, info) in &tensors {
        let (begin, end) = info.data_offsets;
        if begin != covered {
            let what =
                if begin < covered { "overlaps the tensor before it" } else { "leaves a hole" };
            return Err(wrong(format!(
                "tensor `{}`: begins at {begin}, expected {covered}: {what}",
                short(name)
            )));
        }
        covered = end;
    }
    if covered != data {
        return Err(wrong(format!("{data} bytes of data, expected {covered} for its tensors")));
    }

    let data_start = 8 + length;
    let entries = tensors.into_iter().map(|(name, info)| Entry {
        name,
        dtype: info.dtype.to_string(),
        shape: info.shape,
        range: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
    });
    Ok(Header { entries: entries.collect(), metadata, data_start })
}

/// The JSON as it stands. A map type would silently keep one of two equal names.
struct RawHeader {
    tensors: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> serde::Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<RawHeader, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA {
                        tensors.push((name, map.next_value()?));
                    } else if metadata.replace(map.next_value::<Option<_>>()?).is_some() {
                        return Err(serde::de::Error::custom("__metadata__ is there twice"));
                    }
                }
                let metadata = metadata.flatten().unwrap_or_default();
                Ok(RawHeader { tensors, metadata })
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn error(header: &str, data: usize) -> String {
        read_header(&file(header, data), "a.safetensors").expect_err(header).to_string()
    }

    #[test]
    fn valid() {
        let json = r#"{"b": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
            "none": {"dtype": "I64", "shape": [0], "data_offsets": [6, 6]},
            "scalar": {"dtype": "U8", "shape": [], "data_offsets": [14, 15]}}"#;
        let bytes = file(json, 15);
        let header = read_header(&bytes, "a.safetensors").expect("a valid file");
        let names: Vec<&str> = header.entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["a", "none", "b", "scalar"]);
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.data_start, 8 + json.len());
        let a = &header.entries[0];
        assert_eq!((a.dtype.as_str(), &a.shape[..]), ("BF16", &[3, 1][..]));
        assert_eq!(a.range, header.data_start..header.data_start + 6);
        assert_eq!(header.entries[3].range.end, bytes.len());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let tensor = |shape: &str, begin: &str, end: &str| {
            format!(
                r#"{{"t": {{"dtype": "BF16", "shape": {shape},
                "data_offsets": [{begin}, {end}]}}}}"#
            )
        };
        for (header, data, expected) in [
            (tensor("[2]", "4", "0"), 4, "tensor `t`: begins at 4, ends at 0"),
            (tensor("[2]", "0", "4"), 3, "tensor `t`: ends at 4, the file has 3 bytes of data;"),
            (tensor("[3]", "0", "4"), 4, "tensor `t`: 4 bytes, expected 6 for BF16 [3]"),
            (
                tensor("[4294967296, 4294967296]", "0", "0"),
                0,
                "tensor `t`: shape [4294967296, 4294967296] has more elements than fit",
            ),
            (tensor("[1]", "2", "4"), 4, "tensor `t`: begins at 2, expected 0: leaves a hole"),
            (tensor("[1]", "0", "2"), 4, "4 bytes of data, expected 2 for its tensors"),
            ("[]".into(), 0, "header is not valid: "),
            (tensor("[1]", "-1", "1"), 2, "header is not valid: "),
            (tensor("[-1]", "0", "2"), 2, "header is not valid: "),
            (tensor("[1e30]", "0", "2"), 2, "header is not valid: "),
            (tensor("[1]", "0", "18446744073709551616"), 2, "header is not valid: "),
            (
                r#"{"t": {"dtype": "F7", "shape": [], "data_offsets": [0, 0]}}"#.into(),
                0,
                "header is not valid: ",
            ),
            (
                r#"{"t": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}"#.into(),
                2,
                "tensor `t`: 2 bytes",
            ),
            (r#"{"__metadata__": {"a": 1}}"#.into(), 0, "header is not valid: "),
            (r#"{"__metadata__": {}, "__metadata__": {}}"#.into(), 0, "header is not valid: "),
            ("[".repeat(100_000), 0, "header is not valid: "),
            (format!(r#"{{"t": {}"#, "[".repeat(100_000)), 0, "header is not valid: "),
        ] {
            let error = error(&header, data);
            let start = format!("a.safetensors: {expected}");
            assert!(error.starts_with(&start), "{error}, expected {start}");
        }
    }

    #[test]
    fn names_and_overlaps() {
        let two = |a: &str, b: &str, second: &str| {
            format!(
                r#"{{"{a}": {{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
                "{b}": {{"dtype": "U8", "shape": [4], "data_offsets": {second}}}}}"#
            )
        };
        assert_eq!(error(&two("t", "t", "[4, 8]"), 8), "a.safetensors: tensor `t`: named twice");
        for second in ["[0, 4]", "[2, 6]"] {
            let error = error(&two("a", "b", second), 6);
            assert!(error.ends_with("expected 4: overlaps the tensor before it"), "{error}");
        }
    }

    #[test]
    fn lengths() {
        let error = |bytes: &[u8]| read_header(bytes, "a").expect_err("no header").to_string();
        assert_eq!(error(&[0; 7]), "a: 7 bytes, expected at least 8 of a safetensors file");
        assert!(error(&u64::MAX.to_le_bytes()).contains("expected at most 100000000"));
        assert_eq!(
            error(&[5, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']),
            "a: header of 5 bytes, the file has 2 after its length"
        );
        assert!(error(&[2, 0, 0, 0, 0, 0, 0, 0, b'{', 0xff]).contains("not UTF-8 text at byte 1"));
    }
}
