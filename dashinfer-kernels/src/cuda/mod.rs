//! Operators on NVIDIA GPUs.
//!
//! Nothing of CUDA is needed to build this: the driver, NVRTC and cuBLASLt are opened at run time, and a machine without them
//! gets a typed error. Kernels are CUDA C++ (in `cuda/`), compiled for the very GPU at first use. `docs/cuda.md` tells more.

mod backend;
mod cublaslt;
mod device;
mod graph;
mod kernel;
mod library;
mod memory;
mod nvrtc;
mod ops;
mod plan;
mod probe;
mod step;
mod tensor_map;
mod units;
mod upload;

use std::sync::Arc;

pub use backend::{CudaBackend, CudaConfig, CudaKvCache, CudaTensor, CudaVector};
pub use device::{Arch, num_devices};
pub use ops::linear::CudaLinear;

use crate::{DType, KernelError};

/// A GPU in use.
#[derive(Debug, Clone)]
pub struct CudaDevice(Arc<device::Device>);

impl CudaDevice {
    /// Takes the GPU of this number into use, counted from 0.
    ///
    /// # Errors
    /// [`KernelError::Library`] without a driver, [`KernelError::NoDevice`] without such a GPU.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        device::Device::new(ordinal).map(Self)
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
