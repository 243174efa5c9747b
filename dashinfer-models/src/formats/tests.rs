//! Each format against its definition, checkpoints that contradict their configs, and bytes that nobody meant.

use std::{borrow::Cow, collections::BTreeMap};

use dashinfer_kernels::{
    DType, Scheme,
    cpu::{CpuBackend, CpuConfig, to_bytes},
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::{Checkpoint, HfConfig, ModelSpec, Quantization, loader, weights::LinearPlan};

fn backend() -> CpuBackend {
    CpuBackend::new(&CpuConfig::default()).unwrap()
}

/// Tensors in memory: `(type, shape, bytes)` by name.
#[derive(Clone, Default)]
struct Tensors(BTreeMap<String, (StoredType, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn other(mut self, name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.0.insert(name.to_owned(), (StoredType::Other(dtype.to_owned()), shape.to_vec(), bytes));
        self
    }

    fn words(self, name: &str, shape: &[usize], words: &[u32]) -> Self {
        self.other(name, "I32", shape, words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    fn floats(mut self, name: &str, dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        let bytes = to_bytes(values, dtype);
        self.0.insert(name.to_owned(), (StoredType::Float(dtype), shape.to_vec(), bytes));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.0.remove(name).unwrap();
        self
    }
}

impl WeightSource for Tensors {
    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).map(|(dtype, shape, _)| TensorInfo { dtype: dtype.clone(), shape: shape.clone() })
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.0.get(name).map(|(.., bytes)| Cow::Borrowed(&bytes[..]))
    }
}

/// Random bits.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    fn codes(&mut self, len: usize, bits: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(1 << bits) as u8).collect()
    }

    /// Scales that f16 and bf16 hold.
    fn scales(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (1 + self.below(127)) as f32 / 8192.0).collect()
    }
}

/// Puts codes `[lines, len]` into words along the second dimension, each word `order.len()` of them; code `order[i]` is the `i`-th.
fn pack(codes: &[u8], len: usize, bits: usize, order: &[usize]) -> Vec<u32> {
    let line = |line: &[u8]| -> Vec<u32> {
        let word = |codes: &[u8]| {
            let code = |(i, &from): (usize, &usize)| u32::from(codes.get(from).copied().unwrap_or(0)) << (bits * i);
            order.iter().enumerate().map(code).sum()
        };
        line.chunks(order.len()).map(word).collect()
    };
    codes.chunks(len).flat_map(line).collect()
}

fn in_order(bits: usize) -> Vec<usize> {
    (0..32 / bits).collect()
}

fn transposed<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| values[col..].iter().step_by(cols).copied()).collect()
}

fn stored(config: Value) -> Result<StoredQuantization, String> {
    let map: Map<String, Value> = [("quantization_config".to_owned(), config)].into_iter().collect();
    let parsed = StoredQuantization::from_config(Object::new(&map, ""));
    parsed.map(Option::unwrap).map_err(|error| error.to_string())
}

fn linear(rows: usize, cols: usize) -> LinearPlan {
    LinearPlan {
        parts: vec![Part::whole("m".to_owned(), rows)],
        cols,
        bias: false,
        role: Role::Layer,
        unit_rows: false,
    }
}

/// The weights of module `m` as f32, in tiles of odd sizes; and as the packed matrix of what they are kept as has them.
fn read(
    config: Value,
    tensors: &Tensors,
    [rows, cols]: [usize; 2],
) -> Result<(Vec<f32>, Vec<f32>, MatrixForm), String> {
    let (stored, plan) = (stored(config)?, linear(rows, cols));
    let form =
        |quantization| MatrixForm::new(&plan, tensors, Some(&stored), quantization).map_err(|error| error.to_string());
    let as_stored = form(Quantization::AS_STORED)?;
    let module = as_stored.parts[0].as_ref().ok_or("it is not quantized")?;
    for tensor in &module.tensors {
        tensor.check(tensors).map_err(|error| error.to_string())?.ok_or(format!("{} is missing", tensor.name))?;
    }
    let matrix = module.open(tensors).map_err(|error| error.to_string())?;
    let mut values = vec![f32::NAN; rows * cols];
    for row in (0..rows).step_by(5) {
        for col in (0..cols).step_by(13) {
            let (rows, end) = (row..rows.min(row + 5), cols.min(col + 13));
            let mut tile = vec![f32::NAN; rows.len() * (end - col)];
            matrix.values(rows.clone(), col..end, &mut tile);
            for (row, tile) in rows.zip(tile.chunks(end - col)) {
                values[row * cols + col..row * cols + end].copy_from_slice(tile);
            }
        }
    }
    let backend = backend();
    let packed = |scheme: Option<Scheme>| -> Vec<f32> {
        let packed = dashinfer_kernels::Backend::pack_stored(&backend, &[&*matrix], None, scheme).unwrap();
        let mut found = vec![f32::NAN; rows * cols];
        found.chunks_mut(cols).enumerate().for_each(|(row, out)| packed.read_row(row, out));
        found
    };
    assert_eq!(packed(form(Quantization::NONE)?.scheme), values, "dense is the values");
    let kept = packed(as_stored.scheme);
    drop(matrix);
    Ok((values, kept, as_stored))
}

