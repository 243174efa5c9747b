//! The same request gives the same answer, to the last bit of its log-probabilities, whatever else the engine does: that is
//! what makes a seed worth reporting and a prefix cache safe to have.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::OnceLock;

use common::{Answer, FERRIS, Random, complete, complete_all, load, on_test_device};
use dashinfer::{Completion, Engine, Load, Request};

/// A prompt of several blocks, and of no whole number of them.
const PROMPT_LEN: usize = 150;
const VOCAB: usize = 4096;

fn prompt() -> Vec<u32> {
    Random(1).tokens(PROMPT_LEN, VOCAB)
}

/// Greedy, sampled, and sampled with all that looks at earlier tokens.
fn requests() -> Vec<Request> {
    let base = || Request::tokens(prompt()).max_tokens(24).ignore_eos().logprobs(3);
    let sampled = || base().temperature(0.9).seed(7);
    vec![
        base().temperature(0.0),
        sampled(),
        sampled().top_k(40).top_p(0.9).min_p(0.01).repetition_penalty(1.1).presence_penalty(0.2).frequency_penalty(0.1),
    ]
}

/// What an engine with the default settings says to each alone.
fn expected() -> &'static [Answer] {
    static EXPECTED: OnceLock<Vec<Answer>> = OnceLock::new();
    EXPECTED.get_or_init(|| answers(&load(small(Engine::load(FERRIS)))))
}

fn answers(engine: &Engine) -> Vec<Answer> {
    requests().into_iter().map(|request| Answer::from(&complete(engine, request))).collect()
}

/// A cache that does not take long to make.
fn small(load: Load) -> Load {
    load.max_context(512).deterministic(true)
}

#[track_caller]
fn check(settings: impl Fn(Load) -> Load) {
    let engine = load(settings(small(Engine::load(FERRIS))));
    assert_eq!(answers(&engine), expected());
}

/// Requests of many lengths, some of them sampled, some sharing a prefix with the one that is tested.
fn others(count: usize) -> impl Iterator<Item = Request> {
    let mut random = Random(2);
    (0..count).map(move |i| {
        let len = 1 + random.below(40);
        let mut tokens = random.tokens(len, VOCAB);
        if i % 8 == 0 {
            tokens.splice(0..0, prompt()[..40 + i].iter().copied());
        }
        let request = Request::tokens(tokens).max_tokens(1 + random.below(30)).ignore_eos();
        match i % 3 {
            0 => request.temperature(0.0),
            _ => request.temperature(1.0).seed(i as u64).top_p(0.95),
        }
    })
}

#[test]
fn the_answers_are_worth_comparing() {
    let expected = expected();
    assert!(expected.iter().all(|answer| answer.tokens.len() == 24));
    assert_ne!(expected[0], expected[1]);
    assert_ne!(expected[1], expected[2]);
}

#[test]
fn alone_and_among_64_others() {
    let engine = load(small(Engine::load(FERRIS)).max_batch(80));
    let mut all: Vec<_> = others(32).collect();
    let first = all.len();
    all.extend(requests());
    all.extend(others(64).skip(32));
    let found = complete_all(&engine, all);
    let found: Vec<_> = found[first..first + requests().len()].iter().map(Answer::from).collect();
    assert_eq!(found, expected());
    let stats = engine.stats();
    // With steps of their own, each token would have taken one.
    assert!(stats.steps * 4 < stats.generated_tokens, "they did not run together: {stats:?}");
}

#[test]
fn with_a_cold_and_a_warm_prefix_cache_and_without_one() {
    let engine = load(small(Engine::load(FERRIS)));
    let greedy = || requests().remove(0);
    let (cold, warm) = (complete(&engine, greedy()), complete(&engine, greedy()));
    assert_eq!((cold.finish.usage.cached_tokens, warm.finish.usage.cached_tokens), (0, PROMPT_LEN / 32 * 32));
    assert_eq!(Answer::from(&cold), expected()[0]);
    assert_eq!(answers(&engine), expected());

    let engine = load(small(Engine::load(FERRIS)).prefix_cache(false));
    assert_eq!(answers(&engine), expected());
    assert_eq!(complete(&engine, greedy()).finish.usage.cached_tokens, 0);
}

#[test]
fn with_a_prefix_that_ends_within_the_prompt() {
    let engine = load(small(Engine::load(FERRIS)));
    let mut shares_a_prefix = prompt()[..100].to_vec();
    shares_a_prefix.extend([1, 2, 3]);
    complete(&engine, Request::tokens(shares_a_prefix).max_tokens(2));
    let found = complete(&engine, requests().remove(0));
    assert_eq!(found.finish.usage.cached_tokens, 96);
    assert_eq!(Answer::from(&found), expected()[0]);
}

#[test]
fn in_chunks_of_any_size() {
    check(|load| load.max_chunk(1));
    check(|load| load.max_chunk(13));
    check(|load| load.max_chunk(64).block_size(16));
    check(|load| load.max_step_tokens(1));
    check(|load| load.max_step_tokens(29).max_batch(3));
    check(|load| load.max_step_tokens(2048).block_size(128));
}

#[test]
fn on_any_number_of_threads() {
    for threads in [1, 2, 3] {
        let engine = on_test_device(small(Engine::load(FERRIS))).threads(threads).blocking().unwrap();
        assert_eq!(answers(&engine), expected(), "{threads} threads");
    }
}

#[test]
fn preempted_or_not() {
    // Blocks for one sequence of the whole context, which hold all three of ours.
    let context = 512;
    let per_token = on_test_device(Engine::load(FERRIS)).estimate().unwrap().kv_bytes_per_token;
    let kv_cache_bytes = context as u64 * per_token;
    for prefix_cache in [true, false] {
        let settings = Engine::load(FERRIS).max_context(context).kv_cache_bytes(kv_cache_bytes).deterministic(true);
        let engine = load(settings.block_size(16).prefix_cache(prefix_cache));
        assert_eq!(engine.model().kv_cache_tokens, context);
        let mut ours: Vec<_> = requests().into_iter().map(|request| engine.blocking().generate(request)).collect();
        let first_chunks: Vec<_> = ours.iter_mut().map(|stream| stream.next().unwrap().unwrap()).collect();
        // These go first, and do not fit beside ours.
        let rivals = (0..3).map(|seed| Request::tokens(Random(seed).tokens(400, VOCAB)).max_tokens(8).priority(1));
        complete_all(&engine, rivals);
        for ((stream, mut whole), expected) in ours.into_iter().zip(first_chunks).zip(expected()) {
            stream.for_each(|chunk| whole.append(chunk.unwrap()));
            assert_eq!(Answer::from(&Completion::try_from(whole).unwrap()), *expected);
        }
        let stats = engine.stats();
        assert!(stats.preemptions >= 2, "{stats:?}");
    }
}

#[test]
fn prompt_logits_do_not_depend_on_the_steps_either() {
    let tokens = prompt();
    let alone = load(small(Engine::load(FERRIS))).blocking().prompt_logits(&tokens[..]).unwrap();
    let engine = load(small(Engine::load(FERRIS)).max_chunk(7).max_step_tokens(40));
    let streams: Vec<_> = others(8).map(|request| engine.generate(request)).collect();
    assert_eq!(engine.blocking().prompt_logits(&tokens[..]).unwrap(), alone);
    drop(streams);
}
