//! The model in a GGUF file: its config and tensors as a checkpoint of transformers has them.
//!
//! The numbers stay those of the file, see [`crate::files::Convention::Gguf`].

mod config;

pub use self::config::config_json;

use crate::error::{Error, Result};
use crate::files::FileTensor;
use crate::files::gguf::Gguf;

const ARCHITECTURE: &str = "qwen35";

/// Names in GGUF files and canonical ones, without what follows the last point.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "embed_tokens"), ("output_norm", "norm"), ("output", "lm_head")];
/// Those of a block.
const IN_BLOCK: [(&str, &str); 18] = [
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
/// Whole names of a block, those that files spell differently more than once; the first counts.
const WHOLE_IN_BLOCK: [(&str, &str); 5] = [
    ("ssm_a", "linear_attn.A_log"),
    ("ssm_a.weight", "linear_attn.A_log"),
    ("ssm_dt.bias", "linear_attn.dt_bias"),
    ("ssm_dt", "linear_attn.dt_bias"),
    ("ssm_dt.weight", "linear_attn.dt_bias"),
];
/// Those of the multi-token-prediction module beside its layer.
const IN_MODULE: [(&str, &str); 4] = [
    ("nextn.eh_proj", "fc"),
    ("nextn.enorm", "pre_fc_norm_embedding"),
    ("nextn.hnorm", "pre_fc_norm_hidden"),
    ("nextn.shared_head_norm", "norm"),
];

/// The tensors that belong to the text model or its multi-token-prediction module, by their
/// canonical names, in the shapes that a checkpoint has.
///
/// layers: of the trunk. A tensor of a block that has no canonical name is an error, for it would
/// change the result. Others, like those of a vision tower, are left out.
pub fn tensors(gguf: &Gguf, layers: usize) -> Result<Vec<(String, FileTensor)>> {
    let blocks = config::block_count(gguf)?;
    // A module with an embedding or a head of its own is another; the text model runs without.
    let other_module = gguf.tensors.iter().any(|t| {
        block(&t.name).is_some_and(|(_, rest)| {
            rest.starts_with("nextn.embed_tokens.") || rest.starts_with("nextn.shared_head_head.")
        })
    });
    let mut out = Vec::with_capacity(gguf.tensors.len() + 1);
    for tensor in &gguf.tensors {
        let block = block(&tensor.name).map(|(block, _)| block);
        if block.is_some_and(|block| block >= blocks) {
            return Err(Error::File(format!(
                "{}: expected no such block, `{ARCHITECTURE}.block_count` is {blocks}",
                tensor.place()
            )));
        }
        let in_trunk = block.is_some_and(|block| block < layers);
        match canonical_name(&tensor.name, layers) {
            _ if other_module && block.is_some() && !in_trunk => {}
            Some(name) => {
                let mut tensor = tensor.clone();
                if name.ends_with("conv1d.weight") && tensor.shape.len() == 2 {
                    tensor.shape.insert(1, 1);
                }
                out.push((name, tensor));
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
    let named = |name: &str| out.iter().find(|(n, _)| n == name);
    // Without a norm of its own the module uses that of the trunk.
    if named("mtp.fc.weight").is_some()
        && named("mtp.norm.weight").is_none()
        && let Some((_, norm)) = named("norm.weight")
    {
        out.push(("mtp.norm.weight".to_owned(), norm.clone()));
    }
    Ok(out)
}

/// Whether a tensor outside the blocks, all of which are read or refused, has a known purpose: here,
/// or in a vision tower, a drafting module, or programs that store frequencies.
pub fn is_known(name: &str, layers: usize) -> bool {
    const OTHERS: [&str; 4] = ["v.", "mm.", "rope_freqs.", "nextn."];
    canonical_name(name, layers).is_some()
        || block(name).is_some()
        || OTHERS.iter().any(|start| name.starts_with(start))
}

/// The block of a tensor, and its name there.
fn block(name: &str) -> Option<(usize, &str)> {
    let (digits, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = digits.parse().ok()?;
    // One spelling of each number.
    (block.to_string() == digits).then_some((block, rest))
}

/// The canonical name of a tensor. layers: of the trunk.
fn canonical_name(name: &str, layers: usize) -> Option<String> {
    let find = |names: &[(&str, &'static str)], name: &str| {
        names.iter().find(|(gguf, _)| *gguf == name).map(|(_, canonical)| *canonical)
    };
    let Some((block, rest)) = block(name) else {
        let (stem, end) = name.rsplit_once('.')?;
        return Some(format!("{}.{end}", find(&OUTSIDE, stem)?));
    };
    let prefix = match block.checked_sub(layers) {
        None => format!("layers.{block}"),
        Some(layer) => format!("mtp.layers.{layer}"),
    };
    if let Some(name) = find(&WHOLE_IN_BLOCK, rest) {
        return Some(format!("{prefix}.{name}"));
    }
    let (stem, end) = rest.rsplit_once('.')?;
    match find(&IN_MODULE, stem) {
        Some(name) => (block >= layers).then(|| format!("mtp.{name}.{end}")),
        None => Some(format!("{prefix}.{}.{end}", find(&IN_BLOCK, stem)?)),
    }
}

/// What a GGUF file calls the tensor of this canonical name. layers: of the trunk.
///
/// Panics if it is none of the text model or its module.
pub fn gguf_name(canonical: &str, layers: usize) -> String {
    let find = |names: &[(&'static str, &str)], name: &str| {
        names.iter().find(|(_, canonical)| *canonical == name).map(|(gguf, _)| *gguf)
    };
    let with_end = |names: &[(&'static str, &str)], name: &str| {
        let (stem, end) = name.rsplit_once('.')?;
        Some(format!("{}.{end}", find(names, stem)?))
    };
    let name = || {
        let module = canonical.strip_prefix("mtp.");
        let rest = module.unwrap_or(canonical);
        let first = if module.is_some() { layers } else { 0 };
        let Some((layer, rest)) = rest.strip_prefix("layers.").and_then(|l| l.split_once('.'))
        else {
            return match module {
                Some(name) => Some(format!("blk.{layers}.{}", with_end(&IN_MODULE, name)?)),
                None => with_end(&OUTSIDE, rest),
            };
        };
        let block = first + layer.parse::<usize>().ok()?;
        let whole = find(&WHOLE_IN_BLOCK, rest).map(str::to_owned);
        Some(format!("blk.{block}.{}", whole.or_else(|| with_end(&IN_BLOCK, rest))?))
    };
    name().unwrap_or_else(|| panic!("{canonical} is no tensor of the text model"))
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
            if let Some(canonical) = canonical {
                let first = if name == "blk.7.ssm_dt" { "blk.7.ssm_dt.bias" } else { name };
                assert_eq!(gguf_name(canonical, 8), first);
            }
        }
    }
}
