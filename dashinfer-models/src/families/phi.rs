//! Phi-3 and Phi-4.

use crate::{ConfigError, HfConfig, ModelSpec, RopeScaling, TensorNames, dialect::Dialect};

const KEYS: Dialect = Dialect { rotated: Some(1.0), ..Dialect::LLAMA };

/// Llama with q, k and v in one matrix, and gate and up; a window on every layer if there is one; LongRoPE.
/// <https://arxiv.org/abs/2404.14219>
pub(super) fn phi3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    // The reference's default of the epsilon; null key/value heads are as many as there are query heads, as everywhere.
    let config =
        config.with_defaults(serde_json::json!({"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}));
    let mut spec = config.llama_like_in(&KEYS)?;
    if let RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } | RopeScaling::Yarn { .. } = spec.ropes[0].scaling {
        return Err(ConfigError::Unsupported {
            field: "rope_scaling".into(),
            found: "a type without factors for each pair".into(),
            supported: "longrope in this family".into(),
        });
    }
    let window = config.object().count("sliding_window")?;
    for layer in &mut spec.layers {
        layer.window = window;
    }
    spec.names = TensorNames { qkv: &["self_attn.qkv_proj"], gate_up: &["mlp.gate_up_proj"], ..TensorNames::LLAMA };
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{example, spec_of};

    /// Factors for heads of 128, three quarters of which are rotated.
    fn longrope(changes: Value) -> Value {
        let mut rope = json!({"type": "longrope", "short_factor": vec![1.0; 48], "long_factor": vec![4.0; 48]});
        for (key, value) in changes.as_object().unwrap() {
            rope[key] = value.clone();
        }
        json!({"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75, "rope_scaling": rope})
    }

    #[test]
    fn the_longest_context_decides_which_factors_are_in_use() {
        for kind in ["longrope", "su"] {
            let mut spec = spec_of("Phi3ForCausalLM", longrope(json!({"type": kind})));
            let rope = spec.ropes[0].rope(spec.max_positions);
            assert_eq!((rope.inv_freq.len(), rope.inv_freq[0]), (48, 0.25));
            // √(1 + ln 32 / ln 4096), of the model's own context
            let scale = (1.0 + 32f32.ln() / 4096f32.ln()).sqrt();
            assert!((rope.scale - scale).abs() < 1e-6);
            spec.limit_context(1 << 20);
            assert_eq!(spec.max_positions, 131_072);
            spec.limit_context(4097);
            assert_eq!(spec.ropes[0].rope(spec.max_positions).inv_freq[0], 0.25);
            spec.limit_context(4096);
            let rope = spec.ropes[0].rope(spec.max_positions);
            assert_eq!(rope.inv_freq[0], 1.0);
            assert!((rope.scale - scale).abs() < 1e-6);
        }
    }

    #[test]
    fn factors_must_fit() {
        let error = |changes| example("Phi3ForCausalLM", longrope(changes)).to_spec().unwrap_err().to_string();
        assert_eq!(
            error(json!({"long_factor": [1.0]})),
            "rope_scaling.long_factor: wanted a factor for each of 48 pairs, found 1"
        );
        assert_eq!(
            error(json!({"short_factor": null})),
            "rope_scaling.short_factor: wanted a list of numbers, found nothing"
        );
        let negative = error(json!({"short_factor": vec![-1.0; 48]}));
        assert_eq!(negative, "rope_scaling.short_factor: wanted a finite number above 0, found -1");
        assert_eq!(
            error(json!({"type": "yarn", "factor": 2.0})),
            "rope_scaling: a type without factors for each pair is not supported; supported: longrope in this family"
        );
    }

    #[test]
    fn the_window_is_on_every_layer_or_on_none() {
        let windows = |changes| spec_of("Phi3ForCausalLM", changes).layers.iter().map(|l| l.window).collect::<Vec<_>>();
        assert_eq!(windows(json!({"sliding_window": 2047})), [Some(2047); 40]);
        assert_eq!(windows(json!({"sliding_window": null})), [None; 40]);
        assert_eq!(windows(json!({})), [None; 40]);
    }
}
