// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// packed[b, s, r, p] = w[row, 64 s + 8 (p ^ r % 8) ..+ 8]      w: [R, K] T, of one expert      packed: see moe.cuh
//
// row of block b and row r of it: gate and up (R = 2F, GATED): 64 b + r, and F + 64 b + r - 64 for r >= 64; else 128 b + r.
// Zeros for rows and columns that do not exist. A thread moves 16 bytes. Limit: memory; done once, at load.
#include "moe.cuh"


extern "C" __global__ void __launch_bounds__(256) KERNEL(moe_pack)(T* packed, const T* w, u32 num_rows, u32 num_k, u32 num_pieces) {
#if __CUDA_ARCH__ >= 800
    let_next_start();
    wait_for_inputs();
    const u32 num_steps = (num_k + STEP_K - 1) / STEP_K;
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < num_pieces; i += gridDim.x * 256) {
        const u32 step = i / (STEP_BYTES / 16), r = i / 8 % BLOCK_ROWS, k = step % num_steps * STEP_K + (i % 8 ^ r % 8) * 8;
        const u32 block = step / num_steps;
        const u32 feature = GATED ? 64 * block + r % 64 : BLOCK_ROWS * block + r, num_features = GATED ? num_rows / 2 : num_rows;
        const u32 row = feature + (GATED && r >= 64 ? num_features : 0);
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (feature < num_features && k < num_k) piece = *reinterpret_cast<const uint4*>(w + size_t(row) * num_k + k);
        reinterpret_cast<uint4*>(packed)[i] = piece;
    }
#endif
}
