//! The products between heads and latent vectors on tensor cores, and keys and values made of latent vectors.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::ops::operand::{Span, count_u32, typed_kernel};
use crate::cuda::plan::{EXPANDED_BLOCK, EXPANDED_ROWS, PrefillTile};
use crate::cuda::units::Unit;
use crate::{DType, KernelError, LatentParams};

pub(crate) static UNIT: Unit =
    Unit { name: "latent_product.cu", source: include_str!("../../../../cuda/latent_product.cu") };

const OP: &str = "latent_attention";
/// Features of a step, and stages, as in the kernel.
const STEP: usize = 64;
const STAGES: usize = 3;

/// What a product is for (`EXPAND` of the kernel).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Between the heads of rows and latent vectors.
    Heads = 0,
    Keys = 1,
    Values = 2,
}

/// One compilation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Variant {
    purpose: Purpose,
    /// Rows and columns of a block, and how warps share them.
    tile: [usize; 2],
    warps: [usize; 2],
}

const FEW: Variant = Variant { purpose: Purpose::Heads, tile: [16, 64], warps: [1, 4] };
const SOME: Variant = Variant { purpose: Purpose::Heads, tile: [64, 64], warps: [2, 2] };
const MANY: Variant = Variant { purpose: Purpose::Heads, tile: [128, 128], warps: [2, 4] };
const KEYS: Variant = Variant { purpose: Purpose::Keys, ..MANY };
const VALUES: Variant = Variant { purpose: Purpose::Values, ..MANY };

/// Every compilation.
pub(crate) const VARIANTS: [Variant; 5] = [FEW, SOME, MANY, KEYS, VALUES];

impl Variant {
    /// The compiler's options.
    pub(crate) fn options(&self) -> [String; 5] {
        let Self { purpose, tile, warps } = *self;
        [
            format!("-DEXPAND={}", purpose as u32),
            format!("-DTILE_M={}", tile[0]),
            format!("-DTILE_N={}", tile[1]),
            format!("-DWARPS_M={}", warps[0]),
            format!("-DWARPS_N={}", warps[1]),
        ]
    }

    fn kernel(&self, device: &Arc<Device>, dtype: DType) -> Result<Kernel, KernelError> {
        let options = self.options();
        let kernel = typed_kernel(device, &UNIT, dtype, &options.each_ref().map(String::as_str), "latent_product")?;
        kernel.with_shared(self.shared())
    }

    fn shared(&self) -> u32 {
        (STAGES * (self.tile[0] + self.tile[1]) * STEP * 2) as u32
    }

    fn launch(&self, [rows, cols, heads]: [usize; 3]) -> Launch {
        let grid = [cols / self.tile[1], rows.div_ceil(self.tile[0]), heads].map(|count| count as u32);
        Launch { grid, block: (32 * self.warps[0] * self.warps[1]) as u32, shared: self.shared() }
    }
}

/// A product of each head with a matrix of its own: `out[t, h, n] = Σ_k x[t, h, k] · w[h, n, k]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) num_rows: usize,
    pub(crate) num_heads: usize,
    /// Columns of the output.
    pub(crate) num_n: usize,
    /// What a sum runs over: the first of `x_head` values of a head.
    pub(crate) num_k: usize,
    pub(crate) x_head: usize,
}

impl Heads {
    /// The addresses of `out`, `[T, H, N]`, `x`, `[T, H, x_head]`, and `w`, `[H, N, K]`.
    pub(super) fn checked(
        &self,
        op: &'static str,
        dtype: DType,
        [out, x, weight]: [Span<'_>; 3],
    ) -> Result<[u64; 3], KernelError> {
        let (size, rows) = (dtype.size_bytes(), self.num_rows * self.num_heads);
        Ok([
            out.holding(op, "values of the product", rows * self.num_n, size)?,
            x.holding(op, "values of x", rows * self.x_head, size)?,
            weight.holding(op, "weights of the heads", self.num_heads * self.num_n * self.num_k, size)?,
        ])
    }
}

/// `LatentProductParams` of `latent_product.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Params {
    out: u64,
    x: u64,
    w: u64,
    tiles: u64,
    block_table: u64,
    num_rows: u32,
    num_n: u32,
    num_k: u32,
    x_row: u32,
    x_head: u32,
    out_row: u32,
    out_head: u32,
    block_size: u32,
    rope_dim: u32,
    pad: u32,
}

/// What keys and values are made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expansion<'a> {
    /// One layer: `[num_blocks, B, C + R]`.
    pub(crate) cache: Span<'a>,
    pub(crate) block_size: usize,
    pub(crate) block_table: Span<'a>,
    /// [`PrefillTile`]s of up to [`EXPANDED_ROWS`] rows of what is made.
    pub(crate) tiles: Span<'a>,
    pub(crate) num_tiles: usize,
    /// All rows of what is made, whole blocks.
    pub(crate) num_rows: usize,
    /// The first head and how many there are.
    pub(crate) first_head: usize,
    pub(crate) num_heads: usize,
}

/// See `latent_product.cu`.
#[derive(Debug)]
pub(crate) struct Products {
    dtype: DType,
    few: Kernel,
    some: Kernel,
    many: Kernel,
}

