//! [`QuantizedMatrix`]: codes in panels, scales and zero points beside them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;

use super::super::aligned::AlignedBuf;
use super::super::linear::{SendPtr, Stack, bias_from_bytes, padded_bias};
use super::super::pool::ThreadPool;
use super::super::weight_buf::WeightBuf;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
use super::quantize_avx2;
use super::stored;
use crate::dtype::widen;
use crate::error::check;
use crate::quant::activations::Cut;
use crate::quant::stored::{StoredStack, check_order};
use crate::quant::{GroupParams, PANEL, Scheme, WeightBits, int4, int8};
use crate::{DType, KernelError, MatrixView, PackedShape, SharedBytes, StoredMatrix};

/// Input features of a row that are brought to f32 at a time where groups allow it: the codes of all rows of a panel then stay in
/// the L1 cache until their lines are full.
const STRETCH: usize = 512;

/// Tasks that each thread gets, at least, where panels are filled together: so that threads end at about the same time.
const TASKS_PER_THREAD: usize = 4;

/// A weight matrix `[N, K]` of a [`Scheme`], and its bias.
#[derive(Debug)]
pub struct QuantizedMatrix {
    rows: usize,
    cols: usize,
    scheme: Scheme,
    cut: Cut,
    /// `[panels][panel_bytes]`
    codes: WeightBuf<u8>,
    /// `[panels][scale_groups][16]`, f16.
    scales: WeightBuf<u16>,
    /// As `scales`; empty if the scheme has no zero points.
    zeros: WeightBuf<u8>,
    /// `[panels * 16]`; empty without a bias.
    bias: Vec<f32>,
    /// The input feature at each place of a row, if they are not in order: a permutation, in a scheme with groups.
    order: Option<Vec<u32>>,
}

impl QuantizedMatrix {
    /// Quantizes and packs `parts`, stacked along the output features. `bias`: `[sum of rows]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in type or columns, a length is off, or the matrix has more columns than the scheme
    /// can sum; [`KernelError::NotFinite`]; [`KernelError::OutOfMemory`].
    pub fn pack(
        parts: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        scheme: Scheme,
        pool: &ThreadPool,
    ) -> Result<Self, KernelError> {
        let stack = Stack::new(parts, bias)?;
        let (cols, dtype) = (stack.cols, stack.dtype);
        let quantize = best_quantizer();
        Self::build([stack.rows, cols], scheme, bias, None, pool, 1, &|panels, cut, codes, scales, zeros| {
            let rows: Vec<&[u8]> = stack.panel(panels.start).collect();
            let panel = Panel { scheme, cut, cols, source: Source::Bytes(&rows, dtype) };
            // SAFETY: the variant was chosen for this machine.
            unsafe { quantize(&panel, codes, scales, zeros) }
        })
    }

    /// Packs `parts` that were stored quantized, stacked along the output features; see
    /// [`Backend::pack_stored`](crate::Backend::pack_stored). `bias`: `[sum of rows]`.
    ///
    /// # Errors
    /// Those of [`pack`](Self::pack), and [`KernelError::Shape`] for an order that is no permutation.
    pub(crate) fn pack_stored(
        parts: &[&dyn StoredMatrix],
        bias: Option<&[f32]>,
        scheme: Scheme,
        pool: &ThreadPool,
    ) -> Result<Self, KernelError> {
        let stack = StoredStack::new(parts, bias)?;
        let shape = [stack.rows, stack.cols];
        if stack.fits(scheme) {
            if let Some(order) = stack.order() {
                check_order("pack", order, stack.cols)?;
            }
            let order = stack.order().map(<[u32]>::to_vec);
            let most = stack.rows.div_ceil(PANEL) / (TASKS_PER_THREAD * pool.num_threads());
            let together = stored::panels_together(&stack, scheme).min(most).max(1);
            return Self::build(shape, scheme, bias, order, pool, together, &|panels, cut, codes, scales, zeros| {
                stored::pack_panels(&stack, panels, scheme, cut, codes, scales, zeros)
            });
        }
        let quantize = best_quantizer();
        Self::build(shape, scheme, bias, None, pool, 1, &|panels, cut, codes, scales, zeros| {
            let panel = Panel { scheme, cut, cols: stack.cols, source: Source::Stored(&stack, panels.start) };
            // SAFETY: the variant was chosen for this machine.
            unsafe { quantize(&panel, codes, scales, zeros) }
        })
    }

