//! What differs between devices before a backend is there: defaults, types, and how much memory there is.

#[cfg(feature = "cuda")]
use dashinfer_kernels::cuda;
use dashinfer_kernels::{CacheType, DType, KernelError, Scheme};
use dashinfer_models::{Attention, ModelSpec, Quantization, StepLimits, StoredType};

use super::Device;
use super::load::Opened;
use super::memory::{DEFAULT_CACHE_BYTES, Spare, available_bytes};
use crate::Error;

/// The device that a load will use.
pub(super) enum Target {
    Cpu,
    Cuda(cuda::CudaDevice),
}

impl Target {
    /// Finds the device that was asked for.
    ///
    /// # Errors
    /// [`Error::Device`] if it is not there, or this build cannot use it.
    pub(super) fn open(device: Device) -> Result<Self, Error> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            Device::Cuda(ordinal) => Ok(Self::Cuda(cuda::CudaDevice::open(ordinal)?)),
            // A machine without a driver has no GPU for us; one whose GPU does not work says so when it is asked for by name.
            Device::Auto => Ok(match cuda::num_devices() {
                Ok(1..) => cuda::CudaDevice::open(0).map_or(Self::Cpu, Self::Cuda),
                _ => Self::Cpu,
            }),
        }
    }

    pub(super) fn default_batch(&self) -> usize {
        match self {
            Self::Cpu => 64,
            Self::Cuda(_) => 256,
        }
    }

    pub(super) fn default_step_tokens(&self) -> usize {
        match self {
            Self::Cpu => 512,
            Self::Cuda(_) => 8192,
        }
    }

    /// The type in which the model is computed.
    pub(super) fn compute_type(&self, asked: Option<DType>, opened: &Opened) -> Result<DType, Error> {
        match self {
            Self::Cpu => match asked {
                None => Ok(DType::F32),
                Some(dtype @ (DType::F32 | DType::BF16)) => Ok(dtype),
                Some(dtype) => Err(unsupported(format!("computing in {dtype}"), "cpu")),
            },
            Self::Cuda(_) => Ok(asked.unwrap_or_else(|| most_stored(opened))),
        }
    }

    /// The type of activations between operators.
    pub(super) fn activation_type(&self, compute: DType) -> DType {
        match self {
            Self::Cpu => DType::F32,
            Self::Cuda(_) => compute,
        }
    }

    /// The type of keys and values.
    pub(super) fn kv_cache_type(
        &self,
        asked: Option<CacheType>,
        spec: &ModelSpec,
        compute: DType,
    ) -> Result<CacheType, Error> {
        let asked = asked.unwrap_or(compute.into());
        match self {
            Self::Cpu if asked.scale_bytes() != 0 && matches!(spec.attention, Attention::Latent(_)) => {
                Err(unsupported(format!("a KV cache of latent vectors in {asked}"), "cpu"))
            }
            Self::Cuda(_) if asked != compute.into() => {
                Err(unsupported(format!("a KV cache in {asked} beside activations in {compute}"), "cuda"))
            }
            Self::Cpu | Self::Cuda(_) => Ok(asked),
        }
    }

    /// Whether weights can be quantized as asked for.
    pub(super) fn check_quantization(&self, quantization: Quantization) -> Result<(), Error> {
        match (self, quantization.layers_scheme().or(quantization.vocabulary_scheme())) {
            (Self::Cuda(_), Some(scheme)) => Err(unsupported(format!("quantizing weights to {scheme}"), "cuda")),
            _ => Ok(()),
        }
    }

    /// What becomes of weights, as far as it is known here.
    pub(super) fn quantization(&self, quantization: Quantization, compute: DType) -> Quantization {
        match self {
            Self::Cpu => quantization,
            Self::Cuda(_) => quantization.dense_only(compute),
        }
    }

    /// Bytes of a packed matrix whose weights are stored as `stored`.
    pub(super) fn packed_bytes(
        &self,
        rows: usize,
        cols: usize,
        stored: DType,
        scheme: Option<Scheme>,
        compute: DType,
    ) -> usize {
        match self {
            Self::Cpu => dashinfer_kernels::cpu::packed_bytes(rows, cols, stored, scheme),
            Self::Cuda(_) => cuda::packed_bytes(rows, cols, compute),
        }
    }

    /// What operators need beside activations.
    pub(super) fn workspace_bytes(
        &self,
        spec: &ModelSpec,
        limits: StepLimits,
        compute: DType,
        quantization: Quantization,
    ) -> u64 {
        match self {
            Self::Cpu => {
                let experts = spec.experts.map_or(0, |experts| {
                    let (hidden, inner) = (spec.hidden_size, experts.size);
                    dashinfer_kernels::cpu::expert_bytes(limits.max_tokens, hidden, inner, &experts.routing)
                });
                let products = if !quantization.rounds_activations(spec) && compute == DType::F32 {
                    0
                } else {
                    dashinfer_kernels::cpu::workspace_bytes(limits.max_tokens, widest(spec))
                };
                let latent = match &spec.attention {
                    Attention::Latent(attention) => dashinfer_kernels::cpu::latent_workspace_bytes(&attention.params()),
                    _ => 0,
                };
                experts.saturating_add(products).saturating_add(latent) as u64
            }
            Self::Cuda(device) => {
                let cache = spec.kv_cache(1, 1, compute.into());
                let latent = match &spec.attention {
                    Attention::Latent(attention) => Some((attention.params(), compute, limits.max_tokens)),
                    _ => None,
                };
                let params = cuda::WorkspaceParams {
                    num_heads: spec.attention.num_heads(),
                    num_kv_heads: cache.num_kv_heads,
                    head_dim: cache.head_dim,
                    latent,
                    max_logit_rows: limits.max_logit_rows,
                    vocab_size: spec.vocab_size,
                };
                let experts = spec.experts.map_or(0, |experts| {
                    let (hidden, inner) = (spec.hidden_size, experts.size);
                    cuda::expert_bytes(limits.max_tokens, hidden, inner, compute, &experts.routing)
                });
                cuda::workspace_bytes(device, &params).saturating_add(experts as u64)
            }
        }
    }

    /// What the device has to give, and how much of it the cache takes when nobody says.
    pub(super) fn spare_bytes(&self) -> Result<Option<Spare>, Error> {
        Ok(match self {
            Self::Cpu => {
                available_bytes().map(|available| Spare { available, part: (1, 2), most: DEFAULT_CACHE_BYTES })
            }
            Self::Cuda(device) => Some(Spare { available: device.memory()?.0, part: (9, 10), most: u64::MAX }),
        })
    }
}

