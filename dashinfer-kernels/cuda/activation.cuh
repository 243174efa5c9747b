// The functions of gated layers, f(gate, up), in f32.
//   ACTIVATION 0   silu: gate / (1 + exp(-gate)) * up
//              1   gelu by tanh, <https://arxiv.org/abs/1606.08415>: gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) * up
//              2   clamped swiglu, g = min(gate, limit), u = clamp(up, -limit, limit): g / (1 + exp(-alpha * g)) * (u + 1)
#pragma once
#include "common.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

// Of the clamped function alone.
struct Clamp {
    float alpha, limit;
};

// x / (1 + exp(-y)). A 16-bit result needs no more than the fast functions give (2 ulp of f32 each).
__device__ __forceinline__ float times_sigmoid(float x, float y) {
    if constexpr (sizeof(T) == 4) return x / (1.f + expf(-y));
    return __fdividef(x, 1.f + __expf(-y));
}

__device__ __forceinline__ float gated(float gate, float up, Clamp clamp) {
    if constexpr (ACTIVATION == 1) {
        // (1 + tanh(y)) / 2 is the sigmoid of 2 y.
        constexpr float TWICE_ROOT = 1.5957691216057308f; // 2 sqrt(2 / pi)
        return times_sigmoid(gate, TWICE_ROOT * gate * fmaf(0.044715f * gate, gate, 1.f)) * up;
    } else if constexpr (ACTIVATION == 2) {
        // Comparisons, so that a NaN stays one.
        const float g = gate > clamp.limit ? clamp.limit : gate;
        const float high = up > clamp.limit ? clamp.limit : up, u = high < -clamp.limit ? -clamp.limit : high;
        return times_sigmoid(g, clamp.alpha * g) * (u + 1.f);
    } else {
        return times_sigmoid(gate, gate) * up;
    }
}
