//! The scheduler as its caller sees it.

mod laws;
mod policy;

use super::prefix_cache::chain_hash;
use super::*;

/// Plenty of everything, in blocks of 16.
fn limits() -> Limits {
    Limits {
        token_budget: 64,
        max_running: 8,
        max_chunk: None,
        max_all_logits: 64,
        num_blocks: 64,
        block_size: 16,
        prefix_cache: true,
        hash_seed: 1,
    }
}

/// A prompt of `len` tokens that has a prefix in common only with prompts of the same `text`.
fn prompt(text: u32, len: usize) -> NewSequence {
    NewSequence {
        tokens: (0..len as u32).map(|i| text * 1000 + i).collect(),
        max_total_tokens: len + 16,
        priority: 0,
        want_all_logits: false,
        cache_salt: 0,
        needs_host: false,
    }
}
