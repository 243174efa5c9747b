//! Every CPU kernel in the shapes of a published model (Qwen2.5 0.5B) beside the machine's peak and a plain baseline.
//!
//! Criterion's groups are named `op/dtype/shape`; a table of all that was measured follows them. Each call works on other
//! memory than the calls before it, and all of it together is larger than the caches, because that is how a model's
//! layers find it. Threads: one for each core, or `BENCH_THREADS`; kernels: the best of the machine, or those of `BENCH_ISA`.

#![allow(missing_docs, reason = "a program")]
#![expect(clippy::print_stdout, reason = "what it measures is its output")]

use std::hint::black_box;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use benches::limits::{Limit, Limits};
use benches::table::{Row, Table};
use benches::{machine, naive};
use criterion::{Criterion, Throughput};
use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, CpuKvCache, CpuTensor, Isa, PoolConfig, to_bytes};
use dashinfer_kernels::{
    Activation, AttentionParams, Backend, CacheLayout, CacheType, DType, Issue, KvCacheSpec, LatentHeads, LatentParams,
    MatrixView, PagedBatch, Rope, RopePairs, SampleParams, SampleRow, SequenceRows, StepRows, TensorUse,
};

const FITS: &str = "the operands of a benchmark fit each other";

const HIDDEN: usize = 896;
const MLP: usize = 4864;
const VOCAB: usize = 151_936;
const HEAD_DIM: usize = 64;
const PARAMS: AttentionParams =
    AttentionParams { num_heads: 14, num_kv_heads: 2, head_dim: HEAD_DIM, scale: 0.125, window: None, soft_cap: None };
const QKV: usize = (PARAMS.num_heads + 2 * PARAMS.num_kv_heads) * HEAD_DIM;
const BLOCK_SIZE: usize = 32;
/// Of DeepSeek-V2-Lite.
const LATENT: LatentParams =
    LatentParams { num_heads: 16, rank: 512, nope_dim: 128, rope_dim: 64, v_dim: 128, scale: 0.1147 };

/// What a benchmark is called, and what one call has to do.
struct Case {
    op: &'static str,
    /// `dtype/shape`
    name: String,
    bytes: f64,
    flops: f64,
}

struct Kernels {
    criterion: Criterion,
    backend: CpuBackend,
    table: Table,
    /// Bytes that are too many for the caches.
    working_set: usize,
}

