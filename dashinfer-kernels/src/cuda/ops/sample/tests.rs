//! The kernels against the CPU's sampler.

use super::*;
use crate::cuda::device::test_device;
use crate::sample::{SampleParams, SampleScratch, sample_row, uniform};
use std::num::NonZeroU32;

const GREEDY: SampleParams = SampleParams::GREEDY;

/// Numbers that follow from a seed.
struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    fn unit(&mut self) -> f64 {
        self.drawn += 1;
        uniform(self.seed ^ 0x5eed, self.drawn)
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.unit() * n as f64) as usize).min(n.saturating_sub(1))
    }

    fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    fn of<V: Clone>(&mut self, values: &[V]) -> V {
        values[self.below(values.len())].clone()
    }
}

/// Logits that look like a model's; some rows on a coarse grid (ties), some with odd values, some flat, some constant.
fn logits(vocab: usize, random: &mut Random) -> Vec<f32> {
    let kind = random.below(8);
    let (spread, step) =
        ([3.0, 3.0, 3.0, 1.0, 0.2, 3.0, 3.0, 0.0][kind], [0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 1.0, 0.0][kind]);
    let mut row: Vec<f32> = (0..vocab)
        .map(|_| {
            let normal = (0..4).map(|_| random.unit()).sum::<f64>() * 1.7 - 3.4;
            let peak = if random.chance(40.0 / vocab as f64) { 8.0 * random.unit() } else { 0.0 };
            let x = spread * normal + if spread > 0.5 { peak } else { 0.0 };
            if step > 0.0 { ((x / step).round() * step) as f32 } else { x as f32 }
        })
        .collect();
    if kind == 5 {
        for _ in 0..1 + vocab / 8 {
            let odd = random.of(&[f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -0.0, 0.0, f32::MAX, -f32::MAX]);
            row[random.below(vocab)] = odd;
        }
    }
    if kind == 6 && random.chance(0.3) {
        row.fill(random.of(&[f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -0.0]));
    }
    row
}

/// What a row refers to, owned.
#[derive(Debug, Clone)]
struct Case {
    logits_row: usize,
    params: SampleParams,
    position: u64,
    prompt: Vec<u32>,
    generated: Vec<u32>,
    banned: Vec<u32>,
    allowed: Option<Vec<u32>>,
}

impl Case {
    fn random(logits_row: usize, vocab: usize, random: &mut Random) -> Self {
        let mut params = SampleParams { seed: random.below(1 << 30) as u64, ..GREEDY };
        params.temperature = random.of(&[0.0, 0.3, 0.7, 1.0, 1.0, 1.5, 5.0, 1e-6]);
        if random.chance(0.4) {
            params.top_k = NonZeroU32::new(random.of(&[1, 2, 20, 50, 300, 1024, 1025, 5000, u32::MAX]));
        }
        if random.chance(0.5) {
            params.top_p = random.of(&[0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 0.999_999_9, f32::NAN]);
        }
        if random.chance(0.3) {
            params.min_p = random.of(&[0.01, 0.1, 0.5, 1.0, 2.0, f32::NAN]);
        }
        // One id beyond the row now and then.
        let ids = |longest: usize, random: &mut Random| {
            (0..random.below(longest + 1)).map(|_| random.below(vocab + 1) as u32).collect::<Vec<_>>()
        };
        let (mut prompt, mut generated, mut banned) = (vec![], vec![], vec![]);
        if random.chance(0.4) {
            params.repetition_penalty = random.of(&[1.0, 1.1, 1.5, 0.8, -1.0]);
            params.frequency_penalty = random.of(&[0.0, 0.3, -0.2]);
            params.presence_penalty = random.of(&[0.0, 0.5, -0.5]);
            (prompt, generated) = (ids(3000, random), ids(500, random));
        }
        if random.chance(0.3) {
            params.logit_bias = ids(40, random).iter().map(|&id| (id, (random.unit() * 8.0 - 4.0) as f32)).collect();
        }
        if random.chance(0.3) {
            banned = ids(20, random);
        }
        let allowed = random.chance(0.2).then(|| {
            let density = random.of(&[0.0, 0.01, 0.5, 1.0]);
            let words = random.of(&[vocab.div_ceil(32), vocab.div_ceil(32), vocab / 32, vocab / 32 + 3]);
            (0..words).map(|_| (0..32).fold(0, |word, _| word << 1 | u32::from(random.unit() < density))).collect()
        });
        if random.chance(0.3) {
            params.logprobs = Some(random.of(&[0, 1, 5, 20, 64]));
        }
        Self { logits_row, params, position: random.below(1 << 20) as u64, prompt, generated, banned, allowed }
    }

