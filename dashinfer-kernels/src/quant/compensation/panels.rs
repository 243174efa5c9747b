//! Square matrices in panels of columns, and the two products with them that all the rest is made of.

/// Columns of a panel.
pub(super) const WIDTH: usize = 32;

/// A square matrix in panels of [`WIDTH`] columns, padded to whole ones by rows and columns of the identity.
#[derive(Debug, Clone)]
pub(super) struct Panels {
    /// Rows and columns of the matrix.
    len: usize,
    /// With padding.
    padded: usize,
    /// `[panels][padded]`
    data: Vec<[f32; WIDTH]>,
}

impl Panels {
    /// The matrix with `value(i, j)` in row `i` and column `j`.
    pub(super) fn new(len: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let padded = len.next_multiple_of(WIDTH);
        let mut data = vec![[0.0; WIDTH]; padded / WIDTH * padded];
        for (panel, data) in data.chunks_mut(padded.max(1)).enumerate() {
            for (i, row) in data.iter_mut().enumerate() {
                for (j, to) in (panel * WIDTH..).zip(row) {
                    *to = if i < len && j < len { value(i, j) } else { f32::from(u8::from(i == j)) };
                }
            }
        }
        Self { len, padded, data }
    }

    /// Makes what pads the matrix zero.
    pub(super) fn clear_padding(&mut self) {
        for i in self.len..self.padded {
            self.data[i / WIDTH * self.padded + i][i % WIDTH] = 0.0;
        }
    }

    /// Rows, and columns, with padding.
    pub(super) fn padded(&self) -> usize {
        self.padded
    }

    /// All rows of the panel that starts with column `first`.
    pub(super) fn panel(&self, first: usize) -> &[[f32; WIDTH]] {
        &self.data[first / WIDTH * self.padded..][..self.padded]
    }

    pub(super) fn panel_mut(&mut self, first: usize) -> &mut [[f32; WIDTH]] {
        &mut self.data[first / WIDTH * self.padded..][..self.padded]
    }

    pub(super) fn diagonal(&self, i: usize) -> f32 {
        self.panel(i / WIDTH * WIDTH)[i][i % WIDTH]
    }
}

/// `sums += Σ_i factors[i] · rows[i]`
#[inline(always)]
pub(super) fn add_product(sums: &mut [f32], factors: &[f32], rows: &[[f32; WIDTH]]) {
    let mut own: [f32; WIDTH] = [0.0; WIDTH];
    for (factor, row) in factors.iter().zip(rows) {
        for i in 0..WIDTH {
            own[i] += factor * row[i];
        }
    }
    for (sum, own) in sums.iter_mut().zip(own) {
        *sum += own;
    }
}

/// `values[i] −= rows[i] · factors`
#[inline(always)]
pub(super) fn subtract_dots(values: &mut [f32], rows: &[[f32; WIDTH]], factors: &[f32; WIDTH]) {
    const LANES: usize = 8;
    for (value, row) in values.iter_mut().zip(rows) {
        let mut lanes = [0.0f32; LANES];
        for (row, factors) in row.as_chunks::<LANES>().0.iter().zip(factors.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                lanes[i] += row[i] * factors[i];
            }
        }
        let [a, b, c, d, e, f, g, h] = lanes;
        *value -= ((a + e) + (c + g)) + ((b + f) + (d + h));
    }
}
