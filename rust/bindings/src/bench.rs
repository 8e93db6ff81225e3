//! Kernels on their own, for benchmarks.

use pyo3::prelude::*;

#[pymodule]
pub mod kernels {
    use crate::error::{detached, exception};
    use pyo3::prelude::*;
    use qdelta_core::kernels::Reading;
    use qdelta_core::simd::Cpu;
    use qdelta_core::{Error, bench, threads};
    use std::collections::BTreeMap;

    /// Seconds for `repeats` products of a random [rows, cols] matrix with `tokens` rows.
    ///
    /// format: bf16, f16, f32, or one of panels, as w8, w5_planes or w4_k.
    #[pyfunction]
    #[pyo3(signature = (isa, format, rows, cols, tokens, repeats, ask = "l1", abreast = true))]
    #[allow(clippy::too_many_arguments)]
    fn matmul(
        py: Python<'_>,
        isa: &str,
        format: &str,
        rows: usize,
        cols: usize,
        tokens: usize,
        repeats: usize,
        ask: &str,
        abreast: bool,
    ) -> PyResult<f64> {
        let cpu = Cpu::named(isa).map_err(|error| exception(py, error))?;
        detached(py, || {
            let reading = Reading { ask: bench::ask_named(ask)?, abreast };
            let format = bench::format_named(format)?;
            if rows == 0 || cols == 0 || tokens == 0 {
                return Err(Error::Argument("rows, cols and tokens are at least 1".into()));
            }
            Ok(bench::matmul(cpu, format, (rows, cols), tokens, reading, repeats).as_secs_f64())
        })
    }

    /// Seconds for `repeats` steps of `tokens` tokens on `heads` states of 128 x 128.
    #[pyfunction]
    #[pyo3(signature = (isa, heads, tokens, repeats, ask = "l1"))]
    fn delta_rule(
        py: Python<'_>,
        isa: &str,
        heads: usize,
        tokens: usize,
        repeats: usize,
        ask: &str,
    ) -> PyResult<f64> {
        let cpu = Cpu::named(isa).map_err(|error| exception(py, error))?;
        detached(py, || {
            let ask = bench::ask_named(ask)?;
            Ok(bench::delta_rule(cpu, heads, tokens, ask, repeats).as_secs_f64())
        })
    }

    /// Seconds for `repeats` passes of four queries over `chunks` chunks of 256 positions of a head of 256
    /// dimensions.
    #[pyfunction]
    #[pyo3(signature = (isa, kv, chunks, repeats, ask = "l1"))]
    fn attention(
        py: Python<'_>,
        isa: &str,
        kv: &str,
        chunks: usize,
        repeats: usize,
        ask: &str,
    ) -> PyResult<f64> {
        let cpu = Cpu::named(isa).map_err(|error| exception(py, error))?;
        detached(py, || {
            let bytes = match kv {
                "q8" => true,
                "f16" => false,
                _ => return Err(Error::Argument(format!("kv is `{kv}`, expected q8 or f16"))),
            };
            let ask = bench::ask_named(ask)?;
            Ok(bench::attention(cpu, bytes, chunks, ask, repeats)?.as_secs_f64())
        })
    }

    /// Seconds that a region of a pool takes beside its work.
    #[pyfunction]
    fn fork_join(py: Python<'_>, threads: usize) -> PyResult<f64> {
        detached(py, || Ok(bench::fork_join(threads::checked(threads)?).as_secs_f64()))
    }

    /// What the machine could do at best, in bytes and operations per second.
    #[pyfunction]
    fn limits(py: Python<'_>, isa: &str, threads: usize) -> PyResult<BTreeMap<&'static str, f64>> {
        let cpu = Cpu::named(isa).map_err(|error| exception(py, error))?;
        detached(py, || {
            let limits = bench::limits(cpu, threads::checked(threads)?);
            Ok(BTreeMap::from([
                ("read_one", limits.read_one),
                ("read_all", limits.read_all),
                ("int8_peak", limits.int8_peak),
                ("f32_peak", limits.f32_peak),
            ]))
        })
    }
}
