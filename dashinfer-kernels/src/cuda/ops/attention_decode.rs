//! Decode attention on tensor cores.

use std::sync::Arc;

use super::attention_units::{DecodeOperands, check_soft_cap, soft_cap_option};
use super::operand::typed_kernel;
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit =
    Unit { name: "attention_decode.cu", source: include_str!("../../../cuda/attention_decode.cu") };

const OP: &str = "attention_decode";
/// Positions of a stage of a warp's ring.
const CHUNK: usize = 16;
/// Query heads of a kv head: the rows of one tile.
const MAX_GROUP: usize = 16;

/// What a compilation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Rows whose keys and values are in the cache.
    Cached,
    /// Steps of decodes, with rotation and the cache's new positions.
    Fused,
    /// The same, for few rows: twice the warps to a block, which so is done sooner.
    FusedWide,
}

/// How a head size is compiled.
#[derive(Debug)]
struct HeadSize {
    /// `D`
    head_dim: usize,
    /// Stages of a warp's ring, keys and values apart, for each [`Purpose`]; where shared memory is smaller, fewer.
    stages: [Option<usize>; 3],
    /// Blocks of four warps of a multiprocessor that registers are left for.
    blocks: usize,
}

/// Every head size that there is a kernel for. Rings of 96 KB fit every GPU since SM80, which has 99 for a block.
static HEAD_SIZES: &[HeadSize] = &[
    HeadSize { head_dim: 64, stages: [Some(6), Some(6), Some(6)], blocks: 4 },
    HeadSize { head_dim: 80, stages: [Some(6), Some(6), Some(4)], blocks: 3 },
    HeadSize { head_dim: 96, stages: [Some(6), Some(5), Some(4)], blocks: 3 },
    HeadSize { head_dim: 128, stages: [Some(6), Some(6), Some(4)], blocks: 3 },
    HeadSize { head_dim: 192, stages: [Some(4), Some(4), None], blocks: 2 },
    HeadSize { head_dim: 256, stages: [Some(3), Some(3), None], blocks: 2 },
];

/// One compilation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Variant {
    purpose: Purpose,
    head_dim: usize,
    stages: usize,
    /// Blocks of a multiprocessor that registers are left for.
    blocks: usize,
    /// Whether scores are capped.
    is_capped: bool,
}

/// Every compilation for an architecture.
pub(crate) fn variants(arch: Arch) -> impl Iterator<Item = Variant> {
    let purposes = [Purpose::Cached, Purpose::Fused, Purpose::FusedWide];
    let of_size = move |size: &'static HeadSize| {
        purposes.into_iter().filter_map(move |purpose| size.variant(arch, purpose, false))
    };
    HEAD_SIZES.iter().flat_map(of_size).flat_map(|variant| [variant, Variant { is_capped: true, ..variant }])
}

/// KB of shared memory of a multiprocessor. A block may have all but one, which the system takes of every block.
fn shared_kb(arch: Arch) -> usize {
    match arch.number() {
        80 | 87 => 164,
        90 | 100 | 103 => 228,
        _ => 100,
    }
}

impl HeadSize {
    /// The one for a purpose, with as many stages as shared memory has room for; a warp's accumulator needs three.
    fn variant(&self, arch: Arch, purpose: Purpose, is_capped: bool) -> Option<Variant> {
        let most = self.stages[purpose as usize]?;
        let blocks = if purpose == Purpose::FusedWide { self.blocks / 2 } else { self.blocks };
        // A wide block that is cut down is not worth its while.
        let least = if purpose == Purpose::FusedWide { most } else { 3 };
        let of = |stages| Variant { purpose, head_dim: self.head_dim, stages, blocks, is_capped };
        (least..=most).rev().map(of).find(|variant| variant.shared() <= (shared_kb(arch) - 1) << 10)
    }
}

impl Variant {
    /// The compiler's options.
    pub(crate) fn options(&self) -> Vec<String> {
        let mut options = vec![
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DSTAGES={}", self.stages),
            format!("-DNUM_WARPS={}", self.warps()),
            format!("-DBLOCKS={}", self.blocks),
            format!("-DFUSED={}", u32::from(self.purpose != Purpose::Cached)),
        ];
        options.extend(soft_cap_option(self.is_capped).map(str::to_owned));
        options
    }

    fn warps(&self) -> usize {
        if self.purpose == Purpose::FusedWide { 8 } else { 4 }
    }

    /// Bytes of a warp's ring.
    fn ring(&self) -> usize {
        self.stages * CHUNK * self.head_dim * 2
    }

