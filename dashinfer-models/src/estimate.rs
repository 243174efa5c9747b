//! What a model will take of a device's memory, known from its config and the headers of its checkpoint.

use dashinfer_kernels::{CacheType, DType, LatentHeads, Scheme};

use crate::{
    ModelSpec, Quantization, StepLimits, StoredQuantization, WeightSource, WeightsError,
    activations::Widths,
    formats::{HeadsForm, MatrixForm},
    loader::prove,
    weights::{Fill, LinearPlan, Plan, VectorPlan},
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
    /// ([`Backend::packed_bytes`](dashinfer_kernels::Backend::packed_bytes)).
    ///
    /// # Errors
    /// Those of the load itself: weights that do not fit the spec.
    pub fn new(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        compute: DType,
        cache_type: CacheType,
        limits: StepLimits,
        quantization: Quantization,
        packed_bytes: &PackedBytes<'_>,
    ) -> Result<Self, WeightsError> {
        let (plan, stored) = (Plan::new(spec), spec.stored_quantization.as_ref());
        prove(spec, &plan, source)?;
        let mut sum = Sum { source, stored, quantization, packed_bytes, bytes: 0 };
        plan.fill(&mut sum)?;
        Ok(Self {
            weight_bytes: sum.bytes,
            kv_bytes_per_token: spec.kv_cache(1, 1, cache_type).block_bytes() as u64,
            activation_bytes: Widths::new(spec).bytes(limits, compute),
        })
    }
}

/// Bytes of a packed matrix: `(rows, cols, stored type, scheme)`.
pub type PackedBytes<'a> = dyn Fn(usize, usize, DType, Option<Scheme>) -> usize + 'a;

struct Sum<'a> {
    source: &'a dyn WeightSource,
    stored: Option<&'a StoredQuantization>,
    quantization: Quantization,
    packed_bytes: &'a PackedBytes<'a>,
    bytes: u64,
}

