//! GGUF files: their values against the reference implementation of the format, models in them against the same models elsewhere, and
//! damaged ones. `gguf/make_gguf.py` made the files in `gguf`; the others are made here.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use common::{
    gguf::{File, MXFP4, Value, converted, of_golden},
    sequences::{Cached, Runner, Wanted},
};
use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, packed_bytes, to_bytes};
use dashinfer_kernels::{BlockFormat, DType, Group, Scheme, to_f32};
use dashinfer_models::{
    Checkpoint, Decoder, Gguf, GgufWeights, MemoryEstimate, ModelSpec, Quantization, StepLimits, StoredType,
    TensorInfo, WeightCache, WeightSource, WeightsFrom, shapes,
};
use proptest::prelude::*;

const LIMITS: StepLimits = StepLimits { max_tokens: 64, max_logit_rows: 64 };

fn committed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf").join(name)
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// A folder of its own, that goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dashinfer-gguf-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn backend() -> CpuBackend {
    CpuBackend::new(&CpuConfig::default()).unwrap()
}

fn open(path: &Path) -> (ModelSpec, GgufWeights) {
    let file = Gguf::open(path).unwrap();
    let spec = file.spec().unwrap();
    let weights = file.into_weights(&spec);
    (spec, weights)
}

fn load(spec: &ModelSpec, weights: &mut dyn WeightSource, quantization: Quantization) -> Decoder<CpuBackend> {
    Decoder::load(backend(), spec.clone(), weights, LIMITS, quantization, &mut |_| ()).unwrap()
}

fn logits<B: Cached>(decoder: &mut Decoder<B>) -> Vec<Vec<f32>> {
    let vocab = decoder.spec().vocab_size as u32;
    let ids: Vec<u32> = (0..40).map(|i| (i * 31 + 7) % vocab).collect();
    Runner::new(decoder, 1).step(&[(0, &ids)], Wanted::All)
}

fn worst(found: &[Vec<f32>], wanted: &[Vec<f32>]) -> f32 {
    let differences = found.iter().flatten().zip(wanted.iter().flatten()).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst, off| if off.is_nan() { f32::INFINITY } else { worst.max(off) })
}

fn largest(logits: &[Vec<f32>]) -> f32 {
    logits.iter().flatten().fold(0.0, |largest, value| largest.max(value.abs()))
}

#[test]
fn values_of_blocks_are_the_references() {
    let (_, file) = (0, Gguf::open(&committed("blocks.gguf")).unwrap());
    let weights = file.into_weights(&shapes::named("qwen2.5-0.5b").unwrap());
    for format in BlockFormat::ALL {
        let name = format!("{format}.blocks");
        let info = weights.info(&name).unwrap();
        assert_eq!(info.dtype, StoredType::Blocks(format));
        let mut found = vec![0.0; info.shape.iter().product()];
        format.dequantize(&weights.read(&name).unwrap(), &mut found);
        let wanted = to_f32(&weights.read(&format!("{format}.values")).unwrap(), DType::F32);
        assert_eq!(found.len(), wanted.len());
        let different = found.iter().zip(&wanted).position(|(found, wanted)| found.to_bits() != wanted.to_bits());
        assert_eq!(different, None, "{format}");
    }
}

/// A model from a file that another program wrote: rows of q and k in pairs, factors on the frequencies, a tied embedding.
#[test]
fn a_converted_golden_gives_its_logits() {
    let (spec, mut weights) = open(&committed("llama-v5-config.bf16.gguf"));
    let folder = golden("llama-v5-config");
    let wanted = ModelSpec::read(&folder).unwrap();
    assert_eq!(
        (spec.architecture.as_str(), spec.tied_embeddings, spec.dtype),
        ("LlamaForCausalLM", true, Some(DType::BF16))
    );
    assert_eq!((&spec.attention, &spec.mlp, &spec.layers), (&wanted.attention, &wanted.mlp, &wanted.layers));
    assert_eq!(
        (spec.vocab_size, spec.max_positions, spec.norm_eps),
        (wanted.vocab_size, wanted.max_positions, wanted.norm_eps)
    );
    let (found, wanted_rope) = (spec.ropes[0].rope(256), wanted.ropes[0].rope(256));
    for (found, wanted) in found.inv_freq.iter().zip(&wanted_rope.inv_freq) {
        assert!((found / wanted - 1.0).abs() < 3e-7, "{found} {wanted}");
    }
    let found = logits(&mut load(&spec, &mut weights, Quantization::NONE));
    let wanted = logits(&mut load(&wanted, &mut Checkpoint::open(&folder).unwrap(), Quantization::NONE));
    assert!(worst(&found, &wanted) < 1e-5 * largest(&wanted), "{}", worst(&found, &wanted));
}

