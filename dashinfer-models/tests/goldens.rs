//! The decoder against `transformers`: tiny checkpoints of every family, with the outputs of the reference.
//!
//! `goldens/README.md` says where the numbers come from and why the bounds are what they are. Each case runs whole, in
//! chunks, token by token, and in one batch; the bounds are the same. Every folder in `goldens` is a case.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;
mod spelt_otherwise;

use std::{
    cell::{Cell, RefCell},
    fs,
    path::{Path, PathBuf},
};

use common::{
    reference::Reference,
    sequences::{Cached, Runner, Wanted},
};
use dashinfer_kernels::cpu::packed_bytes;
use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, Isa};
use dashinfer_kernels::{Backend, DType};
use dashinfer_models::{
    Checkpoint, Decoder, GenerationConfig, HfConfig, MemoryEstimate, ModelSpec, Quantization, RopeScaling, StepLimits,
    WeightSource,
};
use safetensors::SafeTensors;

/// In units of the largest logit of the case, and of the largest value of a hidden state.
#[derive(Clone, Copy)]
struct Bounds {
    logits: f32,
    /// Greedy tokens are compared where the best logit is better by so much.
    margin: f32,
}

/// Bounds of a path that computes in f32.
const F32: Bounds = Bounds { logits: 2e-3, margin: 4e-3 };
/// Bounds of a path whose activations are rounded to f16 and bf16 (the goldens' weights are bf16, and lose nothing in f16 but what
/// is below its range). Each of some ten roundings on the way through a layer is off by up to 2⁻¹² and 2⁻⁹ of a value, half a unit
/// in the last place, and these models of random weights hand errors on undiminished. Measured on an H200, the worst of all cases
/// used half of a bound, most a quarter.
#[cfg(feature = "cuda")]
const F16: Bounds = Bounds { logits: 1e-2, margin: 2e-2 };
#[cfg(feature = "cuda")]
const BF16: Bounds = Bounds { logits: 6e-2, margin: 0.12 };

/// The divergence of what was found from what was wanted, in nats.
fn divergence(found: &[f32], wanted: &[f32]) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
        logits.iter().map(|x| f64::from(x - largest) - sum.ln()).collect()
    };
    let (found, wanted) = (log_softmax(found), log_softmax(wanted));
    wanted.iter().zip(found).map(|(wanted, found)| wanted.exp() * (wanted - found)).sum()
}

/// The mean divergence of a model with experts whose activations are rounded, of all rows but one in forty (or one, of fewer): a router near a tie picks
/// another expert then, which is no mistake, and that row is another by more than any rounding. The bound is that of `goldens/README.md` for
/// dense models; so are the margin, in logits, of a greedy token, and one miss in twenty for models with experts.
const ROUTED_DIVERGENCE: f64 = 5e-3;
const ROUTED_MARGIN: f32 = 0.5;

/// What was found of a case whose routers may pick other experts.
#[derive(Default)]
struct Routed {
    divergences: Vec<f64>,
    misses: u32,
    steps: u32,
}

struct Case {
    folder: PathBuf,
    bounds: Bounds,
    /// The longest context, if it is not the model's.
    max_context: Option<usize>,
    /// The largest part of a bound that was used up, for the record.
    worst: Cell<f32>,
    /// The largest logit.
    scale: f32,
    prompts: Vec<Prompt>,
    /// `[L + 1, T, E]` of the first prompt.
    hidden_states: Vec<f32>,
    /// If it has experts and activations are rounded: it is judged as a whole, when it is dropped.
    routed: Option<RefCell<Routed>>,
}

#[derive(Clone)]
struct Prompt {
    ids: Vec<u32>,
    /// `[T][V]`
    logits: Vec<Vec<f32>>,
    greedy_ids: Vec<u32>,
    greedy_margins: Vec<f32>,
}

fn cases(bounds: Bounds) -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "there are no goldens");
    folders.into_iter().flat_map(|folder| Case::read(folder, bounds).by_context()).collect()
}