    fn row(&self) -> SampleRow<'_> {
        SampleRow {
            prompt: &self.prompt,
            generated: &self.generated,
            banned: &self.banned,
            allowed: self.allowed.as_deref(),
            ..SampleRow::new(self.logits_row, &self.params, self.position)
        }
    }
}

/// Whether a token could be picked if sums were a little different: it stands no farther than rounding from the thresholds and
/// from where `u` falls. `logits`: after the edits.
fn is_close(logits: &[f32], case: &Case, id: u32) -> bool {
    const MARGIN: f64 = 1e-6;
    let SampleParams { temperature, top_k, top_p, min_p, seed, .. } = case.params;
    let mut sorted: Vec<f32> = logits.iter().copied().filter(|x| *x > f32::NEG_INFINITY).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let last = top_k.and_then(|k| sorted.get(k.get() as usize - 1)).copied().unwrap_or(f32::NEG_INFINITY);
    sorted.retain(|&x| x >= last);
    // What top-k left. From here on, +∞ is the largest number.
    let logits: Vec<f32> =
        logits.iter().map(|&x| if x >= last { x.min(f32::MAX) } else { f32::NEG_INFINITY }).collect();
    sorted.iter_mut().for_each(|x| *x = x.min(f32::MAX));
    let Some(&max) = sorted.first() else { return false };
    let weight = |x: f32| ((f64::from(x) - f64::from(max)) / f64::from(temperature)).exp();
    let total: f64 = sorted.iter().map(|&x| weight(x)).sum();
    let top_p = if top_p < 1.0 { f64::from(top_p) } else { 2.0 };
    let min_p = if min_p > 0.0 { f64::from(min_p.min(1.0)) } else { 0.0 };
    // The last logit kept, if top-p and min-p keep a little less or a little more.
    let last = |room: f64| {
        let (mut last, mut above) = (max, 0.0);
        for ties in sorted.chunk_by(|a, b| a == b) {
            let w = weight(ties[0]);
            if ties[0] < max && (above >= (top_p + room) * total || w < min_p * (1.0 - room)) {
                break;
            }
            last = ties[0];
            above += w * ties.len() as f64;
        }
        last
    };
    let u = uniform(seed, case.position);
    [last(-MARGIN), last(MARGIN)].into_iter().any(|last| {
        let mass = |logits: &[f32]| logits.iter().filter(|x| **x >= last).map(|&x| weight(x)).sum::<f64>();
        let (total, before, until) = (mass(&logits), mass(&logits[..id as usize]), mass(&logits[..=id as usize]));
        logits[id as usize] >= last && before <= (u + MARGIN) * total && until >= (u - MARGIN) * total
    })
}

