// Causal attention of prompt rows over the paged cache, with the tensor cores of SM80 and newer (mma.sync, cp.async).
//
//   out[r, h, :] = sum_p softmax_p(scale * q[r, h, :] . k[p, h / (H / K), :]) * v[p, h / (H / K), :]
// for row r at position P, over positions p in 0..=P, or P - window + 1 ..= P where window > 0. f32 sums and softmax, P in T.
// With SOFT_CAP scores are capped; a sink joins the softmax of its head (softmax.cuh).
//   qkv: [T, (H + 2K) * D]   out: [T, H * D]   k_cache, v_cache: [blocks, K, B, D], the rows' own keys already in them.
// Method: FlashAttention-2, <https://arxiv.org/abs/2307.08691>.
//
// Block (i, h) takes tile i (counted from the last, the longest) of query head h: up to TILE_M rows of one sequence. Each of
// its warps keeps M_TILES * 16 rows: their scores, sums and outputs never leave its registers. Two m-tiles to a warp halve the
// traffic from shared memory for each product: with one, reading the fragments takes as long as the products on an A100.
// Positions come in tiles of TILE_N: while the warps multiply by a tile's keys its values are on their way, and while they
// multiply by the values the next keys are. So keys and values have one buffer each, and two blocks fit on an SM.
//
// A row's result does not depend on the tile, chunk or batch it was computed in: tiles of positions start at multiples of
// TILE_N, every row goes through them in rising order, and a tile of which a row sees nothing leaves its sums as they were to
// the bit (its maximum stays, the old sums are multiplied by exactly 1, and zeros are added).
// Slots outside of what the tile's rows see are never read: zeros take their place, whatever memory holds there.
//
// Shared memory: rows of C = D / 8 pieces of 16 bytes. ldmatrix reads the same piece of eight rows that follow each other, which
// must fall on the eight different 16-byte columns of the banks. Row r begins C * r pieces in, so piece c lies in column
// (C * r + c) % 8; c is replaced by c ^ key(r), where key is
//   r % 8         for C % 8 == 0 (D = 64, 128, 192, 256): all rows begin in one column
//   r / 2 % 4     for C % 8 == 4 (D = 96): two columns four apart, each for every other row; key moves c among its four
//   r / 4 % 2     for C % 8 == 2 or 6 (D = 80): four columns two apart, each for r and r + 4; key moves c among its two
// No padding. Bytes: (TILE_M + 2 * TILE_N) * D * 2, at most 96 KB.
//
// Limit: the tensor cores, 4 * D FLOP for each visible position of each row and head.
// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
#include "mma.cuh"
#include "softmax.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef NUM_WARPS
#define NUM_WARPS (HEAD_DIM > 128 ? 8 : 4)
#endif
#ifndef TILE_M
#define TILE_M 128
#endif
#ifndef TILE_N
#define TILE_N (HEAD_DIM > 192 ? 32 : 64)
#endif

constexpr int D = HEAD_DIM;
constexpr int C = D / 8; // 16-byte pieces of a row
constexpr int THREADS = NUM_WARPS * 32;
constexpr int M_TILES = TILE_M / (NUM_WARPS * 16); // of 16 rows, to a warp
constexpr int GROUP = 16;                          // positions that lie in one block whatever its size
constexpr int NUM_GROUPS = TILE_N / GROUP;
// The queries stay in registers where those suffice; else they are read again for each tile of positions.
constexpr bool KEEP_Q = M_TILES * (D / 4 + D / 2 + TILE_N / 2) <= 168;
// Steps of the product with the keys that the compiler may mix: all of them need more registers than there are.
constexpr int Q_UNROLL = D < 128 || KEEP_Q ? D / 16 : 4;
constexpr int KEY_SHIFT = C % 8 == 0 ? 0 : C % 8 == 4 ? 1 : 2;
constexpr int KEY_MASK = C % 8 == 0 ? 7 : C % 8 == 4 ? 3 : 1;
static_assert(D % 16 == 0 && C % 2 == 0 && D <= 256, "head size");
static_assert(TILE_M == M_TILES * NUM_WARPS * 16 && TILE_N % GROUP == 0, "tiles");
static_assert((TILE_M + 2 * TILE_N) * D * 2 <= 96 * 1024, "shared memory of the smaller chips");

