//! What some positions give some queries: weighted sums of values, and what is needed to add those of other positions.

use std::ops::Range;

/// Sums over some positions, for each of `Q` queries. Weights are `2^(score − max)`.
pub(crate) struct Partial<'a> {
    /// `[Q, width]`: the sum of weight times value.
    pub(super) out: &'a mut [f32],
    /// `[Q]`: the largest score; −∞ if the query sees none of the positions, and then all else is of no meaning.
    pub(super) max: &'a mut [f32],
    /// `[Q]`: the sum of weights.
    pub(super) sum: &'a mut [f32],
}

impl<'a> Partial<'a> {
    /// Values that a partial of `queries` queries takes.
    pub(super) fn len(queries: usize, width: usize) -> usize {
        queries * (width + 2)
    }

    /// One in memory of that length, as it was left there.
    pub(super) fn new(memory: &'a mut [f32], queries: usize) -> Self {
        let (max, rest) = memory.split_at_mut(queries);
        let (sum, out) = rest.split_at_mut(queries);
        Self { out, max, sum }
    }

    /// Some queries of one at `memory` of `queries` queries.
    ///
    /// # Safety
    /// There is one, and these queries of it are accessed in no other way meanwhile.
    pub(super) unsafe fn of(memory: *mut f32, queries: usize, width: usize, these: Range<usize>) -> Self {
        // SAFETY: the caller's promise; a partial is `[Q]`, `[Q]` and `[Q, width]` values.
        unsafe {
            let slice = |at: usize, len| std::slice::from_raw_parts_mut(memory.add(at), len);
            Self {
                max: slice(these.start, these.len()),
                sum: slice(queries + these.start, these.len()),
                out: slice(2 * queries + these.start * width, these.len() * width),
            }
        }
    }

    /// Asks for what another core has written, so that several lines come at once; on x86-64 alone.
    pub(super) fn fetch(&self) {
        #[cfg(target_arch = "x86_64")]
        for values in [&*self.max, &*self.sum, &*self.out] {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // A line is 16 values long, and they start anywhere in the first.
            for at in (0..values.len()).step_by(16).chain(values.len().checked_sub(1)) {
                // SAFETY: the instruction is on every x86-64 machine, and reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(at).cast()) };
            }
        }
    }

    pub(super) fn num_queries(&self) -> usize {
        self.max.len()
    }

    pub(super) fn width(&self) -> usize {
        self.out.len() / self.max.len().max(1)
    }

    /// Makes it that of no positions.
    pub(super) fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }

    /// Adds that of other positions. The same whether this one is that of no positions or is replaced by the other.
    pub(super) fn add(&mut self, other: &Partial<'_>) {
        let width = self.width();
        for query in 0..self.num_queries() {
            let (old, new) = (self.max[query], other.max[query]);
            let (to, from) = (&mut self.out[query * width..][..width], &other.out[query * width..][..width]);
            if new == f32::NEG_INFINITY {
                continue;
            }
            if old == f32::NEG_INFINITY {
                (self.max[query], self.sum[query]) = (new, other.sum[query]);
                to.copy_from_slice(from);
                continue;
            }
            let max = old.max(new);
            let (keep, take) = ((old - max).exp2(), (new - max).exp2());
            self.max[query] = max;
            self.sum[query] = self.sum[query] * keep + other.sum[query] * take;
            for (to, from) in to.iter_mut().zip(from) {
                *to = *to * keep + from * take;
            }
        }
    }

    /// One query's output: the mean of the values by weight, with a value of zero for the score `sink` among them.
    pub(super) fn mean(&mut self, query: usize, sink: Option<f32>) -> &mut [f32] {
        let width = self.width();
        let zero = sink.map_or(0.0, |sink| (sink - self.max[query]).exp2());
        let scale = 1.0 / (self.sum[query] + zero);
        let out = &mut self.out[query * width..][..width];
        out.iter_mut().for_each(|x| *x *= scale);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_make_the_whole_and_nothing_adds_nothing() {
        // One query of width 2: two positions of score 1 and one of score 3.
        let mut low = [1.0, 2.0, 1.0 + 3.0, 2.0 + 4.0];
        let mut high = [3.0, 0.5, 10.0, 20.0];
        let mut sum = [7.0; 4];
        let mut sum = Partial::new(&mut sum, 1);
        sum.clear();
        sum.add(&Partial::new(&mut low, 1));
        assert_eq!((sum.max[0], sum.sum[0], &*sum.out), (1.0, 2.0, &[4.0, 6.0][..]));
        sum.add(&Partial::new(&mut high, 1));
        sum.add(&Partial::new(&mut [f32::NEG_INFINITY, 0.0, 5.0, 5.0], 1));
        assert_eq!((sum.max[0], sum.sum[0]), (3.0, 1.0));
        assert_eq!(sum.mean(0, None), [4.0 / 4.0 + 10.0, 6.0 / 4.0 + 20.0]);
    }
}
