// nvrtc: sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
// Decode attention over the paged cache, on tensor cores.
//
//   out[row, h, :] = sum_p softmax_p(scale * q[row, h, :] . k[p, h / G, :]) * v[p, h / G, :]      G = H / K <= 16
// With SOFT_CAP scores are capped; a sink joins the softmax of its head (softmax.cuh).
//
// q: heads of qkv [rows, (H + 2 K) * D]   k, v: blocks [K, B, D]   out: [rows, H * D]   all T; sums and softmax in f32.
//
// A block of NUM_WARPS warps takes one unit (attention_units.cuh) and one kv head at a time. The G query heads are rows of
// one 16-row tile. Positions go in chunks of 16, never across a cache block; warp w takes the chunks with index % NUM_WARPS
// == w and knows nothing of the other warps until the end: it has its own ring of chunks in shared memory, filled by
// asynchronous copies and guarded by __syncwarp alone, and its own running softmax and accumulator over all of D. The warps
// merge in shared memory in their order. So a result depends on the row, its ranges and NUM_WARPS only, not on block or batch.
// Four warps, and two or more blocks to a multiprocessor, keep the memory busy; eight are done sooner with a row of a few
// hundred positions, when there are few rows and most of the device has nothing to do.
//
// FUSED: q, k and v of the rows, all of them decodes, come straight from the projection. The block norms and rotates its
// query heads on their way to shared memory (rope.cuh), and the unit with the row's own position, its last, rotates k too,
// puts k and v into the cache, and lays them over their place in the ring, which the copies filled with zeros. All bits are
// those of rope_and_cache followed by this kernel without FUSED; qkv stays as it was.
//
// What is read before wait_for_inputs(): units and block table, which the host copied before the step, as no kernel of a step
// writes them; with FUSED also keys and values before the row's own position, as the only kernel that writes to the cache
// in such a step is this one, at the rows' own positions, and those are in blocks of one sequence alone. All that was written
// before the step is there: a copy stands between two steps, and is no part of programmatic launches
// (docs/decisions/0030-decode-reads-the-cache-early.md).
//
// Shared: rings [NUM_WARPS][STAGES][16][D] T, keys and values of a chunk in two stages, one after the other; m and l of
// the warps [NUM_WARPS][16][2] f32; with FUSED q [16][D], the new k and v [2][D], all T, and sines and cosines [2][D / 2] f32.
// Limit: memory, 4 * K * D bytes a position, each read once. At D = 128 and four warps: 80 KB are on their way in each
// block, two blocks to a multiprocessor of SM90.
#include "attention_units.cuh"
#include "mma.cuh"
#include "rope.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef NUM_WARPS
#define NUM_WARPS 4
#endif
#ifndef STAGES
#define STAGES (HEAD_DIM <= 128 ? 6 : HEAD_DIM <= 192 ? 4 : 3)
#endif
#ifndef BLOCKS
#define BLOCKS 1 // of a multiprocessor, that registers are left for
#endif
#ifndef FUSED
#define FUSED 0
#endif

constexpr int D = HEAD_DIM;
constexpr int CHUNK = 16;                   // positions
constexpr int ROW_BYTES = D * 2;            // of a position in the ring
constexpr int PER_ROW = ROW_BYTES / 16;     // 16-byte pieces
constexpr int STAGE_BYTES = CHUNK * ROW_BYTES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int SUMS = D <= 128 ? 2 : 1;      // of a score: two take half the time from the first product to the last
constexpr int MERGE_STRIDE = D + 8;         // floats; + 8: the rows of a fragment fall into different banks
constexpr u32 AFTER_RINGS = NUM_WARPS * RING_BYTES;
static_assert(D % 16 == 0 && D <= 256, "head size");
static_assert((NUM_WARPS & (NUM_WARPS - 1)) == 0, "warps take chunks by the last bits of their index");
static_assert(CHUNK * MERGE_STRIDE * 4 <= RING_BYTES, "a warp's accumulator is merged in its ring");

