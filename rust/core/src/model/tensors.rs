//! The tensors of a model: names, shapes, and what they do.
//!
//! Names are canonical: text tensors without the prefix that checkpoints put before them
//! (`layers.0.mlp.up_proj.weight`), the others as `mtp.…` and `visual.…`. Shapes are slowest
//! axis first; a matrix is [outputs, inputs].

use crate::config::{Config, LayerType, VisionConfig};

/// What a tensor does, as far as its storage depends on it; see [`super::recipe`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// embed_tokens, which is the head too if the model is tied.
    Embedding,
    Head,
    MlpGate,
    MlpUp,
    MlpDown,
    /// in_proj_qkv, in_proj_z.
    LinearInput,
    /// in_proj_a, in_proj_b: decay and write strength.
    LinearGate,
    LinearOutput,
    Query,
    /// k_proj, v_proj.
    KeyValue,
    AttentionOutput,
    MtpInput,
    /// Norms, convolution taps, A_log, dt_bias.
    Small,
    Vision,
}

/// A tensor that a model has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorSpec {
    /// Canonical name.
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
}

impl TensorSpec {
    fn new(name: String, shape: &[usize], role: Role) -> TensorSpec {
        TensorSpec { name, shape: shape.to_vec(), role }
    }

    /// Number of elements, or None if 64 bits do not hold their bytes.
    pub fn elements(&self) -> Option<usize> {
        let elements = self.shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim))?;
        elements.checked_mul(4).map(|_| elements)
    }

    /// Rows and columns of a matrix; any other tensor is one row.
    pub fn rows_cols(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, self.shape.iter().product()),
        }
    }
}

/// Tensors of the text model, in the order of their use.
pub fn text_tensors(config: &Config) -> Vec<TensorSpec> {
    let (d, vocab) = (config.hidden_size, config.vocab_size);
    let mut out = Vec::new();
    out.push(TensorSpec::new("embed_tokens.weight".into(), &[vocab, d], Role::Embedding));
    for (i, layer) in config.layer_types.iter().enumerate() {
        layer_tensors(config, *layer, &format!("layers.{i}"), &mut out);
    }
    out.push(TensorSpec::new("norm.weight".into(), &[d], Role::Small));
    if !config.tie_word_embeddings {
        out.push(TensorSpec::new("lm_head.weight".into(), &[vocab, d], Role::Head));
    }
    out
}

fn layer_tensors(config: &Config, layer: LayerType, prefix: &str, out: &mut Vec<TensorSpec>) {
    let d = config.hidden_size;
    let mut add = |name: &str, shape: &[usize], role: Role| {
        out.push(TensorSpec::new(format!("{prefix}.{name}"), shape, role));
    };
    add("input_layernorm.weight", &[d], Role::Small);
    match layer {
        LayerType::LinearAttention => {
            let (h_v, d_v) = (config.linear_num_value_heads, config.linear_value_head_dim);
            let (conv, value) = (config.conv_dim(), config.value_dim());
            let taps = config.linear_conv_kernel_dim;
            add("linear_attn.in_proj_qkv.weight", &[conv, d], Role::LinearInput);
            add("linear_attn.in_proj_z.weight", &[value, d], Role::LinearInput);
            add("linear_attn.in_proj_b.weight", &[h_v, d], Role::LinearGate);
            add("linear_attn.in_proj_a.weight", &[h_v, d], Role::LinearGate);
            add("linear_attn.conv1d.weight", &[conv, 1, taps], Role::Small);
            add("linear_attn.A_log", &[h_v], Role::Small);
            add("linear_attn.dt_bias", &[h_v], Role::Small);
            add("linear_attn.norm.weight", &[d_v], Role::Small);
            add("linear_attn.out_proj.weight", &[d, value], Role::LinearOutput);
        }
        LayerType::FullAttention => {
            let head = config.head_dim;
            let (q, kv) = (config.num_attention_heads * head, config.num_key_value_heads * head);
            // q_proj holds query and gate of each head.
            add("self_attn.q_proj.weight", &[2 * q, d], Role::Query);
            add("self_attn.k_proj.weight", &[kv, d], Role::KeyValue);
            add("self_attn.v_proj.weight", &[kv, d], Role::KeyValue);
            add("self_attn.o_proj.weight", &[d, q], Role::AttentionOutput);
            add("self_attn.q_norm.weight", &[head], Role::Small);
            add("self_attn.k_norm.weight", &[head], Role::Small);
        }
    }
    let ff = config.intermediate_size;
    add("post_attention_layernorm.weight", &[d], Role::Small);
    add("mlp.gate_proj.weight", &[ff, d], Role::MlpGate);
    add("mlp.up_proj.weight", &[ff, d], Role::MlpUp);
    add("mlp.down_proj.weight", &[d, ff], Role::MlpDown);
}

