//! Weights to the device at the speed of the bus: threads copy from mapped files into pinned memory, piece by piece, while
//! earlier pieces are on their way.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};

use super::device::Device;
use super::memory::{Buffer, Event, Pinned};
use crate::{DType, KernelError, element};

/// Bytes of a piece, as they arrive on the device.
const PIECE: usize = 8 << 20;
/// Threads that copy. A page cache is read at some 5 to 10 GB/s by one thread, and the bus takes 50.
const THREADS: usize = 6;

/// A run of values to be uploaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// Little-endian values of `dtype`, not necessarily aligned.
    pub(super) bytes: &'a [u8],
    pub(super) dtype: DType,
}

/// Pinned memory for uploads. It is given back when loading is over, by [`Uploader::release`].
#[derive(Debug)]
pub(super) struct Uploader {
    device: Arc<Device>,
    lanes: Mutex<Vec<Lane>>,
}

/// What one thread copies through: two pieces in turn.
#[derive(Debug)]
struct Lane {
    pieces: [(Pinned, Event); 2],
}

/// A piece of one source.
#[derive(Clone, Copy)]
struct Piece<'a> {
    source: Source<'a>,
    first: usize,
    len: usize,
    /// In bytes of the destination.
    offset: usize,
}

impl Uploader {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self { device: Arc::clone(device), lanes: Mutex::default() }
    }

    /// Gives the pinned memory back; a later upload takes new.
    pub(super) fn release(&self) {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Copies `sources`, one after the other and converted to `dtype`, to the start of `to`. They have been read when this
    /// returns; the device has them before any work that is started later.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `to` is too small, [`KernelError::OutOfMemory`] without pinned memory.
    pub(super) fn upload(&self, to: &Buffer, sources: &[Source<'_>], dtype: DType) -> Result<(), KernelError> {
        let size = dtype.size_bytes();
        let mut pieces = Vec::new();
        let mut offset = 0;
        for &source in sources {
            let num_values = source.bytes.len() / source.dtype.size_bytes();
            let step = PIECE / size;
            for first in (0..num_values).step_by(step) {
                let len = step.min(num_values - first);
                pieces.push(Piece { source, first, len, offset });
                offset += len * size;
            }
        }
        if offset > to.bytes() {
            let found = to.bytes();
            return Err(KernelError::Shape { op: "upload", what: "bytes of the weight", wanted: offset, found });
        }
        let wanted = pieces.len().clamp(1, THREADS);
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        while lanes.len() < wanted {
            lanes.push(Lane::new(&self.device)?);
        }
        let next = AtomicUsize::new(0);
        if let [lane] = &mut lanes[..wanted] {
            return lane.copy(&self.device, to, &pieces, &next, dtype);
        }
        std::thread::scope(|scope| {
            let (pieces, next, device) = (&pieces[..], &next, &self.device);
            let threads: Vec<_> = lanes[..wanted]
                .iter_mut()
                .map(|lane| scope.spawn(move || lane.copy(device, to, pieces, next, dtype)))
                .collect();
            // All are joined, whatever the first ones say.
            let results: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            results.into_iter().try_for_each(|result| {
                result.unwrap_or_else(|_| Err(KernelError::Threads("a copying thread panicked".to_owned())))
            })
        })
    }
}

impl Lane {
    fn new(device: &Arc<Device>) -> Result<Self, KernelError> {
        let piece = || Ok((Pinned::new(device, "pinned memory to upload weights", PIECE)?, Event::new(device)?));
        Ok(Self { pieces: [piece()?, piece()?] })
    }

    fn copy(
        &mut self,
        device: &Device,
        to: &Buffer,
        pieces: &[Piece<'_>],
        next: &AtomicUsize,
        dtype: DType,
    ) -> Result<(), KernelError> {
        device.bind()?;
        let mut turn = 0;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (pinned, done) = &mut self.pieces[turn];
            turn = 1 - turn;
            done.wait()?;
            let bytes = piece.len * dtype.size_bytes();
            convert(&mut pinned.as_mut_slice()[..bytes], piece, dtype);
            pinned.start_upload(to, piece.offset, bytes)?;
            done.record()?;
        }
        Ok(())
    }
}

/// Writes the values of a piece as `dtype`, rounded to nearest.
fn convert(to: &mut [u8], piece: &Piece<'_>, dtype: DType) {
    let Piece { source: Source { bytes, dtype: stored }, first, len, .. } = *piece;
    if stored == dtype {
        let size = dtype.size_bytes();
        to.copy_from_slice(&bytes[first * size..][..len * size]);
        return;
    }
    let values = (first..first + len).map(|i| element(bytes, stored, i));
    match dtype {
        DType::F32 => to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = x.to_le_bytes()),
        DType::F16 => {
            to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = f16::from_f32(x).to_le_bytes());
        }
        DType::BF16 => {
            to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, x)| *to = bf16::from_f32(x).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::test_device;
    use super::*;

    #[test]
    fn values_are_converted_to_the_nearest() {
        let source: Vec<u8> =
            [1.0f32, -2.5, 3.140_625, 1.0 + 1.0 / 512.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let piece = Piece { source: Source { bytes: &source, dtype: DType::F32 }, first: 1, len: 3, offset: 0 };
        let mut to = [0; 6];
        convert(&mut to, &piece, DType::BF16);
        let found: Vec<f32> = (0..3).map(|i| element(&to, DType::BF16, i)).collect();
        assert_eq!(found, [-2.5, 3.140_625, 1.0]);
    }

    #[test]
    fn sources_arrive_one_after_the_other() {
        let Some(device) = test_device() else { return };
        let byte = |i: usize| (i * 7 + i / 251) as u8;
        let one: Vec<u8> = (0..3 * PIECE + 10).map(byte).collect();
        let two: Vec<u8> = (0..6).map(|i| byte(i + 5)).collect();
        let buffer = device.alloc("test", one.len() + two.len()).unwrap();
        let source = |bytes| Source { bytes, dtype: DType::BF16 };
        let uploader = Uploader::new(&device);
        uploader.upload(&buffer, &[source(&one), source(&two)], DType::BF16).unwrap();
        let mut found = vec![0; buffer.bytes()];
        buffer.download(0, &mut found).unwrap();
        assert!(found[..one.len()] == one && found[one.len()..] == two);
    }
}
