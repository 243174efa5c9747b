//! From a file's metadata to a [`ModelSpec`]: its keys become those of `config.json`, and the families say what they mean.

use dashinfer_kernels::DType;
use serde_json::{Map, Value, json};

use super::{Gguf, value::Metadata};
use crate::{
    ConfigError, ExpertMatrices, ExpertNames, HfConfig, LatentNames, ModelSpec, RopeScaling, StoredQuantization,
    StoredType, TensorNames,
};

/// What each frequency of the rotary embedding is divided by: `[R / 2]`.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The same of LongRoPE, on short contexts and on long ones: what their names start with.
const LONG_ROPE_FACTORS: &str = "rope_factors_";

/// Of `expert_gating_func`.
const BY_SIGMOID: u64 = 2;

/// More layers than these are refused anyway.
const MAX_LAYERS: u64 = 1 << 10;

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
    Architecture { name: "glm4", family: "Glm4ForCausalLM", names: FUSED_NAMES, paired_rows: false, more: biases },
    Architecture { name: "chatglm", family: "GlmForCausalLM", names: FUSED_NAMES, paired_rows: false, more: chatglm },
    Architecture { name: "phi3", family: "Phi3ForCausalLM", names: FUSED_NAMES, paired_rows: false, more: phi3 },
    Architecture { name: "qwen2moe", family: "Qwen2MoeForCausalLM", names: NAMES, paired_rows: false, more: qwen2_moe },
    Architecture { name: "qwen3moe", family: "Qwen3MoeForCausalLM", names: NAMES, paired_rows: false, more: qwen3_moe },
    Architecture {
        name: "deepseek2",
        family: "DeepseekV2ForCausalLM",
        names: NAMES,
        paired_rows: false,
        more: deepseek,
    },
    Architecture {
        name: "glm4moe",
        family: "Glm4MoeForCausalLM",
        names: POST_NAMES,
        paired_rows: false,
        more: glm4_moe,
    },
    Architecture { name: "gpt-oss", family: "GptOssForCausalLM", names: POST_NAMES, paired_rows: false, more: gpt_oss },
];

/// The names of tensors, the same in nearly all architectures.
const NAMES: TensorNames = TensorNames {
    embed: "token_embd",
    layers: "blk",
    attention_norm: "attn_norm",
    qkv: &["attn_q", "attn_k", "attn_v"],
    qk_norm: ["attn_q_norm", "attn_k_norm"],
    latent: LatentNames {
        q: "attn_q",
        q_a: "attn_q_a",
        q_a_norm: "attn_q_a_norm",
        q_b: "attn_q_b",
        kv_a: "attn_kv_a_mqa",
        kv_a_norm: "attn_kv_a_norm",
        kv_b: "attn_kv_b",
    },
    sinks: "attn_sinks.weight",
    attention_out: "attn_output",
    post_attention_norm: "post_attention_norm",
    mlp_norm: "ffn_norm",
    gate_up: &["ffn_gate", "ffn_up"],
    down: "ffn_down",
    experts: ExpertNames {
        router: "ffn_gate_inp",
        correction: "exp_probs_b.bias",
        matrices: ExpertMatrices::Numbered { gate_up: ["ffn_gate_exps", "ffn_up_exps"], down: "ffn_down_exps" },
        shared_gate_up: ["ffn_gate_shexp", "ffn_up_shexp"],
        shared_down: "ffn_down_shexp",
        shared_gate: "ffn_gate_inp_shexp",
    },
    post_mlp_norm: "post_ffw_norm",
    norm: "output_norm",
    head: "output",
    ..TensorNames::LLAMA
};

/// Gate and up in one.
const FUSED_NAMES: TensorNames = TensorNames { gate_up: &["ffn_up"], ignored: &[LONG_ROPE_FACTORS], ..NAMES };

/// The norm before the feed-forward layer by another name.
const POST_NAMES: TensorNames = TensorNames { mlp_norm: "post_attention_norm", ..NAMES };

/// q, k and v in one, which several architectures have in some of their files.
const FUSED_QKV: &[&str] = &["attn_qkv"];

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

