//! What a model is, strictly: every size known, every combination checked.

use std::{ops::RangeInclusive, path::Path};

use dashinfer_kernels::{
    Activation, AttentionParams, CacheLayout, CacheType, DType, ExpertGroups, Feature, GroupScore, KvCacheSpec,
    LatentParams, Routing,
};

use crate::{ConfigError, HfConfig, RopeSpec, StoredQuantization, TensorNames};

const SIZES: RangeInclusive<usize> = 1..=1 << 20;
const MLP_SIZES: RangeInclusive<usize> = 1..=1 << 22;
const HEADS: RangeInclusive<usize> = 1..=1 << 12;
/// Of latent vectors; with the rotated part, their size is that of a head.
const RANKS: RangeInclusive<usize> = 1..=1 << 12;
const LAYERS: RangeInclusive<usize> = 1..=1 << 10;
const EXPERTS: RangeInclusive<usize> = 1..=1 << 11;
const VOCAB: RangeInclusive<usize> = 1..=1 << 24;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;
/// Five times the largest model published so far; a config beyond it is a mistake or an attack.
const MAX_PARAMETERS: u64 = 1 << 43;

/// A decoder-only transformer. Made by [`HfConfig::to_spec`] or [`shapes::named`](crate::shapes::named).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelSpec {
    /// The entry of `architectures` that it was read as.
    pub architecture: String,
    /// The type that the config names, if we know it. Weights are loaded in the type that they are stored in.
    pub dtype: Option<DType>,
    /// Rows of the embedding, `V`.
    pub vocab_size: usize,
    /// Width of the residual stream, `E`.
    pub hidden_size: usize,
    /// The longest context that the model is meant for, in tokens.
    pub max_positions: usize,
    /// Added to the mean square in every RMSNorm.
    pub norm_eps: f32,
    /// Added to the stored weights of every RMSNorm: 1 where checkpoints store what they differ from 1 by (Gemma), else 0.
    pub norm_offset: f32,
    /// Whether the outputs of attention and of the feed-forward layer are normed too, before they are added (Gemma 2, GLM-4).
    pub post_norms: bool,
    /// Factor on the embedding: 1 but in Gemma.
    pub embedding_scale: f32,
    /// With `Some(c)`, logits `x` become `c · tanh(x / c)`.
    pub logit_soft_cap: Option<f32>,
    /// What all attention layers have in common.
    pub attention: Attention,
    /// What all feed-forward layers without experts have in common.
    pub mlp: Mlp,
    /// What all layers with experts have in common; `None` where there are none.
    pub experts: Option<Experts>,
    /// The distinct rotary embeddings; layers name them by index.
    pub ropes: Vec<RopeSpec>,
    /// What each layer has of its own.
    pub layers: Vec<LayerSpec>,
    /// Whether the embedding is the output matrix too.
    pub tied_embeddings: bool,
    /// Layers behind the last that checkpoints may hold and that nobody needs: those that predict tokens further ahead (DeepSeek-V3).
    pub extra_layers: usize,
    /// Whether each row of the output matrix is divided by its length when it is loaded (Baichuan 2).
    pub unit_head: bool,
    /// What checkpoints call the parameters.
    pub names: TensorNames,
    /// How weights were quantized before they were stored, if they were.
    pub stored_quantization: Option<StoredQuantization>,
}

/// How a row looks at those before it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Attention {
    /// Query heads in groups, each with a key/value head.
    Grouped(GroupedAttention),
    /// Heads over one compressed vector for each token.
    Latent(LatentAttention),
}

/// Grouped-query attention. <https://arxiv.org/abs/2305.13245>
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct GroupedAttention {
    /// Query heads, `H`.
    pub num_heads: usize,
    /// Key/value heads, `K`.
    pub num_kv_heads: usize,
    /// Head size, `D`.
    pub head_dim: usize,
    /// Whether the q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Whether each q and k head is normed before it is rotated.
    pub qk_norm: bool,
    /// Factor on `q · k`: `1 / √D` unless the config says otherwise.
    pub scale: f32,
    /// With `Some(c)`, scores `s` become `c · tanh(s / c)`.
    pub soft_cap: Option<f32>,
    /// Whether each head has a learned score for a position without a value, which every row sees.
    pub sinks: bool,
}

