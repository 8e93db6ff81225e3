//! GGUF files, versions 2 and 3, whole or split into parts.
//!
//!     "GGUF"   u32 version   u64 tensors   u64 entries
//!     entries  string key, u32 type, value; an array is u32 type, u64 count, elements
//!     tensors  string name, u32 n <= 4, n x u64 sizes, fastest axis first, u32 type, u64 offset
//!     padding to the alignment; the data, from which offsets count
//!
//! A string is a u64 length and bytes. Numbers are little-endian. The parts of a split file each
//! have their own tensors and data; the first has the metadata.

use super::mmap::Mapping;
use super::{FileTensor, file_name};
use crate::error::{Error, Result};
use crate::quant::BlockType;
use crate::tensor::Bytes;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
const MOST_ALIGNMENT: u64 = 1 << 20;
const MOST_DIMS: u32 = 4;
/// Longer arrays are passed over; vocabularies have a quarter of a million entries.
const MOST_ARRAY: u64 = 1 << 22;
/// Names are no longer than this, in any program that reads them.
const MOST_NAME: usize = 1 << 16;

/// Types that are not decoded: id, name, columns and bytes of a block.
const OTHER_TYPES: [(u32, &str, usize, usize); 15] = [
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
];
const FLOAT_TYPES: [(u32, &str, usize, usize); 3] =
    [(0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2)];

/// Whether a file says that it is one.
pub fn starts_like_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// A value of the metadata.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

