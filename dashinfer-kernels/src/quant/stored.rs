//! Weights that were quantized before they were stored: the one form in which all formats reach the packer.
//!
//! A format says what its matrix is by [`StoredMatrix`], and gives tiles of it: as f32 always, and as codes with scales where it has
//! those of integers. If a [`Scheme`] can hold the codes, they are packed as they are ([`Scheme::holding`]); else the values are
//! quantized anew. Either happens a tile at a time, so no matrix is ever in f32 as a whole.

use std::ops::Range;

use super::{Group, Scheme, WeightBits, int4, int8};
use crate::dtype::widen;
use crate::error::check;
use crate::{KernelError, MatrixView};

/// Bits of a stored code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CodeBits {
    /// 0 to 15.
    Four,
    /// 0 to 255.
    Eight,
}

impl CodeBits {
    /// Their number.
    #[must_use]
    pub const fn count(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// The largest code.
    #[must_use]
    pub const fn max(self) -> u8 {
        match self {
            Self::Four => 15,
            Self::Eight => 255,
        }
    }

    /// The code of 0 where there are no zero points: 8 or 128.
    #[must_use]
    pub const fn middle(self) -> u8 {
        match self {
            Self::Four => int4::ZERO,
            Self::Eight => int8::ZERO,
        }
    }
}

/// How the codes of a stored matrix are to be read: `w = scale · (code − zero)`, a scale and a zero for each output feature and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CodeLayout {
    /// Of a code.
    pub bits: CodeBits,
    /// Neighbouring places that share a scale, the last group having what is left; `None`: all of a row.
    pub group: Option<usize>,
    /// Whether groups have zero points; else zero is in the [middle](CodeBits::middle).
    pub zero_points: bool,
}

impl CodeLayout {
    /// Groups of a row of `cols` places.
    #[must_use]
    pub const fn groups(self, cols: usize) -> usize {
        match self.group {
            None => 1,
            Some(0) => 0,
            Some(group) => cols.div_ceil(group),
        }
    }

    /// The largest of our groups into which those of the layout can be cut, each part with the scale of the whole.
    fn cut(self) -> Option<Group> {
        let fits = |group: &Group| self.group.is_none_or(|stored| stored > 0 && stored.is_multiple_of(group.size()));
        Group::ALL.into_iter().rev().find(fits)
    }

    /// Whether `scheme` can hold such codes without rounding any.
    #[must_use]
    pub fn fits(self, scheme: Scheme) -> bool {
        let groups = match (scheme.group(), self.group) {
            (None, None) | (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(group), Some(stored)) => stored > 0 && stored.is_multiple_of(group.size()),
        };
        groups
            && match (scheme.weight_bits(), self.bits) {
                (WeightBits::Four, CodeBits::Four) => scheme.has_zero_points() || !self.zero_points,
                (WeightBits::Four, CodeBits::Eight) => false,
                // A code of 4 bits less its zero point lies in −15 to 15.
                (WeightBits::Eight, CodeBits::Four) => true,
                (WeightBits::Eight, CodeBits::Eight) => !self.zero_points,
            }
    }
}

impl Scheme {
    /// The scheme with 16-bit activations that holds the codes of all of `layouts`, side by side in one matrix, without rounding
    /// any: the one with the fewest bits. `None` if there is none, so that weights must be quantized anew: groups that are no
    /// multiples of 32, 8-bit codes with zero points.
    #[must_use]
    pub fn holding(layouts: &[CodeLayout]) -> Option<Self> {
        let group = layouts.iter().map(|layout| layout.cut()).min()??; // `None` is less than any
        let scheme = if layouts.iter().all(|layout| layout.bits == CodeBits::Four) {
            Self::A16W4 { group, zero_point: layouts.iter().any(|layout| layout.zero_points) }
        } else {
            let whole = layouts.iter().all(|layout| layout.group.is_none());
            Self::A16W8 { group: (!whole).then_some(group) }
        };
        layouts.iter().all(|layout| layout.fits(scheme)).then_some(scheme)
    }
}

/// 4-bit codes of a word.
pub(crate) const IN_WORD: usize = 8;

/// All 4-bit codes of a matrix where they stand, eight to a word of 32 bits, little endian, so that words can be moved in place
/// of codes.
#[derive(Debug, Clone, Copy)]
pub enum CodeWords<'a> {
    /// A word has the codes of eight neighbouring places, lowest bits first, of one output feature: those of places `8 i ..` of
    /// feature `r` are word `i · octet + r · row`.
    OfPlaces {
        /// All words.
        bytes: &'a [u8],
        /// Words from eight places to the next eight.
        octet: usize,
        /// Words from an output feature to the next.
        row: usize,
    },
    /// A word has the codes of output features 0 2 4 6 1 3 5 7 of eight, lowest bits first, at one place: those of features
    /// `8 i ..` at place `p` are word `p · col + i`.
    OfFeatures {
        /// All words.
        bytes: &'a [u8],
        /// Words from a place to the next.
        col: usize,
    },
}

