//! From a file of device code to machine code for one device: images first, then the cache, then NVRTC.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::arch::Arch;
use super::cache::{Cache, fnv1a_128};
use super::images::{self, Images};
use super::library::Places;
use super::nvrtc::{Compiled, Nvrtc, Source};
use super::units::{HEADERS, Unit};
use crate::KernelError;

/// Options of every compilation. Divisions and square roots are exact, denormals are kept: the defaults, and the reference's
/// arithmetic.
const OPTIONS: &[&str] = &["--std=c++17"];

/// Names an archive of images.
const IMAGES_VARIABLE: &str = "DASHINFER_KERNEL_IMAGES";
/// The archive that is looked for beside the program.
const IMAGES_FILE: &str = "kernels.dki";

/// Where kernels come from. The defaults fit a machine with a compiler.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct KernelSettings {
    /// Images that the program brings (`include_bytes!`), to be used before a compiler. Default: the archive that
    /// `DASHINFER_KERNEL_IMAGES` names, else `kernels.dki` beside the program if it is there.
    pub images: Option<&'static [u8]>,
    /// The folder that keeps compiled kernels for later processes. Default: `$DASHINFER_KERNEL_CACHE`, else
    /// `dashinfer/kernels` in `$XDG_CACHE_HOME` or `~/.cache`.
    pub cache: Option<PathBuf>,
}

impl KernelSettings {
    /// Sets [`images`](Self::images).
    #[must_use]
    pub fn images(mut self, archive: &'static [u8]) -> Self {
        self.images = Some(archive);
        self
    }

    /// Sets [`cache`](Self::cache).
    #[must_use]
    pub fn cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = Some(folder.into());
        self
    }
}

/// What makes a device's kernels. NVRTC is opened for the first kernel that has no image.
#[derive(Debug)]
pub(crate) struct Compiler {
    arch: Arch,
    images: Option<Images>,
    cache: Cache,
    places: Places,
    /// CUDA's major version of the driver: it loads no code of later compilers.
    newest: Option<u32>,
    nvrtc: OnceLock<Result<Nvrtc, KernelError>>,
}

impl Compiler {
    /// Kernels for `arch`. `newest`: see [`Nvrtc::find`].
    ///
    /// # Errors
    /// [`KernelError::Images`] if the archive cannot be read.
    pub(crate) fn new(
        arch: Arch,
        settings: &KernelSettings,
        places: Places,
        newest: Option<u32>,
    ) -> Result<Self, KernelError> {
        let cache = settings.cache.as_deref().map_or_else(Cache::of_this_user, Cache::in_folder);
        let images = match (settings.images, std::env::var_os(IMAGES_VARIABLE)) {
            (Some(bytes), _) => Some(Images::from_bytes(bytes)?),
            (None, Some(path)) if !path.is_empty() => Some(Images::open(Path::new(&path))?),
            (None, _) => {
                let program = std::env::current_exe().ok();
                let beside = program.map(|program| program.with_file_name(IMAGES_FILE)).filter(|path| path.is_file());
                beside.as_deref().map(Images::open).transpose()?
            }
        };
        Ok(Self { arch, images, cache, places, newest, nvrtc: OnceLock::new() })
    }

    /// The machine code of `unit` with these options, in any order.
    ///
    /// # Errors
    /// [`KernelError::Compile`], or [`KernelError::Library`] if there is no image and no compiler.
    pub(crate) fn machine_code(&self, unit: &Unit, options: &[&str]) -> Result<Vec<u8>, KernelError> {
        if let Some(images) = &self.images {
            for arch in self.arch.runs() {
                if let Some(image) = images.get(&image_key(unit, arch, options))? {
                    return Ok(image);
                }
            }
        }
        let opened = self.nvrtc.get_or_init(|| Nvrtc::open(&self.places, self.arch, self.newest));
        let nvrtc = opened.as_ref().map_err(KernelError::clone)?;
        let target = nvrtc.target(self.arch).expect("opened because it knows the architecture");
        let key = cache_key(unit, target, options, &nvrtc.version());
        if let Some(cubin) = self.cache.get(key.as_bytes()) {
            return Ok(cubin);
        }
        let compiled = compile(nvrtc, unit, target, options, &[])?;
        self.cache.put(key.as_bytes(), &compiled.cubin);
        Ok(compiled.cubin)
    }
}

/// Compiles a unit. `reports` are options that change what is said and not what is made.
///
/// # Errors
/// [`KernelError::Compile`].
pub fn compile(
    nvrtc: &Nvrtc,
    unit: &Unit,
    arch: Arch,
    options: &[&str],
    reports: &[&str],
) -> Result<Compiled, KernelError> {
    let source = Source { name: unit.name, text: unit.source, headers: HEADERS };
    let options = sorted(options);
    let all: Vec<&str> = OPTIONS.iter().chain(&options).chain(reports).copied().collect();
    nvrtc.compile(source, arch, &all)
}

/// An archive of images of these compilations: unit, architecture, options, machine code.
#[must_use]
pub fn archive(images: Vec<(&Unit, Arch, Vec<String>, Vec<u8>)>) -> Vec<u8> {
    let key =
        |unit, arch, options: &[String]| image_key(unit, arch, &options.iter().map(String::as_str).collect::<Vec<_>>());
    let keyed = images.into_iter().map(|(unit, arch, options, cubin)| (key(unit, arch, &options), cubin));
    images::archive(&keyed.collect::<Vec<_>>())
}

