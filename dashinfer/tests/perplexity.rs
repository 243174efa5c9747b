//! The bundled model against the figures that `transformers` computed from it: see its `README.md` and `perplexity.json`.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::Path;

use common::{Expected, FERRIS, complete, load, log_softmax, max_abs_diff};
use dashinfer::{Engine, Request, SpecialTokens};

fn engine() -> Engine {
    load(Engine::load(FERRIS))
}

#[test]
fn perplexity_is_the_recorded_one() {
    let recorded = fs::read_to_string(Path::new(FERRIS).join("perplexity.json")).unwrap();
    let recorded: serde_json::Value = serde_json::from_str(&recorded).unwrap();
    let text = fs::read_to_string(Path::new(FERRIS).join("perplexity.txt")).unwrap();
    let engine = engine();
    let tokens = engine.tokenizer().unwrap().encode(&text, SpecialTokens::Without).unwrap();
    assert_eq!(tokens.len() as u64, recorded["num_tokens"].as_u64().unwrap());

    let (mut sum, mut num_scored) = (0.0, 0);
    let windows = recorded["window_negative_log_likelihood"].as_array().unwrap();
    for (window, wanted) in tokens.chunks(1024).zip(windows) {
        let logits = engine.blocking().prompt_logits(window).unwrap();
        let scored = logits.rows().zip(&window[1..]);
        let found: f64 = scored.map(|(row, &next)| -log_softmax(row, next)).sum();
        let wanted = wanted.as_f64().unwrap();
        assert!((found / wanted - 1.0).abs() < 1e-3, "a window has {found}, wanted {wanted}");
        sum += found;
        num_scored += window.len() - 1;
    }
    assert_eq!(num_scored as u64, recorded["num_scored_tokens"].as_u64().unwrap());
    let (found, wanted) = ((sum / num_scored as f64).exp(), recorded["perplexity"].as_f64().unwrap());
    assert!((found / wanted - 1.0).abs() < 1e-3, "the perplexity is {found}, wanted {wanted}");
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
