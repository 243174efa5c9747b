//! The random numbers of this crate's tests.

/// SplitMix64, <https://doi.org/10.1145/2714064.2660195>; of its state.
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In −1..1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// `cases` random cases of a property; a quarter of them where `DASHINFER_EMULATED` says that an emulator runs the tests, in which
/// arithmetic is ten to twenty times slower. Other runs draw others.
pub(crate) fn cases(cases: u32) -> proptest::prelude::ProptestConfig {
    let emulated = std::env::var_os("DASHINFER_EMULATED").is_some();
    proptest::prelude::ProptestConfig::with_cases(if emulated { cases.div_ceil(4) } else { cases })
}

/// `len` values in −1..1, the same for the same seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64(seed ^ 0x9e37_79b9_7f4a_7c15);
    (0..len).map(|_| random.value()).collect()
}
