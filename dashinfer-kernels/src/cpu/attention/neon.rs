//! NEON: up to five queries by 16 columns, or two by 32, each row's sums in four or eight registers.
//!
//! Scores, and the sums of values by equal weights, are those of AVX2 to the bit; weights are not, because their sum has other lanes.

use std::arch::aarch64::*;
use std::ops::Range;

use super::super::linear::prefetch;
use super::super::math::exp2_4;
use super::blocked::{self, BF16, Dots, F16, F32, INT8, Product, Scales, Softened, Tiles, step_bytes};
use super::{Partial, RANGE, Span};

/// See [`blocked::range`].
///
/// # Safety
/// As there; the machine has NEON.
pub(super) unsafe fn range(span: &Span<'_>, scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::range::<Neon>(span, scratch, partial) }
}

struct Neon;

impl Tiles for Neon {
    /// 20 sums, four steps of each row, and four vectors of the right side. With six rows the compiler spills where elements are converted.
    const MAX_ROWS: usize = 5;
    /// 16 sums; 24 would be spilled too. Two groups of one or two rows have the independent chains that hide a multiply-add's latency.
    const MAX_ROWS_OF_TWO: usize = 2;

    unsafe fn product<const ELEMENT: u8>(rows: usize, groups: usize, product: &Product<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match (rows, groups) {
                (1, 1) => tile_of::<ELEMENT, 1, 1>(product),
                (2, 1) => tile_of::<ELEMENT, 2, 1>(product),
                (1, _) => tile_of::<ELEMENT, 1, 2>(product),
                (2, _) => tile_of::<ELEMENT, 2, 2>(product),
                (3, _) => tile_of::<ELEMENT, 3, 1>(product),
                (4, _) => tile_of::<ELEMENT, 4, 1>(product),
                _ => tile_of::<ELEMENT, 5, 1>(product),
            }
        }
    }

    const DOT_POSITIONS: usize = 2;
    /// 16 sums, eight vectors of the right side, and one of the left.
    const MAX_DOT_ROWS: usize = 8;

    unsafe fn dots<const ELEMENT: u8>(rows: usize, dots: &Dots) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match rows {
                1 => dots_of::<ELEMENT, 1>(dots),
                2 => dots_of::<ELEMENT, 2>(dots),
                3 => dots_of::<ELEMENT, 3>(dots),
                4 => dots_of::<ELEMENT, 4>(dots),
                5 => dots_of::<ELEMENT, 5>(dots),
                6 => dots_of::<ELEMENT, 6>(dots),
                7 => dots_of::<ELEMENT, 7>(dots),
                _ => dots_of::<ELEMENT, 8>(dots),
            }
        }
    }

    unsafe fn soften(scores: &mut [f32; RANGE], seen: Range<usize>, scales: &Scales<'_>) -> Softened {
        // SAFETY: the caller's promise, passed on.
        unsafe { soften(scores, seen, scales) }
    }
}

/// The sums of a tile: for each row and group of columns, four vectors.
type Sums<const ROWS: usize, const GROUPS: usize> = [[[float32x4_t; 4]; GROUPS]; ROWS];

