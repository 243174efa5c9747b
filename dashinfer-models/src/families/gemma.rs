//! Gemma 2 and 3: norms of 1 + w on either side of attention and MLP, scaled embeddings, windows on most layers.

use serde_json::{Value, json};

use super::windows;
use crate::{ConfigError, HfConfig, ModelSpec, RopeSpec, TensorNames, dialect::Dialect};

const KEYS: Dialect = Dialect { activation: "hidden_activation", ..Dialect::LLAMA };

const NAMES: TensorNames = TensorNames {
    post_attention_norm: "post_attention_layernorm",
    mlp_norm: "pre_feedforward_layernorm",
    post_mlp_norm: "post_feedforward_layernorm",
    ..TensorNames::LLAMA
};

/// Gemma 2: soft caps on attention and logits, a window on every other layer. <https://arxiv.org/abs/2408.00118>
pub(super) fn gemma2(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    // The defaults of the reference's class. A soft cap that is `null` is off.
    let config = config.with_defaults(json!({
        "vocab_size": 256_000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": true,
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0
    }));
    gemma(&config, 2)
}

/// Gemma 3: norms on q and k heads in place of the caps, five windowed layers to one full one, and a rotary embedding for each of the
/// two kinds. <https://arxiv.org/abs/2503.19786>
pub(super) fn gemma3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    // The defaults of the reference's class, which the published configs of 4B and more rely on.
    let config = config.with_defaults(json!({
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "tie_word_embeddings": true,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4
    }));
    if config.object().flag("use_bidirectional_attention")? == Some(true) {
        return Err(ConfigError::Unsupported {
            field: "use_bidirectional_attention".into(),
            found: "true".into(),
            supported: "attention to earlier tokens".into(),
        });
    }
    let [full, sliding] = ropes(&config)?;
    let pattern = match config.object().count("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => config.object().count("_sliding_window_pattern")?.unwrap_or(6),
    };
    let mut spec = gemma(&full, pattern)?;
    spec.grouped().qk_norm = true;
    let (head_dim, max_positions) = (spec.grouped().head_dim, spec.max_positions);
    spec.ropes.push(RopeSpec::from_config(sliding.object(), head_dim, max_positions, KEYS.pairs)?);
    for layer in &mut spec.layers {
        layer.rope = usize::from(layer.window.is_some());
    }
    Ok(spec)
}

/// The text model within Gemma 3 of 4B and more. The tensors of its encoder of images are ignored: there is no image input.
pub(super) fn gemma3_with_images(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = gemma3(&config.nested("text_config")?)?;
    spec.names = TensorNames {
        embed: "language_model.model.embed_tokens",
        layers: "language_model.model.layers",
        norm: "language_model.model.norm",
        head: "language_model.lm_head",
        ignored: &["vision_tower.", "multi_modal_projector."],
        ..NAMES
    };
    Ok(spec)
}

/// What both have, with a window on all layers but each `pattern`-th unless `layer_types` says otherwise.
fn gemma(config: &HfConfig, pattern: usize) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like_in(&KEYS)?;
    let config = config.object();
    spec.names = NAMES;
    spec.norm_offset = 1.0;
    spec.post_norms = true;
    // The reference keeps the factor in the type that the model is computed in, and the models were trained so: √3584 is 59.75 in bf16,
    // not 59.87.
    let scale = (spec.hidden_size as f32).sqrt();
    spec.embedding_scale = spec.dtype.map_or(scale, |dtype| dtype.round(scale));
    spec.logit_soft_cap = config.number("final_logit_softcapping")?.map(|cap| cap as f32);
    let bias = config.flag("attention_bias")?.unwrap_or(false);
    let attention = spec.grouped();
    attention.qkv_bias = bias;
    attention.out_bias = bias;
    attention.soft_cap = config.number("attn_logit_softcapping")?.map(|cap| cap as f32);
    if let Some(scalar) = config.number("query_pre_attn_scalar")? {
        attention.scale = (1.0 / scalar.sqrt()) as f32;
    }
    let window = config.count("sliding_window")?;
    if !windows::set_by_name(&mut spec, config, window)? {
        let missing = || ConfigError::value("sliding_window", "a whole number", "nothing");
        windows::set_by_pattern(&mut spec, window.ok_or_else(missing)?, pattern);
    }
    Ok(spec)
}

