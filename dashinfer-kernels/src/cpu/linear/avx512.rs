//! AVX-512: up to twelve rows by one panel of 16 columns, each row's sums in one register.
//!
//! A multiply-add takes its value of `x` straight from memory, broadcast, so a step is a load of weights and one instruction
//! for each row. The sums are those of AVX2, to the bit.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocked::{self, BF16, F16, F32, Tile, Tiles, group_bytes};
use super::pack::PANEL;
use super::{Job, Output};

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has AVX-512F.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::product::<Avx512>(job, rows, panels, out) }
}

struct Avx512;

impl Tiles for Avx512 {
    /// Enough chains to hide the latency of two multiply-adds a cycle; more rows would leave the L1 cache.
    const MAX_ROWS: usize = 12;
    /// 16 KiB of bf16.
    const K_BLOCK: usize = 512;
    /// Converting costs three instructions beside twelve multiply-adds, and f32 would take twice the L1 cache: measured, it is
    /// slower.
    const WIDEN_FROM: Option<usize> = None;

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
                6 => tile_of::<TYPE, 6>(tile),
                7 => tile_of::<TYPE, 7>(tile),
                8 => tile_of::<TYPE, 8>(tile),
                9 => tile_of::<TYPE, 9>(tile),
                10 => tile_of::<TYPE, 10>(tile),
                11 => tile_of::<TYPE, 11>(tile),
                _ => tile_of::<TYPE, 12>(tile),
            }
        }
    }
}

/// See [`Tiles::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f")]
unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32) {
    for k in 0..groups {
        // SAFETY: group `k` exists on both sides; `to` is aligned to a cache line.
        unsafe { _mm512_store_ps(to.add(k * PANEL), load16::<TYPE>(from, k, k % 2 == 1)) };
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // a function of its own, as for AVX2
#[target_feature(enable = "avx512f")]
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let mut acc = [_mm512_setzero_ps(); ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: `start` gives 16 values.
        *acc = unsafe { _mm512_loadu_ps(tile.start(i).as_ptr()) };
    }
    let (x, cols, steps) = (tile.x(ROWS), tile.job.weight.cols(), tile.ks.len());
    let step = |k: usize, odd: bool, acc: &mut [__m512; ROWS]| {
        // SAFETY: `k < steps`, so group `k` can be read, and value `ks.start + k` of each row exists.
        unsafe {
            let weights = load16::<TYPE>(tile.weights, k, odd);
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_fmadd_ps(_mm512_set1_ps(*x.add(i * cols + k)), weights, *acc);
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
            _mm512_storeu_ps(sums.as_mut_ptr(), *acc);
            tile.out.store(tile.row + i, tile.panel, &sums);
        }
    }
}

/// The 16 weights of group `k` as f32; `odd` says whether `k` is.
///
/// # Safety
/// The group, and of bf16 the pair of groups that it belongs to, must be readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load16<const TYPE: u8>(weights: *const u8, k: usize, odd: bool) -> __m512 {
    // SAFETY: the caller's promise; 16 values are 64 bytes of f32 and 32 bytes of the others.
    unsafe {
        let group = weights.add((if TYPE == BF16 { k & !1 } else { k }) * group_bytes(TYPE));
        match TYPE {
            F32 => _mm512_loadu_ps(group.cast()),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(group.cast())),
            _ => {
                let pairs = _mm512_loadu_si512(group.cast());
                let odd_ones = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
                _mm512_castsi512_ps(if odd {
                    _mm512_and_si512(pairs, odd_ones)
                } else {
                    _mm512_slli_epi32::<16>(pairs)
                })
            }
        }
    }
}
