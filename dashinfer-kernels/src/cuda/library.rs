//! Finds CUDA's libraries on this machine and opens them, at run time.
//!
//! Nothing of CUDA is needed to build or to start a program. What a system calls its loader's path seldom holds all of
//! it: toolkits install beside the system, and Python wheels hide their libraries among packages. So [`Places`] lists the
//! folders where they may be, which is plain arithmetic on paths, and [`Library`] opens a file among them by its full path.
//! From then on the loader knows it by its SONAME: whoever asks for `libcuda.so.1` or `libcublasLt.so.13` by bare name,
//! as `cudarc` does, gets the library that is open, with no `LD_LIBRARY_PATH`.

use std::ffi::{CStr, CString, OsString, c_void};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use crate::KernelError;

/// Names folders to look into before all others, with colons between them.
const VARIABLE: &str = "DASHINFER_CUDA_LIBRARIES";

/// One of CUDA's libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    /// The driver, which comes with the kernel's module and not with a toolkit.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
}

impl Name {
    /// The name without a number.
    fn plain(self) -> &'static str {
        match self {
            Name::Driver => "libcuda.so",
            Name::Nvrtc => "libnvrtc.so",
            Name::CublasLt => "libcublasLt.so",
        }
    }

    /// The library's file names, which are also its SONAMEs; newest first, each with CUDA's major version.
    ///
    /// `cudarc` asks for these numbers among others. Toolkits also have a name without a number; a number tells whether the
    /// driver can load what the library makes.
    fn files(self) -> &'static [(u32, &'static str)] {
        match self {
            Name::Driver => &[(0, "libcuda.so.1")],
            Name::Nvrtc => &[(13, "libnvrtc.so.13"), (12, "libnvrtc.so.12")],
            Name::CublasLt => &[(13, "libcublasLt.so.13"), (12, "libcublasLt.so.12")],
        }
    }
}

/// A library that may be opened: a file that is there, or a name that the loader may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) at: At,
    /// CUDA's major version by the name; 0 for the driver.
    pub(crate) major: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum At {
    File(PathBuf),
    Loader(&'static str),
}

/// Folders where CUDA's libraries may be, in the order in which they are tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Places {
    /// What the caller named.
    named: Vec<PathBuf>,
    /// Where drivers are, if the loader does not know.
    drivers: Vec<PathBuf>,
    /// Toolkits, the one named by `CUDA_HOME` or `CUDA_PATH` first.
    toolkits: Vec<PathBuf>,
    /// Python's packages: those of active environments first, then of the `python3` on the path, the system's, the user's.
    wheels: Vec<PathBuf>,
}

impl Places {
    /// The places of this machine and this process's environment.
    pub(crate) fn of_this_process() -> Self {
        Self::find(Path::new("/"), &|name| std::env::var_os(name))
    }

    /// `root` stands for `/` in the places that are fixed; `variable` reads the environment.
    fn find(root: &Path, variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let folders_in = |name: &str| -> Vec<PathBuf> {
            let value = variable(name).unwrap_or_default();
            std::env::split_paths(&value).filter(|path| !path.as_os_str().is_empty()).collect()
        };
        let mut places = Self { named: folders_in(VARIABLE), ..Self::default() };

        let fixed = ["usr/local/nvidia/lib64", "usr/lib/wsl/lib", "run/opengl-driver/lib"];
        let multiarch = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        let fixed = fixed.into_iter().chain([multiarch.as_str(), "usr/lib64", "usr/lib"]);
        places.drivers = fixed.map(|folder| root.join(folder)).collect();

        let mut toolkits: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].into_iter().flat_map(folders_in).collect();
        let local = root.join("usr/local");
        toolkits.push(local.join("cuda"));
        toolkits.extend(newest_first(&local, "cuda-"));
        let conda = folders_in("CONDA_PREFIX");
        toolkits.extend(conda.iter().cloned());
        for toolkit in unique(toolkits) {
            let inside = ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"];
            places
                .toolkits
                .extend(inside.map(|folder| toolkit.join(folder)).into_iter().filter(|folder| folder.is_dir()));
        }

