use dashinfer_kernels::{
    Backend, DType, MatrixView, Scheme,
    cpu::{CpuBackend, CpuConfig, to_bytes},
};

use super::*;
use crate::{HfConfig, RandomWeights, test_folder::TestFolder};

fn backend() -> CpuBackend {
    CpuBackend::new(&CpuConfig::default()).unwrap()
}

fn plan() -> (Plan, RandomWeights) {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40, "max_position_embeddings": 64}"#;
    let spec = HfConfig::parse(config).unwrap().to_spec().unwrap();
    (Plan::new(&spec), RandomWeights::new(&spec, 0))
}

#[test]
fn the_key_says_all_that_decides_the_bytes() {
    let (plan, source) = plan();
    let quantization = Quantization::new("a16w4-g32".parse().unwrap());
    let key =
        |layout, source: &RandomWeights, quantization| super::key(layout, &plan, source, None, quantization).unwrap();
    let first = key("x", &source, quantization);
    assert!(first.starts_with("layout: x\nlayers: a16w4-g32\nvocabulary: a16w8-g32\n"), "{first}");
    assert!(first.contains("\nmodel.layers.0.mlp.up_proj.weight [24, 16] Float(BF16)\n"), "{first}");
    assert!(first.contains("\nrandom, version 1, seed 0, "), "{first}");
    for other in [
        key("y", &source, quantization),
        key("x", &source.clone().dtype(DType::F16), quantization),
        key("x", &source, quantization.vocabulary(None)),
        key("x", &source, Quantization::NONE),
    ] {
        assert_ne!(other, first);
    }
    let mut plan = plan.clone();
    plan.norm.offset = 1.0;
    let offset = super::key("x", &plan, &source, None, quantization).unwrap();
    plan.head.as_mut().unwrap().unit_rows = true;
    let unit_rows = super::key("x", &plan, &source, None, quantization).unwrap();
    assert!(first != offset && first != unit_rows && offset != unit_rows);
}

/// Whoever changes the bytes that packing makes must change the layout's name, or files of older versions would be read as new
/// ones. This holds the one to the other.
#[test]
fn the_name_of_the_layout_stands_for_these_bytes() {
    let (backend, rows, cols) = (backend(), 37, 100);
    let mut state = 1u64;
    let values: Vec<f32> = (0..rows * cols)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let mut all = Vec::new();
    let dense = [DType::F32, DType::F16, DType::BF16].map(|dtype| (dtype, None));
    for (dtype, scheme) in dense.into_iter().chain(Scheme::ALL.map(|scheme| (DType::F32, Some(scheme)))) {
        let bytes = to_bytes(&values, dtype);
        let view = MatrixView { bytes: &bytes, dtype, rows, cols };
        let matrix = backend.pack(&[view], Some(&values[..rows]), scheme).unwrap();
        for buffer in backend.export(&matrix) {
            all.extend_from_slice(&xxh64(buffer).to_le_bytes());
        }
    }
    let found = (backend.layout().unwrap(), format!("{:016x}", xxh64(&all)));
    assert_eq!(
        found,
        ("cpu panels, version 1", "5abc52e0df783c8d".to_owned()),
        "the layout has changed: give it another name"
    );
}

#[test]
fn what_cannot_be_written_is_told_and_leaves_nothing() {
    let folder = TestFolder::new();
    let (plan, source) = plan();
    let cache = WeightCache::new(folder.path().join("a/b"));
    let file = || cache.file(&backend(), &plan, &source, None, Quantization::NONE).unwrap();
    let mut writer = file().writer().unwrap();
    writer.fail(io::ErrorKind::StorageFull.into());
    writer.vector(&backend(), &[1.0]);
    assert_eq!(writer.finish(None), WeightsFrom::NotStored { error: io::ErrorKind::StorageFull });
    drop(file().writer().unwrap());
    assert_eq!(std::fs::read_dir(cache.folder()).unwrap().count(), 0);
}

#[test]
fn a_file_of_other_items_is_refused() {
    let folder = TestFolder::new();
    let (plan, source) = plan();
    let (cache, backend) = (WeightCache::new(folder.path()), backend());
    let file = || cache.file(&backend, &plan, &source, None, Quantization::NONE).unwrap();
    let mut writer = file().writer().unwrap();
    writer.vector(&backend, &[1.0, 2.0]);
    assert_eq!(writer.finish(None), WeightsFrom::Stored { replaced: None });
    let open = || StoredWeights::open(&file(), &backend).unwrap().unwrap();
    assert_eq!(open().vector(2), Ok(vec![1.0, 2.0]));
    assert_eq!(open().vector(3).unwrap_err().to_string(), "wanted vector [3, 1], found vector [2, 1]");
    assert_eq!(open().finish().unwrap_err().to_string(), "wanted nothing, found vector [2, 1]");
    let mut taken = open();
    taken.vector(2).unwrap();
    assert_eq!(taken.vector(2).unwrap_err().to_string(), "wanted vector [2, 1], found nothing");
}
