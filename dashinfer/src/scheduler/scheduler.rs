//! The policy: who holds blocks, and who computes how many tokens.

use std::collections::{BTreeSet, VecDeque};

use super::block_pool::BlockCounts;
use super::kv_blocks::{KvBlocks, Shortage};
use super::limits::{Limits, SchedulerError};
use super::plan::{StepPlan, Work};
use super::prefix_cache::{ChainHash, chain_hash};
use super::sequence::{NewSequence, Rank, SeqId, SeqMap, Sequence};

/// Decides step by step which sequences compute how many tokens; see the [module](super) for the rules and the loop.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(super) limits: Limits,
    pub(super) blocks: KvBlocks,
    pub(super) sequences: SeqMap<Sequence>,
    /// Not paused, without blocks.
    pub(super) waiting: BTreeSet<Rank>,
    /// Not paused, with blocks, in order: the last gives way first.
    pub(super) running: Vec<Rank>,
    /// Paused, with blocks.
    pub(super) parked: BTreeSet<Rank>,
    pub(super) plan: StepPlan,
    /// Submitted and not committed, the oldest first.
    pub(super) under_way: VecDeque<StepPlan>,
    /// The one that was committed or abandoned last.
    done: StepPlan,
    next_seq: u64,
    num_looked_up_tokens: u64,
    num_hit_tokens: u64,
    num_preemptions: u64,
}

/// What the scheduler is busy with, and what it has counted since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stats {
    /// Sequences without blocks, those paused aside.
    pub(crate) waiting: usize,
    /// Sequences with blocks, those paused aside.
    pub(crate) running: usize,
    /// Paused sequences.
    pub(crate) paused: usize,
    /// The blocks of the KV cache.
    pub(crate) blocks: BlockCounts,
    /// Tokens of sequences when first admitted, those aside that were not to be looked up.
    pub(crate) num_looked_up_tokens: u64,
    /// How many of these were found in the prefix cache.
    pub(crate) num_hit_tokens: u64,
    /// How often a sequence gave its blocks back to compute them again.
    pub(crate) num_preemptions: u64,
}

impl Scheduler {
    /// A scheduler of an empty cache.
    ///
    /// # Errors
    /// [`SchedulerError::InvalidLimit`] names the limit under which nothing could run.
    pub(crate) fn new(limits: Limits) -> Result<Self, SchedulerError> {
        Self::with_hash(limits, chain_hash)
    }

    pub(super) fn with_hash(limits: Limits, hash: ChainHash) -> Result<Self, SchedulerError> {
        limits.check()?;
        Ok(Self {
            blocks: KvBlocks::new(&limits, hash),
            sequences: SeqMap::default(),
            waiting: BTreeSet::new(),
            running: Vec::new(),
            parked: BTreeSet::new(),
            plan: StepPlan::new(limits.token_budget, limits.max_running, Vec::new()),
            under_way: VecDeque::new(),
            done: StepPlan::default(),
            next_seq: 0,
            num_looked_up_tokens: 0,
            num_hit_tokens: 0,
            num_preemptions: 0,
            limits,
        })
    }

    /// Puts a prompt at the end of the queue of its priority.
    ///
    /// # Errors
    /// [`EmptyPrompt`](SchedulerError::EmptyPrompt), [`PromptTooLong`](SchedulerError::PromptTooLong) or
    /// [`TooLongForCache`](SchedulerError::TooLongForCache).
    pub(crate) fn add(&mut self, new: NewSequence) -> Result<SeqId, SchedulerError> {
        let (len, max_total_tokens, capacity) = (new.tokens.len(), new.max_total_tokens, self.limits.capacity());
        if len == 0 {
            return Err(SchedulerError::EmptyPrompt);
        }
        if len > max_total_tokens {
            return Err(SchedulerError::PromptTooLong { len, max_total_tokens });
        }
        if max_total_tokens > capacity {
            return Err(SchedulerError::TooLongForCache { max_total_tokens, capacity });
        }
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        let sequence = Sequence::new(seq, new);
        self.waiting.insert(sequence.rank);
        self.sequences.insert(seq, sequence);
        Ok(seq)
    }

