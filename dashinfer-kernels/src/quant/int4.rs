//! 4-bit codes: two to a byte, zero at 8 or where the group's zero point is.
//!
//! ```text
//! panel:  quads 0 and 1                                   quads 2 and 3   ..
//!         [feature 0: k 0|4  1|5  2|6  3|7][feature 1]..   64 bytes        cols / 8 of them
//!                       low|high half of the byte
//! ```
//!
//! A mask gives the bytes of the even quad, a shift and a mask those of the odd one.

use super::{GroupParams, PANEL, inverse, nearest, nearest_whole, stored_scale};

/// The code of 0 where there are no zero points.
pub(crate) const ZERO: u8 = 8;

/// Steps to the largest weight, for each scale that is tried: fewer of them make a coarser grid that clips less; more of them a
/// finer one that clips it.
pub(crate) const STEPS: [f32; 5] = [-8.0, -7.0, -7.5, -8.6, -9.3];

/// What is taken of the smallest and of the largest weight, for each scale and zero point that are tried.
pub(crate) const SHRINK: [(f32, f32); 4] = [(1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9)];

/// Values whose squared errors are summed side by side.
pub(crate) const LANES: usize = 16;

/// Bytes of a panel of `cols` input features, a multiple of 8.
pub(crate) const fn panel_bytes(cols: usize) -> usize {
    PANEL * cols / 2
}

/// The code of input feature `k` of output feature `lane` of a panel.
pub(crate) fn code(panel: &[u8], lane: usize, k: usize) -> u8 {
    let byte = panel[k / 8 * 64 + lane * 4 + k % 4];
    if (k / 4).is_multiple_of(2) { byte & 15 } else { byte >> 4 }
}

/// Puts the codes of one output feature, a multiple of 8, in their places in a run of quads that starts with the first of them.
#[inline(always)]
pub(crate) fn place(quads: &mut [u8], lane: usize, codes: &[u8]) {
    for (quads, codes) in quads.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
        quads[lane * 4..][..4].copy_from_slice(&in_pairs(*codes));
    }
}

/// The same for all output features of a panel, `[16][input features]`.
pub(crate) fn place_all(quads: &mut [u8], codes: &[u8]) {
    let len = codes.len() / PANEL;
    let lanes: [&[[u8; 8]]; PANEL] = std::array::from_fn(|lane| codes[lane * len..][..len].as_chunks().0);
    for (i, quads) in quads.as_chunks_mut::<64>().0.iter_mut().take(len / 8).enumerate() {
        for (lane, to) in lanes.iter().zip(quads.as_chunks_mut().0) {
            *to = in_pairs(lane[i]);
        }
    }
}

/// Eight codes in four bytes.
#[inline(always)]
fn in_pairs(codes: [u8; 8]) -> [u8; 4] {
    let codes = u64::from_le_bytes(codes);
    ((codes | codes >> 28) as u32).to_le_bytes()
}

/// Rounds a group to codes 0 to 15 around 8. The weight of the largest size is about code 0, so that all sixteen codes are in reach;
/// one of the opposite sign and nearly its size is clipped to code 15, and off by a quarter of that size, `max |w| / 4`, at most.
///
/// Among some scales near that one, the one with the least squared error is taken. Of normal weights in groups of 32 that
/// leaves 0.7 % of their variance as error; no sixteen evenly spaced codes around 8 leave less than 0.65 %.
#[inline(always)]
pub(crate) fn quantize(values: &[f32], codes: &mut [u8]) -> GroupParams {
    let (low, high) = range(values);
    let largest = if high > -low { high } else { low };
    // Loops: `map` and `from_fn` are functions of their own, which have the vectors of whoever calls this only if they are inlined.
    let mut scales = [half::f16::ZERO; 5];
    for n in 0..5 {
        scales[n] = stored_scale(largest / STEPS[n]);
    }
    let errors = squared_errors(values, scales, [-8.0; 5], [7.0; 5]);
    let scale = least(errors).map_or(half::f16::ZERO, |n| scales[n]);
    let inverse = inverse(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (nearest((value * inverse).clamp(-8.0, 7.0)) + i32::from(ZERO)) as u8;
    }
    GroupParams { scale, zero: ZERO }
}

/// Rounds a group to codes 0 to 15 from near its smallest weight (or 0) to near its largest (or 0). A weight is off by
/// a sixth of the range, `(max − min) / 6`, at most: half a step for its own rounding, half for that of the zero point, and a
/// tenth of the range that is clipped.
#[inline(always)]
pub(crate) fn quantize_with_zero(values: &[f32], codes: &mut [u8]) -> GroupParams {
    let (low, high) = range(values);
    let (mut scales, mut zeros) = ([half::f16::ZERO; 4], [0.0; 4]);
    let (mut first, mut last) = ([0.0; 4], [0.0; 4]);
    for n in 0..4 {
        let (below, above) = SHRINK[n];
        scales[n] = stored_scale((high * above - low * below) / 15.0);
        zeros[n] = nearest((-low * below * inverse(scales[n])).clamp(0.0, 15.0)) as f32;
        (first[n], last[n]) = (-zeros[n], 15.0 - zeros[n]);
    }
    let errors = squared_errors(values, scales, first, last);
    let (scale, zero) = least(errors).map_or((half::f16::ZERO, 0.0), |n| (scales[n], zeros[n]));
    let inverse = inverse(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (nearest((value * inverse).clamp(-zero, 15.0 - zero)) + zero as i32) as u8;
    }
    GroupParams { scale, zero: zero as u8 }
}

