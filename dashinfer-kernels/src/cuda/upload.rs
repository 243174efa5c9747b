//! Weights to the device at the speed of the bus: threads copy from mapped files into pinned memory, piece by piece, while
//! earlier pieces are on their way. Weights that were stored quantized are decoded there, a tile at a time.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};

use super::device::Device;
use super::memory::{Buffer, Event, Pinned};
use crate::{DType, KernelError, StoredMatrix, element};

/// Bytes of a piece, as they arrive on the device.
const PIECE: usize = 8 << 20;
/// Threads that copy. A page cache is read at some 5 to 10 GB/s by one thread, and the bus takes 50.
const THREADS: usize = 6;

/// Output and input features of a tile that is decoded at once: reading few rows of a format that keeps columns together costs
/// whole cache lines.
const TILE: [usize; 2] = [16, 512];

/// A run of values to be uploaded.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Little-endian values of `dtype`, not necessarily aligned.
    Plain { bytes: &'a [u8], dtype: DType },
    /// The weights of a matrix, row after row. Its shape was checked.
    Stored(&'a dyn StoredMatrix),
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
struct Piece<'a> {
    values: Values<'a>,
    /// In bytes of the destination.
    offset: usize,
}

/// What a piece is made of.
enum Values<'a> {
    Plain { bytes: &'a [u8], dtype: DType },
    Tile { matrix: &'a dyn StoredMatrix, rows: Range<usize>, cols: Range<usize> },
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Plain { bytes, dtype } => bytes.len() / dtype.size_bytes(),
            Self::Tile { rows, cols, .. } => rows.len() * cols.len(),
        }
    }
}

impl<'a> Source<'a> {
    /// Its values in pieces of at most `most`.
    fn pieces(self, most: usize) -> Vec<Values<'a>> {
        match self {
            Self::Plain { bytes, dtype } => {
                let whole = bytes.len() / dtype.size_bytes() * dtype.size_bytes();
                bytes[..whole].chunks(most * dtype.size_bytes()).map(|bytes| Values::Plain { bytes, dtype }).collect()
            }
            Self::Stored(matrix) => {
                let (num_rows, num_cols) = (matrix.rows(), matrix.cols());
                if num_cols == 0 {
                    return Vec::new();
                }
                // Whole rows, or parts of one that is longer than a piece.
                let (of_rows, of_cols) = ((most / num_cols).max(1), num_cols.min(most));
                let tiles = |row: usize| {
                    let rows = row..num_rows.min(row + of_rows);
                    (0..num_cols).step_by(of_cols).map(move |col| Values::Tile {
                        matrix,
                        rows: rows.clone(),
                        cols: col..num_cols.min(col + of_cols),
                    })
                };
                (0..num_rows).step_by(of_rows).flat_map(tiles).collect()
            }
        }
    }
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
            for values in source.pieces(PIECE / size) {
                let len = values.len();
                pieces.push(Piece { values, offset });
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
            let bytes = piece.values.len() * dtype.size_bytes();
            convert(&mut pinned.as_mut_slice()[..bytes], &piece.values, dtype);
            pinned.start_upload(to, piece.offset, bytes)?;
            done.record()?;
        }
        Ok(())
    }
}

/// Writes values as `dtype`, rounded to nearest.
fn convert(to: &mut [u8], values: &Values<'_>, dtype: DType) {
    match values {
        Values::Plain { bytes, dtype: stored } if *stored == dtype => to.copy_from_slice(bytes),
        Values::Plain { bytes, dtype: stored } => {
            let len = bytes.len() / stored.size_bytes();
            write(to, (0..len).map(|i| element(bytes, *stored, i)), dtype);
        }
        Values::Tile { matrix, rows, cols } => {
            let (size, [most_rows, most_cols]) = (dtype.size_bytes(), TILE);
            let mut tile = vec![0.0; most_rows * most_cols];
            for row in rows.clone().step_by(most_rows) {
                let of_rows = row..rows.end.min(row + most_rows);
                for col in cols.clone().step_by(most_cols) {
                    let of_cols = col..cols.end.min(col + most_cols);
                    let tile = &mut tile[..of_rows.len() * of_cols.len()];
                    matrix.values(of_rows.clone(), of_cols.clone(), tile);
                    for (row, values) in of_rows.clone().zip(tile.chunks_exact(of_cols.len())) {
                        let at = ((row - rows.start) * cols.len() + (col - cols.start)) * size;
                        write(&mut to[at..at + of_cols.len() * size], values.iter().copied(), dtype);
                    }
                }
            }
        }
    }
}

fn write(to: &mut [u8], values: impl Iterator<Item = f32>, dtype: DType) {
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
    use crate::{CodeBits, CodeLayout, GroupedCodes, to_f32};

    #[test]
    fn values_are_converted_to_the_nearest() {
        let source: Vec<u8> =
            [1.0f32, -2.5, 3.140_625, 1.0 + 1.0 / 512.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut to = [0; 6];
        convert(&mut to, &Values::Plain { bytes: &source[4..], dtype: DType::F32 }, DType::BF16);
        let found: Vec<f32> = (0..3).map(|i| element(&to, DType::BF16, i)).collect();
        assert_eq!(found, [-2.5, 3.140_625, 1.0]);
    }

    #[test]
    fn pieces_of_a_stored_matrix_are_its_weights_row_after_row() {
        // More rows and columns than a tile has, and a tail of each; groups that end within.
        let (rows, cols, group) = (37usize, 1100usize, 32);
        let layout = CodeLayout { bits: CodeBits::Eight, group: Some(group), zero_points: true };
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 31 % 251) as u8).collect();
        let groups = cols.div_ceil(group);
        let scales: Vec<f32> = (0..rows * groups).map(|i| 0.5 + i as f32 / 1024.0).collect();
        let zeros: Vec<u8> = (0..rows * groups).map(|i| (i % 7) as u8).collect();
        let order: Vec<u32> = (0..cols as u32).rev().collect();
        let matrix = GroupedCodes::new([rows, cols], layout, &codes, &scales, &zeros).unwrap();
        let mut want = vec![0.0; rows * cols];
        for matrix in [matrix, matrix.with_order(&order)] {
            matrix.values(0..rows, 0..cols, &mut want);
            // Several rows to a piece, one, and less.
            for most in [3 * cols + 5, cols, 700, 1 << 20] {
                let mut found = Vec::new();
                for values in Source::Stored(&matrix).pieces(most) {
                    assert!(values.len() <= most);
                    let mut bytes = vec![0xff; values.len() * 4];
                    convert(&mut bytes, &values, DType::F32);
                    found.extend(to_f32(&bytes, DType::F32));
                }
                assert!(found == want, "pieces of {most}");
            }
        }
    }

    #[test]
    fn sources_arrive_one_after_the_other() {
        let Some(device) = test_device() else { return };
        let byte = |i: usize| (i * 7 + i / 251) as u8;
        let one: Vec<u8> = (0..3 * PIECE + 10).map(byte).collect();
        let two: Vec<u8> = (0..6).map(|i| byte(i + 5)).collect();
        let buffer = device.alloc("test", one.len() + two.len()).unwrap();
        let source = |bytes| Source::Plain { bytes, dtype: DType::BF16 };
        let uploader = Uploader::new(&device);
        uploader.upload(&buffer, &[source(&one), source(&two)], DType::BF16).unwrap();
        let mut found = vec![0; buffer.bytes()];
        buffer.download(0, &mut found).unwrap();
        assert!(found[..one.len()] == one && found[one.len()..] == two);
    }
}