/// As [`COUNTS`], of architectures with experts or latent attention, which say themselves what they read.
const MORE: [(&str, &str); 13] = [
    ("num_experts", "expert_count"),
    ("num_local_experts", "expert_count"),
    ("n_routed_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ("n_shared_experts", "expert_shared_count"),
    ("first_k_dense_replace", "leading_dense_block_count"),
    ("routed_scaling_factor", "expert_weights_scale"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
    ("q_lora_rank", "attention.q_lora_rank"),
    ("kv_lora_rank", "attention.kv_lora_rank"),
];

/// Llama, and Mistral and Mixtral, which files call so too: the one that says how far it sees, and the one with experts.
fn llama(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    let window = facts.count("attention.sliding_window")?.filter(|window| *window > 0);
    if let Some(window) = window {
        config.insert("architectures".into(), json!(["MistralForCausalLM"]));
        config.insert("sliding_window".into(), window.into());
    }
    if facts.count("expert_count")?.is_some_and(|experts| experts > 0) {
        config.insert("architectures".into(), json!(["MixtralForCausalLM"]));
        config.insert("sliding_window".into(), window.into());
        return facts.take(config, &["num_local_experts", "num_experts_per_tok"]);
    }
    config.insert("attention_bias".into(), facts.has("blk.0.attn_q.bias").into());
    config.insert("mlp_bias".into(), facts.has("blk.0.ffn_gate.bias").into());
    Ok(())
}

/// Whether there are biases on q, k and v is seen from the tensors.
fn biases(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    let bias = ["blk.0.attn_q.bias", "blk.0.attn_qkv.bias"].into_iter().any(|bias| facts.has(bias));
    config.insert("attention_bias".into(), bias.into());
    Ok(())
}

/// ChatGLM and GLM-4 of 2024, whose arithmetic is one; the base of the frequencies has their ratio in it.
fn chatglm(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    // How it was before files said so.
    config.entry("head_dim").or_insert_with(|| 128.into());
    biases(facts, config)
}

/// Windows, and the factors of LongRoPE.
fn phi3(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    let window = facts.count("attention.sliding_window")?.filter(|window| *window > 0);
    config.insert("sliding_window".into(), window.into());
    let original = facts.count("rope.scaling.original_context_length")?;
    let [short, long] = ["short", "long"].map(|which| facts.file.floats(&format!("{LONG_ROPE_FACTORS}{which}.weight")));
    if let (Some(short), Some(long)) = (short, long) {
        let mut scaling = json!({"rope_type": "longrope", "short_factor": short, "long_factor": long});
        if let Some(factor) = facts.number("rope.scaling.attn_factor")? {
            scaling["attention_factor"] = factor.into();
        }
        if let Some(original) = original {
            scaling["original_max_position_embeddings"] = original.into();
        }
        config.insert("rope_scaling".into(), scaling);
    }
    Ok(())
}

/// Qwen with experts, and one of every token. Their weights are no sum of one unless the file says so.
fn qwen2_moe(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    facts.experts_of_qwen(config, false)?;
    config.insert("qkv_bias".into(), facts.has("blk.0.attn_q.bias").into());
    let [size, _] = facts.shape_in_some_layer("ffn_gate_shexp.weight").unwrap_or_default();
    facts.take(config, &["shared_expert_intermediate_size"])?;
    config.entry("shared_expert_intermediate_size").or_insert_with(|| size.into());
    Ok(())
}

fn qwen3_moe(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    facts.experts_of_qwen(config, true)?;
    biases(facts, config)
}

/// DeepSeek-V2, and V3 whose experts are chosen by sigmoid.
fn deepseek(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    const EXPERT_KEYS: [&str; 5] = [
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "first_k_dense_replace",
    ];
    facts.take(config, &EXPERT_KEYS)?;
    facts.take(config, &["routed_scaling_factor", "n_group", "topk_group", "q_lora_rank", "kv_lora_rank"])?;
    // Absent, there is none; to the family that means one of a certain size.
    config.entry("q_lora_rank").or_insert(Value::Null);

    // Keys and values as attention has them after what makes them of latent vectors was taken to its other side: then the sizes of
    // heads have keys of their own.
    let size = |own: &str| {
        let own = match facts.count(&format!("attention.{own}_mla"))? {
            None => facts.count(&format!("attention.{own}"))?,
            own => own,
        };
        Ok::<_, ConfigError>(own.unwrap_or(0))
    };
    let (key_dim, value_dim, rope_dim) =
        (size("key_length")?, size("value_length")?, facts.count("rope.dimension_count")?.unwrap_or(0));
    if rope_dim >= key_dim {
        return Err(facts.unsupported(
            "rope.dimension_count",
            rope_dim,
            &format!("less than the size of keys, {key_dim}"),
        ));
    }
    config.remove("head_dim");
    for (key, value) in
        [("qk_rope_head_dim", rope_dim), ("qk_nope_head_dim", key_dim - rope_dim), ("v_head_dim", value_dim)]
    {
        config.insert(key.into(), value.into());
    }

    let by_sigmoid = facts.is_by_sigmoid()?;
    // As published of those whose files do not say.
    let published = match (by_sigmoid, facts.count("expert_count")?) {
        (false, Some(160)) => (8, 3),
        (true, Some(256)) => (8, 4),
        _ => (1, 1),
    };
    config.entry("n_group").or_insert_with(|| published.0.into());
    config.entry("topk_group").or_insert_with(|| published.1.into());
    let normalize = facts.metadata.flag(&facts.key("expert_weights_norm"))?.unwrap_or(by_sigmoid);
    if by_sigmoid {
        config.insert("architectures".into(), json!(["DeepseekV3ForCausalLM"]));
        config.insert("norm_topk_prob".into(), normalize.into());
        config.insert("num_nextn_predict_layers".into(), facts.extra_layers()?.into());
    } else if normalize {
        return Err(facts.unsupported("expert_weights_norm", true, "false where experts are chosen by softmax"));
    } else if config["n_group"] != 1 {
        config.insert("topk_method".into(), "group_limited_greedy".into());
    }
    if let (Some(scaling), Some(tenth)) =
        (config.get_mut("rope_scaling"), facts.number("rope.scaling.yarn_log_multiplier")?)
    {
        // It is one number in all that was published, on scores and on cosine and sine, which thus have a factor of 1.
        scaling["mscale"] = (10.0 * tenth).into();
        scaling["mscale_all_dim"] = (10.0 * tenth).into();
    }
    Ok(())
}

/// GLM-4.5: what the hub has in its config, and whether heads are normed is seen from the tensors.
fn glm4_moe(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    const EXPERT_KEYS: [&str; 8] = [
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "first_k_dense_replace",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
    ];
    facts.take(config, &EXPERT_KEYS)?;
    if let Some(found) = facts.count("expert_gating_func")?.filter(|found| *found != BY_SIGMOID) {
        return Err(facts.unsupported("expert_gating_func", found, "2: sigmoid"));
    }
    if let Some(normalize) = facts.metadata.flag(&facts.key("expert_weights_norm"))? {
        config.insert("norm_topk_prob".into(), normalize.into());
    }
    config.insert("num_nextn_predict_layers".into(), facts.extra_layers()?.into());
    config.insert("use_qk_norm".into(), facts.has("blk.0.attn_q_norm.weight").into());
    biases(facts, config)
}

/// Windows on every other layer from the first on, and frequencies whose ramp is not rounded to whole dimensions: what is published.
fn gpt_oss(facts: &Facts<'_>, config: &mut Map<String, Value>) -> Result<(), ConfigError> {
    facts.take(config, &["num_local_experts", "num_experts_per_tok"])?;
    // Layers have no other feed-forward layer.
    if let Some(size) = facts.count("expert_feed_forward_length")? {
        config.insert("intermediate_size".into(), size.into());
    }
    if let Some(window) = facts.count("attention.sliding_window")? {
        config.insert("sliding_window".into(), window.into());
    }
    if let Some(limit) = facts.number("swiglu_clamp_exp")? {
        config.insert("swiglu_limit".into(), limit.into());
    }
    match config.get_mut("rope_scaling") {
        Some(scaling) => scaling["truncate"] = false.into(),
        // Contexts as long as that of training.
        None => drop(config.insert("rope_scaling".into(), json!({"rope_type": "default"}))),
    }
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
    if facts.has(&format!("{}.0.{}.weight", NAMES.layers, FUSED_QKV[0])) {
        spec.names.qkv = FUSED_QKV;
    }
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

    /// Takes the values of [`MORE`] that the file has, by the keys of `config.json`.
    fn take(&self, config: &mut Map<String, Value>, keys: &[&str]) -> Result<(), ConfigError> {
        for (key, own) in MORE.iter().filter(|(key, _)| keys.contains(key)) {
            let value: Option<Value> = match *key {
                "routed_scaling_factor" => self.number(own)?.map(Value::from),
                _ => self.count(own)?.map(Value::from),
            };
            if let Some(value) = value {
                config.insert((*key).into(), value);
            }
        }
        Ok(())
    }

    /// The experts of Qwen: which layers have them, and where the file is an old one their size, is seen from the tensors.
    fn experts_of_qwen(&self, config: &mut Map<String, Value>, normalize: bool) -> Result<(), ConfigError> {
        self.take(config, &["num_experts", "num_experts_per_tok", "moe_intermediate_size"])?;
        if let Some([_, size, _]) = self.shape_in_some_layer("ffn_gate_exps.weight") {
            config.entry("moe_intermediate_size").or_insert_with(|| size.into());
        }
        let normalize = self.metadata.flag(&self.key("expert_weights_norm"))?.unwrap_or(normalize);
        config.insert("norm_topk_prob".into(), normalize.into());
        let layers = self.count("block_count")?.unwrap_or(0).min(MAX_LAYERS);
        let router = |layer: &u64| self.has(&format!("{}.{layer}.{}.weight", NAMES.layers, NAMES.experts.router));
        let dense: Vec<u64> = (0..layers).filter(|layer| !router(layer)).collect();
        config.insert("mlp_only_layers".into(), dense.into());
        Ok(())
    }

    /// The shape of a tensor in the first layer that has it, if it has so many dimensions.
    fn shape_in_some_layer<const N: usize>(&self, tensor: &str) -> Option<[usize; N]> {
        let mut names = self.file.files.iter().flat_map(|file| file.tensors());
        let is_in_a_layer = |name: &str| {
            let layer = name.strip_suffix(tensor).and_then(|rest| rest.strip_suffix('.'));
            layer.and_then(|rest| rest.strip_prefix(NAMES.layers)).is_some()
        };
        names.find(|(name, _)| is_in_a_layer(name)).and_then(|(_, stored)| stored.info.shape[..].try_into().ok())
    }

    /// Whether experts are chosen by sigmoid: the file says so by a number.
    fn is_by_sigmoid(&self) -> Result<bool, ConfigError> {
        match self.count("expert_gating_func")? {
            None | Some(0 | 1) => Ok(false),
            Some(BY_SIGMOID) => Ok(true),
            Some(found) => Err(self.unsupported("expert_gating_func", found, "1 and 2: softmax and sigmoid")),
        }
    }

    /// Layers behind the last that nobody needs, which are counted in `block_count`.
    fn extra_layers(&self) -> Result<u64, ConfigError> {
        Ok(self.count("nextn_predict_layers")?.unwrap_or(0))
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
        if let Some(layers) = config.get_mut("num_hidden_layers")
            && let Some(all) = layers.as_u64()
        {
            *layers = all.saturating_sub(self.extra_layers()?).into();
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
        // Heads over latent vectors are of other sizes, which their architecture has seen to.
        if !config.contains_key("kv_lora_rank") {
            self.check_head_sizes(&mut config)?;
        }
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
            // Its factors are tensors, of which an architecture that has them makes use; of others they are left over.
            (Some("longrope"), _) if self.has(&format!("{LONG_ROPE_FACTORS}long.weight")) => Ok(None),
            (Some(other), _) => Err(self.unsupported("rope.scaling.type", other, "none, linear, yarn")),
        }
    }

    /// A family's error, with the key of the file where it is about one.
    fn in_own_words(&self, error: ConfigError) -> ConfigError {
        let own = |field: String| {
            let found = COUNTS.iter().chain(&NUMBERS).chain(&MORE).find(|(key, _)| *key == field);
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
