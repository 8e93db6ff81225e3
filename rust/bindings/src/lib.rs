//! Python bindings: conversion of arguments and results, exceptions, releasing the GIL. No
//! arithmetic happens here.

mod bench;
mod checkpoint;
mod error;
mod model;
mod session;
mod tokenizer;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use pyo3::prelude::*;
    use qdelta_core::simd::Cpu;

    #[pymodule_export]
    use super::bench::kernels;
    #[pymodule_export]
    use super::checkpoint::{Checkpoint, convert, export_gguf, gguf_header_bytes, losses, verify};
    #[pymodule_export]
    use super::model::{MemoryPlan, Model, memory_plan};
    #[pymodule_export]
    use super::session::{Session, Snapshot};
    #[pymodule_export]
    use super::tokenizer::Encoder;

    /// Instruction sets that this machine can run, best first.
    #[pyfunction]
    fn instruction_sets() -> Vec<&'static str> {
        Cpu::all().into_iter().map(Cpu::name).collect()
    }
}