    /// Calls `fill` for all panels, `together` at a time, with their numbers, how their input features are cut, and their
    /// codes, scales and zero points, to be written. It says whether all weights were finite.
    fn build(
        [rows, cols]: [usize; 2],
        scheme: Scheme,
        bias: Option<&[f32]>,
        order: Option<Vec<u32>>,
        pool: &ThreadPool,
        together: usize,
        fill: &FillPanels<'_>,
    ) -> Result<Self, KernelError> {
        check_cols(scheme, cols)?;
        let (cut, panels) = (Cut::new(scheme, cols), rows.div_ceil(PANEL));
        let sizes = Sizes::new(scheme, rows, cols);
        let mut codes = AlignedBuf::<u8>::zeroed("a weight matrix", sizes.codes)?;
        let mut scales = AlignedBuf::<u16>::zeroed("scales of a weight matrix", sizes.scales)?;
        let mut zeros = AlignedBuf::<u8>::zeroed("zero points of a weight matrix", sizes.zeros)?;
        let (to_codes, to_scales, to_zeros) =
            (SendPtr(codes.as_mut_ptr()), SendPtr(scales.as_mut_ptr()), SendPtr(zeros.as_mut_ptr()));
        let (panel_bytes, panel_params) = (panel_bytes(scheme, cut.padded), cut.scale_groups * PANEL);
        let finite = AtomicBool::new(true);
        let panel_zeros = if scheme.has_zero_points() { panel_params } else { 0 };
        pool.run(panels.div_ceil(together), &|task, _| {
            let (first, end) = (task * together, panels.min((task + 1) * together));
            let count = end - first;
            // SAFETY: the panels of tasks are disjoint, and the buffers hold `panels` of them.
            let (codes, scales, zeros) = unsafe {
                (
                    std::slice::from_raw_parts_mut(to_codes.get().add(first * panel_bytes), count * panel_bytes),
                    std::slice::from_raw_parts_mut(to_scales.get().add(first * panel_params), count * panel_params),
                    std::slice::from_raw_parts_mut(to_zeros.get().add(first * panel_zeros), count * panel_zeros),
                )
            };
            if !fill(first..end, cut, codes, scales, zeros) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        if !finite.into_inner() {
            return Err(KernelError::NotFinite { op: "pack", what: "a weight that is to be quantized" });
        }
        let (codes, scales, zeros) = (codes.into(), scales.into(), zeros.into());
        Ok(Self { rows, cols, scheme, cut, codes, scales, zeros, bias: padded_bias(rows, bias), order })
    }

    /// Puts [`buffers`](Self::buffers) together again.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if they are not those of a matrix of `shape`.
    pub(crate) fn from_buffers(
        shape: &PackedShape,
        scheme: Scheme,
        buffers: &[SharedBytes],
    ) -> Result<Self, KernelError> {
        let (rows, cols) = (shape.rows, shape.cols);
        check_cols(scheme, cols)?;
        let (wanted, found) = (if shape.order { 5 } else { 4 }, buffers.len());
        let [codes, scales, zeros, bias, order @ ..] = buffers else {
            return Err(KernelError::Shape { op: "import", what: "number of buffers", wanted, found });
        };
        check("import", "number of buffers", wanted, found)?;
        let order = order.first().map(|bytes| -> Result<_, KernelError> {
            check("import", "bytes of an order", cols.saturating_mul(size_of::<u32>()), bytes.len())?;
            let order: Vec<_> = bytes.as_chunks().0.iter().map(|col| u32::from_ne_bytes(*col)).collect();
            check_order("import", &order, cols)?;
            // The stack's `fits` lets no order into a scheme without groups.
            check("import", "orders of a scheme without groups", 0, usize::from(scheme.group().is_none()))?;
            Ok(order)
        });
        let sizes = Sizes::new(scheme, rows, cols);
        Ok(Self {
            rows,
            cols,
            scheme,
            cut: Cut::new(scheme, cols),
            codes: WeightBuf::shared("bytes of codes", sizes.codes, codes.clone())?,
            scales: WeightBuf::shared("bytes of scales", sizes.scales, scales.clone())?,
            zeros: WeightBuf::shared("bytes of zero points", sizes.zeros, zeros.clone())?,
            bias: bias_from_bytes(shape, bias)?,
            order: order.transpose()?,
        })
    }

    /// What is to be stored of it: codes, scales, zero points and bias, and the order of its input features if it has one.
    pub(crate) fn buffers(&self) -> Vec<&[u8]> {
        let mut buffers =
            vec![self.codes.bytes(), self.scales.bytes(), self.zeros.bytes(), bytemuck::cast_slice(&self.bias)];
        buffers.extend(self.order().map(bytemuck::cast_slice));
        buffers
    }

    /// Output features, `N`.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features, `K`.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How it is quantized.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.codes.len() + 2 * self.scales.len() + self.zeros.len() + 4 * self.order().map_or(0, <[u32]>::len)
    }

    /// The input feature at each place of a row, if they are not in order.
    pub(crate) fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    pub(super) fn cut(&self) -> Cut {
        self.cut
    }

    pub(crate) fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// The codes of panel `panel`, as [`int8`] or [`int4`] lay them out.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let bytes = panel_bytes(self.scheme, self.cut.padded);
        &self.codes[panel * bytes..][..bytes]
    }