/// Multi-head latent attention: keys and values of all heads follow from one vector of `C + R` values for each token, which is what
/// the cache keeps. <https://arxiv.org/abs/2405.04434>, section 2.1
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct LatentAttention {
    /// Heads, `H`.
    pub num_heads: usize,
    /// Size of the vector that queries are made of, or `None` if they are made of the hidden state itself.
    pub q_rank: Option<usize>,
    /// Size of the vector that keys and values are made of, `C`.
    pub kv_rank: usize,
    /// Values of each query and key that are not rotated, `N`.
    pub nope_dim: usize,
    /// Values of each query that are rotated, `R`, and of the one rotated part of a key that all heads share.
    pub rope_dim: usize,
    /// Values of each head's output.
    pub v_dim: usize,
    /// Factor on `q · k`.
    pub scale: f32,
    /// Added to the mean square in the norms of the two compressed vectors.
    pub norm_eps: f32,
    /// Whether the projections from the hidden state to compressed vectors, and the one back to it, have biases.
    pub bias: bool,
}

/// The gated feed-forward layer: `down(f(gate(x)) · up(x))`. <https://arxiv.org/abs/2002.05202>
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Mlp {
    /// Inner size, `F`.
    pub size: usize,
    /// Whether the three projections have biases.
    pub bias: bool,
    /// The function `f` on the gate.
    pub activation: Activation,
}

/// A mixture of experts in place of the feed-forward layer: for each token some of many, each like a small one.
/// <https://arxiv.org/abs/2101.03961>
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Experts {
    /// How tokens find theirs.
    pub routing: Routing,
    /// Inner size of each, `F`.
    pub size: usize,
    /// The function on their gates.
    pub activation: Activation,
    /// Whether the three projections of each have biases.
    pub bias: bool,
    /// Whether the router has one, which is part of the score.
    pub router_bias: bool,
    /// Whether experts are chosen by score and a correction that is not part of it (DeepSeek-V3).
    pub correction: bool,
    /// An expert of every token beside the chosen.
    pub shared: Option<SharedExpert>,
}

/// An expert of every token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedExpert {
    /// Its inner size.
    pub size: usize,
    /// Whether what it computes has a gate: a factor for each token, of its hidden state (Qwen2-MoE).
    pub gated: bool,
}

/// What one layer has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerSpec {
    /// With `Some(w)`, a position sees itself and the `w - 1` before it; with `None`, all.
    pub window: Option<usize>,
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
    /// Whether it has [experts](ModelSpec::experts) in place of the feed-forward layer.
    pub experts: bool,
}

impl ModelSpec {
    /// Reads and checks `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// Those of [`HfConfig::read`] and [`HfConfig::to_spec`].
    pub fn read(folder: &Path) -> Result<Self, ConfigError> {
        HfConfig::read(folder)?.to_spec()
    }

    /// Lowers the longest context to `tokens`, if it is longer. With LongRoPE that may decide for other frequencies, as
    /// [`RopeScaling::Long`](crate::RopeScaling::Long) says: so before the model is loaded, not while it is in use.
    pub fn limit_context(&mut self, tokens: usize) {
        self.max_positions = self.max_positions.min(tokens);
    }

