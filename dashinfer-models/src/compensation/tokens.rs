//! Text to look at, which the model writes itself.

use dashinfer_kernels::{PagedBatch, SampleParams, SampleRow, SequenceRows};

use crate::{ForwardBatch, ModelSpec};

/// Sequences. A step that samples a token of each reads the weights once for all of them.
const SEQUENCES: usize = 128;

/// Tokens of a sequence, if the model takes as many. What a position beyond that adds is little.
const LENGTH: usize = 256;

/// Tokens of a cache block.
pub(super) const BLOCK_SIZE: usize = 32;

/// Sequences that start with one token each, drawn evenly from the vocabulary, and go on as the model says, at temperature 1.
///
/// Tokens that are all drawn evenly are not like text, and what makes up for errors on them does not on text: it gains half as much.
#[derive(Debug)]
pub(super) struct Tokens {
    /// `[S][length so far]`
    sequences: Vec<Vec<u32>>,
    length: usize,
    params: Vec<SampleParams>,
}

impl Tokens {
    pub(super) fn new(spec: &ModelSpec) -> Self {
        let start = |index: u64| vec![(mix(index) % spec.vocab_size.max(1) as u64) as u32];
        let params = |seed: u64| SampleParams { temperature: 1.0, seed, ..SampleParams::GREEDY };
        Self {
            sequences: (0..SEQUENCES as u64).map(start).collect(),
            length: LENGTH.min(spec.max_positions),
            params: (0..SEQUENCES as u64).map(params).collect(),
        }
    }

    pub(super) fn num_sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Blocks of a cache that holds all of them.
    pub(super) fn num_blocks(&self) -> usize {
        self.sequences.len() * self.blocks_of_one()
    }

    fn blocks_of_one(&self) -> usize {
        self.length.div_ceil(BLOCK_SIZE)
    }

    /// The newest token of each sequence; `None` when they are as long as they should be.
    pub(super) fn next_step(&self) -> Option<ForwardBatch> {
        let done = self.sequences.iter().all(|tokens| tokens.len() >= self.length);
        (!done).then(|| self.batch(|tokens| tokens.len() - 1))
    }

    /// How the rows of such a step are sampled.
    pub(super) fn rows(&self) -> Vec<SampleRow<'_>> {
        let rows = self.sequences.iter().zip(&self.params).enumerate();
        rows.map(|(row, (tokens, params))| SampleRow::new(row, params, tokens.len() as u64)).collect()
    }

    /// Adds a token to each sequence.
    pub(super) fn push(&mut self, sampled: &[u32]) {
        self.sequences.iter_mut().zip(sampled).for_each(|(tokens, token)| tokens.push(*token));
    }

    /// All tokens, with logits for each, so that no operator leaves any out.
    pub(super) fn all(&self) -> ForwardBatch {
        self.batch(|_| 0)
    }

    /// The tokens of each sequence from `first` on.
    fn batch(&self, first: impl Fn(&[u32]) -> usize) -> ForwardBatch {
        let mut batch = ForwardBatch::default();
        let PagedBatch { positions, slots, sequences, block_table } = &mut batch.paged;
        for (index, tokens) in self.sequences.iter().enumerate() {
            let (first, first_block) = (first(tokens), index * self.blocks_of_one());
            sequences.push(SequenceRows {
                first_row: batch.ids.len(),
                num_rows: tokens.len() - first,
                context_len: tokens.len(),
                first_block,
                num_blocks: self.blocks_of_one(),
            });
            batch.ids.extend(&tokens[first..]);
            positions.extend(first as u32..tokens.len() as u32);
            // Block `b` of the table is block `b`, so slots of a sequence stand in a row.
            let slot = first_block * BLOCK_SIZE;
            slots.extend((slot + first) as u32..(slot + tokens.len()) as u32);
            block_table.extend((first_block..first_block + self.blocks_of_one()).map(|block| block as u32));
        }
        batch.logit_rows = (0..batch.ids.len() as u32).collect();
        batch
    }
}

/// Numbers of which nothing can be told from the one before (SplitMix64). <https://doi.org/10.1145/2714064.2660195>
fn mix(index: u64) -> u64 {
    let mut z = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::CacheType;
    use serde_json::json;

    use super::*;
    use crate::config::tests::config;

    #[test]
    fn batches_are_such_as_a_cache_takes() {
        for positions in [1, 40, 4096] {
            let changes = json!({"max_position_embeddings": positions});
            let spec = config("LlamaForCausalLM", changes).to_spec().unwrap();
            let mut tokens = Tokens::new(&spec);
            let cache = spec.kv_cache(BLOCK_SIZE, tokens.num_blocks(), CacheType::BF16);
            let mut steps = 0;
            while let Some(batch) = tokens.next_step() {
                batch.check(&spec, &cache).unwrap();
                assert_eq!(batch.num_rows(), SEQUENCES);
                tokens.push(&[3; SEQUENCES]);
                steps += 1;
            }
            assert_eq!(steps, positions.min(LENGTH) - 1);
            let all = tokens.all();
            all.check(&spec, &cache).unwrap();
            assert_eq!(all.num_rows(), SEQUENCES * positions.min(LENGTH));
        }
    }
}
