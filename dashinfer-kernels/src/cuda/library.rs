//! Opens CUDA's libraries.

use crate::KernelError;

/// Opens the driver.
pub(super) fn open_driver() -> Result<(), KernelError> {
    // SAFETY: opens a shared library by name; its initializers are those of NVIDIA's driver.
    if unsafe { cudarc::driver::sys::is_culib_present() } {
        return Ok(());
    }
    Err(KernelError::Library { name: "libcuda.so", looked_in: "the loader's path".to_owned() })
}

/// Opens the compiler.
pub(super) fn open_nvrtc() -> Result<(), KernelError> {
    // SAFETY: as above, of the compiler.
    if unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Ok(());
    }
    Err(KernelError::Library { name: "libnvrtc.so", looked_in: "the loader's path".to_owned() })
}

/// Opens cuBLASLt.
pub(super) fn open_cublaslt() -> Result<(), KernelError> {
    // SAFETY: as above, of cuBLASLt.
    if unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Ok(());
    }
    Err(KernelError::Library { name: "libcublasLt.so", looked_in: "the loader's path".to_owned() })
}
