//! The engine's thread: takes commands, plans a step, has it computed, hands out what came of it, until all is done.
//!
//! With an executor of depth 1 it is one step ahead: step `n + 1` is planned and submitted while the device computes step `n`, whose
//! tokens are handed out while the device computes step `n + 1`.
//!
//! ```text
//!   depth 0   plan n │ submit n (computes) │ hand out n │ plan n+1 │ ..
//!   depth 1   plan n+1 │ submit n+1 │ collect n │ hand out n │ plan n+2 │ submit n+2 │ collect n+1 │ ..
//!   device    ........ n .................│ n+1 ..................................│ n+2 ..
//! ```

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use dashinfer_kernels::{KernelError, SampleRow, Sampled};
use tokio::sync::oneshot;
use tracing::trace_span;

use super::batch::BatchBuilder;
use super::continuation::{Continuation, Progress};
use super::executor::{Executor, Step, StepOutput};
use super::hub::{EngineStats, Hub};
use super::stream::Writer;
use super::{PromptLogits, RequestId};
use crate::scheduler::{NewSequence, Scheduler, SeqId, SeqMap, Work};
use crate::text::Detokenizer;
use crate::{Error, Resolved};

/// What the engine's thread is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Generate.
    Generate(Box<NewRequest>),
    /// Compute the logits of every position of these tokens.
    PromptLogits { tokens: Vec<u32>, answer: oneshot::Sender<Result<PromptLogits, Error>> },
    /// The reader of a request has gone.
    Cancel(RequestId),
    /// The reader of a paused request has made room.
    Resume(RequestId),
    /// Nothing more will come but of requests that are known: end when they are done.
    Close,
}

/// A request that was found good.
#[derive(Debug)]
pub(super) struct NewRequest {
    pub(super) resolved: Resolved,
    pub(super) writer: Writer,
    pub(super) arrived: Instant,
    pub(super) detokenizer: Option<Detokenizer>,
}

/// A sequence that someone waits for.
enum Live {
    Continuation(Box<Continuation>),
    PromptLogits { values: Vec<f32>, answer: oneshot::Sender<Result<PromptLogits, Error>> },
}

impl Live {
    fn fail(self, error: Error) {
        match self {
            Self::Continuation(continuation) => continuation.writer.fail(error),
            // Whoever has gone needs no answer.
            Self::PromptLogits { answer, .. } => drop(answer.send(Err(error))),
        }
    }
}

/// The state of the thread.
pub(super) struct StepLoop<E> {
    executor: E,
    scheduler: Scheduler,
    commands: mpsc::Receiver<Command>,
    hub: Arc<Hub>,
    vocab_size: usize,
    batch: BatchBuilder,
    live: SeqMap<Live>,
    by_request: HashMap<RequestId, SeqId>,
    /// The shape of the results of each step under way, the oldest first.
    expected: VecDeque<Expected>,
    /// Steps submitted.
    num_submitted: u64,
    /// Since when the host works for the next step, and how long of that it has waited for results.
    busy_since: Instant,
    waited: Duration,
    stats: EngineStats,
    closing: bool,
}

/// What a step was asked for.
struct Expected {
    num_sampled: usize,
    num_logits: usize,
}

impl<E: Executor> StepLoop<E> {
    pub(super) fn new(
        executor: E,
        scheduler: Scheduler,
        commands: mpsc::Receiver<Command>,
        hub: Arc<Hub>,
        vocab_size: usize,
        block_size: usize,
    ) -> Self {
        Self {
            executor,
            scheduler,
            commands,
            hub,
            vocab_size,
            batch: BatchBuilder::new(block_size),
            live: SeqMap::default(),
            by_request: HashMap::new(),
            expected: VecDeque::new(),
            num_submitted: 0,
            busy_since: Instant::now(),
            waited: Duration::ZERO,
            stats: EngineStats::default(),
            closing: false,
        }
    }

