//! The CPU: one scalar definition of every operator, fast siblings beside it, and a pool of threads.

mod aligned;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod amx;
mod attention;
mod backend;
mod experts;
mod gate;
mod gated;
mod gelu_mul;
mod input_sums;
mod isa;
mod linear;
mod linear_bf16;
mod math;
mod pool;
mod quantized;
mod rms_norm;
mod rope;
mod silu_mul;
mod tasks;
mod weight_buf;

pub use attention::{CpuKvCache, latent_workspace_bytes};
pub use backend::{CpuBackend, CpuConfig, CpuLinear, CpuTensor, packed_bytes, workspace_bytes};
pub use experts::{CpuExpertScratch, CpuExperts, expert_bytes};
pub use isa::Isa;
pub use linear::{PackedMatrix, linear, to_bytes};
pub use pool::{PoolConfig, ThreadPool};
pub use quantized::QuantizedMatrix;
pub use rms_norm::rms_norm;
pub use silu_mul::silu_mul;