/// To the bit where the file says all that the config does; frequencies divided by rounded factors may differ in their last bit.
#[test]
fn every_golden_gives_the_same_logits_from_a_gguf_file() {
    let (folder, mut cases) = (Folder::new(), Vec::new());
    for entry in fs::read_dir(golden("")).unwrap() {
        let golden = entry.unwrap().path();
        if !golden.join("config.json").exists() {
            continue;
        }
        let Some(file) = of_golden(&golden) else { continue };
        if file.tensors.iter().any(|tensor| tensor.type_number == MXFP4) {
            continue; // has a test of its own
        }
        cases.push(golden.file_name().unwrap().to_string_lossy().into_owned());
        let (spec, mut weights) = open(&folder.write("model.gguf", &file.bytes()));
        let wanted_spec = ModelSpec::read(&golden).unwrap();
        let mut checkpoint = Checkpoint::open(&golden).unwrap();
        let found = logits(&mut load(&spec, &mut weights, Quantization::NONE));
        let wanted = logits(&mut load(&wanted_spec, &mut checkpoint, Quantization::NONE));
        let bound =
            if spec.ropes[0].rope(256) == wanted_spec.ropes[0].rope(256) { 0.0 } else { 1e-5 * largest(&wanted) };
        assert!(worst(&found, &wanted) <= bound, "{golden:?}: {}", worst(&found, &wanted));
        // What is asked for is done to weights that were not quantized.
        if bound == 0.0 {
            let scheme: Scheme = "a16w4-g32".parse().unwrap();
            let found = logits(&mut load(&spec, &mut weights, scheme.into()));
            let wanted = logits(&mut load(&wanted_spec, &mut checkpoint, scheme.into()));
            assert_eq!(worst(&found, &wanted), 0.0, "{golden:?}");
        }
    }
    for name in
        ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "phi3"]
    {
        assert!(cases.iter().any(|case| case == name), "{name}");
    }
    for name in ["phi3-longrope", "glm", "glm4", "glm4-moe", "gemma2", "gemma3-text", "llama-gqa-rope-scaling"] {
        assert!(cases.iter().any(|case| case == name), "{name}");
    }
}

/// What makes keys and values of latent vectors as two tensors, and attention described as it is behind them.
#[test]
fn latent_attention_is_read_in_both_forms() {
    let folder = Folder::new();
    for name in ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"] {
        let mut whole = open(&folder.write("whole.gguf", &of_golden(&golden(name)).unwrap().bytes()));
        let split = converted(&golden(name), true).unwrap();
        assert!(split.tensors.iter().all(|tensor| !tensor.name.contains("attn_kv_b")));
        let mut split = open(&folder.write("split.gguf", &split.bytes()));
        assert_eq!(whole.0, split.0);
        assert_eq!(whole.1.names(), split.1.names());
        assert_eq!(whole.1.data_bytes(), split.1.data_bytes());
        for quantization in [Quantization::NONE, "a16w4-g32".parse().unwrap()] {
            let wanted = logits(&mut load(&whole.0, &mut whole.1, quantization));
            assert_eq!(worst(&logits(&mut load(&split.0, &mut split.1, quantization)), &wanted), 0.0, "{name}");
        }
    }
}

/// Keys of latent vectors stand transposed, and their blocks lie along the other side.
#[test]
fn heads_in_blocks_are_put_together_of_their_values() {
    let (num_heads, rank, nope_dim, v_dim) = (2, 32, 64, 3);
    let block = |i: usize| -> Vec<u8> {
        let codes = (0..32).map(|j| (i * 7 + j * 3) as u8);
        to_bytes(&[0.25 + i as f32], DType::F16).into_iter().chain(codes).collect()
    };
    let blocks = |count: usize, first: usize| (first..first + count).flat_map(block).collect::<Vec<u8>>();
    let (keys, values) = (blocks(num_heads * rank * nope_dim / 32, 0), blocks(num_heads * v_dim * rank / 32, 50));
    let mut file = small_file();
    file.tensor("blk.0.attn_k_b.weight", &[num_heads, rank, nope_dim], 8, &keys);
    file.tensor("blk.0.attn_v_b.weight", &[num_heads, v_dim, rank], 8, &values);
    let folder = Folder::new();
    let (_, weights) = open(&folder.write("m.gguf", &file.bytes()));
    let name = "blk.0.attn_kv_b.weight";
    let info = TensorInfo { dtype: StoredType::Float(DType::F32), shape: vec![num_heads * (nope_dim + v_dim), rank] };
    assert_eq!(weights.info(name), Some(info));
    let found = to_f32(&weights.read(name).unwrap(), DType::F32);
    let [keys, values] = [keys, values].map(|bytes| {
        let mut values = vec![0.0; bytes.len() / 34 * 32];
        BlockFormat::Q8_0.dequantize(&bytes, &mut values);
        values
    });
    for head in 0..num_heads {
        let rows = &found[head * (nope_dim + v_dim) * rank..][..(nope_dim + v_dim) * rank];
        for (i, row) in rows.chunks(rank).enumerate() {
            for (col, found) in row.iter().enumerate() {
                let wanted = match i.checked_sub(nope_dim) {
                    None => keys[(head * rank + col) * nope_dim + i],
                    Some(i) => values[(head * v_dim + i) * rank + col],
                };
                assert_eq!(*found, wanted, "{head} {i} {col}");
            }
        }
    }
    // Of other heads, they are left as they are.
    let keys = file.tensors.iter_mut().find(|tensor| tensor.name.contains("k_b")).unwrap();
    keys.shape = vec![num_heads * rank, 1, nope_dim];
    let (_, weights) = open(&folder.write("m.gguf", &file.bytes()));
    assert!(weights.info(name).is_none() && weights.info("blk.0.attn_k_b.weight").is_some());
}

