//! What the kernels of latent attention over units share: their operands and parameters.

use bytemuck::{Pod, Zeroable};

use crate::cuda::ops::attention_units::{DecodeParams, Partials};
use crate::cuda::ops::operand::{Span, count_u32};
use crate::cuda::plan::DecodeUnit;
use crate::{DType, KernelError, LatentParams};

/// Operands of one chunk of a plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentOperands<'a> {
    /// `[num_rows, H, C]`, of the rows from `first_row` on: means of latent vectors.
    pub(crate) means: Span<'a>,
    /// `[num_rows, H, C]`, likewise: queries of latent vectors.
    pub(crate) queries: Span<'a>,
    /// `[first_row + num_rows, H, N + R]`
    pub(crate) q: Span<'a>,
    /// The rows that units name.
    pub(crate) first_row: usize,
    pub(crate) num_rows: usize,
    /// `[num_blocks, B, C + R]`
    pub(crate) cache: Span<'a>,
    pub(crate) block_size: usize,
    pub(crate) units: Span<'a>,
    pub(crate) num_units: Span<'a>,
    pub(crate) block_table: Span<'a>,
    pub(crate) partials: Partials<'a>,
}

/// `LatentDecodeParams` of `latent.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct LatentDecodeParams {
    units: DecodeParams,
    latent_q: u64,
    q: u64,
    nope_dim: u32,
    rope_dim: u32,
}

impl LatentOperands<'_> {
    /// Checks the shapes. Units name rows of the batch: where row 0 would be, were it there, is what kernels count from.
    pub(super) fn checked(
        &self,
        op: &'static str,
        dtype: DType,
        params: &LatentParams,
    ) -> Result<LatentDecodeParams, KernelError> {
        let (size, heads) = (dtype.size_bytes(), params.num_heads);
        if !matches!(self.block_size, 16 | 32 | 64 | 128) {
            let what = format!("a block size of {}", self.block_size);
            return Err(KernelError::Unsupported { op, what, backend: "cuda" });
        }
        let before = (self.first_row * heads * params.rank * size) as u64;
        let count = self.num_rows * heads * params.rank;
        let [partial_out, partial_ml, tickets] = self.partials.checked(op, heads, params.rank)?;
        Ok(LatentDecodeParams {
            units: DecodeParams {
                out: self.means.holding(op, "values of the means", count, size)?.wrapping_sub(before),
                qkv: 0,
                k_cache: self.cache.holding(op, "values of the cache", self.block_size * params.width(), size)?,
                v_cache: 0,
                units: self.units.holding(op, "units", 1, size_of::<DecodeUnit>())?,
                num_units: self.num_units.holding(op, "number of units", 1, 4)?,
                block_table: self.block_table.holding(op, "block table", 0, 4)?,
                partial_out,
                partial_ml,
                tickets,
                sinks: 0,
                num_heads: count_u32(op, "heads", heads)?,
                num_kv_heads: 1,
                head_dim: count_u32(op, "size of latent vectors", params.rank)?,
                block_size: self.block_size as u32,
                window: 0,
                scale: params.scale,
                soft_cap: 0.0,
                unused: 0,
            },
            latent_q: self.queries.holding(op, "values of the queries", count, size)?.wrapping_sub(before),
            q: self.q.holding(op, "values of q", (self.first_row + self.num_rows) * heads * params.q_dim(), size)?,
            nope_dim: count_u32(op, "values that are not rotated", params.nope_dim)?,
            rope_dim: count_u32(op, "values that are rotated", params.rope_dim)?,
        })
    }
}
