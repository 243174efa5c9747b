//! A model in a single file: GGUF, with its config and its tokenizer in the metadata.
//!
//! ```text
//! file ──▶ metadata ──(metadata)──▶ HfConfig's keys ──▶ families ──▶ ModelSpec
//!     │            └──(tokenizer)─▶ GgufTokenizer
//!     └──▶ tensors ──(weights)────▶ GgufWeights: WeightSource
//! ```

mod fault;
mod file;
mod metadata;
mod reader;
mod split;
mod tokenizer;
mod value;
mod weights;

use std::path::Path;

pub use fault::GgufFault;
use file::GgufFile;
pub use tokenizer::{GgufTokenizer, TokenKind};
pub use weights::GgufWeights;

use crate::{CheckpointError, ConfigError, ModelSpec};

/// A GGUF file, or the first of several that are one model (`..-00001-of-00003.gguf`), mapped into memory: opening it reads the heads
/// alone. Versions 2 and 3, little-endian.
///
/// The files must not be truncated or rewritten while a `Gguf` or its weights are there: as with every mapped file, the process would
/// see the change, or be ended by the system. Replacing them by renaming is fine.
#[derive(Debug)]
pub struct Gguf {
    /// At least one; the first has the metadata.
    files: Vec<GgufFile>,
}

impl Gguf {
    /// Opens the file at `path`, and those that belong to it.
    ///
    /// # Errors
    /// [`CheckpointError::Read`] and [`CheckpointError::Gguf`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Ok(Self { files: split::open(path)? })
    }

    /// What the model is, with the names that the file has for its parameters.
    ///
    /// # Errors
    /// [`ConfigError`], with the keys of the file's metadata: an architecture that is not supported, a key that is missing, and values
    /// that no model can have.
    pub fn spec(&self) -> Result<ModelSpec, ConfigError> {
        metadata::spec(self)
    }

    /// The facts of the tokenizer; `None` if the file has none.
    ///
    /// # Errors
    /// [`ConfigError`], with the keys of the file's metadata.
    pub fn tokenizer(&self) -> Result<Option<GgufTokenizer>, ConfigError> {
        GgufTokenizer::read(self.files[0].metadata())
    }

    /// The weights, as those of `spec`, which is that of this file.
    #[must_use]
    pub fn into_weights(self, spec: &ModelSpec) -> GgufWeights {
        let paired = metadata::rows_are_paired(self.files[0].metadata());
        GgufWeights::new(self.files, paired.then_some(spec))
    }

    /// A tensor of floating-point numbers.
    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let (file, stored) = self.files.iter().find_map(|file| Some((file, file.tensors().get(name)?)))?;
        match stored.info.dtype {
            crate::StoredType::Float(dtype) => Some(dashinfer_kernels::to_f32(file.bytes(stored), dtype)),
            _ => None,
        }
    }

    /// The shape of a tensor, outermost dimension first.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.files.iter().find_map(|file| file.tensors().get(name))?.info.shape)
    }
}
