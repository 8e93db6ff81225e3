//! What config.json says of a model, checked once.
//!
//! Accepted spellings: the full form with `text_config`, text-only re-saves with its fields at top
//! level, `rope_scaling` for `rope_parameters`, `type` for `rope_type`, rope fields at text level,
//! a missing `layer_types`. Everything that would change the arithmetic and is not supported is an
//! error.

use super::limits;
use crate::config::{Config, LayerType, MOST_SIZE, Rope, VisionConfig, most_yarn};
use crate::error::{Error, Result, json_text, short};
use crate::kernels::rope::Yarn;
use crate::quant::fp8::BLOCK;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// No number of layers is larger. It decides how much is allocated before a tensor was seen.
const MOST_LAYERS: u64 = 1 << 12;
/// Nor, or smaller, is a setting of YaRN: the paper has 32 and 1 for the betas, and up to 2.5 for the
/// attention factor.
const BETAS: RangeInclusive<f64> = 1e-3..=1e6;
const ATTENTION_FACTORS: RangeInclusive<f64> = 0.01..=100.0;

impl Config {
    /// Reads config.json. `file` is named in errors.
    pub fn from_json(text: &str, file: &str) -> Result<Config> {
        let json: Value = serde_json::from_str(text)
            .map_err(|e| Error::File(format!("{file}: not valid JSON: {}", json_text(&e))))?;
        let top = json
            .as_object()
            .ok_or_else(|| Error::File(format!("{file}: expected a JSON object")))?;
        let text = match top.get("text_config") {
            None | Some(Value::Null) => top,
            Some(Value::Object(text)) => text,
            Some(other) => return Err(wrong(file, "text_config", "an object", other)),
        };
        let reader = Reader { file, text };
        reader.refuse_unsupported(top)?;
        let fp8 = reader.fp8(top)?;

        let num_hidden_layers = reader.size_below("num_hidden_layers", MOST_LAYERS)?;
        let head_dim = reader.size("head_dim")?;
        let config = Config {
            hidden_size: reader.size("hidden_size")?,
            num_hidden_layers,
            intermediate_size: reader.size("intermediate_size")?,
            num_attention_heads: reader.size("num_attention_heads")?,
            num_key_value_heads: reader.size("num_key_value_heads")?,
            head_dim,
            vocab_size: reader.size("vocab_size")?,
            max_position_embeddings: reader.size_or("max_position_embeddings", 262_144)?,
            linear_conv_kernel_dim: reader.size_or("linear_conv_kernel_dim", 4)?,
            linear_num_key_heads: reader.size("linear_num_key_heads")?,
            linear_num_value_heads: reader.size("linear_num_value_heads")?,
            linear_key_head_dim: reader.size("linear_key_head_dim")?,
            linear_value_head_dim: reader.size("linear_value_head_dim")?,
            rms_norm_eps: reader.eps()?,
            tie_word_embeddings: reader.tied(top)?,
            layer_types: reader.layer_types(num_hidden_layers)?,
            rope: reader.rope(head_dim)?,
            mtp_num_hidden_layers: reader.count_or("mtp_num_hidden_layers", 0)?,
            vision: match top.get("vision_config") {
                None | Some(Value::Null) => None,
                Some(Value::Object(vision)) => Some(Reader { file, text: vision }.vision()?),
                Some(other) => return Err(wrong(file, "vision_config", "an object", other)),
            },
            fp8,
        };
        config.check_factors(file)?;
        limits::check(&config, file)?;
        Ok(config)
    }

