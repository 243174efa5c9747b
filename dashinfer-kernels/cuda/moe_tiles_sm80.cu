// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// out[r, n] = sum_k x[x_rows[r], k] * w[e(r), n, k] + bias[e(r), n]            for rows r, sorted by expert e(r)
// GATED: out[r, n] = f(gate, up) (activation.cuh), of w [2N, K], rows of gates and then of ups, and a bias [2N]
//
//   out: [P, N] T   x: T, rows of K; x_rows null: row r   w: packed, moe.cuh   bias: [experts, N or 2N] f32, may be null   K, N % 8 == 0
//
// The products of all experts, for any architecture with mma.sync of bf16. Weights are the left operand, tokens the right one: an item
// is a block of 128 weight rows for a tile of up to TILE_N tokens of one expert, and with few tokens the weights still go by once.
// Blocks walk the items (tile, weight block), weight blocks innermost, so that blocks which run together share tokens and an expert.
// Four warps beside each other have 16 features each of both halves of the weight block (gates and ups); WARPS_N of them
// divide the tokens. A ring of STAGES steps of 64 k is filled by asynchronous copies. Sums run over k in order, in f32: no macro
// changes a bit, and a row depends on no other.
// Limit: few tokens, memory, 2 * N * K bytes for each expert that has some; many, arithmetic.
#include "moe.cuh"

#ifndef TILE_N // tokens of a tile: 16, 64
#define TILE_N 64
#endif
#ifndef WARPS_N
#define WARPS_N 1
#endif
#ifndef STAGES
#define STAGES 3
#endif

#if __CUDA_ARCH__ >= 800
constexpr u32 THREADS = 128 * WARPS_N;
constexpr u32 TOKENS = TILE_N / WARPS_N; // of a warp
constexpr u32 X_BYTES = TILE_N * STEP_K * 2;
constexpr u32 STAGE_BYTES = STEP_BYTES + X_BYTES;
constexpr u32 FEATURES = GATED ? 64 : 128;
constexpr u32 COPIES = TILE_N * 8 / THREADS; // of x, by a thread, in a step
static_assert(TOKENS % 16 == 0 && TILE_N * 8 % THREADS == 0 && THREADS % 64 == 0, "threads do not divide the copies");
#endif

extern "C" __global__ void __launch_bounds__(128 * WARPS_N)
    KERNEL(moe_tiles_sm80)(T* out, const T* x, const u32* x_rows, const T* w, const float* bias, const ExpertTile* tiles, const u32* num_tiles,
                           u32 num_cols, u32 num_k, Clamp clamp) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) u8 shared[];
    const u32 smem = smem_u32(shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % 4, first_token = warp / 4 * TOKENS;
    const u32 num_blocks = (num_cols + FEATURES - 1) / FEATURES, num_steps = (num_k + STEP_K - 1) / STEP_K;
    let_next_start();
    wait_for_inputs();
    const u32 num_items = *num_tiles * num_blocks;

    for (u32 item = blockIdx.x; item < num_items; item += gridDim.x) {
        const ExpertTile tile = load_tile(tiles, item / num_blocks);
        const u32 block = item % num_blocks;
        const u8* const w_at = reinterpret_cast<const u8*>(w) + (size_t(tile.expert) * num_blocks + block) * num_steps * STEP_BYTES;

        // Piece `piece` of some rows of x; the rows of a thread are THREADS / 8 apart, and lie in shared memory alike.
        const u32 piece = threadIdx.x % 8, x_row = threadIdx.x / 8;
        const T* x_at[COPIES];
#pragma unroll
        for (u32 i = 0; i < COPIES; ++i) {
            const u32 row = x_row + i * (THREADS / 8);
            x_at[i] = nullptr;
            if (row < tile.num_rows) {
                const u32 at = tile.first_row + row;
                x_at[i] = x + size_t(x_rows ? x_rows[at] : at) * num_k + piece * 8;
            }
        }
        const auto load_step = [&](u32 step) {
            if (step < num_steps) {
                const u32 stage = smem + step % STAGES * STAGE_BYTES;
                const u8* const from = w_at + size_t(step) * STEP_BYTES;
#pragma unroll
                for (u32 i = 0; i < STEP_BYTES / 16 / THREADS; ++i) {
                    const u32 at = (threadIdx.x + i * THREADS) * 16;
                    cp_async_16(stage + at, from + at, true);
                }
                const u32 to = stage + STEP_BYTES + place_of(x_row, piece);
                const bool exists = step * STEP_K + piece * 8 < num_k;
#pragma unroll
                for (u32 i = 0; i < COPIES; ++i) {
                    const bool valid = exists && x_at[i] != nullptr;
                    cp_async_16(to + i * (THREADS / 8 * 128), valid ? x_at[i] + step * STEP_K : x, valid);
                }
            }
            cp_async_commit();
        };

        __syncthreads(); // nobody reads the item before any more
#pragma unroll
        for (u32 s = 0; s < STAGES - 1; ++s) load_step(s);
        const Biases biases = load_biases(bias, tile.expert, block * FEATURES + 16 * warp_m, num_cols);
        float sums[2][TOKENS / 8][4] = {};
        for (u32 step = 0; step < num_steps; ++step) {
            cp_async_wait<STAGES - 2>();
            __syncthreads(); // this step is there, and nobody reads the one before any more
            load_step(step + STAGES - 1);
            const u32 stage = smem + step % STAGES * STAGE_BYTES;
            const u32 w_row = 16 * warp_m + lane % 16, n_row = first_token + lane / 16 * 8 + lane % 8;
#pragma unroll
            for (u32 k = 0; k < STEP_K / 16; ++k) {
                u32 a[2][4];
#pragma unroll
                for (u32 half = 0; half < 2; ++half) ldmatrix_x4(a[half], stage + half * HALF_BYTES + place_of(w_row, 2 * k + lane / 16));
#pragma unroll
                for (u32 n = 0; n < TOKENS / 16; ++n) {
                    u32 b[4];
                    ldmatrix_x4(b, stage + STEP_BYTES + place_of(n_row + 16 * n, 2 * k + lane / 8 % 2));
                    const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                    for (u32 half = 0; half < 2; ++half) {
                        mma_16x8x16<T>(sums[half][2 * n], a[half], low);
                        mma_16x8x16<T>(sums[half][2 * n + 1], a[half], high);
                    }
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < TOKENS / 8; ++i)
            if (first_token + 8 * i < tile.num_rows)
                write_tokens(out, num_cols, tile.first_row + first_token + 8 * i, tile.first_row + tile.num_rows,
                                    block * FEATURES + 16 * warp_m, biases, clamp, sums[0][i], sums[1][i]);
    }
    cp_async_wait<0>();
#endif
}