impl Fill<(), (), ()> for Sum<'_> {
    type Error = WeightsError;

    fn linear(&mut self, plan: &LinearPlan) -> Result<(), WeightsError> {
        let form = MatrixForm::new(plan, self.source, self.stored, self.quantization)?;
        self.bytes += (self.packed_bytes)(plan.rows(), plan.cols, form.dtype, form.scheme) as u64;
        if form.order {
            self.bytes += (plan.cols * size_of::<u32>()) as u64;
        }
        if plan.bias {
            self.bytes += (plan.rows() * size_of::<f32>()) as u64;
        }
        Ok(())
    }

    fn vector(&mut self, plan: &VectorPlan) -> Result<(), WeightsError> {
        self.bytes += (plan.len * size_of::<f32>()) as u64;
        Ok(())
    }

    fn experts(&mut self, _: Vec<()>, _: Vec<()>) -> Result<(), WeightsError> {
        Ok(())
    }

    fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<()>, WeightsError> {
        let form = HeadsForm::new(plan, self.source, self.stored, self.quantization)?;
        for plan in [&plan.queries, &plan.values] {
            self.bytes += (self.packed_bytes)(plan.rows(), plan.cols, form.dtype, None) as u64;
        }
        Ok(LatentHeads { queries: (), values: () })
    }
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::cpu::packed_bytes;

    use super::*;
    use crate::{RandomWeights, shapes};

    #[test]
    fn the_estimate_of_a_published_shape() {
        let spec = shapes::named("qwen2.5-0.5b").unwrap();
        let limits = StepLimits { max_tokens: 512, max_logit_rows: 8 };
        let source = RandomWeights::new(&spec, 0);
        let none = Quantization::NONE;
        let estimate = |compute, cache_type| {
            MemoryEstimate::new(&spec, &source, compute, cache_type, limits, none, &packed_bytes).unwrap()
        };
        let found = estimate(DType::F32, CacheType::BF16);
        // 494,032,768 parameters in two bytes; the 49 norms and 24 biases take four.
        let in_f32 = 49 * 896 + 24 * (896 + 2 * 128);
        assert_eq!(found.weight_bytes, 494_032_768 * 2 + 2 * in_f32);
        assert_eq!(found.kv_bytes_per_token, 24 * 2 * 2 * 64 * 2);
        assert_eq!(estimate(DType::F32, CacheType::Int8).kv_bytes_per_token, 24 * 2 * 2 * (64 + 4));
        assert_eq!(estimate(DType::F32, CacheType::Uint4).kv_bytes_per_token, 24 * 2 * (64 + 4 + 32 + 4));
        let per_token = 3 * 896 + (896 + 256) + 896 + 2 * 4864 + 4864;
        let per_logit_row = 896 + 896 + 151_936;
        assert_eq!(found.activation_bytes, 4 * (512 * per_token + 8 * per_logit_row));
        let halved = estimate(DType::F16, CacheType::BF16);
        // Logits stay f32.
        let wanted = 2 * (512 * per_token + 8 * (per_logit_row - 151_936)) + 4 * 8 * 151_936;
        assert_eq!(halved.activation_bytes, wanted);
    }

    #[test]
    fn latent_vectors_are_all_that_is_cached() {
        let spec = shapes::named("deepseek-v2-lite").unwrap();
        let limits = StepLimits { max_tokens: 512, max_logit_rows: 8 };
        let source = RandomWeights::new(&spec, 0);
        let estimate = |quantization| {
            MemoryEstimate::new(&spec, &source, DType::F32, CacheType::BF16, limits, quantization, &packed_bytes)
                .unwrap()
        };
        let found = estimate(Quantization::NONE);
        let norms = 27 * (2 * 2048 + 512) + 2048;
        assert_eq!(found.weight_bytes, 2 * (15_706_484_224 + norms));
        assert_eq!(found.kv_bytes_per_token, 27 * (512 + 64) * 2);
        let (attention, shared) = (16 * 192 + 576 + 16 * 128, 3 * 2 * 1408 + 2048);
        let per_token = 3 * 2048 + attention + 3 * 10944 + shared + 64;
        assert_eq!(found.activation_bytes, 4 * (512 * per_token + 8 * (2048 + 2048 + 102_400)));
        // What is between heads and latent vectors stays as it is stored, as does the router.
        let kept = 27 * 16 * (128 + 128) * 512 + 26 * 64 * 2048;
        let matrices = 15_706_484_224 - norms - kept;
        let scales = "a16w8-g32".parse::<Scheme>().unwrap();
        assert_eq!(estimate(scales.into()).weight_bytes, matrices * 17 / 16 + 2 * kept + 4 * norms);
    }

    #[test]
    fn schemes_count_as_what_they_take() {
        let spec = shapes::named("qwen2.5-0.5b").unwrap();
        let limits = StepLimits { max_tokens: 1, max_logit_rows: 1 };
        let source = RandomWeights::new(&spec, 0);
        let bytes = |quantization| {
            MemoryEstimate::new(&spec, &source, DType::F32, CacheType::F32, limits, quantization, &packed_bytes)
                .unwrap()
                .weight_bytes
        };
        let scheme: Scheme = "a16w4-g32".parse().unwrap();
        let (embedding, all) = (151_936 * 896, 494_032_768 - 49 * 896 - 24 * (896 + 2 * 128));
        let in_f32 = 4 * (494_032_768 - all);
        // 4.5 bits of the layers, and of the embedding 8.5, 4.5 or 16.
        let layers = (all - embedding) * 9 / 16;
        assert_eq!(bytes(scheme.into()), layers + embedding * 17 / 16 + in_f32);
        assert_eq!(bytes(Quantization::new(scheme).vocabulary(Some(scheme))), layers + embedding * 9 / 16 + in_f32);
        assert_eq!(bytes(Quantization::new(scheme).vocabulary(None)), layers + embedding * 2 + in_f32);
    }

    #[test]
    fn where_there_are_no_schemes_stored_weights_count_as_what_is_computed_in() {
        let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens");
        let limits = StepLimits { max_tokens: 1, max_logit_rows: 1 };
        for name in ["gptq-4bit-g32-desc-act", "awq-4bit-g128", "fp8-tensor", "gpt-oss-mxfp4", "fp8-block-deepseek-v3"]
        {
            let folder = std::path::Path::new(goldens).join(name);
            let spec = ModelSpec::read(&folder).unwrap();
            let source = crate::Checkpoint::open(&folder).unwrap();
            for (quantization, dtype) in [(Quantization::AS_STORED, DType::BF16), (Quantization::NONE, DType::F16)] {
                let quantization = quantization.dense_only(dtype);
                let (plan, stored) = (Plan::new(&spec), spec.stored_quantization.as_ref());
                let conversions = crate::formats::conversions(&plan, &source, stored, quantization).unwrap();
                assert!(!conversions.is_empty(), "{name}");
                for conversion in conversions {
                    assert_eq!((conversion.to, conversion.as_stored), (crate::PackedAs::Dense(dtype), false), "{name}");
                }
                let dense = |rows, cols, _, scheme: Option<Scheme>| {
                    assert_eq!(scheme, None, "{name}");
                    rows * cols * dtype.size_bytes()
                };
                let estimate = MemoryEstimate::new(&spec, &source, dtype, dtype.into(), limits, quantization, &dense);
                // Two bytes of each parameter; vectors and biases take four.
                let (found, least) = (estimate.unwrap().weight_bytes, 2 * spec.num_parameters());
                assert!((least..least * 11 / 10).contains(&found), "{name}: {found}, {least}");
            }
            // A scheme that is asked for is what there is to be refused.
            let scheme: Scheme = "a16w8-g32".parse().unwrap();
            assert_eq!(Quantization::new(scheme).dense_only(DType::BF16).layers_scheme(), Some(scheme));
        }
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
            Quantization::NONE,
            &packed_bytes,
        );
        assert!(matches!(found, Err(WeightsError::Shape { .. })));
    }
}
