//! Inputs that fuzzing found, replayed; and the valid files that it starts from.

mod common;

use common::fuzz::TARGETS;
use common::gguf::{BOOL, File, TEXT, array, f32, i32s, string, text, u32};
use common::{Stored, Tiny, text_config, values};
use qdelta_core::convert::Job;
use qdelta_core::quant::Quant;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").join(name)
}

#[test]
fn inputs_that_were_found() {
    for (name, target) in TARGETS {
        let inputs = fs::read_dir(folder("found").join(name)).expect(name);
        let paths: Vec<_> = inputs.map(|input| input.expect(name).path()).collect();
        assert!(!paths.is_empty(), "{name}");
        for path in paths {
            target(&fs::read(&path).expect(name));
        }
    }
}

/// Sizes so small that a fuzzer gets somewhere.
fn small_config() -> Value {
    let mut config = text_config();
    let text = &mut config["text_config"];
    for (key, value) in [
        ("hidden_size", 2),
        ("intermediate_size", 2),
        ("num_attention_heads", 1),
        ("num_key_value_heads", 1),
        ("head_dim", 2),
        ("vocab_size", 2),
        ("linear_conv_kernel_dim", 2),
        ("linear_num_key_heads", 1),
        ("linear_num_value_heads", 2),
        ("linear_key_head_dim", 1),
        ("linear_value_head_dim", 1),
    ] {
        text[key] = json!(value);
    }
    text["rope_parameters"]["partial_rotary_factor"] = json!(1.0);
    text["rope_parameters"]["mrope_section"] = json!([1, 0, 0]);
    config
}

/// The same checkpoint with its matrices in FP8.
fn in_fp8(tiny: &Tiny) -> Tiny {
    let mut config = tiny.config.clone();
    config["quantization_config"] =
        json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]});
    let mut tensors = Vec::new();
    for (i, stored) in tiny.tensors.iter().enumerate() {
        let [rows, cols] = stored.shape[..] else {
            tensors.push(stored.clone());
            continue;
        };
        let blocks: Vec<usize> = [rows, cols].iter().map(|n| n.div_ceil(128)).collect();
        let scales = values(i + 1, blocks.iter().product());
        tensors.push(Stored {
            dtype: "F8_E4M3".to_owned(),
            data: vec![0x38 + i as u8; rows * cols],
            ..stored.clone()
        });
        tensors.push(Stored::new(&format!("{}_scale_inv", stored.name), "BF16", &blocks, &scales));
    }
    Tiny { config, tensors, metadata: tiny.metadata.clone() }
}

/// As the target takes a folder.
fn as_folder(tiny: &Tiny) -> Vec<u8> {
    [tiny.config.to_string().as_bytes(), &[0], &tiny.bytes()].concat()
}

/// Valid inputs of each target.
fn seeds() -> [(&'static str, Vec<Vec<u8>>); 5] {
    let config = small_config();
    let gguf = File::model(&config, None);
    let mut other = gguf.clone();
    other.version = 2;
    for (key, value) in [
        ("qwen35.attention.recurrent_layers", array(BOOL, 3, &[1, 0, 0])),
        ("qwen35.attention.head_count_kv", i32s(&[0, 1, 1])),
        ("qwen35.rope.scaling.type", text("yarn")),
        ("qwen35.rope.scaling.factor", f32(2.0)),
        ("qwen35.rope.scaling.original_context_length", u32(512)),
        ("general.alignment", u32(8)),
        ("tokenizer.ggml.tokens", array(TEXT, 2, &[string("a"), string("é")].concat())),
    ] {
        other.set(key, value);
    }
    other.alignment = 8;
    let tiny = Tiny::new(config.clone());
    let written = tiny.write();
    let source = written.open();
    let convert = |quant| {
        let job = Job { threads: Some(1), ..Job::new(&source, quant) };
        job.to_memory(&mut |_, _| true).expect("a conversion").to_vec()
    };
    let configs = [&config, &common::config(), &config["text_config"]];
    [
        ("gguf", vec![gguf.bytes(), other.bytes()]),
        ("safetensors", vec![tiny.bytes(), convert(Quant::W4)]),
        ("config", configs.iter().map(|config| config.to_string().into_bytes()).collect()),
        ("converted", vec![convert(Quant::W4), convert(Quant::W8)]),
        ("folder", vec![as_folder(&tiny), as_folder(&in_fp8(&tiny))]),
    ]
}

#[test]
fn seeds_are_valid() {
    for ((name, seeds), (other, target)) in seeds().iter().zip(TARGETS) {
        assert_eq!(*name, other);
        assert!(seeds.iter().all(|seed| target(seed)), "{name}");
    }
}

#[test]
fn no_part_of_a_seed_is_valid() {
    for ((name, seeds), (_, target)) in seeds().iter().zip(TARGETS) {
        for seed in seeds {
            // Each length of those of some kilobytes.
            for n in (0..seed.len()).step_by(1 + seed.len() / 5000) {
                assert!(!target(&seed[..n]), "{name}: {n} bytes of {}", seed.len());
            }
        }
    }
}

/// Part of `scripts/fuzz`.
#[test]
#[ignore = "writes files for the fuzzer"]
fn write_seeds() {
    for (name, seeds) in seeds() {
        let folder = folder("corpus").join(name);
        fs::create_dir_all(&folder).expect("a folder");
        for (i, seed) in seeds.iter().enumerate() {
            fs::write(folder.join(format!("seed-{i}")), seed).expect("a file");
        }
    }
}
