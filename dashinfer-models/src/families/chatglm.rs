//! ChatGLM2, ChatGLM3 and GLM-4 in their first form, as their own code reads them.

use dashinfer_kernels::RopePairs;
use serde_json::json;

use super::{only, unsupported};
use crate::{ConfigError, HfConfig, ModelSpec, TensorNames, dialect::Dialect, json::Object};

const KEYS: Dialect = Dialect {
    num_layers: "num_layers",
    num_kv_heads: "multi_query_group_num",
    head_dim: "kv_channels",
    intermediate_size: "ffn_hidden_size",
    vocab_size: "padded_vocab_size",
    max_positions: "seq_length",
    norm_eps: "layernorm_epsilon",
    pairs: RopePairs::Interleaved,
    rotated: Some(0.5),
    ..Dialect::LLAMA
};

const NAMES: TensorNames = TensorNames {
    embed: "transformer.embedding.word_embeddings",
    layers: "transformer.encoder.layers",
    qkv: &["self_attention.query_key_value"],
    attention_out: "self_attention.dense",
    gate_up: &["mlp.dense_h_to_4h"],
    down: "mlp.dense_4h_to_h",
    norm: "transformer.encoder.final_layernorm",
    head: "transformer.output_layer",
    // Its frequencies follow from the config.
    ignored: &["transformer.rotary_pos_emb."],
    ..TensorNames::LLAMA
};

/// GLM-4's arithmetic by other names. <https://arxiv.org/abs/2406.12793>
pub(super) fn chatglm(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let object = config.object();
    if object.names("position_encoding_2d") || object.names("inner_hidden_size") {
        let found = "ChatGLM-6B of the first generation, which has positions of two parts,";
        return Err(unsupported("architectures", found, "ChatGLM2, ChatGLM3 and GLM-4"));
    }
    // The defaults of its config class.
    let config = config.with_defaults(json!({
        "multi_query_attention": false, "kv_channels": 128, "multi_query_group_num": 1, "layernorm_epsilon": 1e-5
    }));
    let object = config.object();
    // Without groups, q, k and v of each head stand beside each other.
    only(object, "multi_query_attention", true)?;
    only(object, "rmsnorm", true)?;
    only(object, "post_layer_norm", true)?;
    only(object, "apply_residual_connection_post_layernorm", false)?;
    if let Some(bits) = object.count("quantization_bit")?.filter(|bits| *bits != 0) {
        return Err(unsupported("quantization_bit", bits, "0"));
    }
    if let Some(tokens) = object.count("pre_seq_len")? {
        return Err(unsupported("pre_seq_len", tokens, "null: no learned prefix"));
    }
    let keys = Dialect { pairs: pairs(object)?, ..KEYS };
    let mut spec = config.llama_like_in(&keys)?;
    spec.ropes[0].theta = theta(object, spec.vocab_size)?;
    let bias = object.flag("add_bias_linear")?.unwrap_or(false);
    spec.grouped().qkv_bias = bias || object.flag("add_qkv_bias")?.unwrap_or(false);
    spec.grouped().out_bias = bias;
    spec.mlp.bias = bias;
    spec.names = NAMES;
    Ok(spec)
}

/// Neighbours, unless the config says that it is not the original form.
fn pairs(config: Object<'_>) -> Result<RopePairs, ConfigError> {
    let original = config.flag("original_rope")?.unwrap_or(true);
    Ok(if original { RopePairs::Interleaved } else { RopePairs::Halves })
}

/// 10000, times `rope_ratio`. In ChatGLM2-6B-32K the same key divides positions, and its config differs from those of ChatGLM3, whose
/// vocabulary it has, in nothing but the value: so other values than those of ChatGLM3 are refused with that vocabulary.
fn theta(config: Object<'_>, vocab_size: usize) -> Result<f64, ConfigError> {
    const VOCAB_OF_2_AND_3: usize = 65024;
    let ratio = config.number("rope_ratio")?.unwrap_or(1.0);
    if vocab_size == VOCAB_OF_2_AND_3 && ![1.0, 50.0].contains(&ratio) {
        return Err(unsupported("rope_ratio", ratio, "1, and 50 as in ChatGLM3-6B-32K, with this vocabulary"));
    }
    Ok(10000.0 * ratio)
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::RopePairs;
    use serde_json::{Value, json};

    use super::super::tests::{attention_of, example, spec_of};

    #[test]
    fn the_config_is_read_in_its_own_words() {
        let spec = spec_of("ChatGLMModel", json!({}));
        let attention = attention_of(&spec);
        assert_eq!((spec.num_layers(), spec.vocab_size, spec.mlp.size, spec.max_positions), (28, 65024, 13696, 8192));
        assert_eq!(
            (attention.num_kv_heads, attention.head_dim, attention.qkv_bias, attention.out_bias),
            (2, 128, true, false)
        );
        let rope = &spec.ropes[0];
        assert_eq!((rope.theta, rope.rotary_dim, rope.pairs), (10000.0, 64, RopePairs::Interleaved));
        let spec = spec_of("ChatGLMForConditionalGeneration", json!({"original_rope": false, "add_bias_linear": true}));
        assert_eq!((spec.ropes[0].theta, spec.ropes[0].pairs, spec.mlp.bias), (5e6, RopePairs::Halves, true));
    }

    #[test]
    fn what_is_read_otherwise_elsewhere_is_refused() {
        let check = |changes: Value, text: &str| {
            assert_eq!(example("ChatGLMModel", changes).to_spec().unwrap_err().to_string(), text);
        };
        check(
            json!({"position_encoding_2d": true, "inner_hidden_size": 16384}),
            "architectures: ChatGLM-6B of the first generation, which has positions of two parts, is not supported; \
                supported: ChatGLM2, ChatGLM3 and GLM-4",
        );
        check(
            json!({"multi_query_attention": false}),
            "multi_query_attention: false is not supported; supported: true",
        );
        check(json!({"rmsnorm": false}), "rmsnorm: false is not supported; supported: true");
        check(json!({"quantization_bit": 4}), "quantization_bit: 4 is not supported; supported: 0");
        check(json!({"pre_seq_len": 128}), "pre_seq_len: 128 is not supported; supported: null: no learned prefix");
        check(
            json!({"rope_ratio": 16}),
            "rope_ratio: 16 is not supported; supported: 1, and 50 as in ChatGLM3-6B-32K, with this vocabulary",
        );
        check(json!({"num_layers": null}), "num_layers: wanted a whole number, found nothing");
    }
}