impl Kernels {
    fn new() -> Self {
        let threads = std::env::var("BENCH_THREADS").ok().and_then(|threads| threads.parse().ok());
        let pool = PoolConfig { threads, cores: Vec::new() };
        let isa = std::env::var("BENCH_ISA").ok();
        let isa = isa.map(|name| Isa::ALL.into_iter().find(|isa| isa.name() == name).expect("an instruction set"));
        let backend =
            CpuBackend::new(&CpuConfig { pool, isa, ..CpuConfig::default() }).expect("threads, and what was asked for");
        let limits = Limits::measure(backend.pool().num_threads(), Isa::best());
        let criterion = Criterion::default()
            .sample_size(10)
            .nresamples(1000)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(500))
            .configure_from_args();
        let working_set = (512 << 20).max(4 * machine::l3_bytes().unwrap_or(0));
        Self { criterion, backend, table: Table { limits, rows: Vec::new() }, working_set }
    }

    /// How many operands of `bytes` fill the working set.
    fn copies(&self, bytes: usize) -> usize {
        self.working_set.div_ceil(bytes.max(1))
    }

    /// Times what `setup` gives, and once what `naive` does. Neither happens if the command line does not ask for this case.
    /// `naive` returns the time of as much work as a call does.
    fn measure<R: FnMut(&mut CpuBackend)>(
        &mut self,
        case: Case,
        setup: impl FnOnce(&mut CpuBackend) -> R,
        naive: impl FnOnce() -> f64,
    ) {
        let Case { op, name, bytes, flops } = case;
        let (backend, mut setup, mut run) = (&mut self.backend, Some(setup), None);
        let mut samples = Vec::new();
        let mut group = self.criterion.benchmark_group(op);
        group.throughput(match self.table.limits.of(bytes, flops) {
            Limit::Memory(_) => Throughput::Bytes(bytes as u64),
            Limit::Arithmetic(_) => Throughput::Elements(flops as u64),
        });
        group.bench_function(&name, |bencher| {
            if let Some(setup) = setup.take() {
                run = Some(setup(backend));
            }
            let run = run.as_mut().expect("it was set up on the first call");
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                for _ in 0..iterations {
                    run(backend);
                }
                let time = start.elapsed();
                samples.push(time.as_secs_f64() / iterations as f64);
                time
            });
        });
        group.finish();
        if samples.is_empty() {
            return;
        }
        samples.sort_by(f64::total_cmp);
        let seconds = samples[samples.len() / 2];
        self.table.rows.push(Row { name: format!("{op}/{name}"), seconds, bytes, flops, naive_seconds: naive() });
    }

    fn linear(&mut self, dtype: DType, rows: usize, cols: usize, out_cols: usize) {
        let weight_bytes = out_cols * cols * dtype.size_bytes();
        let copies = self.copies(weight_bytes);
        let case = Case {
            op: "linear",
            name: format!("{dtype}/{rows}x{cols}x{out_cols}"),
            bytes: (weight_bytes + rows * (cols + out_cols) * size_of::<f32>()) as f64,
            flops: 2.0 * (rows * cols * out_cols) as f64,
        };
        let values = noise(out_cols * cols);
        let bytes = to_bytes(&values, dtype);
        let view = MatrixView { bytes: &bytes, dtype, rows: out_cols, cols };
        let setup = |backend: &mut CpuBackend| {
            let mut weights = Rotation::new(copies, || backend.pack(&[view], None, None).expect(FITS));
            let (x, mut out) = (tensor(backend, rows, cols), tensor(backend, rows, out_cols));
            move |backend: &mut CpuBackend| backend.linear(&mut out, &x, weights.next()).expect(FITS)
        };
        let naive = || {
            // A row takes as long as another, and a prompt would take minutes.
            let few = rows.min(2);
            let (x, mut out) = (noise(few * cols), vec![0.0; few * out_cols]);
            time(|| {
                naive::linear(&mut out, black_box(&x), &values, cols);
                black_box(&mut out);
            }) * (rows / few) as f64
        };
        self.measure(case, setup, naive);
    }

    fn rms_norm(&mut self, rows: usize) {
        let bytes = rows * HIDDEN * size_of::<f32>();
        let w = vec![1.5; HIDDEN];
        for (op, num_operands) in [("rms_norm", 2), ("add_rms_norm", 4)] {
            let copies = self.copies(num_operands * bytes);
            // A multiply-add for the sum and two multiplications; an addition for the residual.
            let flops = (rows * HIDDEN * (2 + num_operands)) as f64;
            let case = Case { op, name: format!("f32/{rows}x{HIDDEN}"), bytes: (num_operands * bytes) as f64, flops };
            let add = op == "add_rms_norm";
            let w = &w;
            let setup = |backend: &mut CpuBackend| {
                let make = || [(); 3].map(|()| tensor(backend, rows, HIDDEN));
                let mut operands = Rotation::new(copies, make);
                move |backend: &mut CpuBackend| {
                    let [x, residual, out] = operands.next();
                    if add {
                        backend.add_rms_norm(out, residual, x, w, 1e-6).expect(FITS);
                    } else {
                        backend.rms_norm(out, x, w, 1e-6).expect(FITS);
                    }
                }
            };
            let naive = || {
                let (x, mut sum, mut out) = (noise(rows * HIDDEN), noise(rows * HIDDEN), noise(rows * HIDDEN));
                time(|| {
                    if add {
                        sum.iter_mut().zip(&x).for_each(|(sum, x)| *sum += x);
                    }
                    naive::rms_norm(&mut out, if add { &sum } else { &x }, w, 1e-6);
                })
            };
            self.measure(case, setup, naive);
        }
    }

    fn silu_mul(&mut self, rows: usize) {
        let bytes = 3 * rows * MLP * size_of::<f32>();
        let copies = self.copies(bytes);
        // The exponential is some ten operations.
        let flops = (15 * rows * MLP) as f64;
        let case = Case { op: "silu_mul", name: format!("f32/{rows}x{MLP}"), bytes: bytes as f64, flops };
        let setup = |backend: &mut CpuBackend| {
            let make = || (tensor(backend, rows, MLP), tensor(backend, rows, 2 * MLP));
            let mut operands = Rotation::new(copies, make);
            move |backend: &mut CpuBackend| {
                let (out, x) = operands.next();
                backend.gate(out, x, Activation::Silu).expect(FITS);
            }
        };
        let naive = || {
            let (x, mut out) = (noise(2 * rows * MLP), noise(rows * MLP));
            time(|| naive::silu_mul(&mut out, &x, MLP))
        };
        self.measure(case, setup, naive);
    }

    /// `batch` sequences of `context` tokens, the last `rows` of which are computed.
    fn attention(&mut self, params: AttentionParams, cache_type: CacheType, batch: usize, rows: usize, context: usize) {
        let AttentionParams { num_heads, num_kv_heads, head_dim, .. } = params;
        let kind = if rows == 1 { "decode" } else { "prefill" };
        // Row `p` sees `p + 1` positions.
        let pairs = (batch * rows * (2 * context - rows + 1)) as f64 / 2.0;
        let layer_bytes =
            batch * cache_spec(&params, cache_type, 1, context, 1).block_bytes() * context.div_ceil(BLOCK_SIZE);
        let shape = if params == PARAMS { String::new() } else { format!("-{num_heads}x{num_kv_heads}x{head_dim}") };
        let case = Case {
            op: "attention",
            name: format!("{cache_type}/{kind}-{batch}x{context}{shape}"),
            bytes: layer_bytes as f64 + (2 * batch * rows * num_heads * head_dim * size_of::<f32>()) as f64,
            flops: 4.0 * pairs * (num_heads * head_dim) as f64,
        };
        let layers = self.copies(layer_bytes);
        let setup = |backend: &mut CpuBackend| {
            let mut cache = filled_cache(backend, &params, cache_type, layers, batch, context);
            begin(backend, &ids(batch * rows, 0), &paged(batch, rows, context), &mut cache);
            let qkv = tensor(backend, batch * rows, (num_heads + 2 * num_kv_heads) * head_dim);
            let mut out = tensor(backend, batch * rows, num_heads * head_dim);
            let mut layer = 0;
            move |backend: &mut CpuBackend| {
                layer = (layer + 1) % layers;
                backend.attention(&mut out, &qkv, &cache, layer, &params, None).expect(FITS);
            }
        };
        let naive = || {
            let (q, mut out) = (noise(rows * head_dim), vec![0.0; rows * head_dim]);
            let (k, v) = (noise(context * head_dim), noise(context * head_dim));
            time(|| naive::attention(&mut out, &q, &k, &v, head_dim)) * (batch * num_heads) as f64
        };
        self.measure(case, setup, naive);
    }

    /// [`attention`](Self::attention) over latent vectors, in the shape of DeepSeek-V2-Lite.
    fn latent_attention(&mut self, cache_type: CacheType, batch: usize, rows: usize, context: usize) {
        let LatentParams { num_heads, rank, nope_dim, rope_dim, v_dim, .. } = LATENT;
        let kind = if rows == 1 { "decode" } else { "prefill" };
        let pairs = (batch * rows * (2 * context - rows + 1)) as f64 / 2.0;
        let spec = |layers| KvCacheSpec {
            num_layers: layers,
            num_blocks: batch * context.div_ceil(BLOCK_SIZE),
            block_size: BLOCK_SIZE,
            num_kv_heads: 1,
            head_dim: rank + rope_dim,
            cache_type,
            layout: CacheLayout::Latent { rank },
        };
        let weights = num_heads * (nope_dim + v_dim) * rank;
        let layer_bytes = spec(1).num_blocks * spec(1).block_bytes();
        let (q_cols, out_cols) = (num_heads * (nope_dim + rope_dim), num_heads * v_dim);
        let case = Case {
            op: "latent_attention",
            name: format!("{cache_type}/{kind}-{batch}x{context}-{num_heads}x{}", rank + rope_dim),
            bytes: (layer_bytes + 2 * weights + batch * rows * (q_cols + out_cols) * size_of::<f32>()) as f64,
            flops: 2.0 * (pairs * (num_heads * (2 * rank + rope_dim)) as f64 + (batch * rows * weights) as f64),
        };
        let layers = self.copies(layer_bytes + 2 * weights);
        let setup = |backend: &mut CpuBackend| {
            let mut cache = backend.kv_cache(&spec(layers)).expect("memory for a cache");
            begin(backend, &ids(batch * context, 0), &paged(batch, context, context), &mut cache);
            let [mut q, mut kv] = [q_cols, rank + rope_dim].map(|cols| tensor(backend, batch * context, cols));
            let norm = vec![1.0; rank];
            for layer in 0..layers {
                let norm = (&norm, 1e-6);
                backend.latent_rope_and_cache(&mut q, &mut kv, &mut cache, layer, &LATENT, 0, norm).expect(FITS);
            }
            let matrix = |rows: usize, cols: usize| {
                let bytes = to_bytes(&noise(rows * cols), DType::BF16);
                let view = MatrixView { bytes: &bytes, dtype: DType::BF16, rows, cols };
                backend.pack(&[view], None, None).expect("memory for a matrix")
            };
            let mut heads = Rotation::new(layers, || LatentHeads {
                queries: matrix(num_heads * rank, nope_dim),
                values: matrix(num_heads * v_dim, rank),
            });
            begin(backend, &ids(batch * rows, 0), &paged(batch, rows, context), &mut cache);
            let q = tensor(backend, batch * rows, q_cols);
            let mut out = tensor(backend, batch * rows, out_cols);
            let mut layer = 0;
            move |backend: &mut CpuBackend| {
                layer = (layer + 1) % layers;
                backend.latent_attention(&mut out, &q, &cache, layer, &LATENT, heads.next()).expect(FITS);
            }
        };
        let naive = || {
            let width = rank + rope_dim;
            let (q, mut out, k) = (noise(rows * width), vec![0.0; rows * width], noise(context * width));
            time(|| naive::attention(&mut out, &q, &k, &k, width)) * (batch * num_heads) as f64
        };
        self.measure(case, setup, naive);
    }

    fn rope_and_cache(&mut self, cache_type: CacheType, rows: usize) {
        let cached = cache_spec(&PARAMS, cache_type, 1, rows, 1).block_bytes() * rows.div_ceil(BLOCK_SIZE);
        let rotated = (PARAMS.num_heads + PARAMS.num_kv_heads) * HEAD_DIM;
        let case = Case {
            op: "rope_and_cache",
            name: format!("{cache_type}/{rows}x{QKV}"),
            bytes: (cached + rows * (QKV + rotated) * size_of::<f32>()) as f64,
            flops: 3.0 * (rows * rotated) as f64,
        };
        let layers = self.copies(cached + rows * QKV * size_of::<f32>());
        let setup = |backend: &mut CpuBackend| {
            let spec = cache_spec(&PARAMS, cache_type, layers, rows, 1);
            let mut cache = backend.kv_cache(&spec).expect("memory for a cache");
            begin(backend, &ids(rows, 0), &paged(1, rows, rows), &mut cache);
            let mut qkv = Rotation::new(layers, || tensor(backend, rows, QKV));
            let mut layer = 0;
            move |backend: &mut CpuBackend| {
                layer = (layer + 1) % layers;
                backend.rope_and_cache(qkv.next(), &mut cache, layer, &PARAMS, 0, None).expect(FITS);
            }
        };
        let naive = || {
            let (mut heads, kv) = (noise(rows * rotated), noise(2 * rows * PARAMS.num_kv_heads * HEAD_DIM));
            let (inv_freq, mut cache) = (rope().inv_freq, vec![0.0; kv.len()]);
            time(|| {
                naive::rope(&mut heads, rotated, &inv_freq);
                cache.copy_from_slice(black_box(&kv));
            })
        };
        self.measure(case, setup, naive);
    }

    fn embed(&mut self, dtype: DType, rows: usize) {
        let case = Case {
            op: "embed",
            name: format!("{dtype}/{rows}x{HIDDEN}"),
            bytes: (rows * HIDDEN * (dtype.size_bytes() + size_of::<f32>())) as f64,
            flops: 0.0,
        };
        let bytes = to_bytes(&noise(VOCAB * HIDDEN), dtype);
        let ids: Vec<Vec<u32>> = (0..64).map(|list| ids(rows, list)).collect();
        let view = MatrixView { bytes: &bytes, dtype, rows: VOCAB, cols: HIDDEN };
        let setup = |backend: &mut CpuBackend| {
            let table = backend.pack(&[view], None, None).expect(FITS);
            let mut out = tensor(backend, rows, HIDDEN);
            let mut lists = ids.iter().cycle();
            let batch = paged(1, rows, rows);
            let mut cache =
                backend.kv_cache(&cache_spec(&PARAMS, dtype.into(), 1, rows, 1)).expect("memory for a cache");
            move |backend: &mut CpuBackend| {
                begin(backend, lists.next().expect("it has no end"), &batch, &mut cache);
                backend.embed(&mut out, &table, 1.0).expect(FITS);
            }
        };
        let naive = || {
            let mut out = vec![0.0; rows * HIDDEN];
            let mut lists = ids.iter().cycle();
            time(|| {
                for (out, &id) in out.chunks_exact_mut(HIDDEN).zip(lists.next().expect("it has no end")) {
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = dashinfer_kernels::element(&bytes, dtype, id as usize * HIDDEN + i);
                    }
                }
                black_box(&out);
            })
        };
        self.measure(case, setup, naive);
    }

    fn sample(&mut self, kind: &str, params: &SampleParams, rows: usize) {
        let bytes = rows * VOCAB * size_of::<f32>();
        let case = Case { op: "sample", name: format!("f32/{kind}-{rows}x{VOCAB}"), bytes: bytes as f64, flops: 0.0 };
        let copies = self.copies(bytes);
        let setup = |backend: &mut CpuBackend| {
            let mut logits = Rotation::new(copies, || tensor(backend, rows, VOCAB));
            let row = |logits_row| SampleRow::new(logits_row, params, 100);
            let rows: Vec<_> = (0..rows).map(row).collect();
            move |backend: &mut CpuBackend| {
                backend.sample(logits.next(), &rows).expect(FITS);
                black_box(backend.collect_sampled().expect(FITS));
            }
        };
        let naive = || {
            let logits = noise(VOCAB);
            time(|| {
                black_box(naive::argmax(black_box(&logits)));
            }) * rows as f64
        };
        self.measure(case, setup, naive);
    }
}

