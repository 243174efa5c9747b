//! SVE with `i8mm`: one instruction adds four products for each of as many columns as a register holds.
//!
//! Rust has no type for a register whose length the machine chooses, so each loop is one piece of assembly. A panel has 16
//! columns: registers of 512 bits and more hold all of them, narrower ones walk over the panel in strips.

use std::arch::asm;

use super::super::linear::PANEL;
use super::{Bits, Group};

/// See [`scalar::dots`](super::scalar::dots).
///
/// # Safety
/// The machine has SVE and `i8mm`; `out` has the group's rows.
#[target_feature(enable = "sve,i8mm")]
pub(super) unsafe fn dots(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    let columns: usize;
    // SAFETY: SVE is on in this function; the instruction only says how many 32-bit lanes a register has.
    unsafe { asm!("cntw {}", out(reg) columns, options(pure, nomem, nostack, preserves_flags)) };
    if group.quads() == 0 {
        return out.as_flattened_mut().fill(0);
    }
    for first in (0..PANEL).step_by(columns) {
        let mut row = 0;
        while row < out.len() {
            let (x, out) = (&group.x[row..], &mut out[row..]);
            row += match (group.bits, out.len()) {
                (Bits::Eight, 4..) => four_rows_8(group, first, x, out),
                (Bits::Eight, 2..) => two_rows_8(group, first, x, out),
                (Bits::Eight, _) => one_row_8(group, first, x, out),
                (Bits::Four, 4..) => four_rows_4(group, first, x, out),
                (Bits::Four, 2..) => two_rows_4(group, first, x, out),
                (Bits::Four, _) => one_row_4(group, first, x, out),
            };
        }
    }
}

/// The weights of the strip into `z16`, `[columns][4 steps]`.
macro_rules! load_8 {
    () => {
        "ld1w {{z16.s}}, p0/z, [{weights}]"
    };
}

/// The same for 4-bit weights: a lane gets its two bytes, and above them the same bytes 12 bits further.
macro_rules! load_4 {
    () => {
        "ld1h {{z16.s}}, p0/z, [{weights}]
         lsl z17.s, z16.s, #12
         orr z16.d, z16.d, z17.d
         and z16.b, z16.b, #15"
    };
}

/// A function from the first rows of `x` to those of `out`, for a strip of columns from `first` on; returns how many rows.
/// Row `i` is summed in register `i`; it names a register for four of its steps, and those that point into `x` and `out`.
macro_rules! rows {
    ($name:ident, $quad_bytes:literal, $load:expr, $($row:literal $steps:literal $x:ident $out:ident),+) => {
        #[target_feature(enable = "sve,i8mm")]
        fn $name(group: &Group<'_>, first: usize, x: &[&[i8]], out: &mut [[i32; PANEL]]) -> usize {
            // SAFETY: SVE and `i8mm` are on in this function. Loads of weights and stores of sums are of the columns from
            // `first` on that a register holds, and of no more than the panel has. There is at least one quad, each row has four
            // steps for every one, and `Group` and `out` are borrowed meanwhile.
            unsafe {
                asm!(
                    "whilelo p0.s, {first}, {columns}",
                    $(concat!("mov z", $row, ".s, #0"),)+
                    "2:",
                    $load,
                    concat!("add {weights}, {weights}, #", $quad_bytes),
                    $(concat!("ld1rw {{z", $steps, ".s}}, p0/z, [{", stringify!($x), "}]"),)+
                    $(concat!("add {", stringify!($x), "}, {", stringify!($x), "}, #4"),)+
                    "subs {quads}, {quads}, #1",
                    $(concat!("usdot z", $row, ".s, z16.b, z", $steps, ".b"),)+
                    "b.ne 2b",
                    $(concat!("st1w {{z", $row, ".s}}, p0, [{", stringify!($out), "}]"),)+
                    first = in(reg) first,
                    columns = in(reg) PANEL,
                    weights = inout(reg) group.part(first) => _,
                    quads = inout(reg) group.quads() => _,
                    $($x = inout(reg) x[$row].as_ptr() => _, $out = in(reg) out[$row][first..].as_mut_ptr(),)+
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v16") _, out("v17") _, out("p0") _,
                    options(nostack),
                );
            }
            [$($row),+].len()
        }
    };
}

rows!(one_row_8, 64, load_8!(), 0 4 x0 out0);
rows!(two_rows_8, 64, load_8!(), 0 4 x0 out0, 1 5 x1 out1);
rows!(four_rows_8, 64, load_8!(), 0 4 x0 out0, 1 5 x1 out1, 2 6 x2 out2, 3 7 x3 out3);
rows!(one_row_4, 32, load_4!(), 0 4 x0 out0);
rows!(two_rows_4, 32, load_4!(), 0 4 x0 out0, 1 5 x1 out1);
rows!(four_rows_4, 32, load_4!(), 0 4 x0 out0, 1 5 x1 out1, 2 6 x2 out2, 3 7 x3 out3);
