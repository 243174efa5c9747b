//! Loading: what is proved before it, what is converted on the way, and what is told about it.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use common::{
    reference::Reference,
    sequences::{Runner, Wanted},
};
use dashinfer_kernels::{
    DType, Scheme,
    cpu::{CpuBackend, CpuConfig},
    to_f32,
};
use dashinfer_models::{
    Attention, Decoder, HfConfig, LoadError, LoadProgress, ModelSpec, Quantization, RandomWeights, StepLimits,
    StoredType, TensorInfo, WeightSource, WeightsError,
};

const LIMITS: StepLimits = StepLimits { max_tokens: 16, max_logit_rows: 16 };

/// A Llama with every bias there is, in two layers.
fn spec(tied: bool) -> ModelSpec {
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
            "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": {tied}}}"#
    );
    HfConfig::parse(&config).unwrap().to_spec().unwrap()
}

/// Tensors in memory, which count what is done with them.
struct Memory {
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
    reads: AtomicUsize,
    released: Vec<String>,
    /// Rows that were done with before their tensor was.
    done: Mutex<BTreeMap<String, Vec<Range<usize>>>>,
}

impl Memory {
    fn new(spec: &ModelSpec) -> Self {
        let random = RandomWeights::new(spec, 5);
        let tensor = |name: &str| (random.info(name).unwrap(), random.read(name).unwrap().into_owned());
        let tensors = random.names().into_iter().map(|name| (name.to_owned(), tensor(name))).collect();
        Self { tensors, reads: AtomicUsize::new(0), released: Vec::new(), done: Mutex::default() }
    }

    fn insert(&mut self, name: &str, dtype: StoredType, shape: &[usize]) {
        self.tensors.insert(name.into(), (TensorInfo { dtype, shape: shape.to_vec() }, Vec::new()));
    }

    /// Stores `name` as f32, which loses nothing.
    fn widen(&mut self, name: &str) {
        let (info, bytes) = self.tensors.get_mut(name).unwrap();
        *bytes = to_f32(bytes, DType::BF16).into_iter().flat_map(f32::to_le_bytes).collect();
        info.dtype = StoredType::Float(DType::F32);
    }

    fn load(&mut self, spec: &ModelSpec) -> Result<Decoder<Reference>, LoadError> {
        Decoder::load(Reference::default(), spec.clone(), self, LIMITS, Quantization::NONE, &mut |_| ())
    }
}

impl WeightSource for Memory {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(self.tensors.get(name)?.0.clone())
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        Some(Cow::Borrowed(&self.tensors.get(name)?.1))
    }

    fn done_with_rows(&self, name: &str, rows: Range<usize>) {
        self.done.lock().unwrap().entry(name.into()).or_default().push(rows);
    }

    fn release(&mut self, name: &str) {
        self.released.push(name.into());
    }
}

fn logits(decoder: &mut Decoder<Reference>) -> Vec<Vec<f32>> {
    Runner::new(decoder, 1).step(&[(0, &[3, 1, 4, 1, 5, 9, 2, 6])], Wanted::All)
}

/// The weights of an untied model with `change` done to them are refused, unread.
#[track_caller]
fn check_refused(change: impl FnOnce(&mut Memory), wanted: &str) {
    let spec = spec(false);
    let mut source = Memory::new(&spec);
    change(&mut source);
    let error = source.load(&spec).unwrap_err();
    assert!(matches!(error, LoadError::Weights(_)), "{error:?}");
    assert_eq!(error.to_string(), wanted);
    assert_eq!(source.reads.load(Ordering::Relaxed), 0, "the proof comes first");
}

#[test]
fn weights_of_another_model_are_refused_before_anything_is_read() {
    check_refused(
        |source| {
            source.tensors.remove("model.layers.1.mlp.up_proj.weight");
        },
        "tensor model.layers.1.mlp.up_proj.weight [24, 16] is missing",
    );
    check_refused(
        |source| source.tensors.retain(|name, _| !name.starts_with("model.layers.1.")),
        "tensor model.layers.1.input_layernorm.weight [16] is missing (and 15 more)",
    );
    check_refused(
        |source| {
            source.tensors.remove("lm_head.weight");
        },
        "lm_head.weight is missing, but the config says that it is not tied to the embedding",
    );
    check_refused(
        |source| source.insert("model.norm.weight", StoredType::Float(DType::F32), &[15]),
        "tensor model.norm.weight should have the shape [16], found [15]",
    );
    check_refused(
        |source| source.insert("model.norm.weight", StoredType::Other("F8_E4M3".into()), &[16]),
        "tensor model.norm.weight is stored as F8_E4M3, wanted f32, f16 or bf16",
    );
    check_refused(
        |source| {
            for name in ["model.layers.2.b", "model.layers.2.a"] {
                source.insert(name, StoredType::Float(DType::F32), &[1]);
            }
        },
        "the model has no place for tensor model.layers.2.a (and 1 more)",
    );
}

