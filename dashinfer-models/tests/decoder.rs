//! Laws of the forward pass that hold for every model, on random ones.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use common::{
    reference::Reference,
    sequences::{BLOCK_SIZE, Runner, Wanted},
};
use dashinfer_kernels::{
    Backend, CacheType, KernelError, PagedBatch, SampleParams, SampleRow, SequenceRows,
    cpu::{CpuBackend, CpuConfig},
};
use dashinfer_models::{
    Decoder, ForwardBatch, ForwardError, HfConfig, ModelSpec, Quantization, RandomWeights, StepLimits,
};
use proptest::prelude::*;

const VOCAB: u32 = 50;

/// Small models of every family, with and without windows.
fn any_spec() -> impl Strategy<Value = ModelSpec> {
    let families =
        &["Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3"];
    let family = prop::sample::select(&families[..]);
    let shape = (1usize..4, 1usize..4, 1usize..4, prop::sample::select(&[2usize, 6, 16][..]), 1usize..40, 1usize..40);
    (family, shape, any::<bool>(), prop::option::of(1usize..9)).prop_map(|(family, shape, flag, window)| {
        let (layers, kv_heads, group, head_dim, hidden, mlp) = shape;
        let window = window.map_or("null".into(), |window| window.to_string());
        let heads = kv_heads * group;
        let q_rank = if flag { "null".into() } else { hidden.to_string() };
        let config = format!(
            r#"{{"architectures": ["{family}ForCausalLM"], "hidden_size": {hidden}, "intermediate_size": {mlp},
                "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                "head_dim": {head_dim}, "vocab_size": {VOCAB}, "max_position_embeddings": 64,
                "tie_word_embeddings": {flag}, "attention_bias": {flag}, "mlp_bias": {flag},
                "use_sliding_window": true, "max_window_layers": 1, "sliding_window": {window},
                "num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": {mlp},
                "shared_expert_intermediate_size": 7, "decoder_sparse_step": {group},
                "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
                "q_lora_rank": {q_rank}, "kv_lora_rank": {mlp}, "qk_nope_head_dim": {group},
                "qk_rope_head_dim": {head_dim}, "v_head_dim": {layers}}}"#
        );
        HfConfig::parse(&config).unwrap().to_spec().unwrap()
    })
}

fn load(spec: &ModelSpec, limits: StepLimits) -> Decoder<Reference> {
    Decoder::load(
        Reference::default(),
        spec.clone(),
        &mut RandomWeights::new(spec, 11),
        limits,
        Quantization::NONE,
        &mut |_| (),
    )
    .unwrap()
}

fn any_tokens(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0..VOCAB, len)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chunked_equals_whole_and_batched_equals_alone_to_the_bit(
        spec in any_spec(),
        one in any_tokens(1..40),
        two in any_tokens(1..20),
        chunk in 1usize..12,
    ) {
        let mut decoder = load(&spec, StepLimits { max_tokens: 64, max_logit_rows: 64 });
        let alone = |decoder: &mut _, ids: &[u32]| Runner::new(decoder, 1).step(&[(0, ids)], Wanted::All);
        let (whole_one, whole_two) = (alone(&mut decoder, &one), alone(&mut decoder, &two));

        let mut runner = Runner::new(&mut decoder, 1);
        let chunked: Vec<_> = one.chunks(chunk).flat_map(|ids| runner.step(&[(0, ids)], Wanted::All)).collect();
        prop_assert_eq!(&chunked, &whole_one);

        let together = Runner::new(&mut decoder, 2).step(&[(0, &one), (1, &two)], Wanted::All);
        prop_assert_eq!(&together[..one.len()], &whole_one[..]);
        prop_assert_eq!(&together[one.len()..], &whole_two[..]);

        let last = Runner::new(&mut decoder, 2).step(&[(1, &two), (0, &one)], Wanted::LastOfEach);
        prop_assert_eq!(last, [whole_two.last().unwrap().clone(), whole_one.last().unwrap().clone()]);
    }
}

fn small() -> Decoder<Reference> {
    let config = format!(
        r#"{{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": {VOCAB}, "max_position_embeddings": 64}}"#
    );
    load(&HfConfig::parse(&config).unwrap().to_spec().unwrap(), StepLimits { max_tokens: 4, max_logit_rows: 2 })
}

/// The first `len` tokens of one sequence in block 0.
fn prompt(len: usize, logit_rows: &[u32]) -> ForwardBatch {
    let positions: Vec<u32> = (0..len as u32).collect();
    let sequence = SequenceRows { first_row: 0, num_rows: len, context_len: len, first_block: 0, num_blocks: 1 };
    ForwardBatch {
        ids: positions.clone(),
        carried: Vec::new(),
        paged: PagedBatch { slots: positions.clone(), positions, sequences: vec![sequence], block_table: vec![0] },
        logit_rows: logit_rows.to_vec(),
    }
}

