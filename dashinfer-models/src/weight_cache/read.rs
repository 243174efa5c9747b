//! Stored weights, mapped. All that a file says is checked before any of it is used.

use std::fs::{self, File};
use std::io;

use dashinfer_kernels::{Backend, KernelError, PackedShape, SharedBytes};
use memmap2::Mmap;

use super::checksum::checksums;
use super::file::{self, Extent, Item, What};
use super::{CacheFault, CacheFile};

/// The matrices and vectors of a file, to be taken in its order.
#[derive(Debug)]
pub(crate) struct StoredWeights<'a, B> {
    backend: &'a B,
    items: std::vec::IntoIter<(What, Vec<SharedBytes>)>,
}

impl What {
    pub(super) fn matrix(shape: &PackedShape) -> Self {
        let &PackedShape { rows, cols, dtype, scheme, bias, order } = shape;
        let mut form = scheme.map_or_else(|| dtype.to_string(), |scheme| scheme.to_string());
        if order {
            form.push_str(", reordered");
        }
        Self { form, rows, cols, bias }
    }

    pub(super) fn vector(len: usize) -> Self {
        Self { form: "vector".to_owned(), rows: len, cols: 1, bias: false }
    }
}

impl<'a, B: Backend> StoredWeights<'a, B> {
    /// Opens a file and checks all of it; `None` if there is none.
    pub(crate) fn open(entry: &CacheFile<'_>, backend: &'a B) -> Result<Option<Self>, CacheFault> {
        let unreadable = |error: io::Error| CacheFault::Read(error.kind());
        match fs::metadata(&entry.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
            // Opening a pipe would wait for its writer.
            Ok(metadata) if !metadata.is_file() => return Err(CacheFault::Read(io::ErrorKind::InvalidInput)),
            Ok(_) => {}
        }
        let file = File::open(&entry.path).map_err(unreadable)?;
        // SAFETY: the map is read-only. A file of this name is whole when it gets it, and neither truncated nor written
        // afterwards: `Writer` replaces it by renaming. `WeightCache` asks the same of everyone else who can write to the folder.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        // All of it is read now, to be summed. A refusal changes nothing but the time that it takes.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::WillNeed);
        let bytes = SharedBytes::new(map);
        let header = file::header(&bytes)?;
        if header.key != entry.key {
            return Err(CacheFault::Key);
        }
        let cut = |&Extent { at, bytes: len, .. }: &Extent| {
            // Both fit a `usize`, as `file::header` has found the buffer within the file.
            bytes.get(at as usize..(at + len) as usize).expect("`file::header` has found the buffer within the file")
        };
        let extents: Vec<Extent> = header.items.iter().flat_map(|item| &item.buffers).copied().collect();
        let buffers: Vec<SharedBytes> = extents.iter().map(cut).collect();
        let slices: Vec<&[u8]> = buffers.iter().map(|buffer| &**buffer).collect();
        for (extent, found) in extents.iter().zip(checksums(backend, &slices)) {
            if extent.checksum != found {
                return Err(CacheFault::Value { what: "checksum of a buffer", wanted: extent.checksum, found });
            }
        }
        let mut buffers = buffers.into_iter();
        let take = |Item { what, buffers: extents }| (what, buffers.by_ref().take(extents.len()).collect());
        let items: Vec<_> = header.items.into_iter().map(take).collect();
        Ok(Some(Self { backend, items: items.into_iter() }))
    }

    /// The next matrix, which must be one of `shape`.
    pub(crate) fn matrix(&mut self, shape: &PackedShape) -> Result<B::Linear, CacheFault> {
        let buffers = self.next(What::matrix(shape))?;
        self.backend.import(shape, &buffers).map_err(|error| not_imported(&error))
    }

    /// The next vector, which must be one of `len` values.
    pub(crate) fn vector(&mut self, len: usize) -> Result<B::Vector, CacheFault> {
        let buffers = self.next(What::vector(len))?;
        let [bytes] = &buffers[..] else {
            return Err(CacheFault::Value { what: "buffers of a vector", wanted: 1, found: buffers.len() as u64 });
        };
        let (values, rest) = bytes.as_chunks();
        if values.len() != len || !rest.is_empty() {
            let (wanted, found) = (len as u64 * 4, bytes.len() as u64);
            return Err(CacheFault::Value { what: "bytes of a vector", wanted, found });
        }
        let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
        self.backend.vector(&values).map_err(|error| not_imported(&error))
    }

    /// Experts of matrices that were taken.
    pub(crate) fn experts(&self, gate_up: Vec<B::Linear>, down: Vec<B::Linear>) -> Result<B::Experts, CacheFault> {
        self.backend.pack_experts(gate_up, down).map_err(|error| not_imported(&error))
    }

    fn next(&mut self, wanted: What) -> Result<Vec<SharedBytes>, CacheFault> {
        match self.items.next() {
            Some((found, buffers)) if found == wanted => Ok(buffers),
            found => {
                let found = found.map_or("nothing".to_owned(), |(found, _)| found.to_string());
                Err(CacheFault::Item { wanted: wanted.to_string(), found })
            }
        }
    }

    /// Whether all was taken.
    pub(crate) fn finish(mut self) -> Result<(), CacheFault> {
        let left = self.items.next().map(|(found, _)| found.to_string());
        left.map_or(Ok(()), |found| Err(CacheFault::Item { wanted: "nothing".to_owned(), found }))
    }
}

fn not_imported(error: &KernelError) -> CacheFault {
    CacheFault::Item { wanted: "buffers of a matrix or a vector".to_owned(), found: error.to_string() }
}
