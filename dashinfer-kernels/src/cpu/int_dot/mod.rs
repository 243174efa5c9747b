//! Exact dot products of integers: unsigned weights of 8 or 4 bits by rows of signed 8-bit activations. What products of
//! quantized weights are made of; none uses it yet.
//!
//! Weights stand in panels of 16 output features. A panel is a run of *quads*, four steps of `k` each, so that an
//! instruction which sums four products finds them side by side:
//!
//! | weights | a quad |
//! |---|---|
//! | 8 bits | 64 bytes `[16][4]`: the four steps of each column |
//! | 4 bits | 32 bytes `[16][2]`: of column `c`, byte `j` holds step `j` in its low half and step `j + 2` in its high half |
//!
//! Activations of 16 bits are two rows, `x = 256 · high + low`: integers are exact, so their dot products may be added later.

#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod dotprod;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod i8mm;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod neon;
mod scalar;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod sve;

use super::isa::{Isa, Variant};
use super::linear::PANEL;

/// Rows that a call takes at most.
pub(crate) const MAX_ROWS: usize = 8;
/// Steps of `k` that a call takes at most: `255 · 128 · 32,768` is within i32.
pub(crate) const MAX_STEPS: usize = 1 << 15;

/// Bits of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bits {
    /// Values 0 to 255.
    Eight,
    /// Values 0 to 15.
    Four,
}

impl Bits {
    /// Bytes of 16 columns by four steps.
    pub(crate) const fn quad_bytes(self) -> usize {
        match self {
            Self::Eight => PANEL * 4,
            Self::Four => PANEL * 2,
        }
    }
}

/// Rows of activations, and the weights of one panel at the same steps of `k`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group<'a> {
    x: &'a [&'a [i8]],
    weights: &'a [u8],
    bits: Bits,
}

impl<'a> Group<'a> {
    /// All rows of `x` have as many steps as `weights`.
    pub(crate) fn new(x: &'a [&'a [i8]], weights: &'a [u8], bits: Bits) -> Self {
        let steps = weights.len() / bits.quad_bytes() * 4;
        assert!(steps <= MAX_STEPS && weights.len() == steps / 4 * bits.quad_bytes(), "weights are whole quads");
        assert!((1..=MAX_ROWS).contains(&x.len()) && x.iter().all(|x| x.len() == steps), "rows are as long as weights");
        Self { x, weights, bits }
    }
}

#[cfg(all(feature = "arm", target_arch = "aarch64"))]
impl Group<'_> {
    fn quads(&self) -> usize {
        self.weights.len() / self.bits.quad_bytes()
    }

    /// The weights from column `first` of the first quad on.
    fn part(&self, first: usize) -> *const u8 {
        self.weights.as_ptr().wrapping_add(first * self.bits.quad_bytes() / PANEL)
    }
}

/// `(group, out)`; `out` has as many rows as the group.
pub(crate) type Dots = unsafe fn(&Group<'_>, &mut [[i32; PANEL]]);

pub(crate) static VARIANTS: &[Variant<Dots>] = &[
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Sve, run: sve::dots },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::I8mm, run: i8mm::dots },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::DotProd, run: dotprod::dots },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Neon, run: neon::dots },
    Variant { isa: Isa::Scalar, run: scalar::dots },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::supported;
    use crate::random::SplitMix64;
    use proptest::prelude::*;

    fn check(x: &[Vec<i8>], weights: &[u8], bits: Bits) {
        let x: Vec<&[i8]> = x.iter().map(Vec::as_slice).collect();
        let group = Group::new(&x, weights, bits);
        let mut want = vec![[-1; PANEL]; x.len()];
        scalar::dots(&group, &mut want);
        for v in supported(VARIANTS) {
            let mut out = vec![[-1; PANEL]; x.len()];
            // SAFETY: `out` has the group's rows, and `supported` returns only what this machine has.
            unsafe { (v.run)(&group, &mut out) };
            assert_eq!(out, want, "{:?} {bits:?}, {} rows of {} steps", v.isa, x.len(), x[0].len());
        }
    }

    proptest! {
        // Up to 40 quads leave every tail, and cross the longest run of products that a variant sums in 16 bits.
        #[test]
        fn every_variant_agrees_with_scalar(rows in 1..=MAX_ROWS, quads in 0usize..40, four: bool, seed: u64) {
            let bits = if four { Bits::Four } else { Bits::Eight };
            let mut random = SplitMix64(seed);
            let mut byte = || random.bits().to_le_bytes()[7];
            let x: Vec<Vec<i8>> = (0..rows).map(|_| (0..quads * 4).map(|_| byte().cast_signed()).collect()).collect();
            let weights: Vec<u8> = (0..quads * bits.quad_bytes()).map(|_| byte()).collect();
            check(&x, &weights, bits);
        }
    }

    #[test]
    fn the_longest_group_of_extremes_is_exact() {
        for bits in [Bits::Four, Bits::Eight] {
            for (x, w) in [(-128, 255), (127, 255), (-128, 0), (127, 0)] {
                let weights = vec![w; MAX_STEPS / 4 * bits.quad_bytes()];
                for rows in [1, 2, 4, 8] {
                    check(&vec![vec![x; MAX_STEPS]; rows], &weights, bits);
                }
            }
        }
    }

    #[test]
    fn the_scalar_one_reads_the_layout() {
        let x: &[i8] = &[1, 10, 100, -1];
        let mut out = [[0; PANEL]];
        let mut eight = [0; 64];
        eight[4..8].copy_from_slice(&[9, 8, 7, 6]);
        scalar::dots(&Group::new(&[x], &eight, Bits::Eight), &mut out);
        assert_eq!(out[0][..3], [0, 9 + 80 + 700 - 6, 0]);
        let mut four = [0; 32];
        four[2..4].copy_from_slice(&[0x79, 0x68]);
        scalar::dots(&Group::new(&[x], &four, Bits::Four), &mut out);
        assert_eq!(out[0][..3], [0, 9 + 80 + 700 - 6, 0]);
    }
}
