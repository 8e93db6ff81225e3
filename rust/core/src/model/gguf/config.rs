//! What a GGUF file's metadata says of the model, as the text of a config.json, which has one check.

use super::ARCHITECTURE;
use crate::error::{Error, Result};
use crate::files::gguf::{Gguf, Metadata, Value};
use serde_json::{Map, Value as Json, json};

/// What config.json says of the same model.
pub fn config_json(gguf: &Gguf) -> Result<String> {
    let reader = Reader { metadata: &gguf.metadata };
    reader.check_architecture()?;
    let tensor = |name: &str| gguf.tensors.iter().find(|t| t.name == name);
    if tensor("blk.0.attn_norm.weight").is_none() {
        return Err(reader.unsupported(
            "tensor `blk.0.attn_norm.weight` is missing; a file of the multi-token-prediction \
             module alone is no model, use the full file",
        ));
    }
    let Some(embedding) = tensor("token_embd.weight") else {
        return Err(reader.missing("tensor `token_embd.weight`"));
    };
    let &[vocab, _] = &embedding.shape[..] else {
        return Err(Error::File(format!(
            "{}: shape {:?}, expected [tokens, hidden]",
            embedding.place(),
            embedding.shape
        )));
    };
    let (layers, mtp) = reader.layers(gguf.tensors.len() as u64)?;
    let (value_heads, value_head_dim) = reader.value_heads()?;
    let head_dim = reader.head_dim()?;
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
    set("linear_num_value_heads", json!(value_heads));
    set("linear_key_head_dim", json!(reader.count("ssm.state_size")?));
    set("linear_value_head_dim", json!(value_head_dim));
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

/// Blocks of the file, those of the multi-token-prediction module included.
pub fn block_count(gguf: &Gguf) -> Result<usize> {
    let count = Reader { metadata: &gguf.metadata }.count("block_count")?;
    Ok(usize::try_from(count).unwrap_or(usize::MAX))
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

    fn missing(&self, what: &str) -> Error {
        Error::File(format!("{}: {what} is missing", self.metadata.file()))
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
            None => return Err(self.missing(&format!("`{KEY}`"))),
        };
        Err(self.unsupported(&what))
    }

    fn count(&self, key: &str) -> Result<u64> {
        let key = format!("{ARCHITECTURE}.{key}");
        self.metadata.count(&key)?.ok_or_else(|| self.missing(&format!("`{key}`")))
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

    /// Layers of the trunk, and of the multi-token-prediction module. tensors: of the file.
    fn layers(&self, tensors: u64) -> Result<(u64, u64)> {
        let blocks = self.count("block_count")?;
        let mtp = self.count_or("nextn_predict_layers", 0)?;
        // Each block has tensors, so that no number is larger than the file bears out.
        let layers = blocks.checked_sub(mtp).filter(|n| *n > 0 && blocks <= tensors);
        let layers = layers.ok_or_else(|| {
            Error::File(format!(
                "{}: `{ARCHITECTURE}.block_count` is {blocks}, \
                 `{ARCHITECTURE}.nextn_predict_layers` {mtp}, of {tensors} tensors",
                self.metadata.file()
            ))
        })?;
        Ok((layers, mtp))
    }

    /// Value heads of linear attention and their size.
    fn value_heads(&self) -> Result<(u64, u64)> {
        const INNER: &str = "ssm.inner_size";
        let (heads, inner) = (self.count("ssm.time_step_rank")?, self.count(INNER)?);
        if heads == 0 || !inner.is_multiple_of(heads) {
            let expected =
                format!("a multiple of `{ARCHITECTURE}.ssm.time_step_rank`, which is {heads}");
            return Err(self.wrong(INNER, &Value::Unsigned(inner), &expected));
        }
        Ok((heads, inner / heads))
    }

    /// Size of a head of full attention.
    fn head_dim(&self) -> Result<u64> {
        let keys = self.count("attention.key_length")?;
        let values = self.count_or("attention.value_length", keys)?;
        if values != keys {
            return Err(self.unsupported(&format!(
                "`{ARCHITECTURE}.attention.value_length` is {values}, only that of the keys, {keys}, \
                 is supported"
            )));
        }
        Ok(keys)
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

    /// Programs differ in what these mean beside the factor, and some pass over them.
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
