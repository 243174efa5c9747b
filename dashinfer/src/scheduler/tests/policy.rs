//! Each rule by example.

use super::*;
use crate::scheduler::block_pool::BlockCounts;

/// A scheduler whose invariants are checked after each call, and whose model samples zeros.
struct Loop(Scheduler);

impl Loop {
    fn new(limits: Limits) -> Self {
        Self(Scheduler::new(limits).unwrap())
    }

    fn add(&mut self, new: NewSequence) -> SeqId {
        let seq = self.0.add(new).unwrap();
        self.0.check().unwrap();
        seq
    }

    /// Plans a step: who, and how many tokens.
    fn schedule(&mut self) -> Vec<(SeqId, usize)> {
        self.0.schedule();
        self.0.check().unwrap();
        self.0.plan().work.iter().map(|work| (work.seq, work.len)).collect()
    }

    /// Ends a step, which is submitted unless it was.
    fn commit(&mut self) {
        self.0.submit();
        self.0.check().unwrap();
        if self.0.num_under_way() == 0 {
            return;
        }
        self.0.commit();
        self.0.check().unwrap();
        for i in 0..self.0.done().work.len() {
            let work = self.0.done().work[i];
            if work.samples && self.0.get(work.seq).is_some() {
                self.0.append(work.seq, 0).unwrap();
            }
        }
        self.0.check().unwrap();
    }

    fn step(&mut self) -> Vec<(SeqId, usize)> {
        let plan = self.schedule();
        self.commit();
        plan
    }

    /// Plans a step and submits it, then ends the one before.
    fn step_ahead(&mut self) -> Vec<(SeqId, usize)> {
        let plan = self.schedule();
        self.0.submit();
        if self.0.num_under_way() > 1 || plan.is_empty() {
            self.commit();
        }
        plan
    }

    fn finish(&mut self, seq: SeqId) {
        assert!(self.0.finish(seq));
        self.0.check().unwrap();
    }

    fn blocks(&self, seq: SeqId) -> Vec<u32> {
        self.0.get(seq).unwrap().block_table().iter().map(|id| id.0).collect()
    }

