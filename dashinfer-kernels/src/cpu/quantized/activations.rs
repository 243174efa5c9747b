//! The rows of a product, rounded to integers as its weights' scheme asks and as the kernel's instructions eat them.

use super::super::aligned::AlignedBuf;
use super::super::backend::CpuBackend;
use super::super::linear::SendPtr;
use super::super::pool::ThreadPool;
use super::QuantizedMatrix;
use super::matrix::symmetric_zero;
use crate::KernelError;
use crate::quant::activations::{self as rounding, Cut, MAX_8, MAX_16};
use crate::quant::{ActivationBits, Group, Scheme, nearest};

/// How codes of activations are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operand {
    /// 16 bits each; within a quad in the order 0 2 1 3, so that masking the even and the odd bytes of a quad of weights gives pairs
    /// that stand beside theirs.
    Words,
    /// 8 bits each, in order.
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        allow(dead_code, reason = "for blocked variants")
    )]
    Bytes,
    /// The high bytes of a row, then its low bytes; see [`crate::quant::activations`].
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        allow(dead_code, reason = "for blocked variants")
    )]
    Planes,
}

impl Operand {
    /// Bytes of an activation.
    const fn size(self) -> usize {
        match self {
            Self::Words | Self::Planes => 2,
            Self::Bytes => 1,
        }
    }
}

/// Quantized rows, in memory that is kept from product to product.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    operand: Option<Operand>,
    rows: usize,
    cut: Option<Cut>,
    codes: Option<AlignedBuf<u8>>,
    /// `[T, groups]`
    scales: Vec<f32>,
    /// `[T, groups]`: what makes up for the zero points of the weights: −Σ code, times the zero point if all weights have the same.
    corrections: Vec<i32>,
}

impl Activations {
    /// Rounds `x`, `[rows, cols]`, for a product with weights of `matrix`.
    pub(crate) fn fill(
        &mut self,
        x: &[f32],
        rows: usize,
        matrix: &QuantizedMatrix,
        operand: Operand,
        pool: &ThreadPool,
    ) -> Result<(), KernelError> {
        let (cols, cut, scheme) = (matrix.cols(), matrix.cut(), matrix.scheme());
        let Some(to) = self.resize(rows, cut, operand)? else { return Ok(()) };
        let round = best_rounder();
        let row = |row: usize| {
            // SAFETY: each row is written by one task.
            let (codes, scales, corrections) = unsafe { to.row(row) };
            let job = Row { x: &x[row * cols..][..cols], order: matrix.order(), scheme, cut, operand };
            // SAFETY: the variant was chosen for this machine.
            unsafe { round(&job, codes, scales, corrections) };
        };
        CpuBackend::for_rows(pool, rows, cols, &row);
        Ok(())
    }

    /// Takes `rows` of another, in this order.
    pub(crate) fn gather(&mut self, from: &Self, rows: &[u32], pool: &ThreadPool) -> Result<(), KernelError> {
        let (Some(operand), Some(cut)) = (from.operand, from.cut) else { return Ok(()) };
        let Some(to) = self.resize(rows.len(), cut, operand)? else { return Ok(()) };
        CpuBackend::for_rows(pool, rows.len(), cut.padded, &|row| {
            // SAFETY: each row is written by one task.
            let (codes, scales, corrections) = unsafe { to.row(row) };
            let row = rows[row] as usize;
            codes.copy_from_slice(&from.codes(row)[..codes.len()]);
            scales.copy_from_slice(&from.scales(row)[..scales.len()]);
            corrections.copy_from_slice(&from.corrections[row * cut.groups()..][..corrections.len()]);
        });
        Ok(())
    }

    /// Room for `rows` rows, which are what they were.
    fn resize(&mut self, rows: usize, cut: Cut, operand: Operand) -> Result<Option<To>, KernelError> {
        let (groups, row_bytes) = (cut.groups(), cut.padded * operand.size());
        let wanted = rows.saturating_mul(row_bytes);
        if self.codes.as_ref().is_none_or(|codes| codes.len() < wanted) {
            self.codes = None; // given back before more is taken
            self.codes = Some(AlignedBuf::zeroed("quantized activations", wanted)?);
        }
        self.scales.resize(rows * groups, 0.0);
        self.corrections.resize(rows * groups, 0);
        (self.operand, self.rows, self.cut) = (Some(operand), rows, Some(cut));
        let (scales, corrections) = (SendPtr(self.scales.as_mut_ptr()), SendPtr(self.corrections.as_mut_ptr()));
        let to = |codes: &mut AlignedBuf<u8>| To {
            codes: SendPtr(codes.as_mut_ptr()),
            scales,
            corrections,
            row_bytes,
            groups,
        };
        Ok(self.codes.as_mut().map(to))
    }

