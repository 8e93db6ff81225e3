//! GGUF files that the program writes: against those of the reference's converter, and read back.

mod common;

use common::Tiny;
use common::gguf::converted;
use half::{bf16, f16};
use qdelta_core::config::{Config, LayerType};
use qdelta_core::convert::Job;
use qdelta_core::export::to_gguf;
use qdelta_core::files::Convention;
use qdelta_core::files::gguf::Value;
use qdelta_core::files::gguf_write::Entry;
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::tensors::Role;
use qdelta_core::quant::{BlockType, Quant};
use qdelta_core::tensor::Dtype;
use qdelta_core::{Error, Result};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const Q8_0: Dtype = Dtype::Blocks(BlockType::Q8_0);
const Q4_0: Dtype = Dtype::Blocks(BlockType::Q4_0);
const ALL: [Dtype; 5] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Q8_0, Q4_0];
const CHECKPOINTS: [&str; 3] =
    ["tiny-text/tiny-f32", "tiny-text/tiny-k256-bf16", "tiny-text/tiny-heads-bf16"];

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"))
}

fn golden(name: &str) -> Checkpoint {
    open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name))
}

/// A file that is removed in the end.
struct Written {
    folder: TempDir,
}

impl Written {
    fn new() -> Written {
        Written { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("out.gguf")
    }

    fn open(&self) -> Checkpoint {
        open(&self.path())
    }

    /// What is in the folder.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).expect("the folder");
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }
}

fn try_write(source: &Checkpoint, dtype: Dtype) -> (Written, Result<()>) {
    let written = Written::new();
    let result = to_gguf(source, dtype, Vec::new(), &written.path(), None, &mut |_, _| true);
    (written, result)
}

fn write(source: &Checkpoint, dtype: Dtype) -> Written {
    let (written, result) = try_write(source, dtype);
    result.unwrap_or_else(|error| panic!("{error}"));
    written
}

/// The message with which writing is refused; nothing is left of the file.
fn refused(source: &Checkpoint, dtype: Dtype) -> (Error, String) {
    let (written, result) = try_write(source, dtype);
    assert!(written.names().is_empty(), "{:?}", written.names());
    let error = result.expect_err("a refusal");
    let text = error.to_string();
    (error, text)
}

/// The bytes of numbers in a type.
fn encoded(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Blocks(block) => block.encode(values),
        Dtype::Fp8 | Dtype::U8 => panic!("no type of a GGUF file"),
    }
}

#[test]
fn files_are_those_of_the_converter() {
    for (folder, dtype, reference) in [
        ("tiny-text/tiny-f32", Dtype::F32, "gguf/tiny-f32-F32.gguf"),
        ("tiny-text/tiny-k256-bf16", Q8_0, "gguf/tiny-k256-bf16-Q8_0.gguf"),
    ] {
        let written = write(&golden(folder), dtype).open();
        let reference = golden(reference);
        assert_eq!(written.config, reference.config);
        assert_eq!(written.listing().len(), reference.listing().len());
        let sorted = |checkpoint: &Checkpoint| {
            let rows = checkpoint.listing().into_iter();
            let mut rows: Vec<_> =
                rows.map(|(name, dtype, shape, ..)| (name, dtype, shape)).collect();
            rows.sort();
            rows
        };
        assert_eq!(sorted(&written), sorted(&reference));
        for spec in reference.specs() {
            let [got, want] = [&written, &reference].map(|c| c.tensor(&spec.name).expect("bound"));
            if spec.name.ends_with("A_log") {
                // The converter's exp is another.
                for (got, want) in got.to_f32().iter().zip(want.to_f32()) {
                    assert!((got - want).abs() <= 1e-6 * want.abs(), "{}: {got} {want}", spec.name);
                }
            } else {
                assert!(got.bytes[..] == want.bytes[..], "{}", spec.name);
            }
        }
    }
}

