//! The estimate of memory beside what an allocator counts: every golden, in the type it is stored in and in schemes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, PoolConfig, expert_bytes, packed_bytes};
use dashinfer_kernels::{Backend, CacheType, DType};
use dashinfer_models::{Checkpoint, Decoder, MemoryEstimate, ModelSpec, Quantization, StepLimits};

/// The system's, counting what is in use. Mappings, which large buffers are, pass it by: these models have none so large.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A decoder's own: spec, names, lists, handles of buffers, for each layer and expert.
const LISTS: usize = 24 << 10;
const LISTS_OF_MATRIX: usize = 512;

/// One test, as other threads would be counted too.
#[test]
fn an_estimate_is_what_a_load_takes_within_five_percent() {
    let pool = PoolConfig { threads: NonZeroUsize::new(1), cores: Vec::new() };
    let limits = StepLimits { max_tokens: 256, max_logit_rows: 8 };
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let mut folders: Vec<PathBuf> =
        goldens.read_dir().unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() > 40);
    let schemes = ["a8w8", "a16w8-g32", "a16w4-g32"].map(|scheme| scheme.parse::<Quantization>().unwrap());
    for folder in folders {
        for quantization in [Quantization::AS_STORED, Quantization::NONE].into_iter().chain(schemes) {
            let what = format!("{}, {quantization:?}", folder.file_name().unwrap().display());
            let spec = ModelSpec::read(&folder).unwrap();
            let mut checkpoint = Checkpoint::open(&folder).unwrap();
            let cache = CacheType::F32;
            let estimate =
                MemoryEstimate::new(&spec, &checkpoint, DType::F32, cache, limits, quantization, &packed_bytes);
            let estimate = estimate.unwrap();
            let num_matrices = spec.num_layers() * (4 + spec.experts.map_or(1, |experts| experts.routing.num_experts));
            let backend = CpuBackend::new(&CpuConfig { pool: pool.clone(), ..CpuConfig::default() }).unwrap();

            let before = IN_USE.load(Ordering::Relaxed);
            let decoder =
                Decoder::load(backend, spec.clone(), &mut checkpoint, limits, quantization, &mut |_| ()).unwrap();
            let found = IN_USE.load(Ordering::Relaxed).saturating_sub(before);
            // What experts work in is the backend's and told apart; part of it is taken when there is a step.
            let of_experts = spec
                .experts
                .map_or(0, |experts| expert_bytes(limits.max_tokens, spec.hidden_size, experts.size, &experts.routing));
            let wanted = (estimate.weight_bytes + estimate.activation_bytes) as usize;
            let lists = LISTS + LISTS_OF_MATRIX * num_matrices;
            let allowed = wanted - wanted / 20..=(wanted + of_experts) * 21 / 20 + lists;
            assert!(allowed.contains(&found), "{what}: {found} bytes for {estimate:?}, {allowed:?}");

            let (before, num_blocks) = (IN_USE.load(Ordering::Relaxed), 12);
            let cache = decoder.backend().kv_cache(&spec.kv_cache(16, num_blocks, cache)).unwrap();
            let found = IN_USE.load(Ordering::Relaxed).saturating_sub(before);
            let wanted = num_blocks * 16 * estimate.kv_bytes_per_token as usize;
            // Heads are padded to 16 values.
            assert!(
                found.abs_diff(wanted) <= wanted / 20 || found <= 4 * wanted && odd_heads(&spec),
                "{what}: {found}, {wanted}"
            );
            drop(cache);
        }
    }
}

/// Whether a token of a layer is no whole groups of 16 values, as in models that are made for tests.
fn odd_heads(spec: &ModelSpec) -> bool {
    !spec.kv_cache(16, 1, CacheType::F32).head_dim.is_multiple_of(16)
}
