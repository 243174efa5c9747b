// What the memory can do: reads `count` 16-byte values once and keeps their exclusive or, so that no read can be left out.
// Each block goes through the array in strides of the whole grid, four loads at a time.             Limit: memory, 16*count B.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512) probe_read(const uint4* from, i64 count, u32* out) {
    let_next_start();
    wait_for_inputs();
    const i64 stride = i64(gridDim.x) * blockDim.x;
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    u32 all = 0;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = load_stream(from + i + j * stride);
#pragma unroll
        for (int j = 0; j < 4; ++j) all ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < count; i += stride) {
        const uint4 v = load_stream(from + i);
        all ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (all == 0x9e3779b9u) out[0] = all; // hardly ever, but the compiler cannot know
}

// Fills with pseudo-random bits (SplitMix64 of the index).
extern "C" __global__ void __launch_bounds__(512) probe_fill(u64* to, i64 count, u64 seed) {
    let_next_start();
    wait_for_inputs();
    const i64 stride = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        u64 z = seed + u64(i) * 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        // As bf16 and f16 alike these are ordinary numbers of either sign: no exponent is all ones.
        to[i] = (z & 0x83ff83ff83ff83ffull) | 0x3800380038003800ull;
    }
}
