//! What a step computes: the plan, and the one line of it that each sequence gets.

use super::SeqId;

/// One sequence's share of a step: tokens `start..start + len` of it are to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Work {
    /// Whose tokens these are.
    pub(crate) seq: SeqId,
    /// Position of the first of them, which is how many are computed already.
    pub(crate) start: usize,
    /// How many; at least one.
    pub(crate) len: usize,
    /// Whether the last of them is the sequence's last, so that its logits give the next token.
    pub(crate) samples: bool,
    /// Whether logits of all of them are wanted, not of the last one alone.
    pub(crate) all_logits: bool,
    /// How often the sequence had been preempted before.
    pub(super) num_preemptions: u32,
}

/// The work of one step, decodes first, each sequence at most once. Its buffer lives on from step to step.
#[derive(Debug, Default)]
pub(crate) struct StepPlan {
    /// Who computes what, in the order of the batch.
    pub(crate) work: Vec<Work>,
    /// Tokens in all of [`work`](Self::work); at most the token budget.
    pub(crate) num_tokens: usize,
    /// Tokens of work that wants all its logits.
    pub(super) num_all_logits: usize,
    max_tokens: usize,
    max_work: usize,
}

impl StepPlan {
    /// An empty plan of at most `max_tokens` tokens of at most `max_work` sequences, in the buffer of another one.
    pub(super) fn new(max_tokens: usize, max_work: usize, mut buffer: Vec<Work>) -> Self {
        buffer.clear();
        Self { work: buffer, num_tokens: 0, num_all_logits: 0, max_tokens, max_work }
    }

    pub(super) fn clear(&mut self) {
        self.work.clear();
        (self.num_tokens, self.num_all_logits) = (0, 0);
    }

    /// Tokens left of the budget.
    pub(super) fn tokens_left(&self) -> usize {
        self.max_tokens - self.num_tokens
    }

    /// The most tokens that one more sequence can get; none when there are as many sequences as may be.
    pub(super) fn room(&self) -> usize {
        if self.work.len() < self.max_work { self.tokens_left() } else { 0 }
    }

    pub(super) fn push(&mut self, work: Work) {
        debug_assert!((1..=self.room()).contains(&work.len), "{work:?} exceeds the plan's room of {}", self.room());
        self.num_tokens += work.len;
        self.num_all_logits += if work.all_logits { work.len } else { 0 };
        self.work.push(work);
    }

    /// Takes back the work of `seq`, if it had any.
    pub(super) fn remove(&mut self, seq: SeqId) {
        if let Some(i) = self.work.iter().position(|work| work.seq == seq) {
            let work = self.work.remove(i);
            self.num_tokens -= work.len;
            self.num_all_logits -= if work.all_logits { work.len } else { 0 };
        }
    }
}
