//! Mixture of experts: how tokens find their experts. <https://arxiv.org/abs/1701.06538>
//!
//! `N` is the number of experts of a layer. [`route`] is the definition: one token, in plain loops.

use crate::KernelError;
use crate::error::check;

/// How the tokens of a layer find their experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Experts of the layer, `N`.
    pub num_experts: usize,
    /// Experts of each token.
    pub top_k: usize,
    /// What makes scores of logits.
    pub scoring: Scoring,
    /// Which experts a token may choose from; `None`: all.
    pub groups: Option<ExpertGroups>,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub normalize: bool,
    /// Factor on the weights of the chosen experts, after that.
    pub scale: f32,
}

/// What makes scores of the router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// `1 / (1 + exp(-x))` of each (DeepSeek-V3). <https://arxiv.org/abs/2412.19437>
    Sigmoid,
}

/// Experts in groups of equal size, consecutive: a token chooses from its best groups only (DeepSeek-V2).
/// <https://arxiv.org/abs/2405.04434>
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups; they divide `N`.
    pub num_groups: usize,
    /// Groups of each token.
    pub top_groups: usize,
    /// What a group is judged by.
    pub score: GroupScore,
}

/// What a group of experts is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Max,
    /// The sum of its best two (DeepSeek-V3).
    TopTwo,
}

/// An expert that a token chose.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Chosen {
    /// Its index.
    pub expert: u32,
    /// The factor on what it computes.
    pub weight: f32,
}

impl Routing {
    /// Whether a token finds as many experts as it is to have.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    pub fn check(&self, op: &'static str) -> Result<(), KernelError> {
        let Self { num_experts, top_k, .. } = *self;
        if u32::try_from(num_experts).is_err() {
            let wanted = u32::MAX as usize;
            return Err(KernelError::Shape { op, what: "experts, at most", wanted, found: num_experts });
        }
        at_least(op, "experts of each token", 1, top_k)?;
        let Some(ExpertGroups { num_groups, top_groups, score }) = self.groups else {
            return at_least(op, "experts", top_k, num_experts);
        };
        let size = num_experts / num_groups.max(1);
        check(op, "experts in groups", num_experts, size.saturating_mul(num_groups))?;
        at_least(op, "experts of a group", if score == GroupScore::TopTwo { 2 } else { 1 }, size)?;
        at_least(op, "groups of experts", top_groups, num_groups)?;
        at_least(op, "experts of the groups of a token", top_k, size.saturating_mul(top_groups))
    }

    /// Values that [`route`] needs room for.
    #[must_use]
    pub fn scratch_len(&self) -> usize {
        self.num_experts.saturating_add(self.groups.map_or(0, |groups| groups.num_groups))
    }
}

fn at_least(op: &'static str, what: &'static str, wanted: usize, found: usize) -> Result<(), KernelError> {
    if found >= wanted { Ok(()) } else { Err(KernelError::Shape { op, what, wanted, found }) }
}

/// The experts of one token, with their weights, in ascending order of experts.
///
/// They are chosen by score plus correction, within the best groups if there are any, and weighted by the score alone. Of equals
/// the first is taken; what is not a number comes last.
///
/// `chosen`: `[top_k]`; `logits`, `correction`: `[N]`; `scratch`: [`scratch_len`](Routing::scratch_len) values.
///
/// # Errors
/// [`KernelError::Shape`] for these lengths, and those of [`Routing::check`].
pub fn route(
    chosen: &mut [Chosen],
    logits: &[f32],
    correction: Option<&[f32]>,
    routing: &Routing,
    scratch: &mut [f32],
) -> Result<(), KernelError> {
    const OP: &str = "route";
    routing.check(OP)?;
    check(OP, "number of the chosen", routing.top_k, chosen.len())?;
    check(OP, "number of logits", routing.num_experts, logits.len())?;
    check(OP, "length of the correction", routing.num_experts, correction.map_or(logits.len(), <[f32]>::len))?;
    check(OP, "length of the scratch", routing.scratch_len(), scratch.len())?;
    choose(chosen, logits, correction, routing, scratch);
    Ok(())
}

