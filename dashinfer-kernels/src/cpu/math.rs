//! `exp` in eight lanes.

/// `exp` of eight values: range reduction by `ln 2` in two parts, then a polynomial of degree 6 (its coefficients are those of
/// the Taylor series; on `|r| <= ln 2 / 2` the remainder is below 2e-7 relative). Below −87.3 the result is 0; above 88.3
/// it is that of 88.3.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn exp8(x: std::arch::x86_64::__m256) -> std::arch::x86_64::__m256 {
    use std::arch::x86_64::*;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let underflow = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-87.3));
    let x = _mm256_min_ps(_mm256_set1_ps(88.3), _mm256_max_ps(_mm256_set1_ps(-87.3), x));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    let mut p = _mm256_set1_ps(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    }
    let exponent = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_andnot_ps(underflow, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)))
}

/// The sum of eight lanes, as a fixed tree.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn sum8(x: std::arch::x86_64::__m256) -> f32 {
    use std::arch::x86_64::*;
    let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

#[cfg(test)]
pub(crate) mod tests {
    pub(crate) use crate::random::noise;

    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    #[test]
    fn exp8_is_exp_to_a_few_ulps() {
        use std::arch::x86_64::*;
        if !crate::cpu::Isa::Avx2.is_available() {
            println!("skipped: no AVX2 on this machine");
            return;
        }
        #[target_feature(enable = "avx2,fma")]
        fn run(x: &[f32; 8]) -> [f32; 8] {
            let mut out = [0.0; 8];
            // SAFETY: both arrays hold eight values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), super::exp8(_mm256_loadu_ps(x.as_ptr()))) };
            out
        }
        for i in 0..20_000 {
            let x: [f32; 8] = std::array::from_fn(|lane| (i * 8 + lane) as f32 / 1000.0 - 85.0);
            // SAFETY: AVX2 was detected above; `is_available` includes FMA.
            for (x, y) in x.iter().zip(unsafe { run(&x) }) {
                let want = f64::from(*x).exp();
                assert!((f64::from(y) / want - 1.0).abs() < 4e-7, "exp({x}) = {y}, should be {want}");
            }
        }
        // SAFETY: as above.
        let [zero, none, one, ..] = unsafe { run(&[f32::NEG_INFINITY, -100.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]) };
        assert_eq!([zero, none, one], [0.0, 0.0, 1.0]);
    }
}
