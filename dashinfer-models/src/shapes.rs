//! Published shapes by name, for benchmarks with [random weights](crate::RandomWeights).

use serde_json::json;

use crate::{HfConfig, ModelSpec};

/// Name, hidden size, layers, query heads, key/value heads, MLP size, vocabulary, tied; from the models' pages on the hub.
type Qwen2Shape = (&'static str, usize, usize, usize, usize, usize, usize, bool);

const QWEN2_5: &[Qwen2Shape] = &[
    ("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151_936, true),
    ("qwen2.5-1.5b", 1536, 28, 12, 2, 8960, 151_936, true),
    ("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152_064, false),
];

/// Name and config of other shapes, from the models' pages on the hub.
const OTHERS: &[(&str, &str)] = &[
    (
        "qwen1.5-moe-a2.7b",
        r#"{"architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
            "num_key_value_heads": 16, "intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "norm_topk_prob": false,
            "vocab_size": 151936, "max_position_embeddings": 8192, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "torch_dtype": "bfloat16"}"#,
    ),
    (
        "qwen3-30b-a3b",
        r#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true, "vocab_size": 151936,
            "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "deepseek-v2-lite",
        r#"{"architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
            "num_key_value_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 10944, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "moe_intermediate_size": 1408, "topk_method": "greedy", "routed_scaling_factor": 1.0, "vocab_size": 102400,
            "max_position_embeddings": 163840, "rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 40,
            "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096}, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}"#,
    ),
];

/// The names that [`named`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    QWEN2_5.iter().map(|shape| shape.0).chain(OTHERS.iter().map(|shape| shape.0))
}

/// The published shape of this name.
#[must_use]
pub fn named(name: &str) -> Option<ModelSpec> {
    if let Some((_, config)) = OTHERS.iter().find(|shape| shape.0 == name) {
        return Some(spec(config));
    }
    let &(_, hidden, layers, heads, kv_heads, mlp, vocab, tied) = QWEN2_5.iter().find(|shape| shape.0 == name)?;
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16"
    });
    Some(spec(&config.to_string()))
}

fn spec(config: &str) -> ModelSpec {
    let config = HfConfig::parse(config).expect("the tables hold JSON");
    config.to_spec().expect("the tables hold published models")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_sound_and_of_its_published_size() {
        let sizes: Vec<_> = names().map(|name| named(name).unwrap().num_parameters()).collect();
        assert_eq!(sizes, [494_032_768, 1_543_714_304, 7_615_616_512, 14_315_784_192, 30_532_122_624, 15_706_484_224]);
        assert_eq!(named("gpt-2"), None);
    }
}
