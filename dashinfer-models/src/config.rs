//! `config.json` as published: read permissively, in the spelling of the hub and in that of transformers 5.

use std::path::Path;

use dashinfer_kernels::{Activation, DType};
use serde_json::{Map, Value};

use crate::{
    Attention, ConfigError, FAMILIES, GroupedAttention, LayerSpec, Mlp, ModelSpec, RopeSpec, StoredQuantization,
    TensorNames,
    dialect::Dialect,
    json::{self, Object},
};

/// A `config.json`. It keeps every key; [`to_spec`](Self::to_spec) says what they mean, or why it cannot.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    map: Map<String, Value>,
}

impl HfConfig {
    /// Reads `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// [`ConfigError::Read`] and [`ConfigError::Json`].
    pub fn read(folder: &Path) -> Result<Self, ConfigError> {
        Ok(Self { map: json::read(&folder.join("config.json"))? })
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError::Json`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Ok(Self { map: json::parse(text.as_bytes(), Path::new("config.json"))? })
    }

    /// A config of these keys.
    pub(crate) fn from_map(map: Map<String, Value>) -> Self {
        Self { map }
    }

    /// The strict description of the model.
    ///
    /// # Errors
    /// [`ConfigError::UnknownArchitecture`], [`ConfigError::Unsupported`] and [`ConfigError::Value`].
    pub fn to_spec(&self) -> Result<ModelSpec, ConfigError> {
        let name = self.architecture()?;
        let Some(family) = FAMILIES.iter().find(|family| family.architecture == name) else {
            return Err(ConfigError::UnknownArchitecture { found: name.to_owned(), known: known_architectures() });
        };
        let spec = (family.to_spec)(self)?;
        spec.check()?;
        Ok(spec)
    }

    pub(crate) fn object(&self) -> Object<'_> {
        Object::new(&self.map, "")
    }

    fn architecture(&self) -> Result<&str, ConfigError> {
        let names = self.object().texts("architectures")?.unwrap_or_default();
        let missing = || ConfigError::value("architectures", format!("one of {}", known_architectures()), "nothing");
        names.first().copied().ok_or_else(missing)
    }

    /// This config with `defaults`, a JSON object, for the keys that are absent; those that are `null` stay so. For families whose
    /// published configs leave out what the reference's class has by itself.
    pub(crate) fn with_defaults(&self, defaults: Value) -> Self {
        let Value::Object(mut map) = defaults else { unreachable!("families write an object") };
        map.extend(self.map.clone());
        Self { map }
    }

    /// The object at `key` as a config of its own, for families that put the decoder's into one of several models. The names of
    /// architecture and type, if it has none, and the quantization stay those of the whole.
    pub(crate) fn nested(&self, key: &str) -> Result<Self, ConfigError> {
        if self.object().object(key)?.is_none() {
            return Err(ConfigError::value(key, "an object", "nothing"));
        }
        let mut map = self.map[key].as_object().cloned().unwrap_or_default();
        if let Some(names) = self.map.get("architectures") {
            map.insert("architectures".to_owned(), names.clone());
        }
        for key in ["dtype", "torch_dtype", "quantization_config", "compression_config"] {
            if let (false, Some(value)) = (map.contains_key(key), self.map.get(key)) {
                map.insert(key.to_owned(), value.clone());
            }
        }
        Ok(Self { map })
    }

    /// This config with another value for `key`.
    pub(crate) fn with(&self, key: &str, value: Value) -> Self {
        let mut map = self.map.clone();
        map.insert(key.to_owned(), value);
        Self { map }
    }

    /// The facts that all families have in common: those of Llama without its biases. Every layer sees the whole context.
    pub(crate) fn llama_like(&self) -> Result<ModelSpec, ConfigError> {
        self.llama_like_in(&Dialect::LLAMA)
    }

    /// [`llama_like`](Self::llama_like), in the words of a family.
    pub(crate) fn llama_like_in(&self, keys: &Dialect) -> Result<ModelSpec, ConfigError> {
        let config = self.object();
        let hidden_size = config.required_count(keys.hidden_size)?;
        let num_heads = config.required_count(keys.num_heads)?;
        let head_dim = match config.count(keys.head_dim)? {
            Some(head_dim) => head_dim,
            None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let wanted =
                    format!("a divisor of {} {hidden_size}, as there is no {}", keys.hidden_size, keys.head_dim);
                return Err(ConfigError::value(keys.num_heads, wanted, num_heads));
            }
        };
        let attention = Attention::Grouped(GroupedAttention {
            num_heads,
            num_kv_heads: config.count(keys.num_kv_heads)?.unwrap_or(num_heads),
            head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: false,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: None,
            sinks: false,
        });
        let max_positions = config.required_count(keys.max_positions)?;
        let rope = RopeSpec::of_heads(config, head_dim, keys.rotated, max_positions, keys.pairs)?;
        self.decoder(keys, attention, rope)
    }

    /// The facts of [`llama_like`](Self::llama_like) with another attention and rotary embedding, in the words of a family.
    pub(crate) fn decoder(
        &self,
        keys: &Dialect,
        attention: Attention,
        rope: RopeSpec,
    ) -> Result<ModelSpec, ConfigError> {
        let config = self.object();
        let hidden_size = config.required_count(keys.hidden_size)?;
        let activation = activation(config, keys.activation)?.unwrap_or_default();
        let max_positions = config.required_count(keys.max_positions)?;
        let num_layers = config.required_count(keys.num_layers)?;
        ModelSpec::check_num_layers(num_layers)?; // before anything is allocated by it
        Ok(ModelSpec {
            architecture: self.architecture()?.to_owned(),
            dtype: self.dtype()?,
            vocab_size: config.required_count(keys.vocab_size)?,
            hidden_size,
            max_positions,
            // The default of all four reference classes, as are 10000 for theta and untied embeddings.
            norm_eps: config.number(keys.norm_eps)?.unwrap_or(1e-6) as f32,
            norm_offset: 0.0,
            post_norms: false,
            embedding_scale: 1.0,
            logit_soft_cap: None,
            attention,
            mlp: Mlp { size: config.required_count(keys.intermediate_size)?, bias: false, activation },
            experts: None,
            ropes: vec![rope],
            layers: vec![LayerSpec { window: None, rope: 0, experts: false }; num_layers],
            tied_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
            extra_layers: 0,
            unit_head: false,
            names: TensorNames::LLAMA,
            stored_quantization: StoredQuantization::from_config(config)?,
        })
    }

    /// The type that the config names. Weights may be stored in another; a type that we do not know is theirs to refuse.
    fn dtype(&self) -> Result<Option<DType>, ConfigError> {
        let config = self.object();
        let name = match config.text("dtype")? {
            Some(name) => Some(name),
            None => config.text("torch_dtype")?,
        };
        Ok(match name {
            Some("float32") => Some(DType::F32),
            Some("float16") => Some(DType::F16),
            Some("bfloat16") => Some(DType::BF16),
            _ => None,
        })
    }
}

/// The function on the gate that `key` names.
pub(crate) fn activation(config: Object<'_>, key: &str) -> Result<Option<Activation>, ConfigError> {
    Ok(match config.text(key)? {
        None => None,
        Some("silu" | "swish") => Some(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Some(Activation::GeluTanh),
        Some(other) => {
            return Err(ConfigError::Unsupported {
                field: config.path(key),
                found: other.into(),
                supported: "silu, gelu_pytorch_tanh".into(),
            });
        }
    })
}

fn known_architectures() -> String {
    FAMILIES.iter().map(|family| family.architecture).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::families::tests::example;

    /// A small valid config of `architecture`, with `changes` put over it.
    pub(crate) fn config(architecture: &str, changes: Value) -> HfConfig {
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "bfloat16",
            "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        HfConfig { map: config.as_object().unwrap().clone() }
    }

    #[track_caller]
    fn check_error(changes: Value, text: &str) {
        let error = config("LlamaForCausalLM", changes).to_spec().unwrap_err();
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn both_spellings_give_one_spec() {
        let hub =
            json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"});
        let v5 = json!({"rope_theta": null, "torch_dtype": null, "dtype": "float16",
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}});
        let hub = config("LlamaForCausalLM", hub).to_spec().unwrap();
        assert_eq!(hub, config("LlamaForCausalLM", v5).to_spec().unwrap());
        assert_eq!(hub.dtype, Some(DType::F16));
    }

    #[test]
    fn what_is_missing_or_null_takes_the_references_default() {
        let changes = json!({"head_dim": null, "num_key_value_heads": null, "rms_norm_eps": null, "rope_theta": null,
            "tie_word_embeddings": null, "hidden_act": null, "torch_dtype": null});
        let mut spec = config("LlamaForCausalLM", changes).to_spec().unwrap();
        assert_eq!((spec.grouped().head_dim, spec.grouped().num_kv_heads), (16, 4));
        assert_eq!((spec.norm_eps, spec.ropes[0].theta, spec.tied_embeddings), (1e-6, 10000.0, false));
        assert_eq!(spec.dtype, None);
    }

    #[test]
    fn an_unknown_architecture_is_told_the_known_ones() {
        let error = config("BertModel", json!({})).to_spec().unwrap_err().to_string();
        let known = known_architectures();
        assert_eq!(error, format!("architecture BertModel is not supported; known are {known}"));
        check_error(json!({"architectures": null}), &format!("architectures: wanted one of {known}, found nothing"));
        check_error(json!({"architectures": 3}), "architectures: wanted a list of strings, found 3");
    }

    #[test]
    fn absurd_sizes_are_refused_by_name() {
        check_error(json!({"hidden_size": null}), "hidden_size: wanted a whole number, found nothing");
        check_error(json!({"hidden_size": -5}), "hidden_size: wanted a whole number, found -5");
        check_error(json!({"hidden_size": "big"}), "hidden_size: wanted a whole number, found \"big\"");
        check_error(json!({"hidden_size": 0}), "hidden_size: wanted 1 to 1048576, found 0");
        check_error(
            json!({"hidden_size": 1_000_000_000_000_u64}),
            "hidden_size: wanted 1 to 1048576, found 1000000000000",
        );
        check_error(json!({"vocab_size": 0}), "vocab_size: wanted 1 to 16777216, found 0");
        check_error(json!({"num_hidden_layers": 0}), "num_hidden_layers: wanted 1 to 1024, found 0");
        check_error(json!({"num_hidden_layers": 9e15}), "num_hidden_layers: wanted 1 to 1024, found 9000000000000000");
        check_error(json!({"intermediate_size": 0}), "intermediate_size: wanted 1 to 4194304, found 0");
        check_error(json!({"max_position_embeddings": 0}), "max_position_embeddings: wanted 1 to 1073741824, found 0");
    }

    #[test]
    fn heads_must_fit_each_other() {
        let text = "num_attention_heads: wanted a divisor of hidden_size 64, as there is no head_dim, found 0";
        check_error(json!({"num_attention_heads": 0}), text);
        let text = "num_attention_heads: wanted a divisor of hidden_size 64, as there is no head_dim, found 3";
        check_error(json!({"num_attention_heads": 3}), text);
        check_error(json!({"num_key_value_heads": 0}), "num_key_value_heads: wanted 1 to 4096, found 0");
        check_error(
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads: wanted a divisor of num_attention_heads 4, found 3",
        );
        check_error(json!({"head_dim": 15}), "head_dim: wanted an even number of rotated values, found 15");
        check_error(json!({"head_dim": 0}), "head_dim: wanted 1 to 4096, found 0");
    }

    #[test]
    fn numbers_must_be_numbers() {
        check_error(json!({"rms_norm_eps": -1e-5}), "rms_norm_eps: wanted above 0 and below 1, found -0.00001");
        check_error(json!({"rope_theta": -1.0}), "rope_theta: wanted a finite number above 1, found -1");
        check_error(json!({"rope_theta": "x"}), "rope_theta: wanted a number, found \"x\"");
        let mut spec = config("LlamaForCausalLM", json!({})).to_spec().unwrap();
        spec.norm_eps = f32::NAN;
        assert_eq!(spec.check().unwrap_err().to_string(), "rms_norm_eps: wanted above 0 and below 1, found NaN");
        spec.norm_eps = 1e-5;
        spec.ropes[0].theta = f64::NAN;
        assert_eq!(spec.check().unwrap_err().to_string(), "rope_theta: wanted a finite number above 1, found NaN");
        assert_eq!(
            HfConfig::parse("{\"rope_theta\": NaN}").unwrap_err().to_string(),
            "config.json is not a JSON object"
        );
        assert_eq!(HfConfig::parse("[]").unwrap_err().to_string(), "config.json is not a JSON object");
    }

    #[test]
    fn sizes_that_are_sane_alone_may_be_absurd_together() {
        let changes =
            json!({"hidden_size": 1 << 20, "head_dim": 64, "intermediate_size": 1 << 22, "num_hidden_layers": 1024});
        let text = config("LlamaForCausalLM", changes).to_spec().unwrap_err().to_string();
        assert!(text.starts_with("parameters: wanted at most 8796093022208, found 1"), "{text}");
    }

    #[test]
    fn what_we_do_not_implement_is_refused_by_name() {
        check_error(
            json!({"hidden_act": "relu2"}),
            "hidden_act: relu2 is not supported; supported: silu, gelu_pytorch_tanh",
        );
        check_error(
            json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
            "quantization_config.quant_method: bitsandbytes is not supported; supported: gptq, awq, fp8, fbgemm_fp8, \
             compressed-tensors, mxfp4",
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = HfConfig::read(Path::new("no/such/folder")).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }) && error.to_string().contains("no/such/folder"), "{error}");
    }

    /// Values that have broken config readers before.
    fn nasty() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (0u64..200).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
            Just(json!([])),
            Just(json!([null, -1, "sliding_attention"])),
            Just(json!({})),
            prop_oneof![Just("linear"), Just("llama3"), Just("yarn"), Just("dynamic")].prop_flat_map(|kind| {
                (any::<f64>(), any::<u64>(), any::<f64>(), any::<f64>()).prop_map(
                    move |(factor, original, low, high)| {
                        json!({"rope_type": kind, "factor": factor, "original_max_position_embeddings": original,
                        "low_freq_factor": low, "high_freq_factor": high, "beta_fast": high, "beta_slow": low})
                    },
                )
            }),
        ]
    }

    fn any_key() -> impl Strategy<Value = &'static str> {
        prop::sample::select(
            &[
                "architectures",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "max_position_embeddings",
                "rms_norm_eps",
                "rope_theta",
                "hidden_act",
                "torch_dtype",
                "dtype",
                "head_dim",
                "rope_scaling",
                "rope_parameters",
                "sliding_window",
                "layer_types",
                "use_sliding_window",
                "max_window_layers",
                "attention_bias",
                "mlp_bias",
                "q_lora_rank",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "first_k_dense_replace",
                "moe_layer_freq",
                "num_nextn_predict_layers",
                "tie_word_embeddings",
                "quantization_config",
            ][..],
        )
    }

    proptest! {
        #[test]
        fn a_mutated_config_never_panics_and_what_passes_is_sound(
            family in 0..FAMILIES.len(),
            changes in prop::collection::vec((any_key(), nasty()), 1..5),
        ) {
            let changes = Value::Object(changes.into_iter().map(|(key, value)| (key.to_owned(), value)).collect());
            if let Ok(spec) = example(FAMILIES[family].architecture, changes).to_spec() {
                prop_assert!(spec.check().is_ok());
                for rope in &spec.ropes {
                    let rope = rope.rope(spec.max_positions);
                    prop_assert!(rope.scale.is_finite() && rope.inv_freq.iter().all(|f| f.is_finite()), "{rope:?}");
                }
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            let _ = HfConfig::parse(&text).and_then(|config| config.to_spec());
        }
    }
}
