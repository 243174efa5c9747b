//! A checkpoint of the largest published size, 671 billion parameters in sparse files: opened, proved and estimated from its headers.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use dashinfer_kernels::{CacheType, DType, cpu::packed_bytes};
use dashinfer_models::{
    Checkpoint, FAMILIES, HfConfig, MemoryEstimate, Quantization, StepLimits, WeightSource, WeightsError,
};

const LAYERS: usize = 61;
const EXPERTS: usize = 256;
const HIDDEN: usize = 7168;
const VOCAB: usize = 129_280;
/// As many as are published.
const SHARDS: usize = 163;

/// Name, shape, and whether it is in f32.
type Tensor = (String, Vec<usize>, bool);

/// The tensors of DeepSeek-V3 as they are published, in bf16.
fn tensors() -> Vec<Tensor> {
    let mut tensors: Vec<Tensor> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN], false),
        ("model.norm.weight".into(), vec![HIDDEN], false),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN], false),
    ];
    // The one behind the last predicts a token further ahead.
    for layer in 0..=LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec(), false));
        };
        add("input_layernorm", &[HIDDEN]);
        add("self_attn.q_a_proj", &[1536, HIDDEN]);
        add("self_attn.q_a_layernorm", &[1536]);
        add("self_attn.q_b_proj", &[128 * 192, 1536]);
        add("self_attn.kv_a_proj_with_mqa", &[576, HIDDEN]);
        add("self_attn.kv_a_layernorm", &[512]);
        add("self_attn.kv_b_proj", &[128 * 256, 512]);
        add("self_attn.o_proj", &[HIDDEN, 128 * 128]);
        add("post_attention_layernorm", &[HIDDEN]);
        let mut mlp = |module: &str, size: usize| {
            add(&format!("{module}.gate_proj"), &[size, HIDDEN]);
            add(&format!("{module}.up_proj"), &[size, HIDDEN]);
            add(&format!("{module}.down_proj"), &[HIDDEN, size]);
        };
        if layer < 3 {
            mlp("mlp", 18432);
            continue;
        }
        (0..EXPERTS).for_each(|expert| mlp(&format!("mlp.experts.{expert}"), 2048));
        mlp("mlp.shared_experts", 2048);
        add("mlp.gate", &[EXPERTS, HIDDEN]);
        if layer == LAYERS {
            add("eh_proj", &[HIDDEN, 2 * HIDDEN]);
            ["enorm", "hnorm", "shared_head.norm"].into_iter().for_each(|name| add(name, &[HIDDEN]));
            ["embed_tokens", "shared_head.head"].into_iter().for_each(|name| add(name, &[VOCAB, HIDDEN]));
        }
        tensors.push((format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"), vec![EXPERTS], true));
    }
    tensors
}

/// Writes the headers of shards with their index, and makes the files as long as their tensors.
fn write(folder: &Path, tensors: &[Tensor]) {
    let mut map = BTreeMap::new();
    for (number, shard) in tensors.chunks(tensors.len().div_ceil(SHARDS)).enumerate() {
        let name = format!("model-{:05}-of-{SHARDS:06}.safetensors", number + 1);
        let (mut header, mut end) = (String::from("{"), 0_u64);
        for (tensor, shape, in_f32) in shard {
            let (dtype, size) = if *in_f32 { ("F32", 4) } else { ("BF16", 2) };
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

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Bytes of this process in memory, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

#[cfg(target_pointer_width = "64")] // more than a terabyte is mapped
#[test]
fn a_checkpoint_of_671_billion_parameters_is_opened_and_estimated_from_its_headers() {
    let folder = Folder(std::env::temp_dir().join(format!("dashinfer-large-{}", std::process::id())));
    fs::create_dir_all(&folder.0).unwrap();
    let tensors = tensors();
    write(&folder.0, &tensors);
    let before = resident_bytes();

    let family = FAMILIES.iter().find(|family| family.architecture == "DeepseekV3ForCausalLM").unwrap();
    let config = family.example.config.replacen('{', r#"{"architectures": ["DeepseekV3ForCausalLM"], "#, 1);
    let spec = HfConfig::parse(&config).unwrap().to_spec().unwrap();
    let checkpoint = Checkpoint::open(&folder.0).unwrap();
    assert_eq!(checkpoint.names().len(), tensors.len());
    let limits = StepLimits { max_tokens: 512, max_logit_rows: 8 };
    let estimate = |source: &dyn WeightSource| {
        let none = Quantization::NONE;
        MemoryEstimate::new(&spec, source, DType::F32, CacheType::BF16, limits, none, &packed_bytes)
    };
    let found = estimate(&checkpoint).unwrap();
    if let (Some(before), Some(after)) = (before, resident_bytes()) {
        let taken = after.saturating_sub(before);
        assert!(taken < 256 << 20, "{} MiB for some {} names", taken >> 20, tensors.len());
    }

    // As published: 671 billion parameters without the layer for prediction, all of them in two bytes but for norms and corrections.
    let parameters = spec.num_parameters();
    assert_eq!(parameters, 671_026_419_200);
    let in_f32 = (LAYERS * (2 * HIDDEN + 1536 + 512) + HIDDEN + 58 * EXPERTS) as u64;
    assert_eq!(found.weight_bytes, 2 * (parameters + in_f32));
    assert_eq!(found.kv_bytes_per_token, 61 * 576 * 2);

    // Less one tensor it is none.
    let missing = "model.layers.60.mlp.experts.255.down_proj.weight";
    let rest: Vec<_> = tensors.into_iter().filter(|tensor| tensor.0 != missing).collect();
    drop(checkpoint);
    write(&folder.0, &rest);
    match estimate(&Checkpoint::open(&folder.0).unwrap()) {
        Err(WeightsError::Missing { name, more: 0, .. }) => assert_eq!(name, missing),
        other => panic!("{other:?}"),
    }
}
