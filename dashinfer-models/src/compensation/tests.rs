use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, PoolConfig};
use dashinfer_kernels::{DType, Scheme};
use serde_json::{Value, json};

use super::*;
use crate::config::tests::config;
use crate::{LoadProgress, RandomWeights};

fn backend(threads: usize) -> CpuBackend {
    let pool = PoolConfig { threads: std::num::NonZeroUsize::new(threads), cores: Vec::new() };
    CpuBackend::new(&CpuConfig { pool, ..CpuConfig::default() }).unwrap()
}

/// Sequences of few tokens, so that tests are fast.
fn spec(family: &str, changes: Value) -> ModelSpec {
    let mut all = json!({"max_position_embeddings": 24, "num_hidden_layers": 2});
    all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config(family, all).to_spec().unwrap()
}

fn compensated(name: &str) -> Quantization {
    Quantization::new(name.parse().unwrap()).compensated()
}

fn load(spec: &ModelSpec, quantization: Quantization, threads: usize) -> Result<Decoder<CpuBackend>, LoadError> {
    let limits = StepLimits { max_tokens: 24, max_logit_rows: 24 };
    let mut source = RandomWeights::new(spec, 3);
    Decoder::load(backend(threads), spec.clone(), &mut source, limits, quantization, &mut |_| ())
}

/// Logits of a sequence that was not among those which were looked at.
fn logits(decoder: &mut Decoder<CpuBackend>) -> Vec<f32> {
    let mut batch = ForwardBatch {
        ids: (0..20).map(|i| (i * i * 7 + 5) % decoder.spec().vocab_size as u32).collect(),
        logit_rows: (0..20).collect(),
        ..ForwardBatch::default()
    };
    batch.paged.positions = (0..20).collect();
    batch.paged.slots = (0..20).collect();
    let rows =
        dashinfer_kernels::SequenceRows { first_row: 0, num_rows: 20, context_len: 20, first_block: 0, num_blocks: 1 };
    batch.paged.sequences = vec![rows];
    batch.paged.block_table = vec![0];
    let mut cache = decoder.backend().kv_cache(&decoder.spec().kv_cache(32, 1, CacheType::F32)).unwrap();
    let logits = decoder.forward(&batch, &mut cache).unwrap();
    (0..20).flat_map(|row| logits.read_row(row).unwrap()).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
}

/// Every dense family, with the layouts that are hardest: columns that end within a group, biases, an embedding that is the head.
#[test]
fn logits_come_nearer_in_every_family() {
    let mut families = 0;
    for family in crate::FAMILIES {
        let family = family.architecture;
        for tied in [false, true] {
            let changes = json!({"max_position_embeddings": 24, "num_hidden_layers": 2, "attention_bias": true, "mlp_bias": true});
            // What has no such form is of no use here.
            let Ok(mut spec) = config(family, changes).to_spec() else { continue };
            spec.tied_embeddings = tied;
            if check(&backend(1), &spec, compensated("a16w4-g32")).is_err() {
                continue;
            }
            families += 1;
            let exact = logits(&mut load(&spec, Quantization::NONE, 1).unwrap());
            let of = |quantization: Quantization| {
                distance(&logits(&mut load(&spec, quantization.vocabulary(None), 1).unwrap()), &exact)
            };
            for name in ["a16w4-g32", "a8w4-g64-zp"] {
                let scheme: Scheme = name.parse().unwrap();
                let (plain, better) = (of(Quantization::new(scheme)), of(compensated(name)));
                eprintln!("{family} {name} {tied}: {better}, {plain} weight by weight");
                assert!(better < 0.95 * plain, "{family} {name} {tied}: {better}, {plain} weight by weight");
            }
        }
    }
    assert!(families > 2);
}

#[test]
fn threads_change_nothing() {
    let spec = spec("Qwen3ForCausalLM", json!({}));
    let of = |threads| logits(&mut load(&spec, compensated("a16w4-g32"), threads).unwrap());
    assert_eq!(of(1), of(3));
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_loaded() {
    let dense = spec("LlamaForCausalLM", json!({}));
    let text = |spec: &ModelSpec, quantization| load(spec, quantization, 1).map(|_| ()).unwrap_err().to_string();
    let found = text(&dense, compensated("a16w8-g32"));
    assert!(found.contains("errors of a16w8-g32; those of 4-bit schemes can be"), "{found}");
    let found = text(&dense, Quantization::NONE.compensated());
    assert!(found.contains("weights that are not quantized"), "{found}");
}

#[test]
fn weights_that_lead_nowhere_are_an_error() {
    let spec = spec("LlamaForCausalLM", json!({}));
    let mut source = Huge(RandomWeights::new(&spec, 3).dtype(DType::F32));
    let limits = StepLimits { max_tokens: 4, max_logit_rows: 4 };
    let loaded = Decoder::load(backend(1), spec, &mut source, limits, compensated("a16w4-g32"), &mut |_| ());
    let found = loaded.map(|_| ()).unwrap_err();
    assert!(matches!(found, LoadError::Kernel(KernelError::NotFinite { .. })), "{found}");
}

/// Weights so large that their products are infinite.
struct Huge(RandomWeights);

impl crate::WeightSource for Huge {
    fn names(&self) -> Vec<&str> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<crate::TensorInfo> {
        self.0.info(name)
    }

    fn read(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        let mut bytes = self.0.read(name)?.into_owned();
        if name.ends_with("up_proj.weight") || name.ends_with("gate_proj.weight") {
            for value in bytes.as_chunks_mut().0 {
                *value = (f32::from_le_bytes(*value) * 1e30).to_le_bytes();
            }
        }
        Some(bytes.into())
    }
}

#[test]
fn progress_rises_to_the_end() {
    let spec = spec("LlamaForCausalLM", json!({}));
    let mut seen: Vec<LoadProgress> = Vec::new();
    let limits = StepLimits { max_tokens: 4, max_logit_rows: 4 };
    let mut source = RandomWeights::new(&spec, 3);
    let quantization = compensated("a16w4-g32");
    Decoder::load(backend(1), spec, &mut source, limits, quantization, &mut |progress| seen.push(progress)).unwrap();
    assert!(seen.len() > 2 && seen.is_sorted_by_key(|progress| progress.bytes_done));
    let last = seen.last().unwrap();
    assert_eq!((last.tensors_done, last.bytes_done), (last.tensors_total, last.bytes_total));
}