/// # Safety
/// As for [`Tiles::product`], with `ROWS` rows and `GROUPS` groups.
#[inline(never)] // as for dense products: a function of its own keeps its sums in registers
#[target_feature(enable = "neon")]
unsafe fn tile_of<const ELEMENT: u8, const ROWS: usize, const GROUPS: usize>(product: &Product<'_>) {
    let Product { mut a, a_stride, segments, out, out_stride, add } = *product;
    // SAFETY: the caller's promise: row `i < ROWS`, each step of the segments and 16 columns of each group exist.
    unsafe {
        let mut sums: Sums<ROWS, GROUPS> = [[[vdupq_n_f32(0.0); 4]; GROUPS]; ROWS];
        if add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (g, sums) in sums.iter_mut().enumerate() {
                    *sums = load16::<F32, false>(out.add(i * out_stride + g * 16).cast());
                }
            }
        }
        for segment in segments {
            let whole = segment.steps / 4 * 4;
            for k in (0..whole).step_by(4) {
                for b in segment.b.iter().take(GROUPS) {
                    let ahead = b.wrapping_add(step_bytes(ELEMENT, k)).wrapping_offset(segment.ahead);
                    (0..step_bytes(ELEMENT, 4)).step_by(64).for_each(|line| prefetch(ahead.wrapping_add(line)));
                }
                // Four steps of a row in one load, of which a multiply-add takes its lane for nothing, as in dense products.
                let mut a4 = [vdupq_n_f32(0.0); ROWS];
                for (i, a4) in a4.iter_mut().enumerate() {
                    *a4 = vld1q_f32(a.add(i * a_stride + k));
                }
                step::<ELEMENT, 0, false, ROWS, GROUPS>(&mut sums, &a4, &segment.b, k);
                step::<ELEMENT, 1, true, ROWS, GROUPS>(&mut sums, &a4, &segment.b, k + 1);
                step::<ELEMENT, 2, false, ROWS, GROUPS>(&mut sums, &a4, &segment.b, k + 2);
                step::<ELEMENT, 3, true, ROWS, GROUPS>(&mut sums, &a4, &segment.b, k + 3);
            }
            for k in whole..segment.steps {
                let mut a1 = [vdupq_n_f32(0.0); ROWS];
                for (i, a1) in a1.iter_mut().enumerate() {
                    *a1 = vdupq_n_f32(*a.add(i * a_stride + k));
                }
                if segment.second || k % 2 == 1 {
                    step::<ELEMENT, 0, true, ROWS, GROUPS>(&mut sums, &a1, &segment.b, k);
                } else {
                    step::<ELEMENT, 0, false, ROWS, GROUPS>(&mut sums, &a1, &segment.b, k);
                }
            }
            a = a.add(segment.steps);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (g, sums) in sums.iter().enumerate() {
                for (part, sum) in sums.iter().enumerate() {
                    vst1q_f32(out.add(i * out_stride + g * 16 + part * 4), *sum);
                }
            }
        }
    }
}

/// Step `k`: lane `LANE` of each row's `a` by 16 columns of each group. `SECOND`: of two steps that share their place.
///
/// # Safety
/// The step exists in each of `GROUPS` groups.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn step<const ELEMENT: u8, const LANE: i32, const SECOND: bool, const ROWS: usize, const GROUPS: usize>(
    sums: &mut Sums<ROWS, GROUPS>,
    a: &[float32x4_t; ROWS],
    b: &[*const u8; 2],
    k: usize,
) {
    for (g, b) in b.iter().enumerate().take(GROUPS) {
        // SAFETY: the caller's promise.
        let b = unsafe { load16::<ELEMENT, SECOND>(b.add(step_bytes(ELEMENT, k))) };
        for (part, b) in b.into_iter().enumerate() {
            for (sums, a) in sums.iter_mut().zip(a) {
                sums[g][part] = vfmaq_laneq_f32::<LANE>(sums[g][part], b, *a);
            }
        }
    }
}

/// # Safety
/// As for [`Tiles::dots`], with `ROWS` rows.
#[inline(never)] // as above
#[target_feature(enable = "neon")]
unsafe fn dots_of<const ELEMENT: u8, const ROWS: usize>(dots: &Dots) {
    let Dots { a, a_stride, b, groups, group_bytes, ahead, out, out_stride } = *dots;
    // SAFETY: the caller's promise: each group of two positions and of row `i < ROWS` exists, and two outputs of each row.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); 2]; ROWS];
        for g in 0..groups {
            let at = b.add(g * group_bytes);
            (0..step_bytes(ELEMENT, 2))
                .step_by(64)
                .for_each(|line| prefetch(at.wrapping_offset(ahead).wrapping_add(line)));
            let [first, second] =
                [load16::<ELEMENT, false>(at), load16::<ELEMENT, true>(at.add(step_bytes(ELEMENT, 1)))];
            for part in 0..4 {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = vld1q_f32(a.add(i * a_stride + g * 16 + part * 4));
                    sums[0] = vfmaq_f32(sums[0], a, first[part]);
                    sums[1] = vfmaq_f32(sums[1], a, second[part]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                out.add(i * out_stride + p).write(vaddvq_f32(*sum));
            }
        }
    }
}