/// The same experts in the checkpoint's MXFP4, in that of files, and in Q8_0, which holds their values too: to the bit the same.
#[test]
fn experts_in_blocks_are_computed_as_they_are_stored() {
    let (folder, golden) = (Folder::new(), golden("gpt-oss-mxfp4"));
    let spec = ModelSpec::read(&golden).unwrap();
    let stored = Quantization::AS_STORED;
    let wanted = logits(&mut load(&spec, &mut Checkpoint::open(&golden).unwrap(), stored));
    let mut file = of_golden(&golden).unwrap();
    let check = |file: &File, format: &str| {
        let (spec, mut weights) = open(&folder.write("model.gguf", &file.bytes()));
        let mut decoder = load(&spec, &mut weights, stored);
        let conversions: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
        // Two matrices of each of four experts in both layers.
        assert_eq!(conversions, [format!("gguf {format} → a16w8-g32, as stored (16 matrices)")]);
        assert_eq!(worst(&logits(&mut decoder), &wanted), 0.0, "{format}");
    };
    check(&file, "MXFP4");
    for tensor in file.tensors.iter_mut().filter(|tensor| tensor.type_number == MXFP4) {
        let blocks = tensor.bytes.chunks(17).flat_map(|block| {
            let mut values = [0.0; 32];
            BlockFormat::Mxfp4.dequantize(block, &mut values);
            let scale = 2f32.powi(i32::from(block[0]) - 128);
            let codes = values.map(|value| (value / scale) as i8 as u8);
            to_bytes(&[scale], DType::F16).into_iter().chain(codes).collect::<Vec<u8>>()
        });
        (tensor.type_number, tensor.bytes) = (8, blocks.collect());
    }
    check(&file, "Q8_0");
}

/// A file that says less than today's do: sizes of experts are those of its tensors.
#[test]
fn sizes_of_experts_are_seen_from_the_tensors() {
    let folder = Folder::new();
    let mut file = of_golden(&golden("qwen2-moe")).unwrap();
    let path = folder.write("m.gguf", &file.bytes());
    let wanted = Gguf::open(&path).unwrap().spec().unwrap();
    file.metadata.retain(|(key, _)| !key.ends_with("expert_feed_forward_length") && !key.contains("shared_feed"));
    let found = Gguf::open(&folder.write("m.gguf", &file.bytes())).unwrap().spec().unwrap();
    assert_eq!(found, wanted);
    assert_eq!(found.layers.iter().map(|layer| layer.experts).collect::<Vec<_>>(), [true, false, true]);
    assert!(file.metadata.iter().any(|(key, _)| key.ends_with("expert_used_count")));
    file.metadata.retain(|(key, _)| !key.ends_with("expert_used_count"));
    let error = Gguf::open(&folder.write("m.gguf", &file.bytes())).unwrap().spec().unwrap_err().to_string();
    assert_eq!(error, "qwen2moe.expert_used_count: wanted a whole number, found nothing");
}

/// What one architecture says by a number, and what we have no routing for.
#[test]
fn routings_that_are_not_known_are_refused() {
    let error = |name: &str, key: &str, value: Value| {
        let (folder, mut file) = (Folder::new(), of_golden(&golden(name)).unwrap());
        file.set(key, value);
        Gguf::open(&folder.write("m.gguf", &file.bytes())).unwrap().spec().unwrap_err().to_string()
    };
    assert_eq!(
        error("deepseek-v3", "deepseek2.expert_gating_func", Value::U32(3)),
        "deepseek2.expert_gating_func: 3 is not supported; supported: 1 and 2: softmax and sigmoid"
    );
    assert_eq!(
        error("glm4-moe", "glm4moe.expert_gating_func", Value::U32(1)),
        "glm4moe.expert_gating_func: 1 is not supported; supported: 2: sigmoid"
    );
    assert_eq!(
        error("deepseek-v2", "deepseek2.expert_weights_norm", Value::Bool(true)),
        "deepseek2.expert_weights_norm: true is not supported; supported: false where experts are chosen by softmax"
    );
    assert_eq!(
        error("deepseek-v2", "deepseek2.rope.dimension_count", Value::U32(24)),
        "deepseek2.rope.dimension_count: 24 is not supported; supported: less than the size of keys, 24"
    );
}

