//! Files that hold tensors: mapped, and read as if an enemy wrote them.
//!
//! Nothing here knows what a tensor is for. Nothing is allocated by a size that a file states
//! before that size was compared with the file.

pub mod container;
pub mod folder;
pub mod gguf;
pub mod gguf_write;
pub mod mmap;
pub mod safetensors;

use crate::error::{Error, Result, short};
use crate::quant::BlockType;
use crate::tensor::{Bytes, Dtype};
use std::fs::{self, Metadata};
use std::io::Read;
use std::path::Path;
use std::time::UNIX_EPOCH;

/// What the numbers of a checkpoint mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Convention {
    /// As checkpoints of transformers have them.
    Transformers,
    /// As GGUF files have them: norms with 1 added, but for that of linear attention; -exp(A_log)
    /// in place of A_log; value heads in tiled order, see
    /// [`crate::layers::gated_delta_net::ValueOrder`].
    Gguf,
}

impl Convention {
    pub fn name(self) -> &'static str {
        match self {
            Convention::Transformers => "transformers",
            Convention::Gguf => "gguf",
        }
    }

    pub fn named(name: &str) -> Option<Convention> {
        [Convention::Transformers, Convention::Gguf].into_iter().find(|c| c.name() == name)
    }
}

/// A file as it was when it was read, to tell later whether it has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceFile {
    /// Without its folder.
    pub name: String,
    pub bytes: u64,
    /// Time of the last change in nanoseconds since 1970; 0 if the system does not know it.
    pub modified_ns: u64,
}

impl SourceFile {
    fn new(path: &Path, metadata: &Metadata) -> SourceFile {
        let since_1970 = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        SourceFile {
            name: file_name(path),
            bytes: metadata.len(),
            modified_ns: since_1970.and_then(|t| u64::try_from(t.as_nanos()).ok()).unwrap_or(0),
        }
    }
}

/// A tensor of a file, of any dtype.
#[derive(Clone, Debug)]
pub struct FileTensor {
    /// As the file spells it.
    pub name: String,
    /// As the file spells it.
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
    /// Name of the file.
    pub file: String,
}

impl FileTensor {
    /// The dtype, if it is one that a model can have.
    pub fn known_dtype(&self) -> Option<Dtype> {
        [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Fp8, Dtype::U8]
            .into_iter()
            .chain(BlockType::ALL.map(Dtype::Blocks))
            .find(|d| d.name() == self.dtype)
    }

    /// Where the tensor is, as errors say it.
    pub fn place(&self) -> String {
        format!("{}: tensor `{}`", self.file, short(&self.name))
    }
}

/// The last part of a path, for messages.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A shape for messages, whatever length a file gives it.
pub fn shape_text(shape: &[usize]) -> String {
    const MOST: usize = 8;
    match shape.get(..MOST) {
        Some(first) if shape.len() > MOST => format!("{first:?} and {} more", shape.len() - MOST),
        _ => format!("{shape:?}"),
    }
}

/// Size and time of a regular file. Anything else, a pipe say, could keep a reader waiting forever.
pub fn stat(path: &Path) -> Result<SourceFile> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !metadata.is_file() {
        return Err(Error::File(format!("{}: not a regular file", path.display())));
    }
    Ok(SourceFile::new(path, &metadata))
}

/// Reads a text file of at most `most` bytes.
pub fn read_text(path: &Path, most: u64) -> Result<(String, SourceFile)> {
    let source = stat(path)?;
    let name = file_name(path);
    let too_long =
        |bytes: u64| Error::File(format!("{name}: {bytes} bytes, expected at most {most}"));
    if source.bytes > most {
        return Err(too_long(source.bytes));
    }
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(most + 1).read_to_end(&mut text).map_err(|e| Error::io(path, e))?;
    if text.len() as u64 > most {
        return Err(too_long(text.len() as u64));
    }
    let text = String::from_utf8(text).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::File(format!("{name}: not UTF-8 text at byte {at}"))
    })?;
    Ok((text, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_files() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.json");
        fs::write(&path, "{}").expect("a file");
        let (text, source) = read_text(&path, 2).expect("two bytes");
        assert_eq!((text.as_str(), source.bytes, source.name.as_str()), ("{}", 2, "a.json"));
        assert!(source.modified_ns > 0);
        assert_eq!(
            read_text(&path, 1).expect_err("too long").to_string(),
            "a.json: 2 bytes, expected at most 1"
        );
        fs::write(&path, b"ab\xff").expect("a file");
        assert_eq!(
            read_text(&path, 9).expect_err("no text").to_string(),
            "a.json: not UTF-8 text at byte 2"
        );
        assert!(matches!(stat(&folder.path().join("b")), Err(Error::Io { .. })));
        assert!(matches!(stat(folder.path()), Err(Error::File(_))));
    }
}
