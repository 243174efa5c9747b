//! Rotation of queries and keys, with the norm of heads in front of it, and keys and values into the cache.

use std::sync::Arc;

use super::attention_decode::DecodeRope;
use super::operand::{Span, count_u32, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError, RopePairs};

pub(crate) static UNIT: Unit = Unit { name: "rope.cu", source: include_str!("../../../cuda/rope.cu") };

/// `RopeParams` of `rope.cu`.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
struct RopeParams {
    qkv: u64,
    k_cache: u64,
    v_cache: u64,
    positions: u64,
    slots: u64,
    inv_freq: u64,
    q_norm: u64,
    k_norm: u64,
    rope_scale: f32,
    norm_eps: f32,
    rotated: u32,
    interleaved: u32,
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    num_rows: u32,
    pad: u32,
}

/// What a launch works on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeOperands<'a> {
    /// `[num_rows, (H + 2K) * D]`, in place.
    pub(crate) qkv: Span<'a>,
    /// One layer's keys and values: `[num_blocks, K, B, D]` each.
    pub(crate) cache: [Span<'a>; 2],
    /// u32 `[num_rows]`.
    pub(crate) positions: Span<'a>,
    /// u32 `[num_rows]`: `block * B + offset`, in range, as the host saw to; `u32::MAX` for a row that is not stored.
    pub(crate) slots: Span<'a>,
    /// f32 `[R / 2]`: frequencies, and the factor on sine and cosine.
    pub(crate) inv_freq: Span<'a>,
    pub(crate) rope_scale: f32,
    pub(crate) pairs: RopePairs,
    /// f32 `[D]` for q and for k, and what is added to the mean square.
    pub(crate) norms: Option<([Span<'a>; 2], f32)>,
}

/// The sizes of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeSizes {
    pub(crate) num_rows: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) block_size: usize,
    /// `R`, even, at most `head_dim`.
    pub(crate) rotated: usize,
}

/// A launch whose operands are checked. They must be there until it is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PreparedRope {
    params: RopeParams,
    launch: Launch,
}

impl PreparedRope {
    /// What attention needs to do it on its way, if it can: `None` for sizes that are not whole vectors.
    pub(crate) fn within_decode(&self) -> Option<DecodeRope> {
        let params = &self.params;
        if !params.head_dim.is_multiple_of(8) || !params.rotated.is_multiple_of(8) {
            return None;
        }
        Some(DecodeRope {
            k_cache: params.k_cache,
            v_cache: params.v_cache,
            inv_freq: params.inv_freq,
            q_norm: params.q_norm,
            k_norm: params.k_norm,
            rope_scale: params.rope_scale,
            norm_eps: params.norm_eps,
            rotated: params.rotated,
            interleaved: params.interleaved,
        })
    }
}

/// `rope_and_cache`, see `rope.cu`.
#[derive(Debug)]
pub(crate) struct RopeAndCache {
    kernel: Kernel,
    dtype: DType,
}

impl RopeAndCache {
    /// Pairs of a head that the kernel has room for.
    const MAX_PAIRS: usize = 512;

    pub(crate) fn new(device: &Arc<Device>, dtype: DType) -> Result<Self, KernelError> {
        Ok(Self { kernel: typed_kernel(device, &UNIT, dtype, &[], "rope_and_cache")?, dtype })
    }

    /// Threads of a block, and blocks to a row. Few rows: a head to each group of lanes, so that all work at once. Many: one
    /// block to a row, of so many warps that few lanes are idle in the last round.
    fn threads(sizes: &RopeSizes) -> (u32, u32) {
        let heads = sizes.num_heads + 2 * sizes.num_kv_heads;
        let by_eight = sizes.head_dim.is_multiple_of(8) && sizes.rotated.is_multiple_of(8) && sizes.head_dim <= 256;
        let lanes = if by_eight { (sizes.head_dim / 8).next_power_of_two().clamp(8, 32) } else { 32 };
        let heads_per_warp = 32 / lanes;
        let warps = heads.div_ceil(heads_per_warp);
        if sizes.num_rows <= 64 {
            let in_block = warps.min(4);
            return (in_block as u32 * 32, warps.div_ceil(in_block) as u32);
        }
        let rounds = warps.div_ceil(8);
        (warps.div_ceil(rounds) as u32 * 32, 1)
    }

    /// Rotates the heads of q and k in place, and stores k and v in the cache.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small or the rotation larger than a head.
    #[cfg(test)]
    pub(crate) fn run(
        &self,
        device: &Device,
        operands: &RopeOperands<'_>,
        sizes: &RopeSizes,
    ) -> Result<(), KernelError> {
        let prepared = self.prepare(operands, sizes)?;
        // SAFETY: the operands are borrowed during the call, and buffers outlive the work on them.
        unsafe { self.launch(device, &prepared) }
    }

