//! Dense layers: `out = x · Wᵀ + bias`, by whichever of three ways suits the shape.

#[cfg(test)]
mod bench;
pub(crate) mod rows;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::operand::{Span, typed_kernel};
use crate::cuda::cublaslt::{Choose, CublasLt, LtOperands, LtShape};
use crate::cuda::device::{Arch, Device};
use crate::cuda::kernel::{Args, Kernel, Launch};
use crate::cuda::memory::Buffer;
use crate::cuda::units::Unit;
use crate::{DType, KernelError};

use rows::Rows;

pub(crate) static SIMPLE: Unit =
    Unit { name: "linear_simple.cu", source: include_str!("../../../cuda/linear_simple.cu") };

const OP: &str = "linear";

/// Whether a row's result may depend on the rows beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum LinearMode {
    /// The fastest way for each number of rows: the last bits may change with it.
    #[default]
    Fast,
    /// A row's result is the same, to the bit, whatever else is in the step. Costs speed with many rows.
    RowsAlone,
}

/// The ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `linear_rows.cu`: tensor cores, weights read once for up to 64 rows, any shape.
    Rows,
    /// cuBLASLt: tensor cores, for many rows.
    CublasLt,
    /// `linear_simple.cu`: any type on any device.
    Simple,
}

/// The way for `m` rows of x, `n` columns of the result, and sums over `k`.
fn way_for(arch: Arch, dtype: DType, [m, n, k]: [usize; 3], mode: LinearMode) -> Way {
    if dtype == DType::F32 || arch.number() < 80 {
        return Way::Simple;
    }
    // cuBLASLt has few kernels, slow ones, for rows that do not start at multiples of 16 bytes.
    let few = m <= most_rows(n, k) || n % 8 != 0 || k % 8 != 0;
    if few || mode == LinearMode::RowsAlone { Way::Rows } else { Way::CublasLt }
}

/// Up to so many rows the rows kernel is the fastest way to multiply with `[n, k]`, by `bench_linear` on an H200:
///
/// | layer | n | k | rows | rows kernel | cuBLASLt |
/// |---|---|---|---|---|---|
/// | o of 0.5b | 896 | 896 | 32 | 3.4 µs | 4.0 µs |
/// | most | 4608 | 3584 | 16, 32 | 10.8, 13.1 µs | 10.7, 10.9 µs |
/// | head of 0.5b | 151936 | 896 | 8, 16 | 66.0, 85.9 µs | 70.4, 71.0 µs |
/// | head of 7b | 152064 | 3584 | 1, 4, 16 | 263, 267, 264 µs | 251, 254, 262 µs |
///
/// Among equals the rows kernel is chosen: it starts while the kernel in front of it ends, and gates in place.
fn most_rows(n: usize, k: usize) -> usize {
    match n {
        100_000.. if k >= 2048 => 0,
        100_000.. => 8,
        _ if n * k <= 1 << 20 => 32,
        _ => 16,
    }
}

/// The weights of a dense layer on a GPU.
#[derive(Debug)]
pub struct CudaLinear {
    /// `[rows, cols]`, as in the checkpoint.
    pub(crate) weight: Buffer,
    /// `[rows]`.
    pub(crate) bias_f32: Option<Buffer>,
    /// The same in the element type, for cuBLASLt, which wants the result's.
    pub(crate) bias_t: Option<Buffer>,
    /// Columns of the result (N).
    pub(crate) rows: usize,
    /// Columns of x (K).
    pub(crate) cols: usize,
    /// Of the weights, and of x.
    pub(crate) dtype: DType,
}

/// Addresses and sizes of a product. The bias is there in both types, or not at all (0).
#[derive(Debug, Clone, Copy)]
struct Operands {
    out: u64,
    x: u64,
    weight: u64,
    bias_f32: u64,
    bias_t: u64,
    m: usize,
    n: usize,
    k: usize,
    out_dtype: DType,
}

/// Runs dense layers of one element type.
#[derive(Debug)]
pub(crate) struct Linears {
    device: Arc<Device>,
    dtype: DType,
    mode: LinearMode,
    rows: Rows,
    /// None if the library is not on this machine: the rows kernel does it all then.
    cublaslt: Option<CublasLt>,
    /// For up to 16 rows and for more, each with a result of T and of f32; none where the other ways can do everything.
    simple: Option<[[Kernel; 2]; 2]>,
    /// See [`set_repeats`](Self::set_repeats).
    repeats: bool,
}