struct PrefillTile {
    u32 first_row;   // of the batch
    u32 num_rows;    // 1..=TILE_M
    u32 position;    // of the first row
    u32 first_block; // where the sequence's blocks start in block_table
};

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 key(u32 row) { return row >> KEY_SHIFT & KEY_MASK; }
// Bytes from the start of a buffer to piece c of a row.
__device__ __forceinline__ u32 piece_at(u32 row, u32 c) { return (row * C + (c ^ key(row))) * 16; }

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(attention_prefill_sm80)(T* out, const T* qkv, const T* k_cache, const T* v_cache, const PrefillTile* tiles,
                                   const u32* block_table, u32 num_heads, u32 num_kv_heads, u32 block_size, u32 window,
                                   float scale, float soft_cap, const float* sinks) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 group_row[2][NUM_GROUPS]; // rows of the cache where the groups of a tile of positions start
    let_next_start();
    wait_for_inputs();

    const PrefillTile tile = tiles[gridDim.x - 1 - blockIdx.x];
    const u32 head = blockIdx.y, kv_head = head / (num_heads / num_kv_heads);
    const u32 tid = threadIdx.x, lane = tid % 32, g = lane / 4, t = lane % 4;
    const u32 warp = __shfl_sync(ALL_LANES, tid / 32, 0); // so that the compiler knows a warp's branches to be uniform
    const u32 block_bits = 31 - __clz(block_size);
    const u32 q_smem = smem_u32(shared), k_smem = q_smem + TILE_M * D * 2, v_smem = k_smem + TILE_N * D * 2;

    // Positions that any of the tile's rows sees.
    const u32 kv_end = tile.position + tile.num_rows;
    const u32 kv_begin = window != 0 && tile.position + 1 > window ? tile.position + 1 - window : 0;
    const u32 first_tile = kv_begin / TILE_N * TILE_N;

    auto find_group = [&](u32 position) -> u32 {
        if (position >= kv_end || position + GROUP <= kv_begin) return 0; // nothing of it is read
        const u32 block = block_table[tile.first_block + (position >> block_bits)];
        return ((block * num_kv_heads + kv_head) << block_bits) + (position & (block_size - 1));
    };
    // Copies the keys or values of TILE_N positions; `slot` of group_row says where they lie. Rows that are not seen have an
    // address in the cache too (of their block, or of the first), from which nothing is read.
    auto fetch = [&](u32 to, const T* cache, u32 position, u32 slot) {
        constexpr u32 PIECES = TILE_N * C / THREADS, ROWS = THREADS / C; // of a thread; that the threads cover at once
        static_assert(TILE_N * C % THREADS == 0, "whole rounds of pieces");
        // All groups first: a copy is a barrier to the compiler, behind which it would read shared memory again.
        u32 cache_row[PIECES];
#pragma unroll
        for (u32 n = 0; n < PIECES; n++) {
            const u32 row = (tid + n * THREADS) / C;
            const u32 group = THREADS % C == 0 && GROUP % ROWS == 0 ? n * ROWS / GROUP : row / GROUP;
            cache_row[n] = group_row[slot][group];
        }
#pragma unroll
        for (u32 n = 0; n < PIECES; n++) {
            const u32 i = tid + n * THREADS, row = i / C, c = i % C;
            const T* from = cache + c * 8 + size_t(cache_row[n] + row % GROUP) * D;
            cp_async_16(to + piece_at(row, c), from, position + row - kv_begin < kv_end - kv_begin);
        }
    };

    // The queries, zeros for rows that the tile lacks.
    const size_t qkv_stride = size_t(num_heads + 2 * num_kv_heads) * D;
    const T* q = qkv + tile.first_row * qkv_stride + head * D;
