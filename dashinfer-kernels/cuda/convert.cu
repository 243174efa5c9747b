// out[i] = T(from[i])                from: f32, bf16 or f16, one symbol each; rounded to nearest even by way of f32
// Weights whose stored type is not the type that the model computes in; done once, while loading. Four values per thread.
// Limit: memory, n * (size of the one + size of the other).
#include "common.cuh"

template <typename Stored>
__device__ __forceinline__ void convert(T* out, const Stored* from, u64 count) {
    let_next_start();
    wait_for_inputs();
    const u64 first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (first + 4 <= count && aligned_16(out) && aligned_16(from)) {
        const Vec<Stored, 4> in = load<4>(from + first);
        Vec<T, 4> to;
#pragma unroll
        for (int i = 0; i < 4; i++) to.at[i] = from_float<T>(to_float(in.at[i]));
        store<4>(out + first, to);
    } else {
        for (u64 i = first; i < first + 4 && i < count; i++) out[i] = from_float<T>(to_float(from[i]));
    }
}

extern "C" __global__ void __launch_bounds__(256) KERNEL(convert_f32)(T* out, const f32* from, u64 count) { convert(out, from, count); }
extern "C" __global__ void __launch_bounds__(256) KERNEL(convert_bf16)(T* out, const bf16* from, u64 count) { convert(out, from, count); }
extern "C" __global__ void __launch_bounds__(256) KERNEL(convert_f16)(T* out, const f16* from, u64 count) { convert(out, from, count); }
