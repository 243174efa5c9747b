//! Large zeroed buffers that start on a cache line, and on a huge page where that helps.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ptr::NonNull;

use bytemuck::{AnyBitPattern, NoUninit};

use crate::KernelError;

/// Buffers from this size on are aligned to [`HUGE_PAGE`], so that the system can back them with huge pages: streaming
/// weights through 4 KiB pages costs a TLB miss every 4 KiB.
#[cfg(target_os = "linux")]
const HUGE_FROM: usize = 4 << 20;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;
pub(crate) const CACHE_LINE: usize = 64;

/// A fixed-length, zero-initialized slice of plain values, aligned to a cache line. Pages that are never touched take no
/// memory; on Linux, a large buffer is a mapping of its own, so that dropping it gives the memory back to the system, which
/// an allocator may put off.
#[derive(Debug)]
pub(crate) struct AlignedBuf<T> {
    start: NonNull<T>,
    len: usize,
    memory: Memory,
    _owns: PhantomData<T>,
}

/// What is to be given back.
#[derive(Debug)]
enum Memory {
    Heap(Layout),
    #[cfg(target_os = "linux")]
    Mapping {
        start: *mut libc::c_void,
        bytes: usize,
    },
}

// SAFETY: the buffer owns its memory exclusively, as a `Vec<T>` does.
unsafe impl<T: Send> Send for AlignedBuf<T> {}
// SAFETY: shared access gives only `&[T]`, as with a `Vec<T>`.
unsafe impl<T: Sync> Sync for AlignedBuf<T> {}

impl<T: NoUninit + AnyBitPattern> AlignedBuf<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] if the system does not give the memory, or the size overflows.
    pub(crate) fn zeroed(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(size_of::<T>());
        let out_of_memory = || KernelError::OutOfMemory { what, wanted_bytes: bytes };
        // Miri follows every byte, and a mapping would be all of its time.
        #[cfg(all(target_os = "linux", not(miri)))]
        if bytes >= HUGE_FROM {
            let (start, memory) = map(bytes).ok_or_else(out_of_memory)?;
            return Ok(Self { start: start.cast(), len, memory, _owns: PhantomData });
        }
        let layout = Layout::from_size_align(bytes.max(1), CACHE_LINE).map_err(|_| out_of_memory())?;
        // SAFETY: the layout has a non-zero size.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        Ok(Self { start: start.cast(), len, memory: Memory::Heap(layout), _owns: PhantomData })
    }
}

/// Zeroed memory from the system, aligned to a huge page and advised to be made of such.
#[cfg(all(target_os = "linux", not(miri)))]
fn map(bytes: usize) -> Option<(NonNull<u8>, Memory)> {
    // Mappings are aligned to a page; the rest of the alignment is room to move the start.
    let mapped = bytes.checked_add(HUGE_PAGE).filter(|&mapped| isize::try_from(mapped).is_ok())?;
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new private mapping at a place of the system's choice touches no memory of others.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, access, kind, -1, 0) };
    if start == libc::MAP_FAILED {
        return None;
    }
    let aligned = start.map_addr(|address| address.next_multiple_of(HUGE_PAGE));
    // A hint; a kernel without huge pages refuses it, and nothing is lost.
    // SAFETY: the range lies in the mapping, starts on a page, and the advice does not change its contents.
    unsafe { libc::madvise(aligned, bytes, libc::MADV_HUGEPAGE) };
    Some((NonNull::new(aligned.cast())?, Memory::Mapping { start, bytes: mapped }))
}

impl<T> AlignedBuf<T> {
    /// The start, for kernels whose threads write disjoint parts. Valid for `len` elements as long as the buffer lives.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.start.as_ptr()
    }
}

impl<T> std::ops::Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `start` is valid for `len` elements, all initialized (zeroed bytes are a valid `T`: `zeroed` asks for
        // `AnyBitPattern`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> std::ops::DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for AlignedBuf<T> {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated in `zeroed` with this layout, and given back once.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
            #[cfg(target_os = "linux")]
            Memory::Mapping { start, bytes } => {
                // SAFETY: mapped in `map` with this size, and given back once. It cannot fail for a mapping of ours.
                unsafe { libc::munmap(start, bytes) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_may_be_empty() {
        for len in [0, 1, 17, if cfg!(miri) { 3 << 10 } else { 3 << 20 }] {
            let mut buf = AlignedBuf::<f32>::zeroed("test", len).unwrap();
            assert_eq!(buf.as_mut_ptr() as usize % CACHE_LINE, 0);
            assert!(buf.len() == len && buf.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn absurd_sizes_are_out_of_memory() {
        let error = AlignedBuf::<f32>::zeroed("a test", usize::MAX / 8).unwrap_err();
        assert!(error.to_string().contains("bytes for a test"), "{error}");
    }
}
