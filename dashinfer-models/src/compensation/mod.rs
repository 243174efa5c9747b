//! Quantizing a model so that it makes up for its own errors, with nothing but the model at hand.
//!
//! ```text
//! source ─▶ all weights as they are stored ─▶ tokens, sampled by the model itself ─▶ one pass of all of them, twice side by side:
//!                                                                                      exact:    x ─ linear ─▶ ..
//!           a matrix is quantized when the pass gets to it, from both its inputs ──▶   rounded:  x ─ linear ─▶ ..
//! ```
//!
//! [`TwinBackend`](twin::TwinBackend) is a backend on top of another one, on which each tensor is two: computed with the weights as they are, and with those
//! that were quantized so far. So the one decoder does it, and every dense family can. How codes are found: [`compensate`].
//!
//! Tokens are a function of the weights, and everything else of the tokens: the same load gives the same codes, on any number of threads.
//!
//! [`compensate`]: dashinfer_kernels::compensate

mod tokens;
mod twin;

use dashinfer_kernels::{Backend, CacheType, Feature, KernelError, can_compensate};

use crate::{Decoder, ForwardBatch, ForwardError, LoadError, ModelSpec, Quantization, StepLimits, weights::Packed};

use tokens::Tokens;
pub(crate) use twin::TwinBackend;

/// In the key of a weight cache: other codes of the same weights have another one.
pub(crate) const VERSION: u32 = 1;

/// What is to be said of the layers that are done, of how many.
type OnLayer<'a> = dyn FnMut(usize, usize) + 'a;

/// Whether weights of `spec` can be quantized in this way on `backend`.
///
/// # Errors
/// [`KernelError::Unsupported`]: schemes without 4-bit codes, weights that were stored quantized, layers that are not dense, and backends without what
/// it takes.
pub(crate) fn check<B: Backend>(backend: &B, spec: &ModelSpec, quantization: Quantization) -> Result<(), KernelError> {
    let unsupported = |what: String| Err(KernelError::Unsupported { op: "compensate", what, backend: backend.name() });
    match quantization.layers_scheme() {
        Some(scheme) if can_compensate(scheme) => {}
        Some(scheme) => return unsupported(format!("errors of {scheme}; those of 4-bit schemes can be")),
        None => return unsupported("errors of weights that are not quantized".to_owned()),
    }
    if spec.stored_quantization.is_some() {
        return unsupported(format!("errors of {}", Feature::StoredQuantization));
    }
    match spec.features().into_iter().find(|feature| !twin::can(*feature)) {
        Some(feature) => unsupported(format!("errors of models with {feature}")),
        None => Ok(()),
    }
}

/// Quantizes weights that were packed on `backend`; the backend below it and all matrices, in the order in which they were packed.
///
/// # Errors
/// [`LoadError::Kernel`] if the device has no room or no operators for it, and if what it computes is not finite.
pub(crate) fn quantize<B: Backend>(
    backend: TwinBackend<B>,
    spec: &ModelSpec,
    weights: Packed<TwinBackend<B>>,
    on_layer: &mut OnLayer<'_>,
) -> Result<(B, Vec<B::Linear>), LoadError> {
    let mut tokens = Tokens::new(spec);
    let limits = StepLimits { max_tokens: tokens.num_sequences(), max_logit_rows: tokens.num_sequences() };
    let mut decoder = Decoder::with_weights(backend, spec.clone(), weights, limits)?;
    let cache_spec = spec.kv_cache(tokens::BLOCK_SIZE, tokens.num_blocks(), CacheType::BF16);
    let mut cache = decoder.backend().kv_cache(&cache_spec)?;
    while let Some(batch) = tokens.next_step() {
        let sampled = sample(&mut decoder, &batch, &mut cache, &tokens);
        tokens.push(&sampled.map_err(kernel_error)?);
    }
    drop(cache);

    let (mut backend, weights) = decoder.into_parts();
    backend.start_rounding();
    let batch = tokens.all();
    let limits = StepLimits { max_tokens: batch.num_rows(), max_logit_rows: batch.num_rows() };
    let mut decoder = Decoder::with_weights(backend, spec.clone(), weights, limits)?;
    let mut cache = decoder.backend().kv_cache(&cache_spec)?;
    let num_layers = spec.num_layers();
    let step = decoder.forward_observed(&batch, &mut cache, &mut |_, layer, _| on_layer(layer, num_layers));
    step.map_err(kernel_error)?;
    let (backend, _) = decoder.into_parts();
    Ok(backend.finish()?)
}

/// One more token for each sequence.
fn sample<B: Backend>(
    decoder: &mut Decoder<TwinBackend<B>>,
    batch: &ForwardBatch,
    cache: &mut <TwinBackend<B> as Backend>::KvCache,
    tokens: &Tokens,
) -> Result<Vec<u32>, ForwardError> {
    decoder.forward(batch, cache)?.sample(&tokens.rows())?;
    Ok(decoder.collect_sampled()?.into_iter().map(|sampled| sampled.id).collect())
}

/// Batches are made here, for caches that are made here, so it is the backend that refuses.
fn kernel_error(error: ForwardError) -> LoadError {
    match error {
        ForwardError::Kernel(error) => error.into(),
        ForwardError::Batch(error) => {
            KernelError::Unsupported { op: "compensate", what: error.to_string(), backend: "any" }.into()
        }
    }
}

#[cfg(test)]
mod tests;