impl Products {
    /// Whether there are kernels for it.
    pub(crate) fn supports(arch: Arch, dtype: DType, params: &LatentParams) -> bool {
        let sizes = [params.rank, params.nope_dim, params.v_dim];
        arch.number() >= 80
            && dtype != DType::F32
            && sizes.into_iter().all(|size| size > 0 && size.is_multiple_of(64))
            && params.rope_dim.is_multiple_of(8)
    }

    /// # Errors
    /// What compiling may say.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        let kernel = |variant: Variant| variant.kernel(device, dtype);
        Ok(Self { dtype, few: kernel(FEW)?, some: kernel(SOME)?, many: kernel(MANY)? })
    }

    /// Writes `out`, see [`Heads`]. Which kernel computes a row changes no bit of it.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn heads(&self, device: &Device, operands: [Span<'_>; 3], heads: &Heads) -> Result<(), KernelError> {
        let [out, x, w] = heads.checked(OP, self.dtype, operands)?;
        let Heads { num_rows, num_heads, num_n, num_k, x_head } = *heads;
        let (variant, kernel) = match num_rows {
            0..=32 => (FEW, &self.few),
            513.. if num_n.is_multiple_of(128) => (MANY, &self.many),
            _ => (SOME, &self.some),
        };
        let params = Params {
            out,
            x,
            w,
            tiles: 0,
            block_table: 0,
            num_rows: count_u32(OP, "rows", num_rows)?,
            num_n: count_u32(OP, "columns", num_n)?,
            num_k: count_u32(OP, "columns of x", num_k)?,
            x_row: count_u32(OP, "values of a row of x", num_heads * x_head)?,
            x_head: x_head as u32,
            out_row: count_u32(OP, "values of a row", num_heads * num_n)?,
            out_head: num_n as u32,
            block_size: 0,
            rope_dim: 0,
            pad: 0,
        };
        let launch = variant.launch([num_rows, num_n, num_heads]);
        // SAFETY: this is the kernel's parameter, and sizes were checked just now.
        unsafe { kernel.launch(device, launch, &mut Args::new().value(&params)) }
    }
}

/// Makes the keys and values of heads from latent vectors.
#[derive(Debug)]
pub(crate) struct Expand {
    dtype: DType,
    keys: Kernel,
    values: Kernel,
}

impl Expand {
    /// Whether there are kernels for it.
    pub(crate) fn supports(arch: Arch, dtype: DType, params: &LatentParams) -> bool {
        Products::supports(arch, dtype, params)
            && params.nope_dim.is_multiple_of(KEYS.tile[1])
            && params.v_dim.is_multiple_of(VALUES.tile[1])
    }

    /// # Errors
    /// What compiling may say.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { dtype, keys: KEYS.kernel(device, dtype)?, values: VALUES.kernel(device, dtype)? })
    }

    /// Values of keys and of values that [`run`](Self::run) makes.
    pub(crate) fn sizes(params: &LatentParams, num_rows: usize, num_heads: usize) -> [usize; 2] {
        [params.q_dim(), params.v_dim].map(|dim| num_rows * num_heads * dim)
    }

    /// Writes keys, `[blocks, heads, 64, N + R]`, and values, `[blocks, heads, 64, v_dim]`. `weights`: of all heads,
    /// see [`LatentHeads`](crate::LatentHeads).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn run(
        &self,
        device: &Device,
        [keys, values]: [Span<'_>; 2],
        weights: [Span<'_>; 2],
        from: &Expansion<'_>,
        params: &LatentParams,
    ) -> Result<(), KernelError> {
        let (size, rows) = (self.dtype.size_bytes(), from.num_rows);
        crate::error::check(OP, "rows of whole blocks", rows.next_multiple_of(EXPANDED_BLOCK), rows)?;
        let counts = Expand::sizes(params, rows, from.num_heads);
        let tile_bytes = size_of::<PrefillTile>();
        let outs = [("keys", keys, params.nope_dim, params.q_dim()), ("values", values, params.v_dim, params.v_dim)];
        for (index, (what, out, num_n, width)) in outs.into_iter().enumerate() {
            let (variant, kernel) = [(KEYS, &self.keys), (VALUES, &self.values)][index];
            let of_head = num_n * params.rank;
            let w = weights[index].holding(OP, "weights of the heads", params.num_heads * of_head, size)?;
            let launch_params = Params {
                out: out.holding(OP, what, counts[index], size)?,
                x: from.cache.holding(OP, "values of the cache", from.block_size * params.width(), size)?,
                w: w + (from.first_head * of_head * size) as u64,
                tiles: from.tiles.holding(OP, "tiles", from.num_tiles, tile_bytes)?,
                block_table: from.block_table.holding(OP, "block table", 1, 4)?,
                num_rows: count_u32(OP, "rows", rows)?,
                num_n: num_n as u32,
                num_k: params.rank as u32,
                x_row: params.width() as u32,
                x_head: 0,
                out_row: width as u32,
                out_head: from.num_heads as u32,
                block_size: from.block_size as u32,
                rope_dim: params.rope_dim as u32,
                pad: 0,
            };
            let launch = variant.launch([from.num_tiles * EXPANDED_ROWS, num_n, from.num_heads]);
            // SAFETY: this is the kernel's parameter; sizes were checked just now, and tiles are a plan's.
            unsafe { kernel.launch(device, launch, &mut Args::new().value(&launch_params))? };
        }
        Ok(())
    }
}