/// The smallest and the largest value, 0 among them.
#[inline(always)]
fn range(values: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (whole, rest) = values.as_chunks::<LANES>();
    for values in whole {
        for i in 0..LANES {
            low[i] = less(values[i], low[i]);
            high[i] = more(values[i], high[i]);
        }
    }
    for (i, value) in rest.iter().enumerate() {
        low[i] = less(*value, low[i]);
        high[i] = more(*value, high[i]);
    }
    // In halves, each of which is one operation on vectors.
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            low[i] = less(low[i + half], low[i]);
            high[i] = more(high[i + half], high[i]);
        }
    }
    (low[0], high[0])
}

/// The smaller of two numbers, in one instruction: unlike `min`, it makes no difference of what is not a number.
#[inline(always)]
fn less(value: f32, than: f32) -> f32 {
    if value < than { value } else { than }
}

/// The larger of two numbers, likewise.
#[inline(always)]
pub(super) fn more(value: f32, than: f32) -> f32 {
    if value > than { value } else { than }
}

/// What rounding to whole steps of each scale leaves, from its `first` to its `last`: squared and summed. The sums are in the
/// order of lanes, and one beside the other, as each addition waits for the one before.
#[inline(always)]
fn squared_errors<const N: usize>(values: &[f32], scales: [half::f16; N], first: [f32; N], last: [f32; N]) -> [f32; N] {
    let mut sums = [[0.0f32; LANES]; N];
    for (n, sums) in sums.iter_mut().enumerate() {
        let (step, inverse, first, last) = (scales[n].to_f32(), inverse(scales[n]), first[n], last[n]);
        let off = |value: f32| {
            let off = value - step * nearest_whole((value * inverse).clamp(first, last));
            off * off
        };
        let (whole, rest) = values.as_chunks::<LANES>();
        for values in whole {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += off(*value);
            }
        }
        for (sum, value) in sums.iter_mut().zip(rest) {
            *sum += off(*value);
        }
    }
    let mut totals = [0.0f32; N];
    for lane in 0..LANES {
        for (total, sums) in totals.iter_mut().zip(&sums) {
            *total += sums[lane];
        }
    }
    totals
}

/// The first of the smallest errors; none if all are infinite or no numbers. Without branches, which would be guesses: bits of
/// floats that are not negative are in the order of the floats.
#[inline(always)]
fn least<const N: usize>(errors: [f32; N]) -> Option<usize> {
    const SHIFT: u32 = 3;
    let mut least = u64::from(f32::INFINITY.to_bits()) << SHIFT;
    for (n, error) in errors.iter().enumerate() {
        least = least.min(u64::from(error.to_bits()) << SHIFT | (n as u64 + 1));
    }
    (least as usize & ((1 << SHIFT) - 1)).checked_sub(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::noise;

    /// No weight is off by more than `bound`, and all of them together by no more than the plain steps of `step` would leave.
    fn check(
        values: &[f32],
        bound: f32,
        step: f32,
        quantize: fn(&[f32], &mut [u8]) -> GroupParams,
    ) -> Result<(), TestCaseError> {
        let mut codes = vec![0; values.len()];
        let params = quantize(values, &mut codes);
        // The smallest scale that f16 has, and what rounding a scale to it costs.
        let smallest = 6e-8 * 8.0;
        let mut squared = 0.0;
        for (value, code) in values.iter().zip(codes) {
            prop_assert!(code < 16);
            let off = (params.weight(code) - value).abs();
            prop_assert!(off <= bound * 1.002 + smallest, "{value} {code} {params:?}");
            squared += f64::from(off).powi(2);
        }
        let plain = (f64::from(step) * 1.01 + f64::from(smallest)).powi(2) * values.len() as f64;
        prop_assert!(squared <= plain, "{squared} {plain}");
        Ok(())
    }

    proptest! {
        #[test]
        fn a_weight_comes_back_within_its_bound(len in 1usize..130, exponent in -18i32..10, shift in -1f32..1.0, seed: u64) {
            let size = 2f32.powi(exponent);
            let values: Vec<f32> = noise(len, seed).iter().map(|value| (value + shift) * size).collect();
            let low = values.iter().copied().fold(0.0, f32::min);
            let high = values.iter().copied().fold(0.0, f32::max);
            let largest = high.max(-low);
            check(&values, largest / 4.0, largest / 8.0, quantize)?;
            check(&values, (high - low) / 6.0, (high - low) / 15.0, quantize_with_zero)?;
        }
    }

    #[test]
    fn the_first_of_the_smallest_errors_is_taken() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert_eq!(least([3.0, 1.5, 2.0, 1.5, 9.0]), Some(1));
        assert_eq!(least([0.0, 0.0]), Some(0));
        assert_eq!(least([nan, inf, 1e30, 1e-42]), Some(3));
        assert_eq!(least([inf, nan, inf]), None);
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

    #[test]
    fn all_features_are_placed_as_each_of_them() {
        let codes: Vec<u8> = (0..PANEL * 24).map(|i| (i * 7 + i / 16) as u8 & 15).collect();
        let [mut found, mut wanted] = [(); 2].map(|()| vec![255; panel_bytes(24)]);
        place_all(&mut found, &codes);
        codes.chunks(24).enumerate().for_each(|(lane, codes)| place(&mut wanted, lane, codes));
        assert_eq!(found, wanted);
    }
}
