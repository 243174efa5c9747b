//! What holds under any order of calls.
//!
//! [`World`] is an executor without arithmetic: in place of keys and values it writes into each slot the history that they
//! would depend on, and before a step it compares what the step would read with what it should read.

use std::collections::{BTreeMap, HashMap, VecDeque};

use proptest::prelude::*;

use super::*;

/// A sequence's tokens up to some place, with its salt: equal histories have equal ids, different ones different.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct History(usize);

#[derive(Debug, Default)]
struct Histories(HashMap<(Option<History>, u64), History>);

impl Histories {
    /// The histories of each of `tokens`.
    fn of(&mut self, tokens: &[u32], salt: u64) -> Vec<History> {
        let mut at = self.behind(None, salt);
        tokens
            .iter()
            .map(|&token| {
                at = self.behind(Some(at), u64::from(token));
                at
            })
            .collect()
    }

    fn behind(&mut self, before: Option<History>, token: u64) -> History {
        let next = History(self.0.len());
        *self.0.entry((before, token)).or_insert(next)
    }
}

/// What the world knows of a sequence without asking the scheduler.
#[derive(Debug, Clone)]
struct Wanted {
    tokens: Vec<u32>,
    /// What steps under way have sampled, which the scheduler is not told yet.
    pending: VecDeque<u32>,
    total: usize,
    salt: u64,
    paused: bool,
    needs_host: bool,
}

impl Wanted {
    /// All its tokens, as the device knows them.
    fn on_device(&self) -> Vec<u32> {
        self.tokens.iter().chain(&self.pending).copied().collect()
    }
}

#[derive(Debug)]
struct World {
    scheduler: Scheduler,
    limits: Limits,
    /// Steps that are submitted before the tokens of the first are known, one aside.
    depth: usize,
    /// Who is sampled by the newest step.
    sampled: Vec<SeqId>,
    histories: Histories,
    /// What was last written into each slot.
    slots: Vec<Option<History>>,
    alive: BTreeMap<SeqId, Wanted>,
    /// Whether the newest plan has work.
    is_planned: bool,
    num_finished: usize,
    /// Tokens computed before the host knew them.
    num_carried: usize,
    /// Sequences that lost their blocks with a token pending.
    num_lost: usize,
}

#[derive(Debug, Clone)]
enum Op {
    /// A prompt of `len` tokens. Those of equal `text` agree up to `same`.
    Add {
        text: u32,
        same: usize,
        len: usize,
        num_generated: usize,
        priority: i32,
        salt: u64,
        want_all_logits: bool,
        needs_host: bool,
    },
    /// A whole step, at whose beginning, or one step later, `during` happens.
    Step { during: Option<(Change, usize)> },
    /// A plan that is computed, or not, but never submitted.
    DropPlan { computed: bool },
    /// Something happens to one of the sequences.
    Change(Change, usize),
}

#[derive(Debug, Clone, Copy)]
enum Change {
    Cancel,
    Pause,
    Resume,
}

fn change() -> impl Strategy<Value = (Change, usize)> {
    let change = prop_oneof![Just(Change::Cancel), Just(Change::Pause), Just(Change::Resume)];
    (change, 0usize..1000)
}

fn op() -> impl Strategy<Value = Op> {
    let add =
        (
            0u32..2,
            0usize..120,
            1usize..80,
            0usize..40,
            -1i32..2,
            prop::bool::weighted(0.2).prop_map(u64::from),
            prop::bool::weighted(0.1),
            prop::bool::weighted(0.2),
        )
            .prop_map(|(text, same, len, num_generated, priority, salt, want_all_logits, needs_host)| {
                Op::Add { text, same, len, num_generated, priority, salt, want_all_logits, needs_host }
            });
    prop_oneof![
        4 => add,
        16 => Just(Op::Step { during: None }),
        1 => change().prop_map(|during| Op::Step { during: Some(during) }),
        1 => any::<bool>().prop_map(|computed| Op::DropPlan { computed }),
        2 => change().prop_map(|(change, of)| Op::Change(change, of)),
    ]
}

fn small_limits() -> impl Strategy<Value = Limits> {
    let max_chunk = prop::option::of(1usize..40);
    (1usize..64, 1usize..6, max_chunk, 2usize..20, prop::bool::weighted(0.85), any::<u64>()).prop_map(
        |(token_budget, max_running, max_chunk, num_blocks, prefix_cache, hash_seed)| Limits {
            token_budget,
            max_running,
            max_chunk,
            max_all_logits: 7,
            num_blocks,
            block_size: 16,
            prefix_cache,
            hash_seed,
        },
    )
}

/// Tokens of a sequence are a function of what precedes them, as if sampled greedily: equal prompts continue alike.
fn sampled(tokens: &[u32]) -> u32 {
    tokens.iter().fold(tokens.len() as u32, |sum, &token| sum.wrapping_mul(31).wrapping_add(token)) % 3
}

