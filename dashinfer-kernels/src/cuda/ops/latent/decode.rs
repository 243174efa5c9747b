//! Latent attention of single rows on tensor cores.

use std::sync::Arc;

use super::units::LatentOperands;
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::ops::operand::typed_kernel;
use crate::cuda::units::Unit;
use crate::{DType, KernelError, LatentParams};

pub(crate) static UNIT: Unit =
    Unit { name: "latent_decode.cu", source: include_str!("../../../../cuda/latent_decode.cu") };

const OP: &str = "latent_attention";
/// The one size of latent vectors, and of what is rotated: that of all that is published.
const RANK: usize = 512;
const ROPE: usize = 64;
/// Heads of a block.
pub(crate) const TILE_HEADS: usize = 16;
const WARPS: usize = 4;
/// Positions of a stage, and stages.
const CHUNK: usize = 32;
const STAGES: usize = 2;

/// The compiler's options.
pub(crate) fn options() -> [String; 2] {
    [format!("-DRANK={RANK}"), format!("-DROPE={ROPE}")]
}

/// Bytes of dynamic shared memory: stages, and parts of scores.
const SHARED: usize = STAGES * CHUNK * ((RANK + ROPE) * 2 + 16) + WARPS * TILE_HEADS * (CHUNK + 8) * 4;

/// See `latent_decode.cu`.
#[derive(Debug)]
pub(crate) struct LatentDecode {
    kernel: Kernel,
    merge: Kernel,
    dtype: DType,
    grid: u32,
    merge_grid: u32,
}

impl LatentDecode {
    /// Whether there is a kernel for it.
    pub(crate) fn supports(arch: Arch, dtype: DType, params: &LatentParams) -> bool {
        arch.number() >= 80 && dtype != DType::F32 && (params.rank, params.rope_dim) == (RANK, ROPE)
    }

    /// # Errors
    /// What compiling may say.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        let options = options();
        let options = options.each_ref().map(String::as_str);
        let kernel = typed_kernel(device, &UNIT, dtype, &options, "latent_decode")?;
        let merge = typed_kernel(device, &UNIT, dtype, &options, "latent_merge")?;
        // Two blocks need 166 KB.
        let blocks = if matches!(device.arch.number(), 90 | 100 | 103) { 2 } else { 1 };
        let (grid, merge_grid) = (device.num_sms * blocks, device.num_sms * 8);
        Ok(Self { kernel: kernel.with_shared(SHARED as u32)?, merge, dtype, grid, merge_grid })
    }

    /// Blocks that run at once.
    pub(crate) fn grid(&self) -> usize {
        self.grid as usize
    }

    /// Positions that a row is not split into less of: two chunks.
    pub(crate) fn min_split(&self) -> usize {
        64
    }

    /// Writes the means of the units' rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] for other block sizes.
    pub(crate) fn run(
        &self,
        device: &Device,
        operands: &LatentOperands<'_>,
        params: &LatentParams,
    ) -> Result<(), KernelError> {
        crate::error::check(OP, "size of latent vectors", RANK, params.rank)?;
        crate::error::check(OP, "values that are rotated", ROPE, params.rope_dim)?;
        let params = operands.checked(OP, self.dtype, params)?;
        let launch = Launch { grid: [self.grid, 1, 1], block: WARPS as u32 * 32, shared: SHARED as u32 };
        // SAFETY: this is the kernel's parameter; sizes were checked just now, and units are a plan's, which name rows, blocks and
        // slots of the batch and the workspace that it was made for.
        unsafe { self.kernel.launch(device, launch, &mut Args::new().value(&params))? };
        let launch = Launch { grid: [self.merge_grid, 1, 1], block: RANK as u32 / 4, shared: 0 };
        // SAFETY: as above.
        unsafe { self.merge.launch(device, launch, &mut Args::new().value(&params)) }
    }
}
