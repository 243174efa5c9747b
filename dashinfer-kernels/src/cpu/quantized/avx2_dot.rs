//! The innermost loops of [`avx2`](super::avx2), in assembly: twelve sums, two vectors of codes, a broadcast and a product are all
//! sixteen registers. From intrinsics the compiler makes loops that sum in another order and spill, a third slower.

use std::arch::asm;
use std::arch::x86_64::__m256i;

/// Sums of up to six rows by two halves of a panel.
#[repr(align(32))]
pub(super) struct Sums(pub(super) [[__m256i; 2]; 6]);

/// One row's share of a step: its activations, broadcast, times the codes of both halves in `ymm12` and `ymm13`.
macro_rules! row {
    ($mul:literal, $add:literal, $at:literal, $address:literal, $first:literal, $second:literal) => {
        concat!(
            "vpbroadcastd ymm14, dword ptr [",
            $address,
            " + ",
            $at,
            "]\n",
            $mul,
            " ymm15, ymm12, ymm14\n",
            $add,
            " ymm",
            $first,
            ", ymm",
            $first,
            ", ymm15\n",
            $mul,
            " ymm14, ymm13, ymm14\n",
            $add,
            " ymm",
            $second,
            ", ymm",
            $second,
            ", ymm14\n",
        )
    };
}

/// A step: 64 bytes of codes by four bytes of each row.
macro_rules! step {
    ($mul:literal, $add:literal, $codes:literal, $at:literal, $([$address:literal, $first:literal, $second:literal]),+) => {
        concat!(
            "vmovdqa ymm12, ymmword ptr [{w} + ", $codes, "]\n",
            "vmovdqa ymm13, ymmword ptr [{w} + ", $codes, " + 32]\n",
            $(row!($mul, $add, $at, $address, $first, $second)),+
        )
    };
}

/// A function that walks eight steps at a time, 512 bytes of codes by 32 bytes of each row, and leaves the sums in memory.
macro_rules! dot {
    ($name:ident, $mul:literal, $add:literal, $($row:tt),+) => {
        /// # Safety
        /// AVX2. `w` holds `count` times 512 bytes and is aligned to 32, each row of `x` holds `count` times 32 bytes and they are `stride`
        /// bytes apart, and `count` is not 0.
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn $name(w: *const u8, x: *const u8, stride: usize, count: usize, ahead: *const u8, sums: &mut Sums) {
            // SAFETY: reads what the caller vouches for and writes sums of rows that there are; prefetching touches nothing.
            unsafe {
                asm!(
                    "vpxor ymm0, ymm0, ymm0",
                    "vpxor ymm1, ymm1, ymm1",
                    "vpxor ymm2, ymm2, ymm2",
                    "vpxor ymm3, ymm3, ymm3",
                    "vpxor ymm4, ymm4, ymm4",
                    "vpxor ymm5, ymm5, ymm5",
                    "vpxor ymm6, ymm6, ymm6",
                    "vpxor ymm7, ymm7, ymm7",
                    "vpxor ymm8, ymm8, ymm8",
                    "vpxor ymm9, ymm9, ymm9",
                    "vpxor ymm10, ymm10, ymm10",
                    "vpxor ymm11, ymm11, ymm11",
                    ".p2align 5 /* one row does not use {s} */",
                    "2:",
                    step!($mul, $add, "0", "0", $($row),+),
                    step!($mul, $add, "64", "4", $($row),+),
                    "prefetcht0 byte ptr [{ahead}]",
                    step!($mul, $add, "128", "8", $($row),+),
                    step!($mul, $add, "192", "12", $($row),+),
                    step!($mul, $add, "256", "16", $($row),+),
                    step!($mul, $add, "320", "20", $($row),+),
                    "prefetcht0 byte ptr [{ahead} + 64]",
                    step!($mul, $add, "384", "24", $($row),+),
                    step!($mul, $add, "448", "28", $($row),+),
                    "add {w}, 512",
                    "add {x}, 32",
                    "add {x3}, 32",
                    "add {ahead}, 128",
                    "dec {count}",
                    "jnz 2b",
                    "vmovdqa ymmword ptr [{sums}], ymm0",
                    "vmovdqa ymmword ptr [{sums} + 32], ymm1",
                    "vmovdqa ymmword ptr [{sums} + 64], ymm2",
                    "vmovdqa ymmword ptr [{sums} + 96], ymm3",
                    "vmovdqa ymmword ptr [{sums} + 128], ymm4",
                    "vmovdqa ymmword ptr [{sums} + 160], ymm5",
                    "vmovdqa ymmword ptr [{sums} + 192], ymm6",
                    "vmovdqa ymmword ptr [{sums} + 224], ymm7",
                    "vmovdqa ymmword ptr [{sums} + 256], ymm8",
                    "vmovdqa ymmword ptr [{sums} + 288], ymm9",
                    "vmovdqa ymmword ptr [{sums} + 320], ymm10",
                    "vmovdqa ymmword ptr [{sums} + 352], ymm11",
                    w = inout(reg) w => _,
                    x = inout(reg) x => _,
                    x3 = inout(reg) x.wrapping_add(3 * stride) => _,
                    s = in(reg) stride,
                    count = inout(reg) count => _,
                    ahead = inout(reg) ahead => _,
                    sums = in(reg) sums.0.as_mut_ptr(),
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                    out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                    out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                    options(nostack),
                );
            }
        }
    };
}

