//! Packed weights on disk: the same bits, whatever became of the files, and nothing read where nothing need be.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, io, process, thread};

use common::{
    reference::Reference,
    sequences::{Runner, Wanted},
};
use dashinfer_kernels::{
    DType, Scheme,
    cpu::{CpuBackend, CpuConfig, PoolConfig},
};
use dashinfer_models::{
    CacheFault, Checkpoint, Decoder, HfConfig, LoadError, ModelSpec, Quantization, RandomWeights, StepLimits,
    TensorInfo, WeightCache, WeightSource, WeightsFrom,
};

const LIMITS: StepLimits = StepLimits { max_tokens: 16, max_logit_rows: 16 };

/// A folder that goes with its guard.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dashinfer-weights-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn cache(&self) -> WeightCache {
        WeightCache::new(&self.0)
    }

    /// The files in it, in order.
    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    /// The one file in it.
    fn file(&self) -> PathBuf {
        let mut files = self.files();
        assert_eq!(files.len(), 1, "{files:?}");
        files.remove(0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Qwen3's norms and every bias there is, with columns that end within a group.
fn spec() -> ModelSpec {
    let config = r#"{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 90, "max_position_embeddings": 64,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false}"#;
    HfConfig::parse(config).unwrap().to_spec().unwrap()
}

fn backend() -> CpuBackend {
    let pool = PoolConfig { threads: std::num::NonZeroUsize::new(2), cores: Vec::new() };
    CpuBackend::new(&CpuConfig { pool, ..CpuConfig::default() }).unwrap()
}

/// Loads, and gives logits and where the weights came from.
fn load(
    source: &mut dyn WeightSource,
    quantization: Quantization,
    cache: Option<&WeightCache>,
) -> Result<(Vec<Vec<f32>>, WeightsFrom), LoadError> {
    load_spec(spec(), source, quantization, cache)
}

/// [`load`] of another spec.
fn load_spec(
    spec: ModelSpec,
    source: &mut dyn WeightSource,
    quantization: Quantization,
    cache: Option<&WeightCache>,
) -> Result<(Vec<Vec<f32>>, WeightsFrom), LoadError> {
    let mut decoder = Decoder::load_with_cache(backend(), spec, source, LIMITS, quantization, cache, &mut |_| ())?;
    let weights_from = decoder.weights_from().clone();
    Ok((Runner::new(&mut decoder, 1).step(&[(0, &[3, 1, 4, 1, 5, 9, 2, 6])], Wanted::All), weights_from))
}

fn random() -> RandomWeights {
    RandomWeights::new(&spec(), 5)
}

fn a16w4() -> Quantization {
    Quantization::new("a16w4-g32".parse().unwrap())
}

#[track_caller]
fn assert_stored(found: &WeightsFrom) {
    assert!(matches!(found, WeightsFrom::Stored { replaced: None, .. }), "{found:?}");
}

#[test]
fn experts_are_taken_from_a_file_too() {
    let config = r#"{"architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 64,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 50,
        "mlp_only_layers": [1]}"#;
    check_stored_and_taken(config);
}

#[test]
fn latent_attention_is_taken_from_a_file_too() {
    let config = r#"{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2,
        "num_attention_heads": 3, "vocab_size": 90, "max_position_embeddings": 64, "q_lora_rank": 30, "kv_lora_rank": 20,
        "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9, "first_k_dense_replace": 1, "n_routed_experts": 16,
        "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1}"#;
    check_stored_and_taken(config);
}

/// Logits are the same without a file, with one that is written, and with one that is there.
#[track_caller]
fn check_stored_and_taken(config: &str) {
    let spec = HfConfig::parse(config).unwrap().to_spec().unwrap();
    let source = || RandomWeights::new(&spec, 5);
    for quantization in [Quantization::NONE, a16w4()] {
        let folder = Folder::new();
        let wanted = load_spec(spec.clone(), &mut source(), quantization, None).unwrap().0;
        let (logits, from) = load_spec(spec.clone(), &mut source(), quantization, Some(&folder.cache())).unwrap();
        assert_stored(&from);
        assert_eq!(logits, wanted);
        let (logits, from) =
            load_spec(spec.clone(), &mut Unread(source()), quantization, Some(&folder.cache())).unwrap();
        assert_eq!(from, WeightsFrom::Cache);
        assert_eq!(logits, wanted);
    }
}

/// Weights that must not be read.
struct Unread(RandomWeights);

impl WeightSource for Unread {
    fn names(&self) -> Vec<&str> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name)
    }

    fn identity(&self) -> Option<String> {
        self.0.identity()
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        panic!("{name} is read")
    }
}

