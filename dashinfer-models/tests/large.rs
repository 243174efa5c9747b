//! Checkpoints of published sizes in sparse files: one of 671 billion parameters, opened, proved and estimated from its headers, and one
//! of 7 billion, quantized while it is loaded.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use dashinfer_kernels::{
    CacheType, DType, Group, Scheme,
    cpu::{CpuBackend, CpuConfig, packed_bytes},
};
use dashinfer_models::{
    Checkpoint, Decoder, FAMILIES, HfConfig, MemoryEstimate, ModelSpec, Quantization, RandomWeights, StepLimits,
    WeightSource, WeightsError, shapes,
};

const LAYERS: usize = 61;
const EXPERTS: usize = 256;
const HIDDEN: usize = 7168;
const VOCAB: usize = 129_280;
/// As many as are published.
const SHARDS: usize = 163;

/// Name, shape and type.
type Tensor = (String, Vec<usize>, &'static str);

/// The tensors of DeepSeek-V3 as they are published, with matrices in FP8 and a scale for each block of 128 by 128; or all in bf16.
fn tensors(fp8: bool) -> Vec<Tensor> {
    let mut tensors: Vec<Tensor> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN], "BF16"),
        ("model.norm.weight".into(), vec![HIDDEN], "BF16"),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN], "BF16"),
    ];
    // The one behind the last predicts a token further ahead.
    for layer in 0..=LAYERS {
        let mut plain = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec(), "BF16"));
        };
        plain("input_layernorm", &[HIDDEN]);
        plain("self_attn.q_a_layernorm", &[1536]);
        plain("self_attn.kv_a_layernorm", &[512]);
        plain("post_attention_layernorm", &[HIDDEN]);
        if layer >= 3 {
            plain("mlp.gate", &[EXPERTS, HIDDEN]);
        }
        if layer == LAYERS {
            plain("eh_proj", &[HIDDEN, 2 * HIDDEN]);
            ["enorm", "hnorm", "shared_head.norm"].into_iter().for_each(|name| plain(name, &[HIDDEN]));
            ["embed_tokens", "shared_head.head"].into_iter().for_each(|name| plain(name, &[VOCAB, HIDDEN]));
        }
        let mut matrix = |name: &str, rows: usize, cols: usize| {
            let name = format!("model.layers.{layer}.{name}.weight");
            if fp8 {
                tensors.push((format!("{name}_scale_inv"), vec![rows.div_ceil(128), cols.div_ceil(128)], "F32"));
            }
            tensors.push((name, vec![rows, cols], if fp8 { "F8_E4M3" } else { "BF16" }));
        };
        matrix("self_attn.q_a_proj", 1536, HIDDEN);
        matrix("self_attn.q_b_proj", 128 * 192, 1536);
        matrix("self_attn.kv_a_proj_with_mqa", 576, HIDDEN);
        matrix("self_attn.kv_b_proj", 128 * 256, 512);
        matrix("self_attn.o_proj", HIDDEN, 128 * 128);
        let mut mlp = |module: &str, size: usize| {
            matrix(&format!("{module}.gate_proj"), size, HIDDEN);
            matrix(&format!("{module}.up_proj"), size, HIDDEN);
            matrix(&format!("{module}.down_proj"), HIDDEN, size);
        };
        if layer < 3 {
            mlp("mlp", 18432);
            continue;
        }
        (0..EXPERTS).for_each(|expert| mlp(&format!("mlp.experts.{expert}"), 2048));
        mlp("mlp.shared_experts", 2048);
        tensors.push((format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"), vec![EXPERTS], "F32"));
    }
    tensors
}

/// Writes the headers of shards with their index, and makes the files as long as their tensors.
fn write(folder: &Path, tensors: &[Tensor]) {
    let mut map = BTreeMap::new();
    for (number, shard) in tensors.chunks(tensors.len().div_ceil(SHARDS)).enumerate() {
        let name = format!("model-{:05}-of-{SHARDS:06}.safetensors", number + 1);
        let (mut header, mut end) = (String::from("{"), 0_u64);
        for (tensor, shape, dtype) in shard {
            let size = match *dtype {
                "F32" => 4,
                "BF16" => 2,
                _ => 1,
            };
            let start = end;
            end += shape.iter().product::<usize>() as u64 * size;
            let comma = if start == 0 { "" } else { "," };
            write!(
                header,
                r#"{comma}"{tensor}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
            )
            .unwrap();
            map.insert(tensor.clone(), name.clone());
        }
        header.push('}');
        let mut file = File::create(folder.join(name)).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len(8 + header.len() as u64 + end).unwrap();
    }
    let index = serde_json::json!({"weight_map": map}).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
}

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

/// Bytes of this process in memory, where the system tells.
fn resident_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// The most that they ever were.
fn peak_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

