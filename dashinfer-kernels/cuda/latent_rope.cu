// For each row t of kv [T, C + R] and q [T, H * (N + R)]: the C values are normed, the R behind them and the last R of each head's
// query are rotated, in f32, and rounded once. Queries go back to where they were, the C + R values into the row's slot of the
// cache [blocks, B, C + R].
//
//   c = c * w / sqrt(mean(c^2) + eps)      w: [C] f32
//   (a, b) = (a * cos - b * sin, b * cos + a * sin)    for R / 2 pairs: values i and i + R / 2, or 2i and 2i + 1 (interleaved)
//
// Block (t, 0) takes what the cache gets of row t, block (t, 1) the queries. Any T, C and R.
// Limit: memory, 2 H * R + 2 (C + R) values a row; for one row the latency of a sine.
#include "rope.cuh"

constexpr u32 MAX_PAIRS = 512;       // R / 2
constexpr u32 NO_SLOT = 0xffffffffu; // a row that only fills up a batch: not stored

struct LatentRopeParams {
    T* q;
    const T* kv;
    T* cache;
    const u32* positions;  // [T]
    const u32* slots;      // [T]
    const float* inv_freq; // [R / 2]
    const float* norm;     // [C]
    float rope_scale;
    float norm_eps;
    u32 interleaved;
    u32 num_heads;
    u32 rank;     // C
    u32 nope_dim; // N
    u32 rope_dim; // R
    u32 pad;
};

__shared__ float cosine[MAX_PAIRS], sine[MAX_PAIRS], of_warp[32];

// The pair `pair` of `from`, turned, to `to`.
__device__ __forceinline__ void turn_pair(const LatentRopeParams& p, T* to, const T* from, u32 pair) {
    const u32 half = p.rope_dim / 2;
    const u32 i = p.interleaved ? 2 * pair : pair, j = p.interleaved ? 2 * pair + 1 : pair + half;
    float a = to_float(from[i]), b = to_float(from[j]);
    EightValues::turn(a, b, cosine[pair], sine[pair]);
    to[i] = from_float<T>(a);
    to[j] = from_float<T>(b);
}

extern "C" __global__ void __launch_bounds__(256) KERNEL(latent_rope)(const LatentRopeParams p) {
    let_next_start();
    const u32 t = blockIdx.x, half = p.rope_dim / 2;
    const u32 position = p.positions[t], slot = p.slots[t];
    for (u32 pair = threadIdx.x; pair < half; pair += blockDim.x)
        turn_by(position, p.inv_freq[pair], p.rope_scale, &cosine[pair], &sine[pair]);
    __syncthreads();
    wait_for_inputs();
    if (blockIdx.y == 1) {
        T* const row = p.q + u64(t) * p.num_heads * (p.nope_dim + p.rope_dim) + p.nope_dim;
        for (u32 i = threadIdx.x; i < p.num_heads * half; i += blockDim.x) {
            T* const rotated = row + i / half * (p.nope_dim + p.rope_dim);
            turn_pair(p, rotated, rotated, i % half);
        }
        return;
    }
    if (slot == NO_SLOT) return;
    const T* const from = p.kv + u64(t) * (p.rank + p.rope_dim);
    T* const to = p.cache + u64(slot) * (p.rank + p.rope_dim);
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < p.rank; i += blockDim.x) sum = __fmaf_rn(to_float(from[i]), to_float(from[i]), sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += of_warp[w];
    const float scale = rsqrtf(__fadd_rn(__fdiv_rn(sum, float(p.rank)), p.norm_eps));
    for (u32 i = threadIdx.x; i < p.rank; i += blockDim.x)
        to[i] = from_float<T>(__fmul_rn(__fmul_rn(to_float(from[i]), scale), p.norm[i]));
    for (u32 pair = threadIdx.x; pair < half; pair += blockDim.x) turn_pair(p, to + p.rank, from + p.rank, pair);
}
