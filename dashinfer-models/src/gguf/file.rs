//! One GGUF file, mapped: a head of metadata and of what the tensors are, then the tensors, each at an aligned place.
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    path::Path,
};

use dashinfer_kernels::{BlockFormat, DType};

use super::{
    GgufFault,
    reader::Reader,
    value::{Metadata, Value},
};
use crate::{CheckpointError, StoredType, TensorInfo, mapped::MappedFile};

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
const MAX_ALIGNMENT: usize = 1 << 20;
const MAX_DIMS: u32 = 4;
/// The least that a key with its value takes, and what a tensor takes: their lengths, types and numbers.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// A mapped file. Opening it reads the head alone.
#[derive(Debug)]
pub(super) struct GgufFile {
    file: MappedFile,
    head: Head,
}

/// What the head of a file says.
#[derive(Debug, PartialEq)]
struct Head {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Stored>,
    /// Where the first tensor may start.
    data: usize,
}

/// What a tensor is and where its bytes are in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) info: TensorInfo,
    /// Empty if its type is one that we do not know.
    pub(super) bytes: Range<usize>,
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = MappedFile::open(path)?;
        let head = Head::read(file.bytes()).map_err(|fault| CheckpointError::Gguf { path: path.into(), fault })?;
        Ok(Self { file, head })
    }

    pub(super) fn metadata(&self) -> Metadata<'_> {
        Metadata::new(&self.head.metadata, self.file.bytes())
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.head.tensors
    }

    pub(super) fn bytes(&self, tensor: &Stored) -> &[u8] {
        &self.file.bytes()[tensor.bytes.clone()]
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// See [`MappedFile::identity`].
    pub(super) fn identity(&self) -> Option<String> {
        self.file.identity(self.head.data.min(self.file.bytes().len()))
    }

    pub(super) fn release(&self, bytes: &Range<usize>) {
        self.file.release(bytes);
    }
}

impl Head {
    /// Reads the head of a whole file. The ranges in it lie inside `file`, and do not overlap.
    fn read(file: &[u8]) -> Result<Self, GgufFault> {
        let mut reader = Reader::new(file);
        let magic = reader.array::<4>()?;
        if magic != MAGIC {
            return Err(GgufFault::Magic { found: magic });
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufFault::Version { found: version });
        }
        let (num_tensors, num_keys) = (reader.u64()?, reader.u64()?);
        let metadata = read_metadata(&mut reader, num_keys)?;
        let alignment = alignment(&metadata)?;

        reader.now("the list of tensors");
        reader.room_for(num_tensors, MIN_TENSOR_BYTES)?;
        let mut listed = BTreeMap::new();
        for number in 0..num_tensors {
            reader.now(format!("tensor {number} of {num_tensors}"));
            let name = reader.text()?.to_owned();
            reader.now(format!("tensor {name}"));
            let tensor = Listed::read(&mut reader, alignment)?;
            if listed.insert(name, tensor).is_some() {
                return Err(reader.fault("one of this name", "two"));
            }
        }
        let data = reader.at().next_multiple_of(alignment);
        let tensors = place(listed, data, file.len())?;
        Ok(Self { metadata, tensors, data })
    }
}