impl Value {
    /// The value as a count, whatever integer type the file chose.
    pub fn count(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
}

/// The metadata of a file; values are read when they are asked for.
pub struct Metadata {
    file: String,
    bytes: Bytes,
    /// Type and place of each value.
    entries: BTreeMap<String, (u32, Range<usize>)>,
}

impl Metadata {
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The value of a key; an error if one of its strings is no UTF-8.
    pub fn get(&self, key: &str) -> Result<Option<Value>> {
        let Some((kind, range)) = self.entries.get(key) else { return Ok(None) };
        let mut reader = Reader { bytes: &self.bytes, at: range.start, file: &self.file };
        let value = reader.value(*kind, key)?;
        Ok(Some(value))
    }
}

/// A file with all its parts, mapped.
pub struct Gguf {
    pub metadata: Metadata,
    /// With unique names; shapes are slowest axis first.
    pub tensors: Vec<FileTensor>,
    pub mappings: Vec<Arc<Mapping>>,
}

impl Gguf {
    /// Opens a file, and the other parts if it is one of several.
    pub fn open(path: &Path) -> Result<Gguf> {
        let paths = parts_of(path);
        let n = paths.len();
        let mut parts = Vec::with_capacity(n);
        for (i, path) in paths.iter().enumerate() {
            if !path.exists() && n > 1 {
                return Err(Error::File(format!(
                    "{}: missing, expected beside the other {} parts of the file",
                    path.display(),
                    n - 1
                )));
            }
            let mapping = Mapping::open(path)?;
            let part = Part::read(mapping.bytes(), &file_name(path))?;
            part.check_split(i, n)?;
            parts.push((part, mapping));
        }
        let mut names = HashSet::new();
        for (part, _) in &parts {
            for tensor in &part.tensors {
                if !names.insert(&tensor.name) {
                    return Err(Error::File(format!("{}: named twice", tensor.place())));
                }
            }
        }
        let found = names.len() as u64;
        let expected = parts[0].0.metadata.get("split.tensors.count")?;
        if let Some(expected) = expected.as_ref().and_then(Value::count)
            && n > 1
            && expected != found
        {
            return Err(Error::File(format!(
                "{}: `split.tensors.count` is {expected}, its {n} parts have {found} tensors",
                parts[0].0.metadata.file
            )));
        }
        let mut metadata = None;
        let (mut tensors, mut mappings) = (Vec::new(), Vec::new());
        for (part, mapping) in parts {
            metadata.get_or_insert(part.metadata);
            tensors.extend(part.tensors);
            mappings.push(mapping);
        }
        let metadata = metadata.expect("there is at least one part");
        Ok(Gguf { metadata, tensors, mappings })
    }
}

/// All parts of a file by the name of one, `NAME-00002-of-00003.gguf`; else the file alone.
fn parts_of(path: &Path) -> Vec<PathBuf> {
    let name = file_name(path);
    let parsed = || {
        let stem = name.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (base, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| {
            let plain = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
            if plain { digits.parse::<usize>().ok() } else { None }
        };
        let (number, count) = (parse(number)?, parse(count)?);
        (1..=count).contains(&number).then(|| (base.to_owned(), count))
    };
    match parsed() {
        Some((base, count)) => (1..=count)
            .map(|i| path.with_file_name(format!("{base}-{i:05}-of-{count:05}.gguf")))
            .collect(),
        None => vec![path.to_owned()],
    }
}

/// What one file holds.
pub struct Part {
    pub metadata: Metadata,
    pub tensors: Vec<FileTensor>,
}

impl Part {
    /// Reads and checks a file. file: its name, for errors.
    pub fn read(bytes: Bytes, file: &str) -> Result<Part> {
        let mut reader = Reader { bytes: &bytes, at: 0, file };
        let (n_tensors, n_entries) = reader.start()?;
        let mut entries = BTreeMap::new();
        for _ in 0..n_entries {
            let key = reader.name("key")?;
            let kind = reader.u32()?;
            let start = reader.at;
            reader.skip(kind, &key)?;
            if entries.contains_key(&key) {
                return Err(reader.wrong(format!("key `{}` is there twice", short(&key))));
            }
            entries.insert(key, (kind, start..reader.at));
        }
        let metadata = Metadata { file: file.to_owned(), bytes: bytes.clone(), entries };
        let mut infos = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..n_tensors {
            let info = reader.tensor()?;
            if !names.insert(info.name.clone()) {
                return Err(reader.wrong(format!("tensor `{}`: named twice", short(&info.name))));
            }
            infos.push(info);
        }
        let alignment = match metadata.get(ALIGNMENT_KEY)?.map(|value| value.count()) {
            None => DEFAULT_ALIGNMENT,
            Some(Some(n)) if n.is_power_of_two() && n <= MOST_ALIGNMENT => n as usize,
            Some(n) => {
                let found = n.map_or("no count".to_owned(), |n| n.to_string());
                return Err(reader.wrong(format!(
                    "`{ALIGNMENT_KEY}` is {found}, expected a power of two up to {MOST_ALIGNMENT}"
                )));
            }
        };
        let data_start = reader.at.next_multiple_of(alignment);
        let tensors = place(&bytes, file, infos, data_start, alignment)?;
        Ok(Part { metadata, tensors })
    }

    /// An error if this is not part `i` of `n`.
    fn check_split(&self, i: usize, n: usize) -> Result<()> {
        let file = &self.metadata.file;
        for (key, expected) in [("split.no", i as u64), ("split.count", n as u64)] {
            let Some(found) = self.metadata.get(key)?.and_then(|value| value.count()) else {
                continue;
            };
            // A file that was put together again may keep a count of 0 or 1.
            let whole = n == 1 && found <= 1 && key == "split.count";
            if found != expected && !whole {
                return Err(Error::File(format!(
                    "{file}: `{key}` is {found}, expected {expected} by its name; parts are called \
                     NAME-00001-of-{:05}.gguf and so on",
                    found.max(n as u64)
                )));
            }
        }
        Ok(())
    }
}

/// A row of the tensor table.
struct TensorInfo {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
    offset: u64,
}

/// Cuts the tensors out of the data. They lie inside and do not overlap.
fn place(
    bytes: &Bytes,
    file: &str,
    mut infos: Vec<TensorInfo>,
    data_start: usize,
    alignment: usize,
) -> Result<Vec<FileTensor>> {
    infos.sort_by_key(|info| info.offset);
    let data = bytes.len().saturating_sub(data_start);
    let mut free = 0;
    let mut tensors = Vec::with_capacity(infos.len());
    for info in infos {
        let wrong =
            |text: String| Error::File(format!("{file}: tensor `{}`: {text}", short(&info.name)));
        let offset = usize::try_from(info.offset).unwrap_or(usize::MAX);
        if !offset.is_multiple_of(alignment) {
            return Err(wrong(format!("begins at {offset}, expected a multiple of {alignment}")));
        }
        let end = offset.checked_add(info.bytes).filter(|end| *end <= data).ok_or_else(|| {
            wrong(format!(
                "{} bytes at {offset}, the file has {data} bytes of data; it is cut short or \
                 damaged",
                info.bytes
            ))
        })?;
        if offset < free {
            return Err(wrong(format!(
                "begins at {offset}, inside the tensor that ends at {free}"
            )));
        }
        free = end;
        tensors.push(FileTensor {
            name: info.name,
            dtype: info.dtype.to_owned(),
            shape: info.shape,
            bytes: bytes.slice(data_start + offset..data_start + end),
            file: file.to_owned(),
        });
    }
    Ok(tensors)
}

/// The start of a name that a file gives, for messages.
fn short(name: &str) -> String {
    const MOST: usize = 100;
    match name.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &name[..at]),
        None => name.to_owned(),
    }
}

