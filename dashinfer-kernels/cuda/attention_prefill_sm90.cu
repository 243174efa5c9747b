// nvrtc: sm_90a
// out[t, h, :] = sum_j p[j] * v[j, h', :],  p = softmax_j(scale * q[t, h, :] · k[j, h', :])  over the keys j that row t sees
// With SOFT_CAP scores are capped; a sink joins the softmax of its head (softmax.cuh).
//
// Prefill, for SM90: causal, with an optional sliding window, over the paged cache. T: bf16, f16.
//   q: rows of H * D values and more behind them   out: rows of H * V   k, v maps: [num_blocks, K, B, D and V]   h' = h / (H / K)
// V, the size of values, is D but for keys and values that were made of latent vectors.
// After FlashAttention-3, https://arxiv.org/abs/2407.08608. A block takes 128 rows (a tile) of one head: two warpgroups own
// 64 rows each, a warp of a third copies tiles of KEYS keys and values into two rings. While a warpgroup does the softmax of a
// tile of keys, its products with the values of the tile before run, and the other warpgroup's products: the two take turns.
// Keys go backwards, from the diagonal. The grid is as large as the GPU; blocks walk the list of (tile, head), tiles being
// sorted longest first by the host, forth and back, so that each block gets the same work.
// Limit: arithmetic, 4 * D FLOP for each row, head and key it sees; the exponentials take half of the time of the products
// (D = 128), hidden behind them.
#include "hopper.cuh"
#include "mma.cuh"
#include "softmax.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef VALUE_DIM
#define VALUE_DIM HEAD_DIM
#endif
#ifndef KEYS_PER_TILE
#define KEYS_PER_TILE (VALUE_DIM <= 128 ? 128 : 64)
#endif
#ifndef TAKE_TURNS
#define TAKE_TURNS 1
#endif

struct PrefillTile {
    u32 first_row, num_rows, position, first_block;
};

