//! AWQ <https://arxiv.org/abs/2306.00978>, as AutoAWQ writes it for its `gemm` kernels.
//!
//! ```text
//! qweight  i32 [cols, rows / 8]    a word holds output features 0 2 4 6 1 3 5 7 of eight, lowest bits first
//! qzeros   i32 [groups, rows / 8]  as qweight
//! scales   f16 [groups, rows]
//! ```

use std::ops::Range;

use dashinfer_kernels::{CodeBits, CodeLayout, CodeWords, StoredMatrix};

use super::{
    I32, Module, Raw, StoredModule, Types, WeightsError, bits_and_group,
    codes::{Codes, Unpack},
    group_size, take, unsupported,
};
use crate::{ConfigError, json::Object};

/// The config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Awq {
    /// `None`: a whole row.
    group: Option<usize>,
}

impl Awq {
    pub(super) fn from_config(object: Object<'_>) -> Result<Self, ConfigError> {
        match object.required_count("bits")? {
            4 => {}
            other => return Err(unsupported(object, "bits", other, "4")),
        }
        if let Some(other) = object.text("version")?.filter(|version| !version.eq_ignore_ascii_case("gemm")) {
            return Err(unsupported(object, "version", other, "gemm"));
        }
        if let Some(other) = object.text("backend")?.filter(|&backend| backend != "autoawq") {
            return Err(unsupported(object, "backend", other, "autoawq"));
        }
        object.flag("zero_point")?; // zero points are stored either way
        Ok(Self { group: group_size(object, "group_size")? })
    }

    pub(super) fn label(&self) -> String {
        format!("awq {}", bits_and_group(4, self.group))
    }

    pub(super) fn module(&self, module: &Module<'_>) -> StoredModule {
        let [rows, cols] = module.shape;
        let layout = CodeLayout { bits: CodeBits::Four, group: self.group, zero_points: true };
        let groups = layout.groups(cols);
        let tensors = vec![
            module.wanted("qweight", [cols, rows.div_ceil(8)], I32),
            module.wanted("qzeros", [groups, rows.div_ceil(8)], I32),
            module.wanted("scales", [groups, rows], Types::Float),
        ];
        let (layout, reader) = (Some(layout), super::Reader::Awq(Reader { layout }));
        StoredModule { tensors, layout, order: None, shape: module.shape, label: self.label(), reader }
    }
}

pub(super) struct Reader {
    layout: CodeLayout,
}

impl Reader {
    pub(super) fn open<'a>(
        &self,
        module: &StoredModule,
        raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let [qweight, qzeros, scales] = take(module, raw)?;
        let words = Words { qweight, qzeros, scales, rows: module.shape[0] };
        Ok(Box::new(Codes { shape: module.shape, layout: self.layout, list: None, order: None, unpack: words }))
    }
}

struct Words<'a> {
    qweight: Raw<'a>,
    qzeros: Raw<'a>,
    scales: Raw<'a>,
    rows: usize,
}

/// How far each of eight output features is shifted in its word.
const SHIFTS: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

impl Words<'_> {
    #[inline(always)]
    fn code(&self, words: &Raw<'_>, line: usize, row: usize) -> u8 {
        (words.word(line * self.rows.div_ceil(8) + row / 8) >> SHIFTS[row % 8]) as u8 & 15
    }
}

/// The eight codes of a word in the order of their output features, a byte each, the first lowest.
#[inline(always)]
fn in_order(word: u32) -> u64 {
    // The halves of a word hold the even and the odd ones.
    let spread = |half: u64| {
        let bytes = (half | half << 24) & 0x0000_00ff_0000_00ff;
        (bytes | bytes << 12) & 0x000f_000f_000f_000f
    };
    spread(u64::from(word & 0xffff)) | spread(u64::from(word >> 16)) << 8
}

/// Eight by eight bytes, turned: byte `i` of word `j` becomes byte `j` of word `i`.
#[inline(always)]
fn turned(mut words: [u64; 8]) -> [u64; 8] {
    #[inline(always)]
    fn change(words: &mut [u64; 8], [first, second]: [usize; 2], shift: u32, mask: u64) {
        let (low, high) = (words[first], words[second]);
        words[first] = low & mask | (high & mask) << shift;
        words[second] = low >> shift & mask | high & !mask;
    }
    // Blocks of 4, 2 and 1 beside the diagonal change places.
    for first in [0, 1, 2, 3] {
        change(&mut words, [first, first + 4], 32, 0x0000_0000_ffff_ffff);
    }
    for first in [0, 1, 4, 5] {
        change(&mut words, [first, first + 2], 16, 0x0000_ffff_0000_ffff);
    }
    for first in [0, 2, 4, 6] {
        change(&mut words, [first, first + 1], 8, 0x00ff_00ff_00ff_00ff);
    }
    words
}

