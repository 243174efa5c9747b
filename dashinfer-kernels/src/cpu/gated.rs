//! Products with a gate on them: `out = f(x · gateᵀ) · (x · upᵀ)`, without a pass over memory between the three.
//!
//! A thread computes some rows of some panels of the gate, and of the same panels of up, into memory of its own that stays in the first
//! caches; the activation reads them there and writes the output. The sums are those of the product alone, so the bits are those of
//! the operators one after the other.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::gate::Gate;
use super::linear::{Output, PANEL};
use super::pool::ThreadPool;
use super::tasks::Tasks;
use crate::KernelError;
use crate::error::check;

/// Rows of a block; as many as products with tiles and with panels treat together.
const ROWS: usize = 96;
/// Panels of gate, and as many of up, of a block with that many rows: a pair, as tiles take two. With fewer rows there are more panels.
const PANELS: usize = 2;
/// Values of a block.
const VALUES: usize = ROWS * PANELS * 2 * PANEL;

/// A product with a matrix `[2 F, K]`, to be gated.
pub(super) struct Gated {
    rows: usize,
    /// Panels of gate, and of up.
    panels: usize,
    activation: Gate,
    /// `[T, F]`
    out: Output,
}

/// `(rows, panels, out)`: the product of these rows with these panels of the matrix.
type PartOfProduct<'a> = dyn Fn(Range<usize>, Range<usize>, Output) + Sync + 'a;

impl Gated {
    /// `out`: `[T, F]`; `x`: `[T, K]`; `matrix`: `2 F` and `K`, with `F` a multiple of 16.
    pub(super) fn new(
        out: &mut [f32],
        x: &[f32],
        [features, cols]: [usize; 2],
        activation: Gate,
    ) -> Result<Self, KernelError> {
        const OP: &str = "gated_linear";
        let (rows, inner) = (x.len() / cols.max(1), features / 2);
        check(OP, "output features of the matrix", inner.next_multiple_of(PANEL) * 2, features)?;
        check(OP, "length of x", rows * cols, x.len())?;
        check(OP, "length of the output", rows * inner, out.len())?;
        Ok(Self { rows, panels: inner / PANEL, activation, out: Output::new(out, inner) })
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Computes it on all threads, each some panels.
    ///
    /// # Safety
    /// `product` may be called for all rows and panels if no other thread has the same rows and panels, as is so here. The machine has the
    /// instruction set of the activation, and the output lives.
    pub(super) unsafe fn run(&self, product: &PartOfProduct<'_>, pool: &ThreadPool) {
        Tasks::of_panels(self.rows, self.panels, pool).run(pool, &|rows, panels| {
            let mut memory = MaybeUninit::<Memory>::uninit();
            for first in rows.clone().step_by(ROWS) {
                let rows = first..rows.end.min(first + ROWS);
                // At least a pair, and all of them if there are few rows.
                let wide = ROWS / rows.len() * PANELS;
                for panel in panels.clone().step_by(wide) {
                    let panels = panel..panels.end.min(panel + wide);
                    // SAFETY: tasks have different panels; the rest is the caller's promise.
                    unsafe { self.block(product, rows.clone(), panels, memory.as_mut_ptr().cast()) };
                }
            }
        });
    }

    /// Some rows of some panels.
    ///
    /// # Safety
    /// As for [`run`](Self::run), of these rows and panels. `memory` has room for [`VALUES`].
    unsafe fn block(&self, product: &PartOfProduct<'_>, rows: Range<usize>, panels: Range<usize>, memory: *mut f32) {
        let width = panels.len() * PANEL;
        assert!(rows.len() * 2 * width <= VALUES, "a block fits its memory");
        let up = panels.start + self.panels..panels.end + self.panels;
        for (side, panels) in [panels.clone(), up].into_iter().enumerate() {
            let out = Output::window(memory.wrapping_add(side * width), 2 * width, rows.start, panels.clone());
            product(rows.clone(), panels, out);
        }
        // SAFETY: there is room for as many values, and the products have written all of them.
        let memory = unsafe { std::slice::from_raw_parts(memory, rows.len() * 2 * width) };
        for (row, values) in rows.zip(memory.chunks_exact(2 * width)) {
            let (gate, up) = values.split_at(width);
            // SAFETY: the caller's promise: these columns of this row are this thread's, and all are `width` long.
            unsafe { self.activation.row(self.out.columns(row, panels.clone()), gate, up) };
        }
    }
}

#[repr(align(64))]
struct Memory(#[expect(dead_code, reason = "used through its address")] [f32; VALUES]);

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use proptest::prelude::*;

    use super::*;
    use crate::cpu::gate::GateRows;
    use crate::cpu::isa::{Isa, supported};
    use crate::cpu::linear::{self, PackedMatrix, to_bytes};
    use crate::cpu::pool::PoolConfig;
    use crate::cpu::quantized::{self, Activations, QuantizedMatrix};
    use crate::cpu::{linear_bf16, silu_mul};
    use crate::random::noise;
    use crate::{Activation, DType, MatrixView, Scheme};

    /// The activation of each row of `both`, `[T, 2 F]`.
    fn gate(both: &[f32], inner: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; both.len() / 2];
        silu_mul::silu_mul(&mut out, both, inner, Isa::best()).unwrap();
        out
    }

