//! Doing what was decided: a step goes in, tokens come out.
//!
//! [`Executor::submit`] hands a step over and [`Executor::collect`] waits for its results. On the CPU the work is done between
//! the two calls' entry and return, at depth zero; an executor that runs a device one step ahead keeps the same contract.

use dashinfer_kernels::{Backend, SampleRow, Sampled};
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
    /// Starts a step. Steps are computed in the order of their submission.
    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error>;

    /// Waits for the oldest step that was submitted and not collected.
    fn collect(&mut self) -> Result<StepOutput, Error>;
}

/// One decoder on one backend whose work is done when a call returns.
pub(crate) struct LocalExecutor<B: Backend> {
    decoder: Decoder<B>,
    cache: B::KvCache,
    output: Option<StepOutput>,
}

impl<B: Backend> LocalExecutor<B> {
    pub(crate) fn new(decoder: Decoder<B>, cache: B::KvCache) -> Self {
        Self { decoder, cache, output: None }
    }
}

impl<B: Backend> Executor for LocalExecutor<B> {
    fn submit(&mut self, step: &Step<'_>) -> Result<(), Error> {
        let mut logits = self.decoder.forward(step.batch, &mut self.cache)?;
        // Sampling may overwrite a row, so rows are read first.
        let read = step.read.iter().map(|&row| logits.read_row(row)).collect::<Result<_, _>>()?;
        if !step.rows.is_empty() {
            logits.sample(step.rows)?;
        }
        let sampled = if step.rows.is_empty() { Vec::new() } else { self.decoder.collect_sampled()? };
        self.output = Some(StepOutput { sampled, logits: read });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.output.take().ok_or_else(|| Error::internal("a step was collected that was not submitted"))
    }
}