/// Compares with the CPU; returns whether the very same token was picked.
fn check(found: &Sampled, logits: &[f32], case: &Case) -> bool {
    let mut edited = logits.to_vec();
    let expected = sample_row(&mut edited, &case.row(), &mut SampleScratch::new());
    let name = || {
        format!(
            "vocab {}, {:?}",
            logits.len(),
            Case { prompt: vec![], generated: vec![], allowed: None, ..case.clone() }
        )
    };
    let greedy = case.params.temperature <= 0.0 || case.params.top_k.is_some_and(|k| k.get() == 1);
    if !greedy && edited.iter().any(|x| *x > f32::NEG_INFINITY) {
        assert!(is_close(&edited, case, expected.id), "the CPU's token is far off: {}", name());
    }
    if found.id != expected.id {
        assert!(!greedy && is_close(&edited, case, found.id), "{} instead of {}: {}", found.id, expected.id, name());
    }
    let close = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-5 * b.abs().max(1.0);
    assert_eq!(found.logprob.is_some(), expected.logprob.is_some());
    if let (Some(a), Some(b), true) = (found.logprob, expected.logprob, found.id == expected.id) {
        assert!(close(a, b), "log-probability {a} instead of {b}: {}", name());
    }
    assert_eq!(found.top.len(), expected.top.len(), "{}", name());
    for (a, b) in found.top.iter().zip(&expected.top) {
        assert!(a.0 == b.0 && close(a.1, b.1), "{a:?} instead of {b:?}: {}", name());
    }
    found.id == expected.id
}

/// Rows on the device, each `stride` values from the next, what is between them poisoned.
fn upload(device: &Arc<Device>, rows: &[Vec<f32>], stride: usize) -> (Buffer, Logits) {
    let vocab = rows.first().map_or(0, Vec::len);
    let mut values = vec![f32::INFINITY; rows.len() * stride];
    for (to, row) in values.chunks_exact_mut(stride.max(1)).zip(rows) {
        to[..vocab].copy_from_slice(row);
    }
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    let buffer = device.alloc("logits", bytes.len()).unwrap();
    buffer.upload(0, bytes).unwrap();
    let logits = Logits { ptr: buffer.ptr(), rows: rows.len(), vocab, stride };
    (buffer, logits)
}

#[test]
fn the_same_tokens_as_on_the_cpu() {
    let Some(device) = test_device() else { return };
    let mut sampler = CudaSampler::new(&device, 40).unwrap();
    let (mut num_same, mut num_all) = (0, 0);
    for (vocab, rounds) in [(1, 6), (7, 12), (64, 12), (65, 12), (1000, 16), (4097, 12), (30_011, 6), (151_936, 3)] {
        for round in 0..rounds {
            let mut random = Random::new((vocab * 1000 + round) as u64);
            let rows: Vec<_> = (0..12).map(|_| logits(vocab, &mut random)).collect();
            // Some rows twice, in any order.
            let cases: Vec<_> = (0..40)
                .map(|i| Case::random(if round % 2 == 0 { i % 12 } else { random.below(12) }, vocab, &mut random))
                .collect();
            let cases = if round % 3 == 0 { &cases[..12] } else { &cases[..] };
            let stride = vocab + random.of(&[0, 1, 5]);
            let (_buffer, on_device) = upload(&device, &rows, stride);
            let sample_rows: Vec<_> = cases.iter().map(Case::row).collect();
            sampler.launch(&device, on_device, &sample_rows).unwrap();
            let found = sampler.collect().unwrap();
            for (found, case) in found.iter().zip(cases) {
                num_same += usize::from(check(found, &rows[case.logits_row], case));
                num_all += 1;
            }
        }
    }
    println!("{num_same} of {num_all} tokens are the same");
    assert!(num_same * 1000 >= num_all * 995, "too many fall to a neighbour");
}

