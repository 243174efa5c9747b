//! The families, as data: what sets each one apart from plain Llama.

use crate::{ConfigError, HfConfig, ModelSpec, json::Object};

/// Reads a family's config.
pub type ToSpec = fn(&HfConfig) -> Result<ModelSpec, ConfigError>;

/// Every decoder family, by the `architectures` entry of its `config.json`.
pub static FAMILIES: &[(&str, ToSpec)] = &[
    ("LlamaForCausalLM", llama),
    ("MistralForCausalLM", mistral),
    ("Qwen2ForCausalLM", qwen2),
    ("Qwen3ForCausalLM", qwen3),
];

/// Llama 1 to 3, and the many models published under its name. <https://arxiv.org/abs/2407.21783>
fn llama(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let bias = config.object().flag("attention_bias")?.unwrap_or(false);
    spec.attention.qkv_bias = bias;
    spec.attention.out_bias = bias;
    spec.mlp.bias = config.object().flag("mlp_bias")?.unwrap_or(false);
    Ok(spec)
}

/// Llama without biases, with a sliding window on every layer unless that is `null`. <https://arxiv.org/abs/2310.06825>
fn mistral(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let config = config.object();
    // The reference takes 4096 where the key is absent, and no window only where it is `null`.
    let window = if config.names("sliding_window") { config.count("sliding_window")? } else { Some(4096) };
    for layer in &mut spec.layers {
        layer.window = window;
    }
    Ok(spec)
}

/// Llama with biases on q, k and v, and a window on some layers. Qwen2 and Qwen2.5. <https://arxiv.org/abs/2407.10671>
fn qwen2(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    spec.attention.qkv_bias = true;
    set_qwen_windows(&mut spec, config.object())?;
    Ok(spec)
}

/// Llama with an RMSNorm on each q and k head. <https://arxiv.org/abs/2505.09388>
fn qwen3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let bias = config.object().flag("attention_bias")?.unwrap_or(false);
    spec.attention.qkv_bias = bias;
    spec.attention.out_bias = bias;
    spec.attention.qk_norm = true;
    set_qwen_windows(&mut spec, config.object())?;
    Ok(spec)
}

/// `sliding_window` counts only with `use_sliding_window`. The windowed layers are those that `layer_types` names or, in
/// older configs, those from `max_window_layers` up.
fn set_qwen_windows(spec: &mut ModelSpec, config: Object<'_>) -> Result<(), ConfigError> {
    let in_use = config.flag("use_sliding_window")?.unwrap_or(false);
    let window = if in_use { config.count("sliding_window")? } else { None };
    let Some(types) = config.texts("layer_types")? else {
        let first = config.count("max_window_layers")?.unwrap_or(28); // the reference's default
        for layer in spec.layers.iter_mut().skip(first) {
            layer.window = window;
        }
        return Ok(());
    };
    if types.len() != spec.layers.len() {
        let wanted = format!("one entry for each of {} layers", spec.layers.len());
        return Err(ConfigError::value("layer_types", wanted, types.len()));
    }
    for (layer, kind) in spec.layers.iter_mut().zip(types) {
        layer.window = match kind {
            "full_attention" => None,
            "sliding_attention" if window.is_some() => window,
            "sliding_attention" => {
                let wanted = "use_sliding_window and a sliding_window beside a sliding_attention layer";
                return Err(ConfigError::value("layer_types", wanted, "none"));
            }
            other => {
                return Err(ConfigError::Unsupported {
                    field: "layer_types".into(),
                    found: other.into(),
                    supported: "full_attention, sliding_attention".into(),
                });
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::config::tests::config;

    fn windows(architecture: &str, changes: Value) -> Vec<Option<usize>> {
        let spec = config(architecture, changes).to_spec().unwrap();
        spec.layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn families_differ_in_biases_and_norms() {
        let facts = |architecture, changes| {
            let spec = config(architecture, changes).to_spec().unwrap();
            (spec.attention.qkv_bias, spec.attention.out_bias, spec.attention.qk_norm, spec.mlp.bias)
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
