//! Text to ids.

use crate::error::{detached, exception};
use pyo3::prelude::*;
use std::collections::HashMap;

/// Bytes of text from which on other Python threads may run meanwhile. For shorter ones it is not
/// worth waiting for the interpreter lock afterwards.
const LONG_TEXT: usize = 4096;

/// A tokenizer without its added tokens.
#[pyclass(frozen, module = "qdelta._native")]
pub struct Encoder {
    inner: qdelta_tokenizer::Encoder,
}

#[pymethods]
impl Encoder {
    #[staticmethod]
    #[allow(clippy::type_complexity)]
    fn from_tokenizer_json(
        py: Python<'_>,
        content: &[u8],
    ) -> PyResult<(Encoder, Vec<(u32, String, bool, bool)>)> {
        let read = || {
            let encoder = qdelta_tokenizer::Encoder::from_tokenizer_json(content);
            return_free_memory();
            encoder
        };
        let (inner, added) = detached(py, read)?;
        let added = added.into_iter().map(|token| {
            let exact = !(token.lstrip || token.rstrip || token.single_word);
            (token.id, token.content, token.special, exact)
        });
        Ok((Encoder { inner }, added.collect()))
    }

    #[staticmethod]
    fn from_vocab_and_merges(
        py: Python<'_>,
        vocab: HashMap<String, u32>,
        merges: Vec<(String, String)>,
        pattern: &str,
    ) -> PyResult<Encoder> {
        let read = || qdelta_tokenizer::Encoder::from_vocab_and_merges(&vocab, &merges, pattern);
        detached(py, read).map(|inner| Encoder { inner })
    }

    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        if text.len() < LONG_TEXT {
            return self.inner.encode(text).map_err(|error| exception(py, error));
        }
        detached(py, || self.inner.encode(text))
    }

    #[getter]
    fn size(&self) -> u32 {
        self.inner.size()
    }

    fn token(&self, id: u32) -> Option<&str> {
        self.inner.token(id)
    }

    fn tokens(&self) -> HashMap<&str, u32> {
        self.inner.tokens()
    }

    fn merges(&self) -> Vec<(&str, &str)> {
        self.inner.merges()
    }
}

/// Gives memory that is no longer used back to the system: reading a tokenizer takes more than is kept of it, in
/// blocks that glibc holds on to.
fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes its own locks and moves nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
