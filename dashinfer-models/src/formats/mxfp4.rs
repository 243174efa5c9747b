//! MXFP4 <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>, as gpt-oss stores its experts: blocks
//! of 32 input features with 4 bits each, and a power of two for each block.
//!
//! ```text
//! *_blocks  u8 [.., rows, cols / 32, 16]  two values to a byte, the low half first
//! *_scales  u8 [.., rows, cols / 32]      exponents with a bias of 127
//! ```
//!
//! Twice a value is an integer of −12 to 12, so that 8-bit codes in groups of 32 hold it without loss.

use std::{borrow::Cow, ops::Range};

#[cfg(test)]
use dashinfer_kernels::KernelError;
use dashinfer_kernels::{CodeBits, CodeLayout, StoredMatrix};

use super::{Raw, StoredModule, Types, Wanted, take};
use crate::{
    WeightsError,
    weights::{Part, Stacked},
};

/// Input features of a block.
const BLOCK: usize = 32;

/// Twice the value of each half byte: a sign, two bits of exponent, one of mantissa.
const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// [`TWICE`] of both halves of each byte, the low one first, as codes.
static CODES: [[u8; 2]; 256] = {
    let mut codes = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        let middle = CodeBits::Eight.middle();
        codes[byte] = [middle.wrapping_add_signed(TWICE[byte & 15]), middle.wrapping_add_signed(TWICE[byte >> 4])];
        byte += 1;
    }
    codes
};

/// The matrices of experts in such blocks: a part of `cols` columns is some rows of what is stacked.
pub(super) fn module(part: &Part, stacked: Stacked, cols: usize) -> StoredModule {
    let Stacked { count, width, .. } = stacked;
    let wanted = |what: &str, shape: &[usize]| Wanted {
        name: format!("{}_{what}", part.module),
        shape: shape.to_vec(),
        types: Types::Only("U8"),
    };
    let blocks = cols.div_ceil(BLOCK);
    StoredModule {
        tensors: vec![wanted("blocks", &[count, width, blocks, BLOCK / 2]), wanted("scales", &[count, width, blocks])],
        layout: Some(LAYOUT),
        order: None,
        shape: [part.rows, cols],
        label: "mxfp4".to_owned(),
        reader: super::Reader::Mxfp4(Reader(stacked)),
    }
}

const LAYOUT: CodeLayout = CodeLayout { bits: CodeBits::Eight, group: Some(BLOCK), zero_points: false };

/// Where the rows of a part stand.
pub(super) struct Reader(Stacked);

impl Reader {
    pub(super) fn open<'a>(
        &self,
        module: &StoredModule,
        raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let [rows, cols] = module.shape;
        if !cols.is_multiple_of(BLOCK) {
            return Err(module.tensors[0].value("columns in blocks of 32", cols));
        }
        let [blocks, scales] = take(module, raw)?;
        let Stacked { index, width, first, step, .. } = self.0;
        let places = Places { first: index * width + first, step };
        Ok(Box::new(Mxfp4 { rows, cols, places, blocks: blocks.bytes, scales: scales.bytes }))
    }
}

/// Which of the stored rows a matrix has: `first`, `first + step`, and so on.
#[derive(Debug, Clone, Copy)]
struct Places {
    first: usize,
    step: usize,
}

/// A matrix `[rows, cols]` of such blocks.
#[derive(Debug, Clone)]
struct Mxfp4<'a> {
    rows: usize,
    cols: usize,
    places: Places,
    blocks: Cow<'a, [u8]>,
    scales: Cow<'a, [u8]>,
}

impl<'a> Mxfp4<'a> {
    /// A matrix that stands alone. `blocks`: `[rows, cols / 32, 16]`; `scales`: `[rows, cols / 32]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `cols` is no multiple of 32, or a length is off.
    #[cfg(test)]
    fn new([rows, cols]: [usize; 2], blocks: &'a [u8], scales: &'a [u8]) -> Result<Self, KernelError> {
        let check = |what, wanted, found| match wanted == found {
            true => Ok(()),
            false => Err(KernelError::Shape { op: "pack", what, wanted, found }),
        };
        check("columns of blocks of 32", cols.next_multiple_of(BLOCK), cols)?;
        check("bytes of blocks", rows.saturating_mul(cols / 2), blocks.len())?;
        check("scales of blocks", rows.saturating_mul(cols / BLOCK), scales.len())?;
        let places = Places { first: 0, step: 1 };
        Ok(Self { rows, cols, places, blocks: blocks.into(), scales: scales.into() })
    }

    /// Twice the value of input feature `col` of `row`, over the block's scale.
    fn twice(&self, row: usize, col: usize) -> i8 {
        let row = self.places.first + row * self.places.step;
        let byte = self.blocks[(row * self.cols + col) / 2];
        TWICE[usize::from(if col.is_multiple_of(2) { byte & 15 } else { byte >> 4 })]
    }

    fn scale(&self, row: usize, block: usize) -> f32 {
        let row = self.places.first + row * self.places.step;
        power_of_two(self.scales[row * (self.cols / BLOCK) + block])
    }
}

