//! Families with mixtures of experts: what their configs say about them.

use dashinfer_kernels::{Routing, Scoring};

use super::{llama, qwen};
use crate::{ConfigError, ExpertMatrices, ExpertNames, Experts, HfConfig, ModelSpec, SharedExpert, json::Object};

/// Mistral with experts in every layer. <https://arxiv.org/abs/2401.04088>
pub(super) fn mixtral(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let object = config.object();
    let window = object.count("sliding_window")?;
    let experts = Experts { size: spec.mlp.size, ..softmax_experts(&spec, object, true)? };
    spec.experts = Some(experts);
    for layer in &mut spec.layers {
        layer.window = window;
        layer.experts = true;
    }
    spec.names.experts = ExpertNames {
        router: "block_sparse_moe.gate",
        matrices: ExpertMatrices::Each { experts: "block_sparse_moe.experts", gate_up: ["w1", "w3"], down: "w2" },
        ..ExpertNames::QWEN
    };
    Ok(spec)
}

/// Qwen2 with experts, and an expert of every token behind a gate. <https://arxiv.org/abs/2407.10671>
pub(super) fn qwen2_moe(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = qwen::qwen2(config)?;
    let config = config.object();
    spec.grouped().qkv_bias = config.flag("qkv_bias")?.unwrap_or(true);
    if config.flag("use_sliding_window")?.unwrap_or(false) && config.get("layer_types").is_none() {
        // Unlike Qwen2's, the reference's windows are then on every other layer of the lower ones.
        let (window, end) = (config.count("sliding_window")?, config.count("max_window_layers")?.unwrap_or(28));
        for (index, layer) in spec.layers.iter_mut().enumerate() {
            layer.window = window.filter(|_| index % 2 == 0 && index < end);
        }
    }
    let size = config.required_count("shared_expert_intermediate_size")?;
    let shared = Some(SharedExpert { size, gated: true });
    spec.experts = Some(Experts { shared, ..softmax_experts(&spec, config, false)? });
    set_sparse_layers(&mut spec, config)?;
    Ok(spec)
}

/// Qwen3 with experts. <https://arxiv.org/abs/2505.09388>
pub(super) fn qwen3_moe(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = llama::llama(config)?;
    let config = config.object();
    spec.grouped().qk_norm = true;
    spec.mlp.bias = false;
    if config.flag("use_sliding_window")?.unwrap_or(false) {
        let window = config.count("sliding_window")?;
        spec.layers.iter_mut().for_each(|layer| layer.window = window);
    }
    spec.experts = Some(softmax_experts(&spec, config, false)?);
    set_sparse_layers(&mut spec, config)?;
    Ok(spec)
}

/// Experts of a softmax over all of them; `normalize` where the config does not say.
fn softmax_experts(spec: &ModelSpec, config: Object<'_>, normalize: bool) -> Result<Experts, ConfigError> {
    let routing = Routing {
        num_experts: required_count_of(config, ["num_experts", "num_local_experts"])?,
        top_k: config.required_count("num_experts_per_tok")?,
        scoring: Scoring::Softmax,
        groups: None,
        normalize: config.flag("norm_topk_prob")?.unwrap_or(normalize),
        scale: 1.0,
    };
    Ok(Experts {
        routing,
        size: config.count("moe_intermediate_size")?.unwrap_or(spec.mlp.size),
        activation: spec.mlp.activation,
        bias: false,
        router_bias: false,
        correction: false,
        shared: None,
    })
}

/// The first of two keys that is there: what one class calls `num_experts`, another stores as `num_local_experts`.
fn required_count_of(config: Object<'_>, [first, second]: [&str; 2]) -> Result<usize, ConfigError> {
    match config.count(first)? {
        Some(count) => Ok(count),
        None => config.required_count(second),
    }
}

