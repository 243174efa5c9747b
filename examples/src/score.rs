//! Logits and greedy continuations of token sequences, from file to file: what another implementation is compared with.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use dashinfer::{Engine, PromptLogits, Request};
use futures::future::try_join_all;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};

use crate::Failure;

/// Greedy tokens that follow each prompt, unless the context ends before.
pub const GREEDY_TOKENS: usize = 32;

/// What is wrong with a file of prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InputError {
    /// No tensor is named `prompt_i_ids`.
    NoPrompts,
    /// A tensor is not a row of int64.
    NotIds {
        /// Its name.
        name: String,
        /// Its type and shape.
        found: String,
    },
    /// A value that cannot be a token id.
    NotAnId {
        /// The tensor's name.
        name: String,
        /// The value.
        found: i64,
    },
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPrompts => write!(f, "there is no tensor `prompt_i_ids` with a number for i"),
            Self::NotIds { name, found } => write!(f, "`{name}`: wanted I64 of one dimension, found {found}"),
            Self::NotAnId { name, found } => write!(f, "`{name}`: {found} is no token id"),
        }
    }
}

impl Error for InputError {}

/// One prompt of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// `prompt_0`, `prompt_1`, and so on.
    pub name: String,
    /// Its tokens.
    pub ids: Vec<u32>,
}

/// A prompt, scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// That of the prompt.
    pub name: String,
    /// `[T, V]`
    pub logits: PromptLogits,
    /// The tokens that follow greedily, end tokens included; fewer than [`GREEDY_TOKENS`] if the context ends before.
    pub greedy_ids: Vec<u32>,
}

/// The tensors `prompt_i_ids` (int64, `[T]`) of a safetensors file; all others are ignored.
///
/// # Errors
/// If the bytes are no safetensors file; [`InputError`].
pub fn read_prompts(bytes: &[u8]) -> Result<Vec<Prompt>, Failure> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| format!("no safetensors file: {error}"))?;
    let mut prompts = Vec::new();
    for (name, tensor) in tensors.iter() {
        let Some(number) = name.strip_prefix("prompt_").and_then(|rest| rest.strip_suffix("_ids")) else { continue };
        if let Ok(number) = number.parse::<u32>() {
            prompts.push((number, Prompt { name: format!("prompt_{number}"), ids: token_ids(name, &tensor)? }));
        }
    }
    if prompts.is_empty() {
        return Err(InputError::NoPrompts.into());
    }
    prompts.sort_by_key(|(number, _)| *number);
    Ok(prompts.into_iter().map(|(_, prompt)| prompt).collect())
}

fn token_ids(name: &str, tensor: &TensorView<'_>) -> Result<Vec<u32>, InputError> {
    if tensor.dtype() != Dtype::I64 || tensor.shape().len() != 1 {
        let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
        return Err(InputError::NotIds { name: name.to_owned(), found });
    }
    let ids = tensor.data().as_chunks().0.iter().map(|id| i64::from_le_bytes(*id));
    ids.map(|id| u32::try_from(id).map_err(|_| InputError::NotAnId { name: name.to_owned(), found: id })).collect()
}

/// Scores all prompts, which the engine computes together.
///
/// Takes the memory of all logits at once: `T · V · 4` bytes for each prompt.
///
/// # Errors
/// Those of [`Engine::prompt_logits`] and [`Engine::generate`], for the first prompt that has one.
pub async fn score(engine: &Engine, prompts: Vec<Prompt>) -> Result<Vec<Scored>, dashinfer::Error> {
    try_join_all(prompts.into_iter().map(async |Prompt { name, ids }| {
        let logits = engine.prompt_logits(ids.clone()).await?;
        // A prompt that fills the context has logits, but nothing can follow it.
        let room = engine.model().context - ids.len();
        let greedy_ids = if room == 0 {
            Vec::new()
        } else {
            let request = Request::tokens(ids).temperature(0.0).repetition_penalty(1.0).ignore_eos();
            engine.generate(request.max_tokens(GREEDY_TOKENS.min(room))).complete().await?.tokens
        };
        Ok(Scored { name, logits, greedy_ids })
    }))
    .await
}

/// Writes `prompt_i_logits` (f32, `[T, V]`) and `prompt_i_greedy_ids` (int64, `[32]` or less) for each prompt.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, scored: &[Scored]) -> Result<(), Failure> {
    let tensors = scored.iter().flat_map(|scored| {
        let Scored { name, logits, greedy_ids } = scored;
        let logits_shape = vec![logits.rows().len(), logits.vocab_size()];
        [
            (format!("{name}_logits"), Tensor { values: Values::Logits(logits.values()), shape: logits_shape }),
            (format!("{name}_greedy_ids"), Tensor { values: Values::Ids(greedy_ids), shape: vec![greedy_ids.len()] }),
        ]
    });
    let cannot = |error: &dyn Error| format!("cannot write {}: {error}", path.display());
    // The library writes a temporary file, which nobody else may read, and renames it. So the usual permissions come from here.
    let permissions =
        File::create(path).and_then(|file| file.metadata()).map_err(|error| cannot(&error))?.permissions();
    safetensors::serialize_to_file(tensors, None, path).map_err(|error| cannot(&error))?;
    fs::set_permissions(path, permissions).map_err(|error| cannot(&error))?;
    Ok(())
}

/// A tensor that becomes bytes only when it is written.
struct Tensor<'a> {
    values: Values<'a>,
    shape: Vec<usize>,
}

enum Values<'a> {
    Logits(&'a [f32]),
    Ids(&'a [u32]),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::Logits(_) => Dtype::F32,
            Values::Ids(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.values {
            Values::Logits(logits) => logits.iter().flat_map(|logit| logit.to_le_bytes()).collect(),
            Values::Ids(ids) => ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect(),
        }
    }

    fn data_len(&self) -> usize {
        match self.values {
            Values::Logits(logits) => size_of_val(logits),
            Values::Ids(ids) => ids.len() * size_of::<i64>(),
        }
    }
}
