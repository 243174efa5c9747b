// nvrtc: sm_90a
// out[r, n] = sum_k x[x_rows[r], k] * w[e(r), n, k] + bias[e(r), n]            for rows r, sorted by expert e(r)
// GATED: out[r, n] = f(gate, up) (activation.cuh), of w [2N, K], rows of gates and then of ups, and a bias [2N]
//
//   out: [P, N] T   x: T, rows of K; x_rows null: row r   w: packed, moe.cuh   bias: [experts, N or 2N] f32, may be null   K, N % 8 == 0
//
// The products of all experts, for SM90. Weights are the left operand, tokens the right one: an item is GROUPS blocks of 128 weight rows
// for a tile of up to TILE_N tokens of one expert, and with few tokens the weights still go by once. As many blocks as the GPU has
// multiprocessors walk the items (tile, weight blocks), weight blocks innermost, so that those which run together share tokens and
// an expert. A ring of STAGES steps of 64 k never runs dry between items: one thread has the copy engine bring weights, which lie there as
// shared memory has them; three warps gather rows of x. GROUPS warpgroups multiply, each a weight block: gates and ups of 64 features.
// With `early` weights are brought before the kernel in front is done. It must be one of these that is not, which lets the next start when
// it has waited itself: then routing is over, and what it left may be read.
// Sums run over k in order, in f32. A row's result depends on no other row; it may depend on TILE_N in the last bit.
// Limit: few tokens, memory, 2 * N * K bytes for each expert that has some; many, arithmetic.
#include "hopper.cuh"
#include "moe.cuh"

#ifndef TILE_N // tokens of a tile: 16, 32, 64, 128
#define TILE_N 64
#endif
#ifndef GROUPS
#define GROUPS 1
#endif
#ifndef STAGES
#define STAGES 8
#endif

#if __CUDA_ARCH__ == 900
namespace {
constexpr u32 FEATURES = (GATED ? 64 : 128) * GROUPS;
constexpr u32 W_BYTES = STEP_BYTES * GROUPS, X_BYTES = TILE_N * STEP_K * 2;
constexpr bool STAGED = GROUPS > 1;                             // whether results go through shared memory
constexpr u32 STAGED_BYTES = STAGED ? TILE_N * 128 : 0;         // of a warpgroup: 64 features of each token
constexpr u32 X_AT = STAGES * W_BYTES, STAGED_AT = X_AT + STAGES * X_BYTES, FULL = STAGED_AT + GROUPS * STAGED_BYTES, EMPTY = FULL + 8 * STAGES;
constexpr u32 GATHERERS = 96;                                   // threads
constexpr u32 ROW_STEP = GATHERERS / 8;                         // 12: a thread's rows are so far apart
constexpr u32 COPIES = (TILE_N + ROW_STEP - 1) / ROW_STEP;      // of a thread, in a step
// Steps whose rows may be on their way when the next are asked for. A step is shown so much later: in a short ring, one.
constexpr u32 LAG = STAGES < 6 ? 1 : 3;
constexpr u32 NO_ROW = ~0u;
static_assert(X_BYTES % 1024 == 0 && LAG >= 1 && LAG < STAGES);

struct Problem {
    const ExpertTile* tiles;
    u32 num_items, num_groups; // of weight blocks, GROUPS to a group
    u32 num_blocks, num_steps; // of the packed weights
    ExpertTile first;          // of this block's first item
};

// The items of this block, in order, each with its tile; that of the next is on its way meanwhile.
template <typename Visit>
__device__ __forceinline__ void for_each_item(const Problem& p, Visit&& visit) {
    ExpertTile next = p.first;
    for (u32 item = blockIdx.x; item < p.num_items; item += gridDim.x) {
        const ExpertTile tile = next;
        if (item + gridDim.x < p.num_items) next = load_tile(p.tiles, (item + gridDim.x) / p.num_groups);
        visit(tile, item % p.num_groups);
    }
}

// Where in the ring, and in which turn of it.
struct Place {
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void copy_bytes(u32 smem, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem), "l"(from), "r"(bytes),
                 "r"(barrier)
                 : "memory");
}

// One thread. Weight blocks of one expert lie behind each other, but a step of the second is not behind that of the first.
__device__ __forceinline__ void bring_weights(const Problem& p, u32 smem, const T* w) {
    Place at;
    for_each_item(p, [&](const ExpertTile& tile, u32 group) {
        const u32 block = group * GROUPS;
        const u8* const from = reinterpret_cast<const u8*>(w) + (size_t(tile.expert) * p.num_blocks + block) * p.num_steps * STEP_BYTES;
        const u32 blocks = min(u32(GROUPS), p.num_blocks - block); // nothing is written of what the others multiply
        for (u32 step = 0; step < p.num_steps; ++step, at.next()) {
            const u32 full = smem + FULL + 8 * at.stage;
            mbarrier_wait(smem + EMPTY + 8 * at.stage, at.parity ^ 1);
            mbarrier_expect(full, blocks * STEP_BYTES);
#pragma unroll
            for (u32 b = 0; b < GROUPS; ++b)
                if (b < blocks)
                    copy_bytes(smem + at.stage * W_BYTES + b * STEP_BYTES, from + (size_t(b) * p.num_steps + step) * STEP_BYTES, STEP_BYTES, full);
        }
    });
}

