//! GGUF files made by hand, so that each part of them can be wrong.

use super::{encode, values};
use qdelta_core::config::Config;
use qdelta_core::model::tensors::{TensorSpec, mtp_tensors, text_tensors};
use qdelta_core::quant::BlockType;
use serde_json::Value as Json;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

pub const U8: u32 = 0;
pub const U16: u32 = 2;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const TEXT: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U64: u32 = 10;

/// A value of the metadata: type and bytes.
#[derive(Clone, Debug)]
pub struct Typed(pub u32, pub Vec<u8>);

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

pub fn text(text: impl AsRef<[u8]>) -> Typed {
    Typed(TEXT, string(text))
}

pub fn u32(n: u32) -> Typed {
    Typed(U32, n.to_le_bytes().to_vec())
}

pub fn f32(x: f32) -> Typed {
    Typed(F32, x.to_le_bytes().to_vec())
}

/// An array of elements of type `kind`, their bytes behind each other.
pub fn array(kind: u32, count: u64, elements: &[u8]) -> Typed {
    Typed(ARRAY, [&kind.to_le_bytes(), &count.to_le_bytes()[..], elements].concat())
}

pub fn i32s(numbers: &[i32]) -> Typed {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    array(I32, numbers.len() as u64, &bytes)
}

/// A row of the tensor table, and its data.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    /// Fastest axis first.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// If it is not where its data is put.
    pub offset: Option<u64>,
}

/// A file before it is written.
#[derive(Clone, Debug)]
pub struct File {
    pub version: u32,
    pub entries: Vec<(String, Typed)>,
    pub rows: Vec<Row>,
    pub alignment: usize,
}

impl File {
    /// All that a text model of this config has, with its multi-token-prediction module if it has
    /// one: small tensors F32, the others in a block type, or F16 and BF16 in turn.
    pub fn model(config: &Json, block: Option<BlockType>) -> File {
        let parsed = Config::from_json(&config.to_string(), "config.json").expect("a valid config");
        let layers = parsed.num_hidden_layers;
        let n = |n: usize| u32(n as u32);
        let section = parsed.rope.mrope_section.map(|n| n as i32);
        let entries = [
            ("block_count", n(layers + parsed.mtp_num_hidden_layers)),
            ("nextn_predict_layers", n(parsed.mtp_num_hidden_layers)),
            ("context_length", n(parsed.max_position_embeddings)),
            ("embedding_length", n(parsed.hidden_size)),
            ("feed_forward_length", n(parsed.intermediate_size)),
            ("attention.head_count", n(parsed.num_attention_heads)),
            ("attention.head_count_kv", n(parsed.num_key_value_heads)),
            ("attention.key_length", n(parsed.head_dim)),
            ("attention.value_length", n(parsed.head_dim)),
            ("attention.layer_norm_rms_epsilon", f32(parsed.rms_norm_eps)),
            ("rope.dimension_count", n(parsed.rope.rotary_dim)),
            ("rope.dimension_sections", i32s(&[section[0], section[1], section[2], 0])),
            ("rope.freq_base", f32(parsed.rope.theta as f32)),
            ("ssm.conv_kernel", n(parsed.linear_conv_kernel_dim)),
            ("ssm.state_size", n(parsed.linear_key_head_dim)),
            ("ssm.group_count", n(parsed.linear_num_key_heads)),
            ("ssm.time_step_rank", n(parsed.linear_num_value_heads)),
            ("ssm.inner_size", n(parsed.value_dim())),
            ("full_attention_interval", n(2)),
        ]
        .map(|(key, value)| (format!("qwen35.{key}"), value));
        let mut file = File {
            version: 3,
            entries: vec![("general.architecture".to_owned(), text("qwen35"))],
            rows: Vec::new(),
            alignment: 32,
        };
        file.entries.extend(entries);
        let specs = text_tensors(&parsed).into_iter().chain(mtp_tensors(&parsed));
        for (i, spec) in specs.enumerate() {
            let name = name(&spec.name, layers);
            let mut dims: Vec<u64> = spec.shape.iter().rev().map(|n| *n as u64).collect();
            if dims.len() == 3 {
                dims.remove(1); // the middle axis of the convolution
            }
            let elements: usize = spec.shape.iter().product();
            let small = spec.shape.len() != 2;
            let (kind, data) = match block {
                Some(block) if !small => {
                    let seed = i as u8;
                    let bytes = block.row_bytes(elements);
                    (block.id(), (0..bytes).map(|i| (i as u8).wrapping_mul(37) ^ seed).collect())
                }
                _ if small => (0, encode("F32", &values(i + 1, elements))),
                _ if i % 2 == 0 => (1, encode("F16", &values(i + 1, elements))),
                _ => (30, encode("BF16", &values(i + 1, elements))),
            };
            file.rows.push(Row { name, dims, kind, data, offset: None });
        }
        file
    }

