//! Goes on from a prompt, and shows the text as it is generated.
//!
//! ```console
//! $ cargo run --release --example quickstart -- "Creates a new" --max-tokens 50
//! ```

use std::io::Write;
use std::num::NonZeroUsize;

use dashinfer::{Device, Engine, Quantization, Request};
use examples::{Args, BUNDLED_MODEL, Failure};
use futures::StreamExt;

const USAGE: &str = "\
Goes on from a prompt, and shows the text as it is generated.

quickstart [PROMPT] [--model PATH] [--device D] [--max-tokens N] [--quantize Q] [--weight-cache FOLDER] [--threads N]

  --model PATH     a Hugging Face checkpoint or a GGUF file (default: the bundled model)
  --device D       auto, cpu, cuda or cuda:N (default: a GPU if there is one and the feature `cuda`)
  --max-tokens N   stop after so many (default: 180)
  --quantize Q     none (default), or a scheme for the weights: a16w8, a8w8, a16w4-g32, .. (docs/quantization.md); CPU only
  --weight-cache FOLDER
                   keeps packed weights there, and finds them again; CPU only (default: none)
  --threads N      threads that compute (default: one for each core)";

const PROMPT: &str = "Concurrency in Rust means that";

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = Args::from_env(USAGE);
    let model = args.path("--model")?.unwrap_or_else(|| BUNDLED_MODEL.into());
    let max_tokens = args.option("--max-tokens")?.unwrap_or(180);
    let device = args.option::<Device>("--device")?.unwrap_or_default();
    let quantization = args.option::<Quantization>("--quantize")?.unwrap_or_default();
    let weight_cache = args.path("--weight-cache")?;
    let threads = args.option::<NonZeroUsize>("--threads")?;
    let prompt = args.text()?.unwrap_or_else(|| PROMPT.to_owned());

    let mut load = Engine::load(model).device(device).quantize(quantization);
    if let Some(folder) = weight_cache {
        load = load.weight_cache(folder);
    }
    if let Some(threads) = threads {
        load = load.threads(threads.get());
    }
    let engine = load.await?;

    let mut out = std::io::stdout();
    write!(out, "{prompt}")?;
    out.flush()?;
    let mut tokens = engine.generate(Request::text(prompt).max_tokens(max_tokens));
    while let Some(chunk) = tokens.next().await {
        let chunk = chunk?;
        write!(out, "{}", chunk.text)?;
        out.flush()?;
        if let Some(finish) = chunk.finish {
            writeln!(out)?;
            let usage = finish.usage;
            // The first token is the prompt's; the others are decoded one after another.
            let decoding = (usage.total - usage.time_to_first_token).as_secs_f64();
            let per_second = (usage.generated_tokens - 1) as f64 / decoding.max(f64::EPSILON);
            eprintln!(
                "\n{}: {} tokens after a prompt of {}: the first in {:.1?}, then {per_second:.0} tokens/s",
                engine.model().device,
                usage.generated_tokens,
                usage.prompt_tokens,
                usage.time_to_first_token,
            );
        }
    }
    Ok(())
}
