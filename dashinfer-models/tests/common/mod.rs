//! What the integration tests share.
#![allow(dead_code)] // no test uses all of it

pub(crate) mod gguf;
pub(crate) mod reference;
pub(crate) mod sequences;