impl Linears {
    /// # Errors
    /// [`KernelError::Compile`] if a kernel does not compile; what opening libraries and taking memory brings.
    pub(crate) fn new(device: &Arc<Device>, dtype: DType, mode: LinearMode) -> Result<Self, KernelError> {
        let needs_simple = way_for(device.arch, dtype, [1, 1, 1], mode) == Way::Simple;
        let simple = if needs_simple { Some(simple_kernels(device, dtype)?) } else { None };
        let cublaslt = if needs_simple || mode == LinearMode::RowsAlone {
            None
        } else {
            match CublasLt::new(device) {
                Ok(library) => Some(library),
                Err(KernelError::Library { .. }) => None,
                Err(error) => return Err(error),
            }
        };
        Ok(Self { device: Arc::clone(device), dtype, mode, rows: Rows::new(dtype), cublaslt, simple, repeats: false })
    }

    /// Says whether the products from now on come again many times with as many rows, so that it pays to time cuBLASLt's
    /// proposals for them.
    pub(crate) fn set_repeats(&mut self, repeats: bool) {
        self.repeats = repeats;
    }

    /// `out[m, n] = Σ x[m, k] · w[n, k] + bias[n]`, `out`: `[num_rows, layer.rows]` of `out_dtype`: the layer's type or f32;
    /// `x`: `[num_rows, layer.cols]`. Sums are f32; the result is rounded once.
    ///
    /// The first call for a shape compiles its kernel or plans its product: make it before work is recorded.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] for other types.
    pub(crate) fn run(
        &self,
        out: Span<'_>,
        x: Span<'_>,
        num_rows: usize,
        layer: &CudaLinear,
        out_dtype: DType,
    ) -> Result<(), KernelError> {
        if num_rows == 0 {
            return Ok(());
        }
        let operands = self.operands(out, x, num_rows, layer, layer.rows, out_dtype)?;
        // SAFETY: sizes were checked just now; the caller's thread has the device current, as for every launch.
        unsafe { self.start(&operands) }
    }

