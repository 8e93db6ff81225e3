//! Files mapped into memory, read-only.
//!
//! A mapping shows the file, so it must not change while it is used: bytes that are overwritten
//! change under the reader, and reading pages that were cut off ends the process with SIGBUS.
//! [`Mapping::check_unchanged`] narrows the risk and nothing can remove it; a file replaced by
//! renaming another over it does no harm, because the mapping keeps the old one.

use super::{SourceFile, stat};
use crate::error::{Error, Result};
use crate::tensor::Bytes;
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file in memory, and what it was when it was mapped.
pub struct Mapping {
    map: Mmap,
    /// To ask about this very file, whatever its path leads to by now.
    file: File,
    path: PathBuf,
    source: SourceFile,
}

impl Mapping {
    pub fn open(path: &Path) -> Result<Arc<Mapping>> {
        stat(path)?;
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // Of the file that was opened, should the path lead to another by now.
        let metadata = file.metadata().map_err(|e| Error::io(path, e))?;
        let source = SourceFile::new(path, &metadata);
        // SAFETY: the mapping is read-only and its bytes are taken as plain data, valid whatever
        // they are. That nobody cuts the file short is the user's part, see the module text.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        if map.len() as u64 != source.bytes {
            return Err(Error::File(format!(
                "{}: {} bytes were mapped, expected {}",
                path.display(),
                map.len(),
                source.bytes
            )));
        }
        Ok(Arc::new(Mapping { map, file, path: path.to_owned(), source }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn source(&self) -> &SourceFile {
        &self.source
    }

    /// All bytes of the file; they keep the mapping.
    pub fn bytes(self: &Arc<Mapping>) -> Bytes {
        Bytes::new(self.clone())
    }

    /// Asks the system to read the file ahead, in large pages where it can. Failure costs speed
    /// only.
    pub fn will_need(&self) {
        #[cfg(unix)]
        let _ = self.map.advise(memmap2::Advice::WillNeed);
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(memmap2::Advice::HugePage);
    }

    /// Lets the system take back the memory of a part of this mapping; reading it again loads it
    /// again. Bytes of something else are left alone.
    pub fn release(&self, part: &[u8]) {
        let start = part.as_ptr().addr().wrapping_sub(self.map.as_ptr().addr());
        if start.checked_add(part.len()).is_none_or(|end| end > self.map.len()) {
            return;
        }
        // SAFETY: the pages are clean and backed by the file, so that a later access reads the same
        // bytes from it. memmap2 checks the range.
        #[cfg(target_os = "linux")]
        let _ = unsafe {
            self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, part.len())
        };
    }

    /// An error if the mapped file has changed. It may have lost its name, or be found under
    /// another path from another working folder: its bytes are still there.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(|e| Error::io(&self.path, e))?;
        let now = SourceFile::new(&self.path, &metadata);
        let path = self.path.display();
        if now.bytes != self.source.bytes {
            return Err(Error::File(format!(
                "{path}: changed while in use: {} bytes, expected {}",
                now.bytes, self.source.bytes
            )));
        }
        if now.modified_ns != self.source.modified_ns {
            return Err(Error::File(format!(
                "{path}: changed while in use: modified at {} ns, expected {}",
                now.modified_ns, self.source.modified_ns
            )));
        }
        Ok(())
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::{Duration, SystemTime};

    #[test]
    fn bytes_outlive_the_mapping_and_come_back_after_release() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("data");
        let data: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &data).expect("a file");
        let mapping = Mapping::open(&path).expect("a mapping");
        mapping.will_need();
        let part = mapping.bytes().slice(100..15_000);
        assert_eq!(part[..], data[100..15_000]);
        mapping.release(&part);
        mapping.release(&data);
        drop(mapping);
        assert_eq!(part[..], data[100..15_000]);
    }

    #[test]
    fn empty_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("data");
        fs::write(&path, []).expect("a file");
        assert!(Mapping::open(&path).expect("a mapping").bytes().is_empty());
    }

    #[test]
    fn changes_are_seen() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("data");
        fs::write(&path, b"0123456789").expect("a file");
        let mapping = Mapping::open(&path).expect("a mapping");
        mapping.check_unchanged().expect("nothing changed");

        let file = File::options().write(true).open(&path).expect("the file");
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).expect("a new time");
        let error = mapping.check_unchanged().expect_err("another time").to_string();
        assert!(error.contains("modified at"), "{error}");

        file.set_len(4).expect("a shorter file");
        let error = mapping.check_unchanged().expect_err("another size").to_string();
        assert!(error.ends_with("data: changed while in use: 4 bytes, expected 10"), "{error}");
    }

    #[test]
    #[cfg(unix)]
    fn a_file_that_lost_its_name_is_unchanged() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (path, other) = (folder.path().join("data"), folder.path().join("other"));
        fs::write(&path, b"0123456789").expect("a file");
        let mapping = Mapping::open(&path).expect("a mapping");
        fs::write(&other, b"abc").expect("a file");
        fs::rename(&other, &path).expect("another file in its place");
        mapping.check_unchanged().expect("the mapped file is as it was");
        fs::remove_file(&path).expect("the file");
        mapping.check_unchanged().expect("the mapped file is as it was");
        assert_eq!(mapping.bytes()[..], *b"0123456789");
    }

    #[test]
    fn folders_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(matches!(Mapping::open(folder.path()), Err(Error::File(_))));
        assert!(matches!(Mapping::open(&folder.path().join("none")), Err(Error::Io { .. })));
    }
}
