//! What the device can do at most, to judge what is reached.

use std::time::Duration;

use super::CudaDevice;
use super::cublaslt::{Choose, CublasLt, LtOperands, LtShape};
use super::device::Device;
use super::kernel::{Args, Launch};
use super::memory::{Buffer, Event};
use super::units::Unit;
use crate::{DType, KernelError};

pub(super) static UNIT: Unit = Unit { name: "probe.cu", source: include_str!("../../cuda/probe.cu") };

/// Bytes that are read; many times the second-level cache.
const READ_BYTES: usize = 4 << 30;
/// Rows and columns of the matrices.
const SIZE: usize = 8192;
const RUNS: usize = 20;

impl CudaDevice {
    /// Bytes per second that reading 4 GiB of the device's memory once reaches: the median of some runs.
    ///
    /// # Errors
    /// [`KernelError`] without a compiler or so much memory.
    pub fn read_bandwidth(&self) -> Result<f64, KernelError> {
        let device = &self.0;
        let kernel = device.kernel(&UNIT, &["-DDASH_TYPE=bf16"], "probe_read")?;
        let from = random(device, READ_BYTES)?;
        let out = device.alloc("a measurement", 256)?;
        let time = median(device, || {
            let launch = Launch { grid: [device.num_sms * 4, 1, 1], block: 512, shared: 0 };
            let mut args = Args::new().ptr(from.ptr()).u64((READ_BYTES / 16) as u64).ptr(out.ptr());
            // SAFETY: these are the kernel's parameters, and the buffers are there until the work is waited for.
            unsafe { kernel.launch(device, launch, &mut args) }
        })?;
        Ok(READ_BYTES as f64 / time.as_secs_f64())
    }

    /// Operations per second that a product of bf16 matrices of 8192 rows and columns reaches by cuBLASLt: the median of some
    /// runs on random values.
    ///
    /// # Errors
    /// [`KernelError`] without the library or so much memory.
    pub fn matmul_flops(&self) -> Result<f64, KernelError> {
        let device = &self.0;
        let library = CublasLt::new(device)?;
        let bytes = SIZE * SIZE * DType::BF16.size_bytes();
        let (x, weight) = (random(device, bytes)?, random(device, bytes)?);
        let out = device.alloc("a measurement", bytes)?;
        let (dtype, out_type) = (DType::BF16, DType::BF16);
        let shape = LtShape { rows: SIZE, cols: SIZE, k: SIZE, dtype, out: out_type, has_bias: false };
        let operands = LtOperands { out: out.ptr(), x: x.ptr(), weight: weight.ptr(), bias: 0 };
        // SAFETY: the matrices have these sizes, and are there until the work is waited for.
        let time = median(device, || unsafe { library.run(shape, operands, Choose::First) })?;
        Ok(2.0 * (SIZE as f64).powi(3) / time.as_secs_f64())
    }
}

/// Memory full of random numbers around 1 of either sign.
fn random(device: &std::sync::Arc<Device>, bytes: usize) -> Result<Buffer, KernelError> {
    let kernel = device.kernel(&UNIT, &["-DDASH_TYPE=bf16"], "probe_fill")?;
    let buffer = device.alloc("a measurement", bytes)?;
    let launch = Launch { grid: [device.num_sms * 4, 1, 1], block: 512, shared: 0 };
    let mut args = Args::new().ptr(buffer.ptr()).u64((bytes / 8) as u64).u64(buffer.ptr());
    // SAFETY: these are the kernel's parameters; the buffer has so many bytes.
    unsafe { kernel.launch(device, launch, &mut args)? };
    Ok(buffer)
}

fn median(
    device: &std::sync::Arc<Device>,
    mut run: impl FnMut() -> Result<(), KernelError>,
) -> Result<Duration, KernelError> {
    let (start, end) = (Event::timed(device)?, Event::timed(device)?);
    let mut times = Vec::with_capacity(RUNS);
    for warm_up in 0..RUNS + 3 {
        start.record()?;
        run()?;
        end.record()?;
        end.wait()?;
        if warm_up >= 3 {
            times.push(end.since(&start)?);
        }
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
