//! [`BlockMatrix`]: rows of blocks, as the packer takes them.
//!
//! What a block of 32 stores as small integers is packed as it is, with the very scale of the block: `Q4_0` as 4-bit codes, `Q8_0`, `Q5_0`
//! `IQ4_NL` and `MXFP4` as 8-bit codes, and `Q3_K` too, whose scales of parts are small enough to be multiplied into the codes. `IQ4_XS` has its codes
//! kept and the products of its two scales rounded to f16. The others have smallest weights that no integer zero point can state, or too
//! fine steps: their values are quantized anew.

use std::ops::Range;

use half::f16;

use super::{BlockFormat, blocks, superblocks};
use crate::KernelError;
use crate::error::check;
use crate::quant::{CodeBits, CodeLayout, StoredMatrix};

/// A weight matrix `[rows, cols]` in blocks.
#[derive(Debug, Clone, Copy)]
pub struct BlockMatrix<'a> {
    format: BlockFormat,
    bytes: &'a [u8],
    rows: usize,
    cols: usize,
}

/// Weights that share a scale when their codes are packed.
const GROUP: usize = 32;

impl<'a> BlockMatrix<'a> {
    /// `bytes`: `rows` rows of blocks, row-major.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `cols` are no whole blocks, or the bytes too few or too many.
    pub fn new(format: BlockFormat, bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self, KernelError> {
        let Some(row_bytes) = format.row_bytes(cols) else {
            let (wanted, what) = (format.block_len(), "columns of a matrix in blocks, multiples of their length");
            return Err(KernelError::Shape { op: "pack", what, wanted, found: cols });
        };
        check("pack", "bytes of blocks", rows.saturating_mul(row_bytes), bytes.len())?;
        Ok(Self { format, bytes, rows, cols })
    }

    /// The block of weight `col` of a row, and its place in it.
    fn block(&self, row: usize, col: usize) -> (&'a [u8], usize) {
        let (len, bytes) = (self.format.block_len(), self.format.block_bytes());
        let block = row * (self.cols / len) + col / len;
        (&self.bytes[block * bytes..][..bytes], col % len)
    }

    /// The codes, less the middle, of the group of 32 that starts with weight `first` of a block.
    fn group_codes(&self, block: &[u8], first: usize) -> [i8; GROUP] {
        match self.format {
            BlockFormat::Q4_0 => blocks::q4_0_codes(block),
            BlockFormat::Q5_0 => blocks::q5_0_codes(block),
            BlockFormat::Q8_0 => blocks::q8_0_codes(block),
            BlockFormat::Iq4Nl => blocks::iq4_nl_codes(block),
            BlockFormat::Q3K => superblocks::q3_k_codes(block, first),
            BlockFormat::Iq4Xs => superblocks::iq4_xs_codes(block, first),
            BlockFormat::Mxfp4 => blocks::mxfp4_codes(block),
            _ => unreachable!("it has no layout"),
        }
    }

    /// The scale of that group.
    fn group_scale(&self, block: &[u8], first: usize) -> f32 {
        match self.format {
            BlockFormat::Q3K => superblocks::q3_k_group_scale(block).to_f32(),
            BlockFormat::Iq4Xs => superblocks::iq4_xs_group_scale(block, first),
            BlockFormat::Mxfp4 => blocks::mxfp4_scale(block),
            _ => f16::from_le_bytes([block[0], block[1]]).to_f32(),
        }
    }
}

impl StoredMatrix for BlockMatrix<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn layout(&self) -> Option<CodeLayout> {
        self.format.layout()
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let len = self.format.block_len();
        let mut values = [0.0; superblocks::LEN];
        let values = &mut values[..len];
        for (row, mut out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            let mut col = cols.start;
            while !out.is_empty() {
                let (block, place) = self.block(row, col);
                let some = out.len().min(len - place);
                let (now, later) = std::mem::take(&mut out).split_at_mut(some);
                if some == len {
                    self.format.dequantize(block, now);
                } else {
                    self.format.dequantize(block, values);
                    now.copy_from_slice(&values[place..place + some]);
                }
                (out, col) = (later, col + some);
            }
        }
    }

    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
        let middle = self.format.layout().map_or(0, |layout| layout.bits.middle());
        for (row, mut out) in rows.zip(out.chunks_mut(places.len().max(1))) {
            let mut col = places.start;
            while !out.is_empty() {
                let (block, place) = self.block(row, col);
                let codes = self.group_codes(block, place / GROUP * GROUP);
                let within = place % GROUP;
                let some = out.len().min(GROUP - within);
                let (now, later) = std::mem::take(&mut out).split_at_mut(some);
                for (out, code) in now.iter_mut().zip(&codes[within..]) {
                    *out = middle.wrapping_add_signed(*code);
                }
                (out, col) = (later, col + some);
            }
        }
    }

    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], _zeros: &mut [u8]) {
        for (row, scale) in rows.zip(scales) {
            let (block, first) = self.block(row, group * GROUP);
            *scale = self.group_scale(block, first);
        }
    }
}