/// Reads a file from its start to its end.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Reader<'a> {
    fn wrong(&self, text: String) -> Error {
        Error::File(format!("{}: {text}", self.file))
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let n = usize::try_from(n).ok().filter(|n| *n <= rest.len()).ok_or_else(|| {
            self.wrong(format!(
                "{n} bytes expected at byte {}, the file has {}; it is cut short or damaged",
                self.at,
                rest.len()
            ))
        })?;
        self.at += n;
        Ok(&rest[..n])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(*self.take(N as u64)?.first_chunk().expect("as many bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8]> {
        let n = self.u64()?;
        self.take(n)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let start = self.at;
        let bytes = self.string()?;
        let text = std::str::from_utf8(bytes).ok().filter(|name| name.len() <= MOST_NAME);
        text.map(str::to_owned).ok_or_else(|| {
            self.wrong(format!("the {what} at byte {start} is no name: {} bytes", bytes.len()))
        })
    }

    /// The numbers of tensors and of entries.
    fn start(&mut self) -> Result<(u64, u64)> {
        let magic = self.take(MAGIC.len() as u64)?;
        if magic != MAGIC {
            return Err(self.wrong("no GGUF file".to_owned()));
        }
        let version = self.u32()?;
        if !matches!(version, 2 | 3) {
            let why = match (version, version.swap_bytes()) {
                (1, _) => "; convert the original again with a newer program",
                (_, 1..=3) => ", big-endian, expected little-endian",
                _ => "",
            };
            return Err(Error::Unsupported(format!(
                "{}: GGUF version {version}{why}; supported are 2 and 3",
                self.file
            )));
        }
        let (tensors, entries) = (self.u64()?, self.u64()?);
        // Each takes some bytes, so that larger numbers are damage.
        let rest = (self.bytes.len() - self.at) as u64;
        for (what, n) in [("tensors", tensors), ("entries of metadata", entries)] {
            if n > rest / 8 {
                return Err(self.wrong(format!("{n} {what}, the file has {rest} bytes after that")));
            }
        }
        Ok((tensors, entries))
    }

    /// Bytes of a value of fixed size.
    fn size(kind: u32) -> Option<u64> {
        match kind {
            0 | 1 | 7 => Some(1),
            2 | 3 => Some(2),
            4..=6 => Some(4),
            10..=12 => Some(8),
            _ => None,
        }
    }

    fn unknown(&self, kind: u32, key: &str) -> Error {
        self.wrong(format!("key `{}`: value of the unknown type {kind}", short(key)))
    }

    /// The type and number of an array's elements, which the file has room for.
    fn array_start(&mut self, key: &str) -> Result<(u32, u64)> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            8 => 8,
            _ => Self::size(kind).ok_or_else(|| match kind {
                9 => self.wrong(format!("key `{}`: an array of arrays", short(key))),
                _ => self.unknown(kind, key),
            })?,
        };
        let rest = (self.bytes.len() - self.at) as u64;
        if count > rest / size {
            return Err(self.wrong(format!(
                "key `{}`: an array of {count}, the file has {rest} bytes after that",
                short(key)
            )));
        }
        Ok((kind, count))
    }

    /// Passes over a value.
    fn skip(&mut self, kind: u32, key: &str) -> Result<()> {
        match kind {
            8 => self.string().map(drop),
            9 => match self.array_start(key)? {
                (8, count) => (0..count).try_for_each(|_| self.string().map(drop)),
                (kind, count) => {
                    let size = Self::size(kind).ok_or_else(|| self.unknown(kind, key))?;
                    // It fits, as `array_start` saw.
                    self.take(count * size).map(drop)
                }
            },
            _ => {
                let size = Self::size(kind).ok_or_else(|| self.unknown(kind, key))?;
                self.take(size).map(drop)
            }
        }
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed((self.array::<1>()?[0] as i8).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => {
                let text = std::str::from_utf8(self.string()?);
                let text = text.map_err(|e| {
                    let at = e.valid_up_to();
                    self.wrong(format!("key `{}`: a string is no UTF-8 at byte {at}", short(key)))
                })?;
                Value::Text(text.to_owned())
            }
            9 => {
                let (kind, count) = self.array_start(key)?;
                if count > MOST_ARRAY {
                    return Err(self.wrong(format!(
                        "key `{}`: an array of {count}, expected at most {MOST_ARRAY}",
                        short(key)
                    )));
                }
                let values = (0..count).map(|_| self.value(kind, key));
                Value::Array(values.collect::<Result<_>>()?)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.unknown(kind, key)),
        })
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let name = self.name("tensor's name")?;
        let file = self.file;
        let wrong =
            |text: String| Error::File(format!("{file}: tensor `{}`: {text}", short(&name)));
        let n = self.u32()?;
        if n > MOST_DIMS {
            return Err(wrong(format!("{n} dimensions, expected at most {MOST_DIMS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..n {
            let size = self.u64()?;
            shape.push(usize::try_from(size).map_err(|_| wrong(format!("a size of {size}")))?);
        }
        let (kind, offset) = (self.u32()?, self.u64()?);
        let blocks = BlockType::ALL.map(|b| (b.id(), b.name(), b.cols(), b.bytes()));
        let mut types = FLOAT_TYPES.iter().chain(&blocks).chain(&OTHER_TYPES);
        let (_, dtype, cols, block_bytes) = *types
            .find(|(id, ..)| *id == kind)
            .ok_or_else(|| wrong(format!("the unknown type {kind}")))?;
        let row = shape.first().copied().unwrap_or(1);
        if !row.is_multiple_of(cols) {
            return Err(wrong(format!("rows of {row}, expected a multiple of {cols} for {dtype}")));
        }
        let rows = shape.iter().skip(1).try_fold(1usize, |n, size| n.checked_mul(*size));
        let bytes = rows.and_then(|rows| (row / cols).checked_mul(block_bytes)?.checked_mul(rows));
        let bytes = bytes.ok_or_else(|| wrong(format!("sizes {shape:?}, more than fit")))?;
        shape.reverse();
        Ok(TensorInfo { name, dtype, shape, bytes, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let parts = |name: &str| parts_of(Path::new(name));
        let all = ["d/a-00001-of-00003.gguf", "d/a-00002-of-00003.gguf", "d/a-00003-of-00003.gguf"];
        for name in all {
            assert_eq!(parts(name), all.map(PathBuf::from));
        }
        for name in [
            "a.gguf",
            "a-00004-of-00003.gguf",
            "a-00000-of-00003.gguf",
            "a-1-of-2.gguf",
            "a-00001-of-00003",
            "-of-.gguf",
            "a-+0001-of-00003.gguf",
        ] {
            assert_eq!(parts(name), [PathBuf::from(name)]);
        }
    }
}
