//! Activations as integers: 16 or 8 bits, a scale for each row and group.
//!
//! `x ≈ scale · code`. 16-bit codes reach ±32,512 = 127 · 256, so that they split into a signed high and a signed low byte, for
//! instructions that multiply bytes: `code = 256 · high + low`, both in −128 to 127.

use super::{ActivationBits, Group, Scheme, WeightBits};

/// The largest 16-bit code.
pub(crate) const MAX_16: f32 = 32512.0;
/// The largest 8-bit code.
pub(crate) const MAX_8: f32 = 127.0;

/// Input features that share a scale where 16-bit activations meet weights without groups: the sum of as many products of an 8-bit
/// and a 16-bit code fits 32 bits.
pub(crate) const CHANNEL_GROUP_16: usize = 128;

/// A matrix's input features are padded to whole steps of this many where its weights have no groups.
const CHANNEL_STEP: usize = 128;

/// How the input features of a matrix are cut, both its weights and its activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Input features with their padding.
    pub(crate) padded: usize,
    /// Input features that share an activation's scale: what is summed in integers.
    pub(crate) group: usize,
    /// Groups whose weights have scales of their own: all, or one for the whole row.
    pub(crate) scale_groups: usize,
}

impl Cut {
    pub(crate) fn new(scheme: Scheme, cols: usize) -> Self {
        match (scheme.group(), scheme.activation_bits()) {
            (Some(group), _) => {
                let padded = cols.next_multiple_of(group.size());
                Self { padded, group: group.size(), scale_groups: padded / group.size() }
            }
            (None, ActivationBits::Sixteen) => {
                Self { padded: cols.next_multiple_of(CHANNEL_STEP), group: CHANNEL_GROUP_16, scale_groups: 1 }
            }
            (None, ActivationBits::Eight) => {
                let padded = cols.next_multiple_of(CHANNEL_STEP);
                Self { padded, group: padded, scale_groups: 1 }
            }
        }
    }

    /// Groups of a row of activations.
    pub(crate) fn groups(self) -> usize {
        self.padded.checked_div(self.group).unwrap_or(0)
    }

    /// The most input features for which all sums fit 32 bits.
    pub(crate) fn max_cols(scheme: Scheme) -> usize {
        match (scheme.group(), scheme.activation_bits(), scheme.weight_bits()) {
            (None, ActivationBits::Eight, WeightBits::Eight) => {
                (i32::MAX / (127 * 255)) as usize / CHANNEL_STEP * CHANNEL_STEP
            }
            _ => usize::MAX >> 8,
        }
    }
}

const _: () = assert!(CHANNEL_GROUP_16 as i64 * 255 * 32512 <= i32::MAX as i64, "codes of 8 and 16 bits");
const _: () = assert!(Group::G128.size() as i64 * 255 * 32512 <= i32::MAX as i64, "codes of 8 and 16 bits");

/// What to multiply the codes of a group by, and its values by to get them, with codes up to `max`. Without a number among `x`, or with
/// an infinite one, the scale is not a number either, so that the product tells.
#[inline(always)]
pub(crate) fn scale(x: &[f32], max: f32) -> (f32, f32) {
    const LANES: usize = 16;
    let (mut largest, mut poison) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (whole, rest) = x.as_chunks::<LANES>();
    for lanes in whole {
        for i in 0..LANES {
            largest[i] = largest[i].max(lanes[i].abs());
            poison[i] += lanes[i] * 0.0;
        }
    }
    for (i, x) in rest.iter().enumerate() {
        largest[i] = largest[i].max(x.abs());
        poison[i] += x * 0.0;
    }
    scale_of(largest.into_iter().fold(0.0, f32::max), poison.into_iter().sum(), max)
}

/// [`scale`] of values of which `largest` is the largest in size; `poison` is 0, or not a number if one of them is none.
#[inline(always)]
pub(crate) fn scale_of(largest: f32, poison: f32, max: f32) -> (f32, f32) {
    let inverse = max / largest;
    // Of zeros, and of numbers so small that they are nothing beside all others.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    (largest / max + poison, inverse)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::nearest;
    use crate::random::noise;

    proptest! {
        #[test]
        fn a_value_comes_back_within_half_a_step(len in 1usize..150, exponent in -40i32..40, seed: u64) {
            let size = 2f32.powi(exponent);
            let x: Vec<f32> = noise(len, seed).iter().map(|value| value * size).collect();
            let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            for max in [MAX_8, MAX_16] {
                let (scale, inverse) = scale(&x, max);
                for x in &x {
                    let code = nearest(x * inverse);
                    prop_assert!(code.abs() as f32 <= max);
                    prop_assert!((scale * code as f32 - x).abs() <= largest / max * 0.51, "{x} {code} {scale}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_hidden() {
        for (x, finite) in [(0.0, true), (1e-44, true), (f32::NAN, false), (f32::INFINITY, false)] {
            for place in [0, 17, 39] {
                let mut row = [0.0; 40];
                row[place] = x;
                assert_eq!(scale(&row, MAX_16).0.is_finite(), finite, "{x} at {place}");
            }
        }
    }
}