    /// The scales (f16) of panel `panel` for group `group` of the activations.
    #[inline(always)]
    pub(super) fn scales(&self, panel: usize, group: usize) -> &[u16; PANEL] {
        let at = self.params_at(panel, group);
        self.scales[at..at + PANEL].try_into().expect("the slice has this length")
    }

    /// The zero points of panel `panel` for group `group` of the activations; only if the scheme has any.
    #[inline(always)]
    pub(super) fn zeros(&self, panel: usize, group: usize) -> &[u8; PANEL] {
        let at = self.params_at(panel, group);
        self.zeros[at..at + PANEL].try_into().expect("the slice has this length")
    }

    #[inline(always)]
    fn params_at(&self, panel: usize, group: usize) -> usize {
        let group = if self.cut.scale_groups == 1 { 0 } else { group };
        (panel * self.cut.scale_groups + group) * PANEL
    }

    /// The bias of panel `panel`; zeros without one.
    pub(super) fn panel_bias(&self, panel: usize) -> [f32; PANEL] {
        let mut bias = [0.0; PANEL];
        if !self.bias.is_empty() {
            bias.copy_from_slice(&self.bias[panel * PANEL..][..PANEL]);
        }
        bias
    }

    /// The code of input feature `k` of output feature `lane` of a panel.
    pub(super) fn code(&self, panel: usize, lane: usize, k: usize) -> u8 {
        match self.scheme.weight_bits() {
            WeightBits::Eight => int8::code(self.panel(panel), lane, k),
            WeightBits::Four => int4::code(self.panel(panel), lane, k),
        }
    }

    /// How the codes of output feature `lane` of a panel are to be read in group `group` of the activations.
    pub(super) fn params(&self, panel: usize, lane: usize, group: usize) -> GroupParams {
        let scale = f16::from_bits(self.scales(panel, group)[lane]);
        let zero = if self.zeros.is_empty() { symmetric_zero(self.scheme) } else { self.zeros(panel, group)[lane] };
        GroupParams { scale, zero }
    }

    /// Row `row` as f32 into `out` `[K]`: an embedding.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        if let Some(order) = self.order() {
            for (place, &col) in order.iter().enumerate() {
                out[col as usize] =
                    self.params(panel, lane, place / self.cut.group).weight(self.code(panel, lane, place));
            }
            return;
        }
        for (group, out) in out.chunks_mut(self.cut.group.max(1)).enumerate() {
            let params = self.params(panel, lane, group);
            for (i, out) in out.iter_mut().enumerate() {
                *out = params.weight(self.code(panel, lane, group * self.cut.group + i));
            }
        }
    }
}

/// The code of 0 in a scheme without zero points.
pub(super) fn symmetric_zero(scheme: Scheme) -> u8 {
    match scheme.weight_bits() {
        WeightBits::Eight => int8::ZERO,
        WeightBits::Four => int4::ZERO,
    }
}

