//! Blocks of 256 weights in parts of 16 or 32, each with a small integer scale beside the block's own.
//!
//! Codes of two bits: in each half of 128 weights, weight `32 s + i` is bits `2 s` and `2 s + 1` of byte `i` of 32.
//! Codes of four: in each quarter of 64, the low and then the high halves of 32 bytes.

use half::f16;

use super::{UNEVEN_STEPS, blocks, half};

/// Weights of a block.
pub(super) const LEN: usize = 256;

/// The two-bit codes of part `part` of sixteen, in 64 bytes.
#[inline(always)]
fn two_bits(bytes: &[u8], part: usize) -> [u8; 16] {
    let (start, shift) = (part / 8 * 32 + part % 2 * 16, part % 8 / 2 * 2);
    taken(&bytes[start..], shift, 3)
}

/// The four-bit codes of part `part` of eight, in 128 bytes.
#[inline(always)]
fn nibbles(bytes: &[u8], part: usize) -> [u8; 32] {
    taken(&bytes[part / 2 * 32..], part % 2 * 4, 15)
}

/// The bits of `mask` of each byte, shifted down by `shift` before.
#[inline(always)]
fn taken<const N: usize>(bytes: &[u8], shift: usize, mask: u8) -> [u8; N] {
    let mut codes = [0; N];
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> shift & mask;
    }
    codes
}

/// The scale and the smallest weight of part `part` of eight, 6 bits each, of 12 bytes: those of the first four parts are the low bits
/// of bytes 0 to 3 and 4 to 7; of the others, bytes 8 to 11 hold four bits each, and the two above are left over in the former.
#[inline(always)]
fn scale_and_min(bytes: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        return (bytes[part] & 63, bytes[part + 4] & 63);
    }
    let low = bytes[part + 4];
    (low & 15 | bytes[part - 4] >> 6 << 4, low >> 4 | bytes[part] >> 6 << 4)
}

/// `[scales and minima: 16, 4 bits each][codes: 64][scale: f16][scale of minima: f16]`.
#[inline(always)]
pub(super) fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (half(block, 80).to_f32(), half(block, 82).to_f32());
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        let of_part = block[part];
        let (scale, min) = (scale * f32::from(of_part & 15), min * f32::from(of_part >> 4));
        for (out, code) in out.iter_mut().zip(two_bits(&block[16..80], part)) {
            *out = scale * f32::from(code) - min;
        }
    }
}

/// `[third bits, inverted: 32][codes: 64][scales: 12, 6 bits each][scale: f16]`. Bit `i / 32` of byte `i % 32` is set unless 4 is to be
/// taken off. Of scale `p`, the low four bits are a half of byte `p % 8`, the two above in byte `8 + p % 4`.
#[inline(always)]
pub(super) fn q3_k(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 108).to_f32();
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = scale * f32::from(q3_k_scale(block, part));
        for (out, code) in out.iter_mut().zip(q3_k_part(block, part)) {
            *out = scale * f32::from(code);
        }
    }
}

/// The scale of part `part` of sixteen, −32 to 31.
fn q3_k_scale(block: &[u8], part: usize) -> i8 {
    let bytes = &block[96..108];
    let low = bytes[part % 8] >> (part / 8 * 4) & 15;
    let high = bytes[8 + part % 4] >> (part / 4 * 2) & 3;
    (low | high << 4).cast_signed() - 32
}

/// The codes of part `part` of sixteen, −4 to 3.
#[inline(always)]
fn q3_k_part(block: &[u8], part: usize) -> [i8; 16] {
    let kept: [u8; 16] = taken(&block[part % 2 * 16..], part / 2, 1);
    let mut codes = [0; 16];
    for ((code, low), kept) in codes.iter_mut().zip(two_bits(&block[32..96], part)).zip(kept) {
        *code = (low | kept << 2).cast_signed() - 4;
    }
    codes
}

/// `[scale: f16][scale of minima: f16][scales and minima: 12][codes: 128]`.
#[inline(always)]
pub(super) fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (half(block, 0).to_f32(), half(block, 2).to_f32());
    for ((pair, out), bytes) in out.as_chunks_mut::<64>().0.iter_mut().enumerate().zip(block[16..].as_chunks::<32>().0)
    {
        let mut params = [(0.0, 0.0); 2];
        for (i, params) in params.iter_mut().enumerate() {
            let (of_part, min_of_part) = scale_and_min(&block[4..16], 2 * pair + i);
            *params = (scale * f32::from(of_part), min * f32::from(min_of_part));
        }
        let [(low_scale, low_min), (high_scale, high_min)] = params;
        let (low, high) = out.split_at_mut(32);
        // Shifts of known widths, as few machines shift bytes by others.
        for i in 0..32 {
            low[i] = low_scale * f32::from(bytes[i] & 15) - low_min;
            high[i] = high_scale * f32::from(bytes[i] >> 4) - high_min;
        }
    }
}

