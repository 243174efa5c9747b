//! Matrices of all experts of a layer in one tensor, each transposed: taking one, or every other of its rows, out of it.

use crate::weights::Stacked;

/// Rows that are written side by side while columns of them are read: as many lines as stay in the first cache.
const BLOCK: usize = 64;

impl Stacked {
    /// Its `rows` rows of `cols` values, of the tensor `[count, cols, width]` with elements of `size` bytes. Nothing if that is shorter.
    pub(crate) fn rows(&self, tensor: &[u8], [rows, cols]: [usize; 2], size: usize) -> Vec<u8> {
        let matrix_bytes = cols * self.width * size;
        let matrix = tensor.get(self.index * matrix_bytes..).and_then(|rest| rest.get(..matrix_bytes));
        match (matrix, size) {
            (Some(matrix), 2) => self.transposed::<2>(matrix, rows, cols),
            (Some(matrix), 4) => self.transposed::<4>(matrix, rows, cols),
            _ => Vec::new(),
        }
    }

    /// Its values of the tensor `[count, width]`, likewise.
    pub(crate) fn values(&self, tensor: &[u8], count: usize, size: usize) -> Vec<u8> {
        let row_bytes = self.width * size;
        let row = tensor.get(self.index * row_bytes..).and_then(|rest| rest.get(..row_bytes)).unwrap_or_default();
        let values = row.chunks_exact(size).skip(self.first).step_by(self.step).take(count);
        values.flatten().copied().collect()
    }

    fn transposed<const SIZE: usize>(&self, matrix: &[u8], rows: usize, cols: usize) -> Vec<u8> {
        let from: &[[u8; SIZE]] = matrix.as_chunks().0;
        let mut bytes = vec![0; rows * cols * SIZE];
        let to: &mut [[u8; SIZE]] = bytes.as_chunks_mut().0;
        for (block, to) in to.chunks_mut((BLOCK * cols).max(1)).enumerate() {
            let first = self.first + block * BLOCK * self.step;
            for (col, from) in from.chunks_exact(self.width.max(1)).enumerate() {
                for (row, from) in to.chunks_exact_mut(cols).zip(from[first..].iter().step_by(self.step)) {
                    row[col] = *from;
                }
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_taken_out_and_transposed() {
        let (count, cols, width) = (3, 5, 2 * 70);
        let element = |index: usize, col: usize, place: usize| (index * 10_000 + col * 1000 + place) as u16;
        let all = (0..count).flat_map(|i| (0..cols).flat_map(move |col| (0..width).map(move |at| element(i, col, at))));
        let tensor: Vec<u8> = all.flat_map(u16::to_le_bytes).collect();
        for (first, step) in [(0, 2), (1, 2), (0, 1)] {
            let stacked = Stacked { index: 2, count, width, first, step };
            let rows = width / step;
            let wanted = (0..rows).flat_map(|row| (0..cols).map(move |col| element(2, col, first + step * row)));
            let wanted: Vec<u8> = wanted.flat_map(u16::to_le_bytes).collect();
            assert_eq!(stacked.rows(&tensor, [rows, cols], 2), wanted);
            assert!(stacked.rows(&tensor[1..], [rows, cols], 2).is_empty());
            // As the biases of a layer with 15 experts.
            let stacked = Stacked { index: 11, ..stacked };
            let wanted: Vec<u8> = (0..rows).flat_map(|row| element(2, 1, first + step * row).to_le_bytes()).collect();
            assert_eq!(stacked.values(&tensor, rows, 2), wanted);
            assert!(stacked.values(&tensor[..30], rows, 2).is_empty());
        }
    }
}