impl Case {
    fn read(folder: PathBuf, bounds: Bounds) -> Self {
        let meta: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("meta.json")).unwrap()).unwrap();
        let scale = meta["max_abs_logit"].as_f64().unwrap() as f32;
        let bytes = fs::read(folder.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| dashinfer_kernels::to_f32(expected.tensor(name).unwrap().data(), DType::F32);
        let ids = |name: &str| -> Vec<u32> {
            let data = expected.tensor(name).unwrap().data();
            data.chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()).try_into().unwrap()).collect()
        };
        let prompts = (0..)
            .take_while(|i| expected.tensor(&format!("prompt_{i}_ids")).is_ok())
            .map(|i| {
                let ids_of_prompt = ids(&format!("prompt_{i}_ids"));
                let logits = floats(&format!("prompt_{i}_logits"));
                let vocab = logits.len() / ids_of_prompt.len();
                Prompt {
                    ids: ids_of_prompt,
                    logits: logits.chunks_exact(vocab).map(<[f32]>::to_vec).collect(),
                    greedy_ids: ids(&format!("prompt_{i}_greedy_ids")),
                    greedy_margins: floats(&format!("prompt_{i}_greedy_margins")),
                }
            })
            .collect::<Vec<_>>();
        assert!(!prompts.is_empty(), "{} has no prompts", folder.display());
        let hidden_states = floats("prompt_0_hidden_states");
        let (max_context, worst) = (None, Cell::new(0.0));
        let mut case = Self { scale, prompts, hidden_states, folder, bounds, max_context, worst, routed: None };
        if case.bounds.logits > F32.logits && case.spec().experts.is_some() {
            case.routed = Some(RefCell::default());
            case.hidden_states.clear();
        }
        case
    }

    /// Two cases where the reference decides by the length of a sequence: one for the prompts within the training context, and one
    /// for those beyond it.
    fn by_context(mut self) -> Vec<Self> {
        let line = self.spec().ropes.into_iter().find_map(|rope| match rope.scaling {
            RopeScaling::Long { original_max_positions, .. } => Some(original_max_positions as usize),
            _ => None,
        });
        let Some(line) = line else { return vec![self] };
        let mut long = Self::read(self.folder.clone(), self.bounds);
        self.max_context = Some(line);
        self.prompts.retain(|prompt| prompt.ids.len() + prompt.greedy_ids.len() <= line);
        long.prompts.retain(|prompt| prompt.ids.len() > line);
        assert!(!self.prompts.is_empty() && !long.prompts.is_empty(), "{}: one side of {line} is empty", self.name());
        long.prompts.extend(long.prompts.clone()); // some laws are about two prompts
        long.hidden_states.clear(); // they are those of a short prompt
        vec![self, long]
    }

    fn name(&self) -> String {
        self.folder.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// That of the config, but of type f32, in which the reference computed: Gemma's factor on the embedding is rounded to the type.
    fn spec(&self) -> ModelSpec {
        let config = fs::read_to_string(self.folder.join("config.json")).unwrap();
        let mut spec = HfConfig::parse(&config.replace("\"bfloat16\"", "\"float32\"")).unwrap().to_spec().unwrap();
        spec.limit_context(self.max_context.unwrap_or(usize::MAX));
        spec
    }

    /// With weights in floating point. `None` where a GPU's backend says that it lacks something which the model needs; the CPU's have to have all.
    fn load<B: Backend>(&self, backend: B) -> Option<Decoder<B>> {
        self.load_as(backend, Quantization::NONE)
    }

    fn load_as<B: Backend>(&self, backend: B, quantization: Quantization) -> Option<Decoder<B>> {
        let spec = self.spec();
        let lacking = spec.features().into_iter().find(|feature| !backend.supports(*feature));
        if let (Some(feature), "cuda") = (lacking, backend.name()) {
            eprintln!("{}: skipped: no {feature} on the GPU", self.name());
            return None;
        }
        let mut checkpoint = Checkpoint::open(&self.folder).unwrap();
        let limits = StepLimits { max_tokens: 512, max_logit_rows: 512 };
        Some(Decoder::load(backend, spec, &mut checkpoint, limits, quantization, &mut |_| ()).unwrap())
    }

    #[track_caller]
    fn assert_close(&self, found: &[f32], wanted: &[f32], what: &str) {
        if let Some(routed) = &self.routed {
            assert_eq!(found.len(), wanted.len(), "{}: {what}", self.name());
            let mut routed = routed.borrow_mut();
            routed.divergences.push(divergence(found, wanted));
            return;
        }
        self.assert_within(found, wanted, self.bounds.logits * self.scale, what);
    }

    #[track_caller]
    fn assert_within(&self, found: &[f32], wanted: &[f32], bound: f32, what: &str) {
        assert_eq!(found.len(), wanted.len(), "{}: {what}", self.name());
        let worst = found
            .iter()
            .zip(wanted)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |worst: f32, diff| if diff.is_nan() { f32::INFINITY } else { worst.max(diff) });
        self.worst.set(self.worst.get().max(worst / bound));
        assert!(worst <= bound, "{}: {what} is off by {worst}, the bound is {bound}", self.name());
    }

    #[track_caller]
    fn assert_greedy(&self, prompt: &Prompt, step: usize, logits: &[f32]) {
        let margin = if self.routed.is_some() { ROUTED_MARGIN } else { self.bounds.margin * self.scale };
        if prompt.greedy_margins[step] > margin {
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            if let Some(routed) = &self.routed {
                let mut routed = routed.borrow_mut();
                routed.steps += 1;
                routed.misses += u32::from(best as u32 != prompt.greedy_ids[step]);
                return;
            }
            assert_eq!(best as u32, prompt.greedy_ids[step], "{}: greedy token {step}", self.name());
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        if let Some(routed) = self.routed.take().map(RefCell::into_inner)
            && !std::thread::panicking()
        {
            let Routed { mut divergences, misses, steps } = routed;
            divergences.sort_by(f64::total_cmp);
            let rows = divergences.len().saturating_sub((divergences.len() / 40).max(1));
            let mean = divergences[..rows].iter().sum::<f64>() / rows.max(1) as f64;
            let most = divergences.last().copied().unwrap_or(0.0);
            let name = self.name();
            eprintln!(
                "{name}: a mean divergence of {mean:.1e}, {most:.1e} at most; {misses} of {steps} greedy tokens missed"
            );
            assert!(mean <= ROUTED_DIVERGENCE, "{}: a mean divergence of {mean}", self.name());
            assert!(20 * misses <= steps, "{}: {misses} of {steps} greedy tokens missed", self.name());
            return;
        }
        eprintln!("{}: off by {:.0} % of the bound at most", self.name(), 100.0 * self.worst.get());
    }
}