impl CodeWords<'_> {
    /// Fails unless all words of a `[rows, cols]` matrix are there.
    fn check(&self, rows: usize, cols: usize) -> Result<(), KernelError> {
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let (bytes, [steps, step], [others, other]) = match *self {
            Self::OfPlaces { bytes, octet, row } => (bytes, [cols.div_ceil(IN_WORD) - 1, octet], [rows - 1, row]),
            Self::OfFeatures { bytes, col } => (bytes, [cols - 1, col], [rows.div_ceil(IN_WORD) - 1, 1]),
        };
        // The steps are anybody's numbers.
        let last = steps.checked_mul(step).and_then(|at| at.checked_add(others.checked_mul(other)?));
        let wanted = last.and_then(|last| last.checked_add(1)?.checked_mul(4)).unwrap_or(usize::MAX);
        if wanted <= bytes.len() {
            return Ok(());
        }
        let what = "bytes of the words of codes, at least";
        Err(KernelError::Shape { op: "pack", what, wanted, found: bytes.len() })
    }
}

/// A weight matrix `[rows, cols]` as some format stores it. It writes all of a tile, row-major.
pub trait StoredMatrix: Sync {
    /// Output features.
    fn rows(&self) -> usize;

    /// Input features.
    fn cols(&self) -> usize;

    /// Whether it has as many bytes as it needs, if that was not seen to when it was made. Asked before anything else.
    ///
    /// # Errors
    /// [`KernelError::Shape`].
    fn check(&self) -> Result<(), KernelError> {
        Ok(())
    }

    /// How [`codes`](Self::codes) and [`params`](Self::params) are to be read; `None` if there are only [`values`](Self::values).
    fn layout(&self) -> Option<CodeLayout> {
        None
    }

    /// The input feature whose code stands at each place, if they are not in order: a permutation of `0..cols`. Groups are of
    /// neighbouring places.
    fn order(&self) -> Option<&[u32]> {
        None
    }

    /// The weights of output features `rows` and input features `cols`, in the order of the features.
    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]);

    /// The codes of output features `rows` at `places`. They are within their bits. Called only if there is a
    /// [`layout`](Self::layout).
    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]);

    /// The codes of all places, if they stand in words. Asked only of a matrix with a [`layout`](Self::layout) of 4 bits.
    ///
    /// `bytes` reach to the end of the last word: that of the last output feature and the last place, counted by the steps. Fewer are
    /// a [`KernelError::Shape`] of the packer. It takes [`codes`](Self::codes) in place of words where `cols` is no multiple of 8,
    /// and for 16 output features of a stack that are not all of one matrix, or do not start at a multiple of 8 of its own.
    fn words(&self) -> Option<CodeWords<'_>> {
        None
    }

    /// The scales of `rows` in `group`, and their zero points, which are [in the middle](CodeBits::middle) already and stay so in a
    /// layout without any. Called only if there is a [`layout`](Self::layout).
    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]);
}

/// Codes in plain memory, one to a byte: for whoever makes them.
#[derive(Debug, Clone, Copy)]
pub struct GroupedCodes<'a> {
    rows: usize,
    cols: usize,
    layout: CodeLayout,
    codes: &'a [u8],
    scales: &'a [f32],
    zeros: &'a [u8],
    order: Option<&'a [u32]>,
}

impl<'a> GroupedCodes<'a> {
    /// `codes`: `[rows, cols]`; `scales` and `zeros`: `[rows, groups]`, with no `zeros` in a layout without zero points. Scales are
    /// rounded to f16 when they are packed.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a length is off, or a code or a zero point has too many bits.
    pub fn new(
        [rows, cols]: [usize; 2],
        layout: CodeLayout,
        codes: &'a [u8],
        scales: &'a [f32],
        zeros: &'a [u8],
    ) -> Result<Self, KernelError> {
        let (groups, times) = (layout.groups(cols), |n: usize| rows.saturating_mul(n));
        if layout.group == Some(0) {
            return Err(KernelError::Shape { op: "pack", what: "codes of a group", wanted: 1, found: 0 });
        }
        check("pack", "codes", times(cols), codes.len())?;
        check("pack", "scales of codes", times(groups), scales.len())?;
        check("pack", "zero points of codes", if layout.zero_points { times(groups) } else { 0 }, zeros.len())?;
        let largest = codes.iter().chain(zeros).fold(0, |largest, &code| largest.max(code));
        if largest > layout.bits.max() {
            let (wanted, found) = (usize::from(layout.bits.max()), usize::from(largest));
            return Err(KernelError::Shape { op: "pack", what: "largest code, at most", wanted, found });
        }
        Ok(Self { rows, cols, layout, codes, scales, zeros, order: None })
    }

