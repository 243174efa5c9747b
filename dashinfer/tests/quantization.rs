//! What quantizing costs: perplexity, divergence and agreement on the bundled model's text, logits of the goldens, and that it changes
//! nothing of what the engine promises.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::fs;
use std::path::Path;

use common::{Expected, FERRIS, argmax, complete, golden_folders, load, log_softmax, tiny};
use dashinfer::{Device, Engine, Quantization, Request, Scheme, SpecialTokens};
use futures::executor::block_on;
use futures::future::join_all;

/// What a scheme may cost on the bundled model's text, layers and vocabulary quantized alike.
struct Bound {
    scheme: &'static str,
    /// The perplexity may be higher by this part.
    perplexity: f64,
    /// Mean of Σ p ln (p / q) over all positions, in nats, p being the model as it is stored.
    divergence: f64,
    /// Positions at which the likeliest token stays the same.
    agreement: f64,
}

/// Twice what was measured, and no more than is promised: int8 0.5 %, int4 with groups of 32 4 %, A8W8 1 %.
const BOUNDS: &[Bound] = &[
    Bound { scheme: "a16w8", perplexity: 0.005, divergence: 0.002, agreement: 0.98 },
    Bound { scheme: "a16w8-g32", perplexity: 0.005, divergence: 0.001, agreement: 0.98 },
    Bound { scheme: "a16w8-g64", perplexity: 0.005, divergence: 0.001, agreement: 0.98 },
    Bound { scheme: "a16w8-g128", perplexity: 0.005, divergence: 0.001, agreement: 0.98 },
    Bound { scheme: "a8w8", perplexity: 0.01, divergence: 0.004, agreement: 0.96 },
    Bound { scheme: "a16w4-g32", perplexity: 0.04, divergence: 0.06, agreement: 0.85 },
    Bound { scheme: "a16w4-g32-zp", perplexity: 0.04, divergence: 0.06, agreement: 0.85 },
    Bound { scheme: "a8w4-g32", perplexity: 0.04, divergence: 0.06, agreement: 0.85 },
    Bound { scheme: "a8w4-g32-zp", perplexity: 0.04, divergence: 0.06, agreement: 0.85 },
    Bound { scheme: "a16w4-g64", perplexity: 0.08, divergence: 0.1, agreement: 0.8 },
    Bound { scheme: "a16w4-g64-zp", perplexity: 0.08, divergence: 0.1, agreement: 0.8 },
    Bound { scheme: "a16w4-g128", perplexity: 0.12, divergence: 0.15, agreement: 0.8 },
    Bound { scheme: "a16w4-g128-zp", perplexity: 0.12, divergence: 0.15, agreement: 0.8 },
    Bound { scheme: "a8w4-g64", perplexity: 0.08, divergence: 0.1, agreement: 0.8 },
    Bound { scheme: "a8w4-g64-zp", perplexity: 0.08, divergence: 0.1, agreement: 0.8 },
    Bound { scheme: "a8w4-g128", perplexity: 0.12, divergence: 0.15, agreement: 0.8 },
    Bound { scheme: "a8w4-g128-zp", perplexity: 0.12, divergence: 0.15, agreement: 0.8 },
];

/// Logits of all windows of the text, each with the tokens that follow.
fn logits(engine: &Engine, windows: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let all = windows.iter().flat_map(|window| {
        let logits = engine.blocking().prompt_logits(&window[..]).unwrap();
        logits.rows().take(window.len() - 1).map(<[f32]>::to_vec).collect::<Vec<_>>()
    });
    all.collect()
}

fn scheme(name: &str) -> Scheme {
    name.parse().unwrap()
}

/// All of a model by one scheme.
fn whole(scheme: Scheme) -> Quantization {
    Quantization::new(scheme).vocabulary(Some(scheme))
}

fn on_gpu() -> bool {
    let gpu = load(Engine::load(tiny())).model().device != "cpu";
    if gpu {
        eprintln!("skipped: weights are quantized on the CPU only");
    }
    gpu
}

#[test]
fn every_scheme_stays_within_its_bounds_on_the_bundled_models_text() {
    if on_gpu() {
        return;
    }
    let text = fs::read_to_string(Path::new(FERRIS).join("perplexity.txt")).unwrap();
    let exact = load(Engine::load(FERRIS));
    let tokens = exact.tokenizer().unwrap().encode(&text, SpecialTokens::Without).unwrap();
    let windows: Vec<Vec<u32>> = tokens.chunks(1024).map(<[u32]>::to_vec).collect();
    let next: Vec<u32> = windows.iter().flat_map(|window| window[1..].to_vec()).collect();
    let wanted = logits(&exact, &windows);
    let likelihood = |logits: &[Vec<f32>]| {
        let sum: f64 = logits.iter().zip(&next).map(|(row, &next)| log_softmax(row, next)).sum();
        sum / next.len() as f64
    };
    let perplexity = (-likelihood(&wanted)).exp();
    assert_eq!(BOUNDS.len(), Scheme::ALL.len(), "every scheme has bounds");
    let mut beyond = Vec::new();
    for bound in BOUNDS {
        let engine = load(Engine::load(FERRIS).quantize(scheme(bound.scheme)));
        let found = logits(&engine, &windows);
        let worse = (-likelihood(&found)).exp() / perplexity - 1.0;
        let divergences = wanted.iter().zip(&found).map(|(p, q)| divergence(p, q));
        let divergence = divergences.sum::<f64>() / wanted.len() as f64;
        let same = wanted.iter().zip(&found).filter(|(p, q)| argmax(p) == argmax(q)).count();
        let agreement = same as f64 / wanted.len() as f64;
        eprintln!("{}: perplexity {worse:+.4}, divergence {divergence:.5}, agreement {agreement:.4}", bound.scheme);
        if worse > bound.perplexity || divergence > bound.divergence || agreement < bound.agreement {
            beyond.push(bound.scheme);
        }
    }
    assert!(beyond.is_empty(), "beyond their bounds: {}", beyond.join(", "));
}

/// Σ p ln (p / q) of two rows of logits.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let norm = |row: &[f32]| log_softmax(row, 0) - f64::from(row[0]);
    let (norm_p, norm_q) = (norm(p), norm(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) + norm_p, f64::from(q) + norm_q);
        p.exp() * (p - q)
    });
    terms.sum()
}
