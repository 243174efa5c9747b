//! Rotary position embeddings as configs describe them, and the frequencies that follow. <https://arxiv.org/abs/2104.09864>
//!
//! Every kind of scaling here is fixed once the config and the longest context are known, so it goes into the frequencies. What looks
//! at the length of each sequence (`dynamic`) is refused by name; `longrope`, which does so too in the reference, is decided by
//! the longest context ([`RopeScaling::Long`]).

use std::f64::consts::TAU;

use dashinfer_kernels::{Rope, RopePairs};

use crate::{ConfigError, json::Object};

const SUPPORTED: &str = "default, linear, llama3, yarn, longrope";

/// One rotary embedding.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RopeSpec {
    /// The base of the frequencies.
    pub theta: f64,
    /// How many values of a head are rotated, the first ones; even.
    pub rotary_dim: usize,
    /// Which of them make a pair.
    pub pairs: RopePairs,
    /// How a short training context is stretched over a longer one.
    pub scaling: RopeScaling,
}

/// How the frequencies are changed to reach further than the training context did.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies are divided by `factor`. <https://arxiv.org/abs/2306.15595>
    Linear {
        /// The longer context over the shorter.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, those between blended. <https://arxiv.org/abs/2407.21783>
    Llama3 {
        /// The longer context over the shorter.
        factor: f64,
        /// Waves that turn less often than this in the training context are low.
        low_freq_factor: f64,
        /// Waves that turn more often than this in the training context are high.
        high_freq_factor: f64,
        /// The training context, in tokens.
        original_max_positions: f64,
    },
    /// The same idea with a ramp over dimensions, and a factor on cosine and sine. <https://arxiv.org/abs/2309.00071>
    Yarn {
        /// The longer context over the shorter.
        factor: f64,
        /// On cosine and sine.
        attention_factor: f64,
        /// Dimensions that turn more often than this in the training context are kept.
        beta_fast: f64,
        /// Dimensions that turn less often than this are divided by `factor`.
        beta_slow: f64,
        /// The training context, in tokens.
        original_max_positions: f64,
        /// Whether the ends of the ramp are rounded outward to whole dimensions.
        truncate: bool,
    },
    /// Each frequency is divided by a factor of its own: one list for contexts up to the training context, one for longer ones.
    /// <https://arxiv.org/abs/2402.13753>
    ///
    /// The reference looks at the length of each sequence, and computes all keys of a sequence again when it crosses the line.
    /// Here the longest context that sequences may have decides for all of them, so that cached keys stay right: they get the
    /// long factors if it is longer than the training context, and the short ones if not.
    Long {
        /// On contexts up to `original_max_positions`, one for each pair.
        short_factors: Vec<f64>,
        /// On longer ones.
        long_factors: Vec<f64>,
        /// On cosine and sine, whichever list is in use.
        attention_factor: f64,
        /// The training context, in tokens.
        original_max_positions: f64,
    },
}

impl RopeSpec {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (the hub), in a family that rotates all of
    /// `rotary_dim` values.
    pub(crate) fn from_config(
        config: Object<'_>,
        rotary_dim: usize,
        max_positions: usize,
        pairs: RopePairs,
    ) -> Result<Self, ConfigError> {
        let parameters = parameters(config)?;
        if let Some((field, part)) = rotated_part(config, parameters)?.filter(|(_, part)| *part != 1.0) {
            let (found, supported) = (part.to_string(), "1 in this family".into());
            return Err(ConfigError::Unsupported { field, found, supported });
        }
        Self::new(config, parameters, rotary_dim, max_positions, pairs)
    }

    /// The same, in a family that may rotate a part of each head: that which `partial_rotary_factor` says, or else `rotated`. With
    /// `None` it knows no parts.
    pub(crate) fn of_heads(
        config: Object<'_>,
        head_dim: usize,
        rotated: Option<f64>,
        max_positions: usize,
        pairs: RopePairs,
    ) -> Result<Self, ConfigError> {
        let Some(rotated) = rotated else { return Self::from_config(config, head_dim, max_positions, pairs) };
        let parameters = parameters(config)?;
        let part = match rotated_part(config, parameters)? {
            Some((_, part)) if part > 0.0 && part <= 1.0 => part,
            Some((field, part)) => return Err(ConfigError::value(field, "above 0 and at most 1", part)),
            None => rotated,
        };
        // Rounded down, as the reference does.
        Self::new(config, parameters, (head_dim as f64 * part) as usize, max_positions, pairs)
    }

