//! Laws of models with experts on the CPU, on random ones: each row has the bits that it has alone, and memory is what was said.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::num::NonZeroUsize;

use common::sequences::{Runner, Wanted};
use dashinfer_kernels::{
    CacheType, DType, Scheme,
    cpu::{CpuBackend, CpuConfig, PoolConfig, packed_bytes},
};
use dashinfer_models::{Decoder, HfConfig, MemoryEstimate, ModelSpec, Quantization, RandomWeights, StepLimits};

const VOCAB: u32 = 90;
const LIMITS: StepLimits = StepLimits { max_tokens: 700, max_logit_rows: 700 };

/// A dense layer between two with experts, and an expert of every token.
fn spec() -> ModelSpec {
    let config = format!(
        r#"{{"architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": {VOCAB}, "max_position_embeddings": 1024,
            "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 50, "mlp_only_layers": [1], "tie_word_embeddings": false}}"#
    );
    HfConfig::parse(&config).unwrap().to_spec().unwrap()
}

fn backend(threads: usize, compute: DType) -> Option<CpuBackend> {
    let pool = PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() };
    CpuBackend::new(&CpuConfig { pool, compute, ..CpuConfig::default() }).ok()
}

fn load(threads: usize, compute: DType, quantization: Quantization) -> Option<Decoder<CpuBackend>> {
    let (spec, backend) = (spec(), backend(threads, compute)?);
    let mut source = RandomWeights::new(&spec, 11);
    Some(Decoder::load(backend, spec, &mut source, LIMITS, quantization, &mut |_| ()).unwrap())
}

fn tokens(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i * 31 + i * 7 + seed * 13) % VOCAB).collect()
}

#[test]
fn rows_of_a_mixed_batch_have_the_bits_that_they_have_alone() {
    let schemes = Scheme::ALL.iter().map(|scheme| Quantization::new(*scheme));
    let mut variants: Vec<_> = schemes.map(|quantization| (DType::F32, quantization)).collect();
    variants.extend([DType::F32, DType::BF16].map(|compute| (compute, Quantization::NONE)));
    for (compute, quantization) in variants {
        let Some(mut decoder) = load(2, compute, quantization) else {
            eprintln!("skipped: computing in {compute} is not available on this machine");
            continue;
        };
        // Enough rows for experts to go in batches, some of one row and many.
        let runs: Vec<Vec<u32>> = [640, 17, 1, 1].into_iter().zip(0..).map(|(len, seed)| tokens(len, seed)).collect();
        let together: Vec<_> = runs.iter().map(Vec::as_slice).enumerate().collect();
        let together = Runner::new(&mut decoder, runs.len()).step(&together, Wanted::All);
        let mut rows = together.iter();
        for run in &runs {
            let mut runner = Runner::new(&mut decoder, 1);
            // The last rows one by one, as decodes.
            let (prompt, decodes) = run.split_at(run.len().saturating_sub(3));
            let mut alone = if prompt.is_empty() { Vec::new() } else { runner.step(&[(0, prompt)], Wanted::All) };
            alone.extend(decodes.chunks(1).flat_map(|token| runner.step(&[(0, token)], Wanted::All)));
            for (row, alone) in alone.iter().enumerate() {
                assert_eq!(alone, rows.next().unwrap(), "{compute} {quantization:?}: row {row} of {}", run.len());
            }
        }
        let mut other = load(3, compute, quantization).unwrap();
        let runs: Vec<_> = runs.iter().map(Vec::as_slice).enumerate().collect();
        let with_three_threads = Runner::new(&mut other, runs.len()).step(&runs, Wanted::All);
        assert_eq!(with_three_threads, together, "{compute} {quantization:?}");
    }
}

#[test]
fn experts_are_quantized_and_routers_are_not() {
    let spec = spec();
    let source = RandomWeights::new(&spec, 0);
    let scheme: Scheme = "a16w8-g32".parse().unwrap();
    let estimate = |quantization| {
        let (f32, cache) = (DType::F32, CacheType::F32);
        MemoryEstimate::new(&spec, &source, f32, cache, LIMITS, quantization, &packed_bytes).unwrap()
    };
    let bytes = |rows, cols, scheme| packed_bytes(rows, cols, DType::BF16, scheme) as u64;
    let gated = |size, scheme| bytes(2 * size, 72, scheme) + bytes(72, size, scheme);
    let expected = |scheme| {
        let experts = 12 * gated(40, scheme) + gated(50, scheme) + bytes(12, 72, None) + bytes(1, 72, None);
        let attention = bytes(144, 72, scheme) + bytes(72, 72, scheme);
        let vectors = 4 * (3 * (144 + 2 * 72) + 72);
        2 * experts + gated(100, scheme) + 3 * attention + 2 * bytes(90, 72, scheme) + vectors
    };
    assert_eq!(estimate(Quantization::NONE).weight_bytes, expected(None));
    assert_eq!(estimate(Quantization::new(scheme)).weight_bytes, expected(Some(scheme)));
    let token = 4 * (3 * 72 + 144 + 72 + 3 * 100 + 3 * 50 + 72 + 12 + 1);
    let row = 4 * (2 * 72 + 90);
    assert_eq!(estimate(Quantization::NONE).activation_bytes, 700 * (token + row));
}
