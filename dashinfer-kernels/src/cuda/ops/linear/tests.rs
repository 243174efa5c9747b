use std::sync::Arc;

use super::super::testing::*;
use super::rows::{Prefetch, Tile, tile_for, tiles};
use super::*;

const HALVES: [DType; 2] = [DType::BF16, DType::F16];

#[test]
fn the_way_follows_from_type_architecture_shape_and_mode() {
    let (fast, alone) = (LinearMode::Fast, LinearMode::RowsAlone);
    let way = |major, dtype, m, k, mode| way_for(Arch { major, minor: 0 }, dtype, [m, 3584, k], mode);
    assert_eq!(way(9, DType::BF16, 1, 3584, fast), Way::Rows);
    assert_eq!(way(9, DType::BF16, 16, 3584, fast), Way::Rows);
    assert_eq!(way(9, DType::BF16, 17, 3584, fast), Way::CublasLt);
    assert_eq!(way(9, DType::F16, 8192, 3584, alone), Way::Rows);
    assert_eq!(way(8, DType::F16, 8192, 3583, fast), Way::Rows);
    assert_eq!(way(9, DType::F32, 1, 3584, fast), Way::Simple);
    assert_eq!(way(7, DType::F16, 1, 3584, alone), Way::Simple);
    // A vocabulary's worth of columns, and few weights.
    let way = |shape, mode| way_for(Arch::SM90, DType::BF16, shape, mode);
    assert_eq!(way([1, 152_064, 3584], fast), Way::CublasLt);
    assert_eq!(way([1, 152_064, 3584], alone), Way::Rows);
    assert_eq!([way([8, 151_936, 896], fast), way([9, 151_936, 896], fast)], [Way::Rows, Way::CublasLt]);
    assert_eq!([way([32, 896, 896], fast), way([33, 896, 896], fast)], [Way::Rows, Way::CublasLt]);
}

/// A product on the device, with what it should be.
struct Case {
    x: Values,
    layer: CudaLinear,
    bias: Option<Vec<f32>>,
    weight: Vec<f32>,
    m: usize,
}

impl Case {
    fn new(device: &Arc<Device>, dtype: DType, [m, n, k]: [usize; 3], has_bias: bool) -> Self {
        let seed = (m * 31 + n * 7 + k) as u64;
        let x = Values::random(device, dtype, m * k, seed);
        let weight = Values::random(device, dtype, n * k, !seed);
        // Values of the element type: the same bias for every way.
        let bias: Vec<f32> = random(n, seed ^ 5).iter().map(|&value| rounded(value, dtype)).collect();
        let on_device = |dtype| has_bias.then(|| upload(device, &to_bytes(&bias, dtype)));
        let layer = CudaLinear {
            weight: weight.on_device,
            bias_f32: on_device(DType::F32),
            bias_t: on_device(dtype),
            rows: n,
            cols: k,
            dtype,
        };
        Self { x, layer, bias: has_bias.then_some(bias), weight: weight.values, m }
    }

    fn poisoned(&self, out_dtype: DType) -> Buffer {
        poisoned(self.layer.weight.device(), self.m * self.layer.rows * out_dtype.size_bytes())
    }

    fn run(&self, linears: &Linears, out_dtype: DType) -> Buffer {
        let out = self.poisoned(out_dtype);
        linears.run((&out).into(), (&self.x.on_device).into(), self.m, &self.layer, out_dtype).unwrap();
        out
    }

    /// With this tile, whatever the table says.
    fn run_with(&self, linears: &Linears, out_dtype: DType, tile: Tile) -> Buffer {
        let out = self.poisoned(out_dtype);
        let x = (&self.x.on_device).into();
        let operands = linears.operands((&out).into(), x, self.m, &self.layer, self.layer.rows, out_dtype).unwrap();
        // SAFETY: sizes were checked just now; the buffers live until they are read.
        unsafe { linears.rows.run_with(&linears.device, &operands, false, tile).unwrap() };
        out
    }

    /// One rounding to the result's type; and the additions in f32, each off by up to 2^-23 of the sum so far, which tensor cores
    /// may cut off instead of rounding. Signs are random, so that sums grow with the root of K and the errors together stay far
    /// below 2^-20 of the sum of the products' sizes; a product that is missing is some thousand times that.
    fn check(&self, out: &Buffer, out_dtype: DType, what: &str) {
        let (n, k) = (self.layer.rows, self.layer.cols);
        let got = read(out, out_dtype);
        assert_eq!(got.len(), self.m * n);
        for (i, &got) in got.iter().enumerate() {
            let (x, w) = (&self.x.values[i / n * k..][..k], &self.weight[i % n * k..][..k]);
            let products = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[i % n]));
            let (want, size) = (products().sum::<f64>() + bias, products().map(f64::abs).sum::<f64>() + bias.abs());
            let bound = step(out_dtype) * want.abs() + 2f64.powi(-20) * size;
            let close = (f64::from(got) - want).abs() <= bound;
            assert!(close, "{what}: row {} column {} is {got}, should be {want} within {bound:e}", i / n, i % n);
        }
    }
}