// Three warps; `thread` is 0..96. Rows are there when their copies are waited for, LAG steps later, and shown to the products.
__device__ __forceinline__ void gather_rows(const Problem& p, u32 smem, const T* x, const u32* x_rows, u32 num_k, u32 thread) {
    const u32 piece = thread % 8, first = thread / 8, lane = thread % 32, place = place_of(first, piece);
    Place at, done;
    u32 under_way = 0;
    const auto finish = [&] {
        fence_async();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(smem + FULL + 8 * done.stage);
        done.next();
    };
    for_each_item(p, [&](const ExpertTile& tile, u32) {
        u32 rows[COPIES];
#pragma unroll
        for (u32 i = 0; i < COPIES; ++i) {
            const u32 row = first + i * ROW_STEP;
            rows[i] = NO_ROW;
            if (row < tile.num_rows) rows[i] = x_rows ? x_rows[tile.first_row + row] : tile.first_row + row;
        }
        for (u32 step = 0; step < p.num_steps; ++step, at.next()) {
            const u32 k = step * STEP_K + piece * 8, stage = smem + X_AT + at.stage * X_BYTES;
            mbarrier_wait(smem + EMPTY + 8 * at.stage, at.parity ^ 1);
#pragma unroll
            for (u32 i = 0; i < COPIES; ++i) {
                const bool valid = rows[i] != NO_ROW && k < num_k;
                const u32 to = stage + (place ^ i % 2 * 64) + i * (ROW_STEP * 128); // 12 rows on: the other half of the row
                if (first + i * ROW_STEP < TILE_N) cp_async_16(to, valid ? x + size_t(rows[i]) * num_k + k : x, valid);
            }
            cp_async_commit();
            if (under_way == LAG) {
                cp_async_wait<LAG>();
                finish();
            } else {
                ++under_way;
            }
        }
    });
    cp_async_wait<0>();
    for (; under_way > 0; --under_way) finish();
}

// A warpgroup writes 64 features of the tile's tokens from `col` on, 128 bytes of a token at a time; each warp brings 16 features.
// `pack(i, high)`: of tokens 2t and 2t + 1 of those from 8 i on, this lane's feature g, or g + 8.
template <typename Pack>
__device__ __forceinline__ void write_staged(u32 smem, T* out, u32 num_cols, const ExpertTile& tile, u32 col, u32 group, u32 thread, Pack&& pack) {
    const u32 warp = thread / 32, lane = thread % 32;
    const u32 to = smem + place_of(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    barrier_sync(1 + group, 128); // nobody reads what was there before
#pragma unroll
    for (u32 i = 0; i < TILE_N / 8; i += 2) {
        // Four 8x8 tiles, transposed: lane l gives the address of row l % 8 of tile l / 8.
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + 8 * i * 128), "r"(pack(i, false)),
                     "r"(pack(i, true)), "r"(pack(i + 1, false)), "r"(pack(i + 1, true))
                     : "memory");
    }
    barrier_sync(1 + group, 128);
    const u32 piece = thread % 8, first = thread / 8, from = smem + place_of(first, piece);
    T* const at = out + size_t(tile.first_row + first) * num_cols + col + 8 * piece;
    if (col + 8 * piece >= num_cols) return;
#pragma unroll
    for (u32 i = 0; i < TILE_N / 16; ++i) {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from + i * (16 * 128)) : "memory");
        if (first + 16 * i < tile.num_rows) *reinterpret_cast<uint4*>(at + size_t(16 * i) * num_cols) = v;
    }
}