    /// Layers, `L`.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Parameters, the tied embedding counted once.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        let [vocab, hidden, layers] = [self.vocab_size, self.hidden_size, self.num_layers()].map(wide);
        let attention = match &self.attention {
            Attention::Grouped(attention) => attention.num_parameters(hidden),
            Attention::Latent(attention) => attention.num_parameters(hidden),
        };
        let with_experts = self.num_expert_layers();
        let dense = self.mlp.num_parameters(hidden);
        let experts = self.experts.map_or(0, |experts| experts.num_parameters(hidden));
        let feed_forward = (layers - with_experts) * dense + with_experts * experts;
        let norms = if self.post_norms { 4 } else { 2 } * hidden;
        let embeddings = vocab * hidden * if self.tied_embeddings { 1 } else { 2 };
        embeddings + layers * (attention + norms) + feed_forward + hidden
    }

    /// Layers with experts.
    fn num_expert_layers(&self) -> u64 {
        wide(self.layers.iter().filter(|layer| layer.experts).count())
    }

    /// The cache of this model with `num_blocks` blocks of `block_size` tokens.
    #[must_use]
    pub fn kv_cache(&self, block_size: usize, num_blocks: usize, cache_type: CacheType) -> KvCacheSpec {
        let (num_kv_heads, head_dim, layout) = match &self.attention {
            Attention::Grouped(GroupedAttention { num_kv_heads, head_dim, .. }) => {
                (*num_kv_heads, *head_dim, CacheLayout::KeysAndValues)
            }
            Attention::Latent(LatentAttention { kv_rank, rope_dim, .. }) => {
                (1, kv_rank + rope_dim, CacheLayout::Latent { rank: *kv_rank })
            }
        };
        KvCacheSpec {
            num_layers: self.num_layers(),
            num_blocks,
            block_size,
            num_kv_heads,
            head_dim,
            cache_type,
            layout,
        }
    }

    /// The grouped-query attention of a spec that has it, as [`HfConfig::llama_like`] makes them.
    pub(crate) fn grouped(&mut self) -> &mut GroupedAttention {
        match &mut self.attention {
            Attention::Grouped(attention) => attention,
            Attention::Latent(_) => unreachable!("a family like Llama has grouped-query attention"),
        }
    }

    /// What the model needs of a backend beyond what every backend has.
    #[must_use]
    pub fn features(&self) -> Vec<Feature> {
        let grouped = match &self.attention {
            Attention::Grouped(attention) => Some(attention),
            Attention::Latent(_) => None,
        };
        let needed = [
            (self.embedding_scale != 1.0, Feature::EmbeddingScale),
            (grouped.is_some_and(|attention| attention.soft_cap.is_some()), Feature::AttentionSoftCap),
            (grouped.is_some_and(|attention| attention.sinks), Feature::AttentionSinks),
            (grouped.is_none(), Feature::LatentAttention),
            (self.logit_soft_cap.is_some(), Feature::LogitSoftCap),
            (self.experts.is_some(), Feature::Experts),
            (self.stored_quantization.is_some(), Feature::StoredQuantization),
        ];
        let needed = needed.into_iter().filter_map(|(needed, feature)| needed.then_some(feature));
        let activations = [Some(self.mlp.activation), self.experts.map(|experts| experts.activation)];
        needed.chain(activations.into_iter().flatten().filter_map(Activation::feature)).collect()
    }

    /// Whether tensor `name` is one of the [extra layers](Self::extra_layers).
    pub(crate) fn is_extra(&self, name: &str) -> bool {
        let rest = name.strip_prefix(self.names.layers).and_then(|rest| rest.strip_prefix('.'));
        let number = rest.and_then(|rest| rest.split_once('.')).and_then(|(number, _)| number.parse::<usize>().ok());
        number.is_some_and(|number| number >= self.num_layers() && number - self.num_layers() < self.extra_layers)
    }

    /// Whether this describes a model at all. What passes can be multiplied together without overflow.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        within("hidden_size", self.hidden_size, SIZES)?;
        within("vocab_size", self.vocab_size, VOCAB)?;
        within("intermediate_size", self.mlp.size, MLP_SIZES)?;
        within("max_position_embeddings", self.max_positions, POSITIONS)?;
        Self::check_num_layers(self.num_layers())?;
        let rotated_of = match &self.attention {
            Attention::Grouped(attention) => attention.check()?,
            Attention::Latent(attention) => attention.check()?,
        };
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ConfigError::value("rms_norm_eps", "above 0 and below 1", self.norm_eps));
        }
        positive("the factor on the embedding", self.embedding_scale)?;
        positive("final_logit_softcapping", self.logit_soft_cap.unwrap_or(1.0))?;
        if self.unit_head && self.tied_embeddings {
            let wanted = "false, as rows of the output matrix are normalized";
            return Err(ConfigError::value("tie_word_embeddings", wanted, true));
        }
        for rope in &self.ropes {
            rope.check(rotated_of)?;
        }
        if let Some(experts) = &self.experts {
            experts.check()?;
        }
        for layer in &self.layers {
            if layer.experts && self.experts.is_none() {
                return Err(ConfigError::value("layers", "experts for the layers that have some", "none"));
            }
            if layer.rope >= self.ropes.len() {
                let wanted = format!("the index of one of {} rotary embeddings", self.ropes.len());
                return Err(ConfigError::value("layers", wanted, layer.rope));
            }
            if let Some(window) = layer.window {
                within("sliding_window", window, POSITIONS)?;
                if matches!(self.attention, Attention::Latent(_)) {
                    let wanted = "none, as attention is over latent vectors";
                    return Err(ConfigError::value("sliding_window", wanted, window));
                }
            }
        }
        let parameters = self.num_parameters();
        if parameters > MAX_PARAMETERS.min(usize::MAX as u64 / 4) {
            return Err(ConfigError::value("parameters", format!("at most {MAX_PARAMETERS}"), parameters));
        }
        Ok(())
    }

    pub(crate) fn check_num_layers(num_layers: usize) -> Result<(), ConfigError> {
        within("num_hidden_layers", num_layers, LAYERS)
    }
}

