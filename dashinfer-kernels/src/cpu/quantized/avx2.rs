//! AVX2: up to six rows by one panel, sums of pairs in 32 bits or, where codes are small enough, in 16.
//!
//! *Words.* Masks and shifts turn a quad of codes into pairs of 16-bit integers, two vectors of eight output features, and `pmaddwd`
//! multiplies them with pairs of activations: 16 products an instruction, twice as many as multiply-adds in f32.
//!
//! *Bytes.* `pmaddubsw` multiplies 4-bit codes with 8-bit activations, 32 products an instruction. A pair of products is below 3,811
//! in size, so eight of them are summed in 16 bits: 32 input features, the smallest group.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2_dot::{Sums, bytes, words};
use super::blocked::{self, BYTES, CARRY, CODES_4, CODES_8, Tile, Tiles, WIDE, WORDS, ZEROS, ahead_bytes, code_bytes};
use super::{Job, Operand, Output};
use crate::Scheme;
use crate::quant::{ActivationBits, PANEL, WeightBits};

/// Bytes where 16 bits hold sums of their products.
pub(super) fn operand(scheme: Scheme) -> Operand {
    match (scheme.activation_bits(), scheme.weight_bits()) {
        (ActivationBits::Eight, WeightBits::Four) => Operand::Bytes,
        _ => Operand::Words,
    }
}

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has AVX2, FMA and F16C.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::product::<Avx2>(job, rows, panels, out) }
}

struct Avx2;

impl Tiles for Avx2 {
    const LAYOUTS: [u8; 2] = [WORDS, BYTES];
    /// 6 × 2 accumulators, two vectors of codes, a broadcast and a product fill the 16 registers.
    const MAX_ROWS: usize = 6;
    /// 16 KiB of words.
    const PART: usize = 512;
    const WIDEN_FROM: Option<usize> = Some(3);

    unsafe fn widen<const X: u8, const CODES: u8>(from: *const u8, len: usize, to: *mut u8) {
        // SAFETY: the caller's promise, passed on.
        unsafe { widen::<X, CODES>(from, len, to) }
    }

    unsafe fn tile<const X: u8, const CODES: u8, const FLAGS: u8>(rows: usize, tile: &Tile<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match rows {
                1 => tile_of::<X, CODES, FLAGS, 1>(tile),
                2 => tile_of::<X, CODES, FLAGS, 2>(tile),
                3 => tile_of::<X, CODES, FLAGS, 3>(tile),
                4 => tile_of::<X, CODES, FLAGS, 4>(tile),
                5 => tile_of::<X, CODES, FLAGS, 5>(tile),
                _ => tile_of::<X, CODES, FLAGS, 6>(tile),
            }
        }
    }
}

/// Steps of eight input features: with [`WORDS`], the pairs of the even ones and those of the odd ones of each quad; with [`BYTES`],
/// each quad.
const fn steps(x: u8) -> usize {
    if x == WORDS { 4 } else { 2 }
}

/// The codes of step `step` of eight input features, for both halves of a panel.
///
/// # Safety
/// The codes of eight input features can be read at `codes`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const X: u8, const CODES: u8>(codes: *const u8, step: usize) -> [__m256i; 2] {
    [0, 32].map(|half| {
        let load = |at: usize| {
            // SAFETY: `at` is a place of 64 bytes within those of eight input features.
            unsafe { _mm256_loadu_si256(codes.add(at + half).cast()) }
        };
        match (X, CODES, step) {
            (WORDS, CODES_8, 0 | 2) => _mm256_and_si256(load(step * 32), _mm256_set1_epi16(0xff)),
            (WORDS, CODES_8, _) => _mm256_srli_epi16::<8>(load((step - 1) * 32)),
            (WORDS, CODES_4, 0) => _mm256_and_si256(load(0), _mm256_set1_epi16(15)),
            (WORDS, CODES_4, 1) => _mm256_and_si256(_mm256_srli_epi16::<8>(load(0)), _mm256_set1_epi16(15)),
            (WORDS, CODES_4, 2) => _mm256_and_si256(_mm256_srli_epi16::<4>(load(0)), _mm256_set1_epi16(15)),
            (WORDS, CODES_4, _) => _mm256_srli_epi16::<12>(load(0)),
            (BYTES, CODES_4, 0) => _mm256_and_si256(load(0), _mm256_set1_epi8(15)),
            (BYTES, CODES_4, _) => _mm256_and_si256(_mm256_srli_epi16::<4>(load(0)), _mm256_set1_epi8(15)),
            _ => load(step * 64),
        }
    })
}

