//! Few rows: which tile of `linear_rows.cu` for which shape, and its launch.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use super::Operands;
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::ops::operand::typed_kernel;
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "linear_rows.cu", source: include_str!("../../../../cuda/linear_rows.cu") };

/// The macros of `linear_rows.cu`, by their names there. None of them changes a bit of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub(crate) tile_m: usize,
    pub(crate) row_groups: usize,
    pub(crate) row_warps: usize,
    pub(crate) k_warps: usize,
    pub(crate) cluster: usize,
    pub(crate) stages: usize,
    pub(crate) blocks_per_sm: usize,
    pub(crate) prefetch: Prefetch,
}

/// What a block has brought to L2 before it waits for its inputs. A hint, which changes no bit.
#[cfg_attr(not(test), expect(dead_code, reason = "no tile has it before `bench_linear_tiles` measured it"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Prefetch {
    None,
    /// The rest of its own weights, as far as `PREFETCH_KB` of each row.
    Own,
    /// Those of the block that is so many halves of a wave, of all blocks that run at once, further on.
    HalfWaves(usize),
}

/// KB of each row, at most: all of a row of 4096 values.
const PREFETCH_KB: usize = 8;

pub(super) const fn tile(shape: [usize; 7]) -> Tile {
    let [tile_m, row_groups, row_warps, k_warps, cluster, stages, blocks_per_sm] = shape;
    Tile { tile_m, row_groups, row_warps, k_warps, cluster, stages, blocks_per_sm, prefetch: Prefetch::None }
}

impl Tile {
    /// The same with another prefetch: `ROWS_8.with(Prefetch::Own)`.
    #[cfg(test)]
    pub(super) const fn with(self, prefetch: Prefetch) -> Self {
        Self { prefetch, ..self }
    }
}

/// Parts that K is cut into, and values of K in a unit: `PARTS` and `UNIT` of `linear_rows.cu`.
const PARTS: usize = 8;
const UNIT_K: usize = 64;

// rows of x, groups of 16 weight rows, warps beside each other, warps along K, blocks along K, stages, blocks per SM
const ROWS_8: Tile = tile([8, 1, 1, 8, 1, 4, 2]);
// A block to an SM has all its registers for loads on their way.
const ROWS_8_FEW: Tile = tile([8, 1, 1, 8, 1, 6, 1]);
const ROWS_8_MORE: Tile = tile([8, 1, 1, 8, 1, 3, 3]);
const ROWS_8_WIDE: Tile = tile([8, 2, 1, 8, 1, 2, 2]);
const ROWS_16: Tile = tile([16, 1, 1, 8, 1, 3, 2]);
const ROWS_16_WIDE: Tile = tile([16, 2, 1, 8, 1, 2, 2]);
const ROWS_32: Tile = tile([32, 1, 2, 4, 1, 2, 2]);
// With clusters: x is staged once for more weight rows, and there are blocks enough all the same.
const ROWS_32_CLUSTER: Tile = tile([32, 2, 2, 2, 4, 3, 3]);
const ROWS_64_CLUSTER: Tile = tile([64, 2, 4, 1, 8, 2, 3]);
// For SM100 and newer, where the compiler takes a few registers more.
const ROWS_64_SM100: Tile = tile([64, 1, 4, 1, 8, 2, 3]);

/// Every tile that [`tile_for`] may choose on `arch`.
pub(crate) fn tiles(arch: Arch) -> &'static [Tile] {
    if arch.number() >= 100 {
        &[ROWS_8, ROWS_8_FEW, ROWS_8_WIDE, ROWS_16, ROWS_16_WIDE, ROWS_32_CLUSTER, ROWS_64_SM100]
    } else if arch.number() >= 90 {
        &[ROWS_8, ROWS_8_FEW, ROWS_8_MORE, ROWS_8_WIDE, ROWS_16, ROWS_16_WIDE, ROWS_32_CLUSTER, ROWS_64_CLUSTER]
    } else {
        &[ROWS_8, ROWS_8_FEW, ROWS_8_MORE, ROWS_8_WIDE, ROWS_16, ROWS_16_WIDE, ROWS_32]
    }
}