/// Whole words half of the time.
fn any_cols() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..300, (1usize..38).prop_map(|words| words * 8)]
}

/// A GPTQ module of random codes: its config, its tensors, and its weights by definition.
fn gptq(
    bits: usize,
    [rows, cols]: [usize; 2],
    group: i64,
    kind: &str,
    version: usize,
    seed: u64,
) -> (Value, Tensors, Vec<f32>) {
    let mut random = Random(seed);
    let size = usize::try_from(group).unwrap_or(cols);
    let (groups, middle) = (cols.div_ceil(size), 1 << (bits - 1));
    let codes = random.codes(rows * cols, bits);
    let scales = random.scales(rows * groups);
    let symmetric = kind != "asymmetric";
    let zeros: Vec<u8> = match symmetric {
        true => vec![middle; rows * groups],
        false => random.codes(rows * groups, bits),
    };
    let mut list: Vec<u32> = (0..cols).map(|col| (col / size) as u32).collect();
    if kind == "reordered" {
        for i in (1..cols).rev() {
            list.swap(i, random.below(i + 1));
        }
    } else if kind == "ragged" {
        list.iter_mut().for_each(|index| *index = random.below(groups) as u32);
    }
    let weights = (0..rows * cols).map(|i| {
        let (row, col) = (i / cols, i % cols);
        let at = row * groups + list[col] as usize;
        scales[at] * (f32::from(codes[i]) - f32::from(zeros[at]))
    });
    let weights = weights.collect();
    // Version 1 stores them less one, in as many bits.
    let mask = ((1u16 << bits) - 1) as u8;
    let offset = if version == 1 { 1 } else { 0 };
    let stored_zeros: Vec<u8> = zeros.iter().map(|zero| zero.wrapping_sub(offset) & mask).collect();
    let (per, order) = (32 / bits, in_order(bits));
    // Words along the input features of each output feature, then transposed.
    let qweight = transposed(&pack(&codes, cols, bits, &order), cols.div_ceil(per));
    let qzeros = pack(&transposed(&stored_zeros, groups), rows, bits, &order);
    let tensors = Tensors::default()
        .words("m.qweight", &[cols.div_ceil(per), rows], &qweight)
        .words("m.qzeros", &[groups, rows.div_ceil(per)], &qzeros)
        .floats("m.scales", DType::F16, &[groups, rows], &transposed(&scales, groups))
        .words("m.g_idx", &[cols], &list);
    let format = if version == 1 { "gptq" } else { "gptq_v2" };
    let config = json!({"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
        "desc_act": kind == "reordered", "checkpoint_format": format});
    (config, tensors, weights)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn gptq_is_read_as_defined(
        eight: bool, rows in 1usize..50, words in 1usize..40, group in prop::sample::select(&[32i64, 64, 128, 256, -1, 24][..]),
        kind in prop::sample::select(&["symmetric", "asymmetric", "reordered", "ragged"][..]), version in 1usize..3, seed: u64,
    ) {
        let (bits, shape) = (if eight { 8 } else { 4 }, [rows, words * 8]);
        let (config, tensors, weights) = gptq(bits, shape, group, kind, version, seed);
        let (values, kept, form) = read(config, &tensors, shape).unwrap();
        prop_assert_eq!(&values, &weights);
        let exact = group != 24 && !(eight && kind == "asymmetric") && form.parts[0].as_ref().unwrap().layout.is_some();
        if exact {
            prop_assert_eq!(kept, weights);
        } else {
            prop_assert_eq!(form.scheme.unwrap().to_string(), "a16w8-g32");
            near(&kept, &weights, shape[1])?;
        }
    }

    #[test]
    fn awq_is_read_as_defined(
        rows in 1usize..7, cols in any_cols(), group in prop::sample::select(&[32i64, 64, 128, -1][..]), seed: u64,
    ) {
        let (rows, mut random) = (rows * 8, Random(seed));
        let size = usize::try_from(group).unwrap_or(cols);
        let groups = cols.div_ceil(size);
        let (codes, zeros) = (random.codes(rows * cols, 4), random.codes(rows * groups, 4));
        let scales = random.scales(rows * groups);
        let weights: Vec<f32> = (0..rows * cols).map(|i| {
            let at = i / cols * groups + i % cols / size;
            scales[at] * (f32::from(codes[i]) - f32::from(zeros[at]))
        }).collect();
        let order = [0, 2, 4, 6, 1, 3, 5, 7];
        let tensors = Tensors::default()
            .words("m.qweight", &[cols, rows / 8], &pack(&transposed(&codes, cols), rows, 4, &order))
            .words("m.qzeros", &[groups, rows / 8], &pack(&transposed(&zeros, groups), rows, 4, &order))
            .floats("m.scales", DType::F16, &[groups, rows], &transposed(&scales, groups));
        let config = json!({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "version": "GEMM"});
        let (values, kept, _) = read(config, &tensors, [rows, cols]).unwrap();
        prop_assert_eq!(&values, &weights);
        prop_assert_eq!(kept, weights);
    }

    #[test]
    fn packed_words_of_compressed_tensors_are_read_as_defined(
        eight: bool, rows in 1usize..50, cols in any_cols(), group in prop::sample::select(&[Some(32usize), Some(128), None][..]),
        symmetric: bool, reordered: bool, seed: u64,
    ) {
        let (bits, mut random) = (if eight { 8 } else { 4 }, Random(seed));
        let size = group.unwrap_or(cols);
        let groups = cols.div_ceil(size);
        let codes = random.codes(rows * cols, bits);
        let zeros = if symmetric { vec![1 << (bits - 1); rows * groups] } else { random.codes(rows * groups, bits) };
        let scales = random.scales(rows * groups);
        let mut list: Vec<u32> = (0..cols).map(|col| (col / size) as u32).collect();
        if reordered {
            list.reverse();
        }
        let weights: Vec<f32> = (0..rows * cols).map(|i| {
            let at = i / cols * groups + list[i % cols] as usize;
            scales[at] * (f32::from(codes[i]) - f32::from(zeros[at]))
        }).collect();
        let (per, order) = (32 / bits, in_order(bits));
        let mut tensors = Tensors::default()
            .words("m.weight_packed", &[rows, cols.div_ceil(per)], &pack(&codes, cols, bits, &order))
            .floats("m.weight_scale", DType::BF16, &[rows, groups], &scales)
            .other("m.weight_shape", "I64", &[2], [rows, cols].iter().flat_map(|n| (*n as i64).to_le_bytes()).collect());
        if !symmetric {
            // Along the output features.
            let words = transposed(&pack(&transposed(&zeros, groups), rows, bits, &order), rows.div_ceil(per));
            tensors = tensors.words("m.weight_zero_point", &[rows.div_ceil(per), groups], &words);
        }
        if reordered {
            tensors = tensors.words("m.weight_g_idx", &[cols], &list);
        }
        let strategy = if group.is_some() { "group" } else { "channel" };
        let weights_config = json!({"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group});
        let config = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_config}}});
        let (values, kept, form) = read(config, &tensors, [rows, cols]).unwrap();
        prop_assert_eq!(&values, &weights);
        if form.parts[0].as_ref().unwrap().layout.is_some() && (symmetric || !eight) {
            prop_assert_eq!(kept, weights);
        } else {
            near(&kept, &weights, cols)?;
        }
    }

    #[test]
    fn bytes_of_compressed_tensors_are_read_as_defined(
        rows in 1usize..50, cols in 1usize..300, one: bool, symmetric: bool, seed: u64,
    ) {
        let mut random = Random(seed);
        let codes = random.codes(rows * cols, 8);
        let params = if one { 1 } else { rows };
        let (scales, zeros) = (random.scales(params), random.codes(params, 8));
        let zero = |at: usize| if symmetric { 0 } else { zeros[at].cast_signed() };
        let weights: Vec<f32> = (0..rows * cols).map(|i| {
            let at = if one { 0 } else { i / cols };
            scales[at] * (f32::from(codes[i].cast_signed()) - f32::from(zero(at)))
        }).collect();
        let shape: &[usize] = if one { &[1] } else { &[rows, 1] };
        let mut tensors = Tensors::default()
            .other("m.weight", "I8", &[rows, cols], codes)
            .floats("m.weight_scale", DType::F16, shape, &scales);
        if !symmetric {
            tensors = tensors.other("m.weight_zero_point", "I8", shape, zeros.clone());
        }
        let strategy = if one { "tensor" } else { "channel" };
        let weights_config = json!({"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy});
        let config = json!({"quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_config}}});
        let (values, kept, _) = read(config, &tensors, [rows, cols]).unwrap();
        prop_assert_eq!(&values, &weights);
        if symmetric {
            prop_assert_eq!(kept, weights);
        } else {
            near(&kept, &weights, cols)?;
        }
    }

    #[test]
    fn fp8_is_read_as_defined(rows in 1usize..300, cols in 1usize..300, kind in 0usize..8, seed: u64) {
        let mut random = Random(seed);
        let weight: Vec<u8> = random.codes(rows * cols, 8).into_iter().map(|byte| if byte & 127 == 127 { 0 } else { byte }).collect();
        let (block, one) = ([128, 128], json!({"quant_method": "fp8", "activation_scheme": "static"}));
        let blocks = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block});
        let (channel, tensor) = (compressed_fp8("channel"), compressed_fp8("tensor"));
        let (config, name, shape) = match kind {
            0 => (one, "m.weight_scale", vec![]),
            1 => (one, "m.weight_scale_inv", vec![1]),
            2 => (one, "m.weight_scale", vec![rows]),
            3 => (json!({"quant_method": "fbgemm_fp8"}), "m.weight_scale", vec![rows, 1]),
            4 => (channel, "m.weight_scale", vec![rows, 1]),
            5 => (tensor, "m.weight_scale", vec![1]),
            _ => (blocks, "m.weight_scale_inv", vec![rows.div_ceil(128), cols.div_ceil(128)]),
        };
        let scales = random.scales(shape.iter().product());
        let scale = |row: usize, col: usize| match scales.len() {
            _ if kind >= 6 => scales[row / 128 * cols.div_ceil(128) + col / 128],
            1 => scales[0],
            _ => scales[row],
        };
        let e4m3 = |byte: u8| {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
            let size = if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
            if byte > 127 { -size } else { size }
        };
        let weights: Vec<f32> =
            (0..rows * cols).map(|i| e4m3(weight[i]) * scale(i / cols, i % cols)).collect();
        let dtype = if kind % 2 == 0 { DType::F32 } else { DType::BF16 };
        let tensors = Tensors::default()
            .other("m.weight", "F8_E4M3", &[rows, cols], weight)
            .floats(name, dtype, &shape, &scales);
        let (values, kept, form) = read(config, &tensors, [rows, cols]).unwrap();
        prop_assert_eq!(&values, &weights);
        prop_assert_eq!(form.scheme.unwrap().to_string(), "a16w8-g32");
        near(&kept, &weights, cols)?;
    }
}

fn compressed_fp8(strategy: &str) -> Value {
    let weights = json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "group_size": null});
    json!({"quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
}

/// Half a step of 8 bits in groups of 32, and what rounding the scale costs.
fn near(found: &[f32], wanted: &[f32], cols: usize) -> Result<(), TestCaseError> {
    for (found, wanted) in found.chunks(cols).zip(wanted.chunks(cols)) {
        for (found, wanted) in found.chunks(32).zip(wanted.chunks(32)) {
            let largest = wanted.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            for (found, wanted) in found.iter().zip(wanted) {
                let bound = largest / 254.0 * 1.001 + largest / 2048.0 + 3e-8 * 127.0;
                prop_assert!((found - wanted).abs() <= bound, "{} {}", found, wanted);
            }
        }
    }
    Ok(())
}

/// What version 1 stores for a zero point of 0 is the largest code.
#[test]
fn zero_points_of_gptq_wrap() {
    let (mut config, tensors, _) = gptq(4, [8, 32], 32, "asymmetric", 1, 3);
    let tensors = tensors.words("m.qzeros", &[1, 1], &[0x8f00_0000]).words("m.qweight", &[4, 8], &[0; 32]);
    let tensors = tensors.floats("m.scales", DType::F16, &[1, 8], &[1.0; 8]);
    let first = |config: &Value| -> Vec<f32> {
        read(config.clone(), &tensors, [8, 32]).unwrap().0.chunks(32).map(|row| row[0]).collect()
    };
    assert_eq!(first(&config), [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.0, -9.0]);
    config["checkpoint_format"] = json!("gptq_v2");
    assert_eq!(first(&config), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -15.0, -8.0]);
}

