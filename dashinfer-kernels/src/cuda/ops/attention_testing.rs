//! What the tests of attention kernels share: random paged batches, the whole way from plan to output, and the definition.

use std::sync::Arc;
use std::time::Duration;

use super::attention_decode::{AttentionDecode, DecodeRope, Purpose};
use super::attention_simple::AttentionSimple;
use super::attention_units::{DecodeOperands, Partials};
use super::operand::Span;
use super::testing::*;
use crate::cuda::device::Device;
use crate::cuda::memory::{Buffer, Event};
use crate::cuda::plan::{AttentionPlan, DecodeUnit, PlanParams, Splitting};
use crate::{AttentionParams, DType, KernelError, PagedBatch, SequenceRows};

/// A batch of sequences over a cache whose unused places are NaN, and its plan.
pub(super) struct Case {
    pub(super) dtype: DType,
    pub(super) params: AttentionParams,
    pub(super) block_size: usize,
    /// `(num_rows, context_len)` of each sequence.
    pub(super) sequences: Vec<(usize, usize)>,
    pub(super) splitting: Splitting,
    pub(super) min_split: usize,
    pub(super) padded_rows: Option<usize>,
    /// Whether the plan leaves out what the window hides; the kernel does in any case.
    pub(super) plan_knows_window: bool,
    pub(super) max_slots: usize,
    /// Whether heads have sinks: some above all scores, some below.
    pub(super) has_sinks: bool,
}

impl Case {
    pub(super) fn new(dtype: DType, [num_heads, num_kv_heads, head_dim]: [usize; 3], block_size: usize) -> Self {
        // Scores spread by about 2.7: few positions decide, so that one which is wrong shows.
        let scale = 8.0 / (head_dim as f32).sqrt();
        Self {
            dtype,
            params: AttentionParams { num_heads, num_kv_heads, head_dim, scale, window: None, soft_cap: None },
            block_size,
            sequences: [1, 63, 64, 65, 255, 1000, 5000].map(|context_len| (1, context_len)).to_vec(),
            splitting: Splitting::Balanced,
            min_split: 256,
            padded_rows: None,
            plan_knows_window: true,
            max_slots: 4096,
            has_sinks: false,
        }
    }

    pub(super) fn what(&self) -> String {
        let Self { dtype, params: p, block_size, splitting, has_sinks, .. } = self;
        let [h, k, d] = [p.num_heads, p.num_kv_heads, p.head_dim];
        let more = format!("window {:?}, cap {:?}, sinks {has_sinks}, {splitting:?}", p.window, p.soft_cap);
        format!("{dtype} {h}/{k} heads of {d}, blocks of {block_size}, {more}")
    }
}

/// Either kernel.
pub(super) enum Kernels {
    Decode(AttentionDecode),
    Simple(AttentionSimple),
}

impl Kernels {
    pub(super) fn decode(device: &Arc<Device>, dtype: DType, head_dim: usize) -> Self {
        Self::decode_for(device, dtype, head_dim, Purpose::Cached, false).unwrap()
    }

    /// None if shared memory has no room for it.
    pub(super) fn decode_for(
        device: &Arc<Device>,
        dtype: DType,
        head_dim: usize,
        purpose: Purpose,
        is_capped: bool,
    ) -> Option<Self> {
        AttentionDecode::new(device, dtype, head_dim, purpose, is_capped).unwrap().map(Self::Decode)
    }

    pub(super) fn simple(device: &Arc<Device>, dtype: DType, head_dim: usize) -> Self {
        Self::Simple(AttentionSimple::new(device, dtype, head_dim, false).unwrap())
    }

    /// The same kernel for capped scores.
    fn capped(&self, device: &Arc<Device>, dtype: DType, head_dim: usize) -> Self {
        match self {
            Self::Decode(_) => Self::decode_for(device, dtype, head_dim, Purpose::Cached, true).unwrap(),
            Self::Simple(_) => Self::Simple(AttentionSimple::new(device, dtype, head_dim, true).unwrap()),
        }
    }

    pub(super) fn grid(&self) -> usize {
        match self {
            Self::Decode(kernel) => kernel.grid(),
            Self::Simple(kernel) => kernel.grid(),
        }
    }

    fn run(
        &self,
        device: &Device,
        operands: &DecodeOperands<'_>,
        rope: Option<&DecodeRope>,
    ) -> Result<(), KernelError> {
        match self {
            // SAFETY: buffers outlive the work on them.
            Self::Decode(kernel) => unsafe { kernel.run(device, operands, rope) },
            Self::Simple(kernel) => kernel.run(device, operands),
        }
    }
}

