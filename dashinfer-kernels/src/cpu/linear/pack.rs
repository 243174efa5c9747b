//! The layout of dense weights: panels of 16 output features.
//!
//! A matrix `[N, K]` becomes `ceil(N / 16)` panels `[K][16]`, the last one padded with zeros. A kernel walks a panel from
//! its first byte to its last, and at each step multiplies one value of each of its rows of `x` with 16 weights. So every
//! output is one chain of fused multiply-adds over `k = 0, 1, ..`, whatever the number of rows and on every instruction
//! set: that is why a row's result does not depend on its batch.
//!
//! Weights in bf16 stand in pairs of neighbouring `k`, `[K / 2][16][2]`, with `K` padded to 32: as little-endian 32-bit lanes, a shift gives
//! the even one of each column as f32 and a mask the odd one, and dot products of bf16 eat the pairs as they are.

use half::{bf16, f16};

use super::super::aligned::AlignedBuf;
use super::super::pool::ThreadPool;
use super::super::weight_buf::WeightBuf;
use crate::error::check;
use crate::quant::stored::StoredStack;
use crate::{DType, KernelError, MatrixView, PackedShape, SharedBytes, StoredMatrix};

/// Output features of a panel.
pub(crate) const PANEL: usize = 16;

/// Input features of a panel that are brought to f32 at a time.
const STRETCH: usize = 256;

/// A weight matrix `[N, K]` in panels, and its bias.
#[derive(Debug)]
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    dtype: DType,
    data: WeightBuf<u8>,
    /// `[panels * 16]`, zeros behind the last row; empty without a bias.
    bias: Vec<f32>,
}

impl PackedMatrix {
    /// Packs `parts`, stacked along the output features. `bias`: `[sum of rows]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in type or columns, or a length is off; [`KernelError::OutOfMemory`].
    pub fn pack(parts: &[MatrixView<'_>], bias: Option<&[f32]>, pool: &ThreadPool) -> Result<Self, KernelError> {
        let stack = Stack::new(parts, bias)?;
        let (rows, cols, dtype, panels) = (stack.rows, stack.cols, stack.dtype, stack.rows.div_ceil(PANEL));
        let mut data = AlignedBuf::<u8>::zeroed("a weight matrix", packed_bytes(rows, cols, dtype))?;
        let panel_bytes = panel_bytes(cols, dtype);
        let start = SendPtr(data.as_mut_ptr());
        pool.run(panels, &|panel, _| {
            // SAFETY: panels are disjoint, each is `panel_bytes` long, and all lie within `data`.
            let out = unsafe { std::slice::from_raw_parts_mut(start.get().add(panel * panel_bytes), panel_bytes) };
            let row_bytes = cols * dtype.size_bytes();
            // A stretch of all rows at a time, so that the part of the panel which they share stays in the L1 cache.
            let stretch = 256 * dtype.size_bytes();
            for (index, out) in out.chunks_mut(stretch * PANEL).enumerate() {
                for (lane, source) in stack.panel(panel).enumerate() {
                    let source = &source[index * stretch..row_bytes.min((index + 1) * stretch)];
                    scatter(out, source, dtype, lane);
                }
            }
        });
        Ok(Self { rows, cols, dtype, data: data.into(), bias: stack.padded_bias() })
    }

    /// Packs `parts` that were stored quantized, stacked along the output features, as f32. `bias`: `[sum of rows]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in columns, or the bias in length; [`KernelError::OutOfMemory`].
    pub(crate) fn pack_stored(
        parts: &[&dyn StoredMatrix],
        bias: Option<&[f32]>,
        pool: &ThreadPool,
    ) -> Result<Self, KernelError> {
        let stack = StoredStack::new(parts, bias)?;
        let (rows, cols, dtype) = (stack.rows, stack.cols, DType::F32);
        let mut data = AlignedBuf::<u8>::zeroed("a weight matrix", packed_bytes(rows, cols, dtype))?;
        let panel_bytes = panel_bytes(cols, dtype);
        let start = SendPtr(data.as_mut_ptr());
        pool.run(rows.div_ceil(PANEL), &|panel, _| {
            // SAFETY: panels are disjoint, each is `panel_bytes` long, and all lie within `data`.
            let out = unsafe { std::slice::from_raw_parts_mut(start.get().add(panel * panel_bytes), panel_bytes) };
            let rows = panel * PANEL..rows.min((panel + 1) * PANEL);
            let mut tile = [0.0f32; PANEL * STRETCH];
            for (index, out) in out.chunks_mut(STRETCH * PANEL * size_of::<f32>()).enumerate() {
                let cols = index * STRETCH..cols.min((index + 1) * STRETCH);
                let tile = &mut tile[..rows.len() * cols.len()];
                stack.values(rows.clone(), cols.clone(), tile);
                for (k, out) in out.as_chunks_mut::<{ PANEL * size_of::<f32>() }>().0.iter_mut().enumerate() {
                    for (out, row) in out.as_chunks_mut().0.iter_mut().zip(tile.chunks_exact(cols.len())) {
                        *out = row[k].to_le_bytes();
                    }
                }
            }
        });
        Ok(Self { rows, cols, dtype, data: data.into(), bias: padded_bias(rows, bias) })
    }

    /// Puts [`buffers`](Self::buffers) together again.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if they are not those of a matrix of `shape`.
    pub(crate) fn from_buffers(shape: &PackedShape, buffers: &[SharedBytes]) -> Result<Self, KernelError> {
        let &PackedShape { rows, cols, dtype, .. } = shape;
        let [data, bias] = buffers else {
            return Err(KernelError::Shape {
                op: "import",
                what: "number of buffers",
                wanted: 2,
                found: buffers.len(),
            });
        };
        let data = WeightBuf::shared("bytes of weights", packed_bytes(rows, cols, dtype), data.clone())?;
        Ok(Self { rows, cols, dtype, data, bias: bias_from_bytes(shape, bias)? })
    }

    /// What is to be stored of it: panels and bias.
    pub(crate) fn buffers(&self) -> [&[u8]; 2] {
        [self.data.bytes(), bytemuck::cast_slice(&self.bias)]
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

    /// The stored type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Panel `panel`: `[K][16]`, or of bf16 `[K / 2][16][2]`.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        let bytes = panel_bytes(self.cols, self.dtype);
        &self.data[panel * bytes..][..bytes]
    }

    /// The bias of panel `panel`; zeros without one.
    pub(crate) fn panel_bias(&self, panel: usize) -> [f32; PANEL] {
        let mut bias = [0.0; PANEL];
        if !self.bias.is_empty() {
            bias.copy_from_slice(&self.bias[panel * PANEL..][..PANEL]);
        }
        bias
    }

    /// Row `row` as f32 into `out` `[K]`: an embedding.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let panel = self.panel(row / PANEL);
        for (k, out) in out.iter_mut().enumerate() {
            *out = crate::element(panel, self.dtype, place(row % PANEL, k, self.dtype));
        }
    }
}

