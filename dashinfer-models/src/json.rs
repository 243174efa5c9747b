//! Typed reading of JSON objects written by others. `null` is the same as absent; a value of the wrong kind is an error
//! that names its key.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::ConfigError;

/// Reads a JSON object from a file.
pub(crate) fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = fs::read(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    parse(&text, path)
}

/// Parses a JSON object; `path` is for the error alone.
pub(crate) fn parse(text: &[u8], path: &Path) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_slice(text).map_err(|source| ConfigError::Json { path: path.into(), source })
}

/// A JSON object and its name, for errors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object<'a> {
    map: &'a Map<String, Value>,
    name: &'a str,
}

impl<'a> Object<'a> {
    /// `name` is empty for the whole file.
    pub(crate) fn new(map: &'a Map<String, Value>, name: &'a str) -> Self {
        Self { map, name }
    }

    /// The key as errors call it.
    pub(crate) fn path(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    /// Whether the key is there, be it `null`.
    pub(crate) fn names(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value, unless it is absent or `null`.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| ConfigError::value(self.path(key), wanted, shorten(value)))
    }

    /// A whole number, 0 or more.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(key, "a whole number", whole)
    }

    /// A whole number, 0 or more, that must be there.
    pub(crate) fn required_count(&self, key: &str) -> Result<usize, ConfigError> {
        self.count(key)?.ok_or_else(|| ConfigError::value(self.path(key), "a whole number", "nothing"))
    }

    /// A number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// True or false.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of strings.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        self.typed(key, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A list of whole numbers, 0 or more.
    pub(crate) fn counts(&self, key: &str) -> Result<Option<Vec<usize>>, ConfigError> {
        self.typed(key, "a list of whole numbers", |value| value.as_array()?.iter().map(whole).collect())
    }

    /// A list of numbers.
    pub(crate) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        self.typed(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// One token id, or a list of them.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        self.typed(key, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        })
    }

    /// An object.
    pub(crate) fn object(&self, key: &'a str) -> Result<Option<Object<'a>>, ConfigError> {
        self.typed(key, "an object", |value| Some(Object::new(value.as_object()?, key)))
    }

    /// The objects in an object of objects, in the order of their keys.
    pub(crate) fn objects(&self, key: &str) -> Result<Option<Vec<Object<'a>>>, ConfigError> {
        self.typed(key, "an object of objects", |value| {
            let entries = value.as_object()?.iter();
            entries.map(|(name, value)| Some(Object::new(value.as_object()?, name))).collect()
        })
    }

    /// Whether it has no keys.
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether any value is itself an object.
    pub(crate) fn nests(&self) -> bool {
        self.map.values().any(Value::is_object)
    }
}

/// `4096`, and also `4096.0`, as some tools write it.
fn whole(value: &Value) -> Option<usize> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53: below it every whole f64 is the number that was written
    let number = value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && (0.0..EXACT).contains(&number)).then_some(number as u64)
    })?;
    usize::try_from(number).ok()
}

/// The value as JSON, cut where a message would grow too long.
fn shorten(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