    fn new(
        config: Object<'_>,
        parameters: Option<Object<'_>>,
        rotary_dim: usize,
        max_positions: usize,
        pairs: RopePairs,
    ) -> Result<Self, ConfigError> {
        let theta = match parameters.map(|rope| rope.number("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => config.number("rope_theta")?.unwrap_or(10000.0),
        };
        let scaling = match parameters {
            Some(rope) => RopeScaling::from_config(rope, config, max_positions)?,
            None => RopeScaling::None,
        };
        Ok(Self { theta, rotary_dim, pairs, scaling })
    }

    /// The frequencies for sequences of up to `max_positions` tokens, computed in f64 and rounded once.
    #[must_use]
    pub fn rope(&self, max_positions: usize) -> Rope {
        let dim = self.rotary_dim as f64;
        let plain = (0..self.rotary_dim / 2).map(|pair| self.theta.powf(-2.0 * pair as f64 / dim));
        let inv_freq = match &self.scaling {
            RopeScaling::None => plain.map(|freq| freq as f32).collect(),
            RopeScaling::Linear { factor } => plain.map(|freq| (freq / factor) as f32).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => plain
                .map(|freq| {
                    let turns = original_max_positions * freq / TAU;
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    blend(freq, factor, keep.clamp(0.0, 1.0))
                })
                .collect(),
            &RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, truncate, .. } => {
                let pair_with =
                    |turns: f64| dim * (original_max_positions / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair_with(beta_fast), pair_with(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                let keep = |pair: usize| 1.0 - ((pair as f64 - low) / width).clamp(0.0, 1.0);
                plain.enumerate().map(|(pair, freq)| blend(freq, factor, keep(pair))).collect()
            }
            RopeScaling::Long { short_factors, long_factors, original_max_positions, .. } => {
                let long = max_positions as f64 > *original_max_positions;
                let factors = if long { long_factors } else { short_factors };
                plain.zip(factors).map(|(freq, factor)| (freq / factor) as f32).collect()
            }
        };
        let scale = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => {
                attention_factor as f32
            }
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        };
        Rope { inv_freq, scale, pairs: self.pairs }
    }

    /// Whether frequencies can be made of this.
    pub(crate) fn check(&self, head_dim: usize) -> Result<(), ConfigError> {
        if !(self.theta > 1.0 && self.theta < f64::from(f32::MAX)) {
            return Err(ConfigError::value("rope_theta", "a finite number above 1", self.theta));
        }
        if !self.rotary_dim.is_multiple_of(2) || !(1..=head_dim).contains(&self.rotary_dim) {
            return Err(ConfigError::value("head_dim", "an even number of rotated values", self.rotary_dim));
        }
        match &self.scaling {
            RopeScaling::None => Ok(()),
            &RopeScaling::Linear { factor } => at_least_one("factor", factor),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                at_least_one("factor", factor)?;
                at_least_one("original_max_position_embeddings", original_max_positions)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let wanted = format!("more than low_freq_factor {low_freq_factor}");
                    return Err(ConfigError::value("rope_scaling.high_freq_factor", wanted, high_freq_factor));
                }
                Ok(())
            }
            &RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_max_positions, .. } => {
                at_least_one("factor", factor)?;
                at_least_one("original_max_position_embeddings", original_max_positions)?;
                positive("attention_factor", attention_factor)?;
                positive("beta_slow", beta_slow)?;
                positive("beta_fast", beta_fast)?;
                if beta_fast < beta_slow {
                    let wanted = format!("at least beta_slow {beta_slow}");
                    return Err(ConfigError::value("rope_scaling.beta_fast", wanted, beta_fast));
                }
                Ok(())
            }
            RopeScaling::Long { short_factors, long_factors, attention_factor, original_max_positions } => {
                at_least_one("original_max_position_embeddings", *original_max_positions)?;
                positive("attention_factor", *attention_factor)?;
                for (key, factors) in [("short_factor", short_factors), ("long_factor", long_factors)] {
                    if factors.len() != self.rotary_dim / 2 {
                        let wanted = format!("a factor for each of {} pairs", self.rotary_dim / 2);
                        return Err(ConfigError::value(format!("rope_scaling.{key}"), wanted, factors.len()));
                    }
                    factors.iter().try_for_each(|factor| positive(key, *factor))?;
                }
                Ok(())
            }
        }
    }
}

