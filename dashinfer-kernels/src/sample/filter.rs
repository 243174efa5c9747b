//! Top-k, top-p and min-p without a sort: each is a threshold, found among the few values that can be it.

use super::SampleParams;
use super::softmax::{self, BLOCK};

/// The most likely tokens of a row, with what finding them needs.
#[derive(Debug, Clone, Default)]
pub(super) struct Likely {
    /// Ascending.
    pub(super) ids: Vec<u32>,
    /// Their logits.
    pub(super) logits: Vec<f32>,
    /// The maximum of each block of the row.
    maxima: Vec<f32>,
    /// What a search may reorder.
    values: Vec<f32>,
}

impl Likely {
    /// Keeps the tokens whose logits are at least the `k`-th largest of `row`: `k` of them, more if several share that
    /// value, fewer if not so many are above -∞. `k`: at least 1.
    pub(super) fn find(&mut self, row: &[f32], k: usize) {
        softmax::block_maxima(row, &mut self.maxima);
        // The k-th largest maximum is a lower bound: k blocks have a value that large. No other block has, but for ties,
        // so few values are looked at. With fewer blocks than k, all are.
        let bound = nth_largest(&self.maxima, k, &mut self.values).unwrap_or(f32::NEG_INFINITY);
        self.ids.clear();
        self.logits.clear();
        for (i, (block, &max)) in row.chunks(BLOCK).zip(&self.maxima).enumerate() {
            if max >= bound {
                for (j, &x) in block.iter().enumerate() {
                    if x >= bound && x > f32::NEG_INFINITY {
                        self.ids.push((i * BLOCK + j) as u32);
                        self.logits.push(x);
                    }
                }
            }
        }
        let threshold = nth_largest(&self.logits, k, &mut self.values).unwrap_or(f32::NEG_INFINITY);
        let mut num_kept = 0;
        for i in 0..self.ids.len() {
            if self.logits[i] >= threshold {
                (self.ids[num_kept], self.logits[num_kept]) = (self.ids[i], self.logits[i]);
                num_kept += 1;
            }
        }
        self.ids.truncate(num_kept);
        self.logits.truncate(num_kept);
    }

    /// The tokens found, in the order of their ids, with their logits.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, f32)> {
        self.ids.iter().copied().zip(self.logits.iter().copied())
    }
}

/// The `n`-th largest of `values` (1 is the largest), which hold no `NaN`; `None` if there are fewer.
fn nth_largest(values: &[f32], n: usize, scratch: &mut Vec<f32>) -> Option<f32> {
    if n == 0 || n > values.len() {
        return None;
    }
    scratch.clear();
    scratch.extend_from_slice(values);
    Some(*scratch.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1)
}

/// The smallest weight that top-p and min-p keep. `weights`: those of a softmax, so the largest is 1.
pub(super) fn lowest_weight(params: &SampleParams, weights: &[f32], nucleus: &mut Nucleus) -> f32 {
    // A weight of 0 is never kept, whatever the filters say.
    let mut lowest = f32::MIN_POSITIVE;
    if params.top_p < 1.0 {
        lowest = lowest.max(nucleus.find(weights, f64::from(params.top_p)));
    }
    if params.min_p > 0.0 {
        lowest = lowest.max(params.min_p.min(1.0));
    }
    lowest
}

/// What a search for the nucleus needs: a histogram of the weights by size.
#[derive(Debug, Clone, Default)]
pub(super) struct Nucleus {
    /// The mass of each bucket, in four sums: neighbours often share a bucket, and would wait for each other's
    /// addition.
    buckets: Vec<[f64; 4]>,
    /// The weights of one bucket.
    values: Vec<f32>,
}

impl Nucleus {
    /// Four buckets per power of two: the exponent and the upper two bits of the mantissa, 1.0 the last.
    const SHIFT: u32 = 21;
    const NUM_BUCKETS: usize = Self::bucket(1.0) + 1;

    const fn bucket(weight: f32) -> usize {
        (weight.to_bits() >> Self::SHIFT) as usize
    }