#if FUSED
// Of the layer, for q and k of rows that are not rotated yet.
struct DecodeRope {
    T* k_cache; // where `p.k_cache` points
    T* v_cache;
    const float* inv_freq; // [R / 2]
    const float* q_norm;   // [D] or null
    const float* k_norm;
    float rope_scale;
    float norm_eps;
    u32 rotated;           // R, a multiple of 8
    u32 interleaved;
};

// Bytes into shared memory. Pieces of a query head are xored as those in the rings.
constexpr u32 Q_AT = AFTER_RINGS + NUM_WARPS * 16 * 8;
constexpr u32 NEW_AT = Q_AT + 16 * ROW_BYTES;
constexpr u32 TURNS_AT = NEW_AT + 2 * ROW_BYTES;
#endif

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
    u32 end;                // position: what is in the cache ends here
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

#if FUSED && __CUDA_ARCH__ >= 800
constexpr u32 LANES = D / 8 <= 8 ? 8 : D / 8 <= 16 ? 16 : 32; // to a head that is rotated
constexpr u32 NOWHERE = 0xffffffffu;

// Norms and rotates heads of a row on their way to shared memory: the query heads of a kv head and, with `own`, its new key.
struct Heads {
    static constexpr u32 AT_ONCE = NUM_WARPS * 32 / LANES;
    static constexpr u32 ROUNDS = (16 + 2 + AT_ONCE - 1) / AT_ONCE;
    using Four = Vec<T, 4>;
    u32 group, num_heads; // q heads; and with k and v after them
    u32 unit, first;      // this lane's values; its head of the first round
    Four in[ROUNDS][2];

    __device__ __forceinline__ Heads(u32 group, bool own)
        : group(group), num_heads(group + (own ? 2 : 0)), unit(threadIdx.x % LANES), first(threadIdx.x / LANES) {}

    __device__ __forceinline__ bool has(u32 round) const {
        return first + round * AT_ONCE < num_heads && unit < D / 8;
    }

    // `q`, `k`, `v`: the first of these heads in the row.
    __device__ __forceinline__ void read(const EightValues& eight, const T* q, const T* k, const T* v) {
#pragma unroll
        for (u32 round = 0; round < ROUNDS; round++) {
            in[round][0] = in[round][1] = {};
            if (!has(round)) continue;
            const u32 head = first + round * AT_ONCE;
            const T* const from = head < group ? q + head * D : head == group ? k : v;
            in[round][0] = load<4>(from + eight.at[0]);
            in[round][1] = load<4>(from + eight.at[1]);
        }
    }

    // `k_to`, `v_to`: where the cache keeps the row's position. `by`: the weights of the q norm and of the k norm.
    __device__ __forceinline__ void write(const EightValues& eight, bool is_normed, const EightValues::Weights (&by)[2],
                                          float eps, u8* smem, T* k_to, T* v_to) {
#pragma unroll
        for (u32 round = 0; round < ROUNDS; round++) {
            if (round * AT_ONCE >= num_heads) break; // whole blocks, for the sums
            const u32 head = first + round * AT_ONCE;
            const bool is_q = head < group, is_v = head > group;
            Four(&out)[2] = in[round];
            float a[4], b[4];
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = to_float(out[0].at[j]), b[j] = to_float(out[1].at[j]);
            if (is_normed) {
                const float scale = EightValues::norm_scale(a, b, LANES, D, eps);
                EightValues::Weights of_head; // chosen value by value: an address to choose by would put them into memory
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    of_head.a.at[j] = is_q ? by[0].a.at[j] : by[1].a.at[j];
                    of_head.b.at[j] = is_q ? by[0].b.at[j] : by[1].b.at[j];
                }
                if (!is_v) EightValues::norm(a, b, scale, of_head);
            }
            if (!is_v) {
                eight.rotate(a, b);
#pragma unroll
                for (int j = 0; j < 4; j++) out[0].at[j] = from_float<T>(a[j]), out[1].at[j] = from_float<T>(b[j]);
            }
            if (!has(round)) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 at = eight.at[i];
                if (is_q) {
                    u8* const piece = smem + Q_AT + head * ROW_BYTES + (at / 8 ^ swizzle(head)) * 16;
                    store<4>(reinterpret_cast<T*>(piece) + at % 8, out[i]);
                } else {
                    store<4>(reinterpret_cast<T*>(smem + NEW_AT + (is_v ? ROW_BYTES : 0)) + at, out[i]);
                    store<4>((is_v ? v_to : k_to) + at, out[i]);
                }
            }
        }
    }
};

