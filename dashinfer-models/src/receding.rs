//! A matrix in a source's memory, given back behind whoever packs it: so a mapped file never has much of a matrix in memory.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use dashinfer_kernels::{KernelError, MatrixView, StoredMatrix};

use crate::WeightSource;

/// Bytes that are given back at once: some calls of the system for a gigabyte, and the pages across the ends of a run, which stay until the
/// tensor goes, are few.
pub(crate) const RUN_BYTES: usize = 8 << 20;

/// A matrix of floating point whose rows are given back, run by run, when the last columns of all rows of the run were read. If some
/// are read another time, or never, that only takes memory.
pub(crate) struct Receding<'a> {
    view: MatrixView<'a>,
    source: &'a dyn WeightSource,
    name: String,
    /// Rows of a run; the last may have fewer.
    run: usize,
    /// How many rows of each run were read.
    read: Vec<AtomicUsize>,
}

impl<'a> Receding<'a> {
    /// `view`: all of the tensor `name` of `source`. `run_bytes`: about as many are given back at once.
    pub(crate) fn new(view: MatrixView<'a>, source: &'a dyn WeightSource, name: String, run_bytes: usize) -> Self {
        let row_bytes = view.cols.saturating_mul(view.dtype.size_bytes());
        let run = (run_bytes / row_bytes.max(1)).max(1);
        let read = (0..view.rows.div_ceil(run)).map(|_| AtomicUsize::new(0)).collect();
        Self { view, source, name, run, read }
    }

    /// Counts `rows` as read, and gives the runs back that they complete.
    fn count(&self, rows: Range<usize>) {
        for run in rows.start / self.run..rows.end.div_ceil(self.run) {
            let all = run * self.run..self.view.rows.min((run + 1) * self.run);
            let new = rows.end.min(all.end) - rows.start.max(all.start);
            if self.read[run].fetch_add(new, Ordering::Relaxed) + new == all.len() {
                self.source.done_with_rows(&self.name, all);
            }
        }
    }
}

