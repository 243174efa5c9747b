//! The loops around tiles that multiply a group at a time: which rows and weights are brought into the layout of tiles when.
//!
//! ```text
//!   for each four panels               64 output features
//!     for each part of k               its weights become signed bytes, in the L1 cache
//!       for each 16 rows               their part of `x` becomes rows of bytes, there too
//!         for each panel
//!           for each group             a tile of exact sums, which is scaled and added in f32
//! ```
//!
//! Weights are centred on the way, code − zero in −128 to 127, so nothing has to be made up for. Codes of 16 bits are taken
//! apart: the signed high bytes and the unsigned low ones are multiplied apart, and `256 · high + low` is the sum.

use std::ops::Range;

use super::blocked::{BYTES, CODES_4, CODES_8, WORDS, code_bytes};
use super::matrix::symmetric_zero;
use super::{Job, Operand, Output};
use crate::Scheme;
pub(super) use crate::cpu::amx::ROWS;
use crate::quant::{Group, PANEL, WeightBits};

/// Panels that rows pass over once they are laid out.
pub(super) const PANELS: usize = 4;
/// Input features of a part: whole groups, whatever their size.
pub(super) const PART: usize = 256;
/// Groups of a part, at most.
pub(super) const GROUPS: usize = PART / Group::G32.size();
/// Bytes between rows of `x`: 9 lines, so that those of a tile are in different sets of the cache.
pub(super) const X_STRIDE: usize = 2 * PART + 64;
/// Input features of a tile of `x`, at most.
const DEPTH: usize = 64;

const _: () = assert!(PART.is_multiple_of(Group::G128.size()), "a part has whole groups");

/// Where the operands of a group stand in a [`Scratch`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Input features of a group.
    pub(super) group: usize,
    /// Input features of a tile: all of a group, or 64.
    pub(super) depth: usize,
    /// Tiles of a group.
    pub(super) tiles: usize,
    /// Bytes between groups of a row of `x`.
    x_group: usize,
    /// Bytes from the low bytes of `x` to its high ones; none if it has 8 bits.
    pub(super) high: usize,
}

impl Layout {
    pub(super) fn new(group: usize, operand: u8) -> Self {
        let depth = group.min(DEPTH);
        // Groups of 32 have their low bytes and their high ones side by side; others have all low bytes before all high ones, so that
        // the rows of a tile are whole.
        let (x_group, high) = match (operand, depth < DEPTH) {
            (BYTES, _) => (group, 0),
            (_, true) => (2 * group, group),
            (_, false) => (group, PART),
        };
        Self { group, depth, tiles: group / depth, x_group, high }
    }

    /// Where group `group` of a part starts in a row of `x`: its low bytes, or all of them. Its tiles are 64 bytes apart.
    #[inline(always)]
    pub(super) fn x(&self, group: usize) -> usize {
        group * self.x_group
    }

    /// Where the weights of step `step` start, groups of a panel being counted before those of the next. Its tiles are 1024
    /// bytes apart.
    #[inline(always)]
    pub(super) fn weights(&self, step: usize) -> usize {
        step * self.group * PANEL
    }
}

/// What is in the layout of tiles.
#[repr(C, align(64))]
pub(super) struct Scratch {
    /// Rows of `x` as [`Layout`] says. What a row that is not there holds is of no account.
    pub(super) x: [[u8; X_STRIDE]; ROWS],
    /// Signed bytes, by quads of input features: `[panel][quad][feature][4]`.
    pub(super) weights: [i8; PANELS * PART * PANEL],
    /// Sums of a step, of even ones and of odd ones: low bytes, or all; and high bytes.
    pub(super) dots: [[[[i32; PANEL]; ROWS]; 2]; 2],
    /// Scales of `x` for each group of the part.
    pub(super) scales: [[f32; GROUPS]; ROWS],
}

