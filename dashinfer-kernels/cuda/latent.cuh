// What the kernels of latent attention share: the work of one call of the attention kernels.
#pragma once
#include "attention_units.cuh"

// `units.num_kv_heads` is 1, `units.head_dim` the size of latent vectors, C, which outputs have; `units.qkv` is not read, and
// the cache is `units.k_cache`: [num_blocks, B, C + R].
struct LatentDecodeParams {
    DecodeParams units;
    const T* latent_q; // [rows, H, C]
    const T* q;        // [rows, H, N + R], of which the last R are read
    u32 nope_dim;      // N
    u32 rope_dim;      // R
};

// Where the last R values of a head's query are.
__device__ __forceinline__ const T* rotated_query(const LatentDecodeParams& p, u32 row, u32 head) {
    return p.q + (u64(row) * p.units.num_heads + head) * (p.nope_dim + p.rope_dim) + p.nope_dim;
}
