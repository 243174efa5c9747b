//! What a model is, strictly: every size known, every combination checked.

use std::{ops::RangeInclusive, path::Path};

use dashinfer_kernels::{Activation, AttentionParams, CacheType, DType, Feature, KvCacheSpec};

use crate::{ConfigError, HfConfig, RopeSpec, TensorNames};

const SIZES: RangeInclusive<usize> = 1..=1 << 20;
const MLP_SIZES: RangeInclusive<usize> = 1..=1 << 22;
const HEADS: RangeInclusive<usize> = 1..=1 << 12;
const LAYERS: RangeInclusive<usize> = 1..=1 << 10;
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
    /// What all feed-forward layers have in common.
    pub mlp: Mlp,
    /// The distinct rotary embeddings; layers name them by index.
    pub ropes: Vec<RopeSpec>,
    /// What each layer has of its own.
    pub layers: Vec<LayerSpec>,
    /// Whether the embedding is the output matrix too.
    pub tied_embeddings: bool,
    /// What checkpoints call the parameters.
    pub names: TensorNames,
}

/// Grouped-query attention. <https://arxiv.org/abs/2305.13245>
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Attention {
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

/// What one layer has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerSpec {
    /// With `Some(w)`, a position sees itself and the `w - 1` before it; with `None`, all.
    pub window: Option<usize>,
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
}

impl ModelSpec {
    /// Reads and checks `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// Those of [`HfConfig::read`] and [`HfConfig::to_spec`].
    pub fn read(folder: &Path) -> Result<Self, ConfigError> {
        HfConfig::read(folder)?.to_spec()
    }

    /// Layers, `L`.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Parameters, the tied embedding counted once.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        let Attention { num_heads, num_kv_heads, head_dim, qkv_bias, out_bias, qk_norm, sinks, .. } = self.attention;
        let [vocab, hidden, mlp, layers] =
            [self.vocab_size, self.hidden_size, self.mlp.size, self.num_layers()].map(wide);
        let [q, kv] = [num_heads * head_dim, num_kv_heads * head_dim].map(wide);
        let attention = 2 * hidden * (q + kv)
            + u64::from(qkv_bias) * (q + 2 * kv)
            + u64::from(out_bias) * hidden
            + u64::from(sinks) * wide(num_heads);
        let feed_forward = 3 * hidden * mlp + u64::from(self.mlp.bias) * (2 * mlp + hidden);
        let norms = if self.post_norms { 4 } else { 2 } * hidden + u64::from(qk_norm) * 2 * wide(head_dim);
        let embeddings = vocab * hidden * if self.tied_embeddings { 1 } else { 2 };
        embeddings + layers * (attention + feed_forward + norms) + hidden
    }

    /// The cache of this model with `num_blocks` blocks of `block_size` tokens.
    #[must_use]
    pub fn kv_cache(&self, block_size: usize, num_blocks: usize, cache_type: CacheType) -> KvCacheSpec {
        KvCacheSpec {
            num_layers: self.num_layers(),
            num_blocks,
            block_size,
            num_kv_heads: self.attention.num_kv_heads,
            head_dim: self.attention.head_dim,
            cache_type,
        }
    }

    /// What the attention of layer `layer` needs to know.
    pub(crate) fn attention_params(&self, layer: &LayerSpec) -> AttentionParams {
        let Attention { num_heads, num_kv_heads, head_dim, scale, soft_cap, .. } = self.attention;
        AttentionParams { num_heads, num_kv_heads, head_dim, scale, window: layer.window, soft_cap }
    }

    /// What the model needs of a backend beyond what every backend has.
    #[must_use]
    pub fn features(&self) -> Vec<Feature> {
        let needed = [
            (self.embedding_scale != 1.0, Feature::EmbeddingScale),
            (self.attention.soft_cap.is_some(), Feature::AttentionSoftCap),
            (self.attention.sinks, Feature::AttentionSinks),
            (self.logit_soft_cap.is_some(), Feature::LogitSoftCap),
        ];
        let needed = needed.into_iter().filter_map(|(needed, feature)| needed.then_some(feature));
        needed.chain(self.mlp.activation.feature()).collect()
    }

    /// Whether this describes a model at all. What passes can be multiplied together without overflow.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Attention { num_heads, num_kv_heads, head_dim, .. } = self.attention;
        within("hidden_size", self.hidden_size, SIZES)?;
        within("vocab_size", self.vocab_size, VOCAB)?;
        within("intermediate_size", self.mlp.size, MLP_SIZES)?;
        within("max_position_embeddings", self.max_positions, POSITIONS)?;
        within("num_attention_heads", num_heads, HEADS)?;
        within("num_key_value_heads", num_kv_heads, HEADS)?;
        within("head_dim", head_dim, HEADS)?;
        Self::check_num_layers(self.num_layers())?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            let wanted = format!("a divisor of num_attention_heads {num_heads}");
            return Err(ConfigError::value("num_key_value_heads", wanted, num_kv_heads));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ConfigError::value("rms_norm_eps", "above 0 and below 1", self.norm_eps));
        }
        positive("the factor on attention scores", self.attention.scale)?;
        positive("the factor on the embedding", self.embedding_scale)?;
        positive("attn_logit_softcapping", self.attention.soft_cap.unwrap_or(1.0))?;
        positive("final_logit_softcapping", self.logit_soft_cap.unwrap_or(1.0))?;
        for rope in &self.ropes {
            rope.check(head_dim)?;
        }
        for layer in &self.layers {
            if layer.rope >= self.ropes.len() {
                let wanted = format!("the index of one of {} rotary embeddings", self.ropes.len());
                return Err(ConfigError::value("layers", wanted, layer.rope));
            }
            if let Some(window) = layer.window {
                within("sliding_window", window, POSITIONS)?;
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