/// The experts of a layer are so many tensors, and what does not fit names the one.
#[test]
fn stacked_tensors_that_do_not_fit_are_named() {
    let (folder, mut file) = (Folder::new(), of_golden(&golden("qwen3-moe")).unwrap());
    let stack = file.tensors.iter_mut().find(|tensor| tensor.name == "blk.1.ffn_down_exps.weight").unwrap();
    stack.shape = vec![7, 48, 24];
    stack.bytes.truncate(7 * 48 * 24 * 2);
    let (spec, mut weights) = open(&folder.write("m.gguf", &file.bytes()));
    let loaded = Decoder::load(backend(), spec, &mut weights, LIMITS, Quantization::NONE, &mut |_| ());
    let text = "tensor blk.1.ffn_down_exps.7.weight [48, 24] is missing";
    assert_eq!(loaded.err().unwrap().to_string(), text);
}

/// The values of a file's tensors in memory, as f32.
struct Dequantized(BTreeMap<String, (Vec<usize>, Vec<u8>)>);

impl Dequantized {
    fn new(weights: &GgufWeights) -> Self {
        let tensors = weights.names().into_iter().map(|name| {
            let (info, bytes) = (weights.info(name).unwrap(), weights.read(name).unwrap());
            let values = match info.dtype {
                StoredType::Float(dtype) => to_f32(&bytes, dtype),
                StoredType::Blocks(format) => {
                    let mut values = vec![0.0; info.shape.iter().product()];
                    format.dequantize(&bytes, &mut values);
                    values
                }
                StoredType::Other(other) => panic!("{name} is {other}"),
            };
            (name.to_owned(), (info.shape, values.into_iter().flat_map(f32::to_le_bytes).collect()))
        });
        Self(tensors.collect())
    }
}

impl WeightSource for Dequantized {
    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let shape = self.0.get(name)?.0.clone();
        Some(TensorInfo { dtype: StoredType::Float(DType::F32), shape })
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        Some(Cow::Borrowed(&self.0.get(name)?.1))
    }
}

/// What a file quantized is computed as it is: beside the same values in f32, only activations are rounded, to 16 bits.
#[test]
fn codes_of_a_file_lose_nothing() {
    let (spec, mut weights) = open(&committed("qwen2-yarn.q8_0-q4_0.gguf"));
    let wanted = logits(&mut load(&spec, &mut Dequantized::new(&weights), Quantization::NONE));
    let mut decoder = load(&spec, &mut weights, Quantization::AS_STORED);
    let conversions: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
    let four = "gguf Q4_0 → a16w4-g32, as stored (5 matrices)";
    assert_eq!(conversions, [four, "gguf Q8_0 → a16w8-g32, as stored (5 matrices)"]);
    let found = logits(&mut decoder);
    let off = worst(&found, &wanted) / largest(&wanted);
    assert!(off < 5e-4, "{off}");
    // Not for want of a difference: the golden itself is further away.
    let golden = golden("qwen2-yarn");
    let mut checkpoint = Checkpoint::open(&golden).unwrap();
    let unquantized = logits(&mut load(&ModelSpec::read(&golden).unwrap(), &mut checkpoint, Quantization::NONE));
    let off = worst(&found, &unquantized) / largest(&unquantized);
    assert!((0.01..0.5).contains(&off), "{off}");
    // In floating point, if that is asked for.
    let found = logits(&mut load(&spec, &mut weights, Quantization::NONE));
    assert_eq!(worst(&found, &wanted), 0.0);
}

