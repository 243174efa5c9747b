//! The loop by itself: all commands are there before it runs on the test's thread, and what happens in between happens within
//! a step.

use dashinfer_kernels::SampleParams;
use futures::executor::block_on;
use futures::{FutureExt, StreamExt};

use super::*;
use crate::engine::TokenStream;
use crate::scheduler::Limits;
use crate::{Chunk, Completion, FinishReason};

const VOCAB: usize = 50;

/// Computes by a function of the step's number, counted from 0, and the step.
struct Scripted<F> {
    run: F,
    num_steps: usize,
    output: Option<Result<StepOutput, Error>>,
}

impl<F: FnMut(usize, &Step<'_>) -> Result<StepOutput, Error>> Executor for Scripted<F> {
    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error> {
        self.output = Some((self.run)(self.num_steps, step));
        self.num_steps += 1;
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.output.take().unwrap()
    }
}

/// The model that says for each row how many tokens were generated before it; logits are the row's number.
fn count(step: &Step<'_>) -> StepOutput {
    let sampled = |row: &SampleRow<'_>| Sampled { id: row.generated.len() as u32, ..Sampled::default() };
    StepOutput {
        sampled: step.rows.iter().map(sampled).collect(),
        logits: step.read.iter().map(|&row| vec![row as f32; VOCAB]).collect(),
    }
}

fn broken() -> Error {
    Error::internal("the device fell over")
}

/// What is on its way to a loop, and what the loop shows.
struct Harness {
    commands: mpsc::Sender<Command>,
    obeyed: mpsc::Receiver<Command>,
    hub: Arc<Hub>,
    limits: Limits,
    vocab_size: usize,
    next_request: u64,
}

impl Harness {
    fn new() -> Self {
        let (commands, obeyed) = mpsc::channel();
        let limits = Limits {
            token_budget: 64,
            max_running: 8,
            max_chunk: None,
            max_all_logits: 4,
            num_blocks: 64,
            block_size: 16,
            prefix_cache: false,
            hash_seed: 0,
        };
        Self { commands, obeyed, hub: Hub::new(100), limits, vocab_size: VOCAB, next_request: 0 }
    }

    /// A request whose prompt is one token, `name`.
    fn request(&mut self, name: u32, max_tokens: usize, buffer: usize) -> TokenStream {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let (stream, writer) = TokenStream::new(id, buffer, self.commands.clone(), self.hub.enqueue());
        let resolved = Resolved {
            prompt: vec![name],
            params: SampleParams::default(),
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            min_tokens: 0,
            max_tokens,
            priority: 0,
        };
        let new = NewRequest { resolved, writer, arrived: Instant::now(), detokenizer: None };
        self.send(Command::Generate(Box::new(new)));
        stream
    }

    fn prompt_logits(&self, tokens: Vec<u32>) -> oneshot::Receiver<Result<PromptLogits, Error>> {
        let (answer, result) = oneshot::channel();
        self.send(Command::PromptLogits { tokens, answer });
        result
    }

    fn send(&self, command: Command) {
        self.commands.send(command).unwrap();
    }

