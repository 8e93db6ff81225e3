//! Checkpoint folders in all their spellings, and what is refused.

mod common;

use common::{FILE, Folder, INDEX, Stored, TEXT, Tiny, config, published, values};
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::tensors::{canonical_name, text_tensors};
use qdelta_core::quant::Quant;
use qdelta_core::tensor::Dtype;
use qdelta_core::{Error, Result};
use serde_json::{Value, json};
use std::fs;

const UP: &str = "layers.0.mlp.up_proj.weight";

fn assert_holds(checkpoint: &Checkpoint, tiny: &Tiny) {
    for stored in &tiny.tensors {
        let name = canonical_name(&stored.name);
        let tensor = checkpoint.tensor(&name).expect(&name);
        assert_eq!(tensor.shape, stored.shape, "{name}");
        assert_eq!(tensor.dtype.name(), stored.dtype, "{name}");
        assert_eq!(tensor.bytes[..], stored.data[..], "{name}");
    }
}

#[test]
fn one_file_and_shards() {
    let tiny = Tiny::default();
    let one = tiny.write();
    let checkpoint = one.open();
    assert_holds(&checkpoint, &tiny);
    assert!(checkpoint.has_mtp() && checkpoint.has_vision());
    assert_eq!(checkpoint.quant, Quant::None);
    let names = |c: &Checkpoint| c.sources().iter().map(|s| s.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&checkpoint), ["config.json", FILE]);
    checkpoint.check_values().expect("finite values");
    checkpoint.check_unchanged().expect("nothing changed");

    let three = tiny.write_shards(3);
    let checkpoint = three.open();
    assert_holds(&checkpoint, &tiny);
    assert_eq!(names(&checkpoint).len(), 5);
    assert_eq!(checkpoint.listing().len(), tiny.tensors.len());
    // The index counts, whatever else is in the folder.
    fs::write(three.path(FILE), b"something else").expect("a file");
    assert_holds(&three.open(), &tiny);

    let other = tiny.write();
    fs::rename(other.path(FILE), other.path("weights.safetensors")).expect("the file");
    assert_holds(&other.open(), &tiny);
    fs::write(other.path("more.safetensors"), b"").expect("a file");
    assert!(other.error().contains("(more.safetensors, weights.safetensors)"), "{}", other.error());
    fs::copy(other.path("weights.safetensors"), other.path(FILE)).expect("the file");
    assert_holds(&other.open(), &tiny);
}

#[test]
fn prefixes() {
    let text = [TEXT, "model.", "language_model.model.", ""];
    let visual = ["model.visual.", "visual.", "vision_tower."];
    for (text, visual) in text.into_iter().zip(visual.into_iter().cycle()) {
        let mut tiny = Tiny::default();
        tiny.rename(|name| match canonical_name(name) {
            name if name.starts_with("visual.") => name.replacen("visual.", visual, 1),
            name if name.starts_with("mtp.") => name,
            name => format!("{text}{name}"),
        });
        assert_holds(&tiny.write().open(), &tiny);
    }
}

#[test]
fn text_only_config() {
    let mut config = config()["text_config"].take();
    let rope = config["rope_parameters"].take();
    for key in ["rope_theta", "partial_rotary_factor"] {
        config[key] = rope[key].clone();
    }
    config["rope_scaling"] = json!({"type": "default", "mrope_section": [2, 1, 1]});
    config["layer_types"] = Value::Null;
    config["full_attention_interval"] = json!(2);
    let tiny = Tiny::new(config);
    let checkpoint = tiny.write().open();
    assert_eq!(checkpoint.config.layer_types, Tiny::default().write().open().config.layer_types);
    assert!(checkpoint.config.vision.is_none() && !checkpoint.has_vision());
    assert_holds(&checkpoint, &tiny);
}

#[test]
fn tied_and_untied_heads() {
    let mut tiny = Tiny::default();
    tiny.tensors.push(Stored::new("lm_head.weight", "F32", &[1, 1], &[f32::NAN]));
    let checkpoint = tiny.write().open();
    assert!(checkpoint.tensor("lm_head.weight").is_none());
    assert!(checkpoint.listing().iter().any(|(name, ..)| name == "lm_head.weight"));

    let mut config = config();
    config["tie_word_embeddings"] = json!(false);
    config["text_config"]["tie_word_embeddings"] = json!(false);
    let mut tiny = Tiny::new(config);
    assert_holds(&tiny.write().open(), &tiny);
    tiny.tensors.retain(|t| t.name != "lm_head.weight");
    let error = tiny.error();
    assert!(
        error.ends_with(
            "tensor `lm_head.weight` is missing, expected because `tie_word_embeddings` is false"
        ),
        "{error}"
    );
}

