//! One launcher for each kernel: it checks shapes, and is the only place that launches it.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod attention_decode;
pub(crate) mod attention_prefill_sm80;
pub(crate) mod attention_prefill_sm90;
pub(crate) mod attention_simple;
pub(crate) mod attention_units;
pub(crate) mod embed;
pub(crate) mod gate;
pub(crate) mod gather_rows;
pub(crate) mod latent;
pub(crate) mod linear;
pub(crate) mod moe;
pub(crate) mod operand;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod sample;
pub(crate) mod soft_cap;

#[cfg(test)]
mod attention_fused_testing;
#[cfg(test)]
mod attention_testing;
#[cfg(test)]
mod bench_elementwise;
#[cfg(test)]
mod testing;
