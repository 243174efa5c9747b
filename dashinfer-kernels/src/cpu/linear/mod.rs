//! Dense products with weights in panels: `out = x · weightᵀ + bias`.

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx512;
#[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
mod blocked;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod neon;
mod pack;
mod scalar;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod sve;

use std::ops::Range;

#[cfg(all(feature = "arm", target_arch = "aarch64"))]
pub(crate) use neon::prefetch;
pub(crate) use pack::{BF16_STEP, PANEL, SendPtr, Stack, bias_from_bytes, packed_bytes, padded_bias, place};
pub use pack::{PackedMatrix, to_bytes};

use super::experts::{Group, side_by_side};
use super::gate::Gate;
use super::gated::Gated;
use super::isa::{Isa, Variant, choose};
use super::pool::ThreadPool;
use crate::KernelError;
use crate::error::check;

/// What the threads of a product share.
pub(crate) struct Job<'a> {
    /// `[T, K]`
    x: &'a [f32],
    weight: &'a PackedMatrix,
}

impl<'a> Job<'a> {
    /// `x`: `[T, K]`; `weight`: `[N, K]`.
    pub(crate) fn new(x: &'a [f32], weight: &'a PackedMatrix) -> Self {
        debug_assert!(x.len().is_multiple_of(weight.cols().max(1)), "whole rows");
        Self { x, weight }
    }
}

/// Where a product goes: `[T, N]`, written by several threads, each its own columns.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    /// Where row 0 and column 0 would stand; they need not be there.
    start: SendPtr<f32>,
    /// Values between rows.
    stride: usize,
    /// Columns up to the last that is there.
    cols: usize,
}

impl Output {
    /// `out`: `[T, N]` with `N` = `cols`.
    pub(crate) fn new(out: &mut [f32], cols: usize) -> Self {
        Self { start: SendPtr(out.as_mut_ptr()), stride: cols, cols }
    }

    /// Some rows, `first_row` and those behind it, and the columns of some panels, which start at `memory`, with `stride` values
    /// between rows.
    pub(crate) fn window(memory: *mut f32, stride: usize, first_row: usize, panels: Range<usize>) -> Self {
        let start = memory.wrapping_sub(first_row * stride + panels.start * PANEL);
        Self { start: SendPtr(start), stride, cols: panels.end * PANEL }
    }

    fn width(self, panel: usize) -> usize {
        PANEL.min(self.cols - panel * PANEL)
    }

    #[inline(always)]
    fn at(self, row: usize, panel: usize) -> *mut f32 {
        self.start.get().wrapping_add(row * self.stride + panel * PANEL)
    }

    /// The columns of `panels` in row `row`.
    ///
    /// # Safety
    /// They exist and are whole panels, no other thread accesses them, and nor does this one by another way while it has them.
    pub(crate) unsafe fn columns<'a>(self, row: usize, panels: Range<usize>) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, panels.start), panels.len() * PANEL) }
    }

    /// Where the columns of `panel` in row `row` stand, how many there are, and how many values are between rows.
    #[inline(always)]
    #[cfg_attr(
        not(all(feature = "x86", target_arch = "x86_64")),
        allow(dead_code, reason = "for variants that load and store under a mask")
    )]
    pub(crate) fn place(self, row: usize, panel: usize) -> (*mut f32, usize, usize) {
        (self.at(row, panel), self.width(panel), self.stride)
    }

    /// Writes the columns of `panel` in row `row`.
    ///
    /// # Safety
    /// Row and panel exist, and no other thread accesses these columns of this row.
    #[inline(always)]
    pub(crate) unsafe fn store(self, row: usize, panel: usize, sums: &[f32; PANEL]) {
        let (to, width) = (self.at(row, panel), self.width(panel));
        // SAFETY: `width` columns from there on lie in the row; the caller vouches for exclusive access.
        unsafe {
            if width == PANEL {
                to.cast::<[f32; PANEL]>().write_unaligned(*sums);
            } else {
                to.copy_from_nonoverlapping(sums.as_ptr(), width);
            }
        }
    }

    /// Reads what [`store`](Self::store) wrote.
    ///
    /// # Safety
    /// As for [`store`](Self::store), and these columns were written before.
    #[inline(always)]
    #[cfg_attr(
        not(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64"))),
        expect(dead_code, reason = "for blocked variants")
    )]
    pub(crate) unsafe fn load(self, row: usize, panel: usize, sums: &mut [f32; PANEL]) {
        // SAFETY: as in `store`.
        unsafe { sums.as_mut_ptr().copy_from_nonoverlapping(self.at(row, panel), self.width(panel)) };
    }
}