/// Names an image: `rms_norm.cu sm_80 --std=c++17 -DDASH_TYPE=bf16 <fingerprint of the sources>`.
///
/// Who built the archive named its images from the same sources, or from others by accident: 128 bits tell these apart.
fn image_key(unit: &Unit, arch: Arch, options: &[&str]) -> String {
    let fingerprint = fnv1a_128(sources(unit).as_bytes());
    format!("{} {fingerprint:032x}", description(unit, arch, options))
}

/// Everything that decides what the compiler makes.
fn cache_key(unit: &Unit, arch: Arch, options: &[&str], compiler: &str) -> String {
    format!("NVRTC {compiler} {}\n{}", description(unit, arch, options), sources(unit))
}

fn description(unit: &Unit, arch: Arch, options: &[&str]) -> String {
    let options: Vec<&str> = OPTIONS.iter().copied().chain(sorted(options)).collect();
    format!("{} {} {}", unit.name, arch.target(), options.join(" "))
}

/// The texts that the compiler reads, each behind its length, so that no two lists of texts look alike.
fn sources(unit: &Unit) -> String {
    let texts = std::iter::once((unit.name, unit.source)).chain(HEADERS.iter().copied());
    texts.map(|(name, text)| format!("{name} {}\n{text}", text.len())).collect()
}

/// Macros do not depend on their order; keys should not either.
fn sorted<'a>(options: &[&'a str]) -> Vec<&'a str> {
    let mut options = options.to_vec();
    options.sort_unstable();
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::test_folder::TestFolder;

    static UNIT: Unit = Unit {
        name: "fill.cu",
        source: "#include \"common.cuh\"\nextern \"C\" __global__ void KERNEL(fill)(T* x) { x[threadIdx.x] = from_float<T>(VALUE); }",
    };
    const ONE: &[&str] = &["-DDASH_TYPE=f16", "-DVALUE=1"];

    fn one() -> Vec<String> {
        ONE.iter().map(ToString::to_string).collect()
    }

    fn compiler(settings: &KernelSettings, places: Places) -> Compiler {
        Compiler::new(Arch::new(8, 7), settings, places, None).unwrap()
    }

    #[test]
    fn an_image_is_used_before_a_compiler_is_opened() {
        let images = vec![
            (&UNIT, Arch::SM80, one(), b"for sm_80".to_vec()),
            (&UNIT, Arch::SM86, one(), b"for sm_86".to_vec()),
            (&UNIT, Arch::SM89, one(), b"for sm_89".to_vec()),
        ];
        let folder = TestFolder::new();
        let settings = KernelSettings::default().images(archive(images).leak()).cache(folder.path());
        let compiler = compiler(&settings, Places::default());
        let found = compiler.machine_code(&UNIT, &["-DVALUE=1", "-DDASH_TYPE=f16"]).unwrap();
        assert_eq!(found, b"for sm_86", "the nearest that an 8.7 runs");
        assert!(compiler.nvrtc.get().is_none());
    }

    #[test]
    fn an_image_of_other_sources_is_not_used() {
        let other = Unit { name: "fill.cu", source: "// changed" };
        assert_ne!(image_key(&other, Arch::SM80, ONE), image_key(&UNIT, Arch::SM80, ONE));
        assert_ne!(cache_key(&other, Arch::SM80, ONE, "13.0"), cache_key(&UNIT, Arch::SM80, ONE, "13.0"));
        assert_ne!(cache_key(&UNIT, Arch::SM80, ONE, "12.9"), cache_key(&UNIT, Arch::SM80, ONE, "13.0"));
        assert_ne!(cache_key(&UNIT, Arch::SM86, ONE, "13.0"), cache_key(&UNIT, Arch::SM80, ONE, "13.0"));
        let two = &["-DDASH_TYPE=f16", "-DVALUE=2"];
        assert_ne!(image_key(&UNIT, Arch::SM80, two), image_key(&UNIT, Arch::SM80, ONE));
    }

    #[test]
    fn what_was_compiled_once_is_read_from_the_cache() {
        let folder = TestFolder::new();
        let cache = Cache::in_folder(folder.path());
        let (settings, places) = (KernelSettings::default().cache(folder.path()), Places::of_this_process());
        let first = compiler(&settings, places.clone());
        let code = match first.machine_code(&UNIT, ONE) {
            Err(KernelError::Library { .. }) => return println!("skipped: no compiler on this machine"),
            code => code.unwrap(),
        };
        assert!(code.starts_with(b"\x7fELF"));
        // Put something else in its place: a second look is answered from there.
        let nvrtc = first.nvrtc.get().unwrap().as_ref().unwrap();
        let key = cache_key(&UNIT, nvrtc.target(first.arch).unwrap(), ONE, &nvrtc.version());
        assert_eq!(cache.get(key.as_bytes()), Some(code));
        cache.put(key.as_bytes(), b"from the cache");
        assert_eq!(compiler(&settings, places).machine_code(&UNIT, ONE).unwrap(), b"from the cache");
    }
}