#pragma unroll
    for (u32 n = 0; n < (TILE_M * C + THREADS - 1) / THREADS; n++) {
        const u32 i = tid + n * THREADS, row = i / C, c = i % C;
        if (TILE_M * C % THREADS != 0 && i >= TILE_M * C) break;
        const bool there = row < tile.num_rows;
        cp_async_16(q_smem + piece_at(row, c), there ? q + row * qkv_stride + c * 8 : q, there);
    }
    if (tid < NUM_GROUPS) group_row[0][tid] = find_group(first_tile + tid * GROUP);
    __syncthreads();
    fetch(k_smem, k_cache, first_tile, 0);
    cp_async_commit();

    // This warp's rows and what they see.
    const u32 warp_row = warp * M_TILES * 16;
    const bool has_rows = warp_row < tile.num_rows;
    const u32 rows_left = has_rows ? tile.num_rows - warp_row : 1;
    const u32 warp_first = tile.position + warp_row;
    const u32 warp_last = warp_first + (rows_left < M_TILES * 16 ? rows_left : M_TILES * 16) - 1;
    const u32 warp_begin = window != 0 && warp_first + 1 > window ? warp_first + 1 - window : 0;

    // Where this lane's rows of the 8x8 tiles lie: bit 3 and bit 4 of the lane choose among the four tiles. A step of 16 values
    // of D is two pieces, and 2 * step ^ key is an exclusive or of the address, as the key reaches three bits at most.
    const u32 q_row = q_smem + (warp_row + lane % 16) * (D * 2), q_piece = ((lane / 16) ^ key(lane % 8)) * 16;
    const u32 k_row = k_smem + (lane / 16 * 8 + lane % 8) * (D * 2), k_piece = ((lane / 8 % 2) ^ key(lane % 8)) * 16;
    const u32 v_row = v_smem + (lane % 16) * (D * 2), v_piece = q_piece;

    float o[M_TILES][D / 8][4] = {};
    float row_max[M_TILES][2], row_sum[M_TILES][2] = {};
