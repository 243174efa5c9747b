//! The tensors of a GGUF file as a source of weights.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use dashinfer_kernels::{DType, to_f32};

use super::{
    file::{GgufFile, Stored},
    metadata::ROPE_FACTORS,
};
use crate::{Attention, ModelSpec, StoredType, TensorInfo, WeightSource, source::bytes_of_rows};

/// The tensors of a GGUF file, by their names in it.
///
/// Files of the Llama architecture have the rows of q and k in another order than checkpoints on the hub: the two values that a rotation
/// pairs, `i` and `i + D / 2` of a head, are neighbours, `2 i` and `2 i + 1`. They are put back in order as they are read, row by row,
/// which costs a copy of these matrices while they are packed. So the kernels of the usual pairing serve, and the same weights give
/// the same bits whichever file they come from.
///
/// Tensors of all experts of a layer are listed as the matrices that they are stacked of, where they lie: `blk.0.ffn_up_exps.weight` of
/// `[N, F, E]` as `blk.0.ffn_up_exps.0.weight` and so on, of `[F, E]`. Keys and values of latent attention, `attn_k_b` and `attn_v_b`, are
/// listed as the one matrix `attn_kv_b` that they were taken from, and put together as they are read.
#[derive(Debug)]
pub struct GgufWeights {
    files: Vec<GgufFile>,
    tensors: BTreeMap<String, Listed>,
    /// The size of heads whose paired rows are neighbours.
    paired_head_dim: Option<usize>,
}

/// Where the bytes of a tensor are.
#[derive(Debug)]
enum Listed {
    /// In a file, of this number.
    Whole(usize, Stored),
    /// In two, to be put together.
    Heads(Box<Heads>),
}

/// Keys and values of latent attention.
#[derive(Debug)]
struct Heads {
    info: TensorInfo,
    /// `[H, C, N]`
    keys: (usize, Stored),
    /// `[H, V, C]`
    values: (usize, Stored),
}

/// More experts than these are not taken apart: no model has them.
const MAX_EXPERTS: usize = 1 << 11;

impl GgufWeights {
    pub(super) fn new(files: Vec<GgufFile>, paired: Option<&ModelSpec>) -> Self {
        let mut tensors = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for (name, stored) in file.tensors() {
                // The frequencies in the spec are divided by them already.
                if name != ROPE_FACTORS && !list_experts(&mut tensors, name, number, stored) {
                    tensors.insert(name.clone(), Listed::Whole(number, in_two_dimensions(name, stored)));
                }
            }
        }
        join_heads(&mut tensors);
        let paired_head_dim = paired.and_then(|spec| match &spec.attention {
            Attention::Grouped(attention) => Some(attention.head_dim),
            Attention::Latent(_) => None,
        });
        Self { files, tensors, paired_head_dim }
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.tensors.values().flat_map(Listed::parts).map(|(_, stored)| stored.bytes.len() as u64).sum()
    }

    fn bytes(&self, (number, stored): (usize, &Stored)) -> &[u8] {
        self.files[number].bytes(stored)
    }
}

impl Listed {
    fn info(&self) -> &TensorInfo {
        match self {
            Self::Whole(_, stored) => &stored.info,
            Self::Heads(heads) => &heads.info,
        }
    }

    /// What it lies in, each with the number of its file.
    fn parts(&self) -> impl Iterator<Item = (usize, &Stored)> {
        let parts = match self {
            Self::Whole(number, stored) => [Some((*number, stored)), None],
            Self::Heads(heads) => [&heads.keys, &heads.values].map(|(number, stored)| Some((*number, stored))),
        };
        parts.into_iter().flatten()
    }
}

impl WeightSource for GgufWeights {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|listed| listed.info().clone())
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        Some(match (self.tensors.get(name)?, self.paired_head_dim) {
            (Listed::Whole(number, stored), Some(head_dim)) if is_paired(name) => {
                unpair(self.bytes((*number, stored)), stored.info.shape[0], head_dim)
            }
            (Listed::Whole(number, stored), _) => Cow::Borrowed(self.bytes((*number, stored))),
            (Listed::Heads(heads), _) => {
                let [keys, values] = [&heads.keys, &heads.values]
                    .map(|(number, stored)| in_type(self.bytes((*number, stored)), stored, &heads.info.dtype));
                Cow::Owned(heads.joined(&keys, &values))
            }
        })
    }

    fn identity(&self) -> Option<String> {
        self.files.iter().map(GgufFile::identity).collect()
    }

    fn done_with_rows(&self, name: &str, rows: Range<usize>) {
        if let Some(Listed::Whole(number, stored)) = self.tensors.get(name)
            && let Some(bytes) = bytes_of_rows(&stored.bytes, stored.info.shape.first().copied().unwrap_or(0), &rows)
        {
            self.files[*number].release(&bytes);
        }
    }

    fn release(&mut self, name: &str) {
        for (number, stored) in self.tensors.get(name).into_iter().flat_map(Listed::parts) {
            self.files[number].release(&stored.bytes);
        }
    }
}