#if __CUDA_ARCH__ == 900
namespace {
constexpr int D = HEAD_DIM, V = VALUE_DIM;
constexpr int KEYS = KEYS_PER_TILE;
constexpr int ROWS = 64; // of a warpgroup
constexpr int CONSUMERS = 2, STAGES = 2;
constexpr int SWIZZLE = D % 64 == 0 ? 128 : D % 32 == 0 ? 64 : 32;
constexpr int CHUNK = SWIZZLE / 2; // columns
constexpr int K_CHUNKS = D / CHUNK, V_CHUNKS = V / CHUNK;
static_assert(D % CHUNK == 0 && V % CHUNK == 0 && (KEYS == 64 || KEYS == 128));

// Shared memory, from a multiple of 1024: queries of each warpgroup, the ring of keys, the ring of values, barriers.
constexpr u32 Q_BYTES = ROWS * D * 2, K_BYTES = KEYS * D * 2, V_BYTES = KEYS * V * 2; // of a tile
constexpr u32 K_AT = CONSUMERS * Q_BYTES, V_AT = K_AT + STAGES * K_BYTES, BARRIERS_AT = V_AT + STAGES * V_BYTES;
static_assert(Q_BYTES % 1024 == 0 && K_BYTES % 1024 == 0 && V_BYTES % 1024 == 0);

// Barriers: "full" is the copy's arrival, "empty" one arrival of each consumer warp.
constexpr u32 K_FULL = BARRIERS_AT, K_EMPTY = K_FULL + 8 * STAGES, V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;

// Named barriers: whose turn it is, and one within each warpgroup.
constexpr u32 TURN = 1, GROUP = 1 + CONSUMERS;

struct Problem {
    const PrefillTile* tiles;
    u32 num_items, num_heads, group; // group: query heads of a kv head
    u32 window;
};

// One (tile, head) and the tiles of keys it needs.
struct Item {
    u32 first_row, num_rows, position, first_block, head;
    u32 first_keys, end_keys; // tiles of keys
    __device__ u32 end() const { return position + num_rows; } // keys beyond are not read
};

// The item of this block in `round`; no rows: none.
__device__ __forceinline__ Item item_of(const Problem& problem, u32 round) {
    const u32 place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const u64 index = u64(round) * gridDim.x + place;
    Item item;
    item.num_rows = 0;
    if (index >= problem.num_items) return item;
    item.head = u32(index) % problem.num_heads; // heads innermost: neighbours share keys
    const uint4 tile = *reinterpret_cast<const uint4*>(problem.tiles + u32(index) / problem.num_heads);
    item.first_row = tile.x, item.num_rows = tile.y, item.position = tile.z, item.first_block = tile.w;
    const u32 first_key = problem.window && item.position >= problem.window ? item.position - problem.window + 1 : 0;
    item.first_keys = first_key / KEYS;
    item.end_keys = (item.end() + KEYS - 1) / KEYS;
    return item;
}

// Where in a ring, and in which turn of it.
struct Place {
    u32 count = 0;
    __device__ u32 stage() const { return count % STAGES; }
    __device__ u32 parity() const { return count / STAGES % 2; }
};

// --- producer ----------------------------------------------------------------------------------------------------------

struct Source {
    const TensorMap* map;
    u32 tile_at, full, empty;
    Place place;
};

// One warp copies tile `keys` of the head's keys or values: a box for each block (or part of a block as large as the tile)
// and chunk of columns. Blocks without keys below `end` stay as they are: the table has no entry for them.
template <u32 CHUNKS>
__device__ __forceinline__ void copy_tile(Source& to, u32 smem, const u32* blocks, u32 block_shift, u32 keys, u32 end, u32 kv_head, u32 lane) {
    const u32 box_shift = min(block_shift, KEYS == 128 ? 7 : 6), first = keys * KEYS; // a box's keys: a power of two
    const u32 boxes = ((min(end - first, u32(KEYS)) + (1u << box_shift) - 1) >> box_shift) * CHUNKS;
    u32 block = 0;
    if (lane < boxes) block = blocks[(first + (lane / CHUNKS << box_shift)) >> block_shift]; // on its way during the wait
    const u32 stage = to.place.stage(), full = smem + to.full + 8 * stage;
    mbarrier_wait(smem + to.empty + 8 * stage, to.place.parity() ^ 1);
    if (lane == 0) mbarrier_expect(full, (boxes << box_shift) * SWIZZLE);
    __syncwarp();
    constexpr u32 MOST = KEYS / 16 * CHUNKS;
#pragma unroll
    for (u32 turn = 0; turn < MOST; turn += 32) {
        const u32 box = turn + lane, part = box / CHUNKS << box_shift, chunk = box % CHUNKS;
        if (box < boxes) {
            if (turn > 0) block = blocks[(first + part) >> block_shift];
            copy_tensor_4d(smem + to.tile_at + stage * (CHUNKS * KEYS * SWIZZLE) + (chunk * KEYS + part) * SWIZZLE, to.map, full, chunk * CHUNK,
                           (first + part) & ((1u << block_shift) - 1), kv_head, block);
        }
    }
    ++to.place.count;
}

__device__ __forceinline__ void produce(const Problem& problem, u32 smem, const TensorMap* k_map, const TensorMap* v_map, const u32* block_table,
                                        u32 block_shift, u32 lane) {
    Source k{k_map, K_AT, K_FULL, K_EMPTY, {}}, v{v_map, V_AT, V_FULL, V_EMPTY, {}};
    for (u32 round = 0; u64(round) * gridDim.x < problem.num_items; ++round) {
        const Item item = item_of(problem, round);
        if (item.num_rows == 0) continue;
        const u32* blocks = block_table + item.first_block;
        const u32 kv_head = item.head / problem.group, end = item.end();
        // In the order of use: keys are a tile ahead of the values.
        for (u32 keys = item.end_keys; keys-- > item.first_keys;) {
            copy_tile<K_CHUNKS>(k, smem, blocks, block_shift, keys, end, kv_head, lane);
            if (keys + 1 < item.end_keys) copy_tile<V_CHUNKS>(v, smem, blocks, block_shift, keys + 1, end, kv_head, lane);
        }
        copy_tile<V_CHUNKS>(v, smem, blocks, block_shift, item.first_keys, end, kv_head, lane);
    }
}

// --- consumers ---------------------------------------------------------------------------------------------------------

// Starts to copy the warpgroup's queries into shared memory; rows beyond the tile become zeros.
__device__ __forceinline__ void load_queries(const Item& item, u32 smem, const T* q_rows, size_t q_row, u32 group, u32 thread) {
    constexpr u32 PIECES = D / 8; // of 16 bytes, in a row
    static_assert(ROWS * PIECES % 128 == 0);
#pragma unroll 4
    for (u32 i = thread; i < ROWS * PIECES; i += 128) {
        const u32 row = i / PIECES, piece = i % PIECES;
        const bool valid = group * ROWS + row < item.num_rows;
        const u32 from_row = item.first_row + (valid ? group * ROWS + row : 0);
        const u32 chunk = piece / (CHUNK / 8), offset = row * SWIZZLE + piece % (CHUNK / 8) * 16;
        cp_async_16(smem + chunk * (ROWS * SWIZZLE) + swizzled<SWIZZLE>(offset), q_rows + from_row * q_row + item.head * D + piece * 8, valid);
    }
    cp_async_commit();
}

// s = q · k^T, started.
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 2], u64 q, u64 k) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const u32 chunk = step / (SWIZZLE / 32), within = step % (SWIZZLE / 32) * 32;
        const u64 a = descriptor_after(q, chunk * ROWS * SWIZZLE + within), b = descriptor_after(k, chunk * KEYS * SWIZZLE + within);
        if (step == 0) Wgmma<T, KEYS>::template smem<false, false>(s, a, b);
        else Wgmma<T, KEYS>::template smem<true, false>(s, a, b);
    }
    wgmma_commit();
}

