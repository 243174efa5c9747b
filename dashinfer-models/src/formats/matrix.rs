//! What becomes of a matrix when it is packed, and what of that is worth telling.

use std::{collections::BTreeMap, fmt};

use dashinfer_kernels::{CodeLayout, DType, Group, LatentHeads, PackedShape, Scheme};

use super::{StoredModule, StoredQuantization, dense_type, heads_module, module};
use crate::{
    Quantization, WeightSource, WeightsError,
    loader::common_type,
    quantization::Choice,
    weights::{Fill, LinearPlan, Plan, Role, StoredHeads, VectorPlan},
};

/// What holds the weights that no scheme of ours holds as they are: finer than what it stands for, FP8 and codes of odd groups.
const NEAREST: Scheme = Scheme::A16W8 { group: Some(Group::G32) };

/// How the parts of a matrix are stored, and what they are packed into.
pub(crate) struct MatrixForm {
    /// `None`: not quantized.
    pub(crate) parts: Vec<Option<StoredModule>>,
    /// The type that is packed, of a matrix that is not quantized.
    pub(crate) dtype: DType,
    pub(crate) scheme: Option<Scheme>,
    /// Whether the input features stand in an order of their own.
    pub(crate) order: bool,
}

impl MatrixForm {
    /// # Errors
    /// [`WeightsError`] for tensors that contradict the config.
    pub(crate) fn new(
        plan: &LinearPlan,
        source: &dyn WeightSource,
        stored: Option<&StoredQuantization>,
        quantization: Quantization,
    ) -> Result<Self, WeightsError> {
        let parts = plan.parts.iter().map(|part| module(stored, source, part, plan));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let choice = quantization.choice(plan.role);
        if parts.iter().all(Option::is_none) {
            let dtype = common_type(plan.parts.iter().map(|part| dense_type(source, part)));
            return Ok(Self { parts, dtype, scheme: choice.scheme(), order: false });
        }
        if plan.unit_rows {
            return Err(WeightsError::Value {
                name: plan.parts[0].weight(),
                wanted: "floating point, as its rows are divided by their lengths".to_owned(),
                found: parts.iter().flatten().map(|part| part.label.as_str()).next().unwrap_or_default().to_owned(),
            });
        }
        let layouts: Option<Vec<CodeLayout>> =
            parts.iter().map(|part| part.as_ref().and_then(|part| part.layout)).collect();
        let orders = || parts.iter().flatten().map(|part| part.order.as_deref());
        let order = orders().next().flatten();
        let fits = |scheme: &Scheme| {
            let same_order = orders().all(|other| other == order) && (order.is_none() || scheme.group().is_some());
            let held = layouts.as_ref().is_some_and(|layouts| layouts.iter().all(|layout| layout.fits(*scheme)));
            same_order && held
        };
        let scheme = match choice {
            Choice::AsStored => {
                let held = layouts.as_ref().and_then(|layouts| Scheme::holding(layouts));
                Some(held.filter(fits).unwrap_or(NEAREST))
            }
            Choice::Dense => None,
            Choice::Scheme(scheme) => Some(scheme),
        };
        let order = order.is_some() && scheme.as_ref().is_some_and(fits);
        let dtype = quantization.dense_type().filter(|_| scheme.is_none()).unwrap_or(DType::F32);
        Ok(Self { parts, dtype, scheme, order })
    }

    /// Whether any part was quantized before it was stored.
    pub(crate) fn is_stored(&self) -> bool {
        self.parts.iter().any(Option::is_some)
    }

    /// Whether all codes are packed as they are.
    fn is_exact(&self) -> bool {
        let Some(scheme) = self.scheme else { return false };
        let held = |part: &Option<StoredModule>| {
            part.as_ref().is_some_and(|part| {
                part.layout.is_some_and(|layout| layout.fits(scheme)) && part.order.is_some() == self.order
            })
        };
        self.parts.iter().all(held)
    }

    /// What its parts are stored as, each once.
    fn label(&self) -> String {
        let mut labels: Vec<&str> = Vec::new();
        for part in &self.parts {
            let label = part.as_ref().map_or("floating point", |part| &part.label);
            if !labels.contains(&label) {
                labels.push(label);
            }
        }
        labels.join(" beside ")
    }
}

/// How the matrices between heads and latent vectors are stored, as one tensor, and what they are packed into: floating point, always.
pub(crate) struct HeadsForm {
    /// `None`: not quantized.
    pub(crate) stored: Option<StoredModule>,
    pub(crate) dtype: DType,
}

