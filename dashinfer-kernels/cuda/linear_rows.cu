// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]     out: [M, N] T or f32   x: [M, K]   w: [N, K]   bias: [N] f32, may be null
// GATED: w is [2N, K], rows of gates and then of ups, and out[m, n] = silu(x · w[n]) * (x · w[N + n]), gate and up rounded
// to T first, as by two kernels.
//
// For few rows of x: reads w once, as fast as the memory gives it. Limit: memory, 2 * N * K bytes.
// Tensor cores take w as their left operand, 16 rows, and x as the right one, 8 rows; the sum over k may run in any order
// that both share. So a lane takes eight *neighbouring* k of its row, 16 bytes, and gives them to two products: weights
// go from memory to registers as they lie, with no detour through shared memory. Only x is staged there.
//
//   a unit: 64 k = 128 bytes of a row; half h of it, lane 4 g + t:  w row g and row g + 8, x row g:  k = 32 h + 8 t .. + 8
//   product 1 takes elements 0, 1 (as its k = 2t, 2t + 1) and 2, 3 (2t + 8, 2t + 9); product 2 takes 4, 5 and 6, 7.
//
// The sum has a fixed form: part p is the units p, p + PARTS, p + 2 * PARTS, .. in order, and then the parts are added in
// order. Who sums a part (a warp, a block of the cluster, a later round of the same warp) is a matter of the macros below and
// changes no bit. So a row of out depends on neither M, nor its neighbours, nor TILE_M. Parts are interleaved so that those
// who sum them, in step, read a row's neighbouring units at about the same time: DRAM likes long runs.
//
// Registers hold a few units ahead. With PREFETCH a block also has weights brought to L2 before it waits for its inputs, so
// that memory is busy while the kernel in front of it ends: the rest of its rows, or those of the block that comes blocks_ahead
// further, when it can be expected to end.
//
// A cluster of CLUSTER blocks makes a tile of ROWS weight rows and TILE_M rows of x; the tiles of the same weight rows lie
// next to each other in the grid, so that L2 serves all but the first: num_blocks = ceil(N / OUT_COLS) * ceil(M / TILE_M)
// * CLUSTER. Warp = k_warp * ROW_WARPS + row_warp. SM80 and newer; bf16 and f16.
// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
#include "activation.cuh"
#include "mma.cuh"

#ifndef TILE_M // rows of x in a tile: 8, 16, 32, 64
#define TILE_M 8
#endif
#ifndef ROW_GROUPS // groups of 16 weight rows to a warp: each fragment of x serves all
#define ROW_GROUPS 1
#endif
#ifndef ROW_WARPS // warps beside each other, which share x
#define ROW_WARPS 1
#endif
#ifndef K_WARPS // parts of K that a block sums at once
#define K_WARPS 8
#endif
#ifndef CLUSTER // blocks that share a tile, each with other parts of K (more than 1: SM90 and newer)
#define CLUSTER 1
#endif
#ifndef STAGES // units on their way, of weights (in registers) and of x (in shared memory)
#define STAGES 3
#endif
#ifndef BLOCKS_PER_SM // that registers must suffice for
#define BLOCKS_PER_SM 1
#endif
#ifndef PREFETCH // KB of each row that are brought to L2 ahead of the loads (0, older than SM90, not aligned: none)
#define PREFETCH 0
#endif
#ifndef ALIGNED // whether K % 8 == 0: rows start at multiples of 16 bytes
#define ALIGNED 1
#endif
#ifndef OUT_F32
#define OUT_F32 0
#endif
#ifndef GATED
#define GATED 0
#endif

#define DO_PREFETCH (PREFETCH && ALIGNED && __CUDA_ARCH__ >= 900)

#if __CUDA_ARCH__ >= 800
#if OUT_F32
using Out = float;
#else
using Out = T;
#endif

