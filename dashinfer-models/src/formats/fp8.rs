//! Weights in FP8, e4m3 <https://arxiv.org/abs/2209.05433>, with scales for the whole tensor, for each output feature, or for blocks
//! (DeepSeek-V3 <https://arxiv.org/abs/2412.19437>).
//!
//! ```text
//! weight            f8  [rows, cols]
//! weight_scale      [] or [1] or [1, 1] or [rows] or [rows, 1]; also weight_scale_inv
//! weight_scale_inv  [⌈rows / block⌉, ⌈cols / block⌉]; also weight_scale
//! ```
//!
//! A weight is `value · scale`, under either name. Scales of activations may be there, and are not used: activations are not rounded
//! to FP8.

use std::ops::Range;

use dashinfer_kernels::StoredMatrix;

use super::{Module, Raw, StoredModule, Types, WeightsError, take, unsupported};
use crate::{ConfigError, json::Object};

/// The config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fp8 {
    /// Rows and columns of a block.
    pub(super) block: Option<[usize; 2]>,
}

impl Fp8 {
    pub(super) fn from_config(object: Object<'_>) -> Result<Self, ConfigError> {
        if let Some(other) = object.text("fmt")?.filter(|&fmt| fmt != "e4m3") {
            return Err(unsupported(object, "fmt", other, "e4m3"));
        }
        if let Some(other) = object.text("activation_scheme")?.filter(|scheme| !["dynamic", "static"].contains(scheme))
        {
            return Err(unsupported(object, "activation_scheme", other, "dynamic, static"));
        }
        Ok(Self { block: block(object, "weight_block_size")? })
    }

    pub(super) fn module(&self, module: &Module<'_>) -> StoredModule {
        let [rows, cols] = module.shape;
        let names = if self.block.is_some() {
            ["weight_scale_inv", "weight_scale"]
        } else {
            ["weight_scale", "weight_scale_inv"]
        };
        let name = names.into_iter().find(|name| module.has(name)).unwrap_or(names[0]);
        let (scales, shape, label) = match self.block {
            Some([block_rows, block_cols]) => (
                Scales::Blocks([block_rows, block_cols]),
                vec![rows.div_ceil(block_rows), cols.div_ceil(block_cols)],
                format!("fp8 {block_rows}×{block_cols}"),
            ),
            None => match module.stored_shape(name) {
                Some(found) if found == [rows] || found == [rows, 1] => {
                    (Scales::Rows, found, "fp8 by output feature".to_owned())
                }
                Some(found) if found == [1] || found == [1, 1] => (Scales::One, found, "fp8".to_owned()),
                _ => (Scales::One, vec![], "fp8".to_owned()),
            },
        };
        let tensors = vec![
            module.wanted("weight", [rows, cols], Types::Only("F8_E4M3")),
            module.wanted(name, shape, Types::Scale),
        ];
        let reader = super::Reader::Fp8(Reader { scales });
        StoredModule { tensors, layout: None, order: None, shape: module.shape, label, reader }
    }
}

/// Rows and columns of a block, if there are blocks.
pub(super) fn block(object: Object<'_>, key: &str) -> Result<Option<[usize; 2]>, ConfigError> {
    match object.counts(key)?.as_deref() {
        None => Ok(None),
        Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok(Some([rows, cols])),
        Some(other) => Err(ConfigError::value(object.path(key), "rows and columns of a block", format!("{other:?}"))),
    }
}

/// Who shares a scale.
#[derive(Debug, Clone, Copy)]
enum Scales {
    One,
    Rows,
    Blocks([usize; 2]),
}

pub(super) struct Reader {
    scales: Scales,
}

impl Reader {
    pub(super) fn open<'a>(
        &self,
        module: &StoredModule,
        raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let [weight, scales] = take(module, raw)?;
        Ok(Box::new(Weights { shape: module.shape, weight, kind: self.scales, scales }))
    }
}

struct Weights<'a> {
    shape: [usize; 2],
    weight: Raw<'a>,
    kind: Scales,
    scales: Raw<'a>,
}

impl StoredMatrix for Weights<'_> {
    fn rows(&self) -> usize {
        self.shape[0]
    }

    fn cols(&self) -> usize {
        self.shape[1]
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let width = self.shape[1];
        for (row, out) in rows.zip(out.chunks_mut(cols.len().max(1))) {
            let stored = &self.weight.bytes[row * width..][cols.clone()];
            let mut scaled = |run: Range<usize>, scale: f32| {
                let run = run.start - cols.start..run.end - cols.start;
                for (out, &byte) in out[run.clone()].iter_mut().zip(&stored[run]) {
                    *out = E4M3[usize::from(byte)] * scale;
                }
            };
            match self.kind {
                Scales::One => scaled(cols.clone(), self.scales.scale(0)),
                Scales::Rows => scaled(cols.clone(), self.scales.scale(row)),
                Scales::Blocks([block_rows, block_cols]) => {
                    let first = row / block_rows * width.div_ceil(block_cols);
                    let mut col = cols.start;
                    while col < cols.end {
                        let block = col / block_cols;
                        let end = cols.end.min((block + 1).saturating_mul(block_cols));
                        scaled(col..end, self.scales.scale(first + block));
                        col = end;
                    }
                }
            }
        }
    }

    fn codes(&self, _: Range<usize>, _: Range<usize>, _: &mut [u8]) {
        unreachable!("it has no layout");
    }

    fn params(&self, _: Range<usize>, _: usize, _: &mut [f32], _: &mut [u8]) {
        unreachable!("it has no layout");
    }
}

/// The value of each byte: a sign, four bits of exponent with a bias of 7, three of mantissa; no infinities, and one pattern (of each
/// sign) that is not a number.
static E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (exponent, mantissa) = ((byte >> 3) & 15, byte & 7);
        let size = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            // 2^(exponent − 7) · (1 + mantissa / 8)
            (8 + mantissa) as f32 / 1024.0 * (1u32 << exponent) as f32
        };
        values[byte as usize] = if byte < 128 { size } else { -size };
        byte += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_values_of_the_format() {
        let cases = [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x40, 2.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ];
        for (byte, value) in cases {
            assert_eq!(E4M3[byte], value, "{byte:#x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        assert_eq!(E4M3.iter().filter(|value| value.is_finite()).count(), 254);
        assert!(E4M3[..127].is_sorted());
    }
}