        let mut pythons = folders_in("VIRTUAL_ENV");
        pythons.extend(conda);
        let on_path = folders_in("PATH").into_iter().filter(|folder| folder.join("python3").exists());
        pythons.extend(on_path.filter_map(|folder| folder.parent().map(Path::to_path_buf)));
        pythons.extend([root.join("usr/local"), root.join("usr")]);
        pythons.extend(folders_in("HOME").into_iter().map(|home| home.join(".local")));
        for packages in unique(pythons).iter().flat_map(|prefix| packages_of(prefix)) {
            places.wheels.extend(libraries_of_wheels(&packages));
        }
        places
    }

    /// Where a library is, in the order of preference: the folders that the caller named, toolkits, the loader's own path,
    /// Python's wheels. A driver is the loader's affair first. Of several versions in one folder the newest comes first;
    /// `newest` leaves out what is newer than that major version of CUDA.
    pub(crate) fn candidates(&self, name: Name, newest: Option<u32>) -> Vec<Candidate> {
        let fits = |&&(major, _): &&(u32, &str)| newest.is_none_or(|newest| major <= newest);
        let in_folder = |folder: &PathBuf| {
            let files = name.files().iter().filter(fits).map(|&(major, file)| (major, folder.join(file)));
            let there = files.filter(|(_, path)| path.exists());
            there.map(|(major, path)| Candidate { at: At::File(path), major }).collect::<Vec<_>>()
        };
        let loader = || {
            name.files().iter().filter(fits).map(|&(major, file)| Candidate { at: At::Loader(file), major }).collect()
        };
        let mut candidates: Vec<Candidate> = self.named.iter().flat_map(in_folder).collect();
        match name {
            Name::Driver => {
                candidates.extend::<Vec<_>>(loader());
                candidates.extend(self.drivers.iter().flat_map(in_folder));
            }
            Name::Nvrtc | Name::CublasLt => {
                candidates.extend(self.toolkits.iter().flat_map(in_folder));
                candidates.extend::<Vec<_>>(loader());
                candidates.extend(self.wheels.iter().flat_map(in_folder));
            }
        }
        candidates
    }

    /// What an error says about where a library was looked for.
    fn looked_in(&self, name: Name) -> String {
        let groups = match name {
            Name::Driver => [&self.named[..], &self.drivers, &[]],
            Name::Nvrtc | Name::CublasLt => [&self.named[..], &self.toolkits, &self.wheels],
        };
        let folders = groups.into_iter().flatten().map(|folder| folder.display().to_string());
        let mut text = vec!["the loader's path".to_string()];
        text.extend(folders);
        text.join(", ")
    }

    /// Opens the first candidate that can be opened and that `accept` makes something of.
    ///
    /// # Errors
    /// [`KernelError::Library`] says where was looked, and what was wrong with the candidates that were there.
    pub(crate) fn open<T>(
        &self,
        name: Name,
        newest: Option<u32>,
        mut accept: impl FnMut(Library) -> Result<T, String>,
    ) -> Result<T, KernelError> {
        let mut refused = String::new();
        for candidate in self.candidates(name, newest) {
            let by_name = matches!(candidate.at, At::Loader(_));
            match Library::open(&candidate, name).and_then(&mut accept) {
                Ok(library) => return Ok(library),
                // The loader's path is always tried: that it has nothing is no news.
                Err(why) if by_name && why.contains("cannot open shared object file") => {}
                Err(why) => refused = format!("{refused}; {why}"),
            }
        }
        let fits = name.files().iter().filter(|&&(major, _)| newest.is_none_or(|newest| major <= newest));
        let files = fits.map(|&(_, file)| file).collect::<Vec<_>>().join(" or ");
        let looked_in = format!("{} for {files}; {VARIABLE} may name more folders{refused}", self.looked_in(name));
        Err(KernelError::Library { name: name.plain(), looked_in })
    }
}

