//! A model: its config, its tensors, and the forward pass over them.

mod ahead;
pub mod checkpoint;
pub mod config;
pub mod forward;
pub mod gguf;
pub mod memory;
pub mod recipe;
pub mod synthetic;
pub mod tensors;
pub mod weights;

pub use forward::Model;
