//! The definition of the dot products, and of the layout of weights.

use super::super::linear::PANEL;
use super::{Bits, Group};

/// `out[r][c] = Σₖ weight[k][c] · x[r][k]`.
pub(super) fn dots(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    for (out, x) in out.iter_mut().zip(group.x) {
        *out = std::array::from_fn(|c| {
            x.iter().enumerate().map(|(k, x)| i32::from(weight(group, k, c)) * i32::from(*x)).sum()
        });
    }
}

/// The weight of column `c` at step `k`.
fn weight(group: &Group<'_>, k: usize, c: usize) -> u8 {
    let quad = &group.weights[k / 4 * group.bits.quad_bytes()..];
    match group.bits {
        Bits::Eight => quad[c * 4 + k % 4],
        Bits::Four => quad[c * 2 + k % 2] >> (k % 4 / 2 * 4) & 15,
    }
}
