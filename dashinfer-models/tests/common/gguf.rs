//! GGUF files made by plain statements of the format: of anything, and of goldens.

use std::{collections::BTreeMap, fs, path::Path};

use dashinfer_models::{Checkpoint, StoredType, WeightSource};
use serde_json::Value as Json;

/// A value of the metadata.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    U32s(Vec<u32>),
}

/// A file to be written.
#[derive(Debug, Clone)]
pub(crate) struct File {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    pub(crate) type_number: u32,
    pub(crate) bytes: Vec<u8>,
}

impl Default for File {
    fn default() -> Self {
        Self { version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() }
    }
}

impl File {
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], type_number: u32, bytes: &[u8]) {
        let (name, shape, bytes) = (name.to_owned(), shape.to_vec(), bytes.to_vec());
        self.tensors.push(Tensor { name, shape, type_number, bytes });
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            put(&mut out, value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for size in tensor.shape.iter().rev() {
                out.extend((*size as u64).to_le_bytes());
            }
            out.extend(tensor.type_number.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.bytes);
        }
        out
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    let start = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let list = |out: &mut Vec<u8>, kind: u32, len: usize| {
        start(out, 9);
        start(out, kind);
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::U32(value) => {
            start(out, 4);
            out.extend(value.to_le_bytes());
        }
        Value::F32(value) => {
            start(out, 6);
            out.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            start(out, 7);
            out.push((*value).into());
        }
        Value::Text(value) => {
            start(out, 8);
            text(out, value);
        }
        Value::Texts(values) => {
            list(out, 8, values.len());
            values.iter().for_each(|value| text(out, value));
        }
        Value::U32s(values) => {
            list(out, 4, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
    }
}

/// A golden as a GGUF file, its weights in the types that they are stored in; `None` if it is of no architecture that files have, or has
/// what they cannot say.
pub(crate) fn of_golden(folder: &Path) -> Option<File> {
    converted(folder, false)
}

/// The same, with latent attention's `kv_b` as two tensors if `split_heads`, as files have it today.
pub(crate) fn converted(folder: &Path, split_heads: bool) -> Option<File> {
    let config: Json = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let architecture = match config["architectures"][0].as_str()? {
        "LlamaForCausalLM" | "MistralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "Gemma2ForCausalLM" => "gemma2",
        "Gemma3ForCausalLM" => "gemma3",
        "Glm4ForCausalLM" => "glm4",
        "GlmForCausalLM" => "chatglm",
        "Phi3ForCausalLM" => "phi3",
        "MixtralForCausalLM" => "llama",
        "Qwen2MoeForCausalLM" => "qwen2moe",
        "Qwen3MoeForCausalLM" => "qwen3moe",
        "DeepseekV2ForCausalLM" | "DeepseekV3ForCausalLM" => "deepseek2",
        "Glm4MoeForCausalLM" => "glm4moe",
        "GptOssForCausalLM" => "gpt-oss",
        _ => return None,
    };
    let quantized = config["quantization_config"]["quant_method"].as_str();
    if config["use_sliding_window"] == true || quantized.is_some_and(|method| method != "mxfp4") {
        return None;
    }
    let whole = |key: &str| config[key].as_u64().map(|value| value as usize);
    let heads = whole("num_attention_heads").unwrap();
    let kv_heads = whole("num_key_value_heads").unwrap_or(heads);
    let head_dim = whole("head_dim").unwrap_or(whole("hidden_size").unwrap() / heads);
    let rope = [&config["rope_scaling"], &config["rope_parameters"]].into_iter().find(|rope| rope.is_object());
    // Gemma 3 has one for each kind of layer.
    let local = rope.map(|rope| &rope["sliding_attention"]).filter(|local| local.is_object());
    let rope = rope.map(|rope| if local.is_some() { &rope["full_attention"] } else { rope });
    let of_rope = |key: &str| rope.and_then(|rope| rope[key].as_f64());
    let theta = of_rope("rope_theta").or(config["rope_theta"].as_f64()).unwrap();

    let mut file = File::default();
    file.set("general.architecture", Value::Text(architecture.into()));
    let mut put = |key: &str, value: Value| file.set(&format!("{architecture}.{key}"), value);
    for (key, value) in [
        ("context_length", whole("max_position_embeddings").unwrap()),
        ("embedding_length", whole("hidden_size").unwrap()),
        ("block_count", whole("num_hidden_layers").unwrap()),
        ("feed_forward_length", whole("intermediate_size").unwrap()),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        (
            "rope.dimension_count",
            if ["glm4", "chatglm", "glm4moe"].contains(&architecture) { head_dim / 2 } else { head_dim },
        ),
    ] {
        put(key, Value::U32(value as u32));
    }
    experts(&config, &mut put);
    if architecture == "deepseek2" {
        latent(&config, split_heads, &mut put);
    }
    put("attention.layer_norm_rms_epsilon", Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32));
    put("rope.freq_base", Value::F32(theta as f32));
    if let Some(window) = whole("sliding_window")
        .filter(|window| *window > 0 && ["llama", "gemma2", "gemma3", "phi3", "gpt-oss"].contains(&architecture))
    {
        put("attention.sliding_window", Value::U32(window as u32));
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = config[key].as_f64() {
            put(key, Value::F32(cap as f32));
        }
    }
    if let Some(scalar) = config["query_pre_attn_scalar"].as_f64().filter(|scalar| *scalar != head_dim as f64) {
        put("attention.scale", Value::F32((1.0 / scalar.sqrt()) as f32));
    }
    let local = local.and_then(|rope| rope["rope_theta"].as_f64()).or(config["rope_local_base_freq"].as_f64());
    if let Some(theta) = local {
        put("rope.freq_base_swa", Value::F32(theta as f32));
    }
    let kind = rope.and_then(|rope| rope["rope_type"].as_str().or(rope["type"].as_str()));
    if kind == Some("linear") {
        put("rope.scaling.type", Value::Text("linear".into()));
        put("rope.scaling.factor", Value::F32(of_rope("factor").unwrap() as f32));
    }
    if kind == Some("yarn") {
        put("rope.scaling.type", Value::Text("yarn".into()));
        put("rope.scaling.factor", Value::F32(of_rope("factor").unwrap() as f32));
        let original = of_rope("original_max_position_embeddings").unwrap();
        put("rope.scaling.original_context_length", Value::U32(original as u32));
        if let Some(all_dim) = of_rope("mscale_all_dim") {
            put("rope.scaling.yarn_log_multiplier", Value::F32((0.1 * all_dim) as f32));
        }
    }
    if kind == Some("longrope") {
        let original = config["original_max_position_embeddings"].as_f64().unwrap();
        put("rope.scaling.original_context_length", Value::U32(original as u32));
        let factor = whole("max_position_embeddings").unwrap() as f64 / original;
        put("rope.scaling.attn_factor", Value::F32((1.0 + factor.ln() / original.ln()).sqrt() as f32));
        for (key, name) in [("short_factor", "rope_factors_short"), ("long_factor", "rope_factors_long")] {
            let factors = rope.unwrap()[key].as_array().unwrap();
            let bytes: Vec<u8> =
                factors.iter().flat_map(|factor| (factor.as_f64().unwrap() as f32).to_le_bytes()).collect();
            file.tensor(&format!("{name}.weight"), &[head_dim / 2], 0, &bytes);
        }
    }
    if kind == Some("llama3") {
        let factors = (0..head_dim / 2).map(|pair| {
            let turns = of_rope("original_max_position_embeddings").unwrap() / std::f64::consts::TAU
                * theta.powf(-2.0 * pair as f64 / head_dim as f64);
            let (low, high) = (of_rope("low_freq_factor").unwrap(), of_rope("high_freq_factor").unwrap());
            let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - keep) / of_rope("factor").unwrap() + keep)) as f32
        });
        let bytes: Vec<u8> = factors.flat_map(f32::to_le_bytes).collect();
        file.tensor("rope_freqs.weight", &[head_dim / 2], 0, &bytes);
    }
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut stacks: Stacks = BTreeMap::new();
    let extra = whole("num_hidden_layers").unwrap();
    for name in checkpoint.names() {
        // Layers that predict tokens further ahead are left out, as the usual converter does of DeepSeek.
        if architecture == "deepseek2" && name.starts_with(&format!("model.layers.{extra}.")) {
            continue;
        }
        let info = checkpoint.info(name).unwrap();
        let mut bytes = checkpoint.read(name).unwrap().into_owned();
        let StoredType::Float(dtype) = info.dtype else {
            if let Some(module) = name.strip_suffix("_blocks") {
                let scales = checkpoint.read(&format!("{module}_scales")).unwrap();
                mxfp4(&mut file, &own_module(module, architecture), &info.shape, &bytes, &scales);
            }
            continue;
        };
        if architecture == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
            bytes = paired(&bytes, info.shape[0], head_dim);
        }
        let mut type_number = match dtype.name() {
            "f32" => 0,
            "f16" => 1,
            _ => 30,
        };
        let norms_differ_from_one = architecture.starts_with("gemma") && name.ends_with("norm.weight");
        if norms_differ_from_one {
            let whole = dashinfer_kernels::to_f32(&bytes, dtype).into_iter().map(|value| value + 1.0);
            (type_number, bytes) = (0, whole.flat_map(f32::to_le_bytes).collect());
        }
        let size = dtype.size_bytes();
        if let Some((stack, expert)) = of_expert(name) {
            let stack =
                stacks.entry(own_name(&stack, architecture)).or_insert((info.shape, type_number, BTreeMap::new()));
            stack.2.insert(expert, bytes);
        } else if let Some(module) = name.strip_suffix("gate_up_proj") {
            // Columns of gate and up by turns, transposed.
            for (which, own) in ["gate_proj", "up_proj"].into_iter().enumerate() {
                let (shape, bytes) = transposed(&bytes, &info.shape, size, which, 2);
                file.tensor(
                    &format!("{}.weight", own_module(&format!("{module}{own}"), architecture)),
                    &shape,
                    type_number,
                    &bytes,
                );
            }
        } else if name.ends_with("experts.down_proj") {
            let (shape, bytes) = transposed(&bytes, &info.shape, size, 0, 1);
            file.tensor(&format!("{}.weight", own_module(name, architecture)), &shape, type_number, &bytes);
        } else if let Some(module) = name.strip_suffix("gate_up_proj_bias") {
            for (which, own) in ["gate_proj", "up_proj"].into_iter().enumerate() {
                let values: Vec<u8> = bytes.chunks(size).skip(which).step_by(2).flatten().copied().collect();
                let name = format!("{}.bias", own_module(&format!("{module}{own}"), architecture));
                file.tensor(&name, &[info.shape[0], info.shape[1] / 2], type_number, &values);
            }
        } else if let Some(module) = name.strip_suffix("_bias").filter(|module| module.ends_with("down_proj")) {
            file.tensor(&format!("{}.bias", own_module(module, architecture)), &info.shape, type_number, &bytes);
        } else if split_heads && name.ends_with("kv_b_proj.weight") {
            let [heads, nope, v] =
                ["num_attention_heads", "qk_nope_head_dim", "v_head_dim"].map(|key| whole(key).unwrap());
            let (rank, row) = (info.shape[1], info.shape[1] * size);
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for head in bytes.chunks((nope + v) * row) {
                keys.extend(transposed(&head[..nope * row], &[1, nope, rank], size, 0, 1).1);
                values.extend(&head[nope * row..]);
            }
            let layer = own_name(name, architecture).replace("attn_kv_b.weight", "");
            file.tensor(&format!("{layer}attn_k_b.weight"), &[heads, rank, nope], type_number, &keys);
            file.tensor(&format!("{layer}attn_v_b.weight"), &[heads, v, rank], type_number, &values);
        } else {
            // The usual converter leaves out what is 1.
            let shape = if name.ends_with("shared_expert_gate.weight") { &info.shape[1..] } else { &info.shape[..] };
            file.tensor(&own_name(name, architecture), shape, type_number, &bytes);
        }
    }
    for (name, (mut shape, type_number, experts)) in stacks {
        shape.insert(0, experts.len());
        file.tensor(&name, &shape, type_number, &experts.into_values().flatten().collect::<Vec<_>>());
    }
    Some(file)
}