/// One block has a whole row where rows are many; where they are few, many blocks share one.
#[test]
fn few_rows_and_many_are_the_same_to_the_sampler() {
    let Some(device) = test_device() else { return };
    const VOCAB: usize = 151_936;
    let mut random = Random::new(7);
    let some: Vec<_> = (0..16).map(|_| logits(VOCAB, &mut random)).collect();
    let (mut num_same, mut num_all) = (0, 0);
    for num_rows in [1, 1, 3, 3, 8, 64, 200] {
        let mut sampler = CudaSampler::new(&device, num_rows).unwrap();
        let first = random.below(some.len());
        let rows: Vec<_> = (0..num_rows).map(|i| some[(first + i) % some.len()].clone()).collect();
        let cases: Vec<_> = (0..num_rows).map(|i| Case::random(i, VOCAB, &mut random)).collect();
        let (_buffer, on_device) = upload(&device, &rows, VOCAB + random.of(&[0, 1, 4]));
        let sample_rows: Vec<_> = cases.iter().map(Case::row).collect();
        sampler.launch(&device, on_device, &sample_rows).unwrap();
        for (found, case) in sampler.collect().unwrap().iter().zip(&cases) {
            num_same += usize::from(check(found, &rows[case.logits_row], case));
            num_all += 1;
        }
    }
    println!("{num_same} of {num_all} tokens are the same");
    assert!(num_same * 1000 >= num_all * 990, "too many fall to a neighbour");
}

/// Filters that keep thousands of tokens, and rows in which thousands tie: lists run over.
#[test]
fn long_lists_are_cut_where_the_cpu_cuts_them() {
    let Some(device) = test_device() else { return };
    const VOCAB: usize = 40_000;
    let mut sampler = CudaSampler::new(&device, 42).unwrap();
    let mut random = Random::new(11);
    let model = |spread: f64, step: f64, random: &mut Random| -> Vec<f32> {
        let mut value = || ((0..4).map(|_| random.unit()).sum::<f64>() - 2.0) * spread;
        (0..VOCAB).map(|_| if step > 0.0 { (value() / step).round() * step } else { value() } as f32).collect()
    };
    let shapes = [(5.0, 0.0), (0.01, 0.0), (5.0, 2.0), (5.0, 0.0625), (60.0, 0.0), (0.0, 0.0)];
    let mut rows: Vec<_> = shapes.iter().map(|&(spread, step)| model(spread, step, &mut random)).collect();
    // One token far above the rest, whose weights are below all bins.
    let mut deep: Vec<f32> = model(0.3, 0.0, &mut random).iter().map(|x| x - 23.0).collect();
    deep[77] = 0.0;
    rows.push(deep);
    let filters = [(0, 0.9), (0, 0.999_999_9), (200, 1.0), (1000, 0.7), (5000, 0.95), (30_000, 1.0)];
    let cases: Vec<_> = (0..42)
        .map(|i| {
            let (top_k, top_p) = filters[i / 7];
            let logprobs = (i % 2 == 0).then_some(20);
            let params = SampleParams { temperature: 1.0, top_k: NonZeroU32::new(top_k), top_p, logprobs, ..GREEDY };
            let (prompt, generated, banned) = (vec![], vec![], vec![]);
            Case { logits_row: i % 7, params, position: i as u64, prompt, generated, banned, allowed: None }
        })
        .collect();
    let (_buffer, on_device) = upload(&device, &rows, VOCAB);
    let sample_rows: Vec<_> = cases.iter().map(Case::row).collect();
    sampler.launch(&device, on_device, &sample_rows).unwrap();
    let same = sampler
        .collect()
        .unwrap()
        .iter()
        .zip(&cases)
        .filter(|(found, case)| check(found, &rows[case.logits_row], case))
        .count();
    assert!(same >= 41, "{same} of 42 tokens are the same");
}

