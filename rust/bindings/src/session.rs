//! Sessions and their snapshots.

use crate::error::{detached, exception};
use numpy::{PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use qdelta_core::Error;
use qdelta_core::model::forward::{Model, Rows};
use qdelta_core::session;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One timeline of tokens. Calls from several threads take turns.
#[pyclass(frozen, module = "qdelta._native")]
pub struct Session {
    inner: Mutex<session::Session>,
}

/// The state of a session at some token.
#[pyclass(frozen, module = "qdelta._native")]
pub struct Snapshot {
    inner: session::Snapshot,
}

type Arrays<'py> = BTreeMap<String, Bound<'py, PyArrayDyn<f32>>>;

impl Session {
    pub fn new(model: Arc<Model>) -> qdelta_core::Result<Session> {
        Ok(Session { inner: Mutex::new(session::Session::new(model)?) })
    }

    fn lock(&self) -> MutexGuard<'_, session::Session> {
        // A panic inside a feed is caught there and marks the session as unusable.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Session {
    #[getter]
    fn n_tokens(&self, py: Python<'_>) -> usize {
        py.detach(|| self.lock().tokens().len())
    }

    fn tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        let tokens = py.detach(|| self.lock().tokens().to_vec());
        PyArray1::from_vec(py, tokens)
    }

    #[pyo3(signature = (tokens, logits="last"))]
    fn feed(
        &self,
        py: Python<'_>,
        tokens: PyReadonlyArray1<'_, i32>,
        logits: &str,
    ) -> PyResult<()> {
        let rows = match logits {
            "none" => Rows::None,
            "last" => Rows::Last,
            "all" => Rows::All,
            _ => {
                let text = format!("logits is `{logits}`, expected one of: none, last, all");
                return Err(exception(py, Error::Argument(text)));
            }
        };
        let tokens = tokens.as_array().to_vec();
        detached(py, || self.lock().feed(&tokens, rows))
    }

    fn logits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (logits, vocab) = detached(py, || {
            let mut session = self.lock();
            let vocab = session.model().config.vocab_size;
            Ok((session.logits()?.to_vec(), vocab))
        })?;
        let rows = logits.len() / vocab;
        PyArray1::from_vec(py, logits).reshape([rows, vocab])
    }

    fn gather<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'_, i32>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let ids = ids.as_array().to_vec();
        let values = detached(py, || self.lock().gather(&ids))?;
        Ok(PyArray1::from_vec(py, values))
    }

    #[pyo3(signature = (k, *, limit))]
    fn screening(&self, py: Python<'_>, k: usize, limit: usize) -> PyResult<Vec<(usize, usize)>> {
        let rows = detached(py, || self.lock().screening(k, limit))?;
        Ok(rows.into_iter().map(|row| (row.scored, row.missed)).collect())
    }

    #[pyo3(signature = (k, *, limit, ids, values))]
    #[allow(clippy::type_complexity)]
    fn candidates<'py>(
        &self,
        py: Python<'py>,
        k: usize,
        limit: usize,
        ids: PyReadonlyArray1<'_, i32>,
        values: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<(Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<f32>>)> {
        let (ids, values) = (ids.as_array().to_vec(), values.as_array().to_vec());
        let (ids, values) = detached(py, || self.lock().candidates(k, limit, &ids, &values))?;
        Ok((PyArray1::from_vec(py, ids), PyArray1::from_vec(py, values)))
    }

    fn snapshot(&self, py: Python<'_>) -> PyResult<Snapshot> {
        Ok(Snapshot { inner: detached(py, || self.lock().snapshot())? })
    }

    fn restore(&self, py: Python<'_>, snapshot: &Snapshot) -> PyResult<()> {
        detached(py, || self.lock().restore(&snapshot.inner))
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.lock().reset());
    }

    fn start_profile(&self, py: Python<'_>) {
        py.detach(|| self.lock().start_profile());
    }

    fn stop_profile(&self, py: Python<'_>) -> PyResult<BTreeMap<&'static str, f64>> {
        detached(py, || match self.lock().stop_profile() {
            Some(profile) => Ok(profile.seconds().into_iter().collect()),
            None => Err(Error::Argument("no profile was started".into())),
        })
    }

    fn trace<'py>(
        &self,
        py: Python<'py>,
        tokens: PyReadonlyArray1<'_, i32>,
    ) -> PyResult<Arrays<'py>> {
        let tokens = tokens.as_array().to_vec();
        let values = detached(py, || self.lock().trace(&tokens))?;
        values
            .into_iter()
            .map(|(name, value)| {
                let shape = vec![value.data.len() / value.width, value.width];
                Ok((name, PyArray1::from_vec(py, value.data).reshape(shape)?))
            })
            .collect()
    }

    fn state<'py>(&self, py: Python<'py>, layer: usize) -> PyResult<Arrays<'py>> {
        let arrays = detached(py, || self.lock().layer_state(layer))?;
        arrays
            .into_iter()
            .map(|(name, shape, data)| {
                Ok((name.to_owned(), PyArray1::from_vec(py, data).reshape(shape)?))
            })
            .collect()
    }
}

#[pymethods]
impl Snapshot {
    #[getter]
    fn n_tokens(&self) -> usize {
        self.inner.n_tokens()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.bytes()
    }
}
