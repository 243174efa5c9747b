// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// Decode attention over the paged cache, on tensor cores.
//
//   out[row, h, :] = sum_p softmax_p(scale * q[row, h, :] . k[p, h / G, :]) * v[p, h / G, :]      G = H / K <= 16
//
// q: heads of qkv [rows, (H + 2 K) * D]   k, v: blocks [K, B, D]   out: [rows, H * D]   all T; sums and softmax in f32.
//
// A block of four warps takes one unit (attention_units.cuh) and one kv head at a time. The G query heads are rows of one
// 16-row tile. Positions go in chunks of 16, never across a cache block; warp w takes the chunks with index % 4 == w and
// knows nothing of the other warps until the end: it has its own ring of chunks in shared memory, filled by asynchronous
// copies and guarded by __syncwarp alone, and its own running softmax and accumulator over all of D. The four merge in
// shared memory in the order of the warps. So a result depends on the row and its range only, not on block or batch.
//
// Shared: rings [4 warps][STAGES][16][D] T, keys and values of a chunk in two stages, one after the other; then m and l of
// the warps [4][16][2] f32. 96.5 KB at most.
// Limit: memory, 4 * K * D bytes a position, each read once. At D = 128: 80 KB are on their way in each block, two blocks
// to a multiprocessor of SM90.
#include "attention_units.cuh"
#include "mma.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef STAGES
#define STAGES (HEAD_DIM <= 128 ? 6 : HEAD_DIM <= 192 ? 4 : 3)
#endif

constexpr int D = HEAD_DIM;
constexpr int NUM_WARPS = 4;
constexpr int CHUNK = 16;                   // positions
constexpr int ROW_BYTES = D * 2;            // of a position in the ring
constexpr int PER_ROW = ROW_BYTES / 16;     // 16-byte pieces
constexpr int STAGE_BYTES = CHUNK * ROW_BYTES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int MERGE_STRIDE = D + 8;         // floats; + 8: the rows of a fragment fall into different banks
static_assert(D % 16 == 0 && D <= 256, "head size");
static_assert(CHUNK * MERGE_STRIDE * 4 <= RING_BYTES, "a warp's accumulator is merged in its ring");

#if __CUDA_ARCH__ >= 800
// Rows r..r + 7 of one column of 16-byte pieces lie in eight different bank groups once the piece is xored with this.
constexpr u32 SWIZZLE_MASK = PER_ROW % 8 == 0 ? 7 : PER_ROW % 8 == 4 ? 3 : 1;
constexpr u32 SWIZZLE_SHIFT = PER_ROW % 8 == 0 ? 0 : PER_ROW % 8 == 4 ? 1 : 2;
__device__ __forceinline__ u32 swizzle(u32 row) { return row >> SWIZZLE_SHIFT & SWIZZLE_MASK; }
// Bytes from a lane's row to piece `2 i + odd`, where `x` is odd ^ swizzle(row): all but two bits of it constant.
__device__ __forceinline__ u32 piece(u32 i, u32 x) {
    return (2 * i & ~SWIZZLE_MASK) * 16 + ((2 * i & SWIZZLE_MASK) ^ x) * 16;
}

// A warp copies 32 pieces of a chunk at once. After PERIOD such rounds, PERIOD_ROWS rows, the places in shared memory come
// again, but for a constant xor: a lane remembers PERIOD of them.
constexpr u32 ROUNDS = CHUNK * PER_ROW / 32;
constexpr u32 COMMON = PER_ROW & -PER_ROW; // divisor of PER_ROW and 32
constexpr u32 PERIOD = PER_ROW / COMMON, PERIOD_ROWS = 32 / COMMON;

// Asks for a warp's chunks, keys and values in turn.
struct Requests {
    const u8* k;            // this lane's first piece of block 0, of the kv head
    const u8* v;
    const u32* blocks;      // of the sequence
    u64 block_bytes;
    u32 block_shift;        // log2 of B
    u32 end;                // position
    u32 last_chunk;         // one past
    u32 chunk;              // to be asked for next
    u32 block, block_after; // of it, and of the chunk after it
    int lane;
    u32 places[PERIOD];

    __device__ __forceinline__ u32 block_of(u32 c) const { return c < last_chunk ? blocks[c * CHUNK >> block_shift] : 0; }

    __device__ __forceinline__ void start() {
        block = block_of(chunk);
        block_after = block_of(chunk + NUM_WARPS);
    }

