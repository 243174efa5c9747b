//! Words of 4-bit codes into panels: moved as they are, without a byte for each code on the way.
//!
//! A word of a panel has eight input features of one output feature, with those that are four apart in one byte
//! ([`int4`](crate::quant::int4)).

use crate::quant::PANEL;
use crate::quant::stored::{CodeWords, IN_WORD};

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
use sse2::two_octets;

/// Bytes of eight input features of a panel.
const OCTET: usize = 4 * PANEL;

/// Input features that are moved for one panel before the next: with those of all panels, they stay in the L1 cache.
const STRETCH: usize = 64;

/// Fills neighbouring panels whose rows are all there, from row `first_row` on of the matrix whose words these are, a multiple
/// of 8. `panels`: the codes of each, of `cols` input features, a multiple of 8, and perhaps more, which stay what they are.
pub(super) fn place(words: &CodeWords<'_>, first_row: usize, cols: usize, panels: &mut [&mut [u8]]) {
    for first in (0..cols).step_by(STRETCH) {
        let octets = first / IN_WORD..cols.min(first + STRETCH) / IN_WORD;
        for (number, panel) in panels.iter_mut().enumerate() {
            let row = first_row + number * PANEL;
            let to = &mut panel[octets.start * OCTET..octets.end * OCTET];
            match *words {
                CodeWords::OfPlaces { bytes, octet, row: 1 } => {
                    for (i, to) in octets.clone().zip(to.chunks_exact_mut(OCTET)) {
                        let words = &bytes[4 * (i * octet + row)..][..OCTET];
                        for (to, word) in to.as_chunks_mut().0.iter_mut().zip(words.as_chunks().0) {
                            *to = in_panel_order(u32::from_le_bytes(*word)).to_le_bytes();
                        }
                    }
                }
                CodeWords::OfPlaces { bytes, octet, row: step } => {
                    for lane in 0..PANEL {
                        for (i, to) in octets.clone().zip(to.chunks_exact_mut(OCTET)) {
                            let word = word(bytes, i * octet + (row + lane) * step);
                            to[4 * lane..][..4].copy_from_slice(&in_panel_order(word).to_le_bytes());
                        }
                    }
                }
                CodeWords::OfFeatures { bytes, col } => {
                    let first = octets.start * IN_WORD * col + row / IN_WORD;
                    of_features(bytes.get(4 * first..).unwrap_or_default(), col, to);
                }
            }
        }
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let at = &bytes[4 * index..][..4];
    u32::from_le_bytes([at[0], at[1], at[2], at[3]])
}

/// The codes 0 to 7 of a word in the order 0 4 1 5 2 6 3 7.
#[inline(always)]
fn in_panel_order(word: u32) -> u32 {
    // Of four bytes the middle ones change places, then of each two bytes the middle halves.
    let word = word & 0xff00_00ff | (word & 0x0000_ff00) << 8 | word >> 8 & 0x0000_ff00;
    word & 0xf00f_f00f | (word & 0x00f0_00f0) << 4 | word >> 4 & 0x00f0_00f0
}

/// Octets of input features of a panel: two words for each input feature, the next ones `step` words behind.
fn of_features(words: &[u8], step: usize, to: &mut [u8]) {
    let from = |octet: usize| &words[4 * octet * IN_WORD * step..];
    let (pairs, rest) = to.as_chunks_mut();
    for (i, pair) in pairs.iter_mut().enumerate() {
        two_octets(from(2 * i), step, pair);
    }
    if !rest.is_empty() {
        octet(from(2 * pairs.len()), step, rest);
    }
}

#[cfg(not(all(feature = "x86", target_arch = "x86_64")))]
fn two_octets(words: &[u8], step: usize, to: &mut [u8; 2 * OCTET]) {
    let (first, second) = to.split_at_mut(OCTET);
    octet(words, step, first);
    octet(&words[4 * IN_WORD * step..], step, second);
}

/// One of them.
fn octet(words: &[u8], step: usize, to: &mut [u8]) {
    for (half, to) in to.chunks_exact_mut(OCTET / 2).enumerate() {
        transpose(std::array::from_fn(|i| word(words, i * step + half)), to);
    }
}

/// Transposes words of eight input features into those of eight output features.
fn transpose(words: [u32; IN_WORD], to: &mut [u8]) {
    const LOW: u32 = 0x0f0f_0f0f;
    // Those that are four apart share their bytes: output features 0 4 1 5, and 2 6 3 7.
    let even: [_; 4] = std::array::from_fn(|i| (words[i] & LOW | (words[i + 4] & LOW) << 4).to_le_bytes());
    let odd: [_; 4] = std::array::from_fn(|i| (words[i] >> 4 & LOW | words[i + 4] & !LOW).to_le_bytes());
    for (bytes, features) in [(even, [0, 4, 1, 5]), (odd, [2, 6, 3, 7])] {
        for (at, feature) in features.into_iter().enumerate() {
            to[4 * feature..][..4].copy_from_slice(&bytes.map(|bytes| bytes[at]));
        }
    }
}

/// With vectors that every x86-64 has.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod sse2 {
    use std::arch::x86_64::*;

    use super::{IN_WORD, OCTET};

    /// [`octet`](super::octet), of sixteen input features and both octets of a panel.
    pub(super) fn two_octets(words: &[u8], step: usize, to: &mut [u8; 2 * OCTET]) {
        // Without wrapping: the step is anybody's number.
        let end = (2 * IN_WORD - 1).checked_mul(step).and_then(|last| last.checked_add(2)?.checked_mul(4));
        assert!(end.is_some_and(|end| end <= words.len()), "words of all input features");
        let load = |i: usize| {
            // SAFETY: SSE2 is part of x86-64; of lines 0 to 15, the two words lie before the end that was asserted.
            unsafe { _mm_loadl_epi64(words.as_ptr().add(4 * i * step).cast()) }
        };
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let columns: [_; IN_WORD] = std::array::from_fn(|i| _mm_unpacklo_epi64(load(i), load(i + IN_WORD)));
            let low = _mm_set1_epi8(15);
            let (mut even, mut odd) = ([_mm_setzero_si128(); 4], [_mm_setzero_si128(); 4]);
            for i in 0..4 {
                let (first, second) = (columns[i], columns[i + 4]);
                even[i] = _mm_or_si128(_mm_and_si128(first, low), _mm_slli_epi16::<4>(_mm_and_si128(second, low)));
                odd[i] = _mm_or_si128(_mm_and_si128(_mm_srli_epi16::<4>(first), low), _mm_andnot_si128(low, second));
            }
            let [even, odd] = [gathered(even), gathered(odd)];
            for (i, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                let (even, odd) = (_mm_castsi128_ps(even), _mm_castsi128_ps(odd));
                // Features 0 4 1 5 and 2 6 3 7 become 0 1 2 3 and 4 5 6 7.
                let at = &mut to[32 * i..][..32];
                _mm_storeu_ps(at.as_mut_ptr().cast(), _mm_shuffle_ps::<0b10_00_10_00>(even, odd));
                _mm_storeu_ps(at[16..].as_mut_ptr().cast(), _mm_shuffle_ps::<0b11_01_11_01>(even, odd));
            }
        }
    }

    /// Byte `i` of each of four vectors as word `i` of the four that come out.
    #[inline(always)]
    fn gathered([a, b, c, d]: [__m128i; 4]) -> [__m128i; 4] {
        // SAFETY: as above.
        unsafe {
            let [low, high] = [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)];
            let [other_low, other_high] = [_mm_unpacklo_epi8(c, d), _mm_unpackhi_epi8(c, d)];
            [
                _mm_unpacklo_epi16(low, other_low),
                _mm_unpackhi_epi16(low, other_low),
                _mm_unpacklo_epi16(high, other_high),
                _mm_unpackhi_epi16(high, other_high),
            ]
        }
    }
}

