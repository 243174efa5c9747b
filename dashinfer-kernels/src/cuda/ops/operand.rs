//! What launchers take: parts of buffers, whose sizes they check, and kernels of one element type.

use std::sync::Arc;

use crate::cuda::device::Device;
use crate::cuda::kernel::Kernel;
use crate::cuda::memory::Buffer;
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

/// A part of a buffer on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<'a> {
    buffer: &'a Buffer,
    offset: usize,
    bytes: usize,
}

impl<'a> Span<'a> {
    /// `bytes` bytes of `buffer`, from `offset` on.
    pub(crate) fn part(buffer: &'a Buffer, offset: usize, bytes: usize) -> Result<Self, KernelError> {
        let end = offset.saturating_add(bytes);
        if end > buffer.bytes() {
            let (what, found) = ("bytes of the buffer", buffer.bytes());
            return Err(KernelError::Shape { op: "span", what, wanted: end, found });
        }
        Ok(Self { buffer, offset, bytes })
    }

    /// The rest of it, from `offset` on.
    pub(crate) fn rest(self, offset: usize) -> Result<Self, KernelError> {
        let Some(bytes) = self.bytes.checked_sub(offset) else {
            let (what, found) = ("bytes of the span", self.bytes);
            return Err(KernelError::Shape { op: "span", what, wanted: offset, found });
        };
        Ok(Self { buffer: self.buffer, offset: self.offset + offset, bytes })
    }

    /// Its size.
    pub(crate) fn bytes(self) -> usize {
        self.bytes
    }

    /// Its address, after a check that `count` elements of `size` bytes fit.
    pub(crate) fn holding(
        self,
        op: &'static str,
        what: &'static str,
        count: usize,
        size: usize,
    ) -> Result<u64, KernelError> {
        let wanted = count.saturating_mul(size);
        if wanted > self.bytes {
            return Err(KernelError::Shape { op, what, wanted: count, found: self.bytes / size });
        }
        Ok(self.buffer.ptr() + self.offset as u64)
    }
}

impl<'a> From<&'a Buffer> for Span<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Self { buffer, offset: 0, bytes: buffer.bytes() }
    }
}

/// A count as kernels take it.
pub(crate) fn count_u32(op: &'static str, what: &'static str, count: usize) -> Result<u32, KernelError> {
    u32::try_from(count).map_err(|_| KernelError::Shape { op, what, wanted: u32::MAX as usize, found: count })
}

/// The kernel `name` of `unit` for elements of `dtype`, compiled with further `options`.
pub(crate) fn typed_kernel(
    device: &Arc<Device>,
    unit: &'static Unit,
    dtype: DType,
    options: &[&str],
    name: &str,
) -> Result<Kernel, KernelError> {
    let element = format!("-DDASH_TYPE={dtype}");
    let mut all = vec![element.as_str()];
    all.extend_from_slice(options);
    device.kernel(unit, &all, &format!("{name}_{dtype}"))
}

/// Threads for a row that `per_thread` values at a time go through: whole warps, one step where a block has threads enough.
pub(crate) fn threads_for(cols: usize, per_thread: usize, most: usize) -> u32 {
    cols.div_ceil(per_thread).next_multiple_of(32).clamp(32, most) as u32
}
