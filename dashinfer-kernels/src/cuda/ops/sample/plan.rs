//! What a launch of the sampler uploads, laid out on the host: plain data from plain data.

use bytemuck::{NoUninit, Zeroable};

use super::{Logits, MAX_TOP};
use crate::error::KernelError;
use crate::sample::{SampleParams, SampleRow, uniform};

/// `Job` of `cuda/sample.cu`: what is to be done with one row. `x_first` counts words of the lists.
#[derive(Debug, Clone, Copy, PartialEq, NoUninit, Zeroable)]
#[repr(C)]
pub(super) struct Job {
    u: f64,
    top_p: f64,
    logits_row: u32,
    index: u32,
    flags: u32,
    rank: u32,
    inverse_temperature: f32,
    lowest_weight: f32,
    repetition: f32,
    frequency: f32,
    presence: f32,
    bias_first: u32,
    num_bias: u32,
    prompt_first: u32,
    num_prompt: u32,
    generated_first: u32,
    num_generated: u32,
    carried: u32,
    banned_first: u32,
    num_banned: u32,
    mask_first: u32,
    num_mask: u32,
    table_first: u32,
    table_size: u32,
    copy: u32,
    pad: u32,
}

impl Job {
    const GREEDY: u32 = 1;
    const EDITED: u32 = 2;
    const REPETITION: u32 = 4;
    const OUTPUT_PENALTIES: u32 = 8;
    const MASK: u32 = 16;
    const LOGPROBS: u32 = 32;
    const NUCLEUS: u32 = 64;
    const LISTED: u32 = 128;

    fn is(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// The log-probabilities of a row as it came.
    fn logprobs(num_top: usize) -> Self {
        Self {
            top_p: 1.0,
            flags: Self::LOGPROBS | if num_top > 0 { Self::LISTED } else { 0 },
            rank: num_top as u32,
            inverse_temperature: 1.0,
            lowest_weight: f32::MIN_POSITIVE,
            carried: NONE,
            copy: NONE,
            ..Self::zeroed()
        }
    }

    /// Jobs that need every kernel come first, those that need one last: each kernel has a run from the first on.
    fn order(&self) -> (bool, bool, u32) {
        (!self.is(Self::NUCLEUS), self.is(Self::GREEDY), self.index)
    }
}

/// No row, no token.
const NONE: u32 = u32::MAX;

/// A row of which the largest logit is wanted and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, NoUninit)]
#[repr(C)]
struct Pair {
    logits_row: u32,
    index: u32,
}

/// The rows of one launch, sorted by the kernel that they go to. One plan is filled again and again.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Rows of the kernel `argmax`, where pairs are needed.
    pairs: Vec<Pair>,
    /// What is to be done with all other rows, in [`Job::order`].
    jobs: Vec<Job>,
    num_plain: usize,
    num_list_words: usize,
    num_table_words: usize,
    num_copies: usize,
    bias: Vec<(u32, f32)>,
}

