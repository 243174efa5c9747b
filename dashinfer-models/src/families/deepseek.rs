//! DeepSeek-V2 and -V3: latent attention, and experts behind the first layers.

use dashinfer_kernels::{ExpertGroups, GroupScore, RopePairs, Routing, Scoring};

use super::unsupported;
use crate::{
    Attention, ConfigError, ExpertNames, Experts, HfConfig, LatentAttention, ModelSpec, RopeSpec, SharedExpert,
    dialect::Dialect, json::Object, rope::deepseek_score_factor,
};

/// The norms of latent vectors take the default of the reference's class, whatever the config says of others.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Experts as in Qwen, and one of every token.
pub(super) const EXPERT_NAMES: ExpertNames = ExpertNames {
    shared_gate_up: ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
    shared_down: "mlp.shared_experts.down_proj",
    ..ExpertNames::QWEN
};

/// DeepSeek-V2 and its Lite. Experts are weighted by a softmax over all of them; like the reference, this does not read
/// `norm_topk_prob`. <https://arxiv.org/abs/2405.04434>
pub(super) fn deepseek_v2(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = latent(config)?;
    let object = config.object();
    only_text(object, "scoring_func", "softmax")?;
    let groups = match object.text("topk_method")?.unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => Some(ExpertGroups {
            num_groups: object.required_count("n_group")?,
            top_groups: object.required_count("topk_group")?,
            score: GroupScore::Max,
        }),
        other => return Err(unsupported("topk_method", other, "greedy, group_limited_greedy")),
    };
    let scale = object.number("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    let routing =
        |num_experts, top_k| Routing { num_experts, top_k, scoring: Scoring::Softmax, groups, normalize: false, scale };
    set_experts(&mut spec, object, 0, routing)?;
    Ok(spec)
}

/// DeepSeek-V3 and R1. Experts are chosen by sigmoid and a correction, within the groups whose best two are best.
/// <https://arxiv.org/abs/2412.19437>
pub(super) fn deepseek_v3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = latent(config)?;
    let object = config.object();
    only_text(object, "scoring_func", "sigmoid")?;
    only_text(object, "topk_method", "noaux_tc")?;
    // What is absent is the reference's default.
    let groups = Some(ExpertGroups {
        num_groups: object.count("n_group")?.unwrap_or(8),
        top_groups: object.count("topk_group")?.unwrap_or(4),
        score: GroupScore::TopTwo,
    });
    let normalize = object.flag("norm_topk_prob")?.unwrap_or(true);
    let scale = object.number("routed_scaling_factor")?.unwrap_or(2.5) as f32;
    let routing =
        |num_experts, top_k| Routing { num_experts, top_k, scoring: Scoring::Sigmoid, groups, normalize, scale };
    set_experts(&mut spec, object, 0, routing)?;
    if let Some(experts) = &mut spec.experts {
        experts.correction = true;
    }
    spec.extra_layers = object.count("num_nextn_predict_layers")?.unwrap_or(1);
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
    spec.names.experts = EXPERT_NAMES;
    Ok(spec)
}

/// Experts in the layers from `first_k_dense_replace` on whose number `moe_layer_freq` divides, if there are any. Where the config does not say, the
/// layers start at `first`. `routing` is made for their number, and how many of them each token has.
pub(super) fn set_experts(
    spec: &mut ModelSpec,
    config: Object<'_>,
    first: usize,
    routing: impl FnOnce(usize, usize) -> Routing,
) -> Result<(), ConfigError> {
    let Some(num_experts) = config.count("n_routed_experts")? else { return Ok(()) };
    let first = config.count("first_k_dense_replace")?.unwrap_or(first);
    let every = config.count("moe_layer_freq")?.unwrap_or(1);
    if every == 0 {
        return Err(ConfigError::value("moe_layer_freq", "1 or more", every));
    }
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        layer.experts = index >= first && index.is_multiple_of(every);
    }
    if !spec.layers.iter().any(|layer| layer.experts) {
        return Ok(());
    }
    let size = config.required_count("moe_intermediate_size")?;
    let shared = config.count("n_shared_experts")?.filter(|count| *count > 0);
    spec.experts = Some(Experts {
        routing: routing(num_experts, config.required_count("num_experts_per_tok")?),
        size,
        activation: spec.mlp.activation,
        bias: false,
        router_bias: false,
        correction: false,
        // They are one that is so many times as large.
        shared: shared.map(|count| SharedExpert { size: size.saturating_mul(count), gated: false }),
    });
    Ok(())
}

