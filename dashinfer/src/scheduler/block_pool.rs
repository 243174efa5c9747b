//! The blocks of the KV cache: which are free, which are held, and which are kept for their contents.
//!
//! ```text
//!                    allocate                          give back, registered
//!    free  ───────────────────────▶  in use  ─────────────────────────────▶  cached
//!      ▲                             │   ▲                                    │  │
//!      └──── give back, plain ───────┘   └────────────── share ───────────────┘  │
//!                                    ▲                                           │
//!                                    └── allocate, when none is free: the least ─┘
//!                                        recently used is evicted
//! ```
//!
//! A block in use has one holder, or several if it is registered: then its contents are finished and found through the
//! prefix cache. A [`BlockTable`] is the guard of what it holds. All operations take constant time: the free and the cached
//! blocks are lists linked by index.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A block's place in the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BlockId(pub(crate) u32);

impl BlockId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// How many blocks are in which state; the three add up to the blocks of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockCounts {
    /// Nothing in them is of use.
    pub(crate) free: usize,
    /// Held by no sequence, but found again through the prefix cache until evicted.
    pub(crate) cached: usize,
    /// Held by one sequence or more.
    pub(crate) in_use: usize,
}

/// All blocks of one KV cache.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Arc<Mutex<Blocks>>,
}

impl BlockPool {
    /// # Panics
    /// If ids of `num_blocks` blocks exceed `u32`.
    pub(super) fn new(num_blocks: usize) -> Self {
        Self { blocks: Arc::new(Mutex::new(Blocks::new(num_blocks))) }
    }

    /// A table that holds nothing yet.
    pub(super) fn table(&self) -> BlockTable {
        BlockTable { ids: Vec::new(), blocks: Arc::clone(&self.blocks) }
    }

    pub(super) fn counts(&self) -> BlockCounts {
        let blocks = lock(&self.blocks);
        let (free, cached) = (blocks.free.len, blocks.cached.len);
        BlockCounts { free, cached, in_use: blocks.holders.len() - free - cached }
    }

    /// Blocks that could be allocated now, evicting what is cached.
    pub(super) fn num_available(&self) -> usize {
        let blocks = lock(&self.blocks);
        blocks.free.len + blocks.cached.len
    }

    /// How many of these blocks no sequence holds.
    pub(super) fn num_unused(&self, ids: &[BlockId]) -> usize {
        let blocks = lock(&self.blocks);
        ids.iter().filter(|id| blocks.holders[id.index()] == 0).count()
    }

    /// Says that a held block is finished and known to the prefix cache: it may be shared, and is kept when given back.
    pub(super) fn register(&self, id: BlockId) {
        let mut blocks = lock(&self.blocks);
        debug_assert!(blocks.holders[id.index()] > 0, "{id:?} is registered by its holder");
        blocks.registered[id.index()] = true;
    }

    /// Makes a cached block the last to be evicted, as if it had been used now.
    pub(super) fn touch(&self, id: BlockId) {
        let blocks = &mut *lock(&self.blocks);
        if blocks.holders[id.index()] == 0 && blocks.registered[id.index()] {
            blocks.cached.remove(&mut blocks.links, id);
            blocks.cached.push_back(&mut blocks.links, id);
        }
    }

    /// The invariants, given how often each block stands in a table.
    #[cfg(test)]
    pub(super) fn check(&self, num_holders: &[u32], is_registered: impl Fn(BlockId) -> bool) -> Result<(), String> {
        let blocks = lock(&self.blocks);
        let free = blocks.free.check(&blocks.links)?;
        let cached = blocks.cached.check(&blocks.links)?;
        let in_use = blocks.holders.iter().filter(|&&holders| holders > 0).count();
        if free.len() + cached.len() + in_use != blocks.holders.len() {
            let all = blocks.holders.len();
            return Err(format!("{} free + {} cached + {in_use} in use != {all} blocks", free.len(), cached.len()));
        }
        if num_holders != blocks.holders {
            return Err(format!("tables hold {num_holders:?}, the pool counts {:?}", blocks.holders));
        }
        for (i, &registered) in blocks.registered.iter().enumerate() {
            let id = BlockId(i as u32);
            if registered != is_registered(id) {
                return Err(format!("{id:?}: pool and prefix cache disagree whether it is registered"));
            }
            if blocks.holders[i] > 1 && !registered {
                return Err(format!("{id:?} is shared but not registered"));
            }
        }
        if let Some(id) = free.iter().find(|id| blocks.registered[id.index()] || blocks.holders[id.index()] > 0) {
            return Err(format!("{id:?} is on the free list, but registered or held"));
        }
        if let Some(id) = cached.iter().find(|id| !blocks.registered[id.index()] || blocks.holders[id.index()] > 0) {
            return Err(format!("{id:?} is on the cached list, but not registered or held"));
        }
        Ok(())
    }
}

