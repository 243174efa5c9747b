// Latent attention and its products without tensor cores: any T, SM70 and newer, C + R <= 64 * PAIRS, both even.
//
//   means[row, h, :] = sum_p softmax_p(scale * q'[row, h, :] . cache[p, :]) * cache[p, :C]     q' = latent_q[row, h, :] | q[row, h, N:]
//
// A block of four warps takes one unit (attention_units.cuh) and one head. Warp w takes positions begin + w, + 4, .. and keeps a running
// softmax of its own; a lane holds pairs l, l + 32, .. of the C + R values. The warps merge in their order.
// Limit: shuffles, five for each score; every head reads all of the cache.
#include "latent.cuh"

#ifndef PAIRS
#define PAIRS 9
#endif

constexpr int NUM_WARPS = 4;

__device__ __forceinline__ float2 load_pair(const T* from) {
    const Vec<T, 2> v = load<2>(from);
    return float2{to_float(v.at[0]), to_float(v.at[1])};
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, PAIRS <= 9 ? 4 : 3) KERNEL(latent_simple)(const LatentDecodeParams p) {
    __shared__ float2 parts[NUM_WARPS][PAIRS * 32];
    __shared__ float2 of_warp[NUM_WARPS]; // m and l

    let_next_start();
    wait_for_inputs();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 num_heads = p.units.num_heads, rank = p.units.head_dim, width = rank + p.rope_dim;
    const u32 block_shift = log2_of(p.units.block_size);
    const float scale = p.units.scale * LOG2_E;

    const u32 num_items = *p.units.num_units * num_heads;
    for (u32 wave = 0; wave * gridDim.x < num_items; wave++) {
        const u32 item = item_of_wave(wave);
        if (item >= num_items) continue; // the whole block
        const DecodeUnit unit = p.units.units[item / num_heads];
        const u32 head = item % num_heads;
        const u32* const blocks = p.units.block_table + unit.first_block;
        const T* const latent_q = p.latent_q + (u64(unit.row) * num_heads + head) * rank;
        const T* const rotated_q = rotated_query(p, unit.row, head);

        float2 q[PAIRS], acc[PAIRS];
        float m = -INF, l = 0.f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const u32 at = (i * 32 + lane) * 2;
            q[i] = acc[i] = float2{0.f, 0.f};
            if (at < width) q[i] = load_pair(at < rank ? latent_q + at : rotated_q + (at - rank));
            q[i].x *= scale, q[i].y *= scale;
        }
        for (u32 position = unit.begin + warp; position < unit.end; position += NUM_WARPS) {
            const u64 slot = u64(blocks[position >> block_shift]) << block_shift | (position & (p.units.block_size - 1));
            const T* const token = p.units.k_cache + slot * width;
            float2 k[PAIRS];
            float s = 0.f;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const u32 at = (i * 32 + lane) * 2;
                k[i] = at < width ? load_pair(token + at) : float2{0.f, 0.f};
                s += q[i].x * k[i].x + q[i].y * k[i].y;
            }
            s = warp_sum(s); // the same bits in every lane
            const float top = fmaxf(m, s), keep = exp2_approx(m - top), weight = exp2_approx(s - top);
            m = top;
            l = l * keep + weight;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                acc[i].x = acc[i].x * keep + weight * k[i].x;
                acc[i].y = acc[i].y * keep + weight * k[i].y;
            }
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++) parts[warp][i * 32 + lane] = acc[i];
        if (lane == 0) of_warp[warp] = float2{m, l};
        __syncthreads();
        float top = -INF;
#pragma unroll
        for (int w = 0; w < NUM_WARPS; w++) top = fmaxf(top, of_warp[w].x);
        for (u32 pair = threadIdx.x; pair < rank / 2; pair += NUM_WARPS * 32) {
            float sum = 0.f, x = 0.f, y = 0.f;
#pragma unroll
            for (int w = 0; w < NUM_WARPS; w++) {
                const float weight = weight_of(of_warp[w].x, top);
                sum += of_warp[w].y * weight;
                x += parts[w][pair].x * weight;
                y += parts[w][pair].y * weight;
            }
            if (unit.num_splits == 1) {
                const float inverse = inverse_sum(sum);
                store_pair(p.units.out + (u64(unit.row) * num_heads + head) * rank + pair * 2, x * inverse, y * inverse);
            } else {
                const u64 to = u64(unit.slot) * num_heads + head;
                store_pair(p.units.partial_out + to * rank + pair * 2, x, y);
                if (pair == 0) store_pair(p.units.partial_ml + to * 2, top, sum);
            }
        }
        if (unit.num_splits > 1 && is_last_part(p.units, unit, head)) merge_parts<2, 4>(p.units, unit, head, 1, rank);
        __syncthreads(); // before `parts` is written again
    }
}

// out[t, h, n] = sum_k x[t, h, k] * w[h, n, k]: block (t, h), a warp to an output, in the order of k within each lane.
extern "C" __global__ void __launch_bounds__(256)
    KERNEL(latent_product_simple)(T* out, const T* x, const T* w, u32 num_heads, u32 num_n, u32 num_k, u32 x_head) {
    let_next_start();
    wait_for_inputs();
    const u32 lane = threadIdx.x % 32, head = blockIdx.y;
    const u64 row = u64(blockIdx.x) * num_heads + head;
    const T* const from = x + row * x_head;
    for (u32 n = threadIdx.x / 32; n < num_n; n += blockDim.x / 32) {
        const T* const weights = w + (u64(head) * num_n + n) * num_k;
        float sum = 0.f;
        for (u32 k = lane; k < num_k; k += 32) sum += to_float(from[k]) * to_float(weights[k]);
        sum = warp_sum(sum);
        if (lane == 0) out[row * num_n + n] = from_float<T>(sum);
    }
}
