//! A mixture of experts: routing, the products of the chosen experts, and the sum of their results.
//!
//! Who is chosen is known on the device alone, so nothing here depends on it: lists have room for the worst case, and blocks walk as
//! many items as the device counted. A step of few rows can be recorded like any other.

#[cfg(test)]
mod bench;
pub(crate) mod packed;
pub(crate) mod route;
#[cfg(test)]
mod tests;
pub(crate) mod tiles;

use std::sync::{Arc, Mutex, PoisonError};

use super::operand::{Span, count_u32, threads_for, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::memory::Buffer;
use crate::cuda::units::Unit;
use crate::error::check;
use crate::{Activation, DType, KernelError, Routing};

use packed::CudaExperts;
use route::Route;
use tiles::{Product, Tile, Tiles, tile_for};

pub(crate) static COMBINE: Unit = Unit { name: "moe_combine.cu", source: include_str!("../../../cuda/moe_combine.cu") };

const OP: &str = "experts";

/// What routing leaves for the products, and what they leave for each other, for steps of up to `max_rows` rows.
#[derive(Debug)]
pub struct CudaExpertScratch {
    max_rows: usize,
    num_experts: usize,
    top_k: usize,
    hidden: usize,
    inner: usize,
    /// Sections of 4-byte values: [`Section`].
    lists: Buffer,
    /// `[max_rows · top_k, F]`: gated rows, sorted by expert.
    gated: Buffer,
    /// `[max_rows · top_k, E]`: results of these rows.
    results: Buffer,
}

/// The lists in a scratch; P rows are `max_rows · top_k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    /// How many tiles there are, alone in its cache line.
    NumTiles,
    /// `[P]`: the experts of each token, ascending.
    Experts,
    /// `[P]`: their weights.
    Weights,
    /// `[P]`: where the row of each of them is.
    RowOf,
    /// `[P]`: the token of each row.
    TokenOf,
    /// Tiles, four values each.
    Tiles,
}

impl CudaExpertScratch {
    pub(crate) fn new(
        device: &Arc<Device>,
        dtype: DType,
        max_rows: usize,
        [hidden, inner]: [usize; 2],
        routing: &Routing,
    ) -> Result<Self, KernelError> {
        const OP: &str = "expert_scratch";
        let Routing { num_experts, top_k, .. } = *routing;
        route::check(OP, routing)?;
        let pairs = max_rows.saturating_mul(top_k);
        for (what, values) in [("rows of experts", pairs), ("features", hidden), ("features of an expert", inner)] {
            count_u32(OP, what, values)?;
        }
        let [lists, gated, results] = sizes(dtype, max_rows, [hidden, inner], routing);
        Ok(Self {
            max_rows,
            num_experts,
            top_k,
            hidden,
            inner,
            lists: device.alloc("lists of experts", lists)?,
            gated: device.alloc("activations of experts", gated)?,
            results: device.alloc("results of experts", results)?,
        })
    }

    fn section(&self, section: Section) -> Result<Span<'_>, KernelError> {
        Span::from(&self.lists).rest(4 * section_start(section, self.max_rows * self.top_k))
    }
}

/// Bytes of what experts work in, for steps of up to `max_rows` rows.
#[must_use]
pub fn expert_bytes(max_rows: usize, hidden: usize, inner: usize, dtype: DType, routing: &Routing) -> usize {
    sizes(dtype, max_rows, [hidden, inner], routing).into_iter().fold(0, usize::saturating_add)
}

/// Of lists, gated rows and results.
fn sizes(dtype: DType, max_rows: usize, [hidden, inner]: [usize; 2], routing: &Routing) -> [usize; 3] {
    let pairs = max_rows.saturating_mul(routing.top_k).min(u32::MAX as usize);
    let most = tiles::most_tiles(pairs, routing.num_experts, tiles::LEAST_ROWS);
    let bytes = |cols: usize| pairs.saturating_mul(cols).saturating_mul(dtype.size_bytes());
    [4 * (section_start(Section::Tiles, pairs) + 4 * most), bytes(inner), bytes(hidden)]
}

/// In values, each section at a multiple of 64.
fn section_start(section: Section, pairs: usize) -> usize {
    let pairs = pairs.next_multiple_of(64);
    match section {
        Section::NumTiles => 0,
        Section::Experts => 64,
        Section::Weights => 64 + pairs,
        Section::RowOf => 64 + 2 * pairs,
        Section::TokenOf => 64 + 3 * pairs,
        Section::Tiles => 64 + 4 * pairs,
    }
}

/// What a layer of experts reads and writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// `[num_rows, E]`
    pub(crate) out: Span<'a>,
    /// `[num_rows, E]`
    pub(crate) x: Span<'a>,
    /// `[num_rows, N]` in f32.
    pub(crate) logits: Span<'a>,
    /// `[N]` in f32.
    pub(crate) correction: Option<Span<'a>>,
    pub(crate) activation: Activation,
    pub(crate) num_rows: usize,
}

