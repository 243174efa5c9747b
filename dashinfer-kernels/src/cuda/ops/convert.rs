//! Weights of one stored type as another.

use std::sync::Arc;

use super::operand::{Span, count_u32, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "convert.cu", source: include_str!("../../../cuda/convert.cu") };

/// `out[i] = from[i]` for `count` elements, rounded to nearest even. Done while loading, so the kernel is looked up each time.
///
/// # Errors
/// [`KernelError::Shape`] if an operand is too small.
pub(crate) fn convert(
    device: &Arc<Device>,
    (out, to): (Span<'_>, DType),
    (from, stored): (Span<'_>, DType),
    count: usize,
) -> Result<(), KernelError> {
    const OP: &str = "convert";
    let kernel = typed_kernel(device, &UNIT, to, &[], &format!("convert_{stored}"))?;
    let mut args = Args::new()
        .ptr(out.holding(OP, "values of the output", count, to.size_bytes())?)
        .ptr(from.holding(OP, "stored values", count, stored.size_bytes())?)
        .u64(count as u64);
    let blocks = count_u32(OP, "blocks", count.div_ceil(4 * 256))?;
    // SAFETY: these are the kernel's parameters; sizes were checked above.
    unsafe { kernel.launch(device, Launch { grid: [blocks, 1, 1], block: 256, shared: 0 }, &mut args) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// One rounding, to nearest even, on both sides: equality.
    #[test]
    fn every_type_becomes_every_other_rounded_to_nearest_even() {
        let Some(device) = test_device() else { return };
        for to in TYPES {
            for stored in TYPES {
                for count in [1, 3, 4, 1023, 5000] {
                    let from = Values::random(&device, stored, count, 3);
                    let out = poisoned(&device, count * to.size_bytes());
                    convert(&device, ((&out).into(), to), ((&from.on_device).into(), stored), count).unwrap();
                    let want: Vec<f32> = from.values.iter().map(|&value| rounded(value, to)).collect();
                    assert_eq!(read(&out, to), want, "{stored} to {to}, {count}");
                }
            }
        }
    }
}