    /// The same codes, of input features in another order: that at place `i` is of feature `order[i]`.
    #[must_use]
    pub fn with_order(mut self, order: &'a [u32]) -> Self {
        self.order = Some(order);
        self
    }
}

impl StoredMatrix for GroupedCodes<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn layout(&self) -> Option<CodeLayout> {
        Some(self.layout)
    }

    fn order(&self) -> Option<&[u32]> {
        self.order
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let (groups, size) = (self.layout.groups(self.cols), self.layout.group.unwrap_or(usize::MAX));
        let weight = |row: usize, place: usize| {
            let group = row * groups + place / size;
            let zero = self.zeros.get(group).copied().unwrap_or(self.layout.bits.middle());
            self.scales[group] * (i32::from(self.codes[row * self.cols + place]) - i32::from(zero)) as f32
        };
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            match self.order {
                None => out.iter_mut().zip(cols.clone()).for_each(|(out, place)| *out = weight(row, place)),
                Some(order) => {
                    for (place, &col) in order.iter().enumerate() {
                        if cols.contains(&(col as usize)) {
                            out[col as usize - cols.start] = weight(row, place);
                        }
                    }
                }
            }
        }
    }

    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
        for (row, out) in rows.zip(out.chunks_mut(places.len().max(1))) {
            out.copy_from_slice(&self.codes[row * self.cols..][places.clone()]);
        }
    }

    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]) {
        let groups = self.layout.groups(self.cols);
        for ((row, scale), zero) in rows.zip(scales).zip(zeros) {
            *scale = self.scales[row * groups + group];
            if self.layout.zero_points {
                *zero = self.zeros[row * groups + group];
            }
        }
    }
}

/// Weights that were not quantized, to stand beside some that were.
impl StoredMatrix for MatrixView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn check(&self) -> Result<(), KernelError> {
        let wanted = self.rows.saturating_mul(self.cols).saturating_mul(self.dtype.size_bytes());
        check("pack", "bytes of a part", wanted, self.bytes.len())
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let size = self.dtype.size_bytes();
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            let from = (row * self.cols + cols.start) * size;
            widen(&self.bytes[from..from + cols.len() * size], self.dtype, out);
        }
    }

    fn codes(&self, _: Range<usize>, _: Range<usize>, _: &mut [u8]) {
        unreachable!("it has no layout");
    }

    fn params(&self, _: Range<usize>, _: usize, _: &mut [f32], _: &mut [u8]) {
        unreachable!("it has no layout");
    }
}

/// Stored matrices above each other, as one.
pub(crate) struct StoredStack<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// With the first row of each.
    parts: Vec<(usize, &'a dyn StoredMatrix)>,
}

impl<'a> StoredStack<'a> {
    /// `bias`: `[sum of rows]`, if there is one.
    pub(crate) fn new(parts: &[&'a dyn StoredMatrix], bias: Option<&[f32]>) -> Result<Self, KernelError> {
        let Some(first) = parts.first() else {
            return Err(KernelError::Shape { op: "pack", what: "number of parts", wanted: 1, found: 0 });
        };
        let (cols, mut rows) = (first.cols(), 0usize);
        let mut stacked = Vec::with_capacity(parts.len());
        for &part in parts {
            part.check()?;
            check("pack", "columns of a part", cols, part.cols())?;
            if part.layout().is_some_and(|layout| layout.bits == CodeBits::Four)
                && let Some(words) = part.words()
            {
                words.check(part.rows(), cols)?;
            }
            stacked.push((rows, part));
            rows = rows.saturating_add(part.rows());
        }
        if let Some(bias) = bias {
            check("pack", "length of the bias", rows, bias.len())?;
        }
        Ok(Self { rows, cols, parts: stacked })
    }

    /// Whether `scheme` can hold the codes of all parts in one matrix without rounding any. They must agree in the order of their
    /// input features, as those that multiply one input do, and an order asks for groups.
    pub(crate) fn fits(&self, scheme: Scheme) -> bool {
        let order = self.order();
        (order.is_none() || scheme.group().is_some())
            && self
                .parts
                .iter()
                .all(|(_, part)| part.layout().is_some_and(|layout| layout.fits(scheme)) && part.order() == order)
    }

    /// Whether any part is stored in codes of integers.
    pub(crate) fn has_codes(&self) -> bool {
        self.parts.iter().any(|(_, part)| part.layout().is_some())
    }

    /// That of the first part.
    pub(crate) fn order(&self) -> Option<&'a [u32]> {
        self.parts.first().and_then(|(_, part)| part.order())
    }

