//! Decode attention on tensor cores.

use std::sync::Arc;

use super::attention_units::DecodeOperands;
use super::operand::typed_kernel;
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit =
    Unit { name: "attention_decode.cu", source: include_str!("../../../cuda/attention_decode.cu") };

const OP: &str = "attention_decode";
const WARPS: usize = 4;
/// Positions of a stage of a warp's ring.
const CHUNK: usize = 16;
/// Query heads of a kv head: the rows of one tile.
const MAX_GROUP: usize = 16;

/// How a head size is compiled.
#[derive(Debug)]
pub(crate) struct Variant {
    /// `D`
    pub(crate) head_dim: usize,
    /// Stages of a warp's ring, keys and values apart. A block's four rings take 96 KB at most: every GPU since SM80 has 99.
    pub(crate) stages: usize,
    /// Blocks of a multiprocessor that its registers allow.
    blocks: usize,
}

/// Every head size that there is a kernel for.
pub(crate) static VARIANTS: &[Variant] = &[
    Variant { head_dim: 64, stages: 6, blocks: 4 },
    Variant { head_dim: 80, stages: 6, blocks: 3 },
    Variant { head_dim: 96, stages: 6, blocks: 3 },
    Variant { head_dim: 128, stages: 6, blocks: 3 },
    Variant { head_dim: 192, stages: 4, blocks: 2 },
    Variant { head_dim: 256, stages: 3, blocks: 2 },
];

impl Variant {
    /// The compiler's options.
    pub(crate) fn options(&self) -> [String; 2] {
        [format!("-DHEAD_DIM={}", self.head_dim), format!("-DSTAGES={}", self.stages)]
    }

    /// Bytes of a warp's ring.
    fn ring(&self) -> usize {
        self.stages * CHUNK * self.head_dim * 2
    }

    /// Bytes of dynamic shared memory: the rings, and two floats of each warp and head.
    fn shared(&self) -> usize {
        WARPS * (self.ring() + MAX_GROUP * 8)
    }

    /// Blocks that a multiprocessor holds at once.
    fn blocks_per_sm(&self, arch: Arch) -> usize {
        let shared_of_sm = match arch.number() {
            80 | 87 => 164 << 10,
            90 | 100 | 103 => 228 << 10,
            _ => 100 << 10,
        };
        const OF_SYSTEM: usize = 1 << 10; // of every block
        (shared_of_sm / (self.shared() + OF_SYSTEM)).clamp(1, self.blocks)
    }
}

/// Attention of single rows over their cached positions, see `attention_decode.cu`.
#[derive(Debug)]
pub(crate) struct AttentionDecode {
    kernel: Kernel,
    dtype: DType,
    variant: &'static Variant,
    grid: u32,
}

impl AttentionDecode {
    /// Whether there is a kernel for these heads; if not, [`AttentionSimple`](super::attention_simple::AttentionSimple)
    /// serves.
    pub(crate) fn supports(arch: Arch, dtype: DType, head_dim: usize, group: usize) -> bool {
        arch.number() >= 80
            && dtype != DType::F32
            && (1..=MAX_GROUP).contains(&group)
            && VARIANTS.iter().any(|variant| variant.head_dim == head_dim)
    }

    /// # Errors
    /// [`KernelError::Unsupported`] if there is none for this GPU, type or head size, and what compiling may say.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType, head_dim: usize) -> Result<Self, KernelError> {
        let variant = VARIANTS.iter().find(|variant| variant.head_dim == head_dim);
        let variant = variant.filter(|_| Self::supports(device.arch, dtype, head_dim, 1)).ok_or_else(|| {
            let what = format!("a head size of {head_dim} in {dtype} on compute capability {}", device.arch);
            KernelError::Unsupported { op: OP, what, backend: "cuda" }
        })?;
        let [head, stages] = variant.options();
        let kernel = typed_kernel(device, &UNIT, dtype, &[&head, &stages], OP)?;
        let kernel = kernel.with_shared(variant.shared() as u32)?;
        let grid = device.num_sms * variant.blocks_per_sm(device.arch) as u32;
        Ok(Self { kernel, dtype, variant, grid })
    }

    /// Blocks that run at once: what a plan divides the positions between.
    pub(crate) fn grid(&self) -> usize {
        self.grid as usize
    }

    /// Writes the output of rows of one unit, and the partial results of the others for
    /// [`AttentionCombine`](super::attention_combine::AttentionCombine).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] for more than 16 query heads to a kv
    /// head and for other block sizes.
    pub(crate) fn run(&self, device: &Device, operands: &DecodeOperands<'_>) -> Result<(), KernelError> {
        crate::error::check(OP, "head size", self.variant.head_dim, operands.params.head_dim)?;
        let params = operands.checked(OP, self.dtype)?;
        if operands.group() > MAX_GROUP {
            let what = format!("{} query heads to a kv head", operands.group());
            return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        }
        let launch = Launch { grid: [self.grid, 1, 1], block: WARPS as u32 * 32, shared: self.variant.shared() as u32 };
        // SAFETY: this is the kernel's parameter; sizes were checked above, and units are a plan's, which name rows, blocks and
        // slots of the batch and the workspace that it was made for.
        unsafe { self.kernel.launch(device, launch, &mut Args::new().value(&params)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention_testing::*;
    use super::super::testing::*;
    use super::*;

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
        for variant in VARIANTS {
            assert!(variant.shared() <= 99 << 10);
            assert!(CHUNK * (variant.head_dim + 8) * 4 <= variant.ring());
        }
    }

    #[test]
    fn attention_decode_every_head_size() {
        let Some(device) = device() else { return };
        for dtype in HALVES {
            for head_dim in VARIANTS.iter().map(|variant| variant.head_dim) {
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
    }
}
