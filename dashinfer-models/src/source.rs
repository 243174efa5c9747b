//! Where weights come from: a [`Checkpoint`](crate::Checkpoint), a [`Gguf`](crate::Gguf), or [`RandomWeights`](crate::RandomWeights).

use std::borrow::Cow;

use dashinfer_kernels::{BlockFormat, DType};

/// Named tensors. What it says about a tensor does not change while a model is loaded from it.
pub trait WeightSource {
    /// The names of all tensors.
    fn names(&self) -> Vec<&str>;

    /// What tensor `name` is, without reading it.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// The values of tensor `name`: little-endian, row-major, not necessarily aligned.
    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>>;

    /// A text that tells these weights from all others of the same names, shapes and types, found without reading them: the names,
    /// sizes and times of files, or a seed. `None`: nothing does, and what was packed of them cannot be found again later.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Says that tensor `name` will not be read again, so that its memory can go. Reading it again must still work.
    fn release(&mut self, _name: &str) {}
}

/// The type and shape of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its elements.
    pub dtype: StoredType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
}

/// The type of stored elements: one that we read, or the name of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredType {
    /// A floating-point type of the kernels.
    Float(DType),
    /// Rows of quantized blocks.
    Blocks(BlockFormat),
    /// Anything else, as the file calls it.
    Other(String),
}

impl std::fmt::Display for StoredType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Float(dtype) => dtype.fmt(f),
            Self::Blocks(format) => write!(f, "blocks of {format}"),
            Self::Other(name) => f.write_str(name),
        }
    }
}
