//! compressed-tensors <https://github.com/vllm-project/compressed-tensors>: integers packed into words or one to a byte, and FP8.
//!
//! ```text
//! pack-quantized   weight_packed      i32 [rows, ⌈cols · bits / 32⌉]  neighbouring input features, lowest bits first, offset to unsigned
//!                  weight_scale       [rows, groups]
//!                  weight_zero_point  i32 [⌈rows · bits / 32⌉, groups]  neighbouring output features; if not symmetric
//!                  weight_shape       i64 [2]  rows, cols
//!                  weight_g_idx       i32 [cols]  the group of each input feature; optional
//! int-quantized    weight             i8 [rows, cols]
//!                  weight_scale, weight_zero_point (i8 [rows, groups])
//! float-quantized  weight, weight_scale as in `fp8`
//! ```
//!
//! A checkpoint may have groups of modules with settings of their own, told apart by patterns of names. Here the tensors of a module
//! tell which of them it is of.

use std::ops::Range;

use dashinfer_kernels::{CodeBits, CodeLayout, CodeWords, StoredMatrix};

use super::{
    I32, Module, Raw, StoredModule, Types, WeightsError, bits_and_group,
    codes::{Codes, Unpack, code_of, nibbles, per_word},
    fp8::{self, Fp8},
    group_size,
    order::{self, Order},
    unsupported,
};
use crate::{ConfigError, StoredType, json::Object};

/// The config: the settings of each group of modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compressed {
    groups: Vec<Settings>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Settings {
    Packed(CodeLayout),
    Int8(CodeLayout),
    Float(Fp8),
}

const FORMATS: &str = "pack-quantized, int-quantized, float-quantized";

impl Compressed {
    pub(super) fn from_config(object: Object<'_>) -> Result<Self, ConfigError> {
        let format = object.text("format")?;
        if let Some(sparsity) = object.object("sparsity_config")?
            && let Some(other) = sparsity.text("format")?.filter(|&format| format != "dense")
        {
            return Err(unsupported(sparsity, "format", other, "dense"));
        }
        let mut groups = Vec::new();
        for group in object.objects("config_groups")?.unwrap_or_default() {
            // Of a checkpoint with several formats each group names its own.
            let format = group.text("format")?.or(format).unwrap_or("pack-quantized");
            if let Some(weights) = group.object("weights")? {
                groups.push(Settings::from_config(group, format, weights)?);
            }
        }
        Ok(Self { groups })
    }

    /// See `StoredQuantization::module`. `by_default`: whether it is quantized if nothing of its weight is there.
    pub(super) fn module(&self, module: &Module<'_>, by_default: bool) -> Result<Option<StoredModule>, WeightsError> {
        let is =
            |tensor, name: &str| matches!(module.stored_type(tensor), Some(StoredType::Other(found)) if found == name);
        let float = |settings: &Settings| match settings {
            Settings::Float(fp8) => Some(fp8.module(module)),
            Settings::Packed(_) | Settings::Int8(_) => None,
        };
        let int8 = |settings: &Settings| match settings {
            Settings::Int8(layout) => Some(Int8::module(*layout, module)),
            Settings::Packed(_) | Settings::Float(_) => None,
        };
        if is("weight", "F8_E4M3") {
            return Ok(fitting(module, self.groups.iter().filter_map(float)));
        }
        if is("weight", "I8") {
            return Ok(fitting(module, self.groups.iter().filter_map(int8)));
        }
        if !module.has("weight_packed") && (!by_default || module.has("weight")) {
            return Ok(None);
        }
        let packed = self.groups.iter().filter_map(|settings| match settings {
            Settings::Packed(layout) => Some(Packed::module(*layout, module)),
            Settings::Int8(_) | Settings::Float(_) => None,
        });
        Ok(fitting(module, packed.collect::<Result<Vec<_>, _>>()?.into_iter()))
    }
}

/// The first whose tensors are all there, or else the first: the proof says what it lacks.
fn fitting(module: &Module<'_>, candidates: impl Iterator<Item = StoredModule>) -> Option<StoredModule> {
    let mut first = None;
    for candidate in candidates {
        if candidate.tensors.iter().all(|tensor| matches!(tensor.check(module.source), Ok(Some(_)))) {
            return Some(candidate);
        }
        first = first.or(Some(candidate));
    }
    first
}

