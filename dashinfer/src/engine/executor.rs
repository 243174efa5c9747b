//! Doing what was decided: a step goes in, tokens come out.
//!
//! [`Executor::submit`] hands a step over and [`Executor::collect`] waits for its results. At depth 0 each step is collected
//! before the next is submitted: on the CPU, where the work is done when a call returns. At depth 1 the next one is submitted
//! first, so that a device finds it when it is done with the one before.

use std::collections::VecDeque;
use std::time::Duration;

use dashinfer_kernels::{Backend, SampleRow, Sampled, WeightReads};
use dashinfer_models::{Decoder, ForwardBatch};

use crate::Error;

/// What one step computes.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    /// The forward pass.
    pub(crate) batch: &'a ForwardBatch,
    /// The rows of its logits that give a token, in the order of [`StepOutput::sampled`].
    pub(crate) rows: &'a [SampleRow<'a>],
    /// The rows of its logits that are wanted as they are, in the order of [`StepOutput::logits`].
    pub(crate) read: &'a [usize],
}

/// What came of a step.
#[derive(Debug, Default)]
pub(crate) struct StepOutput {
    /// A token for each of [`Step::rows`].
    pub(crate) sampled: Vec<Sampled>,
    /// `[V]` for each of [`Step::read`].
    pub(crate) logits: Vec<Vec<f32>>,
}

/// A loaded model with its cache, on some device.
pub(crate) trait Executor {
    /// How many steps may wait to be collected when another one is submitted: 0 or 1.
    fn depth(&self) -> usize {
        0
    }

    /// Starts a step. Steps are computed in the order of their submission. One that was refused is not collected.
    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error>;

    /// Waits for the oldest step that was submitted and not collected. It is collected even if it failed.
    fn collect(&mut self) -> Result<StepOutput, Error>;

    /// How long the device has had nothing to do, if it is known to be done with all that was submitted. Asked before a step is
    /// submitted behind another one.
    fn idle_before_submit(&self) -> Option<Duration> {
        None
    }

    /// What of weights all steps so far have read, where somebody counts.
    fn weight_reads(&self) -> Option<WeightReads> {
        None
    }
}

/// One decoder on one backend.
pub(crate) struct LocalExecutor<B: Backend> {
    decoder: Decoder<B>,
    cache: B::KvCache,
    /// What was submitted and not collected, the oldest first.
    submitted: VecDeque<Submitted>,
}

/// What is known of a step before it is waited for.
struct Submitted {
    /// Whether there are tokens to wait for.
    samples: bool,
    logits: Vec<Vec<f32>>,
}

impl<B: Backend> LocalExecutor<B> {
    pub(crate) fn new(decoder: Decoder<B>, cache: B::KvCache) -> Self {
        Self { decoder, cache, submitted: VecDeque::new() }
    }
}

impl<B: Backend> Executor for LocalExecutor<B> {
    fn depth(&self) -> usize {
        self.decoder.backend().depth().min(1)
    }

    fn idle_before_submit(&self) -> Option<Duration> {
        self.decoder.backend().idle()
    }

    fn weight_reads(&self) -> Option<WeightReads> {
        self.decoder.backend().weight_reads()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error> {
        let mut logits = self.decoder.forward(step.batch, &mut self.cache)?;
        // Sampling may overwrite a row, so rows are read first. This waits for the device; only scoring asks for rows.
        let logits_read = step.read.iter().map(|&row| logits.read_row(row)).collect::<Result<_, _>>()?;
        let samples = !step.rows.is_empty();
        if samples {
            logits.sample(step.rows)?;
        }
        self.submitted.push_back(Submitted { samples, logits: logits_read });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        let Submitted { samples, logits } =
            self.submitted.pop_front().ok_or_else(|| Error::internal("a step was collected that was not submitted"))?;
        let sampled = if samples { self.decoder.collect_sampled()? } else { Vec::new() };
        Ok(StepOutput { sampled, logits })
    }
}
