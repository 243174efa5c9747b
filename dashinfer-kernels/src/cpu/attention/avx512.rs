//! AVX-512: up to twelve queries by 32 columns, each row's sums in two registers.
//!
//! Sums are those of AVX2 to the bit; weights are not, because their sum has other lanes.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::math::exp2_16;
use super::blocked::{self, BF16, Dots, F16, F32, INT8, Product, Scales, Softened, Tiles, step_bytes};
use super::{Partial, RANGE, Span};

/// See [`blocked::range`].
///
/// # Safety
/// As there; the machine has AVX-512F, BW, DQ and VL.
pub(super) unsafe fn range(span: &Span<'_>, scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::range::<Avx512>(span, scratch, partial) }
}

struct Avx512;

impl Tiles for Avx512 {
    /// 24 sums of the 32 registers, two vectors of the right side, and one value.
    const MAX_ROWS: usize = 12;
    const MAX_ROWS_OF_TWO: usize = 12;

    unsafe fn product<const ELEMENT: u8>(rows: usize, groups: usize, product: &Product<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            if groups == 1 {
                match rows {
                    1 => tile_of::<ELEMENT, 1, 1>(product),
                    2 => tile_of::<ELEMENT, 2, 1>(product),
                    3 => tile_of::<ELEMENT, 3, 1>(product),
                    4 => tile_of::<ELEMENT, 4, 1>(product),
                    5 => tile_of::<ELEMENT, 5, 1>(product),
                    6 => tile_of::<ELEMENT, 6, 1>(product),
                    7 => tile_of::<ELEMENT, 7, 1>(product),
                    8 => tile_of::<ELEMENT, 8, 1>(product),
                    9 => tile_of::<ELEMENT, 9, 1>(product),
                    10 => tile_of::<ELEMENT, 10, 1>(product),
                    11 => tile_of::<ELEMENT, 11, 1>(product),
                    _ => tile_of::<ELEMENT, 12, 1>(product),
                }
            } else {
                match rows {
                    1 => tile_of::<ELEMENT, 1, 2>(product),
                    2 => tile_of::<ELEMENT, 2, 2>(product),
                    3 => tile_of::<ELEMENT, 3, 2>(product),
                    4 => tile_of::<ELEMENT, 4, 2>(product),
                    5 => tile_of::<ELEMENT, 5, 2>(product),
                    6 => tile_of::<ELEMENT, 6, 2>(product),
                    7 => tile_of::<ELEMENT, 7, 2>(product),
                    8 => tile_of::<ELEMENT, 8, 2>(product),
                    9 => tile_of::<ELEMENT, 9, 2>(product),
                    10 => tile_of::<ELEMENT, 10, 2>(product),
                    11 => tile_of::<ELEMENT, 11, 2>(product),
                    _ => tile_of::<ELEMENT, 12, 2>(product),
                }
            }
        }
    }

    const DOT_POSITIONS: usize = 4;
    /// 24 sums, four vectors of the right side, and one of the left.
    const MAX_DOT_ROWS: usize = 6;

    unsafe fn dots<const ELEMENT: u8>(rows: usize, dots: &Dots) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match rows {
                1 => dots_of::<ELEMENT, 1>(dots),
                2 => dots_of::<ELEMENT, 2>(dots),
                3 => dots_of::<ELEMENT, 3>(dots),
                4 => dots_of::<ELEMENT, 4>(dots),
                5 => dots_of::<ELEMENT, 5>(dots),
                _ => dots_of::<ELEMENT, 6>(dots),
            }
        }
    }

    unsafe fn soften(scores: &mut [f32; RANGE], seen: Range<usize>, scales: &Scales<'_>) -> Softened {
        // SAFETY: the caller's promise, passed on.
        unsafe { soften(scores, seen, scales) }
    }
}

/// # Safety
/// As for [`Tiles::product`], with `ROWS` rows and `GROUPS` groups.
#[inline(never)] // as for dense products: a function of its own keeps its sums in registers
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_of<const ELEMENT: u8, const ROWS: usize, const GROUPS: usize>(product: &Product<'_>) {
    let Product { mut a, a_stride, segments, out, out_stride, add } = *product;
    // SAFETY: the caller's promise: row `i < ROWS`, each step of the segments and 16 columns of each group exist. A prefetch
    // reads nothing.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); GROUPS]; ROWS];
        if add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (g, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(out.add(i * out_stride + g * 16));
                }
            }
        }
        /// Step `k` of a segment; `second`: of two steps that share their place.
        macro_rules! step {
            ($segment:ident, $k:expr, $second:literal) => {
                let mut b = [_mm512_setzero_ps(); GROUPS];
                for (b, from) in b.iter_mut().zip($segment.b) {
                    let at = from.add(step_bytes(ELEMENT, $k));
                    if ELEMENT != BF16 || !$second {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset($segment.ahead).cast());
                    }
                    *b = load16::<ELEMENT, $second>(at);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(i * a_stride + $k));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_fmadd_ps(a, b, *sum);
                    }
                }
            };
        }
        for segment in segments {
            for k in (0..segment.steps / 2 * 2).step_by(2) {
                step!(segment, k, false);
                step!(segment, k + 1, true);
            }
            if segment.steps % 2 == 1 {
                let k = segment.steps - 1;
                if segment.second {
                    step!(segment, k, true);
                } else {
                    step!(segment, k, false);
                }
            }
            a = a.add(segment.steps);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (g, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(out.add(i * out_stride + g * 16), *sum);
            }
        }
    }
}

