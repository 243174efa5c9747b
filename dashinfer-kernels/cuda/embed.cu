// out[t, :] = scale * table[id(t), :]        out: [T, E]   table: [V, E]   id(t): ids[t], or (*last_ids)[carried[t]] where carried[t] is given
// A decode that follows a step whose samples the host has not seen yet takes its token from the device: `carried` names the
// row of `*last_ids` that the sampler wrote. It writes to two places in turn, and a recorded step reads which.
// One block per row. A scale of 1 copies. Limit: memory, 2 * T * E elements; for one row the launch.
#include "common.cuh"

constexpr u32 NOT_CARRIED = 0xffffffffu;

// The block multiplies `cols` values, in f32; rows of whole 16 bytes go 16 bytes at a time.
__device__ __forceinline__ void scale_row(T* to, const T* from, u32 cols, float scale) {
    constexpr int N = PER_16B<T>;
    if (cols % N == 0 && aligned_16(to) && aligned_16(from)) {
        for (u32 i = threadIdx.x * N; i < cols; i += blockDim.x * N) {
            Vec<T, N> values = load<N>(from + i);
#pragma unroll
            for (int j = 0; j < N; j++) values.at[j] = from_float<T>(scale * to_float(values.at[j]));
            store<N>(to + i, values);
        }
    } else {
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from_float<T>(scale * to_float(from[i]));
    }
}

extern "C" __global__ void __launch_bounds__(512) KERNEL(embed)(T* out, const T* __restrict__ table,
                                                                 const u32* ids, const u32* carried,
                                                                 const u32* const* last_ids, u32 hidden, u32 num_rows,
                                                                 float scale) {
    let_next_start();
    wait_for_inputs();
    const u32 row = blockIdx.x;
    if (row >= num_rows) return;
    const u32 from = carried[row];
    const u32 id = from == NOT_CARRIED ? ids[row] : (*last_ids)[from];
    T* const to = out + size_t(row) * hidden;
    if (scale == 1.f) copy_row(to, table + size_t(id) * hidden, hidden);
    else scale_row(to, table + size_t(id) * hidden, hidden, scale);
}
