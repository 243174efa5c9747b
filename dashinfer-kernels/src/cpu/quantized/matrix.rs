//! [`QuantizedMatrix`]: codes in panels, scales and zero points beside them.

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use super::super::aligned::AlignedBuf;
use super::super::linear::{SendPtr, Stack, bias_from_bytes};
use super::super::pool::ThreadPool;
use super::super::weight_buf::WeightBuf;
use crate::quant::activations::Cut;
use crate::quant::{GroupParams, PANEL, Scheme, WeightBits, int4, int8};
use crate::{DType, KernelError, MatrixView, PackedShape, SharedBytes};

/// Input features of a row that are brought to f32 at a time where groups allow it: the codes of all rows of a panel then stay in
/// the L1 cache until their lines are full.
const STRETCH: usize = 512;

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
        let (rows, cols, dtype) = (stack.rows, stack.cols, stack.dtype);
        check_cols(scheme, cols)?;
        let (cut, panels) = (Cut::new(scheme, cols), rows.div_ceil(PANEL));
        let sizes = Sizes::new(scheme, rows, cols);
        let mut codes = AlignedBuf::<u8>::zeroed("a weight matrix", sizes.codes)?;
        let mut scales = AlignedBuf::<u16>::zeroed("scales of a weight matrix", sizes.scales)?;
        let mut zeros = AlignedBuf::<u8>::zeroed("zero points of a weight matrix", sizes.zeros)?;
        let (to_codes, to_scales, to_zeros) =
            (SendPtr(codes.as_mut_ptr()), SendPtr(scales.as_mut_ptr()), SendPtr(zeros.as_mut_ptr()));
        let (panel_bytes, panel_params) = (panel_bytes(scheme, cut.padded), cut.scale_groups * PANEL);
        let has_zeros = scheme.has_zero_points();
        let finite = AtomicBool::new(true);
        let quantize = best_quantizer();
        pool.run(panels, &|panel, _| {
            // SAFETY: panels are disjoint, and the buffers hold `panels` of them.
            let (codes, scales, zeros) = unsafe {
                (
                    std::slice::from_raw_parts_mut(to_codes.get().add(panel * panel_bytes), panel_bytes),
                    std::slice::from_raw_parts_mut(to_scales.get().add(panel * panel_params), panel_params),
                    std::slice::from_raw_parts_mut(
                        to_zeros.get().add(if has_zeros { panel * panel_params } else { 0 }),
                        if has_zeros { panel_params } else { 0 },
                    ),
                )
            };
            let sources: Vec<&[u8]> = stack.panel(panel).collect();
            // SAFETY: the variant was chosen for this machine.
            let all_finite =
                unsafe { quantize(&Panel { scheme, cut, cols, dtype, sources: &sources }, codes, scales, zeros) };
            if !all_finite {
                finite.store(false, Ordering::Relaxed);
            }
        });
        if !finite.into_inner() {
            return Err(KernelError::NotFinite { op: "pack", what: "a weight that is to be quantized" });
        }
        let (codes, scales, zeros) = (codes.into(), scales.into(), zeros.into());
        Ok(Self { rows, cols, scheme, cut, codes, scales, zeros, bias: stack.padded_bias() })
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
        let [codes, scales, zeros, bias] = buffers else {
            return Err(KernelError::Shape {
                op: "import",
                what: "number of buffers",
                wanted: 4,
                found: buffers.len(),
            });
        };
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
        })
    }

    /// What is to be stored of it: codes, scales, zero points and bias.
    pub(crate) fn buffers(&self) -> [&[u8]; 4] {
        [self.codes.bytes(), self.scales.bytes(), self.zeros.bytes(), bytemuck::cast_slice(&self.bias)]
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
        self.codes.len() + 2 * self.scales.len() + self.zeros.len()
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

fn panel_bytes(scheme: Scheme, padded: usize) -> usize {
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

/// A panel to be quantized: its rows as they are stored.
struct Panel<'a> {
    scheme: Scheme,
    cut: Cut,
    cols: usize,
    dtype: DType,
    /// Up to 16 rows of `cols` elements of `dtype`.
    sources: &'a [&'a [u8]],
}

/// `(panel, codes, scales, zeros)`; whether all weights were finite.
type Quantizer = unsafe fn(&Panel<'_>, &mut [u8], &mut [u16], &mut [u8]) -> bool;

fn best_quantizer() -> Quantizer {
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    if super::super::isa::Isa::Avx2.is_available() {
        return quantize_avx2;
    }
    quantize_plain
}

/// [`quantize_panel`], compiled for AVX2: the same operations on more values at a time.
///
/// # Safety
/// The machine has AVX2.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[target_feature(enable = "avx2")]
unsafe fn quantize_avx2(panel: &Panel<'_>, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) -> bool {
    quantize_panel(panel, codes, scales, zeros)
}

/// [`quantize_panel`], for every machine.
///
/// # Safety
/// None is needed.
unsafe fn quantize_plain(panel: &Panel<'_>, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) -> bool {
    quantize_panel(panel, codes, scales, zeros)
}

#[inline(always)]
fn quantize_panel(panel: &Panel<'_>, codes: &mut [u8], scales: &mut [u16], zeros: &mut [u8]) -> bool {
    let Panel { scheme, cut, cols, dtype, sources } = *panel;
    let (bits, zero_points) = (scheme.weight_bits(), scheme.has_zero_points());
    let grouped = scheme.group().is_some();
    let (stretch, group) = if grouped { (STRETCH, cut.group) } else { (cut.padded.max(1), cut.padded.max(1)) };
    let (mut values, mut row_codes) = (vec![0.0f32; stretch], vec![0u8; stretch]);
    let mut poison = 0.0;
    for first in (0..cut.padded).step_by(stretch) {
        let len = stretch.min(cut.padded - first);
        let (values, row_codes) = (&mut values[..len], &mut row_codes[..len]);
        let from = panel_bytes(scheme, first);
        let codes = &mut codes[from..from + panel_bytes(scheme, len)];
        for lane in 0..PANEL {
            let stored = len.min(cols.saturating_sub(first));
            match sources.get(lane) {
                Some(source) => {
                    widen(&source[first * dtype.size_bytes()..][..stored * dtype.size_bytes()], dtype, values)
                }
                None => values.fill(0.0),
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
            for (at, (values, codes)) in values.chunks(group).zip(row_codes.chunks_mut(group)).enumerate() {
                let params = match (bits, zero_points) {
                    (WeightBits::Eight, _) => int8::quantize(values, codes),
                    (WeightBits::Four, false) => int4::quantize(values, codes),
                    (WeightBits::Four, true) => int4::quantize_with_zero(values, codes),
                };
                let at = (first / group + at) * PANEL + lane;
                scales[at] = params.scale.to_bits();
                if zero_points {
                    zeros[at] = params.zero;
                }
            }
            match bits {
                WeightBits::Eight => int8::place(codes, lane, row_codes),
                WeightBits::Four => int4::place(codes, lane, row_codes),
            }
        }
    }
    poison == 0.0
}

/// Stored elements as f32, as many as there are.
#[inline(always)]
fn widen(bytes: &[u8], dtype: DType, out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (out, value) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*value);
            }
        }
        DType::F16 => {
            for (out, value) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f16::from_le_bytes(*value).to_f32();
            }
        }
        DType::BF16 => {
            for (out, value) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_le_bytes(*value).to_f32();
            }
        }
    }
}
