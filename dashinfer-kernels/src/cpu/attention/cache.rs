//! The paged cache: blocks of keys and values in the order that the products read them.
//!
//! Both products of attention are sums of broadcast times vector, like a dense product over panels, and read groups of 16
//! neighbours: positions of a key, features of a value. For each layer, block and key/value head,
//!
//! - keys are `[B / 16][D][16]`: one step over features multiplies with 16 positions;
//! - values are `[D / 16][B][16]`: one step over positions multiplies with 16 features.
//!
//! So each is read from its start to its end. A cache of latent vectors, which are keys and values at once, has the latter alone, and
//! scores are sums over the 16 of a group, too. `D` is padded with zeros to whole groups; quantized types have the scales of the
//! `B` tokens behind (and then, if there are any, the offsets).
//!
//! In bf16, two steps share a row of 64 bytes: `[steps / 2][16][2]`. One shift or mask of its words widens 16 neighbours of one of them, and
//! the tiles of AMX, which sum pairs, take rows as they are. In uint4, element `j` of a group is beside `j + 8`; threads write tokens, and
//! the two features of a value that share a byte are of one token.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::super::aligned::AlignedBuf;
use super::{int8, uint4};
use crate::error::check;
use crate::{CacheLayout, CacheType, DType, KernelError, KvCacheSpec};

/// Elements that are read together.
pub(super) const GROUP: usize = 16;

/// Keys and values of all layers on the CPU.
#[derive(Debug)]
pub struct CpuKvCache {
    spec: KvCacheSpec,
    /// `[L]` of `[num_blocks][K]` runs of keys, unless they are the values, then as many of values.
    data: AlignedBuf<u8>,
}

/// Which of the two a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Keys,
    Values,
}

/// How one side of a cache is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Float(DType),
    Int8,
    Uint4,
}

impl Element {
    fn of(cache_type: CacheType, side: Side) -> Self {
        match (cache_type, side) {
            (CacheType::F32, _) => Self::Float(DType::F32),
            (CacheType::F16, _) => Self::Float(DType::F16),
            (CacheType::BF16, _) => Self::Float(DType::BF16),
            (CacheType::Int8, _) | (CacheType::Uint4, Side::Keys) => Self::Int8,
            (CacheType::Uint4, Side::Values) => Self::Uint4,
        }
    }
}

/// Keys or values of one head in one block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    /// The elements.
    pub(super) codes: &'a [u8],
    /// `[B]` scales, then offsets.
    scales: &'a [u8],
}

impl CpuKvCache {
    pub(crate) fn new(spec: &KvCacheSpec) -> Result<Self, KernelError> {
        if !matches!(spec.block_size, 16 | 32 | 64 | 128) {
            let what = format!("a block of {} tokens (16, 32, 64 or 128 are)", spec.block_size);
            return Err(KernelError::Unsupported { op: "kv_cache", what, backend: "cpu" });
        }
        if let CacheLayout::Latent { rank } = spec.layout {
            if spec.cache_type.scale_bytes() != 0 {
                let what = format!("{} in a cache of latent vectors (f32, f16 and bf16 are)", spec.cache_type);
                return Err(KernelError::Unsupported { op: "kv_cache", what, backend: "cpu" });
            }
            check("kv_cache", "key/value heads of latent vectors", 1, spec.num_kv_heads)?;
            check("kv_cache", "values of a latent vector, at most", rank.min(spec.head_dim), rank)?;
        }
        let mut bytes = 1_usize;
        // A head size that is too large for its bytes to be counted is also too large for the buffer.
        let head_bytes = if spec.head_dim > 1 << 32 { usize::MAX } else { spec.head_bytes() };
        for factor in [spec.num_layers, spec.num_blocks, spec.block_size, spec.num_kv_heads, head_bytes] {
            bytes = bytes.saturating_mul(factor);
        }
        Ok(Self { spec: *spec, data: AlignedBuf::zeroed("the KV cache", bytes)? })
    }

    /// What it was made for.
    #[must_use]
    pub fn spec(&self) -> &KvCacheSpec {
        &self.spec
    }

