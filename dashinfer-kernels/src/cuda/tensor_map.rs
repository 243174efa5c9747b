//! Tensor maps: how the copy engine (SM90 and newer) finds boxes of a tensor in global memory.

use std::ffi::c_void;

use bytemuck::NoUninit;
use cudarc::driver::sys;

use super::device::{Device, checked};
use crate::{DType, KernelError};

/// A `CUtensorMap`: passed to kernels by value, as `const __grid_constant__ TensorMap`.
#[derive(Debug, Clone, Copy, NoUninit)]
#[repr(transparent)]
pub(crate) struct TensorMap([u64; 16]);

/// A tensor of `RANK` dimensions, innermost (which is contiguous) first, and the boxes that are copied of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boxes<const RANK: usize> {
    /// Of 16-bit elements.
    pub(crate) dtype: DType,
    /// Address of the first element: a multiple of 16.
    pub(crate) base: u64,
    /// Elements in each dimension.
    pub(crate) dims: [u64; RANK],
    /// Bytes from an element to the next in each dimension: multiples of 16. That of the innermost is not looked at.
    pub(crate) stride_bytes: [u64; RANK],
    /// Elements of a box: at most 256 in each dimension.
    pub(crate) box_dims: [u32; RANK],
    /// 32, 64 or 128: bytes of the box's innermost dimension, within which its pieces of 16 are permuted.
    pub(crate) swizzle_bytes: u32,
}

impl TensorMap {
    /// Asks the driver for it: some 100 ns, without the device.
    pub(crate) fn new<const RANK: usize>(device: &Device, boxes: &Boxes<RANK>) -> Result<Self, KernelError> {
        use sys::CUtensorMapDataType_enum as Type;
        use sys::CUtensorMapSwizzle_enum as Swizzle;
        let dtype = match boxes.dtype {
            DType::BF16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match boxes.swizzle_bytes {
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        device.bind()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let steps = [1u32; RANK];
        // SAFETY: the driver is open; every array has RANK elements (strides: those after the first). The address is not followed.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                dtype,
                RANK as u32,
                boxes.base as *mut c_void,
                boxes.dims.as_ptr(),
                boxes.stride_bytes[1..].as_ptr(),
                boxes.box_dims.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        checked("cuTensorMapEncodeTiled", result)?;
        Ok(Self(map.opaque))
    }
}
