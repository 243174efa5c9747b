// What all kernels share: the element type, conversions, 16-byte loads, reductions, programmatic launches.
//
// A file is compiled once for each element type: -DDASH_TYPE=bf16 | f16 | f32 makes `T` that type and KERNEL(name) the
// symbol name_bf16, .. . No toolkit header: a machine may have NVRTC alone. Conversions are inline PTX.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using uptr = unsigned long long;

struct bf16 { u16 bits; };
struct f16 { u16 bits; };
using f32 = float;

#ifndef DASH_TYPE
#define DASH_TYPE bf16
#endif
using T = DASH_TYPE;
#define DASH_PASTE(a, b) a##_##b
#define DASH_EXPAND(a, b) DASH_PASTE(a, b)
#define KERNEL(name) DASH_EXPAND(name, DASH_TYPE)

constexpr float INF = __builtin_bit_cast(float, 0x7f800000u);
constexpr u32 ALL_LANES = 0xffffffffu;

// --- conversions -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename To>
__device__ __forceinline__ To from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    // Round to nearest, ties to even; a NaN stays one.
    u32 bits = __float_as_uint(x);
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u ? u16(0x7fff) : u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    return y;
}

// Two values in one register, the first in the lower half.
template <typename To>
__device__ __forceinline__ u32 pack2(float lo, float hi) {
    return u32(from_float<To>(lo).bits) | u32(from_float<To>(hi).bits) << 16;
}
#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ u32 pack2<bf16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <>
__device__ __forceinline__ u32 pack2<f16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
#endif

// --- vectors -----------------------------------------------------------------------------------------------------------

// N values that are loaded and stored at once; N * sizeof(V) is 2, 4, 8 or 16 bytes, and the address a multiple of it.
template <typename V, int N>
struct alignas(sizeof(V) * N) Vec {
    V at[N];
};
template <typename V>
constexpr int PER_16B = 16 / int(sizeof(V));

template <int N, typename V>
__device__ __forceinline__ Vec<V, N> load(const V* from) { return *reinterpret_cast<const Vec<V, N>*>(from); }
template <int N, typename V>
__device__ __forceinline__ void store(V* to, const Vec<V, N>& values) { *reinterpret_cast<Vec<V, N>*>(to) = values; }

// 16 bytes that are read once: past the first-level cache.
__device__ __forceinline__ uint4 load_stream(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ bool aligned_16(const void* p) { return uptr(p) % 16 == 0; }

// The block copies `cols` values; rows of whole 16 bytes go 16 bytes at a time.
template <typename V>
__device__ __forceinline__ void copy_row(V* to, const V* from, u32 cols) {
    constexpr int N = PER_16B<V>;
    if (cols % N == 0 && aligned_16(to) && aligned_16(from)) {
        for (u32 i = threadIdx.x * N; i < cols; i += blockDim.x * N) store<N>(to + i, load<N>(from + i));
    } else {
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
    }
}

__device__ __forceinline__ u32 smem_u32(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// --- reductions --------------------------------------------------------------------------------------------------------

template <typename X>
__device__ __forceinline__ X warp_sum(X x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

// --- programmatic dependent launch -------------------------------------------------------------------------------------
//
// Kernels are launched so that one may start while the one before it still runs (SM90 and newer). Every thread of every
// kernel calls `wait_for_inputs` once, before it reads what an earlier kernel wrote, writes anything to global memory, or
// returns. Before it only constants may be read: weights, kernel parameters, what was copied before the step began
// (docs/decisions/0030-decode-reads-the-cache-early.md). `let_next_start` may come at any time.
// What earlier kernels write is no `const __restrict__` parameter: the compiler takes that for memory which nobody changes
// while the kernel runs, and may then read it before the wait; nor is the output `__restrict__` beside it.

__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
