//! Dense products by cuBLASLt: what it is told once for each shape is kept.
//!
//! Our matrices are row-major, its are column-major: it computes `outᵀ = W · xᵀ`, and sees `W` `[N, K]` as a `[K, N]` to be
//! transposed, `x` `[M, K]` as `[K, M]`, `out` `[M, N]` as `[N, M]`. Nothing is moved for that.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys as driver;

use super::device::{Arch, Device, checked};
use super::library;
use super::memory::{Buffer, Event};
use super::quiet::quietly;
use crate::{DType, KernelError};

/// What the library may use for partial sums; on Hopper it asks for more.
const WORKSPACE_BYTES: usize = 32 << 20;
const WORKSPACE_BYTES_SM90: usize = 64 << 20;
/// How many of the heuristic's proposals are tried out.
const CANDIDATES: usize = 8;
/// Timed runs of each, of which the fastest counts.
const RUNS: usize = 3;
/// `CUBLAS_OP_T` of `cublas_api.h`.
const TRANSPOSE: i32 = 1;
/// What addresses are multiples of.
const ALIGNMENT: u32 = 16;

/// `[rows, k] · [cols, k]ᵀ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LtShape {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) k: usize,
    /// Of both factors.
    pub(crate) dtype: DType,
    /// Of the result, and of the bias.
    pub(crate) out: DType,
    pub(crate) has_bias: bool,
}

/// Which of the heuristic's proposals runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choose {
    /// The one it likes best.
    First,
    /// The fastest: they are timed at the first call for a shape, which waits for the device (8 proposals, 4 runs each).
    Fastest,
}

/// Addresses on the device, each a multiple of 16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LtOperands {
    pub(crate) out: u64,
    pub(crate) x: u64,
    pub(crate) weight: u64,
    /// `[cols]` of the result's type; 0 for none.
    pub(crate) bias: u64,
}

/// The library, its workspace, and a plan for each shape. All work goes to the device's one stream, so one workspace is enough.
pub(crate) struct CublasLt {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: Mutex<HashMap<LtShape, Plan>>,
}

// SAFETY: the handle may be used from any thread; descriptors are used under the lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// Bytes that the library works in.
pub(super) fn workspace_bytes(arch: Arch) -> usize {
    if arch.number() >= 90 { WORKSPACE_BYTES_SM90 } else { WORKSPACE_BYTES }
}

