//! Weights of experts as the products read them.
//!
//! All matrices of a kind lie in one allocation: one base address serves every block of a product. A matrix that is packed comes to
//! the device in an allocation of its own, which is given back as soon as it has been copied here, so that beside all layers there
//! are the matrices of one layer twice, while it is packed. Left where they are, they would cost more, for good: the driver hands
//! out multiples of 2 MiB, and 128 experts of 3 MiB each would take 128 MiB more than they hold.

use std::sync::Arc;

use super::super::linear::CudaLinear;
use super::super::operand::{Span, count_u32, typed_kernel};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Args, Launch};
use crate::cuda::memory::Buffer;
use crate::cuda::units::Unit;
use crate::error::check;
use crate::{DType, KernelError};

pub(crate) static UNIT: Unit = Unit { name: "moe_pack.cu", source: include_str!("../../../../cuda/moe_pack.cu") };

const OP: &str = "pack_experts";

/// Bytes of a step of 64 columns of a block of 128 rows, as in `moe.cuh`.
const STEP_BYTES: usize = 16 << 10;
/// Columns of a step.
const STEP_K: usize = 64;

/// The matrices of all experts of a layer on a GPU.
#[derive(Debug)]
pub struct CudaExperts {
    pub(crate) gate_up: Packed,
    pub(crate) down: Packed,
    /// `N`.
    pub(crate) num_experts: usize,
    /// `E`.
    pub(crate) hidden: usize,
    /// `F`.
    pub(crate) inner: usize,
}

/// One matrix of each expert, packed as `moe.cuh` says.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) weights: Buffer,
    /// `[num_experts, rows]` in f32.
    pub(crate) bias: Option<Buffer>,
    pub(crate) num_experts: usize,
    /// Features of the result: half of the rows if these are gates and ups.
    pub(crate) num_cols: usize,
    /// Columns of a matrix.
    pub(crate) num_k: usize,
    /// Whether the rows are gates and ups.
    pub(crate) gated: bool,
}

/// The macro that says whether rows are gates and ups.
pub(crate) fn option(gated: bool) -> &'static str {
    if gated { "-DGATED=1" } else { "-DGATED=0" }
}

impl CudaExperts {
    /// Takes the matrices `[2F, E]` and `[E, F]` of each expert, and gives their memory back.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if they do not fit each other, [`KernelError::Unsupported`] if E or F is no multiple of 8.
    pub(crate) fn new(
        device: &Arc<Device>,
        dtype: DType,
        gate_up: Vec<CudaLinear>,
        down: Vec<CudaLinear>,
    ) -> Result<Self, KernelError> {
        let num_experts = gate_up.len();
        check(OP, "matrices of down", num_experts, down.len())?;
        let (Some(first), Some(second)) = (gate_up.first(), down.first()) else {
            return Err(KernelError::Shape { op: OP, what: "experts", wanted: 1, found: 0 });
        };
        let (hidden, inner) = (second.rows, second.cols);
        check(OP, "rows of gate and up", 2 * inner, first.rows)?;
        check(OP, "columns of gate and up", hidden, first.cols)?;
        if !hidden.is_multiple_of(8) || !inner.is_multiple_of(8) {
            let what = format!("experts of {inner} between {hidden} features, not in whole eights,");
            return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        }
        let gate_up = Packed::new(device, dtype, gate_up, true)?;
        let down = Packed::new(device, dtype, down, false)?;
        Ok(Self { gate_up, down, num_experts, hidden, inner })
    }
}

impl Packed {
    fn new(device: &Arc<Device>, dtype: DType, matrices: Vec<CudaLinear>, gated: bool) -> Result<Self, KernelError> {
        let num_experts = matrices.len();
        let [rows, num_k] = matrices.first().map_or([0; 2], |first| [first.rows, first.cols]);
        let num_biases = matrices.iter().filter(|matrix| matrix.bias_f32.is_some()).count();
        if num_biases > 0 {
            check(OP, "biases", num_experts, num_biases)?;
        }
        for matrix in &matrices {
            check(OP, "rows of an expert's matrix", rows, matrix.rows)?;
            check(OP, "columns of an expert's matrix", num_k, matrix.cols)?;
            if matrix.dtype != dtype {
                let what = format!("a matrix of {} beside {dtype}", matrix.dtype);
                return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
            }
        }
        let num_cols = if gated { rows / 2 } else { rows };
        let bytes = expert_bytes(num_cols, num_k, gated);
        let num_pieces = count_u32(OP, "pieces of a matrix", bytes / 16)?;
        let kernel = typed_kernel(device, &UNIT, dtype, &[option(gated)], "moe_pack")?;
        let weights = device.alloc("the weights of experts", bytes.saturating_mul(num_experts))?;
        let bias = if num_biases > 0 { Some(device.alloc("biases of experts", 4 * rows * num_experts)?) } else { None };
        let launch = Launch { grid: [num_pieces.div_ceil(256).min(16 * device.num_sms), 1, 1], block: 256, shared: 0 };
        device.bind()?;
        for (expert, matrix) in matrices.into_iter().enumerate() {
            let to = Span::part(&weights, expert * bytes, bytes)?;
            let mut args = Args::new()
                .ptr(to.holding(OP, "packed weights", bytes, 1)?)
                .ptr(Span::from(&matrix.weight).holding(OP, "weights", rows * num_k, dtype.size_bytes())?)
                .u32(count_u32(OP, "rows", rows)?)
                .u32(count_u32(OP, "columns", num_k)?)
                .u32(num_pieces);
            // SAFETY: these are the kernel's parameters; both sizes were checked just now.
            unsafe { kernel.launch(device, launch, &mut args)? };
            if let (Some(bias), Some(from)) = (&bias, &matrix.bias_f32) {
                bias.copy_from(expert * 4 * rows, from, 4 * rows)?;
            }
            // The matrix goes here; that waits for the copy.
        }
        Ok(Self { weights, bias, num_experts, num_cols, num_k, gated })
    }
}

/// Bytes of one expert's packed matrix: `num_cols` features of the result, or gates and ups of as many.
pub(crate) fn expert_bytes(num_cols: usize, num_k: usize, gated: bool) -> usize {
    let blocks = num_cols.div_ceil(if gated { 64 } else { 128 });
    blocks.saturating_mul(num_k.div_ceil(STEP_K)).saturating_mul(STEP_BYTES)
}