/// The tile for `m` rows of x, `n` weight rows, and sums over `k`: by `bench_linear_tiles` on an H200.
///
/// Blocks that run at once should be all there are, or many times fewer: with two to an SM, 288 blocks (n = 4608) take a
/// second turn for the last 24. Loads far ahead pay unless a warp's share of K is a unit or two.
pub(crate) fn tile_for(arch: Arch, num_sms: u32, [m, n, k]: [usize; 3]) -> Tile {
    let blocks_per_sm = n.div_ceil(16).div_ceil(num_sms as usize);
    let short = k <= 2 * PARTS * UNIT_K;
    let (clusters, sm100) = (arch.number() >= 90, arch.number() >= 100);
    match (m, blocks_per_sm) {
        (0..=8, 0..=1) => ROWS_8_FEW,
        (0..=8, 2) => ROWS_8,
        // Half as many blocks, that fit nearly at once.
        (0..=8, 4..=8) if short => ROWS_8_WIDE,
        (0..=8, blocks) if !sm100 && (blocks == 3 || short) => ROWS_8_MORE,
        (0..=8, _) => ROWS_8,
        (9..=16, 0..=2) => ROWS_16,
        (9..=16, _) => ROWS_16_WIDE,
        (17..=32, _) if clusters => ROWS_32_CLUSTER,
        _ if sm100 => ROWS_64_SM100,
        _ if clusters => ROWS_64_CLUSTER,
        // For more rows too: the second tile finds the weights in L2.
        _ => ROWS_32,
    }
}

/// What a kernel is compiled for, beside the element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) tile: Tile,
    /// K % 8 == 0.
    pub(crate) aligned: bool,
    /// The result is f32, not T.
    pub(crate) out_f32: bool,
    pub(crate) gated: bool,
}

impl Variant {
    /// The compiler's options, without that of the element type.
    pub(crate) fn options(self) -> Vec<String> {
        let Tile { tile_m, row_groups, row_warps, k_warps, cluster, stages, blocks_per_sm, prefetch } = self.tile;
        let macros = [
            ("TILE_M", tile_m),
            ("ROW_GROUPS", row_groups),
            ("ROW_WARPS", row_warps),
            ("K_WARPS", k_warps),
            ("CLUSTER", cluster),
            ("STAGES", stages),
            // Loads of single values need more registers, and are slow anyway.
            ("BLOCKS_PER_SM", if self.aligned { blocks_per_sm } else { 1 }),
            ("PREFETCH", if prefetch == Prefetch::None { 0 } else { PREFETCH_KB }),
            ("ALIGNED", usize::from(self.aligned)),
            ("OUT_F32", usize::from(self.out_f32)),
            ("GATED", usize::from(self.gated)),
        ];
        macros.iter().map(|(name, value)| format!("-D{name}={value}")).collect()
    }
}

/// The kernels of one element type, each compiled at first use.
#[derive(Debug)]
pub(super) struct Rows {
    dtype: DType,
    kernels: Mutex<HashMap<Variant, Kernel>>,
}

impl Rows {
    pub(super) fn new(dtype: DType) -> Self {
        Self { dtype, kernels: Mutex::default() }
    }

    /// With [`tile_for`] the shape.
    ///
    /// # Safety
    /// As for [`run_with`](Self::run_with).
    pub(super) unsafe fn run(&self, device: &Arc<Device>, operands: &Operands, gated: bool) -> Result<(), KernelError> {
        let weight_rows = operands.n * if gated { 2 } else { 1 };
        let tile = tile_for(device.arch, device.num_sms, [operands.m, weight_rows, operands.k]);
        // SAFETY: the caller's promise.
        unsafe { self.run_with(device, operands, gated, tile) }
    }