constexpr int PARTS = 8;
constexpr int UNIT = 64;
constexpr int STRIDE = PARTS * UNIT;                 // from a part's unit to its next
constexpr int ROUNDS = PARTS / (K_WARPS * CLUSTER);
constexpr int THREADS = 32 * ROW_WARPS * K_WARPS;
constexpr int N_TILES = TILE_M / 8;
constexpr int N_GROUP = N_TILES < 2 ? N_TILES : 2;   // of them whose x is in registers at once
constexpr int ROWS = 16 * ROW_GROUPS * ROW_WARPS;    // weight rows of a tile
constexpr int OUT_COLS = GATED ? ROWS / 2 : ROWS;    // and columns of out
constexpr int FRAGS = ROW_GROUPS * N_TILES * 4;      // sums that a lane holds
constexpr int PAIRS = ROW_WARPS * ROW_GROUPS * N_TILES * 2 * 32; // sums of rows g and g + 8, of the whole tile
constexpr int PAIRS_PER_THREAD = (PAIRS + CLUSTER * THREADS - 1) / (CLUSTER * THREADS);
constexpr int X_UNIT = TILE_M * UNIT * 2;            // bytes of x in a unit
constexpr int X_BYTES = K_WARPS * STAGES * X_UNIT;
constexpr int SUM_BYTES = K_WARPS * ROW_WARPS * FRAGS * 32 * 4;
constexpr int SMEM = X_BYTES > SUM_BYTES ? X_BYTES : SUM_BYTES; // first x, then the sums
static_assert(ROUNDS * K_WARPS * CLUSTER == PARTS, "parts do not divide");
static_assert(STAGES >= 2 && SMEM <= 48 * 1024, "more shared memory than a block has");
static_assert(sizeof(T) == 2, "16-bit types");

// Eight values at `from`, of which `valid` (possibly more, or less than none) exist; zeros for the others.
__device__ __forceinline__ uint4 load8_or_zero(const T* from, int valid) {
#if ALIGNED
    return valid > 0 ? load_stream(from) : make_uint4(0, 0, 0, 0);
#else
    u32 half[8];
#pragma unroll
    for (int i = 0; i < 8; i++) half[i] = i < valid ? u32(from[i].bits) : 0u;
    return make_uint4(half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16);
#endif
}

// 16 bytes to shared memory, zeros if not `valid`. Small tiles are read by many blocks of an SM: through the first-level cache.
__device__ __forceinline__ void copy_x(u32 smem, const T* from, bool valid) {
    if (TILE_M <= 16)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(from), "r"(valid ? 16 : 0) : "memory");
    else
        cp_async_16(smem, from, valid);
}

// Waits for the warps that share x.
__device__ __forceinline__ void sync_row_warps(int k_warp) {
    if (ROW_WARPS == 1)
        __syncwarp();
    else if (K_WARPS == 1)
        __syncthreads();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(k_warp + 1), "n"(ROW_WARPS * 32) : "memory");
}

// Waits for the whole cluster; what its threads wrote before is seen after.
__device__ __forceinline__ void sync_cluster() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
__device__ __forceinline__ float load_of_block(u32 smem, int block) {
    float y;
#if CLUSTER > 1
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(y) : "r"(there) : "memory");
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(y) : "r"(smem) : "memory");
#endif
    return y;
}

// What a block works at: it is `block` of its cluster (clusters are whole runs of blocks), and its tile begins at row
// first_row of x and column first_col of out. Asked for again where it is needed again: registers are scarce in between.
struct Place {
    int block, first_row, first_col;
};
__device__ __forceinline__ Place place_of_block(int num_rows, int further = 0) {
    u32 at;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(at));
    at += further;
    const u32 tile = at / CLUSTER, tiles_m = (u32(num_rows) + TILE_M - 1) / TILE_M;
    return {int(at % CLUSTER), int(tile % tiles_m * TILE_M), int(tile / tiles_m * OUT_COLS)};
}

#if DO_PREFETCH
// Has values first_k .. end_k of the weight rows of a block's tile brought to L2; each warp asks for a few of the rows.
__device__ __forceinline__ void prefetch_rows(const T* w, Place place, int num_cols, int num_k, int first_k, int end_k) {
    if (threadIdx.x % 32 != 0 || place.block != 0 || place.first_row != 0 || first_k >= end_k) return;
    for (int row = threadIdx.x / 32; row < ROWS; row += THREADS / 32) {
        const int col = place.first_col + (GATED ? row / 16 * 8 + row % 8 : row);
        if (col >= num_cols) continue;
        const T* from = w + size_t(col + (GATED && row % 16 >= 8 ? num_cols : 0)) * num_k + first_k;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"((end_k - first_k) * 2) : "memory");
    }
}
#endif