#[test]
fn the_second_load_reads_no_weights_and_equals_the_first_to_the_bit() {
    let schemes = Scheme::ALL.into_iter().map(Quantization::new);
    let others = [a16w4().vocabulary(None), a16w4().compensated()];
    let folder = Folder::new();
    for (dtype, quantization) in [DType::F32, DType::F16, DType::BF16]
        .map(|dtype| (dtype, Quantization::NONE))
        .into_iter()
        .chain(schemes.chain(others).map(|quantization| (DType::BF16, quantization)))
    {
        let wanted = load(&mut random().dtype(dtype), quantization, None).unwrap();
        assert_eq!(wanted.1, WeightsFrom::Source);
        let first = load(&mut random().dtype(dtype), quantization, Some(&folder.cache())).unwrap();
        assert_stored(&first.1);
        let second = load(&mut Unread(random().dtype(dtype)), quantization, Some(&folder.cache())).unwrap();
        assert_eq!(second.1, WeightsFrom::Cache);
        assert!(first.0 == wanted.0 && second.0 == wanted.0, "{dtype} {quantization:?}");
    }
    assert_eq!(
        folder.files().len(),
        3 + Scheme::ALL.len() + others.len(),
        "each has a file of its own, and no other is left"
    );
}

/// Codes as they are stored, some of them reordered; FP8, which is rounded; and both in f32. Each choice has a file of its own.
#[test]
fn checkpoints_that_are_stored_quantized_are_kept_as_they_are_packed() {
    for golden in ["gptq-4bit-g32-desc-act", "awq-4bit-g128", "fp8-block-qwen3"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(golden);
        let folder = Folder::new();
        let load = |quantization, cache: Option<&WeightCache>| {
            let (spec, mut source) = (ModelSpec::read(&path).unwrap(), Checkpoint::open(&path).unwrap());
            let nobody = &mut |_| ();
            let decoder = Decoder::load_with_cache(backend(), spec, &mut source, LIMITS, quantization, cache, nobody);
            let mut decoder = decoder.unwrap();
            let (from, conversions) = (decoder.weights_from().clone(), decoder.conversions().to_vec());
            (Runner::new(&mut decoder, 1).step(&[(0, &[3, 1, 4, 1, 5, 9, 2, 6])], Wanted::All), from, conversions)
        };
        for quantization in [Quantization::AS_STORED, Quantization::NONE, a16w4()] {
            let wanted = load(quantization, None);
            let first = load(quantization, Some(&folder.cache()));
            assert_stored(&first.1);
            let second = load(quantization, Some(&folder.cache()));
            assert_eq!(second.1, WeightsFrom::Cache, "{golden} {quantization:?}");
            assert!(first.0 == wanted.0 && second.0 == wanted.0, "{golden} {quantization:?}");
            assert_eq!(second.2, wanted.2, "{golden} {quantization:?}");
        }
        assert_eq!(folder.files().len(), 3, "{golden}");
    }
}

#[test]
fn other_weights_in_the_same_folder_are_not_mistaken() {
    let folder = Folder::new();
    let cache = Some(folder.cache());
    for seed in [5, 6] {
        let mut weights = RandomWeights::new(&spec(), seed);
        let wanted = load(&mut weights, a16w4(), None).unwrap().0;
        let (found, from) = load(&mut weights, a16w4(), cache.as_ref()).unwrap();
        assert_stored(&from);
        assert_eq!(found, wanted);
    }
    // Were the hashes of two keys the same, one would replace the other.
    let [one, two] = &folder.files()[..] else { panic!("two files are wanted") };
    fs::rename(one, two).unwrap();
    let wanted = load(&mut random(), a16w4(), None).unwrap().0;
    let mut faults = Vec::new();
    for seed in [5, 6] {
        let (found, from) = load(&mut RandomWeights::new(&spec(), seed), a16w4(), cache.as_ref()).unwrap();
        assert!(seed != 5 || found == wanted);
        faults.push(from);
    }
    let replaced = |from: &WeightsFrom| matches!(from, WeightsFrom::Stored { replaced: Some(CacheFault::Key), .. });
    assert_eq!(faults.iter().filter(|from| replaced(from)).count(), 1, "{faults:?}");
}

