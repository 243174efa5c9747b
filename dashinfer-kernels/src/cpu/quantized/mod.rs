//! Products with quantized weights: `out = x · weightᵀ + bias`, with `x` rounded to integers on the way.

mod activations;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod amx;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod amx_groups;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2_dot;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx512;
#[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
mod blocked;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod dotprod;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod grouped;
#[cfg(all(test, feature = "x86", target_arch = "x86_64"))]
mod grouped_model;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod groups;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod i8mm;
mod matrix;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod neon;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod quantize_avx2;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod round_avx2;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod round_neon;
mod scalar;
mod stored;
mod words;

use std::ops::Range;

pub(crate) use activations::{Activations, Operand};
pub use matrix::QuantizedMatrix;
pub(crate) use matrix::packed_bytes;

use super::experts::{Group, side_by_side};
use super::gate::Gate;
use super::gated::Gated;
use super::isa::{Isa, Variant, choose};
use super::linear::{Output, group_rows};
use super::pool::ThreadPool;
use super::tasks::Tasks;
use crate::error::check;
use crate::{KernelError, Scheme};

/// What the threads of a product share.
pub(crate) struct Job<'a> {
    x: &'a Activations,
    weight: &'a QuantizedMatrix,
}

/// One implementation of the product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    /// How the activations of a scheme are to be laid out.
    operand: fn(Scheme) -> Operand,
    /// `(job, rows, panels, out)`.
    run: unsafe fn(&Job<'_>, Range<usize>, Range<usize>, Output),
}

pub(crate) static VARIANTS: &[Variant<Product>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Amx, run: Product { operand: avx512::operand, run: amx::product } },
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx512Vnni, run: Product { operand: avx512::operand, run: avx512::product } },
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: Product { operand: avx2::operand, run: avx2::product } },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::I8mm, run: Product { operand: dotprod::operand, run: i8mm::product } },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::DotProd, run: Product { operand: dotprod::operand, run: dotprod::product } },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Neon, run: Product { operand: neon::operand, run: neon::product } },
    Variant { isa: Isa::Scalar, run: Product { operand: |_| Operand::Words, run: scalar::product } },
];

impl Product {
    /// How the activations of `scheme` are to be laid out.
    pub(crate) fn operand(self, scheme: Scheme) -> Operand {
        (self.operand)(scheme)
    }
}

/// The best variant that needs no more than `limit`.
pub(crate) fn best(limit: Isa) -> Product {
    choose(VARIANTS, limit)
}

/// See [`scalar::product`]: every variant gives the same bits, and a row's result does not depend on the other rows.
///
/// `x`: `[T, K]`; `out`: `[T, N]`; `scratch` is for the codes of `x`.
pub(crate) fn run(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    weight: &QuantizedMatrix,
    scratch: &mut Activations,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    let rows = x.len() / weight.cols().max(1);
    check("linear", "length of x", rows * weight.cols(), x.len())?;
    check("linear", "length of the output", rows * weight.rows(), out.len())?;
    if rows == 0 || weight.rows() == 0 {
        return Ok(());
    }
    scratch.fill(x, rows, weight, product.operand(weight.scheme()), pool)?;
    let out = Output::new(out, weight.rows());
    let job = Job { x: scratch, weight };
    let tasks = Tasks::new(rows, scratch.row_bytes(), weight.num_panels(), pool);
    // SAFETY: the variant was chosen for this machine; lengths were checked above; each task has its own columns of its own rows of
    // `out`, which outlives the loop.
    tasks.run(pool, &|rows, panels| unsafe { (product.run)(&job, rows, panels, out) });
    Ok(())
}