/// See [`Tiles::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2")]
unsafe fn widen<const X: u8, const CODES: u8>(from: *const u8, len: usize, to: *mut u8) {
    for k in (0..len).step_by(8) {
        for step in 0..steps(X) {
            // SAFETY: eight input features from `k` on exist on both sides; `to` is aligned to a cache line.
            unsafe {
                let [first, second] = unpack::<X, CODES>(from.add(code_bytes(X, CODES, k)), step);
                let to = to.add(code_bytes(X, WIDE, k) + step * 64).cast::<__m256i>();
                _mm256_store_si256(to, first);
                _mm256_store_si256(to.add(1), second);
            }
        }
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const X: u8, const CODES: u8, const FLAGS: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let (weight, x, ks) = (tile.job.weight, tile.job.x, tile.ks.clone());
    let cut = weight.cut();
    let (carry, zeros) = (FLAGS & CARRY != 0, FLAGS & ZEROS != 0);
    let size = if X == WORDS { 2 } else { 1 };
    let stride = cut.padded * size;
    let codes = x.codes(tile.row)[..stride * ROWS].as_ptr();
    // One for each row and group.
    let (groups, scales, corrections) = (cut.groups(), x.scales(tile.row), x.corrections(tile.row));
    let (scales, corrections) = (scales[..groups * ROWS].as_ptr(), corrections[..groups * ROWS].as_ptr());

    let mut out = [[_mm256_setzero_ps(); 2]; ROWS];
    for (i, out) in out.iter_mut().enumerate() {
        *out = load(&tile.start(i));
    }
    let (group, first_group) = if carry { (ks.len().max(1), 0) } else { (cut.group, ks.start / cut.group.max(1)) };
    for (index, k) in ks.clone().step_by(group).enumerate() {
        let index = first_group + index;
        // SAFETY: the codes of a group from `k` on exist, in the weights and in `ROWS` rows of `x`.
        let dots = unsafe {
            let weights = tile.weights.add(code_bytes(X, CODES, k - ks.start));
            let ahead = tile.ahead.wrapping_add(ahead_bytes(CODES, k - ks.start));
            dots::<X, CODES, ROWS>(weights, codes.add(k * size), stride, group, ahead)
        };
        let weight_scales = weight.scales(tile.panel, index);
        // SAFETY: 16 scales of 16 bits are two vectors of eight.
        let weight_scales = unsafe {
            [0, 1].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(weight_scales.as_ptr().cast::<__m128i>().add(half))))
        };
        let zero_points = if zeros {
            let bytes = weight.zeros(tile.panel, index);
            // SAFETY: 16 bytes are one vector; the upper half of them is within it.
            unsafe {
                let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
                [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
            }
        } else {
            [_mm256_setzero_si256(); 2]
        };
        for (i, (out, dots)) in out.iter_mut().zip(&dots.0).enumerate() {
            // SAFETY: there is one of each for each row and group.
            let (scale, correction) = unsafe {
                let at = i * groups + index;
                (_mm256_broadcast_ss(&*scales.add(at)), _mm256_set1_epi32(*corrections.add(at)))
            };
            for half in 0..2 {
                let dot = if carry && k > 0 {
                    // What the parts before have summed stands in the output.
                    _mm256_add_epi32(dots[half], _mm256_castps_si256(out[half]))
                } else if zeros {
                    _mm256_add_epi32(dots[half], _mm256_mullo_epi32(zero_points[half], correction))
                } else {
                    _mm256_add_epi32(dots[half], correction)
                };
                let start = if carry { load(&weight.panel_bias(tile.panel))[half] } else { out[half] };
                out[half] = if carry && !tile.is_last() {
                    _mm256_castsi256_ps(dot)
                } else {
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(weight_scales[half], scale), start)
                };
            }
        }
    }
    for (i, out) in out.iter().enumerate() {
        store(tile, i, *out);
    }
}

