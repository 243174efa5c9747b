//! Which weights are quantized while they are loaded.

use dashinfer_kernels::{Group, Scheme};

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
        }
    }
}

impl From<Scheme> for Quantization {
    fn from(scheme: Scheme) -> Self {
        Self::new(scheme)
    }
}
