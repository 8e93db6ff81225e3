//! A model: its config, its tensors, and the forward pass over them.

mod ahead;
pub mod checkpoint;
mod config_json;
pub mod forward;
pub mod gguf;
mod limits;
pub mod memory;
pub mod options;
pub mod recipe;
pub mod synthetic;
pub mod tensors;
pub mod weights;

pub use forward::Model;
