// nvrtc: sm_75 sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// Attention over the paged cache without tensor cores: any T, any even head size up to 256, any H / K, SM70 and newer.
//
//   out[row, h, :] = sum_p softmax_p(scale * q[row, h, :] . k[p, h / G, :]) * v[p, h / G, :]      G = H / K
// With SOFT_CAP scores are capped; a sink joins the softmax of its head (softmax.cuh).
//
// q: heads of qkv [rows, (H + 2 K) * D]   k, v: blocks [K, B, D]   out: [rows, H * D]   all T; arithmetic in f32.
//
// A block of four warps takes one unit (attention_units.cuh), one kv head and up to four of its query heads at a time. A
// lane holds pairs l, l + 32, .. of the D / 2 pairs of a head. Warp w takes the quads of positions with index % 4 == w and
// keeps a running softmax of its own; the four merge in shared memory in the order of the warps. Keys and values are read
// ceil(G / 4) times. A row of a prompt is a unit too, so this serves prefill where nothing faster exists: every row then
// reads its whole context.
// Limit: memory while G <= 4, then shuffles (five for each score).
#include "attention_units.cuh"

#ifndef PAIRS
#define PAIRS 2 // of a head in each lane: D <= 64 * PAIRS
#endif

constexpr int NUM_WARPS = 4;
constexpr int HEADS = 4; // query heads of an item, at most
constexpr int QUAD = 4;  // positions that are loaded at once

// Two neighbours as floats; zeros if they are not to be read.
__device__ __forceinline__ float2 load_pair(const T* from, bool valid) {
    if (!valid) return float2{0.f, 0.f};
    const Vec<T, 2> v = load<2>(from);
    return float2{to_float(v.at[0]), to_float(v.at[1])};
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32) KERNEL(attention_simple)(const DecodeParams p) {
    __shared__ float2 parts[NUM_WARPS][HEADS][PAIRS * 32];
    __shared__ float2 of_warp[NUM_WARPS][HEADS]; // m and l

    let_next_start();
    wait_for_inputs();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 dim = p.head_dim, half = dim / 2;
    const u32 group = p.num_heads / p.num_kv_heads, num_parts = (group + HEADS - 1) / HEADS;
    const u32 block_shift = log2_of(p.block_size);
    const u64 head_stride = u64(p.block_size) * dim, block_stride = head_stride * p.num_kv_heads;
    const Scores scores(p.scale, p.soft_cap);

    const u32 per_unit = p.num_kv_heads * num_parts;
    const u32 num_items = *p.num_units * per_unit;
    for (u32 wave = 0; wave * gridDim.x < num_items; wave++) {
        const u32 item = item_of_wave(wave);
        if (item >= num_items) continue; // the whole block
        const DecodeUnit unit = p.units[item / per_unit];
        const u32 kv_head = item % per_unit / num_parts, part = item % num_parts;
        const u32 first_head = kv_head * group + part * HEADS;
        const u32 num_heads = group - part * HEADS < HEADS ? group - part * HEADS : HEADS;

        const u32 low = first_visible(unit, p.window), end = unit.end;
        const u32 low_quad = low / QUAD;
        const u32 first_quad = low_quad + ((warp - low_quad) & (NUM_WARPS - 1));
        const u32 last_quad = low < end ? (end + QUAD - 1) / QUAD : 0;
        const T* const k_head = p.k_cache + kv_head * head_stride;
        const T* const v_head = p.v_cache + kv_head * head_stride;
        const u32* const blocks = p.block_table + unit.first_block;

        float2 q[HEADS][PAIRS], acc[HEADS][PAIRS];
        float m[HEADS], l[HEADS];
        const T* const q_row = p.qkv + (u64(unit.row) * (p.num_heads + 2 * p.num_kv_heads) + first_head) * dim;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const u32 pair = i * 32 + lane;
                q[h][i] = load_pair(q_row + h * dim + pair * 2, h < num_heads && pair < half);
                q[h][i].x *= scores.scale, q[h][i].y *= scores.scale;
                acc[h][i] = float2{0.f, 0.f};
            }
            m[h] = -INF, l[h] = 0.f;
        }

        for (u32 quad = first_quad; quad < last_quad; quad += NUM_WARPS) {
            const u32 position = quad * QUAD; // four positions never cross a block
            const u64 at = blocks[position >> block_shift] * block_stride + (position & (p.block_size - 1)) * dim;
            float2 k[QUAD][PAIRS], v[QUAD][PAIRS];
#pragma unroll
            for (int j = 0; j < QUAD; j++)
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    const u32 pair = i * 32 + lane;
                    const bool valid = position + j < end && pair < half;
                    k[j][i] = load_pair(k_head + at + j * dim + pair * 2, valid);
                    v[j][i] = load_pair(v_head + at + j * dim + pair * 2, valid);
                }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= num_heads) break;
                float s[QUAD], top = m[h];
#pragma unroll
                for (int j = 0; j < QUAD; j++) {
                    s[j] = 0.f;
#pragma unroll
                    for (int i = 0; i < PAIRS; i++) s[j] += q[h][i].x * k[j][i].x + q[h][i].y * k[j][i].y;
                    s[j] = scores.capped(warp_sum(s[j])); // the same bits in every lane
                    if (position + j < low || position + j >= end) s[j] = -INF;
                    top = fmaxf(top, s[j]);
                }
                const float keep = exp2_approx(m[h] - top); // at least one of the four is seen: top is finite
                m[h] = top;
                l[h] *= keep;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) acc[h][i].x *= keep, acc[h][i].y *= keep;
#pragma unroll
                for (int j = 0; j < QUAD; j++) {
                    const float weight = exp2_approx(s[j] - top);
                    l[h] += weight;
#pragma unroll
                    for (int i = 0; i < PAIRS; i++) acc[h][i].x += weight * v[j][i].x, acc[h][i].y += weight * v[j][i].y;
                }
            }
        }

#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) parts[warp][h][i * 32 + lane] = acc[h][i];
            if (lane == 0) of_warp[warp][h] = float2{m[h], l[h]};
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < num_heads * half; i += NUM_WARPS * 32) {
            const u32 head = i / half, pair = i % half;
            float top = -INF;
#pragma unroll
            for (int w = 0; w < NUM_WARPS; w++) top = fmaxf(top, of_warp[w][head].x);
            float sum = 0.f, x = 0.f, y = 0.f;
#pragma unroll
            for (int w = 0; w < NUM_WARPS; w++) {
                const float weight = weight_of(of_warp[w][head].x, top);
                sum += of_warp[w][head].y * weight;
                x += parts[w][head][pair].x * weight;
                y += parts[w][head][pair].y * weight;
            }
            if (unit.num_splits == 1) {
                const float inverse = inverse_with_sink(top, sum, p.sinks, first_head + head);
                const u64 to = (u64(unit.row) * p.num_heads + first_head + head) * dim + pair * 2;
                store_pair(p.out + to, x * inverse, y * inverse);
            } else {
                const u64 to = u64(unit.slot) * p.num_heads + first_head + head;
                store_pair(p.partial_out + to * dim + pair * 2, x, y);
                if (pair == 0) store_pair(p.partial_ml + to * 2, top, sum);
            }
        }
        if (unit.num_splits > 1 && is_last_part(p, unit, first_head)) merge_parts<2, 4>(p, unit, first_head, num_heads, dim);
        __syncthreads(); // before `parts` is written again
    }
}