    /// Whether these are `rows` rows, rounded for products with weights like `matrix`.
    pub(super) fn fits(&self, rows: usize, matrix: &QuantizedMatrix) -> bool {
        self.rows == rows && self.cut == Some(matrix.cut())
    }

    /// Bytes that `rows` rows of `cols` values take at most, in any scheme.
    pub(crate) fn max_bytes(rows: usize, cols: usize) -> usize {
        // Two bytes a code, and a scale and a correction for each 32.
        rows.saturating_mul(cols.checked_next_multiple_of(128).unwrap_or(cols)).saturating_mul(2 * 32 + 8) / 32
    }

    /// Bytes of a row's codes.
    pub(super) fn row_bytes(&self) -> usize {
        self.cut.map_or(0, |cut| cut.padded) * self.operand.map_or(0, Operand::size)
    }

    /// How the codes are laid out.
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        expect(dead_code, reason = "for blocked variants")
    )]
    pub(super) fn operand(&self) -> Option<Operand> {
        self.operand
    }

    /// The codes of row `row` and those behind it, in the layout of the operand.
    #[inline(always)]
    pub(super) fn codes(&self, row: usize) -> &[u8] {
        let (Some(codes), Some(cut), Some(operand)) = (&self.codes, self.cut, self.operand) else { return &[] };
        &codes[row * cut.padded * operand.size()..self.rows * cut.padded * operand.size()]
    }

    /// The scales of row `row` and those behind it, one for each group.
    #[inline(always)]
    pub(super) fn scales(&self, row: usize) -> &[f32] {
        &self.scales[row * self.cut.map_or(0, Cut::groups)..]
    }

    /// The corrections of row `row` and those behind it, one for each group.
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        allow(dead_code, reason = "for blocked variants")
    )]
    #[inline(always)]
    pub(super) fn corrections(&self, row: usize) -> &[i32] {
        &self.corrections[row * self.cut.map_or(0, Cut::groups)..]
    }

    /// The code of column `k` of row `row`, whatever the layout.
    pub(super) fn code(&self, row: usize, k: usize) -> i32 {
        let codes = self.codes(row);
        match self.operand {
            Some(Operand::Words) => {
                let at = 2 * (k / 4 * 4 + WORD_PLACES[k % 4]);
                i32::from(i16::from_le_bytes([codes[at], codes[at + 1]]))
            }
            Some(Operand::Planes) => {
                let padded = self.cut.map_or(0, |cut| cut.padded);
                256 * i32::from(codes[k].cast_signed()) + i32::from(codes[padded + k].cast_signed())
            }
            Some(Operand::Bytes) | None => i32::from(codes[k].cast_signed()),
        }
    }
}

/// Where rows go.
#[derive(Clone, Copy)]
struct To {
    codes: SendPtr<u8>,
    scales: SendPtr<f32>,
    corrections: SendPtr<i32>,
    row_bytes: usize,
    groups: usize,
}

impl To {
    /// Codes, scales and corrections of row `row`.
    ///
    /// # Safety
    /// There is such a row, no other part of the program has it, and the [`Activations`] outlive what comes of it.
    unsafe fn row<'a>(self, row: usize) -> (&'a mut [u8], &'a mut [f32], &'a mut [i32]) {
        // SAFETY: each row has its own part of the three buffers; the rest is the caller's promise.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.codes.get().add(row * self.row_bytes), self.row_bytes),
                std::slice::from_raw_parts_mut(self.scales.get().add(row * self.groups), self.groups),
                std::slice::from_raw_parts_mut(self.corrections.get().add(row * self.groups), self.groups),
            )
        }
    }
}

/// Where the four codes of a quad stand among the words.
pub(super) const WORD_PLACES: [usize; 4] = [0, 2, 1, 3];

/// A row to be rounded.
pub(super) struct Row<'a> {
    x: &'a [f32],
    /// The value at each place, if they are not in order.
    order: Option<&'a [u32]>,
    scheme: Scheme,
    pub(super) cut: Cut,
    pub(super) operand: Operand,
}