#pragma unroll
    for (int m = 0; m < M_TILES; m++) row_max[m][0] = row_max[m][1] = -INF;
    u32 kept_q[KEEP_Q ? D / 16 : 1][M_TILES][4];
    auto load_q = [&](u32 (&a)[M_TILES][4], int step) {
#pragma unroll
        for (int m = 0; m < M_TILES; m++) ldmatrix_x4(a[m], q_row + m * 16 * (D * 2) + (q_piece ^ (step * 32)));
    };
    if constexpr (KEEP_Q) {
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < D / 16; step++) load_q(kept_q[step], step);
    }
    const Scores scores(scale, soft_cap);
    const float scale_log2 = SOFT_CAP ? 1.f : scores.scale; // of what is left in `s`

    for (u32 start = first_tile, slot = 0; start < kv_end; start += TILE_N, slot ^= 1) {
        const bool more = start + TILE_N < kv_end;
        u32 next_group = 0;
        if (more && tid < NUM_GROUPS) next_group = find_group(start + TILE_N + tid * GROUP);

        cp_async_wait<0>();
        __syncthreads(); // the keys (and queries) are there; nobody needs the earlier values
        fetch(v_smem, v_cache, start, slot);
        cp_async_commit();

        const bool sees = has_rows && start <= warp_last && start + TILE_N > warp_begin;
        float s[M_TILES][TILE_N / 8][4] = {};
        if (sees) {
#pragma unroll Q_UNROLL
            for (int step = 0; step < D / 16; step++) {
                u32 read_q[M_TILES][4];
                if constexpr (!KEEP_Q) load_q(read_q, step);
                const auto& a = KEEP_Q ? kept_q[KEEP_Q ? step : 0] : read_q;
#pragma unroll
                for (int n = 0; n < TILE_N / 16; n++) {
                    u32 b[4];
                    ldmatrix_x4(b, k_row + n * 16 * (D * 2) + (k_piece ^ (step * 32)));
                    const u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                    for (int m = 0; m < M_TILES; m++) {
                        mma_16x8x16<T>(s[m][2 * n], a[m], b0);
                        mma_16x8x16<T>(s[m][2 * n + 1], a[m], b1);
                    }
                }
            }
        }

        if (more && tid < NUM_GROUPS) group_row[slot ^ 1][tid] = next_group;
        cp_async_wait<0>();
        __syncthreads(); // the values are there; nobody needs the keys any more
        if (more) {
            fetch(k_smem, k_cache, start + TILE_N, slot ^ 1);
            cp_async_commit();
        }
        if (!sees) continue;

        if constexpr (SOFT_CAP) {
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
#pragma unroll
                for (int n = 0; n < TILE_N / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[m][n][i] = scores.capped(s[m][n][i] * scores.scale);
        }
        // Only a tile that crosses the diagonal or the start of a window hides something from the warp's rows.
        if (start + TILE_N - 1 > warp_first || (window != 0 && start + window <= warp_last)) {
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 position = warp_first + m * 16 + g + i / 2 * 8;
                    const u32 begin = window != 0 && position + 1 > window ? position + 1 - window : 0;
#pragma unroll
                    for (int n = 0; n < TILE_N / 8; n++) {
                        const u32 p = start + n * 8 + t * 2 + i % 2;
                        if (p > position || p < begin) s[m][n][i] = -INF;
                    }
                }
            }
        }

        u32 p[M_TILES][TILE_N / 16][4];
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) { // rows g and g + 8
                float high = row_max[m][half];
#pragma unroll
                for (int n = 0; n < TILE_N / 8; n++) high = fmaxf(high, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                high = quad_max(high);
                // A row that has seen nothing yet subtracts zero: exp2(-inf) is what it needs.
                const float offset = high == -INF ? 0.f : high * scale_log2;
                const float correction = high == row_max[m][half] ? 1.f : exp2_approx(row_max[m][half] * scale_log2 - offset);
                row_max[m][half] = high;
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < TILE_N / 8; n++) {
                    const float p0 = exp2_approx(s[m][n][2 * half] * scale_log2 - offset);
                    const float p1 = exp2_approx(s[m][n][2 * half + 1] * scale_log2 - offset);
                    sum += p0 + p1;
                    p[m][n / 2][n % 2 * 2 + half] = pack2<T>(p0, p1);
                }
                row_sum[m][half] = row_sum[m][half] * correction + sum;
                // Where no row's maximum rose there is nothing to multiply: the factor is exactly 1.
                if (__any_sync(ALL_LANES, correction != 1.f)) {
#pragma unroll
                    for (int n = 0; n < D / 8; n++) o[m][n][2 * half] *= correction, o[m][n][2 * half + 1] *= correction;
                }
            }
        }

#pragma unroll
        for (int step = 0; step < TILE_N / 16; step++) {
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                ldmatrix_x4_trans(b, v_row + step * 16 * (D * 2) + (v_piece ^ (n * 32)));
                const u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < M_TILES; m++) {
                    mma_16x8x16<T>(o[m][2 * n], p[m][step], b0);
                    mma_16x8x16<T>(o[m][2 * n + 1], p[m][step], b1);
                }
            }
        }
    }
    if (!has_rows) return;

    // Out by way of the warp's own rows of the queries, for stores of 16 bytes.
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float inverse = inverse_with_sink(row_max[m][half] * scale_log2, quad_sum(row_sum[m][half]), sinks, head);
            const u32 row = warp_row + m * 16 + half * 8 + g;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const u32 pair = pack2<T>(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
                *reinterpret_cast<u32*>(shared + piece_at(row, n) + t * 4) = pair;
            }
        }
    }
    __syncwarp();
    T* to = out + (size_t(tile.first_row) * num_heads + head) * D;
#pragma unroll
    for (u32 n = 0; n < M_TILES * 16 * C / 32; n++) {
        const u32 i = lane + n * 32, row = warp_row + i / C, c = i % C;
        if (row < tile.num_rows) {
            *reinterpret_cast<uint4*>(to + size_t(row) * num_heads * D + c * 8) =
                *reinterpret_cast<const uint4*>(shared + piece_at(row, c));
        }
    }
#endif
}
