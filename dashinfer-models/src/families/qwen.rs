//! Qwen: the first generation, Qwen2 and Qwen2.5, and Qwen3.

use serde_json::json;

use super::{only, unsupported, windows};
use crate::{ConfigError, HfConfig, ModelSpec, TensorNames, dialect::Dialect, json::Object};

const FIRST_KEYS: Dialect =
    Dialect { head_dim: "kv_channels", max_positions: "seq_length", norm_eps: "layer_norm_epsilon", ..Dialect::LLAMA };

const FIRST_NAMES: TensorNames = TensorNames {
    embed: "transformer.wte",
    layers: "transformer.h",
    attention_norm: "ln_1",
    qkv: &["attn.c_attn"],
    attention_out: "attn.c_proj",
    mlp_norm: "ln_2",
    gate_up: &["mlp.w2", "mlp.w1"], // the second is the gate
    down: "mlp.c_proj",
    norm: "transformer.ln_f",
    ..TensorNames::LLAMA
};

/// The first generation: Llama with biases on q, k and v, by other names. <https://arxiv.org/abs/2309.16609>
///
/// Beyond `seq_length` tokens its own code stretches the rotary embedding with the sequence (`use_dynamic_ntk`) and scales queries by
/// their position (`use_logn_attn`). Here `seq_length` is the longest context, so that neither is ever meant.
pub(super) fn qwen(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    // The defaults of its config class.
    let config = config.with_defaults(json!({"kv_channels": 128, "no_bias": true, "rotary_emb_base": 10000}));
    let object = config.object();
    only(object, "scale_attn_weights", true)?;
    if let Some(part) = object.number("rotary_pct")?.filter(|part| *part != 1.0) {
        return Err(unsupported("rotary_pct", part, "1"));
    }
    let mut spec = config.llama_like_in(&FIRST_KEYS)?;
    // It counts gate and up together.
    if !spec.mlp.size.is_multiple_of(2) {
        return Err(ConfigError::value("intermediate_size", "an even number", spec.mlp.size));
    }
    spec.mlp.size /= 2;
    let bias = !object.flag("no_bias")?.unwrap_or(true);
    spec.mlp.bias = bias;
    spec.grouped().qkv_bias = true;
    spec.grouped().out_bias = bias;
    spec.ropes[0].theta = object.number("rotary_emb_base")?.unwrap_or(10000.0);
    spec.names = FIRST_NAMES;
    Ok(spec)
}

/// Llama with biases on q, k and v, and a window on some layers. Qwen2 and Qwen2.5. <https://arxiv.org/abs/2407.10671>
pub(super) fn qwen2(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    spec.grouped().qkv_bias = true;
    set_qwen_windows(&mut spec, config.object())?;
    Ok(spec)
}

/// Llama with an RMSNorm on each q and k head. <https://arxiv.org/abs/2505.09388>
pub(super) fn qwen3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let bias = config.object().flag("attention_bias")?.unwrap_or(false);
    spec.grouped().qkv_bias = bias;
    spec.grouped().out_bias = bias;
    spec.grouped().qk_norm = true;
    set_qwen_windows(&mut spec, config.object())?;
    Ok(spec)
}

/// `sliding_window` counts only with `use_sliding_window`. The windowed layers are those that `layer_types` names or, in
/// older configs, those from `max_window_layers` up.
fn set_qwen_windows(spec: &mut ModelSpec, config: Object<'_>) -> Result<(), ConfigError> {
    let in_use = config.flag("use_sliding_window")?.unwrap_or(false);
    let window = if in_use { config.count("sliding_window")? } else { None };
    if !windows::set_by_name(spec, config, window)? {
        let first = config.count("max_window_layers")?.unwrap_or(28); // the reference's default
        for layer in spec.layers.iter_mut().skip(first) {
            layer.window = window;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{attention_of, example, spec_of};

    #[test]
    fn the_first_generation_is_read_in_its_own_words() {
        let spec = spec_of("QWenLMHeadModel", json!({"rotary_emb_base": 1e6, "use_logn_attn": true}));
        let attention = attention_of(&spec);
        assert_eq!((spec.max_positions, spec.mlp.size, spec.ropes[0].theta), (8192, 11008, 1e6));
        assert_eq!(
            (attention.num_kv_heads, attention.head_dim, attention.qkv_bias, attention.out_bias),
            (32, 128, true, false)
        );
        let spec = spec_of("QWenLMHeadModel", json!({"no_bias": false}));
        assert!(spec.mlp.bias && attention_of(&spec).out_bias);
    }

    #[test]
    fn what_the_first_generation_could_mean_besides_is_refused() {
        let error = |changes: Value| example("QWenLMHeadModel", changes).to_spec().unwrap_err().to_string();
        assert_eq!(error(json!({"rotary_pct": 0.5})), "rotary_pct: 0.5 is not supported; supported: 1");
        assert_eq!(
            error(json!({"scale_attn_weights": false})),
            "scale_attn_weights: false is not supported; supported: true"
        );
        assert_eq!(error(json!({"intermediate_size": 7})), "intermediate_size: wanted an even number, found 7");
        assert_eq!(error(json!({"seq_length": null})), "seq_length: wanted a whole number, found nothing");
    }
}
