//! Checkpoints that were quantized before they were stored: what their configs say, which tensors a module then has, and how these
//! become a [`StoredMatrix`], the one form that the packer takes.
//!
//! Which modules are quantized is read from the file, not from the lists of exceptions in the config, of which every tool has its own
//! kind: a module with a plain `.weight` in floating point is not, another is. The proof of a checkpoint sees to it that all tensors
//! are there, are used, and have the shapes and types that the config asks for.

mod awq;
mod blocks;
mod codes;
mod compressed;
mod fp8;
mod gptq;
mod matrix;
pub(crate) mod mxfp4;
mod order;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt};

use dashinfer_kernels::{BlockFormat, CodeLayout, DType, LatentHeads, StoredMatrix};

pub use matrix::{Conversion, PackedAs};
pub(crate) use matrix::{HeadsForm, MatrixForm, conversions};

use crate::{
    ConfigError, StoredType, TensorInfo, WeightSource, WeightsError,
    json::Object,
    weights::{Fill, LinearPlan, Part, Plan, Role, StoredHeads, VectorPlan},
};

/// How the weights of a checkpoint were quantized before they were stored: its `quantization_config`, or that of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredQuantization(Method);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Method {
    Gptq(gptq::Gptq),
    Awq(awq::Awq),
    Fp8(fp8::Fp8),
    Compressed(compressed::Compressed),
    /// Of experts alone: all modules are as in any checkpoint.
    Mxfp4,
    /// Of GGUF files: each matrix says what it is.
    Blocks,
}

const SUPPORTED: &str = "gptq, awq, fp8, fbgemm_fp8, compressed-tensors, mxfp4";

impl StoredQuantization {
    /// Matrices in blocks, each in a format of its own or in none: GGUF files.
    pub(crate) const BLOCKS: Self = Self(Method::Blocks);

    /// What a whole `config.json` says; `None` if weights are not quantized.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] for a method, or a variant of one, that we do not read; [`ConfigError::Value`].
    pub(crate) fn from_config(config: Object<'_>) -> Result<Option<Self>, ConfigError> {
        // The second is an older name, which compressed-tensors alone has used.
        let keys = ["quantization_config", "compression_config"];
        let Some(key) = keys.into_iter().find(|key| config.get(key).is_some()) else { return Ok(None) };
        let Some(object) = config.object(key)? else { return Ok(None) };
        let method = match object.text("quant_method")? {
            None if key == keys[1] => "compressed-tensors",
            None => {
                return Err(ConfigError::value(object.path("quant_method"), format!("one of {SUPPORTED}"), "nothing"));
            }
            Some(method) => method,
        };
        Ok(Some(Self(match method {
            "gptq" => Method::Gptq(gptq::Gptq::from_config(object)?),
            "awq" => Method::Awq(awq::Awq::from_config(object)?),
            "fp8" | "fbgemm_fp8" => Method::Fp8(fp8::Fp8::from_config(object)?),
            "compressed-tensors" => Method::Compressed(compressed::Compressed::from_config(object)?),
            "mxfp4" => Method::Mxfp4,
            other => return Err(unsupported(object, "quant_method", other, SUPPORTED)),
        })))
    }

    /// How the weight of `part` is stored, if it was quantized. Tensors that are missing, or not what they should be, are found by
    /// whoever proves the list of them.
    fn module(
        &self,
        source: &dyn WeightSource,
        part: &Part,
        cols: usize,
        role: Role,
    ) -> Result<Option<StoredModule>, WeightsError> {
        if let Some(stacked) = part.stacked {
            let is_dense = matches!(source.info(&part.weight()).map(|info| info.dtype), Some(StoredType::Float(_)));
            let experts = self.0 == Method::Mxfp4 && !is_dense;
            return Ok(experts.then(|| mxfp4::module(part, stacked, cols)));
        }
        let module = Module { source, name: &part.module, shape: [part.rows, cols] };
        if let Some(StoredType::Float(_)) = module.stored_type("weight") {
            return Ok(None);
        }
        // An embedding is never quantized, and a head seldom; so what is missing of them is `.weight`.
        let by_default = role != Role::Vocabulary;
        match &self.0 {
            Method::Gptq(gptq) if by_default || module.has("qweight") => gptq.module(&module).map(Some),
            Method::Awq(awq) if by_default || module.has("qweight") => Ok(Some(awq.module(&module))),
            Method::Fp8(fp8) if module.has("weight") => Ok(Some(fp8.module(&module))),
            Method::Compressed(compressed) => compressed.module(&module, by_default),
            Method::Blocks => Ok(blocks::module(&module)),
            _ => Ok(None),
        }
    }

