//! GGUF files: those of the reference's converter, and files made by hand.

mod common;

use common::gguf::{BOOL, F32, File, I32, Row, TEXT, Typed, U8, U64};
use common::gguf::{array, converted, f32, i32s, name, string, text, u32};
use qdelta_core::config::{Config, LayerType};
use qdelta_core::files::Convention;
use qdelta_core::files::gguf::{Gguf, Value};
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::tensors::Role;
use qdelta_core::quant::{BlockType, Quant};
use qdelta_core::tensor::Dtype;
use qdelta_core::{Error, Result};
use serde_json::{Value as Json, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&golden(name)).unwrap_or_else(|error| panic!("{error}"))
}

fn model() -> File {
    File::model(&common::text_config(), None)
}

fn opened(file: &File) -> Result<Checkpoint> {
    let written = file.write();
    let checkpoint = Checkpoint::open(&written.path)?;
    checkpoint.check_values()?;
    Ok(checkpoint)
}

fn error(file: &File) -> String {
    opened(file).err().expect("an invalid file").to_string()
}

#[test]
fn unknown_tensors_are_told() {
    for name in ["gguf/tiny-f32-F32.gguf", "tiny-text/tiny-f32", "gguf/tiny-k256-bf16-Q4_K_M.gguf"]
    {
        assert_eq!(open(name).unknown().next(), None, "{name}");
    }
    let mut file = model();
    for name in ["v.blk.0.ln1.weight", "mm.0.weight", "rope_freqs.weight", "strange.weight"] {
        file.add(name, "output_norm.weight");
    }
    let checkpoint = opened(&file).expect("what is not used does no harm");
    assert_eq!(checkpoint.unknown().collect::<Vec<_>>(), ["strange.weight"]);
}

#[test]
fn every_tensor_of_the_golden_file() {
    let (gguf, folder) = (open("gguf/tiny-f32-F32.gguf"), open("tiny-text/tiny-f32"));
    assert_eq!((gguf.quant, gguf.convention), (Quant::None, Convention::Gguf));
    assert_eq!(folder.convention, Convention::Transformers);
    assert_eq!(gguf.config, Config { vision: None, ..folder.config.clone() });
    assert!(gguf.config.values_per_key() > 1 && gguf.has_mtp() && !gguf.has_vision());
    let specs: Vec<_> = folder.specs().iter().filter(|spec| spec.role != Role::Vision).collect();
    assert_eq!(gguf.specs().len(), specs.len());
    assert_eq!(gguf.listing().len(), specs.len());
    for spec in specs {
        let values = folder.floats(&spec.name).expect("a tensor of the folder");
        let want = converted(&gguf.config, spec, values);
        let got = gguf.floats(&spec.name).expect("a tensor of the file");
        assert_eq!(gguf.tensor(&spec.name).expect("the same").shape, spec.shape);
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // The converter's exp is another; one of a few hundred at most.
            let bound = if spec.name.ends_with("A_log") { 1e-6 * want.abs().max(1.0) } else { 0.0 };
            assert!((got - want).abs() <= bound, "{}[{i}]: {got}, expected {want}", spec.name);
        }
    }
}

/// The codes of Q8_0 are the checkpoint's numbers to half a step, and a step is an f16.
#[test]
fn rows_of_the_golden_q8_0_file() {
    let (gguf, folder) = (open("gguf/tiny-k256-bf16-Q8_0.gguf"), open("tiny-text/tiny-k256-bf16"));
    assert_eq!(gguf.config, Config { vision: None, ..folder.config.clone() });
    let mut matrices = 0;
    for spec in gguf.specs() {
        let tensor = gguf.tensor(&spec.name).expect("it is bound");
        if tensor.dtype != Dtype::Blocks(BlockType::Q8_0) {
            assert_eq!((tensor.dtype, spec.role), (Dtype::F32, Role::Small), "{}", spec.name);
            continue;
        }
        matrices += 1;
        let values = folder.floats(&spec.name).expect("a tensor of the folder");
        let want = converted(&gguf.config, spec, values);
        for (got, want) in tensor.to_f32().chunks(32).zip(want.chunks(32)) {
            let most = want.iter().fold(0f32, |most, x| most.max(x.abs()));
            let bound = most / 127.0 * (0.5 + 127.0 / 2048.0) + f32::from_bits(1 << 23);
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() <= bound, "{}: {got}, expected {want}", spec.name);
            }
        }
    }
    assert_eq!(matrices, 72);
}

