//! How fast the ways are, on the shapes of two models: `cargo test --release .. bench_linear -- --ignored --nocapture`.
//!
//! A product's weights are as many copies as the cache cannot hold, taken in turn, all random; the series is recorded once,
//! as a decode step is, so that the next product starts while this one ends.

use std::sync::Arc;
use std::time::Duration;

use super::super::testing::{random, test_device};
use super::rows::{Prefetch, Tile, tile, tile_for};
use super::*;
use crate::cuda::graph::Recording;
use crate::cuda::memory::Event;

/// Name, N, K, bias, result in f32.
const SHAPES: [(&str, usize, usize, bool, bool); 10] = [
    ("7b qkv", 4608, 3584, true, false),
    ("7b o", 3584, 3584, false, false),
    ("7b gate_up", 37888, 3584, false, false),
    ("7b down", 3584, 18944, false, false),
    ("7b head", 152_064, 3584, false, true),
    ("0.5b qkv", 1152, 896, true, false),
    ("0.5b o", 896, 896, false, false),
    ("0.5b gate_up", 9728, 896, false, false),
    ("0.5b down", 896, 4864, false, false),
    ("0.5b head", 151_936, 896, false, true),
];
const ROWS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 2048, 8192];
/// More than any L2 there is.
const CACHE_BYTES: usize = 240 << 20;
/// How long a recorded series should take.
const SERIES: Duration = Duration::from_micros(1500);

struct Bench {
    device: Arc<Device>,
    linears: Linears,
    weights: Buffer,
    x: Buffer,
    out: Buffer,
    bias: Buffer,
}

impl Bench {
    fn new(device: &Arc<Device>) -> Self {
        let bytes = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
        };
        let fill = |what, size: usize| {
            let buffer = device.alloc(what, size).unwrap();
            let noise = bytes(&random((8 << 20).min(size / 2), size as u64));
            for at in (0..size).step_by(noise.len()) {
                buffer.upload(at, &noise[..noise.len().min(size - at)]).unwrap();
            }
            buffer
        };
        Self {
            device: Arc::clone(device),
            linears: Linears::new(device, DType::BF16, LinearMode::Fast).unwrap(),
            weights: fill("weights", 152_064 * 3584 * 2 + CACHE_BYTES),
            x: fill("x", 8192 * 18944 * 2),
            out: device.alloc("out", 8192 * 37888 * 2).unwrap(),
            bias: fill("bias", 1 << 20),
        }
    }

    fn operands(&self, m: usize, shape: usize, copy: usize) -> Operands {
        let (_, n, k, has_bias, out_f32) = SHAPES[shape];
        let bias = if has_bias { self.bias.ptr() } else { 0 };
        Operands {
            out: self.out.ptr(),
            x: self.x.ptr(),
            weight: self.weights.ptr() + (copy * n * k * 2) as u64,
            bias_f32: bias,
            bias_t: bias,
            m,
            n,
            k,
            out_dtype: if out_f32 { DType::F32 } else { DType::BF16 },
        }
    }

    /// Time of one product in a recorded series of them: the median of several.
    fn time(&self, m: usize, shape: usize, run: impl Fn(&Operands) -> Result<(), KernelError>) -> Option<Duration> {
        let (_, n, k, ..) = SHAPES[shape];
        let copies = CACHE_BYTES.div_ceil(n * k * 2).max(1);
        let (start, end) = (Event::timed(&self.device).unwrap(), Event::timed(&self.device).unwrap());
        let measure = |work: &dyn Fn()| {
            start.record().unwrap();
            work();
            end.record().unwrap();
            end.wait().unwrap();
            end.since(&start).unwrap()
        };
        run(&self.operands(m, shape, 0)).ok()?;
        let once = measure(&|| run(&self.operands(m, shape, 0)).unwrap());
        let count = (SERIES.as_secs_f64() / once.as_secs_f64().max(1e-6)).ceil().clamp(1.0, 400.0) as usize;
        let count = count.max(copies.min(2));
        let recording = Recording::start(&self.device).unwrap();
        for i in 0..count {
            run(&self.operands(m, shape, i % copies)).unwrap();
        }
        let graph = recording.finish().unwrap();
        measure(&|| graph.launch().unwrap());
        let mut times: Vec<_> = (0..5).map(|_| measure(&|| graph.launch().unwrap()) / count as u32).collect();
        times.sort();
        Some(times[2])
    }

    fn rows(&self, m: usize, shape: usize, tile: Tile) -> Option<Duration> {
        // SAFETY: the buffers hold the largest shape.
        self.time(m, shape, |operands| unsafe { self.linears.rows.run_with(&self.device, operands, false, tile) })
    }

    fn cublaslt(&self, m: usize, shape: usize, tuned: bool) -> Option<Duration> {
        let library = self.linears.cublaslt.as_ref()?;
        let choose = if tuned { Choose::Fastest } else { Choose::First };
        self.time(m, shape, |operands| {
            let (shape, addresses) = self.linears.for_cublaslt(operands);
            // SAFETY: the buffers hold the largest shape. The first call is not recorded.
            unsafe { library.run(shape, addresses, choose) }
        })
    }
}