    proptest! {
        #![proptest_config(crate::random::cases(48))]

        #[test]
        fn it_has_the_bits_of_product_and_activation(
            t in prop_oneof![1usize..6, 90usize..110], panels in 1usize..9, k in 1usize..200, threads in 1usize..4,
            scheme in 0..Scheme::ALL.len(), bias: bool, seed: u64,
        ) {
            let pool = ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() }).unwrap();
            let inner = panels * PANEL;
            let bytes = to_bytes(&noise(2 * inner * k, seed), DType::BF16);
            let view = [MatrixView { bytes: &bytes, dtype: DType::BF16, rows: 2 * inner, cols: k }];
            let bias = bias.then(|| noise(2 * inner, seed ^ 1));
            let x = noise(t * k, seed ^ 2);
            let silu = Gate::new(Activation::Silu, GateRows::best(Isa::best()));
            let (mut both, mut out) = (vec![f32::NAN; t * 2 * inner], vec![f32::NAN; t * inner]);

            let matrix = PackedMatrix::pack(&view, bias.as_deref(), &pool).unwrap();
            for v in supported(linear::VARIANTS) {
                linear::run(v.run, &mut both, &x, &matrix, &pool).unwrap();
                linear::run_gated(v.run, &mut out, &x, &matrix, silu, &pool).unwrap();
                prop_assert_eq!(&out, &gate(&both, inner), "{:?}", v.isa);
            }
            let mut scratch = linear_bf16::Rounded::default();
            for v in supported(linear_bf16::VARIANTS) {
                linear_bf16::run(v.run, &mut both, &x, &matrix, &mut scratch, &pool).unwrap();
                linear_bf16::run_gated(v.run, &mut out, &x, &matrix, silu, &mut scratch, &pool).unwrap();
                prop_assert_eq!(&out, &gate(&both, inner), "{:?} in bf16", v.isa);
            }
            let scheme = Scheme::ALL[scheme];
            let matrix = QuantizedMatrix::pack(&view, bias.as_deref(), scheme, &pool).unwrap();
            let mut scratch = Activations::default();
            for v in supported(quantized::VARIANTS) {
                quantized::run(v.run, &mut both, &x, &matrix, &mut scratch, &pool).unwrap();
                quantized::run_gated(v.run, &mut out, &x, &matrix, silu, &mut scratch, &pool).unwrap();
                prop_assert_eq!(&out, &gate(&both, inner), "{:?} {}", v.isa, scheme);
            }
        }
    }

    #[test]
    fn features_that_are_not_whole_panels_are_refused() {
        let error =
            Gated::new(&mut [0.0; 24], &[0.0; 4], [48, 4], Gate::new(Activation::Silu, GateRows::best(Isa::Scalar)))
                .map(|_| ())
                .unwrap_err();
        assert_eq!(error.to_string(), "gated_linear: output features of the matrix should be 64, found 48");
    }
}
