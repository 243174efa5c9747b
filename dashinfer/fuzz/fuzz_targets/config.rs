//! `config.json` and `generation_config.json`, to a [`ModelSpec`](dashinfer_models::ModelSpec) through the families.
#![no_main]

use dashinfer_fuzz::{file, folder, parts, run};
use dashinfer_kernels::CacheType;
use dashinfer_models::{GenerationConfig, HfConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    run(|| {
        let [config, generation] = parts(input);
        let Ok(config) = HfConfig::parse(&String::from_utf8_lossy(config)) else { return };
        file("generation_config.json", (!generation.is_empty()).then_some(generation));
        let _ = GenerationConfig::read(folder(), &config);
        if let Ok(mut spec) = config.to_spec() {
            // What holds for all that a family lets through.
            assert!(spec.num_parameters() > 0);
            for rope in &spec.ropes {
                let rope = rope.rope(spec.max_positions);
                assert!(rope.scale.is_finite() && rope.inv_freq.iter().all(|freq| freq.is_finite()), "{rope:?}");
            }
            let _ = spec.kv_cache(1, 1, CacheType::BF16).block_bytes();
            spec.limit_context(100);
        }
    });
});
