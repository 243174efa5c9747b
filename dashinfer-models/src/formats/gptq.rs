//! GPTQ <https://arxiv.org/abs/2210.17323>, as AutoGPTQ and GPTQModel write it.
//!
//! ```text
//! qweight  i32 [cols · bits / 32, rows]    a word holds neighbouring input features of one output feature, lowest bits first
//! qzeros   i32 [groups, rows · bits / 32]  neighbouring output features; in version 1 less one
//! scales   f16 [groups, rows]
//! g_idx    i32 [cols]                      the group of each input feature; optional
//! ```

use std::ops::Range;

use dashinfer_kernels::{CodeBits, CodeLayout, CodeWords, StoredMatrix};

use super::{
    I32, Module, Raw, StoredModule, Types, WeightsError, bits_and_group,
    codes::{Codes, Unpack, code_of, nibbles, per_word},
    group_size,
    order::{self, Order},
    take, unsupported, word,
};
use crate::{ConfigError, json::Object};

/// The config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Gptq {
    bits: CodeBits,
    /// `None`: a whole row.
    group: Option<usize>,
    /// Zero is in the middle.
    symmetric: bool,
    /// Added to stored zero points: 1 in version 1 of the format.
    zero_offset: u8,
}

impl Gptq {
    pub(super) fn from_config(object: Object<'_>) -> Result<Self, ConfigError> {
        let bits = match object.required_count("bits")? {
            4 => CodeBits::Four,
            8 => CodeBits::Eight,
            other => return Err(unsupported(object, "bits", other, "4, 8")),
        };
        // The newer tool has used both names.
        let mut zero_offset = 1;
        for key in ["checkpoint_format", "format"] {
            match object.text(key)? {
                None | Some("gptq") => {}
                Some("gptq_v2") => zero_offset = 0,
                Some(other) => return Err(unsupported(object, key, other, "gptq, gptq_v2")),
            }
        }
        if object.flag("is_marlin_format")? == Some(true) {
            return Err(unsupported(object, "is_marlin_format", true, "false"));
        }
        if object.object("dynamic")?.is_some_and(|dynamic| !dynamic.is_empty()) {
            return Err(unsupported(object, "dynamic", "settings of single modules", "one for all"));
        }
        if let Some(other) = object.text("pack_dtype")?.filter(|&dtype| dtype != "int32") {
            return Err(unsupported(object, "pack_dtype", other, "int32"));
        }
        object.flag("desc_act")?; // the list of groups says what it says
        let symmetric = object.flag("sym")?.unwrap_or(true);
        Ok(Self { bits, group: group_size(object, "group_size")?, symmetric, zero_offset })
    }

    pub(super) fn label(&self) -> String {
        format!("gptq {}", bits_and_group(self.bits.count(), self.group))
    }

    pub(super) fn module(&self, module: &Module<'_>) -> Result<StoredModule, WeightsError> {
        let ([rows, cols], per) = (module.shape, per_word(self.bits));
        let layout = CodeLayout { bits: self.bits, group: self.group, zero_points: !self.symmetric };
        let groups = layout.groups(cols);
        let mut tensors = vec![
            module.wanted("qweight", [cols.div_ceil(per), rows], I32),
            module.wanted("qzeros", [groups, rows.div_ceil(per)], I32),
            module.wanted("scales", [groups, rows], Types::Float),
        ];
        if module.has("g_idx") {
            tensors.push(module.wanted("g_idx", [cols], I32));
        }
        let (order, list) = order::read(module, "g_idx", self.group)?;
        let (list, order, layout_of) = match order {
            Order::Features => (None, None, Some(layout)),
            Order::By(order) => (list, Some(order), Some(layout)),
            Order::Ragged => (list, None, None),
        };
        let mut label = self.label();
        if list.is_some() {
            label.push_str(" reordered");
        }
        let reader = super::Reader::Gptq(Reader { layout, list, zero_offset: self.zero_offset });
        Ok(StoredModule { tensors, layout: layout_of, order, shape: module.shape, label, reader })
    }
}

pub(super) struct Reader {
    layout: CodeLayout,
    list: Option<Vec<u32>>,
    zero_offset: u8,
}

impl Reader {
    pub(super) fn open<'a>(
        &'a self,
        module: &'a StoredModule,
        mut raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        raw.truncate(3); // the list was read
        let [qweight, qzeros, scales] = take(module, raw)?;
        let (shape, bits) = (module.shape, self.layout.bits);
        let words = Words { qweight, qzeros, scales, rows: shape[0], bits, zero_offset: self.zero_offset };
        if !self.layout.zero_points {
            let middle = bits.middle();
            for group in 0..self.layout.groups(shape[1]) {
                if let Some(found) = (0..shape[0]).map(|row| words.zero(row, group)).find(|&zero| zero != middle) {
                    return Err(module.tensors[1].value(format!("zero points of {middle}, as `sym` says"), found));
                }
            }
        }
        let order = module.order.as_deref();
        Ok(Box::new(Codes { shape, layout: self.layout, list: self.list.clone(), order, unpack: words }))
    }
}

struct Words<'a> {
    qweight: Raw<'a>,
    qzeros: Raw<'a>,
    scales: Raw<'a>,
    rows: usize,
    bits: CodeBits,
    zero_offset: u8,
}

impl Unpack for Words<'_> {
    fn codes(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        let (per, len) = (per_word(self.bits), cols.len());
        // Words of neighbouring features are far apart, and what the next ones wait for is fetched together: so many that they
        // stay in the first cache, whatever their distance.
        const TOGETHER: usize = 8;
        let mut fetched = cols.start;
        let mut col = cols.start;
        while col < cols.end {
            if col >= fetched {
                fetched = cols.end.min((col / per + TOGETHER) * per);
                let first_bytes = (col / per..fetched.div_ceil(per))
                    .map(|line| self.qweight.bytes.get(4 * (line * self.rows + rows.start)).copied().unwrap_or(0));
                std::hint::black_box(first_bytes.fold(0, |all, byte| all ^ byte));
            }
            let (at, first) = (col - cols.start, col % per);
            let count = (per - first).min(cols.end - col);
            let words = &self.qweight.bytes[4 * (col / per * self.rows + rows.start)..][..4 * rows.len()];
            let words = words.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
            for (words, out) in words.zip(out.chunks_mut(len)) {
                let out = &mut out[at..at + count];
                match self.bits {
                    // All of a word, as nearly always: a store of a known size.
                    CodeBits::Four if count == 8 => out.copy_from_slice(&nibbles(words)),
                    CodeBits::Four => out.copy_from_slice(&nibbles(words)[first..first + count]),
                    CodeBits::Eight => out.copy_from_slice(&words.to_le_bytes()[first..first + count]),
                }
            }
            col += count;
        }
    }

    fn column(&self, rows: Range<usize>, col: usize, out: &mut [u8], stride: usize) {
        let per = per_word(self.bits);
        for (out, row) in out.iter_mut().step_by(stride.max(1)).zip(rows) {
            *out = code_of(word(&self.qweight.bytes, col / per * self.rows + row), self.bits, col % per);
        }
    }

    fn words(&self) -> Option<CodeWords<'_>> {
        Some(CodeWords::OfPlaces { bytes: &self.qweight.bytes, octet: self.rows, row: 1 })
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.scale(group * self.rows + row)
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        let per = per_word(self.bits);
        let stored = code_of(self.qzeros.word(group * self.rows.div_ceil(per) + row / per), self.bits, row % per);
        // Version 1 stores a zero point of 0 as the largest code.
        stored.wrapping_add(self.zero_offset) & self.bits.max()
    }
}