    pub fn set(&mut self, key: &str, value: Typed) {
        match self.entries.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.entries.push((key.to_owned(), value)),
        }
    }

    pub fn unset(&mut self, key: &str) {
        self.entries.retain(|(k, _)| k != key);
    }

    pub fn row(&mut self, name: &str) -> &mut Row {
        self.rows.iter_mut().find(|row| row.name == name).expect(name)
    }

    /// A copy of a tensor under another name.
    pub fn add(&mut self, name: &str, like: &str) -> &mut Row {
        let row = Row { name: name.to_owned(), ..self.row(like).clone() };
        self.rows.push(row);
        self.row(name)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.rows.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, Typed(kind, value)) in &self.entries {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for row in &self.rows {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend(string(&row.name));
            out.extend((row.dims.len() as u32).to_le_bytes());
            out.extend(row.dims.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(row.kind.to_le_bytes());
            out.extend(row.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&row.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }

    /// The file in a folder of its own.
    pub fn write(&self) -> Written {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("model.gguf");
        fs::write(&path, self.bytes()).expect("a file");
        Written { _folder: folder, path }
    }

    /// The same in parts, row i in part i modulo `parts`, under the names that parts have.
    pub fn write_parts(&self, parts: usize) -> Vec<(String, File)> {
        let part = |part: usize| {
            let entries = if part == 0 { self.entries.clone() } else { Vec::new() };
            let rows = self.rows.iter().skip(part).step_by(parts).cloned().collect();
            let mut file = File { entries, rows, ..self.clone() };
            file.set("split.no", Typed(U16, (part as u16).to_le_bytes().to_vec()));
            file.set("split.count", Typed(U16, (parts as u16).to_le_bytes().to_vec()));
            let tensors = self.rows.len() as i32;
            file.set("split.tensors.count", Typed(I32, tensors.to_le_bytes().to_vec()));
            (format!("model-{:05}-of-{parts:05}.gguf", part + 1), file)
        };
        (0..parts).map(part).collect()
    }
}

/// A file that is removed in the end.
pub struct Written {
    _folder: TempDir,
    pub path: PathBuf,
}

/// What GGUF calls a tensor of the model.
pub fn name(canonical: &str, layers: usize) -> String {
    const STEMS: [(&str, &str); 18] = [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("linear_attn.in_proj_qkv", "attn_qkv"),
        ("linear_attn.in_proj_z", "attn_gate"),
        ("linear_attn.in_proj_b", "ssm_beta"),
        ("linear_attn.in_proj_a", "ssm_alpha"),
        ("linear_attn.conv1d", "ssm_conv1d"),
        ("linear_attn.norm", "ssm_norm"),
        ("linear_attn.out_proj", "ssm_out"),
    ];
    let renamed = match canonical {
        "embed_tokens.weight" => "token_embd.weight",
        "norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        "mtp.fc.weight" => "eh_proj",
        "mtp.pre_fc_norm_embedding.weight" => "enorm",
        "mtp.pre_fc_norm_hidden.weight" => "hnorm",
        "mtp.norm.weight" => "shared_head_norm",
        _ => "",
    };
    let module = canonical.strip_prefix("mtp.");
    match (renamed, module) {
        ("", _) => {}
        (stem, Some(_)) => return format!("blk.{layers}.nextn.{stem}.weight"),
        (name, None) => return name.to_owned(),
    }
    let layer = module.unwrap_or(canonical).strip_prefix("layers.").expect(canonical);
    let (i, rest) = layer.split_once('.').expect(canonical);
    let i = i.parse::<usize>().expect(canonical) + module.map_or(0, |_| layers);
    match rest {
        "linear_attn.A_log" => format!("blk.{i}.ssm_a"),
        "linear_attn.dt_bias" => format!("blk.{i}.ssm_dt.bias"),
        _ => {
            let stem = rest.strip_suffix(".weight").expect(canonical);
            let (_, stem) = STEMS.iter().find(|(from, _)| *from == stem).expect(canonical);
            format!("blk.{i}.{stem}.weight")
        }
    }
}

/// What the converter makes of a tensor's values: 1 added to norms, -exp(A_log), value heads moved.
pub fn converted(config: &Config, spec: &TensorSpec, mut values: Vec<f32>) -> Vec<f32> {
    let name = &spec.name;
    if name.contains("norm") && !name.ends_with("linear_attn.norm.weight") {
        values.iter_mut().for_each(|x| *x += 1.0);
    }
    if name.ends_with("A_log") {
        values.iter_mut().for_each(|x| *x = -x.exp());
    }
    let heads = |values: &[f32], d: usize| {
        let (keys, r) = (config.linear_num_key_heads, config.values_per_key());
        let from = |j: usize| (j % keys) * r + j / keys;
        let heads = (0..keys * r).flat_map(|j| &values[from(j) * d..][..d]);
        heads.copied().collect::<Vec<f32>>()
    };
    let (d_v, taps) = (config.linear_value_head_dim, config.linear_conv_kernel_dim);
    let row = spec.shape[1..].iter().product::<usize>();
    let q_and_k = 2 * config.key_dim();
    match name.split_once("linear_attn.").map_or("", |(_, part)| part) {
        "in_proj_qkv.weight" => {
            let moved = heads(&values[q_and_k * row..], d_v * row);
            values.splice(q_and_k * row.., moved).for_each(drop);
        }
        "conv1d.weight" => {
            let moved = heads(&values[q_and_k * taps..], d_v * taps);
            values.splice(q_and_k * taps.., moved).for_each(drop);
        }
        "in_proj_z.weight" => values = heads(&values, d_v * row),
        "in_proj_a.weight" | "in_proj_b.weight" => values = heads(&values, row),
        "A_log" | "dt_bias" => values = heads(&values, 1),
        "out_proj.weight" => {
            values = values.chunks_exact(row).flat_map(|row| heads(row, d_v)).collect();
        }
        _ => {}
    }
    values
}
