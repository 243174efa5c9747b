//! One safetensors file, mapped: eight bytes of header length, a JSON header, then the tensors without gaps.
//! <https://huggingface.co/docs/safetensors>

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use dashinfer_kernels::DType;
use safetensors::tensor::{Dtype, Metadata};

use crate::{CheckpointError, StoredType, TensorInfo, mapped::MappedFile};

const LENGTH_BYTES: usize = 8;
/// The most that the reference reader takes; it keeps a wrong length from looking like a real one.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A mapped file. Opening it reads the header alone.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    file: MappedFile,
    tensors: BTreeMap<String, Stored>,
}

/// What a tensor is and where its bytes are in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) info: TensorInfo,
    pub(crate) bytes: Range<usize>,
}

impl SafetensorsFile {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = MappedFile::open(path)?;
        let tensors = parse_header(file.bytes(), path)?;
        Ok(Self { file, tensors })
    }

    /// See [`MappedFile::identity`].
    pub(crate) fn identity(&self) -> Option<String> {
        let data = self.tensors.values().map(|tensor| tensor.bytes.start).min();
        self.file.identity(data.unwrap_or(self.file.bytes().len()))
    }

    pub(crate) fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    pub(crate) fn bytes(&self, tensor: &Stored) -> &[u8] {
        &self.file.bytes()[tensor.bytes.clone()]
    }

    pub(crate) fn release(&self, bytes: &Range<usize>) {
        self.file.release(bytes);
    }
}

/// Reads the header of a whole file. What it returns lies inside `file`.
fn parse_header(file: &[u8], path: &Path) -> Result<BTreeMap<String, Stored>, CheckpointError> {
    let length = |what, wanted: u64, found: usize| CheckpointError::Length {
        path: PathBuf::from(path),
        what,
        wanted,
        found: found as u64,
    };
    let Some((prefix, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(length("the length of the header", LENGTH_BYTES as u64, file.len()));
    };
    let header_bytes = u64::from_le_bytes(*prefix);
    if header_bytes > MAX_HEADER_BYTES.min(rest.len() as u64) {
        return Err(length("the header", header_bytes, rest.len()));
    }
    let (header, data) = rest.split_at(header_bytes as usize);
    // Deserializing checks that tensors follow each other without gap or overlap and that their sizes fit their shapes.
    // It does not know how long the file is, and `SafeTensors::read_metadata`, which does, adds without looking for
    // overflow.
    let metadata: Metadata =
        serde_json::from_slice(header).map_err(|source| CheckpointError::Header { path: path.into(), source })?;
    if metadata.data_len() != data.len() {
        return Err(length("the tensors", metadata.data_len() as u64, data.len()));
    }
    let start = LENGTH_BYTES + header.len();
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
        (name, Stored { info: TensorInfo { dtype: stored_type(info.dtype), shape: info.shape.clone() }, bytes })
    });
    Ok(tensors.collect())
}