/// Opens the driver, so that `cudarc` finds it.
pub(super) fn open_driver() -> Result<(), KernelError> {
    // SAFETY: opens a shared library by name; its initializers are those of NVIDIA's driver.
    open_for(Name::Driver, None, || unsafe { cudarc::driver::sys::is_culib_present() })
}

/// Opens cuBLASLt, so that `cudarc` finds it: one of CUDA `newest` or before.
///
/// `cudarc` asks the loader for `libcublasLt.so` first. A machine whose loader knows this name, which takes a toolkit's
/// folder for development on its path, gets that one.
pub(super) fn open_cublaslt(newest: Option<u32>) -> Result<(), KernelError> {
    // SAFETY: as above, of cuBLASLt.
    open_for(Name::CublasLt, newest, || unsafe { cudarc::cublaslt::sys::is_culib_present() })
}

fn open_for(name: Name, newest: Option<u32>, is_found: impl Fn() -> bool) -> Result<(), KernelError> {
    Places::of_this_process().open(name, newest, |library| match is_found() {
        true => Ok(()),
        false => Err(format!("{} was opened, but is not found by its name", library.from)),
    })
}

/// Each path once, where it came first.
fn unique(paths: Vec<PathBuf>) -> Vec<PathBuf> {
    let mut kept: Vec<PathBuf> = Vec::with_capacity(paths.len());
    for path in paths {
        if !kept.contains(&path) {
            kept.push(path);
        }
    }
    kept
}

/// The folders in `parent` whose names begin with `prefix`, by the numbers in the rest of the name, greatest first.
fn newest_first(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<(Vec<u32>, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let version = name.to_str()?.strip_prefix(prefix)?;
            let numbers = version.split('.').map(|part| part.parse().unwrap_or(0)).collect();
            entry.path().is_dir().then(|| (numbers, entry.path()))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, path)| path).collect()
}

/// The package folders of the Pythons that are installed under `prefix`. No Python is run to ask it.
fn packages_of(prefix: &Path) -> Vec<PathBuf> {
    let pythons = ["lib", "lib64"].into_iter().flat_map(|lib| newest_first(&prefix.join(lib), "python3"));
    let packages = pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|folder| python.join(folder)));
    packages.filter(|folder| folder.is_dir()).collect()
}

/// The library folders of NVIDIA's wheels: one for all since CUDA 13 (`nvidia/cu13/lib`), before that one for each part
/// (`nvidia/cuda_nvrtc/lib`).
fn libraries_of_wheels(packages: &Path) -> Vec<PathBuf> {
    let nvidia = packages.join("nvidia");
    let mut parts = newest_first(&nvidia, "cu1");
    let mut others = newest_first(&nvidia, "");
    others.sort();
    parts.extend(others);
    unique(parts).into_iter().map(|part| part.join("lib")).filter(|folder| folder.is_dir()).collect()
}

/// An open library. It stays open for as long as the process lives: CUDA's libraries start threads and register exits.
#[derive(Debug, Clone)]
pub(crate) struct Library {
    handle: NonNull<c_void>,
    /// What was opened: a path, or a name that the loader found.
    pub(crate) from: String,
}

