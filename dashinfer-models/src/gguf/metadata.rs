//! From a file's metadata to a [`ModelSpec`]: its keys become those of `config.json`, and the families say what they mean.

use dashinfer_kernels::DType;
use serde_json::{Map, Value, json};

use super::{Gguf, value::Metadata};
use crate::{ConfigError, HfConfig, ModelSpec, RopeScaling, StoredQuantization, StoredType, TensorNames};

/// What each frequency of the rotary embedding is divided by: `[R / 2]`.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An architecture of GGUF files.
struct Architecture {
    /// Its name in `general.architecture`, and what its keys start with.
    name: &'static str,
    /// The family that it is.
    family: &'static str,
    /// What it calls its tensors.
    names: TensorNames,
    /// Whether the rows of q and k are in an order that makes the values of a rotated pair neighbours.
    paired_rows: bool,
    /// What it has beyond the facts that all of them share.
    more: fn(&Facts<'_>, &mut Map<String, Value>) -> Result<(), ConfigError>,
}

/// Those that we read.
static ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "llama", family: "LlamaForCausalLM", names: NAMES, paired_rows: true, more: llama },
    Architecture { name: "qwen2", family: "Qwen2ForCausalLM", names: NAMES, paired_rows: false, more: |_, _| Ok(()) },
    Architecture { name: "qwen3", family: "Qwen3ForCausalLM", names: NAMES, paired_rows: false, more: biases },
    Architecture { name: "gemma2", family: "Gemma2ForCausalLM", names: NAMES, paired_rows: false, more: gemma2 },
    Architecture { name: "gemma3", family: "Gemma3ForCausalLM", names: NAMES, paired_rows: false, more: gemma3 },
    Architecture { name: "glm4", family: "Glm4ForCausalLM", names: GLM4_NAMES, paired_rows: false, more: biases },
];

/// The names of tensors, the same in nearly all architectures.
const NAMES: TensorNames = TensorNames {
    embed: "token_embd",
    layers: "blk",
    attention_norm: "attn_norm",
    qkv: &["attn_q", "attn_k", "attn_v"],
    qk_norm: ["attn_q_norm", "attn_k_norm"],
    sinks: "attn_sinks.weight",
    attention_out: "attn_output",
    post_attention_norm: "post_attention_norm",
    mlp_norm: "ffn_norm",
    gate_up: &["ffn_gate", "ffn_up"],
    down: "ffn_down",
    post_mlp_norm: "post_ffw_norm",
    norm: "output_norm",
    head: "output",
    ..TensorNames::LLAMA
};

/// Gate and up in one.
const GLM4_NAMES: TensorNames = TensorNames { gate_up: &["ffn_up"], ..NAMES };

/// Keys of `config.json` that are whole numbers, and of which key behind the architecture's name they are.
const COUNTS: [(&str, &str); 8] = [
    ("hidden_size", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("max_position_embeddings", "context_length"),
    ("head_dim", "attention.key_length"),
    ("vocab_size", "vocab_size"),
];

/// As [`COUNTS`], of numbers.
const NUMBERS: [(&str, &str); 2] =
    [("rms_norm_eps", "attention.layer_norm_rms_epsilon"), ("rope_theta", "rope.freq_base")];

/// Llama, and Mistral, which files call so too: the one that says how far it sees.
fn llama(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    if let Some(experts) = facts.count("expert_count")?.filter(|experts| *experts > 0) {
        return Err(facts.unsupported("expert_count", experts, "llama without experts"));
    }
    if let Some(window) = facts.count("attention.sliding_window")?.filter(|window| *window > 0) {
        config.insert("architectures".into(), json!(["MistralForCausalLM"]));
        config.insert("sliding_window".into(), window.into());
    }
    config.insert("attention_bias".into(), facts.has("blk.0.attn_q.bias").into());
    config.insert("mlp_bias".into(), facts.has("blk.0.ffn_gate.bias").into());
    Ok(())
}

/// Whether there are biases on q, k and v is seen from the tensors.
fn biases(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    config.insert("attention_bias".into(), facts.has("blk.0.attn_q.bias").into());
    Ok(())
}

fn gemma2(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    facts.gemma(config, 46)?;
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = facts.number(key)? {
            config.insert(key.into(), cap.into());
        }
    }
    Ok(())
}

