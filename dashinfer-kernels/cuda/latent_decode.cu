// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// Latent attention of single rows over the paged cache, on tensor cores. T: bf16, f16.
//
//   means[row, h, :] = sum_p softmax_p(scale * q'[row, h, :] . cache[p, :]) * cache[p, :C]     q' = latent_q[row, h, :] | q[row, h, N:]
//
// cache: blocks [B, C + R], the key that all heads share, whose first C values are the value too. Sums and softmax in f32.
//
// A block of four warps takes one unit (attention_units.cuh) and 16 heads, the rows of one tile, at a time. Chunks of 32 positions
// go by in two stages of shared memory, filled by asynchronous copies, and are read from there twice. For scores each warp has a quarter of
// the C + R features of all positions, so that its part of the queries stays in registers; the parts are added in shared memory, in
// the order of the warps. Then each warp softens all scores, as all would otherwise wait once more, and has a quarter of the C
// columns of the sums. A result depends on the row and its ranges only. Parts of a row are merged by latent_merge.
//
// Shared: stages [2][32][C + R + 8] T, where + 8 lets eight rows of one column fall into different banks; parts of scores [4][16][40] f32.
// Limit: memory, 2 (C + R) bytes a position for 16 heads. Two blocks to a multiprocessor keep up to 148 KB on their way.
#include "latent.cuh"
#include "mma.cuh"

#ifndef RANK
#define RANK 512
#endif
#ifndef ROPE
#define ROPE 64
#endif

constexpr int C = RANK, WIDTH = RANK + ROPE;
constexpr int HEADS = 16, NUM_WARPS = 4, CHUNK = 32, STAGES = 2;
constexpr int PIECES = WIDTH / 8;                // of 16 bytes, of a position
constexpr u32 PITCH = WIDTH * 2 + 16;            // bytes
constexpr u32 STAGE_BYTES = CHUNK * PITCH;
constexpr u32 SCORES_AT = STAGES * STAGE_BYTES;
constexpr int SCORE_PITCH = CHUNK + 8;           // floats
constexpr int STEPS = WIDTH / 16 / NUM_WARPS;    // of 16 features, of a warp
constexpr int COLUMNS = C / NUM_WARPS;           // of a warp
static_assert(WIDTH % (16 * NUM_WARPS) == 0 && C % (16 * NUM_WARPS) == 0 && ROPE % 16 == 0, "warps share features and columns");
static_assert(CHUNK * PIECES % (NUM_WARPS * 32) == 0 && PITCH % 128 == 16, "whole rounds of copies, without conflicts of banks");

#if __CUDA_ARCH__ >= 800
// Copies chunks of a unit's positions.
struct Chunks {
    const T* cache;
    const u32* blocks;
    u32 block_shift, begin, end;
    u32 block[2]; // of both halves of the chunk that is to be copied next

    __device__ __forceinline__ u32 block_of(u32 position) const { return position < end ? blocks[position >> block_shift] : 0; }
    __device__ __forceinline__ void find(u32 chunk) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) block[half] = block_of(begin + chunk * CHUNK + half * 16);
    }
    // Positions from `end` on become zeros: a weight of zero does not hide a NaN.
    __device__ __forceinline__ void copy(u32 chunk, u32 stage) {
        const u32 first = begin + chunk * CHUNK;
#pragma unroll 6
        for (u32 i = threadIdx.x; i < CHUNK * PIECES; i += NUM_WARPS * 32) {
            const u32 at = i / PIECES, piece = i % PIECES, position = first + at;
            const u64 slot = u64(at < 16 ? block[0] : block[1]) << block_shift | (position & ((1u << block_shift) - 1));
            cp_async_16(stage + at * PITCH + piece * 16, cache + slot * WIDTH + piece * 8, position < end);
        }
        cp_async_commit();
        find(chunk + 1);
    }
};
#endif

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, 2) KERNEL(latent_decode)(const LatentDecodeParams p) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) u8 shared[];
    const u32 smem = smem_u32(shared);
    float* const scores = reinterpret_cast<float*>(shared + SCORES_AT);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 num_heads = p.units.num_heads, num_tiles = (num_heads + HEADS - 1) / HEADS;
    const float scale = p.units.scale * LOG2_E;
    // This lane's part of a score: head g, position 2 t.
    float* const part = scores + (warp * HEADS + g) * SCORE_PITCH + 2 * t;
    const float* const whole = scores + g * SCORE_PITCH + 2 * t;
    const u32 key_at = smem + (lane / 16 * 8 + lane % 8) * PITCH + warp * (STEPS * 32) + lane / 8 % 2 * 16;
    const u32 value_at = smem + lane % 16 * PITCH + warp * (COLUMNS * 2) + lane / 16 * 16;
    let_next_start();
    wait_for_inputs();

    const u32 num_items = *p.units.num_units * num_tiles;
    for (u32 wave = 0; wave * gridDim.x < num_items; wave++) {
        const u32 item = item_of_wave(wave);
        if (item >= num_items) continue; // the whole block
        const DecodeUnit unit = p.units.units[item / num_tiles];
        const u32 first_head = item % num_tiles * HEADS;
        const u32 heads = num_heads - first_head < HEADS ? num_heads - first_head : HEADS;
        const u32 num_chunks = (unit.end - unit.begin + CHUNK - 1) / CHUNK;
        Chunks chunks{p.units.k_cache, p.units.block_table + unit.first_block, log2_of(p.units.block_size), unit.begin, unit.end, {}};
        chunks.find(0);
        if (num_chunks > 0) chunks.copy(0, smem);

        u32 q[STEPS][4];
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 head = g + j % 2 * 8, feature = (warp * STEPS + i) * 16 + j / 2 * 8 + 2 * t;
                q[i][j] = 0;
                if (head < heads) {
                    const T* const from = feature < C ? p.latent_q + (u64(unit.row) * num_heads + first_head + head) * C + feature
                                                      : rotated_query(p, unit.row, first_head + head) + (feature - C);
                    q[i][j] = *reinterpret_cast<const u32*>(from);
                }
            }

        // Heads g and g + 8; `l` over the lane's own positions until the end. All warps have the same `m` and `l`.
        float acc[COLUMNS / 8][4] = {};
        float m[2] = {-INF, -INF}, l[2] = {0.f, 0.f};
        for (u32 chunk = 0; chunk < num_chunks; chunk++) {
            const u32 stage = chunk % STAGES * STAGE_BYTES;
            cp_async_wait<0>();
            __syncthreads(); // the chunk is there, and nobody reads the one before any more
            if (chunk + 1 < num_chunks) chunks.copy(chunk + 1, smem + (STAGE_BYTES - stage));

            float s[CHUNK / 8][4] = {};
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int half = 0; half < CHUNK / 16; half++) {
                    u32 k[4];
                    ldmatrix_x4(k, key_at + stage + half * (16 * PITCH) + i * 32);
                    mma_16x8x16<T>(s[2 * half], q[i], {k[0], k[1]});
                    mma_16x8x16<T>(s[2 * half + 1], q[i], {k[2], k[3]});
                }
