//! Operators on NVIDIA GPUs.
//!
//! Nothing of CUDA is needed to build this: the driver, NVRTC and cuBLASLt are opened at run time, and a machine without them
//! gets a typed error. Kernels are CUDA C++ (in `cuda/`), compiled for the very GPU at first use. `docs/cuda.md` tells more.

mod arch;
mod cache;
mod compiler;
mod device;
mod graph;
mod images;
mod kernel;
mod library;
mod memory;
mod nvrtc;
mod ops;
mod tensor_map;
#[cfg(test)]
mod test_folder;
mod units;

pub use arch::Arch;
pub use compiler::KernelSettings;
pub use device::num_devices;

/// What checks kernels and compiles them beforehand: for `cargo xtask`, and for builds that ship images of their own.
pub mod tools {
    pub use super::compiler::{archive, compile};
    pub use super::images::Images;
    pub use super::nvrtc::{Compiled, Nvrtc};
    pub use super::units::{Archs, Listed, UNITS, Unit};
}