// One warpgroup: weight block `group` of each item.
__device__ __forceinline__ void multiply(const Problem& p, u32 smem, T* out, const float* bias, u32 num_cols, Clamp clamp, u32 group,
                                         u32 thread) {
    const u32 warp = thread / 32, lane = thread % 32;
    const u64 first_w = matrix_descriptor<128>(smem + group * STEP_BYTES, HALF_BYTES), first_x = matrix_descriptor<128>(smem + X_AT, X_BYTES);
    Place at;
    float first[TILE_N / 2], second[TILE_N / 2]; // rows 0..64 of the weight block, and 64..128
    for_each_item(p, [&](const ExpertTile& tile, u32 of_item) {
        const u32 col = of_item * FEATURES + group * (FEATURES / GROUPS) + 16 * warp;
        const Biases biases = load_biases(bias, tile.expert, col, num_cols);
#pragma unroll
        for (u32 i = 0; i < TILE_N / 2; ++i) first[i] = 0.f, second[i] = 0.f;
        u32 before = 0;
        for (u32 step = 0; step < p.num_steps; ++step, at.next()) {
            mbarrier_wait(smem + FULL + 8 * at.stage, at.parity);
            const u64 w = descriptor_after(first_w, at.stage * W_BYTES), xs = descriptor_after(first_x, at.stage * X_BYTES);
            hold(first), hold(second);
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < STEP_K / 16; ++k) {
                Wgmma<T, TILE_N>::template smem<true, false>(first, descriptor_after(w, 32 * k), descriptor_after(xs, 32 * k));
                Wgmma<T, TILE_N>::template smem<true, false>(second, descriptor_after(w, HALF_BYTES + 32 * k), descriptor_after(xs, 32 * k));
            }
            wgmma_commit();
            wgmma_wait<1>(); // the step before is done
            hold(first), hold(second);
            if (step > 0 && lane == 0) mbarrier_arrive(smem + EMPTY + 8 * before);
            before = at.stage;
        }
        wgmma_wait<0>();
        hold(first), hold(second);
        if (lane == 0) mbarrier_arrive(smem + EMPTY + 8 * before);
        if constexpr (STAGED) {
            const u32 staged = smem + STAGED_AT + group * STAGED_BYTES, block_col = col - 16 * warp;
            if (block_col >= num_cols) return;
            if constexpr (GATED != 0) {
                write_staged(staged, out, num_cols, tile, block_col, group, thread, [&](u32 i, bool high) {
                    float x[2];
#pragma unroll
                    for (u32 j = 0; j < 2; ++j) {
                        const u32 at = 4 * i + 2 * high + j;
                        x[j] = gated(first[at] + biases.at[high], second[at] + biases.at[2 + high], clamp);
                    }
                    return pack2<T>(x[0], x[1]);
                });
            } else {
                write_staged(staged, out, num_cols, tile, block_col, group, thread, [&](u32 i, bool high) {
                    return pack2<T>(first[4 * i + 2 * high] + biases.at[high], first[4 * i + 2 * high + 1] + biases.at[high]);
                });
                write_staged(staged, out, num_cols, tile, block_col + 64, group, thread, [&](u32 i, bool high) {
                    return pack2<T>(second[4 * i + 2 * high] + biases.at[2 + high], second[4 * i + 2 * high + 1] + biases.at[2 + high]);
                });
            }
            return;
        }
        if (col >= num_cols) return;
#pragma unroll
        for (u32 i = 0; i < TILE_N / 8; ++i)
            if (8 * i < tile.num_rows)
                write_tokens(out, num_cols, tile.first_row + 8 * i, tile.first_row + tile.num_rows, col, biases, clamp, first + 4 * i,
                             second + 4 * i);
    });
}
} // namespace
#endif

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    KERNEL(moe_tiles_sm90)(T* out, const T* x, const u32* x_rows, const T* w, const float* bias, const ExpertTile* tiles, const u32* num_tiles,
                           u32 num_cols, u32 num_k, Clamp clamp, u32 early) {
#if __CUDA_ARCH__ == 900
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = (smem_u32(shared) + 1023) / 1024 * 1024;
    const u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), group = warp / 4;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i) {
            mbarrier_init(smem + FULL + 8 * i, 1 + GATHERERS / 32); // the weights' promise, and each warp of rows
            mbarrier_init(smem + EMPTY + 8 * i, 4 * GROUPS);
        }
        mbarrier_init_done();
    }
    __syncthreads();
    const bool waits = !early || warp != 4 * GROUPS;
    if (waits) {
        wait_for_inputs();
        let_next_start();
    }

    const u32 num_blocks = (num_cols + FEATURES / GROUPS - 1) / (FEATURES / GROUPS), num_groups = (num_blocks + GROUPS - 1) / GROUPS;
    // Both loads at once: there is room for a tile of every block of the grid.
    const ExpertTile first = load_tile(tiles, blockIdx.x / num_groups);
    u32 count;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(count) : "l"(num_tiles) : "memory");
    const Problem problem{tiles, count * num_groups, num_groups, num_blocks, (num_k + STEP_K - 1) / STEP_K, first};
    if (group == GROUPS) {
        if (warp == 4 * GROUPS) {
            if (threadIdx.x % 32 == 0) bring_weights(problem, smem, w);
            if (!waits) wait_for_inputs();
        } else {
            gather_rows(problem, smem, x, x_rows, num_k, threadIdx.x - 128 * GROUPS - 32);
        }
    } else {
        multiply(problem, smem, out, bias, num_cols, clamp, group, threadIdx.x % 128);
    }
#endif
}