/// By name: the shape of one, its type, and the bytes of all.
type Stacks = BTreeMap<String, (Vec<usize>, u32, BTreeMap<usize, Vec<u8>>)>;

/// What is said of experts, by the keys of the architecture.
fn experts(config: &Json, put: &mut impl FnMut(&str, Value)) {
    let whole = |key: &str| config[key].as_u64().map(|value| value as u32);
    let count = ["num_experts", "num_local_experts", "n_routed_experts"].into_iter().find_map(whole);
    let Some(count) = count else { return };
    put("expert_count", Value::U32(count));
    for (key, own) in [
        ("num_experts_per_tok", "expert_used_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ("n_shared_experts", "expert_shared_count"),
        ("first_k_dense_replace", "leading_dense_block_count"),
        ("n_group", "expert_group_count"),
        ("topk_group", "expert_group_used_count"),
    ] {
        if let Some(value) = whole(key) {
            put(own, Value::U32(value));
        }
    }
    if let Some(scale) = config["routed_scaling_factor"].as_f64() {
        put("expert_weights_scale", Value::F32(scale as f32));
    }
    if let Some(limit) = config["swiglu_limit"].as_f64() {
        put("swiglu_clamp_exp", Value::F32(limit as f32));
    }
    let architecture = config["architectures"][0].as_str().unwrap();
    if ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"].contains(&architecture) {
        put("expert_weights_norm", Value::Bool(config["norm_topk_prob"].as_bool().unwrap()));
        put("expert_gating_func", Value::U32(if architecture == "DeepseekV2ForCausalLM" { 1 } else { 2 }));
    }
    if architecture == "Glm4MoeForCausalLM" {
        // Counted with those that are there, as the usual converter does.
        put("block_count", Value::U32(whole("num_hidden_layers").unwrap() + 1));
        put("nextn_predict_layers", Value::U32(1));
    }
}

