//! The families, as data: what sets each one apart from plain Llama.

mod deepseek;
mod experts;
mod llama;
mod qwen;

use crate::{ConfigError, HfConfig, ModelSpec};

/// Reads a family's config.
pub type ToSpec = fn(&HfConfig) -> Result<ModelSpec, ConfigError>;

/// Every decoder family, by the `architectures` entry of its `config.json`.
pub static FAMILIES: &[(&str, ToSpec)] = &[
    ("DeepseekV2ForCausalLM", deepseek::deepseek_v2),
    ("DeepseekV3ForCausalLM", deepseek::deepseek_v3),
    ("LlamaForCausalLM", llama::llama),
    ("MistralForCausalLM", llama::mistral),
    ("Qwen2ForCausalLM", qwen::qwen2),
    ("Qwen3ForCausalLM", qwen::qwen3),
    ("MixtralForCausalLM", experts::mixtral),
    ("Qwen2MoeForCausalLM", experts::qwen2_moe),
    ("Qwen3MoeForCausalLM", experts::qwen3_moe),
];

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use crate::{GroupedAttention, config::tests::config};

    /// The window of each layer.
    pub(super) fn windows(architecture: &str, changes: Value) -> Vec<Option<usize>> {
        let spec = config(architecture, changes).to_spec().unwrap();
        spec.layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn families_differ_in_biases_and_norms() {
        let facts = |architecture, changes| {
            let mut spec = config(architecture, changes).to_spec().unwrap();
            let &mut GroupedAttention { qkv_bias, out_bias, qk_norm, .. } = spec.grouped();
            (qkv_bias, out_bias, qk_norm, spec.mlp.bias)
        };
        assert_eq!(facts("LlamaForCausalLM", json!({})), (false, false, false, false));
        assert_eq!(facts("LlamaForCausalLM", json!({"attention_bias": true})), (true, true, false, false));
        assert_eq!(facts("LlamaForCausalLM", json!({"mlp_bias": true})), (false, false, false, true));
        assert_eq!(facts("MistralForCausalLM", json!({"attention_bias": true})), (false, false, false, false));
        assert_eq!(facts("Qwen2ForCausalLM", json!({})), (true, false, false, false));
        assert_eq!(facts("Qwen3ForCausalLM", json!({})), (false, false, true, false));
        assert_eq!(facts("Qwen3ForCausalLM", json!({"attention_bias": true})), (true, true, true, false));
    }

    #[test]
    fn mistrals_window_is_on_every_layer() {
        assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": 16})), [Some(16); 4]);
        assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": null})), [None; 4]);
        assert_eq!(windows("MistralForCausalLM", json!({})), [Some(4096); 4]);
    }

    #[test]
    fn llama_has_no_window() {
        assert_eq!(windows("LlamaForCausalLM", json!({"sliding_window": 16})), [None; 4]);
    }

    #[test]
    fn qwens_window_is_on_the_layers_that_the_config_names() {
        let off = json!({"sliding_window": 8, "use_sliding_window": false, "max_window_layers": 1});
        assert_eq!(windows("Qwen2ForCausalLM", off), [None; 4]);
        let upper = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(windows("Qwen2ForCausalLM", upper), [None, None, None, Some(8)]);
        let beyond = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 99});
        assert_eq!(windows("Qwen3ForCausalLM", beyond), [None; 4]);
        let (full, sliding) = ("full_attention", "sliding_attention");
        let named = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3,
            "layer_types": [sliding, full, sliding, full]});
        assert_eq!(windows("Qwen3ForCausalLM", named), [Some(8), None, Some(8), None]);
    }

    #[test]
    fn layer_types_must_fit() {
        let error = |changes| config("Qwen2ForCausalLM", changes).to_spec().unwrap_err().to_string();
        assert_eq!(
            error(json!({"layer_types": ["full_attention"]})),
            "layer_types: wanted one entry for each of 4 layers, found 1"
        );
        assert_eq!(
            error(json!({"layer_types": ["linear_attention", "a", "b", "c"]})),
            "layer_types: linear_attention is not supported; supported: full_attention, sliding_attention"
        );
        let sliding = ["sliding_attention"; 4];
        assert_eq!(
            error(json!({"layer_types": sliding, "sliding_window": 8})),
            "layer_types: wanted use_sliding_window and a sliding_window beside a sliding_attention layer, found none"
        );
    }
}