// The warp lays a row of shared memory over row `row` of a stage.
__device__ __forceinline__ void lay_over(u8* stage, const u8* from, u32 row, u32 lane) {
    if (lane < PER_ROW) {
        const uint4 piece = *reinterpret_cast<const uint4*>(from + lane * 16);
        *reinterpret_cast<uint4*>(stage + row * ROW_BYTES + (lane ^ swizzle(row)) * 16) = piece;
    }
    __syncwarp();
}
#endif

#if FUSED
extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, BLOCKS)
    KERNEL(attention_decode)(const DecodeParams p, const DecodeRope rope) {
#else
extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32, BLOCKS) KERNEL(attention_decode)(const DecodeParams p) {
#endif
    let_next_start();
#if __CUDA_ARCH__ >= 800
    const u32 num_items = *p.num_units * p.num_kv_heads;
    if (blockIdx.x >= num_items) {
        // Nothing to do in any turn. It is enough that one block of a grid waits: the grid is not done before that one is. The
        // others make room at once.
        if (blockIdx.x == 0) wait_for_inputs();
        return;
    }
    extern __shared__ __align__(128) u8 rings[];
    float2(*const of_warp)[16] = reinterpret_cast<float2(*)[16]>(rings + AFTER_RINGS); // m and l of each head

    const u32 warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 g = lane / 4, t = lane % 4;
    const u32 group = p.num_heads / p.num_kv_heads;
    const Scores scores(p.scale, p.soft_cap);

    u8* const own = rings + warp * RING_BYTES;
    const u32 ring = smem_u32(own);
    // Rows and pieces of this lane's ldmatrix addresses: for keys, tiles (positions 0..7, dims 0..7), (0..7, 8..15),
    // (8..15, 0..7), (8..15, 8..15); for values, which come transposed, and for queries, (0..7, 0..7), (8..15, 0..7),
    // (0..7, 8..15), ..
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
#if FUSED
    for (u32 i = threadIdx.x; i < 16 * PER_ROW; i += NUM_WARPS * 32) // heads that there are not stay zeros
        *reinterpret_cast<uint4*>(rings + Q_AT + i * 16) = uint4{0, 0, 0, 0};
#endif

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
        requests.last_chunk = last_chunk;
        requests.chunk = first_chunk;
        const T* const row = p.qkv + unit.row * (u64(p.num_heads + 2 * p.num_kv_heads) * D);
#if FUSED
        const bool has_own = low < end && end == unit.context_len; // the row's own position
        const u32 own_chunk = has_own ? last_chunk - 1 : NOWHERE;
        requests.end = has_own ? end - 1 : end;
#else
        requests.end = end;
        if (wave == 0) wait_for_inputs();
#endif
        requests.start();
#pragma unroll
        for (u32 i = 0; i < STAGES - 1; i++) {
            if (i % 2 == 0) requests.next<false>(ring + i * STAGE_BYTES);
            else requests.next<true>(ring + i * STAGE_BYTES);
        }

        // The query heads as the 16 rows of a left operand, zeros below the last.
        u32 q[D / 16][4];
#if FUSED
        float* const turns = reinterpret_cast<float*>(rings + TURNS_AT);
        const u32 position = unit.context_len == 0 ? 0 : unit.context_len - 1;
        for (u32 pair = threadIdx.x; pair < rope.rotated / 2; pair += NUM_WARPS * 32)
            turn_by(position, rope.inv_freq[pair], rope.rope_scale, turns + pair, turns + D / 2 + pair);
        u64 slot = 0; // the row's own, in rows of D
        if (has_own) {
            const u32 block = requests.blocks[position >> requests.block_shift];
            slot = (u64(block) * p.num_kv_heads + kv_head) * p.block_size + (position & (p.block_size - 1));
        }
        Heads heads(group, has_own);
        __syncthreads();
        const EightValues eight(heads.unit, rope.rotated / 2, rope.interleaved != 0, turns, turns + D / 2);
        const bool is_normed = rope.q_norm != nullptr;
        EightValues::Weights norms[2] = {};
        if (is_normed && heads.unit < D / 8) norms[0] = eight.weights(rope.q_norm), norms[1] = eight.weights(rope.k_norm);
        if (wave == 0) wait_for_inputs();
        const T* const own_k = row + (p.num_heads + kv_head) * D;
        heads.read(eight, row + kv_head * group * D, own_k, own_k + p.num_kv_heads * D);
        heads.write(eight, is_normed, norms, rope.norm_eps, rings, rope.k_cache + slot * D, rope.v_cache + slot * D);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < D / 16; i++) ldmatrix_x4(q[i], smem_u32(rings) + Q_AT + v_row * ROW_BYTES + piece(i, v_x));
