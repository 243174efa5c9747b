//! What can be wrong with a model's files: its config, its checkpoint, the weights in it, or a batch for it.

use std::path::PathBuf;

use dashinfer_kernels::KernelError;

use crate::GgufFault;

/// A `config.json` or `generation_config.json` that cannot be read, or that describes no model we can run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{} is not a JSON object", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it breaks.
        #[source]
        source: serde_json::Error,
    },
    /// No family of this name.
    #[error("architecture {found} is not supported; known are {known}")]
    UnknownArchitecture {
        /// What the config says.
        found: String,
        /// Every architecture we know, separated by commas.
        known: String,
    },
    /// A value that no model can have.
    #[error("{field}: wanted {wanted}, found {found}")]
    Value {
        /// The key in the file; inner keys follow a dot.
        field: String,
        /// What would do.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// A value with a meaning, but one that we do not implement.
    #[error("{field}: {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The key in the file; inner keys follow a dot.
        field: String,
        /// What is there.
        found: String,
        /// What we do implement.
        supported: String,
    },
}

impl ConfigError {
    /// A [`ConfigError::Value`] for anything that can be displayed.
    pub(crate) fn value(field: impl Into<String>, wanted: impl Into<String>, found: impl std::fmt::Display) -> Self {
        Self::Value { field: field.into(), wanted: wanted.into(), found: found.to_string() }
    }
}

/// Safetensors or GGUF files that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The folder is not there, or is no folder.
    #[error("{} is not a folder", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds no checkpoint.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A file cannot be opened or mapped.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file that is shorter or longer than its header says.
    #[error("{}: {what} should take {wanted} bytes, found {found}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Which part of the file.
        what: &'static str,
        /// What the header asks for.
        wanted: u64,
        /// What is there.
        found: u64,
    },
    /// A header that is not what the format asks for: no JSON, overlapping tensors, gaps, sizes that do not fit shapes.
    #[error("{}: the safetensors header is invalid", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A file that is no GGUF file that can be read.
    #[error("{}: {fault}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: GgufFault,
    },
    /// An index that is not JSON of the right form.
    #[error("{} is not an index of shards", path.display())]
    IndexJson {
        /// The index.
        path: PathBuf,
        /// Where it breaks.
        #[source]
        source: serde_json::Error,
    },
    /// An index that names a file outside its folder.
    #[error("{}: {tensor} is said to be in {shard:?}, wanted the plain name of a file beside the index", path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The name in the index.
        shard: String,
    },
    /// An index that names a shard which is not there.
    #[error("{}: shard {shard} is missing (it should hold {tensor})", path.display())]
    MissingShard {
        /// The index.
        path: PathBuf,
        /// The shard.
        shard: String,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// An index that names a tensor which its shard does not hold.
    #[error("{}: {tensor} is not in {shard}", path.display())]
    MissingTensor {
        /// The index.
        path: PathBuf,
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// A shard with a tensor that the index puts elsewhere or does not name.
    #[error("{}: {tensor} in {shard} is not listed there", path.display())]
    Unlisted {
        /// The index.
        path: PathBuf,
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
}

/// Weights that are not those of the model: found before the first one is packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A parameter has no tensor.
    #[error("tensor {name} {shape:?} is missing{}", others(*more))]
    Missing {
        /// The first missing tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// How many more are missing.
        more: usize,
    },
    /// An untied model without its output matrix.
    #[error("lm_head.weight is missing, but the config says that it is not tied to the embedding")]
    MissingHead,
    /// A tensor of another shape.
    #[error("tensor {name} should have the shape {wanted:?}, found {found:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// What the config asks for.
        wanted: Vec<usize>,
        /// What is there.
        found: Vec<usize>,
    },
    /// A tensor of a type that we do not read.
    #[error("tensor {name} is stored as {found}, wanted {wanted}")]
    DType {
        /// The tensor.
        name: String,
        /// The stored type.
        found: String,
        /// What would do.
        wanted: String,
    },
    /// A tensor of a quantized weight whose contents cannot be.
    #[error("tensor {name}: wanted {wanted}, found {found}")]
    Value {
        /// The tensor.
        name: String,
        /// What would do.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// Tensors which the model has no use for: it is another model than the config says.
    #[error("the model has no place for tensor {name}{}", others(*more))]
    LeftOver {
        /// The first of them, by name.
        name: String,
        /// How many more there are.
        more: usize,
    },
}

fn others(more: usize) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more)") }
}

/// Loading failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The spec describes no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are not the model's.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device cannot take them.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A cache was asked for, and packed weights cannot be stored in its folder. Found before anything is packed.
    #[error("cannot write to the weight cache {}", path.display())]
    WeightCache {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// A batch that contradicts itself, the model or the cache. Always the batch builder's mistake, never a request's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// Two counts that must agree, or a limit.
    #[error("batch: {what} should be {wanted}, found {found}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// What would do.
        wanted: usize,
        /// What is there.
        found: usize,
    },
    /// More than there is room for.
    #[error("batch: {found} {what}, but there is room for {max}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        max: usize,
        /// What is there.
        found: usize,
    },
    /// A row that names a token, position or slot it cannot have.
    #[error("batch: {what} of row {row} should be {wanted}, found {found}")]
    Row {
        /// Which value.
        what: &'static str,
        /// The row in the batch.
        row: usize,
        /// What would do.
        wanted: String,
        /// What is there.
        found: u32,
    },
    /// A sequence that does not fit the rows or the block table.
    #[error("batch: {what} of sequence {sequence} should be {wanted}, found {found}")]
    Sequence {
        /// Which value.
        what: &'static str,
        /// The sequence's place in the batch.
        sequence: usize,
        /// What would do.
        wanted: String,
        /// What is there.
        found: usize,
    },
}

/// A step failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// The batch is wrong.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// An operator refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}
