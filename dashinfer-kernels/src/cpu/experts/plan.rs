//! Who computes which rows: the choices of a step, sorted by expert and cut into batches.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::pool::ThreadPool;
use crate::Chosen;

/// Consecutive places of a [`Plan`], and the expert that computes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) expert: usize,
    /// Places, or rows of a batch.
    pub(crate) rows: Range<usize>,
}

/// The choices of a step in the order of experts, and of rows for each expert. A choice's *place* is its index in that order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// `[T · top_k]`: the row of `x` at each place.
    pub(super) rows: Vec<u32>,
    /// `[T, top_k]`: the place of each choice; ascending in a row, as its experts are.
    pub(super) places: Vec<u32>,
    /// The experts that were chosen, ascending.
    pub(super) groups: Vec<Group>,
    /// `[N]`
    next: Vec<u32>,
}

impl Plan {
    /// With room for `choices` of `num_experts`.
    pub(super) fn with_capacity(choices: usize, num_experts: usize) -> Self {
        Self {
            rows: Vec::with_capacity(choices),
            places: Vec::with_capacity(choices),
            groups: Vec::with_capacity(num_experts),
            next: Vec::with_capacity(num_experts),
        }
    }

    /// Sorts `chosen`, `[T, top_k]`, of `num_experts`.
    pub(super) fn make(&mut self, chosen: &[Chosen], top_k: usize, num_experts: usize) {
        self.next.clear();
        self.next.resize(num_experts, 0);
        for choice in chosen {
            self.next[choice.expert as usize] += 1;
        }
        self.groups.clear();
        let mut first = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let count = std::mem::replace(next, first);
            first += count;
            if count > 0 {
                self.groups.push(Group { expert, rows: (first - count) as usize..first as usize });
            }
        }
        self.rows.clear();
        self.rows.resize(chosen.len(), 0);
        self.places.clear();
        for (index, choice) in chosen.iter().enumerate() {
            let next = &mut self.next[choice.expert as usize];
            self.rows[*next as usize] = (index / top_k) as u32;
            self.places.push(*next);
            *next += 1;
        }
    }

    /// The groups that come next, from group `first` on: as many as have no more than `most` places together, but one at least.
    pub(super) fn batch(&self, first: usize, most: usize) -> Range<usize> {
        let start = self.groups[first].rows.start;
        let more = self.groups[first + 1..].iter().take_while(|group| group.rows.end - start <= most).count();
        first..first + 1 + more
    }
}

/// Calls `run` for parts of the panels of each group, in parallel, so that every panel of every group has its turn. With `pairs`, a part
/// starts at an even panel. Returns how many panels had one, as the tasks have counted them.
pub(crate) fn side_by_side(
    pool: &ThreadPool,
    groups: &[Group],
    panels: usize,
    pairs: bool,
    run: &(dyn Fn(&Group, Range<usize>) + Sync),
) -> usize {
    // Several tasks for each thread, as in a product alone.
    let per_task = (panels * groups.len()).div_ceil(pool.num_threads() * 8).clamp(1, panels.max(1));
    let per_task = if pairs { per_task.next_multiple_of(2) } else { per_task };
    let parts = panels.div_ceil(per_task);
    let visited = AtomicUsize::new(0);
    pool.run(groups.len() * parts, &|task, _| {
        let first = task % parts * per_task;
        let part = first..panels.min(first + per_task);
        visited.fetch_add(part.len(), Ordering::Relaxed);
        run(&groups[task / parts], part);
    });
    visited.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(experts: &[[u32; 2]], num_experts: usize) -> Plan {
        let chosen: Vec<Chosen> =
            experts.as_flattened().iter().map(|expert| Chosen { expert: *expert, weight: 1.0 }).collect();
        let mut plan = Plan::with_capacity(chosen.len(), num_experts);
        plan.make(&chosen, 2, num_experts);
        plan
    }

    #[test]
    fn choices_are_sorted_by_expert_then_by_row() {
        let plan = plan(&[[1, 4], [0, 4], [1, 2]], 6);
        assert_eq!(plan.rows, [1, 0, 2, 2, 0, 1]);
        assert_eq!(plan.places, [1, 4, 0, 5, 2, 3]);
        let groups: Vec<_> = plan.groups.iter().map(|group| (group.expert, group.rows.clone())).collect();
        assert_eq!(groups, [(0, 0..1), (1, 1..3), (2, 3..4), (4, 4..6)]);
    }

    #[test]
    fn batches_hold_whole_groups() {
        let plan = plan(&[[1, 4], [0, 4], [1, 2]], 6);
        assert_eq!(plan.batch(0, 6), 0..4);
        assert_eq!(plan.batch(0, 3), 0..2);
        assert_eq!(plan.batch(2, 3), 2..4);
        assert_eq!(plan.batch(3, 1), 3..4);
    }
}
