//! Full blocks, found again by their tokens.
//!
//! A *prefix* is a run of whole blocks of tokens from the start of a sequence; keys and values of its last block depend on
//! all of it. Prefixes form a tree, and each is interned: while anything refers to a prefix (a block with its contents, a
//! longer prefix, a running sequence), its [`PrefixId`] stands for exactly these tokens and no others. The id of the parent
//! and the tokens of one block thus identify a prefix completely, and comparing them proves a hit at the cost of one block.
//! The chained hash only says where to look: two prefixes with one hash cost a miss, never a wrong block.

use std::collections::HashMap;

use super::block_pool::BlockId;

/// An interned prefix of at least one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PrefixId(u32);

/// What a block of tokens follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parent {
    /// Nothing. Sequences of different salts share nothing, their first blocks have different parents.
    Start { salt: u64 },
    /// The blocks of a prefix.
    Prefix(PrefixId),
}

/// How far a sequence is known as a prefix. It keeps the prefix alive until [`PrefixCache::leave`].
#[derive(Debug)]
pub(super) struct Place {
    parent: Parent,
    hash: u64,
    num_blocks: usize,
}

impl Place {
    /// Blocks of the sequence, from its start, that have a prefix.
    pub(super) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// The prefix of all these blocks.
    pub(super) fn prefix(&self) -> Option<PrefixId> {
        match self.parent {
            Parent::Start { .. } => None,
            Parent::Prefix(id) => Some(id),
        }
    }
}

#[derive(Debug)]
struct Prefix {
    parent: Parent,
    hash: u64,
    /// Of the last block; empty in an unused entry.
    tokens: Vec<u32>,
    /// Where keys and values of the last block are. One block at most: a second copy stays its sequence's own.
    block: Option<BlockId>,
    /// Longer prefixes by one block, and places here.
    num_refs: u32,
}

/// `(hash of the parent, tokens of the block) → hash`.
pub(super) type ChainHash = fn(u64, &[u32]) -> u64;

/// The prefixes that are stored, computed or built upon.
#[derive(Debug)]
pub(super) struct PrefixCache {
    seed: u64,
    hash: ChainHash,
    block_size: usize,
    prefixes: Vec<Prefix>,
    unused: Vec<PrefixId>,
    by_hash: HashMap<u64, PrefixId>,
    /// The prefix that a block ends, by block.
    stored_in: Vec<Option<PrefixId>>,
}

impl PrefixCache {
    pub(super) fn new(num_blocks: usize, block_size: usize, seed: u64, hash: ChainHash) -> Self {
        Self {
            seed,
            hash,
            block_size,
            prefixes: Vec::new(),
            unused: Vec::new(),
            by_hash: HashMap::new(),
            stored_in: vec![None; num_blocks],
        }
    }

    /// The place of a sequence of which nothing is known yet.
    pub(super) fn start(&self, salt: u64) -> Place {
        Place { parent: Parent::Start { salt }, hash: mix(self.seed ^ mix(salt)), num_blocks: 0 }
    }

    /// Collects into `found` the prefixes of `tokens` that have a block, as far as there is no gap and at most
    /// `max_blocks`, and returns the place at their end, which does not keep them alive before [`arrive`](Self::arrive).
    pub(super) fn find(&self, tokens: &[u32], salt: u64, max_blocks: usize, found: &mut Vec<BlockId>) -> Place {
        found.clear();
        let mut place = self.start(salt);
        for tokens in tokens.chunks_exact(self.block_size).take(max_blocks) {
            let hash = (self.hash)(place.hash, tokens);
            let Some(id) = self.get(place.parent, hash, tokens) else { break };
            let Some(block) = self.block(id) else { break };
            found.push(block);
            place = Place { parent: Parent::Prefix(id), hash, num_blocks: place.num_blocks + 1 };
        }
        place
    }

    /// Makes a place from [`find`](Self::find) keep its prefix alive.
    pub(super) fn arrive(&mut self, place: &Place) {
        self.add_ref(place.parent);
    }