/// Things to use in turn.
struct Rotation<T> {
    items: Vec<T>,
    next: usize,
}

impl<T> Rotation<T> {
    fn new(len: usize, make: impl FnMut() -> T) -> Self {
        Self { items: std::iter::repeat_with(make).take(len).collect(), next: 0 }
    }

    fn next(&mut self) -> &mut T {
        self.next = (self.next + 1) % self.items.len();
        &mut self.items[self.next]
    }
}

/// The shortest of three times.
fn time(mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..3).map(once).fold(f64::INFINITY, f64::min)
}

/// Values within 1 of zero, with no pattern that a cache or a branch could learn.
fn noise(len: usize) -> Vec<f32> {
    let mut state = len as u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn ids(len: usize, seed: usize) -> Vec<u32> {
    noise(len + seed).iter().take(len).map(|x| ((x + 1.0) / 2.0 * (VOCAB - 1) as f32) as u32).collect()
}

fn tensor(backend: &CpuBackend, rows: usize, cols: usize) -> CpuTensor {
    let mut tensor = backend.tensor(rows, cols, TensorUse::Activations).expect("memory for a tensor");
    tensor.resize("benchmark", rows, cols).expect(FITS);
    tensor.values_mut().copy_from_slice(&noise(rows * cols));
    tensor
}

fn cache_spec(
    params: &AttentionParams,
    cache_type: CacheType,
    num_layers: usize,
    context: usize,
    batch: usize,
) -> KvCacheSpec {
    KvCacheSpec {
        num_layers,
        num_blocks: batch * context.div_ceil(BLOCK_SIZE),
        block_size: BLOCK_SIZE,
        num_kv_heads: params.num_kv_heads,
        head_dim: params.head_dim,
        cache_type,
        layout: CacheLayout::KeysAndValues,
    }
}

/// A cache in which every position of every sequence is stored.
fn filled_cache(
    backend: &mut CpuBackend,
    params: &AttentionParams,
    cache_type: CacheType,
    layers: usize,
    batch: usize,
    context: usize,
) -> CpuKvCache {
    let spec = cache_spec(params, cache_type, layers, context, batch);
    let mut cache = backend.kv_cache(&spec).expect("memory for a cache");
    begin(backend, &ids(batch * context, 0), &paged(batch, context, context), &mut cache);
    let cols = (params.num_heads + 2 * params.num_kv_heads) * params.head_dim;
    let mut qkv = tensor(backend, batch * context, cols);
    for layer in 0..layers {
        backend.rope_and_cache(&mut qkv, &mut cache, layer, params, 0, None).expect(FITS);
    }
    cache
}

/// Announces a step of these ids.
fn begin(backend: &mut CpuBackend, ids: &[u32], paged: &PagedBatch, cache: &mut CpuKvCache) {
    let step = StepRows { ids, carried: &[], paged, logit_rows: &[], may_record: false };
    assert_eq!(backend.begin_step(&step, &[rope()], cache).expect(FITS), Issue::Operators);
}

/// A step of the last `rows` tokens of `batch` sequences of `context`.
fn paged(batch: usize, rows: usize, context: usize) -> PagedBatch {
    let num_blocks = context.div_ceil(BLOCK_SIZE);
    let sequence = |index| SequenceRows {
        first_row: index * rows,
        num_rows: rows,
        context_len: context,
        first_block: index * num_blocks,
        num_blocks,
    };
    let positions = (0..batch).flat_map(|_| context - rows..context);
    let slots = (0..batch).flat_map(|index| {
        let first = index * num_blocks * BLOCK_SIZE;
        first + context - rows..first + context
    });
    PagedBatch {
        positions: positions.map(|position| position as u32).collect(),
        slots: slots.map(|slot| slot as u32).collect(),
        sequences: (0..batch).map(sequence).collect(),
        block_table: (0..(batch * num_blocks) as u32).collect(),
    }
}

fn rope() -> Rope {
    let inv_freq = (0..HEAD_DIM / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect();
    Rope { inv_freq, scale: 1.0, pairs: RopePairs::Halves }
}

fn main() {
    let mut kernels = Kernels::new();
    for (cols, out_cols) in [(HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, 2 * MLP), (MLP, HIDDEN)] {
        for rows in [1, 8, 256] {
            kernels.linear(DType::BF16, rows, cols, out_cols);
        }
    }
    kernels.linear(DType::BF16, 1, HIDDEN, VOCAB);
    for dtype in [DType::F16, DType::F32] {
        for rows in [1, 8, 256] {
            kernels.linear(dtype, rows, HIDDEN, 2 * MLP);
        }
    }
    kernels.rms_norm(256);
    kernels.silu_mul(256);
    for context in [128, 2048] {
        kernels.attention(PARAMS, CacheType::F32, 1, 1, context);
    }
    for cache_type in CacheType::ALL {
        kernels.attention(PARAMS, cache_type, 1, 1, 8192);
        kernels.attention(PARAMS, cache_type, 8, 1, 2048);
    }
    // Qwen2.5 1.5B and 7B.
    for (num_heads, num_kv_heads) in [(12, 2), (28, 4)] {
        let params = AttentionParams { num_heads, num_kv_heads, head_dim: 128, ..PARAMS };
        kernels.attention(params, CacheType::BF16, 1, 1, 8192);
    }
    for length in [256, 1024] {
        kernels.attention(PARAMS, CacheType::F32, 1, length, length);
    }
    kernels.attention(PARAMS, CacheType::BF16, 1, 1024, 1024);
    for cache_type in [CacheType::F32, CacheType::BF16] {
        kernels.latent_attention(cache_type, 1, 1, 8192);
        kernels.latent_attention(cache_type, 8, 1, 2048);
        kernels.latent_attention(cache_type, 1, 512, 512);
    }
    for cache_type in CacheType::ALL {
        kernels.rope_and_cache(cache_type, 256);
    }
    kernels.embed(DType::BF16, 256);
    let greedy = SampleParams::default();
    let drawn = SampleParams { temperature: 0.8, top_k: NonZeroU32::new(50), top_p: 0.95, ..SampleParams::default() };
    for rows in [1, 8] {
        kernels.sample("greedy", &greedy, rows);
        kernels.sample("top_k_top_p", &drawn, rows);
    }
    kernels.criterion.final_summary();
    // Whatever disturbed the first measurement made the peak too low.
    let again = Limits::measure(kernels.backend.pool().num_threads(), Isa::best());
    let limits = &mut kernels.table.limits;
    limits.bytes_per_second = limits.bytes_per_second.max(again.bytes_per_second);
    limits.flops_per_second = limits.flops_per_second.max(again.flops_per_second);
    println!("\n{}", kernels.table);
}
