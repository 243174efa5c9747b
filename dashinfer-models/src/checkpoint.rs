//! A checkpoint's folder: `model.safetensors`, or shards with their index.

use std::{
    borrow::Cow,
    collections::{BTreeMap, btree_map::Entry},
    fs,
    ops::Range,
    path::{Component, Path},
};

use serde::Deserialize;

use crate::{
    CheckpointError, TensorInfo, WeightSource,
    safetensors::{SafetensorsFile, Stored},
    source::bytes_of_rows,
};

/// The tensors of a folder, mapped into memory: opening it reads the headers alone.
///
/// The files must not be truncated or rewritten while a `Checkpoint` is open: as with every mapped file, the process would
/// see the change, or be ended by the system. Replacing them by renaming is fine.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<SafetensorsFile>,
    /// By name: which file, and where in it.
    tensors: BTreeMap<String, (usize, Stored)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the checkpoint in `folder`. A single file goes before an index, as in the reference.
    ///
    /// # Errors
    /// [`CheckpointError`] for a folder without weights, for a file that is cut or damaged, and for an index that does not
    /// agree with its shards.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        if !folder.is_dir() {
            return Err(CheckpointError::NoFolder { path: folder.into() });
        }
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if single.exists() {
            let file = SafetensorsFile::open(&single)?;
            let tensors = file.tensors().iter().map(|(name, stored)| (name.clone(), (0, stored.clone()))).collect();
            Ok(Self { files: vec![file], tensors })
        } else if index.exists() {
            Self::open_shards(folder, &index)
        } else {
            Err(CheckpointError::NoWeights { path: folder.into() })
        }
    }

    fn open_shards(folder: &Path, path: &Path) -> Result<Self, CheckpointError> {
        let text = fs::read(path).map_err(|source| CheckpointError::Read { path: path.into(), source })?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|source| CheckpointError::IndexJson { path: path.into(), source })?;

        let mut files: Vec<SafetensorsFile> = Vec::new();
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            let number = match opened.entry(shard) {
                Entry::Occupied(number) => *number.get(),
                Entry::Vacant(place) => {
                    files.push(open_shard(folder, path, tensor, shard)?);
                    *place.insert(files.len() - 1)
                }
            };
            let Some(stored) = files[number].tensors().get(tensor) else {
                let (tensor, shard) = (tensor.clone(), shard.clone());
                return Err(CheckpointError::MissingTensor { path: path.into(), shard, tensor });
            };
            tensors.insert(tensor.clone(), (number, stored.clone()));
        }
        for (shard, number) in opened {
            if let Some(tensor) =
                files[number].tensors().keys().find(|name| weight_map.get(*name).is_none_or(|s| s != shard))
            {
                let (tensor, shard) = (tensor.clone(), shard.to_owned());
                return Err(CheckpointError::Unlisted { path: path.into(), shard, tensor });
            }
        }
        Ok(Self { files, tensors })
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.tensors.values().map(|(_, stored)| stored.bytes.len() as u64).sum()
    }
}

fn open_shard(folder: &Path, index: &Path, tensor: &str, shard: &str) -> Result<SafetensorsFile, CheckpointError> {
    // The backslash is a separator on one system and part of a name on others: an index must mean the same everywhere.
    let mut parts = Path::new(shard).components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == shard)
        || shard.contains('\\')
    {
        let (tensor, shard) = (tensor.to_owned(), shard.to_owned());
        return Err(CheckpointError::ShardName { path: index.into(), tensor, shard });
    }
    match SafetensorsFile::open(&folder.join(shard)) {
        Err(CheckpointError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            let (tensor, shard) = (tensor.to_owned(), shard.to_owned());
            Err(CheckpointError::MissingShard { path: index.into(), shard, tensor })
        }
        other => other,
    }
}