impl World {
    fn new(limits: Limits, depth: usize, hash: fn(u64, &[u32]) -> u64) -> Self {
        Self {
            scheduler: Scheduler::with_hash(limits.clone(), hash).unwrap(),
            slots: vec![None; limits.num_blocks * limits.block_size],
            histories: Histories::default(),
            alive: BTreeMap::new(),
            is_planned: false,
            num_finished: 0,
            num_carried: 0,
            num_lost: 0,
            limits,
            depth,
            sampled: Vec::new(),
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Add { text, same, len, num_generated, priority, salt, want_all_logits, needs_host } => {
                let needs_host = needs_host || want_all_logits;
                let own = 10 + self.histories.0.len() as u32;
                let tokens: Vec<_> = (0..len).map(|i| if i < same { text } else { own }).collect();
                let total = len + num_generated;
                let new = NewSequence {
                    tokens: tokens.clone(),
                    max_total_tokens: total,
                    priority,
                    want_all_logits,
                    cache_salt: salt,
                    needs_host,
                };
                match self.scheduler.add(new) {
                    Ok(seq) => {
                        let pending = VecDeque::new();
                        self.alive.insert(seq, Wanted { tokens, pending, total, salt, paused: false, needs_host });
                    }
                    Err(refused) => assert!(total > self.slots.len(), "{refused}"),
                }
            }
            Op::Step { during } => {
                self.schedule();
                self.compute();
                self.submit();
                if let Some((change, of)) = during {
                    self.change(change, of);
                    self.scheduler.check().unwrap();
                }
                let ahead = if self.is_planned { self.depth } else { 0 };
                while self.scheduler.num_under_way() > ahead {
                    self.commit();
                }
            }
            Op::DropPlan { computed } => {
                self.schedule();
                if computed {
                    self.compute();
                }
            }
            Op::Change(change, of) => self.change(change, of),
        }
        self.scheduler.check().unwrap();
    }

    fn change(&mut self, change: Change, of: usize) {
        let Some(seq) = self.alive.keys().nth(of % self.alive.len().max(1)).copied() else { return };
        let wanted = self.alive.get_mut(&seq).unwrap();
        match change {
            Change::Cancel => {
                assert!(self.scheduler.finish(seq));
                self.alive.remove(&seq);
            }
            Change::Pause => {
                assert!(self.scheduler.pause(seq));
                wanted.paused = true;
            }
            Change::Resume => {
                assert!(self.scheduler.resume(seq));
                wanted.paused = false;
            }
        }
    }

    /// Plans a step: something, unless there is nothing to do; for no paused sequence; decodes first.
    fn schedule(&mut self) {
        let is_ahead = self.scheduler.num_under_way() > 0;
        let is_held = |seq: SeqId, world: &Self| !world.scheduler.get(seq).unwrap().block_table().is_empty();
        let pending = self.alive.iter().filter(|(_, wanted)| !wanted.pending.is_empty());
        let pending: Vec<_> = pending.map(|(&seq, _)| seq).filter(|&seq| is_held(seq, self)).collect();
        let plan = self.scheduler.schedule();
        self.is_planned = !plan.work.is_empty();
        self.num_carried += plan.work.iter().filter(|work| pending.contains(&work.seq)).count();
        let is_idle = self.alive.values().all(|wanted| wanted.paused);
        assert!(if is_idle { !self.is_planned } else { self.is_planned || is_ahead }, "{plan:?} of {:?}", self.alive);
        assert!(plan.work.iter().all(|work| !self.alive[&work.seq].paused), "{plan:?}");
        let max_chunk = self.limits.max_chunk.unwrap_or(usize::MAX);
        assert!(plan.work.iter().all(|work| work.len <= max_chunk), "{plan:?}");
        let with_logits: usize = plan.work.iter().filter(|work| work.all_logits).map(|work| work.len).sum();
        assert!(with_logits <= self.limits.max_all_logits, "{plan:?}");
        self.num_lost += pending.into_iter().filter(|&seq| !is_held(seq, self)).count();
        self.scheduler.check().unwrap();
    }

    /// Reads and writes what the step's forward pass would.
    fn compute(&mut self) {
        let mut written = HashMap::new();
        let work = self.scheduler.plan().work.clone();
        for work in &work {
            let (sequence, wanted) = (self.scheduler.get(work.seq).unwrap(), &self.alive[&work.seq]);
            assert_eq!(sequence.tokens(), wanted.tokens);
            assert_eq!(sequence.num_computed(), work.start);
            let tokens = wanted.on_device();
            assert_eq!(work.samples, work.start + work.len == tokens.len());
            assert_eq!(
                sequence.carried().map(|row| self.sampled[row as usize]),
                wanted.pending.front().map(|_| work.seq)
            );
            assert!(
                wanted.pending.is_empty() || !wanted.needs_host && tokens.len() < wanted.total,
                "{work:?}: {wanted:?}"
            );
            let histories = self.histories.of(&tokens[..work.start + work.len], wanted.salt);
            let table = sequence.block_table();
            let slot = |i: usize| table[i / 16].0 as usize * 16 + i % 16;
            for (i, &history) in histories.iter().enumerate() {
                if i < work.start {
                    assert_eq!(self.slots[slot(i)], Some(history), "token {i} of {sequence:?}");
                } else {
                    assert_eq!(written.insert(slot(i), history), None, "two sequences write slot {}", slot(i));
                }
            }
        }
        for sequence in self.alive.keys().map(|&seq| self.scheduler.get(seq).unwrap()) {
            let slot = |i: usize| sequence.block_table()[i / 16].0 as usize * 16 + i % 16;
            let kept = (0..sequence.num_computed()).find(|&i| written.contains_key(&slot(i)));
            assert_eq!(kept, None, "the step overwrites a token of {sequence:?}");
        }
        for (slot, history) in written {
            self.slots[slot] = Some(history);
        }
    }

