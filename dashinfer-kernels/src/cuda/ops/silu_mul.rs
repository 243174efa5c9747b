//! The gated activation.

use std::sync::Arc;

use super::operand::{Span, count_u32, threads_for, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "silu_mul.cu", source: include_str!("../../../cuda/silu_mul.cu") };

/// `out[t, i] = silu(x[t, i]) · x[t, F + i]`, see `silu_mul.cu`.
#[derive(Debug)]
pub(crate) struct SiluMul {
    kernel: Kernel,
    dtype: DType,
}

impl SiluMul {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { kernel: typed_kernel(device, &UNIT, dtype, &[], "silu_mul")?, dtype })
    }

    /// `out`: `[num_rows, cols]`; `x`: `[num_rows, 2 * cols]`, gates and then the values that they gate.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn run(
        &self,
        device: &Device,
        out: Span<'_>,
        x: Span<'_>,
        [num_rows, cols]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "silu_mul";
        let size = self.dtype.size_bytes();
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", num_rows * cols, size)?)
            .ptr(x.holding(OP, "values of x", num_rows * 2 * cols, size)?)
            .u32(count_u32(OP, "columns", cols)?)
            .u32(count_u32(OP, "rows", num_rows)?);
        let block = threads_for(cols, 16 / size, 256);
        let parts = cols.div_ceil(block as usize * 16 / size) as u32;
        let launch = Launch { grid: [num_rows as u32, parts, 1], block, shared: 0 };
        // SAFETY: these are the kernel's parameters; sizes were checked above.
        unsafe { self.kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// One rounding of the result, beside functions of a few ulp of f32.
    #[test]
    fn agrees_with_the_formula_also_for_gates_that_are_far_out() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let kernel = SiluMul::new(&device, dtype).unwrap();
            for (num_rows, cols) in [(1, 1), (3, 7), (2, 18944), (5, 2049), (4, 2056), (9, 64)] {
                // Gates of up to ±120: exp of them overflows.
                let values: Vec<f32> = random(num_rows * 2 * cols, 4)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| if i % 5 == 0 { x * 120.0 } else { *x * 4.0 })
                    .collect();
                let x = Values::of(&device, dtype, &values);
                let out = poisoned(&device, num_rows * cols * dtype.size_bytes());
                kernel.run(&device, (&out).into(), (&x.on_device).into(), [num_rows, cols]).unwrap();
                let want: Vec<f64> = x
                    .values
                    .chunks(2 * cols)
                    .flat_map(|row| {
                        let (gate, up) = row.split_at(cols);
                        gate.iter()
                            .zip(up)
                            .map(|(&g, &u)| f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u))
                            .collect::<Vec<_>>()
                    })
                    .collect();
                assert_close(&read(&out, dtype), &want, 1.1 * step(dtype), 1e-7, &format!("{dtype} {num_rows}x{cols}"));
            }
        }
    }
}