/// The config of the full layers, and that of the sliding ones: transformers 5 has an object for each kind in `rope_parameters`; on
/// the hub scaling is that of the full ones, and the others have a theta of their own.
fn ropes(config: &HfConfig) -> Result<[HfConfig; 2], ConfigError> {
    let local_theta = config.object().number("rope_local_base_freq")?.unwrap_or(1e4);
    let sliding = config.with("rope_scaling", Value::Null).with("rope_theta", json!(local_theta));
    let parameters = config.object().object("rope_parameters")?.filter(|parameters| parameters.nests());
    let Some(parameters) = parameters else {
        return Ok([config.clone(), sliding.with("rope_parameters", Value::Null)]);
    };
    let of = |kind: &str| {
        let missing = || ConfigError::value(format!("rope_parameters.{kind}"), "an object", "nothing");
        parameters.get(kind).cloned().ok_or_else(missing)
    };
    let full = config.with("rope_scaling", Value::Null).with("rope_parameters", of("full_attention")?);
    Ok([full, sliding.with("rope_parameters", of("sliding_attention")?)])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{attention_of, example, spec_of};
    use crate::RopeScaling;

    #[track_caller]
    fn check_error(architecture: &str, changes: Value, text: &str) {
        let error = example(architecture, changes).to_spec().unwrap_err();
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn what_a_config_leaves_out_is_the_references_default() {
        let spec = spec_of("Gemma2ForCausalLM", json!({}));
        assert_eq!(
            (attention_of(&spec).soft_cap, spec.logit_soft_cap, spec.tied_embeddings),
            (Some(50.0), Some(30.0), true)
        );
        assert_eq!((attention_of(&spec).head_dim, attention_of(&spec).scale), (256, 0.0625));
        let spec = spec_of(
            "Gemma2ForCausalLM",
            json!({"attn_logit_softcapping": null, "final_logit_softcapping": null, "query_pre_attn_scalar": 144}),
        );
        assert_eq!(
            (attention_of(&spec).soft_cap, spec.logit_soft_cap, attention_of(&spec).scale),
            (None, None, 1.0 / 12.0)
        );
        let spec = spec_of("Gemma3ForConditionalGeneration", json!({}));
        assert_eq!((spec.vocab_size, attention_of(&spec).num_heads, attention_of(&spec).num_kv_heads), (262_208, 8, 4));
        assert_eq!((attention_of(&spec).soft_cap, spec.logit_soft_cap, spec.max_positions), (None, None, 131_072));
    }

    #[test]
    fn the_factor_on_the_embedding_is_of_the_models_type() {
        let scale = |dtype| spec_of("Gemma2ForCausalLM", json!({"torch_dtype": dtype})).embedding_scale;
        assert_eq!((scale("bfloat16"), scale("float16"), scale("float32")), (59.75, 59.875, 3584f32.sqrt()));
    }

    #[test]
    fn windows_are_on_most_layers() {
        let windows = |architecture, changes| -> Vec<Option<usize>> {
            spec_of(architecture, changes).layers.iter().map(|layer| layer.window).take(7).collect()
        };
        let (some, none) = (Some(4096), None);
        assert_eq!(windows("Gemma2ForCausalLM", json!({})), [some, none, some, none, some, none, some]);
        let some = Some(512);
        assert_eq!(windows("Gemma3ForCausalLM", json!({})), [some, some, some, some, some, none, some]);
        let named = json!({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]});
        assert_eq!(windows("Gemma3ForCausalLM", named), [None, some]);
        let pattern = json!({"sliding_window_pattern": 3});
        assert_eq!(windows("Gemma3ForCausalLM", pattern), [some, some, none, some, some, none, some]);
        check_error(
            "Gemma2ForCausalLM",
            json!({"sliding_window": null}),
            "sliding_window: wanted a whole number, found nothing",
        );
    }

    #[test]
    fn both_spellings_of_two_rotary_embeddings_give_one_spec() {
        let hub =
            json!({"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"type": "linear", "factor": 8.0}});
        let v5 = json!({"rope_theta": null, "rope_local_base_freq": null, "rope_scaling": null, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}
        }});
        let hub = spec_of("Gemma3ForCausalLM", hub);
        assert_eq!(hub, spec_of("Gemma3ForCausalLM", v5));
        let ropes: Vec<_> = hub.ropes.iter().map(|rope| (rope.theta, rope.scaling.clone())).collect();
        assert_eq!(ropes, [(1e6, RopeScaling::Linear { factor: 8.0 }), (2e4, RopeScaling::None)]);
        let rope_of = |layer: usize| hub.layers[layer].rope;
        assert_eq!((rope_of(0), rope_of(4), rope_of(5), rope_of(6)), (1, 1, 0, 1));
        check_error(
            "Gemma3ForCausalLM",
            json!({"rope_parameters": {"full_attention": {}}}),
            "rope_parameters.sliding_attention: wanted an object, found nothing",
        );
    }

    #[test]
    fn what_is_not_a_decoder_of_text_is_refused() {
        check_error(
            "Gemma3ForCausalLM",
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention: true is not supported; supported: attention to earlier tokens",
        );
        check_error(
            "Gemma3ForConditionalGeneration",
            json!({"text_config": null}),
            "text_config: wanted an object, found nothing",
        );
    }
}
