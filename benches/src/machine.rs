//! What the machine can do at best, so that a measurement can be given as a fraction of it.
//!
//! Both numbers are measured, in the process and at the moment they are compared with: a shared machine, or one that
//! lowers its clock under load, has less to give than its data sheet says. Only ratios of one run count. Threads are
//! not pinned to cores. Build with optimization: in a debug build the numbers mean nothing.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use dashinfer_kernels::cpu::Isa;

/// Repetitions, of which the best counts: whatever disturbs a measurement makes it slower.
const NUM_ROUNDS: usize = 5;

/// Bytes per second that `threads` threads read from memory together (0 counts as 1).
///
/// Each thread fills a part of its own, so that the part lies in the memory nearest to it, then adds it up with many
/// independent accumulators: sequential loads with nothing to wait for, as in a decode step that streams weights. All
/// parts together have 1 GiB, or four times the L3 caches where that is more, so that little of a round is found in a
/// cache. Pages are whatever the allocator gets. Takes about a second and that much memory.
#[must_use]
pub fn read_bandwidth(threads: usize) -> f64 {
    read_bandwidth_of(threads, (1 << 30).max(4 * l3_bytes().unwrap_or(0)))
}

fn read_bandwidth_of(threads: usize, total_bytes: usize) -> f64 {
    let len = (total_bytes / threads.max(1) / size_of::<u64>()).max(1);
    // Not zeros: a page never written can be one shared page, which stays in the cache.
    let fill = || (1..=len as u64).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect::<Vec<u64>>();
    best_rate(threads, (len * size_of::<u64>()) as f64, fill, |part| {
        black_box(sum(part));
    })
}

/// The wrapping sum in 32 lanes, which become vector registers.
fn sum(values: &[u64]) -> u64 {
    const LANES: usize = 32;
    let mut lanes = [0u64; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(x);
        }
    }
    lanes.iter().chain(tail).fold(0, |sum, &x| sum.wrapping_add(x))
}

/// Bytes of the L3 caches of all sockets and core complexes together; `None` where Linux does not tell.
#[must_use]
pub fn l3_bytes() -> Option<usize> {
    let mut caches = std::collections::BTreeMap::new();
    for cpu in std::fs::read_dir("/sys/devices/system/cpu").ok()?.flatten() {
        for index in std::fs::read_dir(cpu.path().join("cache")).into_iter().flatten().flatten() {
            let read = |name| std::fs::read_to_string(index.path().join(name)).ok();
            let (Some(level), Some(size), Some(cpus)) = (read("level"), read("size"), read("shared_cpu_list")) else {
                continue;
            };
            if level.trim() == "3" {
                caches.insert(cpus, cache_bytes(size.trim())?);
            }
        }
    }
    (!caches.is_empty()).then(|| caches.values().sum())
}

/// A size as sysfs writes it: `32768K`.
fn cache_bytes(size: &str) -> Option<usize> {
    size.strip_suffix('K')?.parse::<usize>().ok()?.checked_mul(1024)
}

/// Multiplications and additions per second, in `f32`, of `threads` threads together (0 counts as 1), with the instructions
/// of `isa`: what products can reach whose kernels use them.
///
/// A fused multiply-add counts as two. Each thread repeats `a = a · m + c` on enough independent registers to fill its
/// pipelines, with no memory involved: the bound of a matrix product in `f32`. [`peak_flops_by_isa`] says what other
/// instructions would give.
#[must_use]
pub fn peak_flops(threads: usize, isa: Isa) -> f64 {
    match isa {
        Isa::Scalar => peak_flops_of(threads, NUM_STEPS, |isa| isa == PLAIN),
        Isa::Avx2 => peak_flops_of(threads, NUM_STEPS, |isa| isa == AVX2),
        // Kernels newer than these lines: the best that is known here.
        _ => peak_flops_of(threads, NUM_STEPS, |_| true),
    }
}

/// [`peak_flops`] of every vector width that this CPU has, by name: `plain` is what the compiler makes of a plain loop (NEON
/// on Arm), `avx2` is with FMA.
#[must_use]
pub fn peak_flops_by_isa(threads: usize) -> Vec<(&'static str, f64)> {
    variants().iter().map(|variant| (variant.isa, variant.rate(threads, NUM_STEPS))).collect()
}

