//! AMX for groups: a tile of 16 rows by one panel for each group, whose sums leave the tile to be scaled.
//!
//! The unit multiplies 16 rows by 16 columns in 16 cycles, whether over 64 input features or, in groups of 32, over half as
//! many. Scaling takes the vector unit, so what bounds a step, of 16 rows by 16 columns by a group, is neither alone. In
//! cycles, by what each can do at best (two vectors loaded, one stored, two computed in a cycle; a tile is 16 vectors, one of
//! weights of 32 input features 8):
//!
//! | step | multiplied | loaded | stored | computed |
//! |---|---|---|---|---|
//! | `a8`, groups of 32 | 16 | 8 `x` + 4 weights + 8 sums + 8 scales = 28 | 16 | 3 × 8 = 24 |
//! | `a8`, 128 | 32 | 16 + 16 + 8 + 8 = 48 | 16 | 24 |
//! | `a16`, 32 | 32 | 16 + 4 + 16 + 8 = 44 | 32 | 4 × 8 = 32; with zero points or 8 bits 5 × 8 = 40 |
//! | `a16`, 128 | 64 | 32 + 16 + 16 + 8 = 72 | 32 | 40 |
//!
//! Laying out `x` comes on top. Where four panels share it, it adds 2 (`a8`) or 4 (`a16`) cycles to all columns but
//! "multiplied". With AVX-512 alone, a step of `a16` in groups of 32 takes 160 cycles of computing at best. Two tiles of
//! columns to one of rows would need fewer loads, but their sums in f32, 32 rows of them, would fill all registers.
//!
//! Loading a tile takes 45 cycles, and multiplying two 52, before the result can be used. So that nothing waits for them, steps
//! overlap: while one is scaled, the sums of the next are stored, and the one after that is multiplied.
//!
//! On a Xeon of 16 threads, two to a core, parts of a step of `a16` in groups of 32 were left out, to see what each takes:
//! multiplications and their loads 30 % of the time, scaling 20 %, `x` being laid out 17 % (for pairs of panels), and stores
//! 11 %. That they add up says that they overlap less than they could. Fetching the rows that are next did not pay.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::WORD_PLACES;
use super::blocked::{BYTES, CODES_4, WORDS, code_bytes};
use super::grouped::{self, GROUPS, Layout, PART, Part, ROWS, Scratch, Sweep, Unit, X_STRIDE};
use super::{Job, Output};
use crate::cpu::amx;
use crate::quant::PANEL;

/// Whether this machine, which has AMX, has all else that is needed.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512vbmi")
}

/// See [`grouped::product`].
///
/// # Safety
/// As there; the machine has AMX for int8, and AVX-512 F, BW, VL, VNNI and VBMI.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { grouped::product::<Amx>(job, rows, panels, out) }
}

struct Amx;

impl Unit for Amx {
    unsafe fn start(depth: usize) -> Self {
        // SAFETY: the caller's promise, passed on.
        unsafe { amx::shape_for_groups(depth) };
        Self
    }

    unsafe fn end(self) {
        // SAFETY: the caller's promise, passed on.
        unsafe { amx::release() };
    }

    unsafe fn widen<const CODES: u8>(codes: *const u8, zeros: &[u8; PANEL], len: usize, to: *mut i8) {
        // SAFETY: the caller's promise, passed on.
        unsafe { widen::<CODES>(codes, zeros, len, to) }
    }

    unsafe fn lay_out<const X: u8>(layout: &Layout, part: &Part, scratch: &mut Scratch) {
        // SAFETY: the caller's promise, passed on.
        unsafe { lay_out::<X>(layout, part, scratch) }
    }

    unsafe fn sweep<const X: u8, const NARROW: bool>(&mut self, sweep: &Sweep<'_>, scratch: &mut Scratch) {
        // SAFETY: the caller's promise, passed on.
        unsafe { steps::<X, NARROW>(sweep, scratch) }
    }
}