#[test]
fn optional_parts_are_whole_or_absent() {
    for (part, has) in [
        ("mtp.", Checkpoint::has_mtp as fn(&Checkpoint) -> bool),
        ("model.visual.", Checkpoint::has_vision),
    ] {
        let mut tiny = Tiny::default();
        tiny.tensors.retain(|t| !t.name.starts_with(part));
        let checkpoint = tiny.write().open();
        assert!(!has(&checkpoint));
        assert_holds(&checkpoint, &tiny);

        let mut tiny = Tiny::default();
        let last = tiny.tensors.iter().rposition(|t| t.name.starts_with(part)).expect(part);
        let name = canonical_name(&tiny.tensors.remove(last).name);
        let error = tiny.error();
        let end =
            format!("tensor `{name}` is missing, expected because others of its part are there");
        assert!(error.ends_with(&end), "{error}");
    }
    // A config without the parts ignores their tensors.
    let mut tiny = Tiny::default();
    tiny.config["vision_config"] = Value::Null;
    tiny.config["text_config"]["mtp_num_hidden_layers"] = json!(0);
    let checkpoint = tiny.write().open();
    assert!(!checkpoint.has_mtp() && !checkpoint.has_vision());
    assert_eq!(checkpoint.listing().len(), tiny.tensors.len());
}

#[test]
fn any_kernel_and_any_layers() {
    for (kernel, layers) in [(1, 1), (2, 3), (7, 2)] {
        let mut config = config();
        let text = &mut config["text_config"];
        text["linear_conv_kernel_dim"] = json!(kernel);
        text["num_hidden_layers"] = json!(layers);
        text["layer_types"] = json!(vec!["linear_attention"; layers]);
        let tiny = Tiny::new(config);
        assert_holds(&tiny.write().open(), &tiny);
    }
}

#[test]
fn tensors_that_the_model_does_not_have() {
    let mut tiny = Tiny::default();
    tiny.tensors.push(Stored::new("model.rotary_emb.inv_freq", "F32", &[2], &[1.0, 2.0]));
    tiny.tensors.push(Stored {
        name: "steps".to_owned(),
        dtype: "I64".to_owned(),
        shape: vec![],
        data: vec![0; 8],
    });
    let checkpoint = tiny.write().open();
    assert!(checkpoint.tensor("steps").is_none());
    let row = checkpoint.listing().into_iter().find(|(name, ..)| name == "steps").expect("steps");
    assert_eq!(row, ("steps".to_owned(), "I64".to_owned(), vec![], 8, FILE.to_owned()));

    for name in ["layers.1.self_attn.q_proj.bias", "layers.0.mlp.up_proj.weight_scale_inv"] {
        let mut tiny = Tiny::default();
        tiny.tensors.push(Stored::new(&published(name), "F32", &[1], &[1.0]));
        let folder = tiny.write();
        assert!(matches!(Checkpoint::open(folder.root()), Err(Error::Unsupported(_))));
        assert!(folder.error().starts_with(&format!("{FILE}: tensor `{TEXT}{name}`: ")));
    }
}

#[test]
fn wrong_tensors_are_named() {
    let up = format!("{TEXT}{UP}");
    let change = |change: &dyn Fn(&mut Stored)| {
        let mut tiny = Tiny::default();
        change(tiny.tensor(&up));
        tiny.error()
    };
    let place = format!("{FILE}: tensor `{up}`: ");
    assert_eq!(
        change(&|t| t.shape = vec![24, 40]),
        format!("{place}shape [24, 40], expected [40, 24]")
    );
    assert_eq!(
        change(&|t| *t = Stored::new(&t.name, "F32", &[40, 23], &values(1, 40 * 23))),
        format!("{place}shape [40, 23], expected [40, 24]")
    );
    for dtype in ["I8", "U8", "F8_E4M3"] {
        let error = change(&|t| {
            (t.dtype, t.data) = (dtype.to_owned(), vec![0; 40 * 24]);
        });
        assert_eq!(error, format!("{place}dtype {dtype}, expected BF16, F16 or F32"));
    }
    let mut tiny = Tiny::default();
    tiny.tensors.retain(|t| t.name != up);
    let error = tiny.error();
    assert!(error.ends_with(&format!("tensor `{UP}` is missing")), "{error}");

    let mut tiny = Tiny::default();
    let mut again = tiny.tensor(&up).clone();
    again.name = format!("model.{UP}");
    tiny.tensors.push(again);
    let error = tiny.error();
    assert!(error.contains(&format!("is `{UP}`, and so is tensor `")), "{error}");
}

#[test]
fn values_that_are_not_finite() {
    let names = [
        "norm.weight",
        "layers.0.linear_attn.A_log",
        "layers.0.linear_attn.dt_bias",
        "layers.0.linear_attn.conv1d.weight",
        "layers.1.self_attn.k_norm.weight",
    ];
    for (name, dtype) in names.into_iter().zip(["BF16", "F16", "F32"].into_iter().cycle()) {
        for (value, text) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
            let mut tiny = Tiny::default();
            let tensor = tiny.tensor(&published(name));
            let mut values = values(3, tensor.shape.iter().product());
            values[1] = value;
            *tensor = Stored::new(&tensor.name, dtype, &tensor.shape.clone(), &values);
            let place = format!("{FILE}: tensor `{TEXT}{name}`");
            assert_eq!(
                tiny.error(),
                format!("{place}: element 1 is {text}, expected a finite number")
            );
        }
    }
}