fn read_metadata(reader: &mut Reader<'_>, num_keys: u64) -> Result<BTreeMap<String, Value>, GgufFault> {
    reader.now("the metadata");
    reader.room_for(num_keys, MIN_KEY_BYTES)?;
    let mut metadata = BTreeMap::new();
    for number in 0..num_keys {
        reader.now(format!("key {number} of {num_keys}"));
        let key = reader.text()?;
        reader.now(format!("key {key}"));
        let value = Value::read(reader)?;
        match metadata.entry(key.to_owned()) {
            Entry::Vacant(place) => place.insert(value),
            Entry::Occupied(_) => return Err(reader.fault("one of this name", "two")),
        };
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<usize, GgufFault> {
    let Some(value) = metadata.get(ALIGNMENT) else { return Ok(DEFAULT_ALIGNMENT) };
    let wanted = || format!("a power of two from 8 to {MAX_ALIGNMENT}");
    let found = if let Value::Unsigned(found) = value { usize::try_from(*found).ok() } else { None };
    let good = found.filter(|found| found.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(found));
    good.ok_or_else(|| GgufFault::Value { what: ALIGNMENT.into(), wanted: wanted(), found: value.to_string() })
}

/// A tensor as the head lists it.
struct Listed {
    info: TensorInfo,
    /// `None` if its type is one that we do not know.
    num_bytes: Option<u64>,
    /// From the start of the data.
    offset: u64,
}

impl Listed {
    fn read(reader: &mut Reader<'_>, alignment: usize) -> Result<Self, GgufFault> {
        let num_dims = reader.u32()?;
        if !(1..=MAX_DIMS).contains(&num_dims) {
            return Err(reader.fault(format!("1 to {MAX_DIMS} dimensions"), num_dims));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dims {
            let size = reader.u64()?;
            let size = usize::try_from(size).ok().filter(|size| *size > 0);
            shape.push(size.ok_or_else(|| reader.fault("dimensions of at least 1", "another"))?);
        }
        let (type_number, offset) = (reader.u32()?, reader.u64()?);
        if !offset.is_multiple_of(alignment as u64) {
            return Err(reader.fault(format!("an offset that is a multiple of {alignment}"), offset));
        }
        let dtype = stored_type(type_number);
        let row = shape[0]; // the file has the innermost dimension first
        let rows = shape[1..].iter().try_fold(1usize, |rows, size| rows.checked_mul(*size));
        let row_bytes = match &dtype {
            StoredType::Float(dtype) => Some(row.checked_mul(dtype.size_bytes())),
            StoredType::Blocks(format) if row.is_multiple_of(format.block_len()) => Some(format.row_bytes(row)),
            StoredType::Blocks(format) => {
                let wanted = format!("rows of {format} in blocks of {}", format.block_len());
                return Err(reader.fault(wanted, format!("rows of {row}")));
            }
            StoredType::Other(_) => None,
        };
        let num_bytes = match row_bytes {
            Some(bytes) => {
                let bytes = bytes.zip(rows).and_then(|(bytes, rows)| bytes.checked_mul(rows));
                Some(bytes.ok_or_else(|| reader.fault("a size that can be counted", format!("{shape:?}")))? as u64)
            }
            None => None,
        };
        shape.reverse();
        Ok(Self { info: TensorInfo { dtype, shape }, num_bytes, offset })
    }
}

/// Finds the tensors' bytes in a file of `len` bytes whose data start at `data`.
fn place(listed: BTreeMap<String, Listed>, data: usize, len: usize) -> Result<BTreeMap<String, Stored>, GgufFault> {
    let room = len.saturating_sub(data) as u64;
    let mut tensors = BTreeMap::new();
    let mut places = Vec::new();
    for (name, Listed { info, num_bytes, offset }) in listed {
        let bytes = match num_bytes {
            None => 0..0,
            Some(num_bytes) if offset.checked_add(num_bytes).is_some_and(|end| end <= room) => {
                // Both fit the file, and so an index.
                let start = data + offset as usize;
                places.push((start, start + num_bytes as usize, name.clone()));
                start..start + num_bytes as usize
            }
            Some(wanted) => {
                let found = room.saturating_sub(offset);
                let at = (data as u64).saturating_add(offset);
                return Err(GgufFault::Ends { what: format!("tensor {name}"), at, wanted, found });
            }
        };
        tensors.insert(name, Stored { info, bytes });
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((_, end, first), (start, _, second)) = (&pair[0], &pair[1]);
        if start < end {
            return Err(GgufFault::Value {
                what: format!("tensor {second}"),
                wanted: format!("a place behind tensor {first}, which ends at byte {end}"),
                found: format!("byte {start}"),
            });
        }
    }
    Ok(tensors)
}

fn stored_type(number: u32) -> StoredType {
    match number {
        0 => StoredType::Float(DType::F32),
        1 => StoredType::Float(DType::F16),
        30 => StoredType::Float(DType::BF16),
        _ => match BlockFormat::of_type_number(number) {
            Some(format) => StoredType::Blocks(format),
            None => StoredType::Other(other_type(number)),
        },
    }
}

/// The names of types that we do not read.
fn other_type(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        _ => return format!("type {number}"),
    };
    let known: Vec<_> = BlockFormat::ALL.iter().map(|format| format.name()).collect();
    format!("{name} (of blocks, {} are read)", known.join(", "))
}
