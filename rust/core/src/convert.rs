//! Converts a checkpoint: its matrices in the panels that the kernels read, in one file or in memory.
//!
//! The file is described in [`crate::files::container`], the choice of formats in
//! [`crate::model::recipe`]. Floats are quantised; the blocks of a GGUF file are re-ordered and keep
//! their numbers. Work goes tensor by tensor in slabs of panels, so that memory holds
//! one slab, whatever the size of the model. The same source gives the same bytes for any number
//! of threads.

use crate::error::{Error, Result};
use crate::files::container::{self, Info, Item, Layout};
use crate::files::mmap::Mapping;
use crate::files::{Convention, file_name, stat};
use crate::model::checkpoint::Checkpoint;
use crate::model::recipe::{self, Storage};
use crate::model::tensors::TensorSpec;
use crate::quant::reorder::reorder_panel_to;
use crate::quant::{Format, PANEL_ROWS, Quant, encode_panel, panel_bytes, planes};
use crate::tensor::{AlignedBuf, Bytes, Dtype, Tensor};
use crate::threads;
use rayon::ThreadPool;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

pub use crate::files::container::verify;

/// Bytes of output that are made before they are written.
const SLAB_BYTES: usize = 16 << 20;
/// Weights are at most this, so that their scales fit f16 in every format.
const LARGEST: f32 = 65504.0;

/// Told done and total bytes of output; false stops the work.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// What to convert a checkpoint to.
pub struct Job<'a> {
    pub source: &'a Checkpoint,
    pub quant: Quant,
    /// How matrices are stored in place of what `quant` says, by their names.
    pub chosen: HashMap<String, Storage>,
    /// How much each column of a matrix matters, by its name.
    pub importance: HashMap<String, Vec<f32>>,
    /// Files that travel along, by the name under which they are found again.
    pub attachments: &'a [(String, Attachment)],
    /// 1 to 1024; [`threads::default_threads`] if None.
    pub threads: Option<usize>,
}

/// A file that travels along.
pub enum Attachment {
    /// Copied when its turn comes.
    Path(PathBuf),
    Content(Vec<u8>),
}

/// Whether a converted file is what the conversion of `source` to the same recipe would be: made of the
/// same files, each tensor stored as the recipe has it now, which another version may have had otherwise.
pub fn is_conversion_of(converted: &Checkpoint, source: &Checkpoint) -> bool {
    let none = HashMap::new();
    converted.sources() == source.sources()
        && source.specs().iter().all(|spec| {
            let dtype = source.tensor(&spec.name).map(|tensor| tensor.dtype);
            dtype
                .and_then(|dtype| recipe::storage(converted.quant, &none, spec, dtype).ok())
                .is_some_and(|storage| converted.tensor(&storage.name(spec)).is_some())
        })
}