/// [`run`], with a gate on it: `x`: `[T, K]`; `weight`: `[2 F, K]` with `F` a multiple of 16; `out`: `[T, F]`.
pub(crate) fn run_gated(
    product: Product,
    out: &mut [f32],
    x: &[f32],
    weight: &QuantizedMatrix,
    activation: Gate,
    scratch: &mut Activations,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    let gated = Gated::new(out, x, [weight.rows(), weight.cols()], activation)?;
    scratch.fill(x, gated.rows(), weight, product.operand(weight.scheme()), pool)?;
    let job = Job { x: scratch, weight };
    // SAFETY: the variant was chosen for this machine; lengths were checked; each task has its own columns.
    unsafe { gated.run(&|rows, panels, out| (product.run)(&job, rows, panels, out), pool) };
    Ok(())
}

/// [`linear::run_groups`](super::linear::run_groups) of quantized rows: `x`, `[rows of all groups, K]`, was filled for matrices
/// like these.
///
/// # Panics
/// As there.
pub(crate) fn run_groups<'a>(
    product: Product,
    out: &mut [f32],
    x: &Activations,
    groups: &[Group],
    weight: &(dyn Fn(usize) -> &'a QuantizedMatrix + Sync),
    pool: &ThreadPool,
) -> usize {
    let Some(rows) = group_rows(groups) else { return 0 };
    let first = weight(groups[0].expert);
    assert!(x.fits(rows, first) && out.len() == rows * first.rows(), "operands hold the rows of all groups");
    let out = Output::new(out, first.rows());
    side_by_side(pool, groups, first.num_panels(), rows >= 16, &|group, panels| {
        let weight = weight(group.expert);
        let like_first = weight.rows() == first.rows() && weight.cols() == first.cols();
        assert!(like_first && weight.scheme() == first.scheme(), "matrices are of one shape and scheme");
        // SAFETY: the variant was chosen for this machine; lengths were checked above; each task has its own panels of rows that no
        // other group has, so its own part of `out`, which outlives the loop.
        unsafe { (product.run)(&Job { x, weight }, group.rows.clone(), panels, out) };
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::supported;
    use crate::cpu::linear::to_bytes;
    use crate::cpu::pool::PoolConfig;
    use crate::random::noise;
    use crate::{DType, Group, MatrixView};
    use proptest::prelude::*;
    use std::num::NonZeroUsize;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() }).unwrap()
    }

    fn packed(n: usize, k: usize, scheme: Scheme, bias: bool, seed: u64, pool: &ThreadPool) -> QuantizedMatrix {
        let bytes = to_bytes(&noise(n * k, seed), DType::BF16);
        let bias = noise(if bias { n } else { 0 }, seed + 1);
        let view = MatrixView { bytes: &bytes, dtype: DType::BF16, rows: n, cols: k };
        QuantizedMatrix::pack(&[view], (!bias.is_empty()).then_some(&bias[..]), scheme, pool).unwrap()
    }

    fn product(variant: Product, x: &[f32], weight: &QuantizedMatrix, pool: &ThreadPool) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / weight.cols() * weight.rows()];
        run(variant, &mut out, x, weight, &mut Activations::default(), pool).unwrap();
        out
    }

    /// [`product`] as one task: with more panels than the tasks of small products have.
    fn at_once(variant: Product, x: &[f32], weight: &QuantizedMatrix, pool: &ThreadPool) -> Vec<f32> {
        let rows = x.len() / weight.cols();
        let mut scratch = Activations::default();
        scratch.fill(x, rows, weight, variant.operand(weight.scheme()), pool).unwrap();
        let mut out = vec![f32::NAN; rows * weight.rows()];
        let (job, to) = (Job { x: &scratch, weight }, Output::new(&mut out, weight.rows()));
        // SAFETY: the machine has what the variant needs; this thread alone writes the output, which has all rows and columns.
        unsafe { (variant.run)(&job, 0..rows, 0..weight.num_panels(), to) };
        out
    }

    fn scalar() -> Product {
        best(Isa::Scalar)
    }

    /// What multiplies groups with AMX, but its instructions in plain Rust.
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    pub(super) const MODEL: Product = Product { operand: avx512::operand, run: grouped_model::product };

    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    proptest! {
        #![proptest_config(crate::random::cases(96))]

        // Up to three tiles of rows and five panels, up to three parts.
        #[test]
        fn the_layouts_of_tiles_have_the_bits_of_the_scalar_product(
            t in 1usize..40, n in 1usize..80, k in 1usize..600, threads in 1usize..3, scheme in 0..Scheme::ALL.len(), bias: bool,
            seed: u64,
        ) {
            let (pool, scheme) = (pool(threads), Scheme::ALL[scheme]);
            if scheme != Scheme::A8W8 {
                let matrix = packed(n, k, scheme, bias, seed >> 1, &pool);
                let x = noise(t * k, !seed);
                let want = product(scalar(), &x, &matrix, &pool);
                prop_assert_eq!(&product(MODEL, &x, &matrix, &pool), &want, "{}", scheme);
                prop_assert_eq!(&at_once(MODEL, &x, &matrix, &pool), &want, "{} at once", scheme);
            }
        }
    }

    proptest! {
        #![proptest_config(crate::random::cases(96))]

        #[test]
        fn every_variant_has_the_bits_of_the_scalar_one(
            t in 1usize..40, n in 1usize..80, k in 1usize..600, threads in 1usize..4, scheme in 0..Scheme::ALL.len(), bias: bool,
            seed: u64,
        ) {
            let (pool, scheme) = (pool(threads), Scheme::ALL[scheme]);
            let matrix = packed(n, k, scheme, bias, seed >> 1, &pool);
            let x = noise(t * k, !seed);
            let want = product(scalar(), &x, &matrix, &pool);
            for v in supported(VARIANTS) {
                prop_assert_eq!(&product(v.run, &x, &matrix, &pool), &want, "{:?} {}", v.isa, scheme);
                prop_assert_eq!(&at_once(v.run, &x, &matrix, &pool), &want, "{:?} {} at once", v.isa, scheme);
            }
        }
    }

    #[test]
    fn the_scalar_product_is_near_the_exact_one() {
        let pool = pool(1);
        let (t, n, k) = (3, 21, 200);
        let x = noise(t * k, 9);
        let weights = noise(n * k, 5);
        let exact: Vec<f64> = (0..t * n)
            .map(|i| (0..k).map(|at| f64::from(x[i / n * k + at]) * f64::from(weights[i % n * k + at])).sum())
            .collect();
        for scheme in Scheme::ALL {
            let out = product(scalar(), &x, &packed(n, k, scheme, false, 5, &pool), &pool);
            let error: f64 = out.iter().zip(&exact).map(|(out, exact)| (f64::from(*out) - exact).powi(2)).sum();
            let error = (error / exact.iter().map(|exact| exact.powi(2)).sum::<f64>()).sqrt();
            // Of uniform noise, a step of 8 bits is 1 / 127 and its rounding 0.29 of that, beside a deviation of 0.58; the bf16
            // of these weights adds 0.1 %.
            let bound = match scheme {
                Scheme::A16W8 { .. } => 0.006,
                Scheme::A8W8 => 0.009,
                _ => 0.09,
            };
            assert!(error < bound, "{scheme}: {error}");
        }
    }

    #[test]
    fn many_rows_and_columns_change_no_bit() {
        let pool = pool(2);
        let (t, n, k) = (203, 37, 1500);
        let x = noise(t * k, 4);
        for scheme in Scheme::ALL {
            let matrix = packed(n, k, scheme, true, 3, &pool);
            let want = product(scalar(), &x[..97 * k], &matrix, &pool);
            // The definition computes each row by itself, and takes its time.
            for v in supported(VARIANTS).into_iter().filter(|v| v.isa != Isa::Scalar) {
                let whole = product(v.run, &x, &matrix, &pool);
                assert_eq!(whole[..want.len()], want, "{:?} {scheme}", v.isa);
                for row in [0, 95, 96, 150, 202] {
                    let alone = product(v.run, &x[row * k..][..k], &matrix, &pool);
                    assert_eq!(alone, whole[row * n..][..n], "{:?} {scheme} row {row}", v.isa);
                }
            }
        }
    }

    /// Few rows take other loops than many, and what is left over behind tiles of 16 and 32 rows others than those before it.
    #[test]
    fn any_number_of_rows_gives_a_row_the_same_bits() {
        let pool = pool(2);
        let (n, k) = (69, 700);
        let x = noise(67 * k, 8);
        for scheme in Scheme::ALL {
            let matrix = packed(n, k, scheme, true, 6, &pool);
            for v in supported(VARIANTS).into_iter().filter(|v| v.isa != Isa::Scalar) {
                let alone: Vec<f32> = x.chunks(k).flat_map(|row| product(v.run, row, &matrix, &pool)).collect();
                for t in (2..=8).chain([11, 12, 13, 14, 15, 16, 17, 22, 23, 25, 26, 31, 32, 33, 37, 38, 48, 50, 64, 67])
                {
                    let some = product(v.run, &x[..t * k], &matrix, &pool);
                    assert_eq!(some, alone[..t * n], "{:?} {scheme} {t} rows", v.isa);
                }
            }
        }
    }

    /// The largest codes everywhere, of one sign or the other: where sums that are kept in too few bits would overflow.
    #[test]
    fn the_largest_sums_are_exact() {
        let pool = pool(1);
        let (n, k) = (17, 4096);
        for scheme in Scheme::ALL {
            for (sign, x) in [(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)] {
                let bytes = to_bytes(&vec![sign; n * k], DType::F32);
                let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows: n, cols: k };
                let matrix = QuantizedMatrix::pack(&[view], None, scheme, &pool).unwrap();
                // Enough rows for tiles.
                let exact = sign * x * k as f32;
                let x = vec![x; 17 * k];
                let want = product(scalar(), &x, &matrix, &pool);
                assert!(want.iter().all(|out| (out / exact - 1.0).abs() < 0.13), "{scheme} {want:?}");
                for v in supported(VARIANTS) {
                    assert_eq!(product(v.run, &x, &matrix, &pool), want, "{:?} {scheme}", v.isa);
                }
                #[cfg(all(feature = "x86", target_arch = "x86_64"))]
                if scheme != Scheme::A8W8 {
                    assert_eq!(product(MODEL, &x, &matrix, &pool), want, "{scheme}");
                }
            }
        }
    }

    #[test]
    fn rows_come_back_near_what_they_were() {
        let pool = pool(1);
        for scheme in Scheme::ALL {
            let (n, k) = (19, 77);
            let matrix = packed(n, k, scheme, false, 8, &pool);
            let weights = noise(n * k, 8);
            let mut row = vec![f32::NAN; k];
            for r in 0..n {
                matrix.read_row(r, &mut row);
                for (found, wanted) in row.iter().zip(&weights[r * k..]) {
                    assert!((found - wanted).abs() < 0.15, "{scheme} {found} {wanted}");
                }
            }
            assert_eq!(matrix.bytes(), packed_bytes(scheme, n, k));
        }
    }

    #[test]
    fn what_cannot_be_quantized_is_refused() {
        let pool = pool(1);
        let scheme = Scheme::A16W4 { group: Group::G32, zero_point: false };
        for bad in [f32::NAN, f32::INFINITY] {
            let bytes = to_bytes(&[0.0, 1.0, bad, 2.0], DType::F32);
            let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows: 1, cols: 4 };
            let error = QuantizedMatrix::pack(&[view], None, scheme, &pool).unwrap_err();
            assert_eq!(error.to_string(), "pack: a weight that is to be quantized is not finite");
        }
        let bytes = vec![0; 70_000 * 2];
        let view = MatrixView { bytes: &bytes, dtype: DType::BF16, rows: 1, cols: 70_000 };
        let error = QuantizedMatrix::pack(&[view], None, Scheme::A8W8, &pool).unwrap_err();
        assert_eq!(error.to_string(), "pack: columns of a quantized matrix, at most should be 66304, found 70000");
    }
}
