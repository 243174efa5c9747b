// For each row t of qkv [T, (H + 2K) * D]: the heads of q and k are normed, if the family norms its heads, and rotated
// (rope.cuh) in f32, and rounded once; they go back to where they were, k and v into the row's slot of the cache
// [blocks, K, B, D]. Steps of decodes do this within attention where they can (attention_decode.cu).
//
// Block (t, c) takes row t, and part c of its heads. Its threads first put the row's sines and cosines into shared memory;
// then a group of 8, 16 or 32 lanes takes a head at a time, eight values to a lane: four pairs, or eight values beyond R.
// Head sizes or rotations that are no multiples of 8, and heads above 256, go by one value or pair at a time, a warp to a head.
// Limit: memory, (2 (H + K) + K) * D reads and writes of a row and 2 K D of cache; for one row the latency of a sine.
#include "rope.cuh"

constexpr u32 MAX_PAIRS = 512;     // of a head, R / 2
constexpr u32 NO_SLOT = 0xffffffffu; // a row that only fills up a batch: not stored

struct RopeParams {
    T* qkv;
    T* k_cache;
    T* v_cache;
    const u32* positions; // [T]
    const u32* slots;     // [T]
    const float* inv_freq; // [R / 2]
    const float* q_norm;  // [D] or null
    const float* k_norm;
    float rope_scale;
    float norm_eps;
    u32 rotated; // R
    u32 interleaved;
    u32 num_heads;
    u32 num_kv_heads;
    u32 head_dim;
    u32 block_size;
    u32 num_rows;
    u32 pad;
};

__shared__ float cosine[MAX_PAIRS], sine[MAX_PAIRS];

// Where head `head` of the cache keeps the row that has slot `slot`.
__device__ __forceinline__ size_t cache_at(const RopeParams& p, u32 slot, u32 head) {
    return ((size_t(slot / p.block_size) * p.num_kv_heads + head) * p.block_size + slot % p.block_size) * p.head_dim;
}

__device__ __forceinline__ void by_eight(const RopeParams& p, T* row, u32 slot) {
    using Four = Vec<T, 4>;
    const u32 d = p.head_dim, units = d / 8;
    const u32 lanes = units <= 8 ? 8 : units <= 16 ? 16 : 32;
    const u32 unit = threadIdx.x % lanes, group = threadIdx.x / lanes, num_groups = blockDim.x / lanes;
    const EightValues eight(unit, p.rotated / 2, p.interleaved != 0, cosine, sine);
    const u32 num_heads = p.num_heads + 2 * p.num_kv_heads, stride = num_groups * gridDim.y;
    // Whole warps make the turns of this loop, for the sums.
    for (u32 first = blockIdx.y * num_groups; first < num_heads; first += stride) {
        const u32 head = first + group;
        const bool mine = head < num_heads && unit < units;
        T* values = row + size_t(head) * d;
        float a[4] = {}, b[4] = {};
        Four in[2];
        if (mine) {
            in[0] = load<4>(values + eight.at[0]);
            in[1] = load<4>(values + eight.at[1]);
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = to_float(in[0].at[j]), b[j] = to_float(in[1].at[j]);
        }
        const bool is_q = head < p.num_heads, is_v = head >= p.num_heads + p.num_kv_heads;
        if (p.q_norm != nullptr) {
            const float scale = EightValues::norm_scale(a, b, lanes, d, p.norm_eps);
            if (mine && !is_v) EightValues::norm(a, b, scale, eight.weights(is_q ? p.q_norm : p.k_norm));
        }
        if (!mine) continue;
        if (!is_v) {
            eight.rotate(a, b);
#pragma unroll
            for (int j = 0; j < 4; j++) in[0].at[j] = from_float<T>(a[j]), in[1].at[j] = from_float<T>(b[j]);
            store<4>(values + eight.at[0], in[0]);
            store<4>(values + eight.at[1], in[1]);
        }
        if (!is_q && slot != NO_SLOT) {
            const u32 kv_head = head - p.num_heads - (is_v ? p.num_kv_heads : 0);
            T* to = (is_v ? p.v_cache : p.k_cache) + cache_at(p, slot, kv_head);
            store<4>(to + eight.at[0], in[0]);
            store<4>(to + eight.at[1], in[1]);
        }
    }
}

// Any size: a warp to a head, a pair or a value to a lane and step.
__device__ __forceinline__ void by_one(const RopeParams& p, T* row, u32 slot) {
    const u32 d = p.head_dim, half = p.rotated / 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    for (u32 head = blockIdx.y * num_warps + warp; head < p.num_heads + 2 * p.num_kv_heads; head += num_warps * gridDim.y) {
        T* values = row + size_t(head) * d;
        const bool is_q = head < p.num_heads, is_v = head >= p.num_heads + p.num_kv_heads;
        T* cached = nullptr;
        if (!is_q && slot != NO_SLOT) {
            const u32 kv_head = head - p.num_heads - (is_v ? p.num_kv_heads : 0);
            cached = (is_v ? p.v_cache : p.k_cache) + cache_at(p, slot, kv_head);
        }
        if (is_v) {
            for (u32 i = lane; i < d && cached != nullptr; i += 32) cached[i] = values[i];
            continue;
        }
        const float* weight = is_q ? p.q_norm : p.k_norm;
        float scale = 1.f;
        if (weight != nullptr) {
            float sum = 0.f;
            for (u32 i = lane; i < d; i += 32) sum += to_float(values[i]) * to_float(values[i]);
            scale = rsqrtf(warp_sum(sum) / float(d) + p.norm_eps);
        }
        auto normed = [&](u32 i) {
            const float x = to_float(values[i]);
            return weight != nullptr ? x * scale * weight[i] : x;
        };
        auto put = [&](u32 i, float x) {
            const T rounded = from_float<T>(x);
            values[i] = rounded;
            if (cached != nullptr) cached[i] = rounded;
        };
        __syncwarp(); // all have read for the sum before one writes
        for (u32 pair = lane; pair < half; pair += 32) {
            const u32 i = p.interleaved ? 2 * pair : pair, j = p.interleaved ? 2 * pair + 1 : pair + half;
            const float a = normed(i), b = normed(j), c = cosine[pair], s = sine[pair];
            put(i, a * c - b * s);
            put(j, b * c + a * s);
        }
        for (u32 i = p.rotated + lane; i < d; i += 32) put(i, normed(i));
    }
}

extern "C" __global__ void __launch_bounds__(256) KERNEL(rope_and_cache)(const RopeParams p) {
    let_next_start();
    const u32 t = blockIdx.x;
    // Positions and slots were copied before the step began, and are read ahead of what its kernels write (0030).
    const u32 position = t < p.num_rows ? p.positions[t] : 0, slot = t < p.num_rows ? p.slots[t] : NO_SLOT;
    for (u32 pair = threadIdx.x; pair < p.rotated / 2; pair += blockDim.x)
        turn_by(position, p.inv_freq[pair], p.rope_scale, &cosine[pair], &sine[pair]);
    __syncthreads();
    wait_for_inputs();
    if (t >= p.num_rows) return;
    const u32 d = p.head_dim;
    T* row = p.qkv + size_t(t) * (p.num_heads + 2 * p.num_kv_heads) * d;
    if (d % 8 == 0 && p.rotated % 8 == 0 && d <= 256) {
        by_eight(p, row, slot);
    } else {
        by_one(p, row, slot);
    }
}
