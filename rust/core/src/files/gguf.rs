//! GGUF files, versions 2 and 3, whole or split into parts.
//!
//!     "GGUF"   u32 version   u64 tensors   u64 entries
//!     entries  string key, u32 type, value; an array is u32 type, u64 count, elements
//!     tensors  string name, u32 n <= 4, n x u64 sizes, fastest axis first, u32 type, u64 offset
//!     padding to the alignment; the data, from which offsets count
//!
//! A string is a u64 length and bytes. Numbers are little-endian. The parts of a split file each
//! have their own tensors and data; the first has the metadata.

mod metadata;

pub use self::metadata::{Array, Metadata, Value};

use self::metadata::Reader;
use super::mmap::Mapping;
use super::{FileTensor, file_name};
use crate::error::{Error, Result, short};
use crate::quant::BlockType;
use crate::tensor::Bytes;
use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8] = b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
const MOST_ALIGNMENT: u64 = 1 << 20;
const MOST_DIMS: u32 = 4;
/// Bytes of an entry, or of a tensor's row of the table, are no fewer than this.
const LEAST_ENTRY: u64 = 13;

const PART_COUNT: &str = "split.count";
const PART_NUMBER: &str = "split.no";
const PART_TENSORS: &str = "split.tensors.count";

/// Types of elements that are no blocks of this program: id, name, columns and bytes of a block.
/// Only the floats can be computed with.
const OTHER_TYPES: [(u32, &str, usize, usize); 22] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (30, "BF16", 1, 2),
    (9, "Q8_1", 32, 36),
    (15, "Q8_K", 256, 292),
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
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
];

/// Whether a file says that it is one.
pub fn starts_like_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Bytes that metadata and tensor table take in a file of `length` bytes that starts with `start`.
/// None: that is too little to tell. file: its name, for errors.
pub fn header_bytes(start: &Bytes, length: u64, file: &str) -> Result<Option<usize>> {
    let mut reader = Reader::of_start(start, length, file);
    match read_header(start, &mut reader) {
        Ok(_) => Ok(Some(reader.at())),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file with all its parts.
pub struct Gguf {
    pub metadata: Metadata,
    /// With unique names; shapes are slowest axis first.
    pub tensors: Vec<FileTensor>,
    pub mappings: Vec<Arc<Mapping>>,
}

impl Gguf {
    /// Opens a file, with the other parts if it is one of several, whichever it is.
    pub fn open(path: &Path) -> Result<Gguf> {
        let mapping = Mapping::open(path)?;
        let part = Part::read(mapping.bytes(), &file_name(path))?;
        match part.count()? {
            1 => Gguf::join(vec![part], vec![mapping]),
            count => Gguf::open_parts(path, count),
        }
    }

    /// Reads a whole file that lies in memory. file: its name, for errors.
    pub fn read(bytes: Bytes, file: &str) -> Result<Gguf> {
        let part = Part::read(bytes, file)?;
        match part.count()? {
            1 => Gguf::join(vec![part], Vec::new()),
            count => Err(Error::File(format!("{file}: `{PART_COUNT}` is {count}, expected 1"))),
        }
    }

    fn open_parts(path: &Path, count: u64) -> Result<Gguf> {
        let paths = parts_of(path).filter(|paths| paths.len() as u64 == count).ok_or_else(|| {
            Error::File(format!(
                "{}: `{PART_COUNT}` is {count}, expected a name like NAME-00001-of-{count:05}.gguf, \
                 which tells where the other parts are",
                file_name(path)
            ))
        })?;
        let (mut parts, mut mappings) = (Vec::new(), Vec::new());
        for (i, path) in paths.iter().enumerate() {
            let mapping = Mapping::open(path).map_err(|error| match error {
                Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                    Error::File(format!("{}: missing, part {} of {count}", path.display(), i + 1))
                }
                error => error,
            })?;
            let part = Part::read(mapping.bytes(), &file_name(path))?;
            part.expect(PART_NUMBER, i as u64)?;
            part.expect(PART_COUNT, count)?;
            parts.push(part);
            mappings.push(mapping);
        }
        let tensors: usize = parts.iter().map(|part| part.tensors.len()).sum();
        parts[0].expect(PART_TENSORS, tensors as u64)?;
        Gguf::join(parts, mappings)
    }

    /// Puts the parts together, of which there is at least one.
    fn join(parts: Vec<Part>, mappings: Vec<Arc<Mapping>>) -> Result<Gguf> {
        let mut metadata = None;
        let mut tensors: Vec<FileTensor> = Vec::new();
        for part in parts {
            metadata.get_or_insert(part.metadata);
            tensors.extend(part.tensors);
        }
        let mut names = HashSet::with_capacity(tensors.len());
        if let Some(tensor) = tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
            let (file, name) = (&tensor.file, short(&tensor.name));
            return Err(Error::File(format!("{file}: tensor `{name}`: named twice")));
        }
        let metadata = metadata.expect("there is at least one part");
        Ok(Gguf { metadata, tensors, mappings })
    }
}

