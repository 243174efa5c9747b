//! Safetensors files and their index, as a folder that is opened.
#![no_main]

use dashinfer_fuzz::{file, folder, parts, run};
use dashinfer_models::{Checkpoint, WeightSource};
use libfuzzer_sys::fuzz_target;

/// A file of safetensors: its header, a space, and its data, whose lengths are put right, or are as they come.
fn shard(bytes: &[u8]) -> Vec<u8> {
    match bytes.split_first() {
        Some((b'=', rest)) => {
            let header = rest.iter().rposition(|byte| *byte == b'}').map_or(rest.len(), |end| end + 1);
            [&(header as u64).to_le_bytes(), rest].concat()
        }
        _ => bytes.to_vec(),
    }
}

fuzz_target!(|input: &[u8]| {
    run(|| {
        let [index, first, second] = parts(input);
        file("model.safetensors.index.json", (!index.is_empty()).then_some(index));
        let name = if index.is_empty() { "model.safetensors" } else { "1.safetensors" };
        file("model.safetensors", None);
        file(name, Some(&shard(first)));
        file("2.safetensors", Some(&shard(second)));
        let Ok(mut checkpoint) = Checkpoint::open(folder()) else { return };
        let total = checkpoint.data_bytes();
        let names: Vec<String> = checkpoint.names().into_iter().map(str::to_owned).collect();
        let mut read = 0;
        for name in &names {
            let info = checkpoint.info(name).expect("what is named is there");
            let bytes = checkpoint.read(name).expect("what is named is there");
            read += bytes.len() as u64;
            checkpoint.done_with_rows(name, 0..info.shape.first().copied().unwrap_or(1));
        }
        assert_eq!(read, total);
        assert!(checkpoint.identity().is_some());
        names.iter().for_each(|name| checkpoint.release(name));
    });
});