/// Whatever `damage` does to the file of some weights, they are packed again, and the file is whole afterwards.
fn check_damage(file: &Path, whole: &[u8], damaged: &[u8], wanted: &[Vec<f32>], cache: &WeightCache) -> CacheFault {
    // Not in place: an engine may have it mapped.
    fs::remove_file(file).unwrap();
    fs::write(file, damaged).unwrap();
    let (found, from) = load(&mut random(), a16w4(), Some(cache)).unwrap();
    assert_eq!(found, wanted);
    assert!(fs::read(file).unwrap() == whole, "it was not mended");
    match from {
        WeightsFrom::Stored { replaced: Some(fault), .. } => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn files_cut_short_or_grown_are_replaced() {
    let folder = Folder::new();
    let wanted = load(&mut random(), a16w4(), Some(&folder.cache())).unwrap().0;
    let (file, whole) = (folder.file(), fs::read(folder.file()).unwrap());
    let lengths = (0..70).step_by(7).chain((70..whole.len()).step_by(whole.len() / 40)).chain([whole.len() - 1]);
    for len in lengths {
        check_damage(&file, &whole, &whole[..len], &wanted, &folder.cache());
    }
    let grown = [&whole[..], &[0; 64]].concat();
    let fault = check_damage(&file, &whole, &grown, &wanted, &folder.cache());
    let (wanted_bytes, found) = (whole.len(), grown.len());
    assert_eq!(fault.to_string(), format!("bytes of the file should be {wanted_bytes:#x}, found {found:#x}"));
    assert_eq!(folder.files(), [file], "temporary files are left");
}

#[test]
fn flipped_bits_are_seen_wherever_they_are() {
    let folder = Folder::new();
    let wanted = load(&mut random(), a16w4(), Some(&folder.cache())).unwrap().0;
    let (file, whole) = (folder.file(), fs::read(folder.file()).unwrap());
    let header_at = u64::from_le_bytes(whole[24..32].try_into().unwrap()) as usize;
    let text: serde_json::Value = serde_json::from_slice(&whole[header_at..]).unwrap();
    // In the prefix, in each buffer, and in the header.
    let items = text["items"].as_array().unwrap().iter();
    let buffers = items.flat_map(|item| item["buffers"].as_array().unwrap());
    let extents = buffers.map(|buffer| (buffer["at"].as_u64().unwrap(), buffer["bytes"].as_u64().unwrap()));
    let extents: Vec<_> = extents.filter(|extent| extent.1 > 0).collect();
    assert!(extents.len() > 30, "{extents:?}");
    let last = extents.iter().map(|(at, bytes)| (at + bytes - 1) as usize);
    for at in [0, 9, 13, 20, 30, 63, header_at, whole.len() - 1].into_iter().chain(last) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        let fault = check_damage(&file, &whole, &damaged, &wanted, &folder.cache());
        if (64..header_at).contains(&at) {
            assert!(fault.to_string().starts_with("checksum of a buffer should be"), "{fault}");
        }
    }
    let mut newer = whole.clone();
    newer[8] = 2;
    let fault = check_damage(&file, &whole, &newer, &wanted, &folder.cache());
    assert_eq!(fault, CacheFault::Value { what: "version", wanted: 1, found: 2 });
}

#[test]
fn what_is_no_file_does_not_stop_a_load() {
    let folder = Folder::new();
    let wanted = load(&mut random(), a16w4(), Some(&folder.cache())).unwrap().0;
    let file = folder.file();
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let (found, from) = load(&mut random(), a16w4(), Some(&folder.cache())).unwrap();
    assert_eq!(found, wanted);
    assert!(matches!(from, WeightsFrom::NotStored { .. }), "a folder is not replaced by a file: {from:?}");
    assert_eq!(folder.files(), [file], "temporary files are left");
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_before_anything_is_read() {
    // Root may write anywhere, but not below a file.
    let folder = Folder::new();
    let path = folder.0.join("file");
    fs::write(&path, "in the way").unwrap();
    let cache = WeightCache::new(path.join("weights"));
    match load(&mut Unread(random()), a16w4(), Some(&cache)) {
        Err(LoadError::WeightCache { path, source }) => {
            assert_eq!(path, cache.folder());
            assert_ne!(source.kind(), io::ErrorKind::NotFound);
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(unix)]
#[test]
fn a_folder_that_has_what_is_wanted_need_not_be_written() {
    use std::os::unix::fs::PermissionsExt;

    let folder = Folder::new();
    let wanted = load(&mut random(), a16w4(), Some(&folder.cache())).unwrap().0;
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o555)).unwrap();
    let found = load(&mut Unread(random()), a16w4(), Some(&folder.cache()));
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(found.unwrap(), (wanted, WeightsFrom::Cache));
}

#[test]
fn files_that_go_or_are_replaced_leave_loaded_models_alone() {
    let folder = Folder::new();
    load(&mut random(), a16w4(), Some(&folder.cache())).unwrap();
    let open = || {
        let cache = folder.cache();
        Decoder::load_with_cache(backend(), spec(), &mut random(), LIMITS, a16w4(), Some(&cache), &mut |_| ()).unwrap()
    };
    let logits = |decoder: &mut _| Runner::<CpuBackend>::new(decoder, 1).step(&[(0, &[3, 1, 4])], Wanted::All);
    let mut decoder = open();
    assert_eq!(decoder.weights_from(), &WeightsFrom::Cache);
    let wanted = logits(&mut decoder);
    fs::remove_file(folder.file()).unwrap();
    assert_eq!(logits(&mut decoder), wanted);
    assert_stored(open().weights_from());
    assert_eq!(logits(&mut decoder), wanted);
}

#[test]
fn weights_without_identity_and_backends_without_a_layout_are_not_kept() {
    struct Nameless(RandomWeights);
    impl WeightSource for Nameless {
        fn names(&self) -> Vec<&str> {
            self.0.names()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            self.0.info(name)
        }

        fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
            self.0.read(name)
        }
    }
    let folder = Folder::new();
    let cache = WeightCache::new(folder.0.join("new"));
    assert_eq!(load(&mut Nameless(random()), a16w4(), Some(&cache)).unwrap().1, WeightsFrom::Source);
    let reference = Reference::default();
    let none = Quantization::NONE;
    let decoder =
        Decoder::load_with_cache(reference, spec(), &mut random(), LIMITS, none, Some(&cache), &mut |_| ()).unwrap();
    assert_eq!(decoder.weights_from(), &WeightsFrom::Source);
    assert!(folder.files().is_empty(), "nothing is made that is of no use");
}

#[test]
fn a_load_that_fails_leaves_no_file() {
    struct Infinite(RandomWeights);
    impl WeightSource for Infinite {
        fn names(&self) -> Vec<&str> {
            self.0.names()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            self.0.info(name)
        }

        fn identity(&self) -> Option<String> {
            Some("infinite".to_owned())
        }

        fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
            let mut bytes = self.0.read(name)?.into_owned();
            if name.contains("down_proj.weight") {
                bytes.fill(0xff);
            }
            Some(bytes.into())
        }
    }
    let folder = Folder::new();
    let found = load(&mut Infinite(random()), a16w4(), Some(&folder.cache()));
    assert!(matches!(found, Err(LoadError::Kernel(_))), "{found:?}");
    assert!(folder.files().is_empty(), "{:?}", folder.files());
}

