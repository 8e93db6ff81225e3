//! Converts a checkpoint: its matrices in the panels that the kernels read, in one file.
//!
//! The file is described in [`crate::files::container`], the choice of formats in
//! [`crate::model::tensors`]. Work goes tensor by tensor in slabs of panels, so that memory holds
//! one slab, whatever the size of the model. The same source gives the same bytes for any number
//! of threads.

use crate::error::{Error, Result};
use crate::files::container::{self, Info, Item, Layout};
use crate::files::mmap::Mapping;
use crate::files::{file_name, stat};
use crate::model::checkpoint::Checkpoint;
use crate::model::tensors::{Storage, TensorSpec};
use crate::quant::{Format, PANEL_ROWS, Quant, encode_panel, panel_bytes, planes};
use crate::tensor::{Dtype, Tensor, widen};
use crate::threads;
use rayon::ThreadPool;
use rayon::prelude::*;
use std::collections::HashSet;
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

/// Writes a checkpoint to `out` with its matrices in the format `quant`.
///
/// attachments: files that travel along, by the name under which they are found again. threads: 1
/// to 1024, or rayon's own choice if None. The file appears at `out` only when it is whole; one that was
/// converted before is replaced, anything else there is an error. If `progress` returns false, the
/// result is [`Error::Interrupted`]; it is called on the caller's thread.
pub fn convert(
    source: &Checkpoint,
    quant: Quant,
    out: &Path,
    attachments: &[(String, PathBuf)],
    threads: Option<usize>,
    progress: &mut Progress,
) -> Result<()> {
    if source.quant != Quant::None {
        return Err(Error::Argument(format!(
            "the source is already converted ({}), expected a checkpoint folder",
            source.quant
        )));
    }
    if quant == Quant::None {
        return Err(Error::Argument("quant is `none`, expected w8 or w4".to_owned()));
    }
    check_replaceable(out)?;
    // Before a long work that would end in the same error.
    source.check_values()?;
    let (items, parts) = plan(source, quant, attachments)?;
    let info =
        Info { quant, config_json: source.config_json.clone(), sources: source.sources().to_vec() };
    let layout = info.layout(&items);
    let pool = threads.map(thread_pool).transpose()?;

    let (file, temporary) = Temporary::create(out)?;
    let mut writer = Writer {
        file,
        path: &temporary.path,
        hasher: blake3::Hasher::new(),
        done: 0,
        total: layout.data_bytes as u64,
        progress,
    };
    writer.step(0)?;
    writer.file.write_all(&layout.header).map_err(|e| writer.error(e))?;
    for ((part, item), padding) in parts.iter().zip(&items).zip(&layout.padding) {
        match part {
            Part::Packed { spec, tensor, format } => {
                write_packed(&mut writer, source, (spec, tensor), *format, pool.as_ref())?;
            }
            Part::Floats { name } => {
                let values = source.floats(name)?;
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.put(&bytes)?;
            }
            Part::AsIs { spec, tensor } => {
                check_rows(source, spec, tensor, f32::MAX)?;
                writer.put_slabs(&tensor.bytes)?;
                source.release(&tensor.bytes);
            }
            Part::File { path } => writer.put_file(path, item.bytes as u64)?,
        }
        writer.put(&vec![0; *padding])?;
    }
    writer.finish(&layout)?;
    source.check_unchanged()?;
    temporary.rename(out)
}

/// What an item of the file is made of.
enum Part<'a> {
    Packed { spec: &'a TensorSpec, tensor: &'a Tensor, format: Format },
    Floats { name: &'a str },
    AsIs { spec: &'a TensorSpec, tensor: &'a Tensor },
    File { path: &'a Path },
}

fn plan<'a>(
    source: &'a Checkpoint,
    quant: Quant,
    attachments: &'a [(String, PathBuf)],
) -> Result<(Vec<Item>, Vec<Part<'a>>)> {
    let mut items = Vec::new();
    let mut parts = Vec::new();
    for spec in source.specs() {
        let tensor = source.tensor(&spec.name).ok_or_else(|| {
            Error::Internal(format!("tensor `{}` of the table is not bound", spec.name))
        })?;
        let (dtype, part) = match spec.role.storage(quant) {
            Storage::Packed(format) => (Dtype::U8, Part::Packed { spec, tensor, format }),
            Storage::F32 => (Dtype::F32, Part::Floats { name: &spec.name }),
            Storage::AsIs => (tensor.dtype, Part::AsIs { spec, tensor }),
        };
        let shape = spec.stored_shape(quant);
        let bytes = dtype.bytes(shape.iter().product());
        items.push(Item { name: spec.stored_name(quant), dtype, shape, bytes });
        parts.push(part);
    }
    let mut names = HashSet::new();
    for (name, path) in attachments {
        if !names.insert(name) {
            return Err(Error::Argument(format!("attachment `{name}` is there twice")));
        }
        let bytes = stat(path)?.bytes as usize;
        let name = container::attachment_tensor(name);
        items.push(Item { name, dtype: Dtype::U8, shape: vec![bytes], bytes });
        parts.push(Part::File { path });
    }
    Ok((items, parts))
}

