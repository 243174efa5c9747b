//! A conversation in the terminal. Ctrl-C ends an answer; at the prompt it ends the program, as the end of the input does.
//!
//! ```console
//! $ cargo run --release --example chat -- --model path/to/Qwen2.5-0.5B-Instruct
//! ```

#![allow(clippy::print_stdout, reason = "a conversation is output")]

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::pin::pin;

use dashinfer::{ChatOptions, Engine, Error, FinishReason, Message, Quantization, Request, RequestError};
use examples::{Args, BUNDLED_MODEL, Failure, History};
use futures::StreamExt;
use tokio::signal::ctrl_c;
use tokio::sync::mpsc;

const USAGE: &str = "\
A conversation. Ctrl-C ends an answer; at the prompt it ends the program, as the end of the input does.

chat [--model PATH] [--system TEXT] [--max-tokens N] [--temperature T] [--quantize Q] [--weight-cache FOLDER] [--threads N]

  --model PATH     a Hugging Face checkpoint or a GGUF file, with a chat template (default: the bundled model,
                   which knows one question: Explain error E0382.)
  --system TEXT    what the model is told about its task
  --max-tokens N   tokens of an answer at most (default: 400)
  --temperature T  0 is greedy (default: the checkpoint's)
  --quantize Q     none (default), or a scheme for the weights: a16w8, a8w8, a16w4-g32, .. (docs/quantization.md); CPU only
  --weight-cache FOLDER
                   keeps packed weights there, and finds them again; CPU only (default: none)
  --threads N      threads that compute (default: one for each core)";

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = Args::from_env(USAGE);
    let model = args.path("--model")?.unwrap_or_else(|| BUNDLED_MODEL.into());
    let mut history = History::new(args.option("--system")?);
    let max_tokens: usize = args.option("--max-tokens")?.unwrap_or(400);
    let temperature = args.option("--temperature")?;
    let quantization = args.option::<Quantization>("--quantize")?.unwrap_or_default();
    let weight_cache = args.path("--weight-cache")?;
    let threads = args.option::<NonZeroUsize>("--threads")?;
    args.end()?;

    let mut load = Engine::load(model).quantize(quantization);
    if let Some(folder) = weight_cache {
        load = load.weight_cache(folder);
    }
    if let Some(threads) = threads {
        load = load.threads(threads.get());
    }
    let engine = load.await?;
    let max_prompt = engine.model().context.saturating_sub(max_tokens);
    let mut lines = lines_of_stdin();

    while let Some(line) = ask(&mut lines).await? {
        if line.trim().is_empty() {
            continue;
        }
        history.push(Message::user(line));
        let forgotten = history.fit(max_prompt, |messages| num_tokens(&engine, messages))?;
        if forgotten > 0 {
            eprintln!("(the context is full: {forgotten} old messages are forgotten)");
        }
        let mut request = Request::chat(history.messages().to_vec()).max_tokens(max_tokens);
        if let Some(temperature) = temperature {
            request = request.temperature(temperature);
        }
        match answer(&engine, request).await {
            Ok(said) => history.push(Message::assistant(said)),
            Err(Error::Request(error @ RequestError::PromptTooLong { .. })) => {
                eprintln!("{error}");
                history.pop();
            }
            Err(error) => return Err(error.into()),
        }
    }
    println!();
    Ok(())
}

/// Shows the answer as it comes. Ends early on Ctrl-C, with what was said until then: the dropped stream cancels the request.
async fn answer(engine: &Engine, request: Request) -> Result<String, Error> {
    let mut tokens = engine.generate(request);
    let mut interrupt = pin!(ctrl_c());
    let mut said = String::new();
    loop {
        let chunk = tokio::select! {
            biased;
            _ = &mut interrupt => {
                println!(" ...");
                return Ok(said);
            }
            chunk = tokens.next() => match chunk {
                Some(chunk) => chunk?,
                None => return Ok(said),
            },
        };
        print!("{}", chunk.text);
        flush();
        said.push_str(&chunk.text);
        if let Some(finish) = chunk.finish {
            println!("{}", if finish.reason == FinishReason::Length { " ..." } else { "" });
            return Ok(said);
        }
    }
}

/// The next line; `None` at the end of the input and on Ctrl-C.
async fn ask(lines: &mut mpsc::Receiver<io::Result<String>>) -> io::Result<Option<String>> {
    print!("> ");
    flush();
    tokio::select! {
        line = lines.recv() => line.transpose(),
        _ = ctrl_c() => Ok(None),
    }
}

/// The lines of stdin, read by a thread of their own: a read that waits can neither be cancelled nor be left to the executor,
/// which would wait for it at the end.
fn lines_of_stdin() -> mpsc::Receiver<io::Result<String>> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}

fn num_tokens(engine: &Engine, messages: &[Message]) -> Result<usize, Error> {
    let tokenizer = engine.tokenizer().ok_or(RequestError::NoTokenizer { needed_by: "a chat" })?;
    let template = tokenizer.chat_template()?.ok_or(RequestError::NoChatTemplate)?;
    Ok(tokenizer.encode_chat(template, messages, &ChatOptions::default())?.len())
}

fn flush() {
    // A terminal that has gone is found out by what is printed next.
    let _ = io::stdout().flush();
}