/// # Safety
/// As for [`Tiles::dots`], with `ROWS` rows.
#[inline(never)] // as above
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn dots_of<const ELEMENT: u8, const ROWS: usize>(dots: &Dots) {
    let Dots { a, a_stride, b, groups, group_bytes, ahead, out, out_stride } = *dots;
    // SAFETY: the caller's promise: each group of four positions and of row `i < ROWS` exists, and four outputs of each row. A prefetch
    // reads nothing.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 4]; ROWS];
        for g in 0..groups {
            let at = b.add(g * group_bytes);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(ahead).cast());
            // Four positions of f32 are as many cache lines, of halves two.
            if ELEMENT == F32 {
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(ahead + 64).cast());
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(ahead + 192).cast());
            }
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(ahead + step_bytes(ELEMENT, 2).cast_signed()).cast());
            let [first, third] = [at, at.add(step_bytes(ELEMENT, 2))];
            let [second, fourth] = [first, third].map(|at| at.add(step_bytes(ELEMENT, 1)));
            let b = [
                load16::<ELEMENT, false>(first),
                load16::<ELEMENT, true>(second),
                load16::<ELEMENT, false>(third),
                load16::<ELEMENT, true>(fourth),
            ];
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_loadu_ps(a.add(i * a_stride + g * 16));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                out.add(i * out_stride + p).write(_mm512_reduce_add_ps(*sum));
            }
        }
    }
}

/// 16 elements as f32; `SECOND`: of the second of two steps that share their place.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load16<const ELEMENT: u8, const SECOND: bool>(from: *const u8) -> __m512 {
    // SAFETY: the caller's promise; 16 elements are 64 bytes of f32, and of bf16 with another step's, 32 of f16, 16 of int8 and 8 of uint4.
    unsafe {
        match ELEMENT {
            F32 => _mm512_loadu_ps(from.cast()),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
            BF16 => {
                let pairs = _mm512_loadu_si512(from.cast());
                let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
                let bits = if SECOND { _mm512_and_si512(pairs, upper) } else { _mm512_slli_epi32::<16>(pairs) };
                _mm512_castsi512_ps(bits)
            }
            INT8 => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))),
            _ => {
                let pairs = _mm_loadl_epi64(from.cast());
                // The upper four bits of a byte come from its neighbour, and are cleared.
                let both = _mm_unpacklo_epi64(pairs, _mm_srli_epi64::<4>(pairs));
                let codes = _mm_and_si128(both, _mm_set1_epi8(15));
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes))
            }
        }
    }
}

/// See [`Tiles::soften`].
///
/// # Safety
/// The machine has AVX-512F; the rest as there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn soften(scores: &mut [f32; RANGE], seen: Range<usize>, scales: &Scales<'_>) -> Softened {
    let used = seen.start / 16 * 16..seen.end.next_multiple_of(16);
    let groups = || used.clone().step_by(16);
    // SAFETY: in all loops: 16 scores, and as many scales where there are any, from `at` on lie in the range, whose length is
    // a multiple of 16.
    unsafe {
        if !scales.keys.is_empty() {
            for at in groups() {
                let to = scores.as_mut_ptr().add(at);
                let score = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(scales.keys.as_ptr().add(at)));
                _mm512_storeu_ps(to, score);
            }
        }
        // What is not seen has the weight 2^−∞.
        scores[used.start..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..used.end].fill(f32::NEG_INFINITY);
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for at in groups() {
            max = _mm512_max_ps(max, _mm512_loadu_ps(scores.as_ptr().add(at)));
        }
        let max = _mm512_reduce_max_ps(max);
        let (mut sum, mut offset) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for at in groups() {
            let to = scores.as_mut_ptr().add(at);
            let mut weight = exp2_16(_mm512_sub_ps(_mm512_loadu_ps(to), _mm512_set1_ps(max)));
            sum = _mm512_add_ps(sum, weight);
            if !scales.values.is_empty() {
                if !scales.value_offsets.is_empty() {
                    offset = _mm512_fmadd_ps(weight, _mm512_loadu_ps(scales.value_offsets.as_ptr().add(at)), offset);
                }
                weight = _mm512_mul_ps(weight, _mm512_loadu_ps(scales.values.as_ptr().add(at)));
            }
            _mm512_storeu_ps(to, weight);
        }
        Softened { max, sum: _mm512_reduce_add_ps(sum), offset: _mm512_reduce_add_ps(offset) }
    }
}
