//! Attention of prompt rows with the tensor cores of SM80 and newer.

use std::sync::Arc;

use super::attention_units::{check_soft_cap, checked_sinks, soft_cap_option};
use super::operand::{Span, count_u32, typed_kernel};
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::plan::PrefillTile;
use crate::cuda::units::Unit;
use crate::{AttentionParams, DType, KernelError};

pub(crate) static UNIT: Unit =
    Unit { name: "attention_prefill_sm80.cu", source: include_str!("../../../cuda/attention_prefill_sm80.cu") };

/// Head sizes that there are tiles for.
pub(crate) const HEAD_DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];

/// How a block shares out its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    rows: usize,
    positions: usize,
    warps: usize,
}

/// The tiles for a head size. On chips with half the tensor rate to their shared memory (8.6, 8.9, 12.x: one product takes as
/// long as reading its fragments) 16 rows to a warp are enough, and smaller blocks fit more often. Heads above 128 leave a warp
/// registers for 16 rows only; then eight warps share the keys. Tiles of 32 positions where registers (128 on 10.x, 96 with
/// caps) or shared memory (256) end.
fn tile(arch: Arch, head_dim: usize, is_capped: bool) -> Tile {
    let slow = matches!(arch.number(), 86..90 | 120..);
    match head_dim {
        256.. => Tile { rows: 128, positions: 32, warps: 8 },
        129.. => Tile { rows: 128, positions: 64, warps: 8 },
        _ if slow => Tile { rows: 64, positions: 64, warps: 4 },
        96 if is_capped => Tile { rows: 128, positions: 32, warps: 4 },
        128 if arch.major >= 10 => Tile { rows: 128, positions: 32, warps: 4 },
        _ => Tile { rows: 128, positions: 64, warps: 4 },
    }
}

/// The options that make the kernel for a head size on a chip, with capped scores or without.
pub(crate) fn options(arch: Arch, head_dim: usize, is_capped: bool) -> Vec<String> {
    let Tile { rows, positions, warps } = tile(arch, head_dim, is_capped);
    let mut options = vec![
        format!("-DHEAD_DIM={head_dim}"),
        format!("-DTILE_M={rows}"),
        format!("-DTILE_N={positions}"),
        format!("-DNUM_WARPS={warps}"),
    ];
    options.extend(soft_cap_option(is_capped).map(str::to_owned));
    options
}

/// What a launch works on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PrefillOperands<'a> {
    /// `[T, H * D]`
    pub(crate) out: Span<'a>,
    /// `[T, (H + 2K) * D]`
    pub(crate) qkv: Span<'a>,
    /// One layer's keys and values: `[num_blocks, K, B, D]` each; the rows' own are in them.
    pub(crate) cache: [Span<'a>; 2],
    /// `[num_tiles]` of [`PrefillTile`]; rows, positions and blocks are in range, as the host saw to.
    pub(crate) tiles: Span<'a>,
    /// u32: the blocks of all sequences.
    pub(crate) block_table: Span<'a>,
    /// `[H]` of f32: each head's sink.
    pub(crate) sinks: Option<Span<'a>>,
}

/// `attention_prefill_sm80` for one head size, see `attention_prefill_sm80.cu`.
#[derive(Debug)]
pub(crate) struct AttentionPrefillSm80 {
    kernel: Kernel,
    dtype: DType,
    head_dim: usize,
    is_capped: bool,
    tile: Tile,
}

impl AttentionPrefillSm80 {
    /// With capped scores or without.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] for other types, head sizes and older chips.
    pub(crate) fn new(
        device: &Arc<Device>,
        dtype: DType,
        head_dim: usize,
        is_capped: bool,
    ) -> Result<Self, KernelError> {
        const OP: &str = "attention_prefill_sm80";
        let arch = device.arch;
        if dtype == DType::F32 || arch.major < 8 || !HEAD_DIMS.contains(&head_dim) {
            let what = format!("{dtype} with head size {head_dim} on compute capability {arch}");
            return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        }
        let options = options(arch, head_dim, is_capped);
        let kernel = typed_kernel(device, &UNIT, dtype, &options.iter().map(String::as_str).collect::<Vec<_>>(), OP)?;
        let tile = tile(arch, head_dim, is_capped);
        let this = Self { kernel, dtype, head_dim, is_capped, tile };
        let shared = this.shared_bytes();
        Ok(Self { kernel: this.kernel.with_shared(shared)?, ..this })
    }

