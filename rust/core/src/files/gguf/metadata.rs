//! The metadata of a GGUF file, and how its bytes are read.

use crate::error::{Error, Result, short};
use crate::tensor::Bytes;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;

/// Names are no longer than this, in any program that reads them.
const MOST_NAME: usize = 1 << 16;
/// Types of values that have no fixed size.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// A value of the metadata; texts and arrays are those of the file, not copies.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

impl Value<'_> {
    /// The value as a count, whatever integer type the file chose.
    pub fn count(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
}

/// As messages show it, at a length that the file does not choose.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(n) => write!(f, "{n}"),
            Value::Signed(n) => write!(f, "{n}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Bool(flag) => write!(f, "{flag}"),
            Value::Text(text) => write!(f, "\"{}\"", short(text)),
            Value::Array(array) => write!(f, "a list of {}", array.len()),
        }
    }
}

/// The elements of an array, read while they are gone through.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    key: &'a str,
    kind: u32,
    count: u64,
    elements: Reader<'a>,
}

impl<'a> Array<'a> {
    pub fn len(&self) -> u64 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// No element is an array itself.
    pub fn iter(self) -> impl Iterator<Item = Result<Value<'a>>> {
        let mut reader = self.elements;
        (0..self.count).map(move |_| reader.value(self.kind, self.key))
    }
}

/// The values of a file by key.
pub struct Metadata {
    file: String,
    bytes: Bytes,
    /// Type and place of each value.
    entries: BTreeMap<String, (u32, Range<usize>)>,
}

impl Metadata {
    /// Passes over `n` entries at the start of `reader`.
    pub(super) fn read(bytes: &Bytes, reader: &mut Reader, n: u64) -> Result<Metadata> {
        let mut entries = BTreeMap::new();
        for _ in 0..n {
            let key = reader.name("key")?;
            let kind = reader.u32()?;
            let start = reader.at;
            reader.skip(kind, key)?;
            match entries.entry(key.to_owned()) {
                Entry::Vacant(entry) => entry.insert((kind, start..reader.at)),
                Entry::Occupied(_) => {
                    return Err(reader.wrong(format!("key `{}` is there twice", short(key))));
                }
            };
        }
        Ok(Metadata { file: reader.file.to_owned(), bytes: bytes.clone(), entries })
    }

    /// Name of the file, for errors.
    pub fn file(&self) -> &str {
        &self.file
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The value of a key; an error if it is a text that is no UTF-8.
    pub fn get(&self, key: &str) -> Result<Option<Value<'_>>> {
        let Some((key, (kind, range))) = self.entries.get_key_value(key) else { return Ok(None) };
        let mut reader = Reader { at: range.start, ..Reader::new(&self.bytes, &self.file) };
        reader.value(*kind, key).map(Some)
    }

    /// The value of a key as a count; an error if it is something else.
    pub fn count(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        let count = value.count().ok_or_else(|| {
            Error::File(format!("{}: `{key}` is {value}, expected a count", self.file))
        })?;
        Ok(Some(count))
    }
}

/// Reads a file from a byte on.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8], // all of the file, or its start
    length: u64,     // of the file
    at: usize,
    file: &'a str,
}