#[test]
fn types_of_the_golden_q4_k_m_file() {
    let gguf = open("gguf/tiny-k256-bf16-Q4_K_M.gguf");
    let types: BTreeSet<&str> = gguf
        .specs()
        .iter()
        .map(|spec| gguf.tensor(&spec.name).expect("it is bound").dtype.name())
        .collect();
    assert_eq!(types, BTreeSet::from(["F32", "Q4_K", "Q6_K"]));
    let listing = gguf.listing();
    let row = listing.iter().find(|(name, ..)| name == "output.weight").expect("a head");
    let file = "tiny-k256-bf16-Q4_K_M.gguf".to_owned();
    let bytes = 512 * BlockType::Q6K.bytes();
    assert_eq!(*row, (row.0.clone(), "Q6_K".to_owned(), vec![512, 256], bytes, file.clone()));
    assert_eq!(gguf.sources().len(), 1);
    assert_eq!(gguf.sources()[0].name, file);
}

#[test]
fn metadata_of_the_golden_file() {
    let gguf = open("gguf/tiny-f32-F32.gguf");
    let metadata = gguf.gguf().expect("it is a GGUF file");
    assert!(metadata.keys().any(|key| key == "qwen35.block_count"));
    assert!(metadata.get("none").expect("no error").is_none());
    let array = |key: &str| match metadata.get(key).expect("no error") {
        Some(Value::Array(array)) => array,
        _ => panic!("{key}"),
    };
    let tokens = array("tokenizer.ggml.tokens");
    assert_eq!(tokens.len(), 512);
    let texts: Vec<&str> = tokens
        .iter()
        .map(|token| match token.expect("a text") {
            Value::Text(text) => text,
            _ => panic!("no text"),
        })
        .collect();
    assert_eq!((texts.len(), texts[0], texts[511]), (512, "!", "[PAD511]"));
    let sections: Vec<Option<u64>> = array("qwen35.rope.dimension_sections")
        .iter()
        .map(|section| section.expect("a number").count())
        .collect();
    assert_eq!(sections.len(), 4);
    assert!(
        matches!(metadata.get("tokenizer.chat_template"), Ok(Some(Value::Text(t))) if t.len() > 99)
    );
}

#[test]
fn a_file_made_by_hand_is_the_model_of_its_config() {
    let file = model();
    let checkpoint = opened(&file).expect("a valid file");
    let expected =
        Config::from_json(&common::text_config().to_string(), "config.json").expect("valid");
    assert_eq!(checkpoint.config, expected);
    assert!(checkpoint.has_mtp());
    for spec in checkpoint.specs() {
        let row = name(&spec.name, expected.num_hidden_layers);
        let row = file.rows.iter().find(|r| r.name == row).expect("it has a name in the file");
        let tensor = checkpoint.tensor(&spec.name).expect("it is bound");
        assert_eq!((&tensor.bytes[..], &tensor.shape), (&row.data[..], &spec.shape));
        assert_eq!(checkpoint.place(&spec.name), format!("model.gguf: tensor `{}`", row.name));
    }
    let names: Vec<_> = checkpoint.listing().into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, file.rows.iter().map(|row| row.name.clone()).collect::<Vec<_>>());
}

/// A config whose rows are whole blocks of every type.
fn wide_config() -> Json {
    let mut config = common::text_config();
    let text = &mut config["text_config"];
    for (key, value) in [
        ("hidden_size", 256),
        ("intermediate_size", 256),
        ("num_attention_heads", 16),
        ("linear_num_key_heads", 2),
        ("linear_num_value_heads", 4),
        ("linear_value_head_dim", 64),
    ] {
        text[key] = json!(value);
    }
    config
}

#[test]
fn every_block_type_in_every_matrix() {
    for block in BlockType::ALL {
        let file = File::model(&wide_config(), Some(block));
        let name = block.name();
        let checkpoint = opened(&file).expect(name);
        for spec in checkpoint.specs().iter().filter(|spec| spec.role != Role::Small) {
            let tensor = checkpoint.tensor(&spec.name).expect("it is bound");
            assert_eq!(tensor.dtype, Dtype::Blocks(block));
            assert_eq!(tensor.bytes.len(), block.row_bytes(tensor.elements()));
        }
    }
}

