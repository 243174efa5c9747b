//! The sampler on the device: picks tokens without waiting for the host, which collects them later.

mod plan;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use bytemuck::{NoUninit, Zeroable};

use self::plan::Plan;
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::memory::{Buffer, Event, Pinned};
use crate::cuda::units::Unit;
use crate::error::KernelError;
use crate::sample::{self, SampleRow, Sampled};

pub(crate) static UNIT: Unit = Unit { name: "sample.cu", source: include_str!("../../../cuda/sample.cu") };

/// The most likely tokens that can be reported with a sampled one: `MAX_TOP` of the kernel.
pub(crate) const MAX_TOP: usize = 64;
/// Sampled steps that may be under way at a time.
const RING: usize = 3;
/// The kernel's masses are sums of this many weights of at most 2⁴⁴.
const MAX_VOCAB: usize = (1 << 20) - 1;

/// Rows of logits on the device: `[rows, vocab]`, `f32`, a row each `stride` values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Logits {
    pub(crate) ptr: u64,
    pub(crate) rows: usize,
    pub(crate) vocab: usize,
    pub(crate) stride: usize,
}

/// Values of a run, of which one warp takes one after the other: `RUN` of the kernels, as below.
const RUN: usize = 512;
/// Warps of a block.
const WARPS: usize = 8;
const NUM_BINS: usize = 1024;
const MAX_LISTED: usize = 4096;
/// Uploads of up to this many bytes are read by a kernel, which takes less than starting a copy does.
const MAX_FETCHED: usize = 512 << 10;

/// `Call` of `cuda/sample.cu`: addresses.
#[derive(Debug, Clone, Copy, NoUninit, Zeroable)]
#[repr(C)]
struct Call {
    logits: u64,
    stride: u64,
    copies: u64,
    copy_stride: u64,
    jobs: u64,
    lists: u64,
    carried_ids: u64,
    tables: u64,
    work: Work,
    ids: u64,
    results: Results,
    vocab: u32,
    num_runs: u32,
}

/// What the blocks of a launch share, each `[jobs]`.
#[derive(Debug, Clone, Copy, NoUninit, Zeroable)]
#[repr(C)]
struct Work {
    best: u64,
    arrived: u64,
    states: u64,
    maxima: u64,
    masses: u64,
    bins: u64,
    listed: u64,
}

impl Work {
    /// Bytes of a job's state, beside what lies in `shared`.
    const STATE: usize = 40;

    /// Bytes for the jobs of rows with so many runs.
    fn bytes(num_jobs: usize, num_runs: usize) -> usize {
        num_jobs * (Self::STATE + num_runs * (32 * size_of::<u32>() + 8) + (NUM_BINS + MAX_LISTED) * 8)
    }

    /// Lays it out: one after the other from `start` on, wider items first.
    fn at(shared: [u64; 2], start: u64, num_jobs: usize, num_runs: usize) -> Self {
        let mut end = start;
        let mut next = |bytes: usize| {
            let first = end;
            end += (num_jobs * bytes) as u64;
            first
        };
        let [best, arrived] = shared;
        let (listed, bins, masses) = (next(MAX_LISTED * 8), next(NUM_BINS * 8), next(num_runs * 8));
        let (states, maxima) = (next(Self::STATE), next(num_runs * 32 * size_of::<u32>()));
        Self { best, arrived, states, maxima, masses, bins, listed }
    }
}

/// Addresses in pinned memory: what the host gets, for each row.
#[derive(Debug, Clone, Copy, NoUninit, Zeroable)]
#[repr(C)]
struct Results {
    /// The sum of the weights at temperature 1, in units of 2⁻⁴⁴: `u64`.
    totals: u64,
    ids: u64,
    picked: u64,
    largest: u64,
    num_top: u64,
    top_ids: u64,
    top_logits: u64,
}

impl Results {
    /// Words of a row.
    const WORDS: usize = 2 + 4 + 2 * MAX_TOP;

    fn at(start: u64, max_rows: usize) -> Self {
        let words = |words: usize| start + (words * max_rows * size_of::<u32>()) as u64;
        Self {
            totals: start,
            ids: words(2),
            picked: words(3),
            largest: words(4),
            num_top: words(5),
            top_ids: words(6),
            top_logits: words(6 + MAX_TOP),
        }
    }
}