    /// Bytes of dynamic shared memory: the rings, two floats of each warp and head; if it rotates, the queries, a key and a
    /// value, sines and cosines.
    fn shared(&self) -> usize {
        let rotated =
            if self.purpose == Purpose::Cached { 0 } else { (MAX_GROUP + 2) * self.head_dim * 2 + self.head_dim * 4 };
        self.warps() * (self.ring() + MAX_GROUP * 8) + rotated
    }

    /// Blocks that a multiprocessor holds at once.
    fn blocks_per_sm(&self, arch: Arch) -> usize {
        ((shared_kb(arch) << 10) / (self.shared() + (1 << 10))).clamp(1, self.blocks)
    }
}

/// How rows are rotated that are not yet (`DecodeRope` of `attention_decode.cu`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct DecodeRope {
    pub(super) k_cache: u64,
    pub(super) v_cache: u64,
    pub(super) inv_freq: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) rope_scale: f32,
    pub(super) norm_eps: f32,
    pub(super) rotated: u32,
    pub(super) interleaved: u32,
}

/// Attention of single rows over their cached positions, see `attention_decode.cu`.
#[derive(Debug)]
pub(crate) struct AttentionDecode {
    kernel: Kernel,
    dtype: DType,
    variant: Variant,
    grid: u32,
}

impl AttentionDecode {
    /// Whether there is a kernel for these heads; if not, [`AttentionSimple`](super::attention_simple::AttentionSimple)
    /// serves.
    pub(crate) fn supports(arch: Arch, dtype: DType, head_dim: usize, group: usize) -> bool {
        arch.number() >= 80
            && dtype != DType::F32
            && (1..=MAX_GROUP).contains(&group)
            && HEAD_SIZES.iter().any(|size| size.head_dim == head_dim)
    }

    /// The kernel for a purpose, with capped scores or without. There is one for [`Purpose::Cached`] if it is [supported](Self::supports), and may be none
    /// for the others.
    ///
    /// # Errors
    /// What compiling may say.
    pub(crate) fn new(
        device: &Arc<Device>,
        dtype: DType,
        head_dim: usize,
        purpose: Purpose,
        is_capped: bool,
    ) -> Result<Option<Self>, KernelError> {
        if !Self::supports(device.arch, dtype, head_dim, 1) {
            return Ok(None);
        }
        let size = HEAD_SIZES.iter().find(|size| size.head_dim == head_dim);
        let Some(variant) = size.and_then(|size| size.variant(device.arch, purpose, is_capped)) else {
            return Ok(None);
        };
        let options = variant.options();
        let kernel = typed_kernel(device, &UNIT, dtype, &options.iter().map(String::as_str).collect::<Vec<_>>(), OP)?;
        let kernel = kernel.with_shared(variant.shared() as u32)?;
        let grid = device.num_sms * variant.blocks_per_sm(device.arch) as u32;
        Ok(Some(Self { kernel, dtype, variant, grid }))
    }

    /// Blocks that run at once: what a plan divides the positions between.
    pub(crate) fn grid(&self) -> usize {
        self.grid as usize
    }

    /// Positions that a row is not split into less of. A warp takes some 0.35 us for a chunk of 16; that a block's part of a row
    /// gets to another block, and is added there, takes what three or four of them take.
    pub(crate) fn min_split(&self) -> usize {
        if self.variant.purpose == Purpose::FusedWide { 384 } else { 256 }
    }

