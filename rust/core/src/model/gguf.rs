//! The model in a GGUF file: its config and tensors as a checkpoint of transformers has them.

use super::config::LayerType;
use crate::error::{Error, Result};
use crate::files::FileTensor;
use crate::files::gguf::{Gguf, Metadata, Value};
use serde_json::{Map, Value as Json, json};

const ARCHITECTURE: &str = "qwen35";
/// Names of tensors that are beside the text model.
const IGNORED: [&str; 4] = ["v.", "mm.", "rope_freqs.", "per_layer"];

/// Whether a tensor of a file may be left out without changing the text model.
pub fn is_ignorable(name: &str) -> bool {
    IGNORED.iter().any(|prefix| name.starts_with(prefix))
}

/// What config.json says of the same model. file: for errors.
pub fn config_json(gguf: &Gguf, file: &str) -> Result<String> {
    let reader = Reader { metadata: &gguf.metadata, file };
    reader.check_architecture()?;
    let tensor = |name: &str| gguf.tensors.iter().find(|t| t.name == name);
    if tensor("blk.0.attn_norm.weight").is_none() && tensor("blk.0.attn_qkv.weight").is_none() {
        return Err(Error::Unsupported(format!(
            "{file}: has no layers; a file of the multi-token-prediction module alone is no model, \
             use the full file"
        )));
    }
    let embedding = tensor("token_embd.weight")
        .ok_or_else(|| Error::File(format!("{file}: tensor `token_embd.weight` is missing")))?;
    let &[vocab, _] = &embedding.shape[..] else {
        return Err(Error::File(format!("{}: no matrix", embedding.place())));
    };

    let blocks = reader.count("block_count")?;
    let mtp = reader.count_or("nextn_predict_layers", 0)?;
    let layers = blocks.checked_sub(mtp).filter(|n| *n > 0).ok_or_else(|| {
        Error::File(format!("{file}: `block_count` is {blocks}, `nextn_predict_layers` {mtp}"))
    })?;
    let (values, inner) = (reader.count("ssm.time_step_rank")?, reader.count("ssm.inner_size")?);
    if values == 0 || !inner.is_multiple_of(values) {
        return Err(Error::File(format!(
            "{file}: `ssm.inner_size` is {inner}, expected a multiple of `ssm.time_step_rank`, which \
             is {values}"
        )));
    }
    let head_dim = reader.count("attention.key_length")?;
    let value_dim = reader.count_or("attention.value_length", head_dim)?;
    if value_dim != head_dim {
        return Err(Error::Unsupported(format!(
            "{file}: `attention.value_length` is {value_dim}, only that of the keys, {head_dim}, is \
             supported"
        )));
    }
    let tied = tensor("output.weight").is_none();
    let mut text = Map::new();
    let mut set = |key: &str, value: Json| text.insert(key.to_owned(), value);
    set("model_type", json!("qwen3_5_text"));
    set("vocab_size", json!(vocab));
    set("hidden_size", json!(reader.count("embedding_length")?));
    set("intermediate_size", json!(reader.count("feed_forward_length")?));
    set("num_hidden_layers", json!(layers));
    set("num_attention_heads", json!(reader.count("attention.head_count")?));
    set("num_key_value_heads", json!(reader.kv_heads()?));
    set("head_dim", json!(head_dim));
    set("max_position_embeddings", json!(reader.count_or("context_length", 262_144)?));
    set("linear_conv_kernel_dim", json!(reader.count_or("ssm.conv_kernel", 4)?));
    set("linear_num_key_heads", json!(reader.count("ssm.group_count")?));
    set("linear_num_value_heads", json!(values));
    set("linear_key_head_dim", json!(reader.count("ssm.state_size")?));
    set("linear_value_head_dim", json!(inner / values));
    set("rms_norm_eps", json!(reader.float_or("attention.layer_norm_rms_epsilon", 1e-6)?));
    set("layer_types", json!(reader.layer_types(layers)?));
    set("rope_parameters", Json::Object(reader.rope(head_dim)?));
    set("mtp_num_hidden_layers", json!(mtp));
    set("tie_word_embeddings", json!(tied));
    let config = json!({
        "model_type": "qwen3_5", "tie_word_embeddings": tied, "text_config": text,
    });
    Ok(config.to_string())
}

