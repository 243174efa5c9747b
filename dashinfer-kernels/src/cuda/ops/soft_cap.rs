//! Soft caps on logits.

use std::sync::Arc;

use super::operand::{Span, count_u32};
use crate::KernelError;
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;

pub(crate) static UNIT: Unit = Unit { name: "soft_cap.cu", source: include_str!("../../../cuda/soft_cap.cu") };

/// Values of a block.
const OF_BLOCK: usize = 256 * 4;

/// `x[i] = cap · tanh(x[i] / cap)`, see `soft_cap.cu`. Compiled at first use: few models have caps.
#[derive(Debug, Default)]
pub(crate) struct SoftCap {
    kernel: Option<Kernel>,
}

impl SoftCap {
    /// `x`: `[count]` of f32, in place.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `x` is smaller, and what compiling may say.
    pub(crate) fn run(&mut self, device: &Arc<Device>, x: Span<'_>, count: usize, cap: f32) -> Result<(), KernelError> {
        const OP: &str = "soft_cap";
        let kernel = match &self.kernel {
            Some(kernel) => kernel,
            None => self.kernel.insert(device.kernel(&UNIT, &["-DDASH_TYPE=f32"], "soft_cap_f32")?),
        };
        let mut args = Args::new().ptr(x.holding(OP, "values", count, 4)?).u64(count as u64).f32(cap);
        let blocks = count_u32(OP, "blocks", count.div_ceil(OF_BLOCK))?;
        let launch = Launch { grid: [blocks, 1, 1], block: 256, shared: 0 };
        // SAFETY: these are the kernel's parameters; the size was checked above.
        unsafe { kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::DType;

    #[test]
    fn logits_are_capped_and_what_lies_behind_them_is_not() {
        let Some(device) = test_device() else { return };
        let mut kernel = SoftCap::default();
        for count in [1, 3, 4, 1023, 1024, 1025, 32 * 4099] {
            let values: Vec<f32> = random(count + 5, 9).iter().map(|x| 200.0 * x).collect();
            let x = Values::of(&device, DType::F32, &values);
            kernel.run(&device, (&x.on_device).into(), count, 30.0).unwrap();
            let capped = values[..count].iter().map(|&x| 30.0 * (f64::from(x) / 30.0).tanh());
            let want: Vec<f64> = capped.chain(values[count..].iter().map(|&x| f64::from(x))).collect();
            assert_close(&read(&x.on_device, DType::F32), &want, 1e-6, 1e-6, &format!("{count}"));
        }
        let three = poisoned(&device, 12);
        assert!(matches!(kernel.run(&device, (&three).into(), 4, 30.0), Err(KernelError::Shape { .. })));
    }
}
