//! The tensors of a GGUF file as a source of weights.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use super::{
    file::{GgufFile, Stored},
    metadata::ROPE_FACTORS,
};
use crate::{Attention, ModelSpec, TensorInfo, WeightSource, source::bytes_of_rows};

/// The tensors of a GGUF file, by their names in it.
///
/// Files of the Llama architecture have the rows of q and k in another order than checkpoints on the hub: the two values that a rotation
/// pairs, `i` and `i + D / 2` of a head, are neighbours, `2 i` and `2 i + 1`. They are put back in order as they are read, row by row,
/// which costs a copy of these matrices while they are packed. So the kernels of the usual pairing serve, and the same weights give
/// the same bits whichever file they come from.
#[derive(Debug)]
pub struct GgufWeights {
    files: Vec<GgufFile>,
    /// By name: which file, and where in it.
    tensors: BTreeMap<String, (usize, Stored)>,
    /// The size of heads whose paired rows are neighbours.
    paired_head_dim: Option<usize>,
}

impl GgufWeights {
    pub(super) fn new(files: Vec<GgufFile>, paired: Option<&ModelSpec>) -> Self {
        let mut tensors = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for (name, stored) in file.tensors() {
                // The frequencies in the spec are divided by them already.
                if name != ROPE_FACTORS {
                    tensors.insert(name.clone(), (number, stored.clone()));
                }
            }
        }
        let paired_head_dim = paired.and_then(|spec| match &spec.attention {
            Attention::Grouped(attention) => Some(attention.head_dim),
            Attention::Latent(_) => None,
        });
        Self { files, tensors, paired_head_dim }
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.tensors.values().map(|(_, stored)| stored.bytes.len() as u64).sum()
    }
}

impl WeightSource for GgufWeights {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(_, stored)| stored.info.clone())
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let (number, stored) = self.tensors.get(name)?;
        let bytes = self.files[*number].bytes(stored);
        Some(match self.paired_head_dim {
            Some(head_dim) if is_paired(name) => unpair(bytes, stored.info.shape[0], head_dim),
            _ => Cow::Borrowed(bytes),
        })
    }

    fn identity(&self) -> Option<String> {
        self.files.iter().map(GgufFile::identity).collect()
    }

    fn done_with_rows(&self, name: &str, rows: Range<usize>) {
        if let Some((number, stored)) = self.tensors.get(name)
            && let Some(bytes) = bytes_of_rows(&stored.bytes, stored.info.shape.first().copied().unwrap_or(0), &rows)
        {
            self.files[*number].release(&bytes);
        }
    }

    fn release(&mut self, name: &str) {
        if let Some((number, stored)) = self.tensors.get(name) {
            self.files[*number].release(&stored.bytes);
        }
    }
}

/// Whether it is the weight or the bias of q or k.
fn is_paired(name: &str) -> bool {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    module.ends_with(".attn_q") || module.ends_with(".attn_k")
}

/// Takes rows `2 i` and `2 i + 1` of each head to rows `i` and `i + D / 2`. Rows that are no whole heads stay: the model's proof refuses
/// them by their shape.
fn unpair(bytes: &[u8], rows: usize, head_dim: usize) -> Cow<'_, [u8]> {
    let head_bytes = bytes.len() / rows.max(1) * head_dim;
    if rows == 0 || head_dim < 2 || !rows.is_multiple_of(head_dim) || !head_dim.is_multiple_of(2) || head_bytes == 0 {
        return Cow::Borrowed(bytes);
    }
    let row_bytes = head_bytes / head_dim;
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(head_bytes) {
        for of_pair in 0..2 {
            for row in head.chunks_exact(row_bytes).skip(of_pair).step_by(2) {
                out.extend_from_slice(row);
            }
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_taken_apart_within_their_head() {
        let rows: Vec<u8> = (0..8).flat_map(|row| [row, row + 100]).collect();
        let found = unpair(&rows, 8, 4);
        let firsts: Vec<u8> = found.chunks_exact(2).map(|row| row[0]).collect();
        assert_eq!(firsts, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert!(found.chunks_exact(2).all(|row| row[1] == row[0] + 100));
        assert_eq!(unpair(&rows, 8, 3)[..], rows, "no whole heads");
        assert!(unpair(&[], 0, 4).is_empty());
    }

    #[test]
    fn only_q_and_k_are_paired() {
        for (name, paired) in [
            ("blk.0.attn_q.weight", true),
            ("blk.11.attn_k.bias", true),
            ("blk.0.attn_v.weight", false),
            ("blk.0.attn_q_norm.weight", false),
            ("attn_q", false),
        ] {
            assert_eq!(is_paired(name), paired, "{name}");
        }
    }
}
