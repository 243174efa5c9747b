//! Every file of device code, with every way in which it is compiled.
//!
//! A file is compiled once for each element type and each list of macros that a launcher can ask for. They are all in one
//! table, made of the functions and lists that the launchers themselves choose from, so that the check of all kernels and the
//! builder of images (`cargo xtask kernels`) compile what will be asked for.

use super::arch::Arch;
use super::{ops, probe};
use crate::DType;

/// A file of device code.
#[derive(Debug)]
pub struct Unit {
    /// The file's name in `cuda/`: `rms_norm.cu`.
    pub name: &'static str,
    /// Its text.
    pub source: &'static str,
}

/// What a file is compiled for.
#[derive(Debug)]
pub struct Listed {
    /// The file.
    pub unit: &'static Unit,
    /// The architectures that it is for.
    pub archs: Archs,
    /// The element types: each is a compilation with `-DDASH_TYPE=bf16` and the like.
    pub types: &'static [DType],
    /// The macros of each variant for an architecture, beside the element type.
    pub variants: fn(Arch) -> Vec<Vec<String>>,
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

impl Listed {
    /// The options of every compilation for an architecture: each element type with each variant.
    #[must_use]
    pub fn compilations(&self, arch: Arch) -> Vec<Vec<String>> {
        if !self.archs.contains(arch) {
            return Vec::new();
        }
        let variants = (self.variants)(arch);
        let with = |dtype, variant: &[String]| [&[type_option(dtype)], variant].concat();
        self.types.iter().flat_map(|&dtype| variants.iter().map(move |variant| with(dtype, variant))).collect()
    }
}

/// The macro that makes an element type `T`.
fn type_option(dtype: DType) -> String {
    format!("-DDASH_TYPE={dtype}")
}

/// Whether a compilation, with its options in any order, is in the table.
#[cfg(test)]
pub(crate) fn is_listed(unit: &Unit, arch: Arch, options: &[&str]) -> bool {
    let wanted = sorted(options);
    let listed = UNITS.iter().filter(|listed| listed.unit.name == unit.name);
    listed.flat_map(|listed| listed.compilations(arch)).any(|options| sorted(&options) == wanted)
}

#[cfg(test)]
fn sorted<S: AsRef<str>>(options: &[S]) -> Vec<&str> {
    let mut options: Vec<&str> = options.iter().map(AsRef::as_ref).collect();
    options.sort_unstable();
    options
}

/// What the files include, by the name that they include it under. The compiler gets the texts: a machine that runs kernels
/// has no copy of the files.
pub(crate) static HEADERS: &[(&str, &str)] = &[
    ("activation.cuh", include_str!("../../cuda/activation.cuh")),
    ("attention_units.cuh", include_str!("../../cuda/attention_units.cuh")),
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("latent.cuh", include_str!("../../cuda/latent.cuh")),
    ("hopper.cuh", include_str!("../../cuda/hopper.cuh")),
    ("moe.cuh", include_str!("../../cuda/moe.cuh")),
    ("mma.cuh", include_str!("../../cuda/mma.cuh")),
    ("rope.cuh", include_str!("../../cuda/rope.cuh")),
    ("softmax.cuh", include_str!("../../cuda/softmax.cuh")),
];

const ALL_TYPES: &[DType] = &[DType::F32, DType::F16, DType::BF16];
/// What tensor cores take.
const HALVES: &[DType] = &[DType::F16, DType::BF16];

/// Every file of device code; twice, if not every architecture needs it for the same types.
pub static UNITS: &[Listed] = &[
    Listed {
        unit: &ops::attention_decode::UNIT,
        archs: Archs::SINCE_SM80,
        types: HALVES,
        variants: |arch| ops::attention_decode::variants(arch).map(|variant| variant.options()).collect(),
    },
    Listed {
        unit: &ops::attention_prefill_sm80::UNIT,
        archs: Archs::SINCE_SM80,
        types: HALVES,
        variants: |arch| {
            capped_or_not(&ops::attention_prefill_sm80::HEAD_DIMS, |head_dim, is_capped| {
                ops::attention_prefill_sm80::options(arch, head_dim, is_capped)
            })
        },
    },
    Listed {
        unit: &ops::attention_prefill_sm90::UNIT,
        archs: Archs::SM90,
        types: HALVES,
        variants: |_| capped_or_not(&ops::attention_prefill_sm90::HEAD_DIMS, ops::attention_prefill_sm90::options),
    },
    Listed {
        unit: &ops::attention_simple::UNIT,
        archs: Archs::ALL,
        types: ALL_TYPES,
        variants: |_| {
            let pairs = ops::attention_simple::PAIRS.iter().map(|&(pairs, _)| pairs).collect::<Vec<_>>();
            capped_or_not(&pairs, ops::attention_simple::options)
        },
    },
    Listed { unit: &ops::embed::UNIT, archs: Archs::ALL, types: ALL_TYPES, variants: one },
    Listed {
        unit: &ops::gate::UNIT,
        archs: Archs::ALL,
        types: ALL_TYPES,
        variants: |_| ops::activation::OPTIONS.map(|option| vec![option.to_owned()]).to_vec(),
    },
    Listed { unit: &ops::gather_rows::UNIT, archs: Archs::ALL, types: ALL_TYPES, variants: one },
    Listed {
        unit: &ops::latent::decode::UNIT,
        archs: Archs::SINCE_SM80,
        types: HALVES,
        variants: |_| vec![ops::latent::decode::options().to_vec()],
    },
    Listed {
        unit: &ops::latent::product::UNIT,
        archs: Archs::SINCE_SM80,
        types: HALVES,
        variants: |_| ops::latent::product::VARIANTS.iter().map(|variant| variant.options().to_vec()).collect(),
    },
    Listed { unit: &ops::latent::rope::UNIT, archs: Archs::ALL, types: ALL_TYPES, variants: one },
    Listed {
        unit: &ops::latent::simple::UNIT,
        archs: Archs::ALL,
        types: ALL_TYPES,
        variants: |_| {
            ops::latent::simple::PAIRS.iter().map(|&pairs| vec![ops::latent::simple::option(pairs)]).collect()
        },
    },
    Listed { unit: &ops::linear::rows::UNIT, archs: Archs::SINCE_SM80, types: HALVES, variants: linear_rows },
    Listed { unit: &ops::linear::SIMPLE, archs: Archs::BEFORE_SM80, types: ALL_TYPES, variants: linear_simple },
    Listed { unit: &ops::linear::SIMPLE, archs: Archs::SINCE_SM80, types: &[DType::F32], variants: linear_simple },
    Listed { unit: &ops::moe::COMBINE, archs: Archs::SINCE_SM80, types: HALVES, variants: one },
    Listed { unit: &ops::moe::packed::UNIT, archs: Archs::SINCE_SM80, types: HALVES, variants: gated_or_not },
    Listed {
        unit: &ops::moe::route::UNIT,
        archs: Archs::SINCE_SM80,
        types: &[DType::F32],
        variants: |_| ops::moe::route::PER_LANE.map(|per_lane| vec![ops::moe::route::option(per_lane)]).to_vec(),
    },
    Listed {
        unit: &ops::moe::tiles::SM80,
        archs: Archs::SINCE_SM80,
        types: HALVES,
        variants: |_| moe_tiles(&ops::moe::tiles::SM80_TILES),
    },
    Listed {
        unit: &ops::moe::tiles::SM90,
        archs: Archs::SM90,
        types: HALVES,
        variants: |_| moe_tiles(&ops::moe::tiles::SM90_TILES),
    },
    Listed { unit: &probe::UNIT, archs: Archs::ALL, types: &[DType::BF16], variants: one },
    Listed { unit: &ops::rms_norm::UNIT, archs: Archs::ALL, types: ALL_TYPES, variants: one },
    Listed { unit: &ops::rope::UNIT, archs: Archs::ALL, types: ALL_TYPES, variants: one },
    Listed { unit: &ops::sample::UNIT, archs: Archs::ALL, types: &[DType::F32], variants: one },
    Listed { unit: &ops::soft_cap::UNIT, archs: Archs::ALL, types: &[DType::F32], variants: one },
];

/// Every size, with scores that are capped and scores that are not.
fn capped_or_not<S: Copy>(sizes: &[S], options: impl Fn(S, bool) -> Vec<String>) -> Vec<Vec<String>> {
    sizes.iter().flat_map(|&size| [false, true].map(|is_capped| options(size, is_capped))).collect()
}

/// Every tile, for rows that are aligned and not, with each kind of result: T, f32, gated T.
fn linear_rows(arch: Arch) -> Vec<Vec<String>> {
    use ops::linear::rows::{Variant, tiles};
    let mut variants = Vec::new();
    for &tile in tiles(arch) {
        for aligned in [true, false] {
            for (out_f32, gated) in [(false, false), (true, false), (false, true)] {
                variants.push(Variant { tile, aligned, out_f32, gated }.options());
            }
        }
    }
    variants
}

fn linear_simple(_: Arch) -> Vec<Vec<String>> {
    let of = |tile: &str| ["-DOUT_F32=0", "-DOUT_F32=1"].map(|out| vec![tile.to_string(), out.to_string()]);
    ["-DTILE_M=16", "-DTILE_M=64"].into_iter().flat_map(of).collect()
}

/// Every tile, for gates and ups with each function and for down.
fn moe_tiles(tiles: &[ops::moe::tiles::Tile]) -> Vec<Vec<String>> {
    let gated = || (0..ops::activation::OPTIONS.len()).map(Some).chain([None]);
    tiles.iter().flat_map(|tile| gated().map(|gated| tile.options(gated))).collect()
}

fn gated_or_not(_: Arch) -> Vec<Vec<String>> {
    [false, true].map(|gated| vec![ops::moe::packed::option(gated).to_string()]).to_vec()
}

/// No macros but the element type.
fn one(_: Arch) -> Vec<Vec<String>> {
    vec![Vec::new()]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_is_listed() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let Ok(entries) = fs::read_dir(folder) else { return println!("skipped: the sources are not here") };
        let files: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        let with = |ending: &str| files.iter().filter(|f| f.ends_with(ending)).cloned().collect::<BTreeSet<_>>();
        let units: BTreeSet<_> = UNITS.iter().map(|listed| listed.unit.name.to_string()).collect();
        let headers: BTreeSet<_> = HEADERS.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(units, with(".cu"));
        assert_eq!(headers, with(".cuh"));
    }