/// The tensors under the names that checkpoints use, in the shapes that they have there.
///
/// layers: of the trunk; what has no such name keeps its own.
pub fn tensors(gguf: &Gguf, layers: usize) -> Result<Vec<FileTensor>> {
    let mut out = Vec::with_capacity(gguf.tensors.len() + 1);
    for tensor in &gguf.tensors {
        let mut tensor = tensor.clone();
        if tensor.name.contains(".nextn.embed_tokens") || tensor.name.contains("shared_head_head") {
            return Err(Error::Unsupported(format!(
                "{}: an embedding or head of its own for multi-token prediction is not supported",
                tensor.place()
            )));
        }
        if let Some(name) = canonical_name(&tensor.name, layers) {
            tensor.name = name;
        }
        if tensor.name.ends_with("conv1d.weight") && tensor.shape.len() == 2 {
            tensor.shape.insert(1, 1);
        }
        out.push(tensor);
    }
    let named = |name: &str| out.iter().find(|t| t.name == name);
    // Without a norm of its own the module uses that of the trunk.
    if named("mtp.fc.weight").is_some()
        && named("mtp.norm.weight").is_none()
        && let Some(norm) = named("norm.weight")
    {
        let norm = FileTensor { name: "mtp.norm.weight".to_owned(), ..norm.clone() };
        out.push(norm);
    }
    Ok(out)
}

/// The name of a tensor in a checkpoint without the prefix of the text model.
fn canonical_name(name: &str, layers: usize) -> Option<String> {
    for (gguf, canonical) in WHOLE {
        if let Some(rest) = name.strip_prefix(gguf).filter(|rest| rest.starts_with('.')) {
            return Some(format!("{canonical}{rest}"));
        }
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    if let Some(rest) = rest.strip_prefix("nextn.") {
        let (stem, end) = rest.split_once('.')?;
        let (_, stem) = NEXTN.iter().find(|(gguf, _)| *gguf == stem)?;
        return Some(format!("mtp.{stem}.{end}"));
    }
    let prefix = match layer.checked_sub(layers) {
        None => format!("layers.{layer}"),
        Some(layer) => format!("mtp.layers.{layer}"),
    };
    let (stem, end) = rest.split_once('.').unwrap_or((rest, ""));
    let name = match (stem, end) {
        ("ssm_a", "" | "weight") => "linear_attn.A_log",
        ("ssm_dt", "" | "bias" | "weight") => "linear_attn.dt_bias",
        (stem, end) => return Some(format!("{prefix}.{}.{end}", canonical_stem(stem)?)),
    };
    Some(format!("{prefix}.{name}"))
}

/// Names of a layer's tensors in GGUF files, and in checkpoints.
const STEMS: [(&str, &str); 18] = [
    ("attn_norm", "input_layernorm"),
    // What comes before the MLP, in spite of its name.
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_qkv", "linear_attn.in_proj_qkv"),
    ("attn_gate", "linear_attn.in_proj_z"),
    ("ssm_beta", "linear_attn.in_proj_b"),
    ("ssm_alpha", "linear_attn.in_proj_a"),
    ("ssm_conv1d", "linear_attn.conv1d"),
    ("ssm_norm", "linear_attn.norm"),
    ("ssm_out", "linear_attn.out_proj"),
];
/// Those of multi-token prediction beside its layer.
const NEXTN: [(&str, &str); 4] = [
    ("eh_proj", "fc"),
    ("enorm", "pre_fc_norm_embedding"),
    ("hnorm", "pre_fc_norm_hidden"),
    ("shared_head_norm", "norm"),
];
const WHOLE: [(&str, &str); 3] =
    [("token_embd", "embed_tokens"), ("output_norm", "norm"), ("output", "lm_head")];

fn canonical_stem(stem: &str) -> Option<&'static str> {
    STEMS.iter().find(|(gguf, _)| *gguf == stem).map(|(_, canonical)| *canonical)
}

