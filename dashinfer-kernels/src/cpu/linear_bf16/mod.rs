//! Products of bf16 weights with activations rounded to bf16, for machines with instructions for that: twice the operations of f32 a
//! cycle, with products of small matrices four times, and with tiles sixteen times.
//!
//! Sums are in f32. The instructions sum pairs in an order of their own, Arm's round to odd, and all take denormals for zeros, so that
//! variants agree to 1e-5 of the largest product, not to the bit; a row's result does not depend on the other rows, within a variant.

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod amx;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx512;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod bfmmla;
mod scalar;

use std::ops::Range;

use half::bf16;

use super::aligned::AlignedBuf;
use super::backend::CpuBackend;
use super::experts::{Group, side_by_side};
use super::gate::Gate;
use super::gated::Gated;
use super::isa::{Isa, Variant};
use super::linear::{BF16_STEP, Output, PackedMatrix, SendPtr, group_rows};
use super::pool::ThreadPool;
use super::tasks::Tasks;
use crate::error::check;
use crate::{DType, KernelError};

/// What the threads of a product share.
pub(crate) struct Job<'a> {
    /// `[T, padded K]`, bits of bf16, zeros from `K` on.
    x: &'a [u16],
    /// Of bf16.
    weight: &'a PackedMatrix,
    /// `K` in whole steps.
    padded: usize,
}

/// `(job, rows, panels, out)`.
pub(crate) type Product = unsafe fn(&Job<'_>, Range<usize>, Range<usize>, Output);

pub(crate) static VARIANTS: &[Variant<Product>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Amx, run: amx::product },
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx512Bf16, run: avx512::product },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::I8mm, run: bfmmla::product },
    Variant { isa: Isa::Scalar, run: scalar::product },
];

/// The best variant that needs no more than `limit`; `None` if that would be the definition, which is for comparing only.
pub(crate) fn best(limit: Isa) -> Option<Product> {
    let fast = VARIANTS.iter().filter(|v| v.isa != Isa::Scalar);
    fast.into_iter().find(|v| v.isa <= limit && v.isa.is_available()).map(|v| v.run)
}

/// Rounded rows, in memory that is kept from product to product.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    codes: Option<AlignedBuf<u16>>,
    rows: usize,
    /// Columns in whole steps.
    padded: usize,
}

impl Rounded {
    /// Bytes that `rows` rows of `cols` values take.
    pub(crate) fn max_bytes(rows: usize, cols: usize) -> usize {
        rows.saturating_mul(cols.checked_next_multiple_of(BF16_STEP).unwrap_or(cols)).saturating_mul(2)
    }

    /// Room for `rows` rows of `padded` columns, which are what they were.
    fn resize(&mut self, rows: usize, padded: usize) -> Result<SendPtr<u16>, KernelError> {
        let wanted = rows * padded;
        if self.codes.as_ref().is_none_or(|codes| codes.len() < wanted) {
            self.codes = None; // given back before more is taken
        }
        (self.rows, self.padded) = (rows, padded);
        let buffer = match &mut self.codes {
            Some(buffer) => buffer,
            none => none.insert(AlignedBuf::zeroed("rounded activations", wanted)?),
        };
        Ok(SendPtr(buffer.as_mut_ptr()))
    }

    fn values(&self) -> &[u16] {
        self.codes.as_ref().map_or(&[], |codes| &codes[..self.rows * self.padded])
    }

    /// Takes `rows` of another, in this order.
    pub(crate) fn gather(&mut self, from: &Self, rows: &[u32], pool: &ThreadPool) -> Result<(), KernelError> {
        let (padded, from) = (from.padded, from.values());
        let to = self.resize(rows.len(), padded)?;
        CpuBackend::for_rows(pool, rows.len(), padded, &|row| {
            // SAFETY: each row has its own part of the buffer, which holds as many, and is written by one task.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * padded), padded) };
            to.copy_from_slice(&from[rows[row] as usize * padded..][..padded]);
        });
        Ok(())
    }