#[test]
fn types_that_are_not_decoded_are_named() {
    for (id, name, cols, bytes) in [
        (9, "Q8_1", 32, 36),
        (16, "IQ2_XXS", 256, 66),
        (21, "IQ3_S", 256, 110),
        (28, "F64", 1, 8),
        (35, "TQ2_0", 256, 66),
        (40, "NVFP4", 64, 36),
    ] {
        let mut file = File::model(&wide_config(), Some(BlockType::Q8_0));
        let row = file.row("blk.1.attn_output.weight");
        (row.kind, row.data) = (id, vec![0; 256 * 256 / cols * bytes]);
        let result = opened(&file);
        let error = result.as_ref().err().expect(name).to_string();
        let start = format!(
            "model.gguf: tensor `blk.1.attn_output.weight`: type {name}, supported are BF16"
        );
        assert!(matches!(result, Err(Error::Unsupported(_))), "{error}");
        assert!(error.starts_with(&start), "{error}");
    }
    // A tensor that the model does not use may have any type of a known size.
    let mut file = model();
    let row = file.add("v.x", "output_norm.weight");
    (row.kind, row.dims, row.data) = (27, vec![3], vec![0; 24]);
    let listing = opened(&file).expect("a valid file").listing();
    let last = listing.last().expect("a row");
    assert_eq!((last.0.as_str(), last.1.as_str()), ("v.x", "I64"));
    // Small tensors are floats.
    let mut file = File::model(&wide_config(), Some(BlockType::Q8_0));
    let row = file.row("output_norm.weight");
    (row.kind, row.data) = (8, vec![0; 256 / 32 * 34]);
    assert!(error(&file).ends_with("`output_norm.weight`: dtype Q8_0, expected BF16, F16 or F32"));
}

#[test]
fn spellings_of_other_exporters() {
    let base = opened(&model()).expect("a valid file").config;
    let same = |change: &dyn Fn(&mut File)| {
        let mut file = model();
        change(&mut file);
        let checkpoint = opened(&file).expect("a valid variant");
        assert_eq!(checkpoint.config, base);
        checkpoint
    };
    let key = |key: &str| format!("qwen35.{key}");
    same(&|f| f.version = 2);
    same(&|f| f.set(&key("rope.dimension_sections"), i32s(&[2, 1, 1])));
    same(&|f| f.set(&key("attention.head_count_kv"), i32s(&[0, 2, 2])));
    same(&|f| f.set(&key("attention.head_count_kv"), Typed(U64, 2u64.to_le_bytes().to_vec())));
    same(&|f| f.set(&key("block_count"), Typed(I32, 3i32.to_le_bytes().to_vec())));
    same(&|f| f.set(&key("block_count"), Typed(U8, vec![3])));
    same(&|f| f.set(&key("attention.recurrent_layers"), array(BOOL, 3, &[1, 0, 0])));
    same(&|f| f.unset(&key("attention.value_length")));
    same(&|f| f.unset(&key("attention.layer_norm_rms_epsilon")));
    same(&|f| f.unset(&key("rope.freq_base")));
    same(&|f| f.unset(&key("ssm.conv_kernel")));
    same(&|f| f.set(&key("rope.scaling.type"), text("none")));
    same(&|f| f.row("blk.0.ssm_dt.bias").name = "blk.0.ssm_dt".to_owned());
    same(&|f| f.row("blk.0.ssm_conv1d.weight").dims.insert(1, 1));
    same(&|f| f.set("general.alignment", u32(32)));
    same(&|f| {
        f.alignment = 4096;
        f.set("general.alignment", u32(4096));
    });
    same(&|f| f.row("blk.0.ssm_norm.weight").data = common::encode("F32", &[0.5; 12]));
    same(&|f| {
        let row = f.row("output_norm.weight");
        (row.kind, row.data) = (30, common::encode("BF16", &[1.5; 24]));
    });
    // In what is none of its business.
    for name in ["v.blk.0.ln1.weight", "mm.0.weight", "rope_freqs.weight", "other"] {
        let checkpoint = same(&|f| {
            f.add(name, "blk.0.ssm_a");
        });
        assert!(checkpoint.tensor(name).is_none());
        assert!(checkpoint.listing().iter().any(|(listed, ..)| listed == name));
    }

    let mut file = model();
    file.unset(&key("full_attention_interval"));
    assert!(error(&file).contains("`blk.1.attn_qkv.weight` is missing"), "{}", error(&file));
    file.set(&key("attention.recurrent_layers"), array(BOOL, 2, &[1, 0]));
    let types = opened(&file).expect("a valid file").config.layer_types;
    assert_eq!(types, [LayerType::LinearAttention, LayerType::FullAttention]);
}

