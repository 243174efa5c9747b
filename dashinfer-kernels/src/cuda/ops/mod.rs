//! One launcher for each kernel: it checks shapes, and is the only place that launches it.

pub(crate) mod attention_combine;
pub(crate) mod attention_decode;
pub(crate) mod attention_simple;
pub(crate) mod attention_units;
pub(crate) mod operand;

#[cfg(test)]
mod attention_testing;
#[cfg(test)]
mod testing;
