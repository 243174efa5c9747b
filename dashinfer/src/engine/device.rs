//! Where a model runs, and in which types.

use std::fmt;
use std::str::FromStr;

use dashinfer_kernels::{CacheType, DType};

/// The type of [random weights](super::Source::Random).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightType {
    /// 32 bits.
    F32,
    /// 16 bits with 11 of precision.
    F16,
    /// 16 bits with 8 of precision and the range of f32.
    #[default]
    BF16,
}

impl WeightType {
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The first NVIDIA GPU if there is one and this build has the `cuda` feature, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number, counted from 0 as CUDA counts them. Needs the `cuda` feature.
    Cuda(usize),
}

/// The type in which a model is computed: of activations, and of weights, which are converted when they are loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ComputeType {
    /// On the CPU f32 activations, with weights as they are stored. On a GPU the type in which most of the weights are stored.
    #[default]
    Auto,
    /// 32 bits. On a GPU for tests: nothing there is tuned for it.
    F32,
    /// 16 bits with 11 of precision; sums in f32. On GPUs only.
    F16,
    /// 16 bits with 8 of precision and the range of f32; sums in f32. On the CPU, activations are rounded in products with bf16 weights, which
    /// takes AVX-512 BF16, AMX or Arm's bf16; the rest stays f32.
    BF16,
}

impl ComputeType {
    pub(super) fn dtype(self) -> Option<DType> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
        }
    }
}

impl From<DType> for ComputeType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

/// The type in which keys and values are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvCacheType {
    /// The type in which the model is computed: f32 on the CPU. On a GPU there is no other yet.
    #[default]
    Auto,
    /// 32 bits: exactly what was computed.
    F32,
    /// 16 bits with 11 of precision: half the memory.
    F16,
    /// 16 bits with 8 of precision and the range of f32: half the memory.
    BF16,
    /// 8 bits, and a scale for each token and head: about a quarter of the memory. On the CPU only.
    Int8,
    /// Keys in 8 bits and values in 4, with a scale (and an offset) for each token and head: a fifth of the memory. On the CPU
    /// only.
    Uint4,
}

impl KvCacheType {
    pub(super) fn cache_type(self) -> Option<CacheType> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(CacheType::F32),
            Self::F16 => Some(CacheType::F16),
            Self::BF16 => Some(CacheType::BF16),
            Self::Int8 => Some(CacheType::Int8),
            Self::Uint4 => Some(CacheType::Uint4),
        }
    }
}

/// `auto`, `f32`, `f16`, `bf16`, `int8` or `uint4`.
impl FromStr for KvCacheType {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [Self::Auto, Self::F32, Self::F16, Self::BF16, Self::Int8, Self::Uint4];
        let named = known.into_iter().find(|known| known.cache_type().map_or("auto", CacheType::name) == text);
        named.ok_or(ParseSettingError { known: "auto, f32, f16, bf16, int8 and uint4" })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// `auto`, `cpu`, `cuda` (the first) or `cuda:N`.
impl FromStr for Device {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
                ordinal.map(Self::Cuda).ok_or(ParseSettingError { known: "auto, cpu, cuda and cuda:N" })
            }
        }
    }
}

/// `auto`, `f32`, `f16` or `bf16`.
impl FromStr for ComputeType {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::BF16),
            _ => Err(ParseSettingError { known: "auto, f32, f16 and bf16" }),
        }
    }
}

/// A word that names no value of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("known are {known}")]
pub struct ParseSettingError {
    known: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_types_are_read_by_name() {
        assert_eq!(["auto", "int8"].map(str::parse), [Ok(KvCacheType::Auto), Ok(KvCacheType::Int8)]);
        for cache_type in CacheType::ALL {
            assert_eq!(cache_type.name().parse::<KvCacheType>().unwrap().cache_type(), Some(cache_type));
        }
        let error = "int4".parse::<KvCacheType>().unwrap_err().to_string();
        assert_eq!(error, "known are auto, f32, f16, bf16, int8 and uint4");
    }

    #[test]
    fn devices_are_read_as_they_are_written() {
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(3)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x"] {
            let error = wrong.parse::<Device>().unwrap_err().to_string();
            assert_eq!(error, "known are auto, cpu, cuda and cuda:N", "{wrong}");
        }
    }
}
