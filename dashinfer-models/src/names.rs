//! What checkpoints call their tensors: facts of a family, like all others.

/// The names of the modules that hold parameters. A module's tensors are `{module}.weight` and, where it has one, `{module}.bias`.
///
/// Those of a layer stand behind `{layers}.{index}.`. A name is of no meaning where a model has no such parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorNames {
    /// The embedding.
    pub embed: &'static str,
    /// What the layers' names start with.
    pub layers: &'static str,
    /// The norm before attention.
    pub attention_norm: &'static str,
    /// The projections to q, k and v: three modules, or one that has them stacked in this order.
    pub qkv: &'static [&'static str],
    /// The norms on q and k heads.
    pub qk_norm: [&'static str; 2],
    /// The modules of latent attention.
    pub latent: LatentNames,
    /// The sinks of attention: the whole name of a tensor.
    pub sinks: &'static str,
    /// The output projection of attention.
    pub attention_out: &'static str,
    /// The norm behind attention, of models with [`post_norms`](crate::ModelSpec::post_norms).
    pub post_attention_norm: &'static str,
    /// The norm before the feed-forward layer.
    pub mlp_norm: &'static str,
    /// The projections to gate and up: two modules, or one that has them stacked in this order.
    pub gate_up: &'static [&'static str],
    /// The output projection of the feed-forward layer.
    pub down: &'static str,
    /// Those of layers with experts.
    pub experts: ExpertNames,
    /// The norm behind the feed-forward layer, of models with [`post_norms`](crate::ModelSpec::post_norms).
    pub post_mlp_norm: &'static str,
    /// The last norm.
    pub norm: &'static str,
    /// The output matrix.
    pub head: &'static str,
    /// What the names of tensors start with that are of no use to a decoder of text, such as an encoder of images.
    pub ignored: &'static [&'static str],
}

/// The names of latent attention's modules, within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatentNames {
    /// The projection to queries, where they are made of the hidden state.
    pub q: &'static str,
    /// The projection to the vector that queries are made of.
    pub q_a: &'static str,
    /// Its norm.
    pub q_a_norm: &'static str,
    /// The projection from it to queries.
    pub q_b: &'static str,
    /// The projection to the vector that keys and values are made of, and the rotated part of keys behind it.
    pub kv_a: &'static str,
    /// The norm of that vector.
    pub kv_a_norm: &'static str,
    /// The projection from it to keys and values, head by head.
    pub kv_b: &'static str,
}

impl LatentNames {
    /// Those of DeepSeek on the hub.
    pub const DEEPSEEK: Self = Self {
        q: "self_attn.q_proj",
        q_a: "self_attn.q_a_proj",
        q_a_norm: "self_attn.q_a_layernorm",
        q_b: "self_attn.q_b_proj",
        kv_a: "self_attn.kv_a_proj_with_mqa",
        kv_a_norm: "self_attn.kv_a_layernorm",
        kv_b: "self_attn.kv_b_proj",
    };
}

/// The names of a layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertNames {
    /// The router.
    pub router: &'static str,
    /// What corrects its choice: the whole name of a tensor.
    pub correction: &'static str,
    /// Those of the experts that are chosen.
    pub matrices: ExpertMatrices,
    /// The projections to gate and up of the shared expert.
    pub shared_gate_up: [&'static str; 2],
    /// The output projection of the shared expert.
    pub shared_down: &'static str,
    /// The gate on what the shared expert computes.
    pub shared_gate: &'static str,
}

/// How the matrices of a layer's experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpertMatrices {
    /// Each in a module of its own, those of expert `i` behind `{experts}.{i}.`.
    Each {
        /// What their names start with.
        experts: &'static str,
        /// The projections to gate and up.
        gate_up: [&'static str; 2],
        /// The output projection.
        down: &'static str,
    },
    /// Each in a module of its own, that of expert `i` behind the name of a layer's: `{down}.{i}` (GGUF files, whose stacked tensors are
    /// listed as so many).
    Numbered {
        /// The projections to gate and up.
        gate_up: [&'static str; 2],
        /// The output projection.
        down: &'static str,
    },
    /// Transposed, and stacked in one tensor for all of a layer's experts, with the biases beside it in `{name}_bias` (gpt-oss).
    Stacked {
        /// `[N, E, 2 F]`: columns of gate and up by turns. The whole name.
        gate_up: &'static str,
        /// `[N, F, E]`. The whole name.
        down: &'static str,
    },
}

impl ExpertNames {
    /// The names of Qwen, from which others differ in a few.
    pub const QWEN: Self = Self {
        router: "mlp.gate",
        correction: "mlp.gate.e_score_correction_bias",
        matrices: ExpertMatrices::Each { experts: "mlp.experts", gate_up: ["gate_proj", "up_proj"], down: "down_proj" },
        shared_gate_up: ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
        shared_down: "mlp.shared_expert.down_proj",
        shared_gate: "mlp.shared_expert_gate",
    };
}

impl TensorNames {
    /// The names of Llama, Mistral and Qwen on the hub, from which others differ in a few.
    pub const LLAMA: Self = Self {
        embed: "model.embed_tokens",
        layers: "model.layers",
        attention_norm: "input_layernorm",
        qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
        latent: LatentNames::DEEPSEEK,
        sinks: "self_attn.sinks",
        attention_out: "self_attn.o_proj",
        post_attention_norm: "post_self_attn_layernorm",
        mlp_norm: "post_attention_layernorm",
        gate_up: &["mlp.gate_proj", "mlp.up_proj"],
        down: "mlp.down_proj",
        experts: ExpertNames::QWEN,
        post_mlp_norm: "post_mlp_layernorm",
        norm: "model.norm",
        head: "lm_head",
        ignored: &[],
    };
}
