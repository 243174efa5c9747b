// x[i] = cap * tanh(x[i] / cap), in place     x: [count] f32
// Four values to a thread; the last block's rest one by one. Limit: memory, 8 * count bytes.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) KERNEL(soft_cap)(float* x, u64 count, float cap) {
    let_next_start();
    wait_for_inputs();
    const u64 i = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= count) return;
    if (i + 4 <= count && aligned_16(x)) {
        Vec<float, 4> values = load<4>(x + i);
#pragma unroll
        for (int j = 0; j < 4; j++) values.at[j] = cap * tanhf(values.at[j] / cap);
        store<4>(x + i, values);
    } else {
        for (u64 j = i; j < i + 4 && j < count; j++) x[j] = cap * tanhf(x[j] / cap);
    }
}
