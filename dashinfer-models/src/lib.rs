//! Model families, checkpoints and the one decoder of dashinfer.
//!
//! ```text
//! config.json ──▶ HfConfig ──▶ ModelSpec ──┐
//! *.safetensors ──▶ Checkpoint ────────────┼──▶ Decoder<B: Backend> ──▶ Logits
//! (or a Gguf, which is both;                │         ▲
//! or RandomWeights)               ForwardBatch, KV cache
//! ```
//!
//! [`HfConfig`] reads what others wrote, permissively. [`ModelSpec`] is strict. A family is a few facts in [`FAMILIES`];
//! [`Decoder`] is the only forward pass. This crate knows nothing of requests, scheduling or sampling policy.
//!
//! ```
//! use dashinfer_kernels::Backend;
//! use dashinfer_models::{Checkpoint, Decoder, ModelSpec, Quantization, StepLimits};
//!
//! fn load<B: Backend>(backend: B, folder: &std::path::Path) -> Result<Decoder<B>, Box<dyn std::error::Error>> {
//!     let spec = ModelSpec::read(folder)?;
//!     let mut checkpoint = Checkpoint::open(folder)?;
//!     let limits = StepLimits { max_tokens: 512, max_logit_rows: 64 };
//!     Ok(Decoder::load(backend, spec, &mut checkpoint, limits, Quantization::NONE, &mut |_| ())?)
//! }
//! ```

mod activations;
mod batch;
mod checkpoint;
mod compensation;
mod config;
mod decoder;
mod dialect;
mod error;
mod estimate;
mod families;
mod formats;
mod generation_config;
mod gguf;
mod json;
mod loader;
mod mapped;
mod names;
mod quantization;
mod random;
mod receding;
mod rope;
mod safetensors;
pub mod shapes;
mod source;
mod spec;
mod stacked;
#[cfg(test)]
mod test_folder;
mod weight_cache;
mod weights;

pub use activations::StepLimits;
pub use batch::ForwardBatch;
pub use checkpoint::Checkpoint;
pub use config::HfConfig;
pub use decoder::{Decoder, Logits};
pub use error::{BatchError, CheckpointError, ConfigError, ForwardError, LoadError, WeightsError};
pub use estimate::{MemoryEstimate, PackedBytes};
pub use families::{Example, FAMILIES, Family, ToSpec};
pub use formats::{Conversion, PackedAs, StoredQuantization};
pub use generation_config::GenerationConfig;
pub use gguf::{Gguf, GgufFault, GgufTokenizer, GgufWeights, TokenKind};
pub use loader::LoadProgress;
pub use names::{ExpertMatrices, ExpertNames, LatentNames, TensorNames};
pub use quantization::Quantization;
pub use random::RandomWeights;
pub use rope::{RopeScaling, RopeSpec};
pub use source::{StoredType, TensorInfo, WeightSource};
pub use spec::{Attention, Experts, GroupedAttention, LatentAttention, LayerSpec, Mlp, ModelSpec, SharedExpert};
#[cfg(fuzzing)]
#[doc(hidden)]
pub use weight_cache::fuzzing;
pub use weight_cache::{CacheFault, WeightCache, WeightsFrom};
