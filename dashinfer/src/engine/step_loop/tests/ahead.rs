//! A device that does what it is told: it keeps tokens in the slots of its cache, and what it samples is a function of those that it
//! finds there. A wrong carry, a wrong slot or a block given away too early shows as a wrong token, if not before.

use proptest::prelude::*;

use super::*;
use crate::Tokenizer;
use crate::text::SpecialTokens;

/// The token that follows a context: of 40, so that stops are met now and then, and never one that is banned.
fn next(context: &[u32], banned: &[u32]) -> u32 {
    let hash = context.iter().fold(7_u64, |hash, &token| (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let first = (hash >> 32) as u32 % 40;
    (0..40).map(|i| (first + i) % 40).find(|token| !banned.contains(token)).expect("most are not banned")
}

/// What a request should give, alone and without a cache.
fn expected(request: &Resolved) -> Vec<u32> {
    let mut context = request.prompt.clone();
    let num_generated = |context: &[u32]| context.len() - request.prompt.len();
    loop {
        let may_stop = num_generated(&context) >= request.min_tokens;
        let token = next(&context, if may_stop { &[] } else { &request.stop_tokens });
        context.push(token);
        if (may_stop && request.stop_tokens.contains(&token)) || num_generated(&context) == request.max_tokens {
            return context.split_off(request.prompt.len());
        }
    }
}

/// Does something while a step, counted from 0, is on its way to the device.
type Hook = Box<dyn FnMut(usize) + Send>;

struct Device {
    depth: usize,
    /// Position and token of what was last written into each slot.
    slots: Vec<Option<(usize, u32)>>,
    num_steps: usize,
    /// The step that sampled last, and its tokens.
    newest: (usize, Vec<u32>),
    outputs: VecDeque<Result<StepOutput, Error>>,
    hook: Hook,
    refuse: Option<usize>,
    lose: Option<usize>,
    num_carried: Arc<std::sync::atomic::AtomicUsize>,
}

impl Device {
    fn new(harness: &Harness) -> Self {
        Self {
            depth: harness.depth,
            slots: vec![None; harness.limits.num_blocks * 16],
            num_steps: 0,
            newest: (usize::MAX, Vec::new()),
            outputs: VecDeque::new(),
            hook: Box::new(|_| ()),
            refuse: None,
            lose: None,
            num_carried: Arc::default(),
        }
    }

    fn compute(&mut self, number: usize, step: &Step<'_>) -> StepOutput {
        let mut tokens = step.batch.ids.clone();
        for carried in &step.batch.carried {
            assert_eq!(self.newest.0 + 1, number, "what an earlier step sampled is known");
            assert!(!self.outputs.is_empty(), "the step before was collected");
            tokens[carried.row as usize] = self.newest.1[carried.sampled as usize];
        }
        self.num_carried.fetch_add(step.batch.carried.len(), std::sync::atomic::Ordering::Relaxed);
        let paged = &step.batch.paged;
        let mut contexts = Vec::new();
        for sequence in &paged.sequences {
            let blocks = &paged.block_table[sequence.first_block..][..sequence.num_blocks];
            let slot = |position: usize| blocks[position / 16] as usize * 16 + position % 16;
            for i in 0..sequence.num_rows {
                let (row, position) = (sequence.first_row + i, sequence.context_len - sequence.num_rows + i);
                assert_eq!((paged.positions[row] as usize, paged.slots[row] as usize), (position, slot(position)));
                self.slots[slot(position)] = Some((position, tokens[row]));
            }
            contexts.push((sequence, slot));
        }
        let mut sampled = Vec::new();
        for row in step.rows {
            let batch_row = step.batch.logit_rows[row.logits_row] as usize;
            let of_row = |sequence: &dashinfer_kernels::SequenceRows| {
                (sequence.first_row..sequence.first_row + sequence.num_rows).contains(&batch_row)
            };
            let (sequence, slot) = contexts.iter().find(|(sequence, _)| of_row(sequence)).unwrap();
            let position = paged.positions[batch_row] as usize;
            assert_eq!((position + 1, position as u64 + 1), (sequence.context_len, row.position));
            let seen: Vec<u32> = (0..=position)
                .map(|at| self.slots[slot(at)].filter(|found| found.0 == at).expect("its slot was written").1)
                .collect();
            let carried = row.carried.map(|row| self.newest.1[row as usize]);
            let told: Vec<u32> = row.prompt.iter().chain(row.generated).chain(&carried).copied().collect();
            assert_eq!(seen, told, "the cache of {sequence:?}");
            sampled.push(Sampled { id: next(&seen, row.banned), ..Sampled::default() });
        }
        if !sampled.is_empty() {
            self.newest = (number, sampled.iter().map(|sampled| sampled.id).collect());
        }
        StepOutput { sampled, logits: step.read.iter().map(|_| vec![0.0; VOCAB]).collect() }
    }
}

impl Executor for Device {
    fn depth(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error> {
        assert!(self.outputs.len() <= self.depth);
        let number = self.num_steps;
        self.num_steps += 1;
        (self.hook)(number);
        let output = self.compute(number, step);
        if self.refuse == Some(number) {
            return Err(broken());
        }
        self.outputs.push_back(if self.lose == Some(number) { Err(broken()) } else { Ok(output) });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.outputs.pop_front().expect("steps are collected once")
    }
}

/// A prompt of `len` tokens that begins like others of the same `text`.
fn prompt(text: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (text + i / 3) % VOCAB as u32).collect()
}

#[test]
fn a_stop_token_ends_a_request_at_any_step_and_what_follows_is_dropped() {
    let other = resolved(prompt(2, 9), 14);
    let free = expected(&resolved(prompt(1, 14), 12));
    for depth in [0, 1] {
        for &stop in &free {
            let mut harness = Harness::new(depth);
            harness.limits.num_blocks = 4;
            harness.limits.prefix_cache = true;
            let request = Resolved { stop_tokens: vec![stop], ..resolved(prompt(1, 14), 12) };
            let wanted = expected(&request);
            let streams = [&request, &other, &request].map(|request| harness.resolved(request.clone(), 99, None));
            let device = Device::new(&harness);
            let stats = harness.run_on(device);
            let [first, beside, second] = streams.map(|stream| whole(stream).unwrap());
            assert_eq!((&first.tokens, &second.tokens, &beside.tokens), (&wanted, &wanted, &expected(&other)));
            assert_eq!(first.finish.reason, FinishReason::StopToken(stop));
            assert_eq!(stats.generated_tokens as usize, 2 * wanted.len() + 14, "what was dropped is not counted");
            assert_nothing_is_left(stats);
        }
    }
}

#[test]
fn a_token_under_way_counts_for_the_minimum() {
    let free = expected(&resolved(prompt(1, 4), 12));
    for depth in [0, 1] {
        for min_tokens in 0..8 {
            let mut harness = Harness::new(depth);
            let request = Resolved { stop_tokens: (0..38).collect(), min_tokens, ..resolved(prompt(1, 4), 12) };
            let stream = harness.resolved(request.clone(), 99, None);
            let device = Device::new(&harness);
            harness.run_on(device);
            let found = tokens(stream);
            assert_eq!(found, expected(&request), "beside {free:?}");
            assert!(found.len() > min_tokens);
        }
    }
}

#[test]
fn a_stop_string_ends_a_request_whose_next_token_is_under_way() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashinfer-models/tests/goldens/qwen3");
    let tokenizer = Arc::new(Tokenizer::from_folder(folder).unwrap());
    let free = expected(&resolved(prompt(1, 4), 12));
    let text = tokenizer.decode(&free, SpecialTokens::Without);
    let stop = tokenizer.decode(&free[4..6], SpecialTokens::Without);
    let before = text.split(&stop).next().unwrap().to_owned();
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        let request = Resolved { stop_strings: vec![stop.clone()], ..resolved(prompt(1, 4), 12) };
        let stream = harness.resolved(request, 99, Some(tokenizer.detokenizer(SpecialTokens::Without)));
        let device = Device::new(&harness);
        let stats = harness.run_on(device);
        let found = whole(stream).unwrap();
        assert_eq!((found.text, found.finish.reason), (before.clone(), FinishReason::StopString(stop.clone())));
        assert_eq!(found.tokens, free[..found.tokens.len()]);
        assert_eq!(stats.steps as usize, found.tokens.len() + depth);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn who_gives_way_with_a_token_under_way_loses_nothing() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        harness.limits.num_blocks = 6;
        let requests = [1, 2, 3, 4].map(|text| resolved(prompt(text * 10, 14), 40));
        let streams = requests.each_ref().map(|request| harness.resolved(request.clone(), 99, None));
        let device = Device::new(&harness);
        let carried = Arc::clone(&device.num_carried);
        let stats = harness.run_on(device);
        assert_eq!(streams.map(tokens), requests.each_ref().map(expected));
        assert!(stats.preemptions > 0);
        assert_eq!(carried.load(std::sync::atomic::Ordering::Relaxed) > 0, depth == 1);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_prefix_is_found_while_a_step_of_the_one_that_left_it_is_under_way() {
    for depth in [0, 1] {
        let mut harness = Harness::new(depth);
        harness.limits.prefix_cache = true;
        harness.limits.num_blocks = 5;
        let free = expected(&resolved(prompt(1, 30), 12));
        let stop = *free.last().unwrap();
        let first = Resolved { stop_tokens: vec![stop], ..resolved(prompt(1, 30), 40) };
        let generated = expected(&first);
        let whole_first = [&first.prompt[..], &generated].concat();
        let second = resolved([&whole_first[..], &[3]].concat(), 20);
        let beside = resolved(prompt(30, 3), 30);
        let streams = [&beside, &first].map(|request| harness.resolved(request.clone(), 99, None));
        // Obeyed before the plan that follows the end of the first.
        let late = harness.resolved(second.clone(), 99, None);
        let mut held_back: Vec<Command> = harness.obeyed.try_iter().collect();
        let request = held_back.pop().unwrap();
        held_back.into_iter().for_each(|command| harness.send(command));
        let (sender, mut request, last) = (harness.commands.clone(), Some(request), generated.len() - 1 + depth);
        let mut device = Device::new(&harness);
        device.hook = Box::new(move |number| {
            if number == last {
                sender.send(request.take().unwrap()).unwrap();
            }
        });
        let stats = harness.run_on(device);
        assert_eq!(streams.map(tokens), [expected(&beside), generated.clone()]);
        let late = whole(late).unwrap();
        assert_eq!(late.tokens, expected(&second));
        // All but the last token of the first was computed and is known; what its last step wrote was dropped.
        assert_eq!(late.finish.usage.cached_tokens, (whole_first.len() - 1) / 16 * 16);
        assert_nothing_is_left(stats);
    }
}

#[test]
fn a_failure_takes_what_it_has_to_and_nothing_else() {
    for (refuse, lose) in [(Some(6), None), (None, Some(6))] {
        for depth in [0, 1] {
            let mut harness = Harness::new(depth);
            harness.limits.prefix_cache = true;
            harness.limits.max_running = 2;
            harness.limits.num_blocks = 6;
            let requests = [(1, 20), (2, 5), (1, 10), (3, 12)].map(|(text, n)| resolved(prompt(text, 20), n));
            let streams = requests.each_ref().map(|request| harness.resolved(request.clone(), 99, None));
            let mut device = Device::new(&harness);
            (device.refuse, device.lose) = (refuse, lose);
            let stats = harness.run_on(device);
            let wanted = requests.each_ref().map(expected);
            let [failed, done, third, fourth] = streams;
            assert!(whole(failed).is_err());
            assert_eq!(tokens(done), wanted[1]);
            // In step 6 of depth 0 or 1 there are the first and the third; the fourth comes later.
            assert!(whole(third).is_err());
            assert_eq!(tokens(fourth), wanted[3]);
            assert_nothing_is_left(stats);
        }
    }
}

#[test]
fn what_needs_the_host_is_never_carried_and_others_run_ahead_of_it() {
    let mut harness = Harness::new(1);
    let (waits, other) = (resolved(prompt(1, 5), 6), resolved(prompt(2, 5), 11));
    let streams = [&waits, &other].map(|request| harness.resolved(request.clone(), 99, None));
    let device = Device::new(&harness);
    let carried = Arc::clone(&device.num_carried);
    let hub = Arc::clone(&harness.hub);
    let requests: Vec<Command> = harness.obeyed.try_iter().collect();
    let scheduler = Scheduler::new(harness.limits).unwrap();
    let mut steps = StepLoop::new(device, scheduler, harness.obeyed, harness.hub, VOCAB, 16);
    // As `start` would do it, but for what the first needs.
    for (index, command) in requests.into_iter().enumerate() {
        let Command::Generate(mut new) = command else { panic!("only requests were sent") };
        let tokens = std::mem::take(&mut new.resolved.prompt);
        let continuation = Continuation::new(*new, tokens.len());
        let max_total_tokens = tokens.len() + continuation.resolved.max_tokens;
        let (priority, want_all_logits, cache_salt) = (0, false, 0);
        let needs_host = index == 0;
        let sequence = NewSequence { tokens, max_total_tokens, priority, want_all_logits, cache_salt, needs_host };
        let seq = steps.scheduler.add(sequence).unwrap();
        steps.live.insert(seq, Live::Continuation(Box::new(continuation)));
    }
    while steps.step() {}
    steps.publish();
    assert_eq!(streams.map(tokens), [expected(&waits), expected(&other)]);
    assert_eq!(carried.load(std::sync::atomic::Ordering::Relaxed), 10, "those of the other one");
    // Six tokens in every second step, eleven in each.
    assert_eq!(hub.stats().steps, 11);
    assert_nothing_is_left(hub.stats());
}

#[derive(Debug, Clone)]
struct Job {
    request: Resolved,
    buffer: usize,
    /// Sent when so many chunks were read of those before, or all of them.
    arrives: usize,
    /// Dropped when so many of its own were.
    cancelled: Option<usize>,
}

fn job() -> impl Strategy<Value = Job> {
    let stops = prop::collection::vec(0u32..40, 0..3);
    (
        0u32..3,
        1usize..50,
        1usize..40,
        stops,
        0usize..10,
        -1i32..2,
        1usize..6,
        0usize..60,
        prop::option::weighted(0.2, 0usize..20),
    )
        .prop_map(|(text, len, max_tokens, mut stop_tokens, min_tokens, priority, buffer, arrives, cancelled)| {
            stop_tokens.sort_unstable();
            stop_tokens.dedup();
            let min_tokens = min_tokens.min(max_tokens);
            let request = Resolved { stop_tokens, min_tokens, priority, ..resolved(prompt(text, len), max_tokens) };
            Job { request, buffer, arrives, cancelled }
        })
}

fn small_limits() -> impl Strategy<Value = Limits> {
    (1usize..64, 1usize..6, prop::option::of(1usize..40), 6usize..14, any::<bool>()).prop_map(
        |(token_budget, max_running, max_chunk, num_blocks, prefix_cache)| Limits {
            token_budget,
            max_running,
            max_chunk,
            max_all_logits: 4,
            num_blocks,
            block_size: 16,
            prefix_cache,
            hash_seed: 0,
        },
    )
}

/// Runs the loop on a thread of its own, and reads one stream at a time, so that others are late. Returns what was read.
fn serve(depth: usize, limits: &Limits, jobs: &[Job], mut seed: u64) -> Vec<Vec<u32>> {
    let mut harness = Harness::new(depth);
    harness.limits = limits.clone();
    let device = Device::new(&harness);
    let (obeyed_later, obeyed) = (harness.commands.clone(), std::mem::replace(&mut harness.obeyed, mpsc::channel().1));
    let scheduler = Scheduler::new(limits.clone()).unwrap();
    let steps = StepLoop::new(device, scheduler, obeyed, Arc::clone(&harness.hub), VOCAB, 16);
    let thread = std::thread::spawn(move || steps.run());

    let mut found = vec![Vec::new(); jobs.len()];
    let mut reading: Vec<(usize, TokenStream)> = Vec::new();
    let (mut num_sent, mut num_read) = (0, 0);
    loop {
        while num_sent < jobs.len() && (jobs[num_sent].arrives <= num_read || reading.is_empty()) {
            let Job { request, buffer, .. } = &jobs[num_sent];
            reading.push((num_sent, harness.resolved(request.clone(), *buffer, None)));
            num_sent += 1;
        }
        if reading.is_empty() {
            break;
        }
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let place = (seed >> 33) as usize % reading.len();
        let (job, stream) = &mut reading[place];
        let is_cancelled = jobs[*job].cancelled == Some(found[*job].len());
        let chunk = if is_cancelled { None } else { block_on(stream.next()) };
        match chunk {
            Some(chunk) => {
                found[*job].extend(chunk.expect("a request is served, or its test is wrong").tokens);
                num_read += 1;
            }
            None => drop(reading.swap_remove(place)),
        }
    }
    obeyed_later.send(Command::Close).unwrap();
    thread.join().unwrap();
    assert_nothing_is_left(harness.hub.stats());
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_request_gives_its_tokens_at_either_depth_whatever_happens_around_it(
        limits in small_limits(),
        jobs in prop::collection::vec(job(), 1..12),
        seed: u64,
    ) {
        for depth in [0, 1] {
            for (job, found) in jobs.iter().zip(serve(depth, &limits, &jobs, seed)) {
                let mut wanted = expected(&job.request);
                wanted.truncate(job.cancelled.unwrap_or(usize::MAX));
                prop_assert_eq!(found, wanted, "at depth {}", depth);
            }
        }
    }
}