/// Where the low bytes of 32 words stand, in the order of input features, and then their high bytes.
pub(super) const SPLIT: [u8; 64] = {
    let mut from = [0; 64];
    let mut k = 0;
    while k < 32 {
        let word = k / 4 * 4 + WORD_PLACES[k % 4];
        from[k] = 2 * word as u8;
        from[32 + k] = 2 * word as u8 + 1;
        k += 1;
    }
    from
};

/// Which zero point each byte of a vector takes: every quarter of the vector holds all sixteen, and each of them goes to the
/// four bytes of its feature's quad.
const SPREAD: [u8; 64] = {
    let mut from = [0; 64];
    let mut i = 0;
    while i < 64 {
        from[i] = (i / 4) as u8;
        i += 1;
    }
    from
};

/// How far ahead codes are fetched.
const AHEAD_BYTES: usize = 2048;

/// See [`Unit::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen<const CODES: u8>(codes: *const u8, zeros: &[u8; PANEL], len: usize, to: *mut i8) {
    // SAFETY: the array is one vector, the zero points a quarter of one; the rest is the caller's promise.
    unsafe {
        let spread = _mm512_loadu_si512(SPREAD.as_ptr().cast());
        let zeros = _mm512_broadcast_i32x4(_mm_loadu_si128(zeros.as_ptr().cast()));
        let (zeros, nibbles) = (_mm512_shuffle_epi8(zeros, spread), _mm512_set1_epi8(15));
        for k in (0..len).step_by(8) {
            let codes = codes.add(code_bytes(BYTES, CODES, k));
            _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(AHEAD_BYTES).cast());
            let first = _mm512_loadu_si512(codes.cast());
            let [even, odd] = if CODES == CODES_4 {
                [_mm512_and_si512(first, nibbles), _mm512_and_si512(_mm512_srli_epi16::<4>(first), nibbles)]
            } else {
                [first, _mm512_loadu_si512(codes.add(64).cast())]
            };
            let to = to.add(k * PANEL);
            _mm512_storeu_si512(to.cast(), _mm512_sub_epi8(even, zeros));
            _mm512_storeu_si512(to.add(64).cast(), _mm512_sub_epi8(odd, zeros));
        }
    }
}

/// See [`Unit::lay_out`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512vl,avx512vbmi")]
unsafe fn lay_out<const X: u8>(layout: &Layout, part: &Part, scratch: &mut Scratch) {
    let groups = part.len / layout.group;
    let there = ((1_u16 << groups) - 1) as u8; // no more than eight
    let (mut codes, mut scales) = (part.codes, part.scales);
    let rows = scratch.x.iter_mut().zip(&mut scratch.scales).take(part.rows);
    // SAFETY: a row has room for the part's codes of either kind, and for its scales, which are one vector; the rest is the
    // caller's promise.
    unsafe {
        let split = _mm512_loadu_si512(SPLIT.as_ptr().cast());
        for (to, to_scales) in rows {
            let to = to.as_mut_ptr();
            for k in (0..part.len).step_by(32) {
                if X != WORDS {
                    _mm256_storeu_si256(to.add(k).cast(), _mm256_loadu_si256(codes.add(k).cast()));
                    continue;
                }
                let bytes = _mm512_permutexvar_epi8(split, _mm512_loadu_si512(codes.add(2 * k).cast()));
                if layout.high == 32 {
                    _mm512_storeu_si512(to.add(2 * k).cast(), bytes);
                } else {
                    _mm256_storeu_si256(to.add(k).cast(), _mm512_castsi512_si256(bytes));
                    _mm256_storeu_si256(to.add(PART + k).cast(), _mm512_extracti64x4_epi64::<1>(bytes));
                }
            }
            _mm256_storeu_ps(to_scales.as_mut_ptr(), _mm256_maskz_loadu_ps(there, scales));
            codes = codes.wrapping_add(part.stride);
            scales = scales.wrapping_add(part.groups);
        }
    }
}

