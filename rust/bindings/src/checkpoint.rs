//! Checkpoints and their conversion.

use crate::error::{detached, exception};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyInt, PyList};
use qdelta_core::files::file_name;
use qdelta_core::files::gguf::{self, Value};
use qdelta_core::files::gguf_write::Entry;
use qdelta_core::files::mmap::Mapping;
use qdelta_core::model::checkpoint;
use qdelta_core::model::recipe::Storage;
use qdelta_core::quant::{BlockType, Format};
use qdelta_core::tensor::Dtype;
use qdelta_core::{Error, convert as core_convert, export, sensitivity};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A checkpoint folder or a converted file, opened and validated.
#[pyclass(frozen, module = "qdelta._native")]
pub struct Checkpoint {
    pub inner: Arc<checkpoint::Checkpoint>,
}

#[pymethods]
impl Checkpoint {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Checkpoint> {
        let inner = detached(py, || checkpoint::Checkpoint::open(&path))?;
        Ok(Checkpoint { inner: Arc::new(inner) })
    }

    #[getter]
    fn config_json(&self) -> &str {
        &self.inner.config_json
    }

    #[getter]
    fn quant(&self) -> String {
        self.inner.quant.to_string()
    }

    fn matrices(&self) -> Vec<(String, usize, usize)> {
        let specs = self.inner.matrices();
        specs.map(|spec| (spec.name.clone(), spec.shape[0], spec.shape[1])).collect()
    }

    #[getter]
    fn convention(&self) -> &str {
        self.inner.convention.name()
    }

    fn gguf_keys(&self) -> Vec<String> {
        self.inner.gguf().map_or(Vec::new(), |gguf| gguf.keys().map(str::to_owned).collect())
    }

    fn gguf_value<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(gguf) = self.inner.gguf() else { return Ok(None) };
        let value = gguf.get(key).map_err(|error| exception(py, error))?;
        value.map(|value| python_value(py, value)).transpose()
    }

    #[getter]
    fn yarn(&self) -> Option<f64> {
        self.inner.config.rope.yarn.as_ref().map(|yarn| yarn.factor)
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.inner.metadata().clone()
    }

    fn attachment<'py>(&self, py: Python<'py>, name: &str) -> Option<Bound<'py, PyBytes>> {
        self.inner.attachment(name).map(|bytes| PyBytes::new(py, &bytes))
    }

    fn sources(&self) -> Vec<(String, u64, u64)> {
        let sources = self.inner.sources().iter();
        sources.map(|s| (s.name.clone(), s.bytes, s.modified_ns)).collect()
    }

    fn is_conversion_of(&self, source: &Checkpoint) -> bool {
        core_convert::is_conversion_of(&self.inner, &source.inner)
    }

    fn unknown_tensors(&self) -> Vec<&str> {
        self.inner.unknown().collect()
    }

    fn tensors(&self) -> Vec<(String, String, Vec<usize>, usize, String)> {
        self.inner.listing()
    }
}

fn python_value<'py>(py: Python<'py>, value: Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Unsigned(n) => n.into_pyobject(py)?.into_any(),
        Value::Signed(n) => n.into_pyobject(py)?.into_any(),
        Value::Float(x) => x.into_pyobject(py)?.into_any(),
        Value::Bool(flag) => flag.into_pyobject(py)?.to_owned().into_any(),
        Value::Text(text) => text.into_pyobject(py)?.into_any(),
        Value::Array(array) => {
            let list = PyList::empty(py);
            for value in array.iter() {
                list.append(python_value(py, value.map_err(|error| exception(py, error))?)?)?;
            }
            list.into_any()
        }
    })
}

/// Runs work without the GIL that reports its progress; an exception of `progress`, or Ctrl-C,
/// interrupts it and is returned beside the result.
fn reporting<T: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl Send + FnOnce(&mut core_convert::Progress) -> qdelta_core::Result<T>,
) -> (qdelta_core::Result<T>, Option<PyErr>) {
    // Python is asked this often whether to stop, and told how far the work is.
    const INTERVAL: Duration = Duration::from_millis(50);
    let mut last = Instant::now();
    let mut raised = None;
    let mut report = |done: u64, total: u64| {
        if last.elapsed() < INTERVAL && done < total {
            return true;
        }
        last = Instant::now();
        let result = Python::attach(|py| {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |p| p.call1(py, (done, total)).map(drop))
        });
        raised = result.err();
        raised.is_none()
    };
    let result = py.detach(|| work(&mut report));
    (result, raised)
}

