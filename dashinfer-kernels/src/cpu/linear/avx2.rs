//! AVX2 and FMA: up to six rows by one panel of 16 columns in registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocked::{self, BF16, F16, F32, Tile, Tiles, group_bytes};
use super::pack::PANEL;
use super::{Job, Output};

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
    /// 6 × 2 accumulators, two weights and a broadcast fill 15 of the 16 registers.
    const MAX_ROWS: usize = 6;
    /// 16 KiB of f32.
    const K_BLOCK: usize = 256;
    const WIDEN_FROM: Option<usize> = Some(13);

    unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32) {
        // SAFETY: the caller's promise, passed on.
        unsafe { widen::<TYPE>(from, groups, to) }
    }

    unsafe fn tile<const TYPE: u8>(rows: usize, tile: &Tile<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match rows {
                1 => tile_of::<TYPE, 1>(tile),
                2 => tile_of::<TYPE, 2>(tile),
                3 => tile_of::<TYPE, 3>(tile),
                4 => tile_of::<TYPE, 4>(tile),
                5 => tile_of::<TYPE, 5>(tile),
                _ => tile_of::<TYPE, 6>(tile),
            }
        }
    }
}

/// See [`Tiles::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32) {
    for k in 0..groups {
        // SAFETY: group `k` exists on both sides; `to` is aligned to a cache line.
        unsafe {
            let [low, high] = load16::<TYPE>(from, k, k % 2 == 1);
            _mm256_store_ps(to.add(k * PANEL), low);
            _mm256_store_ps(to.add(k * PANEL + 8), high);
        }
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // a function of its own: inlined several times into one, accumulators are spilled
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        let start = tile.start(i);
        // SAFETY: `start` holds 16 values.
        *acc = unsafe { [_mm256_loadu_ps(start.as_ptr()), _mm256_loadu_ps(start.as_ptr().add(8))] };
    }
    let (x, cols, steps) = (tile.x(ROWS), tile.job.weight.cols(), tile.ks.len());
    let step = |k: usize, odd: bool, acc: &mut [[__m256; 2]; ROWS]| {
        // SAFETY: `k < steps`, so group `k` can be read, and value `ks.start + k` of each row exists.
        unsafe {
            let [low, high] = load16::<TYPE>(tile.weights, k, odd);
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*x.add(i * cols + k));
                acc[0] = _mm256_fmadd_ps(x, low, acc[0]);
                acc[1] = _mm256_fmadd_ps(x, high, acc[1]);
            }
        }
    };
    let whole = steps / 4 * 4;
    for k in (0..whole).step_by(4) {
        _mm_prefetch::<_MM_HINT_T0>(tile.ahead.wrapping_add(k * 32).cast());
        _mm_prefetch::<_MM_HINT_T0>(tile.ahead.wrapping_add(k * 32 + 64).cast());
        step(k, false, &mut acc);
        step(k + 1, true, &mut acc);
        step(k + 2, false, &mut acc);
        step(k + 3, true, &mut acc);
    }
    for k in whole..steps {
        step(k, k % 2 == 1, &mut acc);
    }
    for (i, acc) in acc.iter().enumerate() {
        let mut sums = [0.0; PANEL];
        // SAFETY: `sums` holds 16 values; the caller gives this thread these columns of these rows.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
            tile.out.store(tile.row + i, tile.panel, &sums);
        }
    }
}

/// The 16 weights of group `k` as f32, the first eight columns and the other eight; `odd` says whether `k` is.
///
/// # Safety
/// The group, and of bf16 the pair of groups that it belongs to, must be readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load16<const TYPE: u8>(weights: *const u8, k: usize, odd: bool) -> [__m256; 2] {
    // SAFETY: the caller's promise; 16 values are 64 bytes of f32 and 32 bytes of the others.
    unsafe {
        let group = weights.add((if TYPE == BF16 { k & !1 } else { k }) * group_bytes(TYPE));
        match TYPE {
            F32 => [_mm256_loadu_ps(group.cast()), _mm256_loadu_ps(group.cast::<f32>().add(8))],
            F16 => [
                _mm256_cvtph_ps(_mm_loadu_si128(group.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(group.cast::<__m128i>().add(1))),
            ],
            _ => {
                let pairs = [0, 1].map(|half| _mm256_loadu_si256(group.cast::<__m256i>().add(half)));
                let odd_ones = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
                pairs.map(|pairs| {
                    let bits = if odd { _mm256_and_si256(pairs, odd_ones) } else { _mm256_slli_epi32::<16>(pairs) };
                    _mm256_castsi256_ps(bits)
                })
            }
        }
    }
}
