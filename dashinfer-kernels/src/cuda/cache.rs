//! Compiled kernels on disk: what was compiled once is read by every later process.
//!
//! ```text
//! entry = magic "DASHKERN", format u32, length of key u64, length of payload u64, checksum u64, key, payload
//! ```
//!
//! Numbers are little endian. The key is the whole text that decides what the compiler makes: compiler, architecture,
//! options, source and headers. A hash of it names the file, but an entry counts only if it holds the key itself, so a hash
//! that two keys share costs a compilation and never gives wrong code.
//!
//! An entry is written under another name in the same folder and then renamed: whoever looks sees a whole entry or none, also
//! while other processes write the same one. What is damaged, cut short or not ours is as good as absent, and is written again.
//! A folder that cannot be written leaves the process without a cache, and nothing else changes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const MAGIC: &[u8; 8] = b"DASHKERN";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 8 + 8 + 8;

/// Names the cache's folder.
const VARIABLE: &str = "DASHINFER_KERNEL_CACHE";

/// A folder of compiled kernels. Safe to share between threads and processes, and to delete at any time.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    /// `None`: this machine has no place for one.
    folder: Option<PathBuf>,
}

impl Cache {
    /// `$DASHINFER_KERNEL_CACHE`, or `dashinfer/kernels` in `$XDG_CACHE_HOME` or `~/.cache`. An empty
    /// `DASHINFER_KERNEL_CACHE` means no cache.
    pub(crate) fn of_this_user() -> Self {
        let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
        Self { folder: folder(&named) }
    }

    /// A cache in this folder, which need not be there yet.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { folder: Some(folder.to_path_buf()) }
    }

    /// What was stored last under this key.
    pub(crate) fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(key)?).ok()?;
        let payload = payload(&bytes, key)?;
        Some(payload.to_vec())
    }

    /// Stores a payload, if that is possible: a full disk or a folder that is not ours is no reason to fail.
    pub(crate) fn put(&self, key: &[u8], payload: &[u8]) {
        let Some(path) = self.path(key) else { return };
        let _ = write(&path, &entry(key, payload));
    }

    fn path(&self, key: &[u8]) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{:032x}.kernel", fnv1a_128(key))))
    }
}

fn folder(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|path| !path.as_os_str().is_empty());
    match variable(VARIABLE) {
        Some(folder) => Some(folder).filter(|path| !path.as_os_str().is_empty()),
        None => {
            // The specification of XDG_CACHE_HOME says to ignore a relative path.
            let user = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
            let user = user.or_else(|| set("HOME").map(|home| home.join(".cache")))?;
            Some(user.join("dashinfer/kernels"))
        }
    }
}

fn entry(key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + key.len() + payload.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&(key.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&fnv1a_64([payload]).to_le_bytes());
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(payload);
    bytes
}