/// Writes a GGUF file.
#[pyfunction]
#[pyo3(signature = (source, out, *, dtype, metadata, threads=None, progress=None))]
pub fn export_gguf(
    py: Python<'_>,
    source: &Checkpoint,
    out: PathBuf,
    dtype: &str,
    metadata: Vec<(String, Bound<'_, PyAny>)>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let known = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let blocks = BlockType::ALL.map(Dtype::Blocks);
    let dtype = known.into_iter().chain(blocks).find(|d| d.name() == dtype).ok_or_else(|| {
        exception(py, Error::Argument(format!("type `{dtype}`, expected one as BF16 or Q8_0")))
    })?;
    let entries = metadata
        .into_iter()
        .map(|(key, value)| Ok((key, entry(&value)?)))
        .collect::<PyResult<Vec<_>>>()?;
    let source = &source.inner;
    let (result, raised) = reporting(py, progress, |report| {
        export::to_gguf(source, dtype, entries, &out, threads, report)
    });
    match (result, raised) {
        (Err(Error::Interrupted), Some(raised)) => Err(raised),
        (result, _) => result.map_err(|error| exception(py, error)),
    }
}

/// A value of GGUF metadata: int as u32, float as f32, bool, str, list of int as i32, list of str.
fn entry(value: &Bound<'_, PyAny>) -> PyResult<Entry> {
    if value.is_instance_of::<PyBool>() {
        return Ok(Entry::Bool(value.extract()?));
    }
    if value.is_instance_of::<PyList>() {
        return match value.extract::<Vec<i32>>() {
            Ok(values) => Ok(Entry::I32s(values)),
            Err(_) => Ok(Entry::Texts(value.extract()?)),
        };
    }
    if value.is_instance_of::<PyInt>() {
        return Ok(Entry::U32(value.extract()?));
    }
    match value.extract::<f32>() {
        Ok(x) => Ok(Entry::F32(x)),
        Err(_) => Ok(Entry::Text(value.extract()?)),
    }
}

/// A file that travels along in a converted one: a path, or its content.
#[derive(FromPyObject)]
pub enum Attachment {
    Content(Vec<u8>),
    Path(PathBuf),
}

/// Writes a converted file, or makes one in memory and opens it if `out` is None.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
#[pyo3(signature = (source, out, *, quant, attachments, formats=None, importance=None, threads=None, progress=None))]
pub fn convert(
    py: Python<'_>,
    source: &Checkpoint,
    out: Option<PathBuf>,
    quant: &str,
    attachments: Vec<(String, Attachment)>,
    formats: Option<HashMap<String, String>>,
    importance: Option<HashMap<String, Vec<f32>>>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Option<Checkpoint>> {
    let quant = quant.parse().map_err(|error| exception(py, error))?;
    let chosen = chosen(formats.unwrap_or_default()).map_err(|error| exception(py, error))?;
    let attachments: Vec<_> = attachments
        .into_iter()
        .map(|(name, attachment)| {
            let attachment = match attachment {
                Attachment::Content(content) => core_convert::Attachment::Content(content),
                Attachment::Path(path) => core_convert::Attachment::Path(path),
            };
            (name, attachment)
        })
        .collect();
    let (result, raised) = reporting(py, progress, |report| {
        let attachments = &attachments;
        let importance = importance.unwrap_or_default();
        let source = &source.inner;
        let job = core_convert::Job { source, quant, chosen, importance, attachments, threads };
        let Some(out) = out else {
            let bytes = job.to_memory(report)?;
            let name = source.name().to_owned();
            return checkpoint::Checkpoint::open_converted(bytes, name).map(Some);
        };
        job.to_file(&out, report).map(|()| None)
    });
    match (result, raised) {
        (Err(Error::Interrupted), Some(raised)) => Err(raised),
        (Ok(opened), _) => Ok(opened.map(|inner| Checkpoint { inner: Arc::new(inner) })),
        (Err(error), _) => Err(exception(py, error)),
    }
}

/// (matrix, format, bytes, error) of all float matrices in some formats.
#[pyfunction]
pub fn losses(
    py: Python<'_>,
    source: &Checkpoint,
    formats: Vec<String>,
    importance: HashMap<String, Vec<f32>>,
) -> PyResult<Vec<(String, &'static str, usize, f64)>> {
    let losses = detached(py, || {
        let formats: Vec<Format> = formats
            .iter()
            .map(|name| match Storage::named(name) {
                Some(Storage::Coded(format)) => Ok(format),
                _ => Err(Error::Argument(format!("format `{name}` is not known"))),
            })
            .collect::<qdelta_core::Result<_>>()?;
        sensitivity::losses(&source.inner, &formats, &importance)
    })?;
    Ok(losses.into_iter().map(|l| (l.matrix, l.format.name(), l.bytes, l.error)).collect())
}

fn chosen(formats: HashMap<String, String>) -> qdelta_core::Result<HashMap<String, Storage>> {
    let storage = |(name, format): (String, String)| match Storage::named(&format) {
        Some(storage) => Ok((name, storage)),
        None => Err(Error::Argument(format!(
            "format of `{name}` is `{format}`, expected keep, w4_r, w4_nl_r, w5_r, w4_k, w5_k, \
             w6_k, w4, w4_nl, w5_planes, w8 or w8_planes"
        ))),
    };
    formats.into_iter().map(storage).collect()
}

/// Recomputes the hash of a converted file; an exception if it is not the recorded one.
#[pyfunction]
pub fn verify(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    detached(py, || core_convert::verify(&path))
}

/// Bytes of the header of a GGUF file of `length` bytes, of which a file holds the start; None if
/// it holds too little of it.
#[pyfunction]
pub fn gguf_header_bytes(py: Python<'_>, start: PathBuf, length: u64) -> PyResult<Option<usize>> {
    detached(py, || gguf::header_bytes(&Mapping::open(&start)?.bytes(), length, &file_name(&start)))
}