/// Tensors of the module that predicts the token after the next; none if the config has none.
pub fn mtp_tensors(config: &Config) -> Vec<TensorSpec> {
    let mut out = Vec::new();
    if config.mtp_num_hidden_layers == 0 {
        return out;
    }
    let d = config.hidden_size;
    let norm = |name: &str| TensorSpec::new(format!("mtp.{name}.weight"), &[d], Role::Small);
    out.push(norm("pre_fc_norm_embedding"));
    out.push(norm("pre_fc_norm_hidden"));
    out.push(TensorSpec::new("mtp.fc.weight".into(), &[d, 2 * d], Role::MtpInput));
    for i in 0..config.mtp_num_hidden_layers {
        layer_tensors(config, LayerType::FullAttention, &format!("mtp.layers.{i}"), &mut out);
    }
    out.push(norm("norm"));
    out
}

/// Tensors of the vision tower.
pub fn vision_tensors(vision: &VisionConfig) -> Vec<TensorSpec> {
    let (h, ff) = (vision.hidden_size, vision.intermediate_size);
    let mut out = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        out.push(TensorSpec::new(format!("visual.{name}"), shape, Role::Vision));
    };
    let patch = vision.patch_size;
    let channels = vision.in_channels;
    let patches = [h, channels, vision.temporal_patch_size, patch, patch];
    add("patch_embed.proj.weight".into(), &patches);
    add("patch_embed.proj.bias".into(), &[h]);
    add("pos_embed.weight".into(), &[vision.num_position_embeddings, h]);
    for i in 0..vision.depth {
        let parts: [(&str, usize, Option<usize>); 6] = [
            ("norm1", h, None),
            ("attn.qkv", 3 * h, Some(h)),
            ("attn.proj", h, Some(h)),
            ("norm2", h, None),
            ("mlp.linear_fc1", ff, Some(h)),
            ("mlp.linear_fc2", h, Some(ff)),
        ];
        for (name, outputs, inputs) in parts {
            let weight: Vec<usize> = [Some(outputs), inputs].into_iter().flatten().collect();
            add(format!("blocks.{i}.{name}.weight"), &weight);
            add(format!("blocks.{i}.{name}.bias"), &[outputs]);
        }
    }
    // A square of patches becomes one token.
    let merged = vision.spatial_merge_size * vision.spatial_merge_size * h;
    let tokens = vision.out_hidden_size;
    add("merger.norm.weight".into(), &[h]);
    add("merger.norm.bias".into(), &[h]);
    add("merger.linear_fc1.weight".into(), &[merged, merged]);
    add("merger.linear_fc1.bias".into(), &[merged]);
    add("merger.linear_fc2.weight".into(), &[tokens, merged]);
    add("merger.linear_fc2.bias".into(), &[tokens]);
    out
}

