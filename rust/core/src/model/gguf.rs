//! The model in a GGUF file: its config and tensors as a checkpoint of transformers has them.
//!
//! The numbers stay those of the file, see [`crate::files::Convention::Gguf`].

use crate::error::{Error, Result};
use crate::files::FileTensor;
use crate::files::gguf::{Gguf, Metadata, Value};
use serde_json::{Map, Value as Json, json};

const ARCHITECTURE: &str = "qwen35";

/// What config.json says of the same model.
pub fn config_json(gguf: &Gguf) -> Result<String> {
    let reader = Reader { metadata: &gguf.metadata };
    reader.check_architecture()?;
    let file = gguf.metadata.file();
    let tensor = |name: &str| gguf.tensors.iter().find(|t| t.name == name);
    if tensor("blk.0.attn_norm.weight").is_none() {
        return Err(Error::Unsupported(format!(
            "{file}: tensor `blk.0.attn_norm.weight` is missing; a file of the multi-token-prediction \
             module alone is no model, use the full file"
        )));
    }
    let embedding = tensor("token_embd.weight")
        .ok_or_else(|| Error::File(format!("{file}: tensor `token_embd.weight` is missing")))?;
    let &[vocab, _] = &embedding.shape[..] else {
        return Err(Error::File(format!(
            "{}: shape {:?}, expected [tokens, hidden]",
            embedding.place(),
            embedding.shape
        )));
    };

    let blocks = reader.count("block_count")?;
    let mtp = reader.count_or("nextn_predict_layers", 0)?;
    // One file has a block for each of these, and much else.
    let layers = blocks.checked_sub(mtp).filter(|n| *n > 0 && blocks <= gguf.tensors.len() as u64);
    let layers = layers.ok_or_else(|| {
        Error::File(format!(
            "{file}: `{ARCHITECTURE}.block_count` is {blocks}, \
             `{ARCHITECTURE}.nextn_predict_layers` {mtp}, of {} tensors",
            gguf.tensors.len()
        ))
    })?;
    let (values, inner) = (reader.count("ssm.time_step_rank")?, reader.count("ssm.inner_size")?);
    if values == 0 || !inner.is_multiple_of(values) {
        return Err(Error::File(format!(
            "{file}: `{ARCHITECTURE}.ssm.inner_size` is {inner}, expected a multiple of \
             `{ARCHITECTURE}.ssm.time_step_rank`, which is {values}"
        )));
    }
    let head_dim = reader.count("attention.key_length")?;
    let value_dim = reader.count_or("attention.value_length", head_dim)?;
    if value_dim != head_dim {
        return Err(Error::Unsupported(format!(
            "{file}: `{ARCHITECTURE}.attention.value_length` is {value_dim}, only that of the keys, \
             {head_dim}, is supported"
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
    set("rms_norm_eps", json!(reader.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6)));
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
/// layers: of the trunk. Tensors outside the blocks that the text model does not have, like those of
/// a vision tower, are left out. One inside a block is an error: it would change the result.
pub fn tensors(gguf: &Gguf, layers: usize) -> Result<Vec<FileTensor>> {
    let reader = Reader { metadata: &gguf.metadata };
    let blocks = reader.count("block_count")?;
    let own_ends = gguf.tensors.iter().any(|t| has_own_end(&t.name));
    let mut out: Vec<FileTensor> = Vec::with_capacity(gguf.tensors.len() + 1);
    for tensor in &gguf.tensors {
        let block = block(&tensor.name);
        if let Some((block, _)) = block
            && block as u64 >= blocks
        {
            return Err(Error::File(format!(
                "{}: expected no such block, `{ARCHITECTURE}.block_count` is {blocks}",
                tensor.place()
            )));
        }
        let in_trunk = block.is_some_and(|(block, _)| block < layers);
        if !in_trunk && block.is_some() && own_ends {
            // Not the module of this family; the text model runs without.
            continue;
        }
        match canonical_name(&tensor.name, layers) {
            Some(name) => {
                let mut shape = tensor.shape.clone();
                if name.ends_with("conv1d.weight") && shape.len() == 2 {
                    shape.insert(1, 1);
                }
                out.push(FileTensor { name, shape, ..tensor.clone() });
            }
            None if in_trunk => {
                return Err(Error::Unsupported(format!(
                    "{}: not part of the architecture {ARCHITECTURE}",
                    tensor.place()
                )));
            }
            None => {}
        }
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

/// Whether a tensor is an embedding or head of the multi-token-prediction module alone.
fn has_own_end(name: &str) -> bool {
    block(name).is_some_and(|(_, rest)| {
        rest.starts_with("nextn.embed_tokens.") || rest.starts_with("nextn.shared_head_head.")
    })
}

/// The block of a tensor, and its name there.
fn block(name: &str) -> Option<(usize, &str)> {
    let (digits, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = digits.parse().ok()?;
    // One spelling of each number.
    (block.to_string() == digits).then_some((block, rest))
}

/// The name of a tensor in a checkpoint without the prefix of the text model.
fn canonical_name(name: &str, layers: usize) -> Option<String> {
    let Some((block, rest)) = block(name) else {
        let (stem, end) = name.split_once('.')?;
        let (_, stem) = WHOLE.iter().find(|(gguf, _)| *gguf == stem)?;
        return Some(format!("{stem}.{end}"));
    };
    if let Some(rest) = rest.strip_prefix("nextn.") {
        let (stem, end) = rest.split_once('.').filter(|_| block >= layers)?;
        let (_, stem) = NEXTN.iter().find(|(gguf, _)| *gguf == stem)?;
        return Some(format!("mtp.{stem}.{end}"));
    }
    let prefix = match block.checked_sub(layers) {
        None => format!("layers.{block}"),
        Some(layer) => format!("mtp.layers.{layer}"),
    };
    match rest {
        "ssm_a" | "ssm_a.weight" => Some(format!("{prefix}.linear_attn.A_log")),
        "ssm_dt" | "ssm_dt.bias" | "ssm_dt.weight" => Some(format!("{prefix}.linear_attn.dt_bias")),
        _ => {
            let (stem, end) = rest.split_once('.')?;
            Some(format!("{prefix}.{}.{end}", canonical_stem(stem)?))
        }
    }
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
}

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> Result<Option<Value<'a>>> {
        self.metadata.get(&format!("{ARCHITECTURE}.{key}"))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::File(format!(
            "{}: `{ARCHITECTURE}.{key}` is {value}, expected {expected}",
            self.metadata.file()
        ))
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::Unsupported(format!("{}: {what}", self.metadata.file()))
    }

    fn check_architecture(&self) -> Result<()> {
        const KEY: &str = "general.architecture";
        let what = match self.metadata.get(KEY)? {
            Some(Value::Text(ARCHITECTURE)) => return Ok(()),
            Some(Value::Text("clip")) => {
                "a vision file (mmproj), which belongs beside a model; give the model's file"
                    .to_owned()
            }
            Some(Value::Text("qwen35moe")) => {
                format!("`{KEY}` is \"qwen35moe\", a mixture of experts, which is not supported")
            }
            Some(value) => {
                format!("`{KEY}` is {value}, only \"{ARCHITECTURE}\" (Qwen3.5) is supported")
            }
            None => {
                let file = self.metadata.file();
                return Err(Error::File(format!("{file}: `{KEY}` is missing")));
            }
        };
        Err(self.unsupported(&what))
    }

    fn count(&self, key: &str) -> Result<u64> {
        let key = format!("{ARCHITECTURE}.{key}");
        self.metadata
            .count(&key)?
            .ok_or_else(|| Error::File(format!("{}: `{key}` is missing", self.metadata.file())))
    }

    fn count_or(&self, key: &str, default: u64) -> Result<u64> {
        Ok(self.metadata.count(&format!("{ARCHITECTURE}.{key}"))?.unwrap_or(default))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        let float = match value {
            // The shortest decimal form of the f32, not its digits in f64.
            Value::Float(x) => (x as f32).to_string().parse().ok(),
            _ => value.count().map(|n| n as f64),
        };
        match float.filter(|x: &f64| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(key, &value, "a finite number")),
        }
    }

    /// One count, or one for each layer, which is 0 where there is no attention.
    fn kv_heads(&self) -> Result<u64> {
        const KEY: &str = "attention.head_count_kv";
        let value = self.get(KEY)?;
        let Some(Value::Array(counts)) = value else { return self.count(KEY) };
        let wrong = || self.wrong(KEY, &Value::Array(counts), "one count for all attention layers");
        let mut heads = None;
        for count in counts.iter() {
            let count = count?.count().ok_or_else(wrong)?;
            if count != 0 && *heads.get_or_insert(count) != count {
                return Err(wrong());
            }
        }
        heads.ok_or_else(wrong)
    }

    fn layer_types(&self, layers: u64) -> Result<Vec<&'static str>> {
        const KEY: &str = "attention.recurrent_layers";
        const INTERVAL: &str = "full_attention_interval";
        let name = |recurrent: bool| match recurrent {
            true => "linear_attention",
            false => "full_attention",
        };
        let Some(value) = self.get(KEY)? else {
            let interval = self.count_or(INTERVAL, 4)?;
            if interval == 0 {
                return Err(self.wrong(INTERVAL, &Value::Unsigned(0), "1 or more"));
            }
            return Ok((1..=layers).map(|i| name(!i.is_multiple_of(interval))).collect());
        };
        let wrong =
            || self.wrong(KEY, &value, &format!("true or false for each of {layers} layers"));
        let Value::Array(flags) = value else { return Err(wrong()) };
        if flags.len() < layers {
            return Err(wrong());
        }
        let flags = flags.iter().take(layers as usize).map(|flag| match flag? {
            Value::Bool(recurrent) => Ok(name(recurrent)),
            _ => Err(wrong()),
        });
        flags.collect()
    }

    fn rope(&self, head_dim: u64) -> Result<Map<String, Json>> {
        let mut rope = Map::new();
        let mut set = |key: &str, value: Json| rope.insert(key.to_owned(), value);
        set("rope_theta", json!(self.float("rope.freq_base")?.unwrap_or(1e7)));
        let dims = self.count_or("rope.dimension_count", head_dim / 4)?;
        let exact = dims as f64 / head_dim as f64;
        // Where the quotient rounds down the product with the head would be below a whole number.
        let short = ((head_dim as f64 * exact) as u64) < dims;
        set("partial_rotary_factor", json!(if short { exact.next_up() } else { exact }));
        if let Some(section) = self.sections()? {
            set("mrope_section", json!(section));
        }
        const TYPE: &str = "rope.scaling.type";
        match self.get(TYPE)? {
            None | Some(Value::Text("none")) => {}
            Some(Value::Text("yarn")) => {
                set("rope_type", json!("yarn"));
                set("factor", json!(self.float("rope.scaling.factor")?));
                let original = self.count("rope.scaling.original_context_length")?;
                set("original_max_position_embeddings", json!(original));
                set("beta_fast", json!(self.float("rope.scaling.yarn_beta_fast")?));
                set("beta_slow", json!(self.float("rope.scaling.yarn_beta_slow")?));
                self.refuse_yarn_factors()?;
            }
            Some(value) => {
                return Err(self.unsupported(&format!(
                    "`{ARCHITECTURE}.{TYPE}` is {value}, supported are \"none\" and \"yarn\""
                )));
            }
        }
        Ok(rope)
    }

    /// Three counts; some files add a fourth, 0.
    fn sections(&self) -> Result<Option<[u64; 3]>> {
        const KEY: &str = "rope.dimension_sections";
        let Some(value) = self.get(KEY)? else { return Ok(None) };
        let wrong = || self.wrong(KEY, &value, "three counts, and perhaps a 0");
        let Value::Array(sections) = value else { return Err(wrong()) };
        let mut counts = [0; 4];
        if !matches!(sections.len(), 3 | 4) {
            return Err(wrong());
        }
        for (count, section) in counts.iter_mut().zip(sections.iter()) {
            *count = section?.count().ok_or_else(wrong)?;
        }
        let [time, height, width, 0] = counts else { return Err(wrong()) };
        Ok(Some([time, height, width]))
    }

    /// Programs differ in what these mean beside the factor, or leave them alone.
    fn refuse_yarn_factors(&self) -> Result<()> {
        for (key, neutral) in
            [("attn_factor", 1.0), ("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)]
        {
            let key = format!("rope.scaling.{key}");
            if let Some(value) = self.float(&key)?
                && value != neutral
            {
                return Err(self.unsupported(&format!(
                    "`{ARCHITECTURE}.{key}` is {value}, only {neutral} is supported"
                )));
            }
        }
        let key = "rope.scaling.yarn_attn_factor";
        match self.float(key)? {
            None => Ok(()),
            Some(value) => Err(self.unsupported(&format!(
                "`{ARCHITECTURE}.{key}` is {value}, which programs understand differently; only \
                 files without it are supported"
            ))),
        }
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
            ("blk.3.nextn.eh_proj.weight", None),
            ("blk.03.attn_norm.weight", None),
            ("blk.+3.attn_norm.weight", None),
            ("blk.3.attn_norm", None),
            ("rope_freqs.weight", None),
            ("norm.weight", None),
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
