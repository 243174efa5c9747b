//! gpt-oss: experts with biases and a clamped activation, attention with sinks.

use dashinfer_kernels::{Activation, Routing, Scoring};

use super::windows;
use crate::{ConfigError, ExpertMatrices, ExpertNames, Experts, HfConfig, ModelSpec};

/// Windows on every other layer, a bias wherever there can be one, and the softmax over the chosen experts alone.
/// <https://arxiv.org/abs/2508.10925>
pub(super) fn gpt_oss(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let config = config.object();
    // Without either, the reference has a scaling of its own, which no published config relies on.
    if config.get("rope_scaling").is_none() && config.get("rope_parameters").is_none() {
        return Err(ConfigError::value("rope_scaling", "an object", "nothing"));
    }
    let bias = config.flag("attention_bias")?.unwrap_or(true);
    let attention = spec.grouped();
    attention.qkv_bias = bias;
    attention.out_bias = bias;
    attention.sinks = true;
    spec.experts = Some(Experts {
        // The softmax over the logits of the chosen is that over all, normalized.
        routing: Routing {
            num_experts: config.required_count("num_local_experts")?,
            top_k: config.required_count("num_experts_per_tok")?,
            scoring: Scoring::Softmax,
            groups: None,
            normalize: true,
            scale: 1.0,
        },
        size: spec.mlp.size,
        activation: Activation::ClampedSwiglu {
            alpha: config.number("swiglu_alpha")?.unwrap_or(1.702) as f32,
            limit: config.number("swiglu_limit")?.unwrap_or(7.0) as f32,
        },
        bias: true,
        router_bias: true,
        correction: false,
        shared: None,
    });
    spec.names.experts = ExpertNames {
        router: "mlp.router",
        matrices: ExpertMatrices::Stacked { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" },
        ..ExpertNames::QWEN
    };
    for layer in &mut spec.layers {
        layer.experts = true;
    }
    let window = if config.names("sliding_window") { config.count("sliding_window")? } else { Some(128) };
    if !windows::set_by_name(&mut spec, config, window)? {
        for layer in spec.layers.iter_mut().step_by(2) {
            layer.window = window;
        }
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::tests::config;

    fn changed(changes: Value) -> HfConfig {
        let mut all = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": false,
            "original_max_position_embeddings": 64}});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config("GptOssForCausalLM", all)
    }

    #[test]
    fn what_a_config_leaves_out_is_the_references_default() {
        let spec = changed(json!({})).to_spec().unwrap();
        assert_eq!(
            spec.layers.iter().map(|layer| layer.window).collect::<Vec<_>>(),
            [Some(128), None, Some(128), None]
        );
        let activation = spec.experts.unwrap().activation;
        assert_eq!(activation, Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 });
        let named = json!({"sliding_window": 9, "swiglu_limit": 2.5, "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"]});
        let spec = changed(named).to_spec().unwrap();
        assert_eq!(spec.layers.iter().map(|layer| layer.window).collect::<Vec<_>>(), [None, Some(9)]);
        let activation = spec.experts.unwrap().activation;
        assert_eq!(activation, Activation::ClampedSwiglu { alpha: 1.702, limit: 2.5 });
    }

    #[test]
    fn what_it_cannot_be_is_refused_by_name() {
        let error = |changes| changed(changes).to_spec().unwrap_err().to_string();
        assert_eq!(error(json!({"rope_scaling": null})), "rope_scaling: wanted an object, found nothing");
        let text = "swiglu_limit: wanted a finite number above 0, found -1";
        assert_eq!(error(json!({"swiglu_limit": -1})), text);
    }
}
