//! The scheduler's invariants, for tests after every call.

use std::collections::HashMap;

use super::kv_blocks::Held;
use super::plan::StepPlan;
use super::scheduler::Scheduler;
use super::sequence::{Rank, Sequence};

impl Scheduler {
    /// Says which invariant is broken, if any.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.blocks.check(self.sequences.values().filter_map(|sequence| sequence.held.as_ref()))?;
        self.check_queues()?;
        for (seq, sequence) in &self.sequences {
            self.check_sequence(sequence).map_err(|broken| format!("sequence {seq}: {broken}"))?;
        }
        self.check_sharing()?;
        self.under_way.iter().chain([&self.plan]).try_for_each(|plan| self.check_plan(plan))
    }

    /// Each sequence is in the one queue of its state.
    fn check_queues(&self) -> Result<(), String> {
        if !self.running.is_sorted() {
            return Err(format!("running out of order: {:?}", self.running));
        }
        let state =
            |rank: &Rank| (self.waiting.contains(rank), self.running.contains(rank), self.parked.contains(rank));
        for (seq, sequence) in &self.sequences {
            let (paused, held) = (sequence.paused, sequence.held.is_some());
            let wanted = (!paused && !held, !paused && held, paused && held);
            if state(&sequence.rank) != wanted || sequence.rank.seq != *seq {
                return Err(format!("queues say {:?} of {sequence:?}", state(&sequence.rank)));
            }
        }
        let num_queued = self.waiting.len() + self.running.len() + self.parked.len();
        let num_unqueued =
            self.sequences.values().filter(|sequence| sequence.paused && sequence.held.is_none()).count();
        if num_queued + num_unqueued != self.sequences.len() {
            return Err(format!("{num_queued} queued and {num_unqueued} not, of {} sequences", self.sequences.len()));
        }
        Ok(())
    }

    fn check_sequence(&self, sequence: &Sequence) -> Result<(), String> {
        let (num_tokens, num_computed) = (sequence.tokens.len() + sequence.num_pending, sequence.num_computed);
        // A step that is done, and whose tokens are being appended, is under way no more.
        if sequence.num_pending > self.under_way.len() + 1 {
            return Err(format!("{} tokens are pending of {} steps", sequence.num_pending, self.under_way.len()));
        }
        if num_computed > num_tokens || num_tokens > sequence.max_total_tokens || sequence.prompt_len > num_tokens {
            return Err(format!("{num_computed} computed of {num_tokens} tokens: {sequence:?}"));
        }
        let num_blocks = sequence.block_table().len();
        if num_computed > num_blocks * self.limits.block_size
            || num_blocks > num_tokens.div_ceil(self.limits.block_size)
        {
            return Err(format!("{num_computed} computed of {num_tokens} tokens in {num_blocks} blocks"));
        }
        let Some(held) = &sequence.held else { return Ok(()) };
        self.blocks.check_place(held, &sequence.tokens, num_computed, sequence.cache_salt)
    }

    /// Two tables share a block at the same place, behind the same blocks' worth of equal tokens, all of them computed.
    fn check_sharing(&self) -> Result<(), String> {
        let mut first_holder = HashMap::new();
        for sequence in self.sequences.values() {
            for (i, &block) in sequence.held.as_ref().map_or(&[][..], Held::block_table).iter().enumerate() {
                let end = (i + 1) * self.limits.block_size;
                let (first, place) = *first_holder.entry(block).or_insert((sequence, i));
                if std::ptr::eq(first, sequence) && place == i {
                    continue;
                }
                let computed = first.num_computed.min(sequence.num_computed);
                if place != i || end > computed || first.tokens[..end] != sequence.tokens[..end] {
                    return Err(format!("{block:?} is shared by {first:?} and {sequence:?}"));
                }
            }
        }
        Ok(())
    }

    fn check_plan(&self, plan: &StepPlan) -> Result<(), String> {
        let num_tokens = plan.work.iter().map(|work| work.len).sum::<usize>();
        let mut seqs: Vec<_> = plan.work.iter().map(|work| work.seq).collect();
        seqs.sort_unstable();
        seqs.dedup();
        let (most_tokens, most_work) = (self.limits.token_budget, self.limits.max_running);
        if num_tokens != plan.num_tokens || num_tokens > most_tokens || plan.work.len() > most_work {
            return Err(format!("the plan exceeds {most_tokens} tokens of {most_work} sequences: {plan:?}"));
        }
        if seqs.len() != plan.work.len() || plan.work.iter().any(|work| work.len == 0) {
            return Err(format!("the plan has a sequence twice, or nothing for it: {plan:?}"));
        }
        Ok(())
    }
}