    /// Closes the engine and runs its loop to the end. Returns the counters of the end.
    fn run(self, run: impl FnMut(usize, &Step<'_>) -> Result<StepOutput, Error>) -> EngineStats {
        self.send(Command::Close);
        let executor = Scripted { run, num_steps: 0, output: None };
        let scheduler = Scheduler::new(self.limits).unwrap();
        StepLoop::new(executor, scheduler, self.obeyed, Arc::clone(&self.hub), self.vocab_size, 16).run();
        self.hub.stats()
    }
}

/// What a stream gave until the loop ended.
fn whole(stream: TokenStream) -> Result<Completion, Error> {
    stream.complete().now_or_never().expect("the loop has ended, and so has every stream")
}

fn tokens(stream: TokenStream) -> Vec<u32> {
    whole(stream).unwrap().tokens
}

fn ready(stream: &mut TokenStream) -> Option<Chunk> {
    stream.next().now_or_never().flatten().map(Result::unwrap)
}

#[track_caller]
fn assert_nothing_is_left(stats: EngineStats) {
    assert_eq!((stats.queued, stats.running, stats.waiting, stats.paused, stats.blocks_in_use), (0, 0, 0, 0, 0));
}

#[test]
fn requests_run_together_and_are_counted() {
    let mut harness = Harness::new();
    let (first, second) = (harness.request(7, 3, 9), harness.request(8, 5, 9));
    let logits = harness.prompt_logits((0..6).collect());
    let stats = harness.run(|number, step| {
        // Four of the six rows of logits fit the first step, beside two prompts.
        let num_rows = [6, 4, 2, 1, 1];
        assert_eq!(step.batch.ids.len(), num_rows[number]);
        Ok(count(step))
    });
    assert_eq!((tokens(first), tokens(second)), (vec![0, 1, 2], vec![0, 1, 2, 3, 4]));
    let logits = block_on(logits).unwrap().unwrap();
    assert_eq!(logits.rows().map(|row| row[0]).collect::<Vec<_>>(), [2.0, 3.0, 4.0, 5.0, 2.0, 3.0]);
    assert_eq!((stats.steps, stats.computed_tokens, stats.generated_tokens), (5, 14, 8));
    assert_nothing_is_left(stats);
}

#[test]
fn a_failed_step_is_told_to_its_requests_and_others_go_on() {
    let mut harness = Harness::new();
    harness.limits.max_running = 2;
    let (first, second, third) = (harness.request(7, 3, 9), harness.request(8, 5, 9), harness.request(9, 4, 9));
    let stats = harness.run(|number, step| if number == 1 { Err(broken()) } else { Ok(count(step)) });
    for mut stream in [first, second] {
        assert_eq!(ready(&mut stream).unwrap().tokens, [0], "what came before the failure is not lost");
        let error = block_on(stream.next()).unwrap().unwrap_err();
        assert_eq!(error.to_string(), "internal error: the device fell over");
        assert!(block_on(stream.next()).is_none());
    }
    assert_eq!(tokens(third), [0, 1, 2, 3]);
    assert_eq!(stats.steps, 5, "the failed one is not counted");
    assert_nothing_is_left(stats);
}

#[test]
fn a_failed_step_is_told_to_who_waits_for_logits() {
    let harness = Harness::new();
    let (failed, later) = (harness.prompt_logits((0..6).collect()), harness.prompt_logits((0..4).collect()));
    let stats = harness.run(|number, step| if number == 0 { Err(broken()) } else { Ok(count(step)) });
    assert!(matches!(block_on(failed).unwrap(), Err(Error::Internal { .. })));
    assert_eq!(block_on(later).unwrap().unwrap().rows().len(), 4);
    assert_nothing_is_left(stats);
}

#[test]
fn logits_that_do_not_fit_the_memory_are_refused_and_others_go_on() {
    let mut harness = Harness::new();
    harness.vocab_size = 1 << 60;
    let (refused, other) = (harness.prompt_logits(vec![1, 2, 3]), harness.request(7, 2, 9));
    let stats = harness.run(|_, step| Ok(count(step)));
    let error = block_on(refused).unwrap().unwrap_err().to_string();
    assert_eq!(error, format!("out of memory: {} bytes for the logits of a prompt", 12_u64 << 60));
    assert_eq!(tokens(other), [0, 1]);
    assert_nothing_is_left(stats);
}

#[test]
fn a_late_reader_finds_the_failure_behind_its_last_chunk() {
    let mut harness = Harness::new();
    // Its only place is taken by a chunk when the step of the other one panics.
    let (mut late, _other) = (harness.request(7, 5, 1), harness.request(8, 5, 9));
    harness.run(|number, step| if number == 1 { panic!("by intent: the test of a panic") } else { Ok(count(step)) });
    assert_eq!(ready(&mut late).unwrap().tokens, [0]);
    assert!(matches!(block_on(late.next()), Some(Err(Error::Internal { .. }))));
    assert!(block_on(late.next()).is_none());
}

#[test]
fn a_panic_is_told_to_all() {
    let mut harness = Harness::new();
    harness.limits.max_running = 1;
    let (running, waiting) = (harness.request(7, 3, 9), harness.request(8, 5, 9));
    let logits = harness.prompt_logits(vec![1]);
    let late = Arc::new(std::sync::Mutex::new(None));
    let (sender, to_be_late) = (harness.commands.clone(), Arc::clone(&late));
    harness.run(move |_, _| {
        // Comes while the step is computed, and is never obeyed.
        let (answer, result) = oneshot::channel();
        sender.send(Command::PromptLogits { tokens: vec![1], answer }).unwrap();
        *to_be_late.lock().unwrap() = Some(result);
        panic!("by intent: the test of a panic")
    });
    let wanted = "internal error: a step panicked; the engine has stopped";
    assert_eq!(whole(running).unwrap_err().to_string(), wanted);
    assert_eq!(whole(waiting).unwrap_err().to_string(), wanted);
    assert_eq!(block_on(logits).unwrap().unwrap_err().to_string(), wanted);
    let late = late.lock().unwrap().take().unwrap();
    assert_eq!(block_on(late).unwrap().unwrap_err().to_string(), wanted);
}

#[test]
fn an_output_of_the_wrong_length_is_a_failed_step() {
    let mut harness = Harness::new();
    let stream = harness.request(7, 3, 9);
    let stats = harness.run(|_, _| Ok(StepOutput::default()));
    let wanted = "internal error: a step gave another number of tokens or logits than it was asked for";
    assert_eq!(whole(stream).unwrap_err().to_string(), wanted);
    assert_nothing_is_left(stats);
}

#[test]
fn a_full_buffer_pauses_until_half_of_it_is_read() {
    let mut harness = Harness::new();
    let (mut late, fast) = (harness.request(7, 10, 4), harness.request(8, 12, 99));
    let mut read = Vec::new();
    let reading = &mut read;
    let stream = &mut late;
    let stats = harness.run(move |number, step| {
        // Full after four steps; one chunk of four read is not yet half of them, all are more.
        let is_planned = step.batch.ids.len() == 2;
        assert!(number > 7 || is_planned == [true, true, true, true, false, false, false, true][number], "{number}");
        let num_reads = match number {
            5 => 1,
            6.. => usize::MAX,
            _ => 0,
        };
        let chunks = std::iter::from_fn(|| ready(stream)).take(num_reads);
        reading.extend(chunks.flat_map(|chunk| chunk.tokens));
        Ok(count(step))
    });
    read.extend(tokens(late));
    assert_eq!(read, (0..10).collect::<Vec<_>>());
    assert_eq!(tokens(fast), (0..12).collect::<Vec<_>>());
    assert_nothing_is_left(stats);
}

#[test]
fn a_dropped_stream_is_in_no_later_step() {
    let mut harness = Harness::new();
    let mut to_drop = Some(harness.request(7, 10, 99));
    let other = harness.request(8, 6, 99);
    let before_it_began = harness.request(9, 6, 99);
    drop(before_it_began);
    let stats = harness.run(move |number, step| {
        assert_eq!(step.batch.ids.len(), if number <= 2 { 2 } else { 1 });
        if number == 2 {
            drop(to_drop.take());
        }
        Ok(count(step))
    });
    assert_eq!(tokens(other), (0..6).collect::<Vec<_>>());
    assert_eq!(stats.steps, 6);
    assert_nothing_is_left(stats);
}

#[test]
fn a_cancellation_that_overtakes_its_request_is_heeded() {
    let mut harness = Harness::new();
    let stream = harness.request(7, 10, 99);
    let request = harness.obeyed.recv().unwrap();
    drop(stream);
    // The command that cancels is in the channel now, the request comes behind it.
    harness.send(request);
    let stats = harness.run(|_, step| Ok(count(step)));
    assert_eq!(stats.steps, 0, "nobody waits for a step");
    assert_nothing_is_left(stats);
}

#[test]
fn dropped_logits_are_computed_no_further() {
    let harness = Harness::new();
    let mut logits = Some(harness.prompt_logits((0..40).collect()));
    let stats = harness.run(move |_, step| {
        drop(logits.take());
        Ok(count(step))
    });
    assert_eq!(stats.steps, 1);
    assert_nothing_is_left(stats);
}

#[test]
fn the_loop_ends_when_all_senders_are_gone() {
    let Harness { commands, obeyed, hub, limits, .. } = Harness::new();
    drop(commands);
    let run = |_: usize, step: &Step<'_>| Ok(count(step));
    let executor = Scripted { run, num_steps: 0, output: None };
    let scheduler = Scheduler::new(limits).unwrap();
    StepLoop::new(executor, scheduler, obeyed, Arc::clone(&hub), VOCAB, 16).run();
    assert_eq!(hub.stats().steps, 0);
}

#[test]
fn a_whole_context_ends_by_length() {
    let mut harness = Harness::new();
    harness.limits.num_blocks = 1;
    let stream = harness.request(7, 15, 99);
    harness.run(|_, step| Ok(count(step)));
    let found = whole(stream).unwrap();
    assert_eq!((found.tokens.len(), found.finish.reason), (15, FinishReason::Length));
}