#pragma unroll
            for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) store_pair(part + r * (8 * SCORE_PITCH) + n * 8, s[n][2 * r], s[n][2 * r + 1]);
            __syncthreads();

            // s[n][j]: head g + j / 2 * 8, position 8 n + 2 t + j % 2 of the chunk.
            const u32 left = unit.end - unit.begin - chunk * CHUNK;
            float top[2] = {m[0], m[1]};
#pragma unroll
            for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float2 sum = {0.f, 0.f};
#pragma unroll
                    for (int w = 0; w < NUM_WARPS; w++) {
                        const float2 of = *reinterpret_cast<const float2*>(whole + (w * HEADS + r * 8) * SCORE_PITCH + n * 8);
                        sum.x += of.x, sum.y += of.y;
                    }
                    const u32 at = 8 * n + 2 * t;
                    s[n][2 * r] = at < left ? sum.x * scale : -INF;
                    s[n][2 * r + 1] = at + 1 < left ? sum.y * scale : -INF;
                    top[r] = fmaxf(top[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
                }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                top[r] = fmaxf(top[r], __shfl_xor_sync(ALL_LANES, top[r], 1));
                top[r] = fmaxf(top[r], __shfl_xor_sync(ALL_LANES, top[r], 2));
            }
            if (__any_sync(ALL_LANES, top[0] > m[0] || top[1] > m[1])) { // else times one
                const float keep[2] = {exp2_approx(m[0] - top[0]), exp2_approx(m[1] - top[1])};
#pragma unroll
                for (int r = 0; r < 2; r++) m[r] = top[r], l[r] *= keep[r];
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) acc[n][j] *= keep[j / 2];
            }
            u32 weights[CHUNK / 16][4];
#pragma unroll
            for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float x = exp2_approx(s[n][2 * r] - m[r]), y = exp2_approx(s[n][2 * r + 1] - m[r]);
                    l[r] += x + y;
                    weights[n / 2][n % 2 * 2 + r] = pack2<T>(x, y);
                }
#pragma unroll
            for (int step = 0; step < CHUNK / 16; step++)
#pragma unroll
                for (int i = 0; i < COLUMNS / 16; i++) {
                    u32 v[4];
                    ldmatrix_x4_trans(v, value_at + stage + step * (16 * PITCH) + i * 32);
                    mma_16x8x16<T>(acc[2 * i], weights[step], {v[0], v[1]});
                    mma_16x8x16<T>(acc[2 * i + 1], weights[step], {v[2], v[3]});
                }
        }

#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 head = g + r * 8;
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 1);
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 2);
            if (head >= heads) continue;
            const u32 column = warp * COLUMNS + 2 * t;
            if (unit.num_splits == 1) {
                const float inverse = inverse_sum(l[r]);
                T* const to = p.units.out + (u64(unit.row) * num_heads + first_head + head) * C + column;
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++) store_pair(to + n * 8, acc[n][2 * r] * inverse, acc[n][2 * r + 1] * inverse);
            } else {
                const u64 at = u64(unit.slot) * num_heads + first_head + head;
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++)
                    store_pair(p.units.partial_out + at * C + column + n * 8, acc[n][2 * r], acc[n][2 * r + 1]);
                if (warp == 0 && t == 0) store_pair(p.units.partial_ml + at * 2, m[r], l[r]);
            }
        }
        __syncthreads(); // before the stages and scores are written again
    }
#endif
}

// Merges the parts of rows that are split: a block takes a head of a row at a time. A head's part is 4 C bytes, and would keep the block that
// comes last busy for long.
extern "C" __global__ void __launch_bounds__(C / 4) KERNEL(latent_merge)(const LatentDecodeParams p) {
#if __CUDA_ARCH__ >= 800
    let_next_start();
    const u32 num_heads = p.units.num_heads, num_items = *p.units.num_units * num_heads;
    wait_for_inputs();
    for (u32 item = blockIdx.x; item < num_items; item += gridDim.x) {
        const DecodeUnit& unit = p.units.units[item / num_heads];
        if (unit.num_splits > 1 && unit.split == 0) merge_parts<4, 8>(p.units, unit, item % num_heads, 1, C);
    }
#endif
}
