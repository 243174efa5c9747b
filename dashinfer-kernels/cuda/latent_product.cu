// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// The products between heads and latent vectors, each head h with a matrix of its own. T: bf16, f16; sums in f32, over k in order.
//
// EXPAND 0: out[t, h, n] = sum_k x[t, h, k] * w[h, n, k]          w: [H, N, K]     x, out: rows of H heads, strides in values
// EXPAND 1: keys of latent vectors c = cache[slot(p), :K]: out[h, p, n] = sum_k c[k] * w[h, k, n], and the R values behind c are copied
//           behind the N of each head                              w: [H, K, N]
// EXPAND 2: values: out[h, p, n] = sum_k c[k] * w[h, n, k]         w: [H, N, K]
//
// What EXPAND makes is laid out as a cache of keys and values: blocks of 64 rows, [blocks, heads, 64, width]. Its rows are those of the tiles, which say
// what positions of which sequence stand there. K, N % 64 == 0 (EXPAND 0: N % TILE_N == 0).
//
// A block takes TILE_M rows by TILE_N columns of one head. Steps of 64 k go by in a ring of STAGES stages, filled by asynchronous
// copies. No macro changes a bit, and a row depends on no other.
// Limit: few rows, memory, 2 N * K bytes a head; many, arithmetic.
#include "mma.cuh"

#ifndef TILE_M
#define TILE_M 64
#endif
#ifndef TILE_N
#define TILE_N 64
#endif
#ifndef WARPS_M
#define WARPS_M 2
#endif
#ifndef WARPS_N
#define WARPS_N 2
#endif
#ifndef EXPAND
#define EXPAND 0
#endif

// Rows of a sequence that are to be expanded.
struct ExpandTile {
    u32 first_row, num_rows, position, first_block;
};

struct LatentProductParams {
    T* out;
    const T* x; // EXPAND: the cache, [num_blocks, B, x_row]
    const T* w; // of the first head
    const ExpandTile* tiles;
    const u32* block_table;
    u32 num_rows; // EXPAND 0
    u32 num_n, num_k;
    u32 x_row, x_head;     // values from a row, and a head, to the next
    u32 out_row, out_head; // EXPAND: values of a row, and how many heads there are
    u32 block_size;
    u32 rope_dim; // EXPAND 1
    u32 pad;
};

constexpr int STEP = 64, STAGES = 3, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int ROWS = TILE_M / WARPS_M, COLS = TILE_N / WARPS_N; // of a warp
constexpr u32 A_BYTES = TILE_M * STEP * 2, B_BYTES = TILE_N * STEP * 2, STAGE_BYTES = A_BYTES + B_BYTES;
[[maybe_unused]] constexpr u32 BLOCK = 64; // rows of a block of what is expanded
constexpr bool BY_K = EXPAND == 1; // w: [K, N]
static_assert(ROWS % 16 == 0 && COLS % 16 == 0, "a warp's part is whole tiles");