/// The payload of an entry, if it is whole and stored under this key. Everything but the payload is known beforehand, so
/// comparing it is the strictest check there is.
fn payload<'a>(bytes: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let payload = bytes.get(HEADER_BYTES + key.len()..)?;
    let wanted = entry(key, payload);
    (wanted == bytes && !payload.is_empty()).then_some(payload)
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let (temporary, mut file) = create_beside(path)?;
    // Not synced: what a crash leaves half written is found out by its checksum.
    let written = file.write_all(bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// A new file beside `path` that nobody else writes.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    for attempt in 0..100 {
        let temporary = path.with_extension(format!("{}-{:x}.tmp", std::process::id(), nanos.wrapping_add(attempt)));
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (temporary, file)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// FNV-1a over 64 bits: against damage, not against an adversary. Any one changed byte changes it.
/// <http://www.isthe.com/chongo/tech/comp/fnv/>
pub(crate) fn fnv1a_64<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let bytes = parts.into_iter().flatten();
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// FNV-1a over 128 bits, to name things by what is in them.
pub(crate) fn fnv1a_128(bytes: &[u8]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(BASIS, |hash, &byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::{process, thread};

    use super::*;
    use crate::cuda::test_folder::TestFolder;

    const KEY: &[u8] = b"a key of some length";
    const PAYLOAD: &[u8] = b"the machine code";

    fn stored(folder: &TestFolder) -> (Cache, PathBuf) {
        let cache = Cache::in_folder(&folder.path().join("new/kernels"));
        cache.put(KEY, PAYLOAD);
        let path = cache.path(KEY).unwrap();
        (cache, path)
    }

    #[test]
    fn what_is_stored_is_found_under_its_key_alone() {
        let folder = TestFolder::new();
        let (cache, path) = stored(&folder);
        assert_eq!(cache.get(KEY).as_deref(), Some(PAYLOAD));
        assert_eq!(cache.get(b"a key of some lengtj"), None);
        assert_eq!(cache.get(b""), None);
        cache.put(KEY, b"newer");
        assert_eq!(cache.get(KEY).as_deref(), Some(&b"newer"[..]));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "temporary files are left");
    }

    #[test]
    fn two_keys_of_one_hash_are_told_apart() {
        let folder = TestFolder::new();
        let (cache, path) = stored(&folder);
        fs::rename(path, cache.path(b"another key").unwrap()).unwrap();
        assert_eq!(cache.get(b"another key"), None);
    }

    #[test]
    fn damage_to_any_byte_is_seen_and_mended() {
        let folder = TestFolder::new();
        let (cache, path) = stored(&folder);
        let whole = fs::read(&path).unwrap();
        for i in 0..whole.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = whole.clone();
                damaged[i] ^= flip;
                fs::write(&path, damaged).unwrap();
                assert_eq!(cache.get(KEY), None, "byte {i}");
            }
        }
        cache.put(KEY, PAYLOAD);
        assert_eq!(cache.get(KEY).as_deref(), Some(PAYLOAD));
    }

    #[test]
    fn an_entry_cut_short_or_grown_is_none() {
        let folder = TestFolder::new();
        let (cache, path) = stored(&folder);
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(cache.get(KEY), None, "{len} bytes");
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert_eq!(cache.get(KEY), None);
        fs::write(&path, vec![0; whole.len()]).unwrap();
        assert_eq!(cache.get(KEY), None);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(cache.get(KEY), None);
        cache.put(KEY, PAYLOAD); // cannot replace a folder, and does not mind
        assert_eq!(cache.get(KEY), None);
    }

    #[test]
    fn threads_that_write_one_entry_leave_it_whole() {
        let folder = TestFolder::new();
        let cache = Cache::in_folder(folder.path());
        let payloads: Vec<Vec<u8>> = (0..4u8).map(|i| vec![i + 1; 100_000 + usize::from(i)]).collect();
        let start = Barrier::new(payloads.len());
        thread::scope(|scope| {
            for payload in &payloads {
                let (cache, payloads, start) = (&cache, &payloads, &start);
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..50 {
                        cache.put(KEY, payload);
                        let found = cache.get(KEY).expect("once written, an entry is always there");
                        assert!(payloads.contains(&found));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "temporary files are left");
    }

    /// Runs this very test again in other processes, told by a variable where to write.
    #[test]
    fn processes_that_write_one_entry_leave_it_whole() {
        const FOLDER: &str = "DASHINFER_TEST_CACHE_FOLDER";
        let payload = |pid: u32| vec![pid as u8 | 1; 200_000];
        if let Some(folder) = std::env::var_os(FOLDER) {
            let cache = Cache::in_folder(Path::new(&folder));
            for _ in 0..50 {
                cache.put(KEY, &payload(process::id()));
                let found = cache.get(KEY).expect("once written, an entry is always there");
                assert!(found.len() == 200_000 && found.iter().all(|&byte| byte == found[0]));
            }
            return;
        }
        let folder = TestFolder::new();
        let name = "cuda::cache::tests::processes_that_write_one_entry_leave_it_whole";
        let mut start = process::Command::new(std::env::current_exe().unwrap());
        start.args([name, "--exact"]).env(FOLDER, folder.path()).stdout(process::Stdio::null());
        let children: Vec<_> = (0..3).map(|_| start.spawn().unwrap()).collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        assert!(Cache::in_folder(folder.path()).get(KEY).is_some());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "temporary files are left");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_cache() {
        // Root may write anywhere, but not below a file.
        let folder = TestFolder::new();
        let file = folder.write("file", b"in the way");
        for cache in [Cache::in_folder(&file.join("kernels")), Cache { folder: None }] {
            cache.put(KEY, PAYLOAD);
            assert_eq!(cache.get(KEY), None);
        }
    }

    #[test]
    fn the_folder_is_the_variables_then_the_users() {
        let folder_with = |variables: &[(&str, &str)]| {
            let find =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, path)| PathBuf::from(path));
            folder(&find).map(|path| path.display().to_string())
        };
        let home = ("HOME", "/home/me");
        assert_eq!(folder_with(&[]), None);
        assert_eq!(folder_with(&[home]).as_deref(), Some("/home/me/.cache/dashinfer/kernels"));
        assert_eq!(folder_with(&[home, ("XDG_CACHE_HOME", "/c")]).as_deref(), Some("/c/dashinfer/kernels"));
        assert_eq!(folder_with(&[home, ("XDG_CACHE_HOME", "c")]).as_deref(), Some("/home/me/.cache/dashinfer/kernels"));
        assert_eq!(folder_with(&[home, (VARIABLE, "/k")]).as_deref(), Some("/k"));
        assert_eq!(folder_with(&[home, (VARIABLE, "")]), None);
    }

    #[test]
    fn hashes_are_the_published_ones() {
        assert_eq!(fnv1a_64([&b""[..]]), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a_64([&b"foo"[..], b"bar"]), 0x8594_4171_f739_67e8);
        assert_eq!(fnv1a_128(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a_128(b"foobar"), 0x343e_1662_793c_64bf_6f0d_3597_ba44_6f18);
    }
}