/// Multiplications and additions per second of int8 in tiles (AMX), of `threads` threads together; `None` where there are none.
///
/// A multiply-add counts as two. Each thread repeats `tdpbsud` on four sums, with no memory involved.
#[must_use]
pub fn peak_tile_ops(threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if Isa::Amx.is_available() {
        const NUM_STEPS: usize = 500_000;
        let amount = (NUM_STEPS * 4 * 2 * 16 * 16 * 64) as f64;
        // SAFETY: there are tiles, and this process may use them.
        return Some(best_rate(threads, amount, || (), |(): &()| unsafe { x86::multiply_tiles(NUM_STEPS) }));
    }
    let _ = threads;
    None
}

/// Some 20 ms per round.
const NUM_STEPS: usize = 10_000_000;

fn peak_flops_of(threads: usize, num_steps: usize, wanted: impl Fn(&str) -> bool) -> f64 {
    let variants = variants();
    variants.iter().filter(|variant| wanted(variant.isa)).map(|v| v.rate(threads, num_steps)).fold(0.0, f64::max)
}

const PLAIN: &str = "plain";
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "a CPU without it has no kernels for it"))]
const AVX2: &str = "avx2";

/// A loop that does `num_values` multiply-adds per step, and returns something that depends on all of them.
struct Variant {
    isa: &'static str,
    num_values: usize,
    run: fn(usize) -> f32,
}

impl Variant {
    fn rate(&self, threads: usize, num_steps: usize) -> f64 {
        let amount = (2 * self.num_values * num_steps) as f64;
        best_rate(
            threads,
            amount,
            || (),
            |(): &()| {
                black_box((self.run)(num_steps));
            },
        )
    }
}

/// The loops that this CPU can run.
fn variants() -> Vec<Variant> {
    let mut variants = vec![Variant { isa: PLAIN, num_values: plain::NUM_VALUES, run: plain::multiply_add }];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            variants.push(Variant {
                isa: AVX2,
                num_values: 8 * x86::NUM_REGISTERS,
                // SAFETY: only this line can call it, and the features that it needs were just detected.
                run: |num_steps| unsafe { x86::multiply_add_avx2(num_steps) },
            });
        }
        if is_x86_feature_detected!("avx512f") {
            variants.push(Variant {
                isa: "avx512f",
                num_values: 16 * x86::NUM_REGISTERS,
                // SAFETY: as above.
                run: |num_steps| unsafe { x86::multiply_add_avx512(num_steps) },
            });
        }
    }
    variants
}

/// `a · M + C` tends to 1: never infinite, never subnormal.
const M: f32 = 0.75;
const C: f32 = 0.25;

mod plain {
    use super::{C, M, black_box};

    /// Twelve registers of SSE's 16, or 24 of NEON's 32.
    pub(super) const NUM_VALUES: usize = if cfg!(target_arch = "aarch64") { 96 } else { 48 };

    pub(super) fn multiply_add(num_steps: usize) -> f32 {
        let mut values = black_box([2.0f32; NUM_VALUES]);
        let (m, c) = black_box((M, C));
        for _ in 0..num_steps {
            for a in &mut values {
                // Where there is no instruction for it, `mul_add` is a slow call.
                let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
                *a = if fused { a.mul_add(m, c) } else { *a * m + c };
            }
        }
        values.iter().sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{C, M, black_box};
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps, _mm512_add_ps, _mm512_cvtss_f32,
        _mm512_fmadd_ps, _mm512_set1_ps,
    };

    /// Two instructions per cycle with a latency of four or five need ten in flight; AVX2 has 16 registers.
    pub(super) const NUM_REGISTERS: usize = 12;

    /// The palette, and eight tiles of 16 rows of 64 bytes, as `ldtilecfg` reads them.
    #[repr(C, align(64))]
    struct TileConfig([u8; 64]);

