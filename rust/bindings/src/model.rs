//! Loaded models.

use crate::checkpoint::Checkpoint;
use crate::error::{detached, exception};
use crate::session::Session;
use pyo3::prelude::*;
use qdelta_core::Error;
use qdelta_core::config::Config;
use qdelta_core::model::forward::Model as CoreModel;
use qdelta_core::model::memory::{self, Needs, Stored};
use qdelta_core::model::options::Options;
use qdelta_core::model::synthetic::Synthetic;
use qdelta_core::quant::Quant;
use qdelta_core::simd::Cpu;
use qdelta_core::state::KvFormat;
use qdelta_core::tensor::Dtype;
use std::sync::Arc;

/// Weights bound to the layers that read them, and the threads that do.
#[pyclass(frozen, module = "qdelta._native")]
pub struct Model {
    pub inner: Arc<CoreModel>,
}

#[allow(clippy::too_many_arguments)]
fn options(
    context: Option<usize>,
    yarn: Option<f64>,
    threads: Option<usize>,
    kv: &str,
    isa: Option<&str>,
    head: &str,
    memory_limit: Option<usize>,
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
    Ok(Options { context, yarn, threads, kv, cpu, head, memory_limit })
}

#[pymethods]
impl Model {
    #[new]
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (checkpoint, *, context=None, yarn=None, threads=None, kv="auto", isa=None, head="full", memory_limit=None))]
    fn new(
        py: Python<'_>,
        checkpoint: &Checkpoint,
        context: Option<usize>,
        yarn: Option<f64>,
        threads: Option<usize>,
        kv: &str,
        isa: Option<&str>,
        head: &str,
        memory_limit: Option<usize>,
    ) -> PyResult<Model> {
        let options = options(context, yarn, threads, kv, isa, head, memory_limit)
            .map_err(|error| exception(py, error))?;
        let checkpoint = checkpoint.inner.clone();
        let inner = detached(py, || CoreModel::load(checkpoint, options))?;
        Ok(Model { inner: Arc::new(inner) })
    }

    /// A model of the config's shape with random weights.
    #[staticmethod]
    #[pyo3(signature = (config_json, *, quant, seed=0, context=None, yarn=None, threads=None, kv="auto", isa=None, head="full", memory_limit=None))]
    #[allow(clippy::too_many_arguments)]
    fn synthetic(
        py: Python<'_>,
        config_json: &str,
        quant: &str,
        seed: u64,
        context: Option<usize>,
        yarn: Option<f64>,
        threads: Option<usize>,
        kv: &str,
        isa: Option<&str>,
        head: &str,
        memory_limit: Option<usize>,
    ) -> PyResult<Model> {
        let options = options(context, yarn, threads, kv, isa, head, memory_limit)
            .map_err(|error| exception(py, error))?;
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
    fn settled(&self) -> bool {
        self.inner.is_settled()
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

    #[getter]
    fn memory_held(&self) -> usize {
        self.inner.budget().held()
    }

    fn memory_plan(&self, context: usize) -> MemoryPlan {
        MemoryPlan::new(self.inner.memory_plan(context), context, self.inner.kv)
    }

    fn session(&self, py: Python<'_>) -> PyResult<Session> {
        detached(py, || Session::new(self.inner.clone()))
    }
}

/// What a model and a session of some length take.
#[pyclass(frozen, get_all, module = "qdelta._native")]
pub struct MemoryPlan {
    context: usize,
    kv_format: &'static str,
    weights: usize,
    kv: usize,
    state: usize,
    scratch: usize,
}

impl MemoryPlan {
    fn new(plan: memory::MemoryPlan, context: usize, kv: KvFormat) -> MemoryPlan {
        let memory::MemoryPlan { weights, kv: cache, state, scratch } = plan;
        MemoryPlan { context, kv_format: kv.name(), weights, kv: cache, state, scratch }
    }
}

/// What decides the sizes of the weights: files, or a config with the dtype that files would have.
#[derive(FromPyObject)]
pub enum Planned<'py> {
    Checkpoint(PyRef<'py, Checkpoint>),
    Config(String),
}

/// What a model will take, before it is converted or loaded.
#[pyfunction]
#[pyo3(signature = (model, *, quant, dtype="bfloat16", context=None, yarn=None, threads=None, kv="auto", head="full", memory_limit=None))]
#[allow(clippy::too_many_arguments)]
pub fn memory_plan(
    py: Python<'_>,
    model: Planned<'_>,
    quant: &str,
    dtype: &str,
    context: Option<usize>,
    yarn: Option<f64>,
    threads: Option<usize>,
    kv: &str,
    head: &str,
    memory_limit: Option<usize>,
) -> PyResult<MemoryPlan> {
    let plan = || {
        let options = options(context, yarn, threads, kv, None, head, memory_limit)?;
        let quant: Quant = quant.parse()?;
        let (config, stored) = match &model {
            Planned::Checkpoint(checkpoint) => {
                let checkpoint = &checkpoint.inner;
                (checkpoint.config.clone(), Stored::of_checkpoint(checkpoint, quant)?)
            }
            Planned::Config(json) => {
                let config = Config::from_json(json, "config.json")?;
                let dtype = Dtype::float(dtype)?;
                let stored = Stored::of_release(&config, quant, dtype)?;
                (config, stored)
            }
        };
        let config = match yarn {
            Some(factor) => config.with_yarn(factor)?,
            None => config,
        };
        let needs = Needs::new(&config, stored, &options)?;
        let context = needs.context(&options)?;
        Ok(MemoryPlan::new(needs.plan(context), context, needs.kv))
    };
    plan().map_err(|error| exception(py, error))
}