/// `(first tiles of x, to the high bytes, first tile of weights, tiles)`, in assembly; sums stay in their tiles.
macro_rules! multiply {
    (words, $low:tt, $high:tt, $weights:tt, $x:expr, $to_high:expr, $w:expr, $tiles:expr) => {
        asm!(
            concat!("tilezero ", $low),
            concat!("tilezero ", $high),
            "2:",
            concat!("tileloadd ", $weights, ", [{w} + {row}*1]"),
            "tileloadd tmm4, [{x} + {stride}*1]",
            concat!("tdpbusd ", $low, ", tmm4, ", $weights),
            "tileloadd tmm5, [{y} + {stride}*1]",
            concat!("tdpbssd ", $high, ", tmm5, ", $weights),
            "add {x}, 64",
            "add {y}, 64",
            "add {w}, 1024",
            "dec {tiles}",
            "jnz 2b",
            x = inout(reg) $x => _,
            y = inout(reg) $x.wrapping_add($to_high) => _,
            w = inout(reg) $w => _,
            tiles = inout(reg) $tiles => _,
            stride = in(reg) X_STRIDE,
            row = in(reg) amx::ROW_BYTES,
            out($low) _, out($high) _, out("tmm4") _, out("tmm5") _, out($weights) _,
            options(nostack, readonly),
        )
    };
    (bytes, $sums:tt, $bytes:tt, $weights:tt, $x:expr, $w:expr, $tiles:expr) => {
        asm!(
            concat!("tilezero ", $sums),
            "2:",
            concat!("tileloadd ", $weights, ", [{w} + {row}*1]"),
            concat!("tileloadd ", $bytes, ", [{x} + {stride}*1]"),
            concat!("tdpbssd ", $sums, ", ", $bytes, ", ", $weights),
            "add {x}, 64",
            "add {w}, 1024",
            "dec {tiles}",
            "jnz 2b",
            x = inout(reg) $x => _,
            w = inout(reg) $w => _,
            tiles = inout(reg) $tiles => _,
            stride = in(reg) X_STRIDE,
            row = in(reg) amx::ROW_BYTES,
            out($sums) _, out($bytes) _, out($weights) _,
            options(nostack, readonly),
        )
    };
}

/// Multiplies step `step`: its sums are left in tiles 0 and 1 if it is even, 2 and 3 if it is odd.
///
/// # Safety
/// This thread's tiles have the depth of the layout; the scratch holds the operands of the step, which is in group `group`.
#[inline(always)]
unsafe fn multiply<const X: u8>(layout: &Layout, scratch: *const Scratch, step: usize, group: usize) {
    // SAFETY: the caller's promise: 16 rows of `x` and as many quads of weights as a tile is deep can be read at either place.
    // No code but this uses tiles, so that they stay as they are until `store`.
    unsafe {
        let x = (&raw const (*scratch).x).cast::<u8>().add(layout.x(group));
        let w = (&raw const (*scratch).weights).cast::<u8>().add(layout.weights(step));
        let (tiles, even) = (layout.tiles, step.is_multiple_of(2));
        match (X == WORDS, even) {
            (true, true) => multiply!(words, "tmm0", "tmm1", "tmm6", x, layout.high, w, tiles),
            (true, false) => multiply!(words, "tmm2", "tmm3", "tmm7", x, layout.high, w, tiles),
            (false, true) => multiply!(bytes, "tmm0", "tmm4", "tmm6", x, w, tiles),
            (false, false) => multiply!(bytes, "tmm2", "tmm5", "tmm7", x, w, tiles),
        }
    }
}

/// Writes the sums of step `step` out of the tiles that [`multiply()`] has left them in.
///
/// # Safety
/// It was multiplied, and since then at most the one after it.
#[inline(always)]
unsafe fn store<const X: u8>(scratch: *mut Scratch, step: usize) {
    macro_rules! store {
        ($to:expr, $($at:literal $tile:literal),+) => {
            asm!($(concat!("tilestored [{to} + {row}*1 + ", $at, "], ", $tile)),+, to = in(reg) $to, row = in(reg) amx::ROW_BYTES,
                 options(nostack, preserves_flags))
        };
    }
    // SAFETY: the scratch has room for two tiles of sums of an even step, and of an odd one.
    unsafe {
        let to = (&raw mut (*scratch).dots[step % 2]).cast::<i32>();
        match (X == WORDS, step.is_multiple_of(2)) {
            (true, true) => store!(to, "0" "tmm0", "1024" "tmm1"),
            (true, false) => store!(to, "0" "tmm2", "1024" "tmm3"),
            (false, true) => store!(to, "0" "tmm0"),
            (false, false) => store!(to, "0" "tmm2"),
        }
    }
}

