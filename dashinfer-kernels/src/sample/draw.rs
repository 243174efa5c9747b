//! From filtered weights to one token.

use super::filter;
use super::softmax::{self, BLOCK, Softmax};
use super::{SampleParams, SampleScratch};

/// Picks a token by temperature, top-k, top-p and min-p. `max`: the largest of `logits`, above -∞. `u`: in `0.0..1.0`.
pub(super) fn draw(logits: &[f32], max: f32, params: &SampleParams, u: f64, scratch: &mut SampleScratch) -> u32 {
    let SampleScratch { likely, weights, nucleus, .. } = scratch;
    let top_k = params.top_k.map(|k| k.get() as usize).filter(|&k| k < logits.len());
    let left = match top_k {
        Some(k) => {
            likely.find(logits, k);
            likely.logits.as_slice()
        }
        None => logits,
    };
    let softmax = Softmax::new(max, params.temperature);
    weights.clear();
    weights.extend(left.iter().map(|&x| softmax.weight(x)));
    let lowest = filter::lowest_weight(params, weights, nucleus);
    let index = pick(weights, lowest, u);
    if top_k.is_some() { likely.ids[index] } else { index as u32 }
}

/// The first index at which the running sum of the weights that are at least `lowest` passes `u` of their total.
/// One weight at least is not below `lowest`.
fn pick(weights: &[f32], lowest: f32, u: f64) -> usize {
    let mass = |block: &[f32]| softmax::sum(block, |w| if w >= lowest { w } else { 0.0 });
    let wanted = u * weights.chunks(BLOCK).map(mass).sum::<f64>();
    // Where rounding lets no sum pass, it is the last block with a kept weight, and the last such weight.
    let (mut first, mut before, mut sum) = (0, 0.0, 0.0);
    for (i, block) in weights.chunks(BLOCK).enumerate() {
        let mass = mass(block);
        if mass > 0.0 {
            (first, before) = (i * BLOCK, sum);
        }
        sum += mass;
        if sum > wanted {
            break;
        }
    }
    let (mut picked, mut sum) = (first, before);
    for (i, &w) in weights[first..].iter().take(BLOCK).enumerate() {
        if w >= lowest {
            picked = first + i;
            sum += f64::from(w);
            if sum > wanted {
                break;
            }
        }
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pick_inverts_the_running_sum() {
        let check = |lowest, u, expected| {
            let weights = [0.0, 0.5, 0.25, 0.0, 1.0, 0.25];
            assert_eq!(pick(&weights, lowest, u), expected, "lowest {lowest}, u {u}");
        };
        check(f32::MIN_POSITIVE, 0.0, 1);
        check(f32::MIN_POSITIVE, 0.2499, 1);
        check(f32::MIN_POSITIVE, 0.25, 2);
        check(f32::MIN_POSITIVE, 0.375, 4);
        check(f32::MIN_POSITIVE, 0.874, 4);
        check(f32::MIN_POSITIVE, 0.875, 5);
        check(f32::MIN_POSITIVE, 1.0 - f64::EPSILON, 5);
        check(f32::MIN_POSITIVE, 1.0, 5); // no sum passes: the last kept
        check(0.5, 0.0, 1);
        check(0.5, 0.34, 4);
        check(0.5, 1.0, 4);
    }

    #[test]
    fn pick_finds_its_block() {
        for len in [1, 63, 64, 65, 500] {
            let mut weights = vec![1.0; len];
            for i in 0..len {
                assert_eq!(pick(&weights, 0.5, (i as f64 + 0.5) / len as f64), i);
            }
            for i in 0..len {
                weights.fill(0.25);
                weights[i] = 1.0;
                for u in [0.0, 0.5, 0.999_999, 1.0] {
                    assert_eq!(pick(&weights, 0.5, u), i);
                }
            }
        }
    }
}