    /// The head size, padded to whole groups.
    pub(super) fn width(&self) -> usize {
        self.spec.head_dim.next_multiple_of(GROUP)
    }

    /// The size of a head's value.
    pub(super) fn value_dim(&self) -> usize {
        match self.spec.layout {
            CacheLayout::KeysAndValues => self.spec.head_dim,
            CacheLayout::Latent { rank } => rank,
        }
    }

    /// The size of a head's value, padded to whole groups.
    pub(super) fn value_width(&self) -> usize {
        self.value_dim().next_multiple_of(GROUP)
    }

    /// Where keys stand: with values, if those are a part of them.
    pub(super) fn key_side(&self) -> Side {
        match self.spec.layout {
            CacheLayout::KeysAndValues => Side::Keys,
            CacheLayout::Latent { .. } => Side::Values,
        }
    }

    /// Where the run of one head in one block starts.
    fn start(&self, layer: usize, side: Side, block: usize, kv_head: usize) -> usize {
        let s = &self.spec;
        let runs = s.num_blocks * s.num_kv_heads;
        let values = self.run_bytes(Side::Values);
        let keys = if self.key_side() == Side::Keys { self.run_bytes(Side::Keys) } else { 0 };
        let run = block * s.num_kv_heads + kv_head;
        let in_layer = if side == Side::Keys { run * keys } else { runs * keys + run * values };
        layer * runs * (keys + values) + in_layer
    }

    fn run_bytes(&self, side: Side) -> usize {
        self.code_bytes(side) + self.spec.block_size * self.spec.cache_type.scale_bytes()
    }

    fn code_bytes(&self, side: Side) -> usize {
        let (keys, values) = (self.spec.cache_type.key_bits(), self.spec.cache_type.value_bits());
        self.spec.block_size * self.width() * if side == Side::Keys { keys } else { values } / 8
    }

    /// Keys or values of one head in one block.
    pub(super) fn run(&self, layer: usize, side: Side, block: usize, kv_head: usize) -> Run<'_> {
        let run = &self.data[self.start(layer, side, block, kv_head)..][..self.run_bytes(side)];
        let (codes, scales) = run.split_at(self.code_bytes(side));
        Run { codes, scales }
    }

    /// Where feature `i` of the token at `offset` in its block stands among the elements of its run.
    fn index(&self, side: Side, i: usize, offset: usize) -> usize {
        let (width, block_size) = (self.width(), self.spec.block_size);
        let (steps, group, step, j) = match side {
            Side::Keys => (width, offset / GROUP, i, offset % GROUP),
            Side::Values => (block_size, i / GROUP, offset, i % GROUP),
        };
        let in_group = match Element::of(self.spec.cache_type, side) {
            Element::Float(DType::BF16) => step / 2 * 2 * GROUP + 2 * j + step % 2,
            Element::Uint4 => step * GROUP + j % 8 * 2 + j / 8,
            _ => step * GROUP + j,
        };
        group * steps * GROUP + in_group
    }

    /// Feature `i` of the token at `offset` in a block; a value of uint4 is rotated.
    pub(super) fn value(&self, layer: usize, side: Side, block: usize, kv_head: usize, i: usize, offset: usize) -> f32 {
        let Run { codes, scales } = self.run(layer, side, block, kv_head);
        let (index, b) = (self.index(side, i, offset), self.spec.block_size);
        let half = |at: usize| f16::from_le_bytes([scales[2 * at], scales[2 * at + 1]]);
        match Element::of(self.spec.cache_type, side) {
            Element::Float(dtype) => crate::element(codes, dtype, index),
            Element::Int8 => int8::dequantize(codes[index].cast_signed(), crate::element(scales, DType::F32, offset)),
            Element::Uint4 => {
                let steps = uint4::Steps { scale: half(offset), offset: half(b + offset) };
                steps.dequantize(codes[index / 2] >> (index % 2 * 4) & 15)
            }
        }
    }

    /// A handle through which threads store tokens, each its own slots.
    pub(crate) fn writer(&mut self) -> CacheWriter<'_> {
        CacheWriter { start: super::SendPtr(self.data.as_mut_ptr()), cache: self }
    }
}

