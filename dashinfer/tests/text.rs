//! What a request can ask of its continuation: where it ends, how its tokens are picked, and the text they make.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::LazyLock;

use common::{FERRIS, Random, argmax, complete, golden_prompts, load, log_softmax, tiny};
use dashinfer::{Chunk, Completion, Engine, FinishReason, Message, Request, SpecialTokens, Tokenizer};

static ENGINE: LazyLock<Engine> = LazyLock::new(|| load(Engine::load(FERRIS).deterministic(true)));

const PROMPT: &str = "# Final Project: Building a Multithreaded Web Server\n\nIt’s been a long journey, but we’ve reached the end of the";

fn request() -> Request {
    Request::text(PROMPT).max_tokens(40).ignore_eos()
}

fn run(request: impl Into<Request>) -> Completion {
    complete(&ENGINE, request)
}

fn tokenizer() -> &'static Tokenizer {
    ENGINE.tokenizer().unwrap()
}

fn chunks(engine: &Engine, request: Request) -> Vec<Chunk> {
    engine.blocking().generate(request).map(Result::unwrap).collect()
}

#[test]
fn chunks_add_up_to_the_completion_and_to_what_the_tokenizer_decodes() {
    let whole = run(request());
    let mut sum = Chunk::default();
    for chunk in chunks(&ENGINE, request()) {
        assert!(sum.finish.is_none(), "a chunk after the last one");
        sum.append(chunk);
    }
    let sum = Completion::try_from(sum).unwrap();
    assert_eq!((&sum.text, &sum.tokens), (&whole.text, &whole.tokens));
    assert_eq!(whole.text, tokenizer().decode(&whole.tokens, SpecialTokens::Without));
    assert_eq!(whole.tokens.len(), 40);
    assert_eq!(whole.finish.reason, FinishReason::Length);
    assert_eq!((whole.finish.usage.generated_tokens, whole.finish.usage.prompt_tokens), (40, 40));
    assert!(whole.finish.usage.time_to_first_token <= whole.finish.usage.total);
}

/// Random weights write bytes of any kind. Each character comes whole, in the chunk of the token that completed it; a chunk
/// is a `String`, so a split one would show as U+FFFD where the whole has none.
#[test]
fn no_chunk_splits_a_character() {
    let engine = load(Engine::load(tiny()));
    let mut num_multibyte = 0;
    for seed in 0..20 {
        let request = Request::tokens([1, 5]).max_tokens(60).ignore_eos().temperature(1.5).seed(seed);
        let pieces = chunks(&engine, request);
        let tokens: Vec<u32> = pieces.iter().flat_map(|chunk| chunk.tokens.clone()).collect();
        let text: String = pieces.iter().map(|chunk| chunk.text.as_str()).collect();
        num_multibyte += text.chars().filter(|c| c.len_utf8() > 1 && *c != '\u{fffd}').count();
        let mut with_prompt = vec![1, 5];
        with_prompt.extend(&tokens);
        let decoder = engine.tokenizer().unwrap();
        let whole = decoder.decode(&with_prompt, SpecialTokens::Without);
        let before = decoder.decode(&[1, 5], SpecialTokens::Without);
        assert_eq!(format!("{before}{text}"), whole);
    }
    assert!(num_multibyte > 0);
}

#[test]
fn a_stop_string_is_never_shown() {
    let unstopped = run(request()).text;
    let pieces: Vec<String> = chunks(&ENGINE, request()).into_iter().map(|chunk| chunk.text).collect();
    // Every stop of a few lengths that occurs: in one chunk, and over the borders of two and more.
    let places: Vec<usize> = unstopped.char_indices().map(|(place, _)| place).collect();
    let mut num_over_borders = 0;
    for (start, len) in (5..places.len() - 12).step_by(9).flat_map(|start| [1, 4, 11].map(|len| (start, len))) {
        let stop = &unstopped[places[start]..places[start + len]];
        num_over_borders += usize::from(!pieces.iter().any(|piece| piece.contains(stop)));
        let mut text = String::new();
        for chunk in chunks(&ENGINE, request().stop(stop).stop("not in the text")) {
            text.push_str(&chunk.text);
            if let Some(finish) = chunk.finish {
                assert_eq!(finish.reason, FinishReason::StopString(stop.to_owned()));
            }
        }
        assert_eq!(text, unstopped[..unstopped.find(stop).unwrap()], "stop {stop:?}");
    }
    assert!(num_over_borders > 5, "{num_over_borders} stops cross a border");
    // What may be the beginning of a stop is given out when it is none.
    let end = &unstopped[unstopped.len() - 3..];
    assert_eq!(run(request().stop(format!("{end}\u{1}"))).text, unstopped);
}