fn thread_pool(threads: usize) -> Result<ThreadPool> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads::checked(threads)?);
    builder.build().map_err(|e| Error::Internal(format!("no threads: {e}")))
}

/// Quantises a matrix, a panel a task, once for each plane of the format.
fn write_packed(
    writer: &mut Writer,
    source: &Checkpoint,
    (spec, tensor): (&TensorSpec, &Tensor),
    format: Format,
    pool: Option<&ThreadPool>,
) -> Result<()> {
    let (rows, cols) = spec.rows_cols();
    let float = float_format(spec, tensor)?;
    let row_bytes = float.bytes(1, cols);
    let panels = rows.div_ceil(PANEL_ROWS);
    for plane in planes(format, cols) {
        let slab_panels = (SLAB_BYTES / plane.len()).max(1);
        let mut slab = vec![0; slab_panels.min(panels) * plane.len()];
        for first in (0..panels).step_by(slab_panels) {
            let slab = &mut slab[..slab_panels.min(panels - first) * plane.len()];
            // Whether all values of the panel can be stored.
            let encode = |(values, panel): &mut (Vec<f32>, Vec<u8>),
                          (i, out): (usize, &mut [u8])| {
                let start = (first + i) * PANEL_ROWS;
                let end = (start + PANEL_ROWS).min(rows);
                values.resize((end - start) * cols, 0.0);
                widen(float, &tensor.bytes[start * row_bytes..end * row_bytes], values);
                let fits = values.iter().all(|x| x.abs() <= LARGEST);
                if fits {
                    encode_panel(format, values, cols, panel);
                    out.copy_from_slice(&panel[plane.clone()]);
                }
                fits
            };
            let mut encode_all = || {
                let init = || (Vec::new(), vec![0; panel_bytes(format, cols)]);
                let panels = slab.par_chunks_exact_mut(plane.len()).enumerate();
                panels.map_init(init, encode).all(|fits| fits)
            };
            let all_fit = match pool {
                Some(pool) => pool.install(encode_all),
                None => encode_all(),
            };
            if !all_fit {
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

fn float_format(spec: &TensorSpec, tensor: &Tensor) -> Result<Format> {
    tensor.dtype.format().ok_or_else(|| {
        Error::Internal(format!("tensor `{}` is bound to {}", spec.name, tensor.dtype.name()))
    })
}

/// An error that names the first row with a value that is not from -most to most.
fn check_rows(source: &Checkpoint, spec: &TensorSpec, tensor: &Tensor, most: f32) -> Result<()> {
    let (rows, cols) = spec.rows_cols();
    let float = float_format(spec, tensor)?;
    let row_bytes = float.bytes(1, cols);
    let mut values = vec![0.0; cols];
    for row in 0..rows {
        widen(float, &tensor.bytes[row * row_bytes..][..row_bytes], &mut values);
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

/// Writes data, hashes it, and reports it.
struct Writer<'a, 'b> {
    file: File,
    path: &'a Path,
    hasher: blake3::Hasher,
    done: u64,
    total: u64,
    progress: &'a mut Progress<'b>,
}

impl Writer<'_, '_> {
    fn error(&self, source: std::io::Error) -> Error {
        Error::io(self.path, source)
    }

    fn step(&mut self, bytes: usize) -> Result<()> {
        self.done += bytes as u64;
        if (self.progress)(self.done, self.total) { Ok(()) } else { Err(Error::Interrupted) }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|e| self.error(e))?;
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

    /// Puts the hash into the header, and all of it on the disk.
    fn finish(mut self, layout: &Layout) -> Result<()> {
        assert_eq!(self.done, self.total, "the layout lists all that was written");
        let hash = self.hasher.finalize().to_hex();
        let mut patch = || {
            self.file.seek(SeekFrom::Start(layout.hash_at as u64))?;
            self.file.write_all(hash.as_bytes())?;
            self.file.sync_all()
        };
        patch().map_err(|e| Error::io(self.path, e))
    }
}

/// A file beside its final place, removed unless it was renamed.
struct Temporary {
    path: PathBuf,
    done: bool,
}

impl Temporary {
    fn create(out: &Path) -> Result<(File, Temporary)> {
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

    fn rename(mut self, out: &Path) -> Result<()> {
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