#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS, BLOCKS_PER_SM)
    KERNEL(linear_rows)(Out* out, const T* x, const T* w, const float* bias, int num_rows, int num_cols, int num_k,
                        int blocks_ahead) {
    let_next_start();
    __shared__ alignas(128) u8 smem[SMEM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    const int g = lane / 4, t = lane % 4;
    const Place place = place_of_block(num_rows);
    const int block = place.block, first_row = place.first_row, first_col = place.first_col;
    const int num_units = (num_k + UNIT - 1) / UNIT;
    const int x_row = (row_warp * 32 + lane) / 8, x_piece = lane % 8; // and rows ROW_WARPS * 4 further

    // What this warp sums: a part's units from `unit` on, where the pointers are kept.
    int part = block * K_WARPS + k_warp, unit = 0;
    const T* x_at = x + size_t(first_row + x_row) * num_k + x_piece * 8; // eight values that this lane copies
    const T* w_at[ROW_GROUPS][2];                                        // eight values of rows g and g + 8
#pragma unroll
    for (int r = 0; r < ROW_GROUPS; r++) {
        const int group = row_warp * ROW_GROUPS + r;
#pragma unroll
        for (int high = 0; high < 2; high++) {
            // Rows past the end repeat the last; nothing is stored for them.
            const int col = first_col + (GATED ? group * 8 + g : group * 16 + high * 8 + g);
            const int row = min(col, num_cols - 1) + (GATED ? high * num_cols : 0);
            w_at[r][high] = w + size_t(row) * num_k + 8 * t;
        }
    }

    uint4 weights[STAGES][ROW_GROUPS][2][2]; // [stage][group][row g, g + 8][half of the unit]
    const auto load_weights = [&](uint4 (&to)[ROW_GROUPS][2][2], int ahead) {
        const int left = num_k - (unit * UNIT + 8 * t);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int k = ahead * STRIDE + half * 32;
#pragma unroll
            for (int r = 0; r < ROW_GROUPS; r++)
#pragma unroll
                for (int high = 0; high < 2; high++) to[r][high][half] = load8_or_zero(w_at[r][high] + k, left - k);
        }
    };
    const auto start_part = [&] {
        const int further = (part - unit) * UNIT;
        unit = part, x_at += further;
#pragma unroll
        for (int r = 0; r < ROW_GROUPS; r++) w_at[r][0] += further, w_at[r][1] += further;
        // The branch keeps these loads before the wait for inputs: straight code is scheduled with the wait first.
        if (unit < num_units) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) load_weights(weights[s], s);
        }
    };

    // x of a unit in shared memory: TILE_M rows of eight pieces of 16 bytes. In odd rows the halves are exchanged: then the
    // lanes that read at once, pieces t of two rows, touch every bank once. Rows and k that do not exist are zeros.
    const u32 x_ring = smem_u32(smem) + k_warp * (STAGES * X_UNIT);
    const u32 x_to = x_ring + x_row * 128 + (x_piece ^ (x_row % 2 * 4)) * 16;
    const u32 x_lane = x_ring + g * 128 + (t ^ (g % 2 * 4)) * 16;
    const auto stage_x = [&](int stage, int ahead) {
        const int left = num_k - (unit * UNIT + x_piece * 8) - ahead * STRIDE;
        if (ROW_WARPS * 4 > TILE_M && x_row >= TILE_M) return;
#pragma unroll(ALIGNED ? TILE_M : 1) // single values need many registers
        for (int row = 0; row < TILE_M; row += ROW_WARPS * 4) {
            const T* from = x_at + size_t(row) * num_k + ahead * STRIDE;
            const u32 to = x_to + stage * X_UNIT + row * 128;
            const int valid = first_row + x_row + row < num_rows ? left : 0;
#if ALIGNED
            copy_x(to, from, valid > 0);
#else
            const uint4 v = load8_or_zero(from, valid);
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
        }
    };

    start_part();
#if DO_PREFETCH
    {
        constexpr int AHEAD = PREFETCH * 1024 / 2;
        // Nobody did it for the first blocks. Where there is one round, all parts start at the beginning of the rows.
        constexpr int HERE = ROUNDS == 1 ? STAGES * STRIDE : 0;
        if (int(blockIdx.x) < blocks_ahead || blocks_ahead == 0)
            prefetch_rows(w, place, num_cols, num_k, HERE, min(num_k, HERE + AHEAD));
        if (blocks_ahead > 0 && blockIdx.x + blocks_ahead < gridDim.x)
            prefetch_rows(w, place_of_block(num_rows, blocks_ahead), num_cols, num_k, 0, min(num_k, AHEAD));
    }
#endif
    wait_for_inputs();

    float total[PAIRS_PER_THREAD][2] = {};
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) {
            stage_x(s, s);
            cp_async_commit();
        }
        float sums[ROW_GROUPS][N_TILES][4] = {};
