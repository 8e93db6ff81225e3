//! Loaded models.

use crate::checkpoint::Checkpoint;
use crate::error::{detached, exception};
use crate::session::Session;
use pyo3::prelude::*;
use qdelta_core::Error;
use qdelta_core::model::config::Config;
use qdelta_core::model::forward::{Model as CoreModel, Options};
use qdelta_core::model::synthetic::Synthetic;
use qdelta_core::simd::Cpu;
use qdelta_core::state::KvFormat;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Weights bound to the layers that read them, and the threads that do.
#[pyclass(frozen, module = "qdelta._native")]
pub struct Model {
    pub inner: Arc<CoreModel>,
}

fn options(
    context: Option<usize>,
    yarn: Option<f64>,
    threads: Option<usize>,
    kv: &str,
    isa: Option<&str>,
    head: &str,
) -> qdelta_core::Result<Options> {
    let kv = match kv {
        "auto" => None,
        "f16" => Some(KvFormat::F16),
        "f32" => Some(KvFormat::F32),
        "q8" => Some(KvFormat::Q8),
        _ => {
            return Err(Error::Argument(format!(
                "kv is `{kv}`, expected one of: auto, f16, f32, q8"
            )));
        }
    };
    let (cpu, head) = (isa.map(Cpu::named).transpose()?, head.parse()?);
    Ok(Options { context, yarn, threads, kv, cpu, head })
}

#[pymethods]
impl Model {
    #[new]
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (checkpoint, *, context=None, yarn=None, threads=None, kv="auto", isa=None, head="full"))]
    fn new(
        py: Python<'_>,
        checkpoint: &Checkpoint,
        context: Option<usize>,
        yarn: Option<f64>,
        threads: Option<usize>,
        kv: &str,
        isa: Option<&str>,
        head: &str,
    ) -> PyResult<Model> {
        let options =
            options(context, yarn, threads, kv, isa, head).map_err(|error| exception(py, error))?;
        let checkpoint = checkpoint.inner.clone();
        let inner = detached(py, || CoreModel::load(checkpoint, options))?;
        Ok(Model { inner: Arc::new(inner) })
    }

    /// A model of the config's shape with random weights.
    #[staticmethod]
    #[pyo3(signature = (config_json, *, quant, seed=0, context=None, threads=None, kv="auto", isa=None, head="full"))]
    #[allow(clippy::too_many_arguments)]
    fn synthetic(
        py: Python<'_>,
        config_json: &str,
        quant: &str,
        seed: u64,
        context: Option<usize>,
        threads: Option<usize>,
        kv: &str,
        isa: Option<&str>,
        head: &str,
    ) -> PyResult<Model> {
        let options =
            options(context, None, threads, kv, isa, head).map_err(|error| exception(py, error))?;
        let inner = detached(py, || {
            let quant = quant.parse()?;
            let config = Config::from_json(config_json, "config.json")?;
            let source = Arc::new(Synthetic::new(&config, quant, seed)?);
            CoreModel::new(config, quant, source, options)
        })?;
        Ok(Model { inner: Arc::new(inner) })
    }

    #[getter]
    fn isa(&self) -> &str {
        self.inner.cpu.name()
    }

    #[getter]
    fn threads(&self) -> usize {
        self.inner.threads()
    }

    #[getter]
    fn kv(&self) -> &str {
        self.inner.kv.name()
    }

    #[getter]
    fn head(&self) -> &str {
        self.inner.head.name()
    }

    #[getter]
    fn quant(&self) -> String {
        self.inner.quant.to_string()
    }

    #[getter]
    fn context(&self) -> usize {
        self.inner.context
    }

    #[getter]
    fn yarn(&self) -> Option<f64> {
        self.inner.config.rope.yarn.as_ref().map(|yarn| yarn.factor)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.config.vocab_size
    }

    #[getter]
    fn weight_bytes(&self) -> usize {
        self.inner.weight_bytes()
    }

    #[getter]
    fn head_bytes(&self) -> usize {
        self.inner.head_bytes()
    }

    fn memory_plan(&self, context: usize) -> BTreeMap<&'static str, usize> {
        let plan = self.inner.memory_plan(context);
        BTreeMap::from([
            ("weights", plan.weights),
            ("kv", plan.kv),
            ("state", plan.state),
            ("scratch", plan.scratch),
        ])
    }

    fn session(&self) -> Session {
        Session::new(self.inner.clone())
    }
}
