//! The gated activation of Gemma's feed-forward layers.

use super::math::tanh;

/// `out = gelu(gate) · up`, with the approximation by `tanh` that Gemma is trained with. <https://arxiv.org/abs/1606.08415>
///
/// The loop is plain, so that a compiler can make vectors of it; each value's result is its own.
///
/// # Safety
/// None is needed; it stands in the place of variants that need some.
pub(super) unsafe fn row(out: &mut [f32], gate: &[f32], up: &[f32]) {
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
    fn far_away_it_is_zero_or_the_identity() {
        assert_eq!((gelu(-50.0), gelu(50.0), gelu(-1e20), gelu(1e20)), (0.0, 50.0, 0.0, 1e20));
    }
}
