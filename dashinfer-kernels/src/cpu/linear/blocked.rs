//! The loops around register tiles: which rows pass over which part of a panel when, so that both are near.
//!
//! ```text
//!   for each block of 96 rows              their part of `x` stays in the L2 cache
//!     for each panel                       16 output features
//!       for each few hundred steps of k    the part of the panel stays in the L1 cache, in f32 if many rows use it
//!         for each tile of rows            sums in registers; meanwhile the next part is fetched
//! ```

use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::PANEL;
use super::{Job, Output};
use crate::DType;

/// The most steps of `k` in a part of a panel that is brought to f32: 16 KiB.
const WIDE_STEPS: usize = 256;
/// Rows of `x` that pass over a panel together, so that their columns of a part stay in the L2 cache.
const ROW_BLOCK: usize = 96;
/// How far ahead weights are fetched while they stream in: the hardware's own prefetching ends at each page, and the
/// loop alone keeps too few lines in flight.
const AHEAD_BYTES: usize = 8192;

/// [`DType::F32`] as a parameter of loops that are compiled for one type.
pub(super) const F32: u8 = 0;
/// [`DType::F16`]; see [`F32`].
pub(super) const F16: u8 = 1;
/// [`DType::BF16`]; see [`F32`].
pub(super) const BF16: u8 = 2;

/// Bytes of a group of 16 weights; of bf16, half the bytes of a pair of groups.
pub(super) const fn group_bytes(kind: u8) -> usize {
    if kind == F32 { PANEL * 4 } else { PANEL * 2 }
}

/// What an instruction set brings.
pub(super) trait Tiles {
    /// Rows of a register tile.
    const MAX_ROWS: usize;

    /// Steps of `k`, an even number, for which a part of a panel stays in the L1 cache while all rows pass over it.
    const K_BLOCK: usize;

    /// From this many rows on, a part of a panel is brought to f32 once and multiplied from the L1 cache; below, or without
    /// it, weights are converted in registers as they stream in.
    const WIDEN_FROM: Option<usize>;

    /// Brings `groups` groups of 16 weights of `TYPE` to f32, in the order of their columns.
    ///
    /// # Safety
    /// The machine has the instruction set; `from` and `to` hold as many groups, and `to` starts on a cache line.
    unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32);

    /// Adds the products of a tile of weights of `TYPE`; see [`Tile`].
    ///
    /// # Safety
    /// The machine has the instruction set, and what [`Tile`] says of its fields holds.
    unsafe fn tile<const TYPE: u8>(rows: usize, tile: &Tile<'_>);
}

/// Up to [`Tiles::MAX_ROWS`] rows of `x` by one panel over the steps `ks`. Sums start from the bias if `ks` starts at 0, else from
/// where the steps before ended; either way they go to `out`.
#[derive(Clone)]
pub(super) struct Tile<'a> {
    pub(super) job: &'a Job<'a>,
    /// The first row; it and those after it lie in the job, and this thread alone writes the panel's columns of them.
    pub(super) row: usize,
    pub(super) panel: usize,
    /// Within the columns of `x`.
    pub(super) ks: Range<usize>,
    /// `ks.len()` groups of the tile's type, which need not be the job's.
    pub(super) weights: *const u8,
    /// What to fetch meanwhile: 32 bytes for each step. Never read otherwise, so it may point anywhere.
    pub(super) ahead: *const u8,
    pub(super) out: Output,
}

impl Tile<'_> {
    /// The sums that row `i` of the tile starts from.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "within a register tile")]
    pub(super) fn start(&self, i: usize) -> [f32; PANEL] {
        if self.ks.start == 0 {
            return self.job.weight.panel_bias(self.panel);
        }
        let mut sums = [0.0; PANEL];
        // SAFETY: this thread wrote these columns of this row in the steps before.
        unsafe { self.out.load(self.row + i, self.panel, &mut sums) };
        sums
    }

    /// Value `ks.start` of each row, the rows `job.weight.cols()` apart.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "within a register tile")]
    pub(super) fn x(&self, rows: usize) -> *const f32 {
        let cols = self.job.weight.cols();
        self.job.x[self.row * cols..(self.row + rows) * cols].as_ptr().wrapping_add(self.ks.start)
    }
}

