//! NVRTC: NVIDIA's compiler as a library, from a text in memory to machine code for one architecture.
//!
//! The nine functions are looked up by name here, not through `cudarc`: a missing one is an error and not a panic, and two
//! versions can be open at once, which the check of all kernels needs (13 no longer knows SM70, 12 does).
//!
//! Code is compiled to machine code, never to PTX: a driver refuses PTX of a compiler newer than itself, and needs time to
//! assemble it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::{mem, ptr};

use super::arch::Arch;
use super::library::{Library, Name, Places};
use crate::KernelError;

type Program = *mut c_void;

/// `NVRTC_SUCCESS`.
const SUCCESS: c_int = 0;

/// An open compiler. Its functions may be called from several threads at once.
#[derive(Debug)]
pub struct Nvrtc {
    functions: Functions,
    version: (u32, u32),
    archs: Vec<u32>,
    library: Library,
}

/// The signatures are those of `nvrtc.h`, the same in CUDA 12 and 13.
#[derive(Debug)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    num_archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    cubin_bytes: GetSize,
    cubin: GetBytes,
    log_bytes: GetSize,
    log: GetBytes,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
}

type GetSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// What is to be compiled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// The file's name, for messages.
    pub(crate) name: &'a str,
    pub(crate) text: &'a str,
    /// What it may include: names and texts.
    pub(crate) headers: &'a [(&'a str, &'a str)],
}

/// What the compiler made.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code: an ELF file that the driver loads.
    pub cubin: Vec<u8>,
    /// Warnings, and what the options asked to be reported.
    pub log: String,
}

impl Nvrtc {
    /// Finds a compiler that knows `arch`, or code for which `arch` runs, and that is of CUDA `newest` or before.
    ///
    /// # Errors
    /// [`KernelError::Library`] names what was looked for, where, and what was wrong with it.
    pub(crate) fn open(places: &Places, arch: Arch, newest: Option<u32>) -> Result<Self, KernelError> {
        places.open(Name::Nvrtc, newest, |library| {
            let nvrtc = Self::in_library(library)?;
            match nvrtc.target(arch) {
                Some(_) => Ok(nvrtc),
                None => Err(format!(
                    "{} is of CUDA {} and does not know compute capability {arch}",
                    nvrtc.library.from,
                    nvrtc.version()
                )),
            }
        })
    }

    /// Finds a compiler on this machine as a process that runs kernels does. `newest` is the newest major version of CUDA to
    /// accept: what a compiler makes can be loaded by drivers of its major version and later ones.
    ///
    /// # Errors
    /// [`KernelError::Library`] names what was looked for, where, and what was wrong with it.
    pub fn find(arch: Arch, newest: Option<u32>) -> Result<Self, KernelError> {
        Self::open(&Places::of_this_process(), arch, newest)
    }

    fn in_library(library: Library) -> Result<Self, String> {
        let functions = Functions::of(&library)?;
        let (mut major, mut minor, mut num_archs) = (0, 0, 0);
        // SAFETY: each writes its results to the integers it is given.
        let states = unsafe { [(functions.version)(&mut major, &mut minor), (functions.num_archs)(&mut num_archs)] };
        if states != [SUCCESS; 2] || major < 1 || minor < 0 || !(0..1000).contains(&num_archs) {
            return Err(format!("{} does not tell its version", library.from));
        }
        let mut archs: Vec<c_int> = vec![0; num_archs as usize];
        // SAFETY: it writes as many integers as it said just before.
        if unsafe { (functions.archs)(archs.as_mut_ptr()) } != SUCCESS {
            return Err(format!("{} does not tell what it compiles for", library.from));
        }
        let archs = archs.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect();
        Ok(Self { functions, version: (major as u32, minor as u32), archs, library })
    }

    /// `13.0`, for example.
    #[must_use]
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// The architecture to compile for, to run on `arch`: itself, or the nearest that the compiler knows.
    pub(crate) fn target(&self, arch: Arch) -> Option<Arch> {
        arch.runs().find(|arch| self.archs.contains(&arch.number()))
    }

