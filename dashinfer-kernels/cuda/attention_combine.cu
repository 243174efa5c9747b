// nvrtc: sm_75 sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// Merges the partial results of rows whose positions were split (attention_units.cuh).
//
//   out[row, h, :] = sum_s exp2(m_s - max m) * acc_s / sum_s exp2(m_s - max m) * l_s          s: the row's splits
//
// acc: partial_out [slots, H, D]   m, l: partial_ml [slots, H, 2]   out: [rows, H * D] T
// One block of four warps for each head (x) and entry of `splits` (y); warp w adds the splits with index % 4 == w, then the
// warps are added in order: the order of the sum is fixed by the number of splits. At most 128 splits; D even, at most 256.
// Entries with one split were written by the unit itself. Limit: latency; the bytes, 4 * D * H a split, lie in L2.
#include "attention_units.cuh"

constexpr int NUM_WARPS = 4;
constexpr int PAIRS = 4; // of a head in each lane

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
    KERNEL(attention_combine)(T* __restrict__ out, const float* __restrict__ partial_out,
                              const float* __restrict__ partial_ml, const RowSplits* __restrict__ splits, u32 num_heads,
                              u32 head_dim) {
    __shared__ float weights[NUM_WARPS * 32];
    __shared__ float tops[NUM_WARPS];
    __shared__ float2 parts[NUM_WARPS][PAIRS * 32];

    let_next_start();
    wait_for_inputs();
    const RowSplits row = splits[blockIdx.y];
    if (row.num_splits <= 1) return;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = head_dim / 2;
    const u64 first = u64(row.first_slot) * num_heads + blockIdx.x; // split s: first + s * num_heads

    // Thread s weighs split s.
    float2 ml{-INF, 0.f};
    if (threadIdx.x < row.num_splits)
        ml = *reinterpret_cast<const float2*>(partial_ml + (first + u64(threadIdx.x) * num_heads) * 2);
    float top = warp_max(ml.x);
    if (lane == 0) tops[warp] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) top = fmaxf(top, tops[w]);
    const float weight = weight_of(ml.x, top);
    weights[threadIdx.x] = weight;
    const float inverse = inverse_sum(block_sum(weight * ml.y)); // with a barrier, which `weights` needs

    float2 acc[PAIRS] = {};
#pragma unroll 4
    for (u32 s = warp; s < row.num_splits; s += NUM_WARPS) {
        const float* const from = partial_out + (first + u64(s) * num_heads) * head_dim;
        const float of_split = weights[s];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const u32 pair = i * 32 + lane;
            if (pair < half) {
                const float2 x = *reinterpret_cast<const float2*>(from + pair * 2);
                acc[i].x += x.x * of_split;
                acc[i].y += x.y * of_split;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) parts[warp][i * 32 + lane] = acc[i];
    __syncthreads();
    for (u32 pair = threadIdx.x; pair < half; pair += NUM_WARPS * 32) {
        float2 sum{0.f, 0.f};
#pragma unroll
        for (int w = 0; w < NUM_WARPS; w++) sum.x += parts[w][pair].x, sum.y += parts[w][pair].y;
        store_pair(out + (u64(row.row) * num_heads + blockIdx.x) * head_dim + pair * 2, sum.x * inverse, sum.y * inverse);
    }
}
