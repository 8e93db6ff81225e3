//! What can go wrong, in the words of the caller's world: files, tensors, arguments.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub enum Error {
    /// The system refused to read or write a file.
    Io { path: PathBuf, source: io::Error },
    /// A file is malformed, or disagrees with another. Names file, tensor, expected, found.
    File(String),
    /// A file is well-formed and asks for something that this program does not do.
    Unsupported(String),
    /// An argument is out of its range.
    Argument(String),
    /// More tokens than the context holds.
    Context { needed: usize, available: usize },
    /// More bytes than the limit that the caller set: the bytes that would be held, and why.
    MemoryLimit { limit: usize, needed: usize, text: String },
    /// The system has no more memory.
    Memory { bytes: usize },
    /// The caller asked to stop.
    Interrupted,
    /// A defect of this program, caught before it could do harm.
    Internal(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path, source: io::Error) -> Error {
        Error::Io { path: path.to_owned(), source }
    }

    /// The same, said of a file.
    pub(crate) fn in_file(self, name: &str) -> Error {
        match self {
            Error::File(text) => Error::File(format!("{name}: {text}")),
            Error::Unsupported(text) => Error::Unsupported(format!("{name}: {text}")),
            other => other,
        }
    }
}

/// What a file says, for messages: at a length and with characters that the file does not choose.
pub(crate) fn short(text: &str) -> String {
    const MOST: usize = 200;
    let mut shown = String::new();
    for c in text.chars() {
        if shown.len() > MOST {
            shown.push('…');
            break;
        }
        match c {
            '"' | '\'' | '\\' => shown.push(c),
            _ => shown.extend(c.escape_debug()),
        }
    }
    shown
}

/// Why JSON could not be read, which may quote it.
pub(crate) fn json_text(error: &serde_json::Error) -> String {
    const MOST: usize = 600; // a list of all dtypes that are known
    let text = error.to_string();
    if text.len() <= MOST && !text.contains(char::is_control) {
        return text;
    }
    format!("{} at line {} column {}", short(&text), error.line(), error.column())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Error::File(text) | Error::Unsupported(text) | Error::Argument(text) => {
                f.write_str(text)
            }
            Error::Context { needed, available } => write!(
                f,
                "the tokens do not fit the context: {needed} needed, {available} available"
            ),
            Error::MemoryLimit { limit, needed, text } => write!(
                f,
                "memory_limit is {}, {} needed: {text}",
                readable(*limit),
                readable(*needed)
            ),
            Error::Memory { bytes } => write!(f, "out of memory: {bytes} bytes were refused"),
            Error::Interrupted => f.write_str("interrupted"),
            Error::Internal(text) => write!(f, "internal error: {text}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// A number of bytes that a person can read.
pub fn readable(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1024.0 * 1024.0 * 1024.0 => format!("{:.2} GiB", bytes / (1u64 << 30) as f64),
        _ if bytes >= 1024.0 * 1024.0 => format!("{:.1} MiB", bytes / (1u64 << 20) as f64),
        _ if bytes >= 1024.0 => format!("{:.1} KiB", bytes / 1024.0),
        _ => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (7 << 30, "7.00 GiB"),
        ] {
            assert_eq!(readable(bytes), text);
        }
    }
}