    /// Moves a place behind the next block of its sequence, interning that prefix, which is returned.
    /// `None`, and the place stays, if a different prefix has the same hash.
    pub(super) fn advance(&mut self, place: &mut Place, tokens: &[u32]) -> Option<PrefixId> {
        debug_assert_eq!(tokens.len(), self.block_size);
        let hash = (self.hash)(place.hash, tokens);
        let id = match self.by_hash.get(&hash) {
            Some(_) => self.get(place.parent, hash, tokens)?,
            None => self.intern(place.parent, hash, tokens),
        };
        let before =
            std::mem::replace(place, Place { parent: Parent::Prefix(id), hash, num_blocks: place.num_blocks + 1 });
        self.add_ref(place.parent);
        self.leave(before);
        Some(id)
    }

    /// Forgets a place.
    pub(super) fn leave(&mut self, place: Place) {
        self.drop_ref(place.parent);
    }

    /// The prefix that is one block shorter.
    pub(super) fn parent(&self, id: PrefixId) -> Option<PrefixId> {
        match self.prefix(id).parent {
            Parent::Start { .. } => None,
            Parent::Prefix(parent) => Some(parent),
        }
    }

    /// The block at the end of a prefix.
    pub(super) fn block(&self, id: PrefixId) -> Option<BlockId> {
        self.prefix(id).block
    }

    /// States that `block` has the keys and values at the end of prefix `id`, which has no block.
    pub(super) fn store(&mut self, id: PrefixId, block: BlockId) {
        let before = self.prefix_mut(id).block.replace(block);
        debug_assert_eq!(before, None, "{id:?} has one block at most");
        self.stored_in[block.index()] = Some(id);
    }

    /// States that the contents of `block` are gone.
    pub(super) fn forget(&mut self, block: BlockId) {
        if let Some(id) = self.stored_in[block.index()].take() {
            self.prefix_mut(id).block = None;
            self.drop_if_unused(id);
        }
    }

    fn prefix(&self, id: PrefixId) -> &Prefix {
        &self.prefixes[id.0 as usize]
    }

    fn prefix_mut(&mut self, id: PrefixId) -> &mut Prefix {
        &mut self.prefixes[id.0 as usize]
    }

    /// The prefix of exactly these tokens.
    fn get(&self, parent: Parent, hash: u64, tokens: &[u32]) -> Option<PrefixId> {
        let id = *self.by_hash.get(&hash)?;
        let prefix = self.prefix(id);
        (prefix.parent == parent && prefix.tokens == tokens).then_some(id)
    }

    fn intern(&mut self, parent: Parent, hash: u64, tokens: &[u32]) -> PrefixId {
        let id = self.unused.pop().unwrap_or_else(|| {
            let id = u32::try_from(self.prefixes.len()).expect("prefixes fit in memory, a block of tokens each");
            self.prefixes.push(Prefix { parent, hash, tokens: Vec::new(), block: None, num_refs: 0 });
            PrefixId(id)
        });
        let prefix = self.prefix_mut(id);
        (prefix.parent, prefix.hash) = (parent, hash);
        prefix.tokens.extend_from_slice(tokens);
        self.by_hash.insert(hash, id);
        self.add_ref(parent);
        id
    }

    fn add_ref(&mut self, parent: Parent) {
        if let Parent::Prefix(id) = parent {
            self.prefix_mut(id).num_refs += 1;
        }
    }

    fn drop_ref(&mut self, parent: Parent) {
        if let Parent::Prefix(id) = parent {
            self.prefix_mut(id).num_refs -= 1;
            self.drop_if_unused(id);
        }
    }

    /// Drops a prefix that nothing refers to, and then its parents as far as the same holds for them.
    fn drop_if_unused(&mut self, mut id: PrefixId) {
        while self.prefix(id).num_refs == 0 && self.prefix(id).block.is_none() {
            let prefix = self.prefix_mut(id);
            prefix.tokens.clear();
            let (hash, parent) = (prefix.hash, prefix.parent);
            self.by_hash.remove(&hash);
            self.unused.push(id);
            let Parent::Prefix(parent) = parent else { break };
            self.prefix_mut(parent).num_refs -= 1;
            id = parent;
        }
    }