/// `(row, codes, scales, corrections)`.
type Rounder = unsafe fn(&Row<'_>, &mut [u8], &mut [f32], &mut [i32]);

fn best_rounder() -> Rounder {
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    if super::super::isa::Isa::Avx2.is_available() {
        return super::round_avx2::row;
    }
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    if super::super::isa::Isa::Neon.is_available() {
        return super::round_neon::row;
    }
    round_plain
}

/// The definition.
///
/// # Safety
/// None is needed.
unsafe fn round_plain(row: &Row<'_>, codes: &mut [u8], scales: &mut [f32], corrections: &mut [i32]) {
    let mut gathered = GATHERED;
    for (group, (scale, correction)) in scales.iter_mut().zip(corrections).enumerate() {
        (*scale, *correction) = row.round_group(group, row.group(group, &mut gathered), codes);
    }
}

/// Room for the values of a group that do not stand side by side.
pub(super) type Gathered = [f32; Group::G128.size()];
pub(super) const GATHERED: Gathered = [0.0; Group::G128.size()];

impl Row<'_> {
    /// The largest code.
    pub(super) fn max(&self) -> f32 {
        match self.scheme.activation_bits() {
            ActivationBits::Eight => MAX_8,
            ActivationBits::Sixteen => MAX_16,
        }
    }

    /// The values of a group; fewer than its size where the row is padded.
    #[inline(always)]
    pub(super) fn group<'b>(&'b self, group: usize, gathered: &'b mut Gathered) -> &'b [f32] {
        let first = group * self.cut.group;
        let places = first.min(self.x.len())..self.x.len().min(first + self.cut.group);
        let Some(order) = self.order else { return &self.x[places] };
        let gathered = &mut gathered[..places.len()]; // an order comes with a scheme of groups, none larger than that
        for (value, &col) in gathered.iter_mut().zip(&order[places]) {
            *value = self.x[col as usize];
        }
        gathered
    }

    /// What makes up for the zero points, of the sum of a group's codes.
    pub(super) fn correction(&self, sum: i32) -> i32 {
        let zero = if self.scheme.has_zero_points() { 1 } else { i32::from(symmetric_zero(self.scheme)) };
        sum.wrapping_mul(zero).wrapping_neg()
    }

    /// Writes the codes of a group, of values `x`, among those of the row; its scale and correction.
    pub(super) fn round_group(&self, group: usize, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
        let Self { cut, operand, .. } = *self;
        let (scale, inverse) = rounding::scale(x, self.max());
        let mut sum = 0i32;
        for quad in 0..cut.group / 4 {
            let quad_codes: [i32; 4] = std::array::from_fn(|i| x.get(quad * 4 + i).map_or(0, |x| nearest(x * inverse)));
            sum = quad_codes.iter().fold(sum, |sum, code| sum.wrapping_add(*code));
            let first = group * cut.group + quad * 4;
            for (i, code) in quad_codes.into_iter().enumerate() {
                match operand {
                    Operand::Words => {
                        codes[2 * (first + WORD_PLACES[i])..][..2].copy_from_slice(&(code as i16).to_le_bytes());
                    }
                    Operand::Bytes => codes[first + i] = code as u8,
                    Operand::Planes => {
                        codes[first + i] = ((code - i32::from(code as i8)) >> 8) as u8;
                        codes[cut.padded + first + i] = code as u8;
                    }
                }
            }
        }
        (scale, self.correction(sum))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::noise;

    proptest! {
        #[test]
        fn every_way_to_round_gives_the_same_codes(
            cols in 1usize..700, scheme in 0..Scheme::ALL.len(), which in 0usize..3, exponent in -30i32..30, reordered: bool,
            seed: u64,
        ) {
            let scheme = Scheme::ALL[scheme];
            let operand = match scheme.activation_bits() {
                ActivationBits::Sixteen => [Operand::Words, Operand::Planes, Operand::Words][which],
                ActivationBits::Eight => [Operand::Words, Operand::Planes, Operand::Bytes][which],
            };
            let x: Vec<f32> = noise(cols, seed).iter().map(|x| x * 2f32.powi(exponent)).collect();
            let cut = Cut::new(scheme, cols);
            // 701 is prime, so that each column comes once.
            let order: Vec<u32> = (0..700).map(|i| (i * 211 + 5) % 701).filter(|&col| (col as usize) < cols).collect();
            let order = (reordered && scheme.group().is_some() && order.len() == cols).then_some(&order[..]);
            let row = Row { x: &x, order, scheme, cut, operand };
            let round = |round: Rounder| {
                let mut codes = vec![0xaa; cut.padded * operand.size()];
                let (mut scales, mut corrections) = (vec![0.0; cut.groups()], vec![0; cut.groups()]);
                // SAFETY: the variant is one for this machine.
                unsafe { round(&row, &mut codes, &mut scales, &mut corrections) };
                (codes, scales, corrections)
            };
            prop_assert_eq!(round(best_rounder()), round(round_plain));
        }
    }
}