// o += p · v, started.
__device__ __forceinline__ void multiply_values(float (&o)[V / 2], const u32 (&p)[KEYS / 4], u64 v) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step)
        Wgmma<T, V>::template registers<true, true>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                                    descriptor_after(v, step * 16 * SWIZZLE));
    wgmma_commit();
}

// Values of two rows, g and g + 8 of the warp's 16.
struct Pair {
    float at[2];
};

__device__ __forceinline__ void cap(float (&s)[KEYS / 2], const Scores& scores) {
    if constexpr (SOFT_CAP) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) s[i] = scores.capped(s[i] * scores.scale);
    }
}

// Hides the keys that a row does not see. `row`: position of row g minus the tile's first key and this lane's first column.
__device__ __forceinline__ void mask(float (&s)[KEYS / 2], int row, u32 window) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int last = row + 8 * half, first = window ? last - int(window) + 1 : -KEYS;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * i + e > last || 8 * i + e < first) s[4 * i + 2 * half + e] = -INF;
    }
}

// Scores become exp2(s * scale - max), summed into `sum` (this lane's columns only); returns by what earlier results shrink.
__device__ __forceinline__ Pair softmax(float (&s)[KEYS / 2], Pair& max_score, Pair& sum, float scale) {
    Pair highest = max_score, shift, shrink;
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            highest.at[half] = fmaxf(highest.at[half], fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            highest.at[half] = fmaxf(highest.at[half], __shfl_xor_sync(ALL_LANES, highest.at[half], lane));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        shift.at[half] = highest.at[half] == -INF ? 0.f : highest.at[half] * scale; // no key seen yet: exp2(-INF) = 0, not NaN
        shrink.at[half] = exp2_approx(fmaf(max_score.at[half], scale, -shift.at[half]));
        sum.at[half] *= shrink.at[half];
    }
    max_score = highest;
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            s[4 * i + j] = exp2_approx(fmaf(s[4 * i + j], scale, -shift.at[j / 2]));
            sum.at[j / 2] += s[4 * i + j];
        }
    return shrink;
}

// The accumulator's layout is that of an operand: only pairs are packed.
__device__ __forceinline__ void pack(u32 (&p)[KEYS / 4], const float (&s)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void scale_rows(float (&o)[V / 2], const Pair& by) {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
        o[4 * i] *= by.at[0], o[4 * i + 1] *= by.at[0];
        o[4 * i + 2] *= by.at[1], o[4 * i + 3] *= by.at[1];
    }
}

// Writes row g (half 0) or g + 8 (half 1). Four lanes hold 2 columns each of every 8: they exchange words so that each has
// 8 columns, 16 bytes, of every 32. The exchange is made by all lanes, the write only if `valid`.
__device__ __forceinline__ void write_row(T* to, const float (&o)[V / 2], int half, float by, u32 t, bool valid) {
#pragma unroll
    for (int i = 0; i + 4 <= V / 8; i += 4) {
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = pack2<T>(o[4 * (i + j) + 2 * half] * by, o[4 * (i + j) + 2 * half + 1] * by);
        // A transposition of 4 x 4 words: swap the halves between lanes t and t ^ 2, then within them between t and t ^ 1.
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u32 got = __shfl_xor_sync(ALL_LANES, t & 2 ? w[j] : w[j + 2], 2);
            (t & 2 ? w[j] : w[j + 2]) = got;
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const u32 got = __shfl_xor_sync(ALL_LANES, t & 1 ? w[j] : w[j + 1], 1);
            (t & 1 ? w[j] : w[j + 1]) = got;
        }
        if (valid) *reinterpret_cast<uint4*>(to + 8 * (i + t)) = make_uint4(w[0], w[1], w[2], w[3]);
    }