#[test]
fn every_type_holds_the_checkpoint() {
    let mut most_values_per_key = 0;
    for name in CHECKPOINTS {
        let source = golden(name);
        most_values_per_key = most_values_per_key.max(source.config.values_per_key());
        for dtype in ALL {
            let written = write(&source, dtype);
            assert_eq!(written.names(), ["out.gguf"]);
            let got = written.open();
            got.check_values().expect("finite numbers");
            assert_eq!((got.quant, got.convention), (Quant::None, Convention::Gguf));
            assert_eq!(got.config, Config { vision: None, ..source.config.clone() });
            assert!(got.has_mtp() && !got.has_vision());
            for spec in source.specs().iter().filter(|spec| spec.role != Role::Vision) {
                let found = got.tensor(&spec.name).expect("it is bound");
                let expected = match spec.role {
                    Role::Small => Dtype::F32,
                    Role::Embedding | Role::Head | Role::LinearGate if dtype == Q4_0 => Q8_0,
                    _ => dtype,
                };
                assert_eq!((found.dtype, &found.shape), (expected, &spec.shape), "{}", spec.name);
                let values = source.floats(&spec.name).expect("a tensor of the folder");
                let values = converted(&got.config, spec, values);
                assert!(found.bytes[..] == encoded(expected, &values)[..], "{name} {}", spec.name);
            }
        }
    }
    assert!(most_values_per_key > 1, "heads must move somewhere");
}

/// What is written from a GGUF file of floats is what is written from the folder.
#[test]
fn a_file_from_a_file() {
    let folder = golden("tiny-text/tiny-heads-bf16");
    let floats = write(&folder, Dtype::F32).open();
    for dtype in ALL {
        let [first, second] = [&folder, &floats].map(|source| write(source, dtype));
        let [first, second] = [first, second].map(|w| fs::read(w.path()).expect("a file"));
        assert!(first == second, "{}", dtype.name());
    }
}

#[test]
fn rows_that_are_no_blocks_are_halves() {
    // 24 and 40 columns.
    let folder = Tiny::new(common::text_config()).write();
    let written = write(&folder.open(), Q4_0).open();
    let halves = written.specs().iter().filter(|spec| spec.role != Role::Small);
    for spec in halves {
        let dtype = written.tensor(&spec.name).expect("it is bound").dtype;
        let whole = spec.shape[1].is_multiple_of(32);
        assert_eq!(dtype == Dtype::F16, !whole, "{} {:?}", spec.name, spec.shape);
    }
}

#[test]
fn threads_change_no_bit() {
    let source = golden("tiny-text/tiny-k256-bf16");
    let files = [None, Some(1), Some(3)].map(|threads| {
        let written = Written::new();
        let path = written.path();
        to_gguf(&source, Q4_0, Vec::new(), &path, threads, &mut |_, _| true).expect("a file");
        fs::read(path).expect("a file")
    });
    assert!(files[0] == files[1] && files[0] == files[2]);
    let written = Written::new();
    let result = to_gguf(&source, Q4_0, Vec::new(), &written.path(), Some(0), &mut |_, _| true);
    assert!(matches!(result, Err(Error::Argument(_))));
}

#[test]
fn metadata_is_written_as_given() {
    let entries = [
        ("a", Entry::U32(u32::MAX)),
        ("b", Entry::F32(0.5)),
        ("c", Entry::Bool(true)),
        ("d", Entry::Text("é\n".to_owned())),
        ("e", Entry::Bools(vec![true, false])),
        ("f", Entry::I32s(vec![-1, 7])),
        ("g", Entry::Texts(vec![String::new(), "x y".to_owned()])),
    ];
    let written = Written::new();
    let own = entries.clone().map(|(key, entry)| (format!("own.{key}"), entry)).to_vec();
    let source = golden("tiny-text/tiny-f32");
    to_gguf(&source, Dtype::Bf16, own, &written.path(), None, &mut |_, _| true).expect("a file");
    let written = written.open();
    let metadata = written.gguf().expect("it is a GGUF file");
    let show = |key: &str| match metadata.get(key).expect("no error").expect(key) {
        Value::Array(array) => {
            let values = array.iter().map(|value| value.expect("no error").to_string());
            format!("[{}]", values.collect::<Vec<_>>().join(", "))
        }
        value => value.to_string(),
    };
    for (key, want) in [
        ("own.a", "4294967295"),
        ("own.b", "0.5"),
        ("own.c", "true"),
        ("own.d", "\"é\\n\""),
        ("own.e", "[true, false]"),
        ("own.f", "[-1, 7]"),
        ("own.g", "[\"\", \"x y\"]"),
        ("general.architecture", "\"qwen35\""),
        ("general.file_type", "32"),
        ("general.quantization_version", "2"),
        ("qwen35.block_count", "9"),
        ("qwen35.nextn_predict_layers", "1"),
        ("qwen35.full_attention_interval", "4"),
        ("qwen35.rope.dimension_sections", "[3, 3, 2, 0]"),
    ] {
        assert_eq!(show(key), want, "{key}");
    }
    let keys: Vec<&str> = metadata.keys().collect();
    assert!(!keys.contains(&"qwen35.attention.recurrent_layers"), "the interval says it");
}