/// Makes a backend, or says why there is none here; and the bounds that it is to keep.
type Tested<B> = (fn() -> Option<B>, Bounds);

/// Every prompt in chunks of `chunk` tokens.
fn check_chunked<B: Cached>((backend, bounds): Tested<B>, chunk: usize) {
    for case in cases(bounds) {
        let Some(backend) = backend() else { return };
        let Some(mut decoder) = case.load(backend) else { continue };
        for (number, prompt) in case.prompts.iter().enumerate() {
            let mut runner = Runner::new(&mut decoder, 1);
            let mut wanted = prompt.logits.iter();
            for ids in prompt.ids.chunks(chunk) {
                for (found, wanted) in runner.step(&[(0, ids)], Wanted::All).iter().zip(&mut wanted) {
                    case.assert_close(found, wanted, &format!("prompt {number} in chunks of {chunk}"));
                }
            }
            assert_eq!(wanted.count(), 0);
        }
    }
}

/// Logits of the last row alone, of none at all in earlier chunks: what an engine asks for.
fn check_last_rows<B: Cached>((backend, bounds): Tested<B>) {
    for case in cases(bounds) {
        let Some(backend) = backend() else { return };
        let Some(mut decoder) = case.load(backend) else { continue };
        for prompt in &case.prompts {
            let mut runner = Runner::new(&mut decoder, 1);
            let (head, tail) = prompt.ids.split_at(prompt.ids.len() / 2);
            assert!(runner.step(&[(0, head)], Wanted::None).is_empty());
            let found = runner.step(&[(0, tail)], Wanted::LastOfEach);
            assert_eq!(found.len(), 1);
            case.assert_close(&found[0], prompt.logits.last().unwrap(), "the last row");
        }
    }
}

/// All prompts of a case in one step, then decoded together, fed the recorded tokens.
fn check_batched<B: Cached>((backend, bounds): Tested<B>) {
    for case in cases(bounds) {
        let Some(backend) = backend() else { return };
        let Some(mut decoder) = case.load(backend) else { continue };
        let mut runner = Runner::new(&mut decoder, case.prompts.len());
        let runs: Vec<_> = case.prompts.iter().map(|prompt| &prompt.ids[..]).enumerate().collect();
        let rows = runner.step(&runs, Wanted::All);
        let wanted: Vec<_> = case.prompts.iter().flat_map(|prompt| &prompt.logits).collect();
        assert_eq!(rows.len(), wanted.len());
        for (found, wanted) in rows.iter().zip(wanted) {
            case.assert_close(found, wanted, "a prompt in the batch of all");
        }
        for step in 1..case.prompts[0].greedy_ids.len() {
            let runs = case.prompts.iter().map(|prompt| &prompt.greedy_ids[step - 1..step]).enumerate();
            let rows = runner.step(&runs.collect::<Vec<_>>(), Wanted::LastOfEach);
            for (prompt, logits) in case.prompts.iter().zip(&rows) {
                case.assert_greedy(prompt, step, logits);
            }
        }
    }
}