/// The kernels of one element type, each compiled at first use: few models have experts.
#[derive(Debug)]
pub(crate) struct Moe {
    device: Arc<Device>,
    dtype: DType,
    /// Whether a row's bits must not depend on how many rows there are.
    rows_alone: bool,
    /// Whether weights of down are brought while gate and up are still computed.
    early: bool,
    route: Route,
    tiles: Tiles,
    combine: Mutex<Option<[Kernel; 2]>>,
}

impl Moe {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType, rows_alone: bool) -> Self {
        Self {
            device: Arc::clone(device),
            dtype,
            rows_alone,
            early: false,
            route: Route::new(),
            tiles: Tiles::new(dtype),
            combine: Mutex::default(),
        }
    }

    /// Whether there are kernels for this device and type.
    pub(crate) fn is_supported(device: &Device, dtype: DType) -> bool {
        device.arch.number() >= 80 && dtype != DType::F32
    }

    /// # Errors
    /// [`KernelError::Unsupported`] unless [`is_supported`](Self::is_supported).
    pub(crate) fn check_supported(&self, op: &'static str) -> Result<(), KernelError> {
        if Self::is_supported(&self.device, self.dtype) {
            return Ok(());
        }
        let what = format!("a mixture of experts in {} on {}", self.dtype, self.device.arch);
        Err(KernelError::Unsupported { op, what, backend: "cuda" })
    }

    /// See [`Backend::experts`](crate::Backend::experts).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if operands do not fit each other, [`KernelError::Unsupported`] for what the kernels do not have.
    pub(crate) fn run(
        &self,
        operands: &Operands<'_>,
        experts: &CudaExperts,
        routing: &Routing,
        scratch: &mut CudaExpertScratch,
    ) -> Result<(), KernelError> {
        let pairs = operands.num_rows * routing.top_k;
        let tile = tile_for(self.device.arch, pairs, routing.num_experts, self.rows_alone);
        self.run_with(operands, experts, routing, scratch, tile)
    }

    fn run_with(
        &self,
        operands: &Operands<'_>,
        experts: &CudaExperts,
        routing: &Routing,
        scratch: &mut CudaExpertScratch,
        tile: Tile,
    ) -> Result<(), KernelError> {
        self.check(operands, experts, routing, scratch)?;
        if operands.num_rows == 0 {
            return Ok(());
        }
        self.route(operands, routing, scratch, tile)?;
        self.gate_up(operands, experts, scratch, tile)?;
        self.down(operands, experts, scratch, tile, self.early)?;
        self.combine(operands, scratch)
    }

    fn check(
        &self,
        operands: &Operands<'_>,
        experts: &CudaExperts,
        routing: &Routing,
        scratch: &CudaExpertScratch,
    ) -> Result<(), KernelError> {
        self.check_supported(OP)?;
        route::check(OP, routing)?;
        check(OP, "experts of the layer", routing.num_experts, experts.num_experts)?;
        check(OP, "experts that the scratch is for", routing.num_experts, scratch.num_experts)?;
        check(OP, "experts of a token that the scratch is for", routing.top_k, scratch.top_k)?;
        check(OP, "features that the scratch is for", experts.hidden, scratch.hidden)?;
        check(OP, "features of an expert that the scratch is for", experts.inner, scratch.inner)?;
        if operands.num_rows > scratch.max_rows {
            let (wanted, found) = (operands.num_rows, scratch.max_rows);
            return Err(KernelError::Shape { op: OP, what: "rows that the scratch is for", wanted, found });
        }
        let (size, values) = (self.dtype.size_bytes(), operands.num_rows * experts.hidden);
        for (what, span) in [("values of the output", operands.out), ("values of x", operands.x)] {
            let address = span.holding(OP, what, values, size)?;
            check(OP, "alignment of the rows", 0, (address % 16) as usize)?;
        }
        Ok(())
    }

    /// Who is chosen, and the rows and tiles that follow.
    fn route(
        &self,
        operands: &Operands<'_>,
        routing: &Routing,
        scratch: &CudaExpertScratch,
        tile: Tile,
    ) -> Result<(), KernelError> {
        let lists = route::Lists {
            experts: scratch.section(Section::Experts)?,
            weights: scratch.section(Section::Weights)?,
            row_of: scratch.section(Section::RowOf)?,
            token_of: scratch.section(Section::TokenOf)?,
            tiles: scratch.section(Section::Tiles)?,
            num_tiles: scratch.section(Section::NumTiles)?,
        };
        let logits = (operands.logits, operands.correction);
        self.route.run(&self.device, &lists, logits, routing, [operands.num_rows, tile.rows()])
    }

    /// `gated[r] = f(gate · x, up · x)` of the row's token and expert.
    fn gate_up(
        &self,
        operands: &Operands<'_>,
        experts: &CudaExperts,
        scratch: &CudaExpertScratch,
        tile: Tile,
    ) -> Result<(), KernelError> {
        let product = Product {
            out: (&scratch.gated).into(),
            x: operands.x,
            x_rows: Some(scratch.section(Section::TokenOf)?),
            x_len: operands.num_rows,
            num_rows: operands.num_rows * scratch.top_k,
            tiles: scratch.section(Section::Tiles)?,
            num_tiles: scratch.section(Section::NumTiles)?,
            activation: operands.activation,
            is_second: false,
        };
        self.tiles.run(&self.device, &product, &experts.gate_up, tile)
    }

    /// `results[r] = down · gated[r]`. `is_second`: right behind [`gate_up`](Self::gate_up).
    fn down(
        &self,
        operands: &Operands<'_>,
        experts: &CudaExperts,
        scratch: &CudaExpertScratch,
        tile: Tile,
        is_second: bool,
    ) -> Result<(), KernelError> {
        let num_rows = operands.num_rows * scratch.top_k;
        let product = Product {
            out: (&scratch.results).into(),
            x: (&scratch.gated).into(),
            x_rows: None,
            x_len: num_rows,
            num_rows,
            tiles: scratch.section(Section::Tiles)?,
            num_tiles: scratch.section(Section::NumTiles)?,
            activation: operands.activation,
            is_second,
        };
        self.tiles.run(&self.device, &product, &experts.down, tile)
    }

    /// `out[t] = Σ weight · results[row]`.
    fn combine(&self, operands: &Operands<'_>, scratch: &CudaExpertScratch) -> Result<(), KernelError> {
        let (num_rows, hidden, top_k) = (operands.num_rows, scratch.hidden, scratch.top_k);
        let (pairs, size) = (num_rows * top_k, self.dtype.size_bytes());
        let mut args = Args::new()
            .ptr(operands.out.holding(OP, "values of the output", num_rows * hidden, size)?)
            .ptr(Span::from(&scratch.results).holding(OP, "results", pairs * hidden, size)?)
            .ptr(scratch.section(Section::RowOf)?.holding(OP, "rows", pairs, 4)?)
            .ptr(scratch.section(Section::Weights)?.holding(OP, "weights", pairs, 4)?)
            .u32(count_u32(OP, "columns", hidden)?)
            .u32(count_u32(OP, "experts of a token", top_k)?);
        let [combine, _] = self.row_kernels()?;
        // SAFETY: these are the kernel's parameters; sizes were checked above, and the rows are below `pairs`.
        unsafe { combine.launch(&self.device, row_launch(num_rows, hidden)?, &mut args) }
    }

    /// `out[t] += sigmoid(gate[t]) · x[t]`; `out`, `x`: `[num_rows, cols]`; `gate`: `[num_rows]` in f32.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small or `cols` is no multiple of 8.
    pub(crate) fn add_gated(
        &self,
        out: Span<'_>,
        x: Span<'_>,
        gate: Option<Span<'_>>,
        [num_rows, cols]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "add_gated";
        self.check_supported(OP)?;
        check(OP, "columns, in whole eights", cols.next_multiple_of(8), cols)?;
        let size = self.dtype.size_bytes();
        let gate = gate.map(|gate| gate.holding(OP, "gates", num_rows, 4)).transpose()?.unwrap_or(0);
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", num_rows * cols, size)?)
            .ptr(x.holding(OP, "values of x", num_rows * cols, size)?)
            .ptr(gate)
            .u32(count_u32(OP, "columns", cols)?);
        let [_, add] = self.row_kernels()?;
        // SAFETY: these are the kernel's parameters; sizes were checked above.
        unsafe { add.launch(&self.device, row_launch(num_rows, cols)?, &mut args) }
    }

    /// Combining, and adding.
    fn row_kernels(&self) -> Result<[Kernel; 2], KernelError> {
        let mut kernels = self.combine.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = &*kernels {
            return Ok(kernels.clone());
        }
        let kernel = |name| typed_kernel(&self.device, &COMBINE, self.dtype, &[], name);
        Ok(kernels.insert([kernel("moe_combine")?, kernel("moe_add")?]).clone())
    }
}

/// A block for each row and 8 columns of each of its threads.
fn row_launch(num_rows: usize, cols: usize) -> Result<Launch, KernelError> {
    let block = threads_for(cols, 8, 256);
    let parts = count_u32(OP, "columns", cols.div_ceil(8 * block as usize))?;
    Ok(Launch { grid: [count_u32(OP, "rows", num_rows)?, parts, 1], block, shared: 0 })
}
