//! The engine's thread: takes commands, plans a step, has it computed, hands out what came of it, until all is done.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use dashinfer_kernels::{KernelError, SampleRow, Sampled};
use tokio::sync::oneshot;

use super::batch::BatchBuilder;
use super::continuation::{Continuation, Progress};
use super::executor::{Executor, Step, StepOutput};
use super::hub::{EngineStats, Hub};
use super::stream::Writer;
use super::{PromptLogits, RequestId};
use crate::scheduler::{NewSequence, Scheduler, SeqId, Work};
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
    live: HashMap<SeqId, Live>,
    by_request: HashMap<RequestId, SeqId>,
    stats: EngineStats,
    closing: bool,
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
            live: HashMap::new(),
            by_request: HashMap::new(),
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
            }
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            if self.closing && self.live.is_empty() {
                self.publish();
                return;
            }
            idle = self.scheduler.schedule().work.is_empty();
            if !idle {
                self.step();
            }
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
                let new = NewSequence { tokens, max_total_tokens, priority: 0, want_all_logits: true, cache_salt: 0 };
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
                if let Some(&seq) = self.by_request.get(&id) {
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
        let sequence = NewSequence {
            tokens,
            max_total_tokens: prompt_len + new.resolved.max_tokens,
            priority: new.resolved.priority,
            want_all_logits: false,
            cache_salt: 0,
        };
        match self.scheduler.add(sequence) {
            Ok(seq) => {
                self.by_request.insert(new.writer.id, seq);
                self.live.insert(seq, Live::Continuation(Box::new(Continuation::new(new, prompt_len))));
            }
            Err(error) => new.writer.fail(error.into()),
        }
    }

    /// Computes the plan, and hands out what came of it.
    fn step(&mut self) {
        match self.compute() {
            Ok(output) => {
                self.stats.steps += 1;
                self.stats.computed_tokens += self.scheduler.plan().num_tokens as u64;
                self.scheduler.commit();
                self.hand_out(output);
            }
            Err(error) => {
                // What was planned cannot be computed; what was not goes on.
                let planned: Vec<SeqId> = self.scheduler.plan().work.iter().map(|work| work.seq).collect();
                for seq in planned {
                    if let Some(live) = self.end(seq) {
                        live.fail(error.clone());
                    }
                }
            }
        }
    }

    fn compute(&mut self) -> Result<StepOutput, Error> {
        self.batch.build(&self.scheduler);
        let mut rows = Vec::with_capacity(self.batch.sampled().len());
        for &(seq, logits_row) in self.batch.sampled() {
            let (Some(sequence), Some(Live::Continuation(live))) = (self.scheduler.get(seq), self.live.get(&seq))
            else {
                return Err(Error::internal("a sequence without a request was planned to be sampled"));
            };
            let (prompt, generated) = sequence.tokens().split_at(sequence.prompt_len());
            let row = SampleRow::new(logits_row, &live.resolved.params, sequence.tokens().len() as u64);
            rows.push(SampleRow { prompt, generated, banned: live.banned(), ..row });
        }
        self.executor.submit(&Step { batch: self.batch.batch(), rows: &rows, read: self.batch.read() })?;
        let output = self.executor.collect()?;
        if (output.sampled.len(), output.logits.len()) != (rows.len(), self.batch.read().len()) {
            // A sequence that misses its token would never be planned again, and its reader wait for ever.
            return Err(Error::internal("a step gave another number of tokens or logits than it was asked for"));
        }
        Ok(output)
    }

    fn hand_out(&mut self, output: StepOutput) {
        let mut sampled = output.sampled.into_iter();
        let mut logits = output.logits.into_iter();
        for index in 0..self.scheduler.plan().work.len() {
            let work = self.scheduler.plan().work[index];
            if work.all_logits {
                self.take_logits(work, logits.by_ref().take(work.len));
                continue;
            }
            if let Some(Live::Continuation(live)) = self.live.get_mut(&work.seq) {
                live.leave_queue();
            }
            if work.samples
                && let Some(token) = sampled.next()
            {
                self.take_token(work.seq, token);
            }
        }
    }

    fn take_logits(&mut self, work: Work, rows: impl Iterator<Item = Vec<f32>>) {
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
        let Some(Live::Continuation(live)) = self.live.get_mut(&seq) else { return };
        self.stats.generated_tokens += 1;
        let token = sampled.id;
        let num_cached = self.scheduler.get(seq).map_or(0, |sequence| sequence.num_cached());
        match live.push(sampled, num_cached) {
            Progress::Ended => drop(self.end(seq)),
            Progress::Continues => {
                if live.writer.must_pause() {
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
        self.hub.set_stats(self.stats);
    }
}

#[cfg(test)]
mod tests;
