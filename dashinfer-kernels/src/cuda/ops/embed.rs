//! Rows of the embedding table, by token.

use std::sync::Arc;

use super::operand::{Span, count_u32, threads_for, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "embed.cu", source: include_str!("../../../cuda/embed.cu") };

/// In `carried`: the row's token is known to the host.
pub(crate) const NOT_CARRIED: u32 = u32::MAX;

/// `out[t, :] = scale · table[id(t), :]`, see `embed.cu`.
#[derive(Debug)]
pub(crate) struct Embed {
    kernel: Kernel,
    dtype: DType,
}

impl Embed {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { kernel: typed_kernel(device, &UNIT, dtype, &[], "embed")?, dtype })
    }

    /// `out`: `[num_rows, hidden]`; `table`: `[V, hidden]`; `ids`, `carried`: u32 `[num_rows]`. Row `t` takes token `ids[t]`, or
    /// `last[carried[t]]` unless that is [`NOT_CARRIED`], where `last_ids` holds the address of `last`. Ids and rows of `last` are in
    /// range, as the host saw to.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small.
    pub(crate) fn run(
        &self,
        device: &Device,
        out: Span<'_>,
        (table, scale): (Span<'_>, f32),
        [ids, carried, last_ids]: [Span<'_>; 3],
        [num_rows, hidden]: [usize; 2],
    ) -> Result<(), KernelError> {
        const OP: &str = "embed";
        let size = self.dtype.size_bytes();
        let mut args = Args::new()
            .ptr(out.holding(OP, "values of the output", num_rows * hidden, size)?)
            .ptr(table.holding(OP, "values of the table", hidden, size)?)
            .ptr(ids.holding(OP, "ids", num_rows, 4)?)
            .ptr(carried.holding(OP, "carried rows", num_rows, 4)?)
            .ptr(last_ids.holding(OP, "the address of the last ids", 1, 8)?)
            .u32(count_u32(OP, "columns", hidden)?)
            .u32(count_u32(OP, "rows", num_rows)?)
            .f32(scale);
        let block = threads_for(hidden, 16 / size, 512);
        let launch = Launch { grid: [num_rows as u32, 1, 1], block, shared: 0 };
        // SAFETY: these are the kernel's parameters; sizes were checked above, ids by who made the step.
        unsafe { self.kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// Copies and single products are exact: equality.
    #[test]
    fn rows_are_those_of_their_tokens_known_to_the_host_or_carried() {
        let Some(device) = test_device() else { return };
        for dtype in TYPES {
            let kernel = Embed::new(&device, dtype).unwrap();
            for (num_rows, hidden) in [(1, 1), (3, 7), (5, 64), (2, 3584), (7, 5000), (33, 129)] {
                let table = Values::random(&device, dtype, 97 * hidden, 1);
                let ids: Vec<u32> = (0..num_rows as u32).map(|t| t * 31 % 97).collect();
                let carried: Vec<u32> =
                    (0..num_rows as u32).map(|t| if t % 3 == 1 { t % 2 } else { NOT_CARRIED }).collect();
                let last = [96, 13];
                let (ids_on, carried_on, last_at) =
                    (words(&device, &ids), words(&device, &carried), words(&device, &last));
                let last_on = upload(&device, &last_at.ptr().to_le_bytes());
                let small = [(&ids_on).into(), (&carried_on).into(), (&last_on).into()];
                for scale in [1.0, 33.941_124] {
                    let out = poisoned(&device, num_rows * hidden * dtype.size_bytes());
                    let scaled = ((&table.on_device).into(), scale);
                    kernel.run(&device, (&out).into(), scaled, small, [num_rows, hidden]).unwrap();
                    let want = (0..num_rows).flat_map(|t| {
                        let id = if carried[t] == NOT_CARRIED { ids[t] } else { last[carried[t] as usize] };
                        let row = &table.values[id as usize * hidden..][..hidden];
                        row.iter().map(|x| rounded(scale * x, dtype)).collect::<Vec<_>>()
                    });
                    let what = format!("{dtype} {num_rows}x{hidden} times {scale}");
                    assert_eq!(read(&out, dtype), want.collect::<Vec<_>>(), "{what}");
                }
            }
        }
    }
}
