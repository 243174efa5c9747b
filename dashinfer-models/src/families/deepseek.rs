//! DeepSeek-V2 and -V3: latent attention, and experts behind the first layers.

use dashinfer_kernels::RopePairs;

use crate::{
    Attention, ConfigError, HfConfig, LatentAttention, ModelSpec, RopeSpec, dialect::Dialect, json::Object,
    rope::deepseek_score_factor,
};

/// The norms of latent vectors take the default of the reference's class, whatever the config says of others.
const LATENT_NORM_EPS: f32 = 1e-6;

/// DeepSeek-V2 and its Lite. <https://arxiv.org/abs/2405.04434>
pub(super) fn deepseek_v2(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    latent(config)
}

/// DeepSeek-V3 and R1. <https://arxiv.org/abs/2412.19437>
pub(super) fn deepseek_v3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = latent(config)?;
    spec.extra_layers = config.object().count("num_nextn_predict_layers")?.unwrap_or(1);
    Ok(spec)
}

/// What they have in common but for experts.
///
/// The reference takes the rotated values of queries and keys from neighbours to halves before it rotates halves. Rotating the neighbours
/// where they stand gives the same values in another order, the same for queries and keys, and so the same scores.
fn latent(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let object = config.object();
    let [num_heads, kv_rank, nope_dim, rope_dim, v_dim] = [
        object.required_count("num_attention_heads")?,
        object.required_count("kv_lora_rank")?,
        object.required_count("qk_nope_head_dim")?,
        object.required_count("qk_rope_head_dim")?,
        object.required_count("v_head_dim")?,
    ];
    // The reference's default where the key is absent; `null` means that there is none.
    let q_rank = if object.names("q_lora_rank") { object.count("q_lora_rank")? } else { Some(1536) };
    let q_dim = nope_dim.saturating_add(rope_dim);
    let mut attention = LatentAttention {
        num_heads,
        q_rank,
        kv_rank,
        nope_dim,
        rope_dim,
        v_dim,
        scale: 1.0 / (q_dim as f32).sqrt(),
        norm_eps: LATENT_NORM_EPS,
        bias: object.flag("attention_bias")?.unwrap_or(false),
    };
    let pairs =
        if object.flag("rope_interleave")?.unwrap_or(true) { RopePairs::Interleaved } else { RopePairs::Halves };
    let max_positions = object.required_count("max_position_embeddings")?;
    let rope = RopeSpec::from_config(object, rope_dim, max_positions, pairs)?;
    let mut spec = config.decoder(&Dialect::LLAMA, Attention::Latent(attention), rope)?;
    attention.scale *= deepseek_score_factor(object, &spec.ropes[0].scaling)? as f32;
    spec.attention = Attention::Latent(attention);
    if has_experts(object, spec.num_layers())?.contains(&true) {
        return Err(ConfigError::Unsupported {
            field: "n_routed_experts".into(),
            found: "experts".into(),
            supported: "dense layers".into(),
        });
    }
    Ok(spec)
}

/// Whether each layer has experts: those from `first_k_dense_replace` on whose number `moe_layer_freq` divides.
fn has_experts(config: Object<'_>, num_layers: usize) -> Result<Vec<bool>, ConfigError> {
    let any = config.count("n_routed_experts")?.is_some();
    let first = config.count("first_k_dense_replace")?.unwrap_or(0);
    let every = config.count("moe_layer_freq")?.unwrap_or(1);
    if every == 0 {
        return Err(ConfigError::value("moe_layer_freq", "1 or more", every));
    }
    Ok((0..num_layers).map(|layer| any && layer >= first && layer.is_multiple_of(every)).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::tests::config;

    fn attention(architecture: &str, changes: Value) -> LatentAttention {
        match config(architecture, changes).to_spec().unwrap().attention {
            Attention::Latent(attention) => attention,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn check_error(changes: Value, text: &str) {
        assert_eq!(config("DeepseekV3ForCausalLM", changes).to_spec().unwrap_err().to_string(), text);
    }

    #[test]
    fn queries_may_be_compressed_or_not() {
        let found = attention("DeepseekV3ForCausalLM", json!({}));
        let sizes = [found.num_heads, found.kv_rank, found.nope_dim, found.rope_dim, found.v_dim];
        assert_eq!((sizes, found.q_rank), ([4, 32, 16, 8, 12], Some(24)));
        assert_eq!((found.scale, found.norm_eps, found.bias), (1.0 / 24f32.sqrt(), 1e-6, false));
        assert_eq!(attention("DeepseekV2ForCausalLM", json!({"q_lora_rank": null})).q_rank, None);
    }

    #[test]
    fn mscale_is_on_scores_twice_and_not_on_cosines() {
        let yarn = |mscale: f64| {
            json!({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": mscale, "mscale_all_dim": mscale,
                "original_max_position_embeddings": 64}})
        };
        let spec = config("DeepseekV3ForCausalLM", yarn(1.0)).to_spec().unwrap();
        let rope = spec.ropes[0].rope(spec.max_positions);
        assert_eq!((rope.inv_freq.len(), rope.scale, rope.pairs), (4, 1.0, RopePairs::Interleaved));
        for (mscale, factor) in [(1.0, 1.368_888), (0.707, 1.260_804), (0.0, 1.0)] {
            let found = attention("DeepseekV2ForCausalLM", yarn(mscale)).scale * 24f32.sqrt();
            assert!((found - factor * factor).abs() < 1e-5, "{mscale}: {found}");
        }
    }

    #[test]
    fn sizes_must_be_there_and_sane() {
        check_error(json!({"kv_lora_rank": null}), "kv_lora_rank: wanted a whole number, found nothing");
        check_error(json!({"kv_lora_rank": 0}), "kv_lora_rank: wanted 1 to 4096, found 0");
        check_error(json!({"q_lora_rank": 0}), "q_lora_rank: wanted 1 to 1048576, found 0");
        check_error(json!({"v_head_dim": 5000}), "v_head_dim: wanted 1 to 4096, found 5000");
        check_error(json!({"qk_nope_head_dim": 0}), "qk_nope_head_dim: wanted 1 to 4096, found 0");
        check_error(json!({"qk_rope_head_dim": 7}), "head_dim: wanted an even number of rotated values, found 7");
        check_error(json!({"moe_layer_freq": 0}), "moe_layer_freq: wanted 1 or more, found 0");
    }

    #[test]
    fn layers_that_predict_further_ahead_are_extra() {
        let spec = config("DeepseekV3ForCausalLM", json!({})).to_spec().unwrap();
        assert!(spec.is_extra("model.layers.4.eh_proj.weight") && spec.is_extra("model.layers.4.mlp.down_proj.weight"));
        let others = [
            "model.layers.3.mlp.down_proj.weight",
            "model.layers.5.x",
            "model.layers.4",
            "layers.4.x",
            "model.layers.+4x",
        ];
        assert!(!others.into_iter().any(|name| spec.is_extra(name)));
        let none = config("DeepseekV2ForCausalLM", json!({})).to_spec().unwrap();
        assert!(!none.is_extra("model.layers.4.eh_proj.weight"));
    }
}
