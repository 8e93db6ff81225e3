//! What the fuzz targets do with their input, and whether it is valid. Whatever it is, no panic may
//! come of it, and no memory by a number that it states.

#![allow(dead_code)]

use qdelta_core::config::Config;
use qdelta_core::files::gguf::{Gguf, Value, header_bytes};
use qdelta_core::files::safetensors::read_header;
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::tensors::{mtp_tensors, text_tensors, vision_tensors};
use qdelta_core::tensor::Bytes;
use std::fs;

pub type Target = fn(&[u8]) -> bool;

pub const TARGETS: [(&str, Target); 5] = [
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("config", config),
    ("converted", converted),
    ("folder", folder),
];

/// A GGUF file and the model in it; and the start of a longer one.
pub fn gguf(data: &[u8]) -> bool {
    let bytes = Bytes::from(data.to_vec());
    let of_start = |n| header_bytes(&bytes.slice(0..n), 1 << 50, "a.gguf");
    let header = of_start(data.len());
    if let Ok(Some(n)) = header {
        assert!(matches!(of_start(n), Ok(Some(found)) if found == n), "{n} bytes are the header");
        assert!(matches!(of_start(n - 1), Ok(None)), "{n} bytes are the header, and no fewer");
    }
    let Ok(gguf) = Gguf::read(bytes.clone(), "a.gguf") else { return false };
    assert!(matches!(header, Ok(Some(_))), "the file has a header");
    for key in gguf.metadata.keys() {
        match gguf.metadata.get(key) {
            Ok(Some(Value::Array(array))) => array.iter().for_each(drop),
            Ok(Some(value)) => drop(value.to_string()),
            Ok(None) => panic!("{key} is not there"),
            Err(_) => {}
        }
    }
    let ranges = gguf.tensors.iter().map(|tensor| tensor.bytes.as_ptr_range());
    let mut ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "tensors overlap");
    use_checkpoint(Checkpoint::from_gguf(gguf))
}

/// The header of a safetensors file.
pub fn safetensors(data: &[u8]) -> bool {
    let Ok(header) = read_header(data, "a.safetensors") else { return false };
    let mut covered = header.data_start;
    for entry in header.entries {
        assert_eq!(entry.range.start, covered, "tensors overlap or leave a hole");
        covered = entry.range.end;
    }
    assert_eq!(covered, data.len());
    true
}

/// A config.json.
pub fn config(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let Ok(config) = Config::from_json(text, "config.json") else { return false };
    let vision = config.vision.as_ref().map(vision_tensors).unwrap_or_default();
    for spec in text_tensors(&config).iter().chain(&mtp_tensors(&config)).chain(&vision) {
        assert!(spec.elements().is_some(), "{} is too large to count", spec.name);
    }
    assert!(config.context() > 0);
    true
}

/// A converted file.
pub fn converted(data: &[u8]) -> bool {
    let bytes = Bytes::from(data.to_vec());
    use_checkpoint(Checkpoint::open_converted(bytes, "a.safetensors".to_owned()))
}

/// A checkpoint folder: config.json, a byte of zero, and the only file with tensors.
pub fn folder(data: &[u8]) -> bool {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (Some(config), Some(file)) = (parts.next(), parts.next()) else { return false };
    let folder = tempfile::tempdir().expect("a folder");
    for (name, content) in [("config.json", config), ("model.safetensors", file)] {
        fs::write(folder.path().join(name), content).expect(name);
    }
    use_checkpoint(Checkpoint::open(folder.path()))
}

fn use_checkpoint(checkpoint: qdelta_core::Result<Checkpoint>) -> bool {
    let Ok(checkpoint) = checkpoint else { return false };
    for spec in checkpoint.specs() {
        checkpoint.place(&spec.name);
        if let Some(tensor) = checkpoint.tensor(&spec.name) {
            assert_eq!(tensor.bytes.len(), tensor.dtype.bytes(tensor.elements()), "{}", spec.name);
        }
        let _ = checkpoint.floats(&spec.name);
    }
    checkpoint.listing();
    checkpoint.unknown().for_each(drop);
    checkpoint.check_values().is_ok()
}
