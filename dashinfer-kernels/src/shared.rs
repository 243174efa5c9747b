//! [`SharedBytes`]: memory that lives as long as somebody holds a part of it.

use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of an owner that is kept alive by them, such as a stretch of a mapped file. Cloning and cutting copy nothing.
#[derive(Clone)]
pub struct SharedBytes {
    start: NonNull<u8>,
    len: usize,
    /// Only kept: it is never mutably borrowed, nor moved out of its allocation, so `start` stays good.
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

// SAFETY: the owner is `Send` and `Sync`, and only `&[u8]` of it is given out.
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    /// All bytes of `owner`.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(owner);
        let bytes = (*owner).as_ref();
        Self { start: NonNull::from(bytes).cast(), len: bytes.len(), owner }
    }

    /// A part of them; `None` if it reaches beyond.
    #[must_use]
    pub fn get(&self, range: Range<usize>) -> Option<Self> {
        let bytes = self.deref().get(range)?;
        Some(Self { start: NonNull::from(bytes).cast(), len: bytes.len(), owner: Arc::clone(&self.owner) })
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` and `len` are those of a slice that was borrowed from `*owner`, or of a part of it. The owner stays
        // where it is and is never mutably borrowed until the last clone of the `Arc` is dropped, so that borrow could have
        // lasted until now.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedBytes").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_outlives_the_whole() {
        let part = {
            let whole = SharedBytes::new(vec![1, 2, 3, 4, 5]);
            assert_eq!(whole.get(4..6).as_deref(), None);
            whole.get(1..4).unwrap().get(1..3).unwrap()
        };
        assert_eq!(*part, [3, 4]);
        assert_eq!(std::thread::spawn(move || part.to_vec()).join().unwrap(), [3, 4]);
        assert!(SharedBytes::new([]).get(0..0).unwrap().is_empty());
    }
}
