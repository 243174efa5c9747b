//! Who holds which blocks, and which of them are known to the prefix cache: the block pool and the prefix cache, kept in
//! step with each other.

use super::block_pool::{BlockCounts, BlockId, BlockPool, BlockTable};
use super::limits::Limits;
use super::prefix_cache::{ChainHash, Place, PrefixCache};

/// What one sequence holds. Goes back through [`KvBlocks::give_back`], so that the prefix cache learns of it.
#[derive(Debug)]
pub(super) struct Held {
    table: BlockTable,
    /// How far its blocks are known as a prefix; `None` if they are not to be.
    place: Option<Place>,
}

impl Held {
    pub(super) fn block_table(&self) -> &[BlockId] {
        self.table.ids()
    }
}

/// Blocks that are missing to hold a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shortage(pub(super) usize);

/// The blocks of the KV cache, and what is found in them.
#[derive(Debug)]
pub(super) struct KvBlocks {
    block_size: usize,
    pool: BlockPool,
    /// `None` if the limits say so.
    prefixes: Option<PrefixCache>,
    /// Blocks found by the last look-up, kept for the buffer.
    found: Vec<BlockId>,
}

impl KvBlocks {
    pub(super) fn new(limits: &Limits, hash: ChainHash) -> Self {
        let Limits { num_blocks, block_size, hash_seed, prefix_cache, .. } = *limits;
        Self {
            block_size,
            pool: BlockPool::new(num_blocks),
            prefixes: prefix_cache.then(|| PrefixCache::new(num_blocks, block_size, hash_seed, hash)),
            found: Vec::new(),
        }
    }

    pub(super) fn counts(&self) -> BlockCounts {
        self.pool.counts()
    }

    /// Holds blocks for all of `tokens`, if `reserve` others stay available: first those found by their tokens, then new
    /// ones. At least the last token has a block of its own, so that there is something to compute. Returns how many tokens
    /// the found blocks contain. With `read` false none are looked for.
    pub(super) fn hold(
        &mut self,
        tokens: &[u32],
        salt: u64,
        read: bool,
        reserve: usize,
    ) -> Result<(Held, usize), Shortage> {
        let num_blocks = tokens.len().div_ceil(self.block_size);
        self.found.clear();
        let place = self.prefixes.as_ref().map(|prefixes| {
            let max_blocks = if read { num_blocks.saturating_sub(1) } else { 0 };
            prefixes.find(tokens, salt, max_blocks, &mut self.found)
        });
        // A found block that nobody holds counts as available, and is no more once it is held.
        let num_revived = self.pool.num_unused(&self.found);
        let wanted = num_blocks - self.found.len() + num_revived + reserve;
        let available = self.pool.num_available();
        if wanted > available {
            return Err(Shortage(wanted - available));
        }
        let mut held = Held { table: self.pool.table(), place };
        if let (Some(prefixes), Some(place)) = (&mut self.prefixes, &held.place) {
            prefixes.arrive(place);
        }
        self.found.iter().for_each(|&id| held.table.share(id));
        let enough = self.grow(&mut held, tokens.len());
        debug_assert!(enough, "available blocks were counted");
        Ok((held, self.found.len() * self.block_size))
    }

    /// Appends blocks until `num_tokens` have room; `false` if the pool has none left.
    pub(super) fn grow(&mut self, held: &mut Held, num_tokens: usize) -> bool {
        while held.table.ids().len() * self.block_size < num_tokens {
            let Some(allocated) = held.table.allocate() else { return false };
            if let (true, Some(prefixes)) = (allocated.evicted, &mut self.prefixes) {
                prefixes.forget(allocated.id);
            }
        }
        true
    }

    /// Registers the blocks that are full now that `computed`, from the sequence's start, is computed.
    pub(super) fn register(&mut self, held: &mut Held, computed: &[u32]) {
        let (Some(prefixes), Some(place)) = (&mut self.prefixes, &mut held.place) else { return };
        for tokens in computed.chunks_exact(self.block_size).skip(place.num_blocks()) {
            let block = held.table.ids()[place.num_blocks()];
            let Some(prefix) = prefixes.advance(place, tokens) else { break };
            if prefixes.block(prefix).is_none() {
                prefixes.store(prefix, block);
                self.pool.register(block);
            }
        }
    }

    /// Gives all blocks back, the last first. A prefix that has lost its block since takes ours, and where ours is a second
    /// copy the first counts as used now: what is cached thus never outlives what leads to it.
    pub(super) fn give_back(&mut self, mut held: Held) {
        if let (Some(prefixes), Some(place)) = (&mut self.prefixes, held.place.take()) {
            while held.table.ids().len() > place.num_blocks() {
                held.table.pop();
            }
            let mut at = place.prefix();
            while let (Some(prefix), Some(&ours)) = (at, held.table.ids().last()) {
                match prefixes.block(prefix) {
                    Some(stored) => self.pool.touch(stored),
                    None => {
                        prefixes.store(prefix, ours);
                        self.pool.register(ours);
                    }
                }
                held.table.pop();
                at = prefixes.parent(prefix);
            }
            prefixes.leave(place);
        }
    }

    /// The invariants of pool and prefix cache, given all that is held.
    #[cfg(test)]
    pub(super) fn check<'a>(&self, held: impl Iterator<Item = &'a Held> + Clone) -> Result<(), String> {
        let BlockCounts { free, cached, in_use } = self.counts();
        let mut num_holders = vec![0; free + cached + in_use];
        for &id in held.clone().flat_map(Held::block_table) {
            num_holders[id.index()] += 1;
        }
        let is_stored = |id| self.prefixes.as_ref().is_some_and(|prefixes| prefixes.is_stored(id));
        self.pool.check(&num_holders, is_stored)?;
        match &self.prefixes {
            Some(prefixes) => {
                prefixes.check(held.filter_map(|held| held.place.as_ref()), |id| self.pool.num_unused(&[id]) == 1)
            }
            None => Ok(()),
        }
    }

    /// That a sequence's place in the prefix cache says what the sequence says, and is up to date.
    #[cfg(test)]
    pub(super) fn check_place(
        &self,
        held: &Held,
        tokens: &[u32],
        num_computed: usize,
        salt: u64,
    ) -> Result<(), String> {
        let (Some(prefixes), Some(place)) = (&self.prefixes, &held.place) else { return Ok(()) };
        let num_tokens = place.num_blocks() * self.block_size;
        if num_tokens > num_computed || prefixes.tokens(place) != (tokens[..num_tokens].to_vec(), salt) {
            return Err(format!("{place:?} is not the prefix of its {num_computed} computed tokens"));
        }
        Ok(())
    }
}
