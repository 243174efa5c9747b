//! What the targets share: a folder to write files into, a bound on memory, and how a panic is told from one that was caught.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock};

/// The most bytes that are allocated at any time. Inputs are of some kilobytes.
const MAX_BYTES: usize = 1 << 30;

/// Ends the process when more than [`MAX_BYTES`] are allocated, touched or not, so that the input is kept as a crash.
struct Bounded;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

impl Bounded {
    fn take(bytes: usize) {
        if ALLOCATED.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > MAX_BYTES {
            ALLOCATED.store(0, Ordering::Relaxed); // what prints the message allocates
            eprintln!("more than {MAX_BYTES} bytes are allocated, the last {bytes} of them at once");
            std::process::abort();
        }
    }
}

// SAFETY: all is done by the system's allocator.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::take(layout.size());
        // SAFETY: as promised to this method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::take(layout.size());
        // SAFETY: as promised to this method.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised to this method.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        Self::take(bytes);
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised to this method.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// Runs a target's body. A panic that leaves it is a crash; one that is caught within, as those of the reader of tokenizers are, is
/// not, whatever the hook of `libfuzzer-sys` thinks of it. With `RUST_BACKTRACE` every panic prints.
pub fn run(body: impl FnOnce()) {
    static LAST: Mutex<String> = Mutex::new(String::new());
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let _ = std::panic::take_hook();
        let print = std::env::var_os("RUST_BACKTRACE").is_some();
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if print {
                default(panic);
            }
            if let Ok(mut last) = LAST.lock() {
                *last = panic.to_string();
            }
        }));
    });
    if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
        eprintln!("{}", LAST.lock().map(|last| last.clone()).unwrap_or_default());
        resume_unwind(panic);
    }
}

/// A folder of this process.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("dashinfer-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("the folder for temporary files can be written to");
        folder
    })
}

/// A file in [`folder`]; `None` removes it.
pub fn file(name: &str, bytes: Option<&[u8]>) -> PathBuf {
    let path = folder().join(name);
    // Removed before it is written again: what is mapped must not change.
    let _ = std::fs::remove_file(&path);
    if let Some(bytes) = bytes {
        std::fs::write(&path, bytes).expect("the folder for temporary files can be written to");
    }
    path
}

/// The parts of an input between bytes of 0xff, which no text in UTF-8 has: a fixed number, those that are not there empty.
pub fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == 0xff);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}