/// Formats that no scheme can hold are rounded to 8 bits, 1 in 254 of the largest of 32 weights.
#[test]
fn superblocks_are_computed_in_eight_bits() {
    assert_eq!(Gguf::open(&committed("superblocks.gguf")).unwrap().tokenizer().unwrap(), None);
    let (spec, mut weights) = open(&committed("superblocks.gguf"));
    let wanted = logits(&mut load(&spec, &mut Dequantized::new(&weights), Quantization::NONE));
    let mut decoder = load(&spec, &mut weights, Quantization::AS_STORED);
    let conversions: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
    assert!(conversions.contains(&"gguf Q4_K beside gguf Q6_K → a16w8-g32 (1 matrix)".to_owned()), "{conversions:?}");
    assert!(conversions.contains(&"gguf IQ4_NL → a16w8-g32, as stored (1 matrix)".to_owned()), "{conversions:?}");
    let found = logits(&mut decoder);
    let off = worst(&found, &wanted) / largest(&wanted);
    // Random bytes make a model that hands errors on undiminished: in 4 bits it is off by 0.3.
    assert!(off < 0.06, "{off}");
    let eight = Scheme::A16W8 { group: Some(Group::G32) };
    let anew = logits(&mut load(&spec, &mut Dequantized::new(&weights), eight.into()));
    assert!(worst(&found, &anew) < 0.02 * largest(&wanted), "only codes that were kept differ from those made anew");
    // What is asked for is made of the values.
    let scheme = Scheme::A16W8 { group: Some(Group::G64) };
    let wanted = logits(&mut load(&spec, &mut Dequantized::new(&weights), scheme.into()));
    let found = logits(&mut load(&spec, &mut weights, scheme.into()));
    assert_eq!(worst(&found, &wanted), 0.0);
}

#[test]
fn an_estimate_counts_what_is_packed() {
    let (spec, weights) = open(&committed("superblocks.gguf"));
    let estimate = |source: &dyn WeightSource, quantization| {
        MemoryEstimate::new(&spec, source, DType::F32, DType::F32.into(), LIMITS, quantization, &packed_bytes).unwrap()
    };
    let eight = Quantization::from(Scheme::A16W8 { group: Some(Group::G32) });
    let (found, wanted) = (estimate(&weights, Quantization::AS_STORED), estimate(&Dequantized::new(&weights), eight));
    assert_eq!(found, wanted);
    assert!(weights.data_bytes() > 60_000);
}

#[test]
fn packed_blocks_are_kept_in_a_cache() {
    let folder = Folder::new();
    let path = folder.write("model.gguf", &fs::read(committed("superblocks.gguf")).unwrap());
    let cache = WeightCache::new(folder.0.join("cache"));
    let load = |path: &Path| {
        let (spec, mut weights) = open(path);
        let (stored, cache) = (Quantization::AS_STORED, Some(&cache));
        Decoder::load_with_cache(backend(), spec, &mut weights, LIMITS, stored, cache, &mut |_| ()).unwrap()
    };
    let mut first = load(&path);
    assert!(matches!(first.weights_from(), WeightsFrom::Stored { replaced: None, .. }));
    let mut second = load(&path);
    assert_eq!(second.weights_from(), &WeightsFrom::Cache);
    assert_eq!(logits(&mut first), logits(&mut second));
}

#[test]
fn several_files_are_one_model() {
    let folder = Folder::new();
    let whole = of_golden(&golden("qwen2-tied")).unwrap();
    let (first, rest) = whole.tensors.split_at(5);
    let (second, third) = rest.split_at(7);
    let write = |number: u32, tensors: &[common::gguf::Tensor], name: &str| {
        let metadata = if number == 0 { whole.metadata.clone() } else { Vec::new() };
        let mut file = File { metadata, tensors: tensors.to_vec(), ..File::default() };
        file.set("split.no", Value::U32(number));
        file.set("split.count", Value::U32(3));
        folder.write(name, &file.bytes())
    };
    let path = write(0, first, "m-00001-of-00003.gguf");
    let error = |path: &Path| {
        let text = Gguf::open(path).unwrap_err().to_string();
        text.replace(&folder.0.display().to_string(), "F")
    };
    assert_eq!(error(&path), "F/m-00002-of-00003.gguf: file 2 of 3: wanted it beside the first, found nothing");
    write(1, second, "m-00002-of-00003.gguf");
    write(1, third, "m-00003-of-00003.gguf");
    let text = "F/m-00003-of-00003.gguf: file 3 of 3: wanted these numbers in its metadata, found (2, 3)";
    assert_eq!(error(&path), text);
    write(2, second, "m-00003-of-00003.gguf");
    assert!(error(&path).ends_with("in one file, found it in two"), "{}", error(&path));
    let last = write(2, third, "m-00003-of-00003.gguf");
    let text = "F/m-00003-of-00003.gguf: file 3 of 3: wanted the first of them, with a name that ends in \
                -00001-of-00003.gguf, found m-00003-of-00003.gguf";
    assert_eq!(error(&last), text);

    let (spec, mut weights) = open(&path);
    let whole = folder.write("whole.gguf", &whole.bytes());
    let (_, mut in_one) = open(&whole);
    let none = Quantization::NONE;
    assert_eq!(logits(&mut load(&spec, &mut weights, none)), logits(&mut load(&spec, &mut in_one, none)));
    assert_eq!(weights.identity().unwrap().lines().count(), 3);
}