    /// The life of the thread. Ends when the engine was closed and every request is done, or by a panic in a step, which is
    /// told to all requests.
    pub(super) fn run(mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| self.serve()));
        if result.is_err() {
            let error = Error::internal("a step panicked; the engine has stopped");
            for (_, live) in self.live.drain() {
                live.fail(error.clone());
            }
            // Those that are already on their way.
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Generate(new) => new.writer.fail(error.clone()),
                    Command::PromptLogits { answer, .. } => drop(answer.send(Err(error.clone()))),
                    Command::Cancel(_) | Command::Resume(_) | Command::Close => {}
                }
            }
        }
    }

    fn serve(&mut self) {
        let mut idle = true;
        loop {
            if idle && !(self.closing && self.live.is_empty()) {
                // Asleep: no plan can be made before something changes.
                match self.commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::RecvError) => return,
                }
                (self.busy_since, self.waited) = (Instant::now(), Duration::ZERO);
            }
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            if self.closing && self.live.is_empty() && self.expected.is_empty() {
                self.publish();
                return;
            }
            idle = !self.step();
            self.publish();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate(new) => self.start(*new),
            Command::PromptLogits { tokens, answer } => {
                let mut values = Vec::new();
                let wanted = tokens.len().saturating_mul(self.vocab_size);
                if values.try_reserve_exact(wanted).is_err() {
                    let wanted_bytes = wanted.saturating_mul(size_of::<f32>());
                    let error = KernelError::OutOfMemory { what: "the logits of a prompt", wanted_bytes };
                    // Whoever has gone needs no answer.
                    return drop(answer.send(Err(error.into())));
                }
                let max_total_tokens = tokens.len();
                let new = NewSequence {
                    tokens,
                    max_total_tokens,
                    priority: 0,
                    want_all_logits: true,
                    cache_salt: 0,
                    needs_host: true,
                };
                match self.scheduler.add(new) {
                    Ok(seq) => drop(self.live.insert(seq, Live::PromptLogits { values, answer })),
                    // Whoever has gone needs no answer.
                    Err(error) => drop(answer.send(Err(error.into()))),
                }
            }
            Command::Cancel(id) => {
                if let Some(seq) = self.by_request.remove(&id) {
                    self.scheduler.finish(seq);
                    self.live.remove(&seq);
                }
            }
            Command::Resume(id) => {
                let seq = self.by_request.get(&id).copied();
                // What was under way when the reader made room may have filled the buffer again.
                if let Some(seq) = seq
                    && let Some(Live::Continuation(live)) = self.live.get(&seq)
                    && !live.writer.must_pause()
                {
                    self.scheduler.resume(seq);
                }
            }
            Command::Close => self.closing = true,
        }
    }

    fn start(&mut self, mut new: NewRequest) {
        // Its reader may have gone before it came here, and the command that says so, too.
        if new.writer.is_closed() {
            return;
        }
        let tokens = std::mem::take(&mut new.resolved.prompt);
        let prompt_len = tokens.len();
        let continuation = Continuation::new(new, prompt_len);
        let sequence = NewSequence {
            tokens,
            max_total_tokens: prompt_len + continuation.resolved.max_tokens,
            priority: continuation.resolved.priority,
            want_all_logits: false,
            cache_salt: 0,
            needs_host: continuation.needs_host(),
        };
        match self.scheduler.add(sequence) {
            Ok(seq) => {
                self.by_request.insert(continuation.writer.id, seq);
                self.live.insert(seq, Live::Continuation(Box::new(continuation)));
            }
            Err(error) => continuation.writer.fail(error.into()),
        }
    }

    /// Submits the next step, and collects the one before, or all if there is no next one or the executor has no depth. Returns
    /// whether there was anything to do.
    fn step(&mut self) -> bool {
        let is_planned =
            trace_span!("schedule", step = self.num_submitted).in_scope(|| !self.scheduler.schedule().work.is_empty());
        let had_work = is_planned || !self.expected.is_empty();
        let submitted = if is_planned { self.submit() } else { Ok(()) };
        let ahead = if is_planned && submitted.is_ok() { self.executor.depth().min(1) } else { 0 };
        while self.expected.len() > ahead {
            self.collect();
        }
        if let Err(error) = submitted {
            // What was planned cannot be computed; what was not goes on. Tokens of the step before are handed out by now.
            let planned: Vec<SeqId> = self.scheduler.plan().work.iter().map(|work| work.seq).collect();
            self.fail(planned, &error);
        }
        had_work
    }

    /// Submits the plan. If this fails, it is as if it had not been made.
    fn submit(&mut self) -> Result<(), Error> {
        let step = self.num_submitted;
        trace_span!("build", step).in_scope(|| self.batch.build(&self.scheduler));
        let mut rows = Vec::with_capacity(self.batch.sampled().len());
        for &(seq, logits_row) in self.batch.sampled() {
            let (Some(sequence), Some(Live::Continuation(live))) = (self.scheduler.get(seq), self.live.get(&seq))
            else {
                return Err(Error::internal("a sequence without a request was planned to be sampled"));
            };
            let (prompt, generated) = sequence.tokens().split_at(sequence.prompt_len());
            let carried = sequence.carried();
            let num_pending = usize::from(carried.is_some());
            let position = (sequence.tokens().len() + num_pending) as u64;
            let row = SampleRow::new(logits_row, &live.resolved.params, position);
            rows.push(SampleRow { prompt, generated, banned: live.banned(num_pending), carried, ..row });
        }
        let expected = Expected { num_sampled: rows.len(), num_logits: self.batch.read().len() };
        let idle = if self.expected.is_empty() { None } else { self.executor.idle_before_submit() };
        let begin = Instant::now();
        self.stats.plan_time += begin.duration_since(self.busy_since).saturating_sub(self.waited);
        let submitted = trace_span!("submit", step).in_scope(|| {
            self.executor.submit(&Step { batch: self.batch.batch(), rows: &rows, read: self.batch.read() })
        });
        (self.busy_since, self.waited) = (Instant::now(), Duration::ZERO);
        self.stats.submit_time += self.busy_since.duration_since(begin);
        submitted?;
        if let Some(idle) = idle {
            self.stats.starved_steps += 1;
            self.stats.starved_time += idle;
        }
        self.scheduler.submit();
        self.expected.push_back(expected);
        self.num_submitted += 1;
        Ok(())
    }

    /// Waits for the oldest step under way, and hands out what came of it.
    fn collect(&mut self) {
        let Some(expected) = self.expected.pop_front() else { return };
        // Of those submitted, this one and those still expected are not handed out.
        let step = self.num_submitted - 1 - self.expected.len() as u64;
        let begin = Instant::now();
        let output = trace_span!("collect", step).in_scope(|| self.executor.collect());
        self.waited += begin.elapsed();
        let output = output.and_then(|output| {
            let is_whole = (output.sampled.len(), output.logits.len()) == (expected.num_sampled, expected.num_logits);
            // A sequence that misses its token would never be planned again, and its reader wait for ever.
            let wrong = || Error::internal("a step gave another number of tokens or logits than it was asked for");
            if is_whole { Ok(output) } else { Err(wrong()) }
        });
        match output {
            Ok(output) => {
                let _span = trace_span!("hand_out", step).entered();
                self.scheduler.commit();
                self.stats.steps += 1;
                self.stats.computed_tokens += self.scheduler.done().num_tokens as u64;
                self.hand_out(output);
            }
            Err(error) => {
                // The step behind it that is under way has the same sequences, whose results are dropped, and others, which
                // depend on nothing here: what this one wrote is in no block that the prefix cache knows.
                self.scheduler.abandon();
                let planned: Vec<SeqId> = self.scheduler.done().work.iter().map(|work| work.seq).collect();
                self.fail(planned, &error);
            }
        }
    }

    fn fail(&mut self, seqs: Vec<SeqId>, error: &Error) {
        for seq in seqs {
            if let Some(live) = self.end(seq) {
                live.fail(error.clone());
            }
        }
    }

    /// Gives the results of the step that is done to those of its sequences that are still there.
    fn hand_out(&mut self, output: StepOutput) {
        let mut sampled = output.sampled.into_iter();
        let mut logits = output.logits.into_iter();
        for index in 0..self.scheduler.done().work.len() {
            let work = self.scheduler.done().work[index];
            if work.all_logits {
                let mut rows = logits.by_ref().take(work.len);
                self.take_logits(work, &mut rows);
                // Of a sequence that has gone nobody took them.
                rows.for_each(drop);
            } else if let Some(token) = if work.samples { sampled.next() } else { None } {
                self.take_token(work.seq, token);
            } else if let Some(Live::Continuation(live)) = self.live.get_mut(&work.seq) {
                live.leave_queue();
            }
        }
    }

    fn take_logits(&mut self, work: Work, rows: &mut dyn Iterator<Item = Vec<f32>>) {
        let Some(Live::PromptLogits { values, answer }) = self.live.get_mut(&work.seq) else { return };
        // Rows come in order; after a preemption they come again from the first.
        values.truncate(work.start * self.vocab_size);
        rows.for_each(|row| values.extend_from_slice(&row));
        if !work.samples && !answer.is_closed() {
            return;
        }
        if let Some(Live::PromptLogits { values, answer }) = self.end(work.seq) {
            // Whoever has gone needs no answer.
            let _ = answer.send(Ok(PromptLogits::new(values, self.vocab_size)));
        }
    }

    fn take_token(&mut self, seq: SeqId, sampled: Sampled) {
        // One that was ended by the step before this one, or cancelled, has no use for it.
        let Some(Live::Continuation(live)) = self.live.get_mut(&seq) else { return };
        let Some(sequence) = self.scheduler.get(seq) else { return };
        live.leave_queue();
        self.stats.generated_tokens += 1;
        let token = sampled.id;
        // A paused one has a token under way from before, and does not pause again: its reader knows, or has said that it is back.
        let is_paused = sequence.is_paused();
        match live.push(sampled, sequence.num_cached()) {
            Progress::Ended => drop(self.end(seq)),
            Progress::Continues => {
                if !is_paused && live.writer.must_pause() {
                    self.scheduler.pause(seq);
                }
                if let Err(error) = self.scheduler.append(seq, token)
                    && let Some(live) = self.end(seq)
                {
                    live.fail(error.into());
                }
            }
        }
    }

    /// Forgets a sequence and frees its blocks.
    fn end(&mut self, seq: SeqId) -> Option<Live> {
        self.scheduler.finish(seq);
        let live = self.live.remove(&seq);
        if let Some(Live::Continuation(continuation)) = &live {
            self.by_request.remove(&continuation.writer.id);
        }
        live
    }

    fn publish(&mut self) {
        let scheduler = self.scheduler.stats();
        self.stats.running = scheduler.running;
        self.stats.waiting = scheduler.waiting;
        self.stats.paused = scheduler.paused;
        self.stats.blocks_in_use = scheduler.blocks.in_use;
        self.stats.blocks_cached = scheduler.blocks.cached;
        self.stats.blocks_free = scheduler.blocks.free;
        self.stats.prefix_lookup_tokens = scheduler.num_looked_up_tokens;
        self.stats.prefix_hit_tokens = scheduler.num_hit_tokens;
        self.stats.preemptions = scheduler.num_preemptions;
        let reads = self.executor.weight_reads().unwrap_or_default();
        self.stats.matrix_bytes_read = reads.matrices;
        self.stats.expert_bytes_read = reads.experts;
        self.stats.expert_bytes_chosen = reads.chosen_experts;
        self.hub.set_stats(self.stats);
    }
}

#[cfg(test)]
mod tests;