    /// # Safety
    /// The machine has tiles, and the system lets this process use them.
    pub(super) unsafe fn multiply_tiles(num_steps: usize) {
        let mut config = TileConfig([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            (config.0[16 + 2 * tile], config.0[48 + tile]) = (64, 16);
        }
        // SAFETY: the configuration is valid; the rest works on tiles alone, which are given back.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbsud tmm0, tmm4, tmm6",
                "tdpbsud tmm1, tmm4, tmm7",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                "dec {steps}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) config.0.as_ptr(),
                steps = inout(reg) num_steps.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn multiply_add_avx2(num_steps: usize) -> f32 {
        let mut values = [_mm256_set1_ps(black_box(2.0)); NUM_REGISTERS];
        let (m, c) = (_mm256_set1_ps(black_box(M)), _mm256_set1_ps(black_box(C)));
        for _ in 0..num_steps {
            for a in &mut values {
                *a = _mm256_fmadd_ps(*a, m, c);
            }
        }
        _mm256_cvtss_f32(values.into_iter().fold(c, |sum, a| _mm256_add_ps(sum, a)))
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply_add_avx512(num_steps: usize) -> f32 {
        let mut values = [_mm512_set1_ps(black_box(2.0)); NUM_REGISTERS];
        let (m, c) = (_mm512_set1_ps(black_box(M)), _mm512_set1_ps(black_box(C)));
        for _ in 0..num_steps {
            for a in &mut values {
                *a = _mm512_fmadd_ps(*a, m, c);
            }
        }
        _mm512_cvtss_f32(values.into_iter().fold(c, |sum, a| _mm512_add_ps(sum, a)))
    }
}

/// The best of [`NUM_ROUNDS`] rounds in which each of `threads` threads does `amount` of `work` on what it `prepare`d:
/// the amount of all, per second from the first start to the last end.
fn best_rate<T>(threads: usize, amount: f64, prepare: impl Fn() -> T + Sync, work: impl Fn(&T) + Sync) -> f64 {
    let threads = threads.max(1);
    let barrier = Barrier::new(threads);
    let measure = || {
        let prepared = prepare();
        std::array::from_fn::<_, NUM_ROUNDS, _>(|_| {
            barrier.wait();
            let start = Instant::now();
            work(&prepared);
            (start, Instant::now())
        })
    };
    let spans: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(measure)).collect();
        handles.into_iter().map(|handle| handle.join().expect("a measuring thread does not panic")).collect()
    });
    let mut best = 0.0;
    for round in 0..NUM_ROUNDS {
        let start = spans.iter().map(|spans| spans[round].0).min().expect("there is a thread");
        let end = spans.iter().map(|spans| spans[round].1).max().expect("there is a thread");
        best = f64::max(best, threads as f64 * amount / (end - start).as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_positive_and_finite_for_any_number_of_threads() {
        for threads in [0, 1, 3] {
            for rate in [read_bandwidth_of(threads, 1 << 20), peak_flops_of(threads, 10_000, |_| true)] {
                assert!(rate.is_finite() && rate > 0.0, "{threads} threads: {rate}");
            }
        }
    }

    #[test]
    fn every_value_is_read() {
        for len in [0, 1, 31, 32, 33, 100] {
            let values: Vec<u64> = (0..len).map(|i| u64::MAX - i).collect();
            assert_eq!(sum(&values), values.iter().fold(0, |a: u64, b| a.wrapping_add(*b)));
        }
    }

    #[test]
    fn every_variant_multiplies_and_adds() {
        for variant in variants() {
            // After n steps a value is 1 + 0.75ⁿ; far out it is 1. A vector variant adds C, and reports one lane.
            let count = if variant.isa == PLAIN { variant.num_values as f32 } else { 12.25 };
            assert!(((variant.run)(1000) - count).abs() < 1e-3);
            assert!((variant.run)(1) > count + 1.0);
        }
    }

    #[test]
    fn cache_sizes_are_parsed_or_refused() {
        assert_eq!(cache_bytes("32768K"), Some(32 << 20));
        assert_eq!(cache_bytes("32M"), None);
        assert_eq!(cache_bytes("K"), None);
        assert!(l3_bytes().is_none_or(|bytes| bytes > 0));
    }
}