#[test]
fn stop_tokens_end_the_text() {
    let unstopped = run(request());
    let stop = unstopped.tokens[12];
    let first = unstopped.tokens.iter().position(|&token| token == stop).unwrap();
    let found = run(request().stop_token(stop));
    assert_eq!(found.finish.reason, FinishReason::StopToken(stop));
    assert_eq!(found.tokens, unstopped.tokens[..=first]);
    assert_eq!(found.text, tokenizer().decode(&unstopped.tokens[..first], SpecialTokens::Without));
}

#[test]
fn end_tokens_end_the_text_unless_ignored() {
    let ask = || Request::chat([Message::user("Explain error E0382.")]);
    let found = run(ask());
    assert_eq!(found.finish.reason, FinishReason::StopToken(2));
    assert_eq!(found.tokens.last(), Some(&2));
    assert!(!found.text.contains("<|im_end|>"));
    let longer = run(ask().ignore_eos().max_tokens(found.tokens.len() + 5));
    assert_eq!(longer.tokens[..found.tokens.len()], found.tokens);
    assert_eq!(longer.tokens.len(), found.tokens.len() + 5);
    assert_eq!(longer.finish.reason, FinishReason::Length);
    // `min_tokens` puts another token in the place of the end.
    let held = run(ask().min_tokens(found.tokens.len() + 5).max_tokens(found.tokens.len() + 5));
    assert_eq!(held.tokens[..found.tokens.len() - 1], found.tokens[..found.tokens.len() - 1]);
    assert!(!held.tokens.contains(&2) && held.tokens.len() == found.tokens.len() + 5);
}

#[test]
fn max_tokens_and_the_context_end_the_text() {
    for max_tokens in [1, 2, 17] {
        let found = run(request().max_tokens(max_tokens));
        assert_eq!((found.tokens.len(), found.finish.reason), (max_tokens, FinishReason::Length));
    }
    let engine = load(Engine::load(FERRIS).max_context(50));
    let found = complete(&engine, request().max_tokens(1000));
    assert_eq!((found.tokens.len(), found.finish.reason), (50 - 40, FinishReason::Length));
}

#[test]
fn min_tokens_looks_for_no_stop_string_before() {
    let unstopped = run(request());
    let stop = unstopped.text.chars().nth(3).unwrap().to_string();
    assert!(run(request().stop(&*stop)).tokens.len() < 20);
    let found = run(request().stop(&*stop).min_tokens(20));
    assert!(found.tokens.len() >= 20);
    assert_eq!(found.tokens, unstopped.tokens[..found.tokens.len()]);
}

#[test]
fn a_chat_is_its_template_written_out() {
    let found = run(Request::chat([Message::user("Explain error E0382.")]).max_tokens(30));
    let text = "<|im_start|>user\nExplain error E0382.<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(found.tokens, run(Request::text(text).max_tokens(30)).tokens);
    assert_eq!(found.finish.usage.prompt_tokens, 21);
    assert!(found.text.starts_with("A type or const parameter"), "{}", found.text);
}

/// By the model's own logits, whatever was done to them to pick a token.
#[test]
fn logprobs_are_the_log_softmax_of_the_logits() {
    let plain = request().max_tokens(12).logprobs(5);
    let bent = plain.clone().temperature(0.8).seed(3).repetition_penalty(1.3).logit_bias(300, 2.0).top_k(50);
    for request in [plain, bent] {
        let found = run(request);
        assert_eq!(found.logprobs.len(), found.tokens.len());
        let mut ids = tokenizer().encode(PROMPT, SpecialTokens::With).unwrap();
        let prompt_len = ids.len();
        ids.extend(&found.tokens);
        let logits = ENGINE.blocking().prompt_logits(ids).unwrap();
        for (row, logprob) in logits.rows().skip(prompt_len - 1).zip(&found.logprobs) {
            let close = |id, logprob: f32| (log_softmax(row, id) - f64::from(logprob)).abs() < 1e-4;
            assert!(close(logprob.id, logprob.logprob), "{logprob:?}, wanted {}", log_softmax(row, logprob.id));
            assert_eq!(logprob.top.len(), 5);
            assert!(logprob.top.iter().all(|&(id, logprob)| close(id, logprob)), "{logprob:?}");
            assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1), "{logprob:?}");
            assert_eq!(logprob.top[0].0, argmax(row));
        }
        assert!(found.logprobs.iter().map(|logprob| logprob.id).eq(found.tokens));
    }
    assert!(run(request()).logprobs.is_empty());
    let without_alternatives = run(request().logprobs(0));
    assert!(without_alternatives.logprobs.iter().all(|logprob| logprob.top.is_empty()));
    assert_eq!(without_alternatives.logprobs.len(), 40);
}

