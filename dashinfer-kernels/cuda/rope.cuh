// How a group of lanes norms and rotates a head, eight values to a lane: for the kernel that does only this (rope.cu), and for
// the one that does it on the way to attention (attention_decode.cu). Both give the same bits: products and sums whose
// rounding the compiler could choose are spelt out.
//
//   head = head * w / sqrt(mean(head^2) + eps)         if the family norms its heads; w: [D] f32
//   (a, b) = (a * cos - b * sin, b * cos + a * sin)    for the R / 2 pairs of its first R values, a and b being values
//                                                      i and i + R / 2, or 2i and 2i + 1 (interleaved)
//
// D and R are multiples of 8, D at most 256. A group has 8, 16 or 32 lanes: the smallest that holds D / 8.
#pragma once
#include "common.cuh"

// Sine and cosine of an angle that is rounded to f32, as the reference computes it; exact to 2 ulp however large it is.
__device__ __forceinline__ void turn_by(u32 position, float inv_freq, float scale, float* cosine, float* sine) {
    float c, s;
    sincosf(__fmul_rn(float(position), inv_freq), &s, &c);
    *cosine = __fmul_rn(c, scale);
    *sine = __fmul_rn(s, scale);
}

// The sum over a group of `lanes` lanes (a power of two), in each of them.
__device__ __forceinline__ float group_sum(float x, u32 lanes) {
    for (u32 lane = lanes / 2; lane > 0; lane >>= 1) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

// A lane's part of any head: values `at[0]` .. + 3, called a, and `at[1]` .. + 3, called b. Lane `unit` of a group holds pairs
// 4 * unit .. + 3, or, when those are beyond R / 2, eight values that pass.
struct EightValues {
    u32 at[2];
    bool turns, interleaved;
    float c[4], s[4];

    // `cosine`, `sine`: [R / 2], `half` = R / 2.
    __device__ __forceinline__ EightValues(u32 unit, u32 half, bool interleaved, const float* cosine, const float* sine)
        : turns(unit * 4 < half), interleaved(interleaved) {
        const bool apart = turns && !interleaved;
        at[0] = apart ? unit * 4 : unit * 8;
        at[1] = apart ? half + unit * 4 : unit * 8 + 4;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            c[j] = turns ? cosine[unit * 4 + j] : 1.f;
            s[j] = turns ? sine[unit * 4 + j] : 0.f;
        }
    }

    // What the group's head is to be multiplied with. Whole warps call it; a lane without values has zeros.
    static __device__ __forceinline__ float norm_scale(const float (&a)[4], const float (&b)[4], u32 lanes, u32 head_dim,
                                                       float eps) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 4; j++) sum = __fmaf_rn(b[j], b[j], __fmaf_rn(a[j], a[j], sum));
        return rsqrtf(__fadd_rn(__fdiv_rn(group_sum(sum, lanes), float(head_dim)), eps));
    }

    // The weights of a norm, [D], of this lane's values.
    struct Weights {
        Vec<float, 4> a, b;
    };
    __device__ __forceinline__ Weights weights(const float* norm) const {
        return {load<4>(norm + at[0]), load<4>(norm + at[1])};
    }

    static __device__ __forceinline__ void norm(float (&a)[4], float (&b)[4], float scale, const Weights& by) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            a[j] = __fmul_rn(__fmul_rn(a[j], scale), by.a.at[j]);
            b[j] = __fmul_rn(__fmul_rn(b[j], scale), by.b.at[j]);
        }
    }

    static __device__ __forceinline__ void turn(float& x, float& y, float c, float s) {
        const float turned = __fmaf_rn(x, c, -__fmul_rn(y, s));
        y = __fmaf_rn(y, c, __fmul_rn(x, s));
        x = turned;
    }

    __device__ __forceinline__ void rotate(float (&a)[4], float (&b)[4]) const {
        if (!turns) return;
        if (interleaved) { // pairs lie within a: (a0, a1), (a2, a3), and within b
            turn(a[0], a[1], c[0], s[0]);
            turn(a[2], a[3], c[1], s[1]);
            turn(b[0], b[1], c[2], s[2]);
            turn(b[2], b[3], c[3], s[3]);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) turn(a[j], b[j], c[j], s[j]);
        }
    }
};