// SAFETY: a handle is a token; `dlsym` may be called from any thread, and nothing closes the library.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens a candidate. NVRTC opens its builtins by bare name when it compiles, so these are opened first, from the same
    /// folder.
    fn open(candidate: &Candidate, name: Name) -> Result<Self, String> {
        match &candidate.at {
            At::Loader(file) => Self::open_as(Path::new(file)),
            At::File(path) => {
                if name == Name::Nvrtc {
                    for builtins in builtins_beside(path, candidate.major) {
                        Self::open_as(&builtins)?;
                    }
                }
                Self::open_as(path)
            }
        }
    }

    /// Opens a path, or, if there is no slash in it, what the loader finds under this name.
    fn open_as(path: &Path) -> Result<Self, String> {
        let from = path.display().to_string();
        let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{from}: a zero byte in a path"))?;
        // Local: two versions of NVRTC in one process keep their symbols apart. The loader finds an open library by its SONAME
        // either way.
        // SAFETY: `c_path` ends with a zero. Opening runs the library's initializers, which is what the caller asks for.
        let handle = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Self { handle, from }),
            None => Err(last_loader_error(&from)),
        }
    }

    /// The address of a function or variable of the library.
    pub(crate) fn symbol(&self, name: &CStr) -> Result<NonNull<c_void>, String> {
        // SAFETY: the handle is that of an open library, `name` ends with a zero.
        let address = unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) };
        NonNull::new(address).ok_or_else(|| format!("{} has no {}", self.from, name.to_string_lossy()))
    }
}