    /// Checks the operands of a launch that rotates the heads of q and k in place, and stores k and v in the cache.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small or the rotation larger than a head.
    pub(crate) fn prepare(&self, operands: &RopeOperands<'_>, sizes: &RopeSizes) -> Result<PreparedRope, KernelError> {
        const OP: &str = "rope_and_cache";
        let size = self.dtype.size_bytes();
        let RopeSizes { num_rows, num_heads, num_kv_heads, head_dim, block_size, rotated } = *sizes;
        if rotated > head_dim || rotated % 2 != 0 || rotated / 2 > Self::MAX_PAIRS {
            let wanted = head_dim.min(2 * Self::MAX_PAIRS);
            return Err(KernelError::Shape { op: OP, what: "rotated values of a head", wanted, found: rotated });
        }
        let cols = (num_heads + 2 * num_kv_heads) * head_dim;
        let block_values = num_kv_heads * block_size * head_dim;
        let (norms, norm_eps) = match operands.norms {
            Some(([q, k], eps)) => {
                let q = q.holding(OP, "weights of the q norm", head_dim, 4)?;
                ([q, k.holding(OP, "weights of the k norm", head_dim, 4)?], eps)
            }
            None => ([0, 0], 0.0),
        };
        let params = RopeParams {
            qkv: operands.qkv.holding(OP, "values of qkv", num_rows * cols, size)?,
            k_cache: operands.cache[0].holding(OP, "values of the key cache", block_values, size)?,
            v_cache: operands.cache[1].holding(OP, "values of the value cache", block_values, size)?,
            positions: operands.positions.holding(OP, "positions", num_rows, 4)?,
            slots: operands.slots.holding(OP, "slots", num_rows, 4)?,
            inv_freq: operands.inv_freq.holding(OP, "frequencies", rotated / 2, 4)?,
            q_norm: norms[0],
            k_norm: norms[1],
            rope_scale: operands.rope_scale,
            norm_eps,
            rotated: rotated as u32,
            interleaved: u32::from(operands.pairs == RopePairs::Interleaved),
            num_heads: count_u32(OP, "heads", num_heads)?,
            num_kv_heads: count_u32(OP, "key heads", num_kv_heads)?,
            head_dim: count_u32(OP, "head size", head_dim)?,
            block_size: count_u32(OP, "block size", block_size)?,
            num_rows: count_u32(OP, "rows", num_rows)?,
            pad: 0,
        };
        let (block, parts) = Self::threads(sizes);
        let launch = Launch { grid: [num_rows as u32, parts, 1], block, shared: 0 };
        Ok(PreparedRope { params, launch })
    }

