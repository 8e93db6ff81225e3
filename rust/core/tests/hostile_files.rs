//! Files that are damaged or malicious: an error that names the place, or a valid file; never a
//! panic.

mod common;

use common::{FILE, Stored, Tiny, file, join, split};
use qdelta_core::convert::{Job, verify};
use qdelta_core::files::safetensors::read_header;
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::quant::Quant;
use serde_json::{Value, json};
use std::fs;

fn small_file() -> Vec<u8> {
    let tensors = [
        Stored::new("a.weight", "BF16", &[2, 3], &[1.0; 6]),
        Stored::new("b", "F32", &[2], &[1.0; 2]),
        Stored::new("none", "F16", &[0, 7], &[]),
    ];
    file(&tensors, &json!({"format": "pt"}))
}

#[test]
fn every_truncation_is_an_error() {
    let good = small_file();
    read_header(&good, "a").expect("a valid file");
    for n in 0..good.len() {
        let error = read_header(&good[..n], "a.safetensors").expect_err("a truncated file");
        assert!(error.to_string().starts_with("a.safetensors: "), "{n}: {error}");
    }
    let longer: Vec<u8> = good.iter().copied().chain([0]).collect();
    read_header(&longer, "a").expect_err("a longer file");
}

#[test]
fn no_changed_byte_makes_a_panic_or_a_range_outside() {
    let good = small_file();
    let (_, data) = split(&good);
    for at in 0..good.len() - data.len() {
        for value in 0..=u8::MAX {
            let mut bytes = good.clone();
            bytes[at] = value;
            if let Ok(header) = read_header(&bytes, "a") {
                assert!(header.entries.iter().all(|e| bytes.get(e.range.clone()).is_some()));
            }
        }
    }
}

/// Changes each byte of the header of a whole checkpoint in a few ways, and opens it.
#[test]
fn no_changed_byte_makes_opening_panic() {
    let tiny = Tiny::default();
    let folder = tiny.write();
    let good = tiny.bytes();
    let (header, data) = split(&good);
    assert!(header.is_object());
    // Bytes that keep the header valid JSON more often than others.
    for (i, at) in (0..good.len() - data.len()).step_by(7).enumerate() {
        let mut bytes = good.clone();
        bytes[at] = b"0917,]}\" a"[i % 10];
        fs::write(folder.path(FILE), &bytes).expect("a file");
        if let Ok(checkpoint) = Checkpoint::open(folder.root()) {
            let _ = checkpoint.check_values();
        }
    }
}

#[test]
fn every_truncation_of_a_checkpoint() {
    let tiny = Tiny::default();
    let folder = tiny.write();
    let good = tiny.bytes();
    for n in (0..good.len()).step_by(211).chain(good.len() - 9..good.len()) {
        fs::write(folder.path(FILE), &good[..n]).expect("a file");
        let error = folder.error();
        assert!(error.starts_with(FILE), "{n}: {error}");
    }
}

#[test]
fn headers_with_one_lie() {
    let good = small_file();
    let (header, data) = split(&good);
    let with = |key: &str, value: Value| {
        let mut header = header.clone();
        header["a.weight"][key] = value;
        let bytes = join(&header.to_string(), &data);
        read_header(&bytes, "a.safetensors").expect_err(key).to_string()
    };
    for (key, value) in [
        ("data_offsets", json!([12, 0])),
        ("data_offsets", json!([0, 13])),
        ("data_offsets", json!([0, 1000])),
        ("data_offsets", json!([8, 20])),
        ("data_offsets", json!([u64::MAX, u64::MAX])),
        ("data_offsets", json!([-12, 0])),
        ("data_offsets", json!([0.0, 12.0])),
        ("data_offsets", json!([0])),
        ("data_offsets", json!(null)),
        ("shape", json!([2, 4])),
        ("shape", json!([0])),
        ("shape", json!([u64::MAX, 2])),
        ("shape", json!([1u64 << 32, 1u64 << 32])),
        ("shape", json!(vec![1; 100_000])),
        ("dtype", json!("F32")),
        ("dtype", json!("F64")),
        ("dtype", json!("bf16")),
        ("dtype", json!("")),
    ] {
        let error = with(key, value);
        assert!(error.starts_with("a.safetensors: ") && error.len() < 500, "{error}");
    }
}

#[test]
fn header_lengths() {
    let good = small_file();
    for length in [0, 1, 100_000_000, 100_000_001, 1 << 32, u64::MAX - 7, u64::MAX] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        read_header(&bytes, "a").expect_err("a wrong length");
    }
}

#[test]
fn deep_nesting() {
    for opening in ["[", "{\"a\":", "{\"__metadata__\": {\"a\": ["] {
        let text = opening.repeat(200_000);
        read_header(&join(&text, &[]), "a").expect_err("a deep header");
        let folder = Tiny::default().write();
        fs::write(folder.path("config.json"), &text).expect("a file");
        assert!(folder.error().starts_with("config.json: not valid JSON"));
    }
}

#[test]
fn converted_files() {
    let folder = Tiny::default().write();
    let out = folder.path("out.safetensors");
    let source = folder.open();
    let job = Job { threads: Some(1), ..Job::new(&source, Quant::W4) };
    job.to_file(&out, &mut |_, _| true).expect("a file");
    let good = fs::read(&out).expect("the file");
    let (_, data) = split(&good);
    for n in (0..good.len()).step_by(1009).chain([good.len() - 1]) {
        fs::write(&out, &good[..n]).expect("a file");
        assert!(Checkpoint::open(&out).is_err() && verify(&out).is_err(), "{n}");
    }
    for (i, at) in (0..good.len() - data.len()).step_by(13).enumerate() {
        let mut bytes = good.clone();
        bytes[at] = b"0917,]}\" a"[i % 10];
        fs::write(&out, &bytes).expect("a file");
        let _ = verify(&out);
        if let Ok(checkpoint) = Checkpoint::open(&out) {
            let _ = checkpoint.check_values();
        }
    }
}
