//! Baichuan of 7B.

use super::unsupported;
use crate::{ConfigError, HfConfig, ModelSpec, TensorNames};

/// Llama with q, k and v in one matrix. In Baichuan 2 rows of the output matrix count by their direction alone.
/// <https://arxiv.org/abs/2309.10305>
pub(super) fn baichuan(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let object = config.object();
    let size = [object.count("hidden_size")?, object.count("num_attention_heads")?];
    // One architecture for both sizes, and nothing in a config says ALiBi but that the larger one has no positions to embed.
    if object.get("max_position_embeddings").is_none() || size == [Some(5120), Some(40)] {
        let found = "Baichuan 13B, which has ALiBi in place of rotary embeddings,";
        return Err(unsupported("architectures", found, "Baichuan and Baichuan 2 of 7B"));
    }
    let mut spec = config.llama_like()?;
    spec.names = TensorNames { qkv: &["self_attn.W_pack"], ..TensorNames::LLAMA };
    // Nothing says so either: both keys are those of all published models of Baichuan 2, and of none of Baichuan.
    spec.unit_head = spec.vocab_size == 125_696 || object.names("z_loss_weight");
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{example, spec_of};

    #[test]
    fn the_head_of_the_second_generation_is_normalized() {
        assert!(!spec_of("BaiChuanForCausalLM", json!({})).unit_head);
        assert!(spec_of("BaichuanForCausalLM", json!({})).unit_head);
        assert!(spec_of("BaichuanForCausalLM", json!({"vocab_size": 64000, "z_loss_weight": 0})).unit_head);
        assert!(!spec_of("BaichuanForCausalLM", json!({"vocab_size": 64000})).unit_head);
    }

    #[test]
    fn the_larger_size_is_refused() {
        let error = |changes: Value| example("BaichuanForCausalLM", changes).to_spec().unwrap_err().to_string();
        let text = "architectures: Baichuan 13B, which has ALiBi in place of rotary embeddings, is not supported; \
            supported: Baichuan and Baichuan 2 of 7B";
        assert_eq!(error(json!({"hidden_size": 5120, "num_attention_heads": 40})), text);
        assert_eq!(error(json!({"max_position_embeddings": null, "model_max_length": 4096})), text);
    }
}
