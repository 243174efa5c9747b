//! Rounding activations with NEON: sixteen at a time. The codes are those of the definition, to the bit.

use std::arch::aarch64::*;

use super::activations::{GATHERED, Operand, Row};
use crate::quant::activations as rounding;

/// See [`Row::round_group`], for all groups of a row.
///
/// # Safety
/// The machine has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn row(row: &Row<'_>, codes: &mut [u8], scales: &mut [f32], corrections: &mut [i32]) {
    let mut gathered = GATHERED;
    for (group, (scale, correction)) in scales.iter_mut().zip(corrections).enumerate() {
        let x = row.group(group, &mut gathered);
        let whole = x.len() == row.cut.group && row.cut.group.is_multiple_of(16);
        (*scale, *correction) = if whole { round(row, group, x, codes) } else { row.round_group(group, x, codes) };
    }
}

/// A group of whole sixteens.
#[target_feature(enable = "neon")]
fn round(row: &Row<'_>, group: usize, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    let x = x.as_chunks::<16>().0;
    let load = |x: &[f32; 16]| {
        // SAFETY: sixteen values are four vectors.
        unsafe { [0, 4, 8, 12].map(|at| vld1q_f32(x.as_ptr().add(at))) }
    };
    let mut largest = [vdupq_n_f32(0.0); 4];
    // Times 0, what is not a number or infinite is not a number.
    let mut poison = [vdupq_n_f32(0.0); 4];
    for x in x {
        for ((largest, poison), x) in largest.iter_mut().zip(&mut poison).zip(load(x)) {
            // Of a number and what is none, the number, as `f32::max`.
            *largest = vmaxnmq_f32(*largest, vabsq_f32(x));
            *poison = vaddq_f32(*poison, vmulq_f32(x, vdupq_n_f32(0.0)));
        }
    }
    let largest = vmaxnmq_f32(vmaxnmq_f32(largest[0], largest[1]), vmaxnmq_f32(largest[2], largest[3]));
    let poison = vaddq_f32(vaddq_f32(poison[0], poison[1]), vaddq_f32(poison[2], poison[3]));
    let (scale, inverse) = rounding::scale_of(vmaxnmvq_f32(largest), vaddvq_f32(poison), row.max());

    let mut sums = vdupq_n_s32(0);
    let (first, padded) = (group * row.cut.group, row.cut.padded);
    let size = if row.operand == Operand::Words { 2 } else { 1 };
    // A row of planes has room for as many bytes once more.
    let all = if row.operand == Operand::Planes { 2 * padded } else { size * padded };
    let to = codes[..all][first * size..].as_mut_ptr();
    // Words in the order 0 2 1 3.
    let order: [u8; 16] = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15];
    // SAFETY: they are sixteen bytes.
    let order = unsafe { vld1q_u8(order.as_ptr()) };
    for (i, x) in x.iter().enumerate() {
        let [a, b, c, d] = load(x).map(|x| vcvtnq_s32_f32(vmulq_n_f32(x, inverse)));
        sums = vaddq_s32(sums, vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)));
        let words = [(a, b), (c, d)].map(|(low, high)| vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
        // SAFETY: the sixteen codes lie among those of the group: words, or bytes, of planes once more `padded` bytes behind.
        unsafe {
            match row.operand {
                Operand::Words => {
                    for (half, words) in words.into_iter().enumerate() {
                        let places = vqtbl1q_u8(vreinterpretq_u8_s16(words), order);
                        vst1q_u8(to.add(i * 32 + half * 16), places);
                    }
                }
                Operand::Bytes => {
                    vst1q_s8(to.add(i * 16).cast(), vcombine_s8(vqmovn_s16(words[0]), vqmovn_s16(words[1])));
                }
                Operand::Planes => {
                    // A code less its signed low byte, over 256, is that fraction rounded up from a half on.
                    let [high, low] = [words.map(|word| vrshrn_n_s16::<8>(word)), words.map(|word| vmovn_s16(word))];
                    vst1q_s8(to.add(i * 16).cast(), vcombine_s8(high[0], high[1]));
                    vst1q_s8(to.add(padded + i * 16).cast(), vcombine_s8(low[0], low[1]));
                }
            }
        }
    }
    (scale, row.correction(vaddvq_s32(sums)))
}
