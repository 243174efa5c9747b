// out[t, i] = f(x[t, i], x[t, F + i])     f: activation.cuh     out: [T, F]   x: [T, 2F], gates and then ups     in f32
// Block (t, c) does part c of row t, 16 bytes of gate, up and output to a thread. Limit: memory, 3 * T * F elements.
#include "activation.cuh"

extern "C" __global__ void __launch_bounds__(256) KERNEL(gate)(T* out, const T* x, u32 cols, u32 num_rows, Clamp clamp) {
    constexpr u32 N = PER_16B<T>;
    let_next_start();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    if (row >= num_rows) return;
    const T* gate = x + row * 2 * cols;
    const T* up = gate + cols;
    out += row * cols;
    const u32 i = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (i >= cols) return;
    if (cols % N == 0 && aligned_16(x) && aligned_16(out)) {
        const Vec<T, N> g = load<N>(gate + i), u = load<N>(up + i);
        Vec<T, N> y;
#pragma unroll
        for (int j = 0; j < N; j++) y.at[j] = from_float<T>(gated(to_float(g.at[j]), to_float(u.at[j]), clamp));
        store<N>(out + i, y);
    } else {
        for (u32 j = i; j < i + N && j < cols; j++) out[j] = from_float<T>(gated(to_float(gate[j]), to_float(up[j]), clamp));
    }
}