/// What is said of latent attention, in the form of one matrix or of two.
fn latent(config: &Json, split_heads: bool, put: &mut impl FnMut(&str, Value)) {
    let whole = |key: &str| config[key].as_u64().unwrap() as u32;
    let (rank, rope) = (whole("kv_lora_rank"), whole("qk_rope_head_dim"));
    let (key, value) = (whole("qk_nope_head_dim") + rope, whole("v_head_dim"));
    put("attention.kv_lora_rank", Value::U32(rank));
    if let Some(rank) = config["q_lora_rank"].as_u64() {
        put("attention.q_lora_rank", Value::U32(rank as u32));
    }
    put("rope.dimension_count", Value::U32(rope));
    if split_heads {
        put("attention.head_count_kv", Value::U32(1));
        put("attention.key_length", Value::U32(rank + rope));
        put("attention.value_length", Value::U32(rank));
        put("attention.key_length_mla", Value::U32(key));
        put("attention.value_length_mla", Value::U32(value));
    } else {
        put("attention.key_length", Value::U32(key));
        put("attention.value_length", Value::U32(value));
    }
}

/// The tensor that an expert's is stacked in, by a name as of the hub, and which expert it is.
fn of_expert(name: &str) -> Option<(String, usize)> {
    let (start, rest) = name.split_once(".experts.")?;
    let (expert, module) = rest.split_once('.')?;
    Some((format!("{start}.experts.{module}"), expert.parse().ok()?))
}

