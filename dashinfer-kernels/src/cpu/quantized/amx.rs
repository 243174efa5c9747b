//! AMX: 32 rows by two panels in eight tiles, for bytes without groups; [`amx_groups`] for the others. What is left over runs
//! on AVX-512.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::amx::{Block, BlockSums, Place, ROWS, for_blocks, multiply_bytes};
use super::{Job, Output, amx_groups, avx512};
use crate::Scheme;
use crate::quant::{ActivationBits, PANEL, int8};

/// From this many rows on, tiles pay: with fewer, most of what they multiply is nothing.
const MIN_ROWS: usize = 17;
/// As [`MIN_ROWS`], with groups of 8- and of 16-bit activations: from so many rows on, a tile of 16 and bringing weights into
/// its layout take less time than AVX-512.
const MIN_GROUPED: [usize; 2] = [14, 12];
/// As [`MIN_GROUPED`], behind tiles that have brought their weights.
const MIN_LEFT: [usize; 2] = [10, 7];
/// Input features of a part: rows of as many are left in the L2 cache while all panels pass over them. Between parts, sums go
/// out and come back, so that few parts are better than many.
const PART: usize = 2048;

/// See [`blocked::product`](super::blocked::product).
///
/// # Safety
/// As there; the machine has AMX for int8, and AVX-512 F, BW, VL and VNNI.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let scheme = job.weight.scheme();
    let per_channel = scheme == Scheme::A8W8;
    let bits = usize::from(scheme.activation_bits() == ActivationBits::Sixteen);
    let left = if per_channel {
        // Blocks of 32 rows, and one of at least 17; the others are left.
        Some(rows.len() % (2 * ROWS)).filter(|left| *left < MIN_ROWS).unwrap_or(0)
    } else if rows.len() < MIN_GROUPED[bits] || !amx_groups::is_available() {
        rows.len()
    } else {
        // Tiles of 16 rows, and one of fewer if they are enough.
        Some(rows.len() % ROWS).filter(|left| rows.len() > ROWS && *left < MIN_LEFT[bits]).unwrap_or(0)
    };
    let middle = rows.end - left;
    // SAFETY: the caller's promise, passed on, for ranges that cover the whole.
    unsafe {
        if middle > rows.start {
            let tiles = if per_channel { blocks } else { amx_groups::product };
            tiles(job, rows.start..middle, panels.clone(), out);
        }
        if left > 0 {
            avx512::product(job, middle..rows.end, panels, out);
        }
    }
}

/// Panels by blocks of 17 to 32 rows.
///
/// # Safety
/// As for [`product`].
unsafe fn blocks(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let padded = job.weight.cut().padded;
    let mut sums = BlockSums([[[[0; PANEL]; ROWS]; 2]; 2]);
    // SAFETY: the machine has AMX and AVX-512; the tiles have the shapes of each place, which lies within the job; the caller's
    // promise is passed on.
    unsafe {
        for_blocks(rows, panels, padded, PART, |place| {
            let ks = &place.ks;
            let weights = place.panels().map(|panel| job.weight.panel(panel)[int8::panel_bytes(ks.start)..].as_ptr());
            let x = place.first_rows().map(|row| job.x.codes(row)[ks.start..].as_ptr());
            start(job, &mut sums, &place, out);
            multiply_bytes(&Block { x, x_stride: padded, weights, steps: ks.len() / 64 }, &mut sums);
            finish(job, &sums, &place, out);
        });
    }
}

/// Sets the sums of a block to its corrections, or to what the part before has left.
///
/// # Safety
/// AVX-512F; this thread alone accesses the columns of these panels in these rows of the output.
#[target_feature(enable = "avx512f")]
unsafe fn start(job: &Job<'_>, sums: &mut BlockSums<i32>, place: &Place, out: Output) {
    let corrections = job.x.corrections(place.rows.start);
    for (i, row) in place.rows.clone().enumerate() {
        for (side, panel) in place.panels.clone().enumerate() {
            let sums = &mut sums.0[i / ROWS][side][i % ROWS];
            if place.ks.start == 0 {
                *sums = [corrections[i]; PANEL];
            } else {
                let mut stored = [0.0; PANEL];
                // SAFETY: `finish` wrote these columns of this row in the part before.
                unsafe { out.load(row, panel, &mut stored) };
                *sums = stored.map(|bits| bits.to_bits().cast_signed());
            }
        }
    }
}

/// Writes the sums of a block: as they are, or scaled if they are whole.
///
/// # Safety
/// As for [`start`].
#[target_feature(enable = "avx512f")]
unsafe fn finish(job: &Job<'_>, sums: &BlockSums<i32>, place: &Place, out: Output) {
    let last = place.ks.end == job.weight.cut().padded;
    let scales = job.x.scales(place.rows.start);
    for (side, panel) in place.panels.clone().enumerate() {
        // SAFETY: 16 scales of 16 bits, and as many values of the bias, are one vector.
        let (weight_scales, bias) = unsafe {
            let (scales, bias) = (job.weight.scales(panel, 0), job.weight.panel_bias(panel));
            (_mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast())), _mm512_loadu_ps(bias.as_ptr()))
        };
        for (i, row) in place.rows.clone().enumerate() {
            let sums = &sums.0[i / ROWS][side][i % ROWS];
            // SAFETY: there are 16 of each; the caller gives this thread these columns of this row.
            unsafe {
                let dot = _mm512_loadu_si512(sums.as_ptr().cast());
                let value = if last {
                    let scale = _mm512_mul_ps(weight_scales, _mm512_set1_ps(scales[i]));
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, bias)
                } else {
                    _mm512_castsi512_ps(dot)
                };
                let mut values = [0.0; PANEL];
                _mm512_storeu_ps(values.as_mut_ptr(), value);
                out.store(row, panel, &values);
            }
        }
    }
}