/// A case on the device.
pub(super) struct Prepared<'a> {
    pub(super) case: &'a Case,
    pub(super) batch: PagedBatch,
    pub(super) plan: AttentionPlan,
    pub(super) num_rows: usize,
    pub(super) qkv: Values,
    pub(super) k: Values,
    pub(super) v: Values,
    pub(super) out: Buffer,
    units: Buffer,
    counts: Buffer,
    block_table: Buffer,
    partials: [Buffer; 3],
    sinks: Option<Values>,
}

impl<'a> Prepared<'a> {
    pub(super) fn new(device: &Arc<Device>, kernels: &Kernels, case: &'a Case, seed: u64) -> Self {
        let AttentionParams { num_heads, num_kv_heads, head_dim, .. } = case.params;
        let batch = batch(case);
        let plan = plan_of(case, &batch, kernels, case.min_split);
        let num_rows = case.padded_rows.unwrap_or_else(|| case.sequences.iter().map(|sequence| sequence.0).sum());

        let qkv = Values::random(device, case.dtype, num_rows * (num_heads + 2 * num_kv_heads) * head_dim, seed);
        let [k, v] = [1, 2].map(|which| Values::of(device, case.dtype, &cache(case, &batch, seed + which)));
        let counts: Vec<u32> = plan.chunks.iter().map(|chunk| chunk.len() as u32).collect();
        let [partial_out, ml, tickets] = Partials::bytes(case.max_slots, num_heads, head_dim);
        Self {
            num_rows,
            qkv,
            k,
            v,
            out: poisoned(device, num_rows * num_heads * head_dim * case.dtype.size_bytes()),
            units: upload(device, bytemuck::cast_slice(&plan.units)),
            counts: words(device, &counts),
            block_table: words(device, &batch.block_table),
            partials: [poisoned(device, partial_out), poisoned(device, ml), upload(device, &vec![0; tickets])],
            sinks: case.has_sinks.then(|| {
                let sinks: Vec<f32> = random(num_heads, seed + 3).iter().map(|x| 12.0 * x).collect();
                Values::of(device, DType::F32, &sinks)
            }),
            case,
            batch,
            plan,
        }
    }

    /// Makes the plan anew for another kernel.
    pub(super) fn plan_for(&mut self, device: &Arc<Device>, kernels: &Kernels, min_split: usize) {
        self.plan = plan_of(self.case, &self.batch, kernels, min_split);
        let counts: Vec<u32> = self.plan.chunks.iter().map(|chunk| chunk.len() as u32).collect();
        self.units = upload(device, bytemuck::cast_slice(&self.plan.units));
        self.counts = words(device, &counts);
    }

    /// All chunks of the plan.
    pub(super) fn run(&self, device: &Arc<Device>, kernels: &Kernels) -> Result<(), KernelError> {
        let cache = [&self.k.on_device, &self.v.on_device];
        self.run_on(device, kernels, &self.qkv.on_device, cache, None)
    }

    /// All chunks of the plan, on other rows and another cache.
    pub(super) fn run_on(
        &self,
        device: &Arc<Device>,
        kernels: &Kernels,
        qkv: &Buffer,
        cache: [&Buffer; 2],
        rope: Option<&DecodeRope>,
    ) -> Result<(), KernelError> {
        let [out, ml, tickets] = self.partials.each_ref().map(Span::from);
        for (i, chunk) in self.plan.chunks.iter().enumerate() {
            let of_unit = size_of::<DecodeUnit>();
            let operands = DecodeOperands {
                out: (&self.out).into(),
                qkv: qkv.into(),
                num_rows: self.num_rows,
                k_cache: cache[0].into(),
                v_cache: cache[1].into(),
                block_size: self.case.block_size,
                units: Span::part(&self.units, chunk.start * of_unit, chunk.len() * of_unit)?,
                num_units: Span::part(&self.counts, i * 4, 4)?,
                block_table: (&self.block_table).into(),
                partials: Partials { num_slots: self.case.max_slots, out, ml, tickets },
                params: &self.case.params,
                sinks: self.sinks.as_ref().map(|sinks| (&sinks.on_device).into()),
            };
            kernels.run(device, &operands, rope)?;
        }
        Ok(())
    }

