//! Packed weights in a folder, through the SDK: a second engine maps what the first has packed.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Answer, FERRIS, complete, load, tiny};
use dashinfer::{Device, Engine, Error, Load, Request, Scheme, Source, WeightsFrom};

/// A folder that goes with its guard.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dashinfer-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn quantized(source: impl Into<Source>) -> Load {
    Engine::load(source).device(Device::Cpu).threads(1).quantize("a16w4-g32".parse::<Scheme>().unwrap())
}

fn answer(engine: &Engine) -> Answer {
    Answer::from(&complete(engine, Request::tokens([1, 2, 3, 4]).max_tokens(24).logprobs(3).ignore_eos()))
}

#[test]
fn a_second_engine_maps_what_the_first_has_packed() {
    let cache = Folder::new("second-engine");
    let plain = quantized(FERRIS).blocking().unwrap();
    let first = quantized(FERRIS).weight_cache(&cache.0).blocking().unwrap();
    let second = quantized(FERRIS).weight_cache(&cache.0).blocking().unwrap();
    assert_eq!(plain.model().weights_from, WeightsFrom::Source);
    assert!(matches!(first.model().weights_from, WeightsFrom::Stored { replaced: None, .. }));
    assert_eq!(second.model().weights_from, WeightsFrom::Cache);
    // Files that go do not disturb those who have them mapped.
    fs::remove_dir_all(&cache.0).unwrap();
    let wanted = answer(&plain);
    assert_eq!(answer(&first), wanted);
    assert_eq!(answer(&second), wanted);
}

#[test]
fn a_checkpoint_that_was_touched_is_packed_again() {
    let (cache, model) = (Folder::new("touched-cache"), Folder::new("touched-model"));
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny().join(name), model.0.join(name)).unwrap();
    }
    let from = || quantized(&model.0).weight_cache(&cache.0).blocking().unwrap().model().weights_from.clone();
    assert!(matches!(from(), WeightsFrom::Stored { replaced: None, .. }));
    assert_eq!(from(), WeightsFrom::Cache);
    let file = fs::File::options().write(true).open(model.0.join("model.safetensors")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert!(matches!(from(), WeightsFrom::Stored { replaced: None, .. }));
}

#[test]
fn a_damaged_file_is_told_and_mended() {
    let cache = Folder::new("damaged");
    let engine = quantized(tiny()).weight_cache(&cache.0).blocking().unwrap();
    let wanted = answer(&engine);
    let path = fs::read_dir(&cache.0).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&path).unwrap();
    bytes[4096] ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let mended = quantized(tiny()).weight_cache(&cache.0).blocking().unwrap();
    match &mended.model().weights_from {
        WeightsFrom::Stored { replaced: Some(fault), .. } => {
            assert!(fault.to_string().starts_with("checksum of a buffer should be"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(answer(&mended), wanted);
    assert_eq!(quantized(tiny()).weight_cache(&cache.0).blocking().unwrap().model().weights_from, WeightsFrom::Cache);
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error_that_names_it() {
    let cache = Folder::new("unwritable");
    fs::write(cache.0.join("file"), "in the way").unwrap();
    let folder = cache.0.join("file/weights");
    let error = quantized(tiny()).weight_cache(&folder).blocking().unwrap_err();
    assert!(matches!(&error, Error::WeightCache { path, .. } if *path == folder), "{error:?}");
    assert_eq!(error.to_string(), format!("cannot write to the weight cache {}", folder.display()));
}

/// Whatever the device: on one that keeps no packed weights, the setting changes nothing.
#[test]
fn a_device_without_packed_weights_takes_no_notice() {
    let cache = Folder::new("device");
    let folder = cache.0.join("new");
    let engine = load(Engine::load(Path::new(FERRIS)).weight_cache(&folder));
    let kept = matches!(engine.model().weights_from, WeightsFrom::Stored { replaced: None, .. });
    assert_eq!(kept, engine.model().device == "cpu");
    assert_eq!(folder.exists(), kept);
}
