//! A GGUF file: its container, what model its metadata make, its tensors and their blocks, and a load of it where it is a whole model.
#![no_main]

use std::num::NonZeroUsize;

use dashinfer_fuzz::{file, run};
use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, packed_bytes};
use dashinfer_kernels::{CacheType, DType, to_f32};
use dashinfer_models::{Decoder, Gguf, MemoryEstimate, Quantization, StepLimits, StoredType, WeightSource};
use libfuzzer_sys::fuzz_target;

/// Beyond this a model is not loaded: a config may make frequencies and activations of sizes that its file has not.
const MAX_ACTIVATION_BYTES: u64 = 1 << 24;

fn backend() -> CpuBackend {
    let mut config = CpuConfig::default();
    config.pool.threads = NonZeroUsize::new(1);
    CpuBackend::new(&config).expect("a thread is all that it takes")
}

fuzz_target!(|input: &[u8]| {
    run(|| {
        let path = file("model.gguf", Some(input));
        let Ok(gguf) = Gguf::open(&path) else { return };
        if let Ok(Some(tokenizer)) = gguf.tokenizer() {
            let _ = tokenizer.end_tokens();
        }
        let Ok(spec) = gguf.spec() else { return };
        let _ = spec.num_parameters();
        let mut weights = gguf.into_weights(&spec);
        let _ = weights.identity();
        for name in weights.names() {
            let info = weights.info(name).expect("what is named is there");
            let bytes = weights.read(name).expect("what is named is there");
            match info.dtype {
                StoredType::Float(dtype) => drop(to_f32(&bytes, dtype)),
                StoredType::Blocks(format) => {
                    let mut values = vec![0.0; bytes.len() / format.block_bytes() * format.block_len()];
                    format.dequantize(&bytes, &mut values);
                    assert_eq!(values.len(), info.shape.iter().product::<usize>());
                }
                StoredType::Other(_) => assert!(bytes.is_empty()),
            }
        }
        let limits = StepLimits { max_tokens: 2, max_logit_rows: 1 };
        let quantization = Quantization::AS_STORED;
        let estimate =
            MemoryEstimate::new(&spec, &weights, DType::F32, CacheType::F32, limits, quantization, &packed_bytes);
        if estimate.is_ok_and(|estimate| estimate.activation_bytes <= MAX_ACTIVATION_BYTES) {
            let _ = Decoder::load(backend(), spec, &mut weights, limits, quantization, &mut |_| ());
        }
    });
});