/// Experts are in each layer whose number, from 1 on, is a multiple of `decoder_sparse_step`, but for those in `mlp_only_layers`.
fn set_sparse_layers(spec: &mut ModelSpec, config: Object<'_>) -> Result<(), ConfigError> {
    let step = config.count("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.counts("mlp_only_layers")?.unwrap_or_default();
    if step == 0 {
        return Err(ConfigError::value("decoder_sparse_step", "1 or more", step));
    }
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        layer.experts = (index + 1).is_multiple_of(step) && !dense.contains(&index);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::tests::config;

    fn spec(architecture: &str, changes: Value) -> ModelSpec {
        config(architecture, changes).to_spec().unwrap()
    }

    fn error(architecture: &str, changes: Value) -> String {
        config(architecture, changes).to_spec().unwrap_err().to_string()
    }

    fn sparse(changes: Value) -> Vec<bool> {
        spec("Qwen2MoeForCausalLM", changes).layers.iter().map(|layer| layer.experts).collect()
    }

    #[test]
    fn experts_are_in_the_layers_that_the_config_names() {
        assert_eq!(sparse(json!({})), [true; 4]);
        assert_eq!(sparse(json!({"decoder_sparse_step": 2})), [false, true, false, true]);
        assert_eq!(sparse(json!({"mlp_only_layers": [0, 3]})), [false, true, true, false]);
        let text = "mlp_only_layers: wanted a list of whole numbers, found [\"x\"]";
        assert_eq!(error("Qwen3MoeForCausalLM", json!({"mlp_only_layers": ["x"]})), text);
        let text = "decoder_sparse_step: wanted 1 or more, found 0";
        assert_eq!(error("Qwen3MoeForCausalLM", json!({"decoder_sparse_step": 0})), text);
    }

    #[test]
    fn weights_are_normalized_where_the_family_or_the_config_says_so() {
        let normalize = |architecture, changes| spec(architecture, changes).experts.unwrap().routing.normalize;
        assert!(normalize("MixtralForCausalLM", json!({})));
        assert!(!normalize("Qwen3MoeForCausalLM", json!({})));
        assert!(normalize("Qwen3MoeForCausalLM", json!({"norm_topk_prob": true})));
    }

    #[test]
    fn sizes_of_experts_are_those_of_the_family() {
        let sizes = |architecture| {
            let experts = spec(architecture, json!({})).experts.unwrap();
            (experts.size, experts.shared.map(|shared| (shared.size, shared.gated)))
        };
        assert_eq!(sizes("MixtralForCausalLM"), (96, None));
        assert_eq!(sizes("Qwen2MoeForCausalLM"), (24, Some((40, true))));
        assert_eq!(sizes("Qwen3MoeForCausalLM"), (24, None));
    }

    #[test]
    fn windows_are_where_the_reference_has_them() {
        let on = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3});
        let windows = |architecture, changes| -> Vec<Option<usize>> {
            spec(architecture, changes).layers.iter().map(|layer| layer.window).collect()
        };
        assert_eq!(windows("Qwen2MoeForCausalLM", on.clone()), [Some(8), None, Some(8), None]);
        assert_eq!(windows("Qwen3MoeForCausalLM", on), [Some(8); 4]);
        assert_eq!(windows("Qwen3MoeForCausalLM", json!({"sliding_window": 8})), [None; 4]);
        assert_eq!(windows("MixtralForCausalLM", json!({"sliding_window": 8})), [Some(8); 4]);
        assert_eq!(windows("MixtralForCausalLM", json!({})), [None; 4]);
    }

    #[test]
    fn absurd_experts_are_refused_by_name() {
        let qwen = "Qwen3MoeForCausalLM";
        let text = "num_local_experts: wanted a whole number, found nothing";
        assert_eq!(error(qwen, json!({"num_experts": null, "num_local_experts": null})), text);
        assert_eq!(error(qwen, json!({"num_experts": 0})), "the number of experts: wanted 1 to 2048, found 0");
        let text = "the number of experts: wanted 1 to 2048, found 1000000";
        assert_eq!(error(qwen, json!({"num_experts": 1_000_000})), text);
        assert_eq!(error(qwen, json!({"num_experts_per_tok": 9})), "num_experts_per_tok: wanted 1 to 8, found 9");
        assert_eq!(error(qwen, json!({"num_experts_per_tok": 0})), "num_experts_per_tok: wanted 1 to 8, found 0");
        assert_eq!(
            error(qwen, json!({"moe_intermediate_size": 0})),
            "moe_intermediate_size: wanted 1 to 1048576, found 0"
        );
    }

    #[test]
    fn the_largest_config_that_passes_can_be_counted() {
        let largest = json!({"num_experts": 2048, "moe_intermediate_size": 1 << 20, "hidden_size": 1 << 20,
            "num_hidden_layers": 1024, "vocab_size": 1 << 24, "head_dim": 4096});
        assert!(error("Qwen3MoeForCausalLM", largest).starts_with("parameters: wanted at most"));
    }
}