#[test]
fn what_contradicts_the_config_is_named() {
    let shape = [16, 64];
    let (config, tensors, _) = gptq(4, shape, 32, "reordered", 1, 3);
    let error = |config: &Value, tensors: &Tensors| read(config.clone(), tensors, shape).err().unwrap();
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        config
    };
    assert_eq!(error(&with("group_size", json!(64)), &tensors), "tensor m.g_idx: wanted groups below 1, found 1");
    assert_eq!(
        error(&with("bits", json!(8)), &tensors),
        "tensor m.qweight should have the shape [16, 16], found [8, 16]"
    );
    assert_eq!(
        error(&with("checkpoint_format", json!("gptq_v2")), &tensors),
        "tensor m.qzeros: wanted zero points of 8, as `sym` says, found 7"
    );
    assert_eq!(error(&config, &tensors.clone().without("m.scales")), "m.scales is missing");
    let half = tensors.clone().floats("m.qzeros", DType::F16, &[2, 2], &[0.0; 4]);
    assert_eq!(error(&config, &half), "tensor m.qzeros is stored as f16, wanted I32");
    let bad = tensors.clone().words("m.g_idx", &[64], &[u32::MAX; 64]);
    assert_eq!(error(&config, &bad), "tensor m.g_idx: wanted groups below 2, found -1");
    let mut cut = tensors.clone();
    cut.0.get_mut("m.qweight").unwrap().2.pop();
    assert_eq!(error(&config, &cut), "tensor m.qweight: wanted 512 bytes, found 511");
    // Of compressed-tensors, whose shape stands beside the words.
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32});
    let config = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}});
    let tensors = Tensors::default()
        .words("m.weight_packed", &[16, 8], &[0; 128])
        .floats("m.weight_scale", DType::F16, &[16, 2], &[1.0; 32])
        .other("m.weight_shape", "I64", &[2], [16i64, 60].iter().flat_map(|n| n.to_le_bytes()).collect());
    assert_eq!(error(&config, &tensors), "tensor m.weight_shape: wanted [16, 64], found [16, 60]");
}