fn gemma3(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    facts.gemma(config, 62)?;
    config.insert("rope_local_base_freq".into(), facts.number("rope.freq_base_swa")?.unwrap_or(1e4).into());
    if let Some(pattern) = facts.count("attention.sliding_window_pattern")? {
        config.insert("sliding_window_pattern".into(), pattern.into());
    }
    if facts.number("final_logit_softcapping")?.is_some_and(|cap| cap != 0.0) {
        return Err(facts.unsupported("final_logit_softcapping", "a soft cap", "none"));
    }
    Ok(())
}

/// A file, asked by keys without the architecture's name before them.
struct Facts<'a> {
    file: &'a Gguf,
    metadata: Metadata<'a>,
    architecture: &'static Architecture,
}

fn architecture(metadata: Metadata<'_>) -> Result<&'static Architecture, ConfigError> {
    let known = || ARCHITECTURES.iter().map(|known| known.name).collect::<Vec<_>>().join(", ");
    let Some(name) = metadata.text("general.architecture")? else {
        return Err(ConfigError::value("general.architecture", format!("one of {}", known()), "nothing"));
    };
    let found = ARCHITECTURES.iter().find(|known| known.name == name);
    found.ok_or_else(|| ConfigError::UnknownArchitecture { found: name.to_owned(), known: known() })
}

/// Whether the rows of q and k are in an order that makes the values of a rotated pair neighbours.
pub(super) fn rows_are_paired(metadata: Metadata<'_>) -> bool {
    architecture(metadata).is_ok_and(|architecture| architecture.paired_rows)
}

pub(super) fn spec(file: &Gguf) -> Result<ModelSpec, ConfigError> {
    let metadata = file.files[0].metadata();
    let architecture = architecture(metadata)?;
    let facts = Facts { file, metadata, architecture };
    let config = facts.config()?;
    let mut spec = HfConfig::from_map(config).to_spec().map_err(|error| facts.in_own_words(error))?;
    spec.names = architecture.names;
    // Files have norms as they are multiplied with, also where checkpoints have what they differ from 1 by.
    spec.norm_offset = 0.0;
    let mut stored = file.files.iter().flat_map(|file| file.tensors().values());
    let in_blocks = stored.any(|stored| matches!(stored.info.dtype, StoredType::Blocks(_)));
    spec.stored_quantization = in_blocks.then_some(StoredQuantization::BLOCKS);
    spec.dtype = facts.most_stored();
    if let Some(divisors) = file.floats(ROPE_FACTORS) {
        let rope = &mut spec.ropes[0];
        if rope.scaling != RopeScaling::None {
            let found = format!("{ROPE_FACTORS} beside {}", facts.key("rope.scaling.type"));
            return Err(ConfigError::Unsupported {
                field: "rotary embedding".into(),
                found,
                supported: "one of them".into(),
            });
        }
        // What scaling of another kind comes to: on contexts of any length the same.
        let factors: Vec<f64> = divisors.into_iter().map(f64::from).collect();
        rope.scaling = RopeScaling::Long {
            short_factors: factors.clone(),
            long_factors: factors,
            attention_factor: 1.0,
            original_max_positions: spec.max_positions as f64,
        };
    }
    spec.check()?;
    Ok(spec)
}

impl Facts<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    fn count(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        self.metadata.count(&self.key(key))
    }

    /// A number that JSON has too.
    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let key = self.key(key);
        match self.metadata.number(&key)? {
            Some(number) if !number.is_finite() => Err(ConfigError::value(key, "a finite number", number)),
            other => Ok(other),
        }
    }

    fn has(&self, tensor: &str) -> bool {
        self.file.shape(tensor).is_some()
    }

    fn unsupported(&self, key: &str, found: impl std::fmt::Display, supported: &str) -> ConfigError {
        ConfigError::Unsupported { field: self.key(key), found: found.to_string(), supported: supported.to_owned() }
    }

    /// The `config.json` that the file stands for.
    fn config(&self) -> Result<Map<String, Value>, ConfigError> {
        let mut config = Map::new();
        config.insert("architectures".into(), json!([self.architecture.family]));
        for (key, own) in COUNTS {
            if let Some(count) = self.count(own)? {
                config.insert(key.into(), count.into());
            }
        }
        for (key, own) in NUMBERS {
            if let Some(number) = self.number(own)? {
                config.insert(key.into(), number.into());
            }
        }
        // Tokenizers are padded to the model's vocabulary or not; the embedding is what it is.
        if let Some([rows, _]) = self.file.shape(&format!("{}.weight", NAMES.embed)) {
            config.insert("vocab_size".into(), (*rows).into());
        }
        config.insert("tie_word_embeddings".into(), (!self.has(&format!("{}.weight", NAMES.head))).into());
        if let Some(scaling) = self.rope_scaling()? {
            config.insert("rope_scaling".into(), scaling);
        }
        (self.architecture.more)(self, &mut config)?;
        self.check_head_sizes(&mut config)?;
        Ok(config)
    }

    /// What Gemma 2 and 3 share. The largest of each, which has `largest` layers, scales scores by the width of its stream instead of the
    /// head size; most files do not say so.
    fn gemma(&self, config: &mut Map<String, Value>, largest: u64) -> Result<(), ConfigError> {
        let number = |key: &str| config.get(key).and_then(Value::as_u64);
        let sizes = (number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads"));
        let scalar = match sizes {
            (Some(layers), Some(hidden), Some(heads @ 1..)) if layers == largest => Some(hidden / heads),
            (_, Some(hidden), Some(heads @ 1..)) => number("head_dim").or(Some(hidden / heads)),
            _ => None, // the family refuses it
        };
        let stated = self.number("attention.scale")?.map(|scale| scale.powi(-2));
        if let Some(scalar) = stated.or(scalar.map(|scalar| scalar as f64)) {
            config.insert("query_pre_attn_scalar".into(), scalar.into());
        }
        if let Some(window) = self.count("attention.sliding_window")? {
            config.insert("sliding_window".into(), window.into());
        }
        // The factor on the embedding is rounded to the type that the models were trained in, as in the reference.
        config.insert("torch_dtype".into(), "bfloat16".into());
        Ok(())
    }

    /// Keys and values of one size; and how much of it is rotated.
    fn check_head_sizes(&self, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
        let number = |key: &str| config.get(key).and_then(Value::as_u64);
        let head_dim = match (number("head_dim"), number("hidden_size"), number("num_attention_heads")) {
            (Some(head_dim), ..) => head_dim,
            (None, Some(hidden), Some(heads @ 1..)) => hidden / heads,
            _ => return Ok(()), // the family refuses it
        };
        if let Some(found) = self.count("attention.value_length")?.filter(|found| *found != head_dim) {
            return Err(self.unsupported("attention.value_length", found, &format!("the head size {head_dim}")));
        }
        if let Some(rotated) = self.count("rope.dimension_count")?.filter(|rotated| *rotated != head_dim) {
            config.insert("partial_rotary_factor".into(), (rotated as f64 / head_dim as f64).into());
        }
        Ok(())
    }

    fn rope_scaling(&self) -> Result<Option<Value>, ConfigError> {
        let kind = self.metadata.text(&self.key("rope.scaling.type"))?;
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?, // the older name
        };
        match (kind, factor) {
            (Some("none"), _) | (None, None) => Ok(None),
            (None | Some("linear"), Some(factor)) => {
                Ok((factor != 1.0).then(|| json!({"rope_type": "linear", "factor": factor})))
            }
            (Some("yarn"), Some(factor)) => {
                let mut yarn = json!({"rope_type": "yarn", "factor": factor});
                let numbers = [
                    ("original_max_position_embeddings", "rope.scaling.original_context_length"),
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ];
                for (key, own) in numbers {
                    if let Some(number) = self.number(own)? {
                        yarn[key] = number.into();
                    }
                }
                for key in ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"] {
                    if let Some(found) = self.number(key)?.filter(|found| *found != 1.0) {
                        return Err(self.unsupported(key, found, "1"));
                    }
                }
                Ok(Some(yarn))
            }
            (Some("linear" | "yarn"), None) => {
                Err(ConfigError::value(self.key("rope.scaling.factor"), "a number", "nothing"))
            }
            (Some(other), _) => Err(self.unsupported("rope.scaling.type", other, "none, linear, yarn")),
        }
    }

    /// A family's error, with the key of the file where it is about one.
    fn in_own_words(&self, error: ConfigError) -> ConfigError {
        let own = |field: String| {
            let found = COUNTS.iter().chain(&NUMBERS).find(|(key, _)| *key == field);
            found.map_or(field, |(_, own)| self.key(own))
        };
        match error {
            ConfigError::Value { field, wanted, found } => ConfigError::Value { field: own(field), wanted, found },
            ConfigError::Unsupported { field, found, supported } => {
                ConfigError::Unsupported { field: own(field), found, supported }
            }
            other => other,
        }
    }

    /// The floating-point type of the embedding: there is no other word about what the model was trained in.
    fn most_stored(&self) -> Option<DType> {
        let name = format!("{}.weight", NAMES.embed);
        let file = self.file.files.iter().find_map(|file| file.tensors().get(&name))?;
        if let StoredType::Float(dtype) = file.info.dtype { Some(dtype) } else { None }
    }
}
