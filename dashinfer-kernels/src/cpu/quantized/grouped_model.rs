//! AMX in plain Rust, for tests: what its instructions do with tiles, byte by byte, so that layouts are seen to fit on any machine.

use std::ops::Range;

use super::amx_groups::SPLIT;
use super::blocked::{CODES_4, WORDS};
use super::grouped::{self, Layout, PART, Part, ROWS, Scratch, Sweep, Unit, X_STRIDE};
use super::{Job, Output};
use crate::quant::PANEL;

/// See [`grouped::product`].
///
/// # Safety
/// As there, but for the machine, which may be any.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { grouped::product::<Model>(job, rows, panels, out) }
}

pub(super) struct Model {
    depth: usize,
}

type Sums = [[i32; PANEL]; ROWS];

/// Whether the bytes of `x` are signed: `tdpbssd`, or `tdpbusd`.
#[derive(Clone, Copy)]
enum Bytes {
    Signed,
    Unsigned,
}

impl Model {
    /// Adds the products of a tile of `x`, whose rows are `X_STRIDE` bytes apart, and one of weights, whose rows are 64 bytes apart.
    fn multiply(&self, sums: &mut Sums, x: &[u8], weights: &[i8], bytes: Bytes) {
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = &x[row * X_STRIDE..][..self.depth];
            for (quad, x) in x.as_chunks::<4>().0.iter().enumerate() {
                let weights = &weights[quad * 64..][..64];
                for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<4>().0) {
                    for (x, weight) in x.iter().zip(weights) {
                        let x = match bytes {
                            Bytes::Signed => i32::from(x.cast_signed()),
                            Bytes::Unsigned => i32::from(*x),
                        };
                        *sum = sum.wrapping_add(x * i32::from(*weight));
                    }
                }
            }
        }
    }

    /// The sums of all tiles of a step.
    fn step(&self, layout: &Layout, x: &[u8], weights: &[i8], bytes: Bytes) -> Sums {
        let mut sums = [[0; PANEL]; ROWS];
        for tile in 0..layout.tiles {
            self.multiply(&mut sums, &x[tile * 64..], &weights[tile * 1024..], bytes);
        }
        sums
    }
}

impl Unit for Model {
    unsafe fn start(depth: usize) -> Self {
        Self { depth }
    }

    unsafe fn end(self) {}

    unsafe fn widen<const CODES: u8>(codes: *const u8, zeros: &[u8; PANEL], len: usize, to: *mut i8) {
        let bytes = if CODES == CODES_4 { len * PANEL / 2 } else { len * PANEL };
        // SAFETY: the caller's promise.
        let (codes, to) =
            unsafe { (std::slice::from_raw_parts(codes, bytes), std::slice::from_raw_parts_mut(to, len * PANEL)) };
        let zero = |i: usize| zeros[i % 64 / 4];
        if CODES == CODES_4 {
            for (codes, to) in codes.as_chunks::<64>().0.iter().zip(to.as_chunks_mut::<128>().0) {
                for (i, code) in codes.iter().enumerate() {
                    to[i] = (code & 15).wrapping_sub(zero(i)).cast_signed();
                    to[64 + i] = (code >> 4).wrapping_sub(zero(i)).cast_signed();
                }
            }
        } else {
            for (i, (code, to)) in codes.iter().zip(to).enumerate() {
                *to = code.wrapping_sub(zero(i)).cast_signed();
            }
        }
    }

    unsafe fn lay_out<const X: u8>(layout: &Layout, part: &Part, scratch: &mut Scratch) {
        let bytes = if X == WORDS { 2 * part.len } else { part.len };
        let groups = part.len / layout.group;
        for (row, (to, to_scales)) in scratch.x.iter_mut().zip(&mut scratch.scales).take(part.rows).enumerate() {
            // SAFETY: the caller's promise.
            let (codes, scales) = unsafe {
                (
                    std::slice::from_raw_parts(part.codes.add(row * part.stride), bytes),
                    std::slice::from_raw_parts(part.scales.add(row * part.groups), groups),
                )
            };
            to_scales[..groups].copy_from_slice(scales);
            if X != WORDS {
                to[..bytes].copy_from_slice(codes);
                continue;
            }
            for (i, words) in codes.as_chunks::<64>().0.iter().enumerate() {
                let split = SPLIT.map(|at| words[usize::from(at)]);
                if layout.high == 32 {
                    to[i * 64..][..64].copy_from_slice(&split);
                } else {
                    to[i * 32..][..32].copy_from_slice(&split[..32]);
                    to[PART + i * 32..][..32].copy_from_slice(&split[32..]);
                }
            }
        }
    }

    unsafe fn sweep<const X: u8, const NARROW: bool>(&mut self, sweep: &Sweep<'_>, scratch: &mut Scratch) {
        let Sweep { job, ref rows, ref panels, ref layout, out, .. } = *sweep;
        let (groups, weight) = (sweep.groups(), job.weight);
        for (side, panel) in panels.clone().enumerate() {
            let mut sums = [weight.panel_bias(panel); ROWS];
            if sweep.ks.start > 0 {
                for (row, sums) in rows.clone().zip(&mut sums) {
                    // SAFETY: the caller's promise; parts before have written them.
                    unsafe { out.load(row, panel, sums) };
                }
            }
            for group in 0..groups {
                let weights = &scratch.weights[layout.weights(side * groups + group)..];
                let x = &scratch.x.as_flattened()[layout.x(group)..];
                let dots = if X == WORDS {
                    let low = self.step(layout, x, weights, Bytes::Unsigned);
                    let high = self.step(layout, &x[layout.high..], weights, Bytes::Signed);
                    std::array::from_fn(|row| {
                        std::array::from_fn(|lane| {
                            let (low, high): (i32, i32) = (low[row][lane], high[row][lane]);
                            if NARROW {
                                assert!(i16::try_from(high).is_ok() || row >= rows.len(), "{high} fits 16 bits");
                            }
                            high.wrapping_mul(256).wrapping_add(low)
                        })
                    })
                } else {
                    self.step(layout, x, weights, Bytes::Signed)
                };
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        let scale = weight.params(panel, lane, sweep.first_group() + group).scale.to_f32();
                        *sum = (dots[row][lane] as f32).mul_add(scale * scratch.scales[row][group], *sum);
                    }
                }
            }
            for (row, sums) in rows.clone().zip(&sums) {
                // SAFETY: the caller's promise.
                unsafe { out.store(row, panel, sums) };
            }
        }
    }
}