/// `libnvrtc-builtins.so.13.0` and the like beside a `libnvrtc.so.13`.
fn builtins_beside(nvrtc: &Path, major: u32) -> Vec<PathBuf> {
    let prefix = format!("libnvrtc-builtins.so.{major}.");
    let entries = nvrtc.parent().map(fs::read_dir).into_iter().flatten().flatten().flatten();
    let names = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let mut found: Vec<PathBuf> = names.map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn last_loader_error(what: &str) -> String {
    // SAFETY: `dlerror` returns null or a string of this thread, valid until its next call.
    let text = unsafe {
        let error = libc::dlerror();
        (!error.is_null()).then(|| CStr::from_ptr(error).to_string_lossy().into_owned())
    };
    text.unwrap_or_else(|| format!("{what}: the loader gave no reason"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::test_folder::TestFolder;

    fn places(root: &Path, variables: &[(&str, String)]) -> Places {
        Places::find(root, &|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    /// The candidates as text: paths without the root, names in angle brackets.
    fn list(places: &Places, root: &Path, name: Name, newest: Option<u32>) -> Vec<String> {
        let show = |candidate: Candidate| match candidate.at {
            At::File(path) => path.strip_prefix(root).unwrap().display().to_string(),
            At::Loader(name) => format!("<{name}>"),
        };
        places.candidates(name, newest).into_iter().map(show).collect()
    }

    #[test]
    fn nothing_installed_leaves_the_loader_to_ask() {
        let root = TestFolder::new();
        let places = places(root.path(), &[]);
        assert_eq!(list(&places, root.path(), Name::Driver, None), ["<libcuda.so.1>"]);
        assert_eq!(list(&places, root.path(), Name::Nvrtc, None), ["<libnvrtc.so.13>", "<libnvrtc.so.12>"]);
        assert_eq!(list(&places, root.path(), Name::CublasLt, Some(12)), ["<libcublasLt.so.12>"]);
    }

    #[test]
    fn named_folders_then_toolkits_then_the_loader_then_wheels() {
        let root = TestFolder::new();
        for file in [
            "named/libnvrtc.so.12",
            "home/targets/sbsa-linux/lib/libnvrtc.so.13",
            "usr/local/cuda/lib64/libnvrtc.so.13",
            "usr/local/cuda-12.9/lib64/libnvrtc.so.12",
            "usr/local/cuda-12.10/targets/x86_64-linux/lib/libnvrtc.so.12",
            "venv/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "tools/bin/python3",
            "tools/lib/python3.9/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "tools/lib/python3.13/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "usr/lib/python3/dist-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "user/.local/lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
        ] {
            root.write(file, b"");
        }
        let at = |folder: &str| root.path().join(folder).display().to_string();
        let path = format!("{}:{}", at("nowhere/bin"), at("tools/bin"));
        let variables = [
            (VARIABLE, format!("{}:{}", at("missing"), at("named"))),
            ("CUDA_HOME", at("home")),
            ("VIRTUAL_ENV", at("venv")),
            ("PATH", path),
            ("HOME", at("user")),
        ];
        let found = list(&places(root.path(), &variables), root.path(), Name::Nvrtc, None);
        let wanted = [
            "named/libnvrtc.so.12",
            "home/targets/sbsa-linux/lib/libnvrtc.so.13",
            "usr/local/cuda/lib64/libnvrtc.so.13",
            "usr/local/cuda-12.10/targets/x86_64-linux/lib/libnvrtc.so.12",
            "usr/local/cuda-12.9/lib64/libnvrtc.so.12",
            "<libnvrtc.so.13>",
            "<libnvrtc.so.12>",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "venv/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "tools/lib/python3.13/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "tools/lib/python3.9/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "usr/lib/python3/dist-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "user/.local/lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn an_older_driver_gets_older_libraries() {
        let root = TestFolder::new();
        let folder = "opt/conda/lib";
        root.write(&format!("{folder}/libcublasLt.so.13"), b"");
        root.write(&format!("{folder}/libcublasLt.so.12"), b"");
        let places = places(root.path(), &[("CONDA_PREFIX", root.path().join("opt/conda").display().to_string())]);
        let found = |newest| list(&places, root.path(), Name::CublasLt, newest);
        let (new, old) = (format!("{folder}/libcublasLt.so.13"), format!("{folder}/libcublasLt.so.12"));
        assert_eq!(found(None), [&new, &old, "<libcublasLt.so.13>", "<libcublasLt.so.12>"]);
        assert_eq!(found(Some(12)), [&old, "<libcublasLt.so.12>"]);
    }

    #[test]
    fn a_driver_is_the_loaders_affair_first_and_never_a_toolkits_stub() {
        let root = TestFolder::new();
        root.write("usr/local/cuda/lib64/stubs/libcuda.so", b"");
        root.write("usr/local/nvidia/lib64/libcuda.so.1", b"");
        let found = list(&places(root.path(), &[]), root.path(), Name::Driver, None);
        assert_eq!(found, ["<libcuda.so.1>", "usr/local/nvidia/lib64/libcuda.so.1"]);
    }

    #[test]
    fn what_is_no_library_is_passed_over_and_told() {
        let root = TestFolder::new();
        root.write("a/libcublasLt.so.13", b"not a library");
        let places = Places { named: vec![root.path().join("a")], ..Places::default() };
        let opened =
            places.open(Name::CublasLt, None, |library| match library.from.contains(&*root.path().to_string_lossy()) {
                true => Ok(()),
                false => Err("the system's own".to_string()),
            });
        let Err(KernelError::Library { name, looked_in }) = opened else { panic!("opened: {opened:?}") };
        assert_eq!(name, "libcublasLt.so");
        assert!(looked_in.contains("a/libcublasLt.so.13"), "{looked_in}");
    }

    #[test]
    fn only_builtins_of_the_same_version_are_opened() {
        let root = TestFolder::new();
        for file in ["libnvrtc-builtins.so.13.0", "libnvrtc-builtins.so.12.9", "libnvrtc-builtins.alt.so.13.0"] {
            root.write(file, b"");
        }
        let found = builtins_beside(&root.path().join("libnvrtc.so.13"), 13);
        assert_eq!(found, [root.path().join("libnvrtc-builtins.so.13.0")]);
    }

    #[test]
    fn an_open_library_has_symbols() {
        let library = Library::open_as(Path::new("libc.so.6")).unwrap();
        assert!(library.symbol(c"strlen").is_ok());
        let missing = library.symbol(c"dashinfer_has_no_such_symbol").unwrap_err();
        assert!(missing.contains("dashinfer_has_no_such_symbol"), "{missing}");
        assert!(Library::open_as(Path::new("libdashinfer-none.so")).is_err());
    }
}
