//! Which weights are quantized while they are loaded.

use std::str::FromStr;

use dashinfer_kernels::{Group, Scheme, UnknownScheme};

use crate::weights::Role;

/// How the weights of a model are quantized while they are loaded, without calibration. Norms and biases never are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Quantization {
    layers: Option<Scheme>,
    vocabulary: Option<Scheme>,
}

impl Quantization {
    /// Every weight as it is stored.
    pub const NONE: Self = Self { layers: None, vocabulary: None };

    /// All linear operators of the layers by `scheme`; the embedding and the head by it too if it has 8-bit weights, else by
    /// [`A16W8`](Scheme::A16W8) with groups of 32, since tokens that look alike differ by little there.
    #[must_use]
    pub const fn new(scheme: Scheme) -> Self {
        let vocabulary = match scheme {
            Scheme::A16W4 { .. } | Scheme::A8W4 { .. } => Scheme::A16W8 { group: Some(Group::G32) },
            other => other,
        };
        Self { layers: Some(scheme), vocabulary: Some(vocabulary) }
    }

    /// The embedding and the head by `scheme` instead, or with `None` as they are stored.
    #[must_use]
    pub const fn vocabulary(mut self, scheme: Option<Scheme>) -> Self {
        self.vocabulary = scheme;
        self
    }

    /// The scheme of the layers' linear operators.
    #[must_use]
    pub const fn layers_scheme(&self) -> Option<Scheme> {
        self.layers
    }

    /// The scheme of the embedding and the head.
    #[must_use]
    pub const fn vocabulary_scheme(&self) -> Option<Scheme> {
        self.vocabulary
    }

    pub(crate) fn scheme(&self, role: Role) -> Option<Scheme> {
        match role {
            Role::Layer => self.layers,
            Role::Vocabulary => self.vocabulary,
            Role::Latent | Role::Router => None,
        }
    }
}

/// `none`, or the name of a [`Scheme`].
impl FromStr for Quantization {
    type Err = UnknownScheme;

    fn from_str(text: &str) -> Result<Self, UnknownScheme> {
        if text == "none" { Ok(Self::NONE) } else { text.parse().map(Self::new) }
    }
}

impl From<Scheme> for Quantization {
    fn from(scheme: Scheme) -> Self {
        Self::new(scheme)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabularies_have_eight_bits_unless_asked_for() {
        let of = |text: &str| text.parse::<Quantization>().unwrap();
        let group = Some(Group::G32);
        assert_eq!(of("none"), Quantization::NONE);
        assert_eq!(of("a8w8").vocabulary_scheme(), Some(Scheme::A8W8));
        let int4 = of("a16w4-g128-zp");
        assert_eq!(int4.layers_scheme(), Some(Scheme::A16W4 { group: Group::G128, zero_point: true }));
        assert_eq!(int4.vocabulary_scheme(), Some(Scheme::A16W8 { group }));
        assert_eq!(int4.vocabulary(None).vocabulary_scheme(), None);
        assert!("int4".parse::<Quantization>().is_err());
    }
}
