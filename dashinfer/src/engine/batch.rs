//! From a plan to a batch: tokens, positions, cache slots and block tables, in buffers that live from step to step.

use dashinfer_kernels::{CarriedId, SequenceRows};
use dashinfer_models::ForwardBatch;

use crate::scheduler::{Scheduler, SeqId};

/// Builds the batch of the scheduler's plan, its sequences in the order of the plan.
#[derive(Debug)]
pub(super) struct BatchBuilder {
    block_size: usize,
    batch: ForwardBatch,
    sampled: Vec<(SeqId, usize)>,
    read: Vec<usize>,
}

impl BatchBuilder {
    pub(super) fn new(block_size: usize) -> Self {
        Self { block_size, batch: ForwardBatch::default(), sampled: Vec::new(), read: Vec::new() }
    }

    /// The batch that was built last.
    pub(super) fn batch(&self) -> &ForwardBatch {
        &self.batch
    }

    /// The sequences that get a token, with the rows of the logits that it comes from.
    pub(super) fn sampled(&self) -> &[(SeqId, usize)] {
        &self.sampled
    }

    /// The rows of the logits that are wanted as they are.
    pub(super) fn read(&self) -> &[usize] {
        &self.read
    }

    pub(super) fn build(&mut self, scheduler: &Scheduler) {
        let Self { block_size, batch, sampled, read } = self;
        let paged = &mut batch.paged;
        batch.ids.clear();
        batch.carried.clear();
        batch.logit_rows.clear();
        paged.positions.clear();
        paged.slots.clear();
        paged.sequences.clear();
        paged.block_table.clear();
        sampled.clear();
        read.clear();
        for work in &scheduler.plan().work {
            let sequence = scheduler.get(work.seq).expect("a plan names sequences that are there");
            let first_row = batch.ids.len();
            let context_len = work.start + work.len;
            let table = sequence.block_table();
            let known = sequence.tokens();
            batch.ids.extend_from_slice(&known[work.start..context_len.min(known.len())]);
            if context_len > known.len() {
                // At most one step is under way when a plan is made, so the token is one of that step's, whose rows are the
                // newest that were sampled: of all steps before, the tokens were appended.
                let sampled = sequence.carried().expect("only a pending token lies behind those that are known");
                batch.carried.push(CarriedId { row: batch.ids.len() as u32, sampled });
                batch.ids.push(0);
            }
            debug_assert_eq!(batch.ids.len(), first_row + work.len, "one token is pending at most");
            for position in work.start..context_len {
                paged.positions.push(position as u32);
                paged
                    .slots
                    .push(table[position / *block_size].0 * *block_size as u32 + (position % *block_size) as u32);
            }
            let num_blocks = context_len.div_ceil(*block_size);
            paged.sequences.push(SequenceRows {
                first_row,
                num_rows: work.len,
                context_len,
                first_block: paged.block_table.len(),
                num_blocks,
            });
            paged.block_table.extend(table[..num_blocks].iter().map(|block| block.0));
            if work.all_logits {
                read.extend(batch.logit_rows.len()..batch.logit_rows.len() + work.len);
                batch.logit_rows.extend(first_row as u32..(first_row + work.len) as u32);
            } else if work.samples {
                sampled.push((work.seq, batch.logit_rows.len()));
                batch.logit_rows.push((first_row + work.len - 1) as u32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Limits, NewSequence};

    #[test]
    fn a_decode_beside_a_prefill_chunk() {
        let mut scheduler = Scheduler::new(Limits {
            token_budget: 20,
            max_running: 4,
            max_chunk: None,
            max_all_logits: 8,
            num_blocks: 8,
            block_size: 16,
            prefix_cache: false,
            hash_seed: 0,
        })
        .unwrap();
        let add = |scheduler: &mut Scheduler, tokens: Vec<u32>, want_all_logits| {
            let max_total_tokens = tokens.len() + 1;
            let new = NewSequence {
                tokens,
                max_total_tokens,
                priority: 0,
                want_all_logits,
                cache_salt: 0,
                needs_host: false,
            };
            scheduler.add(new).unwrap()
        };
        let mut builder = BatchBuilder::new(16);
        let short = add(&mut scheduler, (0..16).collect(), false);
        scheduler.schedule();
        scheduler.submit();
        scheduler.commit();
        scheduler.append(short, 99).unwrap();
        let scored = add(&mut scheduler, vec![7, 8, 9], true);
        let long = add(&mut scheduler, (100..140).collect(), false);
        scheduler.schedule();
        builder.build(&scheduler);

        let batch = builder.batch();
        assert_eq!(batch.ids[..4], [99, 7, 8, 9]);
        assert_eq!(batch.ids[4..], (100..116).collect::<Vec<u32>>());
        assert_eq!(batch.paged.positions[..6], [16, 0, 1, 2, 0, 1]);
        let blocks = |seq| scheduler.get(seq).unwrap().block_table().iter().map(|b| b.0).collect::<Vec<_>>();
        assert_eq!(batch.paged.slots[0], blocks(short)[1] * 16);
        assert_eq!(batch.paged.slots[4], blocks(long)[0] * 16);
        assert_eq!(batch.paged.sequences.iter().map(|s| s.context_len).collect::<Vec<_>>(), [17, 3, 16]);
        // The decode is sampled, the scored rows are read, the chunk gives nothing yet.
        assert_eq!(batch.logit_rows, [0, 1, 2, 3]);
        assert_eq!((builder.sampled(), builder.read()), (&[(short, 0)][..], &[1, 2, 3][..]));
        assert_eq!(batch.paged.block_table.len(), 2 + 1 + 1);
        assert_eq!(blocks(scored).len(), 1);
    }
}