#[test]
fn heads_of_their_own_or_that_of_the_embedding() {
    assert!(opened(&model()).expect("a valid file").config.tie_word_embeddings);
    let mut config = common::text_config();
    config["tie_word_embeddings"] = json!(false);
    config["text_config"]["tie_word_embeddings"] = json!(false);
    let checkpoint = opened(&File::model(&config, None)).expect("a valid file");
    assert!(!checkpoint.config.tie_word_embeddings);
    assert!(checkpoint.tensor("lm_head.weight").is_some());
}

#[test]
fn multi_token_prediction() {
    let in_module = |name: &str| name.starts_with("blk.2.");
    // Without the module the block count is that of the trunk.
    let mut file = model();
    file.rows.retain(|row| !in_module(&row.name));
    let checkpoint = opened(&file).expect("the module may be left out");
    assert!(!checkpoint.has_mtp());
    file.set("qwen35.block_count", u32(2));
    file.unset("qwen35.nextn_predict_layers");
    assert_eq!(opened(&file).expect("a file without").config.mtp_num_hidden_layers, 0);

    let mut file = model();
    file.rows.retain(|row| row.name != "blk.2.nextn.shared_head_norm.weight");
    let checkpoint = opened(&file).expect("the trunk's norm takes the place");
    let norm = |name: &str| checkpoint.floats(name).expect(name);
    assert_eq!(norm("mtp.norm.weight"), norm("norm.weight"));

    for name in ["blk.2.nextn.embed_tokens.weight", "blk.2.nextn.shared_head_head.weight"] {
        let mut file = model();
        file.add(name, "token_embd.weight");
        let checkpoint = opened(&file).expect("the text model runs without the module");
        assert!(!checkpoint.has_mtp());
    }

    let mut file = model();
    file.rows.retain(|row| in_module(&row.name) || !row.name.starts_with("blk."));
    let error = error(&file);
    assert!(error.contains("multi-token-prediction module alone is no model"), "{error}");
}

#[test]
fn yarn() {
    let mut file = model();
    let key = |key: &str| format!("qwen35.rope.scaling.{key}");
    file.set(&key("type"), text("yarn"));
    file.set(&key("factor"), f32(4.0));
    file.set(&key("original_context_length"), u32(512));
    let yarn = |file: &File| opened(file).expect("a valid file").config.rope.yarn.expect("yarn");
    let plain = yarn(&file);
    assert_eq!((plain.factor, plain.original_max_position_embeddings), (4.0, 512));
    file.set(&key("yarn_beta_fast"), f32(16.0));
    file.set(&key("yarn_beta_slow"), f32(2.0));
    file.set(&key("yarn_ext_factor"), f32(1.0));
    assert_eq!((yarn(&file).beta_fast, yarn(&file).beta_slow), (16.0, 2.0));
    for (name, value) in [
        ("yarn_attn_factor", f32(1.0)),
        ("attn_factor", f32(0.5)),
        ("yarn_ext_factor", f32(0.0)),
        ("yarn_log_multiplier", f32(0.1)),
        ("type", text("linear")),
    ] {
        let mut file = file.clone();
        file.set(&key(name), value);
        assert!(matches!(opened(&file), Err(Error::Unsupported(_))), "{name}");
        assert!(error(&file).contains(&key(name)), "{}", error(&file));
    }
    for name in ["factor", "original_context_length"] {
        let mut file = file.clone();
        file.unset(&key(name));
        assert!(error(&file).contains("missing"), "{}", error(&file));
    }
}