/// `(job, rows, panels, out)`.
pub(crate) type Product = unsafe fn(&Job<'_>, Range<usize>, Range<usize>, Output);

pub(crate) static VARIANTS: &[Variant<Product>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx512, run: avx512::product },
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: avx2::product },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Sve, run: sve::product },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Neon, run: neon::product },
    Variant { isa: Isa::Scalar, run: scalar::product },
];

/// The best variant that needs no more than `limit`.
pub(crate) fn best(limit: Isa) -> Product {
    choose(VARIANTS, limit)
}

/// [`run`], with a gate on it: `x`: `[T, K]`; `weight`: `[2 F, K]` with `F` a multiple of 16; `out`: `[T, F]`.
pub(crate) fn run_gated(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    weight: &PackedMatrix,
    activation: Gate,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    let gated = Gated::new(out, x, [weight.rows(), weight.cols()], activation)?;
    let job = Job { x, weight };
    // SAFETY: the variant was chosen for this machine; lengths were checked; each task has its own columns.
    unsafe { gated.run(&|rows, panels, out| product(&job, rows, panels, out), pool) };
    Ok(())
}

/// `out[t, n] = bias[n] + Σₖ x[t, k] · weight[n, k]`, each sum one chain of fused multiply-adds in the order of `k`, so that
/// every variant gives the same bits, and a row's result does not depend on the other rows.
///
/// `x`: `[T, K]`; `out`: `[T, N]`.
///
/// # Errors
/// [`KernelError::Shape`] if `x` is not whole rows of `K`, or `out` has not as many rows of `N`.
pub fn linear(
    out: &mut [f32],
    x: &[f32],
    weight: &PackedMatrix,
    pool: &ThreadPool,
    limit: Isa,
) -> Result<(), KernelError> {
    run(best(limit), out, x, weight, pool)
}

pub(crate) fn run(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    weight: &PackedMatrix,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    let rows = x.len() / weight.cols().max(1);
    check("linear", "length of x", rows * weight.cols(), x.len())?;
    check("linear", "length of the output", rows * weight.rows(), out.len())?;
    if rows == 0 || weight.rows() == 0 {
        return Ok(());
    }
    let out = Output::new(out, weight.rows());
    let job = Job { x, weight };
    let panels = weight.num_panels();
    // Several tasks for each thread, so that a thread that the system interrupts holds the others up by little.
    let per_task = panels.div_ceil(pool.num_threads() * 8).max(1);
    pool.run(panels.div_ceil(per_task), &|task, _| {
        let panels = task * per_task..panels.min((task + 1) * per_task);
        // SAFETY: the variant was chosen for this machine; lengths were checked above; each task has its own panels, so its
        // own columns of `out`, which outlives the loop.
        unsafe { product(&job, 0..rows, panels, out) };
    });
    Ok(())
}

/// The products of `groups` of rows with matrices of one shape, side by side: those of group `g` with `weight(g.expert)`. Returns
/// how many panels were read.
///
/// `x`: `[rows of all groups, K]`; `out`: `[rows of all groups, N]`.
///
/// # Panics
/// If groups share rows, or `x` or `out` does not hold them.
pub(crate) fn run_groups<'a>(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    groups: &[Group],
    weight: &(dyn Fn(usize) -> &'a PackedMatrix + Sync),
    pool: &ThreadPool,
) -> usize {
    let Some(rows) = group_rows(groups) else { return 0 };
    let first = weight(groups[0].expert);
    assert!(x.len() == rows * first.cols() && out.len() == rows * first.rows(), "operands hold the rows of all groups");
    let out = Output::new(out, first.rows());
    side_by_side(pool, groups, first.num_panels(), false, &|group, panels| {
        let weight = weight(group.expert);
        assert!(weight.rows() == first.rows() && weight.cols() == first.cols(), "matrices are of one shape");
        // SAFETY: the variant was chosen for this machine; lengths were checked above; each task has its own panels of rows that no
        // other group has, so its own part of `out`, which outlives the loop.
        unsafe { product(&Job { x, weight }, group.rows.clone(), panels, out) };
    })
}