fn tiny() -> File {
    of_golden(&golden("qwen2-tied")).unwrap()
}

#[track_caller]
fn check_spec_error(change: impl FnOnce(&mut File), wanted: &str) {
    let (folder, mut file) = (Folder::new(), tiny());
    change(&mut file);
    let found = Gguf::open(&folder.write("m.gguf", &file.bytes())).unwrap().spec().unwrap_err().to_string();
    assert_eq!(found, wanted);
}

const KNOWN: &str =
    "llama, qwen2, qwen3, gemma2, gemma3, glm4, chatglm, phi3, qwen2moe, qwen3moe, deepseek2, glm4moe, gpt-oss";

#[test]
fn metadata_errors_name_the_key() {
    let set = |key: &'static str, value: Value| move |file: &mut File| file.set(key, value);
    let remove = |key: &'static str| move |file: &mut File| file.metadata.retain(|(other, _)| other != key);
    check_spec_error(
        set("general.architecture", Value::Text("mamba".into())),
        &format!("architecture mamba is not supported; known are {KNOWN}"),
    );
    check_spec_error(
        remove("general.architecture"),
        &format!("general.architecture: wanted one of {KNOWN}, found nothing"),
    );
    check_spec_error(remove("qwen2.block_count"), "qwen2.block_count: wanted a whole number, found nothing");
    check_spec_error(
        set("qwen2.block_count", Value::Text("two".into())),
        "qwen2.block_count: wanted a whole number, found \"two\"",
    );
    check_spec_error(
        set("qwen2.block_count", Value::U32(u32::MAX)),
        "qwen2.block_count: wanted 1 to 1024, found 4294967295",
    );
    check_spec_error(
        set("qwen2.feed_forward_length", Value::U32s(vec![104, 96])),
        "qwen2.feed_forward_length: a list of different values is not supported; supported: one whole number for all layers",
    );
    check_spec_error(
        set("qwen2.attention.value_length", Value::U32(4)),
        "qwen2.attention.value_length: 4 is not supported; supported: the head size 8",
    );
    check_spec_error(
        set("qwen2.rope.scaling.type", Value::Text("longrope".into())),
        "qwen2.rope.scaling.type: longrope is not supported; supported: none, linear, yarn",
    );
    check_spec_error(
        set("qwen2.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)),
        "qwen2.attention.layer_norm_rms_epsilon: wanted a finite number, found NaN",
    );
}

#[test]
fn lists_of_one_value_are_that_value() {
    let (folder, mut file) = (Folder::new(), tiny());
    file.set("qwen2.feed_forward_length", Value::U32s(vec![104, 104]));
    let path = folder.write("m.gguf", &file.bytes());
    assert_eq!(Gguf::open(&path).unwrap().spec().unwrap().mlp.size, 104);
}

#[track_caller]
fn check_fault(bytes: &[u8], wanted: &str) {
    let folder = Folder::new();
    let path = folder.write("m.gguf", bytes);
    let found = Gguf::open(&path).unwrap_err().to_string();
    assert_eq!(found.replace(&path.display().to_string(), "F"), wanted);
}

#[test]
fn damaged_files_are_told_from_others() {
    check_fault(b"", "F: the header should take 4 bytes from byte 0 on, found 0");
    check_fault(b"PK\x03\x04 and so on", "F: wanted a GGUF file, which starts with \"GGUF\", found \"PK\\u{3}\\u{4}\"");
    let version = |version: u32| File { version, ..tiny() }.bytes();
    check_fault(&version(1), "F: wanted version 2 or 3 of GGUF, little-endian, found version 1");
    check_fault(&version(3 << 24), "F: wanted version 2 or 3 of GGUF, little-endian, found version 3, big-endian");
    let whole = tiny().bytes();
    let name = tiny().tensors.last().unwrap().name.clone();
    let found = Gguf::open(&Folder::new().write("m.gguf", &whole[..whole.len() - 1])).unwrap_err().to_string();
    assert!(found.contains(&format!("tensor {name} should take ")), "{found}");
    let mut many = whole.clone();
    many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let folder = Folder::new();
    let found = Gguf::open(&folder.write("m.gguf", &many)).unwrap_err().to_string();
    assert!(found.contains("the list of tensors should take 18446744073709551615 bytes"), "{found}");
}

#[test]
fn tensors_must_have_places_of_their_own() {
    let with = |tensors: &[(&str, &[usize], u32, usize)]| {
        let mut file = File::default();
        for (name, shape, type_number, len) in tensors {
            file.tensor(name, shape, *type_number, &vec![0; *len]);
        }
        file
    };
    check_fault(
        &with(&[("a", &[2], 0, 8), ("a", &[2], 0, 8)]).bytes(),
        "F: tensor a: wanted one of this name, found two",
    );
    check_fault(
        &with(&[("a", &[2, 33], 8, 68)]).bytes(),
        "F: tensor a: wanted rows of Q8_0 in blocks of 32, found rows of 33",
    );
    check_fault(&with(&[("a", &[1, 1, 1, 1, 1], 0, 4)]).bytes(), "F: tensor a: wanted 1 to 4 dimensions, found 5");
    check_fault(
        &with(&[("a", &[usize::MAX, usize::MAX], 0, 4)]).bytes(),
        "F: tensor a: wanted a size that can be counted, found [18446744073709551615, 18446744073709551615]",
    );
    // The offsets that the writer gives do not fit sizes that are larger than what is written.
    let found = with(&[("a", &[16], 0, 32), ("b", &[8], 0, 32)]).bytes();
    let end = found.len() - 32;
    check_fault(
        &found,
        &format!("F: tensor b: wanted a place behind tensor a, which ends at byte {}, found byte {end}", end + 32),
    );
    let mut file = with(&[("a", &[2], 0, 8)]);
    file.set("general.alignment", Value::U32(24));
    check_fault(&file.bytes(), "F: general.alignment: wanted a power of two from 8 to 1048576, found 24");
    file.set("general.alignment", Value::U32(8));
    file.alignment = 8;
    let folder = Folder::new();
    assert!(Gguf::open(&folder.write("m.gguf", &file.bytes())).is_ok());
    // A type that we do not know is a matter of whoever wants the tensor.
    assert!(Gguf::open(&folder.write("m.gguf", &with(&[("a", &[256], 16, 66)]).bytes())).is_ok());
}

#[test]
fn weights_of_a_type_that_we_do_not_read_are_refused_by_name() {
    let (folder, mut file) = (Folder::new(), tiny());
    let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == "blk.0.ffn_up.weight").unwrap();
    tensor.type_number = 19;
    let (spec, mut weights) = open(&folder.write("m.gguf", &file.bytes()));
    let loaded = Decoder::load(backend(), spec, &mut weights, LIMITS, Quantization::NONE, &mut |_| ());
    let text = "tensor blk.0.ffn_up.weight is stored as IQ1_S (of blocks, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, \
                IQ4_NL, IQ4_XS, MXFP4 are read), wanted f32, f16 or bf16";
    assert_eq!(loaded.err().unwrap().to_string(), text);
}

