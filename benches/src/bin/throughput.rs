//! Tokens per second of the engine, beside what the machine allows; see [`USAGE`].

#![expect(clippy::print_stdout, reason = "what it measures is its output")]

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use benches::arguments::{self, ArgumentError, Arguments};
use benches::limits::{Limits, rate};
use benches::rss;
use benches::work::{ElementBytes, Work};
use dashinfer::{
    ComputeType, Device, Engine, EngineStats, FinishReason, KvCacheType, Quantization, Request, Scheme, Source,
    TokenStream, WeightType,
};
use dashinfer_kernels::DType;
use dashinfer_kernels::cpu::Isa;
use dashinfer_models::{Checkpoint, ModelSpec, StoredType, WeightSource, shapes};
use futures::executor::block_on;
use futures::future::try_join_all;
use serde_json::json;

const USAGE: &str = "\
usage: throughput --shape NAME | --model FOLDER [OPTION ...]

Times the engine with prompts of random token ids, greedy, with end tokens ignored and the prefix cache off.

  --shape NAME          a published shape, filled with random weights in memory (qwen2.5-0.5b, ..)
  --weights TYPE        f32, f16 or bf16; of a shape (default: bf16)
  --tied-experts        all tokens get the same experts (of a shape; default: they are chosen evenly)
  --model FOLDER        a checkpoint instead of a shape
  --device NAME         cpu (default), cuda or cuda:N
  --quantize SCHEME     quantizes weights: a16w8, a16w8-g32, a8w8, a16w4-g32, a16w4-g128-zp, a8w4-g32, ..,
                        4-bit ones with +gptq behind them too (default: no)
  --quantize-vocabulary SCHEME
                        the embedding and the head by this one, or `none` (default: what --quantize makes of them)
  --weight-cache FOLDER keeps packed weights there, and finds them again; CPU only (default: none)
  --compute TYPE        auto, f32, f16 or bf16: the type of activations (default: auto)
  --deterministic       results that do not depend on the batch (the CPU's never do)
  --threads N           threads that compute (default: one for each core)
  --prefill BxL,..      for each, the time of B prompts of L tokens with one token out; best of 3
  --decode B,..         for each, the time of B prompts of 128 tokens with 136 tokens out, less that with 8 out;
                        best of 2 of each
  --decode-context N    decode behind prompts of N tokens, 72 out less 8 out (also --context)
  --repeat N            best of N instead
  --kv-cache TYPE       f32, f16, bf16, int8 or uint4 (default: the engine's)
  --isa NAME            kernels of this instruction set at most: scalar, avx2 or avx512 (default: the machine's best)
  --step-tokens N       the most tokens of a step (default: the engine's)
  --json                one JSON object for each measurement on a line

Without --prefill and --decode: --prefill 1x256 --decode 1,8.
The limit is reading the weights (and, for a decode, the cache) once per step at the memory's bandwidth, or the operations at
the peak of f32 multiply-adds, whichever takes longer. Both are measured first, with as many threads.
On the CPU, bytes/token of a decode are those of matrices and panels of experts as they are counted where they are multiplied with, and those of
the cache; the minimum has the weights that every token needs, the experts that the rows of a step chose, each once, and the cache.
Of models whose sizes are no multiples of 32 it is too high: it takes what pads experts for weights that every token needs.
";

/// Prompts of a prefill: `BxL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prompts {
    batch: NonZeroUsize,
    length: NonZeroUsize,
}

impl FromStr for Prompts {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "wanted is BxL, such as 1x256";
        let (batch, length) = text.split_once('x').ok_or(WANTED)?;
        Ok(Self { batch: batch.parse().map_err(|_| WANTED)?, length: length.parse().map_err(|_| WANTED)? })
    }
}

/// A type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Float(DType);

impl FromStr for Float {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [DType::F32, DType::F16, DType::BF16];
        known.into_iter().find(|dtype| dtype.name() == text).map(Self).ok_or("known are f32, f16 and bf16")
    }
}

/// A scheme, or that there is none.
struct Vocabulary(Option<Scheme>);

impl FromStr for Vocabulary {
    type Err = <Scheme as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|scheme| Self(Some(scheme))) }
    }
}