#[test]
fn a_bias_makes_and_bans_tokens() {
    assert_eq!(run(request().max_tokens(5).logit_bias(77, 1e4)).tokens, [77; 5]);
    let free = run(request());
    let banned = free.tokens.iter().fold(request(), |request, &token| request.logit_bias(token, f32::NEG_INFINITY));
    assert!(run(banned).tokens.iter().all(|token| !free.tokens.contains(token)));
    assert_eq!(run(request().logit_bias(77, 3.0).logit_bias(77, -3.0)).tokens, free.tokens, "biases are added");
}

#[test]
fn penalties_put_off_repetition() {
    let prompt = Request::text("the the the the the").max_tokens(30).ignore_eos();
    let num_distinct = |request: Request| {
        let mut tokens = run(request).tokens;
        tokens.sort_unstable();
        tokens.dedup();
        tokens.len()
    };
    let free = num_distinct(prompt.clone());
    assert!(free < 30, "nothing is repeated in the first place");
    // Stronger than the distance of any two logits.
    assert_eq!(num_distinct(prompt.clone().presence_penalty(1000.0)), 30);
    assert_eq!(num_distinct(prompt.clone().frequency_penalty(1000.0)), 30);
    assert!(num_distinct(prompt.clone().repetition_penalty(1.5)) > free);
    // Of these, only the repetition penalty looks at the prompt.
    let the = tokenizer().encode("the the", SpecialTokens::Without).unwrap()[1];
    let favoured = || prompt.clone().max_tokens(1).logit_bias(the, 30.0);
    assert_eq!(run(favoured().presence_penalty(20.0)).tokens, [the]);
    assert_ne!(run(favoured().repetition_penalty(100.0)).tokens, [the]);
}

#[test]
fn a_seed_is_a_continuation() {
    let sampled = || request().temperature(1.0);
    let with_seed = |seed| run(sampled().seed(seed)).tokens;
    assert_eq!(with_seed(1), with_seed(1));
    assert_ne!(with_seed(1), with_seed(2));
    let (first, second) = (run(sampled()), run(sampled()));
    assert_ne!(first.finish.seed, second.finish.seed, "seeds are drawn anew");
    assert_ne!(first.tokens, second.tokens);
    assert_eq!(with_seed(first.finish.seed), first.tokens);
    assert_eq!(run(sampled().seed(5)).finish.seed, 5);
    assert_eq!(run(sampled().top_k(1)).tokens, run(request()).tokens, "the most likely token is the greedy one");
    assert_eq!(run(sampled().top_p(1e-6)).tokens, run(request()).tokens);
    assert_eq!(run(sampled().min_p(1.0)).tokens, run(request()).tokens);
}

/// Four thousand draws of one token against the probabilities that the logits say.
#[test]
fn samples_are_distributed_as_the_logits_say() {
    const NUM_DRAWS: usize = 4000;
    let engine = load(Engine::load(tiny()));
    let prompt = golden_prompts("llama-mha").remove(0).ids;
    let logits = engine.blocking().prompt_logits(&prompt[..]).unwrap();
    let row = logits.rows().last().unwrap();
    let mut random = Random(9);
    let draws = (0..NUM_DRAWS)
        .map(|_| Request::tokens(prompt.clone()).max_tokens(1).ignore_eos().temperature(1.0).seed(random.next()));
    let mut counts = vec![0.0; row.len()];
    common::complete_all(&engine, draws).iter().for_each(|found| counts[found.tokens[0] as usize] += 1.0);
    for (id, count) in counts.iter().enumerate() {
        let p = log_softmax(row, id as u32).exp();
        let expected = p * NUM_DRAWS as f64;
        let deviation = (expected * (1.0 - p)).sqrt();
        // Seeds are fixed: this holds or not, it is not a matter of luck.
        assert!((count - expected).abs() < 5.0 * deviation + 3.0, "token {id}: {count} draws, expected {expected}");
    }
}
