//! What the launchers of decode attention share: operands, and the kernel's parameters made of them.

use bytemuck::{Pod, Zeroable};

use super::operand::{Span, count_u32};
use crate::cuda::plan::DecodeUnit;
use crate::{AttentionParams, DType, KernelError};

/// Operands of one chunk of a plan: its units, the batch that they name, and the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecodeOperands<'a> {
    /// `[num_rows, H * D]`
    pub(crate) out: Span<'a>,
    /// `[num_rows, (H + 2 K) * D]`: query heads come first.
    pub(crate) qkv: Span<'a>,
    /// Rows of the batch, with its padding.
    pub(crate) num_rows: usize,
    /// `[num_blocks, K, B, D]`
    pub(crate) k_cache: Span<'a>,
    /// As `k_cache`.
    pub(crate) v_cache: Span<'a>,
    /// Tokens in a block, `B`.
    pub(crate) block_size: usize,
    /// [`DecodeUnit`]s that a plan made, on the device.
    pub(crate) units: Span<'a>,
    /// How many of them there are: one `u32` on the device.
    pub(crate) num_units: Span<'a>,
    /// The batch's block table.
    pub(crate) block_table: Span<'a>,
    /// Room for partial results.
    pub(crate) partials: Partials<'a>,
    /// Heads, scale and window.
    pub(crate) params: &'a AttentionParams,
    /// `[H]` of f32: each head's sink.
    pub(crate) sinks: Option<Span<'a>>,
}

/// Room for the partial results of rows that are split.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Partials<'a> {
    /// Units that there is room for: the plan's `max_slots`.
    pub(crate) num_slots: usize,
    /// `[num_slots, H, D]` `f32`: weighted sums of values.
    pub(crate) out: Span<'a>,
    /// `[num_slots, H, 2]` `f32`: largest score and sum of weights.
    pub(crate) ml: Span<'a>,
    /// `[num_slots, H]` `u32`: how many parts of a row are there. Zeros, which every launch leaves behind.
    pub(crate) tickets: Span<'a>,
}

impl Partials<'_> {
    /// Bytes of `out`, `ml` and `tickets`.
    pub(crate) const fn bytes(num_slots: usize, num_heads: usize, head_dim: usize) -> [usize; 3] {
        let heads = num_slots * num_heads;
        [heads * head_dim * 4, heads * 2 * 4, heads * 4]
    }

    /// The addresses of `out`, `ml` and `tickets`.
    pub(in crate::cuda::ops) fn checked(
        &self,
        op: &'static str,
        num_heads: usize,
        head_dim: usize,
    ) -> Result<[u64; 3], KernelError> {
        Ok([
            self.out.holding(op, "values of the partial results", self.num_slots * num_heads * head_dim, 4)?,
            self.ml.holding(op, "weights of the partial results", self.num_slots * num_heads * 2, 4)?,
            self.tickets.holding(op, "tickets of the partial results", self.num_slots * num_heads, 4)?,
        ])
    }
}

/// The kernels' parameters (`attention_units.cuh`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(in crate::cuda::ops) struct DecodeParams {
    pub(in crate::cuda::ops) out: u64,
    pub(in crate::cuda::ops) qkv: u64,
    pub(in crate::cuda::ops) k_cache: u64,
    pub(in crate::cuda::ops) v_cache: u64,
    pub(in crate::cuda::ops) units: u64,
    pub(in crate::cuda::ops) num_units: u64,
    pub(in crate::cuda::ops) block_table: u64,
    pub(in crate::cuda::ops) partial_out: u64,
    pub(in crate::cuda::ops) partial_ml: u64,
    pub(in crate::cuda::ops) tickets: u64,
    pub(in crate::cuda::ops) sinks: u64,
    pub(in crate::cuda::ops) num_heads: u32,
    pub(in crate::cuda::ops) num_kv_heads: u32,
    pub(in crate::cuda::ops) head_dim: u32,
    pub(in crate::cuda::ops) block_size: u32,
    pub(in crate::cuda::ops) window: u32,
    pub(in crate::cuda::ops) scale: f32,
    pub(in crate::cuda::ops) soft_cap: f32,
    /// To a multiple of 8 bytes.
    pub(in crate::cuda::ops) unused: u32,
}

