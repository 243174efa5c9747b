//! Prefill attention on SM90, with the copy engine and warpgroup products.

use std::sync::Arc;

use super::attention_units::soft_cap_option;
use super::operand::typed_kernel;
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::tensor_map::{Boxes, TensorMap};
use crate::cuda::units::Unit;
use crate::error::check;
use crate::{DType, KernelError};

const OP: &str = "attention_prefill_sm90";

pub(crate) static UNIT: Unit =
    Unit { name: "attention_prefill_sm90.cu", source: include_str!("../../../cuda/attention_prefill_sm90.cu") };

/// Rows of a [`PrefillTile`](crate::cuda::plan::PrefillTile), at most.
pub(crate) const TILE_ROWS: u32 = 128;

/// Sizes of keys and of values that there are kernels for.
pub(crate) const HEAD_DIMS: [[u32; 2]; 7] =
    [[64, 64], [80, 80], [96, 96], [128, 128], [192, 192], [256, 256], [192, 128]];

/// The shape of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// BF16 or F16.
    pub(crate) dtype: DType,
    /// `H`.
    pub(crate) num_heads: u32,
    /// `K`; divides `H`.
    pub(crate) num_kv_heads: u32,
    /// `D`, of queries and keys: 64, 80, 96, 128, 192 or 256.
    pub(crate) head_dim: u32,
    /// Of values: `D`, or 128 beside 192.
    pub(crate) value_dim: u32,
    /// `B`: 16, 32, 64 or 128.
    pub(crate) block_size: u32,
    /// Whether scores are capped.
    pub(crate) is_capped: bool,
}

/// The options that make the kernel for sizes of heads, with capped scores or without.
pub(crate) fn options([head_dim, value_dim]: [u32; 2], is_capped: bool) -> Vec<String> {
    let dims = [format!("-DHEAD_DIM={head_dim}"), format!("-DVALUE_DIM={value_dim}")];
    let mut options = [&dims[..], &["-DTAKE_TURNS=1".to_owned()]].concat();
    options.extend(soft_cap_option(is_capped).map(str::to_owned));
    options
}

impl Shape {
    /// Keys of a tile, as in the kernel.
    const fn tile_keys(&self) -> u32 {
        if self.value_dim <= 128 { 128 } else { 64 }
    }

    /// Bytes of a chunk of columns, as in the kernel.
    const fn swizzle_bytes(&self) -> u32 {
        match self.head_dim {
            d if d.is_multiple_of(64) => 128,
            d if d.is_multiple_of(32) => 64,
            _ => 32,
        }
    }

    /// Queries of two warpgroups, two stages of keys and values, barriers, and what aligns them to 1024.
    const fn shared_bytes(&self) -> u32 {
        (TILE_ROWS * self.head_dim + 2 * self.tile_keys() * (self.head_dim + self.value_dim)) * 2 + 64 + 1024
    }
}

/// A layer's cache as the copy engine sees it: made once, as long as the cache stays where it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheMaps {
    k: TensorMap,
    v: TensorMap,
}

/// The operands of a step: addresses on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// `T` rows that start with `H * V` values, so many apart.
    pub(crate) out: (u64, u32),
    /// `T` rows that start with `H * D` values, so many apart.
    pub(crate) q: (u64, u32),
    /// Keys and values of everything up to and with each tile's last row, written before.
    pub(crate) cache: &'a CacheMaps,
    /// [`PrefillTile`](crate::cuda::plan::PrefillTile)s.
    pub(crate) tiles: u64,
    /// How many.
    pub(crate) num_tiles: u32,
    /// Block numbers, `u32`.
    pub(crate) block_table: u64,
    /// Each row sees so many keys, itself included; 0: all before it.
    pub(crate) window: u32,
    /// Of the scores.
    pub(crate) scale: f32,
    /// What scores are capped by, if the shape is one of capped ones.
    pub(crate) soft_cap: f32,
    /// `[H]` of f32, each head's sink; 0: none.
    pub(crate) sinks: u64,
}

