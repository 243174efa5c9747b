// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// moe_route:     for each token t, its top_k experts in ascending order, and their weights   experts, weights: [M, top_k]
// moe_dispatch:  the rows (token, expert) sorted by expert, then by token; and the tiles that the products walk
//                row_of: [M * top_k], the row of each pair   token_of: [M * top_k], the token of each row   tiles, num_tiles
//
// Score: softmax of the logits, or sigmoid of each (SIGMOID). Chosen by score plus correction (f32, may be null), of equals the first,
// what is not a number last; with groups, of the best groups only, judged by their best expert or their best two. Weight: the score,
// divided by the sum of all chosen if NORMALIZE, times `scale`. The definition: src/moe.rs.
//
// A warp routes a token; lane l has experts l, l + 32, .. (at most 32 * PER_LANE). Dispatch is a stable counting sort by one block: each
// warp counts a run of the pairs, the counts become places, and each warp puts its run there, in order. So nothing depends on timing.
// With `dispatch` one block of moe_route does that too: few tokens need no second kernel.
// Limit: latency; for many tokens that of one multiprocessor, some 300 ps for each pair.
#include "common.cuh"

#ifndef PER_LANE
#define PER_LANE 4
#endif

constexpr unsigned THREADS = PER_LANE > 8 ? 512 : 1024; // registers must suffice

struct ExpertTile {
    u32 expert, first_row, num_rows, unused;
};

struct RouteParams {
    u32 num_tokens, num_experts, top_k;
    u32 sigmoid, normalize;
    u32 num_groups, top_groups, top_two; // num_groups 0: none
    float scale;
};

struct DispatchParams {
    u32 num_pairs, num_experts, top_k, tile_rows;
    u32* row_of;
    u32* token_of;
    ExpertTile* tiles;
    u32* num_tiles;
};

#if __CUDA_ARCH__ >= 800
namespace {
constexpr u32 WARPS = THREADS / 32; // of the block that dispatches
constexpr u32 NOTHING = 0;   // a key below all that values have
constexpr u32 NO_EXPERT = ~0u;
constexpr u32 AHEAD = 8;     // pairs of a lane that are read at once: each is a trip to memory

__device__ __forceinline__ u32 warp_max(u32 x) { return __reduce_max_sync(ALL_LANES, x); }
__device__ __forceinline__ u32 warp_min(u32 x) { return __reduce_min_sync(ALL_LANES, x); }

// Keys are ordered as the values are; what is not a number is the least value, and both zeros are the same.
__device__ __forceinline__ u32 key_of(float x) {
    const u32 bits = __float_as_uint(x == x ? x + 0.f : -INF);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ u32 expert_at(int i, u32 lane) { return u32(i) * 32 + lane; }

// Takes away the keys of all groups but the best.
__device__ __forceinline__ void keep_groups(u32 (&keys)[PER_LANE], const RouteParams& p, u32 lane) {
    const u32 size = p.num_experts / p.num_groups;
    float mine = -INF; // the score of group `lane`
#pragma unroll 1
    for (u32 group = 0; group < p.num_groups; ++group) {
        const auto best_but = [&](u32 other) {
            u32 best = NOTHING;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                const u32 expert = expert_at(i, lane);
                if (expert / size == group && expert != other) best = max(best, keys[i]);
            }
            return warp_max(best);
        };
        const u32 first = best_but(NO_EXPERT);
        float score = value_of(first);
        if (p.top_two) {
            u32 where = NO_EXPERT;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                const u32 expert = expert_at(i, lane);
                if (expert / size == group && keys[i] == first) where = min(where, expert);
            }
            score += value_of(best_but(warp_min(where)));
        }
        if (lane == group) mine = score;
    }
    u32 rank = 0;
    for (u32 other = 0; other < p.num_groups; ++other) {
        const float score = __shfl_sync(ALL_LANES, mine, int(other));
        rank += score > mine || (score == mine && other < lane);
    }
    const u32 open = __ballot_sync(ALL_LANES, lane < p.num_groups && rank < p.top_groups);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u32 group = expert_at(i, lane) / size;
        if (group < p.num_groups && !(open >> group & 1)) keys[i] = NOTHING;
    }
}

// By one warp.
__device__ __forceinline__ void route(u32* experts, float* weights, const float* logits, const float* correction, const RouteParams& p, u32 token) {
    const u32 lane = threadIdx.x % 32;
    logits += size_t(token) * p.num_experts;
    float scores[PER_LANE];
    u32 keys[PER_LANE];
    float highest = -INF;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u32 expert = expert_at(i, lane);
        scores[i] = expert < p.num_experts ? logits[expert] : -INF;
        highest = fmaxf(highest, scores[i]);
    }
    if (p.sigmoid) {
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) scores[i] = 1.f / (1.f + expf(-scores[i]));
    } else {
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, step));
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            scores[i] = expert_at(i, lane) < p.num_experts ? expf(scores[i] - highest) : 0.f;
            sum += scores[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) scores[i] /= sum;
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u32 expert = expert_at(i, lane);
        keys[i] = NOTHING;
        if (expert < p.num_experts) keys[i] = key_of(correction ? scores[i] + correction[expert] : scores[i]);
    }
    if (p.num_groups) keep_groups(keys, p, lane);

    u32 expert = NO_EXPERT; // lane j: what was chosen as number j
    float weight = 0.f;
