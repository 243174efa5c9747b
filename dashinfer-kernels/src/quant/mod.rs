//! Quantized weights: which schemes there are, and the layout, the rounding and the bound of each.
//!
//! In all of them a weight is a small unsigned integer, a *code*: `w = scale · (code − zero)`, with a scale (and a zero point, if
//! the scheme has one) for each output feature or for each group of input features. Activations are rounded to 16 or 8 bits
//! beside them ([`activations`]), so that a product is a sum of integers, exact in any order, and one multiply-add for each group.
//!
//! Codes of 16 output features stand together, a *panel*, and within it four input features of each, a *quad*: that is the tile
//! which AVX2, AVX-512 VNNI, AMX and Arm's dot products eat without moving a byte.

pub(crate) mod activations;
mod compensation;
mod ggml;
pub(crate) mod int4;
pub(crate) mod int8;
mod scheme;
pub(crate) mod stored;

use half::f16;

pub use compensation::{CompensatedCodes, ForEach, InputSums, can_compensate, compensate};
pub use ggml::{BlockFormat, BlockMatrix};
pub(crate) use scheme::{ActivationBits, WeightBits};
pub use scheme::{Group, Scheme, UnknownScheme};
pub use stored::{CodeBits, CodeLayout, CodeWords, GroupedCodes, StoredMatrix};

/// Output features of a panel.
pub(crate) const PANEL: usize = 16;

/// How the codes of one group are to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GroupParams {
    pub(crate) scale: f16,
    pub(crate) zero: u8,
}

impl GroupParams {
    /// The weight that `code` stands for.
    pub(crate) fn weight(self, code: u8) -> f32 {
        self.scale.to_f32() * (i32::from(code) - i32::from(self.zero)) as f32
    }
}

/// The nearest scale that can be stored for one that is not: never zero unless `scale` is (which `largest / 127` can be where the
/// largest weight is not), never infinite.
#[inline(always)]
pub(crate) fn stored_scale(scale: f32) -> f16 {
    let stored = f16::from_f32(scale.clamp(-65504.0, 65504.0));
    if stored == f16::ZERO && scale != 0.0 {
        f16::MIN_POSITIVE_SUBNORMAL.copysign(f16::from_f32(scale))
    } else {
        stored
    }
}

/// What weights are multiplied by to be whole steps of a stored scale; 0 of a scale of 0, so that all of them are none.
#[inline(always)]
pub(crate) fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}

/// The nearest integer, ties to even; of a number below 2²² in size. What is not a number gives some integer.
///
/// Adding [`SHIFT`] leaves no bits for fractions. Unlike a conversion, that is one instruction on every machine.
#[inline(always)]
pub(crate) fn nearest(value: f32) -> i32 {
    (value + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()).cast_signed()
}

/// [`nearest`], as the number that it is.
#[inline(always)]
pub(crate) fn nearest_whole(value: f32) -> f32 {
    (value + SHIFT) - SHIFT
}

/// 1.5 · 2²³: what [`nearest`] adds. Numbers of its size have no bits for fractions, so that one below 2²² in size is rounded, and
/// stands in the lowest bits of the sum.
pub(crate) const SHIFT: f32 = 12_582_912.0;
