// out[m, n] = bias[n] + sum_k x[m, k] * w[n, k]     out: [M, N] T or f32   x: [M, K]   w: [N, K]   bias: [N] f32, may be null
//
// For every type, shape and device; the fast kernels need tensor cores and 16-bit types. One chain of fused multiply-adds in
// f32 for each output, in order of k and begun with the bias: what the CPU's scalar definition does, to the bit for f32.
// Block (i, j) of 16 x 16 threads makes 64 columns i of TILE_M rows j; a thread 4 columns of TILE_M / 16 rows, 16 apart.
// Limit: arithmetic without tensor cores, and for few rows the memory, of which this reaches a fraction.
// nvrtc: sm_70 sm_75 sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
#include "common.cuh"

#ifndef TILE_M // 16 or 64
#define TILE_M 64
#endif
#ifndef OUT_F32
#define OUT_F32 0
#endif
#if OUT_F32
using Out = float;
#else
using Out = T;
#endif

constexpr int TILE_N = 64;
constexpr int TILE_K = 16;
constexpr int ROWS = TILE_M / 16; // of a thread

extern "C" __global__ void __launch_bounds__(256)
    KERNEL(linear_simple)(Out* out, const T* x, const T* w, const float* bias, int num_rows, int num_cols, int num_k) {
    __shared__ float xs[TILE_K][TILE_M + 1];
    __shared__ float ws[TILE_K][TILE_N + 1];
    let_next_start();
    wait_for_inputs();
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int first_row = blockIdx.y * TILE_M, first_col = blockIdx.x * TILE_N;

    float sums[ROWS][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int col = first_col + j * 16 + tx;
#pragma unroll
        for (int i = 0; i < ROWS; i++) sums[i][j] = bias && col < num_cols ? bias[col] : 0.f;
    }
    for (int k0 = 0; k0 < num_k; k0 += TILE_K) {
        const int k = k0 + tx; // of what this thread brings: columns tx of rows ty, ty + 16, ..
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = first_row + i * 16 + ty;
            xs[tx][i * 16 + ty] = row < num_rows && k < num_k ? to_float(x[size_t(row) * num_k + k]) : 0.f;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int col = first_col + j * 16 + ty;
            ws[tx][j * 16 + ty] = col < num_cols && k < num_k ? to_float(w[size_t(col) * num_k + k]) : 0.f;
        }
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < TILE_K; kk++) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = fmaf(xs[kk][i * 16 + ty], ws[kk][j * 16 + tx], sums[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = first_row + i * 16 + ty;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int col = first_col + j * 16 + tx;
            if (row < num_rows && col < num_cols) out[size_t(row) * num_cols + col] = from_float<Out>(sums[i][j]);
        }
    }
}
