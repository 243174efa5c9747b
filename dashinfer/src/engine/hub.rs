//! What the handles of an engine share with its threads: the queue's length, counters, and the end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What an engine is busy with, and what it has counted since it was loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests whose first token has not been planned yet.
    pub queued: usize,
    /// Sequences that hold cache blocks and are being computed.
    pub running: usize,
    /// Sequences that wait for blocks: new ones, and those that were preempted.
    pub waiting: usize,
    /// Sequences whose readers are late.
    pub paused: usize,
    /// Cache blocks that sequences hold.
    pub blocks_in_use: usize,
    /// Cache blocks that hold a prefix which may be found again.
    pub blocks_cached: usize,
    /// Cache blocks with nothing in them.
    pub blocks_free: usize,
    /// Forward passes.
    pub steps: u64,
    /// Tokens computed in forward passes: prompts, and what was generated.
    pub computed_tokens: u64,
    /// Tokens sampled.
    pub generated_tokens: u64,
    /// Prompt tokens that were looked up in the prefix cache.
    pub prefix_lookup_tokens: u64,
    /// Those of them that were found there.
    pub prefix_hit_tokens: u64,
    /// How often a sequence gave its blocks back, to be computed again.
    pub preemptions: u64,
    /// The host's work between steps: from the submission of one to that of the next, less the time in which it waits for
    /// results. Divided by `steps` it should be less than a step takes on the device, which then never waits for it.
    pub plan_time: Duration,
    /// Time taken by submissions. On the CPU the steps are computed within.
    pub submit_time: Duration,
    /// Steps before which the device had run out of work although there was some. On a device that can say so.
    pub starved_steps: u64,
    /// How long it had nothing to do before these.
    pub starved_time: Duration,
    /// Bytes of weight matrices that steps have read, beside those of experts: each matrix once for all rows of a step. On the
    /// CPU, as are the next two.
    pub matrix_bytes_read: u64,
    /// Bytes of experts that steps have read, as the threads have counted them.
    pub expert_bytes_read: u64,
    /// Bytes of the experts that the rows of steps have chosen, each once in a step: the least that could be read of them.
    pub expert_bytes_chosen: u64,
}

/// Shared between handles and threads.
#[derive(Debug)]
pub(super) struct Hub {
    queued: AtomicUsize,
    max_queued: usize,
    stats: Mutex<EngineStats>,
}

impl Hub {
    pub(super) fn new(max_queued: usize) -> Arc<Self> {
        Arc::new(Self { queued: AtomicUsize::new(0), max_queued, stats: Mutex::default() })
    }

    /// The most requests that [`enqueue_if_room`](Self::enqueue_if_room) lets wait.
    pub(super) fn max_queued(&self) -> usize {
        self.max_queued
    }

    /// A place in the queue, however long it is.
    pub(super) fn enqueue(self: &Arc<Self>) -> QueuePlace {
        self.queued.fetch_add(1, Ordering::Relaxed);
        QueuePlace(Arc::clone(self))
    }

    /// A place in the queue, unless it is full.
    pub(super) fn enqueue_if_room(self: &Arc<Self>) -> Option<QueuePlace> {
        let more = |queued| (queued < self.max_queued).then_some(queued + 1);
        self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(QueuePlace(Arc::clone(self)))
    }

    pub(super) fn stats(&self) -> EngineStats {
        let stats = *self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        EngineStats { queued: self.queued.load(Ordering::Relaxed), ..stats }
    }

    pub(super) fn set_stats(&self, stats: EngineStats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }
}

/// A request's place in the queue; dropped when the request leaves it.
#[derive(Debug)]
pub(super) struct QueuePlace(Arc<Hub>);

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_has_as_many_places_as_it_says_and_gets_them_back() {
        let hub = Hub::new(2);
        let (first, second) = (hub.enqueue_if_room().unwrap(), hub.enqueue_if_room().unwrap());
        assert!(hub.enqueue_if_room().is_none());
        let third = hub.enqueue();
        assert_eq!(hub.stats().queued, 3);
        drop((first, third));
        assert!(hub.enqueue_if_room().is_some());
        drop(second);
        assert_eq!(hub.stats().queued, 0);
    }
}
