// What the decode kernels share: the work list, how it is walked, and how the parts of a row come together.
//
// A unit is a range of positions of one row of the batch; the host splits long rows (src/cuda/plan.rs). The softmax over
// part of the positions is kept as m, l and acc (softmax.cuh). Two parts merge as
//     m = max(m1, m2)   l = l1 * exp2(m1 - m) + l2 * exp2(m2 - m)   acc likewise      out = acc / l
// A part that saw no position has m = -inf, l = 0, acc = 0, and weighs nothing. A head's sink joins the last of them.
//
// Parts of one row are left in global memory. Each block that is done with a part draws a ticket; the one that draws the
// last finds all parts there, and merges them in the order of the splits: the result does not tell which block it was.
#pragma once
#include "softmax.cuh"

struct alignas(16) DecodeUnit {
    u32 row;         // of the batch
    u32 first_block; // where the sequence's blocks start in the block table
    u32 begin, end;  // positions; begin is a multiple of 64; begin == end gives zeros
    u32 context_len; // the row stands at position context_len - 1
    u32 num_splits;  // of this row; 1: the unit writes the output itself
    u32 slot;        // otherwise its partial result's place
    u32 split;       // which of them this is; the row's slots are consecutive
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
    u32* tickets;         // [slots, H]: of a row's first slot and a block's first head; 0 between launches
    const float* sinks;   // [H]; null: none
    u32 num_heads, num_kv_heads, head_dim;
    u32 block_size;       // 16, 32, 64 or 128
    u32 window;           // 0: none
    float scale;
    float soft_cap;       // with SOFT_CAP
};

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

// Memory that another block has just written: past the first-level cache.
__device__ __forceinline__ Vec<float, 2> load_shared_by_blocks(const float* from, Vec<float, 2>) {
    Vec<float, 2> v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.at[0]), "=f"(v.at[1]) : "l"(from));
    return v;
}
__device__ __forceinline__ Vec<float, 4> load_shared_by_blocks(const float* from, Vec<float, 4>) {
    Vec<float, 4> v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.at[0]), "=f"(v.at[1]), "=f"(v.at[2]), "=f"(v.at[3])
                 : "l"(from));
    return v;
}

// The whole block calls it once its part of a split row is written. Whether all other parts of these heads are there too.
__device__ __forceinline__ bool is_last_part(const DecodeParams& p, const DecodeUnit& unit, u32 first_head) {
    __shared__ u32 is_last;
    __syncthreads(); // the part is written
    if (threadIdx.x == 0) {
        u32* const ticket = p.tickets + u64(unit.slot - unit.split) * p.num_heads + first_head;
        u32 drawn;
        // Releases this part to whoever draws the last ticket, and acquires the others'.
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(drawn) : "l"(ticket) : "memory");
        is_last = drawn == unit.num_splits - 1;
        if (is_last) *ticket = 0; // nobody else draws
    }
    __syncthreads();
    return is_last != 0;
}

// The block merges the parts of `num_heads` heads, N values of one to a thread, and writes the row's output. AT_ONCE parts
// are on their way at a time: what it takes is latency, 4 * D bytes a head and part, which lie in L2.
template <int N, u32 AT_ONCE>
__device__ __forceinline__ void merge_parts(const DecodeParams& p, const DecodeUnit& unit, u32 first_head, u32 num_heads,
                                            u32 dim) {
    const u32 per_head = dim / N;
    const u64 first = u64(unit.slot - unit.split) * p.num_heads + first_head;
    for (u32 i = threadIdx.x; i < num_heads * per_head; i += blockDim.x) {
        const u32 head = i / per_head, d = i % per_head * N;
        float top = -INF, sum = 0.f, acc[N] = {};
        for (u32 s = 0; s < unit.num_splits; s += AT_ONCE) {
            Vec<float, 2> ml[AT_ONCE];
            Vec<float, N> part[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                ml[j] = {-INF, 0.f};
                part[j] = {};
                if (s + j < unit.num_splits) {
                    const u64 at = first + u64(s + j) * p.num_heads + head;
                    ml[j] = load_shared_by_blocks(p.partial_ml + at * 2, Vec<float, 2>{});
                    part[j] = load_shared_by_blocks(p.partial_out + at * dim + d, Vec<float, N>{});
                }
            }
            const float before = top;
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) top = fmaxf(top, ml[j].at[0]);
            const float keep = weight_of(before, top);
            sum *= keep;
#pragma unroll
            for (int n = 0; n < N; n++) acc[n] *= keep;
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                const float weight = weight_of(ml[j].at[0], top);
                sum += ml[j].at[1] * weight;
#pragma unroll
                for (int n = 0; n < N; n++) acc[n] += part[j].at[n] * weight;
            }
        }
        const float inverse = inverse_with_sink(top, sum, p.sinks, first_head + head);
        T* const to = p.out + (u64(unit.row) * p.num_heads + first_head + head) * dim + d;
#pragma unroll
        for (int n = 0; n < N; n += 2) store_pair(to + n, acc[n] * inverse, acc[n + 1] * inverse);
    }
}