impl Settings {
    fn from_config(group: Object<'_>, format: &str, weights: Object<'_>) -> Result<Self, ConfigError> {
        let bits = weights.required_count("num_bits")?;
        let kind = weights.text("type")?.unwrap_or("int");
        let strategy = weights.text("strategy")?;
        let group_size = group_size(weights, "group_size")?;
        if weights.flag("dynamic")? == Some(true) {
            return Err(unsupported(weights, "dynamic", true, "false"));
        }
        if kind == "float" {
            return match (bits, format, strategy) {
                (8, "float-quantized" | "naive-quantized", None | Some("tensor" | "channel")) => {
                    Ok(Self::Float(Fp8 { block: None }))
                }
                (8, "float-quantized" | "naive-quantized", Some("block")) => {
                    let block = fp8::block(weights, "block_structure")?;
                    let missing = || ConfigError::value(weights.path("block_structure"), "rows and columns", "nothing");
                    Ok(Self::Float(Fp8 { block: Some(block.ok_or_else(missing)?) }))
                }
                (8, "float-quantized" | "naive-quantized", Some(other)) => {
                    Err(unsupported(weights, "strategy", other, "tensor, channel, block"))
                }
                (8, other, _) => Err(unsupported(group, "format", other, "float-quantized")),
                (other, ..) => Err(unsupported(weights, "num_bits", format!("{other} bits of a float"), "8")),
            };
        }
        if kind != "int" {
            return Err(unsupported(weights, "type", kind, "int, float"));
        }
        let bits = match bits {
            4 => CodeBits::Four,
            8 => CodeBits::Eight,
            other => return Err(unsupported(weights, "num_bits", other, "4, 8")),
        };
        let size = match strategy {
            Some("group") => group_size,
            Some("channel" | "tensor") => None,
            None => group_size,
            Some(other) => return Err(unsupported(weights, "strategy", other, "tensor, channel, group")),
        };
        let zero_points = !weights.flag("symmetric")?.unwrap_or(true);
        let layout = CodeLayout { bits, group: size, zero_points };
        match format {
            "pack-quantized" => Ok(Self::Packed(layout)),
            "int-quantized" | "naive-quantized" if bits == CodeBits::Eight => Ok(Self::Int8(layout)),
            "int-quantized" | "naive-quantized" => Err(unsupported(weights, "num_bits", 4, "8")),
            other => Err(unsupported(group, "format", other, FORMATS)),
        }
    }
}

/// Codes packed into words.
pub(super) struct Packed {
    layout: CodeLayout,
    list: Option<Vec<u32>>,
}

impl Packed {
    fn module(layout: CodeLayout, module: &Module<'_>) -> Result<StoredModule, WeightsError> {
        let ([rows, cols], per) = (module.shape, per_word(layout.bits));
        let groups = layout.groups(cols);
        let mut tensors = vec![
            module.wanted("weight_packed", [rows, cols.div_ceil(per)], I32),
            module.wanted("weight_scale", [rows, groups], Types::Scale),
            module.wanted("weight_shape", [2], Types::Only("I64")),
        ];
        if layout.zero_points {
            tensors.push(module.wanted("weight_zero_point", [rows.div_ceil(per), groups], I32));
        }
        if module.has("weight_g_idx") {
            tensors.push(module.wanted("weight_g_idx", [cols], I32));
        }
        let (order, list) = order::read(module, "weight_g_idx", layout.group)?;
        let (list, order, layout_of) = match order {
            Order::Features => (None, None, Some(layout)),
            Order::By(order) => (list, Some(order), Some(layout)),
            Order::Ragged => (list, None, None),
        };
        let mut label = format!("compressed-tensors {}", bits_and_group(layout.bits.count(), layout.group));
        if list.is_some() {
            label.push_str(" reordered");
        }
        let reader = super::Reader::Packed(Self { layout, list });
        Ok(StoredModule { tensors, layout: layout_of, order, shape: module.shape, label, reader })
    }

    pub(super) fn open<'a>(
        &'a self,
        module: &'a StoredModule,
        raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let (shape, layout) = (module.shape, self.layout);
        let mut raw = raw.into_iter();
        let mut next = || {
            let missing = || module.tensors[0].value("a module with all its tensors", "fewer");
            raw.next().ok_or_else(missing)
        };
        let (packed, scales, stored_shape) = (next()?, next()?, next()?);
        let zeros = if layout.zero_points { Some(next()?) } else { None };
        let found: Vec<i64> = stored_shape.bytes.as_chunks().0.iter().map(|size| i64::from_le_bytes(*size)).collect();
        if found.iter().map(|&size| usize::try_from(size).ok()).ne(shape.map(Some)) {
            return Err(module.tensors[2].value(format!("{shape:?}"), format!("{found:?}")));
        }
        let words = Words {
            packed,
            scales,
            zeros,
            width: shape[1].div_ceil(per_word(layout.bits)),
            groups: layout.groups(shape[1]),
            bits: layout.bits,
        };
        let order = module.order.as_deref();
        Ok(Box::new(Codes { shape, layout, list: self.list.clone(), order, unpack: words }))
    }
}