/// Loads some times while others do; each time the bits are the same.
fn load_beside_others(cache: &WeightCache, wanted: &[Vec<f32>]) {
    for round in 0..6 {
        let (found, from) = load(&mut random(), a16w4(), Some(cache)).unwrap();
        assert!(found == wanted);
        let fine = matches!(from, WeightsFrom::Cache | WeightsFrom::Stored { replaced: None, .. });
        assert!(fine && (round == 0 || from == WeightsFrom::Cache), "{from:?}");
    }
}

#[test]
fn threads_that_load_at_once_agree() {
    let folder = Folder::new();
    let wanted = load(&mut random(), a16w4(), None).unwrap().0;
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| load_beside_others(&folder.cache(), &wanted));
        }
    });
    folder.file();
}

/// Runs this very test again in other processes, told by a variable where to look.
#[test]
fn processes_that_load_at_once_agree() {
    const FOLDER: &str = "DASHINFER_TEST_WEIGHT_CACHE";
    let wanted = load(&mut random(), a16w4(), None).unwrap().0;
    if let Some(folder) = std::env::var_os(FOLDER) {
        return load_beside_others(&WeightCache::new(folder), &wanted);
    }
    let folder = Folder::new();
    let mut start = process::Command::new(std::env::current_exe().unwrap());
    start.args(["processes_that_load_at_once_agree", "--exact"]).env(FOLDER, &folder.0).stdout(process::Stdio::null());
    let children: Vec<_> = (0..3).map(|_| start.spawn().unwrap()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    folder.file();
}