impl BlockFormat {
    /// The codes that weights of this format are packed as; `None` if they are quantized anew.
    #[must_use]
    pub fn layout(self) -> Option<CodeLayout> {
        let bits = match self {
            Self::Q4_0 => CodeBits::Four,
            Self::Q5_0 | Self::Q8_0 | Self::Iq4Nl | Self::Q3K | Self::Iq4Xs | Self::Mxfp4 => CodeBits::Eight,
            _ => return None,
        };
        Some(CodeLayout { bits, group: Some(GROUP), zero_points: false })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Scheme;
    use crate::cpu::{PoolConfig, QuantizedMatrix, ThreadPool};
    use crate::random::noise;

    /// Blocks of random bytes, with scales that are numbers.
    fn random_blocks(format: BlockFormat, blocks: usize, seed: u64) -> Vec<u8> {
        let len = blocks * format.block_bytes();
        let mut bytes: Vec<u8> = noise(len, seed).iter().map(|value| (value.to_bits() >> 7) as u8).collect();
        let halves: &[usize] = match format {
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
            BlockFormat::Q2K => &[80, 82],
            BlockFormat::Q3K => &[108],
            BlockFormat::Q6K => &[208],
            _ => &[0],
        };
        for (i, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
            if format == BlockFormat::Mxfp4 {
                block[0] = 110 + block[0] % 20; // powers of two that f16 has
                continue;
            }
            for (j, at) in halves.iter().enumerate() {
                let scale = f16::from_f32(noise(blocks * 2, !seed)[i * 2 + j] * 0.01);
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        bytes
    }

    fn values_of(matrix: &BlockMatrix<'_>) -> Vec<f32> {
        let mut values = vec![0.0; matrix.rows * matrix.cols];
        matrix.format.dequantize(matrix.bytes, &mut values);
        values
    }

    fn packed_rows(matrix: &dyn StoredMatrix, scheme: Scheme) -> Vec<f32> {
        let pool = ThreadPool::new(&PoolConfig { threads: std::num::NonZeroUsize::new(1), cores: Vec::new() }).unwrap();
        let packed = QuantizedMatrix::pack_stored(&[matrix], None, scheme, &pool).unwrap();
        let mut rows = vec![0.0; matrix.rows() * matrix.cols()];
        for (row, out) in rows.chunks_mut(matrix.cols()).enumerate() {
            packed.read_row(row, out);
        }
        rows
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_tile_is_that_part_of_the_whole(which in 0..BlockFormat::ALL.len(), rows in 1usize..20, seed: u64, at in 0usize..512, len in 0usize..300) {
            let format = BlockFormat::ALL[which];
            let cols = 512;
            let bytes = random_blocks(format, rows * cols / format.block_len(), seed);
            let matrix = BlockMatrix::new(format, &bytes, rows, cols).unwrap();
            let whole = values_of(&matrix);
            let range = at..cols.min(at + len);
            let (first, last) = (rows / 3, rows);
            let mut tile = vec![f32::NAN; (last - first) * range.len()];
            matrix.values(first..last, range.clone(), &mut tile);
            for (row, found) in (first..last).zip(tile.chunks(range.len().max(1))) {
                prop_assert_eq!(found, &whole[row * cols..][range.clone()]);
            }
        }

        #[test]
        fn codes_that_are_packed_as_they_are_lose_nothing(which in 0..BlockFormat::ALL.len(), rows in 1usize..40, seed: u64) {
            let format = BlockFormat::ALL[which];
            let Some(layout) = format.layout() else { return Ok(()) };
            let cols = 512;
            let bytes = random_blocks(format, rows * cols / format.block_len(), seed);
            let matrix = BlockMatrix::new(format, &bytes, rows, cols).unwrap();
            let scheme = Scheme::holding(&[layout]).unwrap();
            prop_assert_eq!(scheme.group(), Some(crate::Group::G32));
            let (found, wanted) = (packed_rows(&matrix, scheme), values_of(&matrix));
            if format == BlockFormat::Iq4Xs {
                // The product of two scales is rounded: half a unit of 11 bits, or of the smallest numbers.
                for (found, wanted) in found.iter().zip(&wanted) {
                    prop_assert!((found - wanted).abs() <= wanted.abs() / 2048.0 + 127.0 * 3e-8, "{} {}", found, wanted);
                }
            } else {
                prop_assert_eq!(found, wanted, "{}", format);
            }
        }

        #[test]
        fn the_others_are_off_by_half_a_step_of_eight_bits(which in 0..BlockFormat::ALL.len(), rows in 1usize..20, seed: u64) {
            let format = BlockFormat::ALL[which];
            let cols = 512;
            let bytes = random_blocks(format, rows * cols / format.block_len(), seed);
            let matrix = BlockMatrix::new(format, &bytes, rows, cols).unwrap();
            if format.layout().is_some() {
                return Ok(());
            }
            let scheme = Scheme::A16W8 { group: Some(crate::Group::G32) };
            let (found, wanted) = (packed_rows(&matrix, scheme), values_of(&matrix));
            for (found, wanted) in found.chunks(32).zip(wanted.chunks(32)) {
                let largest = wanted.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
                let bound = largest / 254.0 * 1.001 + largest / 2048.0 + 3e-8 * 127.0;
                for (found, wanted) in found.iter().zip(wanted) {
                    prop_assert!((found - wanted).abs() <= bound, "{} {} {}", format, found, wanted);
                }
            }
        }
    }

    #[test]
    fn the_extreme_product_of_q3_k_fits() {
        // Every scale is −32 and every code −4: 128 scales, one more than 8 signed bits hold.
        let mut block = vec![0; BlockFormat::Q3K.block_bytes()];
        block[108..].copy_from_slice(&f16::ONE.to_le_bytes());
        let matrix = BlockMatrix::new(BlockFormat::Q3K, &block, 1, 256).unwrap();
        assert_eq!(values_of(&matrix), [128.0; 256]);
        let scheme = Scheme::holding(&[BlockFormat::Q3K.layout().unwrap()]).unwrap();
        assert_eq!(packed_rows(&matrix, scheme), [128.0; 256]);
    }

    #[test]
    fn what_is_no_matrix_of_blocks_is_refused() {
        let error = |cols, bytes: &[u8]| BlockMatrix::new(BlockFormat::Q8_0, bytes, 2, cols).unwrap_err().to_string();
        assert_eq!(
            error(33, &[]),
            "pack: columns of a matrix in blocks, multiples of their length should be 32, found 33"
        );
        assert_eq!(error(32, &[0; 67]), "pack: bytes of blocks should be 68, found 67");
    }
}
