//! The SDK.

#[allow(dead_code, unused_imports)] // TODO: remove when the engine's thread calls it
mod scheduler;
