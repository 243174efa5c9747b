//! AVX2: up to six queries by 16 columns, or three by 32, each row's sums in two or four registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::math::{exp2_8, max8, sum8};
use super::blocked::{self, BF16, Dots, F16, F32, INT8, Product, Scales, Softened, Tiles, step_bytes};
use super::{Partial, RANGE, Span};

/// See [`blocked::range`].
///
/// # Safety
/// As there; the machine has AVX2, FMA and F16C.
pub(super) unsafe fn range(span: &Span<'_>, scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::range::<Avx2>(span, scratch, partial) }
}

struct Avx2;

impl Tiles for Avx2 {
    /// Twelve sums, two vectors of the right side, and one value.
    const MAX_ROWS: usize = 6;
    /// Twelve sums again. Two groups of one to three rows have the independent chains that hide a multiply-add's latency.
    const MAX_ROWS_OF_TWO: usize = 3;

    unsafe fn product<const ELEMENT: u8>(rows: usize, groups: usize, product: &Product<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match (rows, groups) {
                (1, 1) => tile_of::<ELEMENT, 1, 1>(product),
                (2, 1) => tile_of::<ELEMENT, 2, 1>(product),
                (3, 1) => tile_of::<ELEMENT, 3, 1>(product),
                (4, _) => tile_of::<ELEMENT, 4, 1>(product),
                (5, _) => tile_of::<ELEMENT, 5, 1>(product),
                (6, _) => tile_of::<ELEMENT, 6, 1>(product),
                (1, _) => tile_of::<ELEMENT, 1, 2>(product),
                (2, _) => tile_of::<ELEMENT, 2, 2>(product),
                _ => tile_of::<ELEMENT, 3, 2>(product),
            }
        }
    }

    const DOT_POSITIONS: usize = 2;
    /// Twelve sums, two vectors of the right side, and one of the left.
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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const ELEMENT: u8, const ROWS: usize, const GROUPS: usize>(product: &Product<'_>) {
    let Product { mut a, a_stride, segments, out, out_stride, add } = *product;
    // SAFETY: the caller's promise: row `i < ROWS`, each step of the segments and 16 columns of each group exist. A prefetch
    // reads nothing.
    unsafe {
        let mut sums = [[[_mm256_setzero_ps(); 2]; GROUPS]; ROWS];
        if add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (g, sums) in sums.iter_mut().enumerate() {
                    let from = out.add(i * out_stride + g * 16);
                    *sums = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
                }
            }
        }
        /// Step `k` of a segment; `second`: of two steps that share their place.
        macro_rules! step {
            ($segment:ident, $k:expr, $second:literal) => {
                for g in 0..GROUPS {
                    let at = $segment.b[g].add(step_bytes(ELEMENT, $k));
                    if ELEMENT != BF16 || !$second {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset($segment.ahead).cast());
                    }
                    let [low, high] = load16::<ELEMENT, $second>(at);
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let a = _mm256_broadcast_ss(&*a.add(i * a_stride + $k));
                        sums[g][0] = _mm256_fmadd_ps(a, low, sums[g][0]);
                        sums[g][1] = _mm256_fmadd_ps(a, high, sums[g][1]);
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
            for (g, sums) in sums.iter().enumerate() {
                let to = out.add(i * out_stride + g * 16);
                _mm256_storeu_ps(to, sums[0]);
                _mm256_storeu_ps(to.add(8), sums[1]);
            }
        }
    }
}

/// # Safety
/// As for [`Tiles::dots`], with `ROWS` rows.
#[inline(never)] // as above
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_of<const ELEMENT: u8, const ROWS: usize>(dots: &Dots) {
    let Dots { a, a_stride, b, groups, group_bytes, ahead, out, out_stride } = *dots;
    // SAFETY: the caller's promise: each group of two positions and of row `i < ROWS` exists, and two outputs of each row. A prefetch
    // reads nothing.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        for g in 0..groups {
            let at = b.add(g * group_bytes);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(ahead).cast());
            if ELEMENT == F32 {
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_offset(ahead + 64).cast());
            }
            let [first, second] =
                [load16::<ELEMENT, false>(at), load16::<ELEMENT, true>(at.add(step_bytes(ELEMENT, 1)))];
            for half in 0..2 {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_loadu_ps(a.add(i * a_stride + g * 16 + half * 8));
                    sums[0] = _mm256_fmadd_ps(a, first[half], sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, second[half], sums[1]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                out.add(i * out_stride + p).write(sum8(*sum));
            }
        }
    }
}

/// 16 elements as f32; `SECOND`: of the second of two steps that share their place.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load16<const ELEMENT: u8, const SECOND: bool>(from: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise; 16 elements are 64 bytes of f32, and of bf16 with another step's, 32 of f16, 16 of int8 and 8 of uint4.
    unsafe {
        match ELEMENT {
            F32 => [_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.cast::<f32>().add(8))],
            F16 => [0, 1].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(from.cast::<__m128i>().add(half)))),
            BF16 => [0, 1].map(|half| {
                let pairs = _mm256_loadu_si256(from.cast::<__m256i>().add(half));
                let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
                let bits = if SECOND { _mm256_and_si256(pairs, upper) } else { _mm256_slli_epi32::<16>(pairs) };
                _mm256_castsi256_ps(bits)
            }),
            INT8 => [0, 8].map(|half| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(half).cast())))),
            _ => {
                let pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
                let low = _mm256_and_si256(pairs, _mm256_set1_epi32(15));
                [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(pairs))]
            }
        }
    }
}

/// See [`Tiles::soften`].
///
/// # Safety
/// The machine has AVX2 and FMA; the rest as there.
#[target_feature(enable = "avx2,fma")]
unsafe fn soften(scores: &mut [f32; RANGE], seen: Range<usize>, scales: &Scales<'_>) -> Softened {
    let used = seen.start / 8 * 8..seen.end.next_multiple_of(8);
    let groups = || used.clone().step_by(8);
    // SAFETY: in all loops: eight scores, and as many scales where there are any, from `at` on lie in the range, whose length
    // is a multiple of eight.
    unsafe {
        if !scales.keys.is_empty() {
            for at in groups() {
                let to = scores.as_mut_ptr().add(at);
                let score = _mm256_mul_ps(_mm256_loadu_ps(to), _mm256_loadu_ps(scales.keys.as_ptr().add(at)));
                _mm256_storeu_ps(to, score);
            }
        }
        // What is not seen has the weight 2^−∞.
        scores[used.start..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..used.end].fill(f32::NEG_INFINITY);
        let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
        for at in groups() {
            max = _mm256_max_ps(max, _mm256_loadu_ps(scores.as_ptr().add(at)));
        }
        let max = max8(max);
        let (mut sum, mut offset) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for at in groups() {
            let to = scores.as_mut_ptr().add(at);
            let mut weight = exp2_8(_mm256_sub_ps(_mm256_loadu_ps(to), _mm256_set1_ps(max)));
            sum = _mm256_add_ps(sum, weight);
            if !scales.values.is_empty() {
                if !scales.value_offsets.is_empty() {
                    offset = _mm256_fmadd_ps(weight, _mm256_loadu_ps(scales.value_offsets.as_ptr().add(at)), offset);
                }
                weight = _mm256_mul_ps(weight, _mm256_loadu_ps(scales.values.as_ptr().add(at)));
            }
            _mm256_storeu_ps(to, weight);
        }
        Softened { max, sum: sum8(sum), offset: sum8(offset) }
    }
}