#pragma unroll 1
    for (u32 j = 0; j < p.top_k; ++j) {
        u32 best = NOTHING, where = NO_EXPERT;
        float score = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i] > best) best = keys[i], where = expert_at(i, lane), score = scores[i];
        const u32 of_all = warp_max(best);
        const u32 chosen = warp_min(best == of_all ? where : NO_EXPERT);
        score = __shfl_sync(ALL_LANES, score, int(chosen % 32));
        if (lane == j) expert = chosen, weight = score;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (expert_at(i, lane) == chosen) keys[i] = NOTHING;
    }
    const float sum = warp_sum(weight);
    if (p.normalize) weight /= sum + 1e-20f;
    weight *= p.scale;
    u32 rank = 0;
    for (u32 j = 0; j < p.top_k; ++j) rank += __shfl_sync(ALL_LANES, expert, int(j)) < expert;
    if (lane < p.top_k) {
        const size_t at = size_t(token) * p.top_k + rank;
        experts[at] = expert, weights[at] = weight;
    }
}

// Pairs first + lane, first + lane + 32, .. of a run.
__device__ __forceinline__ void read_pairs(u32 (&of_pairs)[AHEAD], const u32* experts, u32 first, u32 end) {
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
        const u32 pair = first + 32 * i + threadIdx.x % 32;
        of_pairs[i] = pair < end ? experts[pair] : NO_EXPERT;
    }
}

// By a block of THREADS threads. Shared memory: counts of each warp [WARPS][N], of all [N], first rows [N], first tiles [N].
__device__ __forceinline__ void dispatch(u32* shared, const u32* experts, const DispatchParams& p) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = p.num_experts;
    u32* const counts = shared;
    u32 *const totals = shared + WARPS * n, *const first_rows = totals + n, *const first_tiles = first_rows + n;
    const u32 run = (p.num_pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const u32 num_runs = (p.num_pairs + run - 1) / run; // few pairs leave warps without one
    for (u32 i = threadIdx.x; i < num_runs * n; i += blockDim.x) counts[i] = 0;
    __syncthreads();

    const u32 begin = min(warp * run, p.num_pairs), end = min(begin + run, p.num_pairs);
    u32* const mine = counts + warp * n;
    for (u32 first = begin; first < end; first += 32 * AHEAD) {
        u32 of_pairs[AHEAD];
        read_pairs(of_pairs, experts, first, end);
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i)
            if (of_pairs[i] != NO_EXPERT) atomicAdd(mine + of_pairs[i], 1);
    }
    __syncthreads();

    // Counts become how many of the expert the warps before have.
    for (u32 expert = threadIdx.x; expert < n; expert += blockDim.x) {
        u32 sum = 0;
        for (u32 w = 0; w < num_runs; ++w) {
            const u32 count = counts[w * n + expert];
            counts[w * n + expert] = sum;
            sum += count;
        }
        totals[expert] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        u32 rows = 0, tiles = 0;
        for (u32 first = 0; first < n; first += 32) {
            const u32 expert = first + lane, count = expert < n ? totals[expert] : 0;
            const u32 of_count = (count + p.tile_rows - 1) / p.tile_rows;
            u32 sum_rows = count, sum_tiles = of_count; // of lanes up to this
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                const u32 more_rows = __shfl_up_sync(ALL_LANES, sum_rows, step), more_tiles = __shfl_up_sync(ALL_LANES, sum_tiles, step);
                if (lane >= step) sum_rows += more_rows, sum_tiles += more_tiles;
            }
            if (expert < n) first_rows[expert] = rows + sum_rows - count, first_tiles[expert] = tiles + sum_tiles - of_count;
            rows += __shfl_sync(ALL_LANES, sum_rows, 31), tiles += __shfl_sync(ALL_LANES, sum_tiles, 31);
        }
        if (lane == 0) *p.num_tiles = tiles;
    }
    __syncthreads();

    for (u32 expert = threadIdx.x; expert < n; expert += blockDim.x) {
        const u32 count = totals[expert], first_row = first_rows[expert];
        ExpertTile* to = p.tiles + first_tiles[expert];
        for (u32 at = 0; at < count; at += p.tile_rows) {
            *reinterpret_cast<uint4*>(to) = make_uint4(expert, first_row + at, min(p.tile_rows, count - at), 0);
            ++to;
        }
    }
    for (u32 first = begin; first < end; first += 32 * AHEAD) {
        u32 of_pairs[AHEAD];
        read_pairs(of_pairs, experts, first, end);
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) {
            if (first + 32 * i >= end) break;
            const u32 pair = first + 32 * i + lane, expert = of_pairs[i];
            const u32 same = __match_any_sync(ALL_LANES, expert);
            const u32 before = __popc(same & ((1u << lane) - 1));
            u32 row = 0;
            if (expert != NO_EXPERT) row = first_rows[expert] + mine[expert] + before;
            __syncwarp();
            if (expert != NO_EXPERT) {
                if (before == 0) mine[expert] += __popc(same);
                p.row_of[pair] = row;
                p.token_of[row] = pair / p.top_k;
            }
            __syncwarp();
        }
    }
}
} // namespace
#endif

// Grid: a block for every blockDim.x / 32 tokens; one block of THREADS threads, with shared memory for it, if `and_dispatch`.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL(moe_route)(u32* experts, float* weights, const float* logits, const float* correction, RouteParams params, DispatchParams then,
                      u32 and_dispatch) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ u32 shared[];
    let_next_start();
    wait_for_inputs();
    const u32 warps = blockDim.x / 32;
    for (u32 token = blockIdx.x * warps + threadIdx.x / 32; token < params.num_tokens; token += gridDim.x * warps)
        route(experts, weights, logits, correction, params, token);
    if (and_dispatch) {
        __syncthreads();
        dispatch(shared, experts, then);
    }
#endif
}

// One block of THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS, 1) KERNEL(moe_dispatch)(const u32* experts, DispatchParams params) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ u32 shared[];
    let_next_start();
    wait_for_inputs();
    dispatch(shared, experts, params);
#endif
}