#[test]
fn a_list_of_zeros_alone_means_nothing() {
    let (config, tensors, weights) = gptq(4, [16, 64], 32, "symmetric", 1, 3);
    let (values, ..) = read(config, &tensors.words("m.g_idx", &[64], &[0; 64]), [16, 64]).unwrap();
    assert_eq!(values, weights);
}

#[test]
fn methods_and_variants_that_we_do_not_read_are_refused_by_name() {
    let error = |config: Value| stored(config).unwrap_err();
    let gptq = |key: &str, value: Value| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        config[key] = value;
        error(config)
    };
    let field = "quantization_config";
    assert_eq!(gptq("bits", json!(3)), format!("{field}.bits: 3 is not supported; supported: 4, 8"));
    assert_eq!(gptq("bits", json!(null)), format!("{field}.bits: wanted a whole number, found nothing"));
    assert_eq!(gptq("group_size", json!(0)), format!("{field}.group_size: wanted a size of groups, or -1, found 0"));
    assert_eq!(gptq("group_size", json!(-2)), format!("{field}.group_size: wanted a whole number, found -2"));
    let marlin = "marlin is not supported; supported: gptq, gptq_v2";
    assert_eq!(gptq("checkpoint_format", json!("marlin")), format!("{field}.checkpoint_format: {marlin}"));
    assert!(gptq("dynamic", json!({"-:.*down.*": {}})).contains("dynamic: settings of single modules"));
    assert_eq!(gptq("sym", json!("yes")), format!("{field}.sym: wanted true or false, found \"yes\""));
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"});
    assert_eq!(error(awq), format!("{field}.version: gemv is not supported; supported: gemm"));
    let e5m2 = json!({"quant_method": "fp8", "fmt": "e5m2"});
    assert_eq!(error(e5m2), format!("{field}.fmt: e5m2 is not supported; supported: e4m3"));
    let blocks = json!({"quant_method": "fp8", "weight_block_size": [128, 0]});
    let wanted = "wanted rows and columns of a block, found [128, 0]";
    assert_eq!(error(blocks), format!("{field}.weight_block_size: {wanted}"));
    assert_eq!(error(json!({})), format!("{field}.quant_method: wanted one of {SUPPORTED}, found nothing"));
    let compressed = |format: &str, weights: Value| {
        error(
            json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"g": {"weights": weights}}}),
        )
    };
    assert_eq!(
        compressed("marlin-24", json!({"num_bits": 4, "type": "int"})),
        "g.format: marlin-24 is not supported; supported: pack-quantized, int-quantized, float-quantized"
    );
    assert_eq!(
        compressed("nvfp4-pack-quantized", json!({"num_bits": 4, "type": "float"})),
        "weights.num_bits: 4 bits of a float is not supported; supported: 8"
    );
    assert_eq!(
        compressed("pack-quantized", json!({"num_bits": 2, "type": "int"})),
        "weights.num_bits: 2 is not supported; supported: 4, 8"
    );
}

