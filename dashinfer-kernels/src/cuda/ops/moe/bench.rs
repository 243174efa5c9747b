//! How fast a layer of experts is: `cargo test --release .. bench_moe -- --ignored --nocapture`.
//!
//! Each run of a recorded series routes other random tokens, so that few rows find their experts' weights in memory and not in
//! the cache, as in a model; what is read is counted by the definition of routing.

use std::time::Duration;

use super::super::linear::CudaLinear;
use super::super::testing::*;
use super::*;
use crate::cuda::graph::Recording;
use crate::cuda::memory::Event;
use crate::{Chosen, Scoring};

/// Name, E, F, N, experts of a token, layers.
const MODELS: [(&str, usize, usize, usize, usize, usize); 2] =
    [("qwen3-30b-a3b", 2048, 768, 128, 8, 48), ("deepseek-v2-lite", 2048, 1408, 64, 6, 26)];
const ROWS: [usize; 9] = [1, 2, 8, 16, 64, 128, 256, 1024, 8192];
/// Runs of a series, each with tokens of its own.
const RUNS: usize = 12;

/// Something to be timed.
type Part<'a> = dyn Fn(&Moe, &Operands<'_>, &CudaExperts, &mut CudaExpertScratch) -> Result<(), KernelError> + 'a;

struct Bench {
    device: Arc<Device>,
    moe: Moe,
    experts: CudaExperts,
    routing: Routing,
    scratch: CudaExpertScratch,
    x: Buffer,
    out: Buffer,
    logits: Values,
}

impl Bench {
    fn new(
        device: &Arc<Device>,
        (_, hidden, inner, num_experts, top_k, _): (&str, usize, usize, usize, usize, usize),
    ) -> Self {
        let dtype = DType::BF16;
        let noise = to_bytes(&random(1 << 20, 7), dtype);
        let filled = |bytes: usize| {
            let buffer = device.alloc("a measurement", bytes).unwrap();
            for at in (0..bytes).step_by(noise.len()) {
                buffer.upload(at, &noise[..noise.len().min(bytes - at)]).unwrap();
            }
            buffer
        };
        let linear = |rows, cols| CudaLinear {
            weight: filled(rows * cols * 2),
            bias_f32: None,
            bias_t: None,
            rows,
            cols,
            dtype,
        };
        let all = |rows, cols| (0..num_experts).map(|_| linear(rows, cols)).collect();
        let experts = CudaExperts::new(device, dtype, all(2 * inner, hidden), all(hidden, inner)).unwrap();
        let routing =
            Routing { num_experts, top_k, scoring: Scoring::Softmax, groups: None, normalize: true, scale: 1.0 };
        let most = ROWS[ROWS.len() - 1];
        Self {
            device: Arc::clone(device),
            moe: Moe::new(device, dtype, false),
            experts,
            routing,
            scratch: CudaExpertScratch::new(device, dtype, most, [hidden, inner], &routing).unwrap(),
            x: filled(most * hidden * 2),
            out: device.alloc("a measurement", most * hidden * 2).unwrap(),
            logits: Values::random(device, DType::F32, most * RUNS.min(4) * num_experts, 9),
        }
    }

    /// Where the tokens of a run begin.
    fn first(&self, num_rows: usize, run: usize) -> usize {
        run * num_rows % (self.logits.values.len() / self.routing.num_experts - num_rows + 1)
    }

    /// The median time of a run in a recorded series.
    fn time(&mut self, num_rows: usize, what: &Part<'_>) -> Duration {
        let firsts: Vec<usize> = (0..RUNS).map(|run| self.first(num_rows, run)).collect();
        let mut once = |run: usize| {
            let logits = Span::from(&self.logits.on_device).rest(firsts[run] * self.routing.num_experts * 4).unwrap();
            let operands = Operands {
                out: (&self.out).into(),
                x: (&self.x).into(),
                logits,
                correction: None,
                activation: Activation::Silu,
                num_rows,
            };
            what(&self.moe, &operands, &self.experts, &mut self.scratch).unwrap();
        };
        once(0);
        self.device.synchronize().unwrap();
        let recording = Recording::start(&self.device).unwrap();
        (0..RUNS).for_each(&mut once);
        let graph = recording.finish().unwrap();
        let (start, end) = (Event::timed(&self.device).unwrap(), Event::timed(&self.device).unwrap());
        let launch = || {
            start.record().unwrap();
            graph.launch().unwrap();
            end.record().unwrap();
            end.wait().unwrap();
            end.since(&start).unwrap() / RUNS as u32
        };
        launch();
        let mut times: Vec<Duration> = (0..7).map(|_| launch()).collect();
        times.sort();
        times[3]
    }