// Piece `piece` (16 bytes) of row `row` of rows of 128 bytes, so that eight rows of one column fall into different banks.
__device__ __forceinline__ u32 place_of(u32 row, u32 piece) { return row * 128 + ((piece ^ (row & 7)) * 16); }

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(latent_product)(const LatentProductParams p) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) u8 shared[];
    const u32 smem = smem_u32(shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 warp_m = warp / WARPS_N * ROWS, warp_n = warp % WARPS_N * COLS;
    const u32 first_n = blockIdx.x * TILE_N, head = blockIdx.z, num_steps = p.num_k / STEP;
    const T* const w = p.w + u64(head) * p.num_n * p.num_k;
    let_next_start();
    wait_for_inputs();

#if EXPAND
    const ExpandTile tile = p.tiles[blockIdx.y];
    const u32 shift = 31 - __clz(p.block_size);
    const auto x_of = [&](u32 row) {
        const u32 position = tile.position + row;
        const u64 slot = u64(p.block_table[tile.first_block + (position >> shift)]) << shift | (position & (p.block_size - 1));
        return p.x + slot * p.x_row;
    };
    const auto out_of = [&](u32 row) {
        const u32 at = tile.first_row + row;
        return p.out + ((u64(at / BLOCK) * p.out_head + head) * BLOCK + at % BLOCK) * p.out_row;
    };
    const u32 rows = tile.num_rows;
#else
    const u32 first_row = blockIdx.y * TILE_M;
    const auto x_of = [&](u32 row) { return p.x + u64(first_row + row) * p.x_row + u64(head) * p.x_head; };
    const auto out_of = [&](u32 row) { return p.out + u64(first_row + row) * p.out_row + u64(head) * p.out_head; };
    const u32 rows = p.num_rows - first_row < TILE_M ? p.num_rows - first_row : TILE_M;
#endif

    // Rows of x of a thread's copies; a column of 16-byte pieces is its own.
    constexpr u32 X_COPIES = (TILE_M * 8 + THREADS - 1) / THREADS;
    const u32 piece = threadIdx.x % 8, x_row = threadIdx.x / 8;
    const T* x_at[X_COPIES];
#pragma unroll
    for (u32 i = 0; i < X_COPIES; ++i) {
        const u32 row = x_row + i * (THREADS / 8);
        x_at[i] = row < rows ? x_of(row) + piece * 8 : nullptr;
    }
    const auto load_step = [&](u32 step) {
        if (step < num_steps) {
            const u32 stage = smem + step % STAGES * STAGE_BYTES;
#pragma unroll
            for (u32 i = 0; i < X_COPIES; ++i) {
                const u32 row = x_row + i * (THREADS / 8);
                const bool valid = x_at[i] != nullptr;
                if (row < TILE_M) cp_async_16(stage + place_of(row, piece), valid ? x_at[i] + step * STEP : p.x, valid);
            }
            if constexpr (BY_K) {
                // 64 columns of all k of the step, then the next 64.
                for (u32 i = threadIdx.x; i < STEP * TILE_N / 8; i += THREADS) {
                    const u32 chunk = i / (STEP * 8), k = i / 8 % STEP, at = i % 8;
                    cp_async_16(stage + A_BYTES + chunk * (STEP * 128) + place_of(k, at),
                                w + u64(step * STEP + k) * p.num_n + first_n + chunk * 64 + at * 8, true);
                }
            } else {
                for (u32 i = threadIdx.x; i < TILE_N * 8; i += THREADS)
                    cp_async_16(stage + A_BYTES + place_of(i / 8, i % 8), w + u64(first_n + i / 8) * p.num_k + step * STEP + i % 8 * 8, true);
            }
        }
        cp_async_commit();
    };
#pragma unroll
    for (u32 s = 0; s < STAGES - 1; ++s) load_step(s);
    float sums[ROWS / 16][COLS / 8][4] = {};
    for (u32 step = 0; step < num_steps; ++step) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // this step is there, and nobody reads the one before any more
        load_step(step + STAGES - 1);
        const u32 stage = smem + step % STAGES * STAGE_BYTES;
#pragma unroll
        for (u32 k = 0; k < STEP / 16; ++k) {
            u32 a[ROWS / 16][4];
#pragma unroll
            for (u32 m = 0; m < ROWS / 16; ++m) ldmatrix_x4(a[m], stage + place_of(warp_m + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (u32 n = 0; n < COLS / 16; ++n) {
                const u32 column = warp_n + 16 * n;
                u32 b[4];
                if constexpr (BY_K)
                    ldmatrix_x4_trans(b, stage + A_BYTES + column / 64 * (STEP * 128) + place_of(16 * k + lane % 16, column % 64 / 8 + lane / 16));
                else
                    ldmatrix_x4(b, stage + A_BYTES + place_of(column + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
                for (u32 m = 0; m < ROWS / 16; ++m) {
                    mma_16x8x16<T>(sums[m][2 * n], a[m], {b[0], b[1]});
                    mma_16x8x16<T>(sums[m][2 * n + 1], a[m], {b[2], b[3]});
                }
            }
        }
    }
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 m = 0; m < ROWS / 16; ++m)
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const u32 row = warp_m + 16 * m + g + 8 * r;
            if (row >= rows) continue;
            T* const to = out_of(row) + first_n + warp_n + 2 * t;
#pragma unroll
            for (u32 n = 0; n < COLS / 8; ++n) *reinterpret_cast<u32*>(to + 8 * n) = pack2<T>(sums[m][n][2 * r], sums[m][n][2 * r + 1]);
        }
#if EXPAND == 1
    if (blockIdx.x == 0) {
        const u32 pieces = p.rope_dim / 8;
        for (u32 i = threadIdx.x; i < rows * pieces; i += THREADS) {
            const u32 row = i / pieces, at = i % pieces * 8;
            store<8>(out_of(row) + p.num_n + at, load<8>(x_of(row) + p.num_k + at));
        }
    }
#endif
#endif
}
