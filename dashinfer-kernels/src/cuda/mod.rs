//! Operators on NVIDIA GPUs.
//!
//! Nothing of CUDA is needed to build this: the driver, NVRTC and cuBLASLt are opened at run time, and a machine without them
//! gets a typed error. Kernels are CUDA C++ (in `cuda/`), compiled for the very GPU at first use. `docs/cuda.md` tells more.

mod device;
mod graph;
mod kernel;
mod library;
mod memory;
mod nvrtc;
mod ops;
mod plan;
mod tensor_map;
mod units;

pub use device::{Arch, num_devices};
