//! Every file of device code, with every way in which it is compiled.
//!
//! A file is compiled once for each element type and each list of macros ([`Unit::variants`]) that a launcher can ask for.
//! They are all written down here, so that the check of all kernels and the builder of images (`cargo xtask kernels`) walk
//! the table that the launchers compile from.

use super::arch::Arch;
use crate::DType;

/// A file of device code.
#[derive(Debug)]
pub struct Unit {
    /// The file's name: `rms_norm.cu`.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
    /// The architectures that it is for.
    pub archs: Archs,
    /// The element types: each is a compilation with `-DDASH_TYPE=bf16` and the like.
    pub types: &'static [DType],
    /// The macros of each variant: `&[&["-DHEAD_DIM=64"], &["-DHEAD_DIM=128"]]`; `&[&[]]` if there is but one.
    pub variants: &'static [&'static [&'static str]],
}

/// A range of architectures, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Archs {
    /// The oldest.
    pub from: Arch,
    /// The newest.
    pub to: Arch,
}

impl Archs {
    /// All that are supported.
    pub const ALL: Self = Self::since(Arch::SM70);
    /// Before `mma.sync` of bf16 and asynchronous copies.
    pub const BEFORE_SM80: Self = Self { from: Arch::SM70, to: Arch::new(7, 9) };
    /// With `mma.sync` of bf16 and asynchronous copies.
    pub const SINCE_SM80: Self = Self::since(Arch::SM80);
    /// Hopper alone: code with `wgmma` runs on no other.
    pub const SM90: Self = Self { from: Arch::SM90, to: Arch::SM90 };

    /// This one and all after it.
    pub const fn since(from: Arch) -> Self {
        Self { from, to: Arch::new(99, 9) }
    }

    /// Whether it is one of them.
    pub fn contains(self, arch: Arch) -> bool {
        self.from <= arch && arch <= self.to
    }
}

impl Unit {
    /// The options of every compilation: each element type with each variant.
    pub fn compilations(&self) -> impl Iterator<Item = Vec<&'static str>> {
        let of_type = |&dtype| self.variants.iter().map(move |variant| options(dtype, variant));
        self.types.iter().flat_map(of_type)
    }

    /// Whether these options, in any order, are among [`Unit::compilations`].
    pub(crate) fn lists(&self, options: &[&str]) -> bool {
        let wanted = sorted(options);
        self.compilations().any(|listed| sorted(&listed) == wanted)
    }
}

/// The options of a compilation for this element type.
pub(crate) fn options(dtype: DType, variant: &[&'static str]) -> Vec<&'static str> {
    std::iter::once(type_option(dtype)).chain(variant.iter().copied()).collect()
}

/// The macro that makes an element type `T`.
pub(crate) fn type_option(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "-DDASH_TYPE=f32",
        DType::F16 => "-DDASH_TYPE=f16",
        DType::BF16 => "-DDASH_TYPE=bf16",
    }
}

fn sorted<'a>(options: &[&'a str]) -> Vec<&'a str> {
    let mut options = options.to_vec();
    options.sort_unstable();
    options
}

/// What the files include, by the name that they include it under. The compiler gets the texts: a machine that runs kernels
/// has no copy of the files.
pub(crate) static HEADERS: &[(&str, &str)] =
    &[("common.cuh", include_str!("../../cuda/common.cuh")), ("mma.cuh", include_str!("../../cuda/mma.cuh"))];

/// Every file of device code.
pub static UNITS: &[&Unit] = &[];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_is_listed_once() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let Ok(entries) = fs::read_dir(folder) else { return println!("skipped: the sources are not here") };
        let files: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        let with = |ending: &str| files.iter().filter(|f| f.ends_with(ending)).cloned().collect::<BTreeSet<_>>();
        let units: BTreeSet<_> = UNITS.iter().map(|unit| unit.name.to_string()).collect();
        let headers: BTreeSet<_> = HEADERS.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(units, with(".cu"));
        assert_eq!(headers, with(".cuh"));
        assert_eq!(units.len(), UNITS.len());
    }

    #[test]
    fn no_compilation_is_listed_twice() {
        for unit in UNITS {
            let all: Vec<_> = unit.compilations().map(|options| sorted(&options)).collect();
            let once: BTreeSet<_> = all.iter().collect();
            assert_eq!(once.len(), all.len(), "{}", unit.name);
            assert!(!all.is_empty(), "{} is never compiled", unit.name);
        }
    }

    #[test]
    fn compilations_are_types_times_variants() {
        static UNIT: Unit = Unit {
            name: "some.cu",
            source: "",
            archs: Archs::SINCE_SM80,
            types: &[DType::BF16, DType::F16],
            variants: &[&["-DHEAD_DIM=64", "-DTILE=16"], &["-DHEAD_DIM=128", "-DTILE=16"]],
        };
        let all: Vec<_> = UNIT.compilations().map(|options| options.join(" ")).collect();
        let wanted = [
            "-DDASH_TYPE=bf16 -DHEAD_DIM=64 -DTILE=16",
            "-DDASH_TYPE=bf16 -DHEAD_DIM=128 -DTILE=16",
            "-DDASH_TYPE=f16 -DHEAD_DIM=64 -DTILE=16",
            "-DDASH_TYPE=f16 -DHEAD_DIM=128 -DTILE=16",
        ];
        assert_eq!(all, wanted);
        assert!(UNIT.lists(&["-DTILE=16", "-DDASH_TYPE=f16", "-DHEAD_DIM=64"]));
        assert!(!UNIT.lists(&["-DDASH_TYPE=f32", "-DHEAD_DIM=64", "-DTILE=16"]));
        assert!(
            UNIT.archs.contains(Arch::SM80) && UNIT.archs.contains(Arch::SM120) && !UNIT.archs.contains(Arch::SM75)
        );
        assert!(Archs::SM90.contains(Arch::SM90) && !Archs::SM90.contains(Arch::SM100));
        assert!(Archs::BEFORE_SM80.contains(Arch::SM75) && !Archs::BEFORE_SM80.contains(Arch::SM80));
    }
}
