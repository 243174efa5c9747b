//! Kernels that were compiled beforehand, many in one archive: for machines without a compiler, and for starts without one.
//!
//! ```text
//! archive = magic "DASHIMGS", format u32, number of images u32, length of index u64, checksum of index u64, index, payloads
//! index   = for each image: length of key u64, place of payload u64, length of payload u64, checksum of payload u64, key
//! ```
//!
//! Numbers are little endian, places count from the start of the archive. A key names the file, the architecture, the
//! options and a fingerprint of all sources: an archive made from other sources has no image for these, so nobody runs the
//! kernels of another version. `cargo xtask kernels images` writes an archive.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::cache::fnv1a_64;
use crate::KernelError;

const MAGIC: &[u8; 8] = b"DASHIMGS";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 8;
const INDEX_BYTES: usize = 4 * 8;

/// An open archive. Only its index is in memory.
pub struct Images {
    data: Data,
    index: HashMap<String, Entry>,
    from: String,
}

enum Data {
    Memory(&'static [u8]),
    File(File),
}

struct Entry {
    place: u64,
    len: u64,
    checksum: u64,
}

impl Images {
    /// Reads the index of an archive in a file.
    ///
    /// # Errors
    /// [`KernelError::Images`] if it cannot be read or is no whole archive.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let from = path.display().to_string();
        let file = File::open(path).map_err(|error| bad(&from, error))?;
        Self::read(Data::File(file), from)
    }

    /// Reads the index of an archive in memory, as `include_bytes!` makes it.
    ///
    /// # Errors
    /// [`KernelError::Images`] if it is no whole archive.
    pub fn from_bytes(bytes: &'static [u8]) -> Result<Self, KernelError> {
        Self::read(Data::Memory(bytes), "in memory".to_string())
    }

    fn read(data: Data, from: String) -> Result<Self, KernelError> {
        let len = data.len().map_err(|error| bad(&from, error))?;
        let index = data.read_index(len).map_err(|error| bad(&from, error))?;
        Ok(Self { data, index, from })
    }

    /// How many images it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The image under a key; `None` if there is no such key.
    pub(crate) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KernelError> {
        let Some(entry) = self.index.get(key) else { return Ok(None) };
        let payload = self.data.bytes(entry.place, entry.len).map_err(|error| bad(&self.from, error))?;
        if fnv1a_64([&payload[..]]) != entry.checksum {
            return Err(bad(&self.from, "an image is damaged"));
        }
        Ok(Some(payload))
    }
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images").field("from", &self.from).field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Data {
    fn len(&self) -> io::Result<u64> {
        match self {
            Data::Memory(bytes) => Ok(bytes.len() as u64),
            Data::File(file) => Ok(file.metadata()?.len()),
        }
    }

    /// `len` bytes from `place`; the caller has compared both with the archive's length.
    fn bytes(&self, place: u64, len: u64) -> io::Result<Vec<u8>> {
        match *self {
            Data::Memory(bytes) => {
                let bytes = bytes.get(place as usize..).and_then(|bytes| bytes.get(..len as usize));
                bytes.map(<[u8]>::to_vec).ok_or_else(cut_short)
            }
            Data::File(ref file) => {
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, place)?;
                Ok(bytes)
            }
        }
    }

    fn read_index(&self, archive_len: u64) -> io::Result<HashMap<String, Entry>> {
        if archive_len < HEADER_BYTES as u64 {
            return Err(cut_short());
        }
        let header = self.bytes(0, HEADER_BYTES as u64)?;
        if !header.starts_with(MAGIC) {
            return Err(io::Error::other("not an archive of kernels"));
        }
        let (format, num_images) = (u32_at(&header, 8), u32_at(&header, 12));
        let (index_len, checksum) = (u64_at(&header, 16), u64_at(&header, 24));
        if format != FORMAT {
            return Err(io::Error::other(format!("format {format}; this version reads {FORMAT}")));
        }
        if index_len > archive_len - HEADER_BYTES as u64 {
            return Err(cut_short());
        }
        let bytes = self.bytes(HEADER_BYTES as u64, index_len)?;
        // The counts of the header are under the checksum too.
        if fnv1a_64([&header[8..24], &bytes]) != checksum {
            return Err(io::Error::other("the index is damaged"));
        }
        let mut index = HashMap::new();
        let mut rest = &bytes[..];
        for _ in 0..num_images {
            let fixed = rest.split_off(..INDEX_BYTES).ok_or_else(cut_short)?;
            let (key_len, place, len) = (u64_at(fixed, 0), u64_at(fixed, 8), u64_at(fixed, 16));
            let key_len = usize::try_from(key_len).map_err(|_| cut_short())?;
            let key = rest.split_off(..key_len).ok_or_else(cut_short)?;
            if place.checked_add(len).is_none_or(|end| end > archive_len) {
                return Err(cut_short());
            }
            let key = String::from_utf8(key.to_vec()).map_err(io::Error::other)?;
            index.insert(key, Entry { place, len, checksum: u64_at(fixed, 24) });
        }
        Ok(index)
    }
}

