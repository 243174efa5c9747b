//! The sum of the partial results of rows whose positions were split.

use std::sync::Arc;

use super::attention_units::Partials;
use super::operand::{Span, count_u32, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::plan::RowSplits;
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit =
    Unit { name: "attention_combine.cu", source: include_str!("../../../cuda/attention_combine.cu") };

const OP: &str = "attention_combine";

/// Combines a chunk's partial results, see `attention_combine.cu`.
#[derive(Debug)]
pub(crate) struct AttentionCombine {
    kernel: Kernel,
    dtype: DType,
}

impl AttentionCombine {
    /// # Errors
    /// What compiling may say.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { kernel: typed_kernel(device, &UNIT, dtype, &[], OP)?, dtype })
    }

    /// Writes the rows of `out` (`[num_rows, H * D]`) that `splits` name: `num_splits` [`RowSplits`] that a plan made, on the
    /// device. `heads`: `[H, D]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] if the head size is odd or above 256.
    pub(crate) fn run(
        &self,
        device: &Device,
        (out, num_rows): (Span<'_>, usize),
        partials: &Partials<'_>,
        (splits, num_splits): (Span<'_>, usize),
        [num_heads, head_dim]: [usize; 2],
    ) -> Result<(), KernelError> {
        if !head_dim.is_multiple_of(2) || head_dim > 256 {
            let what = format!("a head size of {head_dim}");
            return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        }
        if num_splits > 0xffff {
            return Err(KernelError::Shape { op: OP, what: "rows at once", wanted: 0xffff, found: num_splits });
        }
        let [partial_out, partial_ml] = partials.checked(OP, num_heads, head_dim)?;
        let num_heads_u32 = count_u32(OP, "query heads", num_heads)?;
        let size = self.dtype.size_bytes();
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", num_rows * num_heads * head_dim, size)?)
            .ptr(partial_out)
            .ptr(partial_ml)
            .ptr(splits.holding(OP, "rows", num_splits, size_of::<RowSplits>())?)
            .u32(num_heads_u32)
            .u32(head_dim as u32);
        let launch = Launch { grid: [num_heads_u32, num_splits as u32, 1], block: 128, shared: 0 };
        // SAFETY: these are the kernel's parameters; sizes were checked above, and `splits` are a plan's, which name rows and slots
        // of the batch and the workspace that it was made for.
        unsafe { self.kernel.launch(device, launch, &mut args) }
    }
}