/// The older name of the key, which needs no method.
#[test]
fn a_compression_config_is_one_of_compressed_tensors() {
    let weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128});
    let config =
        json!({"compression_config": {"format": "pack-quantized", "config_groups": {"g": {"weights": weights}}}});
    let found = StoredQuantization::from_config(Object::new(config.as_object().unwrap(), "")).unwrap().unwrap();
    assert!(matches!(found.0, Method::Compressed(_)), "{found}");
}

fn golden(name: &str) -> (ModelSpec, Checkpoint) {
    let folder = format!("{}/tests/goldens/{name}", env!("CARGO_MANIFEST_DIR"));
    let folder = std::path::Path::new(&folder);
    (ModelSpec::read(folder).unwrap(), Checkpoint::open(folder).unwrap())
}

const GOLDENS: [&str; 10] = [
    "fp8-block-deepseek-v3",
    "awq-4bit-g128",
    "compressed-tensors-fp8-channel",
    "compressed-tensors-w4a16",
    "fp8-block-qwen3",
    "fp8-tensor",
    "gptq-4bit-g128",
    "gptq-4bit-g32-desc-act",
    "gptq-8bit-g128-desc-act",
    "gptq-8bit-g32",
];

/// The tensor between heads and latent vectors is split when its values are known, and stays in floating point.
#[test]
fn heads_of_latent_attention_are_split_from_values() {
    let (num_heads, rank, nope_dim, v_dim) = (3, 40, 16, 24);
    let (rows, mut random) = (num_heads * (nope_dim + v_dim), Random(5));
    let part = |rows| vec![Part::whole("m".to_owned(), rows)];
    let matrix = |rows, cols| LinearPlan { parts: part(rows), cols, bias: false, role: Role::Latent, unit_rows: false };
    let plan = LatentHeads { queries: matrix(num_heads * rank, nope_dim), values: matrix(num_heads * v_dim, rank) };
    let weight = random.codes(rows * rank, 7).into_iter().map(|byte| if byte == 127 { 0 } else { byte }).collect();
    let scales = random.scales(rows.div_ceil(32) * 2);
    let mut tensors = Tensors::default().other("m.weight", "F8_E4M3", &[rows, rank], weight).floats(
        "m.weight_scale_inv",
        DType::F32,
        &[rows.div_ceil(32), 2],
        &scales,
    );
    let config = json!({"quant_method": "fp8", "weight_block_size": [32, 32]});
    let (values, ..) = read(config.clone(), &tensors, [rows, rank]).unwrap();
    let stored = stored(config).unwrap();
    for (quantization, dtype) in [(Quantization::NONE, DType::F32), (Quantization::AS_STORED, DType::BF16)] {
        let (found, num_tensors, num_bytes) =
            loader::tests::pack_heads(&mut tensors, Some(&stored), quantization, &plan);
        assert_eq!((num_tensors, num_bytes), (2, (rows * rank + 4 * scales.len()) as u64));
        let mut dense = Tensors::default().floats("m.weight", dtype, &[rows, rank], &values);
        let (wanted, ..) = loader::tests::pack_heads(&mut dense, None, Quantization::NONE, &plan);
        for (found, wanted) in [(&found.queries, &wanted.queries), (&found.values, &wanted.values)] {
            let export = |matrix| dashinfer_kernels::Backend::export(&backend(), matrix).concat();
            assert_eq!(export(found), export(wanted), "{dtype}");
        }
    }
}

