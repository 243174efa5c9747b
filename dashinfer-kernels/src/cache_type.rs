//! The types in which keys and values are kept.

use crate::DType;

/// The type of a KV cache's elements.
///
/// The integers are quantized: each token has, in each head, a scale for its key and one for its value, stored in the block
/// beside them. A key or a value that is rounded changes what every later token attends to, a little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// Eight bits, `scale · code` with codes of −127..=127 and the scale in f32. On the CPU only.
    Int8,
    /// Values in four bits, `scale · code + offset` with codes of 0..=15, scale and offset in f16; keys as in [`Int8`](Self::Int8),
    /// because softmax magnifies what they are rounded by. On the CPU only.
    Uint4,
}

impl CacheType {
    /// All of them, the largest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::BF16, Self::Int8, Self::Uint4];

    /// Bits of one feature of a key.
    #[must_use]
    pub const fn key_bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::BF16 => 16,
            Self::Int8 | Self::Uint4 => 8,
        }
    }

    /// Bits of one feature of a value.
    #[must_use]
    pub const fn value_bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::BF16 => 16,
            Self::Int8 => 8,
            Self::Uint4 => 4,
        }
    }

    /// Bytes of the scale (and offset) beside one token's key, and beside its value, of one head.
    #[must_use]
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 0,
            Self::Int8 | Self::Uint4 => 4,
        }
    }

    /// Bytes of one token's key and value of a head of `head_dim`, with their scales. Heads are padded to whole groups of 16
    /// features, which published sizes are.
    #[must_use]
    pub const fn head_bytes(self, head_dim: usize) -> usize {
        head_dim.next_multiple_of(16) * (self.key_bits() + self.value_bits()) / 8 + 2 * self.scale_bytes()
    }

    /// Bytes of what is kept of one token in a cache of latent vectors, `width` values that are key and value at once. Of integers it
    /// would be as of a value of [`Int8`](Self::Int8), which no backend has.
    #[must_use]
    pub const fn latent_bytes(self, width: usize) -> usize {
        width.next_multiple_of(16) * self.key_bits() / 8 + self.scale_bytes()
    }

    /// The name used on command lines: `f32`, `f16`, `bf16`, `int8`, `uint4`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Int8 => "int8",
            Self::Uint4 => "uint4",
        }
    }
}

impl From<DType> for CacheType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

impl std::fmt::Display for CacheType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantized_head_has_its_scale_beside_it() {
        let bytes = |head_dim| CacheType::ALL.map(|cache_type| cache_type.head_bytes(head_dim));
        assert_eq!(bytes(64), [512, 256, 256, 136, 104]);
        assert_eq!(bytes(128), [1024, 512, 512, 264, 200]);
        assert_eq!(bytes(70), bytes(80));
    }
}
