//! The functions of gated feed-forward layers, by name.

use super::isa::Isa;
use super::math::tanh;
use super::silu_mul::SiluMulRow;
use super::{gelu_mul, silu_mul};
use crate::Activation;

/// A function for one row; see [`Activation`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Gate {
    /// One of a table, or in the form of one.
    Plain(SiluMulRow),
    /// [`Activation::ClampedSwiglu`].
    Clamped { alpha: f32, limit: f32 },
}

/// The variants that a backend has chosen.
#[derive(Debug, Clone, Copy)]
pub(super) struct GateRows {
    silu: SiluMulRow,
    gelu: SiluMulRow,
}

impl GateRows {
    /// The best that need no more than `limit`.
    pub(super) fn best(limit: Isa) -> Self {
        Self { silu: silu_mul::best(limit), gelu: gelu_mul::best(limit) }
    }
}

impl Gate {
    /// The function of `activation` among those of this machine.
    pub(super) fn new(activation: Activation, rows: GateRows) -> Self {
        match activation {
            Activation::Silu => Self::Plain(rows.silu),
            Activation::GeluTanh => Self::Plain(rows.gelu),
            Activation::ClampedSwiglu { alpha, limit } => Self::Clamped { alpha, limit },
        }
    }

    /// `out = f(gate, up)`, each value's its own.
    ///
    /// # Safety
    /// All slices have one length, and the machine has what the chosen variants need.
    pub(super) unsafe fn row(self, out: &mut [f32], gate: &[f32], up: &[f32]) {
        match self {
            // SAFETY: the caller's promise.
            Self::Plain(run) => unsafe { run(out, gate, up) },
            Self::Clamped { alpha, limit } => {
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = clamped_swiglu(*gate, *up, alpha, limit);
                }
            }
        }
    }
}

#[inline(always)]
fn clamped_swiglu(gate: f32, up: f32, alpha: f32, limit: f32) -> f32 {
    let (gate, up) = (gate.min(limit), up.max(-limit).min(limit));
    // The sigmoid of `x` is `(1 + tanh(x / 2)) / 2`.
    (up + 1.0) * gate * (0.5 + 0.5 * tanh(0.5 * alpha * gate))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn clamped_swiglu_is_the_definition(gate in -12f32..12.0, up in -12f32..12.0) {
            let (g, u) = (f64::from(gate).min(7.0), f64::from(up).clamp(-7.0, 7.0));
            let want = (u + 1.0) * g / (1.0 + (-1.702 * g).exp());
            let mut out = [f32::NAN];
            let run = Gate::new(Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 }, GateRows::best(Isa::Scalar));
            // SAFETY: the lengths are equal, and this one needs no more.
            unsafe { run.row(&mut out, &[gate], &[up]) };
            prop_assert!((f64::from(out[0]) - want).abs() <= 2e-6 * (1.0 + want.abs()), "{gate} {up}: {}, {want}", out[0]);
        }
    }

    #[test]
    fn far_away_clamped_swiglu_stays_finite() {
        assert_eq!(clamped_swiglu(-1e30, 3.0, 1.702, 7.0).abs(), 0.0);
        assert!((clamped_swiglu(1e30, 1e30, 1.702, 7.0) - 56.0).abs() < 1e-3);
    }
}