/// The place of a feature in a word of [`CodeWords::OfFeatures`].
#[cfg(test)]
pub(super) const PLACES: [usize; IN_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::int4;
    use crate::random::SplitMix64;

    proptest! {
        #[test]
        fn words_give_the_codes_that_they_hold(
            panels in 1usize..4, before in 0usize..3, octets in 1usize..20, order in 0usize..3, seed: u64,
        ) {
            let (rows, cols) = ((panels + before) * PANEL, octets * IN_WORD);
            let mut random = SplitMix64(seed);
            let codes: Vec<u8> = (0..rows * cols).map(|_| random.bits() as u8 & 15).collect();
            let mut words = vec![0u32; rows * octets];
            for (i, code) in codes.iter().enumerate() {
                let (row, col, code) = (i / cols, i % cols, u32::from(*code));
                match order {
                    0 => words[col / 8 * rows + row] |= code << (4 * (col % 8)),
                    1 => words[row * octets + col / 8] |= code << (4 * (col % 8)),
                    _ => words[col * (rows / 8) + row / 8] |= code << (4 * PLACES[row % 8]),
                }
            }
            let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
            let words = match order {
                0 => CodeWords::OfPlaces { bytes: &bytes, octet: rows, row: 1 },
                1 => CodeWords::OfPlaces { bytes: &bytes, octet: 1, row: octets },
                _ => CodeWords::OfFeatures { bytes: &bytes, col: rows / 8 },
            };
            let size = int4::panel_bytes(cols);
            let mut packed = vec![0; panels * size];
            let first = before * PANEL;
            place(&words, first, cols, &mut packed.chunks_mut(size).collect::<Vec<_>>());
            for row in first..rows {
                for col in 0..cols {
                    let found = int4::code(&packed[(row - first) / PANEL * size..], row % PANEL, col);
                    prop_assert_eq!(found, codes[row * cols + col], "{} {}", row, col);
                }
            }
        }
    }

    /// So far apart that the bytes of all of them are 4 by a multiplication that wraps.
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    #[test]
    #[should_panic(expected = "words of all input features")]
    fn words_beyond_all_memory_are_not_read() {
        sse2::two_octets(&[0; 128], usize::MAX / 15, &mut [0; 2 * OCTET]);
    }

    #[test]
    fn without_vectors_words_are_transposed_too() {
        let mut random = SplitMix64(1);
        let words: [u32; 8] = std::array::from_fn(|_| random.bits() as u32);
        let mut found = [0; OCTET / 2];
        transpose(words, &mut found);
        for (feature, place) in PLACES.into_iter().enumerate() {
            for (col, word) in words.into_iter().enumerate() {
                assert_eq!(int4::code(&found, feature, col), (word >> (4 * place)) as u8 & 15);
            }
        }
    }
}
