//! One prompt being continued.

use std::cmp::Reverse;
use std::fmt;

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
    /// Tokens with keys and values in `held`.
    pub(super) num_computed: usize,
    /// `None` until first admitted.
    pub(super) num_cached: Option<usize>,
    /// Planned for no step.
    pub(super) paused: bool,
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
            num_computed: 0,
            num_cached: None,
            paused: false,
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

    /// Tokens whose keys and values are in its blocks.
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

    /// Tokens known and not computed.
    pub(super) fn num_missing(&self) -> usize {
        self.tokens.len() - self.num_computed
    }
}
