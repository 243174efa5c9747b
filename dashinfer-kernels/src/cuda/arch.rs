//! GPU architectures: which one code is for, and which code a device runs.

use std::fmt;

/// A GPU's compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// 9 of 9.0.
    pub major: u32,
    /// 0 of 9.0.
    pub minor: u32,
}

impl Arch {
    /// Volta.
    pub const SM70: Self = Self::new(7, 0);
    /// Turing.
    pub const SM75: Self = Self::new(7, 5);
    /// Ampere of data centres (A100).
    pub const SM80: Self = Self::new(8, 0);
    /// Ampere (A10, RTX 30).
    pub const SM86: Self = Self::new(8, 6);
    /// Ada (L4, L40, RTX 40).
    pub const SM89: Self = Self::new(8, 9);
    /// Hopper (H100, H200).
    pub const SM90: Self = Self::new(9, 0);
    /// Blackwell of data centres (B100, B200).
    pub const SM100: Self = Self::new(10, 0);
    /// Blackwell (RTX 50, RTX PRO 6000).
    pub const SM120: Self = Self::new(12, 0);

    /// The one with these numbers.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// As a number: 90 for 9.0.
    #[must_use]
    pub const fn number(self) -> u32 {
        10 * self.major + self.minor
    }

    /// What the compiler calls it: with the instructions of this very architecture where there are any.
    #[must_use]
    pub fn target(self) -> String {
        format!("sm_{}{}", self.number(), if self.is_specific() { "a" } else { "" })
    }

    /// Whether code for it may use instructions that no other architecture will have, and then runs on no other: Hopper's
    /// and data-centre Blackwell's tensor cores are reached in no other way.
    pub(crate) fn is_specific(self) -> bool {
        matches!((self.major, self.minor), (9, 0) | (10, 0 | 3))
    }

    /// The architectures whose code this one runs, best first: its own, then the smaller minor numbers of its major one.
    pub(crate) fn runs(self) -> impl Iterator<Item = Arch> {
        let older = (0..self.minor).rev().map(move |minor| Self::new(self.major, minor));
        std::iter::once(self).chain(older.filter(|arch| !arch.is_specific()))
    }

    /// Reads `sm_90a`, `sm_90`, `90a` or `90`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let number: u32 = text.strip_prefix("sm_").unwrap_or(text).trim_end_matches('a').parse().ok()?;
        let arch = Self::new(number / 10, number % 10);
        (number >= 50 && (!text.ends_with('a') || arch.is_specific())).then_some(arch)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_compilers() {
        for name in ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120", "sm_121"] {
            assert_eq!(Arch::parse(name).unwrap().target(), name);
        }
        assert_eq!(Arch::parse("90"), Some(Arch::SM90));
        assert_eq!(Arch::parse("100a"), Some(Arch::SM100));
        for name in ["", "sm_", "sm_a", "sm_80a", "compute_90", "9.0", "-90"] {
            assert_eq!(Arch::parse(name), None, "{name}");
        }
    }

    #[test]
    fn code_runs_on_later_minors_unless_it_is_specific() {
        let runs = |arch: Arch| arch.runs().map(|arch| arch.number()).collect::<Vec<_>>();
        assert_eq!(runs(Arch::new(8, 7)), [87, 86, 85, 84, 83, 82, 81, 80]);
        assert_eq!(runs(Arch::SM90), [90]);
        assert_eq!(runs(Arch::new(10, 3)), [103, 102, 101]);
        assert_eq!(runs(Arch::new(12, 1)), [121, 120]);
    }
}