/// A key that, if it is there, must be what this family does.
fn only_text(config: Object<'_>, key: &str, supported: &str) -> Result<(), ConfigError> {
    match config.text(key)? {
        Some(found) if found != supported => Err(unsupported(key, found, supported)),
        _ => Ok(()),
    }
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
        check_error(json!({"moe_layer_freq": 0, "n_routed_experts": 4}), "moe_layer_freq: wanted 1 or more, found 0");
        let text = "topk_method: greedy is not supported; supported: noaux_tc";
        check_error(json!({"topk_method": "greedy"}), text);
        let text = "scoring_func: softmax is not supported; supported: sigmoid";
        check_error(json!({"scoring_func": "softmax"}), text);
        let v2 = config("DeepseekV2ForCausalLM", json!({"topk_method": "noaux_tc"})).to_spec().unwrap_err().to_string();
        assert_eq!(v2, "topk_method: noaux_tc is not supported; supported: greedy, group_limited_greedy");
    }

    #[test]
    fn experts_are_behind_the_dense_layers() {
        let layers = |changes: Value| -> Vec<bool> {
            let mut all = json!({"n_routed_experts": 16});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            let spec = config("DeepseekV3ForCausalLM", all).to_spec().unwrap();
            spec.layers.iter().map(|layer| layer.experts).collect()
        };
        assert_eq!(layers(json!({})), [true; 4]);
        assert_eq!(layers(json!({"first_k_dense_replace": 3})), [false, false, false, true]);
        assert_eq!(layers(json!({"first_k_dense_replace": 1, "moe_layer_freq": 2})), [false, false, true, false]);
        let dense = config("DeepseekV3ForCausalLM", json!({"first_k_dense_replace": 4, "n_routed_experts": 16}));
        assert_eq!(dense.to_spec().unwrap().experts, None);
    }

    #[test]
    fn routing_is_that_of_the_family() {
        let experts = |family: &str, changes: Value| {
            let mut all = json!({"n_routed_experts": 16, "n_shared_experts": 2, "norm_topk_prob": false});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            config(&format!("Deepseek{family}ForCausalLM"), all).to_spec().unwrap().experts.unwrap()
        };
        let lite = experts("V2", json!({"norm_topk_prob": true}));
        let routing = Routing {
            num_experts: 16,
            top_k: 2,
            scoring: Scoring::Softmax,
            groups: None,
            normalize: false,
            scale: 1.0,
        };
        assert_eq!((lite.routing, lite.correction, lite.size), (routing, false, 24));
        assert_eq!(lite.shared, Some(SharedExpert { size: 48, gated: false }));
        let limited = json!({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": null,
            "routed_scaling_factor": 16});
        let v2 = experts("V2", limited);
        let groups = Some(ExpertGroups { num_groups: 4, top_groups: 2, score: GroupScore::Max });
        assert_eq!((v2.routing, v2.shared), (Routing { groups, scale: 16.0, ..routing }, None));
        let v3 = experts("V3", json!({"norm_topk_prob": null}));
        let groups = Some(ExpertGroups { num_groups: 8, top_groups: 4, score: GroupScore::TopTwo });
        let sigmoid = Routing { scoring: Scoring::Sigmoid, groups, normalize: true, scale: 2.5, ..routing };
        assert_eq!((v3.routing, v3.correction), (sigmoid, true));
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