/// The canonical form of a name as checkpoints spell it, whether or not the model has the tensor.
pub fn canonical_name(name: &str) -> String {
    const TEXT: [&str; 4] =
        ["model.language_model.", "language_model.model.", "language_model.", "model."];
    let rest = TEXT.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    match rest.strip_prefix("vision_tower.") {
        Some(rest) => format!("visual.{rest}"),
        None => rest.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published sizes: layers, hidden, mlp, heads, kv heads, value heads, tied; of the vision
    /// tower depth, hidden, heads, mlp; number of tensors, and parameters of each part.
    struct Size {
        text: (usize, usize, usize, usize, usize, usize, bool),
        vision: (usize, usize, usize, usize),
        tensors: [usize; 3],
        parameters: [usize; 3],
    }

    const SIZES: [Size; 4] = [
        Size {
            text: (24, 1024, 3584, 8, 2, 16, true),
            vision: (12, 768, 12, 3072),
            tensors: [320, 15, 153],
            parameters: [752_393_024, 20_452_864, 100_592_896],
        },
        Size {
            text: (24, 2048, 6144, 8, 2, 16, true),
            vision: (24, 1024, 16, 4096),
            tensors: [320, 15, 297],
            parameters: [1_881_825_088, 60_828_160, 331_416_576],
        },
        Size {
            text: (32, 2560, 9216, 16, 4, 32, true),
            vision: (24, 1024, 16, 4096),
            tensors: [426, 15, 297],
            parameters: [4_205_751_296, 120_599_552, 333_514_240],
        },
        Size {
            text: (32, 4096, 12288, 16, 4, 32, false),
            vision: (27, 1152, 16, 4304),
            tensors: [427, 15, 333],
            parameters: [8_953_803_264, 243_290_624, 456_010_480],
        },
    ];

    fn config(size: &Size) -> Config {
        let (layers, hidden, ff, heads, kv, values, tied) = size.text;
        let (depth, v_hidden, v_heads, v_ff) = size.vision;
        let json = format!(
            r#"{{"model_type": "qwen3_5", "text_config": {{"model_type": "qwen3_5_text",
            "hidden_size": {hidden}, "num_hidden_layers": {layers}, "intermediate_size": {ff},
            "num_attention_heads": {heads}, "num_key_value_heads": {kv}, "head_dim": 256,
            "vocab_size": 248320, "linear_num_key_heads": 16, "linear_num_value_heads": {values},
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "mtp_num_hidden_layers": 1,
            "tie_word_embeddings": {tied}, "rope_parameters": {{"rope_theta": 10000000,
            "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}}}},
            "vision_config": {{"depth": {depth}, "hidden_size": {v_hidden}, "num_heads": {v_heads},
            "intermediate_size": {v_ff}, "out_hidden_size": {hidden}}}}}"#
        );
        Config::from_json(&json, "config.json").expect("the published config is supported")
    }

    #[test]
    fn published_sizes() {
        for size in &SIZES {
            let config = config(size);
            let vision = config.vision.as_ref().expect("the config has a vision tower");
            let parts = [text_tensors(&config), mtp_tensors(&config), vision_tensors(vision)];
            assert_eq!(parts.each_ref().map(Vec::len), size.tensors);
            let parameters = parts.each_ref().map(|part| {
                part.iter().map(|t| t.elements().expect("the sizes are small")).sum::<usize>()
            });
            assert_eq!(parameters, size.parameters);
        }
    }

    #[test]
    fn spellings() {
        for (name, canonical) in [
            ("model.language_model.norm.weight", "norm.weight"),
            ("model.norm.weight", "norm.weight"),
            ("language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("model.visual.pos_embed.weight", "visual.pos_embed.weight"),
            ("visual.pos_embed.weight", "visual.pos_embed.weight"),
            ("vision_tower.pos_embed.weight", "visual.pos_embed.weight"),
            ("mtp.norm.weight", "mtp.norm.weight"),
        ] {
            assert_eq!(canonical_name(name), canonical);
        }
    }
}