/// Columns `first`, `first + step`, .. of each of `[count, cols, width]`, as rows.
fn transposed(bytes: &[u8], shape: &[usize], size: usize, first: usize, step: usize) -> (Vec<usize>, Vec<u8>) {
    let &[count, cols, width] = shape else { panic!("three dimensions") };
    let mut out = Vec::new();
    for matrix in bytes.chunks(cols * width * size) {
        for row in (first..width).step_by(step) {
            for col in 0..cols {
                out.extend(&matrix[(col * width + row) * size..][..size]);
            }
        }
    }
    (vec![count, width / step, cols], out)
}

/// Experts in MXFP4: rows of gate and up stand apart, an exponent before each block, and its halves are low and high.
fn mxfp4(file: &mut File, own: &str, shape: &[usize], blocks: &[u8], scales: &[u8]) {
    let &[count, rows, in_row, 16] = shape else { panic!("blocks of 16 bytes") };
    let all: Vec<Vec<u8>> = blocks
        .chunks(16)
        .zip(scales)
        .map(|(block, scale)| {
            let code = |i: usize| block[i / 2] >> (i % 2 * 4) & 15;
            std::iter::once(*scale).chain((0..16).map(|i| code(i) | code(16 + i) << 4)).collect()
        })
        .collect();
    let mut put = |own: &str, first: usize, step: usize| {
        let rows = all.chunks(in_row).enumerate().filter(|(row, _)| row % step == first).map(|(_, row)| row.concat());
        let bytes: Vec<u8> = rows.flatten().collect();
        file.tensor(&format!("{own}.weight"), &[count, bytes.len() / 17 / in_row / count, in_row * 32], MXFP4, &bytes);
    };
    match own.strip_suffix("ffn_gate_up_exps") {
        Some(layer) => {
            put(&format!("{layer}ffn_gate_exps"), 0, 2);
            put(&format!("{layer}ffn_up_exps"), 1, 2);
        }
        None => put(own, 0, 1),
    }
    debug_assert!(rows.is_multiple_of(2));
}