impl WeightSource for Checkpoint {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(_, stored)| stored.info.clone())
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.tensors.get(name).map(|(number, stored)| Cow::Borrowed(self.files[*number].bytes(stored)))
    }

    fn identity(&self) -> Option<String> {
        self.files.iter().map(SafetensorsFile::identity).collect()
    }

    fn done_with_rows(&self, name: &str, rows: Range<usize>) {
        if let Some((number, stored)) = self.tensors.get(name)
            && let Some(bytes) = bytes_of_rows(&stored.bytes, stored.info.shape.first().copied().unwrap_or(0), &rows)
        {
            self.files[*number].release(&bytes);
        }
    }

    fn release(&mut self, name: &str) {
        if let Some((number, stored)) = self.tensors.get(name) {
            self.files[*number].release(&stored.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{safetensors::tests::file_of, test_folder::TestFolder};

    fn index(folder: &TestFolder, map: serde_json::Value) {
        folder.write("model.safetensors.index.json", json!({"weight_map": map}).to_string().as_bytes());
    }

    #[track_caller]
    fn check_error(folder: &TestFolder, text: &str) {
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert_eq!(error.replace(&folder.path().display().to_string(), "F"), text);
    }

    #[test]
    fn shards_are_one_checkpoint() {
        let folder = TestFolder::new();
        folder.write("1.safetensors", &file_of(&[("a", "U8", &[2], &[1, 2])]));
        folder.write("2.safetensors", &file_of(&[("b", "U8", &[1], &[3]), ("c", "U8", &[1], &[4])]));
        index(&folder, json!({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}));
        let mut checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.names(), ["a", "b", "c"]);
        assert_eq!(checkpoint.data_bytes(), 4);
        assert_eq!(checkpoint.read("c").unwrap()[..], [4]);
        checkpoint.release("c");
        assert_eq!(checkpoint.read("c").unwrap()[..], [4]);
        assert_eq!(checkpoint.read("d"), None);
    }

    #[test]
    fn a_released_tensor_reads_the_same_again() {
        let folder = TestFolder::new();
        let values: Vec<u8> = (0..1 << 19).map(|i: u32| (i % 251) as u8).collect();
        folder.write("model.safetensors", &file_of(&[("a", "U8", &[1 << 19], &values)]));
        let mut checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert!(checkpoint.read("a").unwrap()[..] == values);
        checkpoint.release("a");
        assert!(checkpoint.read("a").unwrap()[..] == values);
    }

    #[test]
    fn rows_that_were_done_with_read_the_same_while_others_are() {
        const ROWS: usize = 1 << 10;
        let folder = TestFolder::new();
        let values: Vec<u8> = (0..ROWS << 9).map(|i| (i % 251) as u8).collect();
        folder.write("model.safetensors", &file_of(&[("a", "U8", &[ROWS, 1 << 9], &values)]));
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let read = checkpoint.read("a").unwrap();
        std::thread::scope(|scope| {
            for first in [0, 100] {
                let (checkpoint, read, values) = (&checkpoint, &read, &values);
                scope.spawn(move || {
                    for rows in (0..8).map(|i| first + 100 * i..first + 100 * (i + 2)) {
                        assert!(read[..] == values[..]);
                        checkpoint.done_with_rows("a", rows);
                    }
                });
            }
        });
        for rows in [ROWS..ROWS + 1, ROWS..usize::MAX] {
            checkpoint.done_with_rows("a", rows.clone());
            checkpoint.done_with_rows("b", rows);
        }
        assert!(read[..] == values[..]);
    }

    #[test]
    fn the_identity_is_that_of_the_files() {
        use std::time::{Duration, UNIX_EPOCH};

        let folder = TestFolder::new();
        let file = file_of(&[("a", "U8", &[4096], &[7; 4096])]);
        let at = |folder: &TestFolder, bytes: &[u8], seconds| {
            let path = folder.write("model.safetensors", bytes);
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
            Checkpoint::open(folder.path()).unwrap().identity().unwrap()
        };
        let first = at(&folder, &file, 1000);
        assert!(first.starts_with("\"model.safetensors\", "), "{first}");
        assert_eq!(at(&TestFolder::new(), &file, 1000), first, "the folder may be moved");
        assert_ne!(at(&folder, &file, 1001), first);
        assert_ne!(at(&folder, &file_of(&[("b", "U8", &[4096], &[7; 4096])]), 1000), first);
        // Copied over with its time kept: what is sampled tells.
        assert_ne!(at(&folder, &file_of(&[("a", "U8", &[4096], &[8; 4096])]), 1000), first);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let folder = TestFolder::new();
        check_error(&folder, "F holds neither model.safetensors nor model.safetensors.index.json");
        assert_eq!(Checkpoint::open(Path::new("no/such")).unwrap_err().to_string(), "no/such is not a folder");
        index(&folder, json!({"a": "1.safetensors"}));
        check_error(&folder, "F/model.safetensors.index.json: shard 1.safetensors is missing (it should hold a)");
        folder.write("1.safetensors", &file_of(&[("b", "U8", &[1], &[3])]));
        check_error(&folder, "F/model.safetensors.index.json: a is not in 1.safetensors");
        index(&folder, json!({}));
        assert!(Checkpoint::open(folder.path()).unwrap().names().is_empty());
    }

    #[test]
    fn an_index_must_agree_with_its_shards() {
        let folder = TestFolder::new();
        folder.write("1.safetensors", &file_of(&[("a", "U8", &[1], &[3]), ("b", "U8", &[1], &[3])]));
        folder.write("2.safetensors", &file_of(&[("b", "U8", &[1], &[3])]));
        index(&folder, json!({"a": "1.safetensors"}));
        check_error(&folder, "F/model.safetensors.index.json: b in 1.safetensors is not listed there");
        index(&folder, json!({"a": "1.safetensors", "b": "2.safetensors"}));
        check_error(&folder, "F/model.safetensors.index.json: b in 1.safetensors is not listed there");
        folder.write("model.safetensors.index.json", b"{\"weight_map\": 3}");
        check_error(&folder, "F/model.safetensors.index.json is not an index of shards");
    }

    #[test]
    fn an_index_cannot_lead_outside_its_folder() {
        let folder = TestFolder::new();
        for shard in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "./x", "x/", "..\\x"] {
            index(&folder, json!({"a": shard}));
            check_error(
                &folder,
                &format!(
                    "F/model.safetensors.index.json: a is said to be in {shard:?}, \
                     wanted the plain name of a file beside the index"
                ),
            );
        }
    }

    #[test]
    fn damaged_files_are_named() {
        let folder = TestFolder::new();
        folder.write("model.safetensors", b"");
        check_error(&folder, "F/model.safetensors: the length of the header should take 8 bytes, found 0");
        let whole = file_of(&[("a", "U8", &[3], &[1, 2, 3])]);
        folder.write("model.safetensors", &whole[..whole.len() - 1]);
        check_error(&folder, "F/model.safetensors: the tensors should take 3 bytes, found 2");
    }
}