    /// Whether a tensor that nothing asks for may be in such a checkpoint all the same: scales of activations, since ours are rounded
    /// by their own values, if at all, and of caches; and biases of modules without any, which some tools write as zeros.
    fn ignores(&self, source: &dyn WeightSource, name: &str) -> bool {
        const SCALES: [&str; 9] = [
            "input_scale",
            "input_scale_ub",
            "input_zero_point",
            "activation_scale",
            "output_scale",
            "k_scale",
            "v_scale",
            "kv_scale",
            "q_scale",
        ];
        match name.rsplit_once('.') {
            Some((_, last)) if SCALES.contains(&last) => true,
            Some((module, "bias")) if source.info(&format!("{module}.qweight")).is_some() => {
                source.read(name).is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0))
            }
            _ => false,
        }
    }
}

/// `gptq: 4 bits in groups of 128`
impl fmt::Display for StoredQuantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Method::Gptq(gptq) => f.write_str(&gptq.label()),
            Method::Awq(awq) => f.write_str(&awq.label()),
            Method::Fp8(_) => f.write_str("fp8"),
            Method::Compressed(_) => f.write_str("compressed-tensors"),
            Method::Mxfp4 => f.write_str("mxfp4"),
            Method::Blocks => f.write_str("gguf"),
        }
    }
}

/// `4-bit g128`: of names of formats.
fn bits_and_group(bits: usize, group: Option<usize>) -> String {
    match group {
        None => format!("{bits}-bit"),
        Some(group) => format!("{bits}-bit g{group}"),
    }
}

fn unsupported(object: Object<'_>, key: &str, found: impl fmt::Display, supported: &str) -> ConfigError {
    ConfigError::Unsupported { field: object.path(key), found: found.to_string(), supported: supported.to_owned() }
}

/// A group size as configs have it: `None` for −1 and for nothing, a whole row.
fn group_size(object: Object<'_>, key: &str) -> Result<Option<usize>, ConfigError> {
    if object.number(key)? == Some(-1.0) {
        return Ok(None);
    }
    match object.count(key)? {
        Some(0) => Err(ConfigError::value(object.path(key), "a size of groups, or -1", 0)),
        size => Ok(size),
    }
}

/// A linear operator's module in a source.
struct Module<'a> {
    source: &'a dyn WeightSource,
    name: &'a str,
    /// Rows and columns of its weight.
    shape: [usize; 2],
}

impl Module<'_> {
    fn tensor(&self, tensor: &str) -> String {
        format!("{}.{tensor}", self.name)
    }

    fn has(&self, tensor: &str) -> bool {
        self.stored_type(tensor).is_some()
    }

    fn stored_type(&self, tensor: &str) -> Option<StoredType> {
        self.source.info(&self.tensor(tensor)).map(|info| info.dtype)
    }

    /// The shape of a tensor; of none, no shape that is ever asked for.
    fn stored_shape(&self, tensor: &str) -> Option<Vec<usize>> {
        self.source.info(&self.tensor(tensor)).map(|info| info.shape)
    }

    fn wanted(&self, tensor: &str, shape: impl Into<Vec<usize>>, types: Types) -> Wanted {
        Wanted { name: self.tensor(tensor), shape: shape.into(), types }
    }
}

/// A tensor that there must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) types: Types,
}

/// The types that a tensor may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Types {
    /// Those of the kernels.
    Float,
    /// Those, or a power of two in a byte.
    Scale,
    /// One, as the file calls it.
    Only(&'static str),
    /// Blocks of one format.
    Blocks(BlockFormat),
}

impl Types {
    fn allow(self, stored: &StoredType) -> bool {
        match (self, stored) {
            (Self::Float | Self::Scale, StoredType::Float(_)) => true,
            (Self::Scale, StoredType::Other(name)) => name == E8M0,
            (Self::Only(wanted), StoredType::Other(name)) => name == wanted,
            (Self::Blocks(wanted), StoredType::Blocks(format)) => wanted == *format,
            _ => false,
        }
    }
}

impl fmt::Display for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float => f.write_str("f32, f16 or bf16"),
            Self::Scale => write!(f, "f32, f16, bf16 or {E8M0}"),
            Self::Only(name) => f.write_str(name),
            Self::Blocks(format) => write!(f, "blocks of {format}"),
        }
    }
}

const I32: Types = Types::Only("I32");
const E8M0: &str = "F8_E8M0";