    /// Whether the next launch finds the tickets as it must.
    pub(super) fn has_no_tickets(&self) -> bool {
        let mut bytes = vec![1; self.partials[2].bytes()];
        self.partials[2].download(0, &mut bytes).unwrap();
        bytes.iter().all(|&byte| byte == 0)
    }

    pub(super) fn output(&self) -> Vec<f32> {
        read(&self.out, self.case.dtype)
    }

    /// The definition, in `f64`; zeros for rows behind the batch's.
    pub(super) fn want(&self) -> Vec<f64> {
        let AttentionParams { num_heads, num_kv_heads, head_dim, scale, window, soft_cap } = self.case.params;
        let row_len = num_heads * head_dim;
        let mut out = vec![0.0; self.num_rows * row_len];
        for sequence in &self.batch.sequences {
            for at in 0..sequence.num_rows {
                let row = sequence.first_row + at;
                let end = sequence.context_len - sequence.num_rows + at + 1;
                let begin = window.map_or(0, |window| end.saturating_sub(window));
                for head in 0..num_heads {
                    let q = (row * (num_heads + 2 * num_kv_heads) + head) * head_dim;
                    let q = &self.qkv.values[q..q + head_dim];
                    let place = |position: usize| {
                        let block =
                            self.batch.block_table[sequence.first_block + position / self.case.block_size] as usize;
                        let kv_head = head / (num_heads / num_kv_heads);
                        let start = (block * num_kv_heads + kv_head) * self.case.block_size;
                        (start + position % self.case.block_size) * head_dim
                    };
                    let scores: Vec<f64> = (begin..end)
                        .map(|position| {
                            let k = &self.k.values[place(position)..];
                            let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                            let score = dot * f64::from(scale);
                            soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                        })
                        .collect();
                    let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks.values[head]));
                    let top = scores.iter().copied().fold(sink, f64::max);
                    let sum: f64 = (sink - top).exp() + scores.iter().map(|score| (score - top).exp()).sum::<f64>();
                    let out = &mut out[row * row_len + head * head_dim..][..head_dim];
                    for (position, score) in (begin..end).zip(&scores) {
                        let weight = (score - top).exp() / sum;
                        for (out, &v) in out.iter_mut().zip(&self.v.values[place(position)..]) {
                            *out += weight * f64::from(v);
                        }
                    }
                }
            }
        }
        out
    }

    /// Bytes of keys and values that the batch's rows see.
    pub(super) fn bytes_read(&self) -> usize {
        let AttentionParams { num_kv_heads, head_dim, .. } = self.case.params;
        let positions: usize = self.batch.sequences.iter().map(|sequence| sequence.context_len).sum();
        2 * positions * num_kv_heads * head_dim * self.case.dtype.size_bytes()
    }
}

/// Runs a case and compares. Weights are rounded to the elements' type before they meet the values, and so is the output;
/// a score of 20 in `f32` is off by some 1e-5.
#[track_caller]
pub(super) fn check(device: &Arc<Device>, kernels: &Kernels, case: &Case, seed: u64) {
    let prepared = Prepared::new(device, kernels, case, seed);
    prepared.run(device, kernels).unwrap();
    let tolerance = step(case.dtype).max(5e-5);
    let first = prepared.output();
    assert_close(&first, &prepared.want(), tolerance, tolerance, &case.what());
    for _ in 0..2 {
        assert!(prepared.has_no_tickets(), "{}", case.what());
        prepared.out.fill(0, prepared.out.bytes(), 0xff).unwrap();
        prepared.run(device, kernels).unwrap();
        assert!(prepared.output() == first, "{}: another result the second time", case.what());
    }
}

fn plan_of(case: &Case, batch: &PagedBatch, kernels: &Kernels, min_split: usize) -> AttentionPlan {
    let AttentionParams { num_kv_heads, window, .. } = case.params;
    let params = PlanParams {
        expand: false,
        grid: kernels.grid(),
        num_kv_heads,
        window: window.filter(|_| case.plan_knows_window),
        splitting: case.splitting,
        min_split,
        prefill_rows: None,
        max_slots: case.max_slots,
    };
    let mut plan = AttentionPlan::default();
    plan.make(batch, &params, case.padded_rows);
    plan
}