    /// `out[m, i] = silu(gate) · up`, gate and up being columns `i` and `F + i` of [`run`](Self::run)'s result, rounded as there:
    /// the same, to the bit, as two kernels, where that result would come from the rows kernel. `out`: `[num_rows, F]`;
    /// `layer.rows` is 2F. Does nothing and returns false where one kernel would be slower or does not exist.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub(crate) fn run_gated(
        &self,
        out: Span<'_>,
        x: Span<'_>,
        num_rows: usize,
        layer: &CudaLinear,
    ) -> Result<bool, KernelError> {
        if num_rows == 0 {
            return Ok(true);
        }
        if !layer.rows.is_multiple_of(2) || self.way([num_rows, layer.rows, layer.cols]) != Way::Rows {
            return Ok(false);
        }
        let operands = self.operands(out, x, num_rows, layer, layer.rows / 2, layer.dtype)?;
        // SAFETY: as in `run`.
        unsafe { self.rows.run(&self.device, &operands, true)? };
        Ok(true)
    }

    fn way(&self, shape: [usize; 3]) -> Way {
        match way_for(self.device.arch, self.dtype, shape, self.mode) {
            Way::CublasLt if self.cublaslt.is_none() => Way::Rows,
            way => way,
        }
    }

    fn operands(
        &self,
        out: Span<'_>,
        x: Span<'_>,
        m: usize,
        layer: &CudaLinear,
        n: usize,
        out_dtype: DType,
    ) -> Result<Operands, KernelError> {
        let k = layer.cols;
        if layer.dtype != self.dtype || (out_dtype != self.dtype && out_dtype != DType::F32) {
            let what = format!("a layer of {} with a result of {out_dtype}, beside {}", layer.dtype, self.dtype);
            return Err(KernelError::Unsupported { op: OP, what, backend: "cuda" });
        }
        for (what, size) in [("rows of x", m), ("rows of the weights", layer.rows), ("columns of the weights", k)] {
            if i32::try_from(size).is_err() {
                return Err(KernelError::Shape { op: OP, what, wanted: i32::MAX as usize, found: size });
            }
        }
        let size = self.dtype.size_bytes();
        let bias = |bias: &Option<Buffer>, size| match bias {
            Some(bias) => Span::from(bias).holding(OP, "values of the bias", layer.rows, size),
            None => Ok(0),
        };
        Ok(Operands {
            out: out.holding(OP, "values of the output", m * n, out_dtype.size_bytes())?,
            x: x.holding(OP, "values of x", m * k, size)?,
            weight: Span::from(&layer.weight).holding(OP, "weights", layer.rows * k, size)?,
            bias_f32: bias(&layer.bias_f32, 4)?,
            bias_t: bias(&layer.bias_t, size)?,
            m,
            n,
            k,
            out_dtype,
        })
    }

    fn for_cublaslt(&self, operands: &Operands) -> (LtShape, LtOperands) {
        let &Operands { out, x, weight, bias_f32, bias_t, m, n, k, out_dtype } = operands;
        let bias = if out_dtype == DType::F32 { bias_f32 } else { bias_t };
        let shape = LtShape { rows: m, cols: n, k, dtype: self.dtype, out: out_dtype, has_bias: bias != 0 };
        (shape, LtOperands { out, x, weight, bias })
    }

    /// # Safety
    /// The operands are there in the sizes they name, and the device is current on this thread.
    unsafe fn start(&self, operands: &Operands) -> Result<(), KernelError> {
        let &Operands { out, x, weight, bias_f32, bias_t, m, n, k, out_dtype } = operands;
        match (self.way([m, n, k]), &self.cublaslt, &self.simple) {
            (Way::CublasLt, Some(library), _)
                if [out, x, weight].iter().all(|at| at % 16 == 0) && (bias_f32 == 0) == (bias_t == 0) =>
            {
                let (shape, addresses) = self.for_cublaslt(operands);
                // Smaller weights would be timed from the cache, where a step never finds them: another proposal wins there.
                let is_large = n * k * self.dtype.size_bytes() > self.device.l2_bytes;
                let choose = if self.repeats && is_large { Choose::Fastest } else { Choose::First };
                // SAFETY: the caller's promise.
                unsafe { library.run(shape, addresses, choose) }
            }
            (Way::Simple, _, Some(kernels)) => {
                let few = m <= 16;
                let kernel = &kernels[usize::from(!few)][usize::from(out_dtype == DType::F32)];
                // SAFETY: the caller's promise.
                unsafe { start_simple(&self.device, kernel, few, operands) }
            }
            // SAFETY: the caller's promise.
            _ => unsafe { self.rows.run(&self.device, operands, false) },
        }
    }
}

fn simple_kernels(device: &Arc<Device>, dtype: DType) -> Result<[[Kernel; 2]; 2], KernelError> {
    let kernel = |tile, out| typed_kernel(device, &SIMPLE, dtype, &[tile, out], "linear_simple");
    let outs = |tile| Ok::<_, KernelError>([kernel(tile, "-DOUT_F32=0")?, kernel(tile, "-DOUT_F32=1")?]);
    Ok([outs("-DTILE_M=16")?, outs("-DTILE_M=64")?])
}

/// # Safety
/// As for [`Linears::start`]; `kernel` is for up to 16 rows at a time if `few`, else for 64.
unsafe fn start_simple(device: &Device, kernel: &Kernel, few: bool, operands: &Operands) -> Result<(), KernelError> {
    let &Operands { out, x, weight, bias_f32, m, n, k, .. } = operands;
    let tiles = [n.div_ceil(64), m.div_ceil(if few { 16 } else { 64 })];
    if tiles[1] > 65_535 {
        return Err(KernelError::Shape { op: OP, what: "rows of x", wanted: 65_535 * 64, found: m });
    }
    let launch = Launch { grid: [tiles[0] as u32, tiles[1] as u32, 1], block: 256, shared: 0 };
    let args = Args::new().ptr(out).ptr(x).ptr(weight).ptr(bias_f32);
    let mut args = [m, n, k].into_iter().fold(args, |args, size| args.i32(size as i32));
    // SAFETY: these are the kernel's parameters; the rest is the caller's promise.
    unsafe { kernel.launch(device, launch, &mut args) }
}