impl Run<'_> {
    /// The scales of neighbouring tokens from `offset` on, if they are int8.
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        expect(dead_code, reason = "for blocked variants")
    )]
    pub(super) fn int8_scales(&self, offset: usize, scales: &mut [f32]) {
        // Runs are a multiple of 64 bytes long in a buffer that is aligned to as many, so their scales are aligned.
        let stored: &[f32] = bytemuck::cast_slice(self.scales);
        scales.copy_from_slice(&stored[offset..][..scales.len()]);
    }

    /// The scales and offsets of neighbouring tokens from `offset` on, if they are uint4.
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        expect(dead_code, reason = "for blocked variants")
    )]
    pub(super) fn uint4_scales(&self, offset: usize, scales: &mut [f32], offsets: &mut [f32]) {
        // Aligned as above.
        let stored: &[f16] = bytemuck::cast_slice(self.scales);
        stored[offset..][..scales.len()].convert_to_f32_slice(scales);
        stored[stored.len() / 2 + offset..][..offsets.len()].convert_to_f32_slice(offsets);
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
    /// Layer, slot and head exist, both slices are `[D]`, and no other thread stores to this slot and head.
    pub(crate) unsafe fn store(&self, layer: usize, slot: usize, kv_head: usize, key: &[f32], value: &[f32]) {
        let (block, offset) = (slot / self.cache.spec.block_size, slot % self.cache.spec.block_size);
        for (side, values) in [(Side::Keys, key), (Side::Values, value)] {
            let start = self.cache.start(layer, side, block, kv_head);
            let (mut short, mut long) = ([0.0; 256], Vec::new());
            let mut values = values;
            if Element::of(self.cache.spec.cache_type, side) == Element::Uint4 {
                let rotated = if let Some(short) = short.get_mut(..values.len()) {
                    short
                } else {
                    long.resize(values.len(), 0.0);
                    &mut long[..]
                };
                rotated.copy_from_slice(values);
                uint4::rotate(rotated);
                values = rotated;
            }
            // SAFETY: the run of this head and block lies in the buffer; the caller has the slot to itself.
            unsafe { self.store_side(self.start.get().add(start), side, offset, values) };
        }
    }

    /// Stores one token's latent vector and what is rotated behind it, rounded to the cache's type.
    ///
    /// # Safety
    /// The cache is one of latent vectors; layer and slot exist, `values` is `[C + R]`, and no other thread stores to this slot.
    pub(crate) unsafe fn store_latent(&self, layer: usize, slot: usize, values: &[f32]) {
        let (block, offset) = (slot / self.cache.spec.block_size, slot % self.cache.spec.block_size);
        let start = self.cache.start(layer, Side::Values, block, 0);
        // SAFETY: the run of this block lies in the buffer; the caller has the slot to itself.
        unsafe { self.store_side(self.start.get().add(start), Side::Values, offset, values) };
    }

    /// # Safety
    /// `run` is where that of `side` starts in some block, `values` is `[D]`, and no other thread stores to this token of it.
    unsafe fn store_side(&self, run: *mut u8, side: Side, offset: usize, values: &[f32]) {
        let cache = self.cache;
        let (b, code_bytes) = (cache.spec.block_size, cache.code_bytes(side));
        // `cache.index(side, i, offset)`: features of a key are steps, those of a value are neighbours in groups.
        let first = cache.index(side, 0, offset);
        let element = Element::of(cache.spec.cache_type, side);
        let two_steps = element == Element::Float(DType::BF16);
        let indexed = values.iter().enumerate().map(|(i, x)| {
            let j = i % GROUP;
            let step = match side {
                Side::Keys if two_steps => i / 2 * 2 * GROUP + i % 2,
                Side::Keys => i * GROUP,
                Side::Values => {
                    let in_group = match element {
                        Element::Uint4 => j % 8 * 2 + j / 8,
                        _ if two_steps => 2 * j,
                        _ => j,
                    };
                    i / GROUP * b * GROUP + in_group
                }
            };
            (first + step, *x)
        });
        // SAFETY: elements `cache.index(..)` lie within the codes of the run, and one scale (and offset) for each of `b` tokens
        // behind them. Bytes are of one token only. Runs and their parts are multiples of 64 bytes in an aligned buffer, so
        // each type is aligned.
        unsafe {
            let scales = run.add(code_bytes);
            match element {
                Element::Float(DType::F32) => indexed.for_each(|(at, x)| run.cast::<f32>().add(at).write(x)),
                Element::Float(DType::F16) => {
                    indexed.for_each(|(at, x)| run.cast::<f16>().add(at).write(f16::from_f32(x)))
                }
                Element::Float(DType::BF16) => {
                    indexed.for_each(|(at, x)| run.cast::<bf16>().add(at).write(bf16::from_f32(x)))
                }
                Element::Int8 => {
                    let scale = int8::scale(values);
                    scales.cast::<f32>().add(offset).write(scale);
                    let inverse = int8::inverse(scale);
                    indexed.for_each(|(at, x)| run.cast::<i8>().add(at).write(int8::quantize(x, inverse)));
                }
                Element::Uint4 => {
                    let steps = uint4::Steps::of(values);
                    scales.cast::<f16>().add(offset).write(steps.scale);
                    scales.cast::<f16>().add(b + offset).write(steps.offset);
                    for (at, x) in indexed {
                        let (byte, shift) = (run.add(at / 2), at % 2 * 4);
                        byte.write(byte.read() & !(15 << shift) | steps.quantize(x) << shift);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::math::tests::noise;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_is_stored_is_read_within_the_bound_of_its_type(
            head_dim in 1usize..100, block in 0usize..4, which in 0usize..5, seed: u64,
        ) {
            let (cache_type, block_size) = (CacheType::ALL[which], [16, 32, 64, 128][block]);
            let layout = CacheLayout::KeysAndValues;
            let spec =
                KvCacheSpec { num_layers: 2, num_blocks: 3, block_size, num_kv_heads: 2, head_dim, cache_type, layout };
            let mut cache = CpuKvCache::new(&spec).unwrap();
            let tokens = noise(3 * block_size * 2 * 2 * head_dim, seed);
            let token = |slot: usize, head: usize| {
                let (key, value) = tokens[(slot * 2 + head) * 2 * head_dim..][..2 * head_dim].split_at(head_dim);
                [(Side::Keys, key), (Side::Values, value)]
            };
            let writer = cache.writer();
            // Twice: what is stored replaces what was there.
            for slot in (0..3 * block_size).chain(0..3 * block_size) {
                for head in 0..2 {
                    let [(_, key), (_, value)] = token(slot, head);
                    // SAFETY: one thread; layer, slot and head exist.
                    unsafe { writer.store(1, slot, head, key, value) };
                }
            }
            for (slot, head) in (0..3 * block_size).flat_map(|slot| [(slot, 0), (slot, 1)]) {
                for (side, values) in token(slot, head) {
                    let mut values = values.to_vec();
                    let element = Element::of(cache_type, side);
                    if element == Element::Uint4 {
                        uint4::rotate(&mut values);
                    }
                    let values = &values[..];
                    let steps = uint4::Steps::of(values).scale.to_f32();
                    let bound = match element {
                        Element::Float(DType::F32) => 0.0,
                        Element::Float(DType::F16) => 0.5 / 1024.0,
                        Element::Float(DType::BF16) => 0.5 / 128.0,
                        Element::Int8 => int8::scale(values) * 0.50005,
                        Element::Uint4 => steps * 0.5001 + 1e-6,
                    };
                    for (i, x) in values.iter().enumerate() {
                        let found = cache.value(1, side, slot / block_size, head, i, slot % block_size);
                        prop_assert!((found - x).abs() <= bound, "{cache_type} {side:?}: {x} became {found}");
                    }
                }
            }
            prop_assert!(cache.data[..cache.data.len() / 2].iter().all(|&byte| byte == 0), "the other layer is untouched");
        }
    }
}
