//! Which layers have a sliding window.

use crate::{ConfigError, ModelSpec, json::Object};

/// Gives `window` to the layers that `layer_types` calls sliding, and none to others. Returns whether the config has such a list.
pub(super) fn set_by_name(
    spec: &mut ModelSpec,
    config: Object<'_>,
    window: Option<usize>,
) -> Result<bool, ConfigError> {
    let Some(types) = config.texts("layer_types")? else { return Ok(false) };
    if types.len() != spec.layers.len() {
        let wanted = format!("one entry for each of {} layers", spec.layers.len());
        return Err(ConfigError::value("layer_types", wanted, types.len()));
    }
    for (layer, kind) in spec.layers.iter_mut().zip(types) {
        layer.window = match kind {
            "full_attention" => None,
            "sliding_attention" if window.is_some() => window,
            "sliding_attention" => {
                let wanted = "a sliding_window in use beside a sliding_attention layer";
                return Err(ConfigError::value("layer_types", wanted, "none"));
            }
            other => {
                return Err(ConfigError::Unsupported {
                    field: "layer_types".into(),
                    found: other.into(),
                    supported: "full_attention, sliding_attention".into(),
                });
            }
        };
    }
    Ok(true)
}

/// Gives `window` to all layers but each `pattern`-th.
pub(super) fn set_by_pattern(spec: &mut ModelSpec, window: usize, pattern: usize) {
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let full = pattern > 0 && (index + 1).is_multiple_of(pattern);
        layer.window = (!full).then_some(window);
    }
}
