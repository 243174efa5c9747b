//! How kernels are told the function of gated layers (`activation.cuh`).

use bytemuck::{Pod, Zeroable};

use crate::Activation;

/// The functions that kernels are compiled for.
pub(crate) const OPTIONS: [&str; 3] = ["-DACTIVATION=0", "-DACTIVATION=1", "-DACTIVATION=2"];

/// Which of [`OPTIONS`] makes a function.
pub(crate) fn number(activation: Activation) -> usize {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::ClampedSwiglu { .. } => 2,
    }
}

/// What a function has beside its operands.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Clamp {
    alpha: f32,
    limit: f32,
}

impl From<Activation> for Clamp {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::ClampedSwiglu { alpha, limit } => Self { alpha, limit },
            Activation::Silu | Activation::GeluTanh => Self::zeroed(),
        }
    }
}

/// The definition, for tests.
#[cfg(test)]
pub(super) fn defined(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            gate / 2.0 * (1.0 + inner.tanh()) * up
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
        }
    }
}

/// One of each, for tests; gpt-oss's numbers.
#[cfg(test)]
pub(super) const EVERY: [Activation; 3] =
    [Activation::Silu, Activation::GeluTanh, Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 }];