/// [`route`] of what was checked.
pub(crate) fn choose(
    chosen: &mut [Chosen],
    logits: &[f32],
    correction: Option<&[f32]>,
    routing: &Routing,
    scratch: &mut [f32],
) {
    let (scores, groups) = scratch.split_at_mut(routing.num_experts);
    score(scores, logits, routing.scoring);
    let scores = &*scores;
    let key = |expert: usize| order(scores[expert] + correction.map_or(0.0, |correction| correction[expert]));
    let size = routing.num_experts / groups.len().max(1);
    if let Some(ExpertGroups { score, .. }) = routing.groups {
        for (group, to) in groups.iter_mut().enumerate() {
            *to = group_score((group * size..(group + 1) * size).map(key), score);
        }
    }
    let is_open = |expert: usize| match routing.groups {
        Some(ExpertGroups { top_groups, .. }) => rank(groups, expert / size) < top_groups,
        None => true,
    };
    // The best so far, best first. An equal that comes later stands behind.
    let mut count = 0;
    for expert in (0..routing.num_experts).filter(|expert| is_open(*expert)) {
        let at =
            (0..count).rev().take_while(|at| key(expert) > key(chosen[*at].expert as usize)).last().unwrap_or(count);
        if at < chosen.len() {
            count = chosen.len().min(count + 1);
            chosen[at..count].rotate_right(1);
            chosen[at] = Chosen { expert: expert as u32, weight: scores[expert] };
        }
    }
    let total = if routing.normalize { chosen.iter().map(|chosen| chosen.weight).sum::<f32>() + TINY } else { 1.0 };
    chosen.iter_mut().for_each(|chosen| chosen.weight = chosen.weight / total * routing.scale);
    chosen.sort_unstable_by_key(|chosen| chosen.expert);
}

/// Beside a sum of scores, so that it is not zero; DeepSeek-V3's.
const TINY: f32 = 1e-20;

/// What is not a number comes last.
fn order(key: f32) -> f32 {
    if key.is_nan() { f32::NEG_INFINITY } else { key }
}

fn score(scores: &mut [f32], logits: &[f32], scoring: Scoring) {
    match scoring {
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for (score, logit) in scores.iter_mut().zip(logits) {
                *score = (logit - max).exp();
            }
            let total: f32 = scores.iter().sum();
            scores.iter_mut().for_each(|score| *score /= total);
        }
        Scoring::Sigmoid => {
            for (score, logit) in scores.iter_mut().zip(logits) {
                *score = 1.0 / (1.0 + (-logit).exp());
            }
        }
    }
}

fn group_score(keys: impl Iterator<Item = f32>, score: GroupScore) -> f32 {
    let [first, second] =
        keys.fold(
            [f32::NEG_INFINITY; 2],
            |[first, second], key| {
                if key > first { [key, first] } else { [first, second.max(key)] }
            },
        );
    match score {
        GroupScore::Max => first,
        GroupScore::TopTwo => first + second,
    }
}

