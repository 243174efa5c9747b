//! Engines on a GPU: the CPU's answers, memory that comes back, errors after which all goes on. Without a GPU, that is said.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{FERRIS, Random, complete, complete_all, tiny};
use dashinfer::{ComputeType, Device, Engine, Error, Load, Request};
use dashinfer_kernels::KernelError;
use dashinfer_kernels::cuda::CudaDevice;

/// Bytes that the driver may keep of what an engine used: code, and pools of its own.
const KEPT_BY_THE_DRIVER: u64 = 64 << 20;

/// The device, and the right to it: tests that count its memory are alone.
fn device() -> Option<(CudaDevice, MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    let device = CudaDevice::open(0).map_err(|error| eprintln!("skipped: no CUDA device ({error})")).ok()?;
    Some((device, ALONE.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn on_gpu(load: Load) -> Load {
    load.device(Device::Cuda(0)).max_context(512)
}

fn greedy(prompt: Vec<u32>) -> Request {
    Request::tokens(prompt).max_tokens(48).temperature(0.0).ignore_eos()
}

#[test]
fn in_f32_the_gpu_continues_as_the_cpu_does() {
    let Some(_alone) = device() else { return };
    let cpu = Engine::load(FERRIS).device(Device::Cpu).max_context(512).blocking().unwrap();
    let gpu = on_gpu(Engine::load(FERRIS)).compute(ComputeType::F32).blocking().unwrap();
    assert_eq!((cpu.model().device, gpu.model().device), ("cpu", "cuda"));
    let requests = |seed| {
        let mut random = Random(seed);
        (0..12).map(move |_| random.below(200) + 1).map(move |len| greedy(Random(len as u64).tokens(len, 4096)))
    };
    // A trained model is seldom undecided: in f32 both round too little to choose otherwise.
    let (wanted, found) = (complete_all(&cpu, requests(1)), complete_all(&gpu, requests(1)));
    let differ = wanted.iter().zip(&found).filter(|(wanted, found)| wanted.tokens != found.tokens).count();
    assert!(differ <= 1, "{differ} of {} continuations differ", wanted.len());
}

#[test]
fn an_engine_that_goes_gives_the_device_s_memory_back() {
    let Some((device, _alone)) = device() else { return };
    let cycle = || {
        let engine = on_gpu(Engine::load(FERRIS)).kv_cache_bytes(64 << 20).blocking().unwrap();
        complete(&engine, greedy(vec![5; 100]));
        futures::executor::block_on(engine.shutdown());
    };
    cycle();
    let before = device.memory().unwrap().0;
    for _ in 0..20 {
        cycle();
    }
    let after = device.memory().unwrap().0;
    assert!(after + KEPT_BY_THE_DRIVER >= before, "{} bytes are missing after 20 engines", before - after);
}

#[test]
fn out_of_memory_is_an_error_by_name_after_which_others_go_on() {
    let Some((device, _alone)) = device() else { return };
    let neighbour = on_gpu(Engine::load(tiny())).kv_cache_bytes(1 << 20).blocking().unwrap();
    let before = device.memory().unwrap().0;
    let most = device.memory().unwrap().1;
    let too_much = Engine::load(FERRIS).device(Device::Cuda(0)).max_batch(1 << 20).max_step_tokens(1 << 20);
    match too_much.kv_cache_bytes(2 * most).blocking() {
        Err(Error::Device(KernelError::OutOfMemory { wanted_bytes, .. })) => assert!(wanted_bytes > 0),
        other => panic!("{other:?}"),
    }
    let after = device.memory().unwrap().0;
    assert!(after + KEPT_BY_THE_DRIVER >= before, "{} bytes are missing", before - after);
    assert_eq!(complete(&neighbour, greedy(vec![1, 2, 3])).tokens.len(), 48);
    let next = on_gpu(Engine::load(FERRIS)).blocking().unwrap();
    assert_eq!(complete(&next, greedy(vec![1, 2, 3])).tokens.len(), 48);
}

#[test]
fn engines_of_different_types_share_a_gpu() {
    let Some(_alone) = device() else { return };
    let types = [ComputeType::BF16, ComputeType::F16, ComputeType::F32];
    let engines =
        types.map(|compute| on_gpu(Engine::load(FERRIS)).compute(compute).kv_cache_bytes(32 << 20).blocking());
    let engines = engines.map(Result::unwrap);
    std::thread::scope(|scope| {
        for engine in &engines {
            scope.spawn(move || {
                let alone = complete(engine, greedy(vec![7; 33])).tokens;
                assert_eq!(complete(engine, greedy(vec![7; 33])).tokens, alone);
            });
        }
    });
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_that_says_so() {
    match Engine::load(tiny()).device(Device::Cuda(99)).blocking() {
        Err(Error::Device(KernelError::NoDevice { wanted, .. })) => assert_eq!(wanted, "CUDA device 99"),
        Err(Error::Device(KernelError::Library { name, .. })) => assert!(name.starts_with("libcuda"), "{name}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cache_of_another_type_than_the_activations_is_refused() {
    let Some(_alone) = device() else { return };
    let load = on_gpu(Engine::load(tiny())).compute(ComputeType::BF16).kv_cache(dashinfer::KvCacheType::F32);
    let error = load.blocking().unwrap_err().to_string();
    assert_eq!(error, "load: a KV cache in f32 beside activations in bf16 is not supported by the cuda backend");
}