/// The kernel for one [`Shape`].
#[derive(Debug, Clone)]
pub(crate) struct AttentionPrefillSm90 {
    device: Arc<Device>,
    kernel: Kernel,
    shape: Shape,
}

impl AttentionPrefillSm90 {
    /// Whether there is a kernel for this device and shape.
    pub(crate) fn supports(device: &Device, shape: &Shape) -> bool {
        device.arch.number() == 90
            && matches!(shape.dtype, DType::BF16 | DType::F16)
            && HEAD_DIMS.contains(&[shape.head_dim, shape.value_dim])
            && matches!(shape.block_size, 16 | 32 | 64 | 128)
    }

    /// What it was made for.
    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Compiles or finds the kernel.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] unless [`Self::supports`], [`KernelError::Shape`] if K does not divide H.
    pub(crate) fn new(device: &Arc<Device>, shape: Shape) -> Result<Self, KernelError> {
        Self::with_options(device, shape, &options([shape.head_dim, shape.value_dim], shape.is_capped))
    }

    fn with_options(device: &Arc<Device>, shape: Shape, options: &[String]) -> Result<Self, KernelError> {
        if !Self::supports(device, &shape) {
            return Err(KernelError::Unsupported {
                op: OP,
                what: format!("{shape:?} on {}", device.arch),
                backend: "cuda",
            });
        }
        let num_kv_heads = shape.num_kv_heads.max(1);
        check(
            OP,
            "query heads, a multiple of kv heads",
            (shape.num_heads / num_kv_heads * num_kv_heads) as usize,
            shape.num_heads as usize,
        )?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let kernel = typed_kernel(device, &UNIT, shape.dtype, &options, OP)?;
        let kernel = kernel.with_shared(shape.shared_bytes())?;
        Ok(Self { device: Arc::clone(device), kernel, shape })
    }

    /// For a layer whose keys and values, `[num_blocks, K, B, D]` and `[num_blocks, K, B, V]`, are at `k` and `v`.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the driver refuses, which it does for addresses that are not multiples of 16.
    pub(crate) fn cache_maps(&self, k: u64, v: u64, num_blocks: usize) -> Result<CacheMaps, KernelError> {
        let Shape { dtype, num_kv_heads, head_dim, value_dim, block_size, .. } = self.shape;
        let swizzle_bytes = self.shape.swizzle_bytes();
        let map = |base, dim: u32| {
            let row = u64::from(dim) * 2;
            let head = row * u64::from(block_size);
            let boxes = Boxes {
                dtype,
                base,
                dims: [dim.into(), block_size.into(), num_kv_heads.into(), num_blocks as u64],
                stride_bytes: [2, row, head, head * u64::from(num_kv_heads)],
                box_dims: [swizzle_bytes / 2, block_size.min(self.shape.tile_keys()), 1, 1],
                swizzle_bytes,
            };
            TensorMap::new(&self.device, &boxes)
        };
        Ok(CacheMaps { k: map(k, head_dim)?, v: map(v, value_dim)? })
    }

    /// Attention of the rows of `tiles`; other rows of `out` are left alone.
    ///
    /// # Safety
    /// All addresses in `operands` and in what they hold are good, for this shape.
    pub(crate) unsafe fn launch(&self, operands: &Operands<'_>) -> Result<(), KernelError> {
        let items = operands.num_tiles * self.shape.num_heads;
        // SAFETY: the caller's.
        unsafe { self.launch_blocks(operands, items.min(self.device.num_sms)) }
    }

    /// With a grid of so many blocks: any number is right.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    unsafe fn launch_blocks(&self, operands: &Operands<'_>, blocks: u32) -> Result<(), KernelError> {
        let Shape { num_heads, num_kv_heads, block_size, .. } = self.shape;
        let mut args = Args::new()
            .ptr(operands.out.0)
            .ptr(operands.q.0)
            .value(&operands.cache.k)
            .value(&operands.cache.v)
            .ptr(operands.tiles)
            .ptr(operands.block_table)
            .u32(operands.num_tiles)
            .u32(num_heads)
            .u32(num_kv_heads)
            .u32(block_size)
            .u32(operands.window)
            .u32(operands.q.1)
            .u32(operands.out.1)
            .f32(operands.scale)
            .f32(operands.soft_cap)
            .ptr(operands.sinks);
        let launch = Launch { grid: [blocks, 1, 1], block: 384, shared: self.shape.shared_bytes() };
        // SAFETY: the parameters are those of the kernel; the caller answers for the addresses.
        unsafe { self.kernel.launch(&self.device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{poisoned, test_device, to_bytes, upload, words};
    use super::*;
    use crate::cuda::memory::{Buffer, Event};
    use crate::cuda::plan::PrefillTile;
    use crate::random::SplitMix64;
    use crate::to_f32;

    /// What queries and values are made of: simpler ones tell where a fault is.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Data {
        /// Scores of a deviation of 2.7: a few keys share the weight.
        Random,
        /// Queries are zero: the result is the mean of the values, whatever the products with keys are.
        NoQueries,
        /// Values are the number of their column: the result is, whatever the weights are.
        ColumnNumbers,
    }

    #[derive(Debug, Clone, Copy)]
    struct Case {
        shape: Shape,
        window: u32,
        /// Read if the shape is one of capped scores.
        soft_cap: f32,
        has_sinks: bool,
        /// `(context_len, num_rows)` of each.
        sequences: &'static [(usize, usize)],
        data: Data,
        /// 0: as many as the launcher takes.
        grid: u32,
    }

    const BASE: Case = Case {
        shape: Shape {
            dtype: DType::BF16,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 128,
            value_dim: 128,
            block_size: 64,
            is_capped: false,
        },
        window: 0,
        soft_cap: 0.0,
        has_sinks: false,
        sequences: &[(300, 300)],
        data: Data::Random,
        grid: 0,
    };

    fn check_case(device: &Arc<Device>, case: Case) {
        let Shape { dtype, num_heads, num_kv_heads, head_dim, value_dim, block_size, is_capped } = case.shape;
        let [h, kv, d, dv, b] = [num_heads, num_kv_heads, head_dim, value_dim, block_size].map(|n| n as usize);
        let kernel = AttentionPrefillSm90::new(device, case.shape).unwrap();
        let mut random = SplitMix64(0x5eed ^ u64::from(head_dim) << 20 ^ u64::from(block_size));

        // Rows of sequences, each behind three rows of nobody; blocks in disorder, with some of nobody, as are table entries.
        let columns = (h + 2 * kv) * d;
        let num_used: usize = case.sequences.iter().map(|&(context, _)| context.div_ceil(b)).sum();
        let num_blocks = 2 * num_used + 3;
        let mut free: Vec<u32> = (0..num_blocks as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, (random.bits() % (i as u64 + 1)) as usize);
        }
        let (mut table, mut tiles, mut firsts, mut num_rows) = (vec![7], Vec::new(), Vec::new(), 0);
        for &(context, rows) in case.sequences {
            num_rows += 3;
            firsts.push((num_rows, table.len()));
            for start in (0..rows).step_by(TILE_ROWS as usize) {
                tiles.push(PrefillTile {
                    first_row: (num_rows + start) as u32,
                    num_rows: (rows - start).min(TILE_ROWS as usize) as u32,
                    position: (context - rows + start) as u32,
                    first_block: table.len() as u32,
                });
            }
            table.extend(free.drain(..context.div_ceil(b)));
            table.push(u32::MAX);
            num_rows += rows;
        }
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile.position + tile.num_rows));

        // What is not a key or value of a sequence is NaN, as are the queries of nobody's rows.
        let mut qkv = vec![f32::NAN; num_rows * columns];
        let mut cache = [d, dv].map(|dim| vec![f32::NAN; num_blocks * kv * b * dim]);
        for (&(context, rows), &(first_row, first_block)) in case.sequences.iter().zip(&firsts) {
            for q in &mut qkv[first_row * columns..(first_row + rows) * columns] {
                *q = if case.data == Data::NoQueries { 0.0 } else { 8.0 * random.value() };
            }
            for key in 0..context {
                let block = table[first_block + key / b] as usize;
                for head in 0..kv {
                    let at = (block * kv + head) * b + key % b;
                    cache[0][at * d..][..d].fill_with(|| random.value());
                    for (i, value) in cache[1][at * dv..][..dv].iter_mut().enumerate() {
                        *value = if case.data == Data::ColumnNumbers { i as f32 / 256.0 } else { random.value() };
                    }
                }
            }
        }
        let stored = [&qkv, &cache[0], &cache[1]].map(|values| to_bytes(values, dtype));
        let buffers = stored.each_ref().map(|bytes| upload(device, bytes));
        let [qkv, k, v] = stored.each_ref().map(|bytes| to_f32(bytes, dtype));
        let out = poisoned(device, num_rows * h * dv * 2);
        let (tiles_buffer, table_buffer) = (upload(device, bytemuck::cast_slice(&tiles)), words(device, &table));
        let maps = kernel.cache_maps(buffers[1].ptr(), buffers[2].ptr(), num_blocks).unwrap();
        let scale = 1.0 / (d as f32).sqrt();
        // Some of them above all scores, some below.
        let sinks: Vec<f32> = (0..h).map(|_| 8.0 * random.value()).collect();
        let sinks_on = upload(device, bytemuck::cast_slice(&sinks));
        let operands = Operands {
            out: (out.ptr(), (h * dv) as u32),
            q: (buffers[0].ptr(), columns as u32),
            cache: &maps,
            tiles: tiles_buffer.ptr(),
            num_tiles: tiles.len() as u32,
            block_table: table_buffer.ptr(),
            window: case.window,
            scale,
            soft_cap: case.soft_cap,
            sinks: if case.has_sinks { sinks_on.ptr() } else { 0 },
        };
        // SAFETY: every buffer is as the operands say, and lives until the download.
        unsafe {
            match case.grid {
                0 => kernel.launch(&operands).unwrap(),
                blocks => kernel.launch_blocks(&operands, blocks).unwrap(),
            }
        }
        let mut bytes = vec![0; out.bytes()];
        out.download(0, &mut bytes).unwrap();
        let found = to_f32(&bytes, dtype);

        // A weight and the result are each rounded to T: half a unit in the last place, relative; |v| <= 1 and weights sum to 1.
        let tolerance = if dtype == DType::BF16 { 2.0 / 512.0 } else { 2.0 / 4096.0 } + 1e-4;
        let mut owned = vec![false; num_rows];
        let (mut worst, mut squares, mut count) = (0f32, 0f64, 0);
        for (&(context, rows), &(first_row, first_block)) in case.sequences.iter().zip(&firsts) {
            for row in 0..rows {
                owned[first_row + row] = true;
                let position = context - rows + row;
                let begin = if case.window == 0 { 0 } else { (position + 1).saturating_sub(case.window as usize) };
                for head in 0..h {
                    let q = &qkv[(first_row + row) * columns + head * d..][..d];
                    let place = |key: usize| {
                        let block = table[first_block + key / b] as usize;
                        (block * kv + head / (h / kv)) * b + key % b
                    };
                    let scores: Vec<f32> = (begin..=position)
                        .map(|key| q.iter().zip(&k[place(key) * d..]).map(|(q, k)| q * k).sum::<f32>() * scale)
                        .map(|score| if is_capped { case.soft_cap * (score / case.soft_cap).tanh() } else { score })
                        .collect();
                    let sink = if case.has_sinks { sinks[head] } else { f32::NEG_INFINITY };
                    let highest = scores.iter().copied().fold(sink, f32::max);
                    let (mut want, mut total) = (vec![0f32; dv], (sink - highest).exp());
                    for (key, score) in (begin..).zip(&scores) {
                        let weight = (score - highest).exp();
                        total += weight;
                        want.iter_mut().zip(&v[place(key) * dv..]).for_each(|(o, v)| *o += weight * v);
                    }
                    for (i, want) in want.iter().map(|o| o / total).enumerate() {
                        let found = found[((first_row + row) * h + head) * dv + i];
                        let error = (found - want).abs();
                        assert!(
                            error <= tolerance,
                            "{case:?}: row {row} at {position}, head {head}, column {i}: wanted {want}, found {found}"
                        );
                        worst = worst.max(error);
                        squares += f64::from(error * error);
                        count += 1;
                    }
                }
            }
        }
        // Errors of rounding are far smaller than their bound on average; those of a fault need not be.
        let deviation = (squares / f64::from(count)).sqrt();
        assert!(deviation <= f64::from(tolerance) / 2.0, "{case:?}: deviation {deviation}, worst {worst}");
        for row in (0..num_rows).filter(|&row| !owned[row]) {
            let untouched = bytes[row * h * dv * 2..(row + 1) * h * dv * 2].iter().all(|&byte| byte == 0xff);
            assert!(untouched, "{case:?}: row {row} is nobody's, and was written");
        }
    }

    fn check_all(cases: impl IntoIterator<Item = Case>) {
        let Some(device) = test_device() else { return };
        if device.arch.number() != 90 {
            eprintln!("skipped: for SM90, not {}", device.arch);
            return;
        }
        for case in cases {
            check_case(&device, case);
        }
    }

    fn with_head_dims(case: Case) -> impl Iterator<Item = Case> {
        HEAD_DIMS
            .into_iter()
            .map(move |[head_dim, value_dim]| Case { shape: Shape { head_dim, value_dim, ..case.shape }, ..case })
    }

    #[test]
    fn prefill_sm90_one_tile_of_keys_without_queries() {
        check_all(with_head_dims(Case { sequences: &[(64, 64)], data: Data::NoQueries, ..BASE }));
    }

    #[test]
    fn prefill_sm90_column_numbers_come_out_whatever_the_weights() {
        check_all(with_head_dims(Case { sequences: &[(64, 64)], data: Data::ColumnNumbers, ..BASE }));
    }

    #[test]
    fn prefill_sm90_one_tile_of_keys() {
        check_all(with_head_dims(Case { sequences: &[(64, 64)], ..BASE }));
    }

    #[test]
    fn prefill_sm90_means_over_several_tiles_of_keys() {
        check_all(with_head_dims(Case { data: Data::NoQueries, ..BASE }));
    }

    #[test]
    fn prefill_sm90_several_tiles_of_keys_at_every_head_dim_and_type() {
        check_all(with_head_dims(BASE));
        check_all(with_head_dims(Case { shape: Shape { dtype: DType::F16, ..BASE.shape }, ..BASE }));
    }

    #[test]
    fn prefill_sm90_block_sizes() {
        for block_size in [16, 32, 64, 128] {
            for [head_dim, value_dim] in [[64, 64], [80, 80], [128, 128], [192, 192], [192, 128]] {
                check_all([Case { shape: Shape { block_size, head_dim, value_dim, ..BASE.shape }, ..BASE }]);
            }
        }
    }

    #[test]
    fn prefill_sm90_odd_lengths_and_chunks_behind_a_context() {
        let sequences =
            &[(1, 1), (127, 127), (128, 128), (129, 129), (200, 1), (391, 130), (385, 128), (65, 64), (513, 2)];
        for block_size in [16, 128] {
            check_all([Case { shape: Shape { block_size, ..BASE.shape }, sequences, ..BASE }]);
        }
        check_all([Case { shape: Shape { head_dim: 256, value_dim: 256, ..BASE.shape }, sequences, ..BASE }]);
    }

    #[test]
    fn prefill_sm90_ratios_of_heads() {
        for (num_heads, num_kv_heads) in [(1, 1), (3, 3), (7, 1), (14, 2), (16, 1)] {
            check_all([Case { shape: Shape { num_heads, num_kv_heads, ..BASE.shape }, ..BASE }]);
        }
    }

    #[test]
    fn prefill_sm90_windows() {
        let sequences = &[(700, 700), (500, 100), (90, 90)];
        for window in [1, 2, 63, 64, 65, 128, 200, 512, 10_000] {
            check_all([Case { window, sequences, ..BASE }]);
        }
        check_all([Case {
            shape: Shape { head_dim: 256, value_dim: 256, ..BASE.shape },
            window: 100,
            sequences,
            ..BASE
        }]);
    }

    #[test]
    fn prefill_sm90_sinks() {
        let sequences = &[(1, 1), (300, 300), (500, 100)];
        check_all(with_head_dims(Case { has_sinks: true, sequences, ..BASE }));
        for window in [1, 128] {
            let shape = Shape { num_heads: 16, num_kv_heads: 2, head_dim: 64, value_dim: 64, ..BASE.shape };
            check_all([Case { shape, has_sinks: true, window, sequences, ..BASE }]);
        }
    }

    #[test]
    fn prefill_sm90_soft_caps() {
        let sequences = &[(1, 1), (300, 300), (500, 100)];
        let shape = Shape { is_capped: true, ..BASE.shape };
        // Scores reach some 10: the smaller cap bends most of them.
        for soft_cap in [3.0, 50.0] {
            check_all(with_head_dims(Case { shape, soft_cap, sequences, ..BASE }));
        }
        let shape = Shape { dtype: DType::F16, ..shape };
        check_all(with_head_dims(Case { shape, soft_cap: 5.0, has_sinks: true, window: 100, sequences, ..BASE }));
    }

    #[test]
    fn prefill_sm90_grids_smaller_and_larger_than_the_work() {
        let sequences = &[(400, 400), (150, 150), (600, 129)];
        for grid in [1, 2, 5, 24, 50] {
            check_all([Case { sequences, grid, ..BASE }]);
        }
    }

    #[test]
    fn prefill_sm90_a_shape_without_kernel_is_an_error() {
        let Some(device) = test_device() else { return };
        let shape = Shape { head_dim: 100, ..BASE.shape };
        assert!(matches!(AttentionPrefillSm90::new(&device, shape), Err(KernelError::Unsupported { .. })));
    }

    /// A buffer of random values, of which the first 2^20 are repeated.
    fn noise(device: &Arc<Device>, elements: usize, dtype: DType) -> Buffer {
        let mut random = SplitMix64(elements as u64);
        let values: Vec<f32> = (0..(1 << 20).min(elements)).map(|_| 2.0 * random.value()).collect();
        let bytes = to_bytes(&values, dtype);
        let buffer = device.alloc("bench", elements * 2).unwrap();
        for offset in (0..elements * 2).step_by(bytes.len()) {
            buffer.upload(offset, &bytes[..bytes.len().min(elements * 2 - offset)]).unwrap();
        }
        buffer
    }

    #[test]
    #[ignore = "a measurement"]
    fn bench_prefill_attention() {
        let Some(device) = test_device() else { return };
        if device.arch.number() != 90 {
            eprintln!("skipped: for SM90, not {}", device.arch);
            return;
        }
        // D, V, H, K, B, context, rows, window
        for [d, dv, h, kv, b, context, rows, window] in [
            [128, 128, 28, 4, 64, 8192, 8192, 0],
            [128, 128, 28, 4, 16, 8192, 8192, 0],
            [128, 128, 28, 4, 128, 8192, 8192, 0],
            [128, 128, 28, 4, 64, 2048, 2048, 0],
            [128, 128, 28, 4, 64, 1024, 1024, 0],
            [128, 128, 28, 4, 64, 32768, 2048, 0],
            [128, 128, 28, 4, 64, 32768, 32768, 0],
            [128, 128, 28, 4, 64, 8192, 8192, 1024],
            [128, 128, 32, 32, 64, 8192, 8192, 0],
            [64, 64, 32, 8, 64, 8192, 8192, 0],
            [96, 96, 32, 32, 64, 8192, 8192, 0],
            [192, 192, 16, 16, 64, 8192, 8192, 0],
            [192, 128, 16, 16, 64, 8192, 8192, 0],
            [256, 256, 16, 8, 64, 8192, 8192, 0],
        ] {
            let [num_heads, num_kv_heads, head_dim, value_dim, block_size, window] =
                [h, kv, d, dv, b, window].map(|n: usize| n as u32);
            let dtype = DType::BF16;
            let shape = Shape { dtype, num_heads, num_kv_heads, head_dim, value_dim, block_size, is_capped: false };
            let [kernel, without_turns] = ["-DTAKE_TURNS=1", "-DTAKE_TURNS=0"].map(|option| {
                let mut options = options([head_dim, value_dim], false);
                options.retain(|option| !option.starts_with("-DTAKE_TURNS"));
                options.push(option.to_owned());
                AttentionPrefillSm90::with_options(&device, shape, &options).unwrap()
            });
            let num_blocks = context.div_ceil(b);
            let qkv = noise(&device, rows * (h + 2 * kv) * d, DType::BF16);
            let cache = [d, dv].map(|dim| noise(&device, num_blocks * kv * b * dim, DType::BF16));
            let out = device.alloc("bench", rows * h * dv * 2).unwrap();
            let mut tiles: Vec<PrefillTile> = (0..rows)
                .step_by(TILE_ROWS as usize)
                .map(|start| PrefillTile {
                    first_row: start as u32,
                    num_rows: (rows - start).min(TILE_ROWS as usize) as u32,
                    position: (context - rows + start) as u32,
                    first_block: 0,
                })
                .collect();
            tiles.reverse();
            let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
            let (tiles_buffer, table_buffer) = (upload(&device, bytemuck::cast_slice(&tiles)), words(&device, &table));
            let maps = kernel.cache_maps(cache[0].ptr(), cache[1].ptr(), num_blocks).unwrap();
            let operands = Operands {
                out: (out.ptr(), (h * dv) as u32),
                q: (qkv.ptr(), ((h + 2 * kv) * d) as u32),
                cache: &maps,
                tiles: tiles_buffer.ptr(),
                num_tiles: tiles.len() as u32,
                block_table: table_buffer.ptr(),
                window,
                scale: 1.0 / (d as f32).sqrt(),
                soft_cap: 0.0,
                sinks: 0,
            };
            let seen: usize = (context - rows + 1..=context)
                .map(|keys| if window == 0 { keys } else { keys.min(window as usize) })
                .sum();
            let flop = 2.0 * ((d + dv) * h * seen) as f64;
            let items = operands.num_tiles * num_heads;
            let persistent = items.min(device.num_sms);
            for (name, kernel, blocks) in [
                ("as many blocks as multiprocessors", &kernel, persistent),
                ("a block for each tile and head", &kernel, items),
                ("without turns", &without_turns, persistent),
            ] {
                let mut times: Vec<f64> = (0..23)
                    .map(|_| {
                        let (start, end) = (Event::timed(&device).unwrap(), Event::timed(&device).unwrap());
                        start.record().unwrap();
                        // SAFETY: every buffer is as the operands say, and lives until the wait.
                        unsafe { kernel.launch_blocks(&operands, blocks).unwrap() };
                        end.record().unwrap();
                        end.wait().unwrap();
                        end.since(&start).unwrap().as_secs_f64()
                    })
                    .skip(3)
                    .collect();
                times.sort_by(f64::total_cmp);
                let median = times[times.len() / 2];
                eprintln!(
                    "attention_prefill_sm90/bf16/D{d} V{dv} H{h} K{kv} B{b} rows {rows} of {context} window {window}   {:8.1} us   {:5.1} TFLOP/s   {name}",
                    median * 1e6,
                    flop / median / 1e12
                );
            }
        }
    }
}