fn check(device: &Arc<Device>, mode: LinearMode, dtype: DType, shape: [usize; 3], outs: &[DType]) {
    let linears = Linears::new(device, dtype, mode).unwrap();
    for has_bias in [false, true] {
        let case = Case::new(device, dtype, shape, has_bias);
        for &out_dtype in outs {
            let what = format!("{dtype} to {out_dtype} {shape:?} bias {has_bias} {mode:?}");
            case.check(&case.run(&linears, out_dtype), out_dtype, &what);
        }
    }
}

/// Tails of units and of parts (K), of weight rows (N), of tiles (M); K that does not allow loads of 16 bytes.
#[test]
fn few_rows_of_every_number_agree_with_the_sum() {
    let Some(device) = test_device() else { return };
    if device.arch.number() < 80 {
        return;
    }
    for m in [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 130] {
        check(&device, LinearMode::RowsAlone, DType::BF16, [m, 37, 1096], &[DType::BF16]);
    }
    for shape in [[1, 1, 1], [3, 50, 77], [13, 129, 513], [20, 100, 67], [40, 130, 1001], [5, 16, 8], [64, 128, 4096]] {
        for dtype in HALVES {
            check(&device, LinearMode::RowsAlone, dtype, shape, &[dtype, DType::F32]);
        }
    }
    // Columns for the other tiles: 16 weight rows make a block, three and six of them to an SM.
    let sms = device.num_sms as usize;
    for [m, n] in [[2, 16 * 3 * sms - 11], [2, 16 * 5 * sms + 5], [16, 16 * 5 * sms + 5]] {
        check(&device, LinearMode::RowsAlone, DType::BF16, [m, n, 72], &[DType::BF16]);
    }
}

#[test]
fn the_plain_kernel_agrees_with_the_sum_for_every_type() {
    let Some(device) = test_device() else { return };
    for dtype in TYPES {
        let kernels = simple_kernels(&device, dtype).unwrap();
        let linears = Linears::new(&device, dtype, LinearMode::RowsAlone).unwrap();
        for shape in [[1, 1, 1], [3, 70, 33], [16, 64, 16], [17, 65, 130], [70, 129, 257]] {
            for has_bias in [false, true] {
                let case = Case::new(&device, dtype, shape, has_bias);
                for (index, out_dtype) in [dtype, DType::F32].into_iter().enumerate() {
                    let out = case.poisoned(out_dtype);
                    let x = (&case.x.on_device).into();
                    let operands =
                        linears.operands((&out).into(), x, case.m, &case.layer, case.layer.rows, out_dtype).unwrap();
                    for (few, kernels) in [(true, &kernels[0]), (false, &kernels[1])] {
                        out.fill(0, out.bytes(), 0xff).unwrap();
                        // SAFETY: sizes were checked just now.
                        unsafe { start_simple(&device, &kernels[index], few, &operands).unwrap() };
                        case.check(&out, out_dtype, &format!("{dtype} to {out_dtype} {shape:?} few {few}"));
                    }
                }
            }
        }
    }
}

/// The same chain of operations as the CPU's scalar definition.
#[test]
fn the_plain_kernel_is_the_cpu_s_definition_to_the_bit() {
    let Some(device) = test_device() else { return };
    let linears = Linears::new(&device, DType::F32, LinearMode::Fast).unwrap();
    for shape in [[3, 70, 133], [33, 65, 257]] {
        let case = Case::new(&device, DType::F32, shape, true);
        let [m, n, k] = shape;
        let bias = case.bias.as_ref().unwrap();
        let got = read(&case.run(&linears, DType::F32), DType::F32);
        for i in 0..m * n {
            let products = case.x.values[i / n * k..][..k].iter().zip(&case.weight[i % n * k..][..k]);
            let want = products.fold(bias[i % n], |sum, (x, w)| x.mul_add(*w, sum));
            assert_eq!(got[i], want, "{shape:?} {i}");
        }
    }
}

#[test]
fn many_rows_agree_with_the_sum_by_the_first_plan_and_by_the_fastest() {
    let Some(device) = test_device() else { return };
    if device.arch.number() < 80 {
        return;
    }
    for dtype in HALVES {
        let linears = Linears::new(&device, dtype, LinearMode::Fast).unwrap();
        if linears.cublaslt.is_none() {
            eprintln!("skipped: no cuBLASLt");
            return;
        }
        for (shape, has_bias) in [([33, 24, 40], true), ([70, 136, 1000], false), ([300, 256, 512], true)] {
            let case = Case::new(&device, dtype, shape, has_bias);
            for out_dtype in [dtype, DType::F32] {
                assert_eq!(linears.way(shape), Way::CublasLt);
                let what = format!("{dtype} to {out_dtype} {shape:?}");
                case.check(&case.run(&linears, out_dtype), out_dtype, &what);
                let out = case.poisoned(out_dtype);
                let x = (&case.x.on_device).into();
                let operands =
                    linears.operands((&out).into(), x, case.m, &case.layer, case.layer.rows, out_dtype).unwrap();
                let (shape, addresses) = linears.for_cublaslt(&operands);
                let library = linears.cublaslt.as_ref().unwrap();
                // SAFETY: sizes were checked just now; the buffers live until they are read.
                unsafe { library.run(shape, addresses, Choose::Fastest).unwrap() };
                case.check(&out, out_dtype, &format!("{what} by the fastest"));
            }
        }
    }
}

