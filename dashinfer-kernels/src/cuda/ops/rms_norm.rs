//! RMSNorm of rows, alone and behind the addition to the residual.

use std::sync::Arc;

use super::operand::{Span, count_u32, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "rms_norm.cu", source: include_str!("../../../cuda/rms_norm.cu") };

/// `out = x · w / sqrt(mean(x²) + eps)`, see `rms_norm.cu`. A row's result does not depend on how many there are.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    norm: Kernel,
    add_norm: Kernel,
    dtype: DType,
}

impl RmsNorm {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        let kernel = |name| typed_kernel(device, &UNIT, dtype, &[], name);
        Ok(Self { norm: kernel("rms_norm")?, add_norm: kernel("add_rms_norm")?, dtype })
    }

    /// Threads by the row's length alone, since they settle the order of the sum: 16 bytes to a thread.
    fn launch(&self, num_rows: usize, hidden: usize) -> Launch {
        let steps = hidden.div_ceil(16 / self.dtype.size_bytes());
        let block = steps.next_multiple_of(32).clamp(32, 1024) as u32;
        Launch { grid: [num_rows as u32, 1, 1], block, shared: 0 }
    }

    /// `out`, `x`: `[num_rows, hidden]`; `weight`: f32 `[hidden]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn run(
        &self,
        device: &Device,
        out: Span<'_>,
        x: Span<'_>,
        (weight, eps): (Span<'_>, f32),
        [num_rows, hidden]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "rms_norm";
        let (values, size) = (num_rows * hidden, self.dtype.size_bytes());
        count_u32(OP, "rows", num_rows)?;
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", values, size)?)
            .ptr(x.holding(OP, "values of x", values, size)?)
            .ptr(weight.holding(OP, "weights", hidden, 4)?)
            .u32(count_u32(OP, "columns", hidden)?)
            .f32(eps);
        // SAFETY: these are the kernel's parameters; sizes were checked above.
        unsafe { self.norm.launch(device, self.launch(num_rows, hidden), &mut args) }
    }

    /// `residual += x`, then `out` is the norm of the residual. `out`, `residual`, `x`: `[num_rows, hidden]`; `weight`: f32
    /// `[hidden]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn run_add(
        &self,
        device: &Device,
        out: Span<'_>,
        [residual, x]: [Span<'_>; 2],
        (weight, eps): (Span<'_>, f32),
        [num_rows, hidden]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "add_rms_norm";
        let (values, size) = (num_rows * hidden, self.dtype.size_bytes());
        count_u32(OP, "rows", num_rows)?;
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", values, size)?)
            .ptr(residual.holding(OP, "values of the residual", values, size)?)
            .ptr(x.holding(OP, "values of x", values, size)?)
            .ptr(weight.holding(OP, "weights", hidden, 4)?)
            .u32(count_u32(OP, "columns", hidden)?)
            .f32(eps);
        // SAFETY: these are the kernel's parameters; sizes were checked above.
        unsafe { self.add_norm.launch(device, self.launch(num_rows, hidden), &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    const SIZES: [(usize, usize); 8] =
        [(1, 1), (3, 7), (2, 64), (2, 3584), (3, 4099), (2, 8192), (1, 16384), (2, 20000)];

    fn norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
        let hidden = weight.len();
        let row = |row: &[f32]| {
            let mean = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / hidden as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            row.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w) * scale).collect::<Vec<_>>()
        };
        x.chunks(hidden).flat_map(row).collect()
    }

    /// One rounding of the result, beside f32 sums of up to 20000 squares in another order (1e-5).
    #[test]
    fn the_norm_agrees_with_the_formula() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let kernel = RmsNorm::new(&device, dtype).unwrap();
            for (num_rows, hidden) in SIZES {
                let x = Values::random(&device, dtype, num_rows * hidden, 5);
                let weight = Values::random(&device, DType::F32, hidden, 6);
                let out = poisoned(&device, num_rows * hidden * dtype.size_bytes());
                let norm_weight = ((&weight.on_device).into(), 1e-5);
                kernel.run(&device, (&out).into(), (&x.on_device).into(), norm_weight, [num_rows, hidden]).unwrap();
                let want = norm(&x.values, &weight.values, 1e-5);
                assert_close(
                    &read(&out, dtype),
                    &want,
                    step(dtype) + 1e-5,
                    1e-6,
                    &format!("{dtype} {num_rows}x{hidden}"),
                );
            }
        }
    }

    /// The sum is one rounded addition on both sides: equal. The norm is that of the rounded sum.
    #[test]
    fn the_residual_takes_the_sum_and_the_norm_is_that_of_what_it_took() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let kernel = RmsNorm::new(&device, dtype).unwrap();
            for (num_rows, hidden) in SIZES {
                let (x, residual) = (
                    Values::random(&device, dtype, num_rows * hidden, 7),
                    Values::random(&device, dtype, num_rows * hidden, 8),
                );
                let weight = Values::random(&device, DType::F32, hidden, 9);
                let out = poisoned(&device, num_rows * hidden * dtype.size_bytes());
                let (both, norm_weight) =
                    ([(&residual.on_device).into(), (&x.on_device).into()], ((&weight.on_device).into(), 1e-6));
                kernel.run_add(&device, (&out).into(), both, norm_weight, [num_rows, hidden]).unwrap();
                let sum: Vec<f32> = residual.values.iter().zip(&x.values).map(|(r, x)| rounded(r + x, dtype)).collect();
                assert_eq!(read(&residual.on_device, dtype), sum, "{dtype} {num_rows}x{hidden}");
                let want = norm(&sum, &weight.values, 1e-6);
                assert_close(
                    &read(&out, dtype),
                    &want,
                    step(dtype) + 1e-5,
                    1e-6,
                    &format!("{dtype} {num_rows}x{hidden}"),
                );
            }
        }
    }

    #[test]
    fn a_row_s_norm_is_the_same_alone_and_among_others() {
        let Some(device) = test_device() else { return };
        let (dtype, hidden) = (DType::BF16, 3584);
        let kernel = RmsNorm::new(&device, dtype).unwrap();
        let x = Values::random(&device, dtype, 40 * hidden, 10);
        let weight = Values::random(&device, DType::F32, hidden, 11);
        let norm_weight = ((&weight.on_device).into(), 1e-6);
        let (all, alone) = (poisoned(&device, 40 * hidden * 2), poisoned(&device, hidden * 2));
        kernel.run(&device, (&all).into(), (&x.on_device).into(), norm_weight, [40, hidden]).unwrap();
        let last = Span::part(&x.on_device, 39 * hidden * 2, hidden * 2).unwrap();
        kernel.run(&device, (&alone).into(), last, norm_weight, [1, hidden]).unwrap();
        assert_eq!(read(&all, dtype)[39 * hidden..], read(&alone, dtype));
    }
}