    /// The weight of the last token of the nucleus: the fewest largest weights that sum to at least `p` of all.
    ///
    /// One pass finds the bucket that holds it, however flat the distribution is. A quickselect among all weights took
    /// four times as long on a row of 152k.
    fn find(&mut self, weights: &[f32], p: f64) -> f32 {
        self.buckets.clear();
        self.buckets.resize(Self::NUM_BUCKETS, [0.0; 4]);
        for weights in weights.chunks(4) {
            for (lane, &w) in weights.iter().enumerate() {
                if let Some(bucket) = self.buckets.get_mut(Self::bucket(w)) {
                    bucket[lane] += f64::from(w);
                }
            }
        }
        let mass = |bucket: &[f64; 4]| bucket.iter().sum::<f64>();
        let wanted = p * self.buckets.iter().rev().map(mass).sum::<f64>();
        let mut above = 0.0;
        for (i, bucket) in self.buckets.iter().enumerate().rev() {
            let mass = mass(bucket);
            if mass > 0.0 && above + mass >= wanted {
                self.values.clear();
                self.values.extend(weights.iter().copied().filter(|&w| Self::bucket(w) == i));
                return last_of_mass(&mut self.values, wanted - above);
            }
            above += mass;
        }
        0.0
    }
}

/// The smallest of the fewest largest `weights` that sum to at least `wanted`; the largest if nothing is wanted, the
/// smallest if all are not enough (when `wanted` is their sum but for rounding). A quickselect by mass instead of rank.
fn last_of_mass(weights: &mut [f32], wanted: f64) -> f32 {
    let (mut rest, mut wanted, mut last) = (weights, wanted, 0.0);
    while !rest.is_empty() {
        let (larger, middle, smaller) = rest.select_nth_unstable_by(rest.len() / 2, |a, b| b.total_cmp(a));
        let mass = softmax::sum(larger, |w| w);
        last = *middle;
        if mass >= wanted && !larger.is_empty() {
            rest = larger;
        } else if mass + f64::from(last) >= wanted {
            return last;
        } else {
            wanted -= mass + f64::from(last);
            rest = smaller;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Softmax;
    use proptest::prelude::*;

    /// The ids of the `k` largest, and of all that tie with the last of them, by sorting.
    fn top_k_by_sort(row: &[f32], k: usize) -> Vec<u32> {
        let mut sorted: Vec<f32> = row.iter().copied().filter(|x| *x > f32::NEG_INFINITY).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let Some(&threshold) = sorted.get(k.min(sorted.len()).wrapping_sub(1)) else { return Vec::new() };
        (0..row.len() as u32).filter(|&id| row[id as usize] >= threshold).collect()
    }

    /// What `lowest_weight` keeps, by sorting in `f64`; `None` if a sum comes so close to `top_p` that rounding
    /// decides.
    fn top_p_then_min_p_by_sort(row: &[f32], temperature: f32, top_p: f32, min_p: f32) -> Option<Vec<u32>> {
        let max = f64::from(softmax::max(row));
        let weight = |x: f32| ((f64::from(x) - max) / f64::from(temperature)).exp();
        let total: f64 = row.iter().map(|&x| weight(x)).sum();
        let mut sorted = row.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let (mut below, mut threshold) = (0.0, f32::NEG_INFINITY);
        for x in sorted {
            let p = weight(x) / total;
            if (weight(x) - f64::from(min_p)).abs() < 1e-5 || (below + p - f64::from(top_p)).abs() < 1e-5 {
                return None;
            }
            if below < f64::from(top_p) && weight(x) >= f64::from(min_p) {
                threshold = x;
            }
            below += p;
        }
        Some((0..row.len() as u32).filter(|&id| row[id as usize] >= threshold).collect())
    }

    fn odd_logit() -> impl Strategy<Value = f32> {
        prop_oneof![
            // A coarse grid, for ties.
            8 => (-40i32..40).prop_map(|x| x as f32 * 0.25),
            4 => -30.0f32..30.0,
            1 => prop_oneof![Just(f32::NEG_INFINITY), Just(f32::NAN), Just(f32::INFINITY), Just(-0.0f32)],
        ]
    }

    proptest! {
        #[test] // Up to four blocks; k from one to more than there are, below and above the number of blocks.
        fn top_k_keeps_what_a_sort_keeps(row in prop::collection::vec(odd_logit(), 1..250), k in 1usize..260) {
            let mut likely = Likely::default();
            likely.find(&row, k);
            prop_assert_eq!(&likely.ids, &top_k_by_sort(&row, k));
            prop_assert!(likely.iter().all(|(id, x)| row[id as usize] == x));
            likely.find(&row, 2);
            prop_assert_eq!(&likely.ids, &top_k_by_sort(&row, 2), "after another use");
        }

        #[test]
        fn top_p_and_min_p_keep_what_a_sort_keeps(
            row in prop::collection::vec(prop_oneof![-12.0f32..3.0, (-20i32..9).prop_map(|x| x as f32 * 0.25)], 1..300),
            temperature in 0.2f32..4.0,
            top_p in 0.01f32..1.0,
            min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
        ) {
            let expected = top_p_then_min_p_by_sort(&row, temperature, top_p, min_p);
            prop_assume!(expected.is_some());
            let softmax = Softmax::new(softmax::max(&row), temperature);
            let weights: Vec<f32> = row.iter().map(|&x| softmax.weight(x)).collect();
            let params = SampleParams { top_p, min_p, ..SampleParams::default() };
            let lowest = lowest_weight(&params, &weights, &mut Nucleus::default());
            let kept: Vec<u32> = (0..row.len() as u32).filter(|&id| weights[id as usize] >= lowest).collect();
            prop_assert_eq!(Some(kept), expected);
        }
    }

    #[test]
    fn the_edges_of_top_p_and_min_p() {
        let check = |top_p, min_p, weights: &[f32], expected: f32| {
            let params = SampleParams { top_p, min_p, ..SampleParams::default() };
            assert_eq!(
                lowest_weight(&params, weights, &mut Nucleus::default()),
                expected,
                "top_p {top_p}, min_p {min_p}"
            );
        };
        let weights = [0.25, 1.0, 0.0, 0.5, 0.25];
        check(1.0, 0.0, &weights, f32::MIN_POSITIVE);
        check(f32::NAN, f32::NAN, &weights, f32::MIN_POSITIVE);
        check(0.0, 0.0, &weights, 1.0);
        check(-1.0, 0.0, &weights, 1.0);
        check(0.5, 0.0, &weights, 1.0); // 1 of 2: exactly enough
        check(0.501, 0.0, &weights, 0.5);
        check(0.75, 0.0, &weights, 0.5);
        check(0.76, 0.0, &weights, 0.25); // the tie keeps both
        check(1.0 - f32::EPSILON, 0.0, &weights, 0.25);
        check(1.0, 0.5, &weights, 0.5);
        check(1.0, 7.0, &weights, 1.0);
        check(0.9, 0.4, &weights, 0.4);
        check(0.9, 0.1, &weights, 0.25);
        check(0.9, 0.0, &[1.0; 1000], 1.0);
    }

    #[test]
    fn a_nucleus_may_reach_far_below_the_largest_weight() {
        // Of a mass of 2.05, one token has 1, half of the rest together 1 and the other half 0.05.
        let mut weights = vec![2e-5f32; 100_000];
        for i in 0..50_000 {
            weights[i * 2] = 1e-6;
        }
        weights[77] = 1.0;
        let lowest = |top_p| {
            lowest_weight(&SampleParams { top_p, ..SampleParams::default() }, &weights, &mut Nucleus::default())
        };
        assert_eq!(lowest(0.4), 1.0);
        assert_eq!(lowest(0.6), 2e-5);
        assert_eq!(lowest(0.99), 1e-6);
    }
}
