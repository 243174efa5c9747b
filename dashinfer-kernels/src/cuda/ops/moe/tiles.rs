//! The products of all experts: which tile for how many rows, and its launch.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::activation::{Clamp, OPTIONS, number};
use super::super::operand::{Span, count_u32, typed_kernel};
use super::packed::{Packed, expert_bytes, option};
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{Activation, DType, KernelError};

pub(crate) static SM80: Unit =
    Unit { name: "moe_tiles_sm80.cu", source: include_str!("../../../../cuda/moe_tiles_sm80.cu") };
pub(crate) static SM90: Unit =
    Unit { name: "moe_tiles_sm90.cu", source: include_str!("../../../../cuda/moe_tiles_sm90.cu") };

const OP: &str = "experts";

/// Rows of the smallest tile.
pub(super) const LEAST_ROWS: usize = 16;

/// A kernel, and its macros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tile {
    /// `moe_tiles_sm80.cu`. None of its macros changes a bit of the result.
    Sm80 { tile_n: usize, warps_n: usize, stages: usize },
    /// `moe_tiles_sm90.cu`.
    Sm90 { tile_n: usize, groups: usize, stages: usize },
}

const fn sm80(tile_n: usize, warps_n: usize, stages: usize) -> Tile {
    Tile::Sm80 { tile_n, warps_n, stages }
}

const fn sm90(tile_n: usize, groups: usize, stages: usize) -> Tile {
    Tile::Sm90 { tile_n, groups, stages }
}

/// With ascending rows. Two blocks share a multiprocessor of SM80; one with 128 rows for itself was slower.
pub(crate) const SM80_TILES: [Tile; 2] = [sm80(16, 1, 4), sm80(64, 1, 3)];
/// With ascending rows. Stages fill the shared memory of a multiprocessor.
pub(crate) const SM90_TILES: [Tile; 4] = [sm90(16, 1, 12), sm90(32, 1, 11), sm90(64, 1, 9), sm90(128, 2, 4)];

/// Every tile that [`tile_for`] may choose on `arch`.
#[cfg(test)]
fn tiles(arch: Arch) -> &'static [Tile] {
    if arch == Arch::SM90 { &SM90_TILES } else { &SM80_TILES }
}

/// The tile for `pairs` rows of `num_experts` experts. `rows_alone`: one whose bits do not depend on how many rows there are.
///
/// An expert with more rows than a tile has its weights read again, from L2; one with fewer costs products of nothing, which matter
/// where arithmetic is the limit. Rows of an expert scatter about their mean by its root and more, so tiles leave room. By `bench_moe` on
/// an H200, gate and up of Qwen3-30B-A3B (128 experts, 8 of a token), in µs:
///
/// | rows | mean | 16 | 32 | 64 | 128 |
/// |---|---|---|---|---|---|
/// | 8 | 0.5 | 75.9 | 75.7 | 75.9 | |
/// | 64 | 4 | 180 | 181 | 183 | |
/// | 256 | 16 | 220 | 189 | 189 | 196 |
/// | 1024 | 64 | | 316 | 242 | 209 |
/// | 8192 | 512 | | 1840 | 1173 | 824 |
pub(crate) fn tile_for(arch: Arch, pairs: usize, num_experts: usize, rows_alone: bool) -> Tile {
    let mean = pairs.div_ceil(num_experts.max(1));
    if arch == Arch::SM90 {
        let [of_16, of_32, of_64, of_128] = SM90_TILES;
        return match mean {
            _ if rows_alone => of_64,
            0..=6 => of_16,
            7..=18 => of_32,
            19..=40 => of_64,
            _ => of_128,
        };
    }
    let [of_16, of_64] = SM80_TILES;
    if mean <= 6 { of_16 } else { of_64 }
}

/// Tiles of `tile_rows` rows that `pairs` rows make at most, however they fall on the experts.
pub(super) fn most_tiles(pairs: usize, num_experts: usize, tile_rows: usize) -> usize {
    pairs.min((pairs / tile_rows).saturating_add(num_experts))
}