/// Sums in f32, a row in a register.
type Values = [__m512; ROWS];

/// The sums of a row of a step as integers in `{t}`, then scaled and added to the row's values.
macro_rules! add_row {
    ($value:literal, $row:literal, $($load:expr),+) => {
        concat!(
            $($load, "\n",)+
            "vcvtdq2ps {t}, {t}\n",
            "vmulps {scale}, {weights}, dword ptr [{scales} + 32*", $row, "]{{1to16}}\n",
            "vfmadd231ps ", $value, ", {t}, {scale}\n",
        )
    };
}
macro_rules! add_row_of_bytes {
    ($value:literal, $row:literal) => {
        add_row!($value, $row, concat!("vmovdqa64 {t}, [{dots} + 64*", $row, "]"))
    };
}
macro_rules! add_row_of_words {
    ($value:literal, $row:literal) => {
        add_row!(
            $value,
            $row,
            concat!("vpslld {t}, zmmword ptr [{dots} + 1024 + 64*", $row, "], 8"),
            concat!("vpaddd {t}, {t}, [{dots} + 64*", $row, "]")
        )
    };
}
// Of the two halves of a sum of high bytes, the lower one is all of it, and the upper one its sign.
macro_rules! add_row_of_narrow_words {
    ($value:literal, $row:literal) => {
        add_row!(
            $value,
            $row,
            concat!("vmovdqa64 {t}, [{dots} + 64*", $row, "]"),
            concat!("vpdpwssd {t}, {shift}, [{dots} + 1024 + 64*", $row, "]")
        )
    };
}
/// All rows of a step; `$values` is an array of 16 vectors.
macro_rules! add_rows {
    ($add_row:ident, $values:ident, $dots:expr, $weights:expr, $scales:expr $(, $shift:expr)?) => {{
        let [v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15] = $values;
        // Not left out, since a register without a type would be taken for one of bytes.
        let (_sum, _scale): (__m512, __m512);
        asm!(
            $add_row!("{v0}", "0"), $add_row!("{v1}", "1"), $add_row!("{v2}", "2"), $add_row!("{v3}", "3"),
            $add_row!("{v4}", "4"), $add_row!("{v5}", "5"), $add_row!("{v6}", "6"), $add_row!("{v7}", "7"),
            $add_row!("{v8}", "8"), $add_row!("{v9}", "9"), $add_row!("{v10}", "10"), $add_row!("{v11}", "11"),
            $add_row!("{v12}", "12"), $add_row!("{v13}", "13"), $add_row!("{v14}", "14"), $add_row!("{v15}", "15"),
            v0 = inout(zmm_reg) *v0, v1 = inout(zmm_reg) *v1, v2 = inout(zmm_reg) *v2, v3 = inout(zmm_reg) *v3,
            v4 = inout(zmm_reg) *v4, v5 = inout(zmm_reg) *v5, v6 = inout(zmm_reg) *v6, v7 = inout(zmm_reg) *v7,
            v8 = inout(zmm_reg) *v8, v9 = inout(zmm_reg) *v9, v10 = inout(zmm_reg) *v10, v11 = inout(zmm_reg) *v11,
            v12 = inout(zmm_reg) *v12, v13 = inout(zmm_reg) *v13, v14 = inout(zmm_reg) *v14, v15 = inout(zmm_reg) *v15,
            dots = in(reg) $dots,
            weights = in(zmm_reg) $weights,
            scales = in(reg) $scales,
            $(shift = in(zmm_reg) $shift,)?
            t = out(zmm_reg) _sum,
            scale = out(zmm_reg) _scale,
            options(nostack, readonly, preserves_flags),
        )
    }};
}

