//! From source to machine code.

use std::ffi::{CString, c_char};
use std::ptr;

use cudarc::nvrtc::sys;

use super::device::Arch;
use super::library;
use super::units::{HEADERS, Unit};
use crate::KernelError;

/// Compiles `unit` with `options` for `arch` to machine code (a CUBIN).
pub(super) fn compile(unit: &Unit, options: &[&str], arch: Arch) -> Result<Vec<u8>, KernelError> {
    library::open_nvrtc()?;
    let text = |text: &str| CString::new(text).map_err(|_| failed(unit, options, "the source contains a NUL"));
    let (source, name) = (text(unit.source)?, text(unit.name)?);
    let headers =
        HEADERS.iter().map(|(name, source)| Ok((text(name)?, text(source)?))).collect::<Result<Vec<_>, _>>()?;
    let header_names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
    let header_texts: Vec<*const c_char> = headers.iter().map(|(_, source)| source.as_ptr()).collect();
    let target = format!("--gpu-architecture={}", arch.target());
    let all = [&target, "--std=c++17"].into_iter().chain(options.iter().copied());
    let all = all.map(text).collect::<Result<Vec<_>, _>>()?;
    let all: Vec<*const c_char> = all.iter().map(|option| option.as_ptr()).collect();

    let mut program = ptr::null_mut();
    // SAFETY: all strings end in NUL and outlive the program; the counts are those of the arrays.
    unsafe {
        let status = sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        );
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(unit, options, &format!("{status:?}")));
        }
        let status = sys::nvrtcCompileProgram(program, all.len() as i32, all.as_ptr());
        let result = if status == sys::nvrtcResult::NVRTC_SUCCESS {
            let mut len = 0;
            let mut image = Vec::new();
            let mut status = sys::nvrtcGetCUBINSize(program, &mut len);
            if status == sys::nvrtcResult::NVRTC_SUCCESS {
                image.resize(len, 0u8);
                status = sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast());
            }
            if status == sys::nvrtcResult::NVRTC_SUCCESS {
                Ok(image)
            } else {
                Err(failed(unit, options, &format!("no image: {status:?}")))
            }
        } else {
            let mut len = 0;
            let mut log = Vec::new();
            if sys::nvrtcGetProgramLogSize(program, &mut len) == sys::nvrtcResult::NVRTC_SUCCESS {
                log.resize(len, 0u8);
                sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            }
            let log = String::from_utf8_lossy(&log);
            Err(failed(unit, options, &format!("{status:?}: {}", log.trim_end_matches('\0'))))
        };
        sys::nvrtcDestroyProgram(&mut program);
        result
    }
}

fn failed(unit: &Unit, options: &[&str], log: &str) -> KernelError {
    KernelError::Compile { unit: format!("{} {}", unit.name, options.join(" ")), log: log.to_owned() }
}
