//! AWQ <https://arxiv.org/abs/2306.00978>, as AutoAWQ writes it for its `gemm` kernels.
//!
//! ```text
//! qweight  i32 [cols, rows / 8]    a word holds output features 0 2 4 6 1 3 5 7 of eight, lowest bits first
//! qzeros   i32 [groups, rows / 8]  as qweight
//! scales   f16 [groups, rows]
//! ```

use std::ops::Range;

use dashinfer_kernels::{CodeBits, CodeLayout, StoredMatrix};

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

impl Unpack for Words<'_> {
    fn codes(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        let len = cols.len();
        for (at, col) in cols.enumerate() {
            self.column(rows.clone(), col, &mut out[at..], len);
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

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.scale(group * self.rows + row)
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        self.code(&self.qzeros, group, row)
    }
}