impl Unpack for Words<'_> {
    fn codes(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        let (len, in_line) = (cols.len(), self.rows.div_ceil(8));
        let words: &[[u8; 4]] = self.qweight.bytes.as_chunks().0;
        let whole = if rows.start.is_multiple_of(8) { rows.len() / 8 } else { 0 };
        let blocks = len / 8;
        // Words of neighbouring features are far apart, and what the next ones wait for is fetched together: so many that they stay in
        // the first cache, whatever their distance.
        const TOGETHER: usize = 4;
        for block in 0..blocks {
            if block.is_multiple_of(TOGETHER) {
                let cols = cols.start + block * 8..cols.end.min(cols.start + (block + TOGETHER) * 8);
                let first = cols.map(|col| words.get(col * in_line + rows.start / 8).map_or(0, |word| word[0]));
                std::hint::black_box(first.fold(0, |all, byte| all ^ byte));
            }
            for octet in 0..whole {
                let at = rows.start / 8 + octet;
                // Each word has a column of the block: they are turned into rows.
                let columns = std::array::from_fn(|i| {
                    in_order(u32::from_le_bytes(words[(cols.start + block * 8 + i) * in_line + at]))
                });
                let out = &mut out[octet * 8 * len..][..8 * len];
                for (codes, out) in turned(columns).into_iter().zip(out.chunks_exact_mut(len)) {
                    out[block * 8..][..8].copy_from_slice(&codes.to_le_bytes());
                }
            }
        }
        // What is no block of eight by eight.
        let (done, out_left) = (rows.start + whole * 8, whole * 8 * len);
        for (at, col) in cols.enumerate() {
            if at >= blocks * 8 && rows.start < done {
                self.column(rows.start..done, col, &mut out[at..out_left], len);
            }
            if done < rows.end {
                self.column(done..rows.end, col, &mut out[out_left + at..], len);
            }
        }
    }

    fn column(&self, rows: Range<usize>, col: usize, out: &mut [u8], stride: usize) {
        let line = col * self.rows.div_ceil(8);
        let mut out = out.iter_mut().step_by(stride.max(1));
        let mut row = rows.start;
        while row < rows.end {
            let word = self.qweight.word(line + row / 8);
            let end = rows.end.min((row / 8 + 1) * 8);
            for (row, out) in (row..end).zip(&mut out) {
                *out = (word >> SHIFTS[row % 8]) as u8 & 15;
            }
            row = end;
        }
    }

    fn words(&self) -> Option<CodeWords<'_>> {
        // A line ends within a word unless features are whole words.
        let whole = self.rows.is_multiple_of(8);
        whole.then(|| CodeWords::OfFeatures { bytes: &self.qweight.bytes, col: self.rows / 8 })
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.scale(group * self.rows + row)
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        self.code(&self.qzeros, group, row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_a_word_come_in_the_order_of_their_features() {
        for word in [0x8765_4321, 0xfedc_ba98, 0xf000_000f, 0x1248_8421] {
            let codes = in_order(word).to_le_bytes();
            assert_eq!(codes, SHIFTS.map(|shift| (word >> shift) as u8 & 15), "{word:#x}");
        }
    }

    #[test]
    fn rows_become_columns() {
        let words: [u64; 8] = std::array::from_fn(|j| u64::from_le_bytes(std::array::from_fn(|i| (10 * j + i) as u8)));
        for (i, word) in turned(words).into_iter().enumerate() {
            assert_eq!(word.to_le_bytes(), std::array::from_fn(|j| (10 * j + i) as u8));
        }
    }

    /// Tiles of all kinds, whole blocks and not: the same as code by code.
    #[test]
    fn a_tile_is_made_of_its_codes() {
        let (rows, cols) = (40, 37);
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        };
        let raw = |bytes: Vec<u8>| Raw { bytes: bytes.into(), stored: crate::StoredType::Other("I32".into()) };
        let words = Words {
            qweight: raw((0..cols * rows / 8).flat_map(|_| next().to_le_bytes()).collect()),
            qzeros: raw(Vec::new()),
            scales: raw(Vec::new()),
            rows,
        };
        for range in [0..16, 8..24, 0..8, 3..19, 32..40, 24..37, 5..5] {
            for places in [0..32, 0..37, 1..33, 5..9, 8..8, 30..37] {
                let mut found = vec![255; range.len() * places.len()];
                words.codes(range.clone(), places.clone(), &mut found);
                let wanted = range.clone().flat_map(|row| places.clone().map(move |col| (row, col)));
                let wanted: Vec<u8> = wanted.map(|(row, col)| words.code(&words.qweight, col, row)).collect();
                assert_eq!(found, wanted, "{range:?} {places:?}");
            }
        }
    }
}
