//! What operators work on: activations, parameters, and the cache of keys and values.

use super::memory::Buffer;
use super::ops::operand::Span;
use crate::error::check;
use crate::{CacheLayout, DType, KernelError, KvCacheSpec};

/// Activations or logits, `[rows, cols]`, with room for a fixed number of rows.
#[derive(Debug)]
pub struct CudaTensor {
    pub(super) buffer: Buffer,
    pub(super) dtype: DType,
    pub(super) max_rows: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl CudaTensor {
    pub(super) fn resize(&mut self, op: &'static str, rows: usize, cols: usize) -> Result<(), KernelError> {
        check(op, "columns of the output", cols, self.cols)?;
        if rows > self.max_rows {
            return Err(KernelError::Shape {
                op,
                what: "room for rows in the output",
                wanted: rows,
                found: self.max_rows,
            });
        }
        self.rows = rows;
        Ok(())
    }

    pub(super) fn span(&self) -> Span<'_> {
        (&self.buffer).into()
    }
}

/// Parameters in f32.
#[derive(Debug)]
pub struct CudaVector {
    pub(super) buffer: Buffer,
    pub(super) len: usize,
}

/// Keys and values of all layers: for each layer `[num_blocks, K, B, D]` keys, then as many values; or latent vectors, `[num_blocks, B, C + R]`.
#[derive(Debug)]
pub struct CudaKvCache {
    pub(super) id: u64,
    pub(super) buffer: Buffer,
    pub(super) spec: KvCacheSpec,
}

impl CudaKvCache {
    pub(super) fn layer(&self, layer: usize) -> Result<[Span<'_>; 2], KernelError> {
        let spec = &self.spec;
        check("cache", "values of a latent vector", 0, self.rank())?;
        let half =
            spec.num_blocks * spec.block_size * spec.num_kv_heads * spec.head_dim * spec.cache_type.key_bits() / 8;
        let part = |index| Span::part(&self.buffer, index * half, half);
        Ok([part(2 * layer)?, part(2 * layer + 1)?])
    }

    /// The latent vectors of a layer: `[num_blocks, B, C + R]`.
    pub(super) fn latent_layer(&self, layer: usize) -> Result<Span<'_>, KernelError> {
        let spec = &self.spec;
        let bytes = spec.num_blocks * spec.block_size * spec.head_bytes();
        Span::part(&self.buffer, layer * bytes, bytes)
    }

    fn rank(&self) -> usize {
        match self.spec.layout {
            CacheLayout::KeysAndValues => 0,
            CacheLayout::Latent { rank } => rank,
        }
    }
}
