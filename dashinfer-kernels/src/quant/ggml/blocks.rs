//! Blocks of 32 weights.
//!
//! Codes of 4 bits stand in 16 bytes: the low halves are the codes of the first 16 weights, the high halves those of the others.
//! The fifth bit of weight `i` is bit `i` of a word of 32.

use super::{UNEVEN_STEPS, half};

/// Weights of a block.
pub(super) const LEN: usize = 32;

/// The codes in 16 bytes.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8]) -> [u8; LEN] {
    let mut codes = [0; LEN];
    let (low, high) = codes.split_at_mut(LEN / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
    codes
}

/// The codes in 16 bytes, with fifth bits of four.
#[inline(always)]
fn five_bits(high: &[u8], bytes: &[u8]) -> [u8; LEN] {
    let mut codes = nibbles(bytes);
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((high >> i & 1) as u8) << 4;
    }
    codes
}

/// `[scale: f16][codes: 16]`, `scale · (code − 8)`.
#[inline(always)]
pub(super) fn q4_0(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 0).to_f32();
    for (out, code) in out.iter_mut().zip(q4_0_codes(block)) {
        *out = scale * f32::from(code);
    }
}

/// `[scale: f16][smallest: f16][codes: 16]`, `scale · code + smallest`.
#[inline(always)]
pub(super) fn q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, smallest) = (half(block, 0).to_f32(), half(block, 2).to_f32());
    for (out, code) in out.iter_mut().zip(nibbles(&block[4..])) {
        *out = scale * f32::from(code) + smallest;
    }
}

/// `[scale: f16][fifth bits: 4][codes: 16]`, `scale · (code − 16)`.
#[inline(always)]
pub(super) fn q5_0(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 0).to_f32();
    for (out, code) in out.iter_mut().zip(q5_0_codes(block)) {
        *out = scale * f32::from(code);
    }
}

/// `[scale: f16][smallest: f16][fifth bits: 4][codes: 16]`, `scale · code + smallest`.
#[inline(always)]
pub(super) fn q5_1(block: &[u8], out: &mut [f32]) {
    let (scale, smallest) = (half(block, 0).to_f32(), half(block, 2).to_f32());
    for (out, code) in out.iter_mut().zip(five_bits(&block[4..8], &block[8..])) {
        *out = scale * f32::from(code) + smallest;
    }
}

/// `[scale: f16][codes: 32, signed]`, `scale · code`.
#[inline(always)]
pub(super) fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 0).to_f32();
    for (out, code) in out.iter_mut().zip(&block[2..]) {
        *out = scale * f32::from(code.cast_signed());
    }
}

/// `[scale: f16][codes: 16]`, `scale · steps[code]`.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 0).to_f32();
    for (out, code) in out.iter_mut().zip(iq4_nl_codes(block)) {
        *out = scale * f32::from(code);
    }
}

/// `[exponent: 1, with a bias of 127][codes: 16]`, `2^(exponent − 1) · twice[code]`.
#[inline(always)]
pub(super) fn mxfp4(block: &[u8], out: &mut [f32]) {
    let scale = mxfp4_scale(block);
    for (out, code) in out.iter_mut().zip(mxfp4_codes(block)) {
        *out = scale * f32::from(code);
    }
}

/// The codes of [`q4_0`], less 8.
pub(super) fn q4_0_codes(block: &[u8]) -> [i8; LEN] {
    // A loop: `map` is a function of its own, which has the vectors of whoever calls this only if it is inlined.
    let mut codes = [0; LEN];
    for (to, code) in codes.iter_mut().zip(nibbles(&block[2..])) {
        *to = code.cast_signed() - 8;
    }
    codes
}

/// The codes of [`q5_0`], less 16.
pub(super) fn q5_0_codes(block: &[u8]) -> [i8; LEN] {
    five_bits(&block[2..6], &block[6..]).map(|code| code.cast_signed() - 16)
}

/// The codes of [`q8_0`].
pub(super) fn q8_0_codes(block: &[u8]) -> [i8; LEN] {
    let mut codes = [0; LEN];
    for (code, byte) in codes.iter_mut().zip(&block[2..]) {
        *code = byte.cast_signed();
    }
    codes
}

/// The steps of [`iq4_nl`].
pub(super) fn iq4_nl_codes(block: &[u8]) -> [i8; LEN] {
    nibbles(&block[2..]).map(|code| UNEVEN_STEPS[usize::from(code)])
}

/// Twice the numbers of [`mxfp4`].
pub(super) fn mxfp4_codes(block: &[u8]) -> [i8; LEN] {
    // In place of a table, as vectors have none: 0 to 4 are themselves, and 5, 6 and 7 are 6, 8 and 12.
    nibbles(&block[1..]).map(|code| {
        let size = code & 7;
        let twice = size + size.saturating_sub(4) + 2 * u8::from(size == 7);
        if code > 7 { twice.cast_signed().wrapping_neg() } else { twice.cast_signed() }
    })
}

/// Half the power of two of [`mxfp4`]. The largest exponent is no exception, unlike in the format's own definition: so it is read
/// from GGUF files.
pub(super) fn mxfp4_scale(block: &[u8]) -> f32 {
    match u32::from(block[0]) {
        exponent @ 0..=1 => f32::from_bits(1 << (21 + exponent)), // 2^-128 and 2^-127, below the normal numbers
        exponent => f32::from_bits((exponent - 1) << 23),
    }
}
