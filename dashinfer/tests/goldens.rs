//! The engine against `transformers`: every golden through requests, steps and streams. The bounds are those of
//! `goldens/README.md` for a path that computes in f32.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::cell::Cell;
use std::fs;
use std::path::Path;

use common::{Expected, ExpectedPrompt, complete_all, golden_folders, load, max_abs_diff};
use dashinfer::{Engine, Quantization, Request};

/// In units of the largest logit of the case.
const LOGITS: f32 = 2e-3;
const MARGIN: f32 = 4e-3;

struct Case {
    name: String,
    scale: f32,
    prompts: Vec<ExpectedPrompt>,
    engine: Engine,
}

impl Case {
    fn load(folder: &Path) -> Self {
        let meta: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("meta.json")).unwrap()).unwrap();
        Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            scale: meta["max_abs_logit"].as_f64().unwrap() as f32,
            prompts: Expected::read(folder).prompts("logits"),
            engine: load(Engine::load(folder).quantize(Quantization::NONE)),
        }
    }

    /// The prompts that stay within `line` tokens, with an engine for no more; and the others, with one for all that the model can.
    /// Where the reference decides by the length of each sequence, an engine decides by the longest that it takes.
    fn load_by_context(folder: &Path, line: usize) -> [Self; 2] {
        let [mut short, mut long] = [Self::load(folder), Self::load(folder)];
        short.prompts.retain(|prompt| prompt.ids.len() + prompt.greedy_ids.len() <= line);
        short.engine = load(Engine::load(folder).max_context(line));
        long.prompts.retain(|prompt| prompt.ids.len() > line);
        assert!(!short.prompts.is_empty() && !long.prompts.is_empty());
        [short, long]
    }
}

fn check_every_case(check: impl Fn(&Case)) {
    let folders = golden_folders();
    assert!(folders.len() >= 14, "only {} goldens are left", folders.len());
    for folder in folders {
        match folder.file_name().and_then(|name| name.to_str()) {
            Some("phi3-longrope") => Case::load_by_context(&folder, 112).iter().for_each(&check),
            _ => check(&Case::load(&folder)),
        }
    }
}

#[test]
fn prompt_logits_are_those_of_the_reference() {
    check_every_case(|case| {
        for (number, prompt) in case.prompts.iter().enumerate() {
            let found = case.engine.blocking().prompt_logits(&prompt.ids[..]).unwrap();
            let worst = max_abs_diff(found.values(), &prompt.logits);
            let bound = LOGITS * case.scale;
            assert!(worst <= bound, "{}: prompt {number} is off by {worst}, the bound is {bound}", case.name);
        }
    });
}

/// Before a near-tie the tokens are equal; behind one, two right engines may go different ways.
#[test]
fn greedy_continuations_are_those_of_the_reference() {
    // By the recorded margins, about half of the tokens come before their prompt's first near-tie.
    let (num_compared, num_recorded) = (Cell::new(0), Cell::new(0));
    check_every_case(|case| {
        let requests = case.prompts.iter().map(|prompt| greedy(prompt.ids.clone(), prompt.greedy_ids.len()));
        for (prompt, found) in case.prompts.iter().zip(complete_all(&case.engine, requests)) {
            let margins = &prompt.greedy_margins;
            let sure = margins.iter().position(|&margin| margin <= MARGIN * case.scale).unwrap_or(margins.len());
            assert_eq!(found.tokens.len(), prompt.greedy_ids.len(), "{}", case.name);
            assert_eq!(found.tokens[..sure], prompt.greedy_ids[..sure], "{}", case.name);
            num_compared.update(|num| num + sure);
            num_recorded.update(|num| num + margins.len());
        }
    });
    assert!(num_compared.get() * 3 > num_recorded.get(), "{num_compared:?} of {num_recorded:?} were compared");
}

/// Step by step, fed the reference's tokens, so that a near-tie hides only itself.
#[test]
fn each_greedy_token_follows_from_the_reference_before_it() {
    check_every_case(|case| {
        for prompt in &case.prompts {
            let steps = 0..prompt.greedy_ids.len();
            let requests = steps.clone().map(|step| {
                let mut ids = prompt.ids.clone();
                ids.extend(&prompt.greedy_ids[..step]);
                greedy(ids, 1)
            });
            let found = complete_all(&case.engine, requests);
            for step in steps.filter(|&step| prompt.greedy_margins[step] > MARGIN * case.scale) {
                assert_eq!(found[step].tokens, [prompt.greedy_ids[step]], "{}: step {step}", case.name);
            }
        }
    });
}

fn greedy(ids: Vec<u32>, max_tokens: usize) -> Request {
    Request::tokens(ids).temperature(0.0).max_tokens(max_tokens).ignore_eos()
}