/// `[scale: f16][scale of minima: f16][scales and minima: 12][fifth bits: 32][codes: 128]`. The fifth bit of weight `i` is bit `i / 32`
/// of byte `i % 32`.
#[inline(always)]
pub(super) fn q5_k(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (half(block, 0).to_f32(), half(block, 2).to_f32());
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (of_part, min_of_part) = scale_and_min(&block[4..16], part);
        let (scale, min) = (scale * f32::from(of_part), min * f32::from(min_of_part));
        let high: [u8; 32] = taken(&block[16..48], part, 1);
        for ((out, low), high) in out.iter_mut().zip(nibbles(&block[48..], part)).zip(high) {
            *out = scale * f32::from(low | high << 4) - min;
        }
    }
}

/// `[low four bits: 128][high two bits: 64][scales: 16, signed][scale: f16]`. In each half of 128 weights, the low bits are the low and
/// then the high halves of 64 bytes.
#[inline(always)]
pub(super) fn q6_k(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 208).to_f32();
    let mut scales = [0.0; 16];
    for (out, of_part) in scales.iter_mut().zip(&block[192..208]) {
        *out = scale * f32::from(of_part.cast_signed());
    }
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low, high) = (&block[half * 64..][..64], &block[128 + half * 32..][..32]);
        let (parts, scales) = (out.as_chunks_mut::<16>().0, &scales[half * 8..][..8]);
        // Each with shifts of known widths, as few machines shift bytes by others.
        for i in 0..2 {
            let (first, second, high) = (&low[i * 16..][..16], &low[32 + i * 16..][..16], &high[i * 16..][..16]);
            for j in 0..16 {
                parts[i][j] = scales[i] * six_bits(first[j] & 15, high[j] << 4 & 0x30);
                parts[2 + i][j] = scales[2 + i] * six_bits(second[j] & 15, high[j] << 2 & 0x30);
                parts[4 + i][j] = scales[4 + i] * six_bits(first[j] >> 4, high[j] & 0x30);
                parts[6 + i][j] = scales[6 + i] * six_bits(second[j] >> 4, high[j] >> 2 & 0x30);
            }
        }
    }
}

/// A code of [`q6_k`], −32 to 31.
#[inline(always)]
fn six_bits(low: u8, high: u8) -> f32 {
    f32::from((low | high).cast_signed() - 32)
}

/// `[scale: f16][high two bits of scales: 2][low four bits of scales: 4][codes: 128]`. In each part of 32 weights, the low and then the
/// high halves of 16 bytes name steps.
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8], out: &mut [f32]) {
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let scale = iq4_xs_group_scale(block, part * 32);
        for (out, code) in out.iter_mut().zip(iq4_xs_codes(block, part * 32)) {
            *out = scale * f32::from(code);
        }
    }
}

/// The scale of part `part` of eight, −32 to 31.
fn iq4_xs_scale(block: &[u8], part: usize) -> i8 {
    let low = block[4 + part / 2] >> (part % 2 * 4) & 15;
    let high = block[2 + part / 4] >> (part % 4 * 2) & 3;
    (low | high << 4).cast_signed() - 32
}

/// Products of a part's scale and a code of [`q3_k`], with the sign of the block's scale changed: they reach from −124 to 128, and so these
/// from −128 to 124. For the 32 weights from `first` on, two parts.
pub(super) fn q3_k_codes(block: &[u8], first: usize) -> [i8; 32] {
    let mut codes = [0; 32];
    for (part, codes) in (first / 16..).zip(codes.chunks_exact_mut(16)) {
        let scale = q3_k_scale(block, part);
        for (out, code) in codes.iter_mut().zip(q3_k_part(block, part)) {
            // 128 becomes −128 on the way, and stays it.
            *out = scale.wrapping_mul(code).wrapping_neg();
        }
    }
    codes
}

/// The scale of [`q3_k_codes`].
pub(super) fn q3_k_group_scale(block: &[u8]) -> f16 {
    -half(block, 108)
}

/// The steps of [`iq4_xs`], for the 32 weights from `first` on, a part.
pub(super) fn iq4_xs_codes(block: &[u8], first: usize) -> [i8; 32] {
    blocks::nibbles(&block[8 + first / 2..][..16]).map(|code| UNEVEN_STEPS[usize::from(code)])
}

/// The scale of [`iq4_xs_codes`].
pub(super) fn iq4_xs_group_scale(block: &[u8], first: usize) -> f32 {
    half(block, 0).to_f32() * f32::from(iq4_xs_scale(block, first / 32))
}