/// The config of a file that is written from a folder with this config.
fn config_of(config: &serde_json::Value) -> Config {
    write(&Tiny::new(config.clone()).write().open(), Dtype::F32).open().config.clone()
}

#[test]
fn layers_in_any_order() {
    use LayerType::{FullAttention, LinearAttention};
    let linear = ["linear_attention"; 2];
    let full = ["full_attention"; 2];
    for (types, expected) in [
        (["linear_attention", "full_attention"], [LinearAttention, FullAttention]),
        (["full_attention", "linear_attention"], [FullAttention, LinearAttention]),
        (linear, [LinearAttention; 2]),
        (full, [FullAttention; 2]),
    ] {
        let mut config = common::text_config();
        config["text_config"]["layer_types"] = json!(types);
        assert_eq!(config_of(&config).layer_types, expected);
    }
}

#[test]
fn yarn_is_written() {
    let mut config = common::text_config();
    let rope = &mut config["text_config"]["rope_parameters"];
    rope["rope_type"] = json!("yarn");
    rope["factor"] = json!(4.0);
    rope["original_max_position_embeddings"] = json!(128);
    rope["beta_fast"] = json!(16.0);
    rope["beta_slow"] = json!(2.0);
    let source = Tiny::new(config.clone()).write().open();
    assert!(source.config.rope.yarn.is_some());
    assert_eq!(config_of(&config), source.config);

    config["text_config"]["rope_parameters"]["attention_factor"] = json!(1.5);
    let folder = Tiny::new(config).write();
    let (error, text) = refused(&folder.open(), Dtype::F32);
    assert!(matches!(error, Error::Unsupported(_)), "{text}");
    assert!(text.contains("`attention_factor` is 1.5"), "{text}");
}

/// A config may speak of a module whose tensors are not there.
#[test]
fn a_checkpoint_without_its_module_is_written_without() {
    let mut tiny = Tiny::new(common::text_config());
    tiny.tensors.retain(|tensor| !tensor.name.starts_with("mtp."));
    let source = tiny.write().open();
    assert!(source.config.mtp_num_hidden_layers > 0 && !source.has_mtp());
    let written = write(&source, Dtype::F32).open();
    assert!(!written.has_mtp());
    assert_eq!(written.config.mtp_num_hidden_layers, 0);
    let metadata = written.gguf().expect("it is a GGUF file");
    let blocks = metadata.get("qwen35.block_count").expect("no error").and_then(|v| v.count());
    assert_eq!(blocks, Some(source.config.num_hidden_layers as u64));
    assert!(metadata.get("qwen35.nextn_predict_layers").expect("no error").is_none());
}

#[test]
fn quantised_sources_are_refused() {
    let quantised = golden("gguf/tiny-k256-bf16-Q8_0.gguf");
    let (error, text) = refused(&quantised, Dtype::Bf16);
    assert!(matches!(error, Error::Unsupported(_)), "{text}");
    assert!(text.contains("quantised already"), "{text}");

    let source = golden("tiny-text/tiny-k256-bf16");
    let job = Job::new(&source, Quant::W8);
    let bytes = job.to_memory(&mut |_, _| true).expect("a conversion");
    let converted = Checkpoint::open_converted(bytes, "memory".to_owned()).expect("a checkpoint");
    let (_, text) = refused(&converted, Q8_0);
    assert!(text.contains("quantised already"), "{text}");
}