/// What nothing asks for is an error, but for scales of activations and zeros for biases.
#[test]
fn all_tensors_are_used_or_known_to_be_of_no_use() {
    struct Changed(Checkpoint, Tensors);
    impl WeightSource for Changed {
        fn names(&self) -> Vec<&str> {
            self.0.names().into_iter().chain(self.1.names()).collect()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            self.1.info(name).or_else(|| self.0.info(name))
        }

        fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
            self.1.read(name).or_else(|| self.0.read(name))
        }
    }
    let prove = |golden_name: &str, name: &str, values: &[f32]| {
        let (spec, source) = golden(golden_name);
        let more = Tensors::default().floats(name, DType::F32, &[values.len()], values);
        let proof = loader::prove(&spec, &Plan::new(&spec), &Changed(source, more));
        proof.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(prove("fp8-tensor", "model.layers.0.mlp.up_proj.input_scale", &[1.0]), Ok(()));
    assert_eq!(prove("gptq-4bit-g128", "model.layers.0.mlp.up_proj.bias", &[0.0; 256]), Ok(()));
    let left = |name: &str| Err(format!("the model has no place for tensor {name}"));
    let bias = "model.layers.0.mlp.up_proj.bias";
    assert_eq!(prove("gptq-4bit-g128", bias, &[1.0; 256]), left(bias));
    assert_eq!(
        prove("qwen2-tied", "model.layers.0.mlp.up_proj.input_scale", &[1.0]),
        left("model.layers.0.mlp.up_proj.input_scale")
    );
    assert_eq!(
        prove("awq-4bit-g128", "model.layers.0.mlp.up_proj.g_idx", &[1.0]),
        left("model.layers.0.mlp.up_proj.g_idx")
    );
}