    /// Calls `with(part, its rows, their places among `rows`)` for each part that has some of `rows`.
    pub(crate) fn each(&self, rows: Range<usize>, mut with: impl FnMut(&dyn StoredMatrix, Range<usize>, Range<usize>)) {
        for &(first, part) in &self.parts {
            let (start, end) = (rows.start.max(first), rows.end.min(first + part.rows()));
            if start < end {
                with(part, start - first..end - first, start - rows.start..end - rows.start);
            }
        }
    }

    /// The weights of `rows` and input features `cols` as f32, row-major.
    pub(crate) fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let len = cols.len();
        self.each(rows, |part, rows, places| {
            part.values(rows, cols.clone(), &mut out[places.start * len..places.end * len]);
        });
    }
}

/// Fails unless `order` is a permutation of `0..cols`.
pub(crate) fn check_order(op: &'static str, order: &[u32], cols: usize) -> Result<(), KernelError> {
    check(op, "input features of an order", cols, order.len())?;
    let mut seen = vec![false; cols];
    for &col in order {
        match seen.get_mut(col as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                let what = "input feature of an order, each once and less than their number";
                return Err(KernelError::Shape { op, what, wanted: cols, found: col as usize });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bits: CodeBits, group: Option<usize>, zero_points: bool) -> CodeLayout {
        CodeLayout { bits, group, zero_points }
    }

    #[test]
    fn a_scheme_is_found_for_each_layout_that_one_can_hold() {
        use CodeBits::{Eight, Four};
        let check = |layouts: &[CodeLayout], wanted: Option<&str>| {
            let found = Scheme::holding(layouts);
            assert_eq!(found.map(|scheme| scheme.to_string()).as_deref(), wanted, "{layouts:?}");
        };
        check(&[layout(Four, Some(128), false)], Some("a16w4-g128"));
        check(&[layout(Four, Some(64), true)], Some("a16w4-g64-zp"));
        check(&[layout(Four, Some(32), false); 3], Some("a16w4-g32"));
        // Larger groups are cut; their parts share the scale.
        check(&[layout(Four, Some(256), false)], Some("a16w4-g128"));
        check(&[layout(Four, Some(96), false)], Some("a16w4-g32"));
        check(&[layout(Four, None, true)], Some("a16w4-g128-zp"));
        check(&[layout(Eight, None, false)], Some("a16w8"));
        check(&[layout(Eight, Some(1024), false)], Some("a16w8-g128"));
        // Side by side.
        check(&[layout(Four, Some(128), false), layout(Four, Some(64), true)], Some("a16w4-g64-zp"));
        check(&[layout(Eight, Some(128), false), layout(Four, Some(64), true)], Some("a16w8-g64"));
        check(&[layout(Eight, None, false), layout(Eight, Some(64), false)], Some("a16w8-g64"));
        // None can.
        for layout in [layout(Eight, Some(128), true), layout(Four, Some(16), false), layout(Four, Some(0), false)] {
            check(&[layout], None);
        }
        check(&[], None);
    }

    #[test]
    fn plain_codes_are_checked() {
        let four = layout(CodeBits::Four, Some(2), true);
        let new = |codes: &[u8], scales: &[f32], zeros: &[u8]| {
            GroupedCodes::new([2, 3], four, codes, scales, zeros).map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(new(&[15; 6], &[1.0; 4], &[15; 4]), Ok(()));
        assert_eq!(new(&[15; 5], &[1.0; 4], &[15; 4]), Err("pack: codes should be 6, found 5".into()));
        assert_eq!(new(&[15; 6], &[1.0; 3], &[15; 4]), Err("pack: scales of codes should be 4, found 3".into()));
        assert_eq!(new(&[15; 6], &[1.0; 4], &[]), Err("pack: zero points of codes should be 4, found 0".into()));
        let large = "pack: largest code, at most should be 15, found 16";
        assert_eq!(new(&[16; 6], &[1.0; 4], &[15; 4]), Err(large.into()));
        assert_eq!(new(&[15; 6], &[1.0; 4], &[16; 4]), Err(large.into()));
        let absurd = layout(CodeBits::Eight, None, false);
        assert!(GroupedCodes::new([usize::MAX, 3], absurd, &[], &[], &[]).is_err());
        assert!(GroupedCodes::new([1, 1], layout(CodeBits::Four, Some(0), false), &[0], &[], &[]).is_err());
    }

    #[test]
    fn an_order_is_a_permutation() {
        assert_eq!(check_order("pack", &[2, 0, 1], 3), Ok(()));
        for bad in [&[0, 1][..], &[0, 1, 3], &[0, 1, 1], &[0, 1, u32::MAX]] {
            assert!(check_order("pack", bad, 3).is_err(), "{bad:?}");
        }
    }
}
