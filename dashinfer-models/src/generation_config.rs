//! `generation_config.json`: how the model's authors would sample, and which tokens end an answer.

use std::{num::NonZeroU32, path::Path};

use serde_json::Map;

use crate::{
    ConfigError, HfConfig,
    json::{self, Object},
};

/// Defaults for sampling and the ids of special tokens. Everything is optional; unknown keys are ignored.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end an answer; empty if the files name none.
    pub eos_token_ids: Vec<u32>,
    /// The token that fills short rows of a batch; of no use here, but tokenizers ask for it.
    pub pad_token_id: Option<u32>,
    /// Whether to sample at all; `Some(false)` is greedy.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keep the fewest most likely tokens whose probabilities sum to this.
    pub top_p: Option<f32>,
    /// Keep the most likely tokens; 0 and negative numbers, by which some mean all, are `None`.
    pub top_k: Option<NonZeroU32>,
    /// Keep tokens at least this likely relative to the most likely one.
    pub min_p: Option<f32>,
    /// Divides positive logits of tokens seen before, multiplies negative ones.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` if it is there; special tokens that it does not name come from `config`.
    ///
    /// # Errors
    /// [`ConfigError`], if the file cannot be read or a known key has a value of another kind.
    pub fn read(folder: &Path, config: &HfConfig) -> Result<Self, ConfigError> {
        let map = match json::read(&folder.join("generation_config.json")) {
            Ok(map) => map,
            Err(ConfigError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(error) => return Err(error),
        };
        Self::from_objects(Object::new(&map, "generation_config"), config.object())
    }

    fn from_objects(given: Object<'_>, config: Object<'_>) -> Result<Self, ConfigError> {
        let ids = |key| -> Result<Vec<u32>, ConfigError> {
            let here = given.token_ids(key)?;
            Ok(if here.is_some() { here } else { config.token_ids(key)? }.unwrap_or_default())
        };
        let number = |key| given.number(key).map(|value| value.map(|value| value as f32));
        Ok(Self {
            bos_token_id: ids("bos_token_id")?.first().copied(),
            eos_token_ids: ids("eos_token_id")?,
            pad_token_id: ids("pad_token_id")?.first().copied(),
            do_sample: given.flag("do_sample")?,
            temperature: number("temperature")?,
            top_p: number("top_p")?,
            top_k: given.number("top_k")?.and_then(|k| NonZeroU32::new(k as u32)), // saturates: negative is 0
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{config::tests::config, test_folder::TestFolder};

    fn read(generation: Value, of_config: Value) -> Result<GenerationConfig, ConfigError> {
        let map = generation.as_object().unwrap();
        GenerationConfig::from_objects(Object::new(map, "generation_config"), config("X", of_config).object())
    }

    #[test]
    fn end_tokens_are_one_or_many_or_those_of_the_config() {
        assert_eq!(read(json!({"eos_token_id": 2}), json!({})).unwrap().eos_token_ids, [2]);
        assert_eq!(read(json!({"eos_token_id": [2, 7]}), json!({"eos_token_id": 9})).unwrap().eos_token_ids, [2, 7]);
        assert_eq!(read(json!({"eos_token_id": null}), json!({"eos_token_id": 9})).unwrap().eos_token_ids, [9]);
        assert_eq!(read(json!({}), json!({})).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn sampling_defaults_are_read() {
        let all = json!({"do_sample": true, "temperature": 0.5, "top_p": 0.75, "top_k": 20, "min_p": 0.25,
            "repetition_penalty": 1.5, "bos_token_id": 1, "_from_model_config": true});
        let found = read(all, json!({})).unwrap();
        assert_eq!((found.do_sample, found.temperature, found.top_p), (Some(true), Some(0.5), Some(0.75)));
        assert_eq!((found.top_k, found.min_p, found.repetition_penalty), (NonZeroU32::new(20), Some(0.25), Some(1.5)));
        assert_eq!(found.bos_token_id, Some(1));
        assert_eq!(read(json!({"top_k": 0}), json!({})).unwrap().top_k, None);
        assert_eq!(read(json!({"top_k": -1}), json!({})).unwrap().top_k, None);
    }

    #[test]
    fn a_value_of_another_kind_is_named() {
        let error = read(json!({"eos_token_id": "</s>"}), json!({})).unwrap_err().to_string();
        assert_eq!(error, "generation_config.eos_token_id: wanted a token id or a list of them, found \"</s>\"");
        let error = read(json!({"temperature": "hot"}), json!({})).unwrap_err().to_string();
        assert_eq!(error, "generation_config.temperature: wanted a number, found \"hot\"");
    }

    #[test]
    fn the_file_is_optional_but_not_arbitrary() {
        let folder = TestFolder::new();
        let config = config("X", json!({"eos_token_id": 5}));
        assert_eq!(GenerationConfig::read(folder.path(), &config).unwrap().eos_token_ids, [5]);
        folder.write("generation_config.json", b"{");
        assert!(matches!(GenerationConfig::read(folder.path(), &config), Err(ConfigError::Json { .. })));
    }
}