    // Always one group, empty when there is nothing left, so that the waits can count. Positions from `end` on become
    // zeros: a weight of zero does not hide a NaN.
    template <bool VALUES>
    __device__ __forceinline__ void next(u32 stage) {
        if (chunk < last_chunk) {
            const u32 position = chunk * CHUNK;
            const u32 in_block = position & ((1u << block_shift) - 1);
            const u8* from = (VALUES ? v : k) + block * block_bytes + in_block * ROW_BYTES;
            const int left = int((end - position) * PER_ROW) - lane; // pieces to `end`
#pragma unroll
            for (u32 i = 0; i < ROUNDS; i++) {
                const u32 same = swizzle(i / PERIOD * PERIOD_ROWS) * 16;
                const u32 to = ((stage + places[i % PERIOD]) ^ same) + i / PERIOD * PERIOD * 512;
                cp_async_16(to, from + i * 512, int(i * 32) < left);
            }
            if (VALUES) {
                chunk += NUM_WARPS;
                block = block_after;
                block_after = block_of(chunk + NUM_WARPS);
            }
        }
        cp_async_commit();
    }
};
#endif

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32) KERNEL(attention_decode)(const DecodeParams p) {
    let_next_start();
    wait_for_inputs();
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) u8 rings[];
    float2(*const of_warp)[16] = reinterpret_cast<float2(*)[16]>(rings + NUM_WARPS * RING_BYTES); // m and l of each head

    const u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 g = lane / 4, t = lane % 4;
    const u32 group = p.num_heads / p.num_kv_heads;
    const float scale = p.scale * LOG2_E;

    u8* const own = rings + warp * RING_BYTES;
    const u32 ring = smem_u32(own);
    // Rows and pieces of this lane's ldmatrix addresses: for keys, tiles (positions 0..7, dims 0..7), (0..7, 8..15),
    // (8..15, 0..7), (8..15, 8..15); for values, which come transposed, (0..7, 0..7), (8..15, 0..7), (0..7, 8..15), ..
    const u32 k_row = lane % 8 + lane / 16 * 8, k_x = (lane / 8 % 2) ^ swizzle(k_row);
    const u32 v_row = lane % 16, v_x = (lane / 16) ^ swizzle(v_row);

    Requests requests;
    requests.block_bytes = u64(p.num_kv_heads) * p.block_size * ROW_BYTES;
    requests.block_shift = log2_of(p.block_size);
    requests.lane = lane;