/// A small file with something of everything.
fn small() -> Vec<u8> {
    let mut file = small_file();
    file.tensor("blk.0.ffn_up_exps.weight", &[2, 3, 32], 8, &[1; 204]);
    file.tensor("blk.0.ffn_up_exps.bias", &[2, 3], 0, &[0; 24]);
    file.tensor("blk.0.attn_k_b.weight", &[2, 2, 2], 30, &[0; 16]);
    file.tensor("blk.0.attn_v_b.weight", &[2, 1, 2], 30, &[0; 8]);
    file.bytes()
}

fn small_file() -> File {
    let mut file = File::default();
    file.set("general.architecture", Value::Text("llama".into()));
    for key in ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"] {
        let value = match key {
            "block_count" => 1,
            "attention.head_count" => 4,
            _ => 32,
        };
        file.set(&format!("llama.{key}"), Value::U32(value));
    }
    file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    file.set("tokenizer.ggml.model", Value::Text("gpt2".into()));
    file.set("tokenizer.ggml.tokens", Value::Texts(["a", "b", "ab", "<s>"].map(str::to_owned).to_vec()));
    file.set("tokenizer.ggml.token_type", Value::U32s(vec![1, 1, 1, 3]));
    file.set("tokenizer.ggml.merges", Value::Texts(vec!["a b".into()]));
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    file.set("tokenizer.ggml.bos_token_id", Value::U32(3));
    file.tensor("rope_freqs.weight", &[4], 0, &to_bytes(&[1.0; 4], DType::F32));
    file.tensor("token_embd.weight", &[4, 32], 8, &[1; 136]);
    file.tensor("output_norm.weight", &[32], 0, &[0; 128]);
    file
}

/// Asks a file, whatever is in it, for all that it can tell.
fn use_up(path: &Path) {
    let Ok(file) = Gguf::open(path) else { return };
    let _ = file.tokenizer().map(|tokenizer| tokenizer.map(|tokenizer| tokenizer.end_tokens()));
    let Ok(spec) = file.spec() else { return };
    let mut weights = file.into_weights(&spec);
    let names: Vec<String> = weights.names().into_iter().map(str::to_owned).collect();
    for name in &names {
        assert!(weights.info(name).is_some() && weights.read(name).is_some());
        weights.release(name);
    }
    // An estimate proves the weights, and allocates nothing by them.
    let none = Quantization::NONE;
    let _ = MemoryEstimate::new(&spec, &weights, DType::F32, DType::F32.into(), LIMITS, none, &packed_bytes);
}

