//! Latent attention and its products without tensor cores, for what has no faster kernels.

use std::sync::Arc;

use super::product::Heads;
use super::units::LatentOperands;
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::ops::operand::{Span, count_u32, typed_kernel};
use crate::cuda::units::Unit;
use crate::{DType, KernelError, LatentParams};

pub(crate) static UNIT: Unit =
    Unit { name: "latent_simple.cu", source: include_str!("../../../../cuda/latent_simple.cu") };

const OP: &str = "latent_attention";
/// Pairs of a token's values that a lane of each warp holds: one compilation for each.
pub(crate) static PAIRS: &[usize] = &[1, 3, 9, 16];
/// Blocks of a multiprocessor.
const BLOCKS: u32 = 4;

/// The compiler's option.
pub(crate) fn option(pairs: usize) -> String {
    format!("-DPAIRS={pairs}")
}

/// See `latent_simple.cu`.
#[derive(Debug)]
pub(crate) struct LatentSimple {
    attention: Kernel,
    product: Kernel,
    dtype: DType,
    grid: u32,
}

impl LatentSimple {
    /// # Errors
    /// [`KernelError::Unsupported`] if sizes are odd or a token has more than 1024 values, and what compiling may say.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType, params: &LatentParams) -> Result<Self, KernelError> {
        let (width, even) = (params.width(), params.rank.is_multiple_of(2) && params.rope_dim.is_multiple_of(2));
        let pairs = PAIRS.iter().find(|&&pairs| even && width > 0 && width <= 64 * pairs);
        let pairs = option(*pairs.ok_or_else(|| {
            let what = format!("latent vectors of {} and {} values", params.rank, params.rope_dim);
            KernelError::Unsupported { op: OP, what, backend: "cuda" }
        })?);
        let kernel = |name| typed_kernel(device, &UNIT, dtype, &[&pairs], name);
        let (attention, product) = (kernel("latent_simple")?, kernel("latent_product_simple")?);
        Ok(Self { attention, product, dtype, grid: device.num_sms * BLOCKS })
    }

    /// Blocks that run at once.
    pub(crate) fn grid(&self) -> usize {
        self.grid as usize
    }

    /// Positions that a row is not split into less of.
    pub(crate) fn min_split(&self) -> usize {
        256
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
        let params = operands.checked(OP, self.dtype, params)?;
        let launch = Launch { grid: [self.grid, 1, 1], block: 128, shared: 0 };
        // SAFETY: this is the kernel's parameter; sizes were checked just now, and units are a plan's, which name rows, blocks and
        // slots of the batch and the workspace that it was made for.
        unsafe { self.attention.launch(device, launch, &mut Args::new().value(&params)) }
    }

    /// See [`Products::heads`](super::product::Products::heads).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn product(
        &self,
        device: &Device,
        [out, x, weight]: [Span<'_>; 3],
        heads: &Heads,
    ) -> Result<(), KernelError> {
        let [out, x, weight] = heads.checked(OP, self.dtype, [out, x, weight])?;
        let num_heads = count_u32(OP, "heads", heads.num_heads)?;
        let mut args = Args::new()
            .ptr(out)
            .ptr(x)
            .ptr(weight)
            .u32(num_heads)
            .u32(count_u32(OP, "columns", heads.num_n)?)
            .u32(count_u32(OP, "columns of x", heads.num_k)?)
            .u32(count_u32(OP, "values of a head of x", heads.x_head)?);
        let launch = Launch { grid: [heads.num_rows as u32, num_heads, 1], block: 256, shared: 0 };
        // SAFETY: these are the kernel's parameters, and sizes were checked just now.
        unsafe { self.product.launch(device, launch, &mut args) }
    }
}