/// All parts of a file by the name of one, `NAME-00002-of-00003.gguf`.
fn parts_of(path: &Path) -> Option<Vec<PathBuf>> {
    let name = file_name(path);
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (base, number) = rest.rsplit_once('-')?;
    let parse = |digits: &str| {
        let plain = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
        if plain { digits.parse::<usize>().ok() } else { None }
    };
    let (number, count) = (parse(number)?, parse(count)?);
    let part = |i| path.with_file_name(format!("{base}-{i:05}-of-{count:05}.gguf"));
    (1..=count).contains(&number).then(|| (1..=count).map(part).collect())
}

/// What one file holds.
struct Part {
    metadata: Metadata,
    tensors: Vec<FileTensor>, // in the order of their data
}

impl Part {
    /// Reads and checks a file. file: its name, for errors.
    fn read(bytes: Bytes, file: &str) -> Result<Part> {
        let mut reader = Reader::new(&bytes, file);
        let (metadata, infos) = read_header(&bytes, &mut reader)?;
        let alignment = match metadata.count(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT) {
            n if n.is_power_of_two() && n <= MOST_ALIGNMENT => n as usize,
            n => {
                return Err(reader.wrong(format!(
                    "`{ALIGNMENT_KEY}` is {n}, expected a power of two up to {MOST_ALIGNMENT}"
                )));
            }
        };
        let data_start = reader.at().next_multiple_of(alignment);
        let tensors = place(&bytes, file, infos, data_start, alignment)?;
        Ok(Part { metadata, tensors })
    }

    /// How many parts the file has, at least one.
    fn count(&self) -> Result<u64> {
        // One that was put together again may keep a count of 0.
        Ok(self.metadata.count(PART_COUNT)?.unwrap_or(1).max(1))
    }

    /// An error if an entry is not this count.
    fn expect(&self, key: &str, expected: u64) -> Result<()> {
        let found = self.metadata.count(key)?;
        if found == Some(expected) {
            return Ok(());
        }
        let found = found.map_or("missing".to_owned(), |n| n.to_string());
        Err(Error::File(format!(
            "{}: `{key}` is {found}, expected {expected} of this part",
            self.metadata.file()
        )))
    }
}

/// The metadata, and the rows of the tensor table. bytes: those of `reader`.
fn read_header<'a>(
    bytes: &Bytes,
    reader: &mut Reader<'a>,
) -> Result<(Metadata, Vec<TensorInfo<'a>>)> {
    let (n_tensors, n_entries) = read_start(reader)?;
    let metadata = Metadata::read(bytes, reader, n_entries)?;
    let infos = (0..n_tensors).map(|_| TensorInfo::read(reader)).collect::<Result<_>>()?;
    Ok((metadata, infos))
}

/// The numbers of tensors and of entries.
fn read_start(reader: &mut Reader) -> Result<(u64, u64)> {
    let magic = reader.take((MAGIC.len() as u64).min(reader.rest()))?;
    if magic != MAGIC {
        return Err(reader.wrong(format!(
            "no GGUF file: it begins with \"{}\", expected \"GGUF\"",
            magic.escape_ascii()
        )));
    }
    let version = reader.u32()?;
    if !VERSIONS.contains(&version) {
        let why = match version {
            1 => "version 1; convert the original model again with a newer program".to_owned(),
            _ if (1..=3).contains(&version.swap_bytes()) => {
                format!("version {}, big-endian", version.swap_bytes())
            }
            _ => format!("version {version}"),
        };
        return Err(reader.unsupported(format!(
            "GGUF {why}; supported are the versions 2 and 3, little-endian"
        )));
    }
    let (tensors, entries) = (reader.u64()?, reader.u64()?);
    let rest = reader.rest();
    for (what, n) in [("tensors", tensors), ("entries of metadata", entries)] {
        if n > rest / LEAST_ENTRY {
            return Err(reader.wrong(format!(
                "{n} {what}, {rest} bytes are left; the file is cut short or damaged"
            )));
        }
    }
    Ok((tensors, entries))
}

