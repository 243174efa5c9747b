//! Attention of a step: which kernels serve the plan's tiles and units, and their room for partial results.
//!
//! | rows | 16-bit, compute capability 9.0 | 16-bit, 8.0 and newer | everything else |
//! |---|---|---|---|
//! | of prompts | `attention_prefill_sm90` | `attention_prefill_sm80` | `attention_simple` |
//! | decodes | `attention_decode` | `attention_decode` | `attention_simple` |
//!
//! When results must not depend on the step, rows of prompts are computed as decodes are, each by itself.
//!
//! Steps of decodes leave rotation and the cache's new positions to `attention_decode`, too, where it can.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::attention_decode::{AttentionDecode, DecodeRope, Purpose};
use super::attention_prefill_sm80::{AttentionPrefillSm80, PrefillOperands};
use super::attention_prefill_sm90::{AttentionPrefillSm90, CacheMaps, Operands, Shape, TILE_ROWS};
use super::attention_simple::AttentionSimple;
use super::attention_units::{DecodeOperands, Partials, checked_sinks};
use super::operand::Span;
use crate::cuda::device::Device;
use crate::cuda::memory::Buffer;
use crate::cuda::plan::{AttentionPlan, DecodeUnit, PlanParams, Splitting};
use crate::{AttentionParams, DType, KernelError};

/// Rows whose splits have room at once when each row is split by itself; more are computed in turns.
const ROWS_AT_ONCE: usize = 256;

/// What attention works on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionOperands<'a> {
    /// `[num_rows, H * D]`
    pub(crate) out: Span<'a>,
    /// `[num_rows, (H + 2 K) * D]`
    pub(crate) qkv: Span<'a>,
    /// Keys and values of the layer: `[num_blocks, K, B, D]` each.
    pub(crate) cache: [Span<'a>; 2],
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    /// Rows of the step, with padding.
    pub(crate) num_rows: usize,
    /// The plan's units, on the device.
    pub(crate) units: Span<'a>,
    /// For each chunk of the plan how many units it has: `u32`.
    pub(crate) num_units: Span<'a>,
    /// The plan's tiles.
    pub(crate) tiles: Span<'a>,
    pub(crate) block_table: Span<'a>,
    /// How rows are rotated that are not yet, nor in the cache: of a step of decodes whose rows
    /// [attention takes](Attention::takes) as they are.
    pub(crate) rope: Option<DecodeRope>,
    /// `[H]` of f32: each head's sink.
    pub(crate) sinks: Option<Span<'a>>,
}

/// The heads that kernels are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Heads {
    num_kv_heads: usize,
    head_dim: usize,
}

#[derive(Debug)]
enum Units {
    Decode {
        cached: AttentionDecode,
        fused: Option<AttentionDecode>,
        /// Results must depend on nothing but the row: with these there are several orders of a row's sum.
        wide: Option<AttentionDecode>,
    },
    Simple(AttentionSimple),
}

impl Units {
    /// The kernel for a step of decodes with so many rows.
    fn of_decodes(&self, num_rows: usize, num_kv_heads: usize, num_sms: u32) -> Option<&AttentionDecode> {
        let Self::Decode { fused, wide, .. } = self else { return None };
        // Half of the multiprocessors have nothing to do, unless rows are split.
        let few = 2 * num_rows * num_kv_heads <= num_sms as usize;
        wide.as_ref().filter(|_| few).or(fused.as_ref())
    }
}

#[derive(Debug)]
enum Tiles {
    None,
    Sm80(AttentionPrefillSm80),
    /// Made when the number of query heads is known. The maps are those of a layer, found by the address of its keys.
    Sm90 {
        kernel: Option<AttentionPrefillSm90>,
        maps: HashMap<u64, CacheMaps>,
    },
}

#[derive(Debug)]
struct Kernels {
    heads: Heads,
    /// Whether scores are capped. What a plan needs to know is the same for both.
    is_capped: bool,
    units: Units,
    /// For more query heads to a kv head than the tensor cores' tile has rows.
    large_groups: Option<AttentionSimple>,
    tiles: Tiles,
}

