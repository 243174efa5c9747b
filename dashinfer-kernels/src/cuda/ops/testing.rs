//! What the tests of kernels share: random operands of each type, poisoned outputs, tolerances, times.

use std::sync::Arc;
use std::time::Duration;

use half::{bf16, f16};

pub(super) use crate::cpu::to_bytes;
pub(super) use crate::cuda::device::test_device;

use crate::cuda::device::Device;
use crate::cuda::graph::Recording;
use crate::cuda::memory::{Buffer, Event};
use crate::random::SplitMix64;
use crate::{DType, KernelError};

pub(super) const TYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// Uniform in -1..1.
pub(super) fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut random = SplitMix64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (0..count).map(|_| random.value()).collect()
}

/// As an element of `dtype` holds it.
pub(super) fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
    }
}

/// Half the distance of two neighbours, relative: what one rounding may change.
pub(super) fn step(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
    }
}

/// Values on the device, and what they are after rounding to their type.
pub(super) struct Values {
    pub(super) values: Vec<f32>,
    pub(super) on_device: Buffer,
}

impl Values {
    pub(super) fn of(device: &Arc<Device>, dtype: DType, values: &[f32]) -> Self {
        let on_device = upload(device, &to_bytes(values, dtype));
        Self { values: values.iter().map(|&value| rounded(value, dtype)).collect(), on_device }
    }

    pub(super) fn random(device: &Arc<Device>, dtype: DType, count: usize, seed: u64) -> Self {
        Self::of(device, dtype, &random(count, seed))
    }
}

pub(super) fn upload(device: &Arc<Device>, bytes: &[u8]) -> Buffer {
    let buffer = device.alloc("a test", bytes.len()).unwrap();
    buffer.upload(0, bytes).unwrap();
    buffer
}

pub(super) fn words(device: &Arc<Device>, values: &[u32]) -> Buffer {
    upload(device, bytemuck::cast_slice(values))
}

/// Memory full of NaNs, whatever the type.
pub(super) fn poisoned(device: &Arc<Device>, bytes: usize) -> Buffer {
    let buffer = device.alloc("a test", bytes).unwrap();
    buffer.fill(0, bytes, 0xff).unwrap();
    buffer
}

pub(super) fn read(buffer: &Buffer, dtype: DType) -> Vec<f32> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.download(0, &mut bytes).unwrap();
    crate::to_f32(&bytes, dtype)
}

/// `|got - want| <= rel · |want| + abs` for each; a NaN is never close.
#[track_caller]
pub(super) fn assert_close(got: &[f32], want: &[f64], rel: f64, abs: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let close = (f64::from(got) - want).abs() <= rel * want.abs() + abs;
        assert!(close, "{what}: value {i} is {got}, should be {want}");
    }
}

/// The shortest of some times per run, each of several runs in a row: recorded and started as a whole, as steps are, since the
/// host takes longer to start a small kernel than the device to run it.
pub(super) fn time(device: &Arc<Device>, mut run: impl FnMut() -> Result<(), KernelError>) -> Duration {
    const RUNS: u32 = 40;
    run().unwrap();
    let recording = Recording::start(device).unwrap();
    for _ in 0..RUNS {
        run().unwrap();
    }
    let graph = recording.finish().unwrap();
    let (start, end) = (Event::timed(device).unwrap(), Event::timed(device).unwrap());
    let once = || {
        start.record().unwrap();
        graph.launch().unwrap();
        end.record().unwrap();
        end.wait().unwrap();
        end.since(&start).unwrap() / RUNS
    };
    once();
    (0..5).map(|_| once()).min().unwrap()
}
