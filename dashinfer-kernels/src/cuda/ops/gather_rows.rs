//! Some rows of a matrix, in any order.

use std::sync::Arc;

use super::operand::{Span, count_u32, threads_for, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "gather_rows.cu", source: include_str!("../../../cuda/gather_rows.cu") };

/// `out[i, :] = x[rows[i], :]`, see `gather_rows.cu`.
#[derive(Debug)]
pub(crate) struct GatherRows {
    kernel: Kernel,
    dtype: DType,
}

impl GatherRows {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { kernel: typed_kernel(device, &UNIT, dtype, &[], "gather_rows")?, dtype })
    }

    /// `out`: `[num_rows, cols]`; `x`: `[T, cols]`; `rows`: u32 `[num_rows]`, in range, as the host saw to.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn run(
        &self,
        device: &Device,
        out: Span<'_>,
        x: Span<'_>,
        rows: Span<'_>,
        [num_rows, cols]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "gather_rows";
        let size = self.dtype.size_bytes();
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", num_rows * cols, size)?)
            .ptr(x.holding(OP, "values of x", cols, size)?)
            .ptr(rows.holding(OP, "rows", num_rows, 4)?)
            .u32(count_u32(OP, "rows", num_rows)?)
            .u32(count_u32(OP, "columns", cols)?);
        let block = threads_for(cols, 16 / size, 512);
        let launch = Launch { grid: [num_rows as u32, 1, 1], block, shared: 0 };
        // SAFETY: these are the kernel's parameters; sizes were checked above, rows by who made the step.
        unsafe { self.kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// Copies are exact: equality.
    #[test]
    fn rows_come_in_the_order_they_were_asked_for_also_twice() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let kernel = GatherRows::new(&device, dtype).unwrap();
            for cols in [1, 8, 33, 3584, 4099] {
                let x = Values::random(&device, dtype, 11 * cols, 2);
                let rows = [10, 0, 3, 3, 7];
                let (rows_on, out) = (words(&device, &rows), poisoned(&device, 5 * cols * dtype.size_bytes()));
                kernel.run(&device, (&out).into(), (&x.on_device).into(), (&rows_on).into(), [5, cols]).unwrap();
                let want: Vec<f32> =
                    rows.iter().flat_map(|&row| x.values[row as usize * cols..][..cols].to_vec()).collect();
                assert_eq!(read(&out, dtype), want, "{dtype} {cols}");
            }
        }
    }
}
