//! What a model will take of a device's memory, known from its config and the headers of its checkpoint.

use dashinfer_kernels::{CacheType, DType};

use crate::{
    ModelSpec, StepLimits, StoredType, WeightSource, WeightsError,
    activations::Widths,
    loader::{common_type, float_type, prove},
    weights::{Fill, LinearPlan, Part, Plan, VectorPlan},
};

/// Bytes of device memory that a model will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryEstimate {
    /// Packed weights.
    pub weight_bytes: u64,
    /// Keys and values of one token over all layers.
    pub kv_bytes_per_token: u64,
    /// Activations of the largest step. They are allocated once, and touched as steps grow.
    pub activation_bytes: u64,
}

impl MemoryEstimate {
    /// Estimates a load of `source` as `spec`, with activations of type `compute`. `packed_bytes` is the backend's
    /// ([`Backend::packed_bytes`](dashinfer_kernels::Backend::packed_bytes)), or [`panel_bytes`] where there is none yet.
    ///
    /// # Errors
    /// Those of the load itself: weights that do not fit the spec.
    pub fn new(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        compute: DType,
        cache_type: CacheType,
        limits: StepLimits,
        packed_bytes: &dyn Fn(usize, usize, DType) -> usize,
    ) -> Result<Self, WeightsError> {
        let plan = Plan::new(spec);
        prove(&plan, source)?;
        let mut sum = Sum { source, packed_bytes, bytes: 0 };
        plan.fill(&mut sum)?;
        Ok(Self {
            weight_bytes: sum.bytes,
            kv_bytes_per_token: spec.kv_cache(1, 1, cache_type).block_bytes() as u64,
            activation_bytes: Widths::new(spec).bytes(limits, compute),
        })
    }
}

/// The size of a matrix packed by a backend that pads rows to panels of 16.
#[must_use]
pub fn panel_bytes(rows: usize, cols: usize, dtype: DType) -> usize {
    rows.next_multiple_of(16) * cols * dtype.size_bytes()
}

struct Sum<'a> {
    source: &'a dyn WeightSource,
    packed_bytes: &'a dyn Fn(usize, usize, DType) -> usize,
    bytes: u64,
}

impl Sum<'_> {
    fn stored_type(&self, part: &Part) -> Result<DType, WeightsError> {
        let name = part.weight();
        let info = self.source.info(&name);
        float_type(&name, info.map_or(StoredType::Float(DType::F32), |info| info.dtype))
    }
}

impl Fill<(), ()> for Sum<'_> {
    type Error = WeightsError;

    fn linear(&mut self, plan: &LinearPlan) -> Result<(), WeightsError> {
        let types = plan.parts.iter().map(|part| self.stored_type(part)).collect::<Result<Vec<_>, _>>()?;
        self.bytes += (self.packed_bytes)(plan.rows(), plan.cols, common_type(types)) as u64;
        if plan.bias {
            self.bytes += (plan.rows() * size_of::<f32>()) as u64;
        }
        Ok(())
    }

    fn vector(&mut self, plan: &VectorPlan) -> Result<(), WeightsError> {
        self.bytes += (plan.len * size_of::<f32>()) as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RandomWeights, shapes};

    #[test]
    fn the_estimate_of_a_published_shape() {
        let spec = shapes::named("qwen2.5-0.5b").unwrap();
        let limits = StepLimits { max_tokens: 512, max_logit_rows: 8 };
        let source = RandomWeights::new(&spec, 0);
        let found = MemoryEstimate::new(&spec, &source, DType::F32, CacheType::BF16, limits, &panel_bytes).unwrap();
        // 494,032,768 parameters in two bytes; the 49 norms and 24 biases take four.
        let in_f32 = 49 * 896 + 24 * (896 + 2 * 128);
        assert_eq!(found.weight_bytes, 494_032_768 * 2 + 2 * in_f32);
        assert_eq!(found.kv_bytes_per_token, 24 * 2 * 2 * 64 * 2);
        let of =
            |cache_type| MemoryEstimate::new(&spec, &source, DType::F32, cache_type, limits, &panel_bytes).unwrap();
        assert_eq!(of(CacheType::Int8).kv_bytes_per_token, 24 * 2 * 2 * (64 + 4));
        assert_eq!(of(CacheType::Uint4).kv_bytes_per_token, 24 * 2 * (64 + 4 + 32 + 4));
        let per_token = 3 * 896 + (896 + 256) + 896 + 2 * 4864 + 4864;
        let per_logit_row = 896 + 896 + 151_936;
        assert_eq!(found.activation_bytes, 4 * (512 * per_token + 8 * per_logit_row));
        let halved = MemoryEstimate::new(&spec, &source, DType::F16, CacheType::BF16, limits, &panel_bytes).unwrap();
        // Logits stay f32.
        let wanted = 2 * (512 * per_token + 8 * (per_logit_row - 151_936)) + 4 * 8 * 151_936;
        assert_eq!(halved.activation_bytes, wanted);
    }

    #[test]
    fn rows_are_padded_to_panels() {
        assert_eq!(panel_bytes(17, 3, DType::F16), 32 * 3 * 2);
        assert_eq!(panel_bytes(16, 3, DType::F32), 16 * 3 * 4);
    }

    #[test]
    fn weights_of_another_model_have_no_estimate() {
        let (small, large) = (shapes::named("qwen2.5-0.5b").unwrap(), shapes::named("qwen2.5-1.5b").unwrap());
        let limits = StepLimits { max_tokens: 1, max_logit_rows: 1 };
        let found = MemoryEstimate::new(
            &large,
            &RandomWeights::new(&small, 0),
            DType::F32,
            CacheType::F32,
            limits,
            &panel_bytes,
        );
        assert!(matches!(found, Err(WeightsError::Shape { .. })));
    }
}