/// Columns of the widest product but those of experts.
fn widest(spec: &ModelSpec) -> usize {
    let shared = spec.experts.and_then(|experts| experts.shared).map_or(0, |shared| shared.size);
    let dense = if spec.layers.iter().any(|layer| !layer.experts) { spec.mlp.size } else { 0 };
    let compressed = match &spec.attention {
        Attention::Latent(attention) => attention.q_rank.unwrap_or(0),
        _ => 0,
    };
    spec.hidden_size.max(spec.attention.out_size()).max(compressed).max(dense).max(shared)
}

fn unsupported(what: String, backend: &'static str) -> Error {
    KernelError::Unsupported { op: "load", what, backend }.into()
}

/// The type in which most of the values are stored.
fn most_stored(opened: &Opened) -> DType {
    let source = opened.source.as_ref();
    let count = |dtype: DType| -> usize {
        let infos = source.names().into_iter().filter_map(|name| source.info(name));
        let of_type = infos.filter(|info| info.dtype == StoredType::Float(dtype));
        of_type.map(|info| info.shape.iter().product::<usize>()).sum()
    };
    // Beside quantized weights, f32 is what scales and norms are in: it says nothing of what the weights are worth.
    let types: &[DType] = match opened.spec.stored_quantization {
        Some(_) => &[DType::F16, DType::BF16],
        None => &[DType::BF16, DType::F16, DType::F32],
    };
    types.iter().copied().max_by_key(|&dtype| count(dtype)).unwrap_or(DType::BF16)
}

/// A build without GPUs: there is no device that could be opened.
#[cfg(not(feature = "cuda"))]
mod cuda {
    use dashinfer_kernels::{DType, KernelError, LatentParams, Routing};

    pub(crate) enum CudaDevice {}

    impl CudaDevice {
        pub(crate) fn open(ordinal: usize) -> Result<Self, KernelError> {
            let wanted = format!("CUDA device {ordinal}");
            Err(KernelError::NoDevice { wanted, found: "a build of dashinfer without the feature `cuda`".to_owned() })
        }

        pub(crate) fn memory(&self) -> Result<(u64, u64), KernelError> {
            match *self {}
        }
    }

    pub(crate) fn num_devices() -> Result<usize, KernelError> {
        Ok(0)
    }

    pub(crate) fn packed_bytes(rows: usize, cols: usize, dtype: DType) -> usize {
        rows * cols * dtype.size_bytes()
    }

    pub(crate) fn expert_bytes(_: usize, _: usize, _: usize, _: DType, _: &Routing) -> usize {
        0
    }

    #[expect(dead_code, reason = "there is no device to ask for its workspace")]
    pub(crate) struct WorkspaceParams {
        pub(crate) num_heads: usize,
        pub(crate) num_kv_heads: usize,
        pub(crate) head_dim: usize,
        pub(crate) latent: Option<(LatentParams, DType, usize)>,
        pub(crate) max_logit_rows: usize,
        pub(crate) vocab_size: usize,
    }

    pub(crate) fn workspace_bytes(device: &CudaDevice, _: &WorkspaceParams) -> u64 {
        match *device {}
    }
}
