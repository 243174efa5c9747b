//! How the rows and panels of a product are cut into tasks for threads.

use std::ops::Range;

use super::pool::ThreadPool;

/// Bytes of rows that a task goes over again and again, once for each of its panels: a part of an L2 cache.
const BLOCK_BYTES: usize = 1200 << 10;
/// Rows of a block are a multiple of this: whole tiles of 32, and what blocked products treat together.
const ROWS: usize = 96;
/// Tasks for each thread, so that one which the system interrupts holds the others up by little.
const TASKS_PER_THREAD: usize = 8;

/// Blocks of rows by groups of panels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tasks {
    rows: usize,
    panels: usize,
    rows_of_task: usize,
    panels_of_task: usize,
}

impl Tasks {
    /// Cuts a product of `rows` rows, of `row_bytes` bytes each, by `panels` panels. Tasks take pairs of panels where there are many rows,
    /// as tiles do.
    pub(super) fn new(rows: usize, row_bytes: usize, panels: usize, pool: &ThreadPool) -> Self {
        let most = (BLOCK_BYTES / row_bytes.max(1) / ROWS).max(1) * ROWS;
        let blocks = rows.div_ceil(most).max(1);
        let step = if rows < 16 { 1 } else { 2 };
        let rows_of_task = if blocks == 1 { rows } else { rows.div_ceil(blocks).next_multiple_of(ROWS) };
        let groups = (pool.num_threads() * TASKS_PER_THREAD).div_ceil(blocks);
        Self { rows, panels, rows_of_task, panels_of_task: panels.div_ceil(groups).next_multiple_of(step).max(1) }
    }

    /// Cuts it by panels alone, for products that cut rows themselves.
    pub(super) fn of_panels(rows: usize, panels: usize, pool: &ThreadPool) -> Self {
        Self::new(rows, 0, panels, pool)
    }

    /// Calls `task(rows, panels)` for all of them on all threads, those of the same panels one after the other: together they read the weights
    /// once.
    pub(super) fn run(&self, pool: &ThreadPool, task: &(dyn Fn(Range<usize>, Range<usize>) + Sync)) {
        if self.rows == 0 || self.panels == 0 {
            return;
        }
        let blocks = self.rows.div_ceil(self.rows_of_task);
        let groups = self.panels.div_ceil(self.panels_of_task);
        let cut = |i: usize, step: usize, end: usize| i * step..end.min((i + 1) * step);
        pool.run(blocks * groups, &|i, _| {
            let (block, group) = (i % blocks, i / blocks);
            task(cut(block, self.rows_of_task, self.rows), cut(group, self.panels_of_task, self.panels));
        });
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::cpu::pool::PoolConfig;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_row_meets_every_panel_once(rows in 0usize..700, row_bytes in 0usize..40_000, panels in 0usize..90, threads in 1usize..4) {
            let pool = ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() }).unwrap();
            let met = Mutex::new(vec![0; rows * panels]);
            Tasks::new(rows, row_bytes, panels, &pool).run(&pool, &|rows, of_panels| {
                let mut met = met.lock().unwrap();
                for row in rows {
                    of_panels.clone().for_each(|panel| met[row * panels + panel] += 1);
                }
            });
            prop_assert!(met.into_inner().unwrap().iter().all(|times| *times == 1));
        }
    }

    #[test]
    fn rows_of_a_task_stay_in_a_cache() {
        let pool = ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(2), cores: Vec::new() }).unwrap();
        let cut = |rows, row_bytes| {
            let tasks = Tasks::new(rows, row_bytes, 96, &pool);
            (tasks.rows_of_task, tasks.panels_of_task)
        };
        assert_eq!(cut(1, 8960), (1, 6), "a decode is cut by panels alone");
        assert_eq!(cut(512, 1536), (512, 6));
        assert_eq!(cut(1024, 1536), (576, 12));
        assert_eq!(cut(1024, 8960), (96, 48));
    }
}