pub(super) fn panel_bytes(scheme: Scheme, padded: usize) -> usize {
    match scheme.weight_bits() {
        WeightBits::Eight => int8::panel_bytes(padded),
        WeightBits::Four => int4::panel_bytes(padded),
    }
}

/// Whether the scheme can sum so many columns.
fn check_cols(scheme: Scheme, cols: usize) -> Result<(), KernelError> {
    let wanted = Cut::max_cols(scheme);
    if cols <= wanted {
        return Ok(());
    }
    let what = "columns of a quantized matrix, at most";
    Err(KernelError::Shape { op: "pack", what, wanted, found: cols })
}

/// Elements of the buffers of a matrix.
struct Sizes {
    codes: usize,
    scales: usize,
    zeros: usize,
}

impl Sizes {
    fn new(scheme: Scheme, rows: usize, cols: usize) -> Self {
        let (cut, panels) = (Cut::new(scheme, cols), rows.div_ceil(PANEL));
        let params = panels.saturating_mul(cut.scale_groups * PANEL);
        let codes = panels.saturating_mul(panel_bytes(scheme, cut.padded));
        Self { codes, scales: params, zeros: if scheme.has_zero_points() { params } else { 0 } }
    }
}

/// Bytes of a quantized `[rows, cols]` matrix.
pub(crate) fn packed_bytes(scheme: Scheme, rows: usize, cols: usize) -> usize {
    let sizes = Sizes::new(scheme, rows, cols);
    sizes.codes.saturating_add(sizes.scales.saturating_mul(2)).saturating_add(sizes.zeros)
}

/// Fills panels: `(their numbers, cut, codes, scales, zeros)`; whether all weights were finite.
type FillPanels<'a> = dyn Fn(Range<usize>, Cut, &mut [u8], &mut [u16], &mut [u8]) -> bool + Sync + 'a;

/// A panel to be quantized.
pub(super) struct Panel<'a> {
    pub(super) scheme: Scheme,
    pub(super) cut: Cut,
    pub(super) cols: usize,
    pub(super) source: Source<'a>,
}

/// Where the weights of a panel come from.
pub(super) enum Source<'a> {
    /// Up to 16 rows of so many elements of a type.
    Bytes(&'a [&'a [u8]], DType),
    /// The rows of this panel of matrices that give them a tile at a time, or a row of it.
    Stored(&'a StoredStack<'a>, usize),
}

impl Source<'_> {
    /// How many rows there are: fewer than 16 in the last panel.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Bytes(rows, _) => rows.len(),
            Self::Stored(stack, panel) => PANEL.min(stack.rows - panel * PANEL),
        }
    }
}

/// `(panel, codes, scales, zeros)`; whether all weights were finite.
type Quantizer = unsafe fn(&Panel<'_>, &mut [u8], &mut [u16], &mut [u8]) -> bool;

fn best_quantizer() -> Quantizer {
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    if super::super::isa::Isa::Avx2.is_available() {
        return quantize_with_avx2;
    }
    quantize_plain
}

/// The same codes as [`quantize_panel`]: of groups by [an implementation of its own](quantize_avx2::panel), else by that one, compiled
/// for AVX2.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize_with_avx2(panel: &Panel<'_>, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) -> bool {
    if let Some(group) = panel.scheme.group() {
        // SAFETY: the caller's promise, passed on.
        return unsafe { quantize_avx2::panel(panel, group, codes, scales, zeros) };
    }
    quantize_panel(panel, codes, scales, zeros)
}

/// [`quantize_panel`], for every machine.
///
/// # Safety
/// None is needed.
unsafe fn quantize_plain(panel: &Panel<'_>, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) -> bool {
    quantize_panel(panel, codes, scales, zeros)
}

/// Rounds the groups of a row; their scales and zero points, if there are any, are 16 apart.
#[inline(always)]
fn quantize_groups<const N: usize>(
    values: &[[f32; N]],
    codes: &mut [[u8; N]],
    scheme: Scheme,
    (scales, zeros): (&mut [u16], &mut [u8]),
) {
    for (at, (values, codes)) in values.iter().zip(codes).enumerate() {
        quantize_group(values, codes, scheme, at, (scales, zeros));
    }
}

