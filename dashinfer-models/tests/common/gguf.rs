//! GGUF files made by plain statements of the format: of anything, and of goldens.

use std::{fs, path::Path};

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
    let config: Json = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let architecture = match config["architectures"][0].as_str()? {
        "LlamaForCausalLM" | "MistralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "Gemma2ForCausalLM" => "gemma2",
        "Gemma3ForCausalLM" => "gemma3",
        "Glm4ForCausalLM" => "glm4",
        _ => return None,
    };
    if config["use_sliding_window"] == true || config.get("quantization_config").is_some() {
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
        ("rope.dimension_count", if architecture == "glm4" { head_dim / 2 } else { head_dim }),
    ] {
        put(key, Value::U32(value as u32));
    }
    put("attention.layer_norm_rms_epsilon", Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32));
    put("rope.freq_base", Value::F32(theta as f32));
    if let Some(window) = whole("sliding_window").filter(|_| ["llama", "gemma2", "gemma3"].contains(&architecture)) {
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
    for name in checkpoint.names() {
        let info = checkpoint.info(name).unwrap();
        let StoredType::Float(dtype) = info.dtype else { panic!("{name} is quantized") };
        let mut bytes = checkpoint.read(name).unwrap().into_owned();
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
        file.tensor(&own_name(name, architecture), &info.shape, type_number, &bytes);
    }
    Some(file)
}

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
    let (module, kind) = name.rsplit_once('.').unwrap();
    let own = |module: &str| match module {
        "post_attention_layernorm" if architecture.starts_with("gemma") => "post_attention_norm",
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
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => panic!("{other} has no name"),
    };
    match module.strip_prefix("model.layers.") {
        Some(rest) => {
            let (layer, part) = rest.split_once('.').unwrap();
            format!("blk.{layer}.{}.{kind}", own(part))
        }
        None => format!("{}.{kind}", own(module)),
    }
}
