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
//!   commit()        the plan's tokens are computed; full blocks enter the prefix cache
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
//! An executor which wants plan `n + 1` before the tokens of step `n` are known fits in as follows. `schedule` counts from
//! what is *planned* rather than computed, and takes a work that samples as having appended one token of yet unknown value,
//! which the device reads where step `n` leaves it. `commit` names its step and applies to work whose sequence still holds
//! the blocks it was planned with. Blocks are registered at `commit`, when their tokens are known. Those of a sequence that
//! finishes or is preempted while its step runs may be handed on at once: steps write in the order of their submission.

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
pub(crate) use sequence::{NewSequence, SeqId};