impl<'a> Job<'a> {
    /// Without attachments, with the default number of threads.
    pub fn new(source: &'a Checkpoint, quant: Quant) -> Job<'a> {
        Job {
            source,
            quant,
            chosen: HashMap::new(),
            importance: HashMap::new(),
            attachments: &[],
            threads: None,
        }
    }

    /// Writes the converted file to `out`.
    ///
    /// It appears there only when it is whole; one that was converted before is replaced, anything
    /// else there is an error. If `progress` returns false, the result is [`Error::Interrupted`]; it
    /// is called on the caller's thread.
    pub fn to_file(&self, out: &Path, progress: &mut Progress) -> Result<()> {
        self.check()?;
        check_replaceable(out)?;
        let (file, temporary) = Temporary::create(out)?;
        self.write(FileSink { file, path: temporary.path.clone() }, progress)?;
        self.source.check_unchanged()?;
        temporary.rename(out)
    }

    /// The bytes of the converted file.
    pub fn to_memory(&self, progress: &mut Progress) -> Result<Bytes> {
        self.check()?;
        let sink = self.write(MemorySink::default(), progress)?;
        self.source.check_unchanged()?;
        Ok(sink.bytes.into())
    }

    fn check(&self) -> Result<()> {
        if self.source.quant != Quant::None {
            return Err(Error::Argument(format!(
                "the source is already converted ({}), expected a checkpoint folder or a GGUF file",
                self.source.quant
            )));
        }
        if self.quant == Quant::None {
            return Err(Error::Argument("quant is `none`, which converts nothing".to_owned()));
        }
        if self.quant == Quant::Gguf && self.source.convention != Convention::Gguf {
            return Err(Error::Argument(format!(
                "quant is `gguf`, which is for GGUF files; {} is none, balanced would do",
                self.source.name()
            )));
        }
        // Before a long work that would end in the same error.
        self.source.check_values()
    }

    fn write<S: Sink>(&self, sink: S, progress: &mut Progress) -> Result<S> {
        let source = self.source;
        let (items, parts) = self.plan()?;
        let info = Info {
            quant: self.quant,
            convention: source.convention,
            config_json: source.config_json.clone(),
            sources: source.sources().to_vec(),
        };
        let layout = info.layout(&items);
        let pool = threads::workers(self.threads)?;
        let total = layout.data_bytes as u64;
        let hasher = blake3::Hasher::new();
        let mut writer = Writer { sink, hasher, done: 0, total, progress };
        writer.sink.reserve(layout.header.len() + layout.data_bytes)?;
        writer.step(0)?;
        writer.sink.write(&layout.header)?;
        for ((part, item), padding) in parts.iter().zip(&items).zip(&layout.padding) {
            match part {
                Part::Coded { spec, tensor, format } => {
                    let importance = self.importance.get(&spec.name).map(Vec::as_slice);
                    let target = Target { format: *format, importance };
                    write_coded(&mut writer, source, (spec, tensor), target, &pool)?;
                }
                Part::Floats { spec, tensor } => write_floats(&mut writer, source, spec, tensor)?,
                Part::AsIs { spec, tensor } => {
                    check_rows(source, spec, tensor, f32::MAX)?;
                    writer.put_slabs(&tensor.bytes)?;
                    source.release(&tensor.bytes);
                }
                Part::File(Attachment::Path(path)) => writer.put_file(path, item.bytes as u64)?,
                Part::File(Attachment::Content(content)) => writer.put(content)?,
            }
            writer.put(&vec![0; *padding])?;
        }
        writer.finish(&layout)
    }

    fn plan(&self) -> Result<(Vec<Item>, Vec<Part<'_>>)> {
        let source = self.source;
        self.check_names()?;
        let mut items = Vec::new();
        let mut parts = Vec::new();
        for spec in source.specs() {
            let tensor = source.tensor(&spec.name).ok_or_else(|| {
                Error::Internal(format!("tensor `{}` of the table is not bound", spec.name))
            })?;
            let storage = recipe::storage(self.quant, &self.chosen, spec, tensor.dtype)
                .map_err(|error| error.in_file(self.source.name()))?;
            let (dtype, part) = match storage {
                Storage::Coded(format) => (Dtype::U8, Part::Coded { spec, tensor, format }),
                Storage::F32 => (Dtype::F32, Part::Floats { spec, tensor }),
                Storage::AsIs => (tensor.dtype, Part::AsIs { spec, tensor }),
            };
            let shape = storage.shape(spec);
            let bytes = dtype.bytes(shape.iter().product());
            items.push(Item { name: storage.name(spec), dtype, shape, bytes });
            parts.push(part);
        }
        let mut names = HashSet::new();
        for (name, attachment) in self.attachments {
            if !names.insert(name) {
                return Err(Error::Argument(format!("attachment `{name}` is there twice")));
            }
            let bytes = match attachment {
                Attachment::Path(path) => stat(path)?.bytes as usize,
                Attachment::Content(content) => content.len(),
            };
            let name = container::attachment_tensor(name);
            items.push(Item { name, dtype: Dtype::U8, shape: vec![bytes], bytes });
            parts.push(Part::File(attachment));
        }
        Ok((items, parts))
    }

    /// An error if something is said of a matrix that is not there, or does not fit it.
    fn check_names(&self) -> Result<()> {
        let specs: HashMap<&str, &TensorSpec> =
            self.source.matrices().map(|spec| (spec.name.as_str(), spec)).collect();
        let find = |name: &String| {
            specs.get(name.as_str()).copied().ok_or_else(|| {
                Error::Argument(format!("`{name}`: no matrix of this model has this name"))
            })
        };
        self.chosen.keys().try_for_each(|name| find(name).map(drop))?;
        for (name, importance) in &self.importance {
            let cols = find(name)?.shape[1];
            let usable = |x: &f32| x.is_finite() && *x >= 0.0;
            if importance.len() != cols || !importance.iter().all(usable) {
                return Err(Error::Argument(format!(
                    "importance of `{name}`: {} numbers, expected {cols} that are finite and not \
                     negative",
                    importance.len()
                )));
            }
        }
        Ok(())
    }
}

/// What an item of the file is made of.
enum Part<'a> {
    Coded { spec: &'a TensorSpec, tensor: &'a Tensor, format: Format },
    Floats { spec: &'a TensorSpec, tensor: &'a Tensor },
    AsIs { spec: &'a TensorSpec, tensor: &'a Tensor },
    File(&'a Attachment),
}

/// What a matrix becomes.
struct Target<'a> {
    format: Format,
    importance: Option<&'a [f32]>,
}