    /// Plans the next step; one other at most may be under way. A plan that was not submitted is dropped.
    pub(crate) fn schedule(&mut self) -> &StepPlan {
        debug_assert!(self.under_way.len() <= 1, "of steps further back the tokens must be known");
        self.plan.clear();
        self.plan_decodes();
        self.plan_prompts();
        &self.plan
    }

    /// The plan that [`schedule`](Self::schedule) made, to read beside the sequences, until it is submitted.
    pub(crate) fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Says that the plan is under way: the next one counts its tokens as computed, and those that it samples as there, their
    /// values pending. Without a plan, or for an empty one, it does nothing.
    pub(crate) fn submit(&mut self) {
        if self.plan.work.is_empty() {
            return;
        }
        let mut num_sampled = 0;
        for work in &self.plan.work {
            let Some(sequence) = self.sequences.get_mut(&work.seq) else { continue };
            debug_assert_eq!(sequence.num_computed, work.start, "{work:?} was planned for another state");
            sequence.num_computed = work.start + work.len;
            if work.samples && sequence.tokens.len() + sequence.num_pending < sequence.max_total_tokens {
                sequence.num_pending += 1;
                sequence.sampled_row = num_sampled;
            }
            num_sampled += u32::from(work.samples && !work.all_logits);
        }
        // Three buffers take turns: of this plan, of the one under way before it, and of the one before that, which is done.
        let buffer = std::mem::take(&mut self.done.work);
        let next = StepPlan::new(self.limits.token_budget, self.limits.max_running, buffer);
        self.under_way.push_back(std::mem::replace(&mut self.plan, next));
    }

    /// How many steps are under way.
    #[cfg(test)]
    pub(crate) fn num_under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Registers blocks that are full now that the oldest step under way is done. Sequences that have finished since it was
    /// planned, or have lost the blocks that it wrote, are passed over. The tokens that it sampled are to be appended next.
    pub(crate) fn commit(&mut self) {
        if !self.abandon() {
            return;
        }
        for work in &self.done.work {
            let Some(sequence) = self.sequences.get_mut(&work.seq) else { continue };
            if sequence.num_preemptions != work.num_preemptions {
                continue;
            }
            let held = sequence.held.as_mut().expect("it holds blocks since it was admitted");
            self.blocks.register(held, &sequence.tokens[..work.start + work.len]);
        }
    }

    /// Takes the oldest step under way as failed. The caller must finish each of its sequences, whose keys and values are
    /// unknown. Returns whether there was one.
    pub(crate) fn abandon(&mut self) -> bool {
        let Some(oldest) = self.under_way.pop_front() else { return false };
        self.done = oldest;
        true
    }

    /// The plan of the step that was committed or abandoned last, until the next one is submitted.
    pub(crate) fn done(&self) -> &StepPlan {
        &self.done
    }

    /// Puts a token at the end of a sequence: the oldest that is pending, if any is.
    ///
    /// # Errors
    /// [`SchedulerError::UnknownSequence`]; [`SchedulerError::Full`] if it has `max_total_tokens` already.
    pub(crate) fn append(&mut self, seq: SeqId, token: u32) -> Result<(), SchedulerError> {
        let sequence = self.sequences.get_mut(&seq).ok_or(SchedulerError::UnknownSequence(seq))?;
        if sequence.tokens.len() == sequence.max_total_tokens {
            return Err(SchedulerError::Full { seq, max_total_tokens: sequence.max_total_tokens });
        }
        sequence.tokens.push(token);
        sequence.num_pending = sequence.num_pending.saturating_sub(1);
        Ok(())
    }

    /// Ends a sequence, done or cancelled, at any time; its blocks are free for the next step. Returns whether it was there.
    pub(crate) fn finish(&mut self, seq: SeqId) -> bool {
        let Some(mut sequence) = self.sequences.remove(&seq) else { return false };
        self.leave_queues(sequence.rank);
        if let Some(held) = sequence.held.take() {
            self.blocks.give_back(held);
        }
        true
    }