/// Adds the sums of a step, scaled; see [`scalar::product`](super::scalar::product). In assembly: the compiler moves each value
/// from one register to another, and adds high bytes in two instructions where one does.
///
/// # Safety
/// The step's sums were stored; `scales` is that of the step's group in the first row of a [`Scratch`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn add<const X: u8, const NARROW: bool>(
    values: &mut Values,
    dots: *const [[[i32; PANEL]; ROWS]; 2],
    weight_scales: __m512,
    scales: *const f32,
) {
    const { assert!(size_of::<[f32; GROUPS]>() == 32, "bytes between the scales of rows") };
    // SAFETY: the features are on in this function; a row of sums is one aligned vector, and each row has scales.
    unsafe {
        match (X == WORDS, NARROW) {
            (false, _) => add_rows!(add_row_of_bytes, values, dots, weight_scales, scales),
            (true, false) => add_rows!(add_row_of_words, values, dots, weight_scales, scales),
            (true, true) => {
                add_rows!(add_row_of_narrow_words, values, dots, weight_scales, scales, _mm512_set1_epi32(256));
            }
        }
    }
}

/// See [`Unit::sweep`].
///
/// # Safety
/// As there.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
unsafe fn steps<const X: u8, const NARROW: bool>(sweep: &Sweep<'_>, scratch: &mut Scratch) {
    let Sweep { job, ref rows, ref panels, ref layout, out, .. } = *sweep;
    let (groups, first_group) = (sweep.groups(), sweep.first_group());
    let (weight, num_steps) = (job.weight, groups * panels.len());
    let mut step = 0;
    let scratch: *mut Scratch = scratch;
    // The group of the step that is to be multiplied next.
    let mut next_group = 0;
    let mut multiply_next = |step: usize| {
        // SAFETY: the operands of all steps are there, as the caller promises. Of the tiles that this step takes, the sums were
        // stored.
        unsafe { multiply::<X>(layout, scratch, step, next_group) };
        next_group = if next_group + 1 == groups { 0 } else { next_group + 1 };
    };
    if num_steps > 0 {
        multiply_next(0);
    }
    if num_steps > 1 {
        multiply_next(1);
    }
    if num_steps > 0 {
        // SAFETY: it was multiplied.
        unsafe { store::<X>(scratch, 0) };
    }
    for panel in panels.clone() {
        let (at, width, stride) = out.place(rows.start, panel);
        let columns = mask(width);
        let mut values = [_mm512_setzero_ps(); ROWS];
        if sweep.ks.start == 0 {
            // SAFETY: the bias is one vector.
            values = [unsafe { _mm512_loadu_ps(weight.panel_bias(panel).as_ptr()) }; ROWS];
        } else {
            let mut at = at;
            if rows.len() == ROWS {
                for values in &mut values {
                    // SAFETY: the columns under the mask were written in the parts before.
                    *values = unsafe { _mm512_maskz_loadu_ps(columns, at) };
                    at = at.wrapping_add(stride);
                }
            } else {
                for (i, values) in values.iter_mut().enumerate() {
                    let there = if i < rows.len() { columns } else { 0 };
                    // SAFETY: as above; without a mask, nothing is read.
                    *values = unsafe { _mm512_maskz_loadu_ps(there, at) };
                    at = at.wrapping_add(stride);
                }
            }
        }
        for group in 0..groups {
            if step + 2 < num_steps {
                multiply_next(step + 2);
            }
            if step + 1 < num_steps {
                // SAFETY: it was multiplied one iteration ago, or before the loop, and since then only the step after it.
                unsafe { store::<X>(scratch, step + 1) };
            }
            // SAFETY: 16 scales of 16 bits are one vector. The step's sums were stored a step ago; the scratch is not borrowed
            // otherwise.
            unsafe {
                let scales = weight.scales(panel, first_group + group);
                let weight_scales = _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast()));
                let dots = &raw const (*scratch).dots[step % 2];
                let scales = (&raw const (*scratch).scales).cast::<f32>().add(group);
                add::<X, NARROW>(&mut values, dots, weight_scales, scales);
            }
            step += 1;
        }
        // Without an index that is not known, so that the values above can be registers.
        let mut at = at;
        for (i, values) in values.iter().enumerate() {
            if i < rows.len() {
                // SAFETY: the caller gives this thread these columns of these rows.
                unsafe { _mm512_mask_storeu_ps(at, columns, *values) };
            }
            at = at.wrapping_add(stride);
        }
    }
}

