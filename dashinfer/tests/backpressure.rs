//! A reader that is late delays itself alone, and loses nothing.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Answer, assert_idle, complete, complete_all, load, tiny, wait_until};
use dashinfer::{Chunk, Completion, Engine, Error, Load, Request, TokenStream};
use futures::executor::block_on;
use futures::{FutureExt, Stream, StreamExt, stream};

const BUFFER: usize = 8;

/// Tokens that each request generates: many times the buffer.
const NUM_TOKENS: usize = 60;

fn request(first: u32) -> Request {
    Request::tokens([first, 2, 3]).max_tokens(NUM_TOKENS).ignore_eos().logprobs(1)
}

fn engine(settings: impl FnOnce(Load) -> Load) -> Engine {
    load(settings(Engine::load(tiny()).stream_buffer(BUFFER).max_batch(64).deterministic(true)))
}

fn read_all(stream: TokenStream) -> Answer {
    Answer::from(&block_on(stream.complete()).unwrap())
}

/// The chunks that lie ready, without waiting for more.
fn tokens_ready(stream: &mut TokenStream) -> Vec<Chunk> {
    std::iter::from_fn(|| stream.next().now_or_never().flatten()).map(Result::unwrap).collect()
}

#[test]
fn thirty_one_fast_readers_beside_one_that_never_polls() {
    let engine = engine(|load| load);
    let expected: Vec<_> = (0..32).map(|first| Answer::from(&complete(&engine, request(first)))).collect();
    assert_idle(&engine);
    let before = engine.stats().generated_tokens;

    let late = engine.generate(request(31));
    let found = complete_all(&engine, (0..31).map(request));
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(&Answer::from(found), expected);
    }
    wait_until("only the late request is left, paused", || {
        let stats = engine.stats();
        (stats.running, stats.waiting, stats.paused) == (0, 0, 1)
    });
    let late_tokens = engine.stats().generated_tokens - before - 31 * NUM_TOKENS as u64;
    // An engine one step ahead had one more on its way when the buffer was full.
    let in_flight = u64::from(engine.model().device != "cpu");
    assert!((BUFFER as u64..=BUFFER as u64 + in_flight).contains(&late_tokens), "{late_tokens}");

    assert_eq!(read_all(late), expected[31]);
    assert_idle(&engine);
}

#[test]
fn a_reader_that_comes_and_goes_gets_every_token() {
    for buffer in [1, 2, 3, BUFFER] {
        let engine = engine(|load| load.stream_buffer(buffer));
        let mut stream = engine.generate(request(1));
        let mut whole = Chunk::default();
        while whole.finish.is_none() {
            let before = engine.stats().generated_tokens;
            wait_until("the request is paused or done", || {
                let stats = engine.stats();
                stats.paused == 1 || stats.generated_tokens == NUM_TOKENS as u64
            });
            let ready = tokens_ready(&mut stream);
            assert!(ready.len() <= buffer + engine.stats().generated_tokens.saturating_sub(before) as usize);
            ready.into_iter().for_each(|chunk| whole.append(chunk));
        }
        let found = Completion::try_from(whole).unwrap();
        assert_eq!(Answer::from(&found), Answer::from(&complete(&engine, request(1))), "a buffer of {buffer}");
    }
}

#[test]
fn a_paused_request_whose_blocks_were_taken_is_computed_again() {
    // Blocks for one sequence of the whole context.
    let kv_cache_bytes = 256 * Engine::estimate(tiny()).unwrap().kv_bytes_per_token;
    for prefix_cache in [true, false] {
        let engine = engine(|load| load.kv_cache_bytes(kv_cache_bytes).block_size(16).prefix_cache(prefix_cache));
        let expected = Answer::from(&complete(&engine, request(1)));
        let late = engine.generate(request(1));
        wait_until("the late request is paused", || engine.stats().paused == 1);
        // Needs every block.
        let large = complete(&engine, Request::tokens([7; 200]).ignore_eos());
        assert_eq!(large.tokens.len(), 56);
        let stats = engine.stats();
        assert!(stats.preemptions > 0, "{stats:?}");
        assert_eq!(read_all(late), expected);
        assert_idle(&engine);
    }
}

#[test]
fn a_paused_request_can_be_cancelled() {
    let engine = engine(|load| load);
    let late = engine.generate(request(1));
    wait_until("the late request is paused", || engine.stats().paused == 1);
    drop(late);
    assert_idle(&engine);
}

