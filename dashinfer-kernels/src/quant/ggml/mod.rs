//! Blocks of weights as GGUF files store them: what each format is, and its values. <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>
//!
//! A row of a matrix is a run of blocks, each of some neighbouring weights, with a scale (and more) of its own: [`blocks`] of 32 weights, and
//! [`superblocks`] of 256 whose parts have small integer scales. Values are computed in f32 in the order of the definition,
//! without fused multiply-adds, so that they equal the reference's to the bit.

mod blocks;
mod matrix;
mod superblocks;

use half::f16;

pub use matrix::BlockMatrix;

/// A format of quantized blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockFormat {
    /// 4 bits, a scale for 32 weights.
    Q4_0,
    /// 4 bits, a scale and a smallest weight for 32.
    Q4_1,
    /// 5 bits, a scale for 32 weights.
    Q5_0,
    /// 5 bits, a scale and a smallest weight for 32.
    Q5_1,
    /// 8 bits, a scale for 32 weights.
    Q8_0,
    /// 2 bits; 256 weights, of which each 16 have a scale and a smallest weight of 4 bits.
    Q2K,
    /// 3 bits; 256 weights, of which each 16 have a scale of 6 bits.
    Q3K,
    /// 4 bits; 256 weights, of which each 32 have a scale and a smallest weight of 6 bits.
    Q4K,
    /// 5 bits; 256 weights, of which each 32 have a scale and a smallest weight of 6 bits.
    Q5K,
    /// 6 bits; 256 weights, of which each 16 have a scale of 8 bits.
    Q6K,
    /// 4 bits that name one of 16 uneven steps; a scale for 32 weights.
    Iq4Nl,
    /// 4 bits that name one of 16 uneven steps; 256 weights, of which each 32 have a scale of 6 bits.
    Iq4Xs,
    /// 4-bit floating-point numbers; a power of two for 32 weights.
    Mxfp4,
}

impl BlockFormat {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Mxfp4,
    ];

    /// The format of the type number that a GGUF file gives a tensor.
    #[must_use]
    pub fn of_type_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.type_number() == number)
    }

    /// The type number of GGUF files.
    #[must_use]
    pub const fn type_number(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq4Nl => 20,
            Self::Iq4Xs => 23,
            Self::Mxfp4 => 39,
        }
    }

    /// The name in use: `Q4_0`, `Q4_K`, ..
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
            Self::Mxfp4 => "MXFP4",
        }
    }

    /// Weights of a block.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl | Self::Mxfp4 => blocks::LEN,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => superblocks::LEN,
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 | Self::Iq4Nl => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q2K => 16 + 64 + 4,
            Self::Q3K => 32 + 64 + 12 + 2,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
            Self::Iq4Xs => 2 + 2 + 4 + 128,
            Self::Mxfp4 => 1 + 16,
        }
    }

    /// Bytes of a row of `cols` weights; `None` if that is not whole blocks.
    #[must_use]
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let blocks = cols.is_multiple_of(self.block_len()).then_some(cols / self.block_len())?;
        blocks.checked_mul(self.block_bytes())
    }

    /// The values of the blocks in `bytes`, as many as `out` has room for.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of exactly `out.len()` weights.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(Some(bytes.len()), self.row_bytes(out.len()), "bytes of {} weights in {self}", out.len());
        #[cfg(all(feature = "x86", target_arch = "x86_64"))]
        if crate::cpu::Isa::Avx2.is_available() {
            // SAFETY: the machine has it.
            return unsafe { dequantize_avx2(self, bytes, out) };
        }
        self.dequantize_plain(bytes, out);
    }

    #[inline(always)]
    fn dequantize_plain(self, bytes: &[u8], out: &mut [f32]) {
        // Called by name: through a function's value they would be compiled for any machine.
        macro_rules! each {
            ($value:path) => {
                for (block, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len())) {
                    $value(block, out);
                }
            };
        }
        match self {
            Self::Q4_0 => each!(blocks::q4_0),
            Self::Q4_1 => each!(blocks::q4_1),
            Self::Q5_0 => each!(blocks::q5_0),
            Self::Q5_1 => each!(blocks::q5_1),
            Self::Q8_0 => each!(blocks::q8_0),
            Self::Iq4Nl => each!(blocks::iq4_nl),
            Self::Q2K => each!(superblocks::q2_k),
            Self::Q3K => each!(superblocks::q3_k),
            Self::Q4K => each!(superblocks::q4_k),
            Self::Q5K => each!(superblocks::q5_k),
            Self::Q6K => each!(superblocks::q6_k),
            Self::Iq4Xs => each!(superblocks::iq4_xs),
            Self::Mxfp4 => each!(blocks::mxfp4),
        }
    }
}