#[test]
fn mlx_and_quantised_checkpoints() {
    fn unsupported(tiny: &Tiny, words: &[&str]) {
        let folder = tiny.write();
        let result: Result<Checkpoint> = Checkpoint::open(folder.root());
        assert!(matches!(result, Err(Error::Unsupported(_))));
        for word in words {
            assert!(folder.error().contains(word), "{}", folder.error());
        }
    }
    let mut tiny = Tiny::default();
    let conv = tiny.tensor("model.language_model.layers.0.linear_attn.conv1d.weight");
    conv.shape.swap(1, 2);
    unsupported(&tiny, &["conv1d.weight`: shape [80, 4, 1], expected [80, 1, 4]", "MLX"]);

    let mut tiny = Tiny::default();
    tiny.metadata = json!({"format": "mlx"});
    unsupported(&tiny, &[FILE, "MLX"]);

    for method in ["fp8", "awq", "gptq"] {
        let mut tiny = Tiny::default();
        tiny.config["quantization_config"] = json!({"quant_method": method});
        unsupported(&tiny, &["config.json: ", "quantization_config"]);
    }
}

#[test]
fn index_that_lies() {
    let tiny = Tiny::default();
    let with_index = |index: Value| {
        let folder = tiny.write_shards(2);
        folder.write_json(INDEX, &index);
        folder.error()
    };
    for (index, expected) in [
        (json!({}), "`weight_map` is missing"),
        (json!({"weight_map": []}), "`weight_map` is no object"),
        (json!({"weight_map": {}}), "`weight_map` names no tensor"),
        (
            json!({"weight_map": {"a": 1}}),
            "`weight_map` has 1 for tensor `a`, expected the name of",
        ),
        (
            json!({"weight_map": {"a": "../model.safetensors"}}),
            "expected the name of a file in this",
        ),
        (json!({"weight_map": {"a": "/etc/passwd"}}), "expected the name of a file in this"),
        (json!({"weight_map": {"a": "b.safetensors"}}), "model.safetensors.index.json names it"),
        (json!({"weight_map": {"a": "config.json"}}), "config.json: header of "),
    ] {
        let error = with_index(index);
        assert!(error.contains(expected), "{error}");
    }

    let folder = tiny.write_shards(2);
    let first = "model.safetensors-00001-of-00002.safetensors";
    let text = fs::read_to_string(folder.path(INDEX)).expect("the index");
    let mut index: Value = serde_json::from_str(&text).expect("JSON");
    let moved = tiny.tensors[1].name.clone();
    index["weight_map"][&moved] = json!(first);
    folder.write_json(INDEX, &index);
    assert_eq!(
        folder.error(),
        format!("{first}: tensor `{moved}` is missing, {INDEX} says it is there")
    );
}

#[test]
fn folders_that_are_none() {
    let folder: Folder = Tiny::default().write();
    assert!(matches!(Checkpoint::open(&folder.path("none")), Err(Error::Io { .. })));
    let error = Checkpoint::open(&folder.path(FILE)).err().expect("no converted file").to_string();
    assert!(error.starts_with(&format!("{FILE}: not a file that qdelta converted")), "{error}");
    fs::remove_file(folder.path(FILE)).expect("the file");
    assert!(folder.error().contains("no file ends in .safetensors"), "{}", folder.error());
    fs::create_dir(folder.path(FILE)).expect("a folder");
    assert!(folder.error().contains("not a regular file"), "{}", folder.error());
    fs::remove_file(folder.path("config.json")).expect("the file");
    assert!(folder.error().contains("no config.json"), "{}", folder.error());
}

#[test]
fn files_that_change() {
    let folder = Tiny::default().write();
    let checkpoint = folder.open();
    let file = fs::File::options().write(true).open(folder.path(FILE)).expect("the file");
    let bytes = file.metadata().expect("its size").len();
    file.set_len(bytes + 1).expect("a longer file");
    let error = checkpoint.check_values().expect_err("another file").to_string();
    assert!(error.ends_with(&format!("{} bytes, expected {bytes}", bytes + 1)), "{error}");
}

#[test]
fn floats_of_all_dtypes() {
    let tiny = Tiny::default();
    let folder = tiny.write();
    let checkpoint = folder.open();
    let mut seen = Vec::new();
    for (i, spec) in text_tensors(&checkpoint.config).iter().enumerate() {
        let n = spec.shape.iter().product();
        assert_eq!(checkpoint.floats(&spec.name).expect("finite"), values(i + 1, n));
        seen.push(checkpoint.tensor(&spec.name).expect("a tensor").dtype);
    }
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        assert!(seen.contains(&dtype));
    }
}