/// An archive of these images, by key.
pub(crate) fn archive(images: &[(String, Vec<u8>)]) -> Vec<u8> {
    let index_len: usize = images.iter().map(|(key, _)| INDEX_BYTES + key.len()).sum();
    let mut place = HEADER_BYTES + index_len;
    let mut index = Vec::with_capacity(index_len);
    for (key, payload) in images {
        for number in [key.len() as u64, place as u64, payload.len() as u64, fnv1a_64([&payload[..]])] {
            index.extend_from_slice(&number.to_le_bytes());
        }
        index.extend_from_slice(key.as_bytes());
        place += payload.len();
    }
    let mut bytes = Vec::with_capacity(place);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&(images.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(index.len() as u64).to_le_bytes());
    let checksum = fnv1a_64([&bytes[8..24], &index]);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes.extend_from_slice(&index);
    for (_, payload) in images {
        bytes.extend_from_slice(payload);
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut short")
}

fn bad(from: &str, what: impl fmt::Display) -> KernelError {
    KernelError::Images { from: from.to_string(), what: what.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::test_folder::TestFolder;

    fn some() -> Vec<(String, Vec<u8>)> {
        [("one", "first"), ("two", ""), ("three", "third image")]
            .map(|(key, payload)| (key.to_string(), payload.as_bytes().to_vec()))
            .to_vec()
    }

    #[test]
    fn images_are_found_in_files_and_in_memory() {
        let folder = TestFolder::new();
        let bytes = archive(&some());
        let path = folder.write("kernels.dki", &bytes);
        for images in [Images::open(&path).unwrap(), Images::from_bytes(bytes.leak()).unwrap()] {
            assert_eq!(images.len(), 3);
            for (key, payload) in some() {
                assert_eq!(images.get(&key).unwrap().as_deref(), Some(&payload[..]), "{key}");
            }
            assert_eq!(images.get("four").unwrap(), None);
        }
        assert!(Images::from_bytes(archive(&[]).leak()).unwrap().is_empty());
    }

    #[test]
    fn damage_to_any_byte_is_an_error_and_never_a_panic() {
        let whole = archive(&some());
        let folder = TestFolder::new();
        for i in 0..whole.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = whole.clone();
                damaged[i] ^= flip;
                let path = folder.write("damaged.dki", &damaged);
                let result = Images::open(&path).and_then(|images| {
                    some().iter().try_for_each(|(key, _)| images.get(key).map(|found| assert!(found.is_some())))
                });
                assert!(matches!(result, Err(KernelError::Images { .. })), "byte {i}: {result:?}");
            }
        }
    }

    #[test]
    fn an_archive_cut_short_is_an_error() {
        let whole = archive(&some());
        for len in 0..whole.len() {
            let cut = Images::from_bytes(whole[..len].to_vec().leak());
            assert!(matches!(cut, Err(KernelError::Images { .. })), "{len} bytes");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = Images::open(Path::new("/nowhere/kernels.dki")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/kernels.dki"), "{error}");
    }
}
