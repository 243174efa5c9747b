//! A GPU: its context, the one stream that all work goes to, and its kernels.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

pub(crate) use super::arch::Arch;
use super::compiler::{Compiler, KernelSettings};
use super::kernel::{Kernel, Module};
use super::library::{self, Places};
use super::memory::Buffer;
use super::quiet::quietly;
use super::units::Unit;
use crate::KernelError;

/// `Ok` for success.
pub(crate) fn checked(call: &'static str, result: CUresult) -> Result<(), KernelError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver is open, since it gave the result; the text is static.
    let words = unsafe {
        if sys::cuGetErrorString(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            String::new()
        }
    };
    Err(KernelError::Device { call, error: format!("{result:?} ({words})") })
}

/// How many GPUs there are.
///
/// # Errors
/// [`KernelError::Library`] without a driver, [`KernelError::Device`] if it does not start.
pub fn num_devices() -> Result<usize, KernelError> {
    library::open_driver()?;
    let mut count = 0;
    // SAFETY: the driver is open.
    unsafe {
        match sys::cuInit(0) {
            CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
            result => checked("cuInit", result)?,
        }
        checked("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
    }
    Ok(count.max(0) as usize)
}

/// The major version of CUDA that the driver is for.
fn newest_cuda() -> Result<u32, KernelError> {
    let mut version = 0; // 13020 for 13.2
    // SAFETY: the driver is open.
    checked("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok((version / 1000).max(0) as u32)
}

/// A GPU in use: its primary context, retained, and one stream. Buffers and kernels keep it alive.
pub(crate) struct Device {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Its compute capability.
    pub(crate) arch: Arch,
    /// Multiprocessors.
    pub(crate) num_sms: u32,
    /// Bytes of the cache that all multiprocessors share.
    pub(crate) l2_bytes: usize,
    /// The newest major version of CUDA whose code and libraries the driver takes.
    pub(crate) cuda: u32,
    /// The name that the driver gives.
    pub(crate) name: String,
    compiler: Compiler,
    modules: Mutex<HashMap<(&'static str, String), Arc<Module>>>,
}

// SAFETY: contexts and streams of the driver may be used from any thread, with the context made current on it (`bind`).
unsafe impl Send for Device {}
// SAFETY: as above; the driver's calls are thread-safe, and the map of modules is behind a lock.
unsafe impl Sync for Device {}

impl Device {
    /// [`with`](Self::with) the defaults.
    #[cfg(test)]
    pub(crate) fn new(ordinal: usize) -> Result<Arc<Self>, KernelError> {
        Self::with(ordinal, &KernelSettings::default())
    }

    /// Takes GPU number `ordinal` into use, and makes it current on this thread.
    pub(crate) fn with(ordinal: usize, kernels: &KernelSettings) -> Result<Arc<Self>, KernelError> {
        let count = num_devices()?;
        if ordinal >= count {
            let found = format!("{count} CUDA devices");
            return Err(KernelError::NoDevice { wanted: format!("CUDA device {ordinal}"), found });
        }
        let cuda = newest_cuda()?;
        let (mut device, mut context, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        let mut name = [0; 128];
        // SAFETY: the driver is open and initialized; every out-pointer is valid for the call.
        unsafe {
            checked("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            checked("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
            checked("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        let release = |error| {
            // SAFETY: it was retained above; nothing uses it yet.
            unsafe { sys::cuDevicePrimaryCtxRelease_v2(device) };
            error
        };
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: as above.
            checked("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
            Ok(value.max(0) as u32)
        };
        let mut facts = || {
            use CUdevice_attribute as Of;
            let facts = [
                attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                attribute(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                attribute(Of::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            ];
            // SAFETY: as above; a stream that does not wait for the default stream can be captured.
            unsafe {
                checked("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                checked("cuStreamCreate", quietly(|| sys::cuStreamCreate(&mut stream, flags)))?;
            }
            Ok(facts)
        };
        let [major, minor, num_sms, l2_bytes] = facts().map_err(release)?;
        // SAFETY: the driver ended the name within the array, whose last byte it was not given.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let (arch, modules) = (Arch { major, minor }, Mutex::default());
        let compiler = Compiler::new(arch, kernels, Places::of_this_process(), Some(cuda)).map_err(release)?;
        let l2_bytes = l2_bytes as usize;
        Ok(Arc::new(Self { device, context, stream, arch, num_sms, l2_bytes, cuda, name, compiler, modules }))
    }

    /// Makes the GPU current on this thread: each thread does so before its first call.
    pub(crate) fn bind(&self) -> Result<(), KernelError> {
        // SAFETY: the context is retained as long as `self` lives.
        checked("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// The stream that all work goes to.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until all work is done.
    pub(crate) fn synchronize(&self) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        checked("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Free bytes and all bytes of the device's memory.
    pub(crate) fn memory(&self) -> Result<(u64, u64), KernelError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, and both pointers are valid.
        checked("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Memory on the device, with whatever was there; aligned to 256 bytes.
    pub(crate) fn alloc(self: &Arc<Self>, what: &'static str, bytes: usize) -> Result<Buffer, KernelError> {
        Buffer::new(self, what, bytes)
    }

    /// The kernel `symbol` of `unit`, compiled with `options`. Compiled or loaded at the first call, which must not happen while
    /// work is being captured; later calls look it up.
    pub(crate) fn kernel(
        self: &Arc<Self>,
        unit: &'static Unit,
        options: &[&str],
        symbol: &str,
    ) -> Result<Kernel, KernelError> {
        let key = (unit.name, options.join(" "));
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(&key) {
            Some(module) => Arc::clone(module),
            None => {
                #[cfg(test)]
                if !super::units::is_listed(unit, self.arch, options) {
                    eprintln!("not listed in units.rs: {} {}", unit.name, options.join(" "));
                }
                let image = self.compiler.machine_code(unit, options)?;
                self.bind()?;
                let module = Arc::new(Module::load(&image)?);
                modules.insert(key, Arc::clone(&module));
                module
            }
        };
        Kernel::new(self, module, symbol)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything that uses them keeps the device alive, so nothing does any more. Errors cannot be told.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            self.modules.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
            quietly(|| {
                sys::cuStreamDestroy_v2(self.stream);
                sys::cuDevicePrimaryCtxRelease_v2(self.device);
            });
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("arch", &self.arch).finish_non_exhaustive()
    }
}

/// The first GPU, for tests; without one they say that they were skipped.
#[cfg(test)]
pub(crate) fn test_device() -> Option<Arc<Device>> {
    match Device::new(0) {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped: no CUDA device ({error})");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_a_typed_error() {
        match Device::new(99) {
            Err(KernelError::Library { name, .. }) => assert_eq!(name, "libcuda.so"),
            Err(KernelError::NoDevice { wanted, .. }) => assert_eq!(wanted, "CUDA device 99"),
            other => panic!("{other:?}"),
        }
    }
}