impl Mlp {
    fn num_parameters(&self, hidden: u64) -> u64 {
        gated_parameters(hidden, wide(self.size), self.bias)
    }
}

impl Experts {
    fn num_parameters(&self, hidden: u64) -> u64 {
        let count = wide(self.routing.num_experts);
        let router = count * (hidden + u64::from(self.router_bias) + u64::from(self.correction));
        let shared = self
            .shared
            .map_or(0, |shared| gated_parameters(hidden, wide(shared.size), false) + u64::from(shared.gated) * hidden);
        router + count * gated_parameters(hidden, wide(self.size), self.bias) + shared
    }

    fn check(&self) -> Result<(), ConfigError> {
        let Routing { num_experts, top_k, groups, scale, .. } = self.routing;
        within("the number of experts", num_experts, EXPERTS)?;
        within("num_experts_per_tok", top_k, 1..=num_experts)?;
        within("moe_intermediate_size", self.size, SIZES)?;
        positive("routed_scaling_factor", scale)?;
        if let Some(ExpertGroups { num_groups, top_groups, score }) = groups {
            within("n_group", num_groups, 1..=num_experts)?;
            within("topk_group", top_groups, 1..=num_groups)?;
            let size = num_experts / num_groups;
            if size * num_groups != num_experts || (score == GroupScore::TopTwo && size < 2) {
                let wanted = format!("a divisor of {num_experts} experts, with two of them in a group at least");
                return Err(ConfigError::value("n_group", wanted, num_groups));
            }
            within("num_experts_per_tok", top_k, 1..=size * top_groups)?;
        }
        if let Some(shared) = self.shared {
            within("the size of the shared expert", shared.size, MLP_SIZES)?;
        }
        if let Activation::ClampedSwiglu { alpha, limit } = self.activation {
            positive("swiglu_alpha", alpha)?;
            positive("swiglu_limit", limit)?;
        }
        Ok(())
    }
}

/// Of gate, up and down.
fn gated_parameters(hidden: u64, size: u64, bias: bool) -> u64 {
    3 * hidden * size + u64::from(bias) * (2 * size + hidden)
}

impl Attention {
    /// Query heads, `H`.
    #[must_use]
    pub fn num_heads(&self) -> usize {
        match self {
            Self::Grouped(attention) => attention.num_heads,
            Self::Latent(attention) => attention.num_heads,
        }
    }

    /// Values of all heads' outputs, which the output projection takes.
    #[must_use]
    pub fn out_size(&self) -> usize {
        match self {
            Self::Grouped(attention) => attention.num_heads * attention.head_dim,
            Self::Latent(attention) => attention.num_heads * attention.v_dim,
        }
    }
}