struct Words<'a> {
    packed: Raw<'a>,
    scales: Raw<'a>,
    zeros: Option<Raw<'a>>,
    /// Words of a row.
    width: usize,
    groups: usize,
    bits: CodeBits,
}

impl Unpack for Words<'_> {
    fn codes(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        let per = per_word(self.bits);
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            let mut col = cols.start;
            while col < cols.end {
                let first = col % per;
                let count = (per - first).min(cols.end - col);
                let (word, to) = (self.packed.word(row * self.width + col / per), col - cols.start);
                let out = &mut out[to..to + count];
                match self.bits {
                    CodeBits::Four => out.copy_from_slice(&nibbles(word)[first..first + count]),
                    CodeBits::Eight => out.copy_from_slice(&word.to_le_bytes()[first..first + count]),
                }
                col += count;
            }
        }
    }

    fn column(&self, rows: Range<usize>, col: usize, out: &mut [u8], stride: usize) {
        let per = per_word(self.bits);
        for (row, out) in rows.zip(out.iter_mut().step_by(stride.max(1))) {
            *out = code_of(self.packed.word(row * self.width + col / per), self.bits, col % per);
        }
    }

    fn words(&self) -> Option<CodeWords<'_>> {
        Some(CodeWords::OfPlaces { bytes: &self.packed.bytes, octet: 1, row: self.width })
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.scale(row * self.groups + group)
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        let per = per_word(self.bits);
        let zero = |zeros: &Raw<'_>| code_of(zeros.word(row / per * self.groups + group), self.bits, row % per);
        self.zeros.as_ref().map_or(self.bits.middle(), zero)
    }
}

/// Signed 8-bit codes, one to a byte.
pub(super) struct Int8 {
    layout: CodeLayout,
}

impl Int8 {
    fn module(layout: CodeLayout, module: &Module<'_>) -> StoredModule {
        let [rows, cols] = module.shape;
        let groups = layout.groups(cols);
        // One scale for all is written for each output feature too.
        let one =
            module.stored_shape("weight_scale").filter(|shape| layout.group.is_none() && shape.iter().all(|&n| n == 1));
        let scales = one.unwrap_or(vec![rows, groups]);
        let mut tensors = vec![
            module.wanted("weight", [rows, cols], Types::Only("I8")),
            module.wanted("weight_scale", scales.clone(), Types::Scale),
        ];
        if layout.zero_points {
            tensors.push(module.wanted("weight_zero_point", scales, Types::Only("I8")));
        }
        let label = format!("compressed-tensors {}", bits_and_group(8, layout.group));
        let reader = super::Reader::Int8(Self { layout });
        StoredModule { tensors, layout: Some(layout), order: None, shape: module.shape, label, reader }
    }

    pub(super) fn open<'a>(
        &self,
        module: &StoredModule,
        raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let (shape, layout) = (module.shape, self.layout);
        let one_scale = module.tensors[1].shape.iter().product::<usize>() == 1;
        let mut raw = raw.into_iter();
        let (Some(weight), Some(scales)) = (raw.next(), raw.next()) else {
            return Err(module.tensors[0].value("a module with all its tensors", "fewer"));
        };
        let zeros = raw.next();
        let bytes = Bytes { weight, scales, zeros, cols: shape[1], groups: layout.groups(shape[1]), one_scale };
        Ok(Box::new(Codes { shape, layout, list: None, order: None, unpack: bytes }))
    }
}

struct Bytes<'a> {
    weight: Raw<'a>,
    scales: Raw<'a>,
    zeros: Option<Raw<'a>>,
    cols: usize,
    groups: usize,
    one_scale: bool,
}

/// From signed to unsigned, with 0 at 128.
const OFFSET: u8 = 0x80;

impl Bytes<'_> {
    fn param(&self, row: usize, group: usize) -> usize {
        if self.one_scale { 0 } else { row * self.groups + group }
    }
}

impl Unpack for Bytes<'_> {
    fn codes(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            let stored = &self.weight.bytes[row * self.cols..][cols.clone()];
            out.iter_mut().zip(stored).for_each(|(out, &byte)| *out = byte ^ OFFSET);
        }
    }

    fn column(&self, rows: Range<usize>, col: usize, out: &mut [u8], stride: usize) {
        for (row, out) in rows.zip(out.iter_mut().step_by(stride.max(1))) {
            *out = self.weight.bytes[row * self.cols + col] ^ OFFSET;
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.scale(self.param(row, group))
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        self.zeros.as_ref().map_or(OFFSET, |zeros| zeros.bytes[self.param(row, group)] ^ OFFSET)
    }
}