/// The same, of groups of any length.
#[inline(always)]
fn quantize_row(
    values: &[f32],
    codes: &mut [u8],
    group: usize,
    scheme: Scheme,
    (scales, zeros): (&mut [u16], &mut [u8]),
) {
    for (at, (values, codes)) in values.chunks(group).zip(codes.chunks_mut(group)).enumerate() {
        quantize_group(values, codes, scheme, at, (scales, zeros));
    }
}

/// Group `at` of a row.
#[inline(always)]
fn quantize_group(
    values: &[f32],
    codes: &mut [u8],
    scheme: Scheme,
    at: usize,
    (scales, zeros): (&mut [u16], &mut [u8]),
) {
    let params = match (scheme.weight_bits(), scheme.has_zero_points()) {
        (WeightBits::Eight, _) => int8::quantize(values, codes),
        (WeightBits::Four, false) => int4::quantize(values, codes),
        (WeightBits::Four, true) => int4::quantize_with_zero(values, codes),
    };
    scales[at * PANEL] = params.scale.to_bits();
    if scheme.has_zero_points() {
        zeros[at * PANEL] = params.zero;
    }
}

#[inline(always)]
pub(super) fn quantize_panel(panel: &Panel<'_>, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) -> bool {
    let Panel { scheme, cut, cols, ref source } = *panel;
    let rows = source.rows();
    let bits = scheme.weight_bits();
    let grouped = scheme.group().is_some();
    let (stretch, group) = if grouped { (STRETCH, cut.group) } else { (cut.padded.max(1), cut.padded.max(1)) };
    let (mut values, mut row_codes) = (vec![0.0f32; stretch], vec![0u8; stretch]);
    // Codes of several rows may share their bytes; values stand row by row, and need no tile beside those of the row.
    let tiled = matches!(source, Source::Stored(stack, _) if stack.has_codes());
    let mut tile = vec![0.0f32; if tiled { rows * stretch } else { 0 }];
    let mut poison = 0.0;
    for first in (0..cut.padded).step_by(stretch) {
        let len = stretch.min(cut.padded - first);
        let (values, row_codes) = (&mut values[..len], &mut row_codes[..len]);
        let from = panel_bytes(scheme, first);
        let codes = &mut codes[from..from + panel_bytes(scheme, len)];
        let stored = len.min(cols.saturating_sub(first));
        if let Source::Stored(stack, panel) = source
            && tiled
        {
            let rows = panel * PANEL..panel * PANEL + rows;
            stack.values(rows.clone(), first..first + stored, &mut tile[..rows.len() * stored]);
        }
        for lane in 0..PANEL {
            match source {
                _ if lane >= rows => values.fill(0.0),
                Source::Bytes(rows, dtype) => {
                    let size = dtype.size_bytes();
                    widen(&rows[lane][first * size..][..stored * size], *dtype, values);
                }
                Source::Stored(..) if tiled => values[..stored].copy_from_slice(&tile[lane * stored..][..stored]),
                Source::Stored(stack, panel) => {
                    let row = panel * PANEL + lane;
                    stack.values(row..row + 1, first..first + stored, &mut values[..stored]);
                }
            }
            values[stored..].fill(0.0);
            // Not a number if any value is infinite or none; in lanes, since a sum in order cannot be made of vectors.
            let mut lanes = [0.0f32; 16];
            for values in values.as_chunks::<16>().0 {
                for i in 0..16 {
                    lanes[i] += values[i] * 0.0;
                }
            }
            poison += lanes.into_iter().sum::<f32>();
            let at = first / group * PANEL + lane;
            let params = (&mut scales[at..], zeros.get_mut(at..).unwrap_or_default());
            match group {
                // Of a known length, loops have no ends to see to.
                32 => quantize_groups::<32>(values.as_chunks().0, row_codes.as_chunks_mut().0, scheme, params),
                64 => quantize_groups::<64>(values.as_chunks().0, row_codes.as_chunks_mut().0, scheme, params),
                128 => quantize_groups::<128>(values.as_chunks().0, row_codes.as_chunks_mut().0, scheme, params),
                _ => quantize_row(values, row_codes, group, scheme, params),
            }
            match bits {
                WeightBits::Eight => int8::place(codes, lane, row_codes),
                WeightBits::Four => int4::place(codes, lane, row_codes),
            }
        }
    }
    poison == 0.0
}