/// Each prompt alone, then its continuation, fed the recorded tokens.
fn check_greedy<B: Cached>((backend, bounds): Tested<B>) {
    for case in cases(bounds) {
        let Some(backend) = backend() else { return };
        let Some(mut decoder) = case.load(backend) else { continue };
        for prompt in &case.prompts {
            let mut runner = Runner::new(&mut decoder, 1);
            let mut run = &prompt.ids[..];
            for step in 0..prompt.greedy_ids.len() {
                let rows = runner.step(&[(0, run)], Wanted::LastOfEach);
                case.assert_greedy(prompt, step, &rows[0]);
                run = &prompt.greedy_ids[step..=step];
            }
        }
    }
}

/// A prefill chunk beside a decode, as a scheduler mixes them.
fn check_mixed<B: Cached>((backend, bounds): Tested<B>) {
    for case in cases(bounds) {
        let Some(backend) = backend() else { return };
        let Some(mut decoder) = case.load(backend) else { continue };
        let mut runner = Runner::new(&mut decoder, 2);
        let [first, .., second] = &case.prompts[..] else { panic!("{} has less than two prompts", case.name()) };
        runner.step(&[(0, &first.ids)], Wanted::None);
        let mut wanted = second.logits.iter();
        for (step, chunk) in second.ids.chunks(9).enumerate().take(first.greedy_ids.len() - 1) {
            let rows = runner.step(&[(1, chunk), (0, &first.greedy_ids[step..=step])], Wanted::All);
            let (decode, prefill) = rows.split_last().unwrap();
            case.assert_greedy(first, step + 1, decode);
            for (found, wanted) in prefill.iter().zip(&mut wanted) {
                case.assert_close(found, wanted, "a chunk beside a decode");
            }
        }
    }
}

/// Hidden states grow to many times the logits' bound allows; they are judged by their own largest value.
fn check_hidden_states<B: Cached>((backend, bounds): Tested<B>) {
    for case in cases(bounds) {
        let Some(backend) = backend() else { return };
        let Some(mut decoder) = case.load(backend) else { continue };
        if case.hidden_states.is_empty() {
            continue;
        }
        let found = Runner::new(&mut decoder, 1).hidden_states(&case.prompts[0].ids);
        assert_eq!(found.len(), decoder.spec().num_layers() + 1);
        let size = case.hidden_states.len() / found.len();
        for (layer, (found, wanted)) in found.iter().zip(case.hidden_states.chunks_exact(size)).enumerate() {
            let largest = wanted.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            case.assert_within(&found.concat(), wanted, case.bounds.logits * largest, &format!("hidden state {layer}"));
        }
    }
}

#[test]
fn every_case_names_its_end_tokens() {
    for case in cases(F32) {
        let config = HfConfig::read(&case.folder).unwrap();
        let generation = GenerationConfig::read(&case.folder, &config).unwrap();
        assert!(!generation.eos_token_ids.is_empty(), "{}", case.name());
    }
}

#[test]
fn an_estimate_is_a_little_more_than_the_file() {
    let limits = StepLimits { max_tokens: 16, max_logit_rows: 1 };
    for case in cases(F32) {
        let spec = case.spec();
        if spec.stored_quantization.is_some() {
            continue; // in f32 it is several times the file
        }
        let checkpoint = Checkpoint::open(&case.folder).unwrap();
        let (f32, none) = (DType::F32, Quantization::NONE);
        let estimate = MemoryEstimate::new(&spec, &checkpoint, f32, f32.into(), limits, none, &packed_bytes).unwrap();
        // DeepSeek-V3's has a layer more, which is not loaded.
        let extra = format!("model.layers.{}.", spec.num_layers());
        let extra = checkpoint.names().into_iter().filter(|name| name.starts_with(&extra));
        let extra: usize = extra.map(|name| checkpoint.read(name).unwrap().len()).sum();
        let stored = checkpoint.data_bytes() - extra as u64;
        // More, by norms and biases in f32, rows padded to 16, and columns of bf16 padded to 32, which is much of a tiny model.
        assert!((stored..stored + stored / 2).contains(&estimate.weight_bytes), "{}: {estimate:?}", case.name());
    }
}

