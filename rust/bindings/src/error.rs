//! Core errors as the exceptions of `qdelta.errors`.

use pyo3::prelude::*;
use qdelta_core::Error;

/// The exception for a core error.
pub fn exception(py: Python<'_>, error: Error) -> PyErr {
    let class = match &error {
        Error::Io { .. } => "FileAccessError",
        Error::File(_) => "FileError",
        Error::Unsupported(_) => "UnsupportedError",
        Error::Argument(_) => "ArgumentError",
        Error::Context { .. } => "ContextError",
        Error::MemoryLimit { .. } => "MemoryLimitError",
        Error::Memory { .. } | Error::Interrupted | Error::Internal(_) => "Error",
    };
    let text = error.to_string();
    let made =
        py.import("qdelta.errors").and_then(|errors| errors.getattr(class)).and_then(|class| {
            match &error {
                Error::Context { needed, available } => class.call1((*needed, *available)),
                Error::MemoryLimit { limit, needed, .. } => class.call1((text, *needed, *limit)),
                Error::Io { path, source } => {
                    let errno = source.raw_os_error().unwrap_or(0);
                    class.call1((errno, source.to_string(), path.as_os_str()))
                }
                _ => class.call1((text,)),
            }
        });
    made.map_or_else(|error| error, PyErr::from_value)
}

/// Runs `work` without the GIL.
pub fn detached<T: Send>(
    py: Python<'_>,
    work: impl Send + FnOnce() -> qdelta_core::Result<T>,
) -> PyResult<T> {
    py.detach(work).map_err(|error| exception(py, error))
}
