//! The floating-point types that checkpoints store, and how to read them as `f32`.

use half::{bf16, f16};

/// The type of a stored element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name used in configs and on command lines: `f32`, `f16`, `bf16`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// The value of this type that is nearest to `x`; halfway between two, the even one.
    #[must_use]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::BF16 => bf16::from_f32(x).to_f32(),
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Element `index` of little-endian `bytes` of type `dtype`, as `f32` (exact for every type). `bytes` need not be aligned.
///
/// # Panics
/// If `index` lies beyond `bytes`.
#[must_use]
pub fn element(bytes: &[u8], dtype: DType, index: usize) -> f32 {
    match dtype {
        DType::F32 => {
            let at = &bytes[index * 4..index * 4 + 4];
            f32::from_le_bytes([at[0], at[1], at[2], at[3]])
        }
        DType::F16 => f16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]).to_f32(),
        DType::BF16 => bf16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]).to_f32(),
    }
}

/// Little-endian `bytes` of type `dtype` as `f32`, as many elements as fit `out`: loops that can be made of vectors, wherever they are inlined.
#[inline(always)]
pub(crate) fn widen(bytes: &[u8], dtype: DType, out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            for (out, value) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*value);
            }
        }
        DType::F16 => {
            for (out, value) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f16::from_le_bytes(*value).to_f32();
            }
        }
        DType::BF16 => {
            for (out, value) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_le_bytes(*value).to_f32();
            }
        }
    }
}

/// All of little-endian `bytes` of type `dtype` as `f32`. Exact for every type.
#[must_use]
pub fn to_f32(bytes: &[u8], dtype: DType) -> Vec<f32> {
    (0..bytes.len() / dtype.size_bytes()).map(|i| element(bytes, dtype, i)).collect()
}