/// Lists what a tensor of all experts is stacked of, matrices or biases, if it is one.
fn list_experts(tensors: &mut BTreeMap<String, Listed>, name: &str, number: usize, stored: &Stored) -> bool {
    let Some((module, kind)) = name.rsplit_once('.').filter(|(module, _)| module.ends_with("_exps")) else {
        return false;
    };
    let (count, one) = match (kind, &stored.info.shape[..]) {
        ("weight", [count, one @ ..]) if one.len() == 2 => (*count, one.to_vec()),
        ("bias", [count, one @ ..]) if one.len() == 1 => (*count, one.to_vec()),
        _ => return false,
    };
    if count > MAX_EXPERTS {
        return false;
    }
    let bytes = stored.bytes.len() / count; // no dimension of a file is 0
    for index in 0..count {
        let start = stored.bytes.start + index * bytes;
        let info = TensorInfo { dtype: stored.info.dtype.clone(), shape: one.clone() };
        let expert = Stored { info, bytes: start..start + bytes };
        tensors.insert(format!("{module}.{index}.{kind}"), Listed::Whole(number, expert));
    }
    true
}

/// The gate on the shared expert has one row, which files leave out of its shape.
fn in_two_dimensions(name: &str, stored: &Stored) -> Stored {
    let mut stored = stored.clone();
    if name.ends_with(".ffn_gate_inp_shexp.weight") && stored.info.shape.len() == 1 {
        stored.info.shape.insert(0, 1);
    }
    stored
}

/// Lists `attn_k_b` and `attn_v_b` as `attn_kv_b`, in every layer that has both and where they fit.
fn join_heads(tensors: &mut BTreeMap<String, Listed>) {
    let with_keys: Vec<String> =
        tensors.keys().filter_map(|name| name.strip_suffix("attn_k_b.weight")).map(str::to_owned).collect();
    for layer in with_keys {
        let [keys, values, both] = ["k", "v", "kv"].map(|which| format!("{layer}attn_{which}_b.weight"));
        let (Some(Listed::Whole(k_file, k)), Some(Listed::Whole(v_file, v))) =
            (tensors.get(&keys), tensors.get(&values))
        else {
            continue;
        };
        let Some(heads) = Heads::new((*k_file, k.clone()), (*v_file, v.clone())) else { continue };
        tensors.remove(&keys);
        tensors.remove(&values);
        // Some have the whole beside its parts.
        tensors.entry(both).or_insert(Listed::Heads(Box::new(heads)));
    }
}

impl Heads {
    /// `None` if they are no keys and values of the same heads.
    fn new(keys: (usize, Stored), values: (usize, Stored)) -> Option<Self> {
        let (&[num_heads, rank, nope_dim], &[v_heads, v_dim, v_rank]) =
            (&keys.1.info.shape[..], &values.1.info.shape[..])
        else {
            return None;
        };
        let rows = nope_dim.checked_add(v_dim)?.checked_mul(num_heads)?;
        let dtype = match (&keys.1.info.dtype, &values.1.info.dtype) {
            (StoredType::Float(keys), StoredType::Float(values)) if keys == values => StoredType::Float(*keys),
            (StoredType::Other(_), _) | (_, StoredType::Other(_)) => return None,
            _ => StoredType::Float(DType::F32),
        };
        let same = num_heads == v_heads && rank == v_rank;
        same.then_some(Self { info: TensorInfo { dtype, shape: vec![rows, rank] }, keys, values })
    }

    /// For each head the rows that make keys, which stand transposed, then those that make values.
    fn joined(&self, keys: &[u8], values: &[u8]) -> Vec<u8> {
        let (&[_, rank, nope_dim], &[_, v_dim, _]) = (&self.keys.1.info.shape[..], &self.values.1.info.shape[..])
        else {
            return Vec::new(); // they have had such shapes
        };
        let StoredType::Float(dtype) = self.info.dtype else { return Vec::new() };
        let size = dtype.size_bytes();
        let mut out = Vec::with_capacity(keys.len() + values.len());
        let heads = keys.chunks_exact(rank * nope_dim * size).zip(values.chunks_exact(v_dim * rank * size));
        for (keys, values) in heads {
            for row in 0..nope_dim {
                for column in keys.chunks_exact(nope_dim * size) {
                    out.extend_from_slice(&column[row * size..][..size]);
                }
            }
            out.extend_from_slice(values);
        }
        out
    }
}

/// The values of a tensor in `dtype`: its own, or f32.
fn in_type<'a>(bytes: &'a [u8], stored: &Stored, dtype: &StoredType) -> Cow<'a, [u8]> {
    let values = match &stored.info.dtype {
        own if own == dtype => return Cow::Borrowed(bytes),
        StoredType::Float(own) => to_f32(bytes, *own),
        StoredType::Blocks(format) => {
            let mut values = vec![0.0; stored.info.shape.iter().product()];
            format.dequantize(bytes, &mut values);
            values
        }
        StoredType::Other(_) => return Cow::Borrowed(&[]), // refused before
    };
    Cow::Owned(values.into_iter().flat_map(f32::to_le_bytes).collect())
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