    /// Leaves a sequence out of plans until it is resumed. It keeps its place in the order, and its blocks until others need
    /// them. Returns whether it was there.
    pub(crate) fn pause(&mut self, seq: SeqId) -> bool {
        self.set_paused(seq, true)
    }

    /// Ends a pause. Returns whether the sequence was there.
    pub(crate) fn resume(&mut self, seq: SeqId) -> bool {
        self.set_paused(seq, false)
    }

    /// A sequence that was added and has not finished.
    pub(crate) fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.sequences.get(&seq)
    }

    /// What the scheduler is busy with.
    pub(crate) fn stats(&self) -> Stats {
        Stats {
            waiting: self.waiting.len(),
            running: self.running.len(),
            paused: self.sequences.len() - self.waiting.len() - self.running.len(),
            blocks: self.blocks.counts(),
            num_looked_up_tokens: self.num_looked_up_tokens,
            num_hit_tokens: self.num_hit_tokens,
            num_preemptions: self.num_preemptions,
        }
    }

    /// A token each for running sequences that lack one.
    fn plan_decodes(&mut self) {
        let mut next = 0;
        while self.plan.room() > 0
            && let Some(rank) = self.may_run(next)
        {
            if self.sequence(rank).num_missing() == 1 {
                self.plan_running(rank);
            }
            next += 1;
        }
    }

    /// What is left of the budget for prompts: those running, and those waiting in so far as they can be admitted.
    fn plan_prompts(&mut self) {
        let (mut next, mut is_admitting) = (0, true);
        // Not `room`: one that waits may take the place of one that is planned.
        while self.plan.tokens_left() > 0 {
            let running = self.may_run(next);
            let goes_first = |waiting: &Rank| running.is_none_or(|running| waiting.outranks(running));
            let waiting = self.waiting.first().copied().filter(|waiting| is_admitting && goes_first(waiting));
            if let Some(waiting) = waiting {
                // The first one that does not fit is waited for: what came later must not take the blocks it needs.
                is_admitting = self.admit(waiting);
                if is_admitting {
                    self.plan_running(waiting);
                    next += 1;
                }
            } else if let Some(running) = running {
                if self.sequence(running).num_missing() > 1 {
                    self.plan_running(running);
                }
                next += 1;
            } else {
                break;
            }
        }
    }

    /// The running sequence in this place, if the plan may have that many.
    fn may_run(&self, place: usize) -> Option<Rank> {
        if place < self.limits.max_running { self.running.get(place).copied() } else { None }
    }

    /// Plans as many tokens of a running sequence as it lacks and the step can take, if there are blocks for them.
    fn plan_running(&mut self, rank: Rank) {
        let sequence = self.sequence(rank);
        let (start, num_missing) = (sequence.num_computed, sequence.num_missing());
        let max_chunk = self.limits.max_chunk.unwrap_or(usize::MAX);
        let (all_logits, num_preemptions) = (sequence.want_all_logits, sequence.num_preemptions);
        let with_logits = if all_logits { self.limits.max_all_logits - self.plan.num_all_logits } else { usize::MAX };
        let len = num_missing.min(max_chunk).min(self.plan.room()).min(with_logits);
        if len > 0 && self.hold_up_to(rank, start + len) {
            let samples = len == num_missing;
            self.plan.push(Work { seq: rank.seq, start, len, samples, all_logits, num_preemptions });
        }
    }

    /// Appends blocks to a running sequence until `num_tokens` have room. Out of blocks, the paused and then the last in rank
    /// give way; `false` if that came to be the sequence itself.
    fn hold_up_to(&mut self, rank: Rank, num_tokens: usize) -> bool {
        loop {
            let sequence = self.sequences.get_mut(&rank.seq).expect("ranks are of known sequences");
            let held = sequence.held.as_mut().expect("running sequences hold blocks");
            if self.blocks.grow(held, num_tokens) {
                return true;
            }
            let last = self.parked.last().or(self.running.last()).copied();
            let victim = last.expect("the sequence itself is running");
            self.preempt(victim);
            if victim == rank {
                return false;
            }
        }
    }

    /// Makes a waiting sequence a running one, with blocks for all its tokens, and leaves one to each other that is running.
    /// For its sake the paused give way, and those that it outranks, but only if that is of use.
    fn admit(&mut self, rank: Rank) -> bool {
        if self.sequence(rank).num_pending > 0 {
            // Preempted with a step under way, whose token it is to be computed with.
            return false;
        }
        let max_others = self.limits.max_running - 1;
        if self.running.get(max_others).is_some_and(|&last| !rank.outranks(last)) {
            return false;
        }
        let (held, num_found) = loop {
            let sequence = self.sequences.get(&rank.seq).expect("ranks are of known sequences");
            let read = !sequence.want_all_logits;
            match self.blocks.hold(&sequence.tokens, sequence.cache_salt, read, self.running.len()) {
                Ok(held) => break held,
                Err(shortage) => {
                    if !self.make_room(rank, shortage) {
                        return false;
                    }
                }
            }
        };
        while let Some(&last) = self.running.get(max_others) {
            self.preempt(last);
        }
        self.waiting.remove(&rank);
        let place = self.running.partition_point(|&other| other < rank);
        self.running.insert(place, rank);

        let sequence = self.sequences.get_mut(&rank.seq).expect("ranks are of known sequences");
        sequence.held = Some(held);
        sequence.num_computed = num_found;
        if sequence.num_cached.is_none() {
            sequence.num_cached = Some(num_found);
            if self.limits.prefix_cache && !sequence.want_all_logits {
                self.num_looked_up_tokens += sequence.tokens.len() as u64;
                self.num_hit_tokens += num_found as u64;
            }
        }
        true
    }

    /// Preempts one sequence for the sake of a waiting one; `false` if all that may be preempted would not do.
    fn make_room(&mut self, rank: Rank, Shortage(shortage): Shortage) -> bool {
        // Each may give back what it holds, and the block that was left for it to grow into.
        let num_held = |rank: &Rank| self.sequence(*rank).block_table().len();
        let outranked = self.running.iter().rev().take_while(|running| rank.outranks(**running));
        let most =
            self.parked.iter().map(num_held).sum::<usize>() + outranked.map(|rank| num_held(rank) + 1).sum::<usize>();
        if most < shortage {
            return false;
        }
        let victim = self.parked.last().or(self.running.last()).copied();
        self.preempt(victim.expect("whose blocks were counted"));
        true
    }

    /// Takes all blocks of a running or parked sequence. Its place in the order is before all that arrived later.
    fn preempt(&mut self, rank: Rank) {
        self.leave_queues(rank);
        self.plan.remove(rank.seq);
        let sequence = self.sequences.get_mut(&rank.seq).expect("ranks are of known sequences");
        sequence.num_computed = 0;
        sequence.num_preemptions = sequence.num_preemptions.wrapping_add(1);
        self.blocks.give_back(sequence.held.take().expect("who runs or is parked holds blocks"));
        self.num_preemptions += 1;
        self.join_queue(rank);
    }

    fn set_paused(&mut self, seq: SeqId, paused: bool) -> bool {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return false };
        if std::mem::replace(&mut sequence.paused, paused) == paused {
            return true;
        }
        let rank = sequence.rank;
        self.leave_queues(rank);
        self.join_queue(rank);
        true
    }

    fn leave_queues(&mut self, rank: Rank) {
        self.waiting.remove(&rank);
        self.parked.remove(&rank);
        if let Ok(place) = self.running.binary_search(&rank) {
            self.running.remove(place);
        }
    }

    /// Puts a sequence where its state belongs. Paused without blocks it is in no queue.
    fn join_queue(&mut self, rank: Rank) {
        let sequence = self.sequence(rank);
        match (sequence.paused, sequence.held.is_some()) {
            (false, false) => {
                self.waiting.insert(rank);
            }
            (false, true) => {
                let place = self.running.partition_point(|&other| other < rank);
                self.running.insert(place, rank);
            }
            (true, true) => {
                self.parked.insert(rank);
            }
            (true, false) => {}
        }
    }

    fn sequence(&self, rank: Rank) -> &Sequence {
        self.sequences.get(&rank.seq).expect("ranks are of known sequences")
    }
}
