//! Storing packed weights, one matrix at a time as they are packed, so that no second copy of them is in memory.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dashinfer_kernels::{Backend, PackedShape};

use super::checksum::checksums;
use super::file::{self, Extent, Header, Item, PREFIX_BYTES, What};
use super::{CacheFault, CacheFile, WeightsFrom};

/// A file that is being written, under a name of its own beside the one that it will have. Dropped before its end, it is removed.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Locked, which says that its process lives.
    file: BufWriter<File>,
    temporary: PathBuf,
    path: PathBuf,
    end: u64,
    header: Header,
    /// The first error; nothing is written behind it.
    failed: Option<io::Error>,
}

impl Writer {
    pub(super) fn new(entry: CacheFile<'_>) -> io::Result<Self> {
        fs::create_dir_all(entry.folder)?;
        remove_abandoned(entry.folder);
        let (temporary, file) = create_beside(&entry.path)?;
        let header = Header { key: entry.key, items: Vec::new() };
        // A file system without locks keeps what killed processes leave, and all else works.
        let _ = file.try_lock();
        let file = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Self { file, temporary, path: entry.path, end: 0, header, failed: None };
        // Room for the prefix. What it says is known at the end.
        writer.write(&[0; PREFIX_BYTES])?;
        Ok(writer)
    }

    /// Stores a packed matrix. Errors are told by [`finish`](Self::finish): a load goes on without a cache.
    pub(crate) fn matrix<B: Backend>(&mut self, backend: &B, shape: &PackedShape, matrix: &B::Linear) {
        self.item(backend, What::matrix(shape), &backend.export(matrix));
    }

    /// Stores a vector.
    pub(crate) fn vector<B: Backend>(&mut self, backend: &B, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.item(backend, What::vector(values.len()), &[&bytes]);
    }

    /// As if writing had failed.
    #[cfg(test)]
    pub(super) fn fail(&mut self, error: io::Error) {
        self.failed = Some(error);
    }

    fn item<B: Backend>(&mut self, backend: &B, what: What, buffers: &[&[u8]]) {
        if self.failed.is_some() {
            return;
        }
        let mut item = Item { what, buffers: Vec::with_capacity(buffers.len()) };
        for (bytes, checksum) in buffers.iter().zip(checksums(backend, buffers)) {
            match self.buffer(bytes) {
                Ok(at) => item.buffers.push(Extent { at, bytes: bytes.len() as u64, checksum }),
                Err(error) => {
                    self.failed = Some(error);
                    return;
                }
            }
        }
        self.header.items.push(item);
    }

    fn buffer(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = file::place(self.end, bytes.len());
        let gap = at - self.end;
        io::copy(&mut io::Read::take(io::repeat(0), gap), &mut self.file)?;
        self.end = at;
        self.write(bytes)?;
        Ok(at)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its name, when all of it is on the disk. `replaced`: what is wrong with the one that has it now.
    pub(crate) fn finish(mut self, replaced: Option<CacheFault>) -> WeightsFrom {
        let stored = self.failed.take().map_or(Ok(()), Err).and_then(|()| self.complete());
        match stored {
            Ok(()) => WeightsFrom::Stored { replaced },
            Err(error) => WeightsFrom::NotStored { error: error.kind() },
        }
    }

    fn complete(&mut self) -> io::Result<()> {
        let (header, header_at) = (serde_json::to_vec(&self.header)?, self.end);
        self.write(&header)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&file::prefix(header_at, &header))?;
        self.file.flush()?;
        // The name must not be on the disk before the bytes are. The folder is not synced: a name that a crash loses is packed
        // once more.
        self.file.get_ref().sync_all()?;
        fs::rename(&self.temporary, &self.path)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After a rename it is not there any more.
        let _ = fs::remove_file(&self.temporary);
    }
}

const TEMPORARY: &str = "tmp";

/// A new file beside `path` that nobody else writes.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    for attempt in 0..100 {
        let number = nanos.wrapping_add(attempt);
        let temporary = path.with_extension(format!("{}-{number:x}.{TEMPORARY}", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (temporary, file)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Removes what processes left that were ended while they wrote: each may be as large as a model, and a process that is ended for
/// want of memory is often started again. A writer that lives holds its lock, or has opened its file just now.
fn remove_abandoned(folder: &Path) {
    const YOUNG: Duration = Duration::from_secs(60);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| name.ends_with(&format!(".{TEMPORARY}")));
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let old = modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > YOUNG));
        if ours && old && OpenOptions::new().write(true).open(&path).is_ok_and(|file| !is_locked(&file)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether another has locked it, or that cannot be told.
fn is_locked(file: &File) -> bool {
    match file.try_lock() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_folder::TestFolder;

    #[test]
    fn what_killed_writers_left_is_removed_and_nothing_else() {
        let folder = TestFolder::new();
        let aged = |name: &str| {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
            file
        };
        aged("a.1-2.tmp");
        aged("a.weights");
        let locked = aged("b.1-2.tmp");
        locked.try_lock().unwrap();
        File::create(folder.path().join("young.1-2.tmp")).unwrap();
        remove_abandoned(folder.path());
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.weights", "b.1-2.tmp", "young.1-2.tmp"]);
    }
}