/// The results of one launch, row by row.
fn sampled(words: &[u32], max_rows: usize, row: usize, has_logprobs: bool) -> Sampled {
    let word = |column: usize| words[column * max_rows + row];
    let id = word(2);
    if !has_logprobs {
        return Sampled { id, ..Sampled::default() };
    }
    let total = u64::from(words[2 * row + 1]) << 32 | u64::from(words[2 * row]);
    let log_sum = (total as f64 / (1u64 << 44) as f64).ln();
    let largest = f32::from_bits(word(4));
    let logprob = |bits: u32| sample::logprob(f32::from_bits(bits), largest, log_sum);
    let top = |column: usize| &words[column * max_rows + row * MAX_TOP..][..(word(5) as usize).min(MAX_TOP)];
    let top = top(6).iter().zip(top(6 + MAX_TOP)).map(|(&id, &bits)| (id, logprob(bits))).collect();
    Sampled { id, logprob: Some(logprob(word(3))), top }
}

/// What one launch needs on the host, from its start until it is collected.
#[derive(Debug)]
struct Slot {
    upload: Pinned,
    /// [`Results`] for `max_rows` rows; kernels write into it.
    results: Pinned,
    done: Event,
}

/// A launch that was not collected: for each row, whether log-probabilities were asked for.
type Pending = Vec<bool>;

/// The kernels of `cuda/sample.cu`.
#[derive(Debug)]
struct Kernels {
    argmax: Kernel,
    fetch: Kernel,
    prepare: Kernel,
    edit: Kernel,
    maxima: Kernel,
    weigh: Kernel,
    narrow: Kernel,
}

impl Kernels {
    fn new(device: &Arc<Device>) -> Result<Self, KernelError> {
        let kernel = |symbol| device.kernel(&UNIT, &["-DDASH_TYPE=f32"], symbol);
        Ok(Self {
            argmax: kernel("argmax_f32")?,
            fetch: kernel("fetch_f32")?,
            prepare: kernel("prepare_f32")?,
            edit: kernel("edit_f32")?,
            maxima: kernel("maxima_f32")?,
            weigh: kernel("weigh_f32")?,
            narrow: kernel("narrow_f32")?,
        })
    }
}

/// Picks tokens as [`sample_row`](crate::sample_row) does; [`launch`](Self::launch) starts, [`collect`](Self::collect) waits.
///
/// A draw that hangs on the last bits of a sum may fall to the neighbour: weights are the CPU's to the bit, but are added as
/// integers, those below 2⁻²¹ of the largest with an error of 2⁻⁴⁵.
#[derive(Debug)]
pub(crate) struct CudaSampler {
    kernels: Kernels,
    max_rows: usize,
    plan: Plan,
    slots: [Slot; RING],
    /// The slot of the next launch.
    next: usize,
    pending: VecDeque<Pending>,
    upload: Buffer,
    tables: Buffer,
    copies: Buffer,
    /// `[2 * max_rows]` of `u64`, then of `u32`: what blocks tell each other; all 0 between launches.
    shared: Buffer,
    work: Buffer,
    /// The ids of the newest launch and, while it runs, of the one before.
    ids: [Buffer; 2],
    newest: usize,
    num_newest: usize,
}

impl CudaSampler {
    /// A sampler of up to `max_rows` rows a launch.
    pub(crate) fn new(device: &Arc<Device>, max_rows: usize) -> Result<Self, KernelError> {
        let max_rows = max_rows.max(1);
        let word = size_of::<u32>();
        let slot = || {
            Ok(Slot {
                upload: Pinned::new(device, "parameters of the sampler", 1 << 16)?,
                results: Pinned::new(device, "sampled tokens", max_rows * word * Results::WORDS)?,
                done: Event::new(device)?,
            })
        };
        let ids = || device.alloc("sampled tokens", max_rows * word);
        let shared = device.alloc("maxima of rows", 2 * max_rows * 3 * word)?;
        shared.fill(0, 2 * max_rows * 3 * word, 0)?;
        Ok(Self {
            kernels: Kernels::new(device)?,
            max_rows,
            plan: Plan::default(),
            slots: [slot()?, slot()?, slot()?],
            next: 0,
            pending: VecDeque::with_capacity(RING),
            upload: device.alloc("parameters of the sampler", 1 << 16)?,
            tables: device.alloc("tables of seen tokens", 1 << 16)?,
            copies: device.alloc("copies of logits", 0)?,
            shared,
            work: device.alloc("work of the sampler", 0)?,
            ids: [ids()?, ids()?],
            newest: 0,
            num_newest: 0,
        })
    }