/// A row's result is the same to the bit alone and among 64 or more others, and whichever tile computes it.
#[test]
fn a_row_does_not_depend_on_the_rows_beside_it_nor_on_the_tile() {
    let Some(device) = test_device() else { return };
    if device.arch.number() < 80 {
        return;
    }
    for (dtype, n, k) in [(DType::BF16, 150, 3592), (DType::F16, 96, 1088), (DType::BF16, 33, 333)] {
        let linears = Linears::new(&device, dtype, LinearMode::RowsAlone).unwrap();
        let case = Case::new(&device, dtype, [100, n, k], true);
        let want = read(&case.run(&linears, DType::F32), DType::F32);
        case.check(&case.run(&linears, DType::F32), DType::F32, "all");
        for &tile in tiles(device.arch) {
            let got = read(&case.run_with(&linears, DType::F32, tile), DType::F32);
            assert_eq!(got, want, "{dtype} {n}x{k} {tile:?}");
        }
        // Rows from `first` on, as the only ones.
        for (first, count) in [(0, 1), (13, 1), (99, 1), (5, 3), (40, 8), (7, 16), (61, 20), (30, 64)] {
            let (x, out) = (&case.x.on_device, poisoned(&device, count * n * 4));
            let x = Span::part(x, first * k * 2, count * k * 2).unwrap();
            linears.run((&out).into(), x, count, &case.layer, DType::F32).unwrap();
            assert_eq!(read(&out, DType::F32), want[first * n..][..count * n], "{dtype} {n}x{k} {count} from {first}");
        }
    }
}

/// Whatever is brought to the cache, of rows that end with the tile and of rows that do not: in one wave, and in several.
#[test]
fn bringing_weights_to_the_cache_changes_no_bit() {
    let Some(device) = test_device() else { return };
    if device.arch.number() < 90 {
        return;
    }
    let linears = Linears::new(&device, DType::BF16, LinearMode::RowsAlone).unwrap();
    let plain = tile_for(device.arch, device.num_sms, [3, 16, 4096]);
    for [n, k] in [[70, 6152], [16 * 5 * device.num_sms as usize + 5, 520]] {
        let case = Case::new(&device, DType::BF16, [3, n, k], true);
        let want = read(&case.run_with(&linears, DType::BF16, plain), DType::BF16);
        for prefetch in [Prefetch::Own, Prefetch::HalfWaves(1), Prefetch::HalfWaves(2)] {
            let got = read(&case.run_with(&linears, DType::BF16, plain.with(prefetch)), DType::BF16);
            assert_eq!(got, want, "{n}x{k} {prefetch:?}");
        }
    }
}

/// Gate and up are those of the two kernels to the bit; the activation is off by a few ulp of f32 before its one rounding.
#[test]
fn the_gated_product_is_the_product_and_then_the_gate() {
    let Some(device) = test_device() else { return };
    if device.arch.number() < 80 {
        return;
    }
    for dtype in HALVES {
        let linears = Linears::new(&device, dtype, LinearMode::RowsAlone).unwrap();
        for [m, f, k] in [[1, 24, 128], [5, 37, 600], [16, 64, 1024], [20, 70, 1032], [64, 130, 520], [3, 9, 77]] {
            let case = Case::new(&device, dtype, [m, 2 * f, k], m % 2 == 0);
            let both = read(&case.run(&linears, dtype), dtype);
            let out = poisoned(&device, m * f * 2);
            assert!(linears.run_gated((&out).into(), (&case.x.on_device).into(), m, &case.layer).unwrap());
            let want: Vec<f64> = (0..m * f)
                .map(|i| (f64::from(both[i / f * 2 * f + i % f]), f64::from(both[i / f * 2 * f + f + i % f])))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            assert_close(&read(&out, dtype), &want, step(dtype), 1e-6, &format!("{dtype} {m}x{f}x{k}"));
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_typed_errors() {
    let Some(device) = test_device() else { return };
    let linears = Linears::new(&device, DType::BF16, LinearMode::Fast).unwrap();
    let case = Case::new(&device, DType::BF16, [2, 16, 32], false);
    let (out, x) = (case.poisoned(DType::BF16), &case.x.on_device);
    let run = |m, layer, dtype| linears.run((&out).into(), x.into(), m, layer, dtype);
    let (what, wanted, found) = ("values of the output", 48, 32);
    assert_eq!(run(3, &case.layer, DType::BF16), Err(KernelError::Shape { op: OP, what, wanted, found }));
    assert!(matches!(run(2, &case.layer, DType::F16), Err(KernelError::Unsupported { .. })));
    assert_eq!(run(0, &case.layer, DType::BF16), Ok(()));
}