/// All laws for one backend.
macro_rules! goldens {
    ($module:ident, $backend:expr, $bounds:expr) => {
        mod $module {
            use super::*;

            #[test]
            fn whole() {
                check_chunked(($backend, $bounds), usize::MAX);
            }

            #[test]
            fn in_chunks() {
                check_chunked(($backend, $bounds), 7);
            }

            #[test]
            fn token_by_token() {
                check_chunked(($backend, $bounds), 1);
            }

            #[test]
            fn last_rows_alone() {
                check_last_rows(($backend, $bounds));
            }

            #[test]
            fn all_prompts_in_one_batch() {
                check_batched(($backend, $bounds));
            }

            #[test]
            fn greedy_continuations() {
                check_greedy(($backend, $bounds));
            }

            #[test]
            fn prefill_beside_decode() {
                check_mixed(($backend, $bounds));
            }

            #[test]
            fn hidden_states() {
                check_hidden_states(($backend, $bounds));
            }
        }
    };
}

fn cpu(isa: Isa) -> Option<CpuBackend> {
    if !isa.is_available() {
        eprintln!("skipped: {isa:?} is not available on this machine");
        return None;
    }
    Some(CpuBackend::new(&CpuConfig { isa: Some(isa), ..CpuConfig::default() }).unwrap())
}

goldens!(reference, || Some(Reference::default()), F32);
goldens!(cpu_best, || cpu(Isa::best()), F32);
goldens!(cpu_avx2, || cpu(Isa::Avx2), F32);
goldens!(cpu_neon, || cpu(Isa::Neon), F32);
goldens!(cpu_scalar, || cpu(Isa::Scalar), F32);

/// Checkpoints that were quantized before they were stored, with the kernels for what they hold.
mod as_stored {
    use super::*;

    /// What each case is computed by.
    const CONVERSIONS: &[(&str, &str)] = &[
        ("awq-4bit-g128", "awq 4-bit g128 → a16w4-g128-zp, as stored (8 matrices)"),
        ("compressed-tensors-fp8-channel", "fp8 by output feature → a16w8-g32 (8 matrices)"),
        ("compressed-tensors-w4a16", "compressed-tensors 4-bit g128 → a16w4-g128, as stored (8 matrices)"),
        ("fp8-block-deepseek-v3", "fp8 128×128 → bf16 (4 matrices)"),
        ("fp8-block-qwen3", "fp8 128×128 → a16w8-g32 (8 matrices)"),
        ("fp8-tensor", "fp8 → a16w8-g32 (8 matrices)"),
        ("gptq-4bit-g128", "gptq 4-bit g128 → a16w4-g128, as stored (8 matrices)"),
        ("gptq-4bit-g32-desc-act", "gptq 4-bit g32 reordered → a16w4-g32, as stored (8 matrices)"),
        ("gptq-8bit-g128-desc-act", "gptq 8-bit g128 reordered → a16w8-g128, as stored (2 matrices)"),
        ("gptq-8bit-g32", "gptq 8-bit g32 → a16w8-g32, as stored (8 matrices)"),
        ("gpt-oss-mxfp4", "mxfp4 → a16w8-g32, as stored (16 matrices)"),
    ];