    /// # Safety
    /// The operands are there in the sizes they name, and the device is current on this thread.
    pub(super) unsafe fn run_with(
        &self,
        device: &Arc<Device>,
        operands: &Operands,
        gated: bool,
        tile: Tile,
    ) -> Result<(), KernelError> {
        let &Operands { out, x, weight, bias_f32, m, n, k, out_dtype, .. } = operands;
        let aligned = k % 8 == 0 && x % 16 == 0 && weight % 16 == 0;
        let out_f32 = out_dtype == DType::F32;
        let kernel = self.kernel(device, Variant { tile, aligned, out_f32, gated })?;
        let cols = 16 * tile.row_groups * tile.row_warps / if gated { 2 } else { 1 };
        let blocks = n.div_ceil(cols) * m.div_ceil(tile.tile_m) * tile.cluster;
        let grid = i32::try_from(blocks).map_err(|_| KernelError::Shape {
            op: "linear",
            what: "tiles",
            wanted: i32::MAX as usize,
            found: blocks,
        })?;
        let block = (32 * tile.row_warps * tile.k_warps) as u32;
        let wave = tile.blocks_per_sm * device.num_sms as usize;
        let ahead = if let Prefetch::HalfWaves(halves) = tile.prefetch { halves * wave / 2 } else { 0 };
        let args = Args::new().ptr(out).ptr(x).ptr(weight).ptr(bias_f32);
        // Whole clusters ahead.
        let mut args = args.i32(m as i32).i32(n as i32).i32(k as i32).i32((ahead / tile.cluster * tile.cluster) as i32);
        // SAFETY: these are the kernel's parameters; the rest is the caller's promise.
        unsafe { kernel.launch(device, Launch { grid: [grid as u32, 1, 1], block, shared: 0 }, &mut args) }
    }

    fn kernel(&self, device: &Arc<Device>, variant: Variant) -> Result<Kernel, KernelError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        match kernels.entry(variant) {
            Entry::Occupied(kernel) => Ok(kernel.get().clone()),
            Entry::Vacant(slot) => {
                let options = variant.options();
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                Ok(slot.insert(typed_kernel(device, &UNIT, self.dtype, &options, "linear_rows")?).clone())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_sums_all_parts_within_the_shared_memory_of_a_block() {
        for arch in [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)].map(|(major, minor)| Arch { major, minor }) {
            for m in 1..=80 {
                for (n, k) in [(16, 896), (896, 4864), (4608, 3584), (9728, 896), (37888, 3584), (152_064, 896)] {
                    let tile = tile_for(arch, 132, [m, n, k]);
                    assert!(tiles(arch).contains(&tile), "{tile:?}");
                    assert!(tile.tile_m >= m.min(32));
                    assert_eq!(PARTS % (tile.k_warps * tile.cluster), 0);
                    assert!(tile.cluster == 1 || arch.number() >= 90);
                    let threads = 32 * tile.k_warps * tile.row_warps;
                    let x = tile.k_warps * tile.stages * tile.tile_m * 128;
                    let sums = tile.k_warps * tile.row_warps * tile.row_groups * tile.tile_m / 8 * 4 * 32 * 4;
                    assert!(threads <= 1024 && x.max(sums) <= 48 << 10, "{tile:?}");
                }
            }
        }
    }

    /// What was fastest, or within noise of it, on 132 SMs.
    #[test]
    fn the_layers_of_two_models_get_their_fastest_tiles() {
        let check = |n, k, of_8, of_16| {
            let tile = |m| tile_for(Arch::SM90, 132, [m, n, k]);
            assert_eq!([tile(1), tile(8), tile(9), tile(16)], [of_8, of_8, of_16, of_16], "{n} {k}");
        };
        check(4608, 3584, ROWS_8_MORE, ROWS_16_WIDE);
        check(3584, 3584, ROWS_8, ROWS_16);
        check(37888, 3584, ROWS_8, ROWS_16_WIDE);
        check(3584, 18944, ROWS_8, ROWS_16);
        check(1152, 896, ROWS_8_FEW, ROWS_16);
        check(896, 896, ROWS_8_FEW, ROWS_16);
        check(9728, 896, ROWS_8_WIDE, ROWS_16_WIDE);
        check(896, 4864, ROWS_8_FEW, ROWS_16);
        check(151_936, 896, ROWS_8_MORE, ROWS_16_WIDE);
    }
}