    /// An error unless sizes divide each other as the layers need it.
    fn check_factors(&self, file: &str) -> Result<()> {
        let divides = |name: &str, n: usize, by_name: &str, by: usize| {
            if n.is_multiple_of(by) {
                Ok(())
            } else {
                Err(Error::File(format!(
                    "{file}: `{name}` is {n}, expected a multiple of `{by_name}`, which is {by}"
                )))
            }
        };
        divides(
            "num_attention_heads",
            self.num_attention_heads,
            "num_key_value_heads",
            self.num_key_value_heads,
        )?;
        divides(
            "linear_num_value_heads",
            self.linear_num_value_heads,
            "linear_num_key_heads",
            self.linear_num_key_heads,
        )?;
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::File(format!(
                "{file}: `head_dim` is {}, expected an even number",
                self.head_dim
            )));
        }
        if self.mtp_num_hidden_layers > 1 {
            return Err(Error::Unsupported(format!(
                "{file}: `mtp_num_hidden_layers` is {}, supported are 0 and 1",
                self.mtp_num_hidden_layers
            )));
        }
        Ok(())
    }
}

fn wrong(file: &str, key: &str, expected: &str, found: &Value) -> Error {
    Error::File(format!("{file}: `{key}` is {}, expected {expected}", shown(found)))
}

fn shown(value: &Value) -> String {
    short(&value.to_string())
}

/// Who quantised a checkpoint, and how, by the settings that it carries.
fn quantiser(settings: &Value) -> String {
    let word = |key: &str| settings.get(key).and_then(Value::as_str);
    let number = |key: &str| settings.get(key).and_then(Value::as_u64);
    let name = match word("quant_method") {
        Some("awq") => "for AWQ",
        Some("gptq") => "for GPTQ",
        Some("compressed-tensors") => "as compressed-tensors (vLLM, llm-compressor)",
        Some("fp8" | "fbgemm_fp8") => "to FP8",
        Some("bitsandbytes") => "by bitsandbytes",
        Some("modelopt") => "by NVIDIA ModelOpt",
        Some("auto-round" | "intel/auto-round") => "by AutoRound",
        Some("torchao") => "by torchao",
        Some("hqq") => "by HQQ",
        Some("quark") => "by AMD Quark",
        Some("mxfp4") => "to MXFP4",
        // MLX writes its settings without a method.
        None if number("group_size").is_some() && number("bits").is_some() => "for MLX",
        Some(_) | None => "by a program that is not known here",
    };
    let mut details = Vec::new();
    details.extend(word("format").or(word("fmt")).map(short));
    details.extend(number("bits").or(number("w_bit")).map(|bits| format!("{bits} bits")));
    details.extend(number("group_size").map(|size| format!("groups of {size}")));
    if let Some(block) = settings.get("weight_block_size").and_then(Value::as_array) {
        let sizes: Vec<String> = block.iter().take(2).map(shown).collect();
        details.push(format!("blocks of {}", sizes.join(" x ")));
    }
    let details: Vec<String> = details;
    if details.is_empty() { name.to_owned() } else { format!("{name}, {}", details.join(", ")) }
}

/// One object of the file.
struct Reader<'a> {
    file: &'a str,
    text: &'a Map<String, Value>,
}