/// The sums of products over `len` input features, a multiple of 32.
///
/// # Safety
/// AVX2. Codes `CODES` of as many input features can be read at `weights`, and as many activations in each of `ROWS` rows at `x`,
/// `stride` bytes apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const X: u8, const CODES: u8, const ROWS: usize>(
    weights: *const u8,
    x: *const u8,
    stride: usize,
    len: usize,
    ahead: *const u8,
) -> Sums {
    let mut sums = Sums([[_mm256_setzero_si256(); 2]; 6]);
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match (X, CODES) {
            (WORDS, WIDE) => words::<ROWS>(weights, x, stride, len / 16, ahead, &mut sums),
            (WORDS, _) => stream_words::<CODES, ROWS>(weights, x, stride, len, ahead, &mut sums),
            (_, WIDE) => {
                let (ones, mut short) = (_mm256_set1_epi16(1), Sums([[_mm256_setzero_si256(); 2]; 6]));
                for k in (0..len).step_by(32) {
                    let ahead = ahead.wrapping_add(ahead_bytes(CODES, k));
                    bytes::<ROWS>(weights.add(code_bytes(X, CODES, k)), x.add(k), stride, 1, ahead, &mut short);
                    widen_sums::<ROWS>(&mut sums, &short, ones);
                }
            }
            _ => stream_bytes::<CODES, ROWS>(weights, x, stride, len, ahead, &mut sums),
        }
    }
    sums
}

/// Adds the 16-bit sums of `short` in pairs to those of `sums`.
#[inline]
#[target_feature(enable = "avx2")]
fn widen_sums<const ROWS: usize>(sums: &mut Sums, short: &Sums, ones: __m256i) {
    for (sums, short) in sums.0.iter_mut().zip(&short.0).take(ROWS) {
        for half in 0..2 {
            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(short[half], ones));
        }
    }
}

/// [`dots`] in words, for few rows, unpacking codes as they stream in.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn stream_words<const CODES: u8, const ROWS: usize>(
    weights: *const u8,
    x: *const u8,
    stride: usize,
    len: usize,
    ahead: *const u8,
    sums: &mut Sums,
) {
    for k in (0..len).step_by(8) {
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(code_bytes(WORDS, CODES, k)).cast());
        if CODES == CODES_8 {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(code_bytes(WORDS, CODES, k) + 64).cast());
        }
        for step in 0..steps(WORDS) {
            // SAFETY: eight input features from `k` on can be read.
            unsafe {
                let pairs = unpack::<WORDS, CODES>(weights.add(code_bytes(WORDS, CODES, k)), step);
                for (i, sums) in sums.0.iter_mut().enumerate().take(ROWS) {
                    let x = _mm256_set1_epi32(x.add(i * stride + k * 2 + step * 4).cast::<i32>().read_unaligned());
                    for half in 0..2 {
                        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs[half], x));
                    }
                }
            }
        }
    }
}

/// [`dots`] in bytes, for few rows, unpacking codes as they stream in.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn stream_bytes<const CODES: u8, const ROWS: usize>(
    weights: *const u8,
    x: *const u8,
    stride: usize,
    len: usize,
    ahead: *const u8,
    sums: &mut Sums,
) {
    let ones = _mm256_set1_epi16(1);
    for first in (0..len).step_by(32) {
        let mut short = Sums([[_mm256_setzero_si256(); 2]; 6]);
        for k in (first..first + 32).step_by(8) {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(code_bytes(BYTES, CODES, k)).cast());
            for step in 0..steps(BYTES) {
                // SAFETY: eight input features from `k` on can be read.
                unsafe {
                    let bytes = unpack::<BYTES, CODES>(weights.add(code_bytes(BYTES, CODES, k)), step);
                    for (i, short) in short.0.iter_mut().enumerate().take(ROWS) {
                        let x = _mm256_set1_epi32(x.add(i * stride + k + step * 4).cast::<i32>().read_unaligned());
                        for half in 0..2 {
                            short[half] = _mm256_add_epi16(short[half], _mm256_maddubs_epi16(bytes[half], x));
                        }
                    }
                }
            }
        }
        widen_sums::<ROWS>(sums, &short, ones);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32; PANEL]) -> [__m256; 2] {
    // SAFETY: there are 16 values.
    unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
}

/// Writes the panel's columns of row `i` of the tile.
#[inline]
#[target_feature(enable = "avx2")]
fn store(tile: &Tile<'_>, i: usize, sums: [__m256; 2]) {
    let mut values = [0.0; PANEL];
    // SAFETY: `values` holds 16 values; the tile gives this thread these columns of these rows.
    unsafe {
        _mm256_storeu_ps(values.as_mut_ptr(), sums[0]);
        _mm256_storeu_ps(values.as_mut_ptr().add(8), sums[1]);
        tile.out.store(tile.row + i, tile.panel, &values);
    }
}
