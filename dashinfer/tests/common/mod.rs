//! What the tests share: the models beside the code, the reference's answers, and short ways to ask an engine.
#![allow(dead_code, reason = "each test uses a part of it")]
#![allow(unreachable_pub, reason = "a module of tests has no outside")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dashinfer::{Completion, ComputeType, Device, Engine, Load, Request};
use futures::executor::block_on;
use futures::future::join_all;
use safetensors::SafeTensors;

/// The bundled model: 7 million parameters, trained, a context of 2048.
pub const FERRIS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/ferris-7m");

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashinfer-models/tests/goldens");

/// A tiny checkpoint with random weights. Most of them sample by default.
pub fn golden(name: &str) -> PathBuf {
    Path::new(GOLDENS).join(name)
}

/// The golden for tests that are not about a family: 400 tokens, two layers, a context of 256.
pub fn tiny() -> PathBuf {
    golden("llama-mha")
}

/// Every golden folder that the tested device reads, in order.
pub fn golden_folders() -> Vec<PathBuf> {
    let entries = fs::read_dir(GOLDENS).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    if test_device() != Device::Cpu {
        folders.retain(|folder| !is_stored_quantized(folder));
    }
    folders
}

/// Whether a golden's weights were quantized before they were stored.
pub fn is_stored_quantized(folder: &Path) -> bool {
    fs::read_to_string(folder.join("config.json")).unwrap().contains("\"quantization_config\"")
}

fn test_device() -> Device {
    std::env::var("DASHINFER_TEST_DEVICE").map_or(Device::Cpu, |device| device.parse().unwrap())
}

/// Loads, on the device that `DASHINFER_TEST_DEVICE` names (`cpu` if it does not), in the type that `DASHINFER_TEST_COMPUTE` names.
/// On the CPU one thread computes: tests run beside each other already, and threads of a pool that wait for cores which others
/// have are slow.
#[track_caller]
pub fn load(load: Load) -> Engine {
    on_test_device(load).blocking().unwrap()
}

/// The settings of [`load`].
#[track_caller]
pub fn on_test_device(load: Load) -> Load {
    let device = test_device();
    let compute = std::env::var("DASHINFER_TEST_COMPUTE").map_or(ComputeType::Auto, |compute| compute.parse().unwrap());
    load.threads(1).device(device).compute(compute)
}

/// What the reference implementation says.
pub struct Expected {
    bytes: Vec<u8>,
}

/// A prompt, and what the reference makes of it.
pub struct ExpectedPrompt {
    pub ids: Vec<u32>,
    pub greedy_ids: Vec<u32>,
    /// The best logit less the second, for each of `greedy_ids`.
    pub greedy_margins: Vec<f32>,
    /// `[n, V]` of the last `n` positions.
    pub logits: Vec<f32>,
}

impl Expected {
    pub fn read(folder: &Path) -> Self {
        Self { bytes: fs::read(folder.join("expected.safetensors")).unwrap() }
    }

    /// The prompts; `logits` is the part of a tensor's name behind the prompt's.
    pub fn prompts(&self, logits: &str) -> Vec<ExpectedPrompt> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = tensors.tensor(name).unwrap().data();
            data.chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect()
        };
        let ids = |name: &str| -> Vec<u32> {
            let data = tensors.tensor(name).unwrap().data();
            data.chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()).try_into().unwrap()).collect()
        };
        let prompts: Vec<_> = (0..)
            .take_while(|i| tensors.tensor(&format!("prompt_{i}_ids")).is_ok())
            .map(|i| ExpectedPrompt {
                ids: ids(&format!("prompt_{i}_ids")),
                greedy_ids: ids(&format!("prompt_{i}_greedy_ids")),
                greedy_margins: floats(&format!("prompt_{i}_greedy_margins")),
                logits: floats(&format!("prompt_{i}_{logits}")),
            })
            .collect();
        assert!(!prompts.is_empty(), "no prompts are recorded");
        prompts
    }
}

/// The first prompts of a golden.
pub fn golden_prompts(name: &str) -> Vec<ExpectedPrompt> {
    Expected::read(&golden(name)).prompts("logits")
}

/// The largest distance between two rows; NaN counts as infinite.
pub fn max_abs_diff(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let diffs = found.iter().zip(wanted).map(|(a, b)| (a - b).abs());
    diffs.fold(0.0, |worst, diff| if diff.is_nan() { f32::INFINITY } else { worst.max(diff) })
}

/// `ln(softmax(logits))[id]`, summed in f64.
pub fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(logits[id as usize] - max) - sum.ln()
}

/// The index of the largest; the first of equal ones.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.unwrap() as u32
}

/// Waits for a whole continuation.
#[track_caller]
pub fn complete(engine: &Engine, request: impl Into<Request>) -> Completion {
    block_on(engine.generate(request).complete()).unwrap()
}

/// Waits for the continuations of requests that run together.
#[track_caller]
pub fn complete_all(engine: &Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Completion> {
    let streams: Vec<_> = requests.into_iter().map(|request| engine.generate(request).complete()).collect();
    block_on(join_all(streams)).into_iter().map(Result::unwrap).collect()
}

/// All that a request must give again: text, tokens, and each log-probability to the bit.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<u32>,
    logprobs: Vec<(u32, Vec<(u32, u32)>)>,
}

impl From<&Completion> for Answer {
    fn from(completion: &Completion) -> Self {
        let logprobs = completion.logprobs.iter().map(|logprob| {
            let top = logprob.top.iter().map(|&(id, logprob)| (id, logprob.to_bits()));
            (logprob.logprob.to_bits(), top.collect())
        });
        Self { text: completion.text.clone(), tokens: completion.tokens.clone(), logprobs: logprobs.collect() }
    }
}

/// Waits for something that other threads will bring about.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until no request is left, and says that nothing is held for one.
#[track_caller]
pub fn assert_idle(engine: &Engine) {
    wait_until("no request is left and no block is in use", || {
        let stats = engine.stats();
        (stats.queued, stats.running, stats.waiting, stats.paused, stats.blocks_in_use) == (0, 0, 0, 0, 0)
    });
}

/// Pseudo-random numbers (SplitMix64) that are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// `len` token ids of a vocabulary of `vocab_size`.
    pub fn tokens(&mut self, len: usize, vocab_size: usize) -> Vec<u32> {
        (0..len).map(|_| self.below(vocab_size) as u32).collect()
    }
}
