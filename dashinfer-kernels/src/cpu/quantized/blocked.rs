//! The loops around register tiles: which rows pass over which part of a panel when, so that both are near.
//!
//! ```text
//!   for each block of 96 rows              their part of `x` stays in the L2 cache
//!     for each panel                       16 output features
//!       for each part of k                 codes of weights stay in the L1 cache, unpacked if many rows use them
//!         for each tile of rows            integer sums in registers; meanwhile the next part is fetched
//! ```

use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Job, Operand, Output};
use crate::quant::{PANEL, WeightBits};

/// Rows of `x` that pass over a panel together, so that their columns of a part stay in the L2 cache.
const ROW_BLOCK: usize = 96;
/// How far ahead weights are fetched while they stream in; as for dense products.
const AHEAD_BYTES: usize = 8192;
/// Bytes of a part that was unpacked.
const WIDE_BYTES: usize = 16 << 10;

/// 8-bit codes as [`crate::quant::int8`] lays them out.
pub(super) const CODES_8: u8 = 0;
/// 4-bit codes as [`crate::quant::int4`] lays them out.
pub(super) const CODES_4: u8 = 1;
/// What [`Tiles::widen`] made of either.
pub(super) const WIDE: u8 = 2;

/// Activations are [`Operand::Words`]; as a parameter of loops that are compiled for one layout.
pub(super) const WORDS: u8 = 0;
/// [`Operand::Bytes`]; see [`WORDS`].
pub(super) const BYTES: u8 = 1;
/// [`Operand::Planes`]; see [`WORDS`].
pub(super) const PLANES: u8 = 2;

/// Weights have zero points: what a tile is compiled for.
pub(super) const ZEROS: u8 = 1;
/// One group spans the row, so that integer sums go from part to part.
pub(super) const CARRY: u8 = 2;

/// What an instruction set brings.
pub(super) trait Tiles {
    /// The layouts of activations that its `operand` names; tiles are compiled for no others.
    const LAYOUTS: [u8; 2];

    /// Rows of a register tile; with [`PLANES`], of which a row has two, half of them.
    const MAX_ROWS: usize;

    /// Input features of a part; whole groups.
    const PART: usize;

    /// From this many rows on, a part is unpacked once for all of them; below, or without it, codes are unpacked in registers as they
    /// stream in.
    const WIDEN_FROM: Option<usize>;

    /// Unpacks `len` input features of codes `CODES` for activations of layout `X`.
    ///
    /// # Safety
    /// The machine has the instruction set; `from` holds the codes of as many input features, and `to` has room for [`code_bytes`] of
    /// as many [`WIDE`] ones.
    unsafe fn widen<const X: u8, const CODES: u8>(from: *const u8, len: usize, to: *mut u8);

    /// Adds the products of a tile; see [`Tile`].
    ///
    /// # Safety
    /// The machine has the instruction set, and what [`Tile`] says of its fields holds. `FLAGS` says what the scheme has.
    unsafe fn tile<const X: u8, const CODES: u8, const FLAGS: u8>(rows: usize, tile: &Tile<'_>);
}

/// Bytes of codes of `len` input features of a panel.
pub(super) const fn code_bytes(x: u8, codes: u8, len: usize) -> usize {
    match codes {
        CODES_8 => len * PANEL,
        CODES_4 => len * PANEL / 2,
        _ if x == WORDS => len * PANEL * 2,
        _ => len * PANEL,
    }
}

/// Bytes to be fetched ahead beside `len` input features: as many as stream in, or what [`Tile::ahead`] says.
pub(super) const fn ahead_bytes(codes: u8, len: usize) -> usize {
    if codes == CODES_8 { len * 16 } else { len * 8 }
}

/// As many rows of `x` as [`Tiles::MAX_ROWS`] allows by one panel over the input features `ks`. Sums start from the bias if `ks` starts at 0, else
/// from where the part before ended; either way they go to `out`.
#[derive(Clone)]
pub(super) struct Tile<'a> {
    pub(super) job: &'a Job<'a>,
    /// The first row; it and those after it lie in the job, and this thread alone writes the panel's columns of them.
    pub(super) row: usize,
    pub(super) panel: usize,
    /// Within the padded columns; whole groups, unless one group spans them all; a multiple of 8.
    pub(super) ks: Range<usize>,
    /// Codes of `ks`.
    pub(super) weights: *const u8,
    /// What to fetch meanwhile: 64 bytes for each eight input features. Never read otherwise, so it may point anywhere.
    pub(super) ahead: *const u8,
    pub(super) out: Output,
}

impl Tile<'_> {
    /// What row `i` of the tile starts from: the bias, or what [`Output`] holds of the parts before; bits of integers, if one group spans
    /// all parts.
    #[inline(always)]
    pub(super) fn start(&self, i: usize) -> [f32; PANEL] {
        if self.ks.start == 0 {
            return self.job.weight.panel_bias(self.panel);
        }
        let mut sums = [0.0; PANEL];
        // SAFETY: this thread wrote these columns of this row in the parts before.
        unsafe { self.out.load(self.row + i, self.panel, &mut sums) };
        sums
    }

    /// Whether the row ends here.
    #[inline(always)]
    pub(super) fn is_last(&self) -> bool {
        self.ks.end == self.job.weight.cut().padded
    }
}

