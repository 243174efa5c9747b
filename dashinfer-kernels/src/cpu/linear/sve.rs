//! SVE with vectors of 256 bits or more: up to eight rows by one panel of 16 columns, which is two vectors, or one of 512 bits.
//!
//! On Neoverse V1 that saves instructions, not time in which they multiply: it has two units of 256 bits, which are four of NEON's 128.
//!
//! Rust has no type for a vector of unknown length, so a loop over steps is one block of assembly, made by macros for each number of rows.

use std::arch::asm;
use std::ops::Range;

use super::blocked::{self, BF16, F16, F32, Tile, Tiles, group_bytes};
use super::pack::{PANEL, place};
use super::{Job, Output, neon};
use crate::cpu::isa::sve_bytes;
use crate::{DType, element};

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has SVE.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on; a machine with SVE has NEON.
    unsafe {
        // A thread can be given shorter vectors than others.
        if sve_bytes() > 16 {
            blocked::product::<Sve>(job, rows, panels, out);
        } else {
            neon::product(job, rows, panels, out);
        }
    }
}

struct Sve;

impl Tiles for Sve {
    /// The rows of `x` are multiplied by lanes, which only the first eight registers have.
    const MAX_ROWS: usize = 8;
    /// As for NEON.
    const K_BLOCK: usize = 256;
    /// Three tiles.
    const WIDEN_FROM: Option<usize> = Some(17);

    unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32) {
        // SAFETY: the caller's promise, passed on; a machine with SVE has NEON.
        unsafe { neon::widen::<TYPE>(from, groups, to) }
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
                _ => tile_of::<TYPE, 8>(tile),
            }
        }
    }
}

/// Fours of steps by some rows.
struct Fours {
    /// The first row; others `x_stride` bytes apart.
    x: *const f32,
    x_stride: usize,
    weights: *const u8,
    /// What to fetch meanwhile.
    ahead: *const u8,
    /// How many, not 0.
    count: usize,
}

/// Lane `$lane` of each row's `x` by the weights in `z$low` and `z$high`. Of a row: the registers of its `x` and of its sums.
macro_rules! step {
    ($lane:literal, $low:literal, $high:literal, [$($x:literal $a:literal $b:literal),*]) => {
        concat!(
            $("fmla z", $a, ".s, z", $low, ".s, z", $x, ".s[", $lane, "]\n",)*
            $("fmla z", $b, ".s, z", $high, ".s, z", $x, ".s[", $lane, "]\n",)*
        )
    };
}

/// One step of f32.
macro_rules! step_f32 {
    ($lane:literal, $rows:tt) => {
        concat!(
            "ld1w {{z24.s}}, p0/z, [{w}]\n",
            "ld1w {{z25.s}}, p1/z, [{w}, #1, mul vl]\n",
            "add {w}, {w}, #64\n",
            step!($lane, 24, 25, $rows)
        )
    };
}

/// One step of f16.
macro_rules! step_f16 {
    ($lane:literal, $rows:tt) => {
        concat!(
            "ld1h {{z24.s}}, p0/z, [{w}]\n",
            "ld1h {{z25.s}}, p1/z, [{w}, #1, mul vl]\n",
            "add {w}, {w}, #32\n",
            "fcvt z24.s, p0/m, z24.h\n",
            "fcvt z25.s, p0/m, z25.h\n",
            step!($lane, 24, 25, $rows)
        )
    };
}

/// Two steps of bf16, which stand in pairs.
macro_rules! steps_bf16 {
    ($even:literal, $odd:literal, $rows:tt) => {
        concat!(
            "ld1w {{z26.s}}, p0/z, [{w}]\n",
            "ld1w {{z27.s}}, p1/z, [{w}, #1, mul vl]\n",
            "add {w}, {w}, #64\n",
            "lsl z24.s, z26.s, #16\n",
            "lsl z25.s, z27.s, #16\n",
            step!($even, 24, 25, $rows),
            "and z26.s, z26.s, #0xffff0000\n",
            "and z27.s, z27.s, #0xffff0000\n",
            step!($odd, 26, 27, $rows)
        )
    };
}

macro_rules! four_steps {
    (F32, $rows:tt) => {
        concat!(step_f32!(0, $rows), step_f32!(1, $rows), step_f32!(2, $rows), step_f32!(3, $rows))
    };
    (F16, $rows:tt) => {
        concat!(step_f16!(0, $rows), step_f16!(1, $rows), step_f16!(2, $rows), step_f16!(3, $rows))
    };
    (BF16, $rows:tt) => {
        concat!(steps_bf16!(0, 1, $rows), steps_bf16!(2, 3, $rows))
    };
}