    /// Rounds `x`, `[rows, cols]`.
    pub(crate) fn fill(&mut self, x: &[f32], rows: usize, cols: usize, pool: &ThreadPool) -> Result<(), KernelError> {
        let padded = cols.next_multiple_of(BF16_STEP);
        let to = self.resize(rows, padded)?;
        let row = |row: usize| {
            // SAFETY: each row has its own part of the buffer, which holds `rows` of them, and is written by one task.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * padded), padded) };
            let (values, padding) = to.split_at_mut(cols);
            for (to, x) in values.iter_mut().zip(&x[row * cols..][..cols]) {
                *to = round(*x);
            }
            padding.fill(0);
        };
        CpuBackend::for_rows(pool, rows, cols, &row);
        Ok(())
    }
}

/// The bits of the nearest bf16, ties to even; what is not a number stays so.
#[inline(always)]
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded as u16 }
}

/// `out[t, n] = bias[n] + Σₖ bf16(x[t, k]) · weight[n, k]`, summed in f32.
///
/// `x`: `[T, K]`; `out`: `[T, N]`; `weight` is of bf16; `scratch` is for the rounded rows.
pub(crate) fn run(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    weight: &PackedMatrix,
    scratch: &mut Rounded,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    let rows = x.len() / weight.cols().max(1);
    check("linear", "length of x", rows * weight.cols(), x.len())?;
    check("linear", "length of the output", rows * weight.rows(), out.len())?;
    check("linear", "bytes of a weight", DType::BF16.size_bytes(), weight.dtype().size_bytes())?;
    if rows == 0 || weight.rows() == 0 {
        return Ok(());
    }
    scratch.fill(x, rows, weight.cols(), pool)?;
    let job = Job { x: scratch.values(), weight, padded: scratch.padded };
    let out = Output::new(out, weight.rows());
    // SAFETY: the variant was chosen for this machine; lengths were checked above; each task has its own columns of its own rows of
    // `out`, which outlives the loop.
    let task = |rows, panels| unsafe { product(&job, rows, panels, out) };
    Tasks::new(rows, 2 * scratch.padded, weight.num_panels(), pool).run(pool, &task);
    Ok(())
}

/// [`run`], with a gate on it: `x`: `[T, K]`; `weight`: `[2 F, K]` with `F` a multiple of 16; `out`: `[T, F]`.
pub(crate) fn run_gated(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    weight: &PackedMatrix,
    activation: Gate,
    scratch: &mut Rounded,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    check("gated_linear", "bytes of a weight", DType::BF16.size_bytes(), weight.dtype().size_bytes())?;
    let gated = Gated::new(out, x, [weight.rows(), weight.cols()], activation)?;
    scratch.fill(x, gated.rows(), weight.cols(), pool)?;
    let job = Job { x: scratch.values(), weight, padded: scratch.padded };
    // SAFETY: the variant was chosen for this machine; lengths were checked; each task has its own columns.
    unsafe { gated.run(&|rows, panels, out| product(&job, rows, panels, out), pool) };
    Ok(())
}

/// [`linear::run_groups`](super::linear::run_groups) of rounded rows: `x`, `[rows of all groups, K]`. The matrices are of bf16.
///
/// # Panics
/// As there.
pub(crate) fn run_groups<'a>(
    product: Product,
    out: &mut [f32],
    x: &Rounded,
    groups: &[Group],
    weight: &(dyn Fn(usize) -> &'a PackedMatrix + Sync),
    pool: &ThreadPool,
) -> usize {
    let Some(rows) = group_rows(groups) else { return 0 };
    let first = weight(groups[0].expert);
    let padded = first.cols().next_multiple_of(BF16_STEP);
    assert!(
        x.rows == rows && x.padded == padded && out.len() == rows * first.rows(),
        "operands hold the rows of all groups"
    );
    let out = Output::new(out, first.rows());
    side_by_side(pool, groups, first.num_panels(), true, &|group, panels| {
        let weight = weight(group.expert);
        let like_first =
            weight.rows() == first.rows() && weight.cols() == first.cols() && weight.dtype() == DType::BF16;
        assert!(like_first, "matrices are of one shape, of bf16");
        let job = Job { x: x.values(), weight, padded };
        // SAFETY: the variant was chosen for this machine; lengths were checked above; each task has its own panels of rows that no
        // other group has, so its own part of `out`, which outlives the loop.
        unsafe { product(&job, group.rows.clone(), panels, out) };
    })
}

