//! Serves some hundred requests at once through `Engine::generate_stream`, and says how that went.
//!
//! ```console
//! $ cargo run --release --example many -- --requests 500 --memory-limit 120M
//! ```

use std::io::{IsTerminal, Write};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use dashinfer::{Engine, Quantization, Request, Usage};
use examples::{Args, BUNDLED_MODEL, Bytes, Failure};
use futures::{StreamExt, stream};

const USAGE: &str = "\
Serves some hundred requests at once, and says how that went.

many [--requests N] [--max-tokens N] [--model PATH] [--memory-limit BYTES] [--quantize Q] [--weight-cache FOLDER] [--threads N]

  --requests N          how many (default: 300)
  --max-tokens N        tokens that each of them generates at most (default: 64)
  --model PATH          a Hugging Face checkpoint or a GGUF file (default: the bundled model)
  --memory-limit BYTES  for weights, activations and KV cache together; K, M and G are understood.
                        A small one makes sequences give their blocks back and start again (preemptions)
  --quantize Q          none (default), or a scheme for the weights: a16w8, a8w8, a16w4-g32, .. (docs/quantization.md); CPU only
  --weight-cache FOLDER
                        keeps packed weights there, and finds them again; CPU only (default: none)
  --threads N           threads that compute (default: one for each core)";

/// All prompts begin with this: it is computed once, and then found in the prefix cache.
const PREFIX: &str = "\
# Module collections

Collection types. Rust’s standard collection library provides efficient implementations of the most common general purpose \
programming data structures. By using the standard implementations, it should be possible for two libraries to communicate \
without significant data conversion.

To get this out of the way: you should probably just use `Vec` or `HashMap`. These two collections cover most use cases for generic \
data storage and processing. They are exceptionally good at doing what they do. All the other collections in the standard \
library have specific use cases where they are the optimal choice, but these cases are borderline niche in comparison.

";

const SUBJECTS: [&str; 8] =
    ["Vec", "VecDeque", "LinkedList", "HashMap", "BTreeMap", "HashSet", "BTreeSet", "BinaryHeap"];
const TASKS: [&str; 5] =
    ["Creates an empty", "Removes an element from the", "Sorts the", "Iterates over the", "Clones the"];

fn prompt(number: usize) -> String {
    let (subject, task) = (SUBJECTS[number % SUBJECTS.len()], TASKS[number % TASKS.len()]);
    format!("{PREFIX}## {subject}, example {number}\n\n{task} `{subject}`")
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = Args::from_env(USAGE);
    let num_requests = args.option("--requests")?.unwrap_or(300);
    let max_tokens = args.option("--max-tokens")?.unwrap_or(64);
    let model = args.path("--model")?.unwrap_or_else(|| BUNDLED_MODEL.into());
    let memory_limit = args.option("--memory-limit")?;
    let quantization = args.option::<Quantization>("--quantize")?.unwrap_or_default();
    let weight_cache = args.path("--weight-cache")?;
    let threads = args.option::<NonZeroUsize>("--threads")?;
    args.end()?;

    let mut load = Engine::load(model).quantize(quantization);
    if let Some(Bytes(limit)) = memory_limit {
        load = load.memory_limit(limit);
    }
    if let Some(folder) = weight_cache {
        load = load.weight_cache(folder);
    }
    if let Some(threads) = threads {
        load = load.threads(threads.get());
    }
    let engine = load.await?;

    // Requests are taken from the iterator as there is room for them, so it could be endless.
    let requests = (0..num_requests).map(|number| Request::text(prompt(number)).max_tokens(max_tokens));
    let mut chunks = engine.generate_stream(stream::iter(requests));
    let started = Instant::now();
    let mut usages = Vec::new();
    let mut bar = Bar::new(num_requests);
    while let Some(tagged) = chunks.next().await {
        let chunk = tagged.chunk.map_err(|error| format!("request {}: {error}", tagged.index))?;
        usages.extend(chunk.finish.map(|finish| finish.usage));
        bar.show(usages.len());
    }
    let took = started.elapsed();
    bar.clear();
    summarize(&mut std::io::stdout(), &engine, &usages, took)
}

fn summarize(out: &mut impl Write, engine: &Engine, usages: &[Usage], took: Duration) -> Result<(), Failure> {
    let sum = |field: fn(&Usage) -> usize| usages.iter().map(field).sum::<usize>();
    let (prompt, cached, generated) = (sum(|u| u.prompt_tokens), sum(|u| u.cached_tokens), sum(|u| u.generated_tokens));
    let per_second = |tokens: usize| tokens as f64 / took.as_secs_f64().max(f64::EPSILON);
    let mut waits: Vec<Duration> = usages.iter().map(|usage| usage.time_to_first_token).collect();
    waits.sort_unstable();
    let quantile = |q: f64| waits.get((waits.len() as f64 * q) as usize).or(waits.last()).copied().unwrap_or_default();
    let stats = engine.stats();
    let share = 100.0 * cached as f64 / prompt.max(1) as f64;

    writeln!(out, "requests             {} in {took:.2?}", usages.len())?;
    writeln!(out, "generated            {generated} tokens, {:.0} tokens/s", per_second(generated))?;
    writeln!(out, "prompts              {prompt} tokens, {cached} of them from the prefix cache ({share:.0} %)")?;
    writeln!(out, "time to first token  median {:.1?}, p99 {:.1?}", quantile(0.5), quantile(0.99))?;
    writeln!(
        out,
        "steps                {} of {:.1} tokens",
        stats.steps,
        stats.computed_tokens as f64 / stats.steps.max(1) as f64
    )?;
    writeln!(out, "preemptions          {}", stats.preemptions)?;
    Ok(())
}

/// A line on stderr that is written over and over; nothing where stderr is not a terminal.
struct Bar {
    total: usize,
    shown: Option<Instant>,
    visible: bool,
}

impl Bar {
    const WIDTH: usize = 40;
    const PAUSE: Duration = Duration::from_millis(50);

    fn new(total: usize) -> Self {
        Self { total, shown: None, visible: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, done: usize) {
        if !self.visible || (done < self.total && self.shown.is_some_and(|shown| shown.elapsed() < Self::PAUSE)) {
            return;
        }
        self.shown = Some(Instant::now());
        let filled = done * Self::WIDTH / self.total.max(1);
        eprint!("\r[{:<width$}] {done}/{}", "#".repeat(filled), self.total, width = Self::WIDTH);
    }

    fn clear(&self) {
        if self.visible {
            eprint!("\r{:width$}\r", "", width = Self::WIDTH + 24);
        }
    }
}