impl<'a> Reader<'a> {
    /// From the first byte on. file: its name, for errors.
    pub fn new(bytes: &'a [u8], file: &'a str) -> Reader<'a> {
        Reader { bytes, length: bytes.len() as u64, at: 0, file }
    }

    /// The same for the start of a file of `length` bytes. What lies behind it is an error of the
    /// kind `UnexpectedEof`.
    pub fn of_start(bytes: &'a [u8], length: u64, file: &'a str) -> Reader<'a> {
        Reader { length: length.max(bytes.len() as u64), ..Reader::new(bytes, file) }
    }

    /// Bytes that were read.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub fn rest(&self) -> u64 {
        self.length - self.at as u64
    }

    pub fn wrong(&self, text: String) -> Error {
        Error::File(format!("{}: {text}", self.file))
    }

    pub fn unsupported(&self, text: String) -> Error {
        Error::Unsupported(format!("{}: {text}", self.file))
    }

    pub fn wrong_tensor(&self, name: &str, text: String) -> Error {
        self.wrong(format!("tensor `{}`: {text}", short(name)))
    }

    pub fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        if n > self.rest() {
            return Err(self.wrong(format!(
                "{n} bytes expected at byte {}, {} are left; the file is cut short or damaged",
                self.at,
                self.rest()
            )));
        }
        let Some(taken) = usize::try_from(n).ok().and_then(|n| self.bytes[self.at..].get(..n))
        else {
            return Err(Error::io(Path::new(self.file), ErrorKind::UnexpectedEof.into()));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(*self.take(N as u64)?.first_chunk().expect("as many bytes were taken"))
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8]> {
        let n = self.u64()?;
        self.take(n)
    }

    /// what: what it names, for errors.
    pub fn name(&mut self, what: &str) -> Result<&'a str> {
        let start = self.at;
        let bytes = self.string()?;
        let text = std::str::from_utf8(bytes).ok().filter(|name| name.len() <= MOST_NAME);
        text.ok_or_else(|| {
            self.wrong(format!(
                "the name of a {what} at byte {start}, {} bytes, is no UTF-8 text of at most \
                 {MOST_NAME} bytes",
                bytes.len()
            ))
        })
    }

    /// Bytes of a value of fixed size.
    fn size(&self, kind: u32, key: &str) -> Result<u64> {
        match kind {
            0 | 1 | 7 => Ok(1),
            2 | 3 => Ok(2),
            4..=6 => Ok(4),
            10..=12 => Ok(8),
            _ => Err(self.unknown(kind, key)),
        }
    }

    fn unknown(&self, kind: u32, key: &str) -> Error {
        self.wrong(format!("key `{}`: a value of the unknown type {kind}", short(key)))
    }

    /// The type and number of an array's elements, which the file has room for.
    fn array_start(&mut self, key: &str) -> Result<(u32, u64)> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let least = match kind {
            ARRAY => {
                let text = format!("key `{}`: an array of arrays is not supported", short(key));
                return Err(self.wrong(text));
            }
            TEXT => size_of::<u64>() as u64,
            _ => self.size(kind, key)?,
        };
        if count > self.rest() / least {
            return Err(self.wrong(format!(
                "key `{}`: an array of {count}, {} bytes are left; the file is cut short or damaged",
                short(key),
                self.rest()
            )));
        }
        Ok((kind, count))
    }

    /// Passes over a value.
    fn skip(&mut self, kind: u32, key: &str) -> Result<()> {
        let bytes = match kind {
            TEXT => self.u64()?,
            ARRAY => match self.array_start(key)? {
                (TEXT, count) => return (0..count).try_for_each(|_| self.string().map(drop)),
                // It fits, as `array_start` saw.
                (kind, count) => count * self.size(kind, key)?,
            },
            _ => self.size(kind, key)?,
        };
        self.take(bytes).map(drop)
    }

    fn value(&mut self, kind: u32, key: &'a str) -> Result<Value<'a>> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed((self.array::<1>()?[0] as i8).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [byte] => {
                    let key = short(key);
                    return Err(
                        self.wrong(format!("key `{key}`: {byte} is neither true nor false"))
                    );
                }
            },
            TEXT => {
                let text = std::str::from_utf8(self.string()?).map_err(|e| {
                    let at = e.valid_up_to();
                    self.wrong(format!("key `{}`: a text is no UTF-8 at byte {at}", short(key)))
                })?;
                Value::Text(text)
            }
            ARRAY => {
                let (kind, count) = self.array_start(key)?;
                Value::Array(Array { key, kind, count, elements: *self })
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.unknown(kind, key)),
        })
    }
}