    /// Starts to pick a token for each of `rows`. Logits may be overwritten.
    ///
    /// # Errors
    /// Those of [`Plan::fill`]; [`KernelError::Shape`] for more rows than the sampler was made for, or a fourth launch before the
    /// first was collected; [`KernelError::Unsupported`] for a vocabulary above [`MAX_VOCAB`]; and what the device reports.
    /// Nothing is under way then that could be collected.
    pub(crate) fn launch(
        &mut self,
        device: &Arc<Device>,
        logits: Logits,
        rows: &[SampleRow<'_>],
    ) -> Result<(), KernelError> {
        const OP: &str = "sample";
        let at_most = |what, found, wanted| {
            if found <= wanted { Ok(()) } else { Err(KernelError::Shape { op: OP, what, wanted, found }) }
        };
        at_most("rows", rows.len(), self.max_rows)?;
        at_most("launches under way", self.pending.len() + 1, RING)?;
        if logits.vocab > MAX_VOCAB {
            let what = format!("a vocabulary of {}, above {MAX_VOCAB},", logits.vocab);
            return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        }
        self.plan.fill(logits, rows, self.num_newest)?;
        self.grow(device, logits)?;
        self.start(device, logits, rows)?;
        self.pending.push_back(rows.iter().map(|row| row.params.logprobs.is_some()).collect());
        self.next = (self.next + 1) % RING;
        (self.newest, self.num_newest) = (1 - self.newest, rows.len());
        Ok(())
    }

    /// Makes room for what is planned. Memory that is given back waits for the work on it, so this is rare: sizes double.
    fn grow(&mut self, device: &Arc<Device>, logits: Logits) -> Result<(), KernelError> {
        let grow = |buffer: &mut Buffer, what, bytes: usize| {
            if bytes > buffer.bytes() {
                *buffer = device.alloc(what, bytes.next_power_of_two())?;
            }
            Ok(())
        };
        let work_bytes = Work::bytes(self.plan.num_jobs()[0], logits.vocab.div_ceil(RUN));
        grow(&mut self.work, "work of the sampler", work_bytes)?;
        let bytes = self.plan.upload_bytes();
        grow(&mut self.upload, "parameters of the sampler", bytes)?;
        grow(&mut self.tables, "tables of seen tokens", self.plan.table_bytes())?;
        grow(&mut self.copies, "copies of logits", self.plan.num_copies() * copy_stride(logits) * size_of::<f32>())?;
        let staged = &mut self.slots[self.next].upload;
        if bytes > staged.as_slice().len() {
            *staged = Pinned::new(device, "parameters of the sampler", bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Puts the planned work into the stream.
    fn start(&mut self, device: &Arc<Device>, logits: Logits, rows: &[SampleRow<'_>]) -> Result<(), KernelError> {
        let Slot { upload, results, done } = &mut self.slots[self.next];
        let bytes = self.plan.upload_bytes();
        if bytes > 0 {
            // What was copied from here last was collected since, so that copy is over.
            self.plan.write(rows, upload.as_mut_slice());
        }
        if bytes > MAX_FETCHED {
            upload.start_upload(&self.upload, 0, bytes)?;
        } else if bytes > 0 {
            let num = bytes.div_ceil(16) as u32;
            let mut args = Args::new().ptr(self.upload.ptr()).ptr(upload.address()).u32(num);
            let launch = Launch { grid: [num.div_ceil(256), 1, 1], block: 256, shared: 0 };
            // SAFETY: the parameters are those of `fetch`. Both have room for whole 16 bytes: their sizes are powers of two.
            unsafe { self.kernels.fetch.launch(device, launch, &mut args)? };
        }
        let results = Results::at(results.address(), self.max_rows);
        let (carried_ids, ids) = (self.ids[self.newest].ptr(), self.ids[1 - self.newest].ptr());
        let shared = [self.shared.ptr(), self.shared.ptr() + (2 * self.max_rows * size_of::<u64>()) as u64];
        let num_plain = self.plan.num_plain() as u32;
        // Plain rows first: jobs may overwrite logits, but only those that no other row has.
        if num_plain > 0 {
            let chunk = chunk_of(logits.vocab, num_plain as usize, device.num_sms as usize);
            let blocks = logits.vocab.div_ceil(chunk).max(1) as u32;
            let pairs = self.plan.pairs_offset().map_or(0, |offset| self.upload.ptr() + offset as u64);
            let mut args = Args::new()
                .ptr(logits.ptr)
                .u64(logits.stride as u64)
                .u32(logits.vocab as u32)
                .u32(chunk as u32)
                .ptr(pairs)
                .ptr(shared[0])
                .ptr(shared[1])
                .ptr(ids)
                .ptr(results.ids);
            let launch = Launch { grid: [blocks, num_plain, 1], block: 256, shared: 0 };
            // SAFETY: the parameters are those of `argmax` in `cuda/sample.cu`. The rows are among the logits (`Plan::fill`),
            // which the caller keeps; indices are below `max_rows`, for which the other buffers were made.
            unsafe { self.kernels.argmax.launch(device, launch, &mut args)? };
        }
        let [num_jobs, num_weighed, num_narrowed] = self.plan.num_jobs();
        if num_jobs > 0 {
            let num_runs = logits.vocab.div_ceil(RUN);
            let call = Call {
                logits: logits.ptr,
                stride: logits.stride as u64,
                copies: self.copies.ptr(),
                copy_stride: copy_stride(logits) as u64,
                jobs: self.upload.ptr(),
                lists: self.upload.ptr() + self.plan.lists_offset() as u64,
                carried_ids,
                tables: self.tables.ptr(),
                work: Work::at(shared, self.work.ptr(), num_jobs, num_runs),
                ids,
                results,
                vocab: logits.vocab as u32,
                num_runs: num_runs as u32,
            };
            let blocks = blocks_of(num_runs, num_jobs, device.num_sms as usize) as u32;
            let passes = |jobs: usize| Launch { grid: [blocks, jobs as u32, 1], block: 256, shared: 0 };
            let (prepared, edited) = self.plan.has_edits();
            let all_prepared = if prepared { num_jobs } else { 0 };
            let edits = Launch { grid: [if edited { num_jobs as u32 } else { 0 }, 1, 1], block: 1024, shared: 0 };
            let Kernels { prepare, edit, maxima, weigh, narrow, .. } = &self.kernels;
            for (kernel, launch) in [
                (prepare, passes(all_prepared)),
                (edit, edits),
                (maxima, passes(num_jobs)),
                (weigh, passes(num_weighed)),
                (narrow, passes(num_narrowed)),
            ] {
                // SAFETY: the kernels' one parameter is a `Call`. Rows and indices as above; lists, tables, copies and jobs were
                // laid out by `Plan::fill` and `Work::at` and have room (`grow`); carried rows are among those of the call
                // before.
                unsafe { kernel.launch(device, launch, &mut Args::new().value(&call))? };
            }
        }
        done.record()
    }

    /// Waits for the oldest launch that was not collected.
    ///
    /// # Errors
    /// [`KernelError::NothingToCollect`], and what went wrong on the device.
    pub(crate) fn collect(&mut self) -> Result<Vec<Sampled>, KernelError> {
        let slot = &self.slots[(self.next + RING - self.pending.len()) % RING];
        let pending = self.pending.pop_front().ok_or(KernelError::NothingToCollect)?;
        slot.done.wait()?;
        let words: &[u32] = bytemuck::cast_slice(slot.results.as_slice());
        let row = |(i, has_logprobs)| sampled(words, self.max_rows, i, has_logprobs);
        Ok(pending.into_iter().enumerate().map(row).collect())
    }

    /// The most rows of a launch.
    pub(crate) fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Rows of the newest launch.
    pub(crate) fn num_last_ids(&self) -> usize {
        self.num_newest
    }

    /// The address of the ids of the newest launch, `u32` for each of its rows: what the next step's embedding reads.
    pub(crate) fn last_ids(&self) -> u64 {
        self.ids[self.newest].ptr()
    }
}

/// Values from one copied row to the next: rows begin at 16 bytes.
fn copy_stride(logits: Logits) -> usize {
    logits.vocab.next_multiple_of(4)
}

/// Blocks that share a job: enough in all to occupy the device several times over, and all warps of a block with equally many
/// runs, at least one.
fn blocks_of(num_runs: usize, num_jobs: usize, num_sms: usize) -> usize {
    let wanted = (16 * num_sms).div_ceil(num_jobs.max(1));
    let runs = num_runs.div_ceil(WARPS * wanted.max(1)).max(1);
    num_runs.div_ceil(WARPS * runs).max(1)
}

/// Values for each block of `argmax`: a multiple of what its 256 threads load at once, few enough to occupy the device, enough
/// that blocks do not wait for each other's atomics.
fn chunk_of(vocab: usize, rows: usize, num_sms: usize) -> usize {
    const LOAD: usize = 256 * 4;
    (vocab * rows / (4 * num_sms.max(1))).next_multiple_of(LOAD).clamp(LOAD, 16 * LOAD)
}