#[repr(align(64))]
struct Wide([MaybeUninit<u8>; WIDE_BYTES]);

/// See [`scalar::product`](super::scalar::product): the same sums, exact in integers and in the same order in f32, so the same bits.
///
/// # Safety
/// The machine has the instruction set of `T`. No other thread may write these columns of these rows; the ranges lie within the job.
pub(super) unsafe fn product<T: Tiles>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match job.x.operand() {
            Some(Operand::Words) => laid_out::<T, WORDS>(job, rows, panels, out),
            Some(Operand::Bytes) => laid_out::<T, BYTES>(job, rows, panels, out),
            Some(Operand::Planes) => laid_out::<T, PLANES>(job, rows, panels, out),
            None => unreachable!("a job has rows"),
        }
    }
}

/// [`product`] for one layout of activations.
///
/// # Safety
/// As there.
unsafe fn laid_out<T: Tiles, const X: u8>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // A constant condition, so that nothing is compiled for the layouts that are left out.
    if const { T::LAYOUTS[0] != X && T::LAYOUTS[1] != X } {
        unreachable!("an instruction set's operands are among its layouts");
    }
    let scheme = job.weight.scheme();
    let carry = job.weight.cut().groups() == 1 && scheme.group().is_none();
    // SAFETY: the caller's promise, passed on; the parameters are those of the job.
    unsafe {
        match (scheme.weight_bits(), scheme.has_zero_points(), carry) {
            (WeightBits::Eight, _, false) => typed::<T, X, CODES_8, 0>(job, rows, panels, out),
            (WeightBits::Eight, _, true) => typed::<T, X, CODES_8, CARRY>(job, rows, panels, out),
            (WeightBits::Four, false, _) => typed::<T, X, CODES_4, 0>(job, rows, panels, out),
            (WeightBits::Four, true, _) => typed::<T, X, CODES_4, ZEROS>(job, rows, panels, out),
        }
    }
}

/// [`product`] for one scheme.
///
/// # Safety
/// As there.
unsafe fn typed<T: Tiles, const X: u8, const CODES: u8, const FLAGS: u8>(
    job: &Job<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    out: Output,
) {
    const { assert!(T::WIDEN_FROM.is_none() || code_bytes(X, WIDE, T::PART) <= WIDE_BYTES, "a part must fit its buffer") };
    let padded = job.weight.cut().padded;
    let widen = T::WIDEN_FROM.is_some_and(|from| rows.len() >= from);
    let mut wide = Wide([const { MaybeUninit::uninit() }; WIDE_BYTES]);
    let wide = wide.0.as_mut_ptr().cast::<u8>();
    for first in rows.clone().step_by(ROW_BLOCK) {
        let block = first..rows.end.min(first + ROW_BLOCK);
        for panel in panels.clone() {
            let weights = job.weight.panel(panel).as_ptr();
            // Without columns there is one part, of no input features: the bias.
            for k in (0..padded.max(1)).step_by(T::PART) {
                let ks = k..padded.min(k + T::PART);
                let weights = weights.wrapping_add(code_bytes(X, CODES, k));
                let part_bytes = code_bytes(X, CODES, ks.len());
                let tile = Tile { job, row: first, panel, ks, weights, ahead: weights.wrapping_add(AHEAD_BYTES), out };
                // SAFETY: the codes of `ks` exist; `wide` holds a part; the caller's promise is passed on.
                unsafe {
                    if widen {
                        T::widen::<X, CODES>(weights, tile.ks.len(), wide);
                        let tile = Tile { weights: wide, ahead: weights.wrapping_add(part_bytes), ..tile };
                        tiles::<T, X, WIDE, FLAGS>(block.clone(), part_bytes, tile);
                    } else {
                        tiles::<T, X, CODES, FLAGS>(block.clone(), part_bytes, tile);
                    }
                }
            }
        }
    }
}

/// All of `rows` by a part of a panel, in equal tiles. The first tiles fetch `fetch_bytes` from `ahead` on.
///
/// # Safety
/// As for [`Tiles::tile`], for all of `rows`.
unsafe fn tiles<T: Tiles, const X: u8, const CODES: u8, const FLAGS: u8>(
    rows: Range<usize>,
    fetch_bytes: usize,
    mut tile: Tile<'_>,
) {
    let max_rows = if X == PLANES { T::MAX_ROWS / 2 } else { T::MAX_ROWS };
    let count = rows.len().div_ceil(max_rows);
    let bytes_per_tile = tile.ks.len() * 8;
    for index in 0..count {
        let next = rows.start + rows.len() * (index + 1) / count;
        // SAFETY: the tile lies within `rows`; the caller's promise is passed on.
        unsafe { T::tile::<X, CODES, FLAGS>(next - tile.row, &tile) };
        tile.row = next;
        let fetched = (index + 1) * bytes_per_tile < fetch_bytes;
        tile.ahead = if fetched { tile.ahead.wrapping_add(bytes_per_tile) } else { tile.weights };
    }
}