impl CublasLt {
    /// Opens the library.
    ///
    /// # Errors
    /// [`KernelError::Library`] if it is not there, [`KernelError::Device`] if it does not start.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, KernelError> {
        library::open_cublaslt(Some(device.cuda))?;
        let bytes = workspace_bytes(device.arch);
        let workspace = device.alloc("the workspace of cuBLASLt", bytes)?;
        let handle = quietly(result::create_handle).map_err(failed("cublasLtCreate"))?;
        Ok(Self { device: Arc::clone(device), handle, workspace, plans: Mutex::default() })
    }

    /// Puts the product into the stream, by the plan of its shape. Once the fastest proposal is known it runs, whatever is chosen.
    ///
    /// # Safety
    /// The operands are there, in the sizes of `shape`, until the work is done. The device is current on this thread.
    pub(crate) unsafe fn run(&self, shape: LtShape, operands: LtOperands, choose: Choose) -> Result<(), KernelError> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(shape) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(slot) => slot.insert(self.plan(shape)?),
        };
        if choose == Choose::Fastest && !plan.is_timed {
            // SAFETY: the caller's promise.
            unsafe { self.tune(plan, operands)? };
        }
        // SAFETY: the caller's promise.
        unsafe { self.start(plan, plan.candidates[plan.best], operands) }
    }

    /// Times the proposals on these operands; the fastest becomes the plan's. `out` is written. Factors that fit into the cache are
    /// timed from there. Does nothing while work is recorded.
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    unsafe fn tune(&self, plan: &mut Plan, operands: LtOperands) -> Result<(), KernelError> {
        let mut state = driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives as long as the device.
        let result = unsafe { driver::cuStreamIsCapturing(self.device.stream(), &mut state) };
        checked("cuStreamIsCapturing", result)?;
        if state != driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        let marks = (0..=RUNS).map(|_| Event::timed(&self.device)).collect::<Result<Vec<_>, _>>()?;
        let mut best = None;
        for (index, &candidate) in plan.candidates.iter().enumerate() {
            // SAFETY: the caller's promise. A proposal that does not run is passed over.
            if unsafe { self.start(plan, candidate, operands) }.is_err() {
                continue;
            }
            // That run loaded the code, and goes on while the others are put behind it: they follow each other without a gap.
            for mark in &marks[..RUNS] {
                mark.record()?;
                // SAFETY: the caller's promise.
                unsafe { self.start(plan, candidate, operands)? };
            }
            marks[RUNS].record()?;
            marks[RUNS].wait()?;
            for run in marks.windows(2) {
                let time = run[1].since(&run[0])?;
                if best.is_none_or(|(fastest, _)| time < fastest) {
                    best = Some((time, index));
                }
            }
        }
        let Some((_, index)) = best else {
            return Err(failed("cublasLtMatmul")(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        };
        (plan.best, plan.is_timed) = (index, true);
        Ok(())
    }

    /// # Safety
    /// As for [`run`](Self::run); nobody else uses the plan meanwhile.
    unsafe fn start(
        &self,
        plan: &Plan,
        candidate: sys::cublasLtMatmulAlgo_t,
        operands: LtOperands,
    ) -> Result<(), KernelError> {
        let (alpha, beta) = (1f32, 0f32);
        let address = |at: u64| at as usize as *mut c_void;
        if operands.bias != 0 {
            plan.desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
        }
        // SAFETY: the descriptors live; operands are the caller's promise; the scales are read before the call returns.
        let result = unsafe {
            result::matmul(
                self.handle,
                plan.desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                address(operands.weight),
                plan.weight.0,
                address(operands.x),
                plan.x.0,
                address(operands.out),
                plan.out.0,
                address(operands.out),
                plan.out.0,
                &candidate,
                address(self.workspace.ptr()),
                self.workspace.bytes(),
                self.device.stream().cast(),
            )
        };
        result.map_err(failed("cublasLtMatmul"))
    }

    fn plan(&self, shape: LtShape) -> Result<Plan, KernelError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let LtShape { rows, cols, k, dtype, out, has_bias } = shape;
        let desc = MatmulDesc::new()?;
        desc.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSE)?;
        if has_bias {
            desc.set(
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &(sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32),
            )?;
            desc.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(data_type(out) as i32))?;
            // Any address, so that the heuristic sees that there is one.
            desc.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &self.workspace.ptr())?;
        }
        let (weight, x) = (Layout::new(dtype, k, cols)?, Layout::new(dtype, k, rows)?);
        let out = Layout::new(out, cols, rows)?;
        let candidates = self.candidates(&desc, [&weight, &x, &out])?;
        Ok(Plan { desc, weight, x, out, candidates, best: 0, is_timed: false })
    }

    /// The heuristic's proposals, the one it likes best first.
    fn candidates(
        &self,
        desc: &MatmulDesc,
        [weight, x, out]: [&Layout; 3],
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, KernelError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        const CALL: &str = "cublasLtMatmulAlgoGetHeuristic";
        let preference = Preference::new()?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(self.workspace.bytes() as u64))?;
        // Parts of K are added in f32, never in the type of the result.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &ALIGNMENT)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &ALIGNMENT)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &ALIGNMENT)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &ALIGNMENT)?;
        let mut proposals: [std::mem::MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>; CANDIDATES] =
            [const { std::mem::MaybeUninit::uninit() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: handle and descriptors live; there is room for as many proposals as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                desc.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
                CANDIDATES as i32,
                proposals.as_mut_ptr().cast(),
                &mut count,
            )
        };
        status.result().map_err(failed(CALL))?;
        let found = proposals.iter().take(count.max(0) as usize);
        // SAFETY: the library filled the first `count`.
        let found = found.map(|proposal| unsafe { proposal.assume_init_ref() });
        let usable = found.filter(|proposal| proposal.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let candidates: Vec<_> = usable.map(|proposal| proposal.algo).collect();
        if candidates.is_empty() {
            return Err(failed(CALL)(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        }
        Ok(candidates)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // Waits for everything in the context.
        // SAFETY: nobody uses it any more; the workspace's memory is given back after the work on it. Errors cannot be told.
        let _ = quietly(|| unsafe { result::destroy_handle(self.handle) });
    }
}

impl std::fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CublasLt").field("device", &self.device).finish_non_exhaustive()
    }
}

/// What is known of a shape.
struct Plan {
    desc: MatmulDesc,
    weight: Layout,
    x: Layout,
    out: Layout,
    candidates: Vec<sys::cublasLtMatmulAlgo_t>,
    /// Which of them runs.
    best: usize,
    /// Whether that is the fastest.
    is_timed: bool,
}

struct MatmulDesc(sys::cublasLtMatmulDesc_t);

impl MatmulDesc {
    /// Sums in f32.
    fn new() -> Result<Self, KernelError> {
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        result::create_matmul_desc(compute, scale).map(Self).map_err(failed("cublasLtMatmulDescCreate"))
    }

    fn set<V>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &V) -> Result<(), KernelError> {
        // SAFETY: the descriptor lives; the value is copied.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<V>()) }
            .map_err(failed("cublasLtMatmulDescSetAttribute"))
    }
}

impl Drop for MatmulDesc {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once. Errors cannot be told.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Column-major, its columns one behind the other.
    fn new(dtype: DType, rows: usize, cols: usize) -> Result<Self, KernelError> {
        result::create_matrix_layout(data_type(dtype), rows as u64, cols as u64, rows as i64)
            .map(Self)
            .map_err(failed("cublasLtMatrixLayoutCreate"))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as for descriptors.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, KernelError> {
        result::create_matmul_pref().map(Self).map_err(failed("cublasLtMatmulPreferenceCreate"))
    }

    fn set<V>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &V) -> Result<(), KernelError> {
        // SAFETY: the preference lives; the value is copied.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<V>()) }
            .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as for descriptors.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn failed(call: &'static str) -> impl Fn(CublasError) -> KernelError {
    move |error| KernelError::Device { call, error: format!("{:?}", error.0) }
}
