//! Who is chosen, and the order of rows that follows from it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::NoUninit;

use super::super::operand::{Span, count_u32, typed_kernel};
use super::tiles::most_tiles;
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, GroupScore, KernelError, Routing, Scoring};

pub(crate) static UNIT: Unit = Unit { name: "moe_route.cu", source: include_str!("../../../../cuda/moe_route.cu") };

const OP: &str = "experts";

/// Experts that a lane of a warp looks after, at most: the kernels that there are.
pub(crate) const PER_LANE: [usize; 4] = [2, 4, 8, 16];
/// A token's experts are kept by the lanes of a warp, as are the groups.
const LANES: usize = 32;
/// Up to so many tokens are routed and sorted by one block.
const FEW_TOKENS: usize = 64;

/// The macro for `per_lane` experts to a lane.
pub(crate) fn option(per_lane: usize) -> String {
    format!("-DPER_LANE={per_lane}")
}

/// Threads of a block that sorts, as in the kernel.
fn threads(per_lane: usize) -> u32 {
    if per_lane > 8 { 512 } else { 1024 }
}

/// Whether it can be done at all, and with these kernels.
///
/// # Errors
/// [`KernelError::Shape`], and [`KernelError::Unsupported`] for more than 512 experts, or 32 of a token, or 32 groups.
pub(crate) fn check(op: &'static str, routing: &Routing) -> Result<(), KernelError> {
    routing.check(op)?;
    let num_groups = routing.groups.map_or(0, |groups| groups.num_groups);
    let most = PER_LANE[PER_LANE.len() - 1] * LANES;
    if routing.num_experts <= most && routing.top_k <= LANES && num_groups <= LANES {
        return Ok(());
    }
    let what = format!("{} of {} experts in {num_groups} groups", routing.top_k, routing.num_experts);
    Err(KernelError::Unsupported { op, what, backend: "cuda" })
}

/// What the kernels write; `P` is rows times `top_k`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lists<'a> {
    /// `[P]`
    pub(crate) experts: Span<'a>,
    /// `[P]`
    pub(crate) weights: Span<'a>,
    /// `[P]`
    pub(crate) row_of: Span<'a>,
    /// `[P]`
    pub(crate) token_of: Span<'a>,
    /// As many as there can be.
    pub(crate) tiles: Span<'a>,
    /// One.
    pub(crate) num_tiles: Span<'a>,
}

/// `RouteParams` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
struct RouteParams {
    num_tokens: u32,
    num_experts: u32,
    top_k: u32,
    sigmoid: u32,
    normalize: u32,
    num_groups: u32,
    top_groups: u32,
    top_two: u32,
    scale: f32,
}

/// `DispatchParams` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
struct DispatchParams {
    num_pairs: u32,
    num_experts: u32,
    top_k: u32,
    tile_rows: u32,
    row_of: u64,
    token_of: u64,
    tiles: u64,
    num_tiles: u64,
}

/// The two kernels, for each number of experts to a lane.
#[derive(Debug)]
pub(super) struct Route {
    kernels: Mutex<HashMap<usize, [Kernel; 2]>>,
}

impl Route {
    pub(super) fn new() -> Self {
        Self { kernels: Mutex::default() }
    }

    /// Routes `num_tokens` tokens, and sorts their rows into tiles of up to `tile_rows`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, and those of [`check`].
    pub(super) fn run(
        &self,
        device: &Arc<Device>,
        lists: &Lists<'_>,
        (logits, correction): (Span<'_>, Option<Span<'_>>),
        routing: &Routing,
        [num_tokens, tile_rows]: [usize; 2],
    ) -> Result<(), KernelError> {
        check(OP, routing)?;
        let Routing { num_experts, top_k, .. } = *routing;
        let pairs = num_tokens.saturating_mul(top_k);
        let per_lane = PER_LANE.into_iter().find(|per_lane| per_lane * LANES >= num_experts).unwrap_or(0);
        let count = |what, count| count_u32(OP, what, count);
        let groups = routing.groups;
        let params = RouteParams {
            num_tokens: count("rows", num_tokens)?,
            num_experts: count("experts", num_experts)?,
            top_k: count("experts of a token", top_k)?,
            sigmoid: u32::from(routing.scoring == Scoring::Sigmoid),
            normalize: u32::from(routing.normalize),
            num_groups: count("groups", groups.map_or(0, |groups| groups.num_groups))?,
            top_groups: count("groups", groups.map_or(0, |groups| groups.top_groups))?,
            top_two: u32::from(groups.is_some_and(|groups| groups.score == GroupScore::TopTwo)),
            scale: routing.scale,
        };
        let most = most_tiles(pairs, num_experts, tile_rows);
        let then = DispatchParams {
            num_pairs: count("rows of experts", pairs)?,
            num_experts: params.num_experts,
            top_k: params.top_k,
            tile_rows: count("rows of a tile", tile_rows)?,
            row_of: lists.row_of.holding(OP, "rows", pairs, 4)?,
            token_of: lists.token_of.holding(OP, "tokens", pairs, 4)?,
            tiles: lists.tiles.holding(OP, "tiles", most, 16)?,
            num_tiles: lists.num_tiles.holding(OP, "numbers of tiles", 1, 4)?,
        };
        let experts = lists.experts.holding(OP, "experts", pairs, 4)?;
        let correction = correction
            .map(|correction| correction.holding(OP, "values of the correction", num_experts, 4))
            .transpose()?
            .unwrap_or(0);
        let threads = threads(per_lane);
        let shared = (threads / 32 + 3) * params.num_experts * 4;
        let few = num_tokens <= FEW_TOKENS;
        let launch = if few {
            Launch { grid: [1, 1, 1], block: threads, shared }
        } else {
            Launch { grid: [params.num_tokens.div_ceil(8), 1, 1], block: 256, shared: 0 }
        };
        let [route, dispatch] = self.kernels(device, per_lane, shared)?;
        let mut args = Args::new()
            .ptr(experts)
            .ptr(lists.weights.holding(OP, "weights", pairs, 4)?)
            .ptr(logits.holding(OP, "logits", num_tokens.saturating_mul(num_experts), 4)?)
            .ptr(correction)
            .value(&params)
            .value(&then)
            .u32(u32::from(few));
        // SAFETY: these are the kernel's parameters; sizes were checked above.
        unsafe { route.launch(device, launch, &mut args)? };
        if few {
            return Ok(());
        }
        let launch = Launch { grid: [1, 1, 1], block: threads, shared };
        let mut args = Args::new().ptr(experts).value(&then);
        // SAFETY: as above.
        unsafe { dispatch.launch(device, launch, &mut args) }
    }

    fn kernels(&self, device: &Arc<Device>, per_lane: usize, shared: u32) -> Result<[Kernel; 2], KernelError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let of_lane = match kernels.entry(per_lane) {
            Entry::Occupied(kernels) => kernels.get().clone(),
            Entry::Vacant(slot) => {
                let option = option(per_lane);
                // Nothing in it is of the element type.
                let kernel = |name| typed_kernel(device, &UNIT, DType::F32, &[&option], name);
                slot.insert([kernel("moe_route")?, kernel("moe_dispatch")?]).clone()
            }
        };
        let [route, dispatch] = of_lane;
        Ok([route.with_shared(shared)?, dispatch.with_shared(shared)?])
    }
}