impl Tile {
    /// Rows of a tile, at most.
    pub(crate) fn rows(self) -> usize {
        match self {
            Self::Sm80 { tile_n, .. } | Self::Sm90 { tile_n, .. } => tile_n,
        }
    }

    /// The compiler's options, without that of the element type. `gated`: of gates and ups, with one of [`OPTIONS`].
    pub(crate) fn options(self, gated: Option<usize>) -> Vec<String> {
        let [tile_n, second, stages] = match self {
            Self::Sm80 { tile_n, warps_n, stages } => [tile_n, warps_n, stages],
            Self::Sm90 { tile_n, groups, stages } => [tile_n, groups, stages],
        };
        let name = if matches!(self, Self::Sm80 { .. }) { "WARPS_N" } else { "GROUPS" };
        let macros = [("TILE_N", tile_n), (name, second), ("STAGES", stages)];
        let options = macros.iter().map(|(name, value)| format!("-D{name}={value}"));
        let function = gated.map(|number| OPTIONS[number].to_owned());
        options.chain([option(gated.is_some()).to_owned()]).chain(function).collect()
    }

    fn unit(self) -> (&'static Unit, &'static str) {
        match self {
            Self::Sm80 { .. } => (&SM80, "moe_tiles_sm80"),
            Self::Sm90 { .. } => (&SM90, "moe_tiles_sm90"),
        }
    }

    /// Blocks of 128 weight rows that a block of the kernel takes at once.
    fn blocks_at_once(self) -> usize {
        match self {
            Self::Sm80 { .. } => 1,
            Self::Sm90 { groups, .. } => groups,
        }
    }

    fn threads(self) -> usize {
        match self {
            Self::Sm80 { warps_n, .. } => 128 * warps_n,
            Self::Sm90 { groups, .. } => 128 * (groups + 1),
        }
    }

    /// Of weights and rows in all stages; of results, which several warpgroups write from there; of barriers, and what aligns
    /// them to 1024.
    fn shared_bytes(self) -> usize {
        match self {
            Self::Sm80 { tile_n, stages, .. } => stages * (128 + tile_n) * 128,
            Self::Sm90 { tile_n, groups, stages } => {
                let results = if groups > 1 { groups * tile_n * 128 } else { 0 };
                stages * ((128 * groups + tile_n) * 128 + 16) + results + 1024
            }
        }
    }

    fn blocks_per_sm(self) -> usize {
        if matches!(self, Self::Sm80 { .. }) { 2 } else { 1 }
    }
}

/// Rows to be multiplied, sorted by expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product<'a> {
    /// `[num_rows, N]`
    pub(super) out: Span<'a>,
    /// `[x_len, K]`
    pub(super) x: Span<'a>,
    /// `[num_rows]`: which row of x; `None`: the same.
    pub(super) x_rows: Option<Span<'a>>,
    pub(super) x_len: usize,
    pub(super) num_rows: usize,
    pub(super) tiles: Span<'a>,
    pub(super) num_tiles: Span<'a>,
    /// On gates and ups.
    pub(super) activation: Activation,
    /// Whether the launch before this one is another product of the same lists: then weights need not wait for its end.
    pub(super) is_second: bool,
}

/// The kernels of one element type, each compiled at first use.
#[derive(Debug)]
pub(super) struct Tiles {
    dtype: DType,
    kernels: Mutex<HashMap<(Tile, Option<usize>), Kernel>>,
}

impl Tiles {
    pub(super) fn new(dtype: DType) -> Self {
        Self { dtype, kernels: Mutex::default() }
    }

