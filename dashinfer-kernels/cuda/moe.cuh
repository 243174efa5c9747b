// What the kernels of a mixture of experts share: packed weights, the lists that routing makes, how results are written.
#pragma once
#include "activation.cuh"
#include "mma.cuh"

#ifndef GATED // whether weights are gates and ups
#define GATED 0
#endif

#if __CUDA_ARCH__ >= 800
// Weights of an expert are packed by `moe_pack`: blocks of 128 rows, cut into steps of 64 columns. A step of a block is 16 KB
// in one piece, as shared memory will have it: row r is 128 bytes at 128 r, and its piece p of 16 bytes lies at place p ^ r % 8.
// So a step is one copy, and reads of 8 rows touch every bank once. What does not exist is zero.
//   gate and up [2F, K]: a block has 64 features, their gates in rows 0.., their ups in rows 64..   down [E, K]: 128 rows
// Step s of block b of expert e is number (e * num_blocks + b) * num_steps + s.
constexpr u32 STEP_K = 64;
constexpr u32 BLOCK_ROWS = 128;
constexpr u32 STEP_BYTES = BLOCK_ROWS * STEP_K * 2;
constexpr u32 HALF_BYTES = STEP_BYTES / 2; // rows 0..64 of a block, rows 64..128

// Rows of one expert that are multiplied together. Rows of all experts are numbered by expert, and then by token.
struct ExpertTile {
    u32 expert, first_row, num_rows, unused;
};

__device__ __forceinline__ ExpertTile load_tile(const ExpertTile* tiles, u32 index) {
    // From L2, and not moved by the compiler to where it may not be read yet.
    uint4 tile;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.x), "=r"(tile.y), "=r"(tile.z), "=r"(tile.w)
                 : "l"(tiles + index)
                 : "memory");
    return {tile.x, tile.y, tile.z, tile.w};
}

// Where piece `piece` of row `row` lies in a step, of weights or of x.
__device__ __forceinline__ u32 place_of(u32 row, u32 piece) { return row * 128 + (piece ^ row % 8) * 16; }

// An 8x8 tile of 16-bit values, lane 4g + t with (g, 2t) and (g, 2t + 1), transposed.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Products have features as rows and tokens as columns. Lane 4g + t brings, of tokens 2t and 2t + 1, features g in `low` and g + 8
// in `high`; written are features col .. col + 16 of rows row .. row + 8, as far as both exist: four lanes write 32 bytes of a row.
__device__ __forceinline__ void write_features(T* out, u32 num_cols, u32 row, u32 end_row, u32 col, u32 low, u32 high) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    low = transposed(low), high = transposed(high); // now features 2t, 2t + 1 of token g
    const bool odd = t % 2;
    const u32 got = __shfl_xor_sync(ALL_LANES, odd ? low : high, 1);
    const u32 at = col + (odd ? 8 + 2 * (t - 1) : 2 * t);
    if (row + g < end_row && at < num_cols)
        *reinterpret_cast<uint2*>(out + size_t(row + g) * num_cols + at) = odd ? make_uint2(got, high) : make_uint2(low, got);
}

// Biases of the four features of a lane: g and g + 8 of gates and of ups, or of features `col` and `col + 64` on.
struct Biases {
    float at[4];
};
__device__ __forceinline__ Biases load_biases(const float* bias, u32 expert, u32 col, u32 num_cols) {
    Biases biases{};
    if (bias == nullptr) return biases;
    const u32 g = threadIdx.x % 32 / 4;
    bias += size_t(expert) * (GATED ? 2 * num_cols : num_cols);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 at = col + g + i % 2 * 8 + (GATED ? 0 : i / 2 * 64);
        if (at < num_cols) biases.at[i] = bias[at + (GATED && i >= 2 ? num_cols : 0)];
    }
    return biases;
}

// Writes 8 tokens of a warp, from `row` on: `first` and `second` are sums as a product leaves them (tokens 2t, 2t + 1 of feature g,
// then of feature g + 8) of gates and of ups of features from `col` on; or, not gated, of features from `col` and from `col + 64` on.
__device__ __forceinline__ void write_tokens(T* out, u32 num_cols, u32 row, u32 end_row, u32 col, const Biases& bias, Clamp clamp,
                                             const float* first, const float* second) {
    if constexpr (GATED != 0) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = gated(first[i] + bias.at[i / 2], second[i] + bias.at[2 + i / 2], clamp);
        write_features(out, num_cols, row, end_row, col, pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* x = half ? second : first;
            const float low = bias.at[2 * half], high = bias.at[2 * half + 1];
            write_features(out, num_cols, row, end_row, col + 64 * half, pack2<T>(x[0] + low, x[1] + low), pack2<T>(x[2] + high, x[3] + high));
        }
    }
}
#endif