#pragma unroll 1
        for (; unit < num_units; unit += STAGES * PARTS) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
                if (unit + s * PARTS >= num_units) break;
                cp_async_wait<STAGES - 2>();
                sync_row_warps(k_warp); // this stage is there, and nobody reads the one before any more
                stage_x((s + STAGES - 1) % STAGES, s + STAGES - 1);
                cp_async_commit();
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int first = 0; first < N_TILES; first += N_GROUP) {
                        uint4 xs[N_GROUP];
#pragma unroll
                        for (int n = 0; n < N_GROUP; n++)
                            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                                         : "=r"(xs[n].x), "=r"(xs[n].y), "=r"(xs[n].z), "=r"(xs[n].w)
                                         : "r"((x_lane ^ (half * 64)) + s * X_UNIT + (first + n) * 1024)
                                         : "memory");
                        // Products that follow each other go to different sums; the order within a sum is always the same.
#pragma unroll
                        for (int step = 0; step < 2; step++)
#pragma unroll
                            for (int r = 0; r < ROW_GROUPS; r++) {
                                const uint4 lo = weights[s][r][0][half], hi = weights[s][r][1][half];
                                const u32 a[4] = {step ? lo.z : lo.x, step ? hi.z : hi.x, step ? lo.w : lo.y, step ? hi.w : hi.y};
#pragma unroll
                                for (int n = 0; n < N_GROUP; n++) {
                                    const u32 b[2] = {step ? xs[n].z : xs[n].x, step ? xs[n].w : xs[n].y};
                                    mma_16x8x16<T>(sums[r][first + n], a, b);
                                }
                            }
                    }
                }
                load_weights(weights[s], s + STAGES);
            }
            x_at += STAGES * STRIDE;
#pragma unroll
            for (int r = 0; r < ROW_GROUPS; r++) w_at[r][0] += STAGES * STRIDE, w_at[r][1] += STAGES * STRIDE;
        }
        if (round + 1 < ROUNDS) {
            part += K_WARPS * CLUSTER;
            start_part();
        }

        // Sums change hands: [k_warp][row_warp][sum of a lane][lane], in place of x. The last stages, copies of nothing, wrote
        // zeros there: they are waited for.
        cp_async_wait<0>();
        __syncthreads();
        float* const mine = reinterpret_cast<float*>(smem) + (k_warp * ROW_WARPS + row_warp) * FRAGS * 32 + lane;
#pragma unroll
        for (int r = 0; r < ROW_GROUPS; r++)
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) mine[((r * N_TILES + n) * 4 + i) * 32] = sums[r][n][i];
        sync_cluster();
#pragma unroll
        for (int p = 0; p < PAIRS_PER_THREAD; p++) {
            const int pair = (p * CLUSTER + block) * THREADS + threadIdx.x;
            if (PAIRS % (CLUSTER * THREADS) != 0 && pair >= PAIRS) break;
            const u32 low = smem_u32(smem) + (pair / 64 * 128 + pair % 64) * 4; // sums 0, 1 of four; 2, 3 lie 64 further
#pragma unroll
            for (int b = 0; b < CLUSTER; b++)
#pragma unroll
                for (int k = 0; k < K_WARPS; k++) {
                    const u32 from = low + k * (ROW_WARPS * FRAGS * 32 * 4);
                    total[p][0] += load_of_block(from, b);
                    total[p][1] += load_of_block(from + 64 * 4, b);
                }
        }
        if (CLUSTER > 1 || ROUNDS > 1) sync_cluster(); // nobody reads these sums any more
    }

    const Place here = place_of_block(num_rows);
#pragma unroll
    for (int p = 0; p < PAIRS_PER_THREAD; p++) {
        const int pair = (p * CLUSTER + here.block) * THREADS + threadIdx.x;
        if (PAIRS % (CLUSTER * THREADS) != 0 && pair >= PAIRS) break;
        // pair = ((group * N_TILES + n) * 2 + odd) * 32 + lane
        const int n = pair / 64 % N_TILES, group = pair / (64 * N_TILES), odd = pair / 32 % 2;
        const int row = here.first_row + n * 8 + pair % 4 * 2 + odd;
        if (row >= num_rows) continue;
        Out* const out_row = out + size_t(row) * num_cols;
#if GATED
        const int col = here.first_col + group * 8 + pair / 4 % 8;
        if (col >= num_cols) continue;
        const float gate = total[p][0] + (bias ? bias[col] : 0.f), up = total[p][1] + (bias ? bias[num_cols + col] : 0.f);
        out_row[col] = from_float<Out>(gated(to_float(from_float<T>(gate)), to_float(from_float<T>(up)), Clamp{}));
#else
#pragma unroll
        for (int high = 0; high < 2; high++) {
            const int col = here.first_col + group * 16 + high * 8 + pair / 4 % 8;
            if (col < num_cols) out_row[col] = from_float<Out>(total[p][high] + (bias ? bias[col] : 0.f));
        }
#endif
    }
}
#endif
