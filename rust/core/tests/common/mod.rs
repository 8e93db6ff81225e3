//! Tiny checkpoints in temporary folders, safetensors files taken apart, and GGUF files made by hand.

// Each test file uses another part of it.
#![allow(dead_code)]

pub mod fuzz;
pub mod gguf;

use qdelta_core::config::Config;
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::tensors::{TensorSpec, mtp_tensors, text_tensors, vision_tensors};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub const TEXT: &str = "model.language_model.";
pub const FILE: &str = "model.safetensors";

/// A config with both kinds of layer, in which no two sizes are equal that could be confused.
pub fn config() -> Value {
    json!({
        "model_type": "qwen3_5",
        "tie_word_embeddings": true,
        "text_config": {
            "model_type": "qwen3_5_text",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "intermediate_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 70,
            "max_position_embeddings": 512,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "tie_word_embeddings": true,
            "mtp_num_hidden_layers": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": true
            }
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 6,
            "num_heads": 2,
            "intermediate_size": 10,
            "out_hidden_size": 24,
            "patch_size": 2,
            "num_position_embeddings": 9
        }
    })
}

/// The same without a vision tower, of which a GGUF file does not speak.
pub fn text_config() -> Value {
    let mut config = config();
    config["vision_config"] = Value::Null;
    config
}

/// A tensor as a file holds it.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Stored {
    pub fn new(name: &str, dtype: &str, shape: &[usize], values: &[f32]) -> Stored {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        Stored {
            name: name.to_owned(),
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            data: encode(dtype, values),
        }
    }
}

pub fn encode(dtype: &str, values: &[f32]) -> Vec<u8> {
    match dtype {
        "BF16" => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        "F16" => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        "F32" => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => panic!("{dtype} is no float"),
    }
}

/// Numbers in -1 .. 1 that differ from tensor to tensor and are exact in all dtypes.
pub fn values(seed: usize, n: usize) -> Vec<f32> {
    let mut x = (seed as u32).wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 25) as f32 / 64.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A checkpoint before it is written.
pub struct Tiny {
    pub config: Value,
    pub tensors: Vec<Stored>,
    pub metadata: Value,
}

impl Tiny {
    /// All tensors of a config under the published names, dtypes in turn.
    pub fn new(config: Value) -> Tiny {
        let parsed = Config::from_json(&config.to_string(), "config.json").expect("a valid config");
        let vision = parsed.vision.as_ref().map(vision_tensors).unwrap_or_default();
        let specs = text_tensors(&parsed).into_iter().chain(mtp_tensors(&parsed)).chain(vision);
        let store = |(i, spec): (usize, TensorSpec)| {
            let dtype = ["BF16", "F16", "F32"][i % 3];
            let n = spec.shape.iter().product();
            Stored::new(&published(&spec.name), dtype, &spec.shape, &values(i + 1, n))
        };
        let tensors = specs.enumerate().map(store).collect();
        Tiny { config, tensors, metadata: json!({"format": "pt"}) }
    }

    pub fn default() -> Tiny {
        Tiny::new(config())
    }

    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|t| t.name == name).expect(name)
    }

    /// Renames every tensor.
    pub fn rename(&mut self, rename: impl Fn(&str) -> String) {
        self.tensors.iter_mut().for_each(|t| t.name = rename(&t.name));
    }

    pub fn bytes(&self) -> Vec<u8> {
        file(&self.tensors, &self.metadata)
    }

    /// Writes a folder with one file.
    pub fn write(&self) -> Folder {
        let folder = Folder::new(&self.config);
        fs::write(folder.path(FILE), self.bytes()).expect("a file");
        folder
    }

    /// Writes a folder with an index; tensor i is in shard i modulo `shards`.
    pub fn write_shards(&self, shards: usize) -> Folder {
        let folder = Folder::new(&self.config);
        let mut weight_map = serde_json::Map::new();
        for shard in 0..shards {
            let name = format!("model.safetensors-{:05}-of-{shards:05}.safetensors", shard + 1);
            let tensors: Vec<Stored> =
                self.tensors.iter().skip(shard).step_by(shards).cloned().collect();
            for tensor in &tensors {
                weight_map.insert(tensor.name.clone(), name.clone().into());
            }
            fs::write(folder.path(&name), file(&tensors, &self.metadata)).expect("a file");
        }
        folder.write_json(INDEX, &json!({"metadata": {}, "weight_map": weight_map}));
        folder
    }

    pub fn error(&self) -> String {
        self.write().error()
    }
}

pub const INDEX: &str = "model.safetensors.index.json";

/// The name of a tensor in the published checkpoints.
pub fn published(name: &str) -> String {
    if name.starts_with("visual.") {
        format!("model.{name}")
    } else if name.starts_with("mtp.") || name.starts_with("lm_head.") {
        name.to_owned()
    } else {
        format!("{TEXT}{name}")
    }
}

/// A checkpoint folder that is removed in the end.
pub struct Folder(TempDir);

impl Folder {
    fn new(config: &Value) -> Folder {
        let folder = Folder(tempfile::tempdir().expect("a temporary folder"));
        folder.write_json("config.json", config);
        folder
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write_json(&self, name: &str, json: &Value) {
        fs::write(self.path(name), json.to_string()).expect("a file");
    }

    pub fn open(&self) -> Checkpoint {
        Checkpoint::open(self.root()).expect("a valid checkpoint")
    }

    /// The message with which the folder is refused, by opening or by reading its small tensors.
    pub fn error(&self) -> String {
        let result = Checkpoint::open(self.root()).and_then(|c| c.check_values());
        result.expect_err("an invalid checkpoint").to_string()
    }
}

/// A safetensors file of these tensors, one behind the other.
pub fn file(tensors: &[Stored], metadata: &Value) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), metadata.clone());
    let mut data = Vec::new();
    for t in tensors {
        let begin = data.len();
        data.extend(&t.data);
        let entry =
            json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, data.len()]});
        header.insert(t.name.clone(), entry);
    }
    join(&Value::from(header).to_string(), &data)
}

/// Puts a header before data.
pub fn join(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// The header and the data of a file.
pub fn split(bytes: &[u8]) -> (Value, Vec<u8>) {
    let (length, rest) = bytes.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).expect("a header"), data.to_vec())
}
