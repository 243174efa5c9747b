//! Operators on NVIDIA GPUs.
//!
//! Nothing of CUDA is needed to build this: the driver, NVRTC and cuBLASLt are opened at run time, and a machine without them
//! gets a typed error. Kernels are CUDA C++ (in `cuda/`), compiled for the very GPU at first use. `docs/cuda.md` tells more.

mod arch;
mod backend;
mod cache;
mod compiler;
mod cublaslt;
mod description;
mod device;
mod graph;
mod images;
mod kernel;
mod library;
mod memory;
mod nvrtc;
mod ops;
mod plan;
mod probe;
mod quiet;
mod records;
mod step;
mod tensor_map;
mod tensors;
#[cfg(test)]
mod test_folder;
mod units;
mod upload;

use std::sync::Arc;

pub use arch::Arch;
pub use backend::{CudaBackend, CudaConfig};
pub use compiler::KernelSettings;
pub use device::num_devices;
pub use ops::linear::CudaLinear;
pub use ops::moe::packed::CudaExperts;
pub use ops::moe::{CudaExpertScratch, expert_bytes};
pub use tensors::{CudaKvCache, CudaTensor, CudaVector};

use crate::{DType, KernelError, LatentParams};

/// A GPU in use.
#[derive(Debug, Clone)]
pub struct CudaDevice(Arc<device::Device>);

impl CudaDevice {
    /// Takes the GPU of this number into use, counted from 0.
    ///
    /// # Errors
    /// [`KernelError::Library`] without a driver, [`KernelError::NoDevice`] without such a GPU.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        Self::open_with(ordinal, &KernelSettings::default())
    }

    /// As [`open`](Self::open), with kernels from images of the program's own, or kept in another folder.
    ///
    /// # Errors
    /// As for [`open`](Self::open), and [`KernelError::Images`] if the images cannot be used.
    pub fn open_with(ordinal: usize, kernels: &KernelSettings) -> Result<Self, KernelError> {
        device::Device::with(ordinal, kernels).map(Self)
    }

    /// Free bytes and all bytes of its memory.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn memory(&self) -> Result<(u64, u64), KernelError> {
        self.0.memory()
    }

    /// Its compute capability.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.0.arch
    }

    /// The name that the driver gives.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }
}

/// Bytes of a `[rows, cols]` matrix of weights on the device.
#[must_use]
pub fn packed_bytes(rows: usize, cols: usize, dtype: DType) -> usize {
    rows.saturating_mul(cols).saturating_mul(dtype.size_bytes())
}

/// What decides how much room operators need beside activations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkspaceParams {
    /// Query heads, `H`.
    pub num_heads: usize,
    /// Key/value heads, `K`.
    pub num_kv_heads: usize,
    /// Head size, `D`.
    pub head_dim: usize,
    /// Latent attention in place of that, in this type, and the most rows of a step.
    pub latent: Option<(LatentParams, DType, usize)>,
    /// The most rows of logits in a step.
    pub max_logit_rows: usize,
    /// Logits in a row, `V`.
    pub vocab_size: usize,
}

/// Bytes that operators need beside activations, at most: cuBLASLt's workspace, partial results of attention, rows that
/// sampling edits, descriptions of steps, and what the driver takes for recorded steps (an allowance).
#[must_use]
pub fn workspace_bytes(device: &CudaDevice, params: &WorkspaceParams) -> u64 {
    const ALLOWANCE: usize = 256 << 20;
    let WorkspaceParams { num_heads, num_kv_heads, head_dim, latent, max_logit_rows, vocab_size } = *params;
    let attention = match &latent {
        Some((params, dtype, max_rows)) => ops::latent::workspace_bytes(&device.0, *dtype, params, *max_rows),
        None => {
            let slots = ops::attention::max_slots(&device.0, num_kv_heads);
            ops::attention_units::Partials::bytes(slots, num_heads, head_dim).into_iter().sum()
        }
    };
    let edited = max_logit_rows.saturating_mul(vocab_size).saturating_mul(2 * size_of::<f32>());
    (cublaslt::workspace_bytes(device.0.arch) + ALLOWANCE).saturating_add(attention).saturating_add(edited) as u64
}

/// What checks kernels and compiles them beforehand: for `cargo xtask`, and for builds that ship images of their own.
pub mod tools {
    pub use super::compiler::{archive, compile};
    pub use super::images::Images;
    pub use super::nvrtc::{Compiled, Nvrtc};
    pub use super::units::{Archs, Listed, UNITS, Unit};
}