/// The name in a GGUF file of a tensor of the text model or of multi-token prediction.
pub fn gguf_name(canonical: &str, layers: usize) -> String {
    let find = |table: &[(&'static str, &str)], stem: &str| {
        table.iter().find(|(_, canonical)| *canonical == stem).map(|(gguf, _)| *gguf)
    };
    let stem = canonical.strip_suffix(".weight").unwrap_or(canonical);
    let name = || {
        if let Some(name) = find(&WHOLE, stem) {
            return Some(format!("{name}.weight"));
        }
        let (first, rest) = match stem.strip_prefix("mtp.") {
            Some(rest) => match find(&NEXTN, rest) {
                Some(name) => return Some(format!("blk.{layers}.nextn.{name}.weight")),
                None => (layers, rest),
            },
            None => (0, stem),
        };
        let (layer, part) = rest.strip_prefix("layers.")?.split_once('.')?;
        let layer = first + layer.parse::<usize>().ok()?;
        Some(match part {
            "linear_attn.A_log" => format!("blk.{layer}.ssm_a"),
            "linear_attn.dt_bias" => format!("blk.{layer}.ssm_dt.bias"),
            part => format!("blk.{layer}.{}.weight", find(&STEMS, part)?),
        })
    };
    name().unwrap_or_else(|| canonical.to_owned())
}

/// Values of the architecture's keys.
struct Reader<'a> {
    metadata: &'a Metadata,
    file: &'a str,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Result<Option<Value>> {
        self.metadata.get(&format!("{ARCHITECTURE}.{key}"))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        let found: String = format!("{value:?}").chars().take(100).collect();
        Error::File(format!(
            "{}: `{ARCHITECTURE}.{key}` is {found}, expected {expected}",
            self.file
        ))
    }

    fn check_architecture(&self) -> Result<()> {
        let file = self.file;
        let unsupported = |what: &str| Err(Error::Unsupported(format!("{file}: {what}")));
        match self.metadata.get("general.architecture")? {
            Some(Value::Text(name)) => match name.as_str() {
                ARCHITECTURE => Ok(()),
                "clip" => unsupported(
                    "a vision file (mmproj), which belongs beside a model; give the model's file",
                ),
                "qwen35moe" => unsupported("a mixture of experts (qwen35moe) is not supported"),
                name => {
                    let name: String = name.chars().take(100).collect();
                    unsupported(&format!(
                        "`general.architecture` is {name:?}, only \"{ARCHITECTURE}\" (Qwen3.5, \
                         dense) is supported"
                    ))
                }
            },
            _ => Err(Error::File(format!("{file}: `general.architecture` is missing"))),
        }
    }

    fn count(&self, key: &str) -> Result<u64> {
        match self.get(key)? {
            Some(value) => value.count().ok_or_else(|| self.wrong(key, &value, "a count")),
            None => Err(Error::File(format!("{}: `{ARCHITECTURE}.{key}` is missing", self.file))),
        }
    }

    fn count_or(&self, key: &str, default: u64) -> Result<u64> {
        if self.get(key)?.is_some() { self.count(key) } else { Ok(default) }
    }

    fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key)? {
            None => Ok(default),
            // The shortest decimal form of the f32, not its digits in f64.
            Some(Value::Float(x)) => Ok((x as f32).to_string().parse().unwrap_or(x)),
            Some(value) => match value.count() {
                Some(n) => Ok(n as f64),
                None => Err(self.wrong(key, &value, "a number")),
            },
        }
    }

    /// One count, or one for each layer, which is 0 where there is no attention.
    fn kv_heads(&self) -> Result<u64> {
        const KEY: &str = "attention.head_count_kv";
        let Some(Value::Array(heads)) = self.get(KEY)? else { return self.count(KEY) };
        let counts: Vec<u64> = heads.iter().filter_map(Value::count).filter(|n| *n > 0).collect();
        match counts.first() {
            Some(first) if counts.iter().all(|n| n == first) => Ok(*first),
            _ => Err(self.wrong(KEY, &Value::Array(heads), "the same count for all attention")),
        }
    }

    fn layer_types(&self, layers: u64) -> Result<Vec<&'static str>> {
        let name = |layer: LayerType| match layer {
            LayerType::LinearAttention => "linear_attention",
            LayerType::FullAttention => "full_attention",
        };
        const KEY: &str = "attention.recurrent_layers";
        if let Some(value) = self.get(KEY)? {
            let Value::Array(flags) = &value else {
                return Err(self.wrong(KEY, &value, "a list"));
            };
            let kind = |flag: &Value| match flag {
                Value::Bool(true) => Some(name(LayerType::LinearAttention)),
                Value::Bool(false) => Some(name(LayerType::FullAttention)),
                _ => None,
            };
            let kinds: Option<Vec<_>> = flags.iter().take(layers as usize).map(kind).collect();
            return kinds.filter(|kinds| kinds.len() as u64 == layers).ok_or_else(|| {
                self.wrong(KEY, &value, &format!("true or false for each of {layers} layers"))
            });
        }
        let interval = self.count_or("full_attention_interval", 4)?;
        if interval == 0 || layers > 1 << 12 {
            return Err(Error::File(format!(
                "{}: {layers} layers with full attention in every {interval}th",
                self.file
            )));
        }
        let kind = |i: u64| match (i + 1).is_multiple_of(interval) {
            true => name(LayerType::FullAttention),
            false => name(LayerType::LinearAttention),
        };
        Ok((0..layers).map(kind).collect())
    }

    fn rope(&self, head_dim: u64) -> Result<Map<String, Json>> {
        let mut rope = Map::new();
        let mut set = |key: &str, value: Json| rope.insert(key.to_owned(), value);
        set("rope_theta", json!(self.float_or("rope.freq_base", 1e7)?));
        let dims = self.count_or("rope.dimension_count", head_dim / 4)?;
        let exact = dims as f64 / head_dim as f64;
        // Where the quotient rounds down the product with the head would be below a whole number.
        let short = ((head_dim as f64 * exact) as u64) < dims;
        set("partial_rotary_factor", json!(if short { exact.next_up() } else { exact }));
        const SECTIONS: &str = "rope.dimension_sections";
        if let Some(value) = self.get(SECTIONS)? {
            let Value::Array(sections) = &value else {
                return Err(self.wrong(SECTIONS, &value, "a list"));
            };
            let counts: Option<Vec<u64>> = sections.iter().map(Value::count).collect();
            match counts.as_deref() {
                Some([time, height, width] | [time, height, width, 0]) => {
                    set("mrope_section", json!([time, height, width]));
                }
                _ => return Err(self.wrong(SECTIONS, &value, "three counts, and 0")),
            }
        }
        match self.get("rope.scaling.type")? {
            None => {}
            Some(Value::Text(kind)) if kind == "none" => {}
            Some(Value::Text(kind)) if kind == "yarn" => {
                set("rope_type", json!("yarn"));
                set("factor", json!(self.float_or("rope.scaling.factor", 1.0)?));
                let original = self.count("rope.scaling.original_context_length")?;
                set("original_max_position_embeddings", json!(original));
            }
            Some(value) => {
                return Err(self.wrong("rope.scaling.type", &value, "\"none\" or \"yarn\""));
            }
        }
        Ok(rope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, canonical) in [
            ("token_embd.weight", Some("embed_tokens.weight")),
            ("output_norm.weight", Some("norm.weight")),
            ("output.weight", Some("lm_head.weight")),
            ("blk.0.ssm_a", Some("layers.0.linear_attn.A_log")),
            ("blk.7.ssm_dt.bias", Some("layers.7.linear_attn.dt_bias")),
            ("blk.7.ssm_dt", Some("layers.7.linear_attn.dt_bias")),
            ("blk.3.attn_output.weight", Some("layers.3.self_attn.o_proj.weight")),
            ("blk.3.ffn_up.scale", Some("layers.3.mlp.up_proj.scale")),
            ("blk.8.attn_norm.weight", Some("mtp.layers.0.input_layernorm.weight")),
            ("blk.8.nextn.eh_proj.weight", Some("mtp.fc.weight")),
            ("blk.8.nextn.shared_head_norm.weight", Some("mtp.norm.weight")),
            ("blk.x.attn_norm.weight", None),
            ("blk.1.ffn_gate_inp.weight", None),
            ("v.blk.0.ln1.weight", None),
        ] {
            assert_eq!(canonical_name(name, 8).as_deref(), canonical, "{name}");
            if let Some(canonical) =
                canonical.filter(|_| name.contains('.') && name != "blk.7.ssm_dt")
                && !name.ends_with(".scale")
            {
                assert_eq!(gguf_name(canonical, 8), name);
            }
        }
    }
}