/// The number of the type.
pub(crate) const MXFP4: u32 = 39;

/// Rows `i` and `i + D / 2` of each head, side by side.
fn paired(bytes: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / rows;
    let row = |row: usize| &bytes[row * row_bytes..][..row_bytes];
    let place = |new: usize| {
        let (head, within) = (new / head_dim, new % head_dim);
        head * head_dim + within % 2 * (head_dim / 2) + within / 2
    };
    (0..rows).flat_map(|new| row(place(new)).to_vec()).collect()
}

fn own_name(name: &str, architecture: &str) -> String {
    if let Some(layer) = name.strip_suffix(".self_attn.sinks") {
        return format!("{}.attn_sinks.weight", layer.replace("model.layers", "blk"));
    }
    if let Some(layer) = name.strip_suffix(".mlp.gate.e_score_correction_bias") {
        return format!("{}.exp_probs_b.bias", layer.replace("model.layers", "blk"));
    }
    let (module, kind) = name.rsplit_once('.').unwrap();
    format!("{}.{kind}", own_module(module, architecture))
}

fn own_module(module: &str, architecture: &str) -> String {
    let own = |module: &str| match module {
        "post_attention_layernorm" if architecture.starts_with("gemma") => "post_attention_norm",
        "post_attention_layernorm" if ["gpt-oss", "glm4moe"].contains(&architecture) => "post_attention_norm",
        "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" | "post_mlp_layernorm" => "post_ffw_norm",
        "post_self_attn_layernorm" => "post_attention_norm",
        "mlp.gate_up_proj" => "ffn_up",
        "model.embed_tokens" => "token_embd",
        "model.norm" => "output_norm",
        "lm_head" => "output",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.q_a_proj" => "attn_q_a",
        "self_attn.q_a_layernorm" => "attn_q_a_norm",
        "self_attn.q_b_proj" => "attn_q_b",
        "self_attn.kv_a_proj_with_mqa" => "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm" => "attn_kv_a_norm",
        "self_attn.kv_b_proj" => "attn_kv_b",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" | "mlp.router" | "block_sparse_moe.gate" => "ffn_gate_inp",
        "mlp.experts.gate_proj" | "block_sparse_moe.experts.w1" => "ffn_gate_exps",
        "mlp.experts.up_proj" | "block_sparse_moe.experts.w3" => "ffn_up_exps",
        "mlp.experts.down_proj" | "block_sparse_moe.experts.w2" => "ffn_down_exps",
        "mlp.experts.gate_up_proj" => "ffn_gate_up_exps",
        "mlp.shared_expert.gate_proj" | "mlp.shared_experts.gate_proj" => "ffn_gate_shexp",
        "mlp.shared_expert.up_proj" | "mlp.shared_experts.up_proj" => "ffn_up_shexp",
        "mlp.shared_expert.down_proj" | "mlp.shared_experts.down_proj" => "ffn_down_shexp",
        "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
        other => panic!("{other} has no name"),
    };
    match module.strip_prefix("model.layers.") {
        Some(rest) => {
            let (layer, part) = rest.split_once('.').unwrap();
            format!("blk.{layer}.{}", own(part))
        }
        None => own(module).to_owned(),
    }
}