    /// Compiles for exactly `arch`, with these options and no others beside the architecture.
    ///
    /// # Errors
    /// [`KernelError::Compile`] with the compiler's log.
    pub(crate) fn compile(&self, source: Source<'_>, arch: Arch, options: &[&str]) -> Result<Compiled, KernelError> {
        let failed = |log: String| KernelError::Compile {
            unit: format!("{} for {}{}", source.name, arch.target(), words(options)),
            log,
        };
        let c_string = |text: &str| CString::new(text).map_err(|_| failed("a zero byte in the source".to_string()));
        let (name, text) = (c_string(source.name)?, c_string(source.text)?);
        let (mut names, mut texts) = (Vec::new(), Vec::new());
        for (name, text) in source.headers {
            names.push(c_string(name)?);
            texts.push(c_string(text)?);
        }
        let target = format!("--gpu-architecture={}", arch.target());
        let all = std::iter::once(target.as_str()).chain(options.iter().copied());
        let all = all.map(c_string).collect::<Result<Vec<_>, _>>()?;

        let (name_list, text_list, option_list) = (pointers(&names), pointers(&texts), pointers(&all));
        let mut program = ProgramGuard { program: ptr::null_mut(), functions: &self.functions };
        // SAFETY: every pointer is to a string that ends with a zero and outlives `program`, and the lists are as long as the
        // count says.
        let state = unsafe {
            (self.functions.create)(
                &mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                text_list.as_ptr(),
                name_list.as_ptr(),
            )
        };
        self.check(state).map_err(failed)?;
        // SAFETY: the program was made above; the options' strings live.
        let state = unsafe { (self.functions.compile)(program.program, all.len() as c_int, option_list.as_ptr()) };
        let log = program.bytes(self.functions.log_bytes, self.functions.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_string();
        self.check(state).map_err(|state| failed(format!("{state}\n{log}")))?;
        match program.bytes(self.functions.cubin_bytes, self.functions.cubin) {
            Ok(cubin) if !cubin.is_empty() => Ok(Compiled { cubin, log }),
            Ok(_) => Err(failed("the compiler made no machine code".to_string())),
            Err(state) => Err(failed(self.error(state))),
        }
    }

    fn check(&self, state: c_int) -> Result<(), String> {
        if state == SUCCESS { Ok(()) } else { Err(self.error(state)) }
    }

    fn error(&self, state: c_int) -> String {
        // SAFETY: returns a constant string, or null.
        let text = unsafe {
            let text = (self.functions.error)(state);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        text.unwrap_or_else(|| format!("NVRTC error {state}"))
    }
}

fn words(options: &[&str]) -> String {
    options.iter().map(|option| format!(" {option}")).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

/// A program, destroyed when it goes.
struct ProgramGuard<'a> {
    program: Program,
    functions: &'a Functions,
}

impl ProgramGuard<'_> {
    fn bytes(&self, size: GetSize, get: GetBytes) -> Result<Vec<u8>, c_int> {
        let mut len = 0;
        // SAFETY: the program lives; the size goes to an integer.
        let state = unsafe { size(self.program, &mut len) };
        if state != SUCCESS {
            return Err(state);
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: it writes as many bytes as it said just before.
        let state = unsafe { get(self.program, bytes.as_mut_ptr().cast()) };
        if state == SUCCESS { Ok(bytes) } else { Err(state) }
    }
}

impl Drop for ProgramGuard<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by `create`, destroyed once. What it returns changes nothing.
            unsafe { (self.functions.destroy)(&mut self.program) };
        }
    }
}

impl Functions {
    fn of(library: &Library) -> Result<Self, String> {
        // SAFETY: each symbol is the function of this name in `nvrtc.h`, and the fields have its signature.
        unsafe {
            Ok(Self {
                version: function(library, c"nvrtcVersion")?,
                num_archs: function(library, c"nvrtcGetNumSupportedArchs")?,
                archs: function(library, c"nvrtcGetSupportedArchs")?,
                create: function(library, c"nvrtcCreateProgram")?,
                destroy: function(library, c"nvrtcDestroyProgram")?,
                compile: function(library, c"nvrtcCompileProgram")?,
                cubin_bytes: function(library, c"nvrtcGetCUBINSize")?,
                cubin: function(library, c"nvrtcGetCUBIN")?,
                log_bytes: function(library, c"nvrtcGetProgramLogSize")?,
                log: function(library, c"nvrtcGetProgramLog")?,
                error: function(library, c"nvrtcGetErrorString")?,
            })
        }
    }
}

