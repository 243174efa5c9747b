//! The shapes of published models, one for each family: what the hub's `config.json` says, less what has no part in the arithmetic.

use super::Example;

pub(super) const LLAMA: Example = Example {
    model: "meta-llama/Llama-3.1-8B-Instruct",
    config: r#"{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "torch_dtype": "bfloat16"}"#,
};

pub(super) const MISTRAL: Example = Example {
    model: "mistralai/Mistral-7B-Instruct-v0.3",
    config: r#"{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": null, "torch_dtype": "bfloat16"}"#,
};

pub(super) const QWEN2: Example = Example {
    model: "Qwen/Qwen2.5-7B-Instruct",
    config: r#"{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "use_sliding_window": false, "torch_dtype": "bfloat16"}"#,
};

pub(super) const QWEN3: Example = Example {
    model: "Qwen/Qwen3-8B",
    config: r#"{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": false, "torch_dtype": "bfloat16"}"#,
};

pub(super) const GEMMA2: Example = Example {
    model: "google/gemma-2-9b-it",
    config: r#"{"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "torch_dtype": "bfloat16"}"#,
};

pub(super) const GEMMA3: Example = Example {
    model: "google/gemma-3-1b-it",
    config: r#"{"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": null,
        "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "torch_dtype": "bfloat16"}"#,
};

pub(super) const GEMMA3_TEXT: Example = Example {
    model: "google/gemma-3-4b-it",
    config: r#"{"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}, "torch_dtype": "bfloat16"}"#,
};

pub(super) const GLM: Example = Example {
    model: "THUDM/glm-4-9b-chat-hf",
    config: r#"{"hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07, "rope_theta": 5000000.0, "attention_bias": true, "torch_dtype": "bfloat16"}"#,
};

pub(super) const GLM4: Example = Example {
    model: "THUDM/GLM-4-9B-0414",
    config: r#"{"hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "attention_bias": true,
        "torch_dtype": "bfloat16"}"#,
};

pub(super) const PHI3: Example = Example {
    model: "microsoft/phi-4",
    config: r#"{"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 10, "vocab_size": 100352, "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-05, "rope_theta": 250000, "rope_scaling": null,
        "sliding_window": null, "torch_dtype": "bfloat16"}"#,
};

pub(super) const QWEN: Example = Example {
    model: "Qwen/Qwen-7B-Chat",
    config: r#"{"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "kv_channels": 128, "vocab_size": 151936, "seq_length": 8192, "max_position_embeddings": 32768,
        "layer_norm_epsilon": 1e-06, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": true, "no_bias": true,
        "use_dynamic_ntk": true, "use_logn_attn": true, "tie_word_embeddings": false, "bf16": true}"#,
};

pub(super) const BAICHUAN: Example = Example {
    model: "baichuan-inc/Baichuan-7B",
    config: r#"{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 64000, "max_position_embeddings": 4096, "model_max_length": 4096, "rms_norm_eps": 1e-06,
        "hidden_act": "silu", "torch_dtype": "float16"}"#,
};

pub(super) const BAICHUAN2: Example = Example {
    model: "baichuan-inc/Baichuan2-7B-Chat",
    config: r#"{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 125696, "max_position_embeddings": 4096, "model_max_length": 4096, "rms_norm_eps": 1e-06,
        "hidden_act": "silu", "torch_dtype": "bfloat16"}"#,
};

pub(super) const CHATGLM3: Example = Example {
    model: "THUDM/chatglm3-6b",
    config: r#"{"hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128,
        "multi_query_attention": true, "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 8192,
        "layernorm_epsilon": 1e-05, "rmsnorm": true, "post_layer_norm": true, "add_bias_linear": false, "add_qkv_bias": true,
        "apply_residual_connection_post_layernorm": false, "original_rope": true, "quantization_bit": 0,
        "pre_seq_len": null, "tie_word_embeddings": false, "torch_dtype": "float16"}"#,
};

pub(super) const CHATGLM4: Example = Example {
    model: "THUDM/glm-4-9b-chat",
    config: r#"{"hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 40, "num_attention_heads": 32, "kv_channels": 128,
        "multi_query_attention": true, "multi_query_group_num": 2, "padded_vocab_size": 151552, "seq_length": 131072,
        "layernorm_epsilon": 1.5625e-07, "rope_ratio": 500, "rmsnorm": true, "post_layer_norm": true,
        "add_bias_linear": false, "add_qkv_bias": true, "apply_residual_connection_post_layernorm": false,
        "original_rope": true, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#,
};

pub(super) const MIXTRAL: Example = Example {
    model: "mistralai/Mixtral-8x7B-Instruct-v0.1",
    config: r#"{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": null, "num_local_experts": 8, "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16"}"#,
};

pub(super) const QWEN2_MOE: Example = Example {
    model: "Qwen/Qwen1.5-MoE-A2.7B-Chat",
    config: r#"{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "norm_topk_prob": false, "vocab_size": 151936,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": false,
        "torch_dtype": "bfloat16"}"#,
};

pub(super) const QWEN3_MOE: Example = Example {
    model: "Qwen/Qwen3-30B-A3B",
    config: r#"{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": true, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": false, "torch_dtype": "bfloat16"}"#,
};

pub(super) const DEEPSEEK_V2: Example = Example {
    model: "deepseek-ai/DeepSeek-V2-Lite-Chat",
    config: r#"{"hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": false, "scoring_func": "softmax",
        "vocab_size": 102400, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}, "torch_dtype": "bfloat16"}"#,
};

pub(super) const DEEPSEEK_V3: Example = Example {
    model: "deepseek-ai/DeepSeek-V3",
    config: r#"{"hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1, "topk_method": "noaux_tc",
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": true, "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1, "vocab_size": 129280, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}, "torch_dtype": "bfloat16"}"#,
};

pub(super) const GLM4_MOE: Example = Example {
    model: "zai-org/GLM-4.5-Air",
    config: r#"{"hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "attention_bias": true, "use_qk_norm": false, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": true,
        "num_nextn_predict_layers": 1, "vocab_size": 151552, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000, "rope_scaling": null, "partial_rotary_factor": 0.5, "torch_dtype": "bfloat16"}"#,
};

pub(super) const GPT_OSS: Example = Example {
    model: "openai/gpt-oss-20b",
    config: r#"{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "attention_bias": true, "num_local_experts": 32, "num_experts_per_tok": 4,
        "swiglu_limit": 7.0, "sliding_window": 128, "vocab_size": 201088, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05, "rope_theta": 150000, "rope_scaling": {"rope_type": "yarn", "factor": 32.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096, "truncate": false}}"#,
};
