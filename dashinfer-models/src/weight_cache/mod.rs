//! Packed weights on disk: what one load has packed, later ones map.
//!
//! A folder holds one file for each set of weights, quantization and layout of packed matrices. The [`key`] is a text of all that
//! decides the file's bytes; its hash names the file, and a file counts only if it holds the key itself. Files are written under
//! another name and then renamed ([`write`]), never changed: whoever has one mapped keeps what it mapped, also when another
//! process replaces it. All of a file is checked before any of it is used ([`read`]), and one that is damaged, cut short or not
//! ours is as good as absent: the weights are packed, and it is replaced.

mod checksum;
mod file;
#[cfg(fuzzing)]
pub mod fuzzing;
mod read;
mod write;

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use dashinfer_kernels::Backend;

pub(crate) use checksum::xxh64;
pub(crate) use read::StoredWeights;
pub(crate) use write::Writer;

use crate::{
    LoadError, Quantization, StoredQuantization, WeightSource, compensation, formats,
    quantization::Choice,
    weights::{Plan, Role},
};

/// A folder of packed weights; of [`Decoder::load_with_cache`](crate::Decoder::load_with_cache). Safe to share between threads and
/// processes.
///
/// Files may be deleted at any time, and are never deleted here: those of weights that are no longer used stay. Nobody may
/// truncate or write into them, since they are mapped, and whoever can write to the folder decides what is computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightCache {
    folder: PathBuf,
}

/// Where the weights of a model came from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightsFrom {
    /// Their source. No cache was asked for, or the backend or the source has nothing that could be kept in one.
    Source,
    /// The cache: nothing was packed.
    Cache,
    /// Their source; they were packed and stored for later loads.
    #[non_exhaustive]
    Stored {
        /// What was wrong with the file that they replace, if there was one.
        replaced: Option<CacheFault>,
    },
    /// Their source; they were packed, and storing them failed, as on a full disk.
    #[non_exhaustive]
    NotStored {
        /// Why.
        error: io::ErrorKind,
    },
}

/// Why a file of packed weights cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheFault {
    /// It cannot be opened or mapped.
    #[error("it cannot be read: {0}")]
    Read(io::ErrorKind),
    /// A number of the file that is not what it must be.
    #[error("{what} should be {wanted:#x}, found {found:#x}")]
    Value {
        /// What is counted, or summed.
        what: &'static str,
        /// What would do.
        wanted: u64,
        /// What is there.
        found: u64,
    },
    /// A header that is not of this form.
    #[error("its header is invalid: {0}")]
    Header(String),
    /// It is of other weights.
    #[error("it holds the weights of something else")]
    Key,
    /// A matrix or vector that is not the one which the model has in its place.
    #[error("wanted {wanted}, found {found}")]
    Item {
        /// What the model has.
        wanted: String,
        /// What is there.
        found: String,
    },
}

/// The one file of a cache that is, or would be, some weights.
#[derive(Debug)]
pub(crate) struct CacheFile<'a> {
    folder: &'a Path,
    path: PathBuf,
    key: String,
}

impl WeightCache {
    /// A cache in `folder`, which need not be there yet.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The place of the weights of `plan`; `None` if they cannot be kept.
    pub(crate) fn file<B: Backend>(
        &self,
        backend: &B,
        plan: &Plan,
        source: &dyn WeightSource,
        stored: Option<&StoredQuantization>,
        quantization: Quantization,
    ) -> Option<CacheFile<'_>> {
        let key = key(backend.layout()?, plan, source, stored, quantization)?;
        let path = self.folder.join(format!("{:016x}.weights", xxh64(key.as_bytes())));
        Some(CacheFile { folder: &self.folder, path, key })
    }
}

impl CacheFile<'_> {
    /// Begins to store. It needs no more than the folder, so that a cache which could never be written is refused before anything
    /// is packed.
    ///
    /// # Errors
    /// [`LoadError::WeightCache`].
    pub(crate) fn writer(self) -> Result<Writer, LoadError> {
        let path = self.folder.to_owned();
        Writer::new(self).map_err(|source| LoadError::WeightCache { path, source })
    }
}

/// All that decides the bytes of a file.
fn key(
    layout: &str,
    plan: &Plan,
    source: &dyn WeightSource,
    stored: Option<&StoredQuantization>,
    quantization: Quantization,
) -> Option<String> {
    let name = |role| match quantization.choice(role) {
        Choice::Scheme(scheme) => scheme.to_string(),
        Choice::Dense if stored.is_some() => "dense".to_owned(),
        Choice::Dense | Choice::AsStored => "as stored".to_owned(),
    };
    let (layers, vocabulary) = (name(Role::Layer), name(Role::Vocabulary));
    let mut key = format!("layout: {layout}\nlayers: {layers}\nvocabulary: {vocabulary}\n");
    if quantization.is_compensated() {
        let _ = writeln!(key, "compensated, version {}", compensation::VERSION);
    }
    if let Some(stored) = stored {
        let _ = writeln!(key, "stored: {stored:?}"); // writing to a text does not fail
    }
    for formats::Wanted { name, shape, .. } in formats::wanted(plan, source, stored).ok()? {
        let dtype = source.info(&name)?.dtype;
        let _ = writeln!(key, "{name} {shape:?} {dtype:?}");
    }
    // What is done to stored values on the way.
    if plan.norm.offset != 0.0 {
        let _ = writeln!(key, "norms: {:+}", plan.norm.offset);
    }
    if plan.head.as_ref().is_some_and(|head| head.unit_rows) {
        key.push_str("head: rows of length 1\n");
    }
    key.push_str(&source.identity()?);
    Some(key)
}

#[cfg(test)]
mod tests;