/// A stored value of an operand.
fn value(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MatrixView;
    use crate::cpu::isa::supported;
    use crate::cpu::linear::to_bytes;
    use crate::cpu::pool::PoolConfig;
    use crate::random::noise;
    use proptest::prelude::*;
    use std::num::NonZeroUsize;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() }).unwrap()
    }

    fn packed(n: usize, k: usize, bias: bool, seed: u64, pool: &ThreadPool) -> PackedMatrix {
        let bytes = to_bytes(&noise(n * k, seed), DType::BF16);
        let bias = noise(if bias { n } else { 0 }, seed + 1);
        let view = MatrixView { bytes: &bytes, dtype: DType::BF16, rows: n, cols: k };
        PackedMatrix::pack(&[view], (!bias.is_empty()).then_some(&bias[..]), pool).unwrap()
    }

    fn product(variant: Product, x: &[f32], weight: &PackedMatrix, pool: &ThreadPool) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / weight.cols() * weight.rows()];
        run(variant, &mut out, x, weight, &mut Rounded::default(), pool).unwrap();
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_variant_agrees_with_scalar(
            t in 1usize..70, n in 1usize..70, k in 1usize..200, threads in 1usize..4, bias: bool, seed: u64,
        ) {
            let pool = pool(threads);
            let matrix = packed(n, k, bias, seed >> 1, &pool);
            let x = noise(t * k, !seed);
            let want = product(scalar::product, &x, &matrix, &pool);
            for v in supported(VARIANTS) {
                for (out, want) in product(v.run, &x, &matrix, &pool).iter().zip(&want) {
                    prop_assert!((out - want).abs() <= 1e-5 * (k as f32).sqrt().max(1.0), "{:?}: {out}, {want}", v.isa);
                }
            }
        }
    }

    #[test]
    fn the_scalar_product_is_the_formula() {
        let pool = pool(1);
        let (t, n, k) = (3, 21, 41);
        let matrix = packed(n, k, true, 5, &pool);
        let (x, weights, bias) = (noise(t * k, 9), noise(n * k, 5), noise(n, 6));
        let exact = |value: f32| f64::from(bf16::from_f32(value).to_f32());
        for (i, out) in product(scalar::product, &x, &matrix, &pool).iter().enumerate() {
            let (row, col) = (i / n, i % n);
            let sum: f64 = (0..k).map(|at| exact(x[row * k + at]) * exact(weights[col * k + at])).sum();
            assert!((f64::from(*out) - sum - f64::from(bias[col])).abs() < 1e-5, "[{row}, {col}]: {out}, {sum}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let pool = pool(2);
        let (t, n, k) = (203, 53, 2500);
        let matrix = packed(n, k, true, 3, &pool);
        let x = noise(t * k, 4);
        for v in supported(VARIANTS) {
            let whole = product(v.run, &x, &matrix, &pool);
            for row in [0, 15, 16, 95, 96, 191, 192, 202] {
                let alone = product(v.run, &x[row * k..][..k], &matrix, &pool);
                assert_eq!(alone, whole[row * n..][..n], "{:?} row {row}", v.isa);
            }
            for rows in [2, 17, 31, 33, 50] {
                let some = product(v.run, &x[..rows * k], &matrix, &pool);
                assert_eq!(some, whole[..rows * n], "{:?} {rows} rows", v.isa);
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        for x in [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, -3.3e38, f32::MAX, f32::INFINITY, 1e-40] {
            assert_eq!(round(x), bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(value(round(f32::NAN)).is_nan());
    }
}