impl Reader<'_> {
    /// The value of a key; null counts as missing.
    fn get(&self, key: &str) -> Option<&Value> {
        self.text.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.size_below(key, MOST_SIZE)
    }

    fn size_below(&self, key: &str, most: u64) -> Result<usize> {
        let value = self
            .get(key)
            .ok_or_else(|| Error::File(format!("{}: `{key}` is missing", self.file)))?;
        match value.as_u64() {
            Some(n) if (1..=most).contains(&n) => Ok(n as usize),
            _ => Err(wrong(self.file, key, &format!("an integer from 1 to {most}"), value)),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key) } else { Ok(default) }
    }

    fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.size_or(key, default),
        }
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_bool().ok_or_else(|| wrong(self.file, key, "true or false", value))
            }
        }
    }

    fn eps(&self) -> Result<f32> {
        let Some(value) = self.get("rms_norm_eps") else { return Ok(1e-6) };
        match value.as_f64() {
            Some(eps) if eps > 0.0 && eps < 1.0 && eps as f32 > 0.0 => Ok(eps as f32),
            _ => Err(wrong(self.file, "rms_norm_eps", "a number between 0 and 1", value)),
        }
    }

    /// The key is at both levels in published configs. Missing means false, as for the config class
    /// that writes them.
    fn tied(&self, top: &Map<String, Value>) -> Result<bool> {
        const KEY: &str = "tie_word_embeddings";
        let here = self.bool_or(KEY, false)?;
        let top = Reader { file: self.file, text: top };
        let at_top = top.bool_or(KEY, here)?;
        if self.get(KEY).is_some() && here != at_top {
            return Err(Error::File(format!(
                "{}: `{KEY}` is {at_top}, in `text_config` {here}, expected the same",
                self.file
            )));
        }
        Ok(at_top)
    }

    fn refuse_unsupported(&self, top: &Map<String, Value>) -> Result<()> {
        let file = self.file;
        let unsupported = |key: &str, value: &Value, supported: &str| {
            Err(Error::Unsupported(format!(
                "{file}: `{key}` is {}, only {supported} is supported",
                shown(value)
            )))
        };
        for object in [top, self.text] {
            if let Some(value) = object.get("model_type")
                && !matches!(value.as_str(), Some("qwen3_5" | "qwen3_5_text"))
            {
                return unsupported("model_type", value, "\"qwen3_5\" or \"qwen3_5_text\"");
            }
        }
        let fixed: [(&str, Value); 3] = [
            ("hidden_act", Value::from("silu")),
            ("attention_bias", Value::from(false)),
            ("attn_output_gate", Value::from(true)),
        ];
        for (key, only) in fixed {
            if let Some(value) = self.get(key)
                && *value != only
            {
                return unsupported(key, value, &only.to_string());
            }
        }
        if let Some(value) = self.get("mlp_only_layers")
            && value.as_array().is_none_or(|layers| !layers.is_empty())
        {
            return unsupported("mlp_only_layers", value, "[]");
        }
        if let Some(value) = self.get("num_experts")
            && value.as_u64() != Some(0)
        {
            return unsupported("num_experts", value, "a dense model");
        }
        if self.bool_or("mtp_use_dedicated_embeddings", false)? {
            return unsupported("mtp_use_dedicated_embeddings", &Value::from(true), "false");
        }
        Ok(())
    }

    /// Whether `quantization_config` says FP8 as it is supported; an error if it, or `quantization`,
    /// says something else.
    fn fp8(&self, top: &Map<String, Value>) -> Result<bool> {
        let mut fp8 = false;
        for object in [top, self.text] {
            for key in ["quantization_config", "quantization"] {
                let Some(settings) = object.get(key).filter(|value| !value.is_null()) else {
                    continue;
                };
                let unsupported = |what: String| {
                    Error::Unsupported(format!(
                        "{}: the checkpoint is already quantised, {} (`{key}`), {what}; use the \
                         original BF16 checkpoint, or a GGUF file of it",
                        self.file,
                        quantiser(settings)
                    ))
                };
                if settings.get("quant_method").and_then(Value::as_str) != Some("fp8") {
                    return Err(unsupported("which is not supported".to_owned()));
                }
                let blocks = Value::from(vec![BLOCK, BLOCK]);
                for (name, only, default) in [
                    ("weight_block_size", blocks, Value::Null),
                    ("fmt", "e4m3".into(), "e4m3".into()),
                    ("scale_fmt", "float".into(), "float".into()),
                    ("activation_scheme", "dynamic".into(), "dynamic".into()),
                ] {
                    let value = settings.get(name).filter(|v| !v.is_null()).unwrap_or(&default);
                    if *value != only {
                        return Err(unsupported(format!(
                            "its `{name}` is {}, only {only} is supported",
                            shown(value)
                        )));
                    }
                }
                fp8 = true;
            }
        }
        Ok(fp8)
    }

    fn layer_types(&self, layers: usize) -> Result<Vec<LayerType>> {
        let Some(value) = self.get("layer_types") else {
            let interval = self.size_or("full_attention_interval", 4)?;
            let full = |i: usize| (i + 1).is_multiple_of(interval);
            return Ok((0..layers)
                .map(
                    |i| if full(i) { LayerType::FullAttention } else { LayerType::LinearAttention },
                )
                .collect());
        };
        let types = value
            .as_array()
            .ok_or_else(|| wrong(self.file, "layer_types", "a list of names", value))?;
        if types.len() != layers {
            return Err(Error::File(format!(
                "{}: `layer_types` has {} entries, expected {layers} (`num_hidden_layers`)",
                self.file,
                types.len()
            )));
        }
        types
            .iter()
            .map(|name| match name.as_str() {
                Some("linear_attention") => Ok(LayerType::LinearAttention),
                Some("full_attention") => Ok(LayerType::FullAttention),
                _ => Err(Error::Unsupported(format!(
                    "{}: `layer_types` names {}, supported are \"linear_attention\" and \
                     \"full_attention\"",
                    self.file,
                    shown(name)
                ))),
            })
            .collect()
    }

    fn rope(&self, head_dim: usize) -> Result<Rope> {
        let file = self.file;
        let mut objects = Vec::new();
        for key in ["rope_parameters", "rope_scaling"] {
            match self.get(key) {
                None => {}
                Some(Value::Object(text)) => objects.push(Reader { file, text }),
                Some(other) => return Err(wrong(file, key, "an object", other)),
            }
        }
        let find = |key: &str| objects.iter().chain([self]).find_map(|object| object.get(key));
        let mut types = Vec::new();
        for object in &objects {
            if let Some(kind) = object.get("rope_type").or_else(|| object.get("type")) {
                types.push(match kind.as_str() {
                    Some("default" | "mrope") => "default",
                    Some("yarn") => "yarn",
                    _ => {
                        return Err(Error::Unsupported(format!(
                            "{file}: `rope_type` is {}, supported are \"default\" and \"yarn\"",
                            shown(kind)
                        )));
                    }
                });
            }
            if let Some(value) = object.get("mrope_interleaved")
                && value.as_bool() != Some(true)
            {
                return Err(Error::Unsupported(format!(
                    "{file}: `mrope_interleaved` is {}, only true is supported",
                    shown(value)
                )));
            }
        }
        if types.first() != types.last() {
            return Err(Error::File(format!(
                "{file}: `rope_type` is \"{}\" in `rope_parameters` and \"{}\" in `rope_scaling`, \
                 expected the same",
                types[0], types[1]
            )));
        }
        let number = |key: &str| match find(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
                _ => Err(wrong(file, key, "a positive number", value)),
            },
        };
        let theta = number("rope_theta")?.unwrap_or(10_000_000.0);
        if theta <= 1.0 {
            return Err(Error::File(format!("{file}: `rope_theta` is {theta}, expected above 1")));
        }
        let factor = number("partial_rotary_factor")?.unwrap_or(0.25);
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            return Err(Error::File(format!(
                "{file}: `partial_rotary_factor` is {factor}, expected an even number of \
                 dimensions of `head_dim` {head_dim}, found {rotary_dim}"
            )));
        }
        let yarn = match types.first() {
            Some(&"yarn") => Some(self.yarn(find, number)?),
            _ => None,
        };
        let Some(value) = find("mrope_section") else {
            // Of the published models. Without images all sections have the same positions.
            return Ok(Rope { theta, rotary_dim, mrope_section: [11, 11, 10], yarn });
        };
        let section: Option<Vec<usize>> = value.as_array().and_then(|section| {
            section.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        });
        let section: Option<[usize; 3]> = section.and_then(|section| section.try_into().ok());
        let sum = |section: &[usize; 3]| section.iter().try_fold(0usize, |a, n| a.checked_add(*n));
        match section {
            Some(mrope_section) if sum(&mrope_section) == Some(rotary_dim / 2) => {
                Ok(Rope { theta, rotary_dim, mrope_section, yarn })
            }
            _ => {
                let expected = format!("three counts that sum to {}", rotary_dim / 2);
                Err(wrong(file, "mrope_section", &expected, value))
            }
        }
    }

    /// The extension of the context. find, number: lookup of a rope field.
    fn yarn<'a>(
        &self,
        find: impl Fn(&str) -> Option<&'a Value>,
        number: impl Fn(&str) -> Result<Option<f64>>,
    ) -> Result<Yarn> {
        let file = self.file;
        let missing = |key: &str| {
            Error::File(format!("{file}: `{key}` is missing, which `rope_type` \"yarn\" needs"))
        };
        const ORIGINAL: &str = "original_max_position_embeddings";
        let original = find(ORIGINAL).ok_or_else(|| missing(ORIGINAL))?;
        let Some(original) = original.as_u64().filter(|n| (1..=MOST_SIZE).contains(n)) else {
            return Err(wrong(
                file,
                ORIGINAL,
                &format!("an integer from 1 to {MOST_SIZE}"),
                original,
            ));
        };
        let factor = number("factor")?.ok_or_else(|| missing("factor"))?;
        let most = most_yarn(original as usize);
        if !(1.0..=most).contains(&factor) {
            return Err(Error::File(format!(
                "{file}: `factor` is {factor}, expected a number from 1 to {most}"
            )));
        }
        if let Some(value) = find("truncate")
            && value.as_bool() != Some(true)
        {
            return Err(Error::Unsupported(format!(
                "{file}: `truncate` is {}, only true is supported",
                shown(value)
            )));
        }
        let mut yarn = Yarn::new(factor, original as usize);
        let within = |key: &str, x: f64, range: RangeInclusive<f64>| {
            let (least, most) = (range.start(), range.end());
            match range.contains(&x) {
                true => Ok(x),
                false => Err(Error::File(format!(
                    "{file}: `{key}` is {x:e}, expected a number from {least} to {most}"
                ))),
            }
        };
        let beta = |key: &str, usual: f64| within(key, number(key)?.unwrap_or(usual), BETAS);
        yarn.beta_fast = beta("beta_fast", yarn.beta_fast)?;
        yarn.beta_slow = beta("beta_slow", yarn.beta_slow)?;
        if yarn.beta_fast <= yarn.beta_slow {
            return Err(Error::File(format!(
                "{file}: `beta_fast` is {}, expected more than `beta_slow`, which is {}",
                yarn.beta_fast, yarn.beta_slow
            )));
        }
        let scales = (number("mscale")?, number("mscale_all_dim")?);
        let attention_factor = match (number("attention_factor")?, scales) {
            (Some(given), _) => given,
            (None, (None, None)) => yarn.attention_factor,
            (None, (Some(mscale), Some(all))) => {
                Yarn::scale(factor, mscale) / Yarn::scale(factor, all)
            }
            (None, (mscale, _)) => {
                let (here, other) = match mscale {
                    Some(_) => ("mscale", "mscale_all_dim"),
                    None => ("mscale_all_dim", "mscale"),
                };
                return Err(Error::Unsupported(format!(
                    "{file}: `{here}` without `{other}`, which programs understand differently; \
                     give both, or `attention_factor`"
                )));
            }
        };
        yarn.attention_factor = within("attention_factor", attention_factor, ATTENTION_FACTORS)?;
        Ok(yarn)
    }

    fn vision(&self) -> Result<VisionConfig> {
        if let Some(value) = self.get("deepstack_visual_indexes")
            && value.as_array().is_none_or(|layers| !layers.is_empty())
        {
            return Err(Error::Unsupported(format!(
                "{}: `deepstack_visual_indexes` is {}, only [] is supported",
                self.file,
                shown(value)
            )));
        }
        Ok(VisionConfig {
            depth: self.size_below("depth", MOST_LAYERS)?,
            hidden_size: self.size("hidden_size")?,
            intermediate_size: self.size("intermediate_size")?,
            num_heads: self.size("num_heads")?,
            out_hidden_size: self.size("out_hidden_size")?,
            in_channels: self.size_or("in_channels", 3)?,
            patch_size: self.size_or("patch_size", 16)?,
            temporal_patch_size: self.size_or("temporal_patch_size", 2)?,
            spatial_merge_size: self.size_or("spatial_merge_size", 2)?,
            num_position_embeddings: self.size_or("num_position_embeddings", 2304)?,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub const TINY: &str = r#"{"model_type": "qwen3_5_text", "hidden_size": 8, "num_hidden_layers": 4,
        "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "vocab_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 4, "linear_value_head_dim": 4, "tie_word_embeddings": true,
        "rope_theta": 1e7, "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}"#;

    fn with(key: &str, value: &str) -> Result<Config> {
        let mut json: Value = serde_json::from_str(TINY).expect("the sample is valid");
        json[key] = serde_json::from_str(value).expect("the value is valid");
        Config::from_json(&json.to_string(), "config.json")
    }

    #[test]
    fn text_only_spelling() {
        let config = Config::from_json(TINY, "config.json").expect("the sample is supported");
        let rope = Rope { theta: 1e7, rotary_dim: 8, mrope_section: [2, 1, 1], yarn: None };
        assert_eq!(config.rope, rope);
        assert_eq!(config.layer_types[3], LayerType::FullAttention);
        assert_eq!(config.layers_of(LayerType::LinearAttention), 3);
        assert_eq!(config.conv_dim(), 32);
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (key, value) in [
            ("hidden_size", "0"),
            ("hidden_size", "-3"),
            ("vocab_size", "1e30"),
            ("num_hidden_layers", "\"4\""),
            ("num_key_value_heads", "3"),
            ("linear_num_value_heads", "3"),
            ("hidden_act", "\"gelu\""),
            ("attention_bias", "true"),
            ("attn_output_gate", "false"),
            ("layer_types", "[\"linear_attention\"]"),
            ("layer_types", "[\"a\", \"b\", \"c\", \"d\"]"),
            ("rms_norm_eps", "-1"),
            ("partial_rotary_factor", "0.01"),
            ("partial_rotary_factor", "2"),
            ("rope_theta", "-1"),
            ("rope_theta", "\"1\""),
            ("rope_theta", "1"),
            ("head_dim", "15"),
            ("head_dim", "null"),
            ("rope_parameters", "[]"),
            ("rope_parameters", "{\"mrope_interleaved\": false}"),
            ("rope_parameters", "{\"mrope_section\": [2, 1]}"),
            ("rope_parameters", "{\"mrope_section\": [2, 1, 1, \"x\"]}"),
            ("rope_parameters", "{\"mrope_section\": [2, 2, 1]}"),
            ("rope_parameters", "{\"mrope_section\": [18446744073709551615, 4, 1]}"),
            ("rope_parameters", "{\"rope_type\": \"yarn\", \"factor\": 4.0}"),
            ("rope_parameters", "{\"rope_type\": \"linear\"}"),
            ("rope_scaling", "{\"type\": \"linear\"}"),
            ("num_hidden_layers", "100000"),
            ("full_attention_interval", "0"),
            ("tie_word_embeddings", "1"),
            ("text_config", "[]"),
            ("vision_config", "3"),
            ("vision_config", "{\"depth\": 1000000}"),
            ("quantization", "{\"bits\": 4}"),
            ("num_experts", "8"),
            ("quantization_config", "{\"quant_method\": \"fp8\"}"),
            ("model_type", "\"llama\""),
            ("mtp_num_hidden_layers", "2"),
        ] {
            let error = with(key, value).expect_err(key).to_string();
            assert!(error.starts_with("config.json: "), "{key}: {error}");
            let inner = ["rope_parameters", "rope_scaling", "vision_config"];
            assert!(error.contains(key) || inner.contains(&key), "{key}: {error}");
        }
    }

    #[test]
    fn who_quantised_a_checkpoint() {
        for (settings, name) in [
            (
                r#"{"quant_method": "awq", "bits": 4, "group_size": 128}"#,
                "for AWQ, 4 bits, groups of 128",
            ),
            (r#"{"quant_method": "gptq", "bits": 8}"#, "for GPTQ, 8 bits"),
            (
                r#"{"quant_method": "compressed-tensors", "format": "pack-quantized"}"#,
                "as compressed-tensors (vLLM, llm-compressor), pack-quantized",
            ),
            (
                r#"{"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 128]}"#,
                "to FP8, e4m3, blocks of 64 x 128",
            ),
            (r#"{"group_size": 64, "bits": 4}"#, "for MLX, 4 bits, groups of 64"),
            (r#"{"quant_method": "new"}"#, "by a program that is not known here"),
            ("[]", "by a program that is not known here"),
        ] {
            let error = with("quantization_config", settings).expect_err(settings).to_string();
            let expected = format!(
                "config.json: the checkpoint is already quantised, {name} (`quantization_config`), "
            );
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    #[test]
    fn fp8_as_it_is_released() {
        let mut settings = serde_json::json!({"quant_method": "fp8", "fmt": "e4m3",
            "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"]});
        assert!(!with("quantization_config", "null").expect("floats").fp8);
        assert!(with("quantization_config", &settings.to_string()).expect("FP8").fp8);
        for (key, value) in [
            ("activation_scheme", Value::from("static")),
            ("fmt", Value::from("e5m2")),
            ("scale_fmt", Value::from("ue8m0")),
            ("weight_block_size", Value::Null),
            ("weight_block_size", Value::from(vec![128])),
        ] {
            let before = settings[key].take();
            settings[key] = value.clone();
            let error = with("quantization_config", &settings.to_string()).expect_err(key);
            let expected = format!("its `{key}` is {value}, only ");
            assert!(error.to_string().contains(&expected), "{error}");
            settings[key] = before;
        }
    }

    fn with_yarn(key: &str, value: &str) -> Result<Config> {
        let mut rope = serde_json::json!({"type": "yarn", "mrope_section": [2, 1, 1],
            "factor": 4.0, "original_max_position_embeddings": 262_144});
        rope[key] = serde_json::from_str(value).expect("the value is valid");
        with("rope_scaling", &rope.to_string())
    }

    #[test]
    fn yarn_of_a_config() {
        let yarn = |key, value| with_yarn(key, value).expect(key).rope.yarn.expect("a yarn config");
        let plain = yarn("type", "\"yarn\"");
        assert_eq!(plain, Yarn::new(4.0, 262_144));
        assert_eq!(yarn("beta_fast", "16").beta_fast, 16.0);
        assert_eq!(yarn("beta_slow", "2.5").beta_slow, 2.5);
        assert_eq!(yarn("attention_factor", "1.5").attention_factor, 1.5);
        assert_eq!(with_yarn("factor", "3.5").expect("a factor").context(), 917_504);
        assert_eq!(with_yarn("type", "null").expect("no type").rope.yarn, None);

        let mut json: Value = serde_json::from_str(TINY).expect("the sample is valid");
        json["rope_scaling"] = serde_json::json!({"type": "yarn", "mrope_section": [2, 1, 1],
            "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 2.0,
            "mscale_all_dim": 0.5});
        let config = Config::from_json(&json.to_string(), "config.json").expect("two scales");
        let factor = config.rope.yarn.expect("a yarn config").attention_factor;
        let log = 4f64.ln();
        assert!((factor - (0.2 * log + 1.0) / (0.05 * log + 1.0)).abs() < 1e-15);
        for (mscale, all) in [(1e300, 1.0), (1.0, 1e300)] {
            json["rope_scaling"]["mscale"] = Value::from(mscale);
            json["rope_scaling"]["mscale_all_dim"] = Value::from(all);
            json["rope_scaling"]["factor"] = Value::from(8192.0);
            let error = Config::from_json(&json.to_string(), "config.json");
            let error = error.expect_err("absurd scales").to_string();
            assert!(error.contains("`attention_factor` is "), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_with_yarn_is_named() {
        for (key, value) in [
            ("factor", "0.99"),
            ("factor", "-4"),
            ("factor", "8.01"),
            ("factor", "\"4\""),
            ("factor", "null"),
            ("original_max_position_embeddings", "null"),
            ("original_max_position_embeddings", "0"),
            ("original_max_position_embeddings", "262144.5"),
            ("beta_fast", "1"),
            ("beta_slow", "0"),
            ("beta_fast", "1e7"),
            ("beta_slow", "1e-310"),
            ("attention_factor", "0"),
            ("attention_factor", "1e300"),
            ("attention_factor", "1e-300"),
            ("attention_factor", "\"NaN\""),
            ("truncate", "false"),
            ("mscale", "1"),
            ("mscale_all_dim", "1"),
        ] {
            let error = with_yarn(key, value).expect_err(key).to_string();
            assert!(error.starts_with("config.json: "), "{key}: {error}");
            assert!(error.contains(key), "{key}: {error}");
        }
        let both = "{\"rope_type\": \"yarn\", \"factor\": 4.0}";
        let error = with("rope_parameters", both).expect_err("rope_scaling differs").to_string();
        assert!(error.contains("\"yarn\" in `rope_parameters` and \"default\""), "{error}");
    }

    #[test]
    fn yarn_by_option() {
        let config = with("max_position_embeddings", "262144").expect("a valid config");
        assert_eq!(config.context(), 262_144);
        let extended = config.clone().with_yarn(2.0).expect("a factor");
        assert_eq!(extended.context(), 524_288);
        assert_eq!(extended.rope.yarn, Some(Yarn::new(2.0, 262_144)));
        assert_eq!(extended.with_yarn(1.0).expect("a factor"), config);
        let asked = with_yarn("attention_factor", "1.5").expect("a valid config");
        let asked = asked.with_yarn(3.0).expect("a factor");
        assert_eq!(asked.rope.yarn, Some(Yarn::new(3.0, 262_144)));
        assert_eq!(asked.context(), 786_432);
        for factor in [0.5, -1.0, 8.5, f64::NAN, f64::INFINITY] {
            let error = config.clone().with_yarn(factor).expect_err("a bad factor").to_string();
            assert!(error.contains("expected a factor from 1 to 8"), "{error}");
        }
    }

    #[test]
    fn messages_have_an_end() {
        let long = "\u{1b}[2J\u{202e}x".repeat(100_000);
        let json = Value::from(long).to_string();
        for key in ["hidden_size", "hidden_act", "model_type", "layer_types", "tie_word_embeddings"]
        {
            let value =
                if key == "layer_types" { &format!("[{}]", [&*json; 4].join(",")) } else { &json };
            let error = with(key, value).expect_err(key).to_string();
            assert!(error.len() < 500 && !error.contains(['\u{1b}', '\u{202e}']), "{error}");
        }
        for (method, key) in [
            ("fp8", "weight_block_size"),
            ("fp8", "fmt"),
            ("fp8", "activation_scheme"),
            ("awq", "weight_block_size"),
            ("awq", "format"),
        ] {
            let settings = format!(
                r#"{{"quant_method": "{method}", "weight_block_size": [128, 128],
                "{key}": [{json}, {json}]}}"#
            );
            let error = with("quantization_config", &settings).expect_err(key).to_string();
            assert!(error.len() < 1200 && !error.contains(['\u{1b}', '\u{202e}']), "{error}");
        }
    }

    #[test]
    fn tied_at_two_levels() {
        let tied = |top: &str, text: &str| {
            let mut inner: Value = serde_json::from_str(TINY).expect("the sample is valid");
            inner["tie_word_embeddings"] = serde_json::from_str(text).expect("the value is valid");
            let json = format!(
                r#"{{"model_type": "qwen3_5", "tie_word_embeddings": {top},
                "text_config": {inner}}}"#
            );
            Config::from_json(&json, "config.json").map(|config| config.tie_word_embeddings)
        };
        for (top, text, expected) in [
            ("true", "true", true),
            ("true", "null", true),
            ("null", "true", true),
            ("false", "null", false),
            ("null", "null", false),
        ] {
            assert_eq!(tied(top, text).expect("the levels agree"), expected, "{top} {text}");
        }
        for (top, text) in [("true", "false"), ("false", "true")] {
            let error = tied(top, text).expect_err("the levels disagree").to_string();
            assert!(error.ends_with("expected the same"), "{error}");
        }
    }
}
