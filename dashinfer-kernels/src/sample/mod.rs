//! Picking a token from a row of logits.
//!
//! [`sample_row`] is the CPU's sampler and the definition for every other one. A sort of 150,000 logits would take
//! longer than all that it does: top-k looks only into the blocks of the row whose maximum can matter, and top-p sums
//! the weights in buckets by size.

mod draw;
mod edit;
mod filter;
mod philox;
mod softmax;

#[cfg(feature = "cuda")]
pub(crate) use philox::uniform;
use softmax::Softmax;

/// How a request picks its tokens. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleParams {
    /// Divides the logits; 0 is greedy, as is what is not above 0.
    pub temperature: f32,
    /// Keep the `k` most likely tokens; 1 is greedy.
    pub top_k: Option<std::num::NonZeroU32>,
    /// Keep the fewest most likely tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of tokens seen in prompt or output, multiplies negative ones; 1 is off.
    /// <https://arxiv.org/abs/1909.05858>
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of every token in the output, times its count; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, before the penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seeds the counter-based generator; the other half of the counter is the position.
    pub seed: u64,
    /// Report the chosen token's log-probability, and those of this many most likely tokens.
    pub logprobs: Option<usize>,
}

impl SampleParams {
    /// The most likely token, with nothing else said.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        logprobs: None,
    };
}

impl Default for SampleParams {
    fn default() -> Self {
        Self::GREEDY
    }
}

/// One row to sample: whose logits, by which rules, after which tokens.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// The row of the logits tensor.
    pub logits_row: usize,
    /// The rules.
    pub params: &'a SampleParams,
    /// The position that the sampled token will have.
    pub position: u64,
    /// The prompt's tokens (for the repetition penalty). Here as below, ids beyond the row are ignored.
    pub prompt: &'a [u32],
    /// The tokens generated so far (for all penalties).
    pub generated: &'a [u32],
    /// Tokens that must not be picked (end tokens before `min_tokens`).
    pub banned: &'a [u32],
    /// The only tokens that may be picked (what a grammar allows): bit `i % 32` of word `i / 32` is set for token `i`, and
    /// tokens beyond its end may not. `None` allows all; bans hold besides.
    pub allowed: Option<&'a [u32]>,
    /// With `Some(i)`, one more token follows `generated`, which the host does not know yet: the one that was sampled for row
    /// `i` of the sampling before this one. Only a backend with a [depth](crate::Backend::depth) above 0 is given such rows;
    /// [`sample_row`] has nowhere to look and ignores it.
    pub carried: Option<u32>,
}

impl<'a> SampleRow<'a> {
    /// A row without history, which may pick any token.
    #[must_use]
    pub const fn new(logits_row: usize, params: &'a SampleParams, position: u64) -> Self {
        Self { logits_row, params, position, prompt: &[], generated: &[], banned: &[], allowed: None, carried: None }
    }

    /// Whether neither `banned` nor `allowed` is against this token.
    fn may_pick(&self, id: u32) -> bool {
        let allowed = |mask: &[u32]| mask.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
        self.allowed.is_none_or(allowed) && !self.banned.contains(&id)
    }
}

/// A sampled token. Log-probabilities are those of the model: of the logits before penalties, bias and temperature.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its log-probability, if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with their log-probabilities, most likely first, if asked for.
    pub top: Vec<(u32, f32)>,
}

/// Memory that [`sample_row`] reuses: it grows to the vocabulary once, after which a token allocates nothing but the
/// list of alternatives that it reports. One scratch serves any number of rows and requests, one at a time.
#[derive(Debug, Clone, Default)]
pub struct SampleScratch {
    /// How often each token was seen; all 0 between uses.
    seen: Vec<u32>,
    /// The row before the edits.
    raw: Vec<f32>,
    /// The logits that a filter left.
    likely: filter::Likely,
    /// The weights of those logits, or of the whole row.
    weights: Vec<f32>,
    nucleus: filter::Nucleus,
}

