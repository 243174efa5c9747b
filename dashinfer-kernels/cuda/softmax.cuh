// What the attention kernels share of their softmax: weights are exp2 of scores, which are in units of log2 e therefore.
//
// A softmax over some positions is kept as three things: m, the largest score; l, the sum of exp2(score - m); and acc, the sum of
// exp2(score - m) * value. Its result is acc / l. A sink is one more score of a head, of a position whose value is zero: it adds to l
// alone, once, when all positions of the row have been seen.
#pragma once
#include "common.cuh"

#ifndef SOFT_CAP
#define SOFT_CAP 0 // whether scores s become c * tanh(s / c)
#endif

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// From products q . k to scores: times `scale`, then `capped`.
struct Scores {
    float scale, cap;

    // `soft_cap`: c, not read without SOFT_CAP.
    __device__ __forceinline__ Scores(float factor, float soft_cap)
        : scale(SOFT_CAP ? factor * (2.f * LOG2_E) / soft_cap : factor * LOG2_E), cap(soft_cap * LOG2_E) {}

    // tanh(y) = 1 - 2 / (1 + exp(2 y)), off by some 2^-22; the tanh of the hardware would be by 2^-11, of a cap of 50.
    __device__ __forceinline__ float capped(float x) const {
        if constexpr (SOFT_CAP == 0) return x;
        float inverse;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + exp2_approx(x)));
        return fmaf(-2.f * cap, inverse, cap);
    }
};

// What a part whose largest score is `m` weighs beside one of `top` >= m. No NaN from -inf - -inf.
__device__ __forceinline__ float weight_of(float m, float top) { return m == -INF ? 0.f : exp2_approx(m - top); }

// 1 / l; 0 for a row that saw nothing. A NaN stays one.
__device__ __forceinline__ float inverse_sum(float l) { return l == 0.f ? 0.f : 1.f / l; }

// What acc is multiplied by when all of a row's positions are in m and l. `sinks`: [H], not in units of log2 e; null: none.
__device__ __forceinline__ float inverse_with_sink(float m, float l, const float* sinks, u32 head) {
    if (sinks == nullptr) return inverse_sum(l);
    const float sink = sinks[head] * LOG2_E, top = fmaxf(m, sink), keep = weight_of(m, top);
    return inverse_sum(fmaf(l, keep, weight_of(sink, top))) * keep;
}