/// The address of each head's sink; 0 for none.
///
/// # Errors
/// [`KernelError::Shape`] if they are fewer than the heads.
pub(super) fn checked_sinks(op: &'static str, sinks: Option<Span<'_>>, num_heads: usize) -> Result<u64, KernelError> {
    sinks.map_or(Ok(0), |sinks| sinks.holding(op, "sinks", num_heads, 4))
}

/// The macro of kernels that cap scores, if they are to.
pub(crate) fn soft_cap_option(is_capped: bool) -> Option<&'static str> {
    is_capped.then_some("-DSOFT_CAP=1")
}

/// Whether a kernel that caps scores, or does not, is what the parameters ask for.
///
/// # Errors
/// [`KernelError::Unsupported`].
pub(super) fn check_soft_cap(op: &'static str, is_capped: bool, params: &AttentionParams) -> Result<(), KernelError> {
    if params.soft_cap.is_some() == is_capped {
        return Ok(());
    }
    let what = format!("a soft cap of {:?} by a kernel made for others", params.soft_cap);
    Err(KernelError::Unsupported { op, what, backend: "cuda" })
}

impl DecodeOperands<'_> {
    /// Query heads of a kv head.
    pub(super) fn group(&self) -> usize {
        self.params.num_heads / self.params.num_kv_heads.max(1)
    }

    /// Checks the shapes.
    pub(super) fn checked(&self, op: &'static str, dtype: DType) -> Result<DecodeParams, KernelError> {
        let AttentionParams { num_heads, num_kv_heads, head_dim, scale, window, soft_cap } = *self.params;
        let size = dtype.size_bytes();
        let group = self.group();
        if group == 0 || group * num_kv_heads != num_heads {
            return Err(KernelError::Shape { op, what: "query heads", wanted: num_kv_heads, found: num_heads });
        }
        if !matches!(self.block_size, 16 | 32 | 64 | 128) {
            let what = format!("a block size of {}", self.block_size);
            return Err(KernelError::Unsupported { op, what, backend: "cuda" });
        }
        let block_bytes = num_kv_heads * self.block_size * head_dim * size;
        let num_blocks = self.k_cache.bytes() / block_bytes;
        let [partial_out, partial_ml, tickets] = self.partials.checked(op, num_heads, head_dim)?;
        Ok(DecodeParams {
            out: self.out.holding(op, "values of the output", self.num_rows * num_heads * head_dim, size)?,
            qkv: self.qkv.holding(
                op,
                "values of q, k and v",
                self.num_rows * (num_heads + 2 * num_kv_heads) * head_dim,
                size,
            )?,
            k_cache: self.k_cache.holding(op, "blocks of keys", num_blocks, block_bytes)?,
            v_cache: self.v_cache.holding(op, "blocks of values", num_blocks, block_bytes)?,
            units: self.units.holding(op, "units", 1, size_of::<DecodeUnit>())?,
            num_units: self.num_units.holding(op, "number of units", 1, 4)?,
            block_table: self.block_table.holding(op, "block table", 0, 4)?,
            partial_out,
            partial_ml,
            tickets,
            sinks: checked_sinks(op, self.sinks, num_heads)?,
            num_heads: count_u32(op, "query heads", num_heads)?,
            num_kv_heads: count_u32(op, "kv heads", num_kv_heads)?,
            head_dim: count_u32(op, "head size", head_dim)?,
            block_size: self.block_size as u32,
            window: count_u32(op, "window", window.unwrap_or(0))?,
            scale,
            soft_cap: soft_cap.unwrap_or(0.0),
            unused: 0,
        })
    }
}