    #[cfg(test)]
    pub(super) fn is_stored(&self, block: BlockId) -> bool {
        self.stored_in[block.index()].is_some()
    }

    /// The invariants, given all places. `is_unused` says of a block that no sequence holds it.
    #[cfg(test)]
    pub(super) fn check<'a>(
        &self,
        places: impl Iterator<Item = &'a Place>,
        is_unused: impl Fn(BlockId) -> bool,
    ) -> Result<(), String> {
        let mut num_refs = vec![0; self.prefixes.len()];
        let mut count = |parent: Parent| {
            if let Parent::Prefix(id) = parent {
                num_refs[id.0 as usize] += 1;
            }
        };
        places.for_each(|place| count(place.parent));
        let alive = || self.prefixes.iter().enumerate().filter(|(_, prefix)| !prefix.tokens.is_empty());
        alive().for_each(|(_, prefix)| count(prefix.parent));
        if alive().count() != self.by_hash.len() || alive().count() + self.unused.len() != self.prefixes.len() {
            return Err(format!("{} prefixes, {} hashes", alive().count(), self.by_hash.len()));
        }
        for (i, prefix) in alive() {
            let id = PrefixId(i as u32);
            if prefix.tokens.len() != self.block_size || prefix.num_refs != num_refs[i] {
                return Err(format!("{id:?} is referred to {} times: {prefix:?}", num_refs[i]));
            }
            if prefix.num_refs == 0 && prefix.block.is_none() {
                return Err(format!("{id:?} is of no use: {prefix:?}"));
            }
            if self.by_hash.get(&prefix.hash) != Some(&id) {
                return Err(format!("{id:?} is not found by its hash"));
            }
            if prefix.block.is_some_and(|block| self.stored_in[block.index()] != Some(id)) {
                return Err(format!("{id:?} and its block disagree: {prefix:?}"));
            }
            let Parent::Prefix(parent) = prefix.parent else { continue };
            if self.prefix(parent).tokens.is_empty() {
                return Err(format!("{id:?} outlives its parent: {prefix:?}"));
            }
            // Tail before head: else the tail would take room where nobody finds it.
            if prefix.block.is_some_and(&is_unused) && self.block(parent).is_none() {
                return Err(format!("{id:?} is cached, but its head is evicted: {prefix:?}"));
            }
        }
        let stored = self.stored_in.iter().flatten().count();
        if stored != alive().filter(|(_, prefix)| prefix.block.is_some()).count() {
            return Err(format!("{stored} blocks stand for prefixes that have none"));
        }
        Ok(())
    }

    /// The tokens of a prefix, from the start of its sequence, and the salt.
    #[cfg(test)]
    pub(super) fn tokens(&self, place: &Place) -> (Vec<u32>, u64) {
        let (mut blocks, mut at) = (Vec::new(), place.parent);
        loop {
            match at {
                Parent::Start { salt } => return (blocks.into_iter().rev().flatten().copied().collect(), salt),
                Parent::Prefix(id) => {
                    blocks.push(&self.prefix(id).tokens);
                    at = self.prefix(id).parent;
                }
            }
        }
    }
}

/// Two tokens at a time. Each step is a bijection of the hash so far, so that none of it is lost on the way.
pub(super) fn chain_hash(parent: u64, tokens: &[u32]) -> u64 {
    tokens.chunks(2).fold(parent, |hash, pair| {
        let low = u64::from(pair[0]);
        let high = pair.get(1).map_or(0, |&token| u64::from(token));
        mix(hash ^ (low | high << 32))
    })
}