impl SampleScratch {
    /// An empty scratch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// Picks a token from `logits`, the row that `row` speaks of: `[V]`. The steps, in this order:
///
/// 1. Log-probabilities, if asked for: those of the logits as they came.
/// 2. Logit bias, repetition penalty, frequency penalty, presence penalty (vLLM's order), and last the bans and what
///    is not among the allowed, so that nothing undoes them. Only the logits that these name are overwritten.
/// 3. A greedy request takes the largest logit, the lowest id of a tie.
/// 4. Temperature, then top-k, then top-p on what top-k left, then min-p. (transformers and SGLang have this order;
///    vLLM has min-p before top-p, which differs if both are set.) Each filter is a threshold: what ties with the last
///    token kept is kept too.
/// 5. One number in `0.0..1.0`, a function of seed and position, picks from the kept tokens in the order of their ids.
///
/// `NaN` is never picked, and +∞ counts as `f32::MAX`. If no logit is above -∞, the lowest id that is allowed and
/// not banned is picked, or 0 if there is none. The result depends on `logits` and `row` alone.
pub fn sample_row(logits: &mut [f32], row: &SampleRow<'_>, scratch: &mut SampleScratch) -> Sampled {
    let params = row.params;
    let model = params.logprobs.map(|num_top| {
        scratch.raw.clear();
        scratch.raw.extend_from_slice(logits);
        LogProbs::new(&scratch.raw, num_top, &mut scratch.likely)
    });
    edit::edit(logits, row, &mut scratch.seen);
    let greedy = params.temperature.is_nan() || params.temperature <= 0.0 || params.top_k.is_some_and(|k| k.get() == 1);
    let id = match softmax::argmax(logits) {
        None => (0..logits.len() as u32).find(|&id| row.may_pick(id)).unwrap_or(0),
        Some(best) if greedy => best as u32,
        Some(best) => {
            let u = philox::uniform(params.seed, row.position);
            draw::draw(logits, logits[best], params, u, scratch)
        }
    };
    let Some(model) = model else { return Sampled { id, ..Sampled::default() } };
    let logit = scratch.raw.get(id as usize).copied().unwrap_or(f32::NAN);
    Sampled { id, logprob: Some(model.of(logit)), top: model.top }
}

/// The log-probability of a logit, given the largest of its row and the logarithm of the sum of weights relative to that.
#[cfg(feature = "cuda")]
pub(crate) fn logprob(logit: f32, max: f32, log_sum: f64) -> f32 {
    Softmax::new(max, 1.0).logprob(logit, log_sum)
}

/// The log-probabilities of the row as it came.
struct LogProbs {
    softmax: Softmax,
    log_sum: f64,
    top: Vec<(u32, f32)>,
}

impl LogProbs {
    fn new(logits: &[f32], num_top: usize, likely: &mut filter::Likely) -> Self {
        let softmax = Softmax::new(softmax::max(logits), 1.0);
        let mut model = Self { softmax, log_sum: softmax.log_sum(logits), top: Vec::new() };
        if num_top > 0 {
            likely.find(logits, num_top);
            let mut top: Vec<(u32, f32)> = likely.iter().collect();
            // Stable, so ties (-0 and 0 are one) stay in the order of their ids. There is no `NaN` to compare.
            top.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal));
            top.truncate(num_top);
            for (_, x) in &mut top {
                *x = model.of(*x);
            }
            model.top = top;
        }
        model
    }

    fn of(&self, logit: f32) -> f32 {
        self.softmax.logprob(logit, self.log_sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    static NO_PARAMS: SampleParams = SampleParams::GREEDY;
    const NO_ROW: SampleRow<'static> = SampleRow::new(0, &NO_PARAMS, 0);
    const GREEDY: SampleParams = SampleParams::GREEDY;

    fn sampled(logits: &[f32], row: SampleRow<'_>) -> Sampled {
        sample_row(&mut logits.to_vec(), &row, &mut SampleScratch::new())
    }

    /// Logits that look like a model's: a few likely tokens above a long tail.
    fn model_like(vocab: usize, seed: u64) -> Vec<f32> {
        let u = |i: usize, draw: u64| philox::uniform(seed, (i as u64) << 8 | draw);
        (0..vocab)
            .map(|i| {
                // A sum of uniform numbers is nearly normal; some tokens stand out.
                let normal = (0..6).map(|draw| u(i, draw)).sum::<f64>() - 3.0;
                let peak = if u(i, 7) < 40.0 / vocab as f64 { 8.0 * u(i, 8) } else { 0.0 };
                (3.0 * normal + peak) as f32
            })
            .collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lower_id_of_a_tie() {
        let check = |logits: &[f32], expected| {
            assert_eq!(sampled(logits, NO_ROW).id, expected, "{logits:?}");
            let warm = SampleParams { temperature: 1.0, top_k: NonZeroU32::new(1), ..GREEDY };
            assert_eq!(sampled(logits, SampleRow { params: &warm, ..NO_ROW }).id, expected, "top_k 1: {logits:?}");
        };
        check(&[1.0, 3.0, 3.0, 2.0], 1);
        check(&[f32::NAN, -1.0, f32::NAN, -0.5], 3);
        check(&[f32::NEG_INFINITY, -1e38], 1);
        check(&[0.0, f32::INFINITY, f32::INFINITY], 1);
        check(&[-0.0, 0.0], 0);
    }

    #[test]
    fn a_row_without_a_usable_logit_gives_the_lowest_id_that_is_not_banned() {
        let hot = SampleParams { temperature: 1.0, top_p: 0.9, logprobs: Some(2), ..GREEDY };
        for logits in [[f32::NAN; 3], [f32::NEG_INFINITY; 3]] {
            for params in [&GREEDY, &hot] {
                let id = |banned| sampled(&logits, SampleRow { params, banned, ..NO_ROW }).id;
                assert_eq!(id(&[]), 0);
                assert_eq!(id(&[1, 0]), 2);
                assert_eq!(id(&[1, 0, 2]), 0);
            }
            let sampled = sampled(&logits, SampleRow { params: &hot, ..NO_ROW });
            assert_eq!((sampled.logprob, sampled.top), (Some(f32::NEG_INFINITY), vec![]));
        }
        assert_eq!(sampled(&[], SampleRow { params: &hot, ..NO_ROW }).id, 0);
        let all_banned = SampleRow { params: &hot, banned: &[0, 1], ..NO_ROW };
        assert_eq!(sampled(&[1.0, 2.0], all_banned).id, 0);
    }

    #[test]
    fn a_banned_token_is_never_picked() {
        let hot = SampleParams { temperature: 5.0, logit_bias: vec![(2, 100.0)], ..GREEDY };
        for position in 0..500 {
            let row = SampleRow { params: &hot, position, banned: &[2, 0], ..NO_ROW };
            assert!(matches!(sampled(&[9.0, 0.0, 9.0, 0.0], row).id, 1 | 3));
        }
        assert_eq!(sampled(&[1.0, 5.0, 4.0], SampleRow { banned: &[1], ..NO_ROW }).id, 2);
    }

    #[test]
    fn only_allowed_tokens_are_picked() {
        let hot = SampleParams { temperature: 5.0, logit_bias: vec![(2, 100.0)], ..GREEDY };
        let logits: Vec<f32> = (0..70).map(|i| i as f32).collect();
        let mask = [1 << 3 | 1 << 7, 0, 1 << 1];
        for position in 0..500 {
            let row = SampleRow { params: &hot, position, banned: &[7], allowed: Some(&mask), ..NO_ROW };
            assert!(matches!(sampled(&logits, row).id, 3 | 65));
        }
        let greedy = |allowed: &[u32], banned: &[u32]| {
            sampled(&logits, SampleRow { allowed: Some(allowed), banned, ..NO_ROW }).id
        };
        assert_eq!(greedy(&mask, &[]), 65);
        assert_eq!(greedy(&mask[..1], &[]), 7, "what lies beyond the mask is not allowed");
        assert_eq!(greedy(&[u32::MAX; 9], &[]), 69, "a mask may be longer than the row");
        assert_eq!(greedy(&[], &[]), 0, "nothing to pick");
        // The lowest allowed id, where the row has no usable logit.
        let row = SampleRow { allowed: Some(&mask), banned: &[3], ..NO_ROW };
        assert_eq!(sampled(&[f32::NAN; 70], row).id, 7);
    }

    #[test]
    fn logprobs_are_those_of_the_untouched_row() {
        let logits = [1.0, 2.0, 2.0, -1.0, f32::NEG_INFINITY, f32::NAN];
        let params = SampleParams {
            logit_bias: vec![(3, 50.0)],
            repetition_penalty: 3.0,
            presence_penalty: 1.0,
            logprobs: Some(3),
            ..GREEDY
        };
        let row = SampleRow { params: &params, prompt: &[1], generated: &[2], banned: &[0], ..NO_ROW };
        let log_sum = (1f64.exp() + 2.0 * 2f64.exp() + (-1f64).exp()).ln();
        let expected = |x: f64| (x - log_sum) as f32;
        let found = sampled(&logits, row);
        assert_eq!(found.id, 3);
        let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-6, "{a} and {b}");
        close(found.logprob.unwrap(), expected(-1.0));
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        close(found.top[0].1, expected(2.0));
        close(found.top[2].1, expected(1.0));

        let top = |n| {
            let params = SampleParams { logprobs: Some(n), ..GREEDY };
            sampled(&logits, SampleRow { params: &params, ..NO_ROW }).top
        };
        assert_eq!(top(0), []);
        assert_eq!(top(1).len(), 1, "a tie at the end is cut");
        assert_eq!(top(100).len(), 4, "-∞ and NaN are no alternatives");
        assert_eq!(sampled(&logits, NO_ROW), Sampled { id: 1, logprob: None, top: vec![] });
    }

    #[test]
    fn logprobs_of_a_large_row_match_f64() {
        let logits = model_like(30_011, 3);
        let params = SampleParams { temperature: 0.8, logprobs: Some(20), ..GREEDY };
        let found = sampled(&logits, SampleRow { params: &params, ..NO_ROW });
        let log_sum = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (found, expected) in found.top.iter().zip(&sorted) {
            assert_eq!(found.0, expected.0);
            assert!((f64::from(found.1) - (f64::from(expected.1) - log_sum)).abs() < 2e-6);
        }
    }

    /// Draws at many positions; compares how often each token came with `probabilities`.
    fn check_distribution(logits: &[f32], params: &SampleParams, probabilities: &[f64]) {
        const NUM_DRAWS: u64 = 40_000;
        let mut counts = vec![0u32; logits.len()];
        let mut scratch = SampleScratch::new();
        for position in 0..NUM_DRAWS {
            let row = SampleRow { params, position, ..NO_ROW };
            counts[sample_row(&mut logits.to_vec(), &row, &mut scratch).id as usize] += 1;
        }
        let total: f64 = probabilities.iter().sum();
        let (mut chi_square, mut freedom) = (0.0, -1.0f64);
        // Rare tokens share one bin: a bin wants some draws for chi² to be what it is.
        let mut rare = (0.0, 0.0);
        let mut add = |expected: f64, count: f64| {
            chi_square += (count - expected).powi(2) / expected;
            freedom += 1.0;
        };
        for (&p, &count) in probabilities.iter().zip(&counts) {
            let expected = p / total * NUM_DRAWS as f64;
            if p == 0.0 {
                assert_eq!(count, 0, "a filtered token was picked: {params:?}");
            } else if expected < 10.0 {
                rare = (rare.0 + expected, rare.1 + f64::from(count));
            } else {
                add(expected, f64::from(count));
            }
        }
        if rare.0 >= 10.0 {
            add(rare.0, rare.1);
        }
        // Mean `freedom`, variance twice that: five standard deviations.
        let bound = freedom + 5.0 * (2.0 * freedom).sqrt();
        assert!(chi_square <= bound, "chi² {chi_square} over {bound}: {params:?}");
    }

    #[test]
    fn draws_follow_the_softmax_and_its_filters() {
        let logits: Vec<f32> = (0..150).map(|i| ((i * 67) % 150) as f32 * -0.05).collect();
        let weight = |temperature: f64| move |&x: &f32| (f64::from(x) / temperature).exp();
        let with = |temperature: f64, keep: &dyn Fn(f32) -> bool| -> Vec<f64> {
            logits.iter().map(|x| if keep(*x) { weight(temperature)(x) } else { 0.0 }).collect()
        };
        let hot = SampleParams { temperature: 1.0, seed: 7, ..GREEDY };
        check_distribution(&logits, &hot, &with(1.0, &|_| true));
        for (temperature, seed) in [(0.5, 1), (2.0, u64::MAX)] {
            let params = SampleParams { temperature: temperature as f32, seed, ..GREEDY };
            check_distribution(&logits, &params, &with(temperature, &|_| true));
        }
        let top_k = SampleParams { top_k: NonZeroU32::new(20), ..hot.clone() };
        check_distribution(&logits, &top_k, &with(1.0, &|x| x > -0.05 * 19.5));
        // The weights are powers of q = exp(-0.05): the first n hold 1 - qⁿ of the mass 1 - q¹⁵⁰.
        let q = (-0.05f64).exp();
        let n = ((1.0 - 0.7 * (1.0 - q.powi(150))).ln() / q.ln()).ceil();
        let top_p = SampleParams { top_p: 0.7, ..hot.clone() };
        check_distribution(&logits, &top_p, &with(1.0, &|x| f64::from(x) > -0.05 * (n - 0.5)));
        // Top-p counts the mass that top-k left.
        let n = ((1.0 - 0.7 * (1.0 - q.powi(20))).ln() / q.ln()).ceil();
        let both = SampleParams { top_p: 0.7, ..top_k };
        check_distribution(&logits, &both, &with(1.0, &|x| f64::from(x) > -0.05 * (n - 0.5)));
        let min_p = SampleParams { min_p: 0.3, ..hot };
        check_distribution(&logits, &min_p, &with(1.0, &|x| f64::from(x) > 0.3f64.ln()));
    }

    #[test]
    fn seed_and_position_alone_decide_the_draw() {
        let (a, b) = (model_like(5000, 1), model_like(700, 2));
        let params = SampleParams {
            temperature: 1.3,
            top_k: NonZeroU32::new(300),
            top_p: 0.95,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            seed: 99,
            logprobs: Some(5),
            ..GREEDY
        };
        let row = |position| SampleRow { params: &params, position, prompt: &[1, 2, 3], generated: &[2, 9], ..NO_ROW };
        let mut scratch = SampleScratch::new();
        let mut ids = std::collections::HashSet::new();
        for position in 0..200 {
            let alone = sampled(&a, row(position));
            sample_row(&mut b.clone(), &row(position + 1), &mut scratch);
            let after_another = sample_row(&mut a.clone(), &row(position), &mut scratch);
            assert_eq!(alone, after_another);
            ids.insert(alone.id);
        }
        assert!(ids.len() > 10, "positions hardly matter: {ids:?}");
        let other = SampleParams { seed: 100, ..params.clone() };
        let differs = (0..50).any(|p| sampled(&a, row(p)).id != sampled(&a, SampleRow { params: &other, ..row(p) }).id);
        assert!(differs, "the seed does not matter");
    }

    #[test]
    fn extreme_settings_and_logits_do_not_panic() {
        let rows: [&[f32]; 4] = [
            &[0.0; 130],
            &[f32::MAX, -f32::MAX, f32::INFINITY, f32::NAN, f32::NEG_INFINITY],
            &[f32::MIN_POSITIVE, -1e-45, 1e-45],
            &[-3.0],
        ];
        let values = [0.0, -1.0, 1e-45, 1e-7, 0.5, 1.0, 3e38, f32::INFINITY, f32::NAN];
        for logits in rows {
            for &a in &values {
                for &b in &values {
                    let params = SampleParams {
                        temperature: a,
                        top_k: NonZeroU32::new(2),
                        top_p: b,
                        min_p: a * 0.5,
                        repetition_penalty: b,
                        presence_penalty: a,
                        frequency_penalty: b,
                        logit_bias: vec![(0, a)],
                        logprobs: Some(3),
                        seed: 5,
                    };
                    let row = SampleRow { params: &params, prompt: &[0], generated: &[1, 1], ..NO_ROW };
                    assert!((sampled(logits, row).id as usize) < logits.len());
                    let all = SampleParams { top_k: None, ..params.clone() };
                    assert!((sampled(logits, SampleRow { params: &all, ..row }).id as usize) < logits.len());
                }
            }
        }
    }
}