/// How many groups come before `group`.
fn rank(groups: &[f32], group: usize) -> usize {
    let mine = groups[group];
    groups.iter().enumerate().filter(|(other, score)| **score > mine || (**score == mine && *other < group)).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::noise;

    const PLAIN: Routing =
        Routing { num_experts: 4, top_k: 2, scoring: Scoring::Softmax, groups: None, normalize: false, scale: 1.0 };

    fn routed(logits: &[f32], correction: Option<&[f32]>, routing: &Routing) -> Vec<(u32, f32)> {
        let mut chosen = vec![Chosen { expert: 99, weight: f32::NAN }; routing.top_k];
        let mut scratch = vec![f32::NAN; routing.scratch_len()];
        route(&mut chosen, logits, correction, routing, &mut scratch).unwrap();
        chosen.iter().map(|chosen| (chosen.expert, chosen.weight)).collect()
    }

    /// The definition again, in f64, by sorting all experts and all groups. Ascending order of experts.
    fn sorted(logits: &[f32], correction: Option<&[f32]>, routing: &Routing) -> Vec<(u32, f64)> {
        let exp: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
        let total: f64 = exp.iter().sum();
        let scores: Vec<f64> = exp
            .iter()
            .map(|e| match routing.scoring {
                Scoring::Softmax => e / total,
                Scoring::Sigmoid => e / (1.0 + e),
            })
            .collect();
        let keys: Vec<f64> =
            scores.iter().enumerate().map(|(i, s)| s + correction.map_or(0.0, |c| f64::from(c[i]))).collect();
        let descending = |mut indices: Vec<usize>, keys: &[f64]| {
            indices.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
            indices
        };
        let mut open: Vec<usize> = (0..keys.len()).collect();
        if let Some(groups) = routing.groups {
            let size = keys.len() / groups.num_groups;
            let of_group: Vec<f64> = keys
                .chunks(size)
                .map(|keys| {
                    let mut keys = keys.to_vec();
                    keys.sort_by(f64::total_cmp);
                    match groups.score {
                        GroupScore::Max => keys[size - 1],
                        GroupScore::TopTwo => keys[size - 1] + keys[size - 2],
                    }
                })
                .collect();
            let best = descending((0..groups.num_groups).collect(), &of_group);
            open.retain(|expert| best[..groups.top_groups].contains(&(expert / size)));
        }
        let mut best = descending(open, &keys);
        best.truncate(routing.top_k);
        best.sort_unstable();
        let total: f64 = if routing.normalize { best.iter().map(|expert| scores[*expert]).sum() } else { 1.0 };
        best.iter().map(|expert| (*expert as u32, scores[*expert] / total * f64::from(routing.scale))).collect()
    }

    proptest! {
        #[test]
        fn it_is_the_plain_definition(
            size in 2usize..9, num_groups in 1usize..9, top_groups in 1usize..9, top_k in 1usize..9, grouped: bool,
            sigmoid: bool, top_two: bool, normalize: bool, corrected: bool, seed: u64,
        ) {
            let num_experts = size * num_groups;
            let top_groups = top_groups.min(num_groups);
            let score = if top_two { GroupScore::TopTwo } else { GroupScore::Max };
            let routing = Routing {
                num_experts,
                top_k: top_k.min(size * top_groups),
                scoring: if sigmoid { Scoring::Sigmoid } else { Scoring::Softmax },
                groups: grouped.then_some(ExpertGroups { num_groups, top_groups, score }),
                normalize,
                scale: 2.5,
            };
            let logits: Vec<f32> = noise(num_experts, seed).iter().map(|x| 3.0 * x).collect();
            let correction = noise(num_experts, !seed);
            let correction = corrected.then_some(&correction[..]);
            let (found, wanted) = (routed(&logits, correction, &routing), sorted(&logits, correction, &routing));
            prop_assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(&wanted) {
                prop_assert_eq!(found.0, wanted.0);
                prop_assert!((f64::from(found.1) - wanted.1).abs() < 1e-5, "{} {}", found.1, wanted.1);
            }
        }
    }

    #[test]
    fn of_equals_the_first_is_taken() {
        let experts = |logits: &[f32]| -> Vec<u32> { routed(logits, None, &PLAIN).iter().map(|of| of.0).collect() };
        assert_eq!(experts(&[0.0; 4]), [0, 1]);
        assert_eq!(experts(&[0.0, 1.0, 0.0, 1.0]), [1, 3]);
        assert_eq!(experts(&[0.0, 0.0, 0.0, 1.0]), [0, 3]);
        let groups = Some(ExpertGroups { num_groups: 2, top_groups: 1, score: GroupScore::TopTwo });
        assert_eq!(routed(&[0.0; 4], None, &Routing { groups, ..PLAIN }), [(0, 0.25), (1, 0.25)]);
    }

    #[test]
    fn a_correction_chooses_and_does_not_weigh() {
        let routing = Routing { scoring: Scoring::Sigmoid, ..PLAIN };
        assert_eq!(routed(&[0.0; 4], Some(&[-1.0, 0.0, -1.0, 7.0]), &routing), [(1, 0.5), (3, 0.5)]);
    }

    #[test]
    fn weights_of_nothing_are_nothing() {
        let routing = Routing { scoring: Scoring::Sigmoid, normalize: true, ..PLAIN };
        assert_eq!(routed(&[-1e4; 4], None, &routing), [(0, 0.0), (1, 0.0)]);
    }

    #[test]
    fn as_many_experts_are_chosen_of_what_is_not_a_number() {
        let routing = Routing { scoring: Scoring::Sigmoid, ..PLAIN };
        let experts: Vec<u32> =
            routed(&[f32::NAN, f32::NAN, f32::NAN, 1.0], None, &routing).iter().map(|of| of.0).collect();
        assert_eq!(experts, [0, 3]);
        assert_eq!(routed(&[f32::NAN; 4], None, &PLAIN).len(), 2);
    }

    #[test]
    fn what_finds_no_experts_is_refused() {
        let error = |routing: Routing| routing.check("route").unwrap_err().to_string();
        assert_eq!(error(Routing { top_k: 0, ..PLAIN }), "route: experts of each token should be 1, found 0");
        assert_eq!(error(Routing { top_k: 5, ..PLAIN }), "route: experts should be 5, found 4");
        let groups = |num_groups, top_groups, score| Routing {
            groups: Some(ExpertGroups { num_groups, top_groups, score }),
            ..PLAIN
        };
        assert_eq!(error(groups(3, 1, GroupScore::Max)), "route: experts in groups should be 4, found 3");
        assert_eq!(error(groups(0, 0, GroupScore::Max)), "route: experts in groups should be 4, found 0");
        assert_eq!(error(groups(4, 2, GroupScore::TopTwo)), "route: experts of a group should be 2, found 1");
        assert_eq!(error(groups(2, 3, GroupScore::Max)), "route: groups of experts should be 3, found 2");
        assert_eq!(
            error(groups(4, 1, GroupScore::Max)),
            "route: experts of the groups of a token should be 2, found 1"
        );
        let found = route(&mut [Chosen::default(); 2], &[0.0; 3], None, &PLAIN, &mut [0.0; 4]).unwrap_err();
        assert_eq!(found.to_string(), "route: number of logits should be 4, found 3");
    }
}
