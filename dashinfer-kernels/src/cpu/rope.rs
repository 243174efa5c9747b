//! Rotary position embedding, with the norm of heads that some families put before it.

use crate::{Rope, RopePairs};

/// Cosines and sines of a step's rows: `[T, R / 2]` each.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    interleaved: bool,
}

impl RopeTable {
    /// Angles are `position · inv_freq` rounded to f32, as the reference computes them; their functions are exact to f32.
    pub(crate) fn fill(&mut self, rope: &Rope, positions: &[u32]) {
        self.half = rope.inv_freq.len();
        self.interleaved = rope.pairs == RopePairs::Interleaved;
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for inv_freq in &rope.inv_freq {
                let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
                self.cos.push(cos as f32 * rope.scale);
                self.sin.push(sin as f32 * rope.scale);
            }
        }
    }

    /// Rotated values of a head, `R`.
    pub(crate) fn rotated(&self) -> usize {
        2 * self.half
    }

    /// Rotates one head of row `row`; values from `R` on stay.
    pub(crate) fn rotate(&self, row: usize, head: &mut [f32]) {
        let cos = &self.cos[row * self.half..][..self.half];
        let sin = &self.sin[row * self.half..][..self.half];
        if self.interleaved {
            for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let [a, b] = *pair;
                *pair = [a * cos - b * sin, b * cos + a * sin];
            }
        } else {
            let (first, second) = head.split_at_mut(self.half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(pairs: RopePairs) -> RopeTable {
        let mut table = RopeTable::default();
        let quarter = std::f32::consts::FRAC_PI_2;
        table.fill(&Rope { inv_freq: vec![quarter, 0.0], scale: 1.0, pairs }, &[0, 1]);
        table
    }

    fn check(pairs: RopePairs, row: usize, want: [f32; 5]) {
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
        table(pairs).rotate(row, &mut head);
        for (got, want) in head.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{pairs:?} {head:?}");
        }
    }

    #[test]
    fn position_zero_turns_nothing_and_a_quarter_turn_swaps_a_pair() {
        check(RopePairs::Halves, 0, [1.0, 2.0, 3.0, 4.0, 5.0]);
        check(RopePairs::Halves, 1, [-3.0, 2.0, 1.0, 4.0, 5.0]);
        check(RopePairs::Interleaved, 1, [-2.0, 1.0, 3.0, 4.0, 5.0]);
    }
}