impl RopeScaling {
    fn from_config(rope: Object<'_>, config: Object<'_>, max_positions: usize) -> Result<Self, ConfigError> {
        let unsupported = |found: &str, key: &str| ConfigError::Unsupported {
            field: rope.path(key),
            found: found.into(),
            supported: SUPPORTED.into(),
        };
        let (key, kind) = match rope.text("rope_type")? {
            Some(kind) => ("rope_type", kind),
            None => ("type", rope.text("type")?.unwrap_or("default")),
        };
        if rope.nests() {
            return Err(unsupported("one rotary embedding per layer type", key));
        }
        let factor = || {
            let missing = || ConfigError::value(rope.path("factor"), "a number", "nothing");
            rope.number("factor")?.ok_or_else(missing)
        };
        let required =
            |key: &str| rope.number(key)?.ok_or_else(|| ConfigError::value(rope.path(key), "a number", "nothing"));
        let original_max_positions = || -> Result<f64, ConfigError> {
            const KEY: &str = "original_max_position_embeddings";
            let here = rope.number(KEY)?;
            Ok(if here.is_some() { here } else { config.number(KEY)? }.unwrap_or(max_positions as f64))
        };
        match kind {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear { factor: factor()? }),
            "llama3" => Ok(Self::Llama3 {
                factor: factor()?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_positions: original_max_positions()?,
            }),
            "yarn" => {
                let original_max_positions = original_max_positions()?;
                let factor = rope.number("factor")?.unwrap_or(max_positions as f64 / original_max_positions);
                Ok(Self::Yarn {
                    factor,
                    attention_factor: yarn_attention_factor(rope, factor)?,
                    // The defaults of the paper, section 3.2, for Llama.
                    beta_fast: rope.number("beta_fast")?.unwrap_or(32.0),
                    beta_slow: rope.number("beta_slow")?.unwrap_or(1.0),
                    original_max_positions,
                    truncate: rope.flag("truncate")?.unwrap_or(true),
                })
            }
            // The second is what the first configs called it.
            "longrope" | "su" => {
                let original_max_positions = original_max_positions()?;
                let factors = |key: &str| {
                    let missing = || ConfigError::value(rope.path(key), "a list of numbers", "nothing");
                    rope.numbers(key)?.ok_or_else(missing)
                };
                let factor = rope.number("factor")?.unwrap_or(max_positions as f64 / original_max_positions);
                let attention_factor = match rope.number("attention_factor")? {
                    Some(given) => given,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original_max_positions.ln()).sqrt(),
                };
                Ok(Self::Long {
                    short_factors: factors("short_factor")?,
                    long_factors: factors("long_factor")?,
                    attention_factor,
                    original_max_positions,
                })
            }
            other => Err(unsupported(other, key)),
        }
    }
}

/// The object that describes the rotary embedding: in the hub's spelling, or in that of transformers 5.
fn parameters(config: Object<'_>) -> Result<Option<Object<'_>>, ConfigError> {
    Ok(match config.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => config.object("rope_parameters")?,
    })
}

/// The part of a head that is rotated, and the key that says so.
fn rotated_part(config: Object<'_>, parameters: Option<Object<'_>>) -> Result<Option<(String, f64)>, ConfigError> {
    const KEY: &str = "partial_rotary_factor";
    for place in [parameters, Some(config)].into_iter().flatten() {
        if let Some(part) = place.number(KEY)? {
            return Ok(Some((place.path(KEY), part)));
        }
    }
    Ok(None)
}