#[test]
fn a_full_queue_is_said() {
    let engine = engine(|load| load.max_queued(3).max_batch(1));
    // It holds the only place of the batch for as long as this test takes.
    let mut running = engine.generate(Request::tokens([1]).ignore_eos());
    block_on(running.next()).unwrap().unwrap();
    let rest = std::thread::spawn(move || block_on(running.for_each(|chunk| async { drop(chunk.unwrap()) })));
    let mut waiting = Vec::new();
    let refused = loop {
        match engine.try_generate(request(1)) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(refused.to_string(), "the queue is full: 3 requests are waiting");
    assert!(matches!(refused, Error::QueueFull { max: 3 }));
    assert!(waiting.len() >= 3);
    // `generate` waits however long the queue is.
    waiting.push(engine.generate(request(1)));
    rest.join().unwrap();
    let answers: Vec<_> = waiting.into_iter().map(read_all).collect();
    assert!(answers.iter().all(|answer| answer == &answers[0]));
    assert_idle(&engine);
    drop(engine.try_generate(request(1)).unwrap());
}

/// Requests, with a count of those that were taken.
fn counted(num_requests: u32, pulls: &AtomicUsize) -> impl Stream<Item = Request> {
    stream::iter(0..num_requests).map(move |index| {
        pulls.fetch_add(1, Ordering::SeqCst);
        request(index).max_tokens(1 + index as usize % 7)
    })
}

#[test]
fn a_stream_of_requests_is_read_only_as_fast_as_its_answers() {
    for max_batch in [1, 3] {
        let engine = engine(|load| load.max_batch(max_batch));
        let pulls = AtomicUsize::new(0);
        let mut answers = pin!(engine.generate_stream(counted(40, &pulls)));
        let mut found: HashMap<usize, Chunk> = HashMap::new();
        while let Some(tagged) = block_on(answers.next()) {
            found.entry(tagged.index).or_default().append(tagged.chunk.unwrap());
            let num_ended = found.values().filter(|chunk| chunk.finish.is_some()).count();
            let ahead = pulls.load(Ordering::SeqCst) - num_ended;
            assert!(ahead <= 2 * max_batch + 1, "{ahead} requests are in flight");
        }
        assert_eq!((found.len(), pulls.load(Ordering::SeqCst)), (40, 40));
        for (index, chunk) in found {
            let found = Completion::try_from(chunk).unwrap();
            let expected = complete(&engine, request(index as u32).max_tokens(1 + index % 7));
            assert_eq!(Answer::from(&found), Answer::from(&expected), "request {index}");
        }
        assert_idle(&engine);
    }
}

#[test]
fn requests_that_end_at_the_same_time_make_room_for_others() {
    let engine = engine(|load| load.max_batch(1));
    let pulls = AtomicUsize::new(0);
    let requests = counted(7, &pulls).map(|request| request.max_tokens(1));
    let mut answers = pin!(engine.generate_stream(requests));
    // As many as may be in flight are started, and all of them have their last chunk ready before any is read.
    let num_started = |pulls: &AtomicUsize| pulls.load(Ordering::SeqCst) as u64;
    let mut num_ended = answers.next().now_or_never().into_iter().count();
    wait_until("both are done", || engine.stats().generated_tokens == num_started(&pulls));
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let patience = std::time::Duration::from_secs(60);
            if is_done.recv_timeout(patience).is_err() {
                eprintln!("the stream of answers sleeps, and nothing will wake it");
                std::process::abort();
            }
        });
        while block_on(answers.next()).is_some() {
            num_ended += 1;
        }
        done.send(()).unwrap();
    });
    assert_eq!(num_ended, 7);
}

#[test]
fn a_bad_request_in_a_stream_ends_itself_alone() {
    let engine = engine(|load| load.max_batch(1));
    let requests = [request(1), Request::tokens([]), request(2), Request::tokens([9999])];
    let tagged: Vec<_> = block_on(engine.generate_stream(stream::iter(requests)).collect());
    let ended = |index| tagged.iter().rfind(|tagged| tagged.index == index).unwrap();
    assert!(ended(0).chunk.as_ref().unwrap().finish.is_some());
    assert!(ended(1).chunk.is_err());
    assert!(ended(2).chunk.as_ref().unwrap().finish.is_some());
    assert!(ended(3).chunk.is_err());
    assert!(block_on(engine.generate_stream(stream::empty()).next()).is_none());
}

#[test]
fn a_dropped_stream_of_requests_cancels_them() {
    let engine = engine(|load| load);
    let pulls = AtomicUsize::new(0);
    let mut answers = pin!(engine.generate_stream(counted(1000, &pulls).boxed_local()));
    block_on(answers.next()).unwrap();
    answers.set(engine.generate_stream(stream::empty().boxed_local()));
    assert_idle(&engine);
    assert!(pulls.load(Ordering::SeqCst) <= 2 * 64 + 1);
}
