//! What a scheduler is given to work with, and what it refuses.

use super::SeqId;

/// How much a step may compute and how much the cache can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The most tokens that one step computes. Should be above `max_running`: decodes beyond it take turns by rank.
    pub(crate) token_budget: usize,
    /// The most sequences that one step computes tokens of.
    pub(crate) max_running: usize,
    /// The most tokens of one prompt that one step computes, so that several prompts share a step. `None`: the budget.
    pub(crate) max_chunk: Option<usize>,
    /// The most tokens that one step computes of sequences which want all their logits.
    pub(crate) max_all_logits: usize,
    /// Blocks of the KV cache.
    pub(crate) num_blocks: usize,
    /// Tokens in a block: a multiple of 16 in `16..=128`.
    pub(crate) block_size: usize,
    /// Whether computed blocks are kept and found again.
    pub(crate) prefix_cache: bool,
    /// Where the hashes of the prefix cache start from. Engines with the same seed hash alike.
    pub(crate) hash_seed: u64,
}

impl Limits {
    pub(super) fn check(&self) -> Result<(), SchedulerError> {
        let wanted = |limit, wanted, found, holds: bool| {
            if holds { Ok(()) } else { Err(SchedulerError::InvalidLimit { limit, wanted, found }) }
        };
        wanted("token_budget", "at least 1", self.token_budget, self.token_budget >= 1)?;
        wanted("max_running", "at least 1", self.max_running, self.max_running >= 1)?;
        let max_chunk = self.max_chunk.unwrap_or(1);
        wanted("max_chunk", "at least 1", max_chunk, max_chunk >= 1)?;
        wanted("max_all_logits", "at least 1", self.max_all_logits, self.max_all_logits >= 1)?;
        let whole = self.block_size.is_multiple_of(16) && (16..=128).contains(&self.block_size);
        wanted("block_size", "a multiple of 16 in 16..=128", self.block_size, whole)?;
        // Slots (block * block_size + offset) are u32 as well.
        let slots = self.num_blocks.checked_mul(self.block_size).is_some_and(|slots| u32::try_from(slots).is_ok());
        wanted("num_blocks", "at least 1, and slots counted in 32 bits", self.num_blocks, self.num_blocks >= 1 && slots)
    }

    /// Tokens that the whole cache can hold.
    pub(super) fn capacity(&self) -> usize {
        self.num_blocks * self.block_size
    }
}

/// Why the scheduler refused a call; it is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SchedulerError {
    /// A limit under which nothing could run.
    #[error("`{limit}` must be {wanted}, found {found}")]
    InvalidLimit {
        /// Its field in [`Limits`].
        limit: &'static str,
        /// What it may be.
        wanted: &'static str,
        /// What it was.
        found: usize,
    },
    /// A prompt without tokens has no next one.
    #[error("a prompt must have at least one token, found none")]
    EmptyPrompt,
    /// The prompt alone is longer than the sequence may become.
    #[error("a prompt of {len} tokens exceeds the sequence's own bound of {max_total_tokens}")]
    PromptTooLong {
        /// Tokens of the prompt.
        len: usize,
        /// Prompt and generation, at most.
        max_total_tokens: usize,
    },
    /// The sequence might outgrow the cache even with all of it to itself.
    #[error("a sequence of up to {max_total_tokens} tokens does not fit a KV cache of {capacity}")]
    TooLongForCache {
        /// Prompt and generation, at most.
        max_total_tokens: usize,
        /// Tokens that the cache holds.
        capacity: usize,
    },
    /// The sequence has as many tokens as it said it would have at most.
    #[error("sequence {seq} already has its {max_total_tokens} tokens")]
    Full {
        /// Which one.
        seq: SeqId,
        /// Prompt and generation, at most.
        max_total_tokens: usize,
    },
    /// The sequence was never added, or is finished.
    #[error("there is no sequence {0}")]
    UnknownSequence(SeqId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_under_which_nothing_could_run_are_refused_by_name() {
        let good = Limits {
            token_budget: 1,
            max_running: 1,
            max_chunk: None,
            max_all_logits: 1,
            num_blocks: 1,
            block_size: 16,
            prefix_cache: true,
            hash_seed: 0,
        };
        assert_eq!(good.check(), Ok(()));
        let refused = |edit: fn(&mut Limits)| {
            let mut limits = good.clone();
            edit(&mut limits);
            match limits.check() {
                Err(SchedulerError::InvalidLimit { limit, .. }) => limit,
                other => panic!("{limits:?} gave {other:?}"),
            }
        };
        assert_eq!(refused(|l| l.token_budget = 0), "token_budget");
        assert_eq!(refused(|l| l.max_running = 0), "max_running");
        assert_eq!(refused(|l| l.max_chunk = Some(0)), "max_chunk");
        assert_eq!(refused(|l| l.max_all_logits = 0), "max_all_logits");
        assert_eq!(refused(|l| l.block_size = 0), "block_size");
        assert_eq!(refused(|l| l.block_size = 24), "block_size");
        assert_eq!(refused(|l| l.block_size = 144), "block_size");
        assert_eq!(refused(|l| l.num_blocks = 0), "num_blocks");
        assert_eq!(refused(|l| l.num_blocks = 1 << 30), "num_blocks");
    }
}
