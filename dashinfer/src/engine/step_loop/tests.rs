//! The loop by itself: all commands are there before it runs on the test's thread, and what happens in between happens within
//! a step. Each scenario runs at both depths of an executor.

use dashinfer_kernels::SampleParams;
use futures::executor::block_on;
use futures::{FutureExt, StreamExt};

mod ahead;

use super::*;
use crate::engine::TokenStream;
use crate::scheduler::Limits;
use crate::{Chunk, Completion, FinishReason};

const VOCAB: usize = 50;

/// Computes by a function of the step's number, counted from 0, and the step.
struct Scripted<F> {
    run: F,
    depth: usize,
    /// The step that is refused when it is submitted.
    refused: Option<usize>,
    num_steps: usize,
    outputs: VecDeque<Result<StepOutput, Error>>,
}

impl<F: FnMut(usize, &Step<'_>) -> Result<StepOutput, Error>> Executor for Scripted<F> {
    fn depth(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error> {
        assert!(self.outputs.len() <= self.depth, "the loop is further ahead than the executor");
        let number = self.num_steps;
        self.num_steps += 1;
        if self.refused == Some(number) {
            return Err(broken());
        }
        self.outputs.push_back((self.run)(number, step));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.outputs.pop_front().unwrap()
    }

    fn idle_before_submit(&self) -> Option<Duration> {
        // Some device: it is seen to have run out of work before every second step.
        self.num_steps.is_multiple_of(2).then_some(Duration::from_millis(1))
    }
}

/// The model that says for each row how many tokens were generated before it; logits are the row's number.
fn count(step: &Step<'_>) -> StepOutput {
    let num_generated = |row: &SampleRow<'_>| row.generated.len() + usize::from(row.carried.is_some());
    let sampled = |row: &SampleRow<'_>| Sampled { id: num_generated(row) as u32, ..Sampled::default() };
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
    depth: usize,
    refused: Option<usize>,
    next_request: u64,
}

impl Harness {
    fn new(depth: usize) -> Self {
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
        let hub = Hub::new(100);
        Self { commands, obeyed, hub, limits, vocab_size: VOCAB, depth, refused: None, next_request: 0 }
    }

    /// A request whose prompt is one token, `name`.
    fn request(&mut self, name: u32, max_tokens: usize, buffer: usize) -> TokenStream {
        self.resolved(resolved(vec![name], max_tokens), buffer, None)
    }

    fn resolved(&mut self, resolved: Resolved, buffer: usize, detokenizer: Option<Detokenizer>) -> TokenStream {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let (stream, writer) = TokenStream::new(id, buffer, self.commands.clone(), self.hub.enqueue());
        let new = NewRequest { resolved, writer, arrived: Instant::now(), detokenizer };
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
        let (depth, refused) = (self.depth, self.refused);
        self.run_on(Scripted { run, depth, refused, num_steps: 0, outputs: VecDeque::new() })
    }

    fn run_on(self, executor: impl Executor) -> EngineStats {
        self.send(Command::Close);
        let scheduler = Scheduler::new(self.limits).unwrap();
        StepLoop::new(executor, scheduler, self.obeyed, Arc::clone(&self.hub), self.vocab_size, 16).run();
        self.hub.stats()
    }
}

/// A greedy request without stops.
fn resolved(prompt: Vec<u32>, max_tokens: usize) -> Resolved {
    Resolved {
        prompt,
        params: SampleParams::default(),
        stop_tokens: Vec::new(),
        stop_strings: Vec::new(),
        min_tokens: 0,
        max_tokens,
        priority: 0,
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
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
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
        // Of the steps 1 to 4, two began late; without a step ahead nobody asks.
        let starved = (stats.starved_steps, stats.starved_time);
        assert_eq!(starved, [(0, Duration::ZERO), (2, Duration::from_millis(2))][depth]);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_failed_step_is_told_to_its_requests_and_others_go_on() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
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
        assert_eq!(stats.steps, 5 + depth as u64, "the failed one is not counted, one that followed too early is");
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_failed_step_is_told_to_who_waits_for_logits() {
    for depth in [0, 1] {
        let harness = Harness::new(depth);
        let (failed, later) = (harness.prompt_logits((0..6).collect()), harness.prompt_logits((0..4).collect()));
        let stats = harness.run(|number, step| if number == 0 { Err(broken()) } else { Ok(count(step)) });
        assert!(matches!(block_on(failed).unwrap(), Err(Error::Internal { .. })));
        // One step ahead, two of its rows are behind two of the other one, for whom they come too late.
        let later = block_on(later).unwrap().unwrap();
        let wanted = [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 0.0, 1.0]][depth];
        assert_eq!(later.rows().map(|row| row[0]).collect::<Vec<_>>(), wanted);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn logits_that_do_not_fit_the_memory_are_refused_and_others_go_on() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        harness.vocab_size = 1 << 60;
        let (refused, other) = (harness.prompt_logits(vec![1, 2, 3]), harness.request(7, 2, 9));
        let stats = harness.run(|_, step| Ok(count(step)));
        let error = block_on(refused).unwrap().unwrap_err().to_string();
        assert_eq!(error, format!("out of memory: {} bytes for the logits of a prompt", 12_u64 << 60));
        assert_eq!(tokens(other), [0, 1]);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_late_reader_finds_the_failure_behind_its_last_chunk() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        // Its only place is taken by a chunk when the step of the other one panics.
        let (mut late, _other) = (harness.request(7, 5, 1), harness.request(8, 5, 9));
        harness.run(|number, step| {
            // The first step whose submission comes behind the results of another one.
            if number == 1 + depth { panic!("by intent: the test of a panic") } else { Ok(count(step)) }
        });
        assert_eq!(ready(&mut late).unwrap().tokens, [0]);
        assert!(matches!(block_on(late.next()), Some(Err(Error::Internal { .. }))));
        assert!(block_on(late.next()).is_none());
    }
}

#[test]
fn a_panic_is_told_to_all() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
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
}

#[test]
fn an_output_of_the_wrong_length_is_a_failed_step() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        let stream = harness.request(7, 3, 9);
        let stats = harness.run(|_, _| Ok(StepOutput::default()));
        let wanted = "internal error: a step gave another number of tokens or logits than it was asked for";
        assert_eq!(whole(stream).unwrap_err().to_string(), wanted);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_full_buffer_pauses_until_half_of_it_is_read() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        let (mut late, fast) = (harness.request(7, 10, 4), harness.request(8, 12, 99));
        let mut read = Vec::new();
        let reading = &mut read;
        let stream = &mut late;
        let stats = harness.run(move |number, step| {
            // Full after four steps, and perhaps a fifth that is under way; one chunk of four read is not yet half of them, all
            // are more.
            let is_planned = step.batch.ids.len() == 2;
            let wanted = [true, true, true, true, depth == 1, false, false, true];
            assert!(number > 7 || is_planned == wanted[number], "{number}");
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
}

#[test]
fn a_dropped_stream_is_in_no_later_step() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
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
}

#[test]
fn a_cancellation_that_overtakes_its_request_is_heeded() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        let stream = harness.request(7, 10, 99);
        let request = harness.obeyed.recv().unwrap();
        drop(stream);
        // The command that cancels is in the channel now, the request comes behind it.
        harness.send(request);
        let stats = harness.run(|_, step| Ok(count(step)));
        assert_eq!(stats.steps, 0, "nobody waits for a step");
        assert_nothing_is_left(stats);
    }
}