impl Plan {
    /// Plans the rows of a launch. `num_before`: the rows of the call before, which carried tokens name.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a row is not among the logits, a carried token not among the rows of the call before, or the
    /// lists have 2³² words; [`KernelError::Unsupported`] for more than [`MAX_TOP`] log-probabilities of a row.
    pub(super) fn fill(
        &mut self,
        logits: Logits,
        rows: &[SampleRow<'_>],
        num_before: usize,
    ) -> Result<(), KernelError> {
        self.pairs.clear();
        self.jobs.clear();
        (self.num_list_words, self.num_table_words, self.num_copies) = (0, 0, 0);
        let shape = |what, wanted, found| Err(KernelError::Shape { op: "sample", what, wanted, found });
        // Rows in rising order differ: as a rule they all do.
        let rising = rows.windows(2).all(|pair| pair[0].logits_row < pair[1].logits_row);
        for (index, row) in rows.iter().enumerate() {
            if row.logits_row >= logits.rows {
                return shape("rows of the logits", row.logits_row + 1, logits.rows);
            }
            if let Some(carried) = row.carried.filter(|&carried| carried as usize >= num_before) {
                return shape("rows of the call before", carried as usize + 1, num_before);
            }
            if let Some(num_top) = row.params.logprobs.filter(|&num_top| num_top > MAX_TOP) {
                let what = format!("{num_top} log-probabilities for a token, more than {MAX_TOP},");
                return Err(KernelError::Unsupported { op: "sample", what, backend: "cuda" });
            }
            let others = || rows.iter().enumerate().any(|(i, other)| i != index && other.logits_row == row.logits_row);
            let (logits_row, index) = (row.logits_row as u32, index as u32);
            match self.row(row, logits.vocab, || !rising && others()) {
                None => self.pairs.push(Pair { logits_row, index }),
                Some(job) => self.jobs.push(Job { logits_row, index, ..job }),
            }
            if let Some(num_top) = row.params.logprobs {
                self.jobs.push(Job { logits_row, index, ..Job::logprobs(num_top) });
            }
        }
        let num_words = self.num_list_words.max(self.num_table_words);
        if num_words >= NONE as usize {
            return shape("words of all lists", NONE as usize, num_words);
        }
        // The two jobs of a row may be in any order.
        self.jobs.sort_unstable_by_key(Job::order);
        self.num_plain = self.pairs.len();
        if self.pairs.iter().enumerate().all(|(i, pair)| pair.logits_row as usize == i && pair.index as usize == i) {
            self.pairs.clear();
        }
        Ok(())
    }

    /// What picks a row's token, without its place; `None` if its largest logit is all that is wanted.
    fn row(&mut self, row: &SampleRow<'_>, vocab: usize, is_shared: impl FnOnce() -> bool) -> Option<Job> {
        let SampleParams { temperature, top_k, top_p, min_p, ref logit_bias, logprobs, .. } = *row.params;
        let (repetition, frequency, presence) =
            (row.params.repetition_penalty, row.params.frequency_penalty, row.params.presence_penalty);
        let top_k = top_k.map_or(0, |k| k.get());
        let mut flags = 0;
        if temperature.is_nan() || temperature <= 0.0 || top_k == 1 {
            flags |= Job::GREEDY;
        }
        if row.allowed.is_some() {
            flags |= Job::MASK;
        }
        let (mut prompt, mut generated, mut carried) = (0, row.generated.len(), row.carried);
        if repetition != 1.0 {
            flags |= Job::REPETITION;
            prompt = row.prompt.len();
        }
        if frequency != 0.0 || presence != 0.0 {
            flags |= Job::OUTPUT_PENALTIES;
        }
        if flags & (Job::REPETITION | Job::OUTPUT_PENALTIES) == 0 {
            (generated, carried) = (0, None);
        }
        let num_seen = prompt + generated + usize::from(carried.is_some());
        if num_seen == 0 {
            flags &= !(Job::REPETITION | Job::OUTPUT_PENALTIES);
        }
        if num_seen + logit_bias.len() + row.banned.len() > 0 {
            flags |= Job::EDITED;
        }
        if flags == Job::GREEDY && logprobs.is_none() {
            return None;
        }
        // All of the vocabulary is off, and a greedy row has no use for filters.
        let is_greedy = flags & Job::GREEDY != 0;
        let rank = if is_greedy || top_k as usize >= vocab { 0 } else { top_k };
        // `NaN` is off, as on the CPU.
        let top_p = if top_p < 1.0 { f64::from(top_p) } else { 1.0 };
        if rank > 0 {
            flags |= Job::LISTED;
        } else if top_p < 1.0 && !is_greedy {
            flags |= Job::NUCLEUS;
        }
        // The log-probabilities are of the logits as they came, and another row's logits must stay as they are.
        let is_copy = flags & (Job::EDITED | Job::MASK) != 0 && (logprobs.is_some() || is_shared());
        let copy = if is_copy { self.num_copies as u32 } else { NONE };
        self.num_copies += usize::from(is_copy);
        let table_size = if num_seen > 0 { (2 * num_seen.min(vocab.max(1))).next_power_of_two() } else { 0 };
        let table_first = self.num_table_words as u32;
        self.num_table_words += 2 * table_size;
        let mut list = |words: usize| {
            let first = self.num_list_words as u32;
            self.num_list_words += words;
            first
        };
        let mask = row.allowed.map_or(0, |mask| mask.len().min(vocab.div_ceil(32)));
        Some(Job {
            u: uniform(row.params.seed, row.position),
            top_p,
            logits_row: 0,
            index: 0,
            flags,
            rank,
            inverse_temperature: temperature.recip().min(f32::MAX),
            lowest_weight: if min_p > 0.0 { min_p.clamp(f32::MIN_POSITIVE, 1.0) } else { f32::MIN_POSITIVE },
            repetition,
            frequency,
            presence,
            bias_first: list(2 * logit_bias.len()),
            num_bias: logit_bias.len() as u32,
            prompt_first: list(prompt),
            num_prompt: prompt as u32,
            generated_first: list(generated),
            num_generated: generated as u32,
            carried: carried.unwrap_or(NONE),
            banned_first: list(row.banned.len()),
            num_banned: row.banned.len() as u32,
            mask_first: list(mask),
            num_mask: mask as u32,
            table_first,
            table_size: table_size as u32,
            copy,
            pad: 0,
        })
    }

    /// Rows of the kernel `argmax`.
    pub(super) fn num_plain(&self) -> usize {
        self.num_plain
    }

    /// How many jobs there are, how many of them (from the first on) pick by weight or list, and how many by top-p alone.
    pub(super) fn num_jobs(&self) -> [usize; 3] {
        let num_first = |is: fn(&Job) -> bool| self.jobs.partition_point(is);
        [self.jobs.len(), num_first(|job| !job.is(Job::GREEDY)), num_first(|job| job.is(Job::NUCLEUS))]
    }

    /// Whether rows are copied or masked, and whether single logits are edited.
    pub(super) fn has_edits(&self) -> (bool, bool) {
        let any = |is: fn(&Job) -> bool| self.jobs.iter().any(is);
        (any(|job| job.copy != NONE || job.is(Job::MASK)), any(|job| job.is(Job::EDITED)))
    }

    /// Rows of logits that are copied before they are edited.
    pub(super) fn num_copies(&self) -> usize {
        self.num_copies
    }

    /// Bytes for the tables in which tokens are counted.
    pub(super) fn table_bytes(&self) -> usize {
        size_of::<u32>() * self.num_table_words
    }

    /// Where the pairs are in the upload; the jobs are at its beginning. `None`: there are none, rows are in order.
    pub(super) fn pairs_offset(&self) -> Option<usize> {
        (!self.pairs.is_empty()).then_some(size_of_val(&*self.jobs))
    }

    /// Where the lists are in the upload.
    pub(super) fn lists_offset(&self) -> usize {
        size_of_val(&*self.jobs) + size_of_val(&*self.pairs)
    }

    /// Bytes of the upload.
    pub(super) fn upload_bytes(&self) -> usize {
        self.lists_offset() + size_of::<u32>() * self.num_list_words
    }

    /// Writes the upload for the rows that were planned: jobs, pairs, lists.
    pub(super) fn write(&mut self, rows: &[SampleRow<'_>], to: &mut [u8]) {
        let (head, lists) = to[..self.upload_bytes()].split_at_mut(self.lists_offset());
        let (jobs, pairs) = head.split_at_mut(size_of_val(&*self.jobs));
        jobs.copy_from_slice(bytemuck::cast_slice(&self.jobs));
        pairs.copy_from_slice(bytemuck::cast_slice(&self.pairs));
        let mut put = |first: u32, words: &[u32]| {
            let bytes: &[u8] = bytemuck::cast_slice(words);
            lists[size_of::<u32>() * first as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        for job in &self.jobs {
            let row = &rows[job.index as usize];
            if job.num_bias > 0 {
                // One thread finds all entries of a token side by side; a stable sort keeps their order.
                self.bias.clear();
                self.bias.extend_from_slice(&row.params.logit_bias);
                self.bias.sort_by_key(|&(id, _)| id);
                for (i, &(id, bias)) in (0..).zip(&self.bias) {
                    put(job.bias_first + i, &[id]);
                    put(job.bias_first + job.num_bias + i, &[bias.to_bits()]);
                }
            }
            put(job.prompt_first, &row.prompt[..job.num_prompt as usize]);
            put(job.generated_first, &row.generated[..job.num_generated as usize]);
            put(job.banned_first, &row.banned[..job.num_banned as usize]);
            put(job.mask_first, &row.allowed.unwrap_or(&[])[..job.num_mask as usize]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: Logits = Logits { ptr: 0, rows: 4, vocab: 100, stride: 100 };
    const GREEDY: SampleParams = SampleParams::GREEDY;

    fn plan(rows: &[SampleRow<'_>]) -> Plan {
        let mut plan = Plan::default();
        plan.fill(LOGITS, rows, 3).unwrap();
        plan
    }

    #[test]
    fn rows_go_to_the_kernel_that_they_need() {
        let greedy = SampleParams::GREEDY;
        let hot = SampleParams { temperature: 1.0, ..GREEDY };
        let plain = plan(&[SampleRow::new(0, &greedy, 0), SampleRow::new(1, &greedy, 0)]);
        assert_eq!((plain.num_plain(), plain.num_jobs()[0], plain.upload_bytes()), (2, 0, 0));
        let mixed = plan(&[SampleRow::new(3, &greedy, 0), SampleRow::new(2, &hot, 0), SampleRow::new(2, &greedy, 0)]);
        assert_eq!((mixed.num_plain(), mixed.num_jobs()), (2, [1, 1, 0]));
        assert_eq!(mixed.pairs, [Pair { logits_row: 3, index: 0 }, Pair { logits_row: 2, index: 2 }]);
        assert_eq!(mixed.pairs_offset(), Some(size_of::<Job>()));
        let banned = plan(&[SampleRow { banned: &[1], ..SampleRow::new(0, &greedy, 0) }]);
        assert_eq!((banned.num_plain(), banned.num_jobs(), banned.has_edits()), (0, [1, 0, 0], (false, true)));
    }

    #[test]
    fn jobs_are_in_the_order_of_the_kernels_that_they_need() {
        let greedy = SampleParams::GREEDY;
        let banned = SampleRow { banned: &[1], ..SampleRow::new(0, &greedy, 0) };
        let hot = SampleParams { temperature: 1.0, top_k: std::num::NonZeroU32::new(100), ..GREEDY };
        let nucleus = SampleParams { top_p: 0.9, logprobs: Some(3), ..hot.clone() };
        let both = SampleParams { top_p: 0.9, top_k: std::num::NonZeroU32::new(99), ..hot.clone() };
        let rows = [&hot, &nucleus, &both].map(|params| SampleRow::new(1, params, 0));
        let plan = plan(&[banned, rows[0], rows[1], rows[2]]);
        assert_eq!(plan.num_jobs(), [5, 4, 1]);
        assert_eq!(plan.jobs.iter().map(|job| job.index).collect::<Vec<_>>(), [2, 1, 2, 3, 0]);
        assert_eq!(plan.jobs.iter().map(|job| job.rank).collect::<Vec<_>>(), [0, 0, 3, 99, 0], "top-k of all is off");
        assert!(plan.jobs[0].is(Job::NUCLEUS) && plan.jobs[2].is(Job::LOGPROBS) && plan.jobs[3].is(Job::LISTED));
    }

    #[test]
    fn logits_that_others_need_are_copied_before_they_are_edited() {
        let greedy = SampleParams::GREEDY;
        let asked = SampleParams { logprobs: Some(0), ..GREEDY };
        let banned = |logits_row, params| SampleRow { banned: &[1], ..SampleRow::new(logits_row, params, 0) };
        assert_eq!(plan(&[banned(0, &greedy), banned(1, &greedy)]).num_copies(), 0);
        assert_eq!(plan(&[banned(1, &greedy), banned(0, &greedy)]).num_copies(), 0);
        assert_eq!(plan(&[banned(1, &greedy), SampleRow::new(1, &greedy, 0)]).num_copies(), 1);
        assert_eq!(plan(&[banned(0, &asked)]).num_copies(), 1);
        assert_eq!(plan(&[SampleRow::new(0, &asked, 0)]).num_copies(), 0);
    }

    #[test]
    fn histories_are_uploaded_for_penalties_alone() {
        let words = |params: &SampleParams| {
            let row = SampleRow { prompt: &[1, 2], generated: &[3, 4, 5], ..SampleRow::new(0, params, 0) };
            let plan = plan(&[row]);
            (plan.num_list_words, plan.num_table_words)
        };
        let hot = SampleParams { temperature: 1.0, ..GREEDY };
        assert_eq!(words(&hot), (0, 0));
        assert_eq!(words(&SampleParams { repetition_penalty: 1.5, ..hot.clone() }), (5, 32));
        assert_eq!(words(&SampleParams { presence_penalty: 1.5, ..hot }), (3, 16));
    }

    #[test]
    fn lists_are_where_the_parameters_say() {
        let params = SampleParams { logit_bias: vec![(9, 1.0), (3, 2.0), (9, 3.0)], repetition_penalty: 2.0, ..GREEDY };
        let row = SampleRow {
            prompt: &[1, 2],
            generated: &[3],
            banned: &[4, 5],
            allowed: Some(&[6, 7, 8, 9, 10]),
            carried: Some(2),
            ..SampleRow::new(1, &params, 0)
        };
        let rows = [SampleRow { carried: None, allowed: None, ..row }, row];
        let mut plan = plan(&rows);
        let mut bytes = vec![0xff; plan.upload_bytes() + 1];
        plan.write(&rows, &mut bytes);
        let lists: Vec<u32> = bytes[plan.lists_offset()..plan.upload_bytes()]
            .chunks_exact(4)
            .map(|bytes| u32::from_ne_bytes(bytes.try_into().unwrap()))
            .collect();
        let found = plan.jobs[1];
        let list = |first: u32, len: u32| &lists[first as usize..(first + len) as usize];
        assert_eq!(list(found.bias_first, 3), [3, 9, 9]);
        assert_eq!(list(found.bias_first + 3, 3), [2.0f32, 1.0, 3.0].map(f32::to_bits));
        assert_eq!(list(found.prompt_first, found.num_prompt), [1, 2]);
        assert_eq!(list(found.generated_first, found.num_generated), [3]);
        assert_eq!(list(found.banned_first, found.num_banned), [4, 5]);
        assert_eq!(list(found.mask_first, found.num_mask), [6, 7, 8, 9], "100 tokens are 4 words");
        assert_eq!((found.carried, found.table_size), (2, 8));
        assert_eq!(found.table_first as usize, 2 * plan.jobs[0].table_size as usize);
    }

    #[test]
    fn the_job_for_log_probabilities_has_no_lists() {
        let asked = SampleParams { logit_bias: vec![(3, 2.0)], logprobs: Some(2), ..GREEDY };
        let rows = [SampleRow { banned: &[4, 5], ..SampleRow::new(0, &asked, 0) }];
        let mut plan = plan(&rows);
        let mut bytes = vec![0xff; plan.upload_bytes()];
        plan.write(&rows, &mut bytes);
        let lists = bytes[plan.lists_offset()..].to_vec();
        assert_eq!(lists.chunks_exact(4).map(|word| word[0]).collect::<Vec<_>>(), [3, 0, 4, 5]);
        assert_eq!(plan.num_jobs(), [2, 1, 0]);
    }

    #[test]
    fn what_does_not_fit_is_a_typed_error() {
        let fill = |row: SampleRow<'_>| Plan::default().fill(LOGITS, &[row], 3);
        let greedy = SampleParams::GREEDY;
        assert!(matches!(fill(SampleRow::new(4, &greedy, 0)), Err(KernelError::Shape { wanted: 5, found: 4, .. })));
        let carried = SampleRow { carried: Some(3), ..SampleRow::new(0, &greedy, 0) };
        assert!(matches!(fill(carried), Err(KernelError::Shape { wanted: 4, found: 3, .. })));
        let many = SampleParams { logprobs: Some(MAX_TOP + 1), ..GREEDY };
        let error = fill(SampleRow::new(0, &many, 0)).unwrap_err();
        assert!(error.to_string().contains("more than 64"), "{error}");
    }
}
