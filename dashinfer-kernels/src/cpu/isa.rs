//! Instruction sets: which one a kernel variant needs, and which ones this machine has.

/// An instruction set that kernel variants are written for, from the least to the most capable of an architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on every machine: the definition of each operator.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (Haswell and Zen, and later).
    Avx2,
    /// x86-64 with AVX-512F beside all of [`Avx2`](Self::Avx2) (Skylake-SP and Zen 4, and later). Only dense products have
    /// kernels of their own; the others run on AVX2.
    Avx512,
}

impl Isa {
    /// All of them, from the least to the most capable.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Its name on command lines: `scalar`, `avx2`, `avx512`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
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
            Self::Avx512 => Self::Avx2.is_available() && is_x86_feature_detected!("avx512f"),
            #[cfg(not(all(feature = "x86", target_arch = "x86_64")))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The best one of this machine.
    #[must_use]
    pub fn best() -> Self {
        [Self::Avx512, Self::Avx2].into_iter().find(|isa| isa.is_available()).unwrap_or(Self::Scalar)
    }
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