    /// Experts that a run touches, on average.
    fn touched(&self, num_rows: usize) -> f64 {
        let n = self.routing.num_experts;
        let mut scratch = vec![0.0; self.routing.scratch_len()];
        let mut total = 0;
        for run in 0..RUNS {
            let mut is_used = vec![false; n];
            for row in self.logits.values[self.first(num_rows, run) * n..][..num_rows * n].chunks(n) {
                let mut chosen = vec![Chosen::default(); self.routing.top_k];
                crate::route(&mut chosen, row, None, &self.routing, &mut scratch).unwrap();
                chosen.iter().for_each(|of| is_used[of.expert as usize] = true);
            }
            total += is_used.iter().filter(|used| **used).count();
        }
        total as f64 / RUNS as f64
    }
}

/// A line for each number of rows: the layer with the tile of the table, its parts, and each product with every tile.
#[test]
#[ignore = "measures"]
fn bench_moe() {
    let Some(device) = test_device().filter(|device| Moe::is_supported(device, DType::BF16)) else { return };
    println!("experts/bf16 on {}", device.name);
    for model in MODELS {
        let (name, hidden, inner, num_experts, top_k, layers) = model;
        let mut bench = Bench::new(&device, model);
        let routing = bench.routing;
        for num_rows in ROWS {
            let pairs = num_rows * top_k;
            let touched = bench.touched(num_rows);
            let rate = |time: Duration, parts: usize| {
                let seconds = time.as_secs_f64();
                let bytes = touched * (parts * inner * hidden * 2) as f64;
                let flop = (2 * parts * inner * hidden * pairs) as f64;
                format!(
                    "{:8.1} µs {:5.2} TB/s {:4.0} TFLOP/s",
                    seconds * 1e6,
                    bytes / seconds / 1e12,
                    flop / seconds / 1e12
                )
            };
            let whole =
                bench.time(num_rows, &|moe, operands, experts, scratch| moe.run(operands, experts, &routing, scratch));
            let chosen = tile_for(device.arch, pairs, num_experts, false);
            let per_second = num_rows as f64 / (whole.as_secs_f64() * layers as f64);
            println!(
                "{name} {num_rows:>5} rows, {touched:5.1} experts | {} | {per_second:8.0} tokens/s of {layers} such layers | {chosen:?}",
                rate(whole, 3)
            );
            let route =
                bench.time(num_rows, &|moe, operands, _, scratch| moe.route(operands, &routing, scratch, chosen));
            let combine = bench.time(num_rows, &|moe, operands, _, scratch| moe.combine(operands, scratch));
            println!("    route {:6.1} µs   combine {:6.1} µs", route.as_secs_f64() * 1e6, combine.as_secs_f64() * 1e6);
            let sm90: &[Tile] = if device.arch.number() == 90 { &tiles::SM90_TILES } else { &[] };
            let mean = pairs.div_ceil(num_experts);
            let fits = |tile: &&Tile| tile.rows() >= mean.min(64) / 2 && (tile.rows() <= 64 || mean >= 16);
            for &tile in tiles::SM80_TILES.iter().chain(sm90).filter(fits) {
                // Beside routing, whose time is taken off again: the lists are of these rows and this tile.
                let mut with = |part: &Part<'_>| {
                    let both = bench.time(num_rows, &|moe, operands, experts, scratch| {
                        moe.route(operands, &routing, scratch, tile)?;
                        part(moe, operands, experts, scratch)
                    });
                    both.saturating_sub(route)
                };
                let gate_up = with(&|moe, operands, experts, scratch| moe.gate_up(operands, experts, scratch, tile));
                let down = with(&|moe, operands, experts, scratch| moe.down(operands, experts, scratch, tile, false));
                println!("    gate_up {} | down {} | {tile:?}", rate(gate_up, 2), rate(down, 1));
            }
        }
    }
}

/// What it saves that weights of down come early, for few rows.
#[test]
#[ignore = "measures"]
fn bench_moe_early() {
    let Some(device) = test_device().filter(|device| Moe::is_supported(device, DType::BF16)) else { return };
    let mut bench = Bench::new(&device, MODELS[0]);
    let routing = bench.routing;
    for num_rows in [1, 2, 8, 64, 256] {
        let [late, early] = [false, true].map(|early| {
            bench.moe.early = early;
            bench.time(num_rows, &|moe, operands, experts, scratch| moe.run(operands, experts, &routing, scratch))
        });
        println!("{num_rows:>5} rows: late {late:.1?}, early {early:.1?}");
    }
}
