//! Loading machine code and launching it.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use bytemuck::NoUninit;
use cudarc::driver::sys::{self, CUresult};

use super::device::{Device, checked};
use super::quiet::quietly;
use crate::KernelError;

/// Loaded machine code.
#[derive(Debug)]
pub(super) struct Module(sys::CUmodule);

// SAFETY: modules of the driver may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a CUBIN into the current context.
    pub(super) fn load(image: &[u8]) -> Result<Self, KernelError> {
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is one that the compiler made; the driver checks its header and size.
        let result = quietly(|| unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) });
        checked("cuModuleLoadData", result)?;
        Ok(Self(module))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: kernels keep their module alive, so nothing uses it any more; the context is current (`Device::drop`).
        quietly(|| unsafe { sys::cuModuleUnload(self.0) });
    }
}

/// A kernel that can be launched on its device.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
    _module: Arc<Module>,
    programmatic: bool,
}

// SAFETY: functions of the driver may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How many blocks of how many threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub(crate) shared: u32,
}

impl Kernel {
    pub(super) fn new(device: &Device, module: Arc<Module>, symbol: &str) -> Result<Self, KernelError> {
        let name = CString::new(symbol)
            .map_err(|_| KernelError::Device { call: "cuModuleGetFunction", error: "a NUL in the name".to_owned() })?;
        let mut function = std::ptr::null_mut();
        device.bind()?;
        // SAFETY: the module is loaded, the name ends in NUL.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, module.0, name.as_ptr()) };
        if result == CUresult::CUDA_ERROR_NOT_FOUND {
            let error = format!("there is no kernel {symbol}");
            return Err(KernelError::Device { call: "cuModuleGetFunction", error });
        }
        checked("cuModuleGetFunction", result)?;
        Ok(Self { function, _module: module, programmatic: device.arch.number() >= 90 })
    }

    /// Lets blocks have up to `bytes` of dynamic shared memory: what exceeds 48 KB, with the kernel's own, must be asked for, once.
    pub(crate) fn with_shared(self, bytes: u32) -> Result<Self, KernelError> {
        if bytes > 32 << 10 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let result = unsafe { sys::cuFuncSetAttribute(self.function, attribute, bytes as i32) };
            checked("cuFuncSetAttribute", result)?;
        }
        Ok(self)
    }

    /// Puts the kernel into the device's stream. It may start before the kernels in front of it are done, and waits for them
    /// itself (`wait_for_inputs` in `common.cuh`).
    ///
    /// # Safety
    /// `args` are the kernel's parameters, in order and of its types, and what it reads and writes through them is there. The
    /// device is current on this thread.
    pub(crate) unsafe fn launch(&self, device: &Device, launch: Launch, args: &mut Args) -> Result<(), KernelError> {
        let [x, y, z] = launch.grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: device.stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(self.programmatic),
        };
        let mut pointers = args.pointers();
        // SAFETY: the caller's promise; configuration and parameters outlive the call.
        let result =
            unsafe { sys::cuLaunchKernelEx(&config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        checked("cuLaunchKernelEx", result)
    }
}

/// The parameters of a launch, in order.
#[derive(Debug)]
pub(crate) struct Args {
    /// Each parameter starts at a multiple of 8 bytes.
    values: [u64; Self::WORDS],
    used: usize,
    starts: [u8; Self::MAX],
    count: usize,
}

impl Args {
    const WORDS: usize = 96;
    const MAX: usize = 32;

    pub(crate) fn new() -> Self {
        Self { values: [0; Self::WORDS], used: 0, starts: [0; Self::MAX], count: 0 }
    }

    /// A parameter of any plain type: a struct that is passed by value.
    ///
    /// # Panics
    /// If a kernel has more parameters than there is room for, which its first launch in any test shows.
    pub(crate) fn value<V: NoUninit>(mut self, value: &V) -> Self {
        let bytes = bytemuck::bytes_of(value);
        let words = bytes.len().div_ceil(8);
        self.starts[self.count] = self.used as u8;
        self.count += 1;
        bytemuck::cast_slice_mut(&mut self.values[self.used..self.used + words])[..bytes.len()].copy_from_slice(bytes);
        self.used += words;
        self
    }

    /// An address on the device; 0 for none.
    pub(crate) fn ptr(self, address: u64) -> Self {
        self.value(&address)
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.value(&value)
    }

    pub(crate) fn i32(self, value: i32) -> Self {
        self.value(&value)
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.value(&value)
    }

    pub(crate) fn f32(self, value: f32) -> Self {
        self.value(&value)
    }

    fn pointers(&mut self) -> [*mut c_void; Self::MAX] {
        let start = self.values.as_mut_ptr();
        let mut pointers = [std::ptr::null_mut(); Self::MAX];
        for (pointer, &word) in pointers.iter_mut().zip(&self.starts[..self.count]) {
            *pointer = start.wrapping_add(word as usize).cast();
        }
        pointers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_where_their_pointers_say() {
        let mut args = Args::new().ptr(0x1234_5678_9abc).u32(7).value(&[1u64, 2, 3]).f32(0.5).i32(-1);
        let pointers = args.pointers();
        // SAFETY: each pointer is to a value of this type in `args`.
        unsafe {
            assert_eq!(*pointers[0].cast::<u64>(), 0x1234_5678_9abc);
            assert_eq!(*pointers[1].cast::<u32>(), 7);
            assert_eq!(*pointers[2].cast::<[u64; 3]>(), [1, 2, 3]);
            assert_eq!(*pointers[3].cast::<f32>(), 0.5);
            assert_eq!(*pointers[4].cast::<i32>(), -1);
        }
        assert!(pointers[5].is_null());
    }
}