#[test]
fn other_architectures_are_named() {
    for (architecture, expected) in [
        ("clip", "a vision file (mmproj)"),
        ("qwen35moe", "a mixture of experts"),
        ("qwen3next", "`general.architecture` is \"qwen3next\", only \"qwen35\""),
        ("llama", "`general.architecture` is \"llama\", only \"qwen35\""),
        ("qwen35\n", "only \"qwen35\""),
    ] {
        let mut file = model();
        file.set("general.architecture", text(architecture));
        assert!(matches!(opened(&file), Err(Error::Unsupported(_))));
        assert!(error(&file).contains(expected), "{}", error(&file));
    }
    let mut file = model();
    file.unset("general.architecture");
    assert_eq!(error(&file), "model.gguf: `general.architecture` is missing");
}

#[test]
fn what_is_wrong_with_the_metadata_is_named() {
    for (key, value, expected) in [
        ("block_count", None, "is missing"),
        ("block_count", Some(u32(0)), "is 0"),
        ("block_count", Some(u32(1)), "is 1"),
        ("block_count", Some(u32(2)), "expected no such block, `qwen35.block_count` is 2"),
        ("block_count", Some(u32(u32::MAX)), "is 4294967295"),
        ("block_count", Some(text("3")), "is \"3\", expected a count"),
        ("block_count", Some(Typed(I32, (-3i32).to_le_bytes().to_vec())), "is -3"),
        ("nextn_predict_layers", Some(u32(4)), "`qwen35.nextn_predict_layers` 4"),
        ("embedding_length", Some(u32(25)), "shape [70, 24], expected [70, 25]"),
        ("attention.head_count_kv", Some(i32s(&[0, 2, 1])), "is a list of 3, expected one count"),
        ("attention.head_count_kv", Some(i32s(&[0, 0])), "is a list of 2, expected one count"),
        ("attention.head_count_kv", Some(array(F32, 1, &[0; 4])), "expected one count"),
        ("attention.head_count_kv", Some(u32(3)), "`num_attention_heads` is 4"),
        ("attention.value_length", Some(u32(8)), "only that of the keys, 16"),
        ("attention.layer_norm_rms_epsilon", Some(f32(f32::NAN)), "is NaN"),
        ("attention.layer_norm_rms_epsilon", Some(f32(2.0)), "`rms_norm_eps` is 2"),
        ("attention.recurrent_layers", Some(array(BOOL, 1, &[1])), "for each of 2 layers"),
        ("attention.recurrent_layers", Some(i32s(&[1, 0, 0])), "expected true or false"),
        ("attention.recurrent_layers", Some(array(BOOL, 3, &[2, 0, 0])), "2 is neither true nor"),
        ("attention.recurrent_layers", Some(u32(1)), "expected true or false"),
        ("full_attention_interval", Some(u32(0)), "expected 1 or more"),
        ("rope.freq_base", Some(f32(f32::INFINITY)), "expected a finite number"),
        ("rope.freq_base", Some(text("x")), "expected a finite number"),
        ("rope.dimension_count", Some(u32(40)), "`partial_rotary_factor` is 2.5"),
        ("rope.dimension_sections", Some(i32s(&[2, 1])), "is a list of 2, expected three counts"),
        ("rope.dimension_sections", Some(i32s(&[2, 1, 1, 1])), "expected three counts"),
        ("rope.dimension_sections", Some(i32s(&[2, 1, -1])), "expected three counts"),
        ("rope.dimension_sections", Some(i32s(&[2, 2, 1])), "`mrope_section` is [2,2,1]"),
        ("rope.dimension_sections", Some(u32(2)), "expected three counts"),
        ("rope.scaling.type", Some(u32(2)), "supported are \"none\" and \"yarn\""),
        ("ssm.inner_size", Some(u32(47)), "expected a multiple of `qwen35.ssm.time_step_rank`"),
        ("ssm.time_step_rank", Some(u32(0)), "`qwen35.ssm.time_step_rank`, which is 0"),
        ("ssm.group_count", Some(u32(3)), "`linear_num_value_heads` is 4"),
        ("ssm.state_size", Some(u32(0)), "`linear_key_head_dim` is 0"),
    ] {
        let mut file = model();
        let key = format!("qwen35.{key}");
        match value {
            Some(value) => file.set(&key, value),
            None => file.unset(&key),
        }
        let error = error(&file);
        assert!(error.starts_with("model.gguf: ") && error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn what_is_wrong_with_the_tensors_is_named() {
    let wrong = |row: &str, change: &dyn Fn(&mut Row)| {
        let mut file = model();
        change(file.row(row));
        error(&file)
    };
    let up = "blk.0.ffn_up.weight";
    for (error, expected) in [
        (
            wrong(up, &|row| row.dims.reverse()),
            "`blk.0.ffn_up.weight`: shape [24, 40], expected [40, 24]",
        ),
        (wrong(up, &|row| row.name.push('x')), "`blk.0.ffn_up.weight` is missing"),
        (wrong(up, &|row| row.name = "blk.0.ffn_down.weight".into()), "named twice"),
        (wrong(up, &|row| row.name = "blk.0.ffn_gate_inp.weight".into()), "not part of the arch"),
        (wrong(up, &|row| row.name = "blk.00.ffn_up.weight".into()), "is missing"),
        (wrong(up, &|row| row.name = "blk.7.ffn_up.weight".into()), "`qwen35.block_count` is 3"),
        (wrong("token_embd.weight", &|row| row.name.clear()), "`token_embd.weight` is missing"),
        (
            wrong("token_embd.weight", &|row| row.dims = vec![24 * 70]),
            "shape [1680], expected [tokens, hidden]",
        ),
        (
            wrong("output_norm.weight", &|row| row.data[..4].copy_from_slice(&[0, 0, 192, 127])),
            "`output_norm.weight`: element 0 is NaN",
        ),
    ] {
        assert!(error.starts_with("model.gguf: ") && error.contains(expected), "{error}");
    }
    for end in ["scale", "input_scale", "bias"] {
        let mut file = model();
        file.add(&format!("blk.0.ffn_up.{end}"), "blk.0.ssm_a");
        assert!(matches!(opened(&file), Err(Error::Unsupported(_))), "{}", error(&file));
        assert!(error(&file).contains("changes a weight"), "{}", error(&file));
    }
    let mut file = model();
    file.add("blk.0.ssm_a.weight", "blk.0.ssm_a");
    assert!(error(&file).contains("A_log`, and so is tensor `blk.0.ssm_a`"), "{}", error(&file));
}

#[test]
fn any_part_opens_all() {
    let file = model();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let parts = file.write_parts(3);
    for (name, part) in &parts {
        fs::write(folder.path().join(name), part.bytes()).expect("a file");
    }
    let whole = opened(&file).expect("a valid file");
    for (name, _) in &parts {
        let checkpoint = Checkpoint::open(&folder.path().join(name)).expect(name);
        assert_eq!(checkpoint.config, whole.config);
        for spec in checkpoint.specs() {
            let bytes = |c: &Checkpoint| c.tensor(&spec.name).expect("it is bound").bytes.to_vec();
            assert_eq!(bytes(&checkpoint), bytes(&whole));
        }
        let sources: Vec<_> = checkpoint.sources().iter().map(|s| s.name.as_str()).collect();
        assert_eq!(sources, parts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
        assert!(checkpoint.gguf().expect("metadata").keys().any(|k| k == "general.architecture"));
    }

    let error = |name: &str| {
        let result = Checkpoint::open(&folder.path().join(name));
        result.err().expect("a part is wrong").to_string()
    };
    let (second, third) = (folder.path().join(&parts[1].0), folder.path().join(&parts[2].0));
    fs::remove_file(&second).expect("the file");
    let missing = error(&parts[0].0);
    assert!(missing.ends_with("model-00002-of-00003.gguf: missing, part 2 of 3"), "{missing}");

    // What takes its place is not it.
    fs::copy(&third, &second).expect("a copy");
    assert!(error(&parts[0].0).contains("`split.no` is 2, expected 1"));
    let mut other = parts[1].1.clone();
    other.rows[0].name = parts[0].1.rows[0].name.clone();
    fs::write(&second, other.bytes()).expect("a file");
    assert!(error(&parts[2].0).ends_with("named twice"), "{}", error(&parts[2].0));
    let mut other = parts[1].1.clone();
    other.rows.pop();
    fs::write(&second, other.bytes()).expect("a file");
    assert!(error(&parts[0].0).contains("`split.tensors.count` is "), "{}", error(&parts[0].0));
    fs::write(&second, file.bytes()).expect("a file");
    assert!(error(&parts[0].0).contains("`split.no` is missing, expected 1"));

    // Names that do not tell where the others are.
    for name in ["model.gguf", "model-00001-of-00002.gguf", "model-1-of-3.gguf"] {
        fs::write(folder.path().join(name), parts[0].1.bytes()).expect("a file");
        let error = error(name);
        assert!(error.contains("expected a name like NAME-00001-of-00003.gguf"), "{error}");
    }
    // And one that seems to, of a file that is whole.
    let name = folder.path().join("whole-00001-of-00002.gguf");
    fs::write(&name, file.bytes()).expect("a file");
    Checkpoint::open(&name).expect("a whole file by any name");
}

#[test]
fn a_file_is_known_by_its_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    fs::write(&path, model().bytes()).expect("a file");
    Checkpoint::open(&path).expect("a GGUF file by another name");

    let path = folder.path().join("model.gguf");
    for (bytes, expected) in [
        (&b""[..], "no GGUF file: it begins with \"\", expected \"GGUF\""),
        (b"GG", "begins with \"GG\""),
        (b"tjgg\x01\0\0\0", "begins with \"tjgg\""),
        (b"\0\0\0\0\0\0\0\0", "begins with \"\\x00\\x00\\x00\\x00\""),
        (b"version https://git-lfs.github.com/spec/v1", "begins with \"vers\""),
        (b"GGUF", "4 bytes expected at byte 4, 0 are left"),
        (b"GGUF\x01\0\0\0", "GGUF version 1; convert the original model again"),
        (b"GGUF\0\0\0\x03", "GGUF version 3, big-endian; supported are"),
        (b"GGUF\x04\0\0\0", "GGUF version 4; supported are the versions 2 and 3"),
    ] {
        fs::write(&path, bytes).expect("a file");
        let error = Checkpoint::open(&path).err().expect(expected).to_string();
        assert!(error.starts_with("model.gguf: ") && error.contains(expected), "{error}");
    }
}

#[test]
fn values_of_every_type() {
    let mut file = model();
    for (i, (kind, bytes)) in
        [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (10, 8), (11, 8), (12, 8)]
            .into_iter()
            .enumerate()
    {
        file.set(&format!("one.{i}"), Typed(kind, vec![if kind == 7 { 1 } else { 0xff }; bytes]));
        let two = if kind == 7 { vec![0, 1] } else { vec![0xff; 2 * bytes] };
        file.set(&format!("two.{i}"), array(kind, 2, &two));
    }
    file.set("none", array(TEXT, 0, &[]));
    file.set("texts", array(TEXT, 2, &[string("é"), string("")].concat()));
    file.set("bad", text(b"ab\xff"));
    file.set("bad list", array(TEXT, 2, &[string("a"), string(b"\xc3")].concat()));
    let written = file.write();
    let gguf = Gguf::open(&written.path).expect("a valid file");
    let show = |key: &str| {
        let value = gguf.metadata.get(key).expect("no error").expect(key);
        match value {
            Value::Array(array) => {
                let values = array.iter().map(|v| v.expect("no error").to_string());
                values.collect::<Vec<_>>().join(" ")
            }
            value => value.to_string(),
        }
    };
    let expected = [
        "255",
        "-1",
        "65535",
        "-1",
        "4294967295",
        "-1",
        "NaN",
        "true",
        "18446744073709551615",
        "-1",
        "NaN",
    ];
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(show(&format!("one.{i}")), *expected);
        let two =
            if *expected == "true" { "false true" } else { &format!("{expected} {expected}") };
        assert_eq!(show(&format!("two.{i}")), two);
    }
    assert_eq!((show("none").as_str(), show("texts").as_str()), ("", "\"é\" \"\""));
    // Only who asks is told.
    let error = gguf.metadata.get("bad").err().expect("no UTF-8").to_string();
    assert_eq!(error, "model.gguf: key `bad`: a text is no UTF-8 at byte 2");
    let Ok(Some(Value::Array(list))) = gguf.metadata.get("bad list") else { panic!("a list") };
    assert!(list.iter().nth(1).expect("an element").is_err());
}
