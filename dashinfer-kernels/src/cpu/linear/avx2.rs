//! AVX2 and FMA: up to six rows by one panel of 16 columns in registers.
//!
//! Weights become f32 in registers, in the loop: that costs two shuffles or shifts beside `2 * rows` multiply-adds, less than
//! a second pass over memory would.

use std::arch::x86_64::*;
use std::ops::Range;

use super::pack::PANEL;
use super::{Job, Output};
use crate::DType;

/// Rows of a register tile: 6 × 2 accumulators, two weights and a broadcast fill 15 of the 16 registers.
const MAX_ROWS: usize = 6;
/// Steps of `k` for which a part of a panel stays in the L1 cache while all rows pass over it: 16 KiB of bf16.
const K_BLOCK: usize = 512;
/// Rows of `x` that pass over a panel together, so that their `K_BLOCK` columns stay in the L2 cache.
const ROW_BLOCK: usize = 96;

/// See [`scalar::product`](super::scalar::product): the same sums in the same order, so the same bits.
///
/// # Safety
/// The machine has AVX2, FMA and F16C. No other thread may write these columns of these rows; the ranges lie within the
/// job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match job.weight.dtype() {
            DType::F32 => typed::<F32>(job, rows, panels, out),
            DType::F16 => typed::<F16>(job, rows, panels, out),
            DType::BF16 => typed::<BF16>(job, rows, panels, out),
        }
    }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn typed<const TYPE: u8>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let mut first = rows.start;
    while first < rows.end {
        // Equal tiles: seven rows are 4 + 3, not 6 + 1.
        let block = rows.end.min(first + ROW_BLOCK) - first;
        for panel in panels.clone() {
            let mut k = 0;
            while k < job.weight.cols() || k == 0 {
                let end = job.weight.cols().min(k + K_BLOCK);
                let tiles = block.div_ceil(MAX_ROWS);
                let mut row = first;
                for tile in 0..tiles {
                    let next = first + block * (tile + 1) / tiles;
                    // SAFETY: the tile lies within `rows`, `k..end` within the columns, and the caller's promise holds.
                    unsafe {
                        match next - row {
                            1 => tile_of::<TYPE, 1>(job, row, panel, k..end, out),
                            2 => tile_of::<TYPE, 2>(job, row, panel, k..end, out),
                            3 => tile_of::<TYPE, 3>(job, row, panel, k..end, out),
                            4 => tile_of::<TYPE, 4>(job, row, panel, k..end, out),
                            5 => tile_of::<TYPE, 5>(job, row, panel, k..end, out),
                            _ => tile_of::<TYPE, 6>(job, row, panel, k..end, out),
                        }
                    }
                    row = next;
                }
                k = end.max(k + 1);
            }
        }
        first += block;
    }
}

/// `ROWS` rows of `x` by panel `panel`, over the steps `ks`; sums start from the bias, or from where the steps before ended.
///
/// # Safety
/// As for [`product`]; `row + ROWS` lies within the job's rows and `ks` within its columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(
    job: &Job<'_>,
    row: usize,
    panel: usize,
    ks: Range<usize>,
    out: Output,
) {
    let cols = job.weight.cols();
    let mut start = [[0.0; PANEL]; ROWS];
    if ks.start == 0 {
        start = [job.weight.panel_bias(panel); ROWS];
    } else {
        for (i, sums) in start.iter_mut().enumerate() {
            // SAFETY: this thread wrote these columns of this row in the steps before.
            unsafe { out.load(row + i, panel, sums) };
        }
    }
    // SAFETY: `start[i]` holds 16 values.
    let mut acc: [[__m256; 2]; ROWS] = std::array::from_fn(|i| unsafe {
        [_mm256_loadu_ps(start[i].as_ptr()), _mm256_loadu_ps(start[i].as_ptr().add(8))]
    });
    let x: [*const f32; ROWS] = std::array::from_fn(|i| job.x[(row + i) * cols..][..cols].as_ptr());
    let group = PANEL * job.weight.dtype().size_bytes();
    let weights = job.weight.panel(panel).as_ptr();
    for k in ks {
        // SAFETY: `k` is a column, so group `k` of the panel and value `k` of each row exist.
        unsafe {
            let [low, high] = load16::<TYPE>(weights.add(k * group));
            for i in 0..ROWS {
                let x = _mm256_broadcast_ss(&*x[i].add(k));
                acc[i][0] = _mm256_fmadd_ps(x, low, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(x, high, acc[i][1]);
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        let mut sums = [0.0; PANEL];
        // SAFETY: `sums` holds 16 values; the caller gives this thread these columns of these rows.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
            out.store(row + i, panel, &sums);
        }
    }
}

/// The 16 weights of a group as f32, the first eight columns and the other eight.
///
/// # Safety
/// A whole group must be readable at `group`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load16<const TYPE: u8>(group: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise; 16 values are 64 bytes of f32 and 32 bytes of the others.
    unsafe {
        match TYPE {
            F32 => [_mm256_loadu_ps(group.cast()), _mm256_loadu_ps(group.cast::<f32>().add(8))],
            F16 => [
                _mm256_cvtph_ps(_mm_loadu_si128(group.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(group.cast::<__m128i>().add(1))),
            ],
            _ => {
                let pairs = _mm256_loadu_si256(group.cast());
                let low = _mm256_slli_epi32::<16>(pairs);
                let high = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
                [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
            }
        }
    }
}