    #[test]
    fn no_compilation_is_listed_twice() {
        let archs = [Arch::SM70, Arch::SM75, Arch::SM80, Arch::SM86, Arch::SM90, Arch::SM100, Arch::SM120];
        let mut once = BTreeSet::new();
        for listed in UNITS {
            let before = once.len();
            for arch in archs {
                for options in listed.compilations(arch) {
                    let line = format!("{} {} {}", listed.unit.name, arch.target(), sorted(&options).join(" "));
                    assert!(once.insert(line.clone()), "{line}");
                }
            }
            assert!(once.len() > before, "{} is never compiled", listed.unit.name);
        }
    }

    #[test]
    fn compilations_are_types_times_variants() {
        static UNIT: Unit = Unit { name: "some.cu", source: "" };
        let listed = Listed {
            unit: &UNIT,
            archs: Archs::SINCE_SM80,
            types: HALVES,
            variants: |arch| {
                [64, 128].map(|d| vec![format!("-DHEAD_DIM={d}"), format!("-DSM={}", arch.major)]).to_vec()
            },
        };
        let all: Vec<_> = listed.compilations(Arch::SM90).iter().map(|options| options.join(" ")).collect();
        let wanted = [
            "-DDASH_TYPE=f16 -DHEAD_DIM=64 -DSM=9",
            "-DDASH_TYPE=f16 -DHEAD_DIM=128 -DSM=9",
            "-DDASH_TYPE=bf16 -DHEAD_DIM=64 -DSM=9",
            "-DDASH_TYPE=bf16 -DHEAD_DIM=128 -DSM=9",
        ];
        assert_eq!(all, wanted);
        assert!(listed.compilations(Arch::SM75).is_empty());
    }

    #[test]
    fn options_are_listed_in_any_order() {
        let unit = &ops::attention_prefill_sm90::UNIT;
        let options = ["-DTAKE_TURNS=1", "-DDASH_TYPE=f16", "-DVALUE_DIM=96", "-DHEAD_DIM=96"];
        assert!(is_listed(unit, Arch::SM90, &options));
        assert!(!is_listed(unit, Arch::SM80, &options) && !is_listed(unit, Arch::SM90, &options[1..]));
    }

    #[test]
    fn archs_are_ranges() {
        assert!(Archs::SINCE_SM80.contains(Arch::SM80) && Archs::SINCE_SM80.contains(Arch::SM120));
        assert!(!Archs::SINCE_SM80.contains(Arch::SM75));
        assert!(Archs::SM90.contains(Arch::SM90) && !Archs::SM90.contains(Arch::SM100));
        assert!(Archs::BEFORE_SM80.contains(Arch::SM75) && !Archs::BEFORE_SM80.contains(Arch::SM80));
    }
}