    /// Writes the output of the units' rows. `rope`: for rows that are not rotated, and not in the cache, which must be decodes
    /// all of them, in a step that writes to the cache in no other way.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] for more than 16 query heads to a kv
    /// head, for other block sizes, and if the kernel is for the other kind of rows.
    ///
    /// # Safety
    /// What `rope` names is still there.
    pub(crate) unsafe fn run(
        &self,
        device: &Device,
        operands: &DecodeOperands<'_>,
        rope: Option<&DecodeRope>,
    ) -> Result<(), KernelError> {
        crate::error::check(OP, "head size", self.variant.head_dim, operands.params.head_dim)?;
        check_soft_cap(OP, self.variant.is_capped, operands.params)?;
        let params = operands.checked(OP, self.dtype)?;
        let unsupported = |what| Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        if operands.group() > MAX_GROUP {
            return unsupported(format!("{} query heads to a kv head", operands.group()));
        }
        let args = Args::new().value(&params);
        let mut args = match (self.variant.purpose, rope) {
            (Purpose::Cached, None) => args,
            (Purpose::Fused | Purpose::FusedWide, Some(rope)) => args.value(rope),
            (purpose, _) => return unsupported(format!("{purpose:?} for rows of the other kind")),
        };
        let (block, shared) = (self.variant.warps() as u32 * 32, self.variant.shared() as u32);
        let launch = Launch { grid: [self.grid, 1, 1], block, shared };
        // SAFETY: these are the kernel's parameters; sizes were checked above, and units are a plan's, which name rows, blocks and
        // slots of the batch and the workspace that it was made for. The caller sees to `rope`.
        unsafe { self.kernel.launch(device, launch, &mut args) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention_fused_testing::*;
    use super::super::attention_testing::*;
    use super::super::testing::*;
    use super::*;
    use crate::RopePairs;
    use crate::cuda::plan::Splitting;

    const HALVES: [DType; 2] = [DType::BF16, DType::F16];

    /// A device that has the kernel.
    fn device() -> Option<Arc<Device>> {
        let device = test_device()?;
        if AttentionDecode::supports(device.arch, DType::BF16, 64, 1) {
            return Some(device);
        }
        eprintln!("skipped: compute capability {}", device.arch);
        None
    }

    #[test]
    fn a_block_s_rings_fit_every_gpu_and_hold_a_warp_s_accumulator() {
        for arch in [Arch::SM80, Arch::SM86, Arch::SM90, Arch::SM120] {
            for variant in variants(arch) {
                assert!(variant.shared() <= (shared_kb(arch) - 1) << 10);
                assert!(CHUNK * (variant.head_dim + 8) * 4 <= variant.ring());
            }
            let cached = variants(arch).filter(|variant| variant.purpose == Purpose::Cached && !variant.is_capped);
            assert_eq!(cached.count(), HEAD_SIZES.len(), "{arch}");
        }
        // Queries, a key and a value beside the rings cost no block of a multiprocessor.
        let plain = variants(Arch::SM90).filter(|variant| !variant.is_capped);
        for two in plain.collect::<Vec<_>>().chunk_by(|a, b| a.head_dim == b.head_dim) {
            assert_eq!(two[0].blocks_per_sm(Arch::SM90), two[1].blocks_per_sm(Arch::SM90), "{two:?}");
        }
    }

    #[test]
    fn attention_decode_every_head_size() {
        let Some(device) = device() else { return };
        for dtype in HALVES {
            for head_dim in HEAD_SIZES.iter().map(|size| size.head_dim) {
                let kernels = Kernels::decode(&device, dtype, head_dim);
                check_shapes(&device, &kernels, dtype, head_dim, &[[14, 2], [4, 4]]);
            }
        }
    }

    #[test]
    fn attention_decode_every_group() {
        let Some(device) = device() else { return };
        let kernels = Kernels::decode(&device, DType::BF16, 128);
        let heads = [[2, 2], [4, 2], [3, 1], [8, 2], [28, 4], [8, 1], [14, 1], [32, 2]];
        check_shapes(&device, &kernels, DType::BF16, 128, &heads);
    }

    #[test]
    fn attention_decode_windows() {
        let Some(device) = device() else { return };
        for head_dim in [64, 80, 128] {
            let kernels = Kernels::decode(&device, DType::BF16, head_dim);
            check_windows(&device, &kernels, DType::BF16, head_dim);
        }
    }

    #[test]
    fn attention_decode_sinks_and_caps() {
        let Some(device) = device() else { return };
        for (i, head_dim) in HEAD_SIZES.iter().map(|size| size.head_dim).enumerate() {
            let kernels = Kernels::decode(&device, HALVES[i % 2], head_dim);
            check_sinks_and_caps(&device, &kernels, HALVES[i % 2], head_dim);
        }
    }

    #[test]
    fn attention_decode_fused_sinks_and_caps() {
        let Some(device) = device() else { return };
        for head_dim in HEAD_SIZES.iter().map(|size| size.head_dim) {
            for (i, (soft_cap, window)) in
                [(None, None), (None, Some(128)), (Some(5.0), Some(700))].into_iter().enumerate()
            {
                let heads = [[16, 2], [4, 1], [8, 4]][i];
                let mut case = Case {
                    has_sinks: i != 1 || head_dim == 64,
                    min_split: 64,
                    plan_knows_window: false,
                    padded_rows: Some(8),
                    ..Case::new(DType::BF16, [heads[0], heads[1], head_dim], 32)
                };
                (case.params.soft_cap, case.params.window) = (soft_cap, window);
                check_fused(&device, &case, HALVES_OF(head_dim), 105 + i as u64);
            }
        }
    }

    #[test]
    fn attention_decode_padding_rows_are_zeros() {
        let Some(device) = device() else { return };
        let kernels = Kernels::decode(&device, DType::F16, 96);
        check_padding(&device, &kernels, DType::F16, 96);
    }

    #[test]
    fn attention_decode_rows_of_prompts() {
        let Some(device) = device() else { return };
        let kernels = Kernels::decode(&device, DType::BF16, 64);
        check_prompt_rows(&device, &kernels, DType::BF16, 64);
    }

    #[test]
    fn attention_decode_a_row_is_the_same_in_any_batch() {
        let Some(device) = device() else { return };
        let kernels = Kernels::decode(&device, DType::BF16, 128);
        check_invariance(&device, &kernels, DType::BF16, 128);
    }

    const HALVES_OF: fn(usize) -> Rotation = |rotated| Rotation { rotated, pairs: RopePairs::Halves, is_normed: false };

    #[test]
    fn attention_decode_fused_every_head_size_whole_and_in_part() {
        let Some(device) = device() else { return };
        for dtype in HALVES {
            for head_dim in HEAD_SIZES.iter().map(|size| size.head_dim) {
                let case = Case { min_split: 64, ..Case::new(dtype, [14, 2, head_dim], 32) };
                check_fused(&device, &case, HALVES_OF(head_dim), 70);
                let case = Case::new(dtype, [4, 4, head_dim], 16);
                check_fused(&device, &case, Rotation { is_normed: true, ..HALVES_OF(head_dim) }, 71);
                check_fused(&device, &case, Rotation { pairs: RopePairs::Interleaved, ..HALVES_OF(head_dim) }, 72);
                let part = Rotation { rotated: head_dim / 4 / 8 * 8, pairs: RopePairs::Interleaved, is_normed: true };
                check_fused(&device, &case, part, 73);
                check_fused(&device, &case, HALVES_OF(32), 74);
            }
        }
    }

    #[test]
    fn attention_decode_fused_every_group_and_block_size() {
        let Some(device) = device() else { return };
        for (i, heads) in [[2, 2], [4, 2], [3, 1], [8, 2], [28, 4], [14, 1], [32, 2]].into_iter().enumerate() {
            let case = Case::new(DType::BF16, [heads[0], heads[1], 128], [16, 32, 64, 128][i % 4]);
            check_fused(&device, &case, Rotation { is_normed: i % 2 == 0, ..HALVES_OF(128) }, 80 + i as u64);
            // Lists in two chunks.
            let fixed = Case { splitting: Splitting::ByContext, max_slots: 11, ..case };
            check_fused(&device, &fixed, HALVES_OF(128), 90 + i as u64);
        }
    }

    #[test]
    fn attention_decode_fused_windows_and_padding() {
        let Some(device) = device() else { return };
        for (window, plan_knows_window) in [(1, true), (1, false), (17, true), (700, false)] {
            let padded_rows = Some(16);
            let mut case = Case { plan_knows_window, padded_rows, ..Case::new(DType::BF16, [4, 2, 64], 32) };
            case.params.window = Some(window);
            check_fused(&device, &case, HALVES_OF(64), 100);
        }
    }

    #[test]
    fn attention_decode_fused_in_several_turns() {
        let Some(device) = device() else { return };
        for head_dim in [64, 128] {
            let sequences = (0..400).map(|i| (1, 1 + i * 37 % 200)).collect();
            let case = Case { sequences, ..Case::new(DType::BF16, [14, 2, head_dim], 16) };
            check_fused(&device, &case, HALVES_OF(head_dim), 110);
        }
    }

    #[test]
    #[ignore = "takes a GPU to itself"]
    fn bench_decode_attention() {
        let Some(device) = device() else { return };
        for ([num_heads, num_kv_heads, head_dim], context_len, num_rows) in [
            ([28, 4, 128], 8192, 32),
            ([14, 2, 64], 2048, 64),
            ([28, 4, 128], 256, 1),
            ([28, 4, 128], 256, 64),
            ([28, 4, 128], 1000, 64),
            ([28, 4, 128], 32768, 1),
        ] {
            let kernels = Kernels::decode(&device, DType::BF16, head_dim);
            bench(&device, &kernels, [num_heads, num_kv_heads, head_dim], context_len, num_rows);
        }
        for (heads, context_len, rows) in [
            ([28, 4, 128], 256, [1, 8, 64].as_slice()),
            ([14, 2, 64], 200, &[1, 64, 256]),
            ([28, 4, 128], 2048, &[1, 16, 64]),
        ] {
            for &num_rows in rows {
                bench_fused(&device, heads, context_len, num_rows);
            }
        }
    }
}
