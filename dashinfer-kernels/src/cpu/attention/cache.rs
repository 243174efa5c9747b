//! The paged cache: blocks of keys and values in the order that the products read them.
//!
//! For each layer, block and key/value head, keys are `[D][B]` (so that one step over `D` multiplies with neighbouring
//! positions) and values `[B][D]` (so that one step over positions multiplies with neighbouring features). Both products of
//! attention are then sums of broadcast times vector, like a dense product over panels.

use half::{bf16, f16};

use super::super::aligned::AlignedBuf;
use crate::{DType, KernelError, KvCacheSpec};

/// Keys and values of all layers on the CPU.
#[derive(Debug)]
pub struct CpuKvCache {
    spec: KvCacheSpec,
    /// `[L][2][num_blocks][K][D * B]`
    data: AlignedBuf<u8>,
}

impl CpuKvCache {
    pub(crate) fn new(spec: &KvCacheSpec) -> Result<Self, KernelError> {
        let mut bytes = 2 * spec.dtype.size_bytes();
        for factor in [spec.num_layers, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim] {
            bytes = bytes.saturating_mul(factor);
        }
        if !spec.block_size.is_multiple_of(16) || spec.block_size == 0 || spec.block_size > 128 {
            let what = format!("a block of {} tokens (16, 32, 64 or 128 are)", spec.block_size);
            return Err(KernelError::Unsupported { op: "kv_cache", what, backend: "cpu" });
        }
        Ok(Self { spec: *spec, data: AlignedBuf::zeroed("the KV cache", bytes)? })
    }

    /// What it was made for.
    #[must_use]
    pub fn spec(&self) -> &KvCacheSpec {
        &self.spec
    }

    /// The bytes of the keys (`side` 0) or values (1) of one head in one block.
    fn start(&self, layer: usize, side: usize, block: usize, kv_head: usize) -> usize {
        let s = &self.spec;
        (((layer * 2 + side) * s.num_blocks + block) * s.num_kv_heads + kv_head) * self.run_bytes()
    }

    fn run_bytes(&self) -> usize {
        self.spec.head_dim * self.spec.block_size * self.spec.dtype.size_bytes()
    }

    /// Keys of one head in one block, `[D][B]`.
    pub(super) fn keys(&self, layer: usize, block: usize, kv_head: usize) -> &[u8] {
        &self.data[self.start(layer, 0, block, kv_head)..][..self.run_bytes()]
    }

    /// Values of one head in one block, `[B][D]`.
    pub(super) fn values(&self, layer: usize, block: usize, kv_head: usize) -> &[u8] {
        &self.data[self.start(layer, 1, block, kv_head)..][..self.run_bytes()]
    }

    pub(super) fn key(&self, layer: usize, block: usize, kv_head: usize, i: usize, offset: usize) -> f32 {
        crate::element(self.keys(layer, block, kv_head), self.spec.dtype, i * self.spec.block_size + offset)
    }

    pub(super) fn value(&self, layer: usize, block: usize, kv_head: usize, i: usize, offset: usize) -> f32 {
        crate::element(self.values(layer, block, kv_head), self.spec.dtype, offset * self.spec.head_dim + i)
    }

    /// A handle through which threads store tokens, each its own slots.
    pub(crate) fn writer(&mut self) -> CacheWriter<'_> {
        CacheWriter { start: super::SendPtr(self.data.as_mut_ptr()), cache: self }
    }
}

/// Stores keys and values from several threads.
pub(crate) struct CacheWriter<'a> {
    cache: &'a CpuKvCache,
    start: super::SendPtr<u8>,
}

impl CacheWriter<'_> {
    /// Stores one token's key and value of one head, rounded to the cache's type.
    ///
    /// # Safety
    /// No other thread accesses this slot. `layer`, `slot` and `kv_head` exist; `key` and `value` are `[D]`.
    pub(crate) unsafe fn store(&self, layer: usize, slot: usize, kv_head: usize, key: &[f32], value: &[f32]) {
        let spec = &self.cache.spec;
        let (block, offset) = (slot / spec.block_size, slot % spec.block_size);
        let keys = self.cache.start(layer, 0, block, kv_head);
        let values = self.cache.start(layer, 1, block, kv_head);
        let size = spec.dtype.size_bytes();
        for (i, (key, value)) in key.iter().zip(value).enumerate() {
            // SAFETY: both places lie in the runs of this head and block, which lie in the buffer; the caller has the slot
            // to itself.
            unsafe {
                put(self.start.get().add(keys + (i * spec.block_size + offset) * size), *key, spec.dtype);
                put(self.start.get().add(values + (offset * spec.head_dim + i) * size), *value, spec.dtype);
            }
        }
    }
}

/// # Safety
/// An element of `dtype` may be written at `to`.
#[inline(always)]
unsafe fn put(to: *mut u8, value: f32, dtype: DType) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::F32 => to.cast::<f32>().write_unaligned(value),
            DType::F16 => to.cast::<f16>().write_unaligned(f16::from_f32(value)),
            DType::BF16 => to.cast::<bf16>().write_unaligned(bf16::from_f32(value)),
        }
    }
}