impl StoredMatrix for Receding<'_> {
    fn rows(&self) -> usize {
        self.view.rows
    }

    fn cols(&self) -> usize {
        self.view.cols
    }

    fn check(&self) -> Result<(), KernelError> {
        self.view.check()
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        self.view.values(rows.clone(), cols.clone(), out);
        if cols.end == self.view.cols && !cols.is_empty() {
            self.count(rows);
        }
    }

    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
        self.view.codes(rows, places, out);
    }

    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]) {
        self.view.params(rows, group, scales, zeros);
    }
}

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, sync::Mutex};

    use dashinfer_kernels::{
        Backend, DType, Scheme,
        cpu::{CpuBackend, CpuConfig, to_bytes},
    };

    use super::*;
    use crate::TensorInfo;

    /// Keeps what is done with.
    #[derive(Default)]
    struct Done(Mutex<Vec<(String, Range<usize>)>>);

    impl Done {
        /// What was done with of tensor `name`, in order of its rows.
        fn rows(&self, name: &str) -> Vec<Range<usize>> {
            let done = self.0.lock().unwrap();
            let mut rows: Vec<_> = done.iter().filter(|(of, _)| of == name).map(|(_, rows)| rows.clone()).collect();
            rows.sort_unstable_by_key(|rows| rows.start);
            rows
        }
    }

    impl WeightSource for Done {
        fn names(&self) -> Vec<&str> {
            unreachable!("rows come from the view")
        }

        fn info(&self, _: &str) -> Option<TensorInfo> {
            unreachable!("rows come from the view")
        }

        fn read(&self, _: &str) -> Option<Cow<'_, [u8]>> {
            unreachable!("rows come from the view")
        }

        fn done_with_rows(&self, name: &str, rows: Range<usize>) {
            self.0.lock().unwrap().push((name.to_owned(), rows));
        }
    }

    /// Numbers between -1 and 1 that all types round differently.
    fn values(len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| (i as f32 * 0.618_034).fract().mul_add(2.0, -1.0) * if i % 97 == 0 { 3.0 } else { 1.0 })
            .collect()
    }

    /// Parts of `types`, packed from plain memory and as they recede, make the same bytes, and all of their rows are given back, once.
    #[track_caller]
    fn check(backend: &CpuBackend, parts: &[(usize, DType)], cols: usize, scheme: Scheme) {
        let all: Vec<_> = parts.iter().map(|(rows, dtype)| to_bytes(&values(rows * cols), *dtype)).collect();
        let view = |bytes, &(rows, dtype): &(usize, DType)| MatrixView { bytes, dtype, rows, cols };
        let common = crate::loader::common_type(parts.iter().map(|part| part.1));
        // What the other way does with types that differ.
        let widened: Vec<_> = parts
            .iter()
            .zip(&all)
            .map(|((_, dtype), bytes)| {
                if *dtype == common {
                    bytes.clone()
                } else {
                    to_bytes(&dashinfer_kernels::to_f32(bytes, *dtype), DType::F32)
                }
            })
            .collect();
        let views: Vec<_> =
            parts.iter().zip(&widened).map(|((rows, _), bytes)| view(bytes, &(*rows, common))).collect();
        let bias: Vec<f32> = values(parts.iter().map(|part| part.0).sum());
        let wanted = backend.pack(&views, Some(&bias), Some(scheme)).unwrap();

        let source = Done::default();
        let row_bytes = cols * 2;
        let matrices: Vec<_> = parts
            .iter()
            .zip(&all)
            .enumerate()
            .map(|(i, (part, bytes))| Receding::new(view(bytes, part), &source, i.to_string(), 7 * row_bytes))
            .collect();
        let receding: Vec<&dyn StoredMatrix> = matrices.iter().map(|matrix| matrix as _).collect();
        let found = backend.pack_stored(&receding, Some(&bias), Some(scheme)).unwrap();
        assert!(backend.export(&found) == backend.export(&wanted), "{scheme}, {parts:?}, {cols} columns");
        for (i, &(rows, dtype)) in parts.iter().enumerate() {
            let run = 7 * 2 / dtype.size_bytes();
            let runs: Vec<_> = (0..rows).step_by(run).map(|first| first..rows.min(first + run)).collect();
            assert_eq!(source.rows(&i.to_string()), runs, "{scheme}, {parts:?}, {cols} columns");
        }
    }

    #[test]
    fn what_recedes_is_packed_into_the_same_bytes_and_given_back() {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        for scheme in Scheme::ALL {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                check(&backend, &[(37, dtype)], 1100, scheme);
                check(&backend, &[(16, dtype), (5, dtype), (0, dtype), (30, dtype)], 67, scheme);
                check(&backend, &[(1, dtype)], 1, scheme);
                check(&backend, &[(33, dtype)], 512, scheme);
            }
            check(&backend, &[(19, DType::BF16), (8, DType::F32), (23, DType::F16)], 515, scheme);
        }
    }

    #[test]
    fn what_is_not_finite_or_too_short_is_refused_as_ever() {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let (source, scheme) = (Done::default(), Some(Scheme::ALL[0]));
        let mut bytes = to_bytes(&values(20 * 40), DType::BF16);
        bytes.pop();
        let both = |bytes: &[u8]| {
            let view = MatrixView { bytes, dtype: DType::BF16, rows: 20, cols: 40 };
            let wanted = backend.pack(&[view], None, scheme).unwrap_err().to_string();
            let receding = Receding::new(view, &source, "a".to_owned(), RUN_BYTES);
            assert_eq!(backend.pack_stored(&[&receding], None, scheme).unwrap_err().to_string(), wanted);
            wanted
        };
        assert_eq!(both(&bytes), "pack: bytes of a part should be 1600, found 1599");
        bytes.push(0);
        bytes[1500..1502].copy_from_slice(&[0x80, 0x7f]); // infinite
        both(&bytes);
        let done = source.rows("a");
        assert!(done.len() == 1 && done[0] == (0..20), "{done:?}");
    }
}