/// # Safety
/// `F` is the type of a function pointer, and fits the function of this name.
unsafe fn function<F: Copy>(library: &Library, name: &CStr) -> Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    let address = library.symbol(name)?.as_ptr();
    // SAFETY: of one size, and the caller promises the type.
    Ok(unsafe { mem::transmute_copy(&address) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler of this machine, or why the test cannot run.
    fn nvrtc(arch: Arch) -> Option<Nvrtc> {
        Nvrtc::find(arch, None).inspect_err(|error| println!("skipped: {error}")).ok()
    }

    const DOUBLE: Source<'_> = Source {
        name: "double.cu",
        text: "#include \"twice.cuh\"\nextern \"C\" __global__ void run(float* x) { x[threadIdx.x] = twice(x[threadIdx.x]); }",
        headers: &[("twice.cuh", "__device__ float twice(float x) { return FACTOR * x; }")],
    };

    #[test]
    fn a_file_with_a_header_in_memory_becomes_machine_code() {
        let Some(nvrtc) = nvrtc(Arch::SM80) else { return };
        // Another program each time: of one that it has made before, the compiler may say nothing.
        let factor = format!("-DFACTOR={}.f", std::process::id());
        let options = ["--std=c++17", &factor, "--ptxas-options=-v"];
        let compiled = nvrtc.compile(DOUBLE, Arch::SM80, &options).unwrap();
        assert!(compiled.cubin.starts_with(b"\x7fELF"));
        assert!(compiled.log.contains("Compiling entry function 'run' for 'sm_80'"), "{}", compiled.log);
        let again = nvrtc.compile(DOUBLE, Arch::SM80, &options).unwrap();
        assert_eq!(again.cubin, compiled.cubin, "one source, one result");
    }

    #[test]
    fn the_log_of_a_failure_is_in_the_error() {
        let Some(nvrtc) = nvrtc(Arch::SM80) else { return };
        let error = nvrtc.compile(DOUBLE, Arch::SM80, &[]).unwrap_err();
        let KernelError::Compile { unit, log } = error else { panic!("{error}") };
        assert_eq!(unit, "double.cu for sm_80");
        assert!(log.contains("FACTOR") && log.contains("twice.cuh"), "{log}");
        let error = nvrtc.compile(DOUBLE, Arch::SM80, &["--no-such-option"]).unwrap_err();
        assert!(error.to_string().contains("no-such-option"), "{error}");
    }

    #[test]
    fn two_versions_can_be_open_at_once() {
        let (Some(new), Some(old)) = (nvrtc(Arch::SM120), nvrtc(Arch::SM70)) else { return };
        for (nvrtc, arch) in [(&old, Arch::SM70), (&new, Arch::SM120), (&old, Arch::SM70)] {
            let compiled = nvrtc.compile(DOUBLE, arch, &["-DFACTOR=2.f"]).unwrap();
            assert!(compiled.cubin.starts_with(b"\x7fELF"), "{arch} of {}", nvrtc.version());
        }
    }

    #[test]
    fn code_is_for_the_nearest_architecture_that_the_compiler_knows() {
        let Some(nvrtc) = nvrtc(Arch::SM80) else { return };
        assert_eq!(nvrtc.target(Arch::SM80), Some(Arch::SM80));
        assert_eq!(nvrtc.target(Arch::new(8, 5)), Some(Arch::SM80));
        assert_eq!(nvrtc.target(Arch::SM90), Some(Arch::SM90));
        assert_eq!(nvrtc.target(Arch::new(42, 0)), None);
    }

    #[test]
    fn threads_compile_beside_each_other() {
        let Some(nvrtc) = nvrtc(Arch::SM80) else { return };
        std::thread::scope(|scope| {
            for factor in 2..6 {
                let nvrtc = &nvrtc;
                scope.spawn(move || {
                    let option = format!("-DFACTOR={factor}.f");
                    assert!(nvrtc.compile(DOUBLE, Arch::SM80, &[&option]).is_ok());
                });
            }
        });
    }
}