    /// Puts a launch into the stream.
    ///
    /// # Safety
    /// Its operands are still there.
    pub(crate) unsafe fn launch(&self, device: &Device, prepared: &PreparedRope) -> Result<(), KernelError> {
        // SAFETY: this is the kernel's parameter; sizes were checked when it was made, slots by who made the step, and the caller
        // sees to the rest.
        unsafe { self.kernel.launch(device, prepared.launch, &mut Args::new().value(&prepared.params)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// `(D, R, pairs, heads are normed)`: each head size whole and in part, and sizes that go one by one.
    const CASES: [(usize, usize, RopePairs, bool); 14] = [
        (64, 64, RopePairs::Halves, false),
        (80, 32, RopePairs::Halves, false),
        (80, 80, RopePairs::Halves, true),
        (96, 96, RopePairs::Halves, false),
        (128, 128, RopePairs::Halves, true),
        (128, 64, RopePairs::Interleaved, false),
        (128, 128, RopePairs::Interleaved, true),
        (192, 192, RopePairs::Halves, true),
        (256, 64, RopePairs::Halves, true),
        (256, 256, RopePairs::Interleaved, false),
        (100, 50, RopePairs::Halves, true),
        (36, 36, RopePairs::Interleaved, true),
        (7, 4, RopePairs::Halves, false),
        (288, 288, RopePairs::Halves, true),
    ];

    /// The operator as the CPU defines it, in f64 from the f32 angle on; rounded to nothing.
    fn reference(
        qkv: &[f32],
        positions: &[u32],
        inv_freq: &[f32],
        case: (usize, usize, RopePairs, bool),
        norms: &[Vec<f32>; 2],
        heads: (usize, usize),
    ) -> Vec<f64> {
        let (d, rotated, pairs, normed) = case;
        let (num_heads, num_kv_heads) = heads;
        let mut all: Vec<f64> = qkv.iter().map(|&x| f64::from(x)).collect();
        for (row, &position) in all.chunks_mut((num_heads + 2 * num_kv_heads) * d).zip(positions) {
            for (index, head) in row.chunks_mut(d).take(num_heads + num_kv_heads).enumerate() {
                if normed {
                    let scale = 1.0 / (head.iter().map(|x| x * x).sum::<f64>() / d as f64 + 1e-6).sqrt();
                    let weight = &norms[usize::from(index >= num_heads)];
                    for (x, &w) in head.iter_mut().zip(weight) {
                        *x *= scale * f64::from(w);
                    }
                }
                for (pair, &inv_freq) in inv_freq.iter().enumerate() {
                    let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
                    let (i, j) = match pairs {
                        RopePairs::Halves => (pair, pair + rotated / 2),
                        RopePairs::Interleaved => (2 * pair, 2 * pair + 1),
                    };
                    let (a, b) = (head[i], head[j]);
                    (head[i], head[j]) = (1.25 * (a * cos - b * sin), 1.25 * (b * cos + a * sin));
                }
            }
        }
        all
    }

    /// One rounding of the result, beside f32 arithmetic on values below 4: 1e-5 covers its sums and differences.
    #[test]
    fn heads_are_normed_rotated_and_stored_as_the_cpu_does_it_at_positions_up_to_a_million() {
        let Some(device) = test_device() else { return };
        let (num_kv_heads, num_blocks) = (3, 6);
        for dtype in TYPES {
            let kernel = RopeAndCache::new(&device, dtype).unwrap();
            for case in CASES {
                for (num_rows, num_heads, block_size) in [(1, 21, 16), (5, 6, 32), (70, 6, 16)] {
                    let (d, rotated, pairs, normed) = case;
                    let what = format!("{dtype} {case:?} {num_rows} rows");
                    let cols = (num_heads + 2 * num_kv_heads) * d;
                    let qkv = Values::random(&device, dtype, num_rows * cols, 12);
                    let positions: Vec<u32> =
                        (0..num_rows as u32).map(|t| [0, 1, 4095, 131_071, 999_983][t as usize % 5] + t / 5).collect();
                    let inv_freq: Vec<f32> =
                        (0..rotated / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotated as f32)).collect();
                    // Slots in no order; the second row of five is not stored.
                    let slots: Vec<u32> = (0..num_rows as u32)
                        .map(|t| if t == 1 { u32::MAX } else { (t * 37 + 5) % (num_blocks * block_size as u32) })
                        .collect();
                    let norms = [13, 14].map(|seed| random(d, seed));
                    let norms_on = norms.each_ref().map(|norm| Values::of(&device, DType::F32, norm));
                    let cache = [(); 2].map(|()| {
                        poisoned(&device, num_blocks as usize * num_kv_heads * block_size * d * dtype.size_bytes())
                    });
                    let (positions_on, slots_on) = (words(&device, &positions), words(&device, &slots));
                    let inv_freq_on = Values::of(&device, DType::F32, &inv_freq);
                    let operands = RopeOperands {
                        qkv: (&qkv.on_device).into(),
                        cache: [(&cache[0]).into(), (&cache[1]).into()],
                        positions: (&positions_on).into(),
                        slots: (&slots_on).into(),
                        inv_freq: (&inv_freq_on.on_device).into(),
                        rope_scale: 1.25,
                        pairs,
                        norms: normed
                            .then(|| ([(&norms_on[0].on_device).into(), (&norms_on[1].on_device).into()], 1e-6)),
                    };
                    let sizes = RopeSizes { num_rows, num_heads, num_kv_heads, head_dim: d, block_size, rotated };
                    kernel.run(&device, &operands, &sizes).unwrap();

                    let want = reference(&qkv.values, &positions, &inv_freq, case, &norms, (num_heads, num_kv_heads));
                    let got = read(&qkv.on_device, dtype);
                    assert_close(&got, &want, 1.02 * step(dtype), 1e-5, &what);
                    let [k_cache, v_cache] = cache.each_ref().map(|cache| read(cache, dtype));
                    let mut written = vec![false; k_cache.len()];
                    for (row, &slot) in got.chunks(cols).zip(&slots).filter(|(_, slot)| **slot != u32::MAX) {
                        for head in 0..num_kv_heads {
                            let slot = slot as usize;
                            let at = ((slot / block_size * num_kv_heads + head) * block_size + slot % block_size) * d;
                            // To the bit what is left in qkv.
                            assert_eq!(k_cache[at..][..d], row[(num_heads + head) * d..][..d], "{what}");
                            assert_eq!(v_cache[at..][..d], row[(num_heads + num_kv_heads + head) * d..][..d], "{what}");
                            written[at..at + d].fill(true);
                        }
                    }
                    let untouched =
                        |cache: &[f32]| cache.iter().zip(&written).all(|(x, written)| *written != x.is_nan());
                    assert!(untouched(&k_cache) && untouched(&v_cache), "{what}: other slots were written");
                }
            }
        }
    }

    #[test]
    fn few_rows_are_spread_over_blocks_and_many_take_one_each() {
        let sizes = |num_rows, head_dim| RopeSizes {
            num_rows,
            num_heads: 28,
            num_kv_heads: 4,
            head_dim,
            block_size: 16,
            rotated: head_dim,
        };
        assert_eq!(RopeAndCache::threads(&sizes(1, 128)), (128, 5));
        assert_eq!(RopeAndCache::threads(&sizes(8192, 128)), (192, 1));
        assert_eq!(RopeAndCache::threads(&sizes(8192, 100)), (256, 1));
    }
}