#[test]
fn greedy_rows_take_the_largest_and_the_lower_id_of_a_tie() {
    let Some(device) = test_device() else { return };
    let mut sampler = CudaSampler::new(&device, 300).unwrap();
    for (vocab, num_rows) in [(1, 3), (7, 5), (65, 300), (1000, 7), (151_936, 1), (151_936, 20), (262_145, 3)] {
        let mut random = Random::new(vocab as u64);
        let rows: Vec<_> = (0..num_rows).map(|_| logits(vocab, &mut random)).collect();
        let (_buffer, on_device) = upload(&device, &rows, vocab);
        // In order, which needs no upload; and turned around.
        let cases = |order: &dyn Fn(usize) -> usize| -> Vec<Case> {
            let case = |logits_row| Case {
                logits_row,
                params: GREEDY,
                position: 0,
                prompt: vec![],
                generated: vec![],
                banned: vec![],
                allowed: None,
            };
            (0..num_rows).map(|i| case(order(i))).collect()
        };
        for cases in [cases(&|i| i), cases(&|i| num_rows - 1 - i), cases(&|_| 0)] {
            let sample_rows: Vec<_> = cases.iter().map(Case::row).collect();
            sampler.launch(&device, on_device, &sample_rows).unwrap();
            for (found, case) in sampler.collect().unwrap().iter().zip(&cases) {
                assert!(check(found, &rows[case.logits_row], case));
            }
        }
    }
}

#[test]
fn a_carried_token_is_penalized() {
    let Some(device) = test_device() else { return };
    let mut sampler = CudaSampler::new(&device, 4).unwrap();
    let rows = vec![vec![0.0, 5.0, 4.5, 1.0, 0.0, 0.0, 0.0], vec![3.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]];
    let penalized = SampleParams { presence_penalty: 1.0, ..GREEDY };
    let plain = SampleParams::GREEDY;
    let (_buffer, on_device) = upload(&device, &rows, 7);
    sampler.launch(&device, on_device, &[SampleRow::new(0, &plain, 0), SampleRow::new(1, &plain, 0)]).unwrap();
    // 1 and 0 were sampled. Three launches are under way before the first is collected.
    let carried = |logits_row, carried| SampleRow { carried, ..SampleRow::new(logits_row, &penalized, 1) };
    sampler.launch(&device, on_device, &[carried(0, Some(0)), carried(1, None)]).unwrap();
    let (_buffer, fresh) = upload(&device, &rows, 7);
    sampler.launch(&device, fresh, &[carried(0, Some(1)), carried(0, Some(0)), carried(1, Some(1))]).unwrap();
    let ids = |sampled: Vec<Sampled>| sampled.iter().map(|s| s.id).collect::<Vec<_>>();
    assert!(matches!(sampler.launch(&device, fresh, &[]), Err(KernelError::Shape { .. })), "a fourth is refused");
    assert_eq!(ids(sampler.collect().unwrap()), [1, 0]);
    assert_eq!(ids(sampler.collect().unwrap()), [2, 0]);
    // Carried are now 0 (of row 1) and 2 (of row 0), then 0.
    assert_eq!(ids(sampler.collect().unwrap()), [1, 1, 0]);
    assert_eq!(sampler.collect(), Err(KernelError::NothingToCollect));
    let mut last = [0u8; 12];
    sampler.ids[sampler.newest].download(0, &mut last).unwrap();
    assert_eq!(bytemuck::cast_slice::<_, u32>(&last), [1, 1, 0]);
    assert_eq!(sampler.last_ids(), sampler.ids[sampler.newest].ptr());
}

#[test]
fn what_does_not_fit_is_a_typed_error_and_leaves_nothing_to_collect() {
    let Some(device) = test_device() else { return };
    let mut sampler = CudaSampler::new(&device, 2).unwrap();
    let (_buffer, on_device) = upload(&device, &[vec![1.0, 2.0]], 2);
    let params = SampleParams::GREEDY;
    let row = |logits_row| SampleRow::new(logits_row, &params, 0);
    assert!(matches!(sampler.launch(&device, on_device, &[row(1)]), Err(KernelError::Shape { .. })));
    assert!(matches!(sampler.launch(&device, on_device, &[row(0); 3]), Err(KernelError::Shape { .. })));
    let large = Logits { vocab: MAX_VOCAB + 1, ..on_device };
    assert!(matches!(sampler.launch(&device, large, &[row(0)]), Err(KernelError::Unsupported { .. })));
    assert_eq!(sampler.collect(), Err(KernelError::NothingToCollect));
}

