//! The norm of latent vectors, the rotation behind them and of queries, and latent vectors into the cache.

use std::sync::Arc;

use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::ops::operand::{Span, count_u32, typed_kernel};
use crate::cuda::units::Unit;
use crate::{DType, KernelError, LatentParams, RopePairs};

pub(crate) static UNIT: Unit = Unit { name: "latent_rope.cu", source: include_str!("../../../../cuda/latent_rope.cu") };

/// `LatentRopeParams` of `latent_rope.cu`.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
struct Params {
    q: u64,
    kv: u64,
    cache: u64,
    positions: u64,
    slots: u64,
    inv_freq: u64,
    norm: u64,
    rope_scale: f32,
    norm_eps: f32,
    interleaved: u32,
    num_heads: u32,
    rank: u32,
    nope_dim: u32,
    rope_dim: u32,
    pad: u32,
}

/// What a launch works on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentRopeOperands<'a> {
    /// `[num_rows, H * (N + R)]`, in place.
    pub(crate) q: Span<'a>,
    /// `[num_rows, C + R]`
    pub(crate) kv: Span<'a>,
    /// One layer: `[num_blocks, B, C + R]`.
    pub(crate) cache: Span<'a>,
    /// u32 `[num_rows]`.
    pub(crate) positions: Span<'a>,
    /// u32 `[num_rows]`: `block * B + offset`, in range, as the host saw to; `u32::MAX` for a row that is not stored.
    pub(crate) slots: Span<'a>,
    /// f32 `[R / 2]`
    pub(crate) inv_freq: Span<'a>,
    pub(crate) rope_scale: f32,
    pub(crate) pairs: RopePairs,
    /// f32 `[C]`, and what is added to the mean square.
    pub(crate) norm: (Span<'a>, f32),
    pub(crate) num_rows: usize,
}

/// See `latent_rope.cu`.
#[derive(Debug)]
pub(crate) struct LatentRope {
    kernel: Kernel,
    dtype: DType,
}

impl LatentRope {
    /// Pairs that the kernel has room for.
    const MAX_PAIRS: usize = 512;

    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { kernel: typed_kernel(device, &UNIT, dtype, &[], "latent_rope")?, dtype })
    }

    /// Norms, rotates and stores.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small or the rotation too large.
    pub(crate) fn run(
        &self,
        device: &Device,
        operands: &LatentRopeOperands<'_>,
        params: &LatentParams,
    ) -> Result<(), KernelError> {
        const OP: &str = "latent_rope_and_cache";
        let (size, rows, rope_dim) = (self.dtype.size_bytes(), operands.num_rows, params.rope_dim);
        if !rope_dim.is_multiple_of(2) || rope_dim / 2 > Self::MAX_PAIRS {
            let (wanted, found) = (2 * Self::MAX_PAIRS, rope_dim);
            return Err(KernelError::Shape { op: OP, what: "rotated values of a head", wanted, found });
        }
        let (norm, norm_eps) = operands.norm;
        let params = Params {
            q: operands.q.holding(OP, "values of q", rows * params.num_heads * params.q_dim(), size)?,
            kv: operands.kv.holding(OP, "values of latent vectors", rows * params.width(), size)?,
            cache: operands.cache.holding(OP, "values of the cache", params.width(), size)?,
            positions: operands.positions.holding(OP, "positions", rows, 4)?,
            slots: operands.slots.holding(OP, "slots", rows, 4)?,
            inv_freq: operands.inv_freq.holding(OP, "frequencies", rope_dim / 2, 4)?,
            norm: norm.holding(OP, "weights of the norm", params.rank, 4)?,
            rope_scale: operands.rope_scale,
            norm_eps,
            interleaved: u32::from(operands.pairs == RopePairs::Interleaved),
            num_heads: count_u32(OP, "heads", params.num_heads)?,
            rank: count_u32(OP, "size of latent vectors", params.rank)?,
            nope_dim: count_u32(OP, "values that are not rotated", params.nope_dim)?,
            rope_dim: rope_dim as u32,
            pad: 0,
        };
        let launch = Launch { grid: [rows as u32, 2, 1], block: 256, shared: 0 };
        // SAFETY: this is the kernel's parameter; sizes were checked just now, slots by who made the step.
        unsafe { self.kernel.launch(device, launch, &mut Args::new().value(&params)) }
    }
}
