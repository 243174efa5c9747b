//! Attention without tensor cores, for what has no faster kernel.

use std::sync::Arc;

use super::attention_units::{DecodeOperands, check_soft_cap, soft_cap_option};
use super::operand::typed_kernel;
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit =
    Unit { name: "attention_simple.cu", source: include_str!("../../../cuda/attention_simple.cu") };

const OP: &str = "attention_simple";
/// Values of a head that a lane of each warp holds in pairs: one compilation for each, and the blocks of a multiprocessor
/// that its registers allow.
pub(crate) static PAIRS: &[(usize, u32)] = &[(1, 6), (2, 4), (3, 3), (4, 2)];

/// The compiler's options.
pub(crate) fn options(pairs: usize, is_capped: bool) -> Vec<String> {
    let mut options = vec![format!("-DPAIRS={pairs}")];
    options.extend(soft_cap_option(is_capped).map(str::to_owned));
    options
}

/// Attention of rows over their cached positions, for any type, see `attention_simple.cu`.
#[derive(Debug)]
pub(crate) struct AttentionSimple {
    kernel: Kernel,
    dtype: DType,
    head_dim: usize,
    is_capped: bool,
    grid: u32,
}

impl AttentionSimple {
    /// With capped scores or without.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if the head size is odd or above 256, and what compiling may say.
    pub(crate) fn new(
        device: &Arc<Device>,
        dtype: DType,
        head_dim: usize,
        is_capped: bool,
    ) -> Result<Self, KernelError> {
        let variant =
            PAIRS.iter().find(|(pairs, _)| head_dim > 0 && head_dim.is_multiple_of(2) && head_dim <= 64 * pairs);
        let &(pairs, blocks) = variant.ok_or_else(|| {
            let what = format!("a head size of {head_dim}");
            KernelError::Unsupported { op: OP, what, backend: "cuda" }
        })?;
        let options = options(pairs, is_capped);
        let kernel = typed_kernel(device, &UNIT, dtype, &options.iter().map(String::as_str).collect::<Vec<_>>(), OP)?;
        Ok(Self { kernel, dtype, head_dim, is_capped, grid: device.num_sms * blocks })
    }

    /// Blocks that run at once: what a plan divides the positions between.
    pub(crate) fn grid(&self) -> usize {
        self.grid as usize
    }

    /// Positions that a row is not split into less of: what adding a part costs.
    pub(crate) fn min_split(&self) -> usize {
        256
    }

    /// Writes the output of the units' rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] for other block sizes.
    pub(crate) fn run(&self, device: &Device, operands: &DecodeOperands<'_>) -> Result<(), KernelError> {
        crate::error::check(OP, "head size", self.head_dim, operands.params.head_dim)?;
        check_soft_cap(OP, self.is_capped, operands.params)?;
        let params = operands.checked(OP, self.dtype)?;
        let launch = Launch { grid: [self.grid, 1, 1], block: 128, shared: 0 };
        // SAFETY: this is the kernel's parameter; sizes were checked above, and units are a plan's, which name rows, blocks and
        // slots of the batch and the workspace that it was made for.
        unsafe { self.kernel.launch(device, launch, &mut Args::new().value(&params)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention_testing::*;
    use super::super::testing::*;
    use super::*;

    #[test]
    fn attention_simple_every_type_and_some_head_sizes() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            for head_dim in [2, 34, 64, 96, 130, 256] {
                let kernels = Kernels::simple(&device, dtype, head_dim);
                check_shapes(&device, &kernels, dtype, head_dim, &[[7, 1], [4, 4]]);
            }
        }
    }

    #[test]
    fn attention_simple_every_group() {
        let Some(device) = test_device() else { return };
        let kernels = Kernels::simple(&device, DType::F32, 72);
        let heads = [[2, 2], [4, 2], [3, 1], [8, 2], [14, 2], [14, 1], [20, 1]];
        check_shapes(&device, &kernels, DType::F32, 72, &heads);
    }

    #[test]
    fn attention_simple_windows() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let kernels = Kernels::simple(&device, dtype, 64);
            check_windows(&device, &kernels, dtype, 64);
        }
    }

    #[test]
    fn attention_simple_sinks_and_caps() {
        let Some(device) = test_device() else { return };
        for (dtype, head_dim) in [(DType::F32, 64), (DType::F32, 256), (DType::BF16, 130), (DType::F16, 32)] {
            let kernels = Kernels::simple(&device, dtype, head_dim);
            check_sinks_and_caps(&device, &kernels, dtype, head_dim);
        }
    }

    #[test]
    fn attention_simple_padding_rows_are_zeros() {
        let Some(device) = test_device() else { return };
        let kernels = Kernels::simple(&device, DType::F32, 128);
        check_padding(&device, &kernels, DType::F32, 128);
    }

    #[test]
    fn attention_simple_rows_of_prompts() {
        let Some(device) = test_device() else { return };
        let kernels = Kernels::simple(&device, DType::F32, 66);
        check_prompt_rows(&device, &kernels, DType::F32, 66);
    }

    #[test]
    fn attention_simple_a_row_is_the_same_in_any_batch() {
        let Some(device) = test_device() else { return };
        let kernels = Kernels::simple(&device, DType::BF16, 128);
        check_invariance(&device, &kernels, DType::BF16, 128);
    }
}
