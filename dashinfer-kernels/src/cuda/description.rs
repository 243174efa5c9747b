//! A step as it is handed over: whether it is sound, of which kind it is, and its rows with padding.

use super::ops::embed::NOT_CARRIED;
use crate::error::check;
use crate::{CarriedId, KernelError, KvCacheSpec, PagedBatch, StepRows};

/// Rows as they are copied to the device, with padding; kept for their memory.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) ids: Vec<u32>,
    pub(super) carried: Vec<u32>,
    pub(super) positions: Vec<u32>,
    pub(super) slots: Vec<u32>,
}

impl Rows {
    /// Takes the rows of a step, and pads them to `rows`: with rows that are stored nowhere.
    pub(super) fn take(&mut self, step: &StepRows<'_>, rows: usize) {
        for (to, from, padding) in [
            (&mut self.ids, step.ids, 0),
            (&mut self.positions, &step.paged.positions[..], 0),
            (&mut self.slots, &step.paged.slots[..], u32::MAX),
            (&mut self.carried, &[][..], NOT_CARRIED),
        ] {
            to.clear();
            to.extend_from_slice(from);
            to.resize(rows, padding);
        }
        for carried in step.carried {
            self.carried[carried.row as usize] = carried.sampled;
        }
    }
}

/// The rows of a recorded step with room for `rows`: few sizes, and little padding.
pub(super) fn padded(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=64 => rows.next_multiple_of(8),
        65..=256 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

/// Checks a step against itself and the cache: kernels read what it names without looking.
///
/// `num_sampled`: rows of the newest sampling, which carried rows name.
pub(super) fn check_step(step: &StepRows<'_>, spec: &KvCacheSpec, num_sampled: usize) -> Result<(), KernelError> {
    const OP: &str = "begin_step";
    let batch = step.paged;
    let at_most = |what, wanted: usize, found: usize| {
        if wanted <= found { Ok(()) } else { Err(KernelError::Shape { op: OP, what, wanted, found }) }
    };
    check(OP, "positions", step.ids.len(), batch.positions.len())?;
    check(OP, "slots", step.ids.len(), batch.slots.len())?;
    let mut row = 0;
    for sequence in &batch.sequences {
        check(OP, "first row of a sequence", row, sequence.first_row)?;
        row += sequence.num_rows;
        at_most("context of a sequence", sequence.num_rows, sequence.context_len)?;
        at_most("blocks of a sequence", sequence.context_len.div_ceil(spec.block_size), sequence.num_blocks)?;
        let end = sequence.first_block.saturating_add(sequence.num_blocks);
        at_most("length of the block table", end, batch.block_table.len())?;
    }
    check(OP, "rows of the sequences", step.ids.len(), row)?;
    let largest = |values: &[u32]| values.iter().max().map_or(0, |&value| value as usize + 1);
    at_most("slots of the cache", largest(&batch.slots), spec.num_blocks * spec.block_size)?;
    at_most("blocks of the cache", largest(&batch.block_table), spec.num_blocks)?;
    at_most("rows", largest(step.logit_rows), step.ids.len())?;
    let one_past = |of: fn(&CarriedId) -> u32| step.carried.iter().map(of).max().map_or(0, |most| most as usize + 1);
    at_most("rows", one_past(|carried| carried.row), step.ids.len())?;
    at_most("sampled rows", one_past(|carried| carried.sampled), num_sampled)
}

/// Whether a step is one row of each sequence, the row's position being its last and its slot where the block table has that.
pub(super) fn is_decode(batch: &PagedBatch, block_size: usize) -> bool {
    let mut rows = batch.positions.iter().zip(&batch.slots).zip(&batch.sequences);
    batch.sequences.len() == batch.positions.len()
        && rows.all(|((&position, &slot), sequence)| {
            let position = position as usize;
            let block = batch.block_table.get(sequence.first_block + position / block_size);
            sequence.context_len == position + 1
                && block.is_some_and(|&block| block as usize * block_size + position % block_size == slot as usize)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheLayout, CacheType, SequenceRows};

    const SPEC: KvCacheSpec = KvCacheSpec {
        num_layers: 1,
        num_blocks: 8,
        block_size: 16,
        num_kv_heads: 1,
        head_dim: 64,
        cache_type: CacheType::BF16,
        layout: CacheLayout::KeysAndValues,
    };

    /// Two decodes: at position 16 in block 5, at position 3 in block 2.
    fn decodes() -> PagedBatch {
        let sequence = |first_row, context_len, first_block, num_blocks| SequenceRows {
            first_row,
            num_rows: 1,
            context_len,
            first_block,
            num_blocks,
        };
        PagedBatch {
            positions: vec![16, 3],
            slots: vec![80, 35],
            sequences: vec![sequence(0, 17, 0, 2), sequence(1, 4, 2, 1)],
            block_table: vec![7, 5, 2],
        }
    }

    fn step(paged: &PagedBatch) -> StepRows<'_> {
        StepRows { ids: &[1, 2], carried: &[], paged, logit_rows: &[0, 1], may_record: true }
    }

    #[test]
    fn padding_is_little_and_sizes_are_few() {
        let sizes: std::collections::BTreeSet<_> = (1..=512).map(padded).collect();
        assert!(sizes.len() <= 40, "{sizes:?}");
        for rows in 1..=512 {
            assert!(padded(rows) >= rows && padded(padded(rows)) == padded(rows), "{rows}");
            assert!(padded(rows) - rows < rows.max(8).div_ceil(4).max(8), "{rows}");
        }
    }

    #[test]
    fn padding_rows_are_stored_nowhere() {
        let paged = decodes();
        let mut rows = Rows::default();
        rows.take(&StepRows { carried: &[CarriedId { row: 1, sampled: 4 }], ..step(&paged) }, 4);
        assert_eq!(rows.ids, [1, 2, 0, 0]);
        assert_eq!(rows.positions, [16, 3, 0, 0]);
        assert_eq!(rows.slots, [80, 35, u32::MAX, u32::MAX]);
        assert_eq!(rows.carried, [NOT_CARRIED, 4, NOT_CARRIED, NOT_CARRIED]);
    }

    #[test]
    fn what_a_step_names_is_there() {
        let check = |edit: fn(&mut PagedBatch), wanted: &str| {
            let mut paged = decodes();
            edit(&mut paged);
            let found = check_step(&step(&paged), &SPEC, 0).err().map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(found, wanted);
        };
        check(|_| (), "");
        check(|paged| paged.slots[1] = 128, "begin_step: slots of the cache should be 129, found 128");
        check(|paged| paged.block_table[0] = 8, "begin_step: blocks of the cache should be 9, found 8");
        check(|paged| paged.sequences[0].num_blocks = 1, "begin_step: blocks of a sequence should be 2, found 1");
        check(|paged| paged.sequences[1].first_block = 3, "begin_step: length of the block table should be 4, found 3");
        check(|paged| paged.positions.truncate(1), "begin_step: positions should be 2, found 1");
        let paged = decodes();
        let carried = [CarriedId { row: 0, sampled: 3 }];
        let error = check_step(&StepRows { carried: &carried, ..step(&paged) }, &SPEC, 3).unwrap_err().to_string();
        assert_eq!(error, "begin_step: sampled rows should be 4, found 3");
    }

    #[test]
    fn a_decode_is_one_row_of_each_sequence_at_its_end() {
        assert!(is_decode(&decodes(), 16));
        let not = |edit: fn(&mut PagedBatch)| {
            let mut paged = decodes();
            edit(&mut paged);
            assert!(!is_decode(&paged, 16), "{paged:?}");
        };
        not(|paged| paged.positions[0] = 15);
        not(|paged| paged.slots[0] = 81);
        not(|paged| paged.sequences[1].context_len = 5);
        not(|paged| paged.sequences.truncate(1));
    }
}