impl HeadsForm {
    /// # Errors
    /// [`WeightsError`] for tensors that contradict the config.
    pub(crate) fn new(
        plan: &LatentHeads<LinearPlan>,
        source: &dyn WeightSource,
        stored: Option<&StoredQuantization>,
        quantization: Quantization,
    ) -> Result<Self, WeightsError> {
        let module = heads_module(stored, source, plan)?;
        let dtype = match (&module, quantization.dense_type(), quantization.choice(Role::Latent)) {
            (None, ..) => dense_type(source, StoredHeads::new(plan).part),
            (Some(_), Some(dtype), _) => dtype,
            (Some(_), None, Choice::Dense) => DType::F32,
            // What is lost is less than quantizing has cost, and half the memory.
            (Some(_), None, Choice::AsStored | Choice::Scheme(_)) => DType::BF16,
        };
        Ok(Self { stored: module, dtype })
    }

    pub(crate) fn packed_shape(&self, plan: &LinearPlan) -> PackedShape {
        let (rows, cols, dtype) = (plan.rows(), plan.cols, self.dtype);
        PackedShape { rows, cols, dtype, scheme: None, bias: false, order: false }
    }
}

/// What weights are packed into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PackedAs {
    /// Integers of a scheme.
    Scheme(Scheme),
    /// Floating point.
    Dense(DType),
}

/// `a16w8-g32`, `f32`
impl fmt::Display for PackedAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scheme(scheme) => scheme.fmt(f),
            Self::Dense(dtype) => dtype.fmt(f),
        }
    }
}

/// What became of matrices that were quantized before they were stored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Conversion {
    /// How they are stored: `gptq 4-bit g128`, `fp8 128×128`.
    pub from: String,
    /// What they are computed in.
    pub to: PackedAs,
    /// Whether they are the stored integers; else values were rounded once more, unless they are f32.
    pub as_stored: bool,
    /// How many they are.
    pub matrices: usize,
}

/// `fp8 128×128 → a16w8-g32 (224 matrices)`
impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let as_stored = if self.as_stored { ", as stored" } else { "" };
        let noun = if self.matrices == 1 { "matrix" } else { "matrices" };
        write!(f, "{} → {}{as_stored} ({} {noun})", self.from, self.to, self.matrices)
    }
}

/// What becomes of the matrices of a plan that were quantized before they were stored.
///
/// # Errors
/// Those of [`MatrixForm::new`].
pub(crate) fn conversions(
    plan: &Plan,
    source: &dyn WeightSource,
    stored: Option<&StoredQuantization>,
    quantization: Quantization,
) -> Result<Vec<Conversion>, WeightsError> {
    struct List<'a> {
        source: &'a dyn WeightSource,
        stored: Option<&'a StoredQuantization>,
        quantization: Quantization,
        found: BTreeMap<(String, String), Conversion>,
    }
    impl List<'_> {
        fn add(&mut self, from: String, to: PackedAs, as_stored: bool, matrices: usize) {
            let new = Conversion { from: from.clone(), to, as_stored, matrices: 0 };
            self.found.entry((from, to.to_string())).or_insert(new).matrices += matrices;
        }
    }
    impl Fill<(), (), ()> for List<'_> {
        type Error = WeightsError;

        fn linear(&mut self, plan: &LinearPlan) -> Result<(), WeightsError> {
            let form = MatrixForm::new(plan, self.source, self.stored, self.quantization)?;
            if form.is_stored() {
                let to = form.scheme.map_or(PackedAs::Dense(form.dtype), PackedAs::Scheme);
                self.add(form.label(), to, form.is_exact(), 1);
            }
            Ok(())
        }

        fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<()>, WeightsError> {
            let form = HeadsForm::new(plan, self.source, self.stored, self.quantization)?;
            if let Some(module) = form.stored {
                self.add(module.label, PackedAs::Dense(form.dtype), false, 2);
            }
            Ok(LatentHeads { queries: (), values: () })
        }

        fn experts(&mut self, _: Vec<()>, _: Vec<()>) -> Result<(), WeightsError> {
            Ok(())
        }

        fn vector(&mut self, _: &VectorPlan) -> Result<(), WeightsError> {
            Ok(())
        }
    }
    if stored.is_none() {
        return Ok(Vec::new());
    }
    let mut list = List { source, stored, quantization, found: BTreeMap::new() };
    plan.fill(&mut list)?;
    Ok(list.found.into_values().collect())
}