#[test]
#[ignore = "a measurement"]
fn bench_sample() {
    let Some(device) = test_device() else { return };
    const VOCAB: usize = 151_936;
    let greedy = SampleParams::GREEDY;
    let hot = SampleParams { temperature: 0.8, ..GREEDY };
    let kinds = [
        ("greedy", greedy),
        ("temperature", hot.clone()),
        ("top-p 0.9", SampleParams { top_p: 0.9, ..hot.clone() }),
        ("top-k 50", SampleParams { top_k: NonZeroU32::new(50), ..hot.clone() }),
        ("top-k 50, top-p 0.9", SampleParams { top_k: NonZeroU32::new(50), top_p: 0.9, ..hot.clone() }),
        ("top-p 0.9, temperature 5", SampleParams { temperature: 5.0, top_p: 0.9, ..hot.clone() }),
        ("top-p 0.9, 20 log-probabilities", SampleParams { top_p: 0.9, logprobs: Some(20), ..hot.clone() }),
        ("penalties", SampleParams { repetition_penalty: 1.1, frequency_penalty: 0.1, ..hot.clone() }),
        ("top-p 0.9, penalties", SampleParams { top_p: 0.9, repetition_penalty: 1.1, frequency_penalty: 0.1, ..hot }),
    ];
    let history: Vec<u32> = (0..2000).map(|i| i * 37 % VOCAB as u32).collect();
    for num_rows in [1, 8, 64, 256] {
        let mut sampler = CudaSampler::new(&device, num_rows).unwrap();
        // Rows like a model's; a few, repeated.
        let mut random = Random::new(2);
        let some: Vec<Vec<f32>> = (0..8)
            .map(|_| {
                let mut value = |_| {
                    let normal = (0..4).map(|_| random.unit()).sum::<f64>() * 1.7 - 3.4;
                    (3.0 * normal + if random.chance(40.0 / VOCAB as f64) { 8.0 * random.unit() } else { 0.0 }) as f32
                };
                (0..VOCAB).map(&mut value).collect()
            })
            .collect();
        let rows: Vec<_> = (0..num_rows).map(|i| some[i % some.len()].clone()).collect();
        let (_buffer, on_device) = upload(&device, &rows, VOCAB);
        for (name, params) in &kinds {
            let row = |i| SampleRow { prompt: &history, generated: &history[..300], ..SampleRow::new(i, params, 5) };
            let sample_rows: Vec<_> = (0..num_rows).map(row).collect();
            let mut times: Vec<_> = (0..30)
                .map(|_| {
                    let (start, end) = (Event::timed(&device).unwrap(), Event::timed(&device).unwrap());
                    // Work in front, so that the host's part is not measured.
                    let _busy =
                        device.alloc("work in front", 256 << 20).map(|busy| busy.fill(0, 256 << 20, 1).map(|()| busy));
                    start.record().unwrap();
                    sampler.launch(&device, on_device, &sample_rows).unwrap();
                    end.record().unwrap();
                    sampler.collect().unwrap();
                    end.wait().unwrap();
                    end.since(&start).unwrap()
                })
                .collect();
            times.sort();
            let (median, bytes) = (times[times.len() / 2].as_secs_f64(), (num_rows * VOCAB * 4) as f64);
            println!(
                "sample/f32/{num_rows}x{VOCAB} {name:<32} {:8.1} µs  {:6.2} TB/s",
                median * 1e6,
                bytes / median / 1e12
            );
        }
    }
}

#[test]
fn a_row_has_as_many_blocks_as_the_device_has_room_for() {
    let check = |num_jobs, expected| assert_eq!(blocks_of(297, num_jobs, 132), expected, "{num_jobs} jobs");
    check(1, 38); // a run for each warp
    check(64, 19);
    check(256, 8);
    check(100_000, 1);
    assert_eq!((blocks_of(0, 1, 132), blocks_of(1, 0, 0)), (1, 1));
}
