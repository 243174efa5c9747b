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
    /// The norm behind the feed-forward layer, of models with [`post_norms`](crate::ModelSpec::post_norms).
    pub post_mlp_norm: &'static str,
    /// The last norm.
    pub norm: &'static str,
    /// The output matrix.
    pub head: &'static str,
}

impl TensorNames {
    /// The names of Llama, Mistral and Qwen on the hub, from which others differ in a few.
    pub const LLAMA: Self = Self {
        embed: "model.embed_tokens",
        layers: "model.layers",
        attention_norm: "input_layernorm",
        qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
        sinks: "self_attn.sinks",
        attention_out: "self_attn.o_proj",
        post_attention_norm: "post_self_attn_layernorm",
        mlp_norm: "post_attention_layernorm",
        gate_up: &["mlp.gate_proj", "mlp.up_proj"],
        down: "mlp.down_proj",
        post_mlp_norm: "post_mlp_layernorm",
        norm: "model.norm",
        head: "lm_head",
    };
}
