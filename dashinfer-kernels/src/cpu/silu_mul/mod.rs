//! The gated activation of Llama-like MLPs.

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod neon;
mod scalar;

use super::isa::{Isa, Variant, choose};
use crate::KernelError;
use crate::error::check;

/// `(out, gate, up)` for one row; all slices have one length.
pub(crate) type SiluMulRow = unsafe fn(&mut [f32], &[f32], &[f32]);

pub(crate) static VARIANTS: &[Variant<SiluMulRow>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: avx2::row },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Neon, run: neon::row },
    Variant { isa: Isa::Scalar, run: scalar::row },
];

/// The best variant that needs no more than `limit`.
pub(crate) fn best(limit: Isa) -> SiluMulRow {
    choose(VARIANTS, limit)
}

/// `out[t, i] = silu(x[t, i]) · x[t, F + i]`, `silu(x) = x / (1 + exp(-x))`. <https://arxiv.org/abs/2002.05202>
///
/// `x`: `[T, 2 F]`, gate then up; `out`: `[T, F]`; `columns` is `F`. Variants agree to 2e-6 relative: their `exp` differ.
///
/// # Errors
/// [`KernelError::Shape`] if `out` is not whole rows of `columns`, or `x` is not twice as long.
pub fn silu_mul(out: &mut [f32], x: &[f32], columns: usize, limit: Isa) -> Result<(), KernelError> {
    let rows = out.len() / columns.max(1);
    check("silu_mul", "length of the output", rows * columns, out.len())?;
    check("silu_mul", "length of x", 2 * out.len(), x.len())?;
    let row = best(limit);
    for (out, x) in out.chunks_exact_mut(columns.max(1)).zip(x.chunks_exact(2 * columns.max(1))) {
        let (gate, up) = x.split_at(columns);
        // SAFETY: lengths were checked above, and `best` returns only an ISA that this machine has.
        unsafe { row(out, gate, up) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::supported;
    use crate::cpu::math::tests::noise;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_variant_agrees_with_scalar(f in 1usize..41, spread in 0.1f32..30.0, seed: u64) {
            let (mut gate, up) = (noise(f, seed), noise(f, !seed));
            gate.iter_mut().for_each(|g| *g *= spread);
            let mut want = vec![f32::NAN; f];
            scalar::row(&mut want, &gate, &up);
            for v in supported(VARIANTS) {
                let mut out = vec![f32::NAN; f];
                // SAFETY: lengths are equal, and `supported` returns only what this machine has.
                unsafe { (v.run)(&mut out, &gate, &up) };
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() <= 2e-6 * want.abs() + 1e-12, "{:?}: {out}, {want}", v.isa);
                }
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        for limit in [Isa::Scalar, Isa::best()] {
            let mut out = [f32::NAN; 3];
            silu_mul(&mut out, &[-1e4, 0.0, 1e4, 2.0, 2.0, 2.0], 3, limit).unwrap();
            assert!(out[0].abs() < 1e-30 && out[1] == 0.0 && out[2] == 2e4, "{limit:?}: {out:?}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let error = silu_mul(&mut [0.0; 4], &[0.0; 6], 2, Isa::best()).unwrap_err();
        assert_eq!(error.to_string(), "silu_mul: length of x should be 8, found 6");
    }
}
