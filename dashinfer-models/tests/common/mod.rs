//! What the integration tests share.

pub(crate) mod reference;
pub(crate) mod sequences;
