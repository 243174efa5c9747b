//! GLM-4 as `transformers` has it: pairs of neighbours are rotated, over half of each head.

use dashinfer_kernels::RopePairs;
use serde_json::json;

use crate::{ConfigError, HfConfig, ModelSpec, TensorNames, dialect::Dialect};

const KEYS: Dialect = Dialect { pairs: RopePairs::Interleaved, rotated: Some(0.5), ..Dialect::LLAMA };

/// GLM-4 of 2024: biases on q, k and v; gate and up in one matrix. <https://arxiv.org/abs/2406.12793>
pub(super) fn glm(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    // The defaults of the reference's class.
    let config = config.with_defaults(json!({
        "num_key_value_heads": 2, "head_dim": 128, "attention_bias": true, "rms_norm_eps": 1.5625e-7
    }));
    let mut spec = config.llama_like_in(&KEYS)?;
    spec.grouped().qkv_bias = config.object().flag("attention_bias")?.unwrap_or(false);
    spec.names = TensorNames { gate_up: &["mlp.gate_up_proj"], ..TensorNames::LLAMA };
    Ok(spec)
}

/// GLM-4 of 2025: the same, with norms behind attention and MLP too.
pub(super) fn glm4(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = glm(config)?;
    spec.post_norms = true;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::RopePairs;
    use serde_json::json;

    use super::super::tests::{attention_of, example, spec_of};

    #[test]
    fn half_of_each_head_is_rotated_unless_the_config_says_otherwise() {
        let rotated = |changes| {
            let spec = spec_of("GlmForCausalLM", changes);
            assert_eq!(spec.ropes[0].pairs, RopePairs::Interleaved);
            spec.ropes[0].rotary_dim
        };
        assert_eq!(rotated(json!({})), 64);
        assert_eq!(rotated(json!({"partial_rotary_factor": 0.25})), 32);
        assert_eq!(rotated(json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}})), 128);
        let error = |part| {
            let config = example("GlmForCausalLM", json!({"partial_rotary_factor": part}));
            config.to_spec().unwrap_err().to_string()
        };
        assert_eq!(error(1.5), "partial_rotary_factor: wanted above 0 and at most 1, found 1.5");
        assert_eq!(error(0.001), "head_dim: wanted an even number of rotated values, found 0");
    }

    #[test]
    fn biases_are_on_q_k_and_v_alone() {
        let biases = |changes| {
            let attention = attention_of(&spec_of("Glm4ForCausalLM", changes));
            (attention.qkv_bias, attention.out_bias)
        };
        assert_eq!(biases(json!({})), (true, false));
        assert_eq!(biases(json!({"attention_bias": false})), (false, false));
    }
}