/// A row of the tensor table.
struct TensorInfo<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: Vec<usize>, // slowest axis first
    bytes: usize,
    offset: u64, // from the start of the data
}

impl<'a> TensorInfo<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<TensorInfo<'a>> {
        let name = reader.name("tensor")?;
        let n = reader.u32()?;
        if n > MOST_DIMS {
            let text = format!("{n} dimensions, expected at most {MOST_DIMS}");
            return Err(reader.wrong_tensor(name, text));
        }
        let mut sizes = [1; MOST_DIMS as usize];
        let sizes = &mut sizes[..n as usize];
        for size in sizes.iter_mut() {
            *size = reader.u64()?;
        }
        let (kind, offset) = (reader.u32()?, reader.u64()?);
        let wrong = |text: String| reader.wrong_tensor(name, text);
        let (dtype, cols, block_bytes) =
            element_type(kind).ok_or_else(|| wrong(format!("the unknown type {kind}")))?;
        let row = sizes.first().copied().unwrap_or(1);
        if !row.is_multiple_of(cols) {
            return Err(wrong(format!("rows of {row}, expected a multiple of {cols} for {dtype}")));
        }
        let too_large = || wrong(format!("sizes {sizes:?}, more than any file can hold"));
        let shape = sizes.iter().rev().map(|size| usize::try_from(*size));
        let shape = shape.collect::<std::result::Result<_, _>>().map_err(|_| too_large())?;
        let rows = sizes.iter().skip(1).try_fold(1u64, |n, size| n.checked_mul(*size));
        let bytes = rows.and_then(|rows| (row / cols).checked_mul(block_bytes)?.checked_mul(rows));
        let bytes = bytes.and_then(|n| usize::try_from(n).ok()).ok_or_else(too_large)?;
        Ok(TensorInfo { name, dtype, shape, bytes, offset })
    }
}

/// Name, columns and bytes of a block of a type.
fn element_type(kind: u32) -> Option<(&'static str, u64, u64)> {
    if let Some(block) = BlockType::from_id(kind) {
        return Some((block.name(), block.cols() as u64, block.bytes() as u64));
    }
    let (_, name, cols, bytes) = OTHER_TYPES.iter().find(|(id, ..)| *id == kind)?;
    Some((name, *cols as u64, *bytes as u64))
}

/// Cuts the tensors out of the data. They lie inside and do not overlap; there may be holes.
fn place(
    bytes: &Bytes,
    file: &str,
    mut infos: Vec<TensorInfo>,
    data_start: usize,
    alignment: usize,
) -> Result<Vec<FileTensor>> {
    infos.sort_by_key(|info| (info.offset, info.bytes));
    let reader = Reader::new(bytes, file);
    let data = bytes.len().saturating_sub(data_start);
    let mut free = 0;
    let mut tensors = Vec::with_capacity(infos.len());
    for TensorInfo { name, dtype, shape, bytes: size, offset } in infos {
        let wrong = |text: String| Err(reader.wrong_tensor(name, text));
        if !offset.is_multiple_of(alignment as u64) {
            return wrong(format!("begins at {offset}, expected a multiple of {alignment}"));
        }
        let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(size));
        let Some(end) = end.filter(|end| *end <= data) else {
            return wrong(format!(
                "{size} bytes at {offset}, the file has {data} bytes of data; it is cut short or \
                 damaged"
            ));
        };
        let start = end - size;
        if start < free {
            return wrong(format!("begins at {start}, inside the tensor that ends at {free}"));
        }
        free = end;
        tensors.push(FileTensor {
            name: name.to_owned(),
            dtype: dtype.to_owned(),
            shape,
            bytes: bytes.slice(data_start + start..data_start + end),
            file: file.to_owned(),
        });
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let parts = |name: &str| parts_of(Path::new(name));
        let all = ["d/a-00001-of-00003.gguf", "d/a-00002-of-00003.gguf", "d/a-00003-of-00003.gguf"];
        for name in all {
            assert_eq!(parts(name), Some(all.map(PathBuf::from).to_vec()));
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
            assert_eq!(parts(name), None);
        }
    }

    #[test]
    fn types_have_one_name_each() {
        let ids: Vec<u32> = (0..64).filter(|id| element_type(*id).is_some()).collect();
        assert_eq!(ids.len(), OTHER_TYPES.len() + BlockType::ALL.len());
        let names: HashSet<&str> =
            ids.iter().map(|id| element_type(*id).expect("an id of the list").0).collect();
        assert_eq!(names.len(), ids.len());
    }
}
