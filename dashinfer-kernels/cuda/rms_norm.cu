// rms_norm:      out[t, i] = x[t, i] * w[i] / sqrt(mean_j(x[t, j]^2) + eps)         out, x, residual: [T, E]   w: [E] f32
// add_rms_norm:  residual += x, rounded to T;  out = rms_norm(residual), of the rounded sum: the norm of what is stored
//
// One block per row, 16 bytes to a thread and step; the row stays in registers between the sum and the product (what the
// block's registers do not hold is read again). Sums in f32, in an order that E and the number of threads settle: the
// launcher chooses threads by E alone, so a row's result does not depend on its batch.
// Limit: memory, 2 * T * E elements (rms_norm) or 4 * T * E (add_rms_norm); for one row the latency of a load and two barriers.
#include "common.cuh"

// Steps kept in registers: 1024 threads hold 16384 values of f32, twice as many of 16 bits.
constexpr int KEEP = 4;

template <int N, bool ADD>
__device__ __forceinline__ void norm_row(T* __restrict__ out, T* __restrict__ residual, const T* __restrict__ x,
                                         const float* __restrict__ weight, u32 hidden, float eps) {
    const u32 first = threadIdx.x * N, stride = blockDim.x * N;
    Vec<T, N> kept[KEEP];
    // The values at `i`, summed and stored where there is something to add.
    auto fetch = [&](u32 i) {
        Vec<T, N> v = load<N>(x + i);
        if constexpr (ADD) {
            const Vec<T, N> r = load<N>(residual + i);
#pragma unroll
            for (int j = 0; j < N; j++) v.at[j] = from_float<T>(to_float(r.at[j]) + to_float(v.at[j]));
        }
        return v;
    };
    float sum = 0.f;
    auto add_squares = [&](const Vec<T, N>& v) {
#pragma unroll
        for (int j = 0; j < N; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
    };
    // All loads first, so that they are on their way together.
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        const u32 i = first + k * stride;
        if (i < hidden) kept[k] = fetch(i);
    }
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        const u32 i = first + k * stride;
        if (i < hidden) {
            if constexpr (ADD) store<N>(residual + i, kept[k]);
            add_squares(kept[k]);
        }
    }
    for (u32 i = first + KEEP * stride; i < hidden; i += stride) {
        const Vec<T, N> v = fetch(i);
        if constexpr (ADD) store<N>(residual + i, v);
        add_squares(v);
    }
    const float scale = rsqrtf(block_sum(sum) / float(hidden) + eps);
    auto put = [&](u32 i, const Vec<T, N>& v) {
        constexpr int PART = N < 4 ? N : 4; // of the weights, 16 bytes
        Vec<T, N> y;
#pragma unroll
        for (int part = 0; part < N; part += PART) {
            const Vec<float, PART> w = load<PART>(weight + i + part);
#pragma unroll
            for (int j = 0; j < PART; j++) y.at[part + j] = from_float<T>(to_float(v.at[part + j]) * scale * w.at[j]);
        }
        store<N>(out + i, y);
    };
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
        const u32 i = first + k * stride;
        if (i < hidden) put(i, kept[k]);
    }
    // Each thread reads again what it wrote itself.
    for (u32 i = first + KEEP * stride; i < hidden; i += stride) put(i, load<N>((ADD ? residual : x) + i));
}

template <bool ADD>
__device__ __forceinline__ void norm(T* out, T* residual, const T* x, const float* weight, u32 hidden, float eps) {
    let_next_start();
    wait_for_inputs();
    const size_t row = size_t(blockIdx.x) * hidden;
    constexpr int N = PER_16B<T>;
    const bool wide = hidden % N == 0 && aligned_16(out) && aligned_16(x) && aligned_16(weight) && (!ADD || aligned_16(residual));
    if (wide) {
        norm_row<N, ADD>(out + row, residual + row, x + row, weight, hidden, eps);
    } else {
        norm_row<1, ADD>(out + row, residual + row, x + row, weight, hidden, eps);
    }
}

extern "C" __global__ void __launch_bounds__(1024) KERNEL(rms_norm)(T* out, const T* x, const float* weight, u32 hidden, float eps) {
    norm<false>(out, nullptr, x, weight, hidden, eps);
}

extern "C" __global__ void __launch_bounds__(1024) KERNEL(add_rms_norm)(T* out, T* residual, const T* x, const float* weight,
                                                                         u32 hidden, float eps) {
    norm<true>(out, residual, x, weight, hidden, eps);
}