/// A part of a panel in f32, its groups on cache lines of their own.
#[repr(align(64))]
struct Wide([MaybeUninit<f32>; WIDE_STEPS * PANEL]);

/// See [`scalar::product`](super::scalar::product): the same sums in the same order, so the same bits.
///
/// # Safety
/// The machine has the instruction set of `T`. No other thread may write these columns of these rows; the ranges lie within
/// the job.
pub(super) unsafe fn product<T: Tiles>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on; the type is the job's.
    unsafe {
        match job.weight.dtype() {
            DType::F32 => typed::<T, F32>(job, rows, panels, out),
            DType::F16 => typed::<T, F16>(job, rows, panels, out),
            DType::BF16 => typed::<T, BF16>(job, rows, panels, out),
        }
    }
}

/// [`product`] for weights of `TYPE`.
///
/// # Safety
/// As there.
unsafe fn typed<T: Tiles, const TYPE: u8>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let (cols, group) = (job.weight.cols(), group_bytes(TYPE));
    const {
        assert!(T::WIDEN_FROM.is_none() || T::K_BLOCK <= WIDE_STEPS, "a part must fit the buffer that it is widened to")
    };
    let widen = TYPE != F32 && T::WIDEN_FROM.is_some_and(|from| rows.len() >= from);
    let mut wide = Wide([const { MaybeUninit::uninit() }; WIDE_STEPS * PANEL]);
    let wide = wide.0.as_mut_ptr().cast::<f32>();
    for first in rows.clone().step_by(ROW_BLOCK) {
        let block = first..rows.end.min(first + ROW_BLOCK);
        for panel in panels.clone() {
            let weights = job.weight.panel(panel).as_ptr();
            // Without columns there is one part, of no steps: the bias.
            for k in (0..cols.max(1)).step_by(T::K_BLOCK) {
                let ks = k..cols.min(k + T::K_BLOCK);
                let weights = weights.wrapping_add(k * group);
                let tile = Tile { job, row: first, panel, ks, weights, ahead: weights.wrapping_add(AHEAD_BYTES), out };
                // SAFETY: steps `ks` of the panel exist; `wide` holds `T::K_BLOCK` groups, at least as many; the caller's promise
                // is passed on.
                unsafe {
                    if widen {
                        T::widen::<TYPE>(weights, tile.ks.len(), wide);
                        let next = weights.wrapping_add(T::K_BLOCK * group);
                        let tile = Tile { weights: wide.cast(), ahead: next, ..tile };
                        tiles::<T, F32>(block.clone(), T::K_BLOCK * group, tile);
                    } else {
                        tiles::<T, TYPE>(block.clone(), T::K_BLOCK * group, tile);
                    }
                }
            }
        }
    }
}

/// All of `rows` by a part of a panel, in equal tiles: seven rows by tiles of six are 4 + 3, not 6 + 1. The first tiles fetch
/// `fetch_bytes` from `ahead` on.
///
/// # Safety
/// As for [`Tiles::tile`], for all of `rows`.
unsafe fn tiles<T: Tiles, const TYPE: u8>(rows: Range<usize>, fetch_bytes: usize, mut tile: Tile<'_>) {
    let count = rows.len().div_ceil(T::MAX_ROWS);
    let bytes_per_tile = tile.ks.len() * 32;
    for index in 0..count {
        let next = rows.start + rows.len() * (index + 1) / count;
        // SAFETY: the tile lies within `rows`; the caller's promise is passed on.
        unsafe { T::tile::<TYPE>(next - tile.row, &tile) };
        tile.row = next;
        let fetched = (index + 1) * bytes_per_tile < fetch_bytes;
        tile.ahead = if fetched { tile.ahead.wrapping_add(bytes_per_tile) } else { tile.weights };
    }
}
