//! AVX-512 VNNI: up to twelve rows by one panel, a row's sums in one register.
//!
//! `vpdpwssd` multiplies pairs of 16-bit integers and adds them to 32-bit sums, 32 products an instruction; `vpdpbusd` four unsigned
//! bytes with four signed ones, 64 products. Both take a row's activations straight from memory, broadcast.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocked::{self, BYTES, CARRY, CODES_4, CODES_8, Tile, Tiles, WORDS, ZEROS, ahead_bytes, code_bytes};
use super::{Job, Operand, Output};
use crate::Scheme;
use crate::quant::{ActivationBits, PANEL};

/// Bytes for 8-bit activations, words for 16-bit ones.
pub(super) fn operand(scheme: Scheme) -> Operand {
    match scheme.activation_bits() {
        ActivationBits::Eight => Operand::Bytes,
        ActivationBits::Sixteen => Operand::Words,
    }
}

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has AVX-512F, BW, VL and VNNI.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::product::<Avx512Vnni>(job, rows, panels, out) }
}

struct Avx512Vnni;

impl Tiles for Avx512Vnni {
    const LAYOUTS: [u8; 2] = [WORDS, BYTES];
    /// Enough chains to hide the latency of two products a cycle, and room for as many sums in f32 beside them.
    const MAX_ROWS: usize = 12;
    /// 16 KiB of bytes.
    const PART: usize = 1024;
    /// Unpacking takes one or two instructions beside those of twelve rows.
    const WIDEN_FROM: Option<usize> = None;

    unsafe fn widen<const X: u8, const CODES: u8>(_: *const u8, _: usize, _: *mut u8) {
        unreachable!("codes are unpacked in registers");
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
                6 => tile_of::<X, CODES, FLAGS, 6>(tile),
                7 => tile_of::<X, CODES, FLAGS, 7>(tile),
                8 => tile_of::<X, CODES, FLAGS, 8>(tile),
                9 => tile_of::<X, CODES, FLAGS, 9>(tile),
                10 => tile_of::<X, CODES, FLAGS, 10>(tile),
                11 => tile_of::<X, CODES, FLAGS, 11>(tile),
                _ => tile_of::<X, CODES, FLAGS, 12>(tile),
            }
        }
    }
}

/// Steps of eight input features: with [`WORDS`], the even ones and the odd ones of each quad; with bytes, each quad.
const fn steps(x: u8) -> usize {
    if x == WORDS { 4 } else { 2 }
}

/// The codes of step `step` of eight input features.
///
/// # Safety
/// The codes of eight input features can be read at `codes`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<const X: u8, const CODES: u8>(codes: *const u8, step: usize) -> __m512i {
    let load = |at: usize| {
        // SAFETY: `at` is a place of 64 bytes within those of eight input features.
        unsafe { _mm512_loadu_si512(codes.add(at).cast()) }
    };
    let (byte, nibble, nibbles) = (_mm512_set1_epi16(0xff), _mm512_set1_epi16(15), _mm512_set1_epi8(15));
    match (X, CODES, step) {
        (WORDS, CODES_8, 0 | 2) => _mm512_and_si512(load(step * 32), byte),
        (WORDS, CODES_8, _) => _mm512_srli_epi16::<8>(load((step - 1) * 32)),
        (WORDS, CODES_4, 0) => _mm512_and_si512(load(0), nibble),
        (WORDS, CODES_4, 1) => _mm512_and_si512(_mm512_srli_epi16::<8>(load(0)), nibble),
        (WORDS, CODES_4, 2) => _mm512_and_si512(_mm512_srli_epi16::<4>(load(0)), nibble),
        (WORDS, _, _) => _mm512_srli_epi16::<12>(load(0)),
        (_, CODES_4, 0) => _mm512_and_si512(load(0), nibbles),
        (_, CODES_4, _) => _mm512_and_si512(_mm512_srli_epi16::<4>(load(0)), nibbles),
        _ => load(step * 64),
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
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

    let mut out = [_mm512_setzero_ps(); ROWS];
    for (i, out) in out.iter_mut().enumerate() {
        *out = load(&tile.start(i));
    }
    let (group, first_group) = if carry { (ks.len().max(1), 0) } else { (cut.group, ks.start / cut.group.max(1)) };
    for (index, k) in ks.clone().step_by(group).enumerate() {
        let index = first_group + index;
        let mut dots = [_mm512_setzero_si512(); ROWS];
        if carry && k > 0 {
            for (dots, out) in dots.iter_mut().zip(&out) {
                // What the parts before have summed stands in the output.
                *dots = _mm512_castps_si512(*out);
            }
        } else if !zeros {
            for (i, dots) in dots.iter_mut().enumerate() {
                // SAFETY: there is one for each row and group.
                *dots = _mm512_set1_epi32(unsafe { *corrections.add(i * groups + index) });
            }
        }
        let weights = tile.weights.wrapping_add(code_bytes(X, CODES, k - ks.start));
        let ahead = tile.ahead.wrapping_add(ahead_bytes(CODES, k - ks.start));
        let codes = codes.wrapping_add(k * size);
        for k in (0..group).step_by(8) {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(code_bytes(X, CODES, k)).cast());
            if CODES == CODES_8 {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(code_bytes(X, CODES, k) + 64).cast());
            }
            for step in 0..steps(X) {
                // SAFETY: the codes of a group exist, in the weights and in `ROWS` rows of `x`.
                unsafe {
                    let pack = unpack::<X, CODES>(weights.add(code_bytes(X, CODES, k)), step);
                    let x = codes.add(k * size + step * 4);
                    for (i, dots) in dots.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(x.add(i * stride).cast::<i32>().read_unaligned());
                        *dots = if X == WORDS {
                            _mm512_dpwssd_epi32(*dots, pack, x)
                        } else {
                            _mm512_dpbusd_epi32(*dots, pack, x)
                        };
                    }
                }
            }
        }
        if carry && !tile.is_last() {
            for (out, dots) in out.iter_mut().zip(&dots) {
                *out = _mm512_castsi512_ps(*dots);
            }
            continue;
        }
        if carry {
            out = [load(&weight.panel_bias(tile.panel)); ROWS];
        }
        // SAFETY: 16 scales of 16 bits are one vector; so are 16 zero points of 8 bits.
        let (weight_scales, zero_points) = unsafe {
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(weight.scales(tile.panel, index).as_ptr().cast()));
            let zeros = if zeros {
                _mm512_cvtepu8_epi32(_mm_loadu_si128(weight.zeros(tile.panel, index).as_ptr().cast()))
            } else {
                _mm512_setzero_si512()
            };
            (scales, zeros)
        };
        for (i, (out, dots)) in out.iter_mut().zip(&dots).enumerate() {
            // SAFETY: there is one of each for each row and group.
            let (scale, correction) = unsafe {
                let at = i * groups + index;
                (_mm512_set1_ps(*scales.add(at)), _mm512_set1_epi32(*corrections.add(at)))
            };
            let dot = if zeros { _mm512_add_epi32(*dots, _mm512_mullo_epi32(zero_points, correction)) } else { *dots };
            *out = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(weight_scales, scale), *out);
        }
    }
    for (i, out) in out.iter().enumerate() {
        let mut values = [0.0; PANEL];
        // SAFETY: `values` holds 16 values; the tile gives this thread these columns of these rows.
        unsafe {
            _mm512_storeu_ps(values.as_mut_ptr(), *out);
            tile.out.store(tile.row + i, tile.panel, &values);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; PANEL]) -> __m512 {
    // SAFETY: there are 16 values.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}
