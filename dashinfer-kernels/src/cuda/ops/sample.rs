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
use crate::sample::{SampleRow, Sampled};

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

/// `Results` of `cuda/sample.cu`: addresses in pinned memory.
#[derive(Debug, Clone, Copy, NoUninit, Zeroable)]
#[repr(C)]
struct Results {
    ids: u64,
    logprobs: u64,
    num_top: u64,
    top_ids: u64,
    top_logprobs: u64,
}

/// What one launch needs on the host, from its start until it is collected.
#[derive(Debug)]
struct Slot {
    upload: Pinned,
    /// `[ids][logprobs][num_top][top_ids][top_logprobs]`, for `max_rows` rows; kernels write into it.
    results: Pinned,
    done: Event,
}

/// A launch that was not collected: for each row, whether log-probabilities were asked for.
type Pending = Vec<bool>;

/// Picks tokens as [`sample_row`](crate::sample_row) does; [`launch`](Self::launch) starts, [`collect`](Self::collect) waits.
///
/// A draw that hangs on the last bits of a sum may fall to the neighbour: weights are the CPU's to the bit, but are added as
/// integers, those below 2⁻²¹ of the largest with an error of 2⁻⁴⁵.
#[derive(Debug)]
pub(crate) struct CudaSampler {
    argmax: Kernel,
    sample: Kernel,
    max_rows: usize,
    plan: Plan,
    slots: [Slot; RING],
    /// The slot of the next launch.
    next: usize,
    pending: VecDeque<Pending>,
    upload: Buffer,
    tables: Buffer,
    copies: Buffer,
    /// `[max_rows]` of `u64`, then of `u32`: what the blocks of `argmax` share; all 0 between launches.
    shared: Buffer,
    /// The ids of the newest launch and, while it runs, of the one before.
    ids: [Buffer; 2],
    newest: usize,
    num_newest: usize,
}

impl CudaSampler {
    /// A sampler of up to `max_rows` rows a launch.
    pub(crate) fn new(device: &Arc<Device>, max_rows: usize) -> Result<Self, KernelError> {
        const OPTIONS: &[&str] = &["-DDASH_TYPE=f32"];
        let max_rows = max_rows.max(1);
        let word = size_of::<u32>();
        let slot = || {
            Ok(Slot {
                upload: Pinned::new(device, "parameters of the sampler", 1 << 16)?,
                results: Pinned::new(device, "sampled tokens", max_rows * word * (3 + 2 * MAX_TOP))?,
                done: Event::new(device)?,
            })
        };
        let ids = || device.alloc("sampled tokens", max_rows * word);
        let shared = device.alloc("maxima of rows", max_rows * 3 * word)?;
        shared.fill(0, max_rows * 3 * word, 0)?;
        Ok(Self {
            argmax: device.kernel(&UNIT, OPTIONS, "argmax_f32")?,
            sample: device.kernel(&UNIT, OPTIONS, "sample_f32")?,
            max_rows,
            plan: Plan::default(),
            slots: [slot()?, slot()?, slot()?],
            next: 0,
            pending: VecDeque::with_capacity(RING),
            upload: device.alloc("parameters of the sampler", 1 << 16)?,
            tables: device.alloc("tables of seen tokens", 1 << 16)?,
            copies: device.alloc("copies of logits", 0)?,
            shared,
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
            upload.start_upload(&self.upload, 0, bytes)?;
        }
        let results = results_at(results.address(), self.max_rows);
        let (carried_ids, ids) = (self.ids[self.newest].ptr(), self.ids[1 - self.newest].ptr());
        let (num_plain, num_general) = (self.plan.num_plain() as u32, self.plan.num_general() as u32);
        // Plain rows first: rows of `sample` may overwrite logits, but only those that no other row has.
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
                .ptr(self.shared.ptr())
                .ptr(self.shared.ptr() + (self.max_rows * size_of::<u64>()) as u64)
                .ptr(ids)
                .ptr(results.ids);
            let launch = Launch { grid: [blocks, num_plain, 1], block: 256, shared: 0 };
            // SAFETY: the parameters are those of `argmax` in `cuda/sample.cu`. The rows are among the logits (`Plan::fill`),
            // which the caller keeps; indices are below `max_rows`, for which the other buffers were made.
            unsafe { self.argmax.launch(device, launch, &mut args)? };
        }
        if num_general > 0 {
            let mut args = Args::new()
                .ptr(logits.ptr)
                .u64(logits.stride as u64)
                .u32(logits.vocab as u32)
                .ptr(self.upload.ptr())
                .ptr(self.upload.ptr() + self.plan.lists_offset() as u64)
                .ptr(carried_ids)
                .ptr(self.tables.ptr())
                .ptr(self.copies.ptr())
                .u64(copy_stride(logits) as u64)
                .ptr(ids)
                .value(&results);
            let launch = Launch { grid: [num_general, 1, 1], block: 512, shared: 0 };
            // SAFETY: the parameters are those of `sample` in `cuda/sample.cu`. Rows and indices as above; lists, tables and
            // copies were laid out by `Plan::fill` and have room (`grow`); carried rows are among those of the call before.
            unsafe { self.sample.launch(device, launch, &mut args)? };
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
        let (ids, rest) = words.split_at(self.max_rows);
        let (logprobs, rest) = rest.split_at(self.max_rows);
        let (num_top, rest) = rest.split_at(self.max_rows);
        let (top_ids, top_logprobs) = rest.split_at(self.max_rows * MAX_TOP);
        let sampled = |(i, has_logprobs): (usize, bool)| {
            if !has_logprobs {
                return Sampled { id: ids[i], ..Sampled::default() };
            }
            let top = i * MAX_TOP..i * MAX_TOP + (num_top[i] as usize).min(MAX_TOP);
            let top = top_ids[top.clone()].iter().zip(&top_logprobs[top]);
            let top = top.map(|(&id, &logprob)| (id, f32::from_bits(logprob))).collect();
            Sampled { id: ids[i], logprob: Some(f32::from_bits(logprobs[i])), top }
        };
        Ok(pending.into_iter().enumerate().map(sampled).collect())
    }

    /// The most rows of a launch.
    pub(crate) fn max_rows(&self) -> usize {
        self.max_rows
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

/// The parts of a slot's results.
fn results_at(start: u64, max_rows: usize) -> Results {
    let words = |words: usize| start + (words * size_of::<u32>()) as u64;
    Results {
        ids: start,
        logprobs: words(max_rows),
        num_top: words(2 * max_rows),
        top_ids: words(3 * max_rows),
        top_logprobs: words((3 + MAX_TOP) * max_rows),
    }
}

/// Values for each block of `argmax`: a multiple of what its 256 threads load at once, few enough to occupy the device, enough
/// that blocks do not wait for each other's atomics.
fn chunk_of(vocab: usize, rows: usize, num_sms: usize) -> usize {
    const LOAD: usize = 256 * 4;
    (vocab * rows / (4 * num_sms.max(1))).next_multiple_of(LOAD).clamp(LOAD, 16 * LOAD)
}