#pragma unroll
    for (int i = V / 32 * 4; i < V / 8; ++i)
        if (valid) *reinterpret_cast<u32*>(to + 8 * i + 2 * t) = pack2<T>(o[4 * i + 2 * half] * by, o[4 * i + 2 * half + 1] * by);
}

// What is in a value row beyond the last key is not known, and 0 * NaN is NaN: zeros, in place of those rows. Both warpgroups
// write them, and each waits for its own writes only.
__device__ __forceinline__ void clear_values(u32 tile, u32 first, u32 group, u32 thread) {
    const u32 pieces = (KEYS - first) * (SWIZZLE / 16); // a row's swizzle stays within the row
    for (u32 chunk = 0; chunk < V_CHUNKS; ++chunk)
        for (u32 i = thread; i < pieces; i += 128)
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tile + (chunk * KEYS + first) * SWIZZLE + 16 * i), "r"(0) : "memory");
    fence_async();
    barrier_sync(GROUP + group, 128);
}

__device__ __forceinline__ void consume(const Problem& problem, u32 smem, T* out, const T* q_rows, size_t q_row, size_t out_row, const Scores& scores,
                                        const float* sinks, u32 group, u32 thread) {
    const float scale = SOFT_CAP ? 1.f : scores.scale; // of what is left in `s`
    const u32 warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const u32 row_in_tile = group * ROWS + warp * 16 + g;
    const u32 q_at = smem + group * Q_BYTES;
    const u64 q = matrix_descriptor<SWIZZLE>(q_at, ROWS * SWIZZLE);
    const u64 first_k = matrix_descriptor<SWIZZLE>(smem + K_AT, KEYS * SWIZZLE), first_v = matrix_descriptor<SWIZZLE>(smem + V_AT, KEYS * SWIZZLE);
    Place k, v;

    const auto wait_for = [&](u32 full, const Place& place) { mbarrier_wait(smem + full + 8 * place.stage(), place.parity()); };
    const auto release = [&](u32 empty, Place& place) {
        if (lane == 0) mbarrier_arrive(smem + empty + 8 * place.stage());
        ++place.count;
    };
    if (TAKE_TURNS && group == 1) barrier_arrive(TURN, 256); // the first turn is that of warpgroup 0

    Item item = item_of(problem, 0);
    if (item.num_rows) load_queries(item, q_at, q_rows, q_row, group, thread);
    for (u32 round = 0; u64(round) * gridDim.x < problem.num_items; ++round) {
        Item next = item_of(problem, round + 1);
        if (item.num_rows) {
            const u32 end = item.end();
            const int position = int(item.position + row_in_tile) - int(2 * t);
            const int first_position = int(item.position + group * ROWS), last_position = first_position + ROWS - 1;
            float s[KEYS / 2], o[V / 2];
            u32 p[KEYS / 4];
            Pair max_score{{-INF, -INF}}, sum{{0.f, 0.f}};
#pragma unroll
            for (int i = 0; i < V / 2; ++i) o[i] = 0.f;

            cp_async_wait<0>();
            fence_async();
            barrier_sync(GROUP + group, 128);

            // The tile of the diagonal.
            u32 keys = item.end_keys - 1;
            wait_for(K_FULL, k);
            hold(s);
            wgmma_fence();
            multiply_keys(s, q, descriptor_after(first_k, k.stage() * K_BYTES));
            wgmma_wait<0>();
            hold(s);
            release(K_EMPTY, k);
            cap(s, scores);
            mask(s, position - int(keys * KEYS), problem.window);
            softmax(s, max_score, sum, scale);
            pack(p, s);
            if (end < item.end_keys * KEYS) {
                wait_for(V_FULL, v);
                clear_values(smem + V_AT + v.stage() * V_BYTES, end - keys * KEYS, group, thread);
            }

            while (keys > item.first_keys) {
                --keys;
                wait_for(K_FULL, k);
                if constexpr (TAKE_TURNS) barrier_sync(TURN + group, 256);
                hold(s), hold(o), hold(p);
                wgmma_fence();
                multiply_keys(s, q, descriptor_after(first_k, k.stage() * K_BYTES));
                wait_for(V_FULL, v);
                wgmma_fence();
                multiply_values(o, p, descriptor_after(first_v, v.stage() * V_BYTES));
                if constexpr (TAKE_TURNS) barrier_arrive(TURN + (group ^ 1), 256);
                wgmma_wait<1>();
                hold(s);
                release(K_EMPTY, k);
                cap(s, scores);
                const int first_key = int(keys * KEYS);
                if (first_key + KEYS - 1 > first_position || (problem.window && first_key <= last_position - int(problem.window)))
                    mask(s, position - first_key, problem.window);
                const Pair shrink = softmax(s, max_score, sum, scale);
                // This wait is over since long. The assembler moves the next one to the start of its basic block, which was in
                // front of the softmax: now a block starts here.
                hold(s);
                wait_for(V_FULL, v);
                wgmma_wait<0>();
                hold(o), hold(p);
                release(V_EMPTY, v);
                scale_rows(o, shrink);
                pack(p, s);
            }

            // The last values; meanwhile the next queries.
            wait_for(V_FULL, v);
            hold(o), hold(p);
            wgmma_fence();
            multiply_values(o, p, descriptor_after(first_v, v.stage() * V_BYTES));
            barrier_sync(GROUP + group, 128); // all warps are done with the queries
            if (next.num_rows) load_queries(next, q_at, q_rows, q_row, group, thread);
            wgmma_wait<0>();
            hold(o), hold(p);
            release(V_EMPTY, v);

#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = sum.at[half];
                total += __shfl_xor_sync(ALL_LANES, total, 1);
                total += __shfl_xor_sync(ALL_LANES, total, 2);
                float by = __fdividef(1.f, total);
                if (sinks != nullptr) by = inverse_with_sink(max_score.at[half] * scale, total, sinks, item.head);
                const u32 row = row_in_tile + 8 * half;
                T* to = out + (item.first_row + size_t(row)) * out_row + item.head * V;
                write_row(to, o, half, by, t, row < item.num_rows);
            }
        } else if (next.num_rows) {
            load_queries(next, q_at, q_rows, q_row, group, thread);
        }
        item = next;
    }
}
} // namespace
#endif

