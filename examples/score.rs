//! Scores token sequences: logits of every position and a greedy continuation of each, from file to file.
//!
//! ```console
//! $ cargo run --release --example score -- MODEL in.safetensors out.safetensors
//! ```

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use dashinfer::{ComputeType, Device, Engine, Quantization};
use examples::score::{GREEDY_TOKENS, read_prompts, score, write};
use examples::{Args, Failure};

const USAGE: &str = "\
Scores token sequences: logits of every position and a greedy continuation of each.

score MODEL IN.safetensors OUT.safetensors [--device D] [--compute TYPE] [--quantize Q] [--weight-cache FOLDER] [--threads N]

For each tensor `prompt_i_ids` (int64, [T]) of IN, OUT gets
  prompt_i_logits      float32, [T, V]: the logits of every position
  prompt_i_greedy_ids  int64, [32]: the most likely tokens after the prompt, end tokens included.
                       Fewer where the model's context ends before, which is said on stderr.
Other tensors of IN are ignored, so the expected outputs of a golden can be its input. All logits are in memory at once.

  --device D       auto, cpu, cuda or cuda:N (default: auto)
  --compute TYPE   auto, f32, f16 or bf16: the type of activations (default: auto)
  --quantize Q     none (default), or a scheme for the weights: a16w8, a8w8, a16w4-g32, .. (docs/quantization.md); CPU only
  --weight-cache FOLDER
                   keeps packed weights there, and finds them again; CPU only (default: none)
  --threads N      threads that compute (default: one for each core)";

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = Args::from_env(USAGE);
    let device = args.option::<Device>("--device")?.unwrap_or_default();
    let compute = args.option::<ComputeType>("--compute")?.unwrap_or_default();
    let quantization = args.option::<Quantization>("--quantize")?.unwrap_or_default();
    let weight_cache = args.path("--weight-cache")?;
    let threads = args.option::<NonZeroUsize>("--threads")?;
    let model = PathBuf::from(args.word("MODEL")?);
    let input = PathBuf::from(args.word("IN.safetensors")?);
    let output = PathBuf::from(args.word("OUT.safetensors")?);
    args.end()?;

    let bytes = fs::read(&input).map_err(|error| format!("cannot read {}: {error}", input.display()))?;
    let prompts = read_prompts(&bytes).map_err(|error| format!("{}: {error:?}", input.display()))?;

    // The cache must hold one sequence of the whole context: no more of that than is needed.
    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    let mut load = Engine::load(model).device(device).compute(compute).quantize(quantization);
    load = load.max_context(longest + GREEDY_TOKENS);
    if let Some(folder) = weight_cache {
        load = load.weight_cache(folder);
    }
    if let Some(threads) = threads {
        load = load.threads(threads.get());
    }
    let engine = load.await?;
    let scored = score(&engine, prompts).await?;
    for scored in scored.iter().filter(|scored| scored.greedy_ids.len() < GREEDY_TOKENS) {
        let (name, found, context) = (&scored.name, scored.greedy_ids.len(), engine.model().context);
        eprintln!("{name}: {found} greedy tokens, not {GREEDY_TOKENS}: the model's context of {context} ends there");
    }
    write(&output, &scored)
}