/// Matrices stacked along their output features, whose shapes were checked to fit.
pub(crate) struct Stack<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) dtype: DType,
    /// The first row of each part.
    parts: Vec<(usize, MatrixView<'a>)>,
    bias: Option<&'a [f32]>,
}

impl<'a> Stack<'a> {
    /// # Errors
    /// [`KernelError::Shape`] if the parts differ in columns, or a length is off; [`KernelError::Unsupported`] if they differ in type.
    pub(crate) fn new(views: &[MatrixView<'a>], bias: Option<&'a [f32]>) -> Result<Self, KernelError> {
        let Some(first) = views.first() else {
            return Err(KernelError::Shape { op: "pack", what: "number of parts", wanted: 1, found: 0 });
        };
        let (dtype, cols) = (first.dtype, first.cols);
        let mut parts = Vec::with_capacity(views.len());
        let mut rows = 0;
        for part in views {
            check("pack", "columns of a part", cols, part.cols)?;
            check("pack", "element size of a part", dtype.size_bytes(), part.dtype.size_bytes())?;
            if part.dtype != dtype {
                let what = format!("{} beside {} in one matrix", part.dtype, dtype);
                return Err(KernelError::Unsupported { op: "pack", what, backend: "cpu" });
            }
            let bytes = part.rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size_bytes()));
            check("pack", "bytes of a part", bytes.unwrap_or(usize::MAX), part.bytes.len())?;
            parts.push((rows, *part));
            rows += part.rows;
        }
        if let Some(bias) = bias {
            check("pack", "length of the bias", rows, bias.len())?;
        }
        Ok(Self { rows, cols, dtype, parts, bias })
    }

    /// The bias of whole panels, zeros behind the last row; empty without one.
    pub(crate) fn padded_bias(&self) -> Vec<f32> {
        padded_bias(self.rows, self.bias)
    }

    /// The rows of panel `panel` as they are stored, `[cols]` each.
    pub(crate) fn panel(&self, panel: usize) -> impl Iterator<Item = &'a [u8]> {
        let row_bytes = self.cols * self.dtype.size_bytes();
        (0..PANEL.min(self.rows - panel * PANEL)).map(move |lane| {
            let row = panel * PANEL + lane;
            // Parts without rows share their first row with the part behind them, which is the one found.
            let (first_row, part) = self.parts[self.parts.partition_point(|(first_row, _)| *first_row <= row) - 1];
            &part.bytes[(row - first_row) * row_bytes..][..row_bytes]
        })
    }
}

/// `bias`, of a matrix of `rows` rows, for whole panels: zeros behind the last row; empty without one.
pub(crate) fn padded_bias(rows: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut padded = Vec::new();
    if let Some(bias) = bias {
        padded.extend_from_slice(bias);
        padded.resize(rows.div_ceil(PANEL) * PANEL, 0.0);
    }
    padded
}

