//! Root mean square normalization of rows.

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod neon;
mod scalar;

use super::isa::{Isa, Variant, choose};
use crate::KernelError;
use crate::error::check;

/// `(out, x, w, eps)` for one row; all slices have one length.
pub(crate) type RmsNormRow = unsafe fn(&mut [f32], &[f32], &[f32], f32);

pub(crate) static VARIANTS: &[Variant<RmsNormRow>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: avx2::row },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Neon, run: neon::row },
    Variant { isa: Isa::Scalar, run: scalar::row },
];

/// The best variant that needs no more than `limit`.
pub(crate) fn best(limit: Isa) -> RmsNormRow {
    choose(VARIANTS, limit)
}

/// `out[t, i] = x[t, i] · w[i] / sqrt(mean_j(x[t, j]²) + eps)`, summed in f32. <https://arxiv.org/abs/1910.07467>
///
/// `x`, `out`: `[T, E]`; `w`: `[E]`. Variants agree to 1e-5 relative: they sum in different orders.
///
/// # Errors
/// [`KernelError::Shape`] if `out` and `x` differ in length, or `x` is not whole rows of `w`.
pub fn rms_norm(out: &mut [f32], x: &[f32], w: &[f32], eps: f32, limit: Isa) -> Result<(), KernelError> {
    check_rows(out.len(), x.len(), w.len())?;
    let row = best(limit);
    for (out, x) in out.chunks_exact_mut(w.len().max(1)).zip(x.chunks_exact(w.len().max(1))) {
        // SAFETY: lengths were checked above, and `best` returns only an ISA that this machine has.
        unsafe { row(out, x, w, eps) };
    }
    Ok(())
}

pub(crate) fn check_rows(out: usize, x: usize, w: usize) -> Result<(), KernelError> {
    check("rms_norm", "length of the output", x, out)?;
    check("rms_norm", "length of x", x / w.max(1) * w, x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::supported;
    use crate::cpu::math::tests::noise;
    use proptest::prelude::*;

    proptest! {
        #[test] // 1..131 crosses every block and leaves every tail
        fn every_variant_agrees_with_scalar(e in 1usize..131, seed: u64) {
            let (x, w) = (noise(e, seed), noise(e, !seed));
            let mut want = vec![f32::NAN; e];
            scalar::row(&mut want, &x, &w, 1e-5);
            for v in supported(VARIANTS) {
                let mut out = vec![f32::NAN; e];
                // SAFETY: lengths are equal, and `supported` returns only what this machine has.
                unsafe { (v.run)(&mut out, &x, &w, 1e-5) };
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() <= 1e-5 * want.abs(), "{:?}: {out}, {want}", v.isa);
                }
            }
        }
    }

    #[test]
    fn a_row_of_equal_values_becomes_the_weights() {
        let mut out = [f32::NAN; 4];
        rms_norm(&mut out, &[3.0, 3.0, -2.0, -2.0], &[0.5, 2.0], 0.0, Isa::best()).unwrap();
        for (out, want) in out.iter().zip([0.5, 2.0, -0.5, -2.0]) {
            assert!((out - want).abs() < 1e-6);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let text = |out: usize, x: usize| {
            rms_norm(&mut vec![0.0; out], &vec![0.0; x], &[1.0; 3], 0.0, Isa::best()).unwrap_err().to_string()
        };
        assert_eq!(text(6, 3), "rms_norm: length of the output should be 3, found 6");
        assert_eq!(text(7, 7), "rms_norm: length of x should be 6, found 7");
    }
}
