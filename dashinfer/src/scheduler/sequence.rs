//! One prompt being continued.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

use super::block_pool::BlockId;
use super::kv_blocks::Held;

/// A sequence's name; never used again in the life of its scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SeqId(pub(crate) u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Things by sequence.
pub(crate) type SeqMap<V> = HashMap<SeqId, V, BuildHasherDefault<SeqHasher>>;

/// Hashes ids that a scheduler counted up: nobody chooses them, so a multiplication spreads them well enough, and a step looks up
/// each of its sequences a dozen times.
#[derive(Debug, Default)]
pub(crate) struct SeqHasher(u64);

impl Hasher for SeqHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15); // 2^64 / golden ratio: Fibonacci hashing
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A prompt to be continued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewSequence {
    /// The prompt, at least one token.
    pub(crate) tokens: Vec<u32>,
    /// The most tokens the sequence will have, prompt and generation. The cache must be able to hold them.
    pub(crate) max_total_tokens: usize,
    /// Higher goes first, and takes blocks from lower.
    pub(crate) priority: i32,
    /// Whether logits of every prompt position are wanted: then all of them are computed, and none is taken from the
    /// prefix cache. After a preemption they are computed again.
    pub(crate) want_all_logits: bool,
    /// Only sequences of equal salt share cached blocks (one adapter, one tenant).
    pub(crate) cache_salt: u64,
    /// Whether each token must be known before the next one can be sampled: then it is in no step that begins earlier.
    pub(crate) needs_host: bool,
}

/// The order in which sequences are served: higher priority first, then the earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    priority: Reverse<i32>,
    pub(super) seq: SeqId,
}

impl Rank {
    /// Whether it goes before `other` by priority, not just by arrival.
    pub(super) fn outranks(self, other: Self) -> bool {
        self.priority < other.priority
    }
}

/// What the scheduler knows of a sequence.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(super) rank: Rank,
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    pub(super) max_total_tokens: usize,
    pub(super) want_all_logits: bool,
    pub(super) cache_salt: u64,
    pub(super) needs_host: bool,
    /// Tokens with keys and values in `held` when the steps under way are done.
    pub(super) num_computed: usize,
    /// Tokens behind `tokens` that steps under way sample: at most one when a plan is made, and two between the submission of
    /// that plan and the commitment of the step before.
    pub(super) num_pending: usize,
    /// Which of the rows that its step samples gives the last pending token.
    pub(super) sampled_row: u32,
    /// `None` until first admitted.
    pub(super) num_cached: Option<usize>,
    /// Planned for no step.
    pub(super) paused: bool,
    /// How often it has lost its blocks: work that was planned before is not found in those it has now.
    pub(super) num_preemptions: u32,
    /// `None` while waiting.
    pub(super) held: Option<Held>,
}

impl Sequence {
    pub(super) fn new(seq: SeqId, new: NewSequence) -> Self {
        Self {
            rank: Rank { priority: Reverse(new.priority), seq },
            prompt_len: new.tokens.len(),
            tokens: new.tokens,
            max_total_tokens: new.max_total_tokens,
            want_all_logits: new.want_all_logits,
            cache_salt: new.cache_salt,
            // A sequence that is scored has no row that the device samples.
            needs_host: new.needs_host || new.want_all_logits,
            num_computed: 0,
            num_pending: 0,
            sampled_row: 0,
            num_cached: None,
            paused: false,
            num_preemptions: 0,
            held: None,
        }
    }

    /// Prompt and what was appended.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of the tokens are the prompt.
    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// If one more token follows [`tokens`](Self::tokens), which the step before samples: for which of its sampled rows. For use
    /// from plan to submission.
    pub(crate) fn carried(&self) -> Option<u32> {
        (self.num_pending > 0).then_some(self.sampled_row)
    }

    /// Left out of plans.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Tokens whose keys and values are in its blocks when the steps under way are done.
    #[cfg(test)]
    pub(crate) fn num_computed(&self) -> usize {
        self.num_computed
    }

    /// Tokens that were found in the prefix cache when the sequence first left the queue. What a preempted sequence finds
    /// again of its own does not count.
    pub(crate) fn num_cached(&self) -> usize {
        self.num_cached.unwrap_or(0)
    }

    /// Its blocks in order; token `i` is in slot `i % block_size` of block `i / block_size`. Empty while it waits.
    pub(crate) fn block_table(&self) -> &[BlockId] {
        self.held.as_ref().map_or(&[], Held::block_table)
    }

    /// Tokens to be computed: those known, and one that is pending, unless it is the last one or must be seen first.
    pub(super) fn num_missing(&self) -> usize {
        let num_tokens = self.tokens.len() + self.num_pending;
        let waits = self.num_pending > 0 && (self.needs_host || num_tokens == self.max_total_tokens);
        if waits { self.tokens.len() - self.num_computed } else { num_tokens - self.num_computed }
    }
}