/// An instruction set.
struct Kernels(Isa);

impl FromStr for Kernels {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == text)
            .map(Self)
            .ok_or("known are scalar, avx2, avx512, avx512vnni, avx512bf16, amx, neon, dotprod, i8mm and sve")
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Model {
    Shape { name: String, dtype: DType, tied_experts: bool },
    Folder(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Options {
    model: Model,
    device: Device,
    compute: ComputeType,
    quantization: Quantization,
    weight_cache: Option<PathBuf>,
    deterministic: bool,
    threads: NonZeroUsize,
    prefill: Vec<Prompts>,
    decode: Vec<NonZeroUsize>,
    decode_context: NonZeroUsize,
    repeat: Option<NonZeroUsize>,
    kv_cache: Option<KvCacheType>,
    step_tokens: Option<NonZeroUsize>,
    isa: Isa,
    json: bool,
}

impl Options {
    fn parse(mut args: Arguments) -> Result<Self, ArgumentError> {
        let wrong = |message: &str| Err(ArgumentError(message.to_owned()));
        let weights = args.value::<Float>("--weights")?;
        let tied_experts = args.flag("--tied-experts");
        let model = match (args.value::<String>("--shape")?, args.value::<PathBuf>("--model")?) {
            (Some(shape), None) if shapes::named(&shape).is_none() => {
                let known: Vec<_> = shapes::names().collect();
                return wrong(&format!("--shape {shape}: known are {}", known.join(", ")));
            }
            (Some(shape), None) => {
                let dtype = weights.map_or(DType::BF16, |Float(dtype)| dtype);
                Model::Shape { name: shape, dtype, tied_experts }
            }
            (None, Some(_)) if weights.is_some() => return wrong("--weights is for a --shape; a --model has its own"),
            (None, Some(folder)) => Model::Folder(folder),
            _ => return wrong("one of --shape and --model is wanted"),
        };
        let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let context = [args.value("--decode-context")?, args.value("--context")?];
        if let [Some(_), Some(_)] = context {
            return wrong("--context and --decode-context are the same");
        }
        let mut quantization = args.value::<Quantization>("--quantize")?.unwrap_or(Quantization::AS_STORED);
        if let Some(Vocabulary(scheme)) = args.value("--quantize-vocabulary")? {
            quantization = quantization.vocabulary(scheme);
        }
        const USUAL: NonZeroUsize = NonZeroUsize::new(128).expect("it is not 0");
        let mut options = Self {
            model,
            device: args.value("--device")?.unwrap_or(Device::Cpu),
            compute: args.value("--compute")?.unwrap_or_default(),
            quantization,
            weight_cache: args.value("--weight-cache")?,
            deterministic: args.flag("--deterministic"),
            threads: args.value("--threads")?.unwrap_or_else(cores),
            prefill: args.list("--prefill")?.unwrap_or_default(),
            decode: args.list("--decode")?.unwrap_or_default(),
            decode_context: context.into_iter().flatten().next().unwrap_or(USUAL),
            repeat: args.value("--repeat")?,
            kv_cache: args.value("--kv-cache")?,
            step_tokens: args.value("--step-tokens")?,
            isa: args.value::<Kernels>("--isa")?.map_or_else(Isa::best, |Kernels(isa)| isa),
            json: args.flag("--json"),
        };
        args.finish()?;
        if options.prefill.is_empty() && options.decode.is_empty() {
            options.prefill = vec!["1x256".parse().expect("it is of this form")];
            options.decode = vec![NonZeroUsize::MIN, NonZeroUsize::MIN.saturating_add(7)];
        }
        Ok(options)
    }

    /// The most tokens that a decode generates, and how many of them do not count.
    fn decode_tokens(&self) -> (usize, usize) {
        if self.decode_context.get() == 128 { (136, 8) } else { (72, 8) }
    }

    /// Batch size, and tokens of each sequence at its end, of every measurement and of the run before them.
    fn sequences(&self) -> impl Iterator<Item = (usize, usize)> {
        let prefill = self.prefill.iter().map(|prompts| (prompts.batch.get(), prompts.length.get() + 1));
        let decoded = self.decode_context.get() + self.decode_tokens().0;
        let decode = self.decode.iter().map(move |batch| (batch.get(), decoded));
        [(1, 18)].into_iter().chain(prefill).chain(decode)
    }
}

/// A loaded engine, and what to compare it with.
struct Bench {
    options: Options,
    engine: Engine,
    work: Work,
    limits: Limits,
    /// Of the weights.
    dtype: DType,
    /// When loading began.
    start: Instant,
}

/// One line of the output.
struct Measured {
    what: &'static str,
    batch: usize,
    /// Of the prompts.
    length: usize,
    tokens: usize,
    time: Duration,
    bytes: f64,
    flops: f64,
    /// What was counted, where it was.
    reads: Option<Reads>,
}

/// Bytes of weights and cache that some steps have read, and the least that they had to.
#[derive(Debug, Clone, Copy)]
struct Reads {
    /// Of weights, as counted where they are multiplied with; of the cache, by the lengths of sequences.
    bytes: f64,
    /// All weights but those of experts and those of the experts that rows chose, once in a step; the cache.
    least: f64,
}

impl Bench {
    fn new(options: Options) -> Result<Self, Box<dyn Error>> {
        let threads = options.threads.get();
        let limits = match options.device {
            Device::Cpu => Limits::measure(threads, options.isa),
            _ => Limits::measure_cuda(options.device)?,
        };
        // What was just measured took more memory than a small model does.
        rss::reset_peak();

        let start = Instant::now();
        let (source, spec, dtype) = open(&options.model)?;
        let max_batch = options.sequences().map(|(batch, _)| batch).max().unwrap_or(1);
        let max_context = options.sequences().map(|(_, tokens)| tokens).max().unwrap_or(1);
        let mut load = Engine::load(source)
            .device(options.device)
            .compute(options.compute)
            .quantize(options.quantization)
            .deterministic(options.deterministic)
            .isa(options.isa)
            .threads(threads)
            .prefix_cache(false)
            .max_batch(max_batch)
            .max_context(max_context);
        if let Some(folder) = &options.weight_cache {
            load = load.weight_cache(folder);
        }
        let usual = if options.device == Device::Cpu { Some(512.max(max_batch)) } else { None };
        if let Some(step_tokens) = options.step_tokens.map(|tokens| tokens.get().max(max_batch)).or(usual) {
            load = load.max_step_tokens(step_tokens);
        }
        if let Some(kv_cache) = options.kv_cache {
            load = load.kv_cache(kv_cache);
        }
        // Room for every sequence to its end: a preempted one would be computed twice. Blocks have 32 tokens.
        let cached = options.sequences().map(|(batch, tokens)| batch * tokens.next_multiple_of(32)).max().unwrap_or(0);
        let kv_bytes_per_token = load.estimate()?.kv_bytes_per_token;
        let engine = load.kv_cache_bytes(cached as u64 * kv_bytes_per_token).blocking()?;
        let bytes_in = |scheme: Option<Scheme>| {
            scheme.map_or(dtype.size_bytes() as f64, |scheme| scheme.bits_per_weight(spec.hidden_size) / 8.0)
        };
        let element_bytes = ElementBytes {
            vocabulary: bytes_in(options.quantization.vocabulary_scheme()),
            layers: bytes_in(options.quantization.layers_scheme()),
        };
        let work = Work::new(&spec, engine.model().weight_bytes, element_bytes, kv_bytes_per_token);
        let bench = Self { options, engine, work, limits, dtype, start };
        if !bench.options.json {
            bench.print_head(start.elapsed());
        }
        Ok(bench)
    }

    fn print_head(&self, load_time: Duration) {
        println!(
            "{}, {} weights, {}, {} threads, loaded in {:.2} s",
            self.name(),
            self.weights(),
            self.engine.model().device,
            self.options.threads,
            load_time.as_secs_f64()
        );
        println!("one token reads {:.1} MB of weights", self.work.step_bytes(1) / 1e6);
        if self.options.weight_cache.is_some() {
            println!("weights from: {:?}", self.engine.model().weights_from);
        }
        for conversion in &self.engine.model().conversions {
            println!("{conversion}");
        }
        let what = match self.options.device {
            Device::Cpu => format!("f32 multiply-adds ({:?})", self.options.isa),
            _ => "a product of bf16 matrices".to_owned(),
        };
        println!(
            "limits: {:.1} GB/s read, {:.1} GFLOP/s of {what}",
            self.limits.bytes_per_second / 1e9,
            self.limits.flops_per_second / 1e9,
        );
        if let Some(ops) = self.limits.tile_ops_per_second {
            println!("        {:.1} TOP/s of int8 in tiles", ops / 1e12);
        }
    }

    /// The scheme of the layers, or the stored type.
    fn weights(&self) -> String {
        self.options.quantization.layers_scheme().map_or_else(|| self.dtype.to_string(), |scheme| scheme.to_string())
    }

    fn name(&self) -> String {
        match &self.options.model {
            Model::Shape { name, tied_experts: false, .. } => name.clone(),
            Model::Shape { name, tied_experts: true, .. } => format!("{name} with tied experts"),
            Model::Folder(folder) => folder.display().to_string(),
        }
    }

    fn run(&self) -> Result<(), Box<dyn Error>> {
        self.best_of(1, &self.prompts(1, 16), 1)?;
        if !self.options.json {
            println!("first token {:.2} s after loading began\n", self.start.elapsed().as_secs_f64());
        }
        // The first steps touch memory for the first time.
        self.best_of(1, &self.prompts(1, 16), 2)?;
        for &Prompts { batch, length } in &self.options.prefill {
            self.report(&self.prefill(batch.get(), length.get())?);
        }
        for batch in &self.options.decode {
            self.report(&self.decode(batch.get())?);
        }
        if self.engine.stats().preemptions > 0 {
            return Err("sequences were preempted, and computed twice: the cache is too small".into());
        }
        if !self.options.json {
            if self.options.device != Device::Cpu {
                self.print_host();
            }
            self.print_memory();
        }
        Ok(())
    }

    fn prefill(&self, batch: usize, length: usize) -> Result<Measured, dashinfer::Error> {
        let prompts = self.prompts(batch, length);
        let time = self.best_of(self.repeat(3), &prompts, 1)?;
        let flops = self.work.prefill_flops(batch, length);
        // As if all rows were one step's.
        let bytes = self.work.step_bytes(batch * length);
        Ok(Measured { what: "prefill", batch, length, tokens: batch * length, time, bytes, flops, reads: None })
    }

    fn decode(&self, batch: usize) -> Result<Measured, Box<dyn Error>> {
        let length = self.options.decode_context.get();
        let prompts = self.prompts(batch, length);
        let (most, least) = self.options.decode_tokens();
        let repeat = self.repeat(2);
        let before = self.engine.stats();
        let long = self.best_of(repeat, &prompts, most)?;
        let between = self.engine.stats();
        let short = self.best_of(repeat, &prompts, least)?;
        let after = self.engine.stats();
        let Some(time) = long.checked_sub(short).filter(|time| !time.is_zero()) else {
            return Err(format!("{most} tokens took no longer than {least}: the machine is too busy").into());
        };
        // A step that samples token `i` (from 1) of a sequence sees the prompt and the `i - 1` tokens before.
        let context = length as f64 + (least + most - 1) as f64 / 2.0;
        let steps = (most - least) as f64;
        let bytes = steps * self.work.decode_bytes(batch, context);
        let flops = steps * self.work.decode_flops(batch, context);
        // The runs differ in the decodes that count.
        let decodes = |count: fn(&EngineStats) -> u64| {
            let (long, short) = (count(&between) - count(&before), count(&after) - count(&between));
            (long as f64 - short as f64) / repeat as f64
        };
        let matrices = decodes(|stats| stats.matrix_bytes_read);
        let cache = steps * self.work.cache_bytes(batch, context);
        let reads = (self.options.device == Device::Cpu).then(|| Reads {
            bytes: matrices + decodes(|stats| stats.expert_bytes_read) + cache,
            least: steps * self.work.dense_bytes() + decodes(|stats| stats.expert_bytes_chosen) + cache,
        });
        Ok(Measured { what: "decode", batch, length, tokens: batch * (most - least), time, bytes, flops, reads })
    }

    fn repeat(&self, usual: usize) -> usize {
        self.options.repeat.map_or(usual, NonZeroUsize::get)
    }

    fn prompts(&self, batch: usize, length: usize) -> Vec<Vec<u32>> {
        let vocab_size = self.engine.model().vocab_size as u64;
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        let mut id = || {
            // The generator of Knuth's MMIX; its upper bits are the good ones.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab_size) as u32
        };
        (0..batch).map(|_| (0..length).map(|_| id()).collect()).collect()
    }

    /// The shortest of some times from the first request to the last of all tokens.
    fn best_of(&self, repeat: usize, prompts: &[Vec<u32>], num_tokens: usize) -> Result<Duration, dashinfer::Error> {
        let mut best = Duration::MAX;
        for _ in 0..repeat {
            let request = |prompt: &Vec<u32>| {
                let request = Request::tokens(prompt.as_slice()).max_tokens(num_tokens).ignore_eos();
                request.temperature(0.0).repetition_penalty(1.0)
            };
            let requests: Vec<_> = prompts.iter().map(request).collect();
            let start = Instant::now();
            let streams = requests.into_iter().map(|request| self.engine.generate(request));
            // Collected, so that all requests are known before the first chunk is waited for.
            let streams: Vec<_> = streams.collect();
            let completions = block_on(try_join_all(streams.into_iter().map(TokenStream::complete)))?;
            best = best.min(start.elapsed());
            for completion in completions {
                assert_eq!(completion.finish.reason, FinishReason::Length);
                assert_eq!(completion.tokens.len(), num_tokens, "nothing else ends these requests");
            }
        }
        Ok(best)
    }

    fn report(&self, measured: &Measured) {
        let &Measured { what, batch, length, tokens, time, bytes, flops, reads } = measured;
        let seconds = time.as_secs_f64();
        let limit = self.limits.of(bytes, flops);
        let fraction = limit.seconds() / seconds;
        let tokens_per_second = tokens as f64 / seconds;
        if self.options.json {
            let line = json!({
                "what": what,
                "shape": self.name(),
                "weights": self.weights(),
                "device": self.engine.model().device,
                "threads": self.options.threads,
                "batch": batch,
                "length": length,
                "tokens_per_second": tokens_per_second,
                "seconds": seconds,
                "bytes_per_second": bytes / seconds,
                "bytes_per_token": bytes / tokens as f64,
                "bytes_read_per_token": reads.map(|reads| reads.bytes / tokens as f64),
                "least_bytes_per_token": reads.map(|reads| reads.least / tokens as f64),
                "flops_per_second": flops / seconds,
                "limit": limit.name(),
                "isa": self.options.isa.name(),
                "deterministic": self.options.deterministic,
                "fraction_of_limit": fraction,
                "machine_bytes_per_second": self.limits.bytes_per_second,
                "machine_flops_per_second": self.limits.flops_per_second,
                "machine_tile_ops_per_second": self.limits.tile_ops_per_second,
                "weight_bytes": self.engine.model().weight_bytes,
                "kv_cache_bytes": self.engine.model().kv_cache_bytes,
                "rss_bytes": rss::current_bytes(),
                "peak_rss_bytes": rss::peak_bytes(),
            });
            println!("{line}");
            return;
        }
        let name = format!("{what}/{}/{batch}x{length}", self.weights());
        let rate = rate(limit, bytes, flops, seconds);
        let (percent, limit) = (100.0 * fraction, limit.name());
        println!("{name:<24} {tokens_per_second:>10.1} tokens/s {rate:>16} {percent:>4.0} % of {limit}");
        if let Some(Reads { bytes, least }) = reads {
            let [read, minimum] = [bytes, least].map(|bytes| bytes / tokens as f64 / 1e6);
            println!("{:<24} bytes/token: {read:.1} MB (minimum {minimum:.1} MB, {:.3} x)", "", bytes / least);
        }
    }

    /// What the host did beside the device, and whether the device waited for it.
    fn print_host(&self) {
        let stats = self.engine.stats();
        let per_step = |time: Duration| time.as_secs_f64() * 1e6 / stats.steps.max(1) as f64;
        let (plan, submit) = (per_step(stats.plan_time), per_step(stats.submit_time));
        let (starved, time) = (stats.starved_steps, stats.starved_time.as_secs_f64() * 1e3);
        println!("\n{} steps; the host took {plan:.0} µs to plan and {submit:.0} µs to submit each", stats.steps);
        println!("the device had nothing to do before {starved} of them, for {time:.1} ms in all");
    }

    fn print_memory(&self) {
        let model = self.engine.model();
        let show = |name, bytes: Option<u64>| match bytes {
            Some(bytes) => println!("{name:<24} {:>10.1} MB", bytes as f64 / 1e6),
            None => println!("{name:<24} {:>10}", "unknown"),
        };
        println!();
        show("weights", Some(model.weight_bytes));
        show("KV cache", Some(model.kv_cache_bytes));
        show("resident", rss::current_bytes());
        show("peak resident", rss::peak_bytes());
    }
}

/// Where the weights come from, what the model is, and the type of most of its weights.
fn open(model: &Model) -> Result<(Source, ModelSpec, DType), Box<dyn Error>> {
    match model {
        Model::Shape { name, dtype, tied_experts } => {
            let spec = shapes::named(name).ok_or("this shape is not known")?;
            let weight_type = match dtype {
                DType::F32 => WeightType::F32,
                DType::F16 => WeightType::F16,
                DType::BF16 => WeightType::BF16,
            };
            Ok((Source::random(name).weight_type(weight_type).tied_experts(*tied_experts), spec, *dtype))
        }
        Model::Folder(folder) => {
            let spec = ModelSpec::read(folder)?;
            let embedding = Checkpoint::open(folder)?.info("model.embed_tokens.weight");
            let dtype = match embedding.map(|info| info.dtype) {
                Some(StoredType::Float(dtype)) => dtype,
                _ => return Err("the embedding is not of a type that this program knows".into()),
            };
            Ok((Source::Folder(folder.clone()), spec, dtype))
        }
    }
}

fn main() -> ExitCode {
    arguments::main("throughput", USAGE, Options::parse, |options| {
        Bench::new(options)?.run()?;
        Ok(ExitCode::SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Options, String> {
        Options::parse(Arguments::new(args.split_whitespace())).map_err(|error| error.to_string())
    }

    #[test]
    fn measurements_are_read_or_the_usual_ones_are_made() {
        let options = parse("--shape qwen2.5-0.5b --weights f16 --prefill 1x8192,16x1024 --threads 3 --json").unwrap();
        let name = "qwen2.5-0.5b".into();
        assert_eq!(options.model, Model::Shape { name, dtype: DType::F16, tied_experts: false });
        let sizes: Vec<_> = options.prefill.iter().map(|p| (p.batch.get(), p.length.get())).collect();
        assert_eq!(sizes, [(1, 8192), (16, 1024)]);
        assert!(options.decode.is_empty() && options.json);
        assert_eq!(options.threads.get(), 3);

        let usual = parse("--model somewhere").unwrap();
        assert_eq!(usual.sequences().collect::<Vec<_>>(), [(1, 18), (1, 257), (1, 264), (8, 264)]);
        let long = parse("--shape qwen2.5-7b --decode 64 --decode-context 2048").unwrap();
        assert_eq!(long.sequences().collect::<Vec<_>>(), [(1, 18), (64, 2120)]);
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let check = |args: &str, expected: &str| assert_eq!(parse(args).unwrap_err(), expected);
        check("", "one of --shape and --model is wanted");
        check("--shape a --model b", "one of --shape and --model is wanted");
        let known = shapes::names().collect::<Vec<_>>().join(", ");
        check("--shape gpt-2", &format!("--shape gpt-2: known are {known}"));
        check("--model b --weights f16", "--weights is for a --shape; a --model has its own");
        check("--model b --device tpu", "--device tpu: known are auto, cpu, cuda and cuda:N");
        check("--model b --weights int3", "--weights int3: known are f32, f16 and bf16");
        check("--model b --prefill 256", "--prefill 256: in `256`: wanted is BxL, such as 1x256");
        check("--model b --decode 0", "--decode 0: in `0`: number would be zero for non-zero type");
        check("--model b --context 5 --decode-context 6", "--context and --decode-context are the same");
        check("--model b --fast", "`--fast` is not an option, or was given before");
    }
}