impl GroupedAttention {
    fn num_parameters(&self, hidden: u64) -> u64 {
        let Self { num_heads, num_kv_heads, head_dim, qkv_bias, out_bias, qk_norm, sinks, .. } = *self;
        let [q, kv] = [num_heads * head_dim, num_kv_heads * head_dim].map(wide);
        2 * hidden * (q + kv)
            + u64::from(qkv_bias) * (q + 2 * kv)
            + u64::from(out_bias) * hidden
            + u64::from(sinks) * wide(num_heads)
            + u64::from(qk_norm) * 2 * wide(head_dim)
    }

    /// How many values of a head can be rotated.
    fn check(&self) -> Result<usize, ConfigError> {
        let Self { num_heads, num_kv_heads, head_dim, .. } = *self;
        within("num_attention_heads", num_heads, HEADS)?;
        within("num_key_value_heads", num_kv_heads, HEADS)?;
        within("head_dim", head_dim, HEADS)?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            let wanted = format!("a divisor of num_attention_heads {num_heads}");
            return Err(ConfigError::value("num_key_value_heads", wanted, num_kv_heads));
        }
        positive("the factor on attention scores", self.scale)?;
        positive("attn_logit_softcapping", self.soft_cap.unwrap_or(1.0))?;
        Ok(head_dim)
    }

    /// What the attention of layer `layer` needs to know.
    pub(crate) fn params(&self, layer: &LayerSpec) -> AttentionParams {
        let Self { num_heads, num_kv_heads, head_dim, scale, soft_cap, .. } = *self;
        AttentionParams { num_heads, num_kv_heads, head_dim, scale, window: layer.window, soft_cap }
    }
}

impl LatentAttention {
    fn num_parameters(&self, hidden: u64) -> u64 {
        let Self { num_heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, bias, .. } = *self;
        let [q, up, out] =
            [num_heads * (nope_dim + rope_dim), num_heads * (nope_dim + v_dim), num_heads * v_dim].map(wide);
        let [rank, rope] = [kv_rank, rope_dim].map(wide);
        let bias = u64::from(bias);
        let queries = match q_rank.map(wide) {
            Some(q_rank) => (hidden + bias + 1 + q) * q_rank,
            None => hidden * q,
        };
        queries + (hidden + bias) * (rank + rope) + rank + up * rank + (out + bias) * hidden
    }

    /// How many values of a head can be rotated.
    fn check(&self) -> Result<usize, ConfigError> {
        within("num_attention_heads", self.num_heads, HEADS)?;
        within("q_lora_rank", self.q_rank.unwrap_or(1), SIZES)?;
        within("kv_lora_rank", self.kv_rank, RANKS)?;
        within("qk_nope_head_dim", self.nope_dim, HEADS)?;
        within("qk_rope_head_dim", self.rope_dim, HEADS)?;
        within("v_head_dim", self.v_dim, HEADS)?;
        positive("the factor on attention scores", self.scale)?;
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            let wanted = "above 0 and below 1";
            return Err(ConfigError::value("the epsilon of norms in attention", wanted, self.norm_eps));
        }
        Ok(self.rope_dim)
    }

    /// What its operators need to know.
    #[must_use]
    pub fn params(&self) -> LatentParams {
        let Self { num_heads, kv_rank, nope_dim, rope_dim, v_dim, scale, .. } = *self;
        LatentParams { num_heads, rank: kv_rank, nope_dim, rope_dim, v_dim, scale }
    }
}

fn wide(size: usize) -> u64 {
    size as u64
}

fn positive(field: &str, found: f32) -> Result<(), ConfigError> {
    if found > 0.0 && found.is_finite() {
        return Ok(());
    }
    Err(ConfigError::value(field, "a finite number above 0", found))
}

fn within(field: &str, found: usize, range: RangeInclusive<usize>) -> Result<(), ConfigError> {
    if range.contains(&found) {
        return Ok(());
    }
    Err(ConfigError::value(field, format!("{} to {}", range.start(), range.end()), found))
}