    /// Samples, where the host does not see it yet.
    fn submit(&mut self) {
        if self.is_planned {
            self.sampled.clear();
        }
        for work in self.scheduler.plan().work.iter().filter(|work| work.samples) {
            let wanted = self.alive.get_mut(&work.seq).unwrap();
            if wanted.tokens.len() + wanted.pending.len() < wanted.total {
                let token = sampled(&wanted.on_device());
                wanted.pending.push_back(token);
            }
            if !work.all_logits {
                self.sampled.push(work.seq);
            }
        }
        self.scheduler.submit();
        self.scheduler.check().unwrap();
        let computed = |work: &Work| self.scheduler.get(work.seq).unwrap().num_computed() == work.start + work.len;
        assert!(self.scheduler.under_way.back().is_none_or(|plan| !self.is_planned || plan.work.iter().all(computed)));
    }

    fn commit(&mut self) {
        self.scheduler.commit();
        self.scheduler.check().unwrap();
        for i in 0..self.scheduler.done().work.len() {
            let work = self.scheduler.done().work[i];
            let Some(wanted) = self.alive.get_mut(&work.seq) else { continue };
            if !work.samples {
                continue;
            }
            if let Some(token) = wanted.pending.pop_front() {
                wanted.tokens.push(token);
                self.scheduler.append(work.seq, token).unwrap();
            }
            // The last token needs no computing; a prompt of which only logits are wanted ends here as well.
            if wanted.tokens.len() == wanted.total {
                assert!(self.scheduler.append(work.seq, 0).is_err());
                assert!(self.scheduler.finish(work.seq));
                self.alive.remove(&work.seq);
                self.num_finished += 1;
            }
        }
    }

    /// Steps until only paused sequences are left.
    fn drain(&mut self) {
        let most = 100 + 100 * self.alive.values().map(|wanted| wanted.total).sum::<usize>();
        for _ in 0..most {
            if self.alive.values().all(|wanted| wanted.paused) && self.scheduler.num_under_way() == 0 {
                return;
            }
            self.run(Op::Step { during: None });
        }
        panic!("not done after {most} steps: {self:?}");
    }

    /// Everything ends, the paused once resumed, and all blocks come back.
    fn wind_up(mut self) {
        self.drain();
        let paused: Vec<_> = self.alive.keys().copied().collect();
        for seq in paused {
            assert!(self.scheduler.resume(seq));
            self.alive.get_mut(&seq).unwrap().paused = false;
        }
        self.drain();
        assert!(self.alive.is_empty());
        assert_eq!(self.scheduler.stats().blocks.in_use, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, max_shrink_iters: 5_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_step_reads_its_own_past_and_everything_ends(
        limits in small_limits(),
        depth in 0usize..2,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut world = World::new(limits, depth, chain_hash);
        ops.into_iter().for_each(|op| world.run(op));
        world.wind_up();
    }

    #[test] // of four values, so that most prefixes collide
    fn colliding_hashes_never_give_a_wrong_block(
        limits in small_limits(),
        depth in 0usize..2,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut world = World::new(limits, depth, |parent, tokens| chain_hash(parent, tokens) % 4);
        ops.into_iter().for_each(|op| world.run(op));
        world.wind_up();
    }
}

#[test]
fn the_random_worlds_reach_what_they_are_to_test() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let (mut num_preemptions, mut num_hits, mut num_finished) = (0, 0, 0);
    let (mut num_carried, mut num_lost) = (0, 0);
    for case in 0..64 {
        let strategy = (small_limits(), prop::collection::vec(op(), 1..200));
        let (limits, ops) = strategy.new_tree(&mut runner).unwrap().current();
        let mut world = World::new(limits, case % 2, chain_hash);
        ops.into_iter().for_each(|op| world.run(op));
        let stats = world.scheduler.stats();
        num_preemptions += stats.num_preemptions;
        num_hits += stats.num_hit_tokens;
        num_finished += world.num_finished;
        num_carried += world.num_carried;
        num_lost += world.num_lost;
    }
    assert!(
        num_preemptions > 64 && num_hits > 64 * 16 && num_finished > 64,
        "{num_preemptions} {num_hits} {num_finished}"
    );
    assert!(num_carried > 64 && num_lost > 16, "{num_carried} {num_lost}");
}