/// `12.3 µs 4.11 TB/s`: weights read per second; or TFLOP/s for many rows.
fn rate(time: Option<Duration>, m: usize, n: usize, k: usize) -> String {
    let Some(time) = time else { return format!("{:>22}", "-") };
    let seconds = time.as_secs_f64();
    let rate = if m <= 64 {
        format!("{:5.2} TB/s", (n * k * 2) as f64 / seconds / 1e12)
    } else {
        format!("{:5.0} TFLOP/s", (2 * m * n * k) as f64 / seconds / 1e12)
    };
    format!("{:>8.1} µs {rate:>13}", seconds * 1e6)
}

#[test]
#[ignore = "measures"]
fn bench_linear() {
    let Some(device) = test_device() else { return };
    let bench = Bench::new(&device);
    eprintln!("linear/bf16 on {}: rows kernel | cuBLASLt, first proposal | cuBLASLt, tuned", device.name);
    for (shape, &(name, n, k, _, out_f32)) in SHAPES.iter().enumerate() {
        for m in ROWS {
            if out_f32 && m > 256 {
                continue;
            }
            let rows =
                (m <= 256).then(|| bench.rows(m, shape, tile_for(device.arch, device.num_sms, [m, n, k]))).flatten();
            let first = bench.cublaslt(m, shape, false);
            let tuned = bench.cublaslt(m, shape, true);
            let [rows, first, tuned] = [rows, first, tuned].map(|time| rate(time, m, n, k));
            eprintln!("{name:<13} {m:>5} | {rows} | {first} | {tuned}");
        }
    }
}

/// As the table of tiles writes it.
fn brief(tile: Tile) -> String {
    let Tile { tile_m, row_groups, row_warps, k_warps, cluster, stages, blocks_per_sm, prefetch } = tile;
    format!("{:?} {prefetch:?}", [tile_m, row_groups, row_warps, k_warps, cluster, stages, blocks_per_sm])
}

/// For the table of tiles: each of some for each shape; the fastest four.
#[test]
#[ignore = "measures"]
fn bench_linear_tiles() {
    let Some(device) = test_device() else { return };
    let bench = Bench::new(&device);
    // rows of x, groups of 16 weight rows, warps beside each other, warps along K, blocks along K, stages, blocks per SM
    let mut candidates = vec![
        [8, 1, 1, 8, 1, 3, 3],
        [8, 1, 1, 8, 1, 2, 4],
        [8, 1, 1, 8, 1, 4, 2],
        [8, 2, 1, 8, 1, 2, 2],
        [8, 1, 2, 8, 1, 3, 1],
        [8, 1, 1, 8, 1, 6, 1],
        [16, 1, 1, 8, 1, 3, 2],
        [16, 1, 1, 8, 1, 2, 3],
        [16, 2, 1, 8, 1, 2, 2],
        [32, 1, 2, 4, 1, 2, 2],
        [64, 1, 4, 1, 1, 2, 2],
    ];
    if device.arch.number() >= 90 {
        candidates.extend([
            [8, 1, 2, 4, 2, 3, 3],
            [8, 1, 1, 4, 2, 3, 6],
            [8, 1, 1, 4, 2, 4, 4],
            [16, 1, 2, 4, 2, 3, 2],
            [16, 2, 2, 2, 4, 3, 3],
            [32, 2, 2, 2, 4, 3, 3],
            [32, 2, 2, 2, 4, 2, 3],
            [32, 2, 1, 4, 2, 3, 3],
            [32, 2, 4, 1, 8, 3, 3],
            [64, 2, 4, 1, 8, 2, 3],
            [64, 2, 2, 2, 4, 2, 3],
            [64, 1, 4, 2, 4, 2, 2],
            [64, 2, 2, 1, 8, 2, 6],
            [64, 2, 4, 1, 4, 2, 3],
        ]);
    }
    let mut candidates: Vec<Tile> = candidates.into_iter().map(tile).collect();
    if device.arch.number() >= 90 {
        for plain in candidates.clone().into_iter().filter(|tile| tile.tile_m <= 16 && tile.cluster == 1) {
            for prefetch in [Prefetch::Own, Prefetch::HalfWaves(1), Prefetch::HalfWaves(2)] {
                candidates.push(plain.with(prefetch));
            }
        }
    }
    for (shape, &(name, n, k, ..)) in SHAPES.iter().enumerate() {
        for m in [1, 8, 16, 32, 64] {
            let tile_m = m.max(8);
            let mut times: Vec<_> = candidates
                .iter()
                .filter(|candidate| candidate.tile_m == tile_m)
                .filter_map(|&tile| Some((bench.rows(m, shape, tile)?, tile)))
                .collect();
            times.sort_by_key(|&(time, _)| time);
            let best: Vec<_> = times
                .iter()
                .take(4)
                .map(|&(time, tile)| format!("{} {}", brief(tile), rate(Some(time), m, n, k)))
                .collect();
            eprintln!("{name:<13} {m:>3} | {}", best.join(" | "));
        }
    }
}