#[test]
fn types_without_an_encoder_are_refused() {
    let source = golden("tiny-text/tiny-f32");
    for block in BlockType::ALL {
        let dtype = Dtype::Blocks(block);
        if [Q8_0, Q4_0].contains(&dtype) {
            continue;
        }
        let (error, text) = refused(&source, dtype);
        assert!(matches!(error, Error::Argument(_)), "{text}");
        let name = block.name();
        assert_eq!(text, format!("type {name}, expected one of: BF16, F16, F32, Q8_0, Q4_0"));
    }
}

#[test]
fn a_name_that_is_taken() {
    let source = golden("tiny-text/tiny-f32");
    let written = Written::new();
    fs::write(written.path(), b"mine").expect("a file");
    let result = to_gguf(&source, Q8_0, Vec::new(), &written.path(), None, &mut |_, _| true);
    assert!(matches!(result, Err(Error::Argument(_))));
    assert_eq!(fs::read(written.path()).expect("the file"), b"mine");
    assert_eq!(written.names(), ["out.gguf"]);

    let path = written.folder.path().join("nowhere").join("out.gguf");
    let result = to_gguf(&source, Q8_0, Vec::new(), &path, None, &mut |_, _| true);
    assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
}

#[test]
fn interruption_leaves_nothing() {
    let source = golden("tiny-text/tiny-heads-bf16");
    for stop in [1, 2, 20] {
        let written = Written::new();
        let mut calls = 0;
        let result =
            to_gguf(&source, Q8_0, Vec::new(), &written.path(), None, &mut |done, total| {
                assert!(done <= total);
                calls += 1;
                calls < stop
            });
        assert!(matches!(result, Err(Error::Interrupted)));
        assert!(written.names().is_empty());
    }
    let written = Written::new();
    let mut last = (0, 0);
    let mut report = |done: u64, total: u64| {
        last = (done, total);
        true
    };
    to_gguf(&source, Q8_0, Vec::new(), &written.path(), None, &mut report).expect("a file");
    assert!(last.0 == last.1 && last.0 > 0, "{last:?}");
}

/// Numbers that a type cannot hold are named, not written as infinity.
#[test]
fn numbers_beyond_a_type() {
    const NAME: &str = "layers.1.self_attn.o_proj.weight";
    // Rows of 64 columns.
    let with = |value: f32| {
        let mut tiny = Tiny::new(common::text_config());
        let tensor = tiny.tensors.iter_mut().find(|t| t.name.ends_with(NAME)).expect("it is there");
        let elements: usize = tensor.shape.iter().product();
        let mut values = vec![0.25; elements];
        values[64 * 3 + 5] = value;
        tensor.dtype = "F32".to_owned();
        tensor.data = common::encode("F32", &values);
        tiny.write()
    };
    for (value, holds) in [
        (6e4f32, &ALL[..]),
        (-1e5, &[Dtype::F32, Dtype::Bf16, Q8_0, Q4_0]),
        (6e5, &[Dtype::F32, Dtype::Bf16, Q8_0]),
        (1e7, &[Dtype::F32, Dtype::Bf16]),
        (f32::MAX, &[Dtype::F32]),
        (f32::INFINITY, &[]),
        (f32::NAN, &[]),
    ] {
        let folder = with(value);
        let source = folder.open();
        for dtype in ALL {
            if holds.contains(&dtype) {
                let got = write(&source, dtype).open();
                let tensor = got.tensor(NAME).expect("it is bound");
                assert!(tensor.to_f32().iter().all(|x| x.is_finite()), "{} {value}", dtype.name());
            } else {
                let (error, text) = refused(&source, dtype);
                assert!(matches!(error, Error::File(_)), "{text}");
                let place = format!("o_proj.weight`: row 3 holds {value}, expected finite numbers");
                assert!(text.starts_with("model.safetensors: tensor `"), "{text}");
                assert!(text.contains(&place), "{text}");
            }
        }
    }
    // A_log whose exponential is infinite.
    let mut tiny = Tiny::new(common::text_config());
    let a_log = tiny.tensors.iter_mut().find(|t| t.name.ends_with("A_log")).expect("it is there");
    a_log.dtype = "F32".to_owned();
    a_log.data = common::encode("F32", &[0.0, 1.0, 100.0, 2.0]);
    let (_, text) = refused(&tiny.write().open(), Dtype::F32);
    assert!(text.contains("A_log`") && text.contains("holds -inf"), "{text}");
}
