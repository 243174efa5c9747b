//! GLM-4 as `transformers` has it: half of each head is rotated, in pairs of neighbours, or of halves where there are experts.

use dashinfer_kernels::{ExpertGroups, GroupScore, RopePairs, Routing, Scoring};
use serde_json::json;

use super::deepseek;
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

/// GLM-4.5: experts as DeepSeek-V3 has them, behind grouped-query attention. <https://arxiv.org/abs/2508.06471>
pub(super) fn glm4_moe(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let keys = Dialect { pairs: RopePairs::Halves, ..KEYS };
    let mut spec = config.llama_like_in(&keys)?;
    let config = config.object();
    let attention = spec.grouped();
    attention.qkv_bias = config.flag("attention_bias")?.unwrap_or(false);
    attention.qk_norm = config.flag("use_qk_norm")?.unwrap_or(false);
    // What is absent is the reference's default.
    let groups = Some(ExpertGroups {
        num_groups: config.count("n_group")?.unwrap_or(1),
        top_groups: config.count("topk_group")?.unwrap_or(1),
        score: GroupScore::TopTwo,
    });
    let normalize = config.flag("norm_topk_prob")?.unwrap_or(true);
    let scale = config.number("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    let routing =
        |num_experts, top_k| Routing { num_experts, top_k, scoring: Scoring::Sigmoid, groups, normalize, scale };
    deepseek::set_experts(&mut spec, config, 1, routing)?;
    if let Some(experts) = &mut spec.experts {
        experts.correction = true;
    }
    spec.names.experts = deepseek::EXPERT_NAMES;
    spec.extra_layers = config.count("num_nextn_predict_layers")?.unwrap_or(1);
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
    fn experts_are_behind_the_first_layer() {
        let spec = spec_of("Glm4MoeForCausalLM", json!({"first_k_dense_replace": null, "num_hidden_layers": 3}));
        assert_eq!(spec.layers.iter().map(|layer| layer.experts).collect::<Vec<_>>(), [false, true, true]);
        assert_eq!((spec.ropes[0].pairs, spec.ropes[0].rotary_dim), (RopePairs::Halves, 64));
        let dense = spec_of("Glm4MoeForCausalLM", json!({"first_k_dense_replace": 46}));
        assert_eq!(dense.experts, None);
        let attention = attention_of(&spec_of("Glm4MoeForCausalLM", json!({"use_qk_norm": true})));
        assert!(attention.qk_norm && attention.qkv_bias && !attention.out_bias);
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