/// Blocks of all sequences in a random order, with some between them that nobody has.
fn batch(case: &Case) -> PagedBatch {
    let (mut first_row, mut first_block) = (0, 0);
    let mut sequences = Vec::new();
    for &(num_rows, context_len) in &case.sequences {
        let num_blocks = context_len.div_ceil(case.block_size);
        sequences.push(SequenceRows { first_row, num_rows, context_len, first_block, num_blocks });
        first_row += num_rows;
        first_block += num_blocks;
    }
    let mut blocks: Vec<u32> = (0..first_block as u32 + 3).collect();
    let keys = random(blocks.len(), 77);
    blocks.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
    blocks.truncate(first_block);
    PagedBatch { sequences, block_table: blocks, ..PagedBatch::default() }
}

/// Random keys or values where there are any.
fn cache(case: &Case, batch: &PagedBatch, seed: u64) -> Vec<f32> {
    let AttentionParams { num_kv_heads, head_dim, .. } = case.params;
    let of_block = num_kv_heads * case.block_size * head_dim;
    let some = random(1_000_003, seed);
    let mut values: Vec<f32> = some.iter().copied().cycle().take((batch.block_table.len() + 3) * of_block).collect();
    let mut used = vec![0; batch.block_table.len() + 3];
    for sequence in &batch.sequences {
        for at in 0..sequence.num_blocks {
            let block = batch.block_table[sequence.first_block + at] as usize;
            used[block] = case.block_size.min(sequence.context_len - at * case.block_size);
        }
    }
    for (block, values) in values.chunks_mut(of_block).enumerate() {
        for of_head in values.chunks_mut(case.block_size * head_dim) {
            of_head[used[block] * head_dim..].fill(f32::NAN);
        }
    }
    values
}

/// Cases that both kernels must pass for a type and head size.
pub(super) fn check_shapes(
    device: &Arc<Device>,
    kernels: &Kernels,
    dtype: DType,
    head_dim: usize,
    heads: &[[usize; 2]],
) {
    for (i, &[num_heads, num_kv_heads]) in heads.iter().enumerate() {
        let min_split = [64, 256][i % 2];
        let case = |block_size| Case { min_split, ..Case::new(dtype, [num_heads, num_kv_heads, head_dim], block_size) };
        check(device, kernels, &case([16, 32, 64, 128][i % 4]), 10 + i as u64);
        // 2 and 10 splits do not fit the slots together: two chunks.
        let fixed = Case { splitting: Splitting::ByContext, max_slots: 11, ..case([32, 16, 128, 64][i % 4]) };
        check(device, kernels, &fixed, 20 + i as u64);
    }
}

pub(super) fn check_windows(device: &Arc<Device>, kernels: &Kernels, dtype: DType, head_dim: usize) {
    for (window, plan_knows_window) in [(1, true), (1, false), (17, true), (100, false), (700, true), (700, false)] {
        for splitting in [Splitting::Balanced, Splitting::ByContext] {
            let mut case = Case { splitting, plan_knows_window, ..Case::new(dtype, [4, 2, head_dim], 32) };
            case.params.window = Some(window);
            check(device, kernels, &case, 30);
        }
    }
}

/// Sinks and caps, apart and together: whole rows, rows in parts, parts that see nothing, and rows that are not there.
pub(super) fn check_sinks_and_caps(device: &Arc<Device>, kernels: &Kernels, dtype: DType, head_dim: usize) {
    let capped = kernels.capped(device, dtype, head_dim);
    for (i, splitting) in [Splitting::Balanced, Splitting::ByContext].into_iter().enumerate() {
        let seed = 34 + i as u64;
        let plain = |heads: [usize; 2]| Case {
            splitting,
            min_split: 64,
            padded_rows: Some(9),
            ..Case::new(dtype, [heads[0], heads[1], head_dim], [16, 64][i])
        };
        for window in [None, Some(1), Some(128)] {
            let mut case = Case { has_sinks: true, plan_knows_window: i == 0, ..plain([16, 2]) };
            case.params.window = window;
            check(device, kernels, &case, seed);
        }
        // Scores reach some 10: the smaller cap bends most of them.
        for (soft_cap, has_sinks) in [(3.0, false), (50.0, false), (5.0, true)] {
            let mut case = Case { has_sinks, ..plain([6, 3]) };
            case.params.soft_cap = Some(soft_cap);
            check(device, &capped, &case, seed);
        }
        let mut case = Case { plan_knows_window: i == 1, ..plain([2, 1]) };
        (case.params.soft_cap, case.params.window) = (Some(4.0), Some(100));
        check(device, &capped, &case, seed);
    }
    // Neither serves for the other.
    let case = Case::new(dtype, [2, 1, head_dim], 16);
    let refused = Prepared::new(device, &capped, &case, 36).run(device, &capped);
    assert!(matches!(refused, Err(KernelError::Unsupported { .. })), "{refused:?}");
}