/// SplitMix64's step: its increment and its finalizer. <https://doi.org/10.1145/2660193.2660195>
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 4;

    /// Stores `tokens` in blocks from `first` on and leaves.
    fn store(cache: &mut PrefixCache, tokens: &[u32], salt: u64, first: u32) {
        let mut place = cache.start(salt);
        for (i, tokens) in (first..).zip(tokens.chunks_exact(BLOCK)) {
            let Some(id) = cache.advance(&mut place, tokens) else { break };
            if cache.block(id).is_none() {
                cache.store(id, BlockId(i));
            }
        }
        cache.leave(place);
        cache.check([].into_iter(), |_| true).unwrap();
    }

    fn find(cache: &PrefixCache, tokens: &[u32], salt: u64) -> Vec<u32> {
        let mut found = Vec::new();
        let place = cache.find(tokens, salt, usize::MAX, &mut found);
        assert_eq!(place.num_blocks(), found.len());
        assert_eq!(cache.tokens(&place).0, tokens[..found.len() * BLOCK]);
        found.iter().map(|block| block.0).collect()
    }

    #[test]
    fn a_block_is_found_behind_the_same_tokens_only() {
        let mut cache = PrefixCache::new(16, BLOCK, 7, chain_hash);
        store(&mut cache, &[1, 1, 1, 1, 2, 2, 2, 2], 0, 0);
        assert_eq!(find(&cache, &[1, 1, 1, 1, 2, 2, 2, 2, 3], 0), [0, 1]);
        assert_eq!(find(&cache, &[1, 1, 1, 1, 2, 2, 2], 0), [0]);
        assert_eq!(find(&cache, &[2, 2, 2, 2], 0), [] as [u32; 0]);
        assert_eq!(find(&cache, &[9, 9, 9, 9, 2, 2, 2, 2], 0), [] as [u32; 0]);
    }

    #[test]
    fn sequences_of_different_salts_share_nothing() {
        let mut cache = PrefixCache::new(16, BLOCK, 7, chain_hash);
        store(&mut cache, &[1; 8], 1, 0);
        store(&mut cache, &[1; 8], 2, 4);
        assert_eq!(find(&cache, &[1; 8], 1), [0, 1]);
        assert_eq!(find(&cache, &[1; 8], 2), [4, 5]);
        assert_eq!(find(&cache, &[1; 8], 3), [] as [u32; 0]);
    }

    #[test]
    fn equal_hashes_of_different_tokens_cost_a_miss_and_no_more() {
        let mut cache = PrefixCache::new(16, BLOCK, 7, |_, _| 0);
        store(&mut cache, &[1, 2, 3, 4, 5, 6, 7, 8], 0, 0);
        store(&mut cache, &[5, 6, 7, 8], 0, 4);
        assert_eq!(find(&cache, &[1, 2, 3, 4, 5, 6, 7, 8], 0), [0]);
        assert_eq!(find(&cache, &[5, 6, 7, 8], 0), [] as [u32; 0]);
        assert_eq!(find(&cache, &[1, 2, 3, 4], 1), [] as [u32; 0]);
    }

    #[test]
    fn a_prefix_without_a_block_is_kept_for_those_behind_it() {
        let mut cache = PrefixCache::new(16, BLOCK, 7, chain_hash);
        store(&mut cache, &[1, 1, 1, 1, 2, 2, 2, 2], 0, 0);
        cache.forget(BlockId(0));
        assert_eq!(find(&cache, &[1, 1, 1, 1, 2, 2, 2, 2], 0), [] as [u32; 0]);
        store(&mut cache, &[1, 1, 1, 1], 0, 5);
        assert_eq!(find(&cache, &[1, 1, 1, 1, 2, 2, 2, 2], 0), [5, 1]);
        for block in [5, 1] {
            cache.forget(BlockId(block));
        }
        assert!(cache.by_hash.is_empty());
    }

    #[test]
    fn the_seed_the_parent_and_each_token_change_the_hash() {
        let start = |seed| PrefixCache::new(1, BLOCK, seed, chain_hash).start(0).hash;
        assert_ne!(start(1), start(2));
        let hash = chain_hash(start(1), &[1, 2, 3, 4]);
        assert_eq!(hash, chain_hash(start(1), &[1, 2, 3, 4]));
        assert_ne!(hash, chain_hash(start(2), &[1, 2, 3, 4]));
        for other in [[0, 2, 3, 4], [1, 0, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0], [2, 1, 3, 4], [3, 4, 1, 2]] {
            assert_ne!(hash, chain_hash(start(1), &other));
        }
    }
}
