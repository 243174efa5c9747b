//! The codes of some output features, each by itself.

use super::factor::Factor;
use super::panels::{Panels, WIDTH, add_product, subtract_dots};
use crate::Scheme;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
use crate::cpu::Isa;
use crate::quant::{int4, nearest, stored_scale};

/// What all output features of a matrix have in common.
pub(super) struct Problem<'a> {
    pub(super) scheme: Scheme,
    /// Input features that share a scale.
    pub(super) group: usize,
    /// `Σ x xᵀ`, damped.
    squares: &'a Panels,
    factor: &'a Factor,
    /// `Σ (y − x) xᵀ`
    shift: &'a Panels,
    /// Passes over all groups after the first.
    sweeps: usize,
}

/// Of some rows: `[rows, cols]`, `[rows, groups]` and `[rows, groups]`.
#[derive(Debug, Default)]
pub(super) struct Codes {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
    pub(super) zeros: Vec<u8>,
}

/// A row on its way.
struct Row {
    /// What its weights should be.
    target: Vec<f32>,
    /// How far they are from it.
    error: Vec<f32>,
    /// Codes less their zeros.
    steps: Vec<f32>,
    /// Of each group.
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl<'a> Problem<'a> {
    pub(super) fn new(
        scheme: Scheme,
        group: usize,
        squares: &'a Panels,
        factor: &'a Factor,
        shift: &'a Panels,
        sweeps: usize,
    ) -> Self {
        Self { scheme, group, squares, factor, shift, sweeps }
    }

    /// The codes of some rows of weights, `[rows, cols]`.
    pub(super) fn solve(&self, weights: &[f32], cols: usize) -> Codes {
        #[cfg(all(feature = "x86", target_arch = "x86_64"))]
        if Isa::Avx2.is_available() {
            // SAFETY: the machine has AVX2.
            return unsafe { self.solve_avx2(weights, cols) };
        }
        self.solve_plain(weights, cols)
    }

    /// # Safety
    /// The machine has AVX2.
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    #[target_feature(enable = "avx2")]
    unsafe fn solve_avx2(&self, weights: &[f32], cols: usize) -> Codes {
        self.solve_plain(weights, cols)
    }

    #[inline(always)]
    fn solve_plain(&self, weights: &[f32], cols: usize) -> Codes {
        let padded = self.squares.padded();
        let mut rows: Vec<Row> = weights.chunks_exact(cols).map(|weights| Row::new(weights, padded)).collect();
        self.find_targets(&mut rows);
        for first in (0..padded).step_by(self.group) {
            for row in &mut rows {
                self.round_group(row, first);
            }
        }
        for _ in 0..self.sweeps {
            for first in (0..padded).step_by(self.group) {
                for row in &mut rows {
                    self.improve_group(row, first);
                }
            }
        }
        let mut found = Codes::default();
        for row in rows {
            let codes = row.steps[..cols].iter().enumerate().map(|(i, step)| (step + row.zeros[i / self.group]) as u8);
            found.codes.extend(codes);
            found.scales.extend(row.scales);
            found.zeros.extend(row.zeros.iter().map(|zero| *zero as u8));
        }
        found
    }

    /// `T = W + W · shift · (L D Lᵀ)⁻¹`
    #[inline(always)]
    fn find_targets(&self, rows: &mut [Row]) {
        let Factor { unit, diagonal } = self.factor;
        let padded = unit.padded();
        // `error` holds the right side, then what is solved so far.
        for first in (0..padded).step_by(WIDTH) {
            for row in &mut *rows {
                add_product(&mut row.error[first..first + WIDTH], &row.target, self.shift.panel(first));
            }
        }
        for first in (0..padded).step_by(WIDTH).rev() {
            let panel = unit.panel(first);
            for row in &mut *rows {
                let (before, rest) = row.error.split_at_mut(first);
                let mut own = [0.0; WIDTH];
                own.copy_from_slice(&rest[..WIDTH]);
                for k in (0..WIDTH).rev() {
                    for i in 0..k {
                        own[i] -= own[k] * panel[first + i][k];
                    }
                }
                rest[..WIDTH].copy_from_slice(&own);
                subtract_dots(before, panel, &own);
            }
        }
        for first in (0..padded).step_by(WIDTH) {
            let panel = unit.panel(first);
            for row in &mut *rows {
                let (before, rest) = row.error.split_at_mut(first);
                let mut spread = [0.0; WIDTH];
                add_product(&mut spread, before, panel);
                for k in 0..WIDTH {
                    let solved = rest[k] / diagonal[first + k] - spread[k];
                    rest[k] = solved;
                    for i in k + 1..WIDTH {
                        spread[i] += solved * panel[first + k][i];
                    }
                }
            }
        }
        for row in rows {
            for (target, error) in row.target.iter_mut().zip(&mut row.error) {
                *target += std::mem::take(error);
            }
        }
    }

    /// Chooses scale and codes of the group that starts with input feature `first`, those before it being done.
    #[inline(always)]
    fn round_group(&self, row: &mut Row, first: usize) {
        let unit = &self.factor.unit;
        let end = unit.padded().min(first + self.group);
        let mut wanted = [0.0; 128];
        let wanted = &mut wanted[..end - first];
        wanted.copy_from_slice(&row.target[first..end]);
        for (part, wanted) in wanted.chunks_mut(WIDTH).enumerate() {
            add_product(wanted, &row.error[..first], unit.panel(first + part * WIDTH));
        }
        // What they would be if none of the group had to be rounded, which its scale is chosen for.
        let (mut free, mut codes) = ([0.0; 128], [0; 128]);
        let (free, codes) = (&mut free[..end - first], &mut codes[..end - first]);
        free.copy_from_slice(wanted);
        self.go_on(row, first, free, |value| value);
        let params = if self.scheme.has_zero_points() {
            int4::quantize_with_zero(free, codes)
        } else {
            int4::quantize(free, codes)
        };
        let grid = Grid::new(params.scale.to_f32(), f32::from(params.zero));
        self.go_on(row, first, wanted, |value| grid.scale * grid.step(value));
        for (step, wanted) in row.steps[first..end].iter_mut().zip(wanted) {
            *step = grid.step(*wanted);
        }
        row.scales.push(grid.scale);
        row.zeros.push(grid.zero);
    }

    /// From the first weight of a group to the last: what a weight is wanted to be, given what those before it have become; in `wanted`
    /// is what makes up for those before the group. `round` says what a weight becomes.
    #[inline(always)]
    fn go_on(&self, row: &mut Row, first: usize, wanted: &mut [f32], round: impl Fn(f32) -> f32) {
        for (part, wanted) in wanted.chunks_mut(WIDTH).enumerate() {
            let at = first + part * WIDTH;
            let panel = self.factor.unit.panel(at);
            add_product(wanted, &row.error[first..at], &panel[first..at]);
            for k in 0..WIDTH {
                let error = row.target[at + k] - round(wanted[k]);
                row.error[at + k] = error;
                for i in k + 1..WIDTH {
                    wanted[i] += error * panel[at + k][i];
                }
            }
        }
    }

    /// Chooses scale and codes of a group once more, all others being as they are.
    #[inline(always)]
    fn improve_group(&self, row: &mut Row, first: usize) {
        let end = self.squares.padded().min(first + self.group);
        let (len, index) = (end - first, first / self.group);
        // What a weight is to be moved by, times its square.
        let mut slope = [0.0f32; 128];
        let mut along = [0.0f32; 128];
        for (part, (slope, along)) in slope[..len].chunks_mut(WIDTH).zip(along[..len].chunks_mut(WIDTH)).enumerate() {
            let panel = self.squares.panel(first + part * WIDTH);
            add_product(slope, &row.error, panel);
            add_product(along, &row.steps[first..end], &panel[first..end]);
        }
        let steps = &mut row.steps[first..end];
        let error = &mut row.error[first..end];
        let dot = |values: &[f32; 128]| steps.iter().zip(values).map(|(a, b)| a * b).sum::<f32>();
        let mut scale = row.scales[index];
        let better = stored_scale(scale + dot(&slope) / dot(&along)).to_f32();
        if better.is_finite() && better != 0.0 {
            let by = better - scale;
            for i in 0..len {
                error[i] -= by * steps[i];
                slope[i] -= by * along[i];
            }
            scale = better;
            row.scales[index] = scale;
        }
        let grid = Grid::new(scale, row.zeros[index]);
        for k in 0..len {
            let step = grid.step(scale * steps[k] + slope[k] / self.squares.diagonal(first + k));
            let by = scale * (step - steps[k]);
            if by == 0.0 {
                continue;
            }
            steps[k] = step;
            error[k] -= by;
            for (part, slope) in slope[..len].chunks_mut(WIDTH).enumerate() {
                let squares = &self.squares.panel(first + part * WIDTH)[first + k];
                for i in 0..WIDTH {
                    slope[i] -= by * squares[i];
                }
            }
        }
    }
}

impl Row {
    fn new(weights: &[f32], padded: usize) -> Self {
        let mut target = weights.to_vec();
        target.resize(padded, 0.0);
        let (error, steps) = (vec![0.0; padded], vec![0.0; padded]);
        Self { target, error, steps, scales: Vec::new(), zeros: Vec::new() }
    }
}

/// The values that a group's codes stand for.
#[derive(Clone, Copy)]
struct Grid {
    scale: f32,
    inverse: f32,
    zero: f32,
}

impl Grid {
    fn new(scale: f32, zero: f32) -> Self {
        Self { scale, inverse: if scale == 0.0 { 0.0 } else { 1.0 / scale }, zero }
    }

    /// The steps of the nearest value.
    #[inline(always)]
    fn step(self, value: f32) -> f32 {
        nearest((value * self.inverse).clamp(-self.zero, 15.0 - self.zero)) as f32
    }
}