/// Writes a tensor as f32.
fn write_floats<S: Sink>(
    writer: &mut Writer<'_, '_, S>,
    source: &Checkpoint,
    spec: &TensorSpec,
    tensor: &Tensor,
) -> Result<()> {
    check_rows(source, spec, tensor, f32::MAX)?;
    let (rows, cols) = spec.rows_cols();
    let slab_rows = (SLAB_BYTES / (4 * cols)).clamp(1, rows);
    let mut values = vec![0.0; slab_rows * cols];
    for first in (0..rows).step_by(slab_rows) {
        let values = &mut values[..slab_rows.min(rows - first) * cols];
        tensor.widen_rows(cols, first, values);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.put(&bytes)?;
    }
    source.release(&tensor.bytes);
    Ok(())
}

/// Codes a matrix, a panel a task, once for each plane of the format.
fn write_coded<S: Sink>(
    writer: &mut Writer<'_, '_, S>,
    source: &Checkpoint,
    (spec, tensor): (&TensorSpec, &Tensor),
    Target { format, importance }: Target<'_>,
    pool: &ThreadPool,
) -> Result<()> {
    let (rows, cols) = spec.rows_cols();
    let from = tensor.dtype.format().ok_or_else(|| unbound(spec, tensor))?;
    let row_bytes = from.bytes(1, cols);
    if format == from {
        check_rows(source, spec, tensor, f32::MAX)?;
        writer.put_slabs(&tensor.bytes)?;
        source.release(&tensor.bytes);
        return Ok(());
    }
    if let Format::Blocks(block) = format {
        check_rows(source, spec, tensor, LARGEST)?;
        let mut values = vec![0.0; rows * cols];
        tensor.widen_rows(cols, 0, &mut values);
        return writer.put(&block.encode(&values));
    }
    let panels = rows.div_ceil(PANEL_ROWS);
    for plane in planes(format, cols) {
        let slab_panels = (SLAB_BYTES / plane.len()).max(1);
        let mut slab = vec![0; slab_panels.min(panels) * plane.len()];
        for first in (0..panels).step_by(slab_panels) {
            let slab = &mut slab[..slab_panels.min(panels - first) * plane.len()];
            // Whether all values of the panel can be stored.
            let code = |(values, panel): &mut (Vec<f32>, Vec<u8>), (i, out): (usize, &mut [u8])| {
                let start = (first + i) * PANEL_ROWS;
                let end = (start + PANEL_ROWS).min(rows);
                let fits = match from {
                    Format::Blocks(block) => {
                        let rows = &tensor.bytes[start * row_bytes..end * row_bytes];
                        reorder_panel_to(block, rows, cols, format, panel);
                        block.is_finite(rows)
                    }
                    _ => {
                        values.resize((end - start) * cols, 0.0);
                        tensor.widen_rows(cols, start, values);
                        let fits = values.iter().all(|x| x.abs() <= LARGEST);
                        if fits {
                            encode_panel(format, values, cols, importance, panel);
                        }
                        fits
                    }
                };
                out.copy_from_slice(&panel[plane.clone()]);
                fits
            };
            let code_all = || {
                let init = || (Vec::new(), vec![0; panel_bytes(format, cols)]);
                let panels = slab.par_chunks_exact_mut(plane.len()).enumerate();
                panels.map_init(init, code).all(|fits| fits)
            };
            if !pool.install(code_all) {
                check_rows(source, spec, tensor, LARGEST)?;
                return Err(Error::Internal(format!(
                    "tensor `{}` does not fit its format",
                    spec.name
                )));
            }
            let rows = first * PANEL_ROWS..((first + slab_panels) * PANEL_ROWS).min(rows);
            source.release(&tensor.bytes[rows.start * row_bytes..rows.end * row_bytes]);
            writer.put(slab)?;
        }
    }
    Ok(())
}

fn unbound(spec: &TensorSpec, tensor: &Tensor) -> Error {
    Error::Internal(format!("tensor `{}` is bound to {}", spec.name, tensor.dtype.name()))
}

/// An error that names the first row with a value that is not from -most to most.
fn check_rows(source: &Checkpoint, spec: &TensorSpec, tensor: &Tensor, most: f32) -> Result<()> {
    let (rows, cols) = spec.rows_cols();
    tensor.dtype.format().ok_or_else(|| unbound(spec, tensor))?;
    let mut values = vec![0.0; cols];
    for row in 0..rows {
        tensor.widen_rows(cols, row, &mut values);
        if let Some(x) = values.iter().find(|x| x.is_nan() || x.abs() > most) {
            return Err(Error::File(format!(
                "{}: row {row} holds {x}, expected numbers from -{most:?} to {most:?}",
                source.place(&spec.name)
            )));
        }
    }
    Ok(())
}

