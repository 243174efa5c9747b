//! Families whose code came with their checkpoints.

use dashinfer_kernels::{cpu::to_bytes, to_f32};
use serde_json::json;

use super::*;

/// Llama's names of modules, and others in their place: within a layer, and outside of one.
fn renamed(tensors: Tensors, layers: &str, names: &[(&str, &str)]) -> Tensors {
    tensors.rename(|name| {
        let (module, kind) = name.rsplit_once('.').unwrap();
        let (place, module) = match module.strip_prefix("model.layers.") {
            Some(rest) => {
                let (layer, module) = rest.split_once('.').unwrap();
                (format!("{layers}.{layer}."), module)
            }
            None => (String::new(), module),
        };
        let other = names.iter().find(|(llama, _)| *llama == module).map_or(module, |(_, other)| *other);
        format!("{place}{other}.{kind}")
    })
}

#[test]
fn the_first_qwen_is_qwen2_by_other_names() {
    let case = case("qwen2-untied");
    let theirs = config_of(&case);
    let mut config = json!({"architectures": ["QWenLMHeadModel"], "use_dynamic_ntk": true, "use_logn_attn": true,
        "no_bias": true, "scale_attn_weights": true, "rotary_pct": 1.0, "max_position_embeddings": 32768, "bf16": true});
    let inner = theirs["intermediate_size"].as_u64().unwrap();
    let (heads, kv_heads) =
        (theirs["num_attention_heads"].as_u64().unwrap(), theirs["num_key_value_heads"].as_u64().unwrap());
    config["intermediate_size"] = json!(2 * inner);
    for (key, name) in [
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "num_hidden_layers"),
        ("num_attention_heads", "num_attention_heads"),
        ("vocab_size", "vocab_size"),
        ("seq_length", "max_position_embeddings"),
        ("layer_norm_epsilon", "rms_norm_eps"),
        ("rotary_emb_base", "rope_theta"),
    ] {
        config[key] = theirs[name].clone();
    }
    let head_dim = theirs["hidden_size"].as_u64().unwrap() / heads;
    config["kv_channels"] = json!(head_dim);
    let tensors = Tensors::of_folder(&case.folder)
        .repeat_heads(&["self_attn.k_proj", "self_attn.v_proj"], head_dim as usize, (heads / kv_heads) as usize)
        .fuse(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.c_attn");
    let names = [
        ("self_attn.c_attn", "attn.c_attn"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("mlp.up_proj", "mlp.w1"),
        ("mlp.gate_proj", "mlp.w2"),
        ("mlp.down_proj", "mlp.c_proj"),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
    ];
    check(&case, &spec(&config), &renamed(tensors, "transformer.h", &names), |_| ());
}

#[test]
fn baichuan_is_llama_with_q_k_and_v_in_one() {
    let case = case("llama-mha");
    let mut config = config_of(&case);
    config["architectures"] = json!(["BaiChuanForCausalLM"]);
    let parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    let tensors = Tensors::of_folder(&case.folder).fuse(&parts, "self_attn.W_pack");
    check(&case, &spec(&config), &tensors, |_| ());
}

/// The case's logits are those of rows of any length: with rows of length 1 they are smaller by it.
#[test]
fn the_head_of_baichuan2_is_normalized() {
    let case = case("llama-mha");
    let mut config = config_of(&case);
    config["architectures"] = json!(["BaichuanForCausalLM"]);
    config["z_loss_weight"] = json!(0);
    let parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    let mut tensors = Tensors::of_folder(&case.folder).fuse(&parts, "self_attn.W_pack");
    // In f32, so that rounding rows again is nothing beside the bounds.
    let head = tensors.0.get_mut("lm_head.weight").unwrap();
    let StoredType::Float(dtype) = head.info.dtype else { panic!("not a float") };
    let values = to_f32(&head.bytes, dtype);
    head.bytes = to_bytes(&values, dashinfer_kernels::DType::F32);
    head.info.dtype = StoredType::Float(dashinfer_kernels::DType::F32);
    let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let lengths: Vec<f32> = values.chunks_exact(head.info.shape[1]).map(length).collect();
    let spec = spec(&config);
    assert!(spec.unit_head && lengths.iter().all(|length| (length - 1.0).abs() > 1e-3));
    let fix = |logits: &mut [f32]| logits.iter_mut().zip(&lengths).for_each(|(logit, length)| *logit *= length);
    check(&case, &spec, &tensors, fix);
}

#[test]
fn chatglm_is_glm_by_other_names() {
    let case = case("glm");
    let theirs = config_of(&case);
    for architecture in ["ChatGLMModel", "ChatGLMForConditionalGeneration"] {
        let mut config = json!({"architectures": [architecture], "multi_query_attention": true, "rmsnorm": true,
            "add_qkv_bias": true, "add_bias_linear": false, "post_layer_norm": true, "original_rope": true, "rope_ratio": 1,
            "apply_residual_connection_post_layernorm": false, "apply_query_key_layer_scaling": true});
        for (key, name) in [
            ("hidden_size", "hidden_size"),
            ("ffn_hidden_size", "intermediate_size"),
            ("num_layers", "num_hidden_layers"),
            ("num_attention_heads", "num_attention_heads"),
            ("multi_query_group_num", "num_key_value_heads"),
            ("kv_channels", "head_dim"),
            ("padded_vocab_size", "vocab_size"),
            ("seq_length", "max_position_embeddings"),
            ("layernorm_epsilon", "rms_norm_eps"),
        ] {
            config[key] = theirs[name].clone();
        }
        let tensors = Tensors::of_folder(&case.folder)
            .fuse(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn.query_key_value");
        let names = [
            ("self_attn.query_key_value", "self_attention.query_key_value"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("model.embed_tokens", "transformer.embedding.word_embeddings"),
            ("model.norm", "transformer.encoder.final_layernorm"),
            ("lm_head", "transformer.output_layer"),
        ];
        let mut tensors = renamed(tensors, "transformer.encoder.layers", &names);
        tensors.add("transformer.rotary_pos_emb.inv_freq", &[4]);
        check(&case, &spec(&config), &tensors, |_| ());
    }
}
