//! What families call things in their `config.json`: facts, like the names of their tensors.

use dashinfer_kernels::RopePairs;

/// How a family writes its config: the keys of what all families have, and how the rotary embedding is meant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dialect {
    pub(crate) hidden_size: &'static str,
    pub(crate) num_layers: &'static str,
    pub(crate) num_heads: &'static str,
    pub(crate) num_kv_heads: &'static str,
    /// Where it is absent, hidden size / heads.
    pub(crate) head_dim: &'static str,
    pub(crate) intermediate_size: &'static str,
    pub(crate) activation: &'static str,
    pub(crate) vocab_size: &'static str,
    pub(crate) max_positions: &'static str,
    pub(crate) norm_eps: &'static str,
    /// Which values of a head make a pair.
    pub(crate) pairs: RopePairs,
    /// The part of a head that is rotated where `partial_rotary_factor` is absent; `None` where a family knows no parts.
    pub(crate) rotated: Option<f64>,
}

impl Dialect {
    /// Of Llama, from which others differ in a few.
    pub(crate) const LLAMA: Self = Self {
        hidden_size: "hidden_size",
        num_layers: "num_hidden_layers",
        num_heads: "num_attention_heads",
        num_kv_heads: "num_key_value_heads",
        head_dim: "head_dim",
        intermediate_size: "intermediate_size",
        activation: "hidden_act",
        vocab_size: "vocab_size",
        max_positions: "max_position_embeddings",
        norm_eps: "rms_norm_eps",
        pairs: RopePairs::Halves,
        rotated: None,
    };
}
