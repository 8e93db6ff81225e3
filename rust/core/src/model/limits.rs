//! What a config's sizes may come to together: a small file must not ask for absurd memory.
//!
//! Each size is checked as it is read, see [`super::config_json`].

use super::tensors::{mtp_tensors, text_tensors, vision_tensors};
use crate::config::{Config, LayerType, MOST_SIZE};
use crate::error::{Error, Result, readable};
use crate::layers::PIECE;
use crate::layers::block::Scratch;

/// No tensor has more elements, so that sizes computed from them cannot overflow.
const MOST_ELEMENTS: u64 = 1 << 40;
/// Nor have a session's recurrent states, 4 GiB. No tensor has their shape, so small files could
/// ask for any size. Those of the published 27B are less than a twentieth of it.
const MOST_STATE: u64 = 1 << 30;
/// No session has work buffers of more bytes. They hold hundreds of tokens, so that a model of few
/// hidden values and wide heads would take a thousand times its weights. The published 27B takes a
/// thirtieth.
const MOST_SCRATCH: usize = 4 << 30;

/// An error if a config's sizes are absurd together. file: named in errors.
pub(super) fn check(config: &Config, file: &str) -> Result<()> {
    let state = [
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        // As the kernels store it.
        config.linear_value_head_dim.next_multiple_of(16),
        config.layers_of(LayerType::LinearAttention),
    ];
    let elements = state.iter().try_fold(1u64, |n, size| n.checked_mul(*size as u64));
    if elements.is_none_or(|n| n > MOST_STATE) {
        return Err(Error::File(format!(
            "{file}: `linear_num_value_heads`, `linear_key_head_dim`, `linear_value_head_dim` \
             and its linear layers give the recurrent states the shape {state:?}, expected at \
             most {MOST_STATE} elements"
        )));
    }
    let vision = config.vision.as_ref().map(vision_tensors).unwrap_or_default();
    for tensor in text_tensors(config).iter().chain(&mtp_tensors(config)).chain(&vision) {
        if tensor.elements().is_none_or(|n| n as u64 > MOST_ELEMENTS) {
            return Err(Error::File(format!(
                "{file}: its sizes give tensor `{}` the shape {:?}, expected at most \
                 {MOST_ELEMENTS} elements",
                tensor.name, tensor.shape
            )));
        }
    }
    // The elements of tensors fit, so these products do not overflow.
    for (heads, dim, width) in [
        ("num_attention_heads", "head_dim", 2 * config.num_attention_heads * config.head_dim),
        ("linear_num_key_heads", "linear_key_head_dim", 2 * config.key_dim()),
        ("linear_num_value_heads", "linear_value_head_dim", config.value_dim()),
    ] {
        if width as u64 > MOST_SIZE {
            return Err(Error::File(format!(
                "{file}: `{heads}` and `{dim}` give rows of {width} values, expected at most \
                 {MOST_SIZE}"
            )));
        }
    }
    let scratch = Scratch::bytes_of(config, (PIECE, PIECE), 1, true);
    if scratch > MOST_SCRATCH {
        return Err(Error::File(format!(
            "{file}: its sizes give sessions work buffers of {}, expected at most {}",
            readable(scratch),
            readable(MOST_SCRATCH)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::config_json::tests::TINY;
    use super::*;

    fn refusal(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::from_json(TINY, "config.json").expect("the sample is supported");
        change(&mut config);
        check(&config, "config.json").expect_err("absurd sizes").to_string()
    }

    #[test]
    fn products_that_overflow() {
        let text = refusal(|config| {
            config.num_attention_heads = 1 << 21;
            config.head_dim = 1 << 21;
            config.hidden_size = 1 << 21;
        });
        assert!(text.contains("q_proj.weight` the shape [8796093022208, 2097152]"), "{text}");
    }

    #[test]
    fn states_that_no_tensor_bounds() {
        for (d_k, d_v) in [(1 << 19, 1 << 19), (1 << 21, 1 << 21)] {
            let text = refusal(|config| {
                config.linear_key_head_dim = d_k;
                config.linear_value_head_dim = d_v;
            });
            let shape = format!("recurrent states the shape [4, {d_k}, {d_v}, 3]");
            assert!(text.contains(&shape), "{text}");
        }
    }

    #[test]
    fn buffers_that_weights_do_not_bound() {
        type Change = fn(&mut Config);
        let changes: [(Change, &str); 5] = [
            (|c| c.num_attention_heads = 1 << 17, "`num_attention_heads` and `head_dim` give"),
            (|c| c.linear_num_value_heads = 1 << 20, "`linear_num_value_heads` and "),
            (
                |c| (c.linear_num_key_heads, c.linear_num_value_heads) = (1 << 19, 1 << 19),
                "`linear_num_key_heads` and ",
            ),
            (|c| c.num_attention_heads = 1 << 16, "work buffers of "),
            (|c| c.intermediate_size = 1 << 21, "work buffers of "),
        ];
        for (change, what) in changes {
            let text = refusal(change);
            assert!(text.contains(what), "{text}");
        }
    }
}
