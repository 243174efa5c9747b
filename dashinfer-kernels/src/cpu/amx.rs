//! AMX: whether there are tiles, and the few instructions that work on them.
//!
//! A tile is a register of up to 16 rows of 64 bytes. The compiler has no stable functions for them yet, so they are written in
//! assembly; a thread that loads no configuration pays nothing for them.
//! <https://www.intel.com/content/www/us/en/developer/articles/technical/intel-sdm.html>, volume 1, chapter 18.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
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
