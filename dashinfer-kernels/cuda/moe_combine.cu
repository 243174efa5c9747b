// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// moe_combine:  out[t, i] = sum_j weights[t, j] * y[rows[t, j], i]     out: [M, E] T   y: [P, E] T   rows, weights: [M, top_k]
// moe_add:      out[t, i] += sigmoid(gate[t]) * x[t, i]                out, x: [M, E] T   gate: [M] f32, null: factors of 1
//
// Sums in f32, in the order of the list, which is that of the experts, and rounded once. A thread makes 8 columns (E % 8 == 0) of
// one row; block (x, y) is a row and 8 * 256 columns. Limit: memory, (top_k + 1) * M * E and 3 * M * E values.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    KERNEL(moe_combine)(T* out, const T* y, const u32* rows, const float* weights, u32 num_cols, u32 top_k) {
    let_next_start();
    wait_for_inputs();
    const u32 col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (col >= num_cols) return;
    rows += size_t(blockIdx.x) * top_k, weights += size_t(blockIdx.x) * top_k;
    float sums[8] = {};
#pragma unroll 4
    for (u32 j = 0; j < top_k; ++j) {
        const Vec<T, 8> values = load<8>(y + size_t(rows[j]) * num_cols + col);
        const float weight = weights[j];
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] = fmaf(weight, to_float(values.at[i]), sums[i]);
    }
    Vec<T, 8> result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.at[i] = from_float<T>(sums[i]);
    store(out + size_t(blockIdx.x) * num_cols + col, result);
}

extern "C" __global__ void __launch_bounds__(256) KERNEL(moe_add)(T* out, const T* x, const float* gate, u32 num_cols) {
    let_next_start();
    wait_for_inputs();
    const u32 col = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (col >= num_cols) return;
    const float factor = gate ? 1.f / (1.f + expf(-gate[blockIdx.x])) : 1.f;
    const size_t at = size_t(blockIdx.x) * num_cols + col;
    Vec<T, 8> sum = load<8>(out + at);
    const Vec<T, 8> values = load<8>(x + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum.at[i] = from_float<T>(fmaf(factor, to_float(values.at[i]), to_float(sum.at[i])));
    store(out + at, sum);
}
