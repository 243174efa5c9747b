//! Reading the files beside a tokenizer: `tokenizer_config.json`.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::TokenizerError;

/// What is used of `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Config {
    #[serde(default)]
    chat_template: Option<Templates>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Config {
    pub(super) fn read(path: &Path) -> Result<Self, TokenizerError> {
        match read_if_there(path)? {
            Some(json) => {
                serde_json::from_str(&json).map_err(|source| parse_error(path, "tokenizer configuration", source))
            }
            None => Ok(Self::default()),
        }
    }

    /// The only template, or the one named `default`: others are for tools and retrieval.
    pub(super) fn template(&self) -> Option<String> {
        match self.chat_template.as_ref()? {
            Templates::One(template) => Some(template.clone()),
            Templates::Named(templates) => {
                templates.iter().find(|named| named.name == "default").map(|named| named.template.clone())
            }
        }
    }

    /// `bos_token` and its like, spelt as a string or as an object with `content`.
    pub(super) fn special_tokens(&self) -> BTreeMap<String, String> {
        let spelling = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
        self.rest
            .iter()
            .filter(|(name, _)| name.ends_with("_token"))
            .filter_map(|(name, value)| Some((name.clone(), spelling(value)?)))
            .collect()
    }
}

pub(super) fn read(path: &Path) -> Result<String, TokenizerError> {
    std::fs::read_to_string(path)
        .map_err(|source| TokenizerError::Read { path: path.to_owned(), source: Arc::new(source) })
}

pub(super) fn read_if_there(path: &Path) -> Result<Option<String>, TokenizerError> {
    match read(path) {
        Err(TokenizerError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

pub(super) fn parse_error(path: &Path, wanted: &'static str, source: impl Into<BoxError>) -> TokenizerError {
    TokenizerError::Parse { path: path.to_owned(), wanted, source: source.into().into() }
}
