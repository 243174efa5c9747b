//! Where weights come from: a [`Checkpoint`](crate::Checkpoint), a [`Gguf`](crate::Gguf), or [`RandomWeights`](crate::RandomWeights).

use std::{borrow::Cow, ops::Range};

use dashinfer_kernels::{BlockFormat, DType};

/// Named tensors. What it says about a tensor does not change while a model is loaded from it. All threads of a pool read from it.
pub trait WeightSource: Sync {
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

    /// Says that these rows of tensor `name`, of its outermost dimension, are done with, so that the memory under them can go. Called from
    /// many threads, while what [`read`](Self::read) gave is borrowed: it must stay the same, and reading it again must still work. Rows
    /// that are not there are of no interest.
    fn done_with_rows(&self, _name: &str, _rows: Range<usize>) {}

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

/// Where `rows` of a tensor lie, which lies at `bytes` and has whole rows, `num_rows` of them. `None` if they are not all there.
pub(crate) fn bytes_of_rows(bytes: &Range<usize>, num_rows: usize, rows: &Range<usize>) -> Option<Range<usize>> {
    if rows.start > rows.end || rows.end > num_rows || num_rows == 0 {
        return None;
    }
    let row_bytes = bytes.len() / num_rows;
    Some(bytes.start + rows.start * row_bytes..bytes.start + rows.end * row_bytes)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_within_their_tensor() {
        assert_eq!(bytes_of_rows(&(10..40), 3, &(1..3)), Some(20..40));
        assert_eq!(bytes_of_rows(&(10..40), 3, &(3..3)), Some(40..40));
        let backwards = Range { start: 2, end: 1 };
        for rows in [2..4, usize::MAX..usize::MAX, backwards] {
            assert_eq!(bytes_of_rows(&(10..40), 3, &rows), None);
        }
        assert_eq!(bytes_of_rows(&(10..10), 0, &(0..0)), None);
        assert_eq!(bytes_of_rows(&(10..10), 5, &(1..4)), Some(10..10));
    }
}
