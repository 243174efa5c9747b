//! Instruction sets: which one a kernel variant needs, and which ones this machine has.

/// An instruction set that kernel variants are written for, from the least to the most capable of an architecture. Each
/// includes those of its architecture before it. An operator without kernels for one of them uses those of the next lesser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on every machine: the definition of each operator.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (Haswell and Zen, and later).
    Avx2,
    /// x86-64 with AVX-512F, BW, DQ and VL (Skylake-SP and Zen 4, and later).
    Avx512,
    /// x86-64 with AVX-512 VNNI: dot products of integers (Cascade Lake and Zen 4, and later).
    Avx512Vnni,
    /// x86-64 with AVX-512 BF16: dot products of bf16 (Cooper Lake and Zen 4, and later).
    Avx512Bf16,
    /// x86-64 with the AMX tiles for int8 and bf16 (Sapphire Rapids, and later). Linux only, which must let the process use them.
    Amx,
    /// 64-bit Arm with NEON: every one.
    Neon,
    /// 64-bit Arm with `dotprod` (Neoverse N1, Apple M1, and later).
    DotProd,
    /// 64-bit Arm with `i8mm` and `bf16` (Neoverse V1 and N2, Apple M2, and later).
    I8mm,
    /// 64-bit Arm with vectors of SVE that are longer than NEON's 128 bits, beside all of [`I8mm`](Self::I8mm) (Neoverse V1). With vectors of
    /// 128 bits, as Neoverse N2 and V2 have them, SVE would bring nothing.
    Sve,
}

impl Isa {
    /// All of them, from the least to the most capable of each architecture.
    pub const ALL: [Self; 10] = [
        Self::Scalar,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::Amx,
        Self::Neon,
        Self::DotProd,
        Self::I8mm,
        Self::Sve,
    ];

    /// Its name on command lines: `scalar`, `avx2`, `avx512`, `avx512vnni`, `avx512bf16`, `amx`, `neon`, `dotprod`, `i8mm`, `sve`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::DotProd => "dotprod",
            Self::I8mm => "i8mm",
            Self::Sve => "sve",
        }
    }

    /// Whether this machine has it and this build holds its kernels.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(all(feature = "x86", target_arch = "x86_64"))]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(all(feature = "x86", target_arch = "x86_64"))]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(all(feature = "x86", target_arch = "x86_64"))]
            Self::Avx512Vnni => Self::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(all(feature = "x86", target_arch = "x86_64"))]
            Self::Avx512Bf16 => Self::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(all(feature = "x86", target_arch = "x86_64"))]
            Self::Amx => Self::Avx512Bf16.is_available() && super::amx::is_available(),
            #[cfg(all(feature = "arm", target_arch = "aarch64"))]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(all(feature = "arm", target_arch = "aarch64"))]
            Self::DotProd => Self::Neon.is_available() && std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(all(feature = "arm", target_arch = "aarch64"))]
            Self::I8mm => {
                Self::DotProd.is_available()
                    && std::arch::is_aarch64_feature_detected!("i8mm")
                    && std::arch::is_aarch64_feature_detected!("bf16")
            }
            #[cfg(all(feature = "arm", target_arch = "aarch64"))]
            Self::Sve => {
                Self::I8mm.is_available() && std::arch::is_aarch64_feature_detected!("sve") && {
                    // SAFETY: the machine has SVE.
                    unsafe { sve_bytes() > 16 }
                }
            }
            #[cfg(not(all(feature = "x86", target_arch = "x86_64")))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => false,
            #[cfg(not(all(feature = "arm", target_arch = "aarch64")))]
            Self::Neon | Self::DotProd | Self::I8mm | Self::Sve => false,
        }
    }

    /// The best one of this machine.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rfind(|isa| isa.is_available()).unwrap_or(Self::Scalar)
    }
}

/// Bytes of a vector of SVE of this thread.
///
/// # Safety
/// The machine has SVE.
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
#[target_feature(enable = "sve")]
pub(crate) unsafe fn sve_bytes() -> usize {
    let bytes;
    // SAFETY: SVE is on in this function; the instruction only counts.
    unsafe { std::arch::asm!("cntb {}", out(reg) bytes, options(pure, nomem, nostack, preserves_flags)) };
    bytes
}

/// One implementation of an operator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant<F> {
    /// What the machine must have for `run` to be called.
    pub(crate) isa: Isa,
    /// The implementation.
    pub(crate) run: F,
}

/// The first of `variants` (best first, scalar last) that the machine has and that needs no more than `limit`.
pub(crate) fn choose<F: Copy>(variants: &[Variant<F>], limit: Isa) -> F {
    variants
        .iter()
        .find(|v| v.isa <= limit && v.isa.is_available())
        .expect("every table ends with a scalar variant, which is always available")
        .run
}

/// The variants that this machine can run; the names of the others go to the test's output.
#[cfg(test)]
pub(crate) fn supported<F: Copy>(variants: &[Variant<F>]) -> Vec<Variant<F>> {
    for v in variants.iter().filter(|v| !v.isa.is_available()) {
        println!("skipped: {:?} is not available on this machine", v.isa);
    }
    variants.iter().copied().filter(|v| v.isa.is_available()).collect()
}

#[cfg(all(test, feature = "arm", target_arch = "aarch64"))]
mod tests {
    use super::*;

    /// What slipped through the dispatch would be skipped by every other test.
    #[test]
    fn an_emulated_cpu_has_what_its_name_says() {
        let (Some(_), Ok(cpu)) = (std::env::var_os("DASHINFER_EMULATED"), std::env::var("QEMU_CPU")) else {
            println!("skipped: no emulator that says so");
            return;
        };
        let best = match &*cpu {
            "cortex-a57" | "cortex-a72" | "a64fx" => Isa::Neon,
            "cortex-a76" | "neoverse-n1" => Isa::DotProd,
            "max,sve=off" | "max,sve-max-vq=1" | "max,sve-default-vector-length=16" => Isa::I8mm,
            "max" | "max,sve-default-vector-length=32" => Isa::Sve,
            other => {
                println!("skipped: what is {other}?");
                return;
            }
        };
        assert_eq!(Isa::best(), best, "{cpu}");
    }
}