/// Partial results that there is room for, at most, whatever the kernels and the splitting.
pub(crate) fn max_slots(device: &Device, num_kv_heads: usize) -> usize {
    /// Blocks of a kernel that a multiprocessor may hold.
    const BLOCKS: usize = 6;
    let grid = device.num_sms as usize * BLOCKS;
    let slots = |splitting| {
        let (window, min_split, prefill_rows) = (None, 1, None);
        let (expand, max_slots) = (false, 0);
        let params = PlanParams { grid, num_kv_heads, window, splitting, min_split, prefill_rows, expand, max_slots };
        params.slots_for(ROWS_AT_ONCE)
    };
    slots(Splitting::Balanced).max(slots(Splitting::ByContext))
}

/// The kernels of attention, and room for partial results.
pub(crate) struct Attention {
    device: Arc<Device>,
    dtype: DType,
    deterministic: bool,
    kernels: Option<Kernels>,
    /// Partial sums, their maxima and weights, and tickets.
    partials: [Buffer; 3],
    generation: u64,
}

impl Attention {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType, deterministic: bool) -> Result<Self, KernelError> {
        let none = || device.alloc("partial attention", 0);
        Ok(Self {
            device: Arc::clone(device),
            dtype,
            deterministic,
            kernels: None,
            partials: [none()?, none()?, none()?],
            generation: 0,
        })
    }

    /// Grows whenever addresses change that a recorded step may name.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// What a plan is made for; with `decodes`, for a step of that many rows, one of each of its sequences. Makes the kernels of
    /// these heads.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if there is none, and what compiling may say.
    pub(crate) fn plan_params(
        &mut self,
        num_kv_heads: usize,
        head_dim: usize,
        block_size: usize,
        decodes: Option<usize>,
    ) -> Result<PlanParams, KernelError> {
        let heads = Heads { num_kv_heads, head_dim };
        if self.kernels.as_ref().is_none_or(|kernels| kernels.heads != heads) {
            // Whether scores are capped is known when the first layer comes; a model that has caps has them in every step.
            let is_capped = self.kernels.as_ref().is_some_and(|kernels| kernels.is_capped);
            self.kernels = Some(self.kernels_for(heads, block_size, is_capped)?);
            self.generation += 1;
        }
        let kernels = self.kernels.as_ref();
        let (grid, min_split) = kernels.map_or((1, 1), |kernels| match &kernels.units {
            Units::Decode { cached, .. } => (cached.grid(), cached.min_split()),
            Units::Simple(kernel) => (kernel.grid(), kernel.min_split()),
        });
        let prefill_rows = kernels.and_then(|kernels| match &kernels.tiles {
            Tiles::None => None,
            Tiles::Sm80(kernel) => Some(kernel.tile_rows()),
            Tiles::Sm90 { .. } => Some(TILE_ROWS as usize),
        });
        let splitting = if self.deterministic { Splitting::ByContext } else { Splitting::Balanced };
        let (window, expand, max_slots) = (None, false, 0);
        let params = PlanParams { grid, num_kv_heads, window, splitting, min_split, prefill_rows, expand, max_slots };
        // The room is that of the largest grid, so that it does not depend on the step.
        let max_slots = params.slots_for(ROWS_AT_ONCE);
        let of_decodes = decodes.and_then(|rows| kernels?.units.of_decodes(rows, num_kv_heads, self.device.num_sms));
        Ok(match of_decodes {
            Some(kernel) => PlanParams { grid: kernel.grid(), min_split: kernel.min_split(), max_slots, ..params },
            None => PlanParams { max_slots, ..params },
        })
    }

    fn kernels_for(&self, heads: Heads, block_size: usize, is_capped: bool) -> Result<Kernels, KernelError> {
        let (device, dtype, head_dim) = (&self.device, self.dtype, heads.head_dim);
        let on_tensor_cores = AttentionDecode::supports(device.arch, dtype, head_dim, 1);
        let of = |purpose| AttentionDecode::new(device, dtype, head_dim, purpose, is_capped);
        let units = match of(Purpose::Cached)? {
            Some(cached) => {
                let wide = if self.deterministic { None } else { of(Purpose::FusedWide)? };
                Units::Decode { cached, fused: of(Purpose::Fused)?, wide }
            }
            None => Units::Simple(AttentionSimple::new(device, dtype, head_dim, is_capped)?),
        };
        let shape = Shape {
            dtype,
            num_heads: heads.num_kv_heads as u32,
            num_kv_heads: heads.num_kv_heads as u32,
            head_dim: head_dim as u32,
            value_dim: head_dim as u32,
            block_size: block_size as u32,
            is_capped,
        };
        let tiles = if self.deterministic || !on_tensor_cores {
            Tiles::None
        } else if AttentionPrefillSm90::supports(device, &shape) {
            Tiles::Sm90 { kernel: None, maps: HashMap::new() }
        } else {
            Tiles::Sm80(AttentionPrefillSm80::new(device, dtype, head_dim, is_capped)?)
        };
        Ok(Kernels { heads, is_capped, units, large_groups: None, tiles })
    }

    /// Whether [`run`](Self::run) takes the rows of a step of decodes as they are, not rotated and not in the cache.
    pub(crate) fn takes(&self, params: &AttentionParams) -> bool {
        let group = params.num_heads / params.num_kv_heads.max(1);
        let on_tensor_cores = AttentionDecode::supports(self.device.arch, self.dtype, params.head_dim, group);
        let units = self.kernels.as_ref().map(|kernels| &kernels.units);
        on_tensor_cores && matches!(units, Some(Units::Decode { fused: Some(_), .. }))
    }

    /// Attention of the rows of `plan`, whose lists are on the device.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small or the plan was made for other heads.
    ///
    /// # Safety
    /// What the rope names is still there.
    pub(crate) unsafe fn run(
        &mut self,
        operands: &AttentionOperands<'_>,
        params: &AttentionParams,
        plan: &AttentionPlan,
        max_slots: usize,
    ) -> Result<(), KernelError> {
        let heads = Heads { num_kv_heads: params.num_kv_heads, head_dim: params.head_dim };
        if self.kernels.as_ref().is_none_or(|kernels| kernels.heads != heads) {
            let found = self.kernels.as_ref().map_or(0, |kernels| kernels.heads.head_dim);
            let what = "head size of the step";
            return Err(KernelError::Shape { op: "attention", what, wanted: params.head_dim, found });
        }
        let is_capped = params.soft_cap.is_some();
        if self.kernels.as_ref().is_some_and(|kernels| kernels.is_capped != is_capped) {
            // The device keeps all code that it has loaded, so recorded steps stay good.
            self.kernels = Some(self.kernels_for(heads, operands.block_size, is_capped)?);
        }
        if !plan.tiles.is_empty() {
            self.run_tiles(operands, params, plan.tiles.len())?;
        }
        if !plan.units.is_empty() {
            // SAFETY: as the caller says.
            unsafe { self.run_units(operands, params, plan, max_slots)? };
        }
        Ok(())
    }

    fn run_tiles(
        &mut self,
        operands: &AttentionOperands<'_>,
        params: &AttentionParams,
        num_tiles: usize,
    ) -> Result<(), KernelError> {
        const OP: &str = "attention";
        let &AttentionOperands { out, qkv, cache, tiles, block_table, num_rows, block_size, num_blocks, sinks, .. } =
            operands;
        match self.kernels.as_mut().map(|kernels| &mut kernels.tiles) {
            None | Some(Tiles::None) => {
                let what = "tiles of prompts".to_owned();
                Err(KernelError::Unsupported { op: OP, what, backend: "cuda" })
            }
            Some(Tiles::Sm80(kernel)) => {
                let operands = PrefillOperands { out, qkv, cache, tiles, block_table, sinks };
                kernel.run(&self.device, &operands, params, [num_tiles, num_rows, block_size])
            }
            Some(Tiles::Sm90 { kernel, maps }) => {
                let (heads, kv_heads, head_dim) = (params.num_heads, params.num_kv_heads, params.head_dim);
                let shape = Shape {
                    dtype: self.dtype,
                    num_heads: heads as u32,
                    num_kv_heads: kv_heads as u32,
                    head_dim: head_dim as u32,
                    value_dim: head_dim as u32,
                    block_size: block_size as u32,
                    is_capped: params.soft_cap.is_some(),
                };
                if kernel.as_ref().is_none_or(|kernel| *kernel.shape() != shape) {
                    *kernel = Some(AttentionPrefillSm90::new(&self.device, shape)?);
                    maps.clear();
                }
                let Some(kernel) = kernel else { return Ok(()) };
                let size = self.dtype.size_bytes();
                let values = num_blocks * kv_heads * block_size * head_dim;
                let [k, v] = cache.map(|half| half.holding(OP, "values of the cache", values, size));
                let (k, v) = (k?, v?);
                // A cache at the same address may be another one, of other sizes.
                let key = k ^ (num_blocks as u64).rotate_left(40);
                let maps = match maps.entry(key) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(place) => place.insert(kernel.cache_maps(k, v, num_blocks)?),
                };
                let operands = Operands {
                    out: (
                        out.holding(OP, "values of the output", num_rows * heads * head_dim, size)?,
                        (heads * head_dim) as u32,
                    ),
                    q: (
                        qkv.holding(OP, "values of qkv", num_rows * (heads + 2 * kv_heads) * head_dim, size)?,
                        ((heads + 2 * kv_heads) * head_dim) as u32,
                    ),
                    cache: maps,
                    tiles: tiles.holding(OP, "tiles", num_tiles, 16)?,
                    num_tiles: num_tiles as u32,
                    block_table: block_table.holding(OP, "blocks", 1, 4)?,
                    window: params.window.map_or(0, |window| u32::try_from(window).unwrap_or(u32::MAX)),
                    scale: params.scale,
                    soft_cap: params.soft_cap.unwrap_or(0.0),
                    sinks: checked_sinks(OP, sinks, heads)?,
                };
                // SAFETY: sizes were checked just now, and what tiles and block table name by who made the step.
                unsafe { kernel.launch(&operands) }
            }
        }
    }

    /// # Safety
    /// What the rope names is still there.
    unsafe fn run_units(
        &mut self,
        operands: &AttentionOperands<'_>,
        params: &AttentionParams,
        plan: &AttentionPlan,
        max_slots: usize,
    ) -> Result<(), KernelError> {
        let wanted = Partials::bytes(max_slots, params.num_heads, params.head_dim);
        for (buffer, wanted) in self.partials.iter_mut().zip(wanted) {
            if buffer.bytes() < wanted {
                *buffer = self.device.alloc("partial attention", wanted)?;
                buffer.fill(0, wanted, 0)?; // the tickets
                self.generation += 1;
            }
        }
        let [out, ml, tickets] = self.partials.each_ref().map(Span::from);
        let partials = Partials { num_slots: max_slots, out, ml, tickets };
        let Some(kernels) = &mut self.kernels else { return Ok(()) };
        let group = params.num_heads / params.num_kv_heads.max(1);
        let on_tensor_cores = AttentionDecode::supports(self.device.arch, self.dtype, params.head_dim, group);
        if matches!(kernels.units, Units::Decode { .. }) && !on_tensor_cores && kernels.large_groups.is_none() {
            kernels.large_groups =
                Some(AttentionSimple::new(&self.device, self.dtype, params.head_dim, kernels.is_capped)?);
        }
        let (device, rope) = (&self.device, operands.rope.as_ref());
        let of_decodes = kernels.units.of_decodes(operands.num_rows, params.num_kv_heads, device.num_sms);
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let size = size_of::<DecodeUnit>();
            let decode = DecodeOperands {
                out: operands.out,
                qkv: operands.qkv,
                num_rows: operands.num_rows,
                k_cache: operands.cache[0],
                v_cache: operands.cache[1],
                block_size: operands.block_size,
                units: operands.units.rest(chunk.start * size)?,
                num_units: operands.num_units.rest(index * size_of::<u32>())?,
                block_table: operands.block_table,
                partials,
                params,
                sinks: operands.sinks,
            };
            match (&kernels.units, of_decodes.filter(|_| rope.is_some())) {
                // SAFETY: as the caller says.
                (_, Some(kernel)) => unsafe { kernel.run(device, &decode, rope)? },
                // SAFETY: as above; with a rope, this is an error.
                (Units::Decode { cached, .. }, None) if on_tensor_cores => unsafe {
                    cached.run(device, &decode, rope)?
                },
                (Units::Simple(kernel), None) => kernel.run(device, &decode)?,
                (Units::Decode { .. }, None) => {
                    if let Some(kernel) = &kernels.large_groups {
                        kernel.run(device, &decode)?;
                    }
                }
            }
        }
        Ok(())
    }
}
