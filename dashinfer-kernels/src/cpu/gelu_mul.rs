//! The gated activation of Gemma's feed-forward layers.

use super::isa::{Isa, Variant, choose};
use super::math::tanh;
use super::silu_mul::SiluMulRow;

/// One loop, from which the compiler makes vectors of four on every machine and of eight with AVX2. Variants agree to the bit: each
/// value's result is its own, of the same operations.
static VARIANTS: &[Variant<SiluMulRow>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: row_avx2 },
    Variant { isa: Isa::Scalar, run: row },
];

/// The best variant that needs no more than `limit`.
pub(super) fn best(limit: Isa) -> SiluMulRow {
    choose(VARIANTS, limit)
}

/// `out = gelu(gate) · up`, with the approximation by `tanh` that Gemma is trained with. <https://arxiv.org/abs/1606.08415>
///
/// # Safety
/// None is needed; it stands in the place of variants that need some.
unsafe fn row(out: &mut [f32], gate: &[f32], up: &[f32]) {
    inline_row(out, gate, up);
}

/// See [`row`].
///
/// # Safety
/// The machine has AVX2.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[target_feature(enable = "avx2,fma")]
unsafe fn row_avx2(out: &mut [f32], gate: &[f32], up: &[f32]) {
    inline_row(out, gate, up);
}

#[inline(always)]
fn inline_row(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gelu(*gate) * up;
    }
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    /// √(2 / π)
    const SCALE: f32 = 0.797_884_6;
    0.5 * x * (1.0 + tanh(SCALE * (x + 0.044_715 * x * x * x)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::isa::supported;
    use crate::cpu::math::tests::noise;

    /// The definition in f64.
    fn exact(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
    }

    proptest! {
        #[test]
        fn it_is_the_definition(x in -12f32..12.0, up in -3f32..3.0) {
            let mut out = [f32::NAN];
            // SAFETY: it needs none.
            unsafe { row(&mut out, &[x], &[up]) };
            let want = exact(f64::from(x)) * f64::from(up);
            prop_assert!((f64::from(out[0]) - want).abs() <= 1e-6 * (1.0 + want.abs()), "{x}: {}, {want}", out[0]);
        }
    }

    #[test]
    fn variants_agree_to_the_bit() {
        for len in 0..40 {
            let (gate, up) = (noise(len, 1), noise(len, 2));
            let mut want = vec![f32::NAN; len];
            // SAFETY: it needs nothing.
            unsafe { row(&mut want, &gate, &up) };
            for Variant { run, isa } in supported(VARIANTS) {
                let mut out = vec![f32::NAN; len];
                // SAFETY: the lengths are equal, and the machine has the instruction set.
                unsafe { run(&mut out, &gate, &up) };
                assert_eq!(out, want, "{isa:?}");
            }
        }
    }

    #[test]
    fn far_away_it_is_zero_or_the_identity() {
        assert_eq!((gelu(-50.0), gelu(50.0), gelu(-1e20), gelu(1e20)), (0.0, 50.0, 0.0, 1e20));
    }
}
