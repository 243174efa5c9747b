//! Operators of LLM inference on slices and device buffers.
//!
//! This crate knows arithmetic and devices; it knows no model, request or async runtime. [`Backend`] is the contract that
//! models are written against.

#[cfg(all(feature = "cuda", not(unix)))]
compile_error!("the feature `cuda` is for Unix: CUDA's libraries are opened with `dlopen`");

mod backend;
mod cache_type;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod error;
mod moe;
mod quant;
#[cfg(test)]
mod random;
mod sample;
mod shared;

pub use backend::{
    Activation, AttentionParams, Backend, CacheLayout, CarriedId, Feature, Issue, KvCacheSpec, LatentHeads,
    LatentParams, MatrixView, PackedShape, PagedBatch, QkNorm, Rope, RopePairs, SequenceRows, StepRows, TensorUse,
    WeightReads,
};
pub use cache_type::CacheType;
pub use dtype::{DType, element, to_f32};
pub use error::KernelError;
pub use moe::{Chosen, ExpertGroups, GroupScore, Routing, Scoring, route};
pub use quant::{
    BlockFormat, BlockMatrix, CodeBits, CodeLayout, CodeWords, CompensatedCodes, ForEach, Group, GroupedCodes,
    InputSums, Scheme, StoredMatrix, UnknownScheme, can_compensate, compensate,
};
pub use sample::{SampleParams, SampleRow, SampleScratch, Sampled, sample_row};
pub use shared::SharedBytes;