/// The whole loop. `p0` has the 16 columns, as far as they fit a vector, and `p1` those of the second vector; with 512 bits there are none,
/// and its multiply-adds are for nothing: a CPU with such vectors and all that [`Isa::Sve`](super::Isa::Sve) asks for is not known.
macro_rules! add_fours {
    ($sums:expr, $fours:expr, $type:ident, [$($x:literal $a:literal $b:literal),*]) => {
        asm!(
            "whilelo p0.s, xzr, {panel}",
            "cntw {at}",
            "whilelo p1.s, {at}, {panel}",
            "mov {at}, {sums}",
            concat!($(
                "ld1w {{z", $a, ".s}}, p0/z, [{at}]\n",
                "ld1w {{z", $b, ".s}}, p1/z, [{at}, #1, mul vl]\n",
                "add {at}, {at}, #64\n",
            )*),
            "2:",
            "prfm pldl1keep, [{ahead}]",
            "prfm pldl1keep, [{ahead}, #64]",
            "add {ahead}, {ahead}, #128",
            "mov {at}, {x}",
            "add {x}, {x}, #16",
            // Four steps of a row, in each 128 bits of its register.
            concat!($(
                "ld1rqw {{z", $x, ".s}}, p0/z, [{at}]\n",
                "add {at}, {at}, {stride}\n",
            )*),
            four_steps!($type, [$($x $a $b),*]),
            "subs {count}, {count}, #1",
            "b.ne 2b",
            "mov {at}, {sums}",
            concat!($(
                "st1w {{z", $a, ".s}}, p0, [{at}]\n",
                "st1w {{z", $b, ".s}}, p1, [{at}, #1, mul vl]\n",
                "add {at}, {at}, #64\n",
            )*),
            panel = in(reg) PANEL,
            sums = in(reg) $sums,
            stride = in(reg) $fours.x_stride,
            x = inout(reg) $fours.x => _,
            w = inout(reg) $fours.weights => _,
            ahead = inout(reg) $fours.ahead => _,
            count = inout(reg) $fours.count => _,
            at = out(reg) _,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _, out("v15") _,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("p0") _, out("p1") _,
            options(nostack),
        )
    };
}

macro_rules! add_fours_of {
    ($rows:expr, $sums:expr, $fours:expr, $type:ident) => {
        match $rows {
            1 => add_fours!($sums, $fours, $type, [0 8 16]),
            2 => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17]),
            3 => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17, 2 10 18]),
            4 => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17, 2 10 18, 3 11 19]),
            5 => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17, 2 10 18, 3 11 19, 4 12 20]),
            6 => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17, 2 10 18, 3 11 19, 4 12 20, 5 13 21]),
            7 => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17, 2 10 18, 3 11 19, 4 12 20, 5 13 21, 6 14 22]),
            _ => add_fours!($sums, $fours, $type, [0 8 16, 1 9 17, 2 10 18, 3 11 19, 4 12 20, 5 13 21, 6 14 22, 7 15 23]),
        }
    };
}

/// Adds the products of fours of steps to the sums of up to eight rows.
///
/// # Safety
/// The machine has SVE with vectors of 256 bits or more; `fours.count` fours of steps exist, in the weights and in each row.
#[inline(never)] // one for each type and number of rows, not all in one
#[target_feature(enable = "neon,sve")]
unsafe fn add_fours<const TYPE: u8, const ROWS: usize>(sums: &mut [[f32; PANEL]; ROWS], fours: &Fours) {
    const { assert!(ROWS >= 1 && ROWS <= Sve::MAX_ROWS, "registers for as many rows") };
    let sums = sums.as_mut_ptr();
    // SAFETY: loads and stores are of `ROWS` rows of sums, and of what the caller says that there is. All registers that are written are
    // named. A prefetch reads nothing.
    unsafe {
        match TYPE {
            F32 => add_fours_of!(ROWS, sums, fours, F32),
            F16 => add_fours_of!(ROWS, sums, fours, F16),
            _ => add_fours_of!(ROWS, sums, fours, BF16),
        }
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let mut sums = [[0.0; PANEL]; ROWS];
    for (i, sums) in sums.iter_mut().enumerate() {
        *sums = tile.start(i);
    }
    let (x, cols, steps) = (tile.x(ROWS), tile.job.weight.cols(), tile.ks.len());
    let whole = steps / 4 * 4;
    if whole > 0 {
        let fours = Fours { x, x_stride: cols * 4, weights: tile.weights, ahead: tile.ahead, count: whole / 4 };
        // SAFETY: `whole` steps exist, in the weights and in each row; the rest is the caller's promise.
        unsafe { add_fours::<TYPE, ROWS>(&mut sums, &fours) };
    }
    let dtype = const { [DType::F32, DType::F16, DType::BF16][TYPE as usize] };
    let groups = if TYPE == BF16 { steps.next_multiple_of(2) } else { steps };
    // SAFETY: the panel holds `steps` groups; those of bf16, whole pairs.
    let weights = unsafe { std::slice::from_raw_parts(tile.weights, groups * group_bytes(TYPE)) };
    for k in whole..steps {
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `k < steps`, so value `ks.start + k` of each row exists.
            let x = unsafe { *x.add(i * cols + k) };
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = x.mul_add(element(weights, dtype, place(lane, k, dtype)), *sum);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: the caller gives this thread these columns of these rows.
        unsafe { tile.out.store(tile.row + i, tile.panel, sums) };
    }
}
