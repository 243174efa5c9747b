//! 4-bit codes: two to a byte, zero at 8 or where the group's zero point is.
//!
//! ```text
//! panel:  quads 0 and 1                                   quads 2 and 3   ..
//!         [feature 0: k 0|4  1|5  2|6  3|7][feature 1]..   64 bytes        cols / 8 of them
//!                       low|high half of the byte
//! ```
//!
//! A mask gives the bytes of the even quad, a shift and a mask those of the odd one.

use super::{GroupParams, PANEL, nearest, stored_scale};

/// The code of 0 where there are no zero points.
pub(crate) const ZERO: u8 = 8;

/// Bytes of a panel of `cols` input features, a multiple of 8.
pub(crate) const fn panel_bytes(cols: usize) -> usize {
    PANEL * cols / 2
}

/// The code of input feature `k` of output feature `lane` of a panel.
pub(crate) fn code(panel: &[u8], lane: usize, k: usize) -> u8 {
    let byte = panel[k / 8 * 64 + lane * 4 + k % 4];
    if k / 4 % 2 == 0 { byte & 15 } else { byte >> 4 }
}

/// Puts the codes of one output feature, a multiple of 8, in their places in a run of quads that starts with the first of them.
#[inline(always)]
pub(crate) fn place(quads: &mut [u8], lane: usize, codes: &[u8]) {
    for (quads, codes) in quads.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
        let [even, odd] = [0, 4].map(|at| u32::from_le_bytes([codes[at], codes[at + 1], codes[at + 2], codes[at + 3]]));
        quads[lane * 4..][..4].copy_from_slice(&(even | odd << 4).to_le_bytes());
    }
}

/// Rounds a group to codes 0 to 15 around 8. The weight of the largest size gets code 0, so that all sixteen codes are in reach;
/// one of the opposite sign and nearly its size is clipped to code 15, and off by one step, `max |w| / 8`, at most.
///
/// Among some scales near that one, the one with the least squared error is taken.
#[inline(always)]
pub(crate) fn quantize(values: &[f32], codes: &mut [u8]) -> GroupParams {
    let largest =
        values.iter().fold(0.0, |largest: f32, value| if value.abs() > largest.abs() { *value } else { largest });
    // Fewer steps to the largest weight make a coarser grid that clips less; more of them a finer one that clips it.
    const STEPS: [f32; 5] = [-8.0, -7.6, -7.3, -8.4, -8.8];
    let mut best = (f32::INFINITY, stored_scale(0.0));
    for steps in STEPS {
        let scale = stored_scale(largest / steps);
        let (step, inverse) = (scale.to_f32(), inverse(scale));
        let mut error = 0.0;
        for value in values {
            let off = value - step * clipped(value * inverse) as f32;
            error += off * off;
        }
        if error < best.0 {
            best = (error, scale);
        }
    }
    let inverse = inverse(best.1);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (clipped(value * inverse) + i32::from(ZERO)) as u8;
    }
    GroupParams { scale: best.1, zero: ZERO }
}

#[inline(always)]
fn inverse(scale: half::f16) -> f32 {
    if scale == half::f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}

#[inline(always)]
fn clipped(steps: f32) -> i32 {
    nearest(steps.clamp(-8.0, 7.0))
}

/// Rounds a group to codes 0 to 15 from its smallest weight (or 0) to its largest (or 0). A weight is off by one step,
/// `(max − min) / 15`, at most: half for its own rounding, half for that of the zero point.
#[inline(always)]
pub(crate) fn quantize_with_zero(values: &[f32], codes: &mut [u8]) -> GroupParams {
    let (mut low, mut high) = (0.0f32, 0.0f32);
    for value in values {
        low = low.min(*value);
        high = high.max(*value);
    }
    let scale = stored_scale((high - low) / 15.0);
    let inverse = inverse(scale);
    let zero = nearest((-low * inverse).clamp(0.0, 15.0));
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (nearest((value * inverse).clamp(-15.0, 15.0)) + zero).clamp(0, 15) as u8;
    }
    GroupParams { scale, zero: zero as u8 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::noise;

    fn check(values: &[f32], step: f32, quantize: fn(&[f32], &mut [u8]) -> GroupParams) -> Result<(), TestCaseError> {
        let mut codes = vec![0; values.len()];
        let params = quantize(values, &mut codes);
        let bound = step * 1.13 + 3e-8 * 8.0;
        for (value, code) in values.iter().zip(codes) {
            prop_assert!(code < 16);
            prop_assert!((params.weight(code) - value).abs() <= bound, "{value} {code} {params:?}");
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn a_weight_comes_back_within_a_step(len in 1usize..130, exponent in -18i32..10, shift in -1f32..1.0, seed: u64) {
            let size = 2f32.powi(exponent);
            let values: Vec<f32> = noise(len, seed).iter().map(|value| (value + shift) * size).collect();
            let low = values.iter().copied().fold(0.0, f32::min);
            let high = values.iter().copied().fold(0.0, f32::max);
            check(&values, high.max(-low) / 8.0, quantize)?;
            check(&values, (high - low) / 15.0, quantize_with_zero)?;
        }
    }

    #[test]
    fn codes_of_two_quads_share_bytes() {
        let codes: Vec<u8> = (0..16).collect();
        let mut panel = vec![255; panel_bytes(16)];
        place(&mut panel, 2, &codes);
        assert_eq!(panel[8..12], [0x40, 0x51, 0x62, 0x73]);
        assert_eq!(panel[72..76], [0xc8, 0xd9, 0xea, 0xfb]);
        assert_eq!((0..16).map(|k| code(&panel, 2, k)).collect::<Vec<_>>(), codes);
    }
}