fn spec(more: &str) -> ModelSpec {
    let family = FAMILIES.iter().find(|family| family.architecture == "DeepseekV3ForCausalLM").unwrap();
    let more = format!(r#"{{"architectures": ["DeepseekV3ForCausalLM"], {more}"#);
    HfConfig::parse(&family.example.config.replacen('{', &more, 1)).unwrap().to_spec().unwrap()
}

fn estimate(spec: &ModelSpec, folder: &Path) -> Result<MemoryEstimate, WeightsError> {
    let limits = StepLimits { max_tokens: 512, max_logit_rows: 8 };
    let checkpoint = Checkpoint::open(folder).unwrap();
    let as_stored = Quantization::AS_STORED;
    MemoryEstimate::new(spec, &checkpoint, DType::F32, CacheType::BF16, limits, as_stored, &packed_bytes)
}

#[cfg(target_pointer_width = "64")] // more than a terabyte is mapped
#[test]
fn a_checkpoint_of_671_billion_parameters_is_opened_and_estimated_from_its_headers() {
    let folder = Folder::new("large");
    let kept_in_memory = |tensors: &[Tensor], spec: &ModelSpec| {
        write(&folder.0, tensors);
        let before = resident_bytes();
        let found = estimate(spec, &folder.0).unwrap();
        if let (Some(before), Some(after)) = (before, resident_bytes()) {
            let taken = after.saturating_sub(before);
            assert!(taken < 512 << 20, "{} MiB for {} names", taken >> 20, tensors.len());
        }
        found
    };

    // As published: 671 billion parameters without the layer for prediction. In bf16, all in two bytes but for norms and corrections.
    let bf16 = spec("");
    let parameters = bf16.num_parameters();
    assert_eq!(parameters, 671_026_419_200);
    let found = kept_in_memory(&tensors(false), &bf16);
    let in_f32 = (LAYERS * (2 * HIDDEN + 1536 + 512) + HIDDEN + 58 * EXPERTS) as u64;
    assert_eq!(found.weight_bytes, 2 * (parameters + in_f32));
    assert_eq!(found.kv_bytes_per_token, 61 * 576 * 2);

    // In FP8, matrices take 8.5 bits; the embedding, the head, routers, and what is between heads and latent vectors take more.
    let quantized = r#""quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128]}, "#;
    let (quantized, mut published) = (spec(quantized), tensors(true));
    let found = kept_in_memory(&published, &quantized);
    assert!((parameters * 17 / 16..parameters * 35 / 32).contains(&found.weight_bytes), "{found:?}");

    // Less one tensor there is none.
    let missing = "model.layers.60.mlp.experts.255.down_proj.weight";
    published.retain(|tensor| tensor.0 != missing);
    write(&folder.0, &published);
    match estimate(&quantized, &folder.0) {
        Err(WeightsError::Missing { name, more: 0, .. }) => assert_eq!(name, missing),
        other => panic!("{other:?}"),
    }
}

/// By itself, as the peak is that of the process.
#[cfg(target_pointer_width = "64")]
#[test]
#[ignore = "15 GB are read and packed, in a minute or more"]
fn little_is_in_memory_beside_what_is_packed_while_seven_billion_parameters_are_quantized() {
    let folder = Folder::new("quantized");
    let spec = shapes::named("qwen2.5-7b").unwrap();
    let stored = RandomWeights::new(&spec, 0);
    let tensors: Vec<Tensor> =
        stored.names().into_iter().map(|name| (name.to_owned(), stored.info(name).unwrap().shape, "BF16")).collect();
    write(&folder.0, &tensors);

    let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
    let scheme = Scheme::A16W4 { group: Group::G32, zero_point: false };
    let quantization = Quantization::new(scheme).vocabulary(Some(scheme));
    let limits = StepLimits { max_tokens: 1, max_logit_rows: 1 };
    let cache = CacheType::BF16;
    let estimate =
        MemoryEstimate::new(&spec, &checkpoint, DType::F32, cache, limits, quantization, &packed_bytes).unwrap();
    let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
    let start = std::time::Instant::now();
    let decoder = Decoder::load(backend, spec, &mut checkpoint, limits, quantization, &mut |_| ()).unwrap();
    let (packed, stored) = (estimate.weight_bytes, checkpoint.data_bytes());
    eprintln!("{} MB in {:.0?} to {} MB", stored / 1_000_000, start.elapsed(), packed / 1_000_000);
    drop(decoder);
    if let Some(peak) = peak_bytes() {
        eprintln!("{} MB at the peak", peak / 1_000_000);
        assert!(peak < packed + 256_000_000, "{} MB beside what is packed", (peak - packed) / 1_000_000);
    }
}
