// rms_norm:      out[t, i] = x[t, i] * w[i] / sqrt(mean_j(x[t, j]^2) + eps)         out, x, residual: [T, E]   w: [E] f32
// add_rms_norm:  residual += x, rounded to T;  out = rms_norm(residual), of the rounded sum: the norm of what is stored
//
// One block per row, 16 bytes to a thread: they stay in registers between the sum and the product (of rows longer than 1024
// threads take, the rest is read again). Sums in f32, in an order that E and the number of threads settle: the launcher chooses
// threads by E alone, so a row's result does not depend on its batch.
// Limit: memory, 2 * T * E elements (rms_norm) or 4 * T * E (add_rms_norm). For few rows latency: a load, a sum over the warp, a
// barrier, a sum over the warps, a store. The weights, which a decode step finds in no cache, are there before the row is.
#include "common.cuh"

// The sum over the block, in every thread, by one barrier: every thread adds the warps' sums itself. Used once in a kernel;
// blockDim.x is a multiple of 32, at most 1024.
__device__ __forceinline__ float sum_once(float x) {
    __shared__ alignas(16) float of_warp[32];
    if (threadIdx.x < 32 && threadIdx.x >= blockDim.x / 32) of_warp[threadIdx.x] = 0.f; // of warps that are not there
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    auto sum_of_16 = [&](const float* from) {
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Vec<float, 4> four = load<4>(from + 4 * i);
            sum[i] = (four.at[0] + four.at[1]) + (four.at[2] + four.at[3]);
        }
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    };
    const float sum = sum_of_16(of_warp);
    return blockDim.x <= 512 ? sum : sum + sum_of_16(of_warp + 16);
}

// Values rounded to T: by pairs, since the conversion of a single value runs at an eighth of the speed.
template <int N>
__device__ __forceinline__ Vec<T, N> rounded(const float (&x)[N]) {
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        Vec<u32, N / 2> pairs;
#pragma unroll
        for (int j = 0; j < N / 2; j++) pairs.at[j] = pack2<T>(x[2 * j], x[2 * j + 1]);
        return __builtin_bit_cast(Vec<T, N>, pairs);
    } else {
        Vec<T, N> y;
#pragma unroll
        for (int j = 0; j < N; j++) y.at[j] = from_float<T>(x[j]);
        return y;
    }
}

// A row by N values to a thread and step. The weights of the first step are read before the wait.
template <int N, bool ADD>
__device__ __forceinline__ void norm_row(T* out, T* residual, const T* x, const float* __restrict__ weight, u32 hidden, float eps) {
    const u32 first = threadIdx.x * N, stride = blockDim.x * N;
    float one_of_hidden = 1.f / float(hidden);
    asm volatile("" : "+f"(one_of_hidden)); // now, not after the sum
    auto weights_at = [&](u32 i) {
        constexpr int PART = N < 4 ? N : 4; // 16 bytes
        Vec<float, N> w;
#pragma unroll
        for (int part = 0; part < N; part += PART) {
            const Vec<float, PART> some = load<PART>(weight + i + part);
#pragma unroll
            for (int j = 0; j < PART; j++) w.at[part + j] = some.at[j];
        }
        return w;
    };
    Vec<float, N> first_weights{};
    if (first < hidden) first_weights = weights_at(first);
    wait_for_inputs();

    float sum = 0.f;
    // The values at `i`, summed and stored where there is something to add, with their squares added to `sum`.
    auto take = [&](u32 i) {
        Vec<T, N> v = load<N>(x + i);
        if constexpr (ADD) {
            const Vec<T, N> r = load<N>(residual + i);
            float both[N];
#pragma unroll
            for (int j = 0; j < N; j++) both[j] = to_float(r.at[j]) + to_float(v.at[j]);
            v = rounded(both);
            store<N>(residual + i, v);
        }
#pragma unroll
        for (int j = 0; j < N; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
        return v;
    };
    Vec<T, N> kept{};
    if (first < hidden) kept = take(first);
#pragma unroll 1
    for (u32 i = first + stride; i < hidden; i += stride) take(i);

    const float scale = rsqrtf(sum_once(sum) * one_of_hidden + eps);
    auto put = [&](u32 i, const Vec<T, N>& v, const Vec<float, N>& w) {
        float y[N];
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = to_float(v.at[j]) * scale * w.at[j];
        store<N>(out + i, rounded(y));
    };
    if (first < hidden) put(first, kept, first_weights);
    // Each thread reads again what it wrote itself.
#pragma unroll 1
    for (u32 i = first + stride; i < hidden; i += stride) put(i, load<N>((ADD ? residual : x) + i), weights_at(i));
}

template <bool ADD>
__device__ __forceinline__ void norm(T* out, T* residual, const T* x, const float* weight, u32 hidden, float eps) {
    let_next_start();
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