/// The rows of all groups, if there are any.
///
/// # Panics
/// If they do not follow one another from 0 on.
pub(crate) fn group_rows(groups: &[Group]) -> Option<usize> {
    let rows = groups.iter().fold(0, |next, group| {
        assert!(group.rows.start == next && group.rows.end >= next, "groups follow one another");
        group.rows.end
    });
    (rows > 0).then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::supported;
    use crate::cpu::math::tests::noise;
    use crate::cpu::pool::PoolConfig;
    use crate::{DType, MatrixView};
    use proptest::prelude::*;
    use std::num::NonZeroUsize;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() }).unwrap()
    }

    fn packed(n: usize, k: usize, dtype: DType, bias: bool, seed: u64, pool: &ThreadPool) -> (PackedMatrix, Vec<f32>) {
        let bytes = to_bytes(&noise(n * k, seed), dtype);
        let bias = noise(if bias { n } else { 0 }, seed + 1);
        let view = MatrixView { bytes: &bytes, dtype, rows: n, cols: k };
        let matrix = PackedMatrix::pack(&[view], (!bias.is_empty()).then_some(&bias[..]), pool).unwrap();
        (matrix, crate::to_f32(&bytes, dtype))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        // Up to 13 rows make tiles of every height; up to 50 columns leave every tail of a panel.
        #[test]
        fn every_variant_has_the_bits_of_the_scalar_one(
            t in 1usize..14, n in 1usize..50, k in 1usize..70, threads in 1usize..4, which in 0usize..3, bias: bool, seed: u64,
        ) {
            let pool = pool(threads);
            let dtype = [DType::F32, DType::F16, DType::BF16][which];
            let (matrix, _) = packed(n, k, dtype, bias, seed >> 1, &pool);
            let x = noise(t * k, !seed);
            let mut want = vec![f32::NAN; t * n];
            run(scalar::product, &mut want, &x, &matrix, &pool).unwrap();
            for v in supported(VARIANTS) {
                let mut out = vec![f32::NAN; t * n];
                run(v.run, &mut out, &x, &matrix, &pool).unwrap();
                prop_assert_eq!(&out, &want, "{:?} {}", v.isa, dtype);
            }
        }
    }

    #[test]
    fn the_scalar_product_is_the_formula() {
        let pool = pool(1);
        let (t, n, k) = (3, 21, 40);
        let (matrix, weights) = packed(n, k, DType::BF16, false, 5, &pool);
        let x = noise(t * k, 9);
        let mut out = vec![f32::NAN; t * n];
        run(scalar::product, &mut out, &x, &matrix, &pool).unwrap();
        for (i, out) in out.iter().enumerate() {
            let (row, col) = (i / n, i % n);
            let sum: f64 = (0..k).map(|k_| f64::from(x[row * k + k_]) * f64::from(weights[col * k + k_])).sum();
            assert!((f64::from(*out) - sum).abs() < 1e-4, "[{row}, {col}]: {out}, {sum}");
        }
    }

    #[test]
    fn blocks_of_rows_and_of_k_change_no_bit() {
        // More rows than a row block, more columns than a k block, and neither a multiple.
        let pool = pool(2);
        let (t, n, k) = (203, 37, 1100);
        let (matrix, _) = packed(n, k, DType::BF16, true, 3, &pool);
        let x = noise(t * k, 4);
        for v in supported(VARIANTS) {
            let mut whole = vec![f32::NAN; t * n];
            run(v.run, &mut whole, &x, &matrix, &pool).unwrap();
            for row in [0, 95, 96, 150, 202] {
                let mut alone = vec![f32::NAN; n];
                run(v.run, &mut alone, &x[row * k..][..k], &matrix, &pool).unwrap();
                assert_eq!(alone, whole[row * n..][..n], "{:?} row {row}", v.isa);
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let pool = pool(1);
        let (matrix, _) = packed(4, 8, DType::F32, false, 1, &pool);
        let text = |out: usize, x: usize| {
            linear(&mut vec![0.0; out], &vec![0.0; x], &matrix, &pool, Isa::best()).unwrap_err().to_string()
        };
        assert_eq!(text(4, 9), "linear: length of x should be 8, found 9");
        assert_eq!(text(5, 8), "linear: length of the output should be 4, found 5");
    }
}
