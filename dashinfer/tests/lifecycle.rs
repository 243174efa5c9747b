//! Engines come and go: several at once, handles on any runtime, and nothing left when they end.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::mpsc;
use std::time::Duration;

use common::{Answer, FERRIS, complete, golden, load, tiny};
use dashinfer::{Blocking, BlockingTokens, Completion, Engine, Error, GenerateStream, Load, Request, TokenStream};
use futures::executor::block_on;
use futures::future::join_all;
use futures::{FutureExt, StreamExt};

fn request() -> Request {
    Request::tokens([3, 4, 5]).max_tokens(20).ignore_eos().temperature(0.0).logprobs(1)
}

fn engine() -> Engine {
    load(Engine::load(tiny()))
}

const _: () = {
    const fn is_handle<T: Clone + Send + Sync + 'static>() {}
    const fn is_stream<T: Send + Unpin + 'static>() {}
    is_handle::<Engine>();
    is_handle::<Blocking>();
    is_handle::<Error>();
    is_handle::<Request>();
    is_stream::<TokenStream>();
    is_stream::<BlockingTokens>();
    is_stream::<GenerateStream<futures::stream::Empty<Request>>>();
    is_stream::<Load>();
};

#[test]
fn two_models_in_one_process() {
    let alone = |folder| Answer::from(&complete(&load(Engine::load(folder)), request()));
    let (first, second) = (golden("qwen3"), golden("llama-mha"));
    let expected = [alone(first.clone()), alone(second.clone())];
    assert_ne!(expected[0], expected[1]);

    let engines = [load(Engine::load(first)), load(Engine::load(second))];
    let streams: Vec<_> = (0..20).map(|i| engines[i % 2].generate(request()).complete()).collect();
    for (i, found) in block_on(join_all(streams)).into_iter().enumerate() {
        assert_eq!(Answer::from(&found.unwrap()), expected[i % 2]);
    }
    let [first, second] = engines;
    first.blocking().shutdown();
    assert_eq!(Answer::from(&complete(&second, request())), expected[1], "the end of one is not the end of the other");
}

#[test]
fn dropping_the_last_handle_lets_streams_finish() {
    let expected = Answer::from(&complete(&engine(), request()));
    let engine = engine();
    let streams: Vec<_> = (0..5).map(|_| engine.generate(request())).collect();
    drop(engine);
    for stream in streams {
        assert_eq!(Answer::from(&block_on(stream.complete()).unwrap()), expected);
    }
}

#[test]
fn shutdown_serves_what_is_in_flight_and_refuses_what_comes_later() {
    let expected = Answer::from(&complete(&engine(), request()));
    let engine = engine();
    let other = engine.clone();
    // 20 chunks fit the buffer of a stream, so none of these must be read for the engine to end.
    let streams: Vec<_> = (0..5).map(|_| engine.generate(request())).collect();
    engine.blocking().shutdown();
    for stream in streams {
        assert_eq!(Answer::from(&block_on(stream.complete()).unwrap()), expected);
    }
    let stats = other.stats();
    assert_eq!((stats.running, stats.blocks_in_use, stats.generated_tokens), (0, 0, 100));

    assert!(matches!(block_on(other.generate(request()).complete()), Err(Error::Closed)));
    assert!(matches!(block_on(other.prompt_logits([1])), Err(Error::Closed)));
    let mut stream = other.try_generate(request()).unwrap();
    assert!(matches!(block_on(stream.next()), Some(Err(Error::Closed))));
    assert!(block_on(stream.next()).is_none());
    assert_eq!(other.model().vocab_size, 400);
    other.blocking().shutdown();
    assert_eq!(other.stats().queued, 0);
}

#[test]
fn a_load_that_is_given_up_ends_by_itself() {
    let (gone, is_gone) = mpsc::channel::<()>();
    let load = Engine::load(tiny()).threads(1).on_progress(move |_| {
        let _ = &gone;
    });
    // Polled once, then dropped: the thread is loading.
    assert!(load.into_future().now_or_never().is_none());
    let hung_up = is_gone.recv_timeout(Duration::from_secs(60));
    assert_eq!(hung_up, Err(mpsc::RecvTimeoutError::Disconnected));
}

/// The same on every executor: load, generate, read, ask for logits, shut down.
async fn whole_life() -> Result<Completion, Error> {
    let engine = Engine::load(tiny()).threads(1).await?;
    let mut tokens = engine.generate(request());
    let mut whole = tokens.next().await.unwrap()?;
    while let Some(chunk) = tokens.next().await {
        whole.append(chunk?);
    }
    assert_eq!(engine.prompt_logits([1, 2]).await?.rows().len(), 2);
    let second = engine.generate(request()).complete().await?;
    assert_eq!(second.tokens, whole.tokens);
    engine.shutdown().await;
    Ok(Completion::try_from(whole).unwrap())
}

#[test]
fn any_executor_will_do() {
    let expected = Answer::from(&complete(&engine(), request()));
    let check = |found: Result<Completion, Error>| assert_eq!(Answer::from(&found.unwrap()), expected);
    check(block_on(whole_life()));
    let current_thread = tokio::runtime::Builder::new_current_thread().build().unwrap();
    check(current_thread.block_on(whole_life()));
    let multi_thread = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    check(multi_thread.block_on(async { tokio::spawn(whole_life()).await.unwrap() }));
}

#[test]
fn without_any_executor() {
    let engine = Engine::load(tiny()).threads(1).blocking().unwrap();
    let blocking = engine.blocking();
    let whole = blocking.complete(request()).unwrap();
    let mut tokens = Vec::new();
    for chunk in blocking.generate(request()) {
        tokens.extend(chunk.unwrap().tokens);
    }
    assert_eq!(tokens, whole.tokens);
    assert_eq!(blocking.try_generate(request()).unwrap().count(), tokens.len());
    blocking.shutdown();
}

#[test]
fn an_estimate_is_what_a_load_takes() {
    let estimate = Engine::estimate(FERRIS).unwrap();
    let engine = load(Engine::load(FERRIS));
    let model = engine.model();
    assert_eq!((model.weight_bytes, model.context), (estimate.weight_bytes, estimate.context));
    assert_eq!(model.kv_cache_tokens as u64 * estimate.kv_bytes_per_token, model.kv_cache_bytes);
    assert_eq!((model.architecture.as_str(), model.vocab_size, model.context), ("Qwen3ForCausalLM", 4096, 2048));
}