impl Scratch {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self {
            x: [[0; X_STRIDE]; ROWS],
            weights: [0; PANELS * PART * PANEL],
            dots: [[[[0; PANEL]; ROWS]; 2]; 2],
            scales: [[0.0; GROUPS]; ROWS],
        }
    }
}

/// A part of some rows of `x`.
pub(super) struct Part {
    /// 1 to 16.
    pub(super) rows: usize,
    /// Codes of the first row.
    pub(super) codes: *const u8,
    /// Bytes between rows of codes.
    pub(super) stride: usize,
    /// Input features: whole groups, and no more than [`PART`].
    pub(super) len: usize,
    /// Scales of the first row.
    pub(super) scales: *const f32,
    /// Scales between those of rows: one for each group of a row.
    pub(super) groups: usize,
}

/// Up to 16 rows by up to four panels over the groups of a part.
pub(super) struct Sweep<'a> {
    pub(super) job: &'a Job<'a>,
    /// 1 to 16 rows.
    pub(super) rows: Range<usize>,
    /// 1 to [`PANELS`].
    pub(super) panels: Range<usize>,
    /// Whole groups.
    pub(super) ks: Range<usize>,
    pub(super) layout: Layout,
    pub(super) out: Output,
}

impl Sweep<'_> {
    /// Groups of the part.
    #[inline(always)]
    pub(super) fn groups(&self) -> usize {
        self.ks.len() / self.layout.group
    }

    /// The number of the part's first group among those of the row.
    #[inline(always)]
    pub(super) fn first_group(&self) -> usize {
        self.ks.start / self.layout.group
    }
}

/// What multiplies tiles: AMX, or its model in plain Rust.
pub(super) trait Unit {
    /// Shapes this thread's tiles for `depth` input features, until [`end`](Self::end).
    ///
    /// # Safety
    /// The machine has the unit.
    unsafe fn start(depth: usize) -> Self;

    /// Gives the tiles back.
    ///
    /// # Safety
    /// As for [`start`](Self::start).
    unsafe fn end(self);

    /// Writes `len` input features of a panel's codes as signed bytes, less the zeros of their output features.
    ///
    /// # Safety
    /// The machine has the unit. `codes` holds as many codes of kind `CODES`, `to` has room for 16 bytes for each; `len` is a
    /// multiple of 32.
    unsafe fn widen<const CODES: u8>(codes: *const u8, zeros: &[u8; PANEL], len: usize, to: *mut i8);

    /// Lays out the part's codes of `x`, of kind `X`, and its scales for 1 to 16 rows.
    ///
    /// # Safety
    /// The machine has the unit. Each row has as many codes and scales as the part says; rows of the scratch have room for them.
    unsafe fn lay_out<const X: u8>(layout: &Layout, part: &Part, scratch: &mut Scratch);

    /// Adds the products of all groups to what the output holds, or to the bias if the part is the first. `NARROW` says that sums of
    /// high bytes fit 16 bits.
    ///
    /// # Safety
    /// The machine has the unit, whose tiles have the depth of the layout. The scratch holds the operands; this thread alone
    /// accesses these columns of these rows of the output, which parts before have written.
    unsafe fn sweep<const X: u8, const NARROW: bool>(&mut self, sweep: &Sweep<'_>, scratch: &mut Scratch);
}

/// See [`scalar::product`](super::scalar::product): the same sums, exact in integers and in the same order in f32, so the same
/// bits. For all schemes but `a8w8`.
///
/// # Safety
/// The machine has the unit. No other thread may write these columns of these rows; the ranges lie within the job.
pub(super) unsafe fn product<U: Unit>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let scheme = job.weight.scheme();
    // High bytes lie in −127 to 127, as codes of 16 bits go to 127 · 256. 32 products with codes in −8 to 7 fit 16 bits; with
    // codes in −15 to 15 they do not.
    let narrow = matches!(scheme, Scheme::A16W4 { group: Group::G32, zero_point: false });
    // SAFETY: the caller's promise, passed on; the parameters are those of the job.
    unsafe {
        match (job.x.operand(), scheme.weight_bits(), narrow) {
            (Some(Operand::Words), WeightBits::Four, true) => typed::<U, WORDS, CODES_4, true>(job, rows, panels, out),
            (Some(Operand::Words), WeightBits::Four, false) => {
                typed::<U, WORDS, CODES_4, false>(job, rows, panels, out)
            }
            (Some(Operand::Words), WeightBits::Eight, _) => typed::<U, WORDS, CODES_8, false>(job, rows, panels, out),
            (Some(Operand::Bytes), WeightBits::Four, _) => typed::<U, BYTES, CODES_4, false>(job, rows, panels, out),
            _ => unreachable!("rows are words or bytes, and bytes with 8-bit weights have no groups"),
        }
    }
}