#[test]
fn missing_tensors_are_named_by_what_the_format_has() {
    struct Without(Checkpoint, &'static str);
    impl WeightSource for Without {
        fn names(&self) -> Vec<&str> {
            self.0.names().into_iter().filter(|name| !name.starts_with(self.1)).collect()
        }

        fn info(&self, name: &str) -> Option<TensorInfo> {
            self.0.info(name).filter(|_| !name.starts_with(self.1))
        }

        fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
            self.0.read(name).filter(|_| !name.starts_with(self.1))
        }
    }
    let error = |golden_name: &str, prefix: &'static str| {
        let (spec, source) = golden(golden_name);
        let source = Without(source, prefix);
        loader::prove(&spec, &Plan::new(&spec), &source).unwrap_err().to_string()
    };
    let up = "model.layers.0.mlp.up_proj";
    assert_eq!(error("gptq-4bit-g128", up), format!("tensor {up}.qweight [16, 256] is missing (and 2 more)"));
    assert_eq!(error("awq-4bit-g128", up), format!("tensor {up}.qweight [128, 32] is missing (and 2 more)"));
    assert_eq!(error("fp8-tensor", up), format!("tensor {up}.weight [256, 128] is missing"));
    assert_eq!(
        error("compressed-tensors-w4a16", up),
        format!("tensor {up}.weight_packed [256, 16] is missing (and 2 more)")
    );
    assert_eq!(error("compressed-tensors-fp8-channel", up), format!("tensor {up}.weight [256, 128] is missing"));
    assert!(error("awq-4bit-g128", "lm_head").starts_with("lm_head.weight is missing"));
    assert_eq!(error("gptq-4bit-g128", "model.embed"), "tensor model.embed_tokens.weight [312, 128] is missing");
}