    fn num_cached(&self, seq: SeqId) -> usize {
        self.0.get(seq).unwrap().num_cached()
    }
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_beside_running_decodes() {
    let mut scheduler = Loop::new(Limits { token_budget: 8, ..limits() });
    let short = scheduler.add(prompt(1, 3));
    assert_eq!(scheduler.step(), [(short, 3)]);
    let long = scheduler.add(prompt(2, 12));
    assert_eq!(scheduler.step(), [(short, 1), (long, 7)]);
    assert_eq!(scheduler.step(), [(short, 1), (long, 5)]);
    assert_eq!(scheduler.step(), [(short, 1), (long, 1)]);
}

#[test]
fn only_the_last_chunk_of_a_prompt_samples() {
    let mut scheduler = Loop::new(Limits { token_budget: 8, ..limits() });
    let seq = scheduler.add(prompt(1, 10));
    scheduler.schedule();
    assert_eq!(
        scheduler.0.plan().work,
        [Work { seq, start: 0, len: 8, samples: false, all_logits: false, num_preemptions: 0 }]
    );
    scheduler.commit();
    scheduler.schedule();
    assert_eq!(
        scheduler.0.plan().work,
        [Work { seq, start: 8, len: 2, samples: true, all_logits: false, num_preemptions: 0 }]
    );
}

#[test]
fn prompts_share_a_step_in_order_of_arrival_within_the_budget() {
    let mut scheduler = Loop::new(Limits { token_budget: 10, ..limits() });
    let [a, b, c] = [1, 2, 3].map(|text| scheduler.add(prompt(text, 4)));
    assert_eq!(scheduler.step(), [(a, 4), (b, 4), (c, 2)]);
    assert_eq!(scheduler.step(), [(a, 1), (b, 1), (c, 2)]);
}

#[test]
fn a_chunk_limit_leaves_room_for_the_next_prompt() {
    let mut scheduler = Loop::new(Limits { token_budget: 10, max_chunk: Some(6), ..limits() });
    let long = scheduler.add(prompt(1, 20));
    let short = scheduler.add(prompt(2, 4));
    assert_eq!(scheduler.step(), [(long, 6), (short, 4)]);
    assert_eq!(scheduler.step(), [(short, 1), (long, 6)]);
}

#[test]
fn higher_priorities_are_admitted_first_and_before_running_prompts() {
    let mut scheduler = Loop::new(Limits { token_budget: 8, ..limits() });
    let low = scheduler.add(NewSequence { priority: -1, ..prompt(1, 20) });
    let high = scheduler.add(NewSequence { priority: 1, ..prompt(2, 6) });
    assert_eq!(scheduler.step(), [(high, 6), (low, 2)]);
    let higher = scheduler.add(NewSequence { priority: 2, ..prompt(3, 5) });
    assert_eq!(scheduler.step(), [(high, 1), (higher, 5), (low, 2)]);
}

#[test]
fn no_step_has_more_sequences_than_may_run() {
    let mut scheduler = Loop::new(Limits { max_running: 2, ..limits() });
    let [a, b, c] = [1, 2, 3].map(|text| scheduler.add(prompt(text, 4)));
    assert_eq!(scheduler.step(), [(a, 4), (b, 4)]);
    scheduler.0.pause(a);
    assert_eq!(scheduler.step(), [(b, 1), (c, 4)]);
    scheduler.0.resume(a);
    assert_eq!(scheduler.step(), [(a, 1), (b, 1)]);
    scheduler.finish(a);
    assert_eq!(scheduler.step(), [(b, 1), (c, 1)]);
}

#[test]
fn a_higher_priority_takes_the_place_of_a_lower_one_that_runs() {
    let mut scheduler = Loop::new(Limits { max_running: 1, ..limits() });
    let low = scheduler.add(prompt(1, 20));
    assert_eq!(scheduler.step(), [(low, 20)]);
    let same = scheduler.add(prompt(2, 20));
    assert_eq!(scheduler.step(), [(low, 1)]);
    let high = scheduler.add(NewSequence { priority: 1, ..prompt(3, 4) });
    assert_eq!(scheduler.step(), [(high, 4)]);
    scheduler.finish(high);
    assert_eq!(scheduler.step(), [(low, 22 - 16)]); // its first block was found again
    assert_eq!(scheduler.0.get(same).unwrap().num_computed(), 0);
}

#[test]
fn out_of_blocks_the_newest_gives_way_and_is_computed_again() {
    let mut scheduler = Loop::new(Limits { num_blocks: 3, prefix_cache: false, ..limits() });
    let old = scheduler.add(prompt(1, 15));
    assert_eq!(scheduler.step(), [(old, 15)]);
    let new = scheduler.add(prompt(2, 15));
    assert_eq!(scheduler.step(), [(old, 1), (new, 15)]);
    assert_eq!(scheduler.step(), [(old, 1), (new, 1)]); // old holds two blocks, new one
    let newest = scheduler.add(prompt(3, 1));
    assert_eq!(scheduler.step(), [(old, 1)]); // new gives way to itself: its block is free, but it wants two
    assert_eq!(scheduler.0.stats().num_preemptions, 1);
    assert_eq!(scheduler.0.get(new).unwrap().prompt_len(), 15);
    assert_eq!(scheduler.blocks(new), [] as [u32; 0]);
    scheduler.finish(old);
    assert_eq!(scheduler.step(), [(new, 17)]); // the last block is left for it to grow into
    scheduler.finish(new);
    assert_eq!(scheduler.step(), [(newest, 1)]);
}

#[test]
fn what_a_preempted_sequence_computed_may_be_found_again() {
    let mut scheduler = Loop::new(Limits { num_blocks: 5, ..limits() });
    let [old, new] = [16, 31].map(|len| NewSequence { max_total_tokens: 64, ..prompt(len as u32, len) });
    let [old, new] = [old, new].map(|new| scheduler.add(new));
    while scheduler.0.stats().num_preemptions == 0 {
        scheduler.step();
    }
    assert_eq!([old, new].map(|seq| scheduler.0.get(seq).unwrap().tokens().len()), [34, 48]);
    scheduler.finish(old);
    assert_eq!(scheduler.step(), [(new, 48 - 32)]); // both full blocks were found
    assert_eq!(scheduler.num_cached(new), 0); // which is not a hit of its prompt
}

#[test]
fn a_paused_sequence_gives_way_first_and_returns_to_its_place() {
    let mut scheduler = Loop::new(Limits { num_blocks: 4, prefix_cache: false, ..limits() });
    let [first, second] = [1, 2].map(|text| scheduler.add(prompt(text, 16)));
    assert_eq!(scheduler.step(), [(first, 16), (second, 16)]);
    scheduler.0.pause(first);
    assert_eq!(scheduler.step(), [(second, 1)]);
    assert_eq!(scheduler.blocks(first).len(), 1);
    let third = scheduler.add(prompt(3, 17));
    assert_eq!(scheduler.step(), [(second, 1)]); // two for the third and one for the second to grow into are too many
    scheduler.finish(second);
    let fourth = scheduler.add(prompt(4, 17));
    assert_eq!(scheduler.step(), [(third, 17)]);
    scheduler.0.resume(first);
    assert_eq!(scheduler.0.get(first).unwrap().num_computed(), 16);
    assert_eq!(scheduler.step(), [(first, 1), (third, 1)]);
    assert_eq!(scheduler.0.get(fourth).unwrap().num_computed(), 0);
}

#[test]
fn a_paused_sequence_is_not_planned() {
    let mut scheduler = Loop::new(limits());
    let [running, waiting] = [1, 2].map(|text| scheduler.add(prompt(text, 4)));
    scheduler.0.pause(waiting);
    assert_eq!(scheduler.step(), [(running, 4)]);
    scheduler.0.pause(running);
    assert_eq!(scheduler.step(), []);
    assert_eq!(scheduler.0.stats().paused, 2);
    for seq in [waiting, running] {
        assert!(scheduler.0.resume(seq));
    }
    assert_eq!(scheduler.step(), [(running, 1), (waiting, 4)]);
}

#[test]
fn a_sequence_paused_during_its_step_keeps_what_the_step_computed() {
    let mut scheduler = Loop::new(limits());
    let seq = scheduler.add(prompt(1, 20));
    scheduler.schedule();
    scheduler.0.submit();
    scheduler.0.pause(seq);
    scheduler.commit();
    scheduler.0.resume(seq);
    assert_eq!(scheduler.step(), [(seq, 1)]);
}

#[test]
fn a_sequence_cancelled_during_its_step_is_passed_over_and_caches_nothing() {
    let mut scheduler = Loop::new(limits());
    let [gone, stays] = [1, 2].map(|text| scheduler.add(prompt(text, 20)));
    assert_eq!(scheduler.schedule(), [(gone, 20), (stays, 20)]);
    scheduler.0.submit();
    scheduler.finish(gone);
    scheduler.commit();
    assert!(!scheduler.0.finish(gone));
    assert_eq!(scheduler.0.append(gone, 1), Err(SchedulerError::UnknownSequence(gone)));
    assert_eq!(scheduler.step(), [(stays, 1)]);
    assert_eq!(scheduler.0.stats().blocks, BlockCounts { free: 62, cached: 0, in_use: 2 });
    let again = scheduler.add(prompt(1, 20));
    scheduler.step();
    assert_eq!(scheduler.num_cached(again), 0);
}

#[test]
fn a_finished_sequence_is_found_as_a_prefix_with_what_it_generated() {
    let mut scheduler = Loop::new(limits());
    let first = scheduler.add(prompt(1, 30));
    for _ in 0..4 {
        scheduler.step(); // 33 tokens are computed
    }
    let tokens = scheduler.0.get(first).unwrap().tokens().to_vec();
    let blocks = scheduler.blocks(first);
    scheduler.finish(first);
    let second = scheduler.add(NewSequence { tokens, max_total_tokens: 64, ..prompt(1, 1) });
    assert_eq!(scheduler.step(), [(second, 2)]);
    assert_eq!(scheduler.num_cached(second), 32);
    assert_eq!(scheduler.blocks(second)[..2], blocks[..2]);
    let stats = scheduler.0.stats();
    assert_eq!((stats.num_hit_tokens, stats.num_looked_up_tokens), (32, 30 + 34));
}

#[test]
fn the_last_token_is_computed_even_if_the_whole_prompt_is_cached() {
    let mut scheduler = Loop::new(limits());
    let first = scheduler.add(prompt(1, 32));
    scheduler.step();
    scheduler.finish(first);
    let second = scheduler.add(prompt(1, 32));
    assert_eq!(scheduler.step(), [(second, 16)]);
}

#[test]
fn sequences_share_the_blocks_of_a_common_prefix() {
    let mut scheduler = Loop::new(limits());
    let first = scheduler.add(prompt(1, 40));
    scheduler.step();
    let second = scheduler.add(prompt(1, 35));
    assert_eq!(scheduler.step(), [(first, 1), (second, 3)]);
    assert_eq!(scheduler.blocks(first)[..2], scheduler.blocks(second)[..2]);
    assert_eq!(scheduler.0.stats().blocks.in_use, 4);
    scheduler.finish(first);
    assert_eq!(scheduler.0.stats().blocks, BlockCounts { free: 61, cached: 0, in_use: 3 });
}

#[test]
fn a_block_computed_twice_at_once_is_cached_once() {
    let mut scheduler = Loop::new(limits());
    let [first, second] = [34, 20].map(|len| scheduler.add(prompt(1, len)));
    assert_eq!(scheduler.step(), [(first, 34), (second, 20)]);
    assert_eq!(scheduler.0.stats().blocks.in_use, 5);
    scheduler.finish(second);
    scheduler.finish(first);
    assert_eq!(scheduler.0.stats().blocks, BlockCounts { free: 62, cached: 2, in_use: 0 });
}

#[test]
fn other_salts_and_wanted_logits_do_not_read_the_cache() {
    let mut scheduler = Loop::new(limits());
    let first = scheduler.add(prompt(1, 20));
    scheduler.step();
    scheduler.finish(first);
    let salted = scheduler.add(NewSequence { cache_salt: 1, ..prompt(1, 20) });
    let scored = scheduler.add(NewSequence { want_all_logits: true, ..prompt(1, 20) });
    let plain = scheduler.add(prompt(1, 20));
    assert_eq!(scheduler.step(), [(salted, 20), (scored, 20), (plain, 4)]);
}

#[test]
fn the_tail_of_what_was_least_recently_used_is_evicted_first() {
    let mut scheduler = Loop::new(Limits { num_blocks: 7, ..limits() });
    for text in [1, 2] {
        let seq = scheduler.add(prompt(text, 48));
        scheduler.step();
        scheduler.finish(seq);
    }
    let evicting = scheduler.add(prompt(3, 33)); // the free block and the last two of text 1
    scheduler.step();
    scheduler.finish(evicting);
    for (text, num_cached) in [(2, 48), (1, 16)] {
        let seq = scheduler.add(prompt(text, 49));
        scheduler.step();
        assert_eq!(scheduler.num_cached(seq), num_cached, "of text {text}");
        scheduler.finish(seq);
    }
}

#[test]
fn a_stream_of_short_prompts_does_not_starve_a_long_one() {
    let mut scheduler = Loop::new(Limits { token_budget: 8, num_blocks: 8, ..limits() });
    let mut short = vec![scheduler.add(prompt(1, 6)), scheduler.add(prompt(2, 6))];
    scheduler.step();
    let long = scheduler.add(NewSequence { max_total_tokens: 128, ..prompt(3, 112) });
    for text in 4..100 {
        short.push(scheduler.add(prompt(text, 6)));
        for (seq, _) in scheduler.step() {
            if seq != long && scheduler.0.get(seq).is_some_and(|seq| seq.tokens().len() > 10) {
                scheduler.finish(seq);
            }
        }
        if scheduler.0.get(long).unwrap().tokens().len() > 112 {
            return;
        }
    }
    panic!("the long prompt was not computed: {:?}", scheduler.0.stats());
}

#[test]
fn a_plan_that_was_not_submitted_is_made_again() {
    let mut scheduler = Loop::new(limits());
    let seq = scheduler.add(prompt(1, 20));
    assert_eq!(scheduler.schedule(), [(seq, 20)]);
    assert_eq!(scheduler.step(), [(seq, 20)]);
    scheduler.0.commit(); // a second time, to no effect
    assert_eq!(scheduler.step(), [(seq, 1)]);
}

#[test]
fn what_could_never_fit_is_refused() {
    let mut scheduler = Scheduler::new(Limits { num_blocks: 2, ..limits() }).unwrap();
    let mut refused = |len, max_total_tokens| scheduler.add(NewSequence { max_total_tokens, ..prompt(1, len) });
    assert_eq!(refused(0, 4), Err(SchedulerError::EmptyPrompt));
    assert_eq!(refused(5, 4), Err(SchedulerError::PromptTooLong { len: 5, max_total_tokens: 4 }));
    assert_eq!(refused(5, 33), Err(SchedulerError::TooLongForCache { max_total_tokens: 33, capacity: 32 }));
    let seq = refused(31, 32).unwrap();
    assert_eq!(scheduler.append(seq, 1), Ok(()));
    assert_eq!(scheduler.append(seq, 1), Err(SchedulerError::Full { seq, max_total_tokens: 32 }));
    assert!(!scheduler.pause(SeqId(7)));
}

#[test]
fn a_step_ahead_plans_pending_tokens_but_for_the_last_one() {
    let mut scheduler = Loop::new(limits());
    let [short, long] = [2, 4].map(|n| scheduler.add(NewSequence { max_total_tokens: 4 + n, ..prompt(n as u32, 4) }));
    let carried = |scheduler: &Loop, seq| scheduler.0.get(seq).unwrap().carried();
    assert_eq!(scheduler.step_ahead(), [(short, 4), (long, 4)]);
    assert_eq!([short, long].map(|seq| carried(&scheduler, seq)), [Some(0), Some(1)]);
    // The second of two tokens is sampled by the second step, and not computed.
    assert_eq!(scheduler.step_ahead(), [(short, 1), (long, 1)]);
    assert_eq!(scheduler.step_ahead(), [(long, 1)]);
    assert_eq!((carried(&scheduler, short), carried(&scheduler, long)), (None, Some(0)));
    scheduler.finish(short);
    assert_eq!(scheduler.step_ahead(), [(long, 1)]);
    assert_eq!(scheduler.step_ahead(), []);
    assert_eq!(scheduler.0.get(long).unwrap().tokens().len(), 8);
}

#[test]
fn what_needs_the_host_waits_for_its_token_and_others_do_not() {
    let mut scheduler = Loop::new(limits());
    let waits = scheduler.add(NewSequence { needs_host: true, ..prompt(1, 4) });
    let other = scheduler.add(prompt(2, 4));
    assert_eq!(scheduler.step_ahead(), [(waits, 4), (other, 4)]);
    for _ in 0..3 {
        assert_eq!(scheduler.step_ahead(), [(other, 1)]);
        assert_eq!(scheduler.step_ahead(), [(waits, 1), (other, 1)]);
    }
}

#[test]
fn blocks_are_found_when_their_step_is_done() {
    let mut scheduler = Loop::new(limits());
    scheduler.add(prompt(1, 32));
    assert_eq!(scheduler.step_ahead().len(), 1);
    let early = scheduler.add(prompt(1, 32));
    assert_eq!(scheduler.step_ahead().len(), 2);
    let late = scheduler.add(prompt(1, 32));
    assert_eq!(scheduler.step_ahead().len(), 3);
    assert_eq!((scheduler.num_cached(early), scheduler.num_cached(late)), (0, 16));
}

#[test]
fn a_sequence_preempted_with_a_step_under_way_keeps_the_token_and_nothing_else() {
    let mut scheduler = Loop::new(Limits { num_blocks: 3, ..limits() });
    let old = scheduler.add(prompt(1, 16));
    let new = scheduler.add(prompt(2, 15));
    assert_eq!(scheduler.step_ahead(), [(old, 16), (new, 15)]);
    assert_eq!(scheduler.step_ahead(), [(old, 1), (new, 1)]); // the third block is for old
    let high = scheduler.add(NewSequence { priority: 1, max_total_tokens: 17, ..prompt(3, 16) });
    assert_eq!(scheduler.schedule(), [(high, 16)]);
    assert_eq!([old, new].map(|seq| scheduler.0.get(seq).unwrap().carried()), [Some(0), Some(1)]);
    scheduler.commit();
    scheduler.commit();
    for (seq, len) in [(old, 18), (new, 17)] {
        let found = scheduler.0.get(seq).unwrap();
        assert_eq!((found.tokens().len(), found.num_computed(), found.carried()), (len, 0, None));
    }
    // Of the step under way when it lost its block, nothing is kept: new's 16th token is computed again.
    assert_eq!(scheduler.0.stats().blocks, BlockCounts { free: 1, cached: 1, in_use: 1 });
    scheduler.finish(high);
    assert_eq!(scheduler.step_ahead(), [(old, 2)]);
    scheduler.finish(old);
    scheduler.commit();
    assert_eq!(scheduler.step_ahead(), [(new, 17)]);
}

#[test]
fn a_failed_step_registers_nothing() {
    let mut scheduler = Loop::new(limits());
    let failed = scheduler.add(prompt(1, 32));
    scheduler.step_ahead();
    let other = scheduler.add(prompt(2, 32));
    scheduler.schedule();
    scheduler.0.submit();
    assert!(scheduler.0.abandon());
    assert_eq!(scheduler.0.done().work[0].seq, failed);
    scheduler.finish(failed);
    scheduler.commit();
    assert!(!scheduler.0.abandon());
    assert_eq!(scheduler.0.stats().blocks, BlockCounts { free: 62, cached: 0, in_use: 2 });
    assert_eq!(scheduler.step(), [(other, 1)]);
}
