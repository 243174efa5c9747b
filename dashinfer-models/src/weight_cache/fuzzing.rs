//! What a fuzz target needs of files of packed weights, and nobody else: files that are whole but for what they hold. Compiled with
//! `--cfg fuzzing` alone.
#![allow(missing_docs, clippy::missing_errors_doc)]

use std::path::Path;

use dashinfer_kernels::{
    Backend, MatrixView, PackedShape,
    cpu::{CpuBackend, CpuConfig},
};

use super::checksum::checksums;
use super::file::{self, Extent, Header, Item, PREFIX_BYTES, What};
use super::{CacheFault, CacheFile, StoredWeights};

const KEY: &str = "a key";

/// What a model wants next.
#[derive(Debug, Clone, Copy)]
pub enum CachedItem {
    Vector(usize),
    Matrix(PackedShape),
}

thread_local! {
    static BACKEND: CpuBackend = {
        let mut config = CpuConfig::default();
        config.pool.threads = std::num::NonZeroUsize::new(1);
        CpuBackend::new(&config).expect("a thread is all that it takes")
    };
}

impl CachedItem {
    fn what(&self) -> What {
        match self {
            Self::Vector(len) => What::vector(*len),
            Self::Matrix(shape) => What::matrix(shape),
        }
    }

    /// Bytes of the buffers of such an item; none if there can be no such matrix.
    #[must_use]
    pub fn buffer_bytes(&self) -> Vec<usize> {
        match self {
            Self::Vector(len) => vec![len * size_of::<f32>()],
            &Self::Matrix(PackedShape { rows, cols, dtype, scheme, bias, order }) => BACKEND.with(|backend| {
                let bytes = vec![0; rows * cols * dtype.size_bytes()];
                let bias = vec![0.0; if bias { rows } else { 0 }];
                let view = MatrixView { bytes: &bytes, dtype, rows, cols };
                let Ok(packed) = backend.pack(&[view], (!bias.is_empty()).then_some(&bias[..]), scheme) else {
                    return Vec::new();
                };
                let mut sizes: Vec<usize> = backend.export(&packed).iter().map(|buffer| buffer.len()).collect();
                sizes.extend(order.then_some(cols * size_of::<u32>()));
                sizes
            }),
        }
    }
}

/// A file of these buffers and this header, whose checksums of prefix and header are right.
#[must_use]
pub fn sealed(header: &[u8], buffers: &[u8]) -> Vec<u8> {
    let header_at = (PREFIX_BYTES + buffers.len()) as u64;
    [&file::prefix(header_at, header)[..], buffers, header].concat()
}

/// A file of these items, whose checksums and places are all right.
#[must_use]
pub fn whole(items: &[(CachedItem, Vec<Vec<u8>>)]) -> Vec<u8> {
    let mut data = vec![0; PREFIX_BYTES];
    let items = items.iter().map(|(item, buffers)| {
        let slices: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
        let sums = BACKEND.with(|backend| checksums(backend, &slices));
        let extents = slices.iter().zip(sums).map(|(bytes, checksum)| {
            let at = file::place(data.len() as u64, bytes.len());
            data.resize(at as usize, 0);
            data.extend_from_slice(bytes);
            Extent { at, bytes: bytes.len() as u64, checksum }
        });
        let buffers = extents.collect();
        Item { what: item.what(), buffers }
    });
    let items = items.collect();
    let header = serde_json::to_vec(&Header { key: KEY.to_owned(), items }).expect("it is plain data");
    sealed(&header, &data[PREFIX_BYTES..])
}

/// Reads the file at `path` as a model does that wants these items.
pub fn read_cached(path: &Path, wanted: &[CachedItem]) -> Result<(), CacheFault> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let entry = CacheFile { folder, path: path.to_owned(), key: KEY.to_owned() };
    BACKEND.with(|backend| {
        let Some(mut weights) = StoredWeights::open(&entry, backend)? else { return Ok(()) };
        for item in wanted {
            match item {
                CachedItem::Vector(len) => drop(weights.vector(*len)?),
                CachedItem::Matrix(shape) => drop(weights.matrix(shape)?),
            }
        }
        weights.finish()
    })
}
