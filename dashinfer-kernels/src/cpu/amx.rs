//! AMX: whether there are tiles, and the few instructions that work on them.
//!
//! A tile is a register of up to 16 rows of 64 bytes. The compiler has no stable functions for them yet, so they are written in
//! assembly; a thread that loads no configuration pays nothing for them.
//! <https://www.intel.com/content/www/us/en/developer/articles/technical/intel-sdm.html>, volume 1, chapter 18.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::ops::Range;
use std::sync::OnceLock;

/// Whether the CPU has tiles for int8 and bf16, the system saves them, and this process may use them. Asks once, since asking
/// the system for leave is what grants it.
pub(crate) fn is_available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| has_tiles() && system_saves_tiles() && may_use_tiles())
}

fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILE | INT8) == BF16 | TILE | INT8
}

/// Bits 17 and 18 of XCR0: tile configuration and tile data.
fn system_saves_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: the caller saw that the system has enabled the instruction.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: OSXSAVE says that the instruction is there and enabled.
    __cpuid(1).ecx & OSXSAVE != 0 && unsafe { xcr0() } & (3 << 17) == 3 << 17
}

/// Linux gives the 8 KiB of state to processes that ask. <https://docs.kernel.org/arch/x86/xstate.html>
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes only what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// The shapes of the eight tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Bytes of a row of a tile.
pub(crate) const ROW_BYTES: usize = 64;
/// Rows of a tile.
pub(crate) const ROWS: usize = 16;

impl TileConfig {
    /// Tiles for a block of two by two: sums in 0 to 3, the first of `x`'s with `first` rows and the second with `second`, in 4 and 5; weights
    /// in 6 and 7.
    const fn block(first: usize, second: usize) -> Self {
        assert!(first >= 1 && first <= ROWS && second >= 1 && second <= ROWS, "a tile has 1 to 16 rows");
        let (a, b) = (first as u8, second as u8);
        Self::of([a, a, b, b, a, b, ROWS as u8, ROWS as u8])
    }

    /// Tiles for one by four: sums in 0 to 3, `rows` of `x` in 4, and the right side in 5 to 7.
    const fn four(rows: usize) -> Self {
        assert!(rows >= 1 && rows <= ROWS, "a tile has 1 to 16 rows");
        let (x, right) = (rows as u8, ROWS as u8);
        Self::of([x, x, x, x, x, right, right, right])
    }

    /// Tiles of whole rows.
    const fn of(shapes: [u8; 8]) -> Self {
        let mut rows = [0; 16];
        let mut row_bytes = [0; 16];
        let mut tile = 0;
        while tile < shapes.len() {
            rows[tile] = shapes[tile];
            row_bytes[tile] = ROW_BYTES as u16;
            tile += 1;
        }
        Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }

    /// Tiles for groups: sums of 16 rows by 16 columns in 0 to 3, 16 rows of `depth` bytes of `x` in 4 and 5, and the weights of as many input
    /// features, four to a row, in 6 and 7.
    const fn group(depth: usize) -> Self {
        assert!(depth >= 4 && depth <= ROW_BYTES && depth.is_multiple_of(4), "whole quads, in the bytes of a row");
        let mut config = Self::block(ROWS, ROWS);
        let mut side = 0;
        while side < 2 {
            config.row_bytes[4 + side] = depth as u16;
            config.rows[6 + side] = (depth / 4) as u8;
            side += 1;
        }
        config
    }

    /// Sets this thread's tiles to these shapes.
    ///
    /// # Safety
    /// [`is_available`] was true.
    unsafe fn load(&self) {
        // SAFETY: the configuration is valid by construction, and tiles may be used.
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly, preserves_flags)) };
    }
}

/// Shapes this thread's tiles for groups, of which a tile takes `depth` input features: 32 or 64.
///
/// # Safety
/// [`is_available`] was true.
pub(crate) unsafe fn shape_for_groups(depth: usize) {
    // SAFETY: the caller's promise.
    unsafe { TileConfig::group(depth).load() }
}