/// The six functions of one multiplication, for one to six rows.
macro_rules! dots {
    ($run:ident, $mul:literal, $add:literal, $one:ident, $two:ident, $three:ident, $four:ident, $five:ident, $six:ident) => {
        dot!($one, $mul, $add, ["{x}", "0", "1"]);
        dot!($two, $mul, $add, ["{x}", "0", "1"], ["{x} + {s}", "2", "3"]);
        dot!($three, $mul, $add, ["{x}", "0", "1"], ["{x} + {s}", "2", "3"], ["{x} + 2*{s}", "4", "5"]);
        dot!(
            $four,
            $mul,
            $add,
            ["{x}", "0", "1"],
            ["{x} + {s}", "2", "3"],
            ["{x} + 2*{s}", "4", "5"],
            ["{x3}", "6", "7"]
        );
        dot!(
            $five,
            $mul,
            $add,
            ["{x}", "0", "1"],
            ["{x} + {s}", "2", "3"],
            ["{x} + 2*{s}", "4", "5"],
            ["{x3}", "6", "7"],
            ["{x} + 4*{s}", "8", "9"]
        );
        dot!(
            $six,
            $mul,
            $add,
            ["{x}", "0", "1"],
            ["{x} + {s}", "2", "3"],
            ["{x} + 2*{s}", "4", "5"],
            ["{x3}", "6", "7"],
            ["{x} + 4*{s}", "8", "9"],
            ["{x3} + 2*{s}", "10", "11"]
        );

        /// Sums of `ROWS` rows over `count` times eight steps.
        ///
        /// # Safety
        /// AVX2; `w` holds `count` times 512 bytes and is aligned to 32, `x` holds `ROWS` rows of `count` times 32 bytes, `stride` bytes apart;
        /// `count` is not 0.
        #[inline]
        #[target_feature(enable = "avx2")]
        pub(super) unsafe fn $run<const ROWS: usize>(
            w: *const u8,
            x: *const u8,
            stride: usize,
            count: usize,
            ahead: *const u8,
            sums: &mut Sums,
        ) {
            // SAFETY: the caller's promise, passed on.
            unsafe {
                match ROWS {
                    1 => $one(w, x, stride, count, ahead, sums),
                    2 => $two(w, x, stride, count, ahead, sums),
                    3 => $three(w, x, stride, count, ahead, sums),
                    4 => $four(w, x, stride, count, ahead, sums),
                    5 => $five(w, x, stride, count, ahead, sums),
                    _ => $six(w, x, stride, count, ahead, sums),
                }
            }
        }
    };
}

// Words: products of pairs in 32 bits, 16 input features at a time.
dots!(words, "vpmaddwd", "vpaddd", words_1, words_2, words_3, words_4, words_5, words_6);
// Bytes: products of pairs in 16 bits, 32 input features at a time.
dots!(bytes, "vpmaddubsw", "vpaddw", bytes_1, bytes_2, bytes_3, bytes_4, bytes_5, bytes_6);
