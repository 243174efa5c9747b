//! What one step computes: tokens, where they stand, and which rows are to have logits.

use dashinfer_kernels::{CarriedId, KvCacheSpec, PagedBatch, SequenceRows};

use crate::{BatchError, ModelSpec, StepLimits};

/// One step over a mixed batch: prefill chunks and decodes, each a run of consecutive rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForwardBatch {
    /// `[T]`: the token of each row; any one of the vocabulary for a carried row.
    pub ids: Vec<u32>,
    /// Rows whose token was sampled by the step before, which was not waited for.
    pub carried: Vec<CarriedId>,
    /// Positions, cache slots and block tables.
    pub paged: PagedBatch,
    /// The rows that get logits, ascending; row `i` of the logits belongs to `logit_rows[i]`.
    pub logit_rows: Vec<u32>,
}

impl ForwardBatch {
    /// Rows, `T`.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.ids.len()
    }

    /// Whether the batch agrees with itself, with the model and with the cache.
    ///
    /// # Errors
    /// [`BatchError`], for the first thing that is wrong.
    pub fn check(&self, spec: &ModelSpec, cache: &KvCacheSpec) -> Result<(), BatchError> {
        let num_rows = self.num_rows();
        if cache.block_size == 0 {
            return Err(BatchError::Count { what: "tokens in a cache block", wanted: 1, found: 0 });
        }
        count("positions", num_rows, self.paged.positions.len())?;
        count("slots", num_rows, self.paged.slots.len())?;
        self.check_ids(spec)?;
        let mut next_row = 0;
        for (index, sequence) in self.paged.sequences.iter().enumerate() {
            self.check_sequence(index, sequence, next_row, cache)?;
            next_row += sequence.num_rows;
        }
        count("rows of all sequences", num_rows, next_row)
    }

    /// Whether a decoder with these limits can compute the batch: the part of [`check`](Self::check) that a step repeats.
    pub(crate) fn check_limits(&self, spec: &ModelSpec, limits: StepLimits) -> Result<(), BatchError> {
        room("rows", limits.max_tokens, self.num_rows())?;
        room("rows of logits", limits.max_logit_rows, self.logit_rows.len())?;
        self.check_ids(spec)
    }

    fn check_ids(&self, spec: &ModelSpec) -> Result<(), BatchError> {
        if self.ids.is_empty() {
            return Err(BatchError::Count { what: "rows", wanted: 1, found: 0 });
        }
        if let Some(row) = self.ids.iter().position(|id| *id as usize >= spec.vocab_size) {
            return Err(row_error("token id", row, format!("below {}", spec.vocab_size), self.ids[row]));
        }
        let mut next = 0;
        for (index, row) in self.logit_rows.iter().enumerate() {
            if !(next..self.ids.len()).contains(&(*row as usize)) {
                let wanted = format!("ascending and below {}", self.ids.len());
                return Err(row_error("source of logits", index, wanted, *row));
            }
            next = *row as usize + 1;
        }
        Ok(())
    }

    fn check_sequence(
        &self,
        index: usize,
        sequence: &SequenceRows,
        next_row: usize,
        cache: &KvCacheSpec,
    ) -> Result<(), BatchError> {
        let SequenceRows { first_row, num_rows, context_len, first_block, num_blocks } = *sequence;
        let wrong = |what, wanted: String, found| BatchError::Sequence { what, sequence: index, wanted, found };
        if first_row != next_row {
            return Err(wrong("first row", next_row.to_string(), first_row));
        }
        let rows_left = self.num_rows() - next_row;
        if !(1..=rows_left).contains(&num_rows) {
            return Err(wrong("number of rows", format!("1 to {rows_left}"), num_rows));
        }
        if context_len < num_rows || context_len > u32::MAX as usize {
            return Err(wrong("context", format!("{num_rows} to {}", u32::MAX), context_len));
        }
        let blocks_needed = context_len.div_ceil(cache.block_size);
        if num_blocks < blocks_needed {
            return Err(wrong("number of blocks", format!("at least {blocks_needed}"), num_blocks));
        }
        let end = first_block.checked_add(num_blocks);
        let Some(blocks) = end.and_then(|end| self.paged.block_table.get(first_block..end)) else {
            let wanted = format!("at most {} less its {num_blocks} blocks", self.paged.block_table.len());
            return Err(wrong("first block", wanted, first_block));
        };
        if let Some(block) = blocks.iter().find(|block| **block as usize >= cache.num_blocks) {
            return Err(wrong("block", format!("below {}", cache.num_blocks), *block as usize));
        }
        for (row, position) in (first_row..first_row + num_rows).zip(context_len - num_rows..) {
            if self.paged.positions[row] as usize != position {
                return Err(row_error("position", row, position.to_string(), self.paged.positions[row]));
            }
            let slot = blocks[position / cache.block_size] as usize * cache.block_size + position % cache.block_size;
            if self.paged.slots[row] as usize != slot {
                return Err(row_error("slot", row, slot.to_string(), self.paged.slots[row]));
            }
        }
        Ok(())
    }
}