/// Gives this thread's tiles back, so that the system need not save them.
///
/// # Safety
/// [`is_available`] was true.
pub(crate) unsafe fn release() {
    // SAFETY: tiles may be used.
    unsafe { std::arch::asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
}

/// The operands of a block of two by two tiles.
pub(crate) struct Block {
    /// The first and the second rows of `x`.
    pub(crate) x: [*const u8; 2],
    /// Bytes between rows of `x`.
    pub(crate) x_stride: usize,
    /// Two panels of weights, 1024 bytes for each 64 bytes of a row of `x`.
    pub(crate) weights: [*const u8; 2],
    /// Steps of 64 bytes of a row of `x`.
    pub(crate) steps: usize,
}

/// Sums of two by two tiles, in 32 bits: `[which rows][which panel][row][column]`.
#[repr(C, align(64))]
pub(crate) struct BlockSums<T>(pub(crate) [[[[T; 16]; ROWS]; 2]; 2]);

/// Fetches four rows of the tile of `x` that comes two steps on.
macro_rules! fetch_rows {
    () => {
        "prefetcht0 [{next}]\nprefetcht0 [{next} + {stride}]\nprefetcht0 [{next} + 2*{stride}]\nprefetcht0 [{next} + {stride3}]\n"
    };
}

/// Fetches the tile of `x` that comes two steps on.
macro_rules! fetch_x {
    ($x:literal) => {
        concat!(
            "lea {next}, [",
            $x,
            " + 128]\n",
            fetch_rows!(),
            "lea {next}, [{next} + 4*{stride}]\n",
            fetch_rows!(),
            "lea {next}, [{next} + 4*{stride}]\n",
            fetch_rows!(),
            "lea {next}, [{next} + 4*{stride}]\n",
            fetch_rows!(),
        )
    };
}

/// Fetches the tile of weights that comes two steps on.
macro_rules! fetch_weights {
    ($w:literal) => {
        fetch_weights!($w, "2048", "2112", "2176", "2240", "2304", "2368", "2432", "2496", "2560", "2624", "2688", "2752",
            "2816", "2880", "2944", "3008")
    };
    ($w:literal, $($at:literal),+) => {
        concat!($("prefetcht0 [", $w, " + ", $at, "]\n"),+)
    };
}

macro_rules! block {
    ($(#[$doc:meta])* $name:ident, $sum:ty, $multiply:literal) => {
        $(#[$doc])*
        ///
        /// Tiles are fetched to the L1 cache two steps ahead: a load from the L2 cache holds up the multiplications behind it, and with
        /// two threads on a core that halves the speed.
        ///
        /// # Safety
        /// [`is_available`] was true, and this thread's tiles have the shapes of [`Place`]. As many rows as that says can be read
        /// from each of `x`, `steps` times 64 bytes of each; and `steps` times 1024 bytes from each of `weights`.
        pub(crate) unsafe fn $name(block: &Block, sums: &mut BlockSums<$sum>) {
            let Block { x, x_stride, weights, steps } = *block;
            // SAFETY: the caller's promise; `sums` holds four tiles of 1024 bytes; fetching ahead touches nothing.
            unsafe {
                std::arch::asm!(
                    "tileloadd tmm0, [{sums} + {row}*1]",
                    "tileloadd tmm1, [{sums} + {row}*1 + 1024]",
                    "tileloadd tmm2, [{sums} + {row}*1 + 2048]",
                    "tileloadd tmm3, [{sums} + {row}*1 + 3072]",
                    "test {steps}, {steps}",
                    "jz 3f",
                    "2:",
                    "tileloadd tmm6, [{w0} + {row}*1]",
                    "tileloadd tmm4, [{x0} + {stride}*1]",
                    fetch_x!("{x0}"),
                    concat!($multiply, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{w1} + {row}*1]",
                    fetch_weights!("{w0}"),
                    concat!($multiply, " tmm1, tmm4, tmm7"),
                    "tileloadd tmm5, [{x1} + {stride}*1]",
                    fetch_x!("{x1}"),
                    concat!($multiply, " tmm2, tmm5, tmm6"),
                    fetch_weights!("{w1}"),
                    concat!($multiply, " tmm3, tmm5, tmm7"),
                    "add {w0}, 1024",
                    "add {w1}, 1024",
                    "add {x0}, 64",
                    "add {x1}, 64",
                    "dec {steps}",
                    "jnz 2b",
                    "3:",
                    "tilestored [{sums} + {row}*1], tmm0",
                    "tilestored [{sums} + {row}*1 + 1024], tmm1",
                    "tilestored [{sums} + {row}*1 + 2048], tmm2",
                    "tilestored [{sums} + {row}*1 + 3072], tmm3",
                    w0 = inout(reg) weights[0] => _,
                    w1 = inout(reg) weights[1] => _,
                    x0 = inout(reg) x[0] => _,
                    x1 = inout(reg) x[1] => _,
                    steps = inout(reg) steps => _,
                    next = out(reg) _,
                    stride = in(reg) x_stride,
                    stride3 = in(reg) 3 * x_stride,
                    row = in(reg) ROW_BYTES,
                    sums = in(reg) sums.0.as_mut_ptr(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

block!(
    /// Adds the products of signed bytes of `x` and unsigned bytes of weights, four to a 32-bit sum.
    multiply_bytes, i32, "tdpbsud"
);
block!(
    /// Adds the products of bf16, two to an f32 sum.
    multiply_bf16, f32, "tdpbf16ps"
);

/// One step of [`multiply_four`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Where the tile of `x` is, in bytes from its first.
    pub(crate) x: usize,
    /// Four tiles of the right side, each 1024 bytes in a row.
    pub(crate) right: [*const u8; 4],
    /// Four times 1024 bytes that will be read soon, wherever.
    pub(crate) ahead: [*const u8; 4],
}

/// Sums of four tiles side by side: `[which tile of the right side][row][column]`.
#[repr(C, align(64))]
pub(crate) struct FourSums(pub(crate) [[[f32; 16]; ROWS]; 4]);

/// Fetches 1024 bytes.
macro_rules! fetch_tile {
    () => {
        fetch_tile!("0", "64", "128", "192", "256", "320", "384", "448", "512", "576", "640", "704", "768",
            "832", "896", "960")
    };
    ($($at:literal),+) => {
        concat!($("prefetcht0 [{ahead} + ", $at, "]\n"),+)
    };
}

/// Sets four tiles of sums to those of the products of bf16, two to an f32 sum, of one tile of `x` with four of the right side in each step.
///
/// # Safety
/// [`is_available`] was true, and [`with_four`] has set up this thread's tiles. As many rows as that says can be read from each step's tile
/// of `x`, 64 bytes of each, `x_stride` bytes apart, and 1024 bytes of each tile of the right side.
pub(crate) unsafe fn multiply_four(steps: &[Step], x: *const u8, x_stride: usize, sums: &mut FourSums) {
    const {
        assert!(
            size_of::<Step>() == 72
                && std::mem::offset_of!(Step, right) == 8
                && std::mem::offset_of!(Step, ahead) == 40
        )
    };
    // SAFETY: the caller's promise; `sums` holds four tiles of 1024 bytes; fetching ahead touches nothing.
    unsafe {
        std::arch::asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "test {count}, {count}",
            "jz 3f",
            "2:",
            "mov {right}, [{steps}]",
            "add {right}, {x}",
            "tileloadd tmm4, [{right} + {stride}*1]",
            "mov {right}, [{steps} + 8]",
            "tileloadd tmm5, [{right} + {row}*1]",
            "mov {ahead}, [{steps} + 40]",
            fetch_tile!(),
            "tdpbf16ps tmm0, tmm4, tmm5",
            "mov {right}, [{steps} + 16]",
            "tileloadd tmm6, [{right} + {row}*1]",
            "mov {ahead}, [{steps} + 48]",
            fetch_tile!(),
            "tdpbf16ps tmm1, tmm4, tmm6",
            "mov {right}, [{steps} + 24]",
            "tileloadd tmm7, [{right} + {row}*1]",
            "mov {ahead}, [{steps} + 56]",
            fetch_tile!(),
            "tdpbf16ps tmm2, tmm4, tmm7",
            "mov {right}, [{steps} + 32]",
            "tileloadd tmm5, [{right} + {row}*1]",
            "mov {ahead}, [{steps} + 64]",
            fetch_tile!(),
            "tdpbf16ps tmm3, tmm4, tmm5",
            "add {steps}, 72",
            "dec {count}",
            "jnz 2b",
            "3:",
            "tilestored [{sums} + {row}*1], tmm0",
            "tilestored [{sums} + {row}*1 + 1024], tmm1",
            "tilestored [{sums} + {row}*1 + 2048], tmm2",
            "tilestored [{sums} + {row}*1 + 3072], tmm3",
            steps = inout(reg) steps.as_ptr() => _,
            count = inout(reg) steps.len() => _,
            right = out(reg) _,
            ahead = out(reg) _,
            x = in(reg) x,
            stride = in(reg) x_stride,
            row = in(reg) ROW_BYTES,
            sums = in(reg) sums.0.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Calls `run` with this thread's tiles set up for [`multiply_four`], and 1 to 16 rows of `x`.
///
/// # Safety
/// [`is_available`] was true.
pub(crate) unsafe fn with_four<T>(rows: usize, run: impl FnOnce() -> T) -> T {
    // SAFETY: the caller's promise. Should `run` panic, the tiles stay set up, which costs the system a little time.
    unsafe {
        TileConfig::four(rows).load();
        let result = run();
        release();
        result
    }
}

/// A block of [`for_blocks`].
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// 1 to 32 rows.
    pub(crate) rows: Range<usize>,
    /// One or two panels.
    pub(crate) panels: Range<usize>,
    /// Input features; not empty.
    pub(crate) ks: Range<usize>,
}

impl Place {
    /// The first rows of both tiles of `x`. Where one tile holds all rows, the other has the first of them again.
    pub(crate) fn first_rows(&self) -> [usize; 2] {
        [self.rows.start, if self.rows.len() > ROWS { self.rows.start + ROWS } else { self.rows.start }]
    }

    /// The panels of both tiles of weights. A single one stands for both.
    pub(crate) fn panels(&self) -> [usize; 2] {
        [self.panels.start, self.panels.end - 1]
    }

    fn config(&self) -> TileConfig {
        match self.rows.len() {
            few @ ..=ROWS => TileConfig::block(few, 1),
            many => TileConfig::block(ROWS, many - ROWS),
        }
    }
}

/// As many rows of a part stay in the L2 cache.
const MOST_ROWS: usize = 576;

/// Walks all rows by all panels in blocks of up to 32 rows and two panels, whose tiles are set up when `run` is called:
///
/// ```text
///   for each `part` of k           its columns of all rows stay in the L2 cache
///     for each pair of panels      the part of it stays in the L1 cache
///       for each 32 rows           2 x 2 tiles of sums; between the parts they stand in the output
/// ```
///
/// # Safety
/// [`is_available`] was true.
pub(crate) unsafe fn for_blocks(
    rows: Range<usize>,
    panels: Range<usize>,
    padded: usize,
    part: usize,
    mut run: impl FnMut(Place),
) {
    let mut shape = 0;
    // Where all columns of all rows stay in the L2 cache, one part is as good, and its sums stay in tiles.
    let part = if rows.len() * padded <= part * MOST_ROWS { padded.max(1) } else { part };
    // Without input features there is nothing to multiply, but sums have a bias.
    for k in (0..padded.max(1)).step_by(part) {
        let ks = k..padded.min(k + part);
        for panel in panels.clone().step_by(2) {
            for first in rows.clone().step_by(2 * ROWS) {
                let place = Place {
                    rows: first..rows.end.min(first + 2 * ROWS),
                    panels: panel..panels.end.min(panel + 2),
                    ks: ks.clone(),
                };
                if shape != place.rows.len() {
                    shape = place.rows.len();
                    // SAFETY: the caller's promise.
                    unsafe { place.config().load() };
                }
                run(place);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { release() };
}