// Grid: any number of blocks; as many as the GPU has multiprocessors, at most num_tiles * num_heads, is best.
extern "C" __global__ void __launch_bounds__(384, 1)
    KERNEL(attention_prefill_sm90)(T* __restrict__ out, const T* __restrict__ q, const __grid_constant__ TensorMap k_map,
                                   const __grid_constant__ TensorMap v_map, const PrefillTile* __restrict__ tiles,
                                   const u32* __restrict__ block_table, u32 num_tiles, u32 num_heads, u32 num_kv_heads, u32 block_size, u32 window,
                                   u32 q_row, u32 out_row, float scale, float soft_cap, const float* __restrict__ sinks) {
#if __CUDA_ARCH__ == 900
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = (smem_u32(shared) + 1023) / 1024 * 1024;
    const u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), group = warp / 4;
    if (threadIdx.x == 0) {
        prefetch_map(&k_map), prefetch_map(&v_map);
        for (u32 i = 0; i < STAGES; ++i) {
            mbarrier_init(smem + K_FULL + 8 * i, 1), mbarrier_init(smem + V_FULL + 8 * i, 1);
            mbarrier_init(smem + K_EMPTY + 8 * i, 4 * CONSUMERS), mbarrier_init(smem + V_EMPTY + 8 * i, 4 * CONSUMERS);
        }
        mbarrier_init_done();
    }
    __syncthreads();
    let_next_start();
    wait_for_inputs();

    const Problem problem{tiles, num_tiles * num_heads, num_heads, num_heads / num_kv_heads, window};
    if (group == CONSUMERS) {
        give_registers<40>();
        if (warp == 4 * CONSUMERS) produce(problem, smem, &k_map, &v_map, block_table, 31 - __clz(block_size), threadIdx.x % 32);
    } else {
        take_registers<232>();
        consume(problem, smem, out, q, q_row, out_row, Scores(scale, soft_cap), sinks, group, threadIdx.x % 128);
    }
#endif
}
