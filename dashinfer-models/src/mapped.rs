//! A file of weights, mapped into memory.

use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use memmap2::Mmap;

use crate::{CheckpointError, weight_cache::xxh64};

/// A read-only map of a whole file.
#[derive(Debug)]
pub(crate) struct MappedFile {
    map: Mmap,
    path: PathBuf,
    /// `None` where the system keeps no such time.
    modified: Option<SystemTime>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let unreadable = |source| CheckpointError::Read { path: path.into(), source };
        let file = File::open(path).map_err(unreadable)?;
        // SAFETY: the map is read-only. That nobody truncates or rewrites the file while it is
        // loaded is what every reader of mapped weights asks of the system; the documentation of `Checkpoint` and `Gguf` says so.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        let modified = file.metadata().and_then(|metadata| metadata.modified()).ok();
        Ok(Self { map, path: path.to_owned(), modified })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What tells this file from others and from itself before a change, short of reading it: its name, length and time, its
    /// header, which ends where `data` starts, and some of its bytes. One that is changed with its length and time kept, where nobody
    /// looks, is taken for the same.
    pub(crate) fn identity(&self, data: usize) -> Option<String> {
        const SAMPLES: usize = 16;
        const SAMPLE_BYTES: usize = 256;
        let name = self.path.file_name()?;
        let modified = match self.modified?.duration_since(UNIX_EPOCH) {
            Ok(after) => format!("{after:?}"),
            Err(before) => format!("-{:?}", before.duration()),
        };
        let len = self.map.len();
        let sample = |i: usize| {
            let at = data + (len - data) / SAMPLES * i;
            &self.map[at..len.min(at + SAMPLE_BYTES)]
        };
        let samples: Vec<u8> = (0..SAMPLES).flat_map(sample).copied().collect();
        let (header, samples) = (xxh64(&self.map[..data]), xxh64(&samples));
        Some(format!("{name:?}, {len} bytes, modified {modified}, header {header:016x}, samples {samples:016x}\n"))
    }

    /// Takes the whole pages of a range of the file out of resident memory; touching them again maps them again.
    #[cfg(unix)]
    pub(crate) fn release(&self, bytes: &Range<usize>) {
        const PAGE: usize = 1 << 16; // a multiple of every page size in use
        let start = bytes.start.next_multiple_of(PAGE);
        let end = bytes.end.min(self.map.len()) / PAGE * PAGE;
        if start < end {
            // SAFETY: the pages are clean ones of a shared, read-only mapping of a file that nobody changes while it is open, so they
            // are read again from it, the same, when they are touched: whoever borrows from the map, on any thread, sees no
            // difference. The range lies inside the map.
            // A refusal changes nothing but memory use, so the result is of no interest.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn release(&self, _bytes: &Range<usize>) {}
}