/// The bytes of a tensor, saturating; 0 of a type that no format has, which [`Types::allow`] refuses.
pub(crate) fn stored_bytes(info: &TensorInfo) -> usize {
    let element = match &info.dtype {
        StoredType::Float(dtype) => dtype.size_bytes(),
        StoredType::Blocks(format) => {
            let Some((cols, rows)) = info.shape.split_last() else { return 0 };
            let row = format.row_bytes(*cols).unwrap_or(0);
            return rows.iter().fold(row, |bytes, &size| bytes.saturating_mul(size));
        }
        StoredType::Other(name) => match name.as_str() {
            "I64" => 8,
            "I32" => 4,
            "I8" | "U8" | "F8_E4M3" | E8M0 => 1,
            _ => 0,
        },
    };
    info.shape.iter().fold(element, |bytes, &size| bytes.saturating_mul(size))
}

impl Wanted {
    /// Checks what the source has in its place. `None` if it has nothing, else the bytes that it takes.
    pub(crate) fn check(&self, source: &dyn WeightSource) -> Result<Option<usize>, WeightsError> {
        let Some(info) = source.info(&self.name) else { return Ok(None) };
        if info.shape != self.shape {
            let (name, wanted) = (self.name.clone(), self.shape.clone());
            return Err(WeightsError::Shape { name, wanted, found: info.shape });
        }
        if !self.types.allow(&info.dtype) {
            let (name, wanted) = (self.name.clone(), self.types.to_string());
            let found = info.dtype.to_string();
            return Err(WeightsError::DType { name, found, wanted });
        }
        Ok(Some(stored_bytes(&info)))
    }

    /// Reads it, if it is all that it should be.
    fn read<'a>(&self, source: &'a dyn WeightSource) -> Result<Raw<'a>, WeightsError> {
        let missing = || WeightsError::Missing { name: self.name.clone(), shape: self.shape.clone(), more: 0 };
        let wanted = self.check(source)?.ok_or_else(missing)?;
        let stored = source.info(&self.name).ok_or_else(missing)?.dtype;
        let bytes = source.read(&self.name).ok_or_else(missing)?;
        if bytes.len() != wanted {
            return Err(self.value(format!("{wanted} bytes"), bytes.len()));
        }
        Ok(Raw { bytes, stored })
    }

    fn value(&self, wanted: impl Into<String>, found: impl fmt::Display) -> WeightsError {
        WeightsError::Value { name: self.name.clone(), wanted: wanted.into(), found: found.to_string() }
    }
}

/// The bytes of a tensor that was checked.
struct Raw<'a> {
    bytes: Cow<'a, [u8]>,
    stored: StoredType,
}

impl Raw<'_> {
    /// Element `index` of a tensor of scales.
    fn scale(&self, index: usize) -> f32 {
        match &self.stored {
            StoredType::Float(dtype) => dashinfer_kernels::element(&self.bytes, *dtype, index),
            StoredType::Other(_) | StoredType::Blocks(_) => mxfp4::power_of_two(self.bytes[index]),
        }
    }

    fn word(&self, index: usize) -> u32 {
        word(&self.bytes, index)
    }
}

/// Word `index` of little-endian bytes.
fn word(bytes: &[u8], index: usize) -> u32 {
    let at = &bytes[index * 4..index * 4 + 4];
    u32::from_le_bytes([at[0], at[1], at[2], at[3]])
}

/// The weight of a module that was quantized before it was stored.
pub(crate) struct StoredModule {
    /// Its tensors, in the order that its reader takes them.
    tensors: Vec<Wanted>,
    layout: Option<CodeLayout>,
    /// See [`StoredMatrix::order`].
    order: Option<Vec<u32>>,
    shape: [usize; 2],
    /// For people: `gptq 4-bit g128`.
    label: String,
    reader: Reader,
}

enum Reader {
    Gptq(gptq::Reader),
    Awq(awq::Reader),
    Packed(compressed::Packed),
    Int8(compressed::Int8),
    Fp8(fp8::Reader),
    Blocks(blocks::Reader),
    Mxfp4(mxfp4::Reader),
}

impl StoredModule {
    /// Reads it.
    ///
    /// # Errors
    /// [`WeightsError`] if a tensor is not what was proven, or holds what the config excludes.
    pub(crate) fn open<'a>(&'a self, source: &'a dyn WeightSource) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let raw = self.tensors.iter().map(|tensor| tensor.read(source)).collect::<Result<Vec<_>, _>>()?;
        match &self.reader {
            Reader::Gptq(reader) => reader.open(self, raw),
            Reader::Awq(reader) => reader.open(self, raw),
            Reader::Packed(reader) => reader.open(self, raw),
            Reader::Int8(reader) => reader.open(self, raw),
            Reader::Fp8(reader) => reader.open(self, raw),
            Reader::Blocks(reader) => reader.open(self, raw),
            Reader::Mxfp4(reader) => reader.open(self, raw),
        }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|tensor| tensor.name.as_str())
    }
}

