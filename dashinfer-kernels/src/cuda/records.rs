//! Which kinds of steps were computed, recorded, or could not be: what is to be done with the next one of a kind.
//!
//! The first step of a kind is computed as it comes, so that all it needs is compiled, chosen and allocated. The second is recorded,
//! and from then on the recording is started as a whole. What is recorded names addresses; when these change, a new generation
//! begins and nothing that was recorded holds any more.

use std::collections::HashMap;
use std::hash::Hash;

/// A kind whose recording failed so many times is not recorded any more.
const MOST_FAILURES: u32 = 4;

/// Recordings `R` of kinds `K` of steps.
#[derive(Debug)]
pub(super) struct Records<K, R> {
    generation: u64,
    kinds: HashMap<K, State<R>>,
}

#[derive(Debug)]
enum State<R> {
    /// Computed as it came; recording it failed so many times.
    Computed {
        failures: u32,
    },
    Recorded(R),
}

/// What to do with a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a, R> {
    /// Compute it as it comes.
    Compute,
    /// Record it.
    Record,
    /// Start this.
    Start(&'a R),
}

impl<K: Eq + Hash + Copy, R> Records<K, R> {
    pub(super) fn new() -> Self {
        Self { generation: 0, kinds: HashMap::new() }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.kinds.clear();
    }

    /// What to do with a step of a kind, when addresses are those of `generation`.
    pub(super) fn next(&mut self, kind: K, generation: u64) -> Next<'_, R> {
        if generation != self.generation {
            self.generation = generation;
            self.kinds.clear();
        }
        match self.kinds.get(&kind) {
            Some(State::Recorded(recording)) => Next::Start(recording),
            Some(State::Computed { failures: 0..MOST_FAILURES }) => Next::Record,
            Some(State::Computed { .. }) | None => Next::Compute,
        }
    }

    /// A step of a kind was computed as it came.
    pub(super) fn computed(&mut self, kind: K) {
        self.kinds.entry(kind).or_insert(State::Computed { failures: 0 });
    }

    /// A step of a kind was recorded.
    pub(super) fn recorded(&mut self, kind: K, recording: R) {
        self.kinds.insert(kind, State::Recorded(recording));
    }

    /// A step of a kind could not be recorded.
    pub(super) fn failed(&mut self, kind: K) {
        if let Some(State::Computed { failures }) = self.kinds.get_mut(&kind) {
            *failures += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_computed_then_recorded_then_started() {
        let mut records = Records::new();
        assert_eq!(records.next('a', 1), Next::Compute);
        assert_eq!(records.next('a', 1), Next::Compute, "it failed before it was computed");
        records.computed('a');
        assert_eq!(records.next('a', 1), Next::Record);
        assert_eq!(records.next('b', 1), Next::Compute, "kinds are apart");
        records.recorded('a', "recording");
        assert_eq!(records.next('a', 1), Next::Start(&"recording"));
        records.computed('a');
        assert_eq!(records.next('a', 1), Next::Start(&"recording"));
    }

    #[test]
    fn new_addresses_make_all_void() {
        let mut records = Records::new();
        records.next('a', 1);
        records.computed('a');
        records.recorded('a', ());
        assert_eq!(records.next('b', 2), Next::Compute);
        assert_eq!(records.next('a', 2), Next::Compute);
        records.computed('a');
        assert_eq!(records.next('a', 2), Next::Record);
        records.clear();
        assert_eq!(records.next('a', 2), Next::Compute);
    }

    #[test]
    fn what_cannot_be_recorded_is_tried_some_times_and_then_left_alone() {
        let mut records: Records<char, ()> = Records::new();
        records.next('a', 0);
        records.computed('a');
        for _ in 0..MOST_FAILURES {
            assert_eq!(records.next('a', 0), Next::Record);
            records.failed('a');
            records.computed('a');
        }
        assert_eq!(records.next('a', 0), Next::Compute);
    }
}
