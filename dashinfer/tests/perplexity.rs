//! The bundled model against the figures that `transformers` computed from it: see its `README.md` and `perplexity.json`.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::Path;

use common::{Expected, FERRIS, complete, load, log_softmax, max_abs_diff};
use dashinfer::{Engine, KvCacheType, Request, SpecialTokens};

fn engine() -> Engine {
    load(Engine::load(FERRIS))
}

/// The windows of the recorded text.
fn windows(engine: &Engine) -> Vec<Vec<u32>> {
    let text = fs::read_to_string(Path::new(FERRIS).join("perplexity.txt")).unwrap();
    let tokens = engine.tokenizer().unwrap().encode(&text, SpecialTokens::Without).unwrap();
    tokens.chunks(1024).map(<[u32]>::to_vec).collect()
}

/// The negative log-likelihood of a window's tokens but the first.
fn negative_log_likelihood(engine: &Engine, window: &[u32]) -> f64 {
    let logits = engine.blocking().prompt_logits(window).unwrap();
    logits.rows().zip(&window[1..]).map(|(row, &next)| -log_softmax(row, next)).sum()
}

fn perplexity(sums: &[f64], windows: &[Vec<u32>]) -> f64 {
    let num_scored: usize = windows.iter().map(|window| window.len() - 1).sum();
    (sums.iter().sum::<f64>() / num_scored as f64).exp()
}

#[test]
fn perplexity_is_the_recorded_one() {
    let recorded = fs::read_to_string(Path::new(FERRIS).join("perplexity.json")).unwrap();
    let recorded: serde_json::Value = serde_json::from_str(&recorded).unwrap();
    let engine = engine();
    let windows = windows(&engine);
    assert_eq!(windows.iter().map(Vec::len).sum::<usize>() as u64, recorded["num_tokens"].as_u64().unwrap());

    let mut sums = Vec::new();
    for (window, wanted) in windows.iter().zip(recorded["window_negative_log_likelihood"].as_array().unwrap()) {
        let (found, wanted) = (negative_log_likelihood(&engine, window), wanted.as_f64().unwrap());
        assert!((found / wanted - 1.0).abs() < 1e-3, "a window has {found}, wanted {wanted}");
        sums.push(found);
    }
    let (found, wanted) = (perplexity(&sums, &windows), recorded["perplexity"].as_f64().unwrap());
    assert!((found / wanted - 1.0).abs() < 1e-3, "the perplexity is {found}, wanted {wanted}");
}

#[test]
fn a_smaller_cache_costs_little_perplexity() {
    let of = |cache: KvCacheType| {
        let engine = load(Engine::load(FERRIS).kv_cache(cache));
        let windows = windows(&engine);
        let sums: Vec<_> = windows.iter().map(|window| negative_log_likelihood(&engine, window)).collect();
        perplexity(&sums, &windows)
    };
    let exact = of(KvCacheType::F32);
    // Halves of a word lose next to nothing; for the others these are the bounds that quantized caches are made for.
    for (cache, bound) in
        [(KvCacheType::F16, 0.0005), (KvCacheType::BF16, 0.002), (KvCacheType::Int8, 0.002), (KvCacheType::Uint4, 0.02)]
    {
        let found = of(cache);
        let change = found / exact - 1.0;
        println!("{cache:?}: {found:.4}, {:+.3} % of {exact:.4}", change * 100.0);
        assert!(change.abs() < bound, "{cache:?}: the perplexity is {found}, in f32 {exact}");
    }
}

#[test]
fn last_logits_and_greedy_continuations_are_the_recorded_ones() {
    let engine = engine();
    for (number, prompt) in Expected::read(Path::new(FERRIS)).prompts("last_logits").iter().enumerate() {
        let found = engine.blocking().prompt_logits(&prompt.ids[..]).unwrap();
        let scale = prompt.logits.iter().fold(0.0, |scale: f32, logit| scale.max(logit.abs()));
        let last = &found.values()[found.values().len() - 8 * found.vocab_size()..];
        let worst = max_abs_diff(last, &prompt.logits);
        assert!(worst <= 2e-3 * scale, "prompt {number} is off by {worst}, the largest logit is {scale}");

        // The nearest of the recorded ties is 0.009, which is above what f32 may move a logit by here.
        let request = Request::tokens(prompt.ids.clone()).max_tokens(prompt.greedy_ids.len()).ignore_eos();
        let sure = prompt.greedy_margins.iter().position(|&margin| margin <= 2.0 * worst).unwrap_or(64);
        assert!(sure >= 32, "prompt {number} has a tie at {sure}");
        assert_eq!(complete(&engine, request).tokens[..sure], prompt.greedy_ids[..sure], "prompt {number}");
    }
}

#[test]
fn the_recorded_texts_are_written() {
    let recorded = fs::read_to_string(Path::new(FERRIS).join("expected.json")).unwrap();
    let recorded: serde_json::Value = serde_json::from_str(&recorded).unwrap();
    let engine = engine();
    for prompt in recorded["prompts"].as_array().unwrap() {
        let request = Request::text(prompt["text"].as_str().unwrap()).max_tokens(64).ignore_eos();
        let found = complete(&engine, request);
        assert_eq!(found.text, prompt["greedy_text"].as_str().unwrap());
        assert_eq!(found.finish.usage.prompt_tokens as u64, prompt["num_tokens"].as_u64().unwrap());
    }
}