#else
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 head = g + j % 2 * 8;
                const T* const from = row + (kv_head * group + head) * D + i * 16 + j / 2 * 8 + 2 * t;
                q[i][j] = head < group ? *reinterpret_cast<const u32*>(from) : 0;
            }
#endif

        // Heads g and g + 8 of this lane; `l` over the lane's own positions until the end.
        float acc[D / 8][4] = {};
        float m[2] = {-INF, -INF}, l[2] = {0.f, 0.f};
        u32 stage = 0, free_stage = (STAGES - 1) * STAGE_BYTES; // offsets: to be read next; read before that, or never
        for (u32 chunk = first_chunk; chunk < last_chunk; chunk += NUM_WARPS) {
            // Scores. After the barrier all lanes' copies are there, and all have read the stage that is filled again.
            cp_async_wait<STAGES - 2>();
            __syncwarp();
            requests.next<STAGES % 2 == 0>(ring + free_stage);
#if FUSED
            if (chunk == own_chunk) lay_over(own + stage, rings + NEW_AT, (end - 1) % CHUNK, lane);
#endif
            float sums[SUMS][2][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                u32 k[4];
                ldmatrix_x4(k, ring + stage + k_row * ROW_BYTES + piece(i, k_x));
                mma_16x8x16<T>(sums[i % SUMS][0], q[i], {k[0], k[1]});
                mma_16x8x16<T>(sums[i % SUMS][1], q[i], {k[2], k[3]});
            }
            float(&s)[2][4] = sums[0];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) if (SUMS == 2) s[n][j] += sums[SUMS - 1][n][j];
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
                    s[n][j] = masked && (at < low || at >= end) ? -INF : scores.capped(s[n][j] * scores.scale);
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
#if FUSED
            if (chunk == own_chunk) lay_over(own + stage, rings + NEW_AT + ROW_BYTES, (end - 1) % CHUNK, lane);
#endif
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
                const float inverse = inverse_with_sink(top, sum, p.sinks, of_all);
                store_pair(p.out + (u64(unit.row) * p.num_heads + of_all) * D + d, x * inverse, y * inverse);
            } else {
                const u64 at = u64(unit.slot) * p.num_heads + of_all;
                store_pair(p.partial_out + at * D + d, x, y);
                if (d == 0) store_pair(p.partial_ml + at * 2, top, sum);
            }
        }
        const u32 first_head = kv_head * group;
        if (unit.num_splits > 1 && is_last_part(p, unit, first_head)) merge_parts<4, 8>(p, unit, first_head, group, D);
        __syncthreads(); // before the rings and of_warp are written again
    }
#endif
}
