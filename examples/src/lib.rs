//! What the programs in this folder share, so that each shows little but `dashinfer`.
//!
//! Run one from the root of the workspace with `cargo run --release --example NAME`; `-- --help` says what it takes.

mod args;
mod failure;
mod history;
pub mod score;

pub use args::{ArgError, Args, Bytes};
pub use failure::Failure;
pub use history::History;

/// The model that comes with the workspace: 7 million parameters, and writes what looks like Rust's documentation.
pub const BUNDLED_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/ferris-7m");

/// Compiles the program of the workspace's front page.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