/// `attention_factor` if given; else from `factor`, and from DeepSeek's `mscale` and `mscale_all_dim` where both are given.
fn yarn_attention_factor(rope: Object<'_>, factor: f64) -> Result<f64, ConfigError> {
    if let Some(given) = rope.number("attention_factor")? {
        return Ok(given);
    }
    let for_scale = |mscale| yarn_scale(factor, mscale);
    let given = |key| rope.number(key).map(|value| value.filter(|value| *value != 0.0));
    Ok(match (given("mscale")?, given("mscale_all_dim")?) {
        (Some(mscale), Some(all_dim)) => for_scale(mscale) / for_scale(all_dim),
        _ => for_scale(1.0),
    })
}

/// The factor on the scores of DeepSeek's attention, which with `mscale_all_dim` is not on cosine and sine: some of what is compared is not
/// rotated. <https://huggingface.co/deepseek-ai/DeepSeek-V2/blob/main/modeling_deepseek.py>
pub(crate) fn deepseek_score_factor(config: Object<'_>, scaling: &RopeScaling) -> Result<f64, ConfigError> {
    let (RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } | RopeScaling::Yarn { factor, .. }) =
        scaling
    else {
        return Ok(1.0);
    };
    let rope = match config.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => config.object("rope_parameters")?,
    };
    let all_dim = rope.map(|rope| rope.number("mscale_all_dim")).transpose()?.flatten();
    Ok(all_dim.filter(|all_dim| *all_dim != 0.0).map_or(1.0, |all_dim| yarn_scale(*factor, all_dim).powi(2)))
}

fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// `freq` kept by the share `keep`, divided by `factor` for the rest.
fn blend(freq: f64, factor: f64, keep: f64) -> f32 {
    (freq * keep + freq / factor * (1.0 - keep)) as f32
}

/// Beyond this no frequency is left in an `f32`.
const MAX: f64 = 1e18;

fn at_least_one(key: &str, found: f64) -> Result<(), ConfigError> {
    if (1.0..=MAX).contains(&found) {
        return Ok(());
    }
    Err(ConfigError::value(format!("rope_scaling.{key}"), "a finite number, 1 or more", found))
}

