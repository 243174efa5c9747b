//! Llama, and what is Llama but for a fact or two.

use crate::{ConfigError, HfConfig, ModelSpec};

/// Llama 1 to 3, and the many models published under its name. <https://arxiv.org/abs/2407.21783>
pub(super) fn llama(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let bias = config.object().flag("attention_bias")?.unwrap_or(false);
    spec.grouped().qkv_bias = bias;
    spec.grouped().out_bias = bias;
    spec.mlp.bias = config.object().flag("mlp_bias")?.unwrap_or(false);
    Ok(spec)
}

/// Llama without biases, with a sliding window on every layer unless that is `null`. <https://arxiv.org/abs/2310.06825>
pub(super) fn mistral(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let config = config.object();
    // The reference takes 4096 where the key is absent, and no window only where it is `null`.
    let window = if config.names("sliding_window") { config.count("sliding_window")? } else { Some(4096) };
    for layer in &mut spec.layers {
        layer.window = window;
    }
    Ok(spec)
}
