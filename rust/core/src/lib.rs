//! Inference of the Qwen3.5 small models on CPUs: no Python, no text.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod bench;
pub mod budget;
pub mod config;
pub mod convert;
pub mod error;
pub mod export;
pub mod files;
pub mod kernels;
pub mod layers;
pub mod model;
pub mod pool;
pub mod profile;
pub mod quant;
pub mod random;
pub mod sensitivity;
pub mod session;
pub mod simd;
pub mod state;
pub mod tensor;
pub mod threads;
pub mod trace;

pub use error::{Error, Result};