/// [`BlockFormat::dequantize_plain`], compiled for AVX2: the same operations on more values at a time.
///
/// # Safety
/// The machine has AVX2 and F16C.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[target_feature(enable = "avx2,f16c")]
unsafe fn dequantize_avx2(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    format.dequantize_plain(bytes, out);
}

impl std::fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The f16 at byte `at` of a block.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// The sixteen steps of the `IQ4` formats: those that suit normally distributed weights.
const UNEVEN_STEPS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn formats_are_found_by_their_numbers() {
        for format in BlockFormat::ALL {
            assert_eq!(BlockFormat::of_type_number(format.type_number()), Some(format));
        }
        assert_eq!(BlockFormat::of_type_number(9), None, "Q8_1 is not for files");
        assert_eq!(BlockFormat::Q4K.row_bytes(512), Some(288));
        assert_eq!(BlockFormat::Q4K.row_bytes(32), None);
        assert_eq!(BlockFormat::Q4_0.row_bytes(0), Some(0));
        assert_eq!(BlockFormat::Q8_0.row_bytes(usize::MAX & !31), None);
    }

    #[test]
    fn nibbles_of_a_block_are_its_first_and_its_second_half() {
        let mut block = vec![0x00, 0x3c]; // 1.0
        block.extend((0..16).map(|i| i | (15 - i) << 4));
        let mut out = [0.0; 32];
        BlockFormat::Q4_0.dequantize(&block, &mut out);
        let wanted: Vec<f32> = (0..16).chain((0..16).rev()).map(|code| code as f32 - 8.0).collect();
        assert_eq!(out[..], wanted);
    }

    #[test]
    fn codes_of_four_bits_are_numbers_with_a_sign_and_an_exponent() {
        let mut block = vec![128]; // twice 1
        block.extend((0..16).map(|i| i | (15 - i) << 4));
        let mut out = [0.0; 32];
        BlockFormat::Mxfp4.dequantize(&block, &mut out);
        let half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for (code, found) in (0..16).zip(out).chain((0..16).rev().zip(out[16..].iter().copied())) {
            let size = 2.0 * half[code & 7];
            assert_eq!(found, if code > 7 { -size } else { size }, "{code}");
        }
    }

    #[test]
    fn values_are_the_same_on_every_machine() {
        let bytes: Vec<u8> = (0..210 * 4u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for format in BlockFormat::ALL {
            let blocks = bytes.len() / format.block_bytes();
            let (mut found, mut wanted) =
                (vec![0.0; blocks * format.block_len()], vec![1.0; blocks * format.block_len()]);
            format.dequantize(&bytes[..blocks * format.block_bytes()], &mut found);
            format.dequantize_plain(&bytes[..blocks * format.block_bytes()], &mut wanted);
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(found.iter().zip(&wanted).all(same), "{format}");
        }
    }

    proptest! {
        #[test] // against a plain restatement: which bits of a block make the code of a weight
        fn blocks_of_any_bytes_have_as_many_values_as_they_should(bytes in prop::collection::vec(any::<u8>(), 210 * 2)) {
            for format in BlockFormat::ALL {
                let blocks = bytes.len() / format.block_bytes();
                let mut out = vec![f32::MAX; blocks * format.block_len()];
                format.dequantize(&bytes[..blocks * format.block_bytes()], &mut out);
                prop_assert!(out.iter().all(|value| *value != f32::MAX), "{format}");
            }
        }
    }
}