/// Values that have broken readers of configs before.
fn nasty() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-2i64..260).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(
            &[
                "gptq",
                "awq",
                "fp8",
                "compressed-tensors",
                "mxfp4",
                "gptq_v2",
                "group",
                "channel",
                "block",
                "tensor",
                "float",
                "int"
            ][..]
        )
        .prop_map(Value::from),
        prop::sample::select(&["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"][..])
            .prop_map(Value::from),
        Just(json!([])),
        Just(json!([128, 128])),
        Just(json!([1, 1])),
        Just(json!([usize::MAX, 1])),
        Just(json!({})),
        Just(json!({"g": {"weights": {"num_bits": 8}}})),
    ]
}

fn any_key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(
        &[
            "quant_method",
            "bits",
            "group_size",
            "sym",
            "desc_act",
            "checkpoint_format",
            "format",
            "dynamic",
            "version",
            "weight_block_size",
            "config_groups",
            "num_bits",
            "type",
            "symmetric",
            "strategy",
            "block_structure",
            "weights",
        ][..],
    )
}

/// Puts `value` at each place where `key` is, and at the top if it is nowhere.
fn replace(config: &mut Value, key: &str, value: &Value) {
    fn walk(config: &mut Value, key: &str, value: &Value) -> bool {
        let Some(object) = config.as_object_mut() else { return false };
        let mut found = false;
        for (name, inner) in object.iter_mut() {
            if name == key {
                *inner = value.clone();
                found = true;
            } else {
                found |= walk(inner, key, value);
            }
        }
        found
    }
    if !walk(config, key, value)
        && let Some(object) = config.as_object_mut()
    {
        object.insert(key.to_owned(), value.clone());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A config that says something else than its tensors, or tensors that were cut or changed: a typed error, or weights.
    #[test]
    fn contradictions_and_damage_never_panic(
        golden_name in prop::sample::select(&GOLDENS[..]), changes in prop::collection::vec((any_key(), nasty()), 0..3),
        damage in prop::option::of((any::<prop::sample::Index>(), 0usize..6, any::<u64>())), dense: bool,
    ) {
        let folder = format!("{}/tests/goldens/{golden_name}", env!("CARGO_MANIFEST_DIR"));
        let mut config = json!(std::fs::read_to_string(format!("{folder}/config.json")).unwrap());
        config = serde_json::from_str(config.as_str().unwrap()).unwrap();
        for (key, value) in &changes {
            replace(&mut config["quantization_config"], key, value);
        }
        let Ok(spec) = HfConfig::parse(&config.to_string()).unwrap().to_spec() else { return Ok(()) };
        let checkpoint = Checkpoint::open(std::path::Path::new(&folder)).unwrap();
        let copy = |name: &str| {
            let info = checkpoint.info(name).unwrap();
            (name.to_owned(), (info.dtype, info.shape, checkpoint.read(name).unwrap().into_owned()))
        };
        let mut tensors = Tensors(checkpoint.names().into_iter().map(copy).collect());
        if let Some((at, how, bits)) = damage {
            // One of those that the format has.
            let names: Vec<String> = tensors.0.keys().filter(|name| name.contains("_proj.")).cloned().collect();
            let name = &names[at.index(names.len())];
            let (dtype, shape, bytes) = tensors.0.get_mut(name).unwrap();
            match how {
                0 => bytes.truncate(bits as usize % bytes.len().max(1)),
                1 => bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (bits >> (i % 57)) as u8),
                2 => shape.push(bits as usize),
                3 => shape.iter_mut().for_each(|size| *size = bits as usize),
                4 => *dtype = StoredType::Other("I32".to_owned()),
                _ => drop(tensors.0.remove(name)),
            }
        }
        let backend = backend();
        let quantization = if dense { Quantization::NONE } else { Quantization::AS_STORED };
        let _ = loader::load(backend, &spec, &mut tensors, quantization, None, &mut |_| ());
    }
}
