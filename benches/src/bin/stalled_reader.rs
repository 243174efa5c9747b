//! What a reader that never polls costs the others; see [`USAGE`].

#![expect(clippy::print_stdout, reason = "what it measures is its output")]

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::arguments::{ArgumentError, Arguments};
use dashinfer::{Engine, FinishReason, Request, TokenStream};
use futures::executor::block_on;
use futures::future::try_join_all;

const USAGE: &str = "\
usage: stalled_reader [OPTION ...]

Times 31 requests whose readers take every chunk at once, alone and beside one whose reader never polls, in turn. Prints both
medians and what was lost; exits with 1 if that is more than 2 %.

  --model FOLDER   a checkpoint (default: the bundled one)
  --tokens N       tokens of each request (default: 256)
  --rounds N       of each kind (default: 7)
  --threads N      threads that compute (default: one for each core)
";

/// The model that comes with the project.
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/ferris-7m");

const NUM_FAST: usize = 31;
/// Chunks that wait for the late reader: it is paused once they are there.
const STREAM_BUFFER: usize = 16;
const MAX_LOSS: f64 = 0.02;

struct Options {
    model: PathBuf,
    tokens: usize,
    rounds: usize,
    threads: Option<usize>,
}

impl Options {
    fn parse(mut args: Arguments) -> Result<Self, ArgumentError> {
        let options = Self {
            model: args.value("--model")?.unwrap_or_else(|| BUNDLED.into()),
            tokens: args.value("--tokens")?.unwrap_or(256),
            rounds: args.value("--rounds")?.unwrap_or(7),
            threads: args.value("--threads")?,
        };
        args.finish()?;
        if options.tokens == 0 || options.rounds == 0 {
            return Err(ArgumentError("--tokens and --rounds are at least 1".to_owned()));
        }
        Ok(options)
    }
}

/// A request that goes on to the end of the context.
fn request(index: usize) -> Request {
    let prompt: Vec<u32> = (0..16).map(|i| 100 + (index * 16 + i) as u32).collect();
    Request::tokens(prompt).temperature(0.0).ignore_eos()
}

/// Tokens per second of the fast readers.
fn fast_readers(engine: &Engine, tokens: usize) -> Result<f64, dashinfer::Error> {
    let start = Instant::now();
    let streams: Vec<_> = (0..NUM_FAST).map(|index| engine.generate(request(index).max_tokens(tokens))).collect();
    let completions = block_on(try_join_all(streams.into_iter().map(TokenStream::complete)))?;
    let seconds = start.elapsed().as_secs_f64();
    assert!(completions.iter().all(|completion| completion.finish.reason == FinishReason::Length));
    Ok((NUM_FAST * tokens) as f64 / seconds)
}

/// The same beside a request that nobody reads.
fn beside_a_stalled_one(engine: &Engine, tokens: usize) -> Result<f64, Box<dyn Error>> {
    let stalled = engine.generate(request(NUM_FAST));
    let start = Instant::now();
    while engine.stats().paused == 0 {
        if start.elapsed() > Duration::from_secs(30) {
            return Err("the engine does not pause a request that nobody reads".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let rate = fast_readers(engine, tokens)?;
    if engine.stats().paused != 1 {
        return Err("the request that nobody reads did not stay paused".into());
    }
    drop(stalled);
    Ok(rate)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run(options: &Options) -> Result<bool, Box<dyn Error>> {
    let mut load = Engine::load(&options.model).prefix_cache(false).stream_buffer(STREAM_BUFFER);
    if let Some(threads) = options.threads {
        load = load.threads(threads);
    }
    let engine = load.blocking()?;
    fast_readers(&engine, options.tokens)?; // the first run touches memory for the first time
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        alone.push(fast_readers(&engine, options.tokens)?);
        beside.push(beside_a_stalled_one(&engine, options.tokens)?);
    }
    let (alone, beside) = (median(&mut alone), median(&mut beside));
    let loss = 1.0 - beside / alone;
    println!("{NUM_FAST} fast readers alone             {alone:>10.1} tokens/s");
    println!("{NUM_FAST} fast readers beside a stalled  {beside:>10.1} tokens/s");
    println!("loss {:.2} % (at most {:.0} % is wanted)", 100.0 * loss, 100.0 * MAX_LOSS);
    Ok(loss <= MAX_LOSS)
}

fn main() -> ExitCode {
    let mut args = Arguments::from_process();
    if args.flag("--help") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("stalled_reader: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("stalled_reader: {error}");
            ExitCode::FAILURE
        }
    }
}
