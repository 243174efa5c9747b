//! `exp` in eight lanes, and in four; `tanh` of one value, in loops that a compiler can make vectors of.

/// `x` for small sizes, ±1 for large ones, within 2e-7: `1 − 2 / (exp(2 |x|) + 1)`, with the sign of `x`.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    /// Added to a small number, it leaves no room for bits behind the point: the sum's last bits are the nearest whole number. A
    /// conversion to `i32` would do too, but one that saturates is not made into vectors.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    // Beyond it the result is 1, and the power would grow without need.
    let size = x.abs().min(10.0);
    let power = 2.0 * std::f32::consts::LOG2_E * size;
    let rounded = power + ROUND;
    let rest = power - (rounded - ROUND);
    let mut p = EXP2_NEAR_ZERO[0];
    for c in &EXP2_NEAR_ZERO[1..] {
        p = p * rest + c;
    }
    // The whole number as an exponent; the bits of `ROUND` itself are shifted out.
    let exp = p * f32::from_bits((rounded.to_bits() << 23).wrapping_add(1f32.to_bits()));
    (1.0 - 2.0 / (exp + 1.0)).copysign(x)
}

/// `row = cap · tanh(row / cap)`. Inlined, so that it gets the vectors of the instruction set that its caller is made for; its results
/// are the same with all of them.
#[inline(always)]
pub(crate) fn soft_cap(row: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    row.iter_mut().for_each(|x| *x = cap * tanh(*x * inverse));
}

/// Of `2^r` for `|r| <= 1/2`: the Taylor series to degree 7, highest first; what it leaves out is below 1e-8.
const EXP2_NEAR_ZERO: [f32; 8] = [
    1.525_273_4e-5,
    1.540_353e-4,
    1.333_355_8e-3,
    9.618_129e-3,
    5.550_411e-2,
    0.240_226_5,
    std::f32::consts::LN_2,
    1.0,
];

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

/// `exp` of four values, in the steps of `exp8`.
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn exp4(x: std::arch::aarch64::float32x4_t) -> std::arch::aarch64::float32x4_t {
    use std::arch::aarch64::*;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let underflow = vcltq_f32(x, vdupq_n_f32(-87.3));
    let x = vminq_f32(vdupq_n_f32(88.3), vmaxq_f32(vdupq_n_f32(-87.3), x));
    let n = vrndnq_f32(vmulq_n_f32(x, std::f32::consts::LOG2_E));
    let r = vfmsq_n_f32(x, n, LN2_HIGH);
    let r = vfmsq_n_f32(r, n, LN2_LOW);
    let mut p = vdupq_n_f32(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = vfmaq_f32(vdupq_n_f32(c), p, r);
    }
    let exponent = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
    let y = vmulq_f32(p, vreinterpretq_f32_s32(exponent));
    vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), underflow))
}

/// `2^x` of eight values, none above 127: a power of two, times a polynomial of degree 6 (the Taylor series; on `|r| <= 1/2` the
/// remainder is below 2e-7 relative). Below −126.5, and for −∞, the result is 0.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn exp2_8(x: std::arch::x86_64::__m256) -> std::arch::x86_64::__m256 {
    use std::arch::x86_64::*;
    // The exponent −127 is that of zero.
    let x = _mm256_max_ps(x, _mm256_set1_ps(-127.0));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm256_sub_ps(x, n);
    let mut p = _mm256_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let exponent = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_mul_ps(p, _mm256_castsi256_ps(exponent))
}

/// [`exp2_8`] of sixteen values.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn exp2_16(x: std::arch::x86_64::__m512) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::*;
    let x = _mm512_max_ps(x, _mm512_set1_ps(-127.0));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    let exponent = _mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)));
    _mm512_mul_ps(p, _mm512_castsi512_ps(exponent))
}

/// [`exp2_8`] of four values.
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn exp2_4(x: std::arch::aarch64::float32x4_t) -> std::arch::aarch64::float32x4_t {
    use std::arch::aarch64::*;
    let x = vmaxq_f32(x, vdupq_n_f32(-127.0));
    let n = vrndnq_f32(x);
    let r = vsubq_f32(x, n);
    let mut p = vdupq_n_f32(EXP2[0]);
    for c in &EXP2[1..] {
        p = vfmaq_f32(vdupq_n_f32(*c), p, r);
    }
    let exponent = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
    vmulq_f32(p, vreinterpretq_f32_s32(exponent))
}

/// `ln(2)^k / k!` from `k = 6` down to 0.
#[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
const EXP2: [f32; 7] =
    [1.540_353_1e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0];

