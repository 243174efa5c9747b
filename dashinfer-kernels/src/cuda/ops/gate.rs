//! The functions of gated layers.

use std::sync::Arc;

use super::activation::{Clamp, OPTIONS, number};
use super::operand::{Span, count_u32, threads_for, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{Activation, DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "gate.cu", source: include_str!("../../../cuda/gate.cu") };

/// `out[t, i] = f(x[t, i], x[t, F + i])`, see `gate.cu`. Compiled for a function at its first use.
#[derive(Debug)]
pub(crate) struct Gate {
    kernels: [Option<Kernel>; OPTIONS.len()],
    dtype: DType,
}

impl Gate {
    pub(crate) fn new(dtype: DType) -> Self {
        Self { kernels: [const { None }; OPTIONS.len()], dtype }
    }

    /// `out`: `[num_rows, cols]`; `x`: `[num_rows, 2 * cols]`, gates and then the values that they gate.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, and what compiling may say.
    pub(crate) fn run(
        &mut self,
        device: &Arc<Device>,
        activation: Activation,
        out: Span<'_>,
        x: Span<'_>,
        [num_rows, cols]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "gate";
        let size = self.dtype.size_bytes();
        let number = number(activation);
        let kernel = match &self.kernels[number] {
            Some(kernel) => kernel,
            None => self.kernels[number].insert(typed_kernel(device, &UNIT, self.dtype, &[OPTIONS[number]], "gate")?),
        };
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", num_rows * cols, size)?)
            .ptr(x.holding(OP, "values of x", num_rows * 2 * cols, size)?)
            .u32(count_u32(OP, "columns", cols)?)
            .u32(count_u32(OP, "rows", num_rows)?)
            .value(&Clamp::from(activation));
        let block = threads_for(cols, 16 / size, 256);
        let parts = cols.div_ceil(block as usize * 16 / size) as u32;
        let launch = Launch { grid: [num_rows as u32, parts, 1], block, shared: 0 };
        // SAFETY: these are the kernel's parameters; sizes were checked above.
        unsafe { kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::activation::{EVERY, defined};
    use super::super::testing::*;
    use super::*;

    /// One rounding of the result, beside functions of a few ulp of f32.
    #[test]
    fn agrees_with_the_formulas_also_for_gates_that_are_far_out() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let mut kernel = Gate::new(dtype);
            for (num_rows, cols) in [(1, 1), (3, 7), (2, 18944), (5, 2049), (4, 2056), (9, 64)] {
                // Gates of up to ±120: exp of them overflows.
                let values: Vec<f32> = random(num_rows * 2 * cols, 4)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| if i % 5 == 0 { x * 120.0 } else { *x * 4.0 })
                    .collect();
                let x = Values::of(&device, dtype, &values);
                for activation in EVERY {
                    let out = poisoned(&device, num_rows * cols * dtype.size_bytes());
                    let shape = [num_rows, cols];
                    kernel.run(&device, activation, (&out).into(), (&x.on_device).into(), shape).unwrap();
                    let rows = x.values.chunks(2 * cols).flat_map(|row| row[..cols].iter().zip(&row[cols..]));
                    let want: Vec<f64> = rows.map(|(&gate, &up)| defined(activation, gate.into(), up.into())).collect();
                    // Gelu is the longest sum: its exponent is off by some ulp, and it is multiplied by up to 120.
                    let (rel, abs) = (1.1 * step(dtype) + 3e-6, 1e-6);
                    assert_close(
                        &read(&out, dtype),
                        &want,
                        rel,
                        abs,
                        &format!("{activation:?} {dtype} {num_rows}x{cols}"),
                    );
                }
            }
        }
    }
}