/// [`product`] for one kind of operands.
///
/// # Safety
/// As there.
unsafe fn typed<U: Unit, const X: u8, const CODES: u8, const NARROW: bool>(
    job: &Job<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    out: Output,
) {
    let cut = job.weight.cut();
    let layout = Layout::new(cut.group, X);
    let size = if X == WORDS { 2 } else { 1 };
    let x_stride = cut.padded * size;
    let mut scratch = Scratch::new();
    // SAFETY: the machine has the unit, which is given back below; operands lie within the job, whose parts are whole groups; the
    // scratch has room for a part; the caller's promise is passed on.
    unsafe {
        let mut unit = U::start(layout.depth);
        for panel in panels.clone().step_by(PANELS) {
            let panels = panel..panels.end.min(panel + PANELS);
            // Without columns there is one part, of no input features: the bias.
            for k in (0..cut.padded.max(1)).step_by(PART) {
                let ks = k..cut.padded.min(k + PART);
                for (side, panel) in panels.clone().enumerate() {
                    let to = scratch.weights[side * ks.len() * PANEL..].as_mut_ptr();
                    widen::<U, CODES>(job, panel, &ks, to);
                }
                for row in rows.clone().step_by(ROWS) {
                    let rows = row..rows.end.min(row + ROWS);
                    let codes = job.x.codes(row).as_ptr().wrapping_add(ks.start * size);
                    let scales = job.x.scales(row).as_ptr().wrapping_add(ks.start / layout.group);
                    let (len, groups) = (ks.len(), cut.groups());
                    let part = Part { rows: rows.len(), codes, stride: x_stride, len, scales, groups };
                    U::lay_out::<X>(&layout, &part, &mut scratch);
                    let (panels, ks) = (panels.clone(), ks.clone());
                    let sweep = Sweep { job, rows, panels, ks, layout, out };
                    unit.sweep::<X, NARROW>(&sweep, &mut scratch);
                }
            }
        }
        unit.end();
    }
}

/// The weights of a part of a panel, a group at a time if they have zero points.
///
/// # Safety
/// As for [`Unit::widen`], of the job's panel.
#[inline(always)]
unsafe fn widen<U: Unit, const CODES: u8>(job: &Job<'_>, panel: usize, ks: &Range<usize>, to: *mut i8) {
    let weight = job.weight;
    let (scheme, group) = (weight.scheme(), weight.cut().group);
    let codes = weight.panel(panel)[code_bytes(BYTES, CODES, ks.start)..].as_ptr();
    // SAFETY: the codes of `ks` exist, and the caller has room for them.
    unsafe {
        if scheme.has_zero_points() {
            for k in (0..ks.len()).step_by(group) {
                let zeros = weight.zeros(panel, (ks.start + k) / group);
                U::widen::<CODES>(codes.add(code_bytes(BYTES, CODES, k)), zeros, group, to.add(k * PANEL));
            }
        } else {
            U::widen::<CODES>(codes, &[symmetric_zero(scheme); PANEL], ks.len(), to);
        }
    }
}