/// 16 elements as f32; `SECOND`: of the second of two steps that share their place.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load16<const ELEMENT: u8, const SECOND: bool>(from: *const u8) -> [float32x4_t; 4] {
    // SAFETY: the caller's promise; 16 elements are 64 bytes of f32, and of bf16 with another step's, 32 of f16, 16 of int8 and 8 of uint4.
    unsafe {
        match ELEMENT {
            F32 => [0, 4, 8, 12].map(|at| vld1q_f32(from.cast::<f32>().add(at))),
            F16 => {
                let halves = [0, 8].map(|at| vreinterpretq_f16_u16(vld1q_u16(from.cast::<u16>().add(at))));
                [
                    vcvt_f32_f16(vget_low_f16(halves[0])),
                    vcvt_high_f32_f16(halves[0]),
                    vcvt_f32_f16(vget_low_f16(halves[1])),
                    vcvt_high_f32_f16(halves[1]),
                ]
            }
            BF16 => [0, 4, 8, 12].map(|at| {
                let pairs = vld1q_u32(from.cast::<u32>().add(at));
                let bits = if SECOND { vandq_u32(pairs, vdupq_n_u32(0xffff_0000)) } else { vshlq_n_u32::<16>(pairs) };
                vreinterpretq_f32_u32(bits)
            }),
            INT8 => {
                let codes = vld1q_s8(from.cast());
                let [low, high] = [vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes)];
                [vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)]
                    .map(|codes| vcvtq_f32_s32(codes))
            }
            _ => {
                let pairs = vmovl_u8(vld1_u8(from));
                let [low, high] = [vandq_u16(pairs, vdupq_n_u16(15)), vshrq_n_u16::<4>(pairs)];
                [vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)]
                    .map(|codes| vcvtq_f32_u32(codes))
            }
        }
    }
}

/// See [`Tiles::soften`].
///
/// # Safety
/// The machine has NEON; the rest as there.
#[target_feature(enable = "neon")]
unsafe fn soften(scores: &mut [f32; RANGE], seen: Range<usize>, scales: &Scales<'_>) -> Softened {
    let used = seen.start / 4 * 4..seen.end.next_multiple_of(4);
    let groups = || used.clone().step_by(4);
    // SAFETY: in all loops: four scores, and as many scales where there are any, from `at` on lie in the range, whose length
    // is a multiple of four.
    unsafe {
        if !scales.keys.is_empty() {
            for at in groups() {
                let to = scores.as_mut_ptr().add(at);
                vst1q_f32(to, vmulq_f32(vld1q_f32(to), vld1q_f32(scales.keys.as_ptr().add(at))));
            }
        }
        // What is not seen has the weight 2^−∞.
        scores[used.start..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..used.end].fill(f32::NEG_INFINITY);
        let mut max = vdupq_n_f32(f32::NEG_INFINITY);
        for at in groups() {
            max = vmaxq_f32(max, vld1q_f32(scores.as_ptr().add(at)));
        }
        let max = vmaxvq_f32(max);
        let (mut sum, mut offset) = (vdupq_n_f32(0.0), vdupq_n_f32(0.0));
        for at in groups() {
            let to = scores.as_mut_ptr().add(at);
            let mut weight = exp2_4(vsubq_f32(vld1q_f32(to), vdupq_n_f32(max)));
            sum = vaddq_f32(sum, weight);
            if !scales.values.is_empty() {
                if !scales.value_offsets.is_empty() {
                    offset = vfmaq_f32(offset, weight, vld1q_f32(scales.value_offsets.as_ptr().add(at)));
                }
                weight = vmulq_f32(weight, vld1q_f32(scales.values.as_ptr().add(at)));
            }
            vst1q_f32(to, weight);
        }
        Softened { max, sum: vaddvq_f32(sum), offset: vaddvq_f32(offset) }
    }
}
