//! Which weights are quantized while they are loaded, and what becomes of those that already are.

use std::str::FromStr;

use dashinfer_kernels::{DType, Group, Scheme, UnknownScheme};

use crate::{ModelSpec, weights::Role};

/// How the weights of a model are quantized while they are loaded, without calibration. Norms and biases never are.
///
/// Of a checkpoint that was quantized before it was stored, [`AS_STORED`](Self::AS_STORED), the default, keeps the stored integers
/// where there are kernels for them, and takes the nearest scheme where there are none, [`NONE`](Self::NONE) makes f32 of them, and a
/// scheme keeps them if it can hold them, else their values are quantized anew. On a GPU, which has no kernels for quantized weights yet,
/// the first two make what it computes in of them: bf16 or f16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Quantization {
    layers: Choice,
    vocabulary: Choice,
    compensated: bool,
    /// What there is instead of schemes, on a backend that has none.
    dense_only: Option<DType>,
}

/// What becomes of some weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) enum Choice {
    #[default]
    AsStored,
    /// Floating point, whatever they are stored as.
    Dense,
    Scheme(Scheme),
}

impl Choice {
    /// Of weights that are stored in floating point.
    pub(crate) const fn scheme(self) -> Option<Scheme> {
        match self {
            Self::AsStored | Self::Dense => None,
            Self::Scheme(scheme) => Some(scheme),
        }
    }
}

impl Quantization {
    /// Every weight as it is stored, quantized or not.
    pub const AS_STORED: Self =
        Self { layers: Choice::AsStored, vocabulary: Choice::AsStored, compensated: false, dense_only: None };

    /// Every weight in floating point: as it is stored, or in f32 if it is stored quantized.
    pub const NONE: Self =
        Self { layers: Choice::Dense, vocabulary: Choice::Dense, compensated: false, dense_only: None };

    /// All linear operators of the layers by `scheme`; the embedding and the head by it too if it has 8-bit weights, else by
    /// [`A16W8`](Scheme::A16W8) with groups of 32, since tokens that look alike differ by little there.
    #[must_use]
    pub const fn new(scheme: Scheme) -> Self {
        let vocabulary = match scheme {
            Scheme::A16W4 { .. } | Scheme::A8W4 { .. } => Scheme::A16W8 { group: Some(Group::G32) },
            other => other,
        };
        let (layers, vocabulary) = (Choice::Scheme(scheme), Choice::Scheme(vocabulary));
        Self { layers, vocabulary, compensated: false, dense_only: None }
    }

    /// The embedding and the head by `scheme` instead, or with `None` as they are stored.
    #[must_use]
    pub const fn vocabulary(mut self, scheme: Option<Scheme>) -> Self {
        self.vocabulary = match scheme {
            Some(scheme) => Choice::Scheme(scheme),
            None => Choice::AsStored,
        };
        self
    }

    /// Codes of the layers' matrices that make up for each other's errors on text that the model writes itself, as in GPTQ
    /// (<https://arxiv.org/abs/2210.17323>), instead of each weight's nearest: of 4-bit schemes, and models whose layers are dense.
    /// Loading then takes the memory of the model as it is stored, that of a step of 32,768 tokens twice, and minutes or hours instead of seconds: keep the result in a
    /// [weight cache](crate::WeightCache). `docs/quantization.md` says what it gains. Scheme, groups and speed are the same.
    #[must_use]
    pub const fn compensated(mut self) -> Self {
        self.compensated = true;
        self
    }

    /// Whether it is [`compensated`](Self::compensated).
    #[must_use]
    pub const fn is_compensated(&self) -> bool {
        self.compensated
    }

    /// The same on a backend that has [no kernels](dashinfer_kernels::Backend::dense_only) for quantized weights and computes in
    /// `dtype`: what is stored quantized becomes that, unless a scheme is asked for. Loading sees to it; for an estimate.
    #[must_use]
    pub const fn dense_only(mut self, dtype: DType) -> Self {
        self.dense_only = Some(dtype);
        self
    }

    /// What weights become that are stored quantized, if it is no scheme.
    pub(crate) const fn dense_type(&self) -> Option<DType> {
        self.dense_only
    }

    /// The scheme of the layers' linear operators, if it does not depend on how they are stored.
    #[must_use]
    pub const fn layers_scheme(&self) -> Option<Scheme> {
        self.layers.scheme()
    }

    /// The scheme of the embedding and the head, if it does not depend on how they are stored.
    #[must_use]
    pub const fn vocabulary_scheme(&self) -> Option<Scheme> {
        self.vocabulary.scheme()
    }

    /// Whether products with weights of `spec` round their activations, which takes memory beside them.
    #[must_use]
    pub fn rounds_activations(&self, spec: &ModelSpec) -> bool {
        let rounds = |choice| match choice {
            Choice::AsStored => spec.stored_quantization.is_some() && self.dense_only.is_none(),
            Choice::Dense => false,
            Choice::Scheme(_) => true,
        };
        rounds(self.layers) || rounds(self.vocabulary)
    }

    pub(crate) fn choice(&self, role: Role) -> Choice {
        let free = |choice| match (choice, self.dense_only) {
            (Choice::AsStored, Some(_)) => Choice::Dense,
            _ => choice,
        };
        match role {
            Role::Layer => free(self.layers),
            Role::Vocabulary => free(self.vocabulary),
            // Never quantized.
            Role::Router => Choice::Dense,
            Role::Latent => match self.layers {
                Choice::Dense => Choice::Dense,
                Choice::AsStored | Choice::Scheme(_) => Choice::AsStored,
            },
        }
    }
}

/// `stored`, `none`, or the name of a [`Scheme`], with `+gptq` behind it if it is to be [`compensated`](Quantization::compensated).
impl FromStr for Quantization {
    type Err = UnknownScheme;

    fn from_str(text: &str) -> Result<Self, UnknownScheme> {
        match text {
            "stored" => Ok(Self::AS_STORED),
            "none" => Ok(Self::NONE),
            scheme => match scheme.strip_suffix("+gptq") {
                Some(scheme) => scheme.parse().map(|scheme| Self::new(scheme).compensated()),
                None => scheme.parse().map(Self::new),
            },
        }
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
        assert_eq!(of("stored"), Quantization::default());
        assert_eq!(of("a8w8").vocabulary_scheme(), Some(Scheme::A8W8));
        let int4 = of("a16w4-g128-zp");
        assert_eq!(int4.layers_scheme(), Some(Scheme::A16W4 { group: Group::G128, zero_point: true }));
        assert_eq!(int4.vocabulary_scheme(), Some(Scheme::A16W8 { group }));
        assert_eq!(int4.vocabulary(None).vocabulary_scheme(), None);
        assert!("int4".parse::<Quantization>().is_err() && "stored+gptq".parse::<Quantization>().is_err());
        assert!(!int4.is_compensated());
        assert_eq!(of("a16w4-g128-zp+gptq"), int4.compensated());
    }
}