impl StoredMatrix for Mxfp4<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn layout(&self) -> Option<CodeLayout> {
        Some(LAYOUT)
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            for (col, out) in cols.clone().zip(out) {
                *out = f32::from(self.twice(row, col)) * 0.5 * self.scale(row, col / BLOCK);
            }
        }
    }

    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
        let whole = places.start.is_multiple_of(2) && places.len().is_multiple_of(2);
        for (row, out) in rows.zip(out.chunks_mut(places.len().max(1))) {
            if whole {
                let first = ((self.places.first + row * self.places.step) * self.cols + places.start) / 2;
                let stored = &self.blocks[first..][..places.len() / 2];
                for (out, byte) in out.as_chunks_mut().0.iter_mut().zip(stored) {
                    *out = CODES[usize::from(*byte)];
                }
                continue;
            }
            for (col, out) in places.clone().zip(out) {
                *out = CodeBits::Eight.middle().wrapping_add_signed(self.twice(row, col));
            }
        }
    }

    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], _: &mut [u8]) {
        for (row, scale) in rows.zip(scales) {
            *scale = 0.5 * self.scale(row, group);
        }
    }
}

/// What a byte of a power of two (e8m0) stands for: 2 to the power of it less 127; of 255, not a number.
pub(crate) fn power_of_two(byte: u8) -> f32 {
    match byte {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 22), // 2^-127, which f32 has below its normal numbers
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::{
        Backend, DType, Scheme,
        cpu::{CpuBackend, CpuConfig, CpuLinear},
    };

    use super::*;

    #[test]
    fn powers_of_two() {
        for (byte, exponent) in [(1, -126), (126, -1), (127, 0), (128, 1), (254, 127)] {
            assert_eq!(power_of_two(byte), 2f32.powi(exponent), "{byte}");
        }
        assert_eq!(power_of_two(0), 2f32.powi(-126) / 2.0);
        assert!(power_of_two(255).is_nan());
    }

    #[test]
    fn values_are_those_of_the_format() {
        // All sixteen, in both halves.
        let blocks: Vec<u8> = (0..16).map(|i| i << 4 | (15 - i)).chain([0x21; 16]).collect();
        let matrix = Mxfp4::new([1, 64], &blocks, &[128, 126]).unwrap();
        let mut values = [f32::NAN; 64];
        matrix.values(0..1, 0..64, &mut values);
        let wanted = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
        for i in 0..16 {
            assert_eq!((values[2 * i], values[2 * i + 1]), (2.0 * wanted[15 - i], 2.0 * wanted[i]));
        }
        assert_eq!(values[32..36], [0.25, 0.5, 0.25, 0.5]);
        let mut part = [f32::NAN; 3];
        matrix.values(0..1, 31..34, &mut part);
        assert_eq!(part, values[31..34]);
        // bf16 holds them too.
        assert_eq!(
            dashinfer_kernels::to_f32(&dashinfer_kernels::cpu::to_bytes(&values, DType::BF16), DType::BF16),
            values
        );
    }

    #[test]
    fn eight_bits_hold_them_without_loss() {
        let (rows, cols) = (19, 96);
        let blocks: Vec<u8> = (0..rows * cols / 2).map(|i| (i * 37 + i / 7) as u8).collect();
        let scales: Vec<u8> = (0..rows * cols / 32).map(|i| 115 + (i % 14) as u8).collect();
        let matrix = Mxfp4::new([rows, cols], &blocks, &scales).unwrap();
        let mut values = vec![f32::NAN; rows * cols];
        matrix.values(0..rows, 0..cols, &mut values);
        let scheme = Scheme::holding(&[matrix.layout().unwrap()]).unwrap();
        assert_eq!(scheme.to_string(), "a16w8-g32");
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let packed = backend.pack_stored(&[&matrix], None, Some(scheme)).unwrap();
        let CpuLinear::Quantized(_) = &packed else { panic!("it is quantized") };
        let mut row = vec![f32::NAN; cols];
        for r in 0..rows {
            packed.read_row(r, &mut row);
            assert_eq!(row, values[r * cols..][..cols]);
        }
    }

    #[test]
    fn codes_of_any_tile_are_those_of_its_columns() {
        let (rows, cols) = (3, 64);
        let blocks: Vec<u8> = (0..rows * cols / 2).map(|i| (i * 37 + i / 7) as u8).collect();
        let matrix = Mxfp4::new([rows, cols], &blocks, &[127; 6]).unwrap();
        for places in [0..64, 2..20, 1..21, 4..9, 7..7] {
            let mut found = vec![0; 2 * places.len()];
            matrix.codes(1..3, places.clone(), &mut found);
            let wanted = (1..3).flat_map(|row| places.clone().map(move |col| (row, col)));
            let wanted: Vec<u8> = wanted.map(|(row, col)| 128u8.wrapping_add_signed(matrix.twice(row, col))).collect();
            assert_eq!(found, wanted, "{places:?}");
        }
    }

    #[test]
    fn lengths_must_fit() {
        let new = |shape, blocks: &[u8], scales: &[u8]| Mxfp4::new(shape, blocks, scales).map(|_| ());
        assert!(new([1, 32], &[0; 16], &[0]).is_ok());
        assert!(new([1, 33], &[0; 16], &[0]).is_err());
        assert!(new([1, 32], &[0; 15], &[0]).is_err());
        assert!(new([1, 32], &[0; 16], &[]).is_err());
        assert!(new([usize::MAX, usize::MAX / 32 * 32], &[], &[]).is_err());
    }
}
