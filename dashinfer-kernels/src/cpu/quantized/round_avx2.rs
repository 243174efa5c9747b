//! Rounding activations with AVX2: sixteen at a time. The codes are those of the definition, to the bit.

use std::arch::x86_64::*;

use super::activations::{GATHERED, Operand, Row};
use crate::quant::activations as rounding;

/// See [`Row::round_group`], for all groups of a row.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn row(row: &Row<'_>, codes: &mut [u8], scales: &mut [f32], corrections: &mut [i32]) {
    let mut gathered = GATHERED;
    for (group, (scale, correction)) in scales.iter_mut().zip(corrections).enumerate() {
        let x = row.group(group, &mut gathered);
        let whole = x.len() == row.cut.group && row.cut.group.is_multiple_of(16);
        (*scale, *correction) = if whole && row.operand != Operand::Planes {
            round(row, group, x, codes)
        } else {
            row.round_group(group, x, codes)
        };
    }
}

/// A group of whole sixteens, in words or bytes.
#[target_feature(enable = "avx2")]
fn round(row: &Row<'_>, group: usize, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    let x = x.as_chunks::<16>().0;
    let load = |x: &[f32; 16]| {
        // SAFETY: sixteen values are two vectors.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    };
    let sign = _mm256_set1_ps(-0.0);
    let mut largest = [_mm256_setzero_ps(); 2];
    // Times 0, what is not a number or infinite is not a number.
    let mut poison = [_mm256_setzero_ps(); 2];
    for x in x {
        for ((largest, poison), x) in largest.iter_mut().zip(&mut poison).zip(load(x)) {
            *largest = _mm256_max_ps(*largest, _mm256_andnot_ps(sign, x));
            *poison = _mm256_add_ps(*poison, _mm256_mul_ps(x, _mm256_setzero_ps()));
        }
    }
    let lanes = |of: [__m256; 2]| {
        let mut lanes = [0.0f32; 16];
        // SAFETY: sixteen values are two vectors.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), of[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(8), of[1]);
        }
        lanes
    };
    let largest = lanes([_mm256_max_ps(largest[0], largest[1]), _mm256_setzero_ps()]).into_iter().fold(0.0, f32::max);
    let poison = lanes([_mm256_add_ps(poison[0], poison[1]), _mm256_setzero_ps()]).into_iter().sum();
    let (scale, inverse) = rounding::scale_of(largest, poison, row.max());

    let inverse = _mm256_set1_ps(inverse);
    let mut sums = _mm256_setzero_si256();
    let first = group * row.cut.group;
    let size = if row.operand == Operand::Words { 2 } else { 1 };
    let to = codes[first * size..(first + row.cut.group) * size].as_mut_ptr();
    for (i, x) in x.iter().enumerate() {
        let [low, high] = load(x).map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
        // Packing works within the halves of a vector, so quarters are put in order behind it.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
        // SAFETY: the sixteen codes lie among those of the group.
        unsafe {
            if row.operand == Operand::Words {
                let places = _mm256_shufflehi_epi16::<0b11_01_10_00>(_mm256_shufflelo_epi16::<0b11_01_10_00>(words));
                _mm256_storeu_si256(to.add(i * 32).cast(), places);
            } else {
                let bytes = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packs_epi16(words, words));
                _mm_storeu_si128(to.add(i * 16).cast(), _mm256_castsi256_si128(bytes));
            }
        }
    }
    let mut sum = [0i32; 8];
    // SAFETY: eight values are one vector.
    unsafe { _mm256_storeu_si256(sum.as_mut_ptr().cast(), sums) };
    (scale, row.correction(sum.into_iter().fold(0, i32::wrapping_add)))
}