/// An error if something is at `out` that was not converted from a checkpoint.
fn check_replaceable(out: &Path) -> Result<()> {
    match stat(out) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if container::starts_like_converted(&Mapping::open(out)?.bytes()) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "{}: exists and is not a converted file, expected a free name",
        out.display()
    )))
}

/// Where the bytes go.
pub(crate) trait Sink {
    /// Makes room for all bytes that will come.
    fn reserve(&mut self, bytes: usize) -> Result<()>;
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Changes bytes that were written, and makes all of them last.
    fn finish(&mut self, at: usize, patch: &[u8]) -> Result<()>;
}

pub(crate) struct FileSink {
    pub file: File,
    pub path: PathBuf,
}

impl Sink for FileSink {
    fn reserve(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))
    }

    fn finish(&mut self, at: usize, patch: &[u8]) -> Result<()> {
        let mut finish = || {
            self.file.seek(SeekFrom::Start(at as u64))?;
            self.file.write_all(patch)?;
            self.file.sync_all()
        };
        finish().map_err(|e| Error::io(&self.path, e))
    }
}

#[derive(Default)]
struct MemorySink {
    bytes: AlignedBuf,
    written: usize,
}

impl Sink for MemorySink {
    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.bytes = AlignedBuf::try_new(bytes)?;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes[self.written..][..bytes.len()].copy_from_slice(bytes);
        self.written += bytes.len();
        Ok(())
    }

    fn finish(&mut self, at: usize, patch: &[u8]) -> Result<()> {
        self.bytes[at..][..patch.len()].copy_from_slice(patch);
        Ok(())
    }
}

/// Writes data, hashes it, and reports it.
struct Writer<'a, 'b, S> {
    sink: S,
    hasher: blake3::Hasher,
    done: u64,
    total: u64,
    progress: &'a mut Progress<'b>,
}

impl<S: Sink> Writer<'_, '_, S> {
    fn step(&mut self, bytes: usize) -> Result<()> {
        self.done += bytes as u64;
        if (self.progress)(self.done, self.total) { Ok(()) } else { Err(Error::Interrupted) }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.hasher.update(bytes);
        self.sink.write(bytes)?;
        self.step(bytes.len())
    }

    fn put_slabs(&mut self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(SLAB_BYTES).try_for_each(|slab| self.put(slab))
    }

    /// Copies a file that had `bytes` bytes when the layout was made.
    fn put_file(&mut self, path: &Path, bytes: u64) -> Result<()> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let mut file = file.take(bytes + 1);
        let (mut copied, mut slab) = (0, vec![0; SLAB_BYTES.min(bytes as usize + 1)]);
        loop {
            let n = match file.read(&mut slab) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::io(path, e)),
            };
            copied += n as u64;
            if copied > bytes {
                break;
            }
            self.put(&slab[..n])?;
        }
        if copied == bytes {
            return Ok(());
        }
        Err(Error::File(format!(
            "{}: changed while in use, expected {bytes} bytes",
            path.display()
        )))
    }

    /// Puts the hash into the header.
    fn finish(mut self, layout: &Layout) -> Result<S> {
        assert_eq!(self.done, self.total, "the layout lists all that was written");
        let hash = self.hasher.finalize().to_hex();
        self.sink.finish(layout.hash_at, hash.as_bytes())?;
        Ok(self.sink)
    }
}

/// A file beside its final place, removed unless it was renamed.
pub(crate) struct Temporary {
    path: PathBuf,
    done: bool,
}

impl Temporary {
    pub fn create(out: &Path) -> Result<(File, Temporary)> {
        let name = file_name(out);
        for i in 0.. {
            let path = out.with_file_name(format!(".{name}.{}-{i}.part", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((file, Temporary { path, done: false })),
                Err(e) if e.kind() == ErrorKind::AlreadyExists && i < 1000 => {}
                Err(e) => return Err(Error::io(&path, e)),
            }
        }
        unreachable!("the loop returns")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rename(mut self, out: &Path) -> Result<()> {
        fs::rename(&self.path, out).map_err(|e| Error::io(out, e))?;
        self.done = true;
        // The new name is on the disk when its folder is. Not every system can open a folder.
        if let Some(folder) = out.parent().filter(|p| !p.as_os_str().is_empty())
            && let Ok(folder) = File::open(folder)
        {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.path);
        }
    }
}
