//! Who computes what in the next step: plain data and arithmetic, without clock, device or runtime.
//!
//! One rule: each sequence's `num_computed` catches up with its number of tokens, within a token budget. A prompt has many
//! tokens to catch up with and is *prefilled* in chunks; a sequence whose sampled token was appended lacks one, which is a
//! *decode*. What was found in the prefix cache counts as computed, what a preempted sequence held does not any more.
//!
//! ```text
//!   add ──▶ waiting ──── admitted: blocks for all its tokens ────▶ running ──▶ finish
//!              ▲                                                     │  ▲
//!              └───────── preempted: gives all blocks back ──────────┘  └── schedule → commit → append
//! ```
//!
//! The caller's loop on the engine's thread; between the calls anything may be added, paused, resumed or finished:
//!
//! ```text
//!   schedule()      decide: who gets blocks, who gets tokens of the budget       → plan()
//!   (forward pass over plan().work, whose sequences' tokens and block tables get() shows)
//!   submit()        the plan is under way: what it samples is pending
//!   (the next plan may be made and submitted here)
//!   commit()        the oldest plan is done; full blocks enter the prefix cache  → done()
//!   append(seq, t)  for each work that `samples` and whose sequence is still there
//! ```
//!
//! # What holds
//!
//! - Decodes come first, then prompts by priority and arrival: one that is running before one that waits, unless the latter
//!   has the higher priority. Nothing overtakes a sequence that waits for blocks, so short prompts cannot starve a long one,
//!   and a long one takes only what decodes leave of the budget.
//! - A sequence is admitted with blocks for all the tokens it has, so a prefill once begun runs out of blocks only if it is
//!   preempted; and only if every running sequence is left a block to grow into, which keeps admissions and preemptions
//!   from taking turns.
//! - Out of blocks, the paused give way first, then the last in rank. The first in rank always goes on, and what gave way
//!   waits before all that came later: everything not paused finishes, whatever the load.
//! - A block is written by the one sequence that holds it, shared only when full and computed, and never written again.
//!
//! # Running one step ahead
//!
//! Plan `n + 1` may be made before the tokens of step `n` are known. `num_computed` counts what is submitted, and a work that
//! samples leaves one token *pending*, which the device reads where step `n` puts it. The last token of a sequence is not
//! computed, so a sequence whose last one is pending is in no further plan; one that ends otherwise, by a stop token, is in one
//! plan too many, whose result for it is dropped.
//!
//! Blocks are registered at `commit`, when their tokens are known, and only if the sequence still has those it was planned with.
//! Those of a sequence that finishes or is preempted with a step under way are handed on at once: whoever gets them is planned
//! later, and steps write in the order of their submission. What such a step still writes is in no registered block, as these
//! are full of tokens that were computed before. A preempted sequence is admitted again when its pending token is known.

mod block_pool;
#[cfg(test)]
mod check;
mod kv_blocks;
mod limits;
mod plan;
mod prefix_cache;
#[expect(clippy::module_inception, reason = "the door is named for the room it leads to")]
mod scheduler;
mod sequence;
#[cfg(test)]
mod tests;

pub(crate) use limits::{Limits, SchedulerError};
pub(crate) use plan::Work;
pub(crate) use scheduler::Scheduler;
pub(crate) use sequence::{NewSequence, SeqId, SeqMap};