/// The bias of whole panels that was stored for a matrix of `shape`.
pub(crate) fn bias_from_bytes(shape: &PackedShape, bytes: &[u8]) -> Result<Vec<f32>, KernelError> {
    let len = if shape.bias { shape.rows.div_ceil(PANEL).saturating_mul(PANEL) } else { 0 };
    check("import", "bytes of the bias", len.saturating_mul(size_of::<f32>()), bytes.len())?;
    Ok(bytes.as_chunks().0.iter().map(|value| f32::from_ne_bytes(*value)).collect())
}

/// Bytes of a packed `[rows, cols]` matrix.
pub(crate) fn packed_bytes(rows: usize, cols: usize, dtype: DType) -> usize {
    rows.div_ceil(PANEL).saturating_mul(panel_bytes(cols, dtype))
}

/// Input features of bf16 are padded to whole steps of this many.
pub(crate) const BF16_STEP: usize = 32;

fn panel_bytes(cols: usize, dtype: DType) -> usize {
    let cols = match dtype {
        DType::BF16 => cols.checked_next_multiple_of(BF16_STEP).unwrap_or(cols),
        DType::F16 | DType::F32 => cols,
    };
    cols.saturating_mul(PANEL * dtype.size_bytes())
}

/// The element of a panel that holds input feature `k` of output feature `lane`.
pub(crate) fn place(lane: usize, k: usize, dtype: DType) -> usize {
    match dtype {
        DType::BF16 => k / 2 * (2 * PANEL) + lane * 2 + k % 2,
        DType::F16 | DType::F32 => k * PANEL + lane,
    }
}

/// Spreads one row's values over the groups of a panel.
fn scatter(panel: &mut [u8], row: &[u8], dtype: DType, lane: usize) {
    fn spread<const SIZE: usize>(panel: &mut [u8], row: &[u8], lane: usize) {
        let groups = panel.as_chunks_mut::<SIZE>().0.chunks_exact_mut(PANEL);
        for (group, value) in groups.zip(row.as_chunks::<SIZE>().0) {
            group[lane] = *value;
        }
    }
    match dtype {
        DType::F32 => spread::<4>(panel, row, lane),
        DType::F16 => spread::<2>(panel, row, lane),
        DType::BF16 => {
            // Two values at a time; the last may be alone.
            spread::<4>(panel, row, lane);
            if let [low, high] = row.as_chunks::<4>().1 {
                panel[row.len() / 4 * (4 * PANEL) + lane * 4..][..2].copy_from_slice(&[*low, *high]);
            }
        }
    }
}

/// A pointer that the threads of a loop share; each writes its own part.
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SendPtr<T> {}

// SAFETY: a pointer is only an address; whoever dereferences it argues for the access.
unsafe impl<T> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

/// Rounds `values` to `dtype`, little-endian: what a checkpoint would hold. For tests and random weights.
#[must_use]
pub fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::PoolConfig;

    #[test]
    fn rows_come_back_as_they_were_whatever_the_parts() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (split, rows, cols) in [(1, 19, 5), (16, 33, 8), (0, 7, 1), (7, 7, 3)] {
                let values: Vec<f32> = (0..rows * cols).map(|i| i as f32 - 50.0).collect();
                let bytes = to_bytes(&values, dtype);
                let (a, b) = bytes.split_at(split * cols * dtype.size_bytes());
                let part = |bytes, rows| MatrixView { bytes, dtype, rows, cols };
                let packed = PackedMatrix::pack(&[part(a, split), part(b, rows - split)], None, &pool).unwrap();
                let mut row = vec![0.0; cols];
                for r in 0..rows {
                    packed.read_row(r, &mut row);
                    assert_eq!(row, values[r * cols..][..cols], "{dtype} row {r}");
                }
                assert_eq!(packed.bytes(), packed_bytes(rows, cols, dtype));
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        let part = |bytes, dtype, rows, cols| MatrixView { bytes, dtype, rows, cols };
        let pack = |parts: &[MatrixView<'_>], bias| PackedMatrix::pack(parts, bias, &pool).unwrap_err().to_string();
        let zeros = [0; 64];
        assert_eq!(pack(&[], None), "pack: number of parts should be 1, found 0");
        assert_eq!(
            pack(&[part(&zeros[..63], DType::BF16, 4, 8)], None),
            "pack: bytes of a part should be 64, found 63"
        );
        assert_eq!(
            pack(&[part(&zeros, DType::BF16, 4, 8), part(&zeros, DType::BF16, 8, 4)], None),
            "pack: columns of a part should be 8, found 4"
        );
        assert_eq!(
            pack(&[part(&zeros, DType::BF16, 4, 8), part(&zeros, DType::F16, 4, 8)], None),
            "pack: f16 beside bf16 in one matrix is not supported by the cpu backend"
        );
        assert_eq!(
            pack(&[part(&zeros, DType::BF16, 4, 8)], Some(&[0.0; 3])),
            "pack: length of the bias should be 4, found 3"
        );
        assert!(pack(&[part(&zeros, DType::F32, usize::MAX, 8)], None).contains("bytes of a part"));
    }
}