/// The first `width` of 16.
#[inline(always)]
fn mask(width: usize) -> __mmask16 {
    (0xffff_u32 >> (PANEL - width)) as __mmask16
}

#[cfg(test)]
mod tests {
    use super::super::blocked::CODES_8;
    use super::super::grouped_model::Model;
    use super::*;
    use crate::random::SplitMix64;

    /// Whether this machine has the vectors, if not the tiles.
    fn has_vectors() -> bool {
        let has = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") && is_available();
        if !has {
            println!("skipped: no AVX-512 VBMI on this machine");
        }
        has
    }

    fn bytes(len: usize, seed: u64) -> Vec<u8> {
        let mut random = SplitMix64(seed);
        (0..len).map(|_| random.bits() as u8).collect()
    }

    #[test]
    fn weights_are_widened_as_in_the_model() {
        if !has_vectors() {
            return;
        }
        let codes = bytes(PART * PANEL, 1);
        let zeros: [u8; PANEL] = std::array::from_fn(|i| (i * 7 % 16) as u8);
        for len in [32, 64, 224, PART] {
            let (mut found, mut wanted) = (vec![0; len * PANEL], vec![0; len * PANEL]);
            // SAFETY: the machine has AVX-512; there are as many codes, and as much room.
            unsafe {
                Amx::widen::<CODES_4>(codes.as_ptr(), &zeros, len, found.as_mut_ptr());
                Model::widen::<CODES_4>(codes.as_ptr(), &zeros, len, wanted.as_mut_ptr());
                assert_eq!(found, wanted, "4 bits, {len}");
                Amx::widen::<CODES_8>(codes.as_ptr(), &[128; PANEL], len, found.as_mut_ptr());
                Model::widen::<CODES_8>(codes.as_ptr(), &[128; PANEL], len, wanted.as_mut_ptr());
            }
            assert_eq!(found, wanted, "8 bits, {len}");
        }
    }

    #[test]
    fn rows_are_laid_out_as_in_the_model() {
        if !has_vectors() {
            return;
        }
        let codes = bytes(ROWS * 2 * PART, 2);
        let scales: Vec<f32> = (0..ROWS * GROUPS).map(|i| i as f32 + 0.5).collect();
        for (group, operand) in [32, 64, 128].into_iter().flat_map(|group| [(group, WORDS), (group, BYTES)]) {
            for (rows, groups) in [(1, 1), (7, PART / group), (16, 2), (16, PART / group)] {
                let layout = Layout::new(group, operand);
                let (codes, scales, len) = (codes.as_ptr(), scales.as_ptr(), groups * group);
                let part = Part { rows, codes, stride: 2 * PART, len, scales, groups: GROUPS };
                let (mut found, mut wanted) = (Scratch::new(), Scratch::new());
                // SAFETY: the machine has AVX-512; there are as many codes and scales.
                unsafe {
                    if operand == WORDS {
                        Amx::lay_out::<WORDS>(&layout, &part, &mut found);
                        Model::lay_out::<WORDS>(&layout, &part, &mut wanted);
                    } else {
                        Amx::lay_out::<BYTES>(&layout, &part, &mut found);
                        Model::lay_out::<BYTES>(&layout, &part, &mut wanted);
                    }
                }
                assert_eq!(found.x, wanted.x, "{layout:?} {rows} rows, {groups} groups");
                assert_eq!(found.scales, wanted.scales, "{layout:?} {rows} rows, {groups} groups");
            }
        }
    }
}