fn positive(key: &str, found: f64) -> Result<(), ConfigError> {
    if found > 1.0 / MAX && found <= MAX {
        return Ok(());
    }
    Err(ConfigError::value(format!("rope_scaling.{key}"), "a finite number above 0", found))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::tests::config;

    /// The frequencies of heads of 16 with theta 10000.
    #[track_caller]
    fn rope(scaling: Value) -> Rope {
        config("LlamaForCausalLM", json!({"rope_scaling": scaling})).to_spec().unwrap().ropes[0].rope(256)
    }

    #[track_caller]
    fn check_error(scaling: Value, text: &str) {
        let error = config("LlamaForCausalLM", json!({"rope_scaling": scaling})).to_spec().unwrap_err();
        assert_eq!(error.to_string(), text);
    }

    #[track_caller]
    fn assert_close(found: &[f32], wanted: &[f32]) {
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
        assert!(found.len() == wanted.len() && found.iter().zip(wanted).all(near), "{found:?}, wanted {wanted:?}");
    }

    #[test]
    fn frequencies_fall_from_one_to_nearly_one_over_theta() {
        let rope = rope(Value::Null);
        assert_close(
            &rope.inv_freq,
            &[1.0, 0.316_227_77, 0.1, 0.031_622_78, 0.01, 0.003_162_278, 0.001, 0.000_316_227_8],
        );
        assert_eq!((rope.scale, rope.pairs), (1.0, RopePairs::Halves));
    }

    #[test]
    fn linear_divides_all_of_them() {
        let plain = rope(json!({"rope_type": "default"}));
        let linear = rope(json!({"type": "linear", "factor": 4}));
        assert_close(&linear.inv_freq, &plain.inv_freq.iter().map(|freq| freq / 4.0).collect::<Vec<_>>());
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaled =
            rope(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512}));
        // Turns in 512 tokens: 81, 26, 8.1, 2.58, 0.81, ...; the fourth lies (2.58 - 1) / 3 of the way.
        let blended = 0.031_622_78 * (0.525_61 + (1.0 - 0.525_61) / 8.0);
        assert_close(&scaled.inv_freq[..3], &[1.0, 0.316_227_77, 0.1]);
        assert!((scaled.inv_freq[3] - blended).abs() < 1e-6, "{}", scaled.inv_freq[3]);
        assert_close(&scaled.inv_freq[4..], &[0.00125, 0.000_395_284_7, 0.000_125, 0.000_039_528_47]);
    }

    #[test]
    fn yarn_ramps_between_its_betas() {
        let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 4, "beta_slow": 1});
        let scaled = rope(yarn);
        // Pair 2.62 turns 4 times in 512 tokens and pair 3.82 once: from 2 to 4, so the third is blended half and half.
        assert_close(&scaled.inv_freq[..3], &[1.0, 0.316_227_77, 0.1]);
        assert_close(&scaled.inv_freq[3..4], &[0.031_622_78 * 0.625]);
        assert_close(&scaled.inv_freq[4..], &[0.0025, 0.000_790_569_4, 0.000_25, 0.000_079_056_94]);
        assert_close(&[scaled.scale], &[0.1 * 4f32.ln() + 1.0]);
    }

    #[test]
    fn yarn_without_truncation_ramps_from_the_very_point() {
        let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 4,
            "beta_slow": 1, "truncate": false});
        let (low, high) = (2.618_06_f32, 3.822_18_f32);
        let keep = 1.0 - (3.0 - low) / (high - low);
        assert!((rope(yarn).inv_freq[3] - 0.031_622_78 * (keep + (1.0 - keep) / 4.0)).abs() < 1e-6);
    }

    #[test]
    fn yarns_attention_factor_is_given_or_follows() {
        let scale = |extra: Value| {
            let mut yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512});
            yarn.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            rope(yarn).scale
        };
        let ln4 = 4f32.ln();
        assert_close(&[scale(json!({"attention_factor": 1.5}))], &[1.5]);
        assert_close(&[scale(json!({"mscale": 0.7}))], &[0.1 * ln4 + 1.0]);
        let both = scale(json!({"mscale": 0.7, "mscale_all_dim": 1.0}));
        assert_close(&[both], &[(0.07 * ln4 + 1.0) / (0.1 * ln4 + 1.0)]);
    }

    #[test]
    fn yarn_without_a_factor_takes_the_ratio_of_the_contexts() {
        let spec = config(
            "Qwen2ForCausalLM",
            json!({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}),
        );
        let RopeScaling::Yarn { factor, .. } = spec.to_spec().unwrap().ropes[0].scaling else { panic!("not yarn") };
        assert_eq!(factor, 4.0);
    }

    #[test]
    fn other_types_are_refused_by_name() {
        for kind in ["dynamic", "mrope"] {
            check_error(
                json!({"type": kind, "factor": 2.0}),
                &format!(
                    "rope_scaling.type: {kind} is not supported; supported: default, linear, llama3, yarn, longrope"
                ),
            );
        }
        let nested = json!({"full_attention": {"rope_theta": 1e6}});
        check_error(
            nested,
            "rope_scaling.type: one rotary embedding per layer type is not supported; supported: default, linear, llama3, yarn, longrope",
        );
        let partial = config("LlamaForCausalLM", json!({"partial_rotary_factor": 0.5})).to_spec().unwrap_err();
        assert_eq!(partial.to_string(), "partial_rotary_factor: 0.5 is not supported; supported: 1 in this family");
    }

    #[test]
    fn scaling_numbers_must_make_sense() {
        check_error(json!({"type": "linear"}), "rope_scaling.factor: wanted a number, found nothing");
        check_error(
            json!({"type": "linear", "factor": 0.5}),
            "rope_scaling.factor: wanted a finite number, 1 or more, found 0.5",
        );
        check_error(
            json!({"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}),
            "rope_scaling.high_freq_factor: wanted more than low_freq_factor 4, found 1",
        );
        check_error(
            json!({"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 32}),
            "rope_scaling.beta_fast: wanted at least beta_slow 32, found 1",
        );
        check_error(
            json!({"type": "yarn", "factor": 2, "attention_factor": -1}),
            "rope_scaling.attention_factor: wanted a finite number above 0, found -1",
        );
    }
}