fn stored_type(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::Float(DType::F32),
        Dtype::F16 => StoredType::Float(DType::F16),
        Dtype::BF16 => StoredType::Float(DType::BF16),
        other => StoredType::Other(format!("{other:?}")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of `header` and `data`.
    pub(crate) fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    /// `(name, type, shape, bytes)`
    pub(crate) type Tensor<'a> = (&'a str, &'a str, &'a [usize], &'a [u8]);

    /// A valid file of these tensors, in this order.
    pub(crate) fn file_of(tensors: &[Tensor<'_>]) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, dtype, shape, bytes) in tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert((*name).into(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            data.extend_from_slice(bytes);
        }
        file(&serde_json::Value::Object(header).to_string(), &data)
    }

    fn parse(file: &[u8]) -> Result<BTreeMap<String, Stored>, CheckpointError> {
        parse_header(file, Path::new("x.safetensors"))
    }

    /// The error's text and that of its source.
    #[track_caller]
    fn check_error(file: &[u8], text: &str, source: &str) {
        let error = parse(file).unwrap_err();
        assert_eq!(error.to_string(), format!("x.safetensors: {text}"));
        let found = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(found.contains(source), "{found}");
    }

    #[test]
    fn tensors_lie_behind_the_header() {
        let bytes = file_of(&[("a", "BF16", &[1, 2], &[1, 2, 3, 4]), ("b", "I8", &[1], &[5])]);
        let found = parse(&bytes).unwrap();
        assert_eq!(&bytes[found["a"].bytes.clone()], [1, 2, 3, 4]);
        assert_eq!(found["a"].info, TensorInfo { dtype: StoredType::Float(DType::BF16), shape: vec![1, 2] });
        assert_eq!(
            (&bytes[found["b"].bytes.clone()], &found["b"].info.dtype),
            (&[5][..], &StoredType::Other("I8".into()))
        );
    }

    #[test]
    fn a_file_without_tensors_is_valid() {
        assert!(parse(&file("{}", &[])).unwrap().is_empty());
    }

    #[test]
    fn broken_files_say_what_is_broken() {
        check_error(&[], "the length of the header should take 8 bytes, found 0", "");
        check_error(&[1, 0, 0], "the length of the header should take 8 bytes, found 3", "");
        check_error(&[255; 20], "the header should take 18446744073709551615 bytes, found 12", "");
        check_error(&file("{", &[]), "the safetensors header is invalid", "EOF");
        check_error(&file("[]", &[]), "the safetensors header is invalid", "");
        check_error(&file("\u{0}", &[]), "the safetensors header is invalid", "");
        let one = |rest: &str| format!("{{\"a\": {{{rest}}}}}");
        let good = one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#);
        check_error(&file(&good, &[0; 3]), "the tensors should take 4 bytes, found 3", "");
        check_error(&file(&good, &[0; 5]), "the tensors should take 4 bytes, found 5", "");
        let invalid = "the safetensors header is invalid";
        check_error(&file(&one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), &[0; 4]), invalid, "invalid");
        check_error(&file(&one(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), &[0; 4]), invalid, "a");
        check_error(&file(&one(r#""dtype":"F99","shape":[1],"data_offsets":[0,4]"#), &[0; 4]), invalid, "F99");
        let huge = one(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]"#);
        check_error(&file(&huge, &[0; 4]), invalid, "overflow");
        let overlap = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        check_error(&file(overlap, &[0; 3]), invalid, "b");
        let gap = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#;
        check_error(&file(gap, &[0; 3]), invalid, "b");
    }

    /// Sizes that fit their shapes and each other, and whose sum with the header wraps around to the file's length.
    #[test]
    fn offsets_near_the_end_of_the_address_space_do_not_wrap() {
        let step = 1_u64 << 60;
        let tensor = |i: u64, end: u64| {
            let (start, size) = (i * step, end - i * step);
            format!(r#""t{i:02}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
        };
        let mut list: Vec<_> = (0..15).map(|i| tensor(i, (i + 1) * step)).collect();
        list.push(tensor(15, u64::MAX - 7));
        let header = format!("{{{}}}", list.join(","));
        let error = parse(&file(&header, &[])).unwrap_err();
        assert!(matches!(error, CheckpointError::Length { what: "the tensors", found: 0, .. }), "{error}");
    }

    proptest! {
        #[test]
        fn a_file_cut_anywhere_is_an_error(cut in 0.0..1.0f64) {
            let whole = file_of(&[("a", "F32", &[2, 3], &[7; 24]), ("b", "F16", &[5], &[1; 10])]);
            let len = (whole.len() as f64 * cut) as usize; // below 1, so at least a byte is gone
            prop_assert!(parse(&whole[..len]).is_err());
        }

        #[test]
        fn arbitrary_headers_never_panic(header in ".{0,120}", data in prop::collection::vec(any::<u8>(), 0..20)) {
            let _ = parse(&file(&header, &data));
        }

        #[test]
        fn a_changed_byte_never_panics_and_ranges_stay_inside(at in any::<prop::sample::Index>(), to: u8) {
            let mut bytes = file_of(&[("a", "F32", &[2, 3], &[7; 24]), ("b", "F16", &[5], &[1; 10])]);
            let at = at.index(bytes.len());
            bytes[at] = to;
            for stored in parse(&bytes).into_iter().flat_map(BTreeMap::into_values) {
                prop_assert!(stored.bytes.start <= stored.bytes.end && stored.bytes.end <= bytes.len());
            }
        }
    }
}