#pragma unroll
    for (u32 i = 0; i < PERIOD; i++) {
        const u32 at = i * 32 + lane, row = at / PER_ROW;
        requests.places[i] = row * ROW_BYTES + (at % PER_ROW ^ swizzle(row)) * 16;
    }

    const u32 num_items = *p.num_units * p.num_kv_heads;
    for (u32 wave = 0; wave * gridDim.x < num_items; wave++) {
        const u32 item = item_of_wave(wave);
        if (item >= num_items) continue; // the whole block
        const DecodeUnit unit = p.units[item / p.num_kv_heads];
        const u32 kv_head = item % p.num_kv_heads;

        const u32 low = first_visible(unit, p.window), end = unit.end;
        const u32 low_chunk = low / CHUNK;
        const u32 first_chunk = low_chunk + ((warp - low_chunk) & (NUM_WARPS - 1));
        const u32 last_chunk = low < end ? (end + CHUNK - 1) / CHUNK : 0;

        const u64 head_bytes = u64(p.block_size) * ROW_BYTES;
        requests.k = reinterpret_cast<const u8*>(p.k_cache) + kv_head * head_bytes + lane * 16;
        requests.v = reinterpret_cast<const u8*>(p.v_cache) + kv_head * head_bytes + lane * 16;
        requests.blocks = p.block_table + unit.first_block;
        requests.end = end;
        requests.last_chunk = last_chunk;
        requests.chunk = first_chunk;
        requests.start();
#pragma unroll
        for (u32 i = 0; i < STAGES - 1; i++) {
            if (i % 2 == 0) requests.next<false>(ring + i * STAGE_BYTES);
            else requests.next<true>(ring + i * STAGE_BYTES);
        }

        // The query heads as the 16 rows of a left operand, zeros below the last.
        u32 q[D / 16][4];
        const T* q_row = p.qkv + unit.row * (u64(p.num_heads + 2 * p.num_kv_heads) * D) + kv_head * group * D;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 head = g + j % 2 * 8;
                q[i][j] = head < group ? *reinterpret_cast<const u32*>(q_row + head * D + i * 16 + j / 2 * 8 + 2 * t) : 0;
            }

        // Heads g and g + 8 of this lane; `l` over the lane's own positions until the end.
        float acc[D / 8][4] = {};
        float m[2] = {-INF, -INF}, l[2] = {0.f, 0.f};
        u32 stage = 0, free_stage = (STAGES - 1) * STAGE_BYTES; // offsets: to be read next; read before that, or never
        for (u32 chunk = first_chunk; chunk < last_chunk; chunk += NUM_WARPS) {
            // Scores. After the barrier all lanes' copies are there, and all have read the stage that is filled again.
            cp_async_wait<STAGES - 2>();
            __syncwarp();
            requests.next<STAGES % 2 == 0>(ring + free_stage);
            float s[2][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                u32 k[4];
                ldmatrix_x4(k, ring + stage + k_row * ROW_BYTES + piece(i, k_x));
                mma_16x8x16<T>(s[0], q[i], {k[0], k[1]});
                mma_16x8x16<T>(s[1], q[i], {k[2], k[3]});
            }
            free_stage = stage;
            stage = stage == RING_BYTES - STAGE_BYTES ? 0 : stage + STAGE_BYTES;

            // Softmax; s[n][j]: head g + j / 2 * 8, position 8 n + 2 t + j % 2 of the chunk.
            const u32 position = chunk * CHUNK;
            const bool masked = position < low || position + CHUNK > end;
            float top[2] = {m[0], m[1]};
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32 at = position + 8 * n + 2 * t + j % 2;
                    s[n][j] = masked && (at < low || at >= end) ? -INF : s[n][j] * scale;
                    top[j / 2] = fmaxf(top[j / 2], s[n][j]);
                }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                top[r] = fmaxf(top[r], __shfl_xor_sync(ALL_LANES, top[r], 1));
                top[r] = fmaxf(top[r], __shfl_xor_sync(ALL_LANES, top[r], 2));
            }
            if (__any_sync(ALL_LANES, top[0] > m[0] || top[1] > m[1])) { // else times one
                const float keep[2] = {exp2_approx(m[0] - top[0]), exp2_approx(m[1] - top[1])};
#pragma unroll
                for (int r = 0; r < 2; r++) m[r] = top[r], l[r] *= keep[r];
#pragma unroll
                for (int n = 0; n < D / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) acc[n][j] *= keep[j / 2];
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    s[n][j] = exp2_approx(s[n][j] - m[j / 2]);
                    l[j / 2] += s[n][j];
                }
            const u32 weights[4] = {pack2<T>(s[0][0], s[0][1]), pack2<T>(s[0][2], s[0][3]),
                                    pack2<T>(s[1][0], s[1][1]), pack2<T>(s[1][2], s[1][3])};

            // Values.
            cp_async_wait<STAGES - 2>();
            __syncwarp();
            requests.next<STAGES % 2 == 1>(ring + free_stage);
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                u32 v[4];
                ldmatrix_x4_trans(v, ring + stage + v_row * ROW_BYTES + piece(i, v_x));
                mma_16x8x16<T>(acc[2 * i], weights, {v[0], v[1]});
                mma_16x8x16<T>(acc[2 * i + 1], weights, {v[2], v[3]});
            }
            free_stage = stage;
            stage = stage == RING_BYTES - STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        }

        // Merge: each warp's accumulator into its own ring, where nothing is on its way any more.
        __syncwarp();
        float* const mine = reinterpret_cast<float*>(own);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 head = g + r * 8;
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 1);
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 2);
            if (head < group) {
                if (t == 0) of_warp[warp][head] = float2{m[r], l[r]};
#pragma unroll
                for (int n = 0; n < D / 8; n++)
                    store_pair(mine + head * MERGE_STRIDE + n * 8 + 2 * t, acc[n][2 * r], acc[n][2 * r + 1]);
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < group * (D / 2); i += NUM_WARPS * 32) {
            const u32 head = i / (D / 2), d = i % (D / 2) * 2;
            float top = -INF;
#pragma unroll
            for (int w = 0; w < NUM_WARPS; w++) top = fmaxf(top, of_warp[w][head].x);
            float sum = 0.f, x = 0.f, y = 0.f;
#pragma unroll
            for (int w = 0; w < NUM_WARPS; w++) {
                const float weight = weight_of(of_warp[w][head].x, top);
                const float2 part =
                    *reinterpret_cast<const float2*>(rings + w * RING_BYTES + (head * MERGE_STRIDE + d) * 4);
                sum += of_warp[w][head].y * weight;
                x += part.x * weight;
                y += part.y * weight;
            }
            const u32 of_all = kv_head * group + head;
            if (unit.num_splits == 1) {
                const float inverse = inverse_sum(sum);
                store_pair(p.out + (u64(unit.row) * p.num_heads + of_all) * D + d, x * inverse, y * inverse);
            } else {
                const u64 at = u64(unit.slot) * p.num_heads + of_all;
                store_pair(p.partial_out + at * D + d, x, y);
                if (d == 0) store_pair(p.partial_ml + at * 2, top, sum);
            }
        }
        __syncthreads(); // before the rings and of_warp are written again
    }
#endif
}
