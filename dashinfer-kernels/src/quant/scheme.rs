//! The schemes by name: bits of activations and weights, and who shares a scale.

use std::fmt;
use std::str::FromStr;

/// How a weight matrix is quantized, and to how many bits its activations are rounded. The names are DashInfer's: `A16W8` has
/// 16-bit activations and 8-bit weights.
///
/// Activations of 16 bits are integers too, of 15 bits below the largest of their group: finer than bf16 in all but the smallest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scheme {
    /// 8-bit weights with one scale for each output feature, or for each group of input features.
    A16W8 {
        /// `None`: one scale for each output feature.
        group: Option<Group>,
    },
    /// 4-bit weights.
    A16W4 {
        /// Input features that share a scale.
        group: Group,
        /// Whether each group has a zero point too; else codes are symmetric.
        zero_point: bool,
    },
    /// 8-bit weights with one scale for each output feature, and activations of 8 bits with one scale for each token. Fast where
    /// there are integer dot products; activations with outliers lose precision.
    A8W8,
    /// 4-bit weights as in [`A16W4`](Self::A16W4), and activations of 8 bits with a scale for each token and group.
    A8W4 {
        /// Input features that share a scale.
        group: Group,
        /// Whether each group has a zero point too; else codes are symmetric.
        zero_point: bool,
    },
}

/// How many neighbouring input features share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// 32
    G32,
    /// 64
    G64,
    /// 128
    G128,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::G32, Self::G64, Self::G128];

    /// Input features.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::G32 => 32,
            Self::G64 => 64,
            Self::G128 => 128,
        }
    }
}

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WeightBits {
    Four,
    Eight,
}

/// Bits of an activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ActivationBits {
    Eight,
    Sixteen,
}

impl Scheme {
    /// Every scheme there is.
    pub const ALL: [Self; 17] = {
        const fn a16w4(group: Group, zero_point: bool) -> Scheme {
            Scheme::A16W4 { group, zero_point }
        }
        const fn a8w4(group: Group, zero_point: bool) -> Scheme {
            Scheme::A8W4 { group, zero_point }
        }
        [
            Self::A16W8 { group: None },
            Self::A16W8 { group: Some(Group::G32) },
            Self::A16W8 { group: Some(Group::G64) },
            Self::A16W8 { group: Some(Group::G128) },
            Self::A8W8,
            a16w4(Group::G32, false),
            a16w4(Group::G64, false),
            a16w4(Group::G128, false),
            a16w4(Group::G32, true),
            a16w4(Group::G64, true),
            a16w4(Group::G128, true),
            a8w4(Group::G32, false),
            a8w4(Group::G64, false),
            a8w4(Group::G128, false),
            a8w4(Group::G32, true),
            a8w4(Group::G64, true),
            a8w4(Group::G128, true),
        ]
    };

    /// Input features that share a scale; `None` if all do.
    #[must_use]
    pub const fn group(self) -> Option<Group> {
        match self {
            Self::A16W8 { group } => group,
            Self::A8W8 => None,
            Self::A16W4 { group, .. } | Self::A8W4 { group, .. } => Some(group),
        }
    }

    /// Whether each group has a zero point.
    #[must_use]
    pub const fn has_zero_points(self) -> bool {
        matches!(self, Self::A16W4 { zero_point: true, .. } | Self::A8W4 { zero_point: true, .. })
    }

    pub(crate) const fn weight_bits(self) -> WeightBits {
        match self {
            Self::A16W8 { .. } | Self::A8W8 => WeightBits::Eight,
            Self::A16W4 { .. } | Self::A8W4 { .. } => WeightBits::Four,
        }
    }

    pub(crate) const fn activation_bits(self) -> ActivationBits {
        match self {
            Self::A16W8 { .. } | Self::A16W4 { .. } => ActivationBits::Sixteen,
            Self::A8W8 | Self::A8W4 { .. } => ActivationBits::Eight,
        }
    }

    /// Bits that a weight takes in memory, its share of scales and zero points included, for a matrix of `cols` input features.
    #[must_use]
    pub fn bits_per_weight(self, cols: usize) -> f64 {
        let code = match self.weight_bits() {
            WeightBits::Four => 4.0,
            WeightBits::Eight => 8.0,
        };
        let beside = if self.has_zero_points() { 24.0 } else { 16.0 };
        code + beside / self.group().map_or(cols.max(1), Group::size) as f64
    }
}

/// `a16w8`, `a16w8-g32`, `a8w8`, `a16w4-g128`, `a16w4-g128-zp`, `a8w4-g32`, ..
impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A16W8 { .. } => "a16w8",
            Self::A8W8 => "a8w8",
            Self::A16W4 { .. } => "a16w4",
            Self::A8W4 { .. } => "a8w4",
        })?;
        if let Some(group) = self.group() {
            write!(f, "-g{}", group.size())?;
        }
        if self.has_zero_points() { f.write_str("-zp") } else { Ok(()) }
    }
}

/// A text that names no scheme.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no scheme; known are a16w8, a16w8-gN, a8w8, a16w4-gN, a16w4-gN-zp, a8w4-gN and a8w4-gN-zp, with N = 32, 64 or 128"
)]
pub struct UnknownScheme(String);

impl FromStr for Scheme {
    type Err = UnknownScheme;

    fn from_str(text: &str) -> Result<Self, UnknownScheme> {
        Self::ALL.into_iter().find(|scheme| scheme.to_string() == text).ok_or_else(|| UnknownScheme(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for scheme in Scheme::ALL {
            assert_eq!(scheme.to_string().parse(), Ok(scheme));
        }
        assert_eq!("a16w4-g64-zp".parse(), Ok(Scheme::A16W4 { group: Group::G64, zero_point: true }));
        assert!("int4".parse::<Scheme>().unwrap_err().to_string().starts_with("`int4` is no scheme; known are a16w8,"));
    }

    #[test]
    fn scales_and_zero_points_count() {
        let bits = |name: &str| name.parse::<Scheme>().unwrap().bits_per_weight(1024);
        assert_eq!(bits("a16w4-g32"), 4.5);
        assert_eq!(bits("a16w4-g32-zp"), 4.75);
        assert_eq!(bits("a16w8-g64"), 8.25);
        assert_eq!(bits("a8w8"), 8.0 + 16.0 / 1024.0);
    }
}
