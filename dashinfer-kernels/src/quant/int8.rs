//! 8-bit codes: a byte each, zero at 128.
//!
//! ```text
//! panel:  quad 0                              quad 1           ..
//!         [feature 0: k 0 1 2 3][feature 1]..  64 bytes         cols / 4 quads
//! ```

use super::{GroupParams, PANEL, int4::more, inverse, nearest, stored_scale};

/// The code of 0 where there are no zero points.
pub(crate) const ZERO: u8 = 128;

/// Bytes of a panel of `cols` input features, a multiple of 4.
pub(crate) const fn panel_bytes(cols: usize) -> usize {
    PANEL * cols
}

/// The code of input feature `k` of output feature `lane` of a panel.
pub(crate) fn code(panel: &[u8], lane: usize, k: usize) -> u8 {
    panel[k / 4 * 64 + lane * 4 + k % 4]
}

/// Puts the codes of one output feature, a multiple of 4, in their places in a run of quads that starts with the first of them.
#[inline(always)]
pub(crate) fn place(quads: &mut [u8], lane: usize, codes: &[u8]) {
    for (quad, codes) in quads.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
        quad[lane * 4..][..4].copy_from_slice(codes);
    }
}

/// Rounds a group to codes 1 to 255 around 128. The largest weight decides the scale, so that none is off by more than half a step,
/// `max |w| / 254`, beside what rounding the scale to f16 costs.
#[inline(always)]
pub(crate) fn quantize(values: &[f32], codes: &mut [u8]) -> GroupParams {
    let mut lanes = [0.0f32; 16];
    let (whole, rest) = values.as_chunks::<16>();
    for values in whole {
        for i in 0..16 {
            lanes[i] = more(values[i].abs(), lanes[i]);
        }
    }
    // In halves, each of which is one operation on vectors.
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = more(lanes[i + half], lanes[i]);
        }
    }
    let mut largest = lanes[0];
    for value in rest {
        largest = more(value.abs(), largest);
    }
    let scale = stored_scale(largest / 127.0);
    let inverse = inverse(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (nearest((value * inverse).clamp(-127.0, 127.0)) + i32::from(ZERO)) as u8;
    }
    GroupParams { scale, zero: ZERO }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::noise;

    proptest! {
        #[test]
        fn a_weight_comes_back_within_half_a_step(len in 1usize..200, exponent in -20i32..10, seed: u64) {
            let size = 2f32.powi(exponent);
            let values: Vec<f32> = noise(len, seed).iter().map(|value| value * size).collect();
            let largest = values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            let mut codes = vec![0; len];
            let params = quantize(&values, &mut codes);
            // Half a step, the rounding of the scale to 11 bits at the largest weight, and the smallest scale that f16 has.
            let bound = largest / 254.0 * 1.001 + largest / 2048.0 + 3e-8 * 127.0;
            for (value, code) in values.iter().zip(codes) {
                prop_assert!((params.weight(code) - value).abs() <= bound, "{value} {code} {params:?}");
            }
        }
    }

    #[test]
    fn codes_stand_in_quads() {
        let codes: Vec<u8> = (0..8).collect();
        let mut panel = vec![255; panel_bytes(8)];
        place(&mut panel, 3, &codes);
        assert_eq!(panel[12..16], [0, 1, 2, 3]);
        assert_eq!(panel[76..80], [4, 5, 6, 7]);
        assert_eq!((0..8).map(|k| code(&panel, 3, k)).collect::<Vec<_>>(), codes);
    }

    /// What is so small that its scale is 0 is 0 too, whatever f32 makes of it.
    #[test]
    fn without_a_scale_weights_are_zeros() {
        let smallest = f32::from_bits(1);
        for (steps, stored) in [(1.0, 0.0), (63.0, 0.0), (64.0, 2f32.powi(-24)), (1e6, 2f32.powi(-24))] {
            let mut codes = [0; 4];
            let params = quantize(&[smallest, -smallest * steps, smallest * steps, 0.0], &mut codes);
            assert_eq!((params.scale.to_f32(), codes), (stored, [ZERO; 4]), "{steps}");
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut codes = [0; 4];
        let params = quantize(&[0.0; 4], &mut codes);
        assert_eq!(codes.map(|code| params.weight(code)), [0.0; 4]);
    }
}
