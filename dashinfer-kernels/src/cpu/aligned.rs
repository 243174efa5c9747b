//! Large zeroed buffers that start on a cache line, and on a huge page where that helps.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ptr::NonNull;

use bytemuck::{AnyBitPattern, NoUninit};

use crate::KernelError;

/// Buffers from this size on are aligned to [`HUGE_PAGE`], so that the system can back them with huge pages: streaming
/// weights through 4 KiB pages costs a TLB miss every 4 KiB.
const HUGE_FROM: usize = 4 << 20;
const HUGE_PAGE: usize = 2 << 20;
const CACHE_LINE: usize = 64;

/// A fixed-length, zero-initialized slice of plain values, aligned to a cache line. Pages that are never touched take no
/// memory.
#[derive(Debug)]
pub(crate) struct AlignedBuf<T> {
    start: NonNull<T>,
    len: usize,
    layout: Layout,
    _owns: PhantomData<T>,
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
        let out_of_memory = KernelError::OutOfMemory { what, wanted_bytes: bytes };
        let align = if bytes >= HUGE_FROM { HUGE_PAGE } else { CACHE_LINE };
        let Ok(layout) = Layout::from_size_align(bytes.max(1), align) else { return Err(out_of_memory) };
        // SAFETY: the layout has a non-zero size.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { return Err(out_of_memory) };
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_FROM {
            // A hint; a kernel without huge pages refuses it, and nothing is lost.
            // SAFETY: the range was just allocated, is page-aligned, and the advice does not change its contents.
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Self { start: start.cast(), len, layout, _owns: PhantomData })
    }
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
        // SAFETY: allocated in `zeroed` with this layout, and given back once.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_may_be_empty() {
        for len in [0, 1, 17, 3 << 20] {
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
