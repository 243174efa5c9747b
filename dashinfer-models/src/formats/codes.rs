//! Integers of 4 or 8 bits with scales, whatever words they are packed into.

use std::ops::Range;

use dashinfer_kernels::{CodeBits, CodeLayout, CodeWords, StoredMatrix};

/// Takes codes out of the words of a format.
pub(super) trait Unpack: Sync {
    /// The codes of `rows` and input features `cols`, in the order of the features, row-major.
    fn codes(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]);

    /// The codes of one input feature of `rows`, `stride` apart.
    fn column(&self, rows: Range<usize>, col: usize, out: &mut [u8], stride: usize);

    /// See [`StoredMatrix::words`], of the features in their order.
    fn words(&self) -> Option<CodeWords<'_>> {
        None
    }

    fn scale(&self, row: usize, group: usize) -> f32;

    /// Of a layout with zero points.
    fn zero(&self, row: usize, group: usize) -> u8;
}

/// A matrix of such codes.
pub(super) struct Codes<'a, U> {
    pub(super) shape: [usize; 2],
    pub(super) layout: CodeLayout,
    /// The group of each input feature, where groups are not of neighbours.
    pub(super) list: Option<Vec<u32>>,
    /// The order in which they are. Without it, a list is of groups that are not full, and codes are of no use.
    pub(super) order: Option<&'a [u32]>,
    pub(super) unpack: U,
}

impl<U: Unpack> Codes<'_, U> {
    fn group(&self, col: usize) -> usize {
        match &self.list {
            Some(list) => list[col] as usize,
            None => self.layout.group.map_or(0, |group| col / group),
        }
    }

    fn zero(&self, row: usize, group: usize) -> f32 {
        let zero = if self.layout.zero_points { self.unpack.zero(row, group) } else { self.layout.bits.middle() };
        f32::from(zero)
    }
}

impl<U: Unpack> StoredMatrix for Codes<'_, U> {
    fn rows(&self) -> usize {
        self.shape[0]
    }

    fn cols(&self) -> usize {
        self.shape[1]
    }

    fn layout(&self) -> Option<CodeLayout> {
        (self.list.is_none() || self.order.is_some()).then_some(self.layout)
    }

    fn order(&self) -> Option<&[u32]> {
        self.order
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let len = cols.len();
        let mut codes = vec![0; rows.len() * len];
        self.unpack.codes(rows.clone(), cols.clone(), &mut codes);
        let width = len.max(1);
        for ((row, out), codes) in rows.zip(out.chunks_mut(width)).zip(codes.chunks(width)) {
            let mut col = cols.start;
            while col < cols.end {
                let group = self.group(col);
                // As many neighbours as surely share it.
                let end = match (&self.list, self.layout.group) {
                    (Some(_), _) => col + 1,
                    (None, Some(size)) => cols.end.min((group + 1) * size),
                    (None, None) => cols.end,
                };
                let (scale, zero) = (self.unpack.scale(row, group), self.zero(row, group));
                let run = col - cols.start..end - cols.start;
                for (out, &code) in out[run.clone()].iter_mut().zip(&codes[run]) {
                    *out = scale * (f32::from(code) - zero);
                }
                col = end;
            }
        }
    }

    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
        let Some(order) = self.order else { return self.unpack.codes(rows, places, out) };
        let len = places.len();
        for (at, &col) in order[places].iter().enumerate() {
            self.unpack.column(rows.clone(), col as usize, &mut out[at..], len);
        }
    }

    fn words(&self) -> Option<CodeWords<'_>> {
        if self.order.is_none() { self.unpack.words() } else { None }
    }

    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]) {
        for ((row, scale), zero) in rows.zip(scales).zip(zeros) {
            *scale = self.unpack.scale(row, group);
            if self.layout.zero_points {
                *zero = self.unpack.zero(row, group);
            }
        }
    }
}

/// Codes to a word.
pub(super) const fn per_word(bits: CodeBits) -> usize {
    32 / bits.count()
}

/// Code `index` of a word, the lowest bits first.
#[inline(always)]
pub(super) fn code_of(word: u32, bits: CodeBits, index: usize) -> u8 {
    match bits {
        CodeBits::Four => (word >> (4 * index)) as u8 & 15,
        CodeBits::Eight => (word >> (8 * index)) as u8,
    }
}

/// The eight 4-bit codes of a word, the lowest bits first.
#[inline(always)]
pub(super) fn nibbles(word: u32) -> [u8; 8] {
    let mut spread = u64::from(word);
    spread = (spread | (spread << 16)) & 0x0000_ffff_0000_ffff;
    spread = (spread | (spread << 8)) & 0x00ff_00ff_00ff_00ff;
    spread = (spread | (spread << 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    spread.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_a_word() {
        assert_eq!(nibbles(0x8765_4321), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(nibbles(0xf0e0_d00f), [15, 0, 0, 13, 0, 14, 0, 15]);
        for index in 0..8 {
            assert_eq!(code_of(0x8765_4321, CodeBits::Four, index), index as u8 + 1);
        }
        assert_eq!([0, 1, 2, 3].map(|i| code_of(0x8765_43ff, CodeBits::Eight, i)), [255, 0x43, 0x65, 0x87]);
    }
}
