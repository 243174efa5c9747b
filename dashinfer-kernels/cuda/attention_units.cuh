// What the decode kernels and the kernel that combines their partial results share: the work list and how it is walked.
//
// A unit is a range of positions of one row of the batch; the host splits long rows (src/cuda/plan.rs). A softmax over
// part of the positions is kept as three things: m, the largest score (times log2 e); l, the sum of exp2(score - m); and
// acc, the sum of exp2(score - m) * value. Two parts merge as
//     m = max(m1, m2)   l = l1 * exp2(m1 - m) + l2 * exp2(m2 - m)   acc likewise      out = acc / l
// A part that saw no position has m = -inf, l = 0, acc = 0, and weighs nothing.
#pragma once
#include "common.cuh"

struct alignas(16) DecodeUnit {
    u32 row;         // of the batch
    u32 first_block; // where the sequence's blocks start in the block table
    u32 begin, end;  // positions; begin is a multiple of 64; begin == end gives zeros
    u32 context_len; // the row stands at position context_len - 1
    u32 num_splits;  // of this row; 1: the unit writes the output itself
    u32 slot;        // otherwise its partial result's place
    u32 pad;
};

struct alignas(16) RowSplits {
    u32 row, first_slot, num_splits, pad;
};

struct DecodeParams {
    T* out;               // [rows, H * D]
    const T* qkv;         // [rows, (H + 2 K) * D]
    const T* k_cache;     // [num_blocks, K, B, D]
    const T* v_cache;     // likewise
    const DecodeUnit* units;
    const u32* num_units; // one number on the device: a graph replays the same grid over any list
    const u32* block_table;
    float* partial_out;   // [slots, H, D]: acc
    float* partial_ml;    // [slots, H, 2]: m and l
    u32 num_heads, num_kv_heads, head_dim;
    u32 block_size;       // 16, 32, 64 or 128
    u32 window;           // 0: none
    float scale;
};

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What a part whose largest score is `m` weighs beside one of `top` >= m. No NaN from -inf - -inf.
__device__ __forceinline__ float weight_of(float m, float top) { return m == -INF ? 0.f : exp2_approx(m - top); }

// 1 / l; 0 for a row that saw nothing. A NaN stays one.
__device__ __forceinline__ float inverse_sum(float l) { return l == 0.f ? 0.f : 1.f / l; }

// The item that this block takes in its `wave`-th turn. Units are listed longest first: every other turn goes backwards, so
// that the block which had the longest item of one turn gets the shortest of the next.
__device__ __forceinline__ u32 item_of_wave(u32 wave) {
    return wave * gridDim.x + (wave % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// The first position of the unit that its row sees.
__device__ __forceinline__ u32 first_visible(const DecodeUnit& unit, u32 window) {
    const u32 low = window != 0 && unit.context_len > window ? unit.context_len - window : 0;
    return unit.begin > low ? unit.begin : low;
}

__device__ __forceinline__ u32 log2_of(u32 power_of_two) { return 31 - __clz(power_of_two); }

__device__ __forceinline__ void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = float2{x, y}; }
template <typename V>
__device__ __forceinline__ void store_pair(V* to, float x, float y) { *reinterpret_cast<u32*>(to) = pack2<V>(x, y); }
