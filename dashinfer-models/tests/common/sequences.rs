//! Sequences over a paged cache: makes batches without a scheduler.

use dashinfer_kernels::{Backend, CacheType, SequenceRows, cpu::CpuBackend};
use dashinfer_models::{Decoder, ForwardBatch};

pub(crate) const BLOCK_SIZE: usize = 16;

/// The type of the cache that a backend is tested with.
pub(crate) trait Cached: Backend {
    fn cache_type(&self) -> CacheType {
        CacheType::F32
    }
}

impl Cached for super::reference::Reference {}
impl Cached for CpuBackend {}
#[cfg(feature = "cuda")]
impl Cached for dashinfer_kernels::cuda::CudaBackend {
    fn cache_type(&self) -> CacheType {
        self.dtype().into()
    }
}

/// A decoder, its cache, and sequences that grow in it. Blocks are dealt in an order that no sequence's are neighbours.
pub(crate) struct Runner<'a, B: Backend> {
    decoder: &'a mut Decoder<B>,
    cache: B::KvCache,
    num_blocks: usize,
    dealt: usize,
    sequences: Vec<Sequence>,
}

#[derive(Default)]
struct Sequence {
    blocks: Vec<u32>,
    num_computed: usize,
}

/// Which rows of a step are to have logits.
#[derive(Clone, Copy)]
pub(crate) enum Wanted {
    All,
    LastOfEach,
    None,
}

impl<'a, B: Cached> Runner<'a, B> {
    pub(crate) fn new(decoder: &'a mut Decoder<B>, num_sequences: usize) -> Self {
        let num_blocks = 97; // a prime, so that any stride deals every block once
        let cache_type = decoder.backend().cache_type();
        let spec = decoder.spec().kv_cache(BLOCK_SIZE, num_blocks, cache_type);
        let cache = decoder.backend().kv_cache(&spec).unwrap();
        let sequences = (0..num_sequences).map(|_| Sequence::default()).collect();
        Self { decoder, cache, num_blocks, dealt: 0, sequences }
    }

    /// Appends tokens to sequences, one run each, and returns the rows of logits.
    pub(crate) fn step(&mut self, runs: &[(usize, &[u32])], wanted: Wanted) -> Vec<Vec<f32>> {
        let batch = self.batch(runs, wanted);
        let logits = self.decoder.forward(&batch, &mut self.cache).unwrap();
        (0..logits.num_rows()).map(|row| logits.read_row(row).unwrap()).collect()
    }

    /// The hidden states of one run: `[L + 1][T][E]`.
    pub(crate) fn hidden_states(&mut self, run: &[u32]) -> Vec<Vec<Vec<f32>>> {
        let batch = self.batch(&[(0, run)], Wanted::All);
        let mut states = Vec::new();
        let mut observe = |backend: &B, layer: usize, x: &B::Tensor| {
            assert_eq!(layer, states.len());
            states.push((0..run.len()).map(|row| backend.read_row(x, row).unwrap()).collect());
        };
        self.decoder.forward_observed(&batch, &mut self.cache, &mut observe).unwrap();
        states
    }

    fn batch(&mut self, runs: &[(usize, &[u32])], wanted: Wanted) -> ForwardBatch {
        let mut batch = ForwardBatch::default();
        for &(number, ids) in runs {
            let sequence = &mut self.sequences[number];
            let context_len = sequence.num_computed + ids.len();
            while sequence.blocks.len() * BLOCK_SIZE < context_len {
                self.dealt += 1;
                assert!(self.dealt < self.num_blocks, "a larger pool is needed");
                sequence.blocks.push((self.dealt * 31 % self.num_blocks) as u32);
            }
            batch.paged.sequences.push(SequenceRows {
                first_row: batch.ids.len(),
                num_rows: ids.len(),
                context_len,
                first_block: batch.paged.block_table.len(),
                num_blocks: sequence.blocks.len(),
            });
            for position in sequence.num_computed..context_len {
                let block = sequence.blocks[position / BLOCK_SIZE];
                batch.paged.positions.push(position as u32);
                batch.paged.slots.push(block * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
            }
            batch.paged.block_table.extend(&sequence.blocks);
            let first = batch.ids.len() as u32;
            batch.ids.extend(ids);
            let end = batch.ids.len() as u32;
            match wanted {
                Wanted::All => batch.logit_rows.extend(first..end),
                Wanted::LastOfEach => batch.logit_rows.push(end - 1),
                Wanted::None => {}
            }
            sequence.num_computed = context_len;
        }
        let cache = self.decoder.spec().kv_cache(BLOCK_SIZE, self.num_blocks, CacheType::F32);
        batch.check(self.decoder.spec(), &cache).unwrap();
        batch
    }
}