/// A block that [`BlockTable::allocate`] appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allocated {
    pub(super) id: BlockId,
    /// Whether it was cached: the prefix cache must forget it.
    pub(super) evicted: bool,
}

/// One sequence's blocks in order: appended to, until all are given back, the last first, at the latest on drop.
#[derive(Debug)]
pub(super) struct BlockTable {
    ids: Vec<BlockId>,
    blocks: Arc<Mutex<Blocks>>,
}

impl BlockTable {
    pub(super) fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Appends a block that nobody else holds; `None` when there is none.
    pub(super) fn allocate(&mut self) -> Option<Allocated> {
        let allocated = lock(&self.blocks).allocate()?;
        self.ids.push(allocated.id);
        Some(allocated)
    }

    /// Appends a registered block, whoever else holds it.
    pub(super) fn share(&mut self, id: BlockId) {
        lock(&self.blocks).share(id);
        self.ids.push(id);
    }

    /// Gives the last block back.
    pub(super) fn pop(&mut self) -> Option<BlockId> {
        let id = self.ids.pop()?;
        lock(&self.blocks).give_back(id);
        Some(id)
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

/// The pool's state stays consistent between operations, so a panic elsewhere is no reason to give it up.
fn lock(blocks: &Mutex<Blocks>) -> MutexGuard<'_, Blocks> {
    blocks.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Blocks {
    /// How many tables each block stands in.
    holders: Vec<u32>,
    /// Whether the prefix cache knows the block.
    registered: Vec<bool>,
    links: Vec<Links>,
    /// Last given back, first taken.
    free: List,
    /// Least recently used first.
    cached: List,
}

impl Blocks {
    fn new(num_blocks: usize) -> Self {
        let num_ids = u32::try_from(num_blocks).expect("limits keep block ids in 32 bits");
        let mut links = vec![Links::default(); num_blocks];
        let mut free = List::default();
        (0..num_ids).for_each(|id| free.push_back(&mut links, BlockId(id)));
        let (holders, registered) = (vec![0; num_blocks], vec![false; num_blocks]);
        Self { holders, registered, links, free, cached: List::default() }
    }

    fn allocate(&mut self) -> Option<Allocated> {
        let allocated = match self.free.pop_front(&mut self.links) {
            Some(id) => Allocated { id, evicted: false },
            None => Allocated { id: self.cached.pop_front(&mut self.links)?, evicted: true },
        };
        self.holders[allocated.id.index()] = 1;
        self.registered[allocated.id.index()] = false;
        Some(allocated)
    }

    fn share(&mut self, id: BlockId) {
        debug_assert!(self.registered[id.index()], "only finished blocks are shared, {id:?} is not");
        if self.holders[id.index()] == 0 {
            self.cached.remove(&mut self.links, id);
        }
        self.holders[id.index()] += 1;
    }

    fn give_back(&mut self, id: BlockId) {
        self.holders[id.index()] -= 1;
        if self.holders[id.index()] > 0 {
            return;
        }
        if self.registered[id.index()] {
            self.cached.push_back(&mut self.links, id);
        } else {
            self.free.push_front(&mut self.links, id);
        }
    }
}

/// A block's neighbours in the one list it stands in, if any.
#[derive(Debug, Clone, Copy, Default)]
struct Links {
    prev: Option<BlockId>,
    next: Option<BlockId>,
}

/// A list of blocks, linked through `Links` that are kept beside it.
#[derive(Debug, Default)]
struct List {
    front: Option<BlockId>,
    back: Option<BlockId>,
    len: usize,
}

impl List {
    fn push_front(&mut self, links: &mut [Links], id: BlockId) {
        links[id.index()] = Links { prev: None, next: self.front };
        match self.front.replace(id) {
            Some(front) => links[front.index()].prev = Some(id),
            None => self.back = Some(id),
        }
        self.len += 1;
    }

    fn push_back(&mut self, links: &mut [Links], id: BlockId) {
        links[id.index()] = Links { prev: self.back, next: None };
        match self.back.replace(id) {
            Some(back) => links[back.index()].next = Some(id),
            None => self.front = Some(id),
        }
        self.len += 1;
    }

    fn pop_front(&mut self, links: &mut [Links]) -> Option<BlockId> {
        let id = self.front?;
        self.remove(links, id);
        Some(id)
    }

    /// Takes `id` out; it must be in this list.
    fn remove(&mut self, links: &mut [Links], id: BlockId) {
        let Links { prev, next } = std::mem::take(&mut links[id.index()]);
        match prev {
            Some(prev) => links[prev.index()].next = next,
            None => self.front = next,
        }
        match next {
            Some(next) => links[next.index()].prev = prev,
            None => self.back = prev,
        }
        self.len -= 1;
    }

    /// The members in order, if the links agree in both directions.
    #[cfg(test)]
    fn check(&self, links: &[Links]) -> Result<Vec<BlockId>, String> {
        let (mut members, mut at, mut prev) = (Vec::new(), self.front, None);
        while let Some(id) = at {
            if links[id.index()].prev != prev || members.len() == links.len() {
                return Err(format!("broken links at {id:?}: {self:?}"));
            }
            members.push(id);
            (prev, at) = (at, links[id.index()].next);
        }
        if members.len() == self.len && self.back == prev {
            Ok(members)
        } else {
            Err(format!("{} members, but {self:?}", members.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(table: &BlockTable) -> Vec<u32> {
        table.ids().iter().map(|id| id.0).collect()
    }

    fn counts(pool: &BlockPool) -> [usize; 3] {
        let BlockCounts { free, cached, in_use } = pool.counts();
        [free, cached, in_use]
    }

    #[test]
    fn a_dropped_table_gives_its_blocks_back() {
        let pool = BlockPool::new(3);
        let mut table = pool.table();
        while table.allocate().is_some() {}
        assert_eq!((ids(&table), counts(&pool)), (vec![0, 1, 2], [0, 0, 3]));
        drop(table);
        assert_eq!(counts(&pool), [3, 0, 0]);
    }

    #[test]
    fn a_shared_block_is_in_use_until_its_last_holder_is_gone() {
        let pool = BlockPool::new(2);
        let (mut first, mut second) = (pool.table(), pool.table());
        let shared = first.allocate().unwrap().id;
        pool.register(shared);
        second.share(shared);
        drop(first);
        assert_eq!(counts(&pool), [1, 0, 1]);
        drop(second);
        assert_eq!(counts(&pool), [1, 1, 0]);
    }

    #[test]
    fn the_least_recently_used_block_is_evicted_and_the_tail_before_the_head() {
        let pool = BlockPool::new(4);
        let (mut first, mut second) = (pool.table(), pool.table());
        for table in [&mut first, &mut second] {
            for _ in 0..2 {
                let id = table.allocate().unwrap().id;
                pool.register(id);
            }
        }
        drop(first); // 1, then 0
        drop(second); // 3, then 2
        pool.touch(BlockId(1));
        let mut table = pool.table();
        while let Some(allocated) = table.allocate() {
            assert!(allocated.evicted);
        }
        assert_eq!(ids(&table), [0, 3, 2, 1]);
    }

    #[test]
    fn free_blocks_go_before_cached_ones() {
        let pool = BlockPool::new(2);
        let mut table = pool.table();
        let kept = table.allocate().unwrap().id;
        pool.register(kept);
        drop(table);
        let mut table = pool.table();
        assert_eq!(table.allocate(), Some(Allocated { id: BlockId(1), evicted: false }));
        assert_eq!(table.allocate(), Some(Allocated { id: kept, evicted: true }));
        assert_eq!(table.allocate(), None);
    }

    #[test]
    fn guards_may_move_to_another_thread() {
        fn send<T: Send>() {}
        send::<BlockTable>();
    }
}