    /// The most rows of a tile.
    pub(crate) fn tile_rows(&self) -> usize {
        self.tile.rows
    }

    fn shared_bytes(&self) -> u32 {
        ((self.tile.rows + 2 * self.tile.positions) * self.head_dim * 2) as u32
    }

    /// The attention of the rows of `num_tiles` tiles; `num_rows` is the number of rows in the batch, `block_size` 16, 32, 64 or
    /// 128. The scale is positive.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, or the heads are others than the kernel's.
    pub(crate) fn run(
        &self,
        device: &Device,
        operands: &PrefillOperands<'_>,
        params: &AttentionParams,
        [num_tiles, num_rows, block_size]: [usize; 3],
    ) -> Result<(), KernelError> {
        const OP: &str = "attention_prefill_sm80";
        let (heads, kv_heads, size) = (params.num_heads, params.num_kv_heads, self.dtype.size_bytes());
        let shape = |what, wanted, found| Err(KernelError::Shape { op: OP, what, wanted, found });
        if params.head_dim != self.head_dim {
            return shape("head size", self.head_dim, params.head_dim);
        }
        check_soft_cap(OP, self.is_capped, params)?;
        if kv_heads == 0 || heads % kv_heads != 0 || heads > 65535 {
            return shape("heads", heads.next_multiple_of(kv_heads.max(1)), heads);
        }
        if !matches!(block_size, 16 | 32 | 64 | 128) {
            return shape("block size", 16, block_size);
        }
        let block_values = kv_heads * block_size * self.head_dim;
        let mut args = Args::new()
            .ptr(operands.out.holding(OP, "values of the output", num_rows * heads * self.head_dim, size)?)
            .ptr(operands.qkv.holding(OP, "values of qkv", num_rows * (heads + 2 * kv_heads) * self.head_dim, size)?)
            .ptr(operands.cache[0].holding(OP, "values of the key cache", block_values, size)?)
            .ptr(operands.cache[1].holding(OP, "values of the value cache", block_values, size)?)
            .ptr(operands.tiles.holding(OP, "tiles", num_tiles, size_of::<PrefillTile>())?)
            .ptr(operands.block_table.holding(OP, "blocks", num_tiles.min(1), 4)?)
            .u32(heads as u32)
            .u32(kv_heads as u32)
            .u32(block_size as u32)
            .u32(params.window.map_or(0, |window| u32::try_from(window).unwrap_or(u32::MAX)))
            .f32(params.scale)
            .f32(params.soft_cap.unwrap_or(0.0))
            .ptr(checked_sinks(OP, operands.sinks, heads)?);
        let grid = [count_u32(OP, "tiles", num_tiles)?, heads as u32, 1];
        let launch = Launch { grid, block: 32 * self.tile.warps as u32, shared: self.shared_bytes() };
        // SAFETY: these are the kernel's parameters; sizes were checked above, the step's description by who made it.
        unsafe { self.kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::cuda::memory::Buffer;

    /// Sequences of `(rows of the step, positions before them)` in a cache whose unused slots and blocks are NaN.
    struct Case {
        params: AttentionParams,
        block_size: usize,
        qkv: Values,
        keys: Vec<f32>,
        values: Vec<f32>,
        cache: [Buffer; 2],
        table: Vec<u32>,
        /// `(first row, rows, context before them, first block)`
        sequences: Vec<(usize, usize, usize, usize)>,
        num_rows: usize,
        dtype: DType,
        sinks: Option<Values>,
    }

    fn case(
        device: &Arc<Device>,
        dtype: DType,
        params: AttentionParams,
        block_size: usize,
        lengths: &[(usize, usize)],
        seed: u64,
    ) -> Case {
        let (k, d) = (params.num_kv_heads, params.head_dim);
        let (mut sequences, mut table, mut first_row) = (Vec::new(), Vec::new(), 0);
        let num_blocks: usize =
            lengths.iter().map(|(rows, before)| (rows + before).div_ceil(block_size)).sum::<usize>() + 3;
        // Blocks in no order, by a stride that is coprime to their number.
        let stride = (num_blocks / 2..)
            .find(|s| (1..=num_blocks).filter(|f| s % f == 0 && num_blocks.is_multiple_of(*f)).count() == 1)
            .unwrap();
        for &(rows, before) in lengths {
            sequences.push((first_row, rows, before, table.len()));
            first_row += rows;
            for _ in 0..(rows + before).div_ceil(block_size) {
                table.push(((table.len() + 1) * stride % num_blocks) as u32);
            }
        }
        let mut stores = [seed, seed + 1].map(|seed| {
            let random: Vec<f32> =
                random(num_blocks * k * block_size * d, seed).iter().map(|&x| rounded(x, dtype)).collect();
            let mut values = vec![f32::NAN; random.len()];
            for &(_, rows, before, first_block) in &sequences {
                for position in 0..rows + before {
                    for head in 0..k {
                        let at = at(&table, first_block, position, head, (k, block_size, d));
                        values[at..at + d].copy_from_slice(&random[at..at + d]);
                    }
                }
            }
            values
        });
        let cache = stores.each_ref().map(|values| upload(device, &to_bytes(values, dtype)));
        let qkv = Values::of(
            device,
            dtype,
            &random(first_row * (params.num_heads + 2 * k) * d, seed + 2).iter().map(|x| 3.0 * x).collect::<Vec<_>>(),
        );
        let [keys, values] = &mut stores;
        let (keys, values) = (std::mem::take(keys), std::mem::take(values));
        Case { params, block_size, qkv, keys, values, cache, table, sequences, num_rows: first_row, dtype, sinks: None }
    }

    fn at(
        table: &[u32],
        first_block: usize,
        position: usize,
        head: usize,
        (k, block_size, d): (usize, usize, usize),
    ) -> usize {
        let block = table[first_block + position / block_size] as usize;
        ((block * k + head) * block_size + position % block_size) * d
    }

    impl Case {
        /// The output, with tiles of at most `tile_rows` rows.
        fn run(&self, device: &Arc<Device>, kernel: &AttentionPrefillSm80, tile_rows: usize) -> Vec<f32> {
            let mut tiles = Vec::new();
            for &(first_row, rows, before, first_block) in &self.sequences {
                for start in (0..rows).step_by(tile_rows) {
                    tiles.push(PrefillTile {
                        first_row: (first_row + start) as u32,
                        num_rows: tile_rows.min(rows - start) as u32,
                        position: (before + start) as u32,
                        first_block: first_block as u32,
                    });
                }
            }
            let out = poisoned(device, self.num_rows * self.params.num_heads * self.params.head_dim * 2);
            let (tiles_on, table_on) = (upload(device, bytemuck::cast_slice(&tiles)), words(device, &self.table));
            let operands = PrefillOperands {
                out: (&out).into(),
                qkv: (&self.qkv.on_device).into(),
                cache: [(&self.cache[0]).into(), (&self.cache[1]).into()],
                tiles: (&tiles_on).into(),
                block_table: (&table_on).into(),
                sinks: self.sinks.as_ref().map(|sinks| (&sinks.on_device).into()),
            };
            kernel.run(device, &operands, &self.params, [tiles.len(), self.num_rows, self.block_size]).unwrap();
            read(&out, self.dtype)
        }

        /// The formula in f64.
        fn reference(&self) -> Vec<f64> {
            let AttentionParams { num_heads, num_kv_heads, head_dim: d, scale, window, soft_cap } = self.params;
            let mut out = Vec::new();
            for &(first_row, rows, before, first_block) in &self.sequences {
                for row in 0..rows {
                    let position = before + row;
                    let begin = window.map_or(0, |w| (position + 1).saturating_sub(w));
                    for head in 0..num_heads {
                        let q =
                            &self.qkv.values[((first_row + row) * (num_heads + 2 * num_kv_heads) + head) * d..][..d];
                        let kv_head = head / (num_heads / num_kv_heads);
                        let place = |p| at(&self.table, first_block, p, kv_head, (num_kv_heads, self.block_size, d));
                        let scores: Vec<f64> = (begin..=position)
                            .map(|p| {
                                let k = &self.keys[place(p)..][..d];
                                let dot = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>();
                                let score = f64::from(scale) * dot;
                                soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                            })
                            .collect();
                        let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks.values[head].into());
                        let high = scores.iter().copied().fold(sink, f64::max);
                        let weights: Vec<f64> = scores.iter().map(|s| (s - high).exp()).collect();
                        let sum: f64 = (sink - high).exp() + weights.iter().sum::<f64>();
                        let mut result = vec![0.0; d];
                        for (p, weight) in (begin..=position).zip(&weights) {
                            for (result, &v) in result.iter_mut().zip(&self.values[place(p)..][..d]) {
                                *result += weight / sum * f64::from(v);
                            }
                        }
                        out.extend(result);
                    }
                }
            }
            out
        }
    }

    fn params(num_heads: usize, num_kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttentionParams {
        AttentionParams {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window,
            soft_cap: None,
        }
    }

    /// Weights are rounded to the element type before they meet the values, so a result that is a mean of values below 1 is off
    /// by up to that rounding whatever its own size; then comes the rounding of the result.
    fn check(device: &Arc<Device>, case: &Case, kernel: &AttentionPrefillSm80, what: &str) {
        let got = case.run(device, kernel, kernel.tile_rows());
        assert_close(&got, &case.reference(), step(case.dtype), step(case.dtype), what);
    }

    const LENGTHS: [(usize, usize); 9] =
        [(1, 0), (63, 0), (64, 0), (65, 0), (129, 0), (500, 0), (37, 91), (1, 200), (130, 64)];

    #[test]
    fn every_head_size_and_block_size_agrees_with_the_formula() {
        let Some(device) = test_device() else { return };
        for dtype in [DType::BF16, DType::F16] {
            for head_dim in HEAD_DIMS {
                let Ok(kernel) = AttentionPrefillSm80::new(&device, dtype, head_dim, false) else {
                    eprintln!("skipped: compute capability {}", device.arch);
                    return;
                };
                for block_size in [16, 32, 64, 128] {
                    let lengths = if block_size == 16 { &LENGTHS[..] } else { &[(70, 0), (33, 150)] };
                    let case = case(&device, dtype, params(2, 1, head_dim, None), block_size, lengths, 20);
                    check(&device, &case, &kernel, &format!("{dtype} D {head_dim} B {block_size}"));
                }
            }
        }
    }

    #[test]
    fn every_ratio_of_heads_agrees_with_the_formula() {
        let Some(device) = test_device() else { return };
        let Ok(kernel) = AttentionPrefillSm80::new(&device, DType::BF16, 64, false) else { return };
        for (heads, kv_heads) in [(1, 1), (4, 2), (6, 2), (8, 2), (5, 1), (14, 2), (8, 1), (16, 1), (3, 3)] {
            let case = case(&device, DType::BF16, params(heads, kv_heads, 64, None), 16, &[(65, 0), (20, 50)], 30);
            check(&device, &case, &kernel, &format!("H {heads} K {kv_heads}"));
        }
    }

    #[test]
    fn windows_hide_what_lies_before_them() {
        let Some(device) = test_device() else { return };
        for head_dim in [64, 128, 256] {
            let Ok(kernel) = AttentionPrefillSm80::new(&device, DType::F16, head_dim, false) else { return };
            for window in [1, 2, 31, 64, 100, 257, 5000] {
                let params = params(2, 1, head_dim, Some(window));
                let case = case(&device, DType::F16, params, 32, &[(300, 0), (5, 200), (129, 333)], 40);
                check(&device, &case, &kernel, &format!("D {head_dim} window {window}"));
            }
        }
    }

    /// Sinks above all scores and below; scores reach some 4, so that the smaller cap bends most of them.
    #[test]
    fn sinks_and_caps_agree_with_the_formula() {
        let Some(device) = test_device() else { return };
        for head_dim in HEAD_DIMS {
            for (soft_cap, has_sinks, window) in [
                (None, true, None),
                (None, true, Some(100)),
                (Some(1.5), false, None),
                (Some(50.0), false, Some(70)),
                (Some(2.0), true, Some(70)),
            ] {
                let is_capped = soft_cap.is_some();
                let Ok(kernel) = AttentionPrefillSm80::new(&device, DType::BF16, head_dim, is_capped) else { return };
                let params = AttentionParams { soft_cap, ..params(8, 2, head_dim, window) };
                let mut case = case(&device, DType::BF16, params, 32, &[(1, 0), (200, 0), (70, 95)], 45);
                case.sinks = has_sinks.then(|| {
                    let sinks: Vec<f32> = random(8, 46).iter().map(|x| 6.0 * x).collect();
                    Values::of(&device, DType::F32, &sinks)
                });
                check(&device, &case, &kernel, &format!("D {head_dim} cap {soft_cap:?} sinks {has_sinks} {window:?}"));
                let cut = case.run(&device, &kernel, 7);
                assert!(cut == case.run(&device, &kernel, kernel.tile_rows()), "D {head_dim}: other tiles");
            }
        }
    }

    /// Tiles of positions start at fixed multiples, and one of which a row sees nothing changes nothing.
    #[test]
    fn a_row_s_result_is_the_same_to_the_bit_however_rows_are_cut_into_tiles_and_chunks() {
        let Some(device) = test_device() else { return };
        for head_dim in HEAD_DIMS {
            for window in [None, Some(70)] {
                let Ok(kernel) = AttentionPrefillSm80::new(&device, DType::BF16, head_dim, false) else { return };
                let case = case(&device, DType::BF16, params(2, 1, head_dim, window), 16, &[(333, 17)], 50);
                let whole = case.run(&device, &kernel, kernel.tile_rows());
                for tile_rows in [1, 7, 16, 50, 64] {
                    let cut = case.run(&device, &kernel, tile_rows);
                    assert!(cut == whole, "D {head_dim} window {window:?} tiles of {tile_rows} rows");
                }
            }
        }
    }

    #[test]
    fn tiles_fit_the_shared_memory_of_their_chips() {
        for (major, minor) in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            for head_dim in HEAD_DIMS {
                let tiles = [false, true].map(|is_capped| tile(Arch { major, minor }, head_dim, is_capped));
                for Tile { rows, positions, warps } in tiles {
                    assert!((rows + 2 * positions) * head_dim * 2 <= 96 << 10, "{major}.{minor} {head_dim}");
                    assert_eq!(rows % (16 * warps), 0);
                }
                // Plans are made before it is known which.
                assert_eq!(tiles[0].rows, tiles[1].rows);
            }
        }
    }

    /// `cargo test --release -p dashinfer-kernels --features cuda bench_prefill_attention_sm80 -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn bench_prefill_attention_sm80() {
        let Some(device) = test_device() else { return };
        for (head_dim, heads, kv_heads) in
            [(64, 14, 2), (80, 32, 32), (96, 32, 32), (128, 28, 4), (192, 16, 4), (256, 16, 8)]
        {
            let (rows, block_size) = (8192, 16);
            let Ok(kernel) = AttentionPrefillSm80::new(&device, DType::BF16, head_dim, false) else { return };
            let params = params(heads, kv_heads, head_dim, None);
            let size = heads * head_dim * 2;
            let qkv = Values::random(&device, DType::BF16, rows * (heads + 2 * kv_heads) * head_dim, 60);
            let cache = [61, 62].map(|seed| Values::random(&device, DType::BF16, rows * kv_heads * head_dim, seed));
            let out = poisoned(&device, rows * size);
            let tiles: Vec<PrefillTile> = (0..rows)
                .step_by(kernel.tile_rows())
                .map(|row| PrefillTile {
                    first_row: row as u32,
                    num_rows: kernel.tile_rows() as u32,
                    position: row as u32,
                    first_block: 0,
                })
                .collect();
            let table: Vec<u32> = (0..(rows / block_size) as u32).map(|i| i * 5 % (rows / block_size) as u32).collect();
            let (tiles_on, table_on) = (upload(&device, bytemuck::cast_slice(&tiles)), words(&device, &table));
            let operands = PrefillOperands {
                out: (&out).into(),
                qkv: (&qkv.on_device).into(),
                cache: [(&cache[0].on_device).into(), (&cache[1].on_device).into()],
                tiles: (&tiles_on).into(),
                block_table: (&table_on).into(),
                sinks: None,
            };
            let took = time(&device, || kernel.run(&device, &operands, &params, [tiles.len(), rows, block_size]))
                .as_secs_f64();
            let flop = 4.0 * (head_dim * heads) as f64 * (rows * (rows + 1) / 2) as f64;
            println!(
                "attention_prefill_sm80/bf16/D{head_dim}_H{heads}_K{kv_heads}_L{rows}   {:.0} µs   {:.1} TFLOP/s   {}",
                took * 1e6,
                flop / took / 1e12,
                device.name
            );
        }
    }
}
