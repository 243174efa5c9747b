//! The memory of packed weights: of our own, or shared with whoever else has the same file mapped.

use std::ptr::NonNull;

use bytemuck::{AnyBitPattern, NoUninit};

use super::aligned::{AlignedBuf, CACHE_LINE};
use crate::error::check;
use crate::{KernelError, SharedBytes};

/// A fixed-length slice of plain values, aligned to a cache line, that is written no more.
#[derive(Debug)]
pub(crate) struct WeightBuf<T> {
    start: NonNull<T>,
    len: usize,
    #[expect(dead_code, reason = "kept as long as the buffer, and dropped with it")]
    memory: Memory<T>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "kept as long as the buffer, and dropped with it")]
enum Memory<T> {
    Own(AlignedBuf<T>),
    Shared(SharedBytes),
}

// SAFETY: the buffer gives out `&[T]` of memory that it owns, or holds a share of.
unsafe impl<T: Send + Sync> Send for WeightBuf<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for WeightBuf<T> {}

impl<T> From<AlignedBuf<T>> for WeightBuf<T> {
    /// What was written until now, for reading.
    fn from(mut own: AlignedBuf<T>) -> Self {
        let len = own.len();
        // Of an empty buffer too it is not null.
        let start = NonNull::from(&mut *own).cast();
        Self { start, len, memory: Memory::Own(own) }
    }
}

impl<T: NoUninit + AnyBitPattern> WeightBuf<T> {
    /// `len` values that stand in `bytes`, without a copy.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if they are not as many, or do not start on a cache line. `what` names them.
    pub(crate) fn shared(what: &'static str, len: usize, bytes: SharedBytes) -> Result<Self, KernelError> {
        check("import", what, len.saturating_mul(size_of::<T>()), bytes.len())?;
        let start = NonNull::from(&*bytes).cast::<T>();
        if len > 0 {
            check("import", "place within a cache line", 0, start.addr().get() % CACHE_LINE)?;
        }
        let start = if len > 0 { start } else { NonNull::dangling() };
        Ok(Self { start, len, memory: Memory::Shared(bytes) })
    }

    /// The values as they stand in memory.
    pub(crate) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }
}

impl<T> std::ops::Deref for WeightBuf<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is valid for `len` elements as long as `memory` lives, which `&self` shows, and nobody writes them.
        // In `shared`, length and alignment were checked (a cache line is a multiple of any `T`'s: of plain numbers), and any
        // bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{CpuBackend, CpuConfig, CpuLinear, to_bytes};
    use crate::random::noise;
    use crate::{Backend, DType, MatrixView, PackedShape, Scheme};

    #[test]
    fn own_memory_stays_what_was_written() {
        for len in [0, 5, if cfg!(miri) { 3 << 10 } else { 3 << 20 }] {
            let mut own = AlignedBuf::<u16>::zeroed("test", len).unwrap();
            own.iter_mut().enumerate().for_each(|(i, value)| *value = i as u16);
            let buf = WeightBuf::from(own);
            assert!(buf.len() == len && buf.iter().enumerate().all(|(i, &value)| value == i as u16));
            assert_eq!(buf.bytes().len(), 2 * len);
        }
    }

    #[test]
    fn shared_memory_must_fit() {
        /// So that it starts on a cache line.
        #[repr(align(64))]
        struct Line([u8; 128]);
        impl AsRef<[u8]> for Line {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let bytes = SharedBytes::new(Line(std::array::from_fn(|i| i as u8)));
        let part = |range| bytes.get(range).unwrap();
        let buf = WeightBuf::<u16>::shared("bytes of a test", 3, part(64..70)).unwrap();
        assert_eq!(buf.bytes(), [64, 65, 66, 67, 68, 69]);
        assert!(WeightBuf::<u16>::shared("bytes of a test", 0, part(3..3)).unwrap().is_empty());
        let error = |len, range| WeightBuf::<u16>::shared("bytes of a test", len, part(range)).unwrap_err().to_string();
        assert_eq!(error(3, 0..7), "import: bytes of a test should be 6, found 7");
        assert_eq!(error(usize::MAX, 0..8), format!("import: bytes of a test should be {}, found 8", usize::MAX));
        assert_eq!(error(4, 4..12), "import: place within a cache line should be 0, found 4");
    }

    /// A copy of `bytes` that starts on a cache line.
    fn stored(bytes: &[u8]) -> SharedBytes {
        struct Stored(AlignedBuf<u8>);
        impl AsRef<[u8]> for Stored {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let mut stored = AlignedBuf::zeroed("a test", bytes.len()).unwrap();
        stored.copy_from_slice(bytes);
        SharedBytes::new(Stored(stored))
    }

    /// `(backend, shape, matrix, its buffers)` of each type and scheme, with and without a bias.
    fn each_form(check: impl Fn(&CpuBackend, &PackedShape, &CpuLinear, &[SharedBytes])) {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let (rows, cols) = (37, 100);
        let (values, bias) = (noise(rows * cols, 3), noise(rows, 4));
        let dense = [DType::F32, DType::F16, DType::BF16].map(|dtype| (dtype, None));
        let forms = dense.into_iter().chain(Scheme::ALL.map(|scheme| (DType::BF16, Some(scheme))));
        for ((dtype, scheme), bias) in forms.zip([None, Some(&bias[..])].into_iter().cycle()) {
            let bytes = to_bytes(&values, dtype);
            let matrix = backend.pack(&[MatrixView { bytes: &bytes, dtype, rows, cols }], bias, scheme).unwrap();
            let buffers: Vec<_> = backend.export(&matrix).into_iter().map(stored).collect();
            let shape = PackedShape { rows, cols, dtype, scheme, bias: bias.is_some(), order: false };
            check(&backend, &shape, &matrix, &buffers);
        }
    }

    #[test]
    fn what_was_exported_is_imported() {
        each_form(|backend, shape, matrix, buffers| {
            let again = backend.import(shape, buffers).unwrap();
            assert_eq!(backend.export(&again), backend.export(matrix));
            assert_eq!((again.rows(), again.cols(), again.bytes()), (shape.rows, shape.cols, matrix.bytes()));
            let place = |matrix| backend.export(matrix)[0].as_ptr();
            assert_eq!(place(&again), buffers[0].as_ptr(), "it was copied");
        });
    }

    #[test]
    fn buffers_of_another_shape_are_refused() {
        each_form(|backend, shape, _, buffers| {
            let refused = |shape: &PackedShape, buffers: &[SharedBytes]| {
                let error = backend.import(shape, buffers).unwrap_err();
                assert!(matches!(error, KernelError::Shape { .. }), "{error}");
            };
            refused(shape, &buffers[1..]);
            refused(shape, &[buffers, &buffers[..1]].concat());
            refused(&PackedShape { rows: 50, ..*shape }, buffers);
            refused(&PackedShape { cols: 200, ..*shape }, buffers);
            refused(&PackedShape { cols: usize::MAX / 2, ..*shape }, buffers);
            refused(&PackedShape { bias: !shape.bias, ..*shape }, buffers);
            for (i, buffer) in buffers.iter().enumerate().filter(|(_, buffer)| !buffer.is_empty()) {
                let mut cut = buffers.to_vec();
                cut[i] = buffer.get(0..buffer.len() - 1).unwrap();
                refused(shape, &cut);
            }
        });
    }
}