#[test]
fn every_cut_is_an_error_or_leaves_padding() {
    let (folder, whole) = (Folder::new(), small());
    for len in 0..whole.len() {
        let path = folder.write("cut.gguf", &whole[..len]);
        assert!(Gguf::open(&path).is_err(), "{len} of {}", whole.len());
    }
    let path = folder.write("whole.gguf", &whole);
    let file = Gguf::open(&path).unwrap();
    assert_eq!(file.tokenizer().unwrap().unwrap().tokens, ["a", "b", "ab", "<s>"]);
    assert!(file.spec().is_ok());
    use_up(&path);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn flipped_bits_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6)) {
        let (folder, mut bytes) = (Folder::new(), small());
        for (place, bit) in flips {
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;
        }
        use_up(&folder.write("flipped.gguf", &bytes));
    }

    #[test]
    fn numbers_out_of_all_proportion_never_panic(place in any::<prop::sample::Index>(), number in prop_oneof![
        Just(u64::MAX), Just(u64::MAX / 2), Just(1u64 << 63), Just(1 << 32), Just(0), any::<u64>()
    ]) {
        let (folder, mut bytes) = (Folder::new(), small());
        let place = place.index(bytes.len() - 8);
        bytes[place..place + 8].copy_from_slice(&number.to_le_bytes());
        use_up(&folder.write("numbers.gguf", &bytes));
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use dashinfer_kernels::cuda::{CudaBackend, CudaConfig, CudaDevice};

    use super::*;

    /// `None`, and a line that says so, where there is no GPU.
    fn load_on_gpu(
        spec: &ModelSpec,
        weights: &mut dyn WeightSource,
        dtype: DType,
        quantization: Quantization,
    ) -> Option<Decoder<CudaBackend>> {
        let device = match CudaDevice::open(0) {
            Ok(device) => device,
            Err(error) => {
                eprintln!("skipped: no CUDA device ({error})");
                return None;
            }
        };
        let backend = CudaBackend::new(&device, &CudaConfig { dtype, deterministic: true }).unwrap();
        Some(Decoder::load(backend, spec.clone(), weights, LIMITS, quantization, &mut |_| ()).unwrap())
    }

    #[test]
    fn every_golden_gives_the_same_logits_from_a_gguf_file() {
        let folder = Folder::new();
        for entry in fs::read_dir(golden("")).unwrap() {
            let golden = entry.unwrap().path();
            let file = golden.join("config.json").exists().then(|| of_golden(&golden)).flatten();
            let Some(file) = file.filter(|file| file.tensors.iter().all(|tensor| tensor.type_number != MXFP4)) else {
                continue;
            };
            let (spec, mut weights) = open(&folder.write("model.gguf", &file.bytes()));
            let wanted_spec = ModelSpec::read(&golden).unwrap();
            let mut checkpoint = Checkpoint::open(&golden).unwrap();
            let none = Quantization::NONE;
            let Some(mut decoder) = load_on_gpu(&spec, &mut weights, DType::F32, none) else { return };
            let found = logits(&mut decoder);
            let wanted = logits(&mut load_on_gpu(&wanted_spec, &mut checkpoint, DType::F32, none).unwrap());
            let same_rope = spec.ropes[0].rope(256) == wanted_spec.ropes[0].rope(256);
            let bound = if same_rope { 0.0 } else { 1e-4 * largest(&wanted) };
            assert!(worst(&found, &wanted) <= bound, "{golden:?}: {}", worst(&found, &wanted));
        }
    }

    /// Blocks become f16 there, which is said, and are what they were but for that and for activations in f16.
    #[test]
    fn blocks_are_computed_in_the_type_of_the_rest() {
        // Random bytes make a model that hands errors on undiminished.
        for (name, bound) in [("qwen2-yarn.q8_0-q4_0.gguf", 0.01), ("superblocks.gguf", 0.06)] {
            let (spec, mut weights) = open(&committed(name));
            let wanted = logits(&mut load(&spec, &mut Dequantized::new(&weights), Quantization::NONE));
            let stored = Quantization::AS_STORED;
            let Some(mut decoder) = load_on_gpu(&spec, &mut weights, DType::F16, stored) else { return };
            let conversions: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
            assert!(
                !conversions.is_empty() && conversions.iter().all(|said| said.contains(" → f16 (")),
                "{conversions:?}"
            );
            let off = worst(&logits(&mut decoder), &wanted) / largest(&wanted);
            assert!(off < bound, "{name}: {off}");
        }
    }
}