#[test]
fn dropped_logits_are_computed_no_further() {
    for depth in [0, 1] {
        let harness = Harness::new(depth);
        let mut logits = Some(harness.prompt_logits((0..40).collect()));
        let stats = harness.run(move |_, step| {
            drop(logits.take());
            Ok(count(step))
        });
        assert_eq!(stats.steps, 1 + depth as u64);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn the_loop_ends_when_all_senders_are_gone() {
    for depth in [0, 1] {
        let Harness { commands, obeyed, hub, limits, .. } = Harness::new(depth);
        drop(commands);
        let run = |_: usize, step: &Step<'_>| Ok(count(step));
        let executor = Scripted { run, depth, refused: None, num_steps: 0, outputs: VecDeque::new() };
        let scheduler = Scheduler::new(limits).unwrap();
        StepLoop::new(executor, scheduler, obeyed, Arc::clone(&hub), VOCAB, 16).run();
        assert_eq!(hub.stats().steps, 0);
    }
}

#[test]
fn a_whole_context_ends_by_length() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        harness.limits.num_blocks = 1;
        let stream = harness.request(7, 15, 99);
        let stats = harness.run(|_, step| Ok(count(step)));
        let found = whole(stream).unwrap();
        assert_eq!((found.tokens.len(), found.finish.reason), (15, FinishReason::Length));
        assert_eq!(stats.steps, 15, "no step is begun that gives nothing");
    }
}

#[test]
fn a_step_that_is_refused_is_told_to_its_requests_behind_the_tokens_of_the_one_before() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        harness.limits.max_running = 2;
        harness.refused = Some(2);
        let (first, second, third) = (harness.request(7, 2, 9), harness.request(8, 5, 9), harness.request(9, 4, 9));
        let stats = harness.run(|_, step| Ok(count(step)));
        assert_eq!(tokens(first), [0, 1], "it is in no third step");
        let mut second = second;
        assert_eq!([(); 2].map(|()| ready(&mut second).unwrap().tokens[0]), [0, 1]);
        assert!(block_on(second.next()).unwrap().is_err());
        // At depth 0 the place of the first was given to it, so that it was in the step that was refused.
        match depth {
            0 => assert!(whole(third).is_err()),
            _ => assert_eq!(tokens(third), [0, 1, 2, 3]),
        }
        assert_eq!(stats.steps, [2, 6][depth]);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_request_for_one_token_takes_one_step() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        let (stream, logits) = (harness.request(7, 1, 1), harness.prompt_logits(vec![1, 2]));
        let stats = harness.run(|_, step| Ok(count(step)));
        assert_eq!(tokens(stream), [0]);
        assert!(block_on(logits).unwrap().is_ok());
        assert_eq!((stats.steps, stats.generated_tokens), (1, 1));
        assert_nothing_is_left(stats);
    }
}

/// What the host does for a step of 256 sequences. `cargo test --release -p dashinfer --lib -- --ignored --nocapture host_time`
#[test]
#[ignore = "a measurement"]
fn host_time_of_a_step() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        harness.limits.max_running = 256;
        harness.limits.token_budget = 256 * 1024;
        harness.limits.num_blocks = 256 * 100;
        harness.limits.prefix_cache = true;
        let mut streams: Vec<_> =
            (0..256).map(|name| harness.resolved(resolved(vec![name; 1000], 500), 64, None)).collect();
        let (mut times, mut begin) = (Vec::new(), Instant::now());
        harness.run(|_, step| {
            times.push(begin.elapsed());
            let output = count(step);
            streams.iter_mut().for_each(|stream| while ready(stream).is_some() {});
            begin = Instant::now();
            Ok(output)
        });
        times.sort_unstable();
        // Others may run on this machine.
        let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e6;
        println!("depth {depth}: {:.0} µs a step in the median, {:.0} to {:.0} µs of most", at(50), at(10), at(90));
    }
}