/// Takes the tensors of a module in the order in which they were asked for.
fn take<'a, const N: usize>(module: &StoredModule, raw: Vec<Raw<'a>>) -> Result<[Raw<'a>; N], WeightsError> {
    let found = raw.len();
    raw.try_into().map_err(|_| WeightsError::Value {
        name: module.label.clone(),
        wanted: format!("{N} tensors of a module"),
        found: found.to_string(),
    })
}

/// Every tensor that a plan asks for of `source`, in the order of [`Plan::fill`].
///
/// # Errors
/// [`WeightsError`] for what a config says that the tensors contradict.
pub(crate) fn wanted(
    plan: &Plan,
    source: &dyn WeightSource,
    stored: Option<&StoredQuantization>,
) -> Result<Vec<Wanted>, WeightsError> {
    struct List<'a> {
        source: &'a dyn WeightSource,
        stored: Option<&'a StoredQuantization>,
        wanted: Vec<Wanted>,
    }
    impl Fill<(), (), ()> for List<'_> {
        type Error = WeightsError;

        fn linear(&mut self, plan: &LinearPlan) -> Result<(), WeightsError> {
            for part in plan.first_parts() {
                match module(self.stored, self.source, part, plan)? {
                    Some(module) => self.wanted.extend(module.tensors),
                    None => self.wanted.push(Wanted {
                        name: part.weight(),
                        shape: part.weight_shape(plan.cols),
                        types: Types::Float,
                    }),
                }
            }
            if plan.bias {
                let bias = |part: &Part| Wanted { name: part.bias(), shape: part.bias_shape(), types: Types::Float };
                self.wanted.extend(plan.first_parts().map(bias));
            }
            Ok(())
        }

        fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<()>, WeightsError> {
            match heads_module(self.stored, self.source, plan)? {
                Some(module) => self.wanted.extend(module.tensors),
                None => {
                    let heads = StoredHeads::new(plan);
                    let (name, shape) = (heads.part.weight(), heads.shape().to_vec());
                    self.wanted.push(Wanted { name, shape, types: Types::Float });
                }
            }
            Ok(LatentHeads { queries: (), values: () })
        }

        fn experts(&mut self, _: Vec<()>, _: Vec<()>) -> Result<(), WeightsError> {
            Ok(())
        }

        fn vector(&mut self, plan: &VectorPlan) -> Result<(), WeightsError> {
            self.wanted.push(Wanted { name: plan.name.clone(), shape: vec![plan.len], types: Types::Float });
            Ok(())
        }
    }
    let mut list = List { source, stored, wanted: Vec::new() };
    plan.fill(&mut list)?;
    Ok(list.wanted)
}

/// How the weight of `part` is stored, if it was quantized.
fn module(
    stored: Option<&StoredQuantization>,
    source: &dyn WeightSource,
    part: &Part,
    plan: &LinearPlan,
) -> Result<Option<StoredModule>, WeightsError> {
    stored.map_or(Ok(None), |stored| stored.module(source, part, plan.cols, plan.role))
}

/// How the tensor of the matrices between heads and latent vectors is stored, if it was quantized.
fn heads_module(
    stored: Option<&StoredQuantization>,
    source: &dyn WeightSource,
    plan: &LatentHeads<LinearPlan>,
) -> Result<Option<StoredModule>, WeightsError> {
    let heads = StoredHeads::new(plan);
    let [rows, cols] = heads.shape();
    let part = Part::whole(heads.part.module.clone(), rows);
    stored.map_or(Ok(None), |stored| stored.module(source, &part, cols, Role::Latent))
}

/// Whether a tensor that no plan asks for may be there all the same.
pub(crate) fn ignores(stored: Option<&StoredQuantization>, source: &dyn WeightSource, name: &str) -> bool {
    stored.is_some_and(|stored| stored.ignores(source, name))
}

/// The type of a part that is not quantized; f32 if there is none, which the proof refuses.
fn dense_type(source: &dyn WeightSource, part: &Part) -> DType {
    match source.info(&part.weight()).map(|info| info.dtype) {
        Some(StoredType::Float(dtype)) => dtype,
        _ => DType::F32,
    }
}