fn row_error(what: &'static str, row: usize, wanted: String, found: u32) -> BatchError {
    BatchError::Row { what, row, wanted, found }
}

fn count(what: &'static str, wanted: usize, found: usize) -> Result<(), BatchError> {
    if wanted == found { Ok(()) } else { Err(BatchError::Count { what, wanted, found }) }
}

fn room(what: &'static str, max: usize, found: usize) -> Result<(), BatchError> {
    if found <= max { Ok(()) } else { Err(BatchError::TooMany { what, max, found }) }
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::CacheType;
    use serde_json::json;

    use super::*;
    use crate::config::tests::config;

    /// A decode at position 5 and a prefill of three, with blocks of four.
    fn batch() -> ForwardBatch {
        let sequence = |first_row, num_rows, context_len, first_block, num_blocks| SequenceRows {
            first_row,
            num_rows,
            context_len,
            first_block,
            num_blocks,
        };
        ForwardBatch {
            ids: vec![9, 1, 2, 3],
            carried: Vec::new(),
            paged: PagedBatch {
                positions: vec![5, 0, 1, 2],
                slots: vec![1, 12, 13, 14],
                sequences: vec![sequence(0, 1, 6, 0, 2), sequence(1, 3, 3, 2, 1)],
                block_table: vec![7, 0, 3],
            },
            logit_rows: vec![0, 3],
        }
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut ForwardBatch), text: &str) {
        let spec = config("LlamaForCausalLM", json!({})).to_spec().unwrap();
        let cache = spec.kv_cache(4, 8, CacheType::F32);
        let mut batch = batch();
        change(&mut batch);
        let found = batch.check(&spec, &cache).err().map(|error| error.to_string());
        assert_eq!(found.unwrap_or_default(), text);
    }

    #[test]
    fn a_batch_that_fits_passes() {
        check(|_| (), "");
        check(|batch| batch.logit_rows.clear(), "");
    }

    #[test]
    fn a_cache_without_slots_is_refused() {
        let spec = config("LlamaForCausalLM", json!({})).to_spec().unwrap();
        let error = batch().check(&spec, &spec.kv_cache(0, 8, CacheType::F32)).unwrap_err();
        assert_eq!(error.to_string(), "batch: tokens in a cache block should be 1, found 0");
    }

    #[test]
    fn contradictions_are_named() {
        check(|b| *b = ForwardBatch::default(), "batch: rows should be 1, found 0");
        check(|b| b.ids[2] = 100, "batch: token id of row 2 should be below 100, found 100");
        check(|b| b.ids.truncate(3), "batch: positions should be 3, found 4");
        check(|b| b.paged.slots.truncate(3), "batch: slots should be 4, found 3");
        let text = "batch: source of logits of row 1 should be ascending and below 4, found";
        check(|b| b.logit_rows[1] = 4, &format!("{text} 4"));
        check(|b| b.logit_rows[1] = 0, &format!("{text} 0"));
        check(|b| b.paged.positions[2] = 9, "batch: position of row 2 should be 1, found 9");
        check(|b| b.paged.slots[0] = 30, "batch: slot of row 0 should be 1, found 30");
        check(|b| b.paged.block_table[1] = 8, "batch: block of sequence 0 should be below 8, found 8");
    }

    #[test]
    fn sequences_cover_the_rows_and_stay_in_the_table() {
        check(|b| b.paged.sequences.truncate(1), "batch: rows of all sequences should be 4, found 1");
        check(|b| b.paged.sequences[1].first_row = 2, "batch: first row of sequence 1 should be 1, found 2");
        check(|b| b.paged.sequences[1].num_rows = 4, "batch: number of rows of sequence 1 should be 1 to 3, found 4");
        check(|b| b.paged.sequences[0].num_rows = 0, "batch: number of rows of sequence 0 should be 1 to 4, found 0");
        check(
            |b| b.paged.sequences[1].context_len = 2,
            "batch: context of sequence 1 should be 3 to 4294967295, found 2",
        );
        check(
            |b| b.paged.sequences[0].num_blocks = 1,
            "batch: number of blocks of sequence 0 should be at least 2, found 1",
        );
        let text = "batch: first block of sequence 0 should be at most 3 less its 2 blocks, found 18446744073709551615";
        check(|b| b.paged.sequences[0].first_block = usize::MAX, text);
    }
}