#[test]
fn what_follows_from_the_config_may_be_stored_too() {
    let spec = spec(true);
    let mut source = Memory::new(&spec);
    source.insert("lm_head.weight", StoredType::Float(DType::F32), &[40, 16]);
    source.insert("model.layers.0.self_attn.rotary_emb.inv_freq", StoredType::Other("F64".into()), &[2]);
    source.load(&spec).unwrap();
    assert!(!source.released.iter().any(|name| name == "lm_head.weight"));
}

#[test]
fn a_spec_that_was_changed_into_no_model_is_refused() {
    let mut spec = spec(true);
    let mut source = Memory::new(&spec);
    let Attention::Grouped(attention) = &mut spec.attention else { panic!("Qwen3 has grouped-query attention") };
    attention.num_kv_heads = 0;
    assert!(matches!(source.load(&spec), Err(LoadError::Config(_))));
    let mut spec = self::spec(true);
    spec.layers.clear();
    assert!(matches!(source.load(&spec), Err(LoadError::Config(_))));
}

#[test]
fn parts_of_different_types_make_one_matrix() {
    let spec = spec(false);
    let wanted = logits(&mut Memory::new(&spec).load(&spec).unwrap());
    let mut mixed = Memory::new(&spec);
    for name in ["self_attn.k_proj.weight", "self_attn.v_proj.bias", "mlp.gate_proj.weight", "input_layernorm.weight"] {
        mixed.widen(&format!("model.layers.0.{name}"));
    }
    assert_eq!(logits(&mut mixed.load(&spec).unwrap()), wanted);
    let mut wide = Memory::new(&spec);
    for name in RandomWeights::new(&spec, 0).names() {
        wide.widen(name);
    }
    assert_eq!(logits(&mut wide.load(&spec).unwrap()), wanted);
}

#[test]
fn each_tensor_is_read_and_given_back_once() {
    let spec = spec(false);
    let mut source = Memory::new(&spec);
    source.load(&spec).unwrap();
    let mut released = source.released.clone();
    released.sort();
    assert_eq!(released, source.names());
    assert_eq!(source.reads.load(Ordering::Relaxed), released.len());
}

#[test]
fn progress_grows_to_the_whole() {
    let spec = spec(false);
    let mut source = Memory::new(&spec);
    let mut seen: Vec<LoadProgress> = Vec::new();
    Decoder::load(Reference::default(), spec, &mut source, LIMITS, Quantization::NONE, &mut |progress| {
        seen.push(progress)
    })
    .unwrap();
    assert!(seen.is_sorted_by(|a, b| a.tensors_done < b.tensors_done && a.bytes_done < b.bytes_done));
    let last = seen.last().unwrap();
    let bytes: usize = source.tensors.values().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!((last.tensors_done, last.tensors_total), (source.tensors.len(), source.tensors.len()));
    assert_eq!((last.bytes_done, last.bytes_total), (bytes as u64, bytes as u64));
}

#[test]
fn a_missing_bias_is_missing() {
    let spec = spec(false);
    let mut source = Memory::new(&spec);
    source.tensors.remove("model.layers.0.mlp.down_proj.bias");
    let LoadError::Weights(error) = source.load(&spec).unwrap_err() else { panic!("not about weights") };
    let name = "model.layers.0.mlp.down_proj.bias".to_owned();
    assert_eq!(error, WeightsError::Missing { name, shape: vec![16], more: 0 });
}

#[test]
fn rows_of_matrices_are_done_with_as_they_are_quantized() {
    let spec = spec(false);
    let scheme = Scheme::A16W8 { group: None };
    for (quantization, all) in [
        (Quantization::NONE, false),
        (Quantization::new(scheme), true),
        (Quantization::new(scheme).vocabulary(None), true),
    ] {
        let mut source = Memory::new(&spec);
        source.widen("model.layers.0.self_attn.k_proj.weight");
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        Decoder::load(backend, spec.clone(), &mut source, LIMITS, quantization, &mut |_| ()).unwrap();
        for (name, (info, _)) in &source.tensors {
            let is_vocabulary = name.contains("embed") || name.contains("lm_head");
            let quantized =
                all && info.shape.len() == 2 && !(is_vocabulary && quantization.vocabulary_scheme().is_none());
            let done = source.done.lock().unwrap().get(name).cloned().unwrap_or_default();
            let wanted = quantized.then(|| 0..info.shape[0]);
            assert!(done.iter().eq(&wanted), "{name}: {done:?}");
            assert_eq!(source.released.iter().filter(|released| *released == name).count(), 1, "{name}");
        }
    }
}
