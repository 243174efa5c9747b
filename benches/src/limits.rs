//! What is measured, against what the machine allows.

use std::error::Error;

use dashinfer::Device;
use dashinfer_kernels::cpu::Isa;

use crate::machine;

/// What the machine can do with some threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Reading from memory; see [`machine::read_bandwidth`].
    pub bytes_per_second: f64,
    /// In f32, with the instructions of the kernels; see [`machine::peak_flops`].
    pub flops_per_second: f64,
    /// In int8 with tiles, where there are any; see [`machine::peak_tile_ops`].
    pub tile_ops_per_second: Option<f64>,
}

/// What some work cannot be faster than, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Seconds that its bytes take.
    Memory(f64),
    /// Seconds that its operations take.
    Arithmetic(f64),
}

impl Limits {
    /// Measures both with `threads` threads, the operations with the instructions of `isa`. Takes a second or two, and 1 GiB of memory.
    #[must_use]
    pub fn measure(threads: usize, isa: Isa) -> Self {
        let (bytes_per_second, flops_per_second) =
            (machine::read_bandwidth(threads), machine::peak_flops(threads, isa));
        let tile_ops_per_second = if isa == Isa::Amx { machine::peak_tile_ops(threads) } else { None };
        Self { bytes_per_second, flops_per_second, tile_ops_per_second }
    }

    /// Measures a GPU: reading 4 GiB of its memory, and a product of bf16 matrices of 8192 rows and columns by cuBLASLt.
    ///
    /// # Errors
    /// If there is no such GPU or this build cannot use it.
    #[cfg(feature = "cuda")]
    pub fn measure_cuda(device: Device) -> Result<Self, Box<dyn Error>> {
        let ordinal = if let Device::Cuda(ordinal) = device { ordinal } else { 0 };
        let device = dashinfer_kernels::cuda::CudaDevice::open(ordinal)?;
        let (bytes_per_second, flops_per_second) = (device.read_bandwidth()?, device.matmul_flops()?);
        Ok(Self { bytes_per_second, flops_per_second, tile_ops_per_second: None })
    }

    /// A GPU, which this build cannot use.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "cuda"))]
    pub fn measure_cuda(device: Device) -> Result<Self, Box<dyn Error>> {
        Err(format!("{device}: build with `--features cuda` to measure a GPU").into())
    }

    /// The limit of work that moves `bytes` and does `flops` operations: whichever takes longer.
    #[must_use]
    pub fn of(&self, bytes: f64, flops: f64) -> Limit {
        let (memory, arithmetic) = (bytes / self.bytes_per_second, flops / self.flops_per_second);
        if memory > arithmetic { Limit::Memory(memory) } else { Limit::Arithmetic(arithmetic) }
    }
}

impl Limit {
    /// The least time.
    #[must_use]
    pub fn seconds(self) -> f64 {
        match self {
            Self::Memory(seconds) | Self::Arithmetic(seconds) => seconds,
        }
    }

    /// `memory` or `arithmetic`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::Arithmetic(_) => "arithmetic",
        }
    }
}

/// A rate as a person reads it: `3.06 GB/s` where memory is the limit, `51.20 GFLOP/s` where arithmetic is.
#[must_use]
pub fn rate(limit: Limit, bytes: f64, flops: f64, seconds: f64) -> String {
    match limit {
        Limit::Memory(_) => format!("{:.2} GB/s", bytes / seconds / 1e9),
        Limit::Arithmetic(_) => format!("{:.2} GFLOP/s", flops / seconds / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_longer_is_the_limit() {
        let limits = Limits { bytes_per_second: 1e9, flops_per_second: 1e10, tile_ops_per_second: None };
        assert_eq!(limits.of(1e9, 1e9), Limit::Memory(1.0));
        assert_eq!(limits.of(1e9, 2e10), Limit::Arithmetic(2.0));
        assert_eq!(rate(limits.of(1e9, 1e9), 1e9, 1e9, 2.0), "0.50 GB/s");
        assert_eq!(rate(limits.of(1e9, 2e10), 1e9, 2e10, 4.0), "5.00 GFLOP/s");
    }
}