/// The largest of eight lanes.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn max8(x: std::arch::x86_64::__m256) -> f32 {
    use std::arch::x86_64::*;
    let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
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
    use super::{soft_cap, tanh};
    pub(crate) use crate::random::noise;

    /// Checks `exp` of a few values at a time.
    #[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
    fn check_exp<const LANES: usize>(exp: impl Fn(&[f32; LANES]) -> [f32; LANES]) {
        for i in 0..160_000 / LANES {
            let x: [f32; LANES] = std::array::from_fn(|lane| (i * LANES + lane) as f32 / 1000.0 - 85.0);
            for (x, y) in x.iter().zip(exp(&x)) {
                let want = f64::from(*x).exp();
                assert!((f64::from(y) / want - 1.0).abs() < 4e-7, "exp({x}) = {y}, should be {want}");
            }
        }
        let mut ends = [0.0; LANES];
        ends[..2].copy_from_slice(&[f32::NEG_INFINITY, -100.0]);
        assert_eq!(exp(&ends)[..3], [0.0, 0.0, 1.0]);
    }

    #[test]
    fn tanh_is_close_everywhere() {
        for i in -40_000..=40_000 {
            let x = i as f32 * 5e-4;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() <= 2e-7, "{x}: {}", tanh(x));
        }
        assert_eq!((tanh(f32::INFINITY), tanh(-1e30), tanh(0.0)), (1.0, -1.0, 0.0));
        let mut row = [100.0, -1.0, 0.0];
        soft_cap(&mut row, 30.0);
        assert!((row[0] - 30.0 * (100f32 / 30.0).tanh()).abs() < 1e-4 && row[2] == 0.0, "{row:?}");
    }

    /// `2^x` of sixteen values, in the vectors of an instruction set.
    #[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
    type Exp2 = crate::cpu::isa::Variant<unsafe fn(&[f32; 16]) -> [f32; 16]>;

    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    fn exp2_variants() -> Vec<Exp2> {
        use std::arch::x86_64::*;

        use crate::cpu::isa::{Isa, Variant};
        #[target_feature(enable = "avx2,fma")]
        fn eight(x: &[f32; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            for at in [0, 8] {
                // SAFETY: both arrays hold eight values from there on.
                unsafe {
                    let y = super::exp2_8(_mm256_loadu_ps(x.as_ptr().add(at)));
                    _mm256_storeu_ps(out.as_mut_ptr().add(at), y);
                }
            }
            out
        }
        #[target_feature(enable = "avx512f")]
        fn sixteen(x: &[f32; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            // SAFETY: both arrays hold sixteen values.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), super::exp2_16(_mm512_loadu_ps(x.as_ptr()))) };
            out
        }
        vec![Variant { isa: Isa::Avx2, run: eight }, Variant { isa: Isa::Avx512, run: sixteen }]
    }

    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    fn exp2_variants() -> Vec<Exp2> {
        use std::arch::aarch64::*;

        use crate::cpu::isa::{Isa, Variant};
        fn four(x: &[f32; 16]) -> [f32; 16] {
            let mut out = [0.0; 16];
            for at in [0, 4, 8, 12] {
                // SAFETY: every 64-bit Arm has NEON; both arrays hold four values from there on.
                unsafe { vst1q_f32(out.as_mut_ptr().add(at), super::exp2_4(vld1q_f32(x.as_ptr().add(at)))) };
            }
            out
        }
        vec![Variant { isa: Isa::Neon, run: four }]
    }

    #[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
    #[test]
    fn exp2_is_exp2_to_a_few_ulps() {
        use crate::cpu::isa::{Variant, supported};
        for Variant { run, .. } in supported(&exp2_variants()) {
            for i in 0..10_000 {
                let x: [f32; 16] = std::array::from_fn(|lane| (i * 16 + lane) as f32 / 1000.0 - 126.0);
                // SAFETY: the machine has the instruction set.
                for (x, y) in x.iter().zip(unsafe { run(&x) }) {
                    let want = f64::from(*x).exp2();
                    assert!((f64::from(y) / want - 1.0).abs() < 4e-7, "2^{x} = {y}, should be {want}");
                }
            }
            let mut x = [0.0; 16];
            (x[0], x[1], x[2]) = (f32::NEG_INFINITY, -200.0, -127.0);
            // SAFETY: as above.
            assert_eq!(unsafe { run(&x) }[..4], [0.0, 0.0, 0.0, 1.0]);
        }
    }

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
        // SAFETY: AVX2 was detected above; `is_available` includes FMA.
        check_exp(|x| unsafe { run(x) });
    }

    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    #[test]
    fn exp4_is_exp_to_a_few_ulps() {
        use std::arch::aarch64::*;
        check_exp(|x: &[f32; 4]| {
            let mut out = [0.0; 4];
            // SAFETY: every 64-bit Arm has NEON; both arrays hold four values.
            unsafe { vst1q_f32(out.as_mut_ptr(), super::exp4(vld1q_f32(x.as_ptr()))) };
            out
        });
    }
}
