//! Qwen2, Qwen2.5 and Qwen3.

use super::windows;
use crate::{ConfigError, HfConfig, ModelSpec, json::Object};

/// Llama with biases on q, k and v, and a window on some layers. Qwen2 and Qwen2.5. <https://arxiv.org/abs/2407.10671>
pub(super) fn qwen2(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    spec.grouped().qkv_bias = true;
    set_qwen_windows(&mut spec, config.object())?;
    Ok(spec)
}

/// Llama with an RMSNorm on each q and k head. <https://arxiv.org/abs/2505.09388>
pub(super) fn qwen3(config: &HfConfig) -> Result<ModelSpec, ConfigError> {
    let mut spec = config.llama_like()?;
    let bias = config.object().flag("attention_bias")?.unwrap_or(false);
    spec.grouped().qkv_bias = bias;
    spec.grouped().out_bias = bias;
    spec.grouped().qk_norm = true;
    set_qwen_windows(&mut spec, config.object())?;
    Ok(spec)
}

/// `sliding_window` counts only with `use_sliding_window`. The windowed layers are those that `layer_types` names or, in
/// older configs, those from `max_window_layers` up.
fn set_qwen_windows(spec: &mut ModelSpec, config: Object<'_>) -> Result<(), ConfigError> {
    let in_use = config.flag("use_sliding_window")?.unwrap_or(false);
    let window = if in_use { config.count("sliding_window")? } else { None };
    if !windows::set_by_name(spec, config, window)? {
        let first = config.count("max_window_layers")?.unwrap_or(28); // the reference's default
        for layer in spec.layers.iter_mut().skip(first) {
            layer.window = window;
        }
    }
    Ok(())
}