pub(super) fn check_padding(device: &Arc<Device>, kernels: &Kernels, dtype: DType, head_dim: usize) {
    let case = Case { padded_rows: Some(16), ..Case::new(dtype, [6, 2, head_dim], 16) };
    check(device, kernels, &case, 40);
}

pub(super) fn check_prompt_rows(device: &Arc<Device>, kernels: &Kernels, dtype: DType, head_dim: usize) {
    let mut case = Case::new(dtype, [4, 2, head_dim], 16);
    case.sequences = vec![(70, 70), (1, 300), (5, 133)];
    check(device, kernels, &case, 50);
}

/// Rows alone and among others, to the bit.
pub(super) fn check_invariance(device: &Arc<Device>, kernels: &Kernels, dtype: DType, head_dim: usize) {
    let run = |sequences: &[(usize, usize)], seed_rows: usize| {
        // The first sequence's blocks and rows hold the same values in both: blocks come in order of the table.
        let case = Case {
            splitting: Splitting::ByContext,
            sequences: sequences.to_vec(),
            ..Case::new(dtype, [4, 2, head_dim], 64)
        };
        let mut prepared = Prepared::new(device, kernels, &case, 60);
        let num_blocks = prepared.batch.block_table.len();
        let in_order: Vec<u32> = (0..num_blocks as u32).collect();
        prepared.block_table = words(device, &in_order);
        let of_cache = (num_blocks + 3) * 2 * 64 * head_dim;
        prepared.k = Values::of(device, dtype, &random(of_cache, 61));
        prepared.v = Values::of(device, dtype, &random(of_cache, 62));
        prepared.run(device, kernels).unwrap();
        let mut out = prepared.output();
        out.truncate(seed_rows * 4 * head_dim);
        out
    };
    let alone = run(&[(1, 2777)], 1);
    let mut among = vec![(1, 2777)];
    among.extend((0..60).map(|i| (1, 1 + i * 31)));
    assert!(alone == run(&among, 1), "{dtype}, heads of {head_dim}");
}

/// Prints the time of attention, and the keys and values read in it: the median of 20. Before each, another batch is attended
/// to, which takes the second-level cache, and keeps the device busy while the host launches.
pub(super) fn bench(
    device: &Arc<Device>,
    kernels: &Kernels,
    heads @ [num_heads, num_kv_heads, head_dim]: [usize; 3],
    context_len: usize,
    num_rows: usize,
) {
    let case = Case::decodes(heads, context_len, num_rows);
    let timed = Prepared::new(device, kernels, &case, 200);
    let time = time_after_others(device, heads, || timed.run(device, kernels));
    let speed = timed.bytes_read() as f64 / time.as_secs_f64() / 1e9;
    println!(
        "attention_decode/bf16/{num_heads}/{num_kv_heads}x{head_dim} context {context_len} rows {num_rows}   \
         {:8.1} us   {speed:6.0} GB/s   {} units",
        time.as_secs_f64() * 1e6,
        timed.plan.units.len(),
    );
}

impl Case {
    /// Rows of one context, to be timed.
    pub(super) fn decodes(heads: [usize; 3], context_len: usize, num_rows: usize) -> Self {
        Self { sequences: vec![(1, context_len); num_rows], max_slots: 2048, ..Self::new(DType::BF16, heads, 64) }
    }
}

/// The median time of 20 runs, each after the attention of another batch, which takes the second-level cache.
pub(super) fn time_after_others(
    device: &Arc<Device>,
    heads @ [_, num_kv_heads, head_dim]: [usize; 3],
    mut run: impl FnMut() -> Result<(), KernelError>,
) -> Duration {
    const FLUSHED: usize = 128 << 20;
    let other = Case::decodes(heads, 4096, FLUSHED.div_ceil(4096 * num_kv_heads * head_dim * 4));
    let kernels = Kernels::decode(device, DType::BF16, head_dim);
    let other = Prepared::new(device, &kernels, &other, 100);
    let [start, end] = [0; 2].map(|_| Event::timed(device).unwrap());
    let mut times: Vec<_> = (0..23)
        .map(|_| {
            other.run(device, &kernels).unwrap();
            start.record().unwrap();
            run().unwrap();
            end.record().unwrap();
            end.wait().unwrap();
            end.since(&start).unwrap()
        })
        .skip(3)
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}