    /// Bounds of a path whose weights are quantized: see `goldens/README.md`. In logits, not in parts of the largest.
    fn check(isa: Isa) {
        const MARGIN: f32 = 0.5;
        for case in cases(F32).iter().filter(|case| case.spec().stored_quantization.is_some()) {
            let Some(backend) = cpu(isa) else { return };
            // A router near a tie picks another expert after a rounding.
            let (mean_divergence, misses_in_twenty) = if case.spec().experts.is_some() { (2e-2, 1) } else { (5e-3, 0) };
            let Some(mut decoder) = case.load_as(backend, Quantization::AS_STORED) else { continue };
            let found: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
            if let Some((_, wanted)) = CONVERSIONS.iter().find(|(name, _)| *name == case.name()) {
                assert!(found.contains(&(*wanted).to_owned()), "{}: {found:?}", case.name());
            }
            let (mut sum, mut count, mut worst) = (0.0, 0, 0.0f32);
            let (mut steps, mut misses) = (0, 0);
            let mut runner = Runner::new(&mut decoder, case.prompts.len());
            let runs: Vec<_> = case.prompts.iter().map(|prompt| &prompt.ids[..]).enumerate().collect();
            let together = runner.step(&runs, Wanted::All);
            for step in 1..case.prompts[0].greedy_ids.len() {
                let runs = case.prompts.iter().map(|prompt| &prompt.greedy_ids[step - 1..step]).enumerate();
                let rows = runner.step(&runs.collect::<Vec<_>>(), Wanted::LastOfEach);
                for (prompt, logits) in case.prompts.iter().zip(&rows) {
                    if prompt.greedy_margins[step] > MARGIN {
                        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
                        steps += 1;
                        misses += usize::from(best as u32 != prompt.greedy_ids[step]);
                    }
                }
            }
            assert!(misses * 20 <= steps * misses_in_twenty, "{}: {misses} of {steps} tokens differ", case.name());
            let mut together = together.iter();
            for prompt in &case.prompts {
                // Alone, in chunks: the same bits as in the batch of all.
                let mut runner = Runner::new(&mut decoder, 1);
                let mut wanted = prompt.logits.iter();
                for ids in prompt.ids.chunks(11) {
                    for alone in runner.step(&[(0, ids)], Wanted::All) {
                        assert!(together.next() == Some(&alone), "{}: a row depends on its batch", case.name());
                        let wanted = wanted.next().unwrap();
                        let off = alone.iter().zip(wanted).map(|(a, b)| (a - b).abs());
                        worst = off.fold(worst, f32::max);
                        sum += divergence(&alone, wanted);
                        count += 1;
                    }
                }
            }
            let mean = sum / f64::from(count);
            let worst = worst / case.scale;
            eprintln!("{}: {found:?}: divergence {mean:.1e}, off by {worst:.1e} of the largest logit", case.name());
            assert!(mean <= mean_divergence, "{}: a mean divergence of {mean}", case.name());
        }
    }

    #[test]
    fn on_the_best_kernels() {
        check(Isa::best());
    }

    #[test]
    fn on_avx2() {
        check(Isa::Avx2);
    }

    #[test]
    fn on_neon() {
        check(Isa::Neon);
    }

    #[test]
    fn by_definition() {
        check(Isa::Scalar);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use dashinfer_kernels::cuda::{CudaBackend, CudaConfig, CudaDevice};

    use super::*;

    fn backend(dtype: DType, deterministic: bool) -> Option<CudaBackend> {
        match CudaDevice::open(0) {
            Ok(device) => Some(CudaBackend::new(&device, &CudaConfig { dtype, deterministic }).unwrap()),
            Err(error) => {
                eprintln!("skipped: no CUDA device ({error})");
                None
            }
        }
    }

    /// What was stored quantized is computed in the type of the rest, and `Decoder::conversions` says so; all cases are computed below.
    #[test]
    fn what_was_stored_quantized_is_converted() {
        for dtype in [DType::BF16, DType::F16] {
            for case in cases(F32).iter().filter(|case| case.spec().stored_quantization.is_some()) {
                let Some(backend) = backend(dtype, false) else { return };
                let Some(decoder) = case.load_as(backend, Quantization::AS_STORED) else { continue };
                let found: Vec<_> = decoder.conversions().iter().map(ToString::to_string).collect();
                let name = case.name();
                assert!(!found.is_empty(), "{name}");
                for conversion in &found {
                    assert!(conversion.contains(&format!(" → {dtype} (")), "{name}: {found:?}");
                }
            }
        }
    }

    #[test]
    fn weights_cannot_be_quantized() {
        let Some(case) = cases(F32).into_iter().find(|case| case.name() == "gptq-4bit-g128") else { panic!("no case") };
        let Some(backend) = backend(DType::BF16, false) else { return };
        let mut checkpoint = Checkpoint::open(&case.folder).unwrap();
        let (limits, scheme) = (StepLimits { max_tokens: 8, max_logit_rows: 8 }, "a16w4-g128".parse().unwrap());
        let loaded = Decoder::load(backend, case.spec(), &mut checkpoint, limits, scheme, &mut |_| ());
        let error = loaded.map(|_| ()).unwrap_err().to_string();
        // The first matrix that is packed is the embedding, which a scheme of four bits leaves in eight.
        assert!(error.contains("quantizing weights to a16w8-g32") && error.contains("cuda"), "{error}");
    }

    goldens!(in_f32, || backend(DType::F32, false), F32);
    goldens!(in_f16, || backend(DType::F16, false), F16);
    goldens!(in_bf16, || backend(DType::BF16, false), BF16);
    goldens!(deterministic_in_bf16, || backend(DType::BF16, true), BF16);
}
