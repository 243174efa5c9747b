//! Requests that are given up at any moment leave nothing behind, and harm nobody.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use common::{Answer, Random, assert_idle, complete, load, tiny, wait_until};
use dashinfer::{Engine, Request, TokenStream};
use futures::executor::block_on;
use futures::{FutureExt, StreamExt};

const VOCAB: usize = 400;

fn engine() -> Engine {
    load(Engine::load(tiny()).max_batch(16).kv_cache_bytes(64 << 20))
}

/// A request that runs until it is cancelled, or to the end of the context.
fn any_request(random: &mut Random) -> Request {
    let len = 1 + random.below(60);
    let request = Request::tokens(random.tokens(len, VOCAB)).ignore_eos();
    match random.below(3) {
        0 => request.temperature(1.0).seed(random.next()),
        1 => request.logprobs(2),
        _ => request.priority(random.below(3) as i32),
    }
}

fn reference(engine: &Engine) -> Answer {
    let request = Request::tokens((10..60).collect::<Vec<u32>>()).max_tokens(20).ignore_eos().logprobs(2);
    Answer::from(&complete(engine, request))
}

/// Reads a few chunks of what is there already, then drops the stream.
fn read_and_drop(mut stream: TokenStream, num_chunks: usize) {
    for _ in 0..num_chunks {
        if let Some(chunk) = stream.next().now_or_never() {
            chunk.unwrap().unwrap();
        }
    }
}

#[test]
fn ten_thousand_requests_dropped_at_random_moments() {
    let engine = engine();
    let expected = reference(&engine);
    let mut random = Random(3);
    let mut open = Vec::new();
    let (mut num_started, mut num_at_once, mut num_after_some) = (0, 0, 0);
    while num_started < 10_000 {
        let stream = engine.generate(any_request(&mut random));
        num_started += 1;
        match random.below(4) {
            0 | 1 => {
                drop(stream);
                num_at_once += 1;
            }
            _ => open.push(stream),
        }
        // Once in a while the engine gets on to tokens, of streams which are then dropped in the middle.
        if random.below(100) == 0 {
            let place = random.below(open.len().max(1));
            if let Some(stream) = open.get_mut(place) {
                block_on(stream.next()).unwrap().unwrap();
                num_after_some += 1;
            }
        }
        if open.len() > 40 {
            let stream = open.swap_remove(random.below(open.len()));
            read_and_drop(stream, random.below(4));
        }
    }
    assert!(num_at_once > 1000 && num_after_some > 50, "{num_at_once} at once, {num_after_some} after tokens");
    drop(open);
    assert_idle(&engine);
    let stats = engine.stats();
    assert!(stats.generated_tokens > 100, "{stats:?}");
    let kv_blocks = engine.model().kv_cache_tokens / 32;
    assert_eq!(stats.blocks_free + stats.blocks_cached, kv_blocks);
    assert_eq!(reference(&engine), expected);
}

#[test]
fn a_request_goes_on_unharmed_while_others_are_cancelled() {
    let engine = engine();
    let long = || Request::tokens([1, 2, 3]).max_tokens(150).ignore_eos().logprobs(2);
    let expected = Answer::from(&complete(&engine, long()));
    let in_flight = std::thread::spawn({
        let engine = engine.clone();
        move || complete(&engine, long())
    });
    let mut random = Random(4);
    while !in_flight.is_finished() {
        let mut stream = engine.generate(any_request(&mut random));
        if random.below(2) == 0 {
            block_on(stream.next()).unwrap().unwrap();
        }
    }
    assert_eq!(Answer::from(&in_flight.join().unwrap()), expected);
    assert_idle(&engine);
}

#[test]
fn a_dropped_stream_stops_costing() {
    let engine = engine();
    let mut stream = engine.generate(Request::tokens([1]).ignore_eos());
    block_on(stream.next()).unwrap().unwrap();
    drop(stream);
    assert_idle(&engine);
    assert!(engine.stats().generated_tokens < 255, "it ran to the end of the context");
}

#[test]
fn dropped_futures_cancel_too() {
    let engine = engine();
    for len in 1..50 {
        // Polled once and then dropped: the work may be waiting, half done or just done.
        let _ = engine.prompt_logits(vec![1; len]).now_or_never();
        let _ = engine.generate(vec![1; len]).complete().now_or_never();
    }
    assert_idle(&engine);
    reference(&engine);
}

#[test]
fn next_is_cancel_safe() {
    let engine = engine();
    let request = || Request::tokens([1, 2, 3]).max_tokens(100).ignore_eos();
    let expected = complete(&engine, request()).tokens;
    let mut stream = engine.generate(request());
    let mut tokens = Vec::new();
    // Each future of `next` is dropped after one poll.
    wait_until("the stream has ended", || match stream.next().now_or_never() {
        Some(Some(chunk)) => {
            tokens.extend(chunk.unwrap().tokens);
            false
        }
        Some(None) => true,
        None => false,
    });
    assert_eq!(tokens, expected);
}
