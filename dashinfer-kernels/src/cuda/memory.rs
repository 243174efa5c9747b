//! Memory: on the device, and pinned on the host for copies that go on by themselves.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::device::{Device, checked};
use crate::KernelError;

/// Memory on the device; given back on drop.
#[derive(Debug)]
pub(crate) struct Buffer {
    device: Arc<Device>,
    ptr: u64,
    bytes: usize,
}

impl Buffer {
    pub(super) fn new(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Self, KernelError> {
        device.bind()?;
        let mut ptr = 0;
        // SAFETY: the context is current. An allocation of nothing is none to the driver, so it gets a byte.
        match unsafe { sys::cuMemAlloc_v2(&mut ptr, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(KernelError::OutOfMemory { what, wanted_bytes: bytes }),
            result => checked("cuMemAlloc", result).map(|()| Self { device: Arc::clone(device), ptr, bytes }),
        }
    }

    /// Its address.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that it is on.
    #[cfg(test)]
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn check_range(&self, op: &'static str, offset: usize, len: usize) -> Result<(), KernelError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(()),
            end => {
                let wanted = end.unwrap_or(usize::MAX);
                Err(KernelError::Shape { op, what: "bytes of the buffer", wanted, found: self.bytes })
            }
        }
    }

    /// Copies `from` to the device, behind the work so far, and waits for it.
    pub(crate) fn upload(&self, offset: usize, from: &[u8]) -> Result<(), KernelError> {
        self.check_range("upload", offset, from.len())?;
        self.device.bind()?;
        let (to, stream) = (self.ptr + offset as u64, self.device.stream());
        // SAFETY: both ranges are there until the wait below is over.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream) };
        checked("cuMemcpyHtoDAsync", result)?;
        self.device.synchronize()
    }

    /// Copies from the device, behind the work so far, and waits for it.
    pub(crate) fn download(&self, offset: usize, to: &mut [u8]) -> Result<(), KernelError> {
        self.check_range("download", offset, to.len())?;
        self.device.bind()?;
        let (from, stream) = (self.ptr + offset as u64, self.device.stream());
        // SAFETY: both ranges are there until the wait below is over.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), stream) };
        checked("cuMemcpyDtoHAsync", result)?;
        self.device.synchronize()
    }

    /// Copies the first `len` bytes of `from`, behind the work so far, without waiting.
    pub(crate) fn copy_from(&self, offset: usize, from: &Self, len: usize) -> Result<(), KernelError> {
        self.check_range("copy", offset, len)?;
        from.check_range("copy", 0, len)?;
        self.device.bind()?;
        // SAFETY: both ranges are in their buffers, which outlive the work on them (`cuMemFree` waits).
        let result =
            unsafe { sys::cuMemcpyDtoDAsync_v2(self.ptr + offset as u64, from.ptr, len, self.device.stream()) };
        checked("cuMemcpyDtoDAsync", result)
    }

    /// Sets `len` bytes, behind the work so far, without waiting.
    pub(crate) fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<(), KernelError> {
        self.check_range("fill", offset, len)?;
        self.device.bind()?;
        // SAFETY: the range is in the buffer.
        let result = unsafe { sys::cuMemsetD8Async(self.ptr + offset as u64, byte, len, self.device.stream()) };
        checked("cuMemsetD8Async", result)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `cuMemFree` waits for the work that may use it. Errors cannot be told.
        unsafe {
            let _ = self.device.bind();
            sys::cuMemFree_v2(self.ptr);
        }
    }
}

/// Pinned memory on the host: copies to and from it go on while the host does other things. Cached, so that the CPU reads it
/// quickly.
#[derive(Debug)]
pub(crate) struct Pinned {
    device: Arc<Device>,
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its memory, like a `Box<[u8]>`.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed.
    pub(crate) fn new(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Self, KernelError> {
        device.bind()?;
        let mut ptr: *mut c_void = std::ptr::null_mut();
        // SAFETY: the context is current.
        match unsafe { sys::cuMemHostAlloc(&mut ptr, bytes.max(1), 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(KernelError::OutOfMemory { what, wanted_bytes: bytes }),
            result => {
                checked("cuMemHostAlloc", result)?;
                // SAFETY: the driver gave so many bytes.
                unsafe { std::ptr::write_bytes(ptr.cast::<u8>(), 0, bytes) };
                Ok(Self { device: Arc::clone(device), ptr: ptr.cast(), bytes })
            }
        }
    }

    /// Its address, at which kernels can read and write too.
    pub(crate) fn address(&self) -> u64 {
        self.ptr as u64
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: it has so many bytes, all initialized.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// Who writes sees to it that no copy is under way (an [`Event`] tells).
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and it is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }

    /// Starts a copy of its first `len` bytes to `to` at `offset`. It must not be written until that is done.
    pub(crate) fn start_upload(&self, to: &Buffer, offset: usize, len: usize) -> Result<(), KernelError> {
        to.check_range("upload", offset, len)?;
        self.check_range("upload", len)?;
        // SAFETY: both ranges are there; buffers outlive the work on them (`cuMemFree` and `cuMemFreeHost` wait).
        let result =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.ptr + offset as u64, self.ptr.cast(), len, self.device.stream()) };
        checked("cuMemcpyHtoDAsync", result)
    }

    fn check_range(&self, op: &'static str, len: usize) -> Result<(), KernelError> {
        if len <= self.bytes {
            return Ok(());
        }
        Err(KernelError::Shape { op, what: "bytes of the pinned memory", wanted: len, found: self.bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the driver waits for copies from and to it. Errors cannot be told.
        unsafe {
            let _ = self.device.bind();
            sys::cuStreamSynchronize(self.device.stream());
            sys::cuMemFreeHost(self.ptr.cast());
        }
    }
}

/// A mark in the stream, to be waited for.
#[derive(Debug)]
pub(crate) struct Event {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One that marks the order alone: cheaper than one that takes the time.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, KernelError> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// One that takes the time.
    pub(crate) fn timed(device: &Arc<Device>) -> Result<Self, KernelError> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn with_flags(device: &Arc<Device>, flags: u32) -> Result<Self, KernelError> {
        device.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the context is current.
        checked("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        Ok(Self { device: Arc::clone(device), event })
    }

    /// Puts the mark behind the work so far.
    pub(crate) fn record(&self) -> Result<(), KernelError> {
        // SAFETY: event and stream are of one device.
        checked("cuEventRecord", unsafe { sys::cuEventRecord(self.event, self.device.stream()) })
    }

    /// Waits for the mark; at once if it was never put.
    pub(crate) fn wait(&self) -> Result<(), KernelError> {
        // SAFETY: the event lives.
        checked("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Whether the mark was reached.
    pub(crate) fn is_reached(&self) -> Result<bool, KernelError> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => checked("cuEventQuery", result).map(|()| true),
        }
    }

    /// The time from `earlier` to this mark, both reached and [timed](Self::timed).
    pub(crate) fn since(&self, earlier: &Self) -> Result<std::time::Duration, KernelError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events live.
        let result = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.event, self.event) };
        checked("cuEventElapsedTime", result)?;
        Ok(std::time::Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nothing waits for it any more. Errors cannot be told.
        unsafe {
            let _ = self.device.bind();
            sys::cuEventDestroy_v2(self.event);
        }
    }
}