    /// `out[r] = weights of r's expert · x[x_rows[r]]`, gated if the weights are. The lists of tiles, of `tile.rows()` rows, are
    /// those of [`Route`](super::route::Route).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(super) fn run(
        &self,
        device: &Arc<Device>,
        product: &Product<'_>,
        weights: &Packed,
        tile: Tile,
    ) -> Result<(), KernelError> {
        let &Packed { num_experts, num_cols, num_k, gated, .. } = weights;
        let &Product { out, x, x_rows, x_len, num_rows, .. } = product;
        let size = self.dtype.size_bytes();
        let most = most_tiles(num_rows, num_experts, tile.rows());
        let blocks = num_cols.div_ceil(if gated { 64 } else { 128 }).div_ceil(tile.blocks_at_once());
        // Numbers of items, and of the pieces of x, are of 32 bits in the kernel.
        count_u32(OP, "items of a product", most.saturating_mul(blocks))?;
        let rows = |rows: Span<'_>| rows.holding(OP, "rows of x", num_rows, 4);
        let bias_rows = if gated { 2 * num_cols } else { num_cols };
        let bias = match &weights.bias {
            Some(bias) => Span::from(bias).holding(OP, "biases", num_experts * bias_rows, 4)?,
            None => 0,
        };
        let packed = Span::from(&weights.weights);
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the rows", num_rows.saturating_mul(num_cols), size)?)
            .ptr(x.holding(OP, "values of x", x_len.saturating_mul(num_k), size)?)
            .ptr(x_rows.map(rows).transpose()?.unwrap_or(0))
            .ptr(packed.holding(OP, "weights", num_experts * expert_bytes(num_cols, num_k, gated), 1)?)
            .ptr(bias)
            .ptr(product.tiles.holding(OP, "tiles", most, 16)?)
            .ptr(product.num_tiles.holding(OP, "numbers of tiles", 1, 4)?)
            .u32(count_u32(OP, "columns", num_cols)?)
            .u32(count_u32(OP, "columns of x", num_k)?)
            .value(&Clamp::from(product.activation));
        if matches!(tile, Tile::Sm90 { .. }) {
            args = args.u32(u32::from(product.is_second));
        }
        let wave = device.num_sms as usize * tile.blocks_per_sm();
        let grid = count_u32(OP, "blocks", wave.min(most * blocks))?;
        let (block, shared) = (tile.threads() as u32, tile.shared_bytes() as u32);
        let kernel = self.kernel(device, tile, gated.then(|| number(product.activation)))?;
        // SAFETY: these are the kernel's parameters; sizes were checked above, and the lists name rows and tokens below these sizes.
        unsafe { kernel.launch(device, Launch { grid: [grid, 1, 1], block, shared }, &mut args) }
    }

    fn kernel(&self, device: &Arc<Device>, tile: Tile, gated: Option<usize>) -> Result<Kernel, KernelError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        match kernels.entry((tile, gated)) {
            Entry::Occupied(kernel) => Ok(kernel.get().clone()),
            Entry::Vacant(slot) => {
                let options = tile.options(gated);
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                let (unit, name) = tile.unit();
                let kernel = typed_kernel(device, unit, self.dtype, &options, name)?;
                Ok(slot.insert(kernel.with_shared(tile.shared_bytes() as u32)?).clone())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_shared_memory_and_grow_with_the_rows() {
        for (arch, most) in
            [(Arch::SM80, 163 << 10), (Arch::SM89, 99 << 10), (Arch::SM90, 227 << 10), (Arch::SM120, 99 << 10)]
        {
            let mut last = 0;
            for mean in [0, 1, 4, 6, 7, 16, 18, 19, 40, 48, 49, 512] {
                let tile = tile_for(arch, 128 * mean, 128, false);
                assert!(tiles(arch).contains(&tile) && tile.rows() >= last.min(mean).max(LEAST_ROWS), "{tile:?}");
                assert!(tile.shared_bytes() <= most, "{tile:?} {}", tile.shared_bytes());
                last = tile.rows();
            }
            let alone = |pairs| tile_for(arch, pairs, 128, true);
            assert!(arch != Arch::SM90 || alone(1) == alone(70_000));
        }
    }

    #[test]
    fn there_is_room_for_every_list_of_tiles() {
        // Each expert's last tile may be partly empty, if it has rows at all.
        let tiles = |counts: &[usize], rows: usize| counts.iter().map(|count| count.div_ceil(rows)).sum::<usize>();
        for counts in [vec![1; 128], vec![17; 8], vec![0, 0, 1000], vec![64, 1, 0, 129]] {
            for rows in [16, 32, 64, 128] {
                assert!(tiles(&counts, rows) <= most_tiles(counts.iter().sum(), counts.len(), rows));
            }
        }
    }
}
