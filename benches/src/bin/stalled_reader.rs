//! What a reader that never polls costs the others; see [`USAGE`].

#![expect(clippy::print_stdout, reason = "what it measures is its output")]

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::arguments::{self, ArgumentError, Arguments};
use dashinfer::{Engine, FinishReason, Request, TokenStream};
use futures::executor::block_on;
use futures::future::try_join_all;

const USAGE: &str = "\
usage: stalled_reader [OPTION ...]

Times 31 requests whose readers take every chunk at once, alone and beside one whose reader never polls, in turn. Prints both
medians, and what was lost: the median of the rounds' losses, with an interval that holds the true one 19 times in 20 or more
often. Exits with 0 if all of it is at most 2 %, with 1 if all of it is more, and with 3 if the machine was too busy to tell.

  --model FOLDER   a checkpoint (default: the bundled one)
  --tokens N       tokens of each request (default: 256)
  --rounds N       of each kind, at least 6 (default: 11)
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
            rounds: args.value("--rounds")?.unwrap_or(11),
            threads: args.value("--threads")?,
        };
        args.finish()?;
        if options.tokens == 0 || options.rounds < 6 {
            return Err(ArgumentError("--tokens is at least 1, and --rounds at least 6".to_owned()));
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

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// How many of the smallest and of the largest of `len` values to leave out, so that the rest spans their true median with a
/// probability of at least 95 %, whatever their distribution: that of more heads or tails than so many in `len` tosses.
fn outside(len: usize) -> usize {
    let (mut outside, mut ways, mut tail) = (0, 1.0, 0.0);
    loop {
        tail += ways / 2f64.powi(len as i32);
        if 2.0 * tail > 0.05 {
            return outside.max(1) - 1;
        }
        ways *= (len - outside) as f64 / (outside + 1) as f64;
        outside += 1;
    }
}

/// What the interval of the loss says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Kept,
    Lost,
    Unclear,
}

fn verdict(low: f64, high: f64) -> Verdict {
    match (low <= MAX_LOSS, high <= MAX_LOSS) {
        (_, true) => Verdict::Kept,
        (false, false) => Verdict::Lost,
        (true, false) => Verdict::Unclear,
    }
}

fn run(options: &Options) -> Result<Verdict, Box<dyn Error>> {
    let mut load = Engine::load(&options.model).prefix_cache(false).stream_buffer(STREAM_BUFFER);
    if let Some(threads) = options.threads {
        load = load.threads(threads);
    }
    let engine = load.blocking()?;
    fast_readers(&engine, options.tokens)?; // the first run touches memory for the first time
    let (mut alone, mut beside, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..options.rounds {
        // Each goes first in turn, so that neither always follows the other.
        let (a, b) = if round % 2 == 0 {
            let a = fast_readers(&engine, options.tokens)?;
            (a, beside_a_stalled_one(&engine, options.tokens)?)
        } else {
            let b = beside_a_stalled_one(&engine, options.tokens)?;
            (fast_readers(&engine, options.tokens)?, b)
        };
        alone.push(a);
        beside.push(b);
        losses.push(1.0 - b / a);
    }
    for values in [&mut alone, &mut beside, &mut losses] {
        values.sort_by(f64::total_cmp);
    }
    let skip = outside(losses.len());
    let (low, high) = (losses[skip], losses[losses.len() - 1 - skip]);
    println!("{NUM_FAST} fast readers alone             {:>10.1} tokens/s", median(&alone));
    println!("{NUM_FAST} fast readers beside a stalled  {:>10.1} tokens/s", median(&beside));
    let percent = [median(&losses), low, high, MAX_LOSS].map(|loss| 100.0 * loss);
    let [loss, low_percent, high_percent, most] = percent;
    println!("loss {loss:.2} %, within {low_percent:.2} to {high_percent:.2} % (at most {most:.0} % is wanted)");
    let verdict = verdict(low, high);
    if verdict == Verdict::Unclear {
        println!("the machine is too busy to tell: repeat it on a quiet one, or with more rounds");
    }
    Ok(verdict)
}

fn main() -> ExitCode {
    arguments::main("stalled_reader", USAGE, Options::parse, |options| {
        Ok(match run(&options)? {
            Verdict::Kept => ExitCode::SUCCESS,
            Verdict::Lost => ExitCode::FAILURE,
            Verdict::Unclear => ExitCode::from(3),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_sign_test() {
        // Tables of the sign test: of 6 values all, of 9 and 11 all but the outermost, of 20 the 6th to the 15th.
        let found = [6, 8, 9, 11, 12, 20].map(outside);
        assert_eq!(found, [0, 0, 1, 1, 2, 5]);
    }

    #[test]
    fn a_wide_interval_is_no_verdict() {
        assert_eq!(verdict(-0.01, 0.02), Verdict::Kept);
        assert_eq!(verdict(0.03, 0.05), Verdict::Lost);
        assert_eq!(verdict(-0.1, 0.1), Verdict::Unclear);
    }
}
