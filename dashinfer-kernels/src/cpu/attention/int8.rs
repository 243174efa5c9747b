//! Eight bits to a value, one scale to a token and head: `x ≈ scale · code`.

/// The scale of a key or a value: its largest magnitude is code ±127.
pub(super) fn scale(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest: f32, x| largest.max(x.abs())) / 127.0
}

/// The factor that takes values to codes. None of them differs from zero when it would not be finite.
pub(super) fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The code of a value; `inverse` is that of its scale.
pub(super) fn quantize(x: f32, inverse: f32) -> i8 {
    // The conversion saturates, and takes NaN to 0.
    (x * inverse).round_ties_even() as i8
}

pub(super) fn dequantize(code: i8, scale: f32) -> f32 {
    scale * f32::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::math::tests::noise;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_is_off_by_half_a_step(len in 1usize..200, exponent in -30i32..30, offset in -2f32..2.0, seed: u64) {
            let values: Vec<f32> = noise(len, seed).iter().map(|x| (x + offset) * 2f32.powi(exponent)).collect();
            let scale = scale(&values);
            for &x in &values {
                let found = dequantize(quantize(x, inverse(scale)), scale);
                // Half a step, and what the product with the inverse is rounded by.
                prop_assert!((found - x).abs() <= scale * 0.50005, "{x} became {found}, the scale is {scale}");
            }
        }
    }

    #[test]
    fn zeros_and_what_is_no_number_have_codes() {
        assert_eq!((scale(&[0.0; 3]), quantize(0.0, inverse(0.0))), (0.0, 0));
        assert_eq!(quantize(f32::NAN, 1.0), 0);
        assert_eq!((quantize(f32::INFINITY, 1.0), quantize(f32::NEG_INFINITY, 1.0)), (127, -128));
        assert_eq!(quantize(1e-44, inverse(scale(&[1e-44]))), 0);
    }
}