fn cache(decoder: &Decoder<Reference>) -> <Reference as Backend>::KvCache {
    decoder.backend().kv_cache(&decoder.spec().kv_cache(BLOCK_SIZE, 1, CacheType::F32)).unwrap()
}

#[test]
fn a_step_beyond_the_limits_is_refused() {
    let mut decoder = small();
    let mut cache = cache(&decoder);
    let mut error = |batch: ForwardBatch| decoder.forward(&batch, &mut cache).unwrap_err().to_string();
    assert_eq!(error(prompt(5, &[])), "batch: 5 rows, but there is room for 4");
    assert_eq!(error(prompt(4, &[0, 1, 2])), "batch: 3 rows of logits, but there is room for 2");
    let mut wrong = prompt(4, &[]);
    wrong.ids[3] = VOCAB;
    assert_eq!(error(wrong), "batch: token id of row 3 should be below 50, found 50");
}

#[test]
fn logits_are_those_of_the_last_step_alone() {
    let mut decoder = small();
    let mut cache = cache(&decoder);
    assert_eq!(decoder.forward(&prompt(4, &[1, 3]), &mut cache).unwrap().num_rows(), 2);
    assert_eq!(decoder.logits().num_rows(), 2);
    assert_eq!(decoder.forward(&prompt(4, &[]), &mut cache).unwrap().num_rows(), 0);
    let missing = KernelError::Shape { op: "read_row", what: "rows of logits", wanted: 1, found: 0 };
    assert_eq!(decoder.logits().read_row(0), Err(missing));
    decoder.forward(&prompt(4, &[1, 3]), &mut cache).unwrap();
    assert!(matches!(decoder.forward(&prompt(5, &[1]), &mut cache), Err(ForwardError::Batch(_))));
    assert_eq!(decoder.logits().num_rows(), 0, "a failed step has none");
}

#[test]
fn logits_can_be_sampled() {
    let mut decoder = small();
    let mut cache = cache(&decoder);
    let mut logits = decoder.forward(&prompt(4, &[1, 3]), &mut cache).unwrap();
    let params = SampleParams::default();
    let row = |logits_row| SampleRow::new(logits_row, &params, 4);
    let values = logits.read_row(1).unwrap();
    logits.sample(&[row(1)]).unwrap();
    assert!(matches!(logits.sample(&[row(2)]), Err(KernelError::Shape { .. })));
    let sampled = decoder.collect_sampled().unwrap();
    assert!(values.iter().all(|value| *value <= values[sampled[0].id as usize]));
    assert_eq!(decoder.collect_sampled(), Err(KernelError::NothingToCollect), "a refused one gives nothing");
}

#[test]
fn a_decoder_can_move_between_threads() {
    fn check<T: Send>() {}
    check::<Decoder<Reference>>();
}

/// Latent attention by its definition, and with its matrices applied to queries and outputs in place of keys and values.
#[test]
fn latent_attention_is_the_same_on_the_cpu() {
    for (family, q_rank) in [("V2", "null"), ("V3", "24")] {
        let config = format!(
            r#"{{"architectures": ["Deepseek{family}ForCausalLM"], "hidden_size": 48, "intermediate_size": 40,
                "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": {VOCAB}, "max_position_embeddings": 64,
                "q_lora_rank": {q_rank}, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6,
                "v_head_dim": 10, "attention_bias": true}}"#
        );
        let spec = HfConfig::parse(&config).unwrap().to_spec().unwrap();
        let limits = StepLimits { max_tokens: 64, max_logit_rows: 64 };
        let ids: Vec<u32> = (0..40).map(|i| i * 7 % VOCAB).collect();
        let wanted = Runner::new(&mut load(&spec, limits), 1).step(&[(0, &ids)], Wanted::All);
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let mut source = RandomWeights::new(&spec, 11);
        let mut decoder = Decoder::load(backend, spec, &mut source, limits, Quantization::NONE, &mut |_| ()).unwrap();
        let mut runner = Runner::new(&mut decoder, 1);
        let found = ids.chunks(13).flat_map(|ids| runner.step(&[(0, ids)], Wanted::All));
        let largest = wanted.concat().iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        for (row, (found, wanted)) in found.zip(&wanted).enumerate() {
            for (found, wanted) in found.iter().zip(wanted) {
                assert!((found - wanted).abs() <= 1e-4 * largest, "{family}, row {row}: {found}, wanted {wanted}");
            }
        }
    }
}
