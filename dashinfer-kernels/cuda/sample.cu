// Picks a token from each row of logits [R, V], as `sample_row` of the CPU does: src/sample/mod.rs says what, this file how.
//
// argmax   rows that are greedy and nothing else. Several blocks per row; each gives its best to an atomic maximum, the last
//          to arrive writes the id. Limit: memory, 4·V bytes per row.
// sample   all other rows, one block of 512 threads each: log-probabilities, edits, argmax, top-k, top-p, min-p, draw.
//          Limit: one block reads its row two to four times, 4·V bytes each, of which the first comes from memory.
//
// Masses are integers: a weight w <= 1 counts floor(w · 2^44). Integer sums do not depend on their order, so the result is
// the same however the row is split, and atomics are allowed. Every choice is a search for one threshold: the largest key t
// for which the entries with keys >= t have a mass of at least `wanted`.
//
//   top-k  keys are logits, each entry counts 1, wanted = k           ties with the last one kept are kept
//   top-p  keys are weights, entries count their mass, wanted = p · total
//   draw   keys fall as ids rise, entries count their mass, wanted = floor(u · total) + 1
//
// The searches look at a list of likely tokens in shared memory: those at least as large as the n-th largest of the 512
// maxima of the threads, so n at least. Where the list proves too short or too long, they look at the row (`search_row`).
#include "common.cuh"

constexpr u32 THREADS = 512, WARPS = THREADS / 32; // with 1024, each has too few registers
constexpr u32 MAX_LISTED = 2048, PER_THREAD = MAX_LISTED / THREADS;
constexpr u32 MAX_TOP = 64;
// How many thread maxima bound the list for top-p: if values are spread evenly, it gets some 1100 tokens.
constexpr u32 NUCLEUS_RANK = 448;
constexpr u32 NUM_BINS = 2048;
constexpr float MAX_FLOAT = 3.402823466e38f;
constexpr u32 NONE = 0xffffffffu;

// One row; mirrored by `RowParams` in src/cuda/ops/sample.rs. `x_first` counts words of `lists`.
struct Row {
    double u;     // in 0..1, picks the token
    double top_p; // 1 and more: off
    u32 logits_row, index;
    u32 flags;
    u32 top_k;    // 0: off
    u32 num_top;  // at most MAX_TOP
    float inverse_temperature;
    float lowest_weight; // of min-p, at least the smallest normal number
    float repetition, frequency, presence;
    u32 bias_first, num_bias; // ids ascending, then as many values
    u32 prompt_first, num_prompt, generated_first, num_generated;
    u32 carried; // index of a row of the call before, whose token follows `generated`; NONE
    u32 banned_first, num_banned;
    u32 mask_first, num_mask; // words
    u32 table_first, table_size; // words of `tables`, twice `table_size`; a power of two
    u32 copy; // the row of `copies` to edit; NONE: the logits themselves
    u32 pad[2];
};
enum : u32 { GREEDY = 1, EDITED = 2, REPETITION = 4, OUTPUT_PENALTIES = 8, MASK = 16, LOGPROBS = 32 };

// --- keys and weights --------------------------------------------------------------------------------------------------

// Rises with x, 0 and -0 alike; 0 for what is never picked, NaN and -∞.
__device__ __forceinline__ u32 key_of(float x) {
    if (!(x > -INF)) return 0;
    const u32 bits = __float_as_uint(x + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(u32 key) {
    if (key == 0) return -INF;
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
// Larger is better: the key, then the lower id.
__device__ __forceinline__ u64 entry_of(u32 key, u32 id) { return key == 0 ? 0 : u64(key) << 32 | ~id; }

// exp(x) for x <= 0: `exp` of src/sample/softmax.rs to the bit, so without fused multiply-adds.
__device__ __forceinline__ float exp_of(float x) {
    const float rounded = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), 12582912.f);
    const float n = __fsub_rn(rounded, 12582912.f);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 355.f / 512.f)), __fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 0.16666665f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float power = __uint_as_float((__float_as_uint(rounded) << 23) + (127u << 23));
    const float y = __fmul_rn(__fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.f), power);
    return x >= -87.33654f ? y : 0.f;
}

struct Softmax {
    float max, inverse_temperature;
    __device__ __forceinline__ float exponent(float x) const {
        x = x > MAX_FLOAT ? MAX_FLOAT : x;
        return __fmul_rn(__fsub_rn(x, max), inverse_temperature);
    }
    __device__ __forceinline__ float weight(float x) const { return exp_of(exponent(x)); }
    __device__ __forceinline__ float logprob(float x, double log_sum) const {
        const double y = double(exponent(x)) - log_sum;
        return y == y ? float(y) : -INF;
    }
};
// `best`: the key of the largest logit.
__device__ __forceinline__ Softmax softmax_of(u32 best, float inverse_temperature) {
    const float max = of_key(best);
    return {max > MAX_FLOAT ? MAX_FLOAT : max, inverse_temperature};
}

// floor(w · 2^44) for a weight in 0..=1: the mantissa of 24 bits, shifted.
constexpr double MASS_UNIT = 1.0 / (1ull << 44);
__device__ __forceinline__ u64 mass_of(float w) {
    const u32 bits = __float_as_uint(w), shift = 127u - (bits >> 23);
    return (u64((bits & 0x7fffffu) | 0x800000u) << 21) >> (shift < 63u ? shift : 63u);
}

// --- rows --------------------------------------------------------------------------------------------------------------

// A row, in quads of four values; what lies beyond it is NaN.
struct Values {
    const float* from;
    u32 num;
    bool aligned;
    __device__ Values(const float* from, u32 num) : from(from), num(num), aligned(uptr(from) % 16 == 0) {}
    __device__ __forceinline__ u32 num_quads() const { return (num + 3) / 4; }
    __device__ __forceinline__ float at(u32 i) const { return i < num ? from[i] : __uint_as_float(0x7fffffffu); }
    __device__ __forceinline__ Vec<float, 4> quad(u32 q) const {
        const u32 i = 4 * q;
        if (aligned && i + 4 <= num) return load<4>(from + i);
        return {at(i), at(i + 1), at(i + 2), at(i + 3)};
    }
};

// Calls f(id, x) for the values of the quads start, start + step, .. less than last; the next quad is under way meanwhile.
template <typename F>
__device__ __forceinline__ void each_of(const Values& values, u32 start, u32 last, u32 step, F f) {
    const u32 beyond = values.num_quads();
    Vec<float, 4> next = values.quad(start < last ? start : beyond);
#pragma unroll 1
    for (u32 q = start; q < last; q += step) {
        const Vec<float, 4> x = next;
        next = values.quad(q + step < last ? q + step : beyond);
#pragma unroll
        for (int i = 0; i < 4; i++) f(4 * q + i, x.at[i]);
    }
}

// Each warp has a run of quads, so that the run that holds a token can be found from the masses of the warps.
__device__ __forceinline__ void run_of(const Values& values, u32 warp, u32& first, u32& last) {
    const u32 quads = values.num_quads(), per_warp = (quads + WARPS - 1) / WARPS;
    first = min(warp * per_warp, quads);
    last = min(first + per_warp, quads);
}
template <typename F>
__device__ __forceinline__ void each(const Values& values, F f) {
    u32 first, last;
    run_of(values, threadIdx.x / 32, first, last);
    each_of(values, first + threadIdx.x % 32, last, 32, f);
}

// --- the block ---------------------------------------------------------------------------------------------------------

struct Shared {
    // A list of likely tokens or, where none is used, the bins of `search_row`.
    union {
        struct {
            u32 ids[MAX_LISTED];
            float logits[MAX_LISTED];
        } list;
        u64 bins[NUM_BINS];
    };
    u64 of_warp[WARPS];
    u32 num_listed;
    u32 top_ids[MAX_TOP];
    float top_logits[MAX_TOP];
    u32 num_top;
    u32 found;
    u64 above;
    Softmax model; // the row's as it came, at temperature 1
    double log_sum;
};

__device__ __forceinline__ u64 warp_sum(u64 x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}
__device__ __forceinline__ u64 warp_best(u64 x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) {
        const u64 other = __shfl_xor_sync(ALL_LANES, x, lane);
        x = other > x ? other : x;
    }
    return x;
}

// Of the  All threads call these functions, and those below.
__device__ __forceinline__ Shared& shared_memory() {
    __shared__ Shared shared;
    return shared;
}

    __device__ __forceinline__ u64 sum(u64 x) {
    Shared& shared = shared_memory();
    x = warp_sum(x);
    __syncthreads(); // of an earlier use
    if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < WARPS ? shared.of_warp[threadIdx.x % 32] : 0);
}
__device__ __forceinline__ u64 best(u64 x) {
    Shared& shared = shared_memory();
    x = warp_best(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_best(threadIdx.x % 32 < WARPS ? shared.of_warp[threadIdx.x % 32] : 0);
}
// The sum over this thread and those before it; `total`: over all.
__device__ __forceinline__ u64 scan(u64 x, u64& total) {
    Shared& shared = shared_memory();
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 1; step < 32; step <<= 1) {
        const u64 other = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += other;
    }
    __syncthreads();
    if (lane == 31) shared.of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    const u64 mass = lane < WARPS ? shared.of_warp[lane] : 0;
    total = warp_sum(mass);
    return x + warp_sum(lane < threadIdx.x / 32 ? mass : 0);
}

// The n-th largest of the threads' keys.
__device__ __forceinline__ u32 nth_largest(u32 key, u32 n) {
    u32 t = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 0; bit--) {
        const u32 next = t | 1u << bit;
        if (u32(__syncthreads_count(key >= next)) >= n) t = next;
    }
    return t;
}
// The largest t for which the entries with keys >= t have a mass of at least `wanted` (at least 1); 0 if there is none.
// Keys are below 2^bits.
__device__ __forceinline__ u32 search(const u32 (&keys)[PER_THREAD], const u64 (&masses)[PER_THREAD], u64 wanted, int bits) {
    u32 t = 0;
#pragma unroll 1
    for (int bit = bits - 1; bit >= 0; bit--) {
        const u32 next = t | 1u << bit;
        u64 mass = 0;
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) mass += keys[i] >= next ? masses[i] : 0;
        if (sum(mass) >= wanted) t = next;
    }
    return t;
}

// What `search_row` looks for: keys and masses as at the head of this file.
struct Entries {
    enum : u32 { LOGITS, WEIGHTS, TIES } by;
    u32 last_key;    // WEIGHTS: of logits with smaller keys it is 0; TIES: the key that they share
    Softmax softmax; // WEIGHTS
    u32 max_id;      // TIES: keys are max_id - id
    __device__ __forceinline__ u64 at(u32 id, float x, u32& key) const {
        const u32 of_logit = key_of(x);
        if (by == LOGITS) {
            key = of_logit;
            return key != 0;
        }
        if (by == TIES) {
            key = max_id - id;
            return of_logit == last_key;
        }
        const float w = of_logit >= last_key ? softmax.weight(x) : 0.f;
        key = __float_as_uint(w);
        return mass_of(w);
    }
};

// `search` over a row, three passes. Overwrites the list.
__device__ __noinline__ u32 search_row(const Values values, u64 wanted, const Entries entries) {
    Shared& shared = shared_memory();
    u32 prefix = 0;
    u64 above = 0; // the mass of larger prefixes
#pragma unroll 1
    for (int level = 0; level < 3; level++) {
        const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, width = level == 2 ? 10 : 11;
        __syncthreads();
        for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS) shared.bins[i] = 0;
        if (threadIdx.x == 0) shared.found = NONE;
        __syncthreads();
        // A thread adds what falls into one bin in succession at once: often all values share a few bins.
        u32 bin = NONE;
        u64 pending = 0;
        each(values, [&](u32 id, float x) {
            u32 key = 0;
            const u64 mass = entries.at(id, x, key);
            if (mass == 0 || (level > 0 && key >> (shift + width) != prefix)) return;
            const u32 into = key >> shift & ((1u << width) - 1);
            if (into != bin) {
                if (pending != 0) atomicAdd(&shared.bins[bin], pending);
                bin = into;
                pending = 0;
            }
            pending += mass;
        });
        if (pending != 0) atomicAdd(&shared.bins[bin], pending);
        __syncthreads();
        // From the largest bin down, some for each thread.
        constexpr u32 PER = NUM_BINS / THREADS;
        const u32 largest = NUM_BINS - 1 - PER * threadIdx.x;
        u64 mass = 0, total;
        for (u32 i = 0; i < PER; i++) mass += shared.bins[largest - i];
        const u64 until = above + scan(mass, total);
        u64 before = until - mass;
        if (before < wanted && until >= wanted) {
            u32 at = largest;
            while (before + shared.bins[at] < wanted) before += shared.bins[at--];
            shared.found = at;
            shared.above = before;
        }
        __syncthreads();
        if (shared.found == NONE) return 0;
        prefix = prefix << width | shared.found;
        above = shared.above;
    }
    return prefix;
}

// The entry of the thread's largest value, the lowest id of a tie; 0 if it has none.
__device__ __noinline__ u64 largest_of(const Values values) {
    u32 most = 0, at = 0;
    each(values, [&](u32 id, float x) {
        const u32 key = key_of(x);
        if (key > most) {
            most = key;
            at = id;
        }
    });
    return entry_of(most, at);
}

__device__ __forceinline__ void clear_list() {
    Shared& shared = shared_memory();
    __syncthreads();
    if (threadIdx.x == 0) shared.num_listed = 0;
    __syncthreads();
}
__device__ __forceinline__ void list(u32 id, float x) {
    Shared& shared = shared_memory();
    const u32 i = atomicAdd(&shared.num_listed, 1u);
    if (i < MAX_LISTED) {
        shared.list.ids[i] = id;
        shared.list.logits[i] = x;
    }
}

// The thread's share of the list: f(i, id, x); an id of NONE with -∞ where the list is shorter.
template <typename F>
__device__ __forceinline__ void each_listed(F f) {
    const Shared& shared = shared_memory();
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) {
        const u32 at = threadIdx.x + i * THREADS;
        const bool is = at < shared.num_listed;
        f(i, is ? shared.list.ids[at] : NONE, is ? shared.list.logits[at] : -INF);
    }
}

// --- the steps ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_allowed(const u32* mask, u32 num_words, u32 id) {
    return id / 32 < num_words && (mask[id / 32] >> (id % 32) & 1);
}

// `src/sample/edit.rs`: bias, repetition, frequency, presence, then bans and what is not allowed.
//
// Tokens of the history are counted in a table with open addressing, of a size that the history gives; each of its entries
// is then one token. Counts are integers, so the order of the atomics does not matter.
__device__ __noinline__ void edit(float* values, u32 vocab, const Row& row, const u32* lists, const u32* carried_ids, u32* tables) {
    const u32* bias_ids = lists + row.bias_first;
    for (u32 i = threadIdx.x; i < row.num_bias; i += THREADS) {
        const u32 id = bias_ids[i];
        if (id >= vocab || (i > 0 && bias_ids[i - 1] == id)) continue;
        // The first of its id adds all, in their order.
        float x = values[id];
        for (u32 j = i; j < row.num_bias && bias_ids[j] == id; j++)
            x = __fadd_rn(x, __uint_as_float(bias_ids[row.num_bias + j]));
        values[id] = x;
    }
    if (row.flags & (REPETITION | OUTPUT_PENALTIES)) {
        u32* ids = tables + row.table_first;
        u32* counts = ids + row.table_size;
        for (u32 i = threadIdx.x; i < row.table_size; i += THREADS) {
            ids[i] = NONE;
            counts[i] = 0;
        }
        __syncthreads(); // the table, and the bias
        const u32 wrap = row.table_size - 1;
        const u32 num_seen = row.num_prompt + row.num_generated + (row.carried != NONE);
        for (u32 i = threadIdx.x; i < num_seen; i += THREADS) {
            const u32 j = i - row.num_prompt;
            const bool in_prompt = i < row.num_prompt;
            const u32 id = in_prompt ? lists[row.prompt_first + i]
                : j < row.num_generated ? lists[row.generated_first + j] : carried_ids[row.carried];
            if (id >= vocab) continue;
            u32 slot = id * 2654435761u >> 8 & wrap;
            while (true) {
                const u32 old = atomicCAS(ids + slot, NONE, id);
                if (old == NONE || old == id) break;
                slot = (slot + 1) & wrap;
            }
            if (!in_prompt) atomicAdd(counts + slot, 1u);
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < row.table_size; i += THREADS) {
            // Atomics work in the second-level cache; so the first must not answer.
            const u32 id = __ldcg(ids + i), count = __ldcg(counts + i);
            if (id == NONE) continue;
            float x = values[id];
            if (row.flags & REPETITION) x = x > 0.f ? __fdiv_rn(x, row.repetition) : __fmul_rn(x, row.repetition);
            if ((row.flags & OUTPUT_PENALTIES) && count > 0) {
                x = __fsub_rn(x, __fmul_rn(row.frequency, float(count)));
                x = __fsub_rn(x, row.presence);
            }
            values[id] = x;
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.num_banned; i += THREADS) {
        const u32 id = lists[row.banned_first + i];
        if (id < vocab) values[id] = -INF;
    }
    if (row.flags & MASK) {
        const u32* mask = lists + row.mask_first;
        for (u32 id = threadIdx.x; id < vocab; id += THREADS)
            if (!is_allowed(mask, row.num_mask, id)) values[id] = -INF;
    }
    __syncthreads();
}

// The lowest id that may be picked, of a row without a usable logit; 0 if there is none.
__device__ __noinline__ u32 first_allowed(u32 vocab, const Row& row, const u32* lists) {
    Shared& shared = shared_memory();
    for (u32 base = 0; base < vocab; base += THREADS) {
        const u32 id = base + threadIdx.x;
        bool is = id < vocab && (!(row.flags & MASK) || is_allowed(lists + row.mask_first, row.num_mask, id));
        for (u32 i = 0; is && i < row.num_banned; i++) is = lists[row.banned_first + i] != id;
        if (threadIdx.x == 0) shared.found = NONE;
        if (__syncthreads_or(is)) {
            if (is) atomicMin(&shared.found, id);
            __syncthreads();
            return shared.found;
        }
    }
    return 0;
}

// The most likely tokens into shared.top_*, unordered: `num` of them, the lowest ids of those that tie with the last.
__device__ __noinline__ void find_top(const Values raw, u32 num, u32 max_id, int id_bits) {
    Shared& shared = shared_memory();
    // Taken are keys above t, and those of t with a rank of at least r.
    u32 t, r = 0;
    const auto take = [&](u32 id, float x) {
        const u32 key = key_of(x);
        if (key == 0 || key < t || (key == t && max_id - id < r)) return;
        const u32 i = atomicAdd(&shared.num_top, 1u);
        if (i < MAX_TOP) {
            shared.top_ids[i] = id;
            shared.top_logits[i] = x;
        }
    };
    if (shared.num_listed <= MAX_LISTED) {
        u32 keys[PER_THREAD];
        u64 masses[PER_THREAD], above = 0;
        each_listed([&](u32 i, u32, float x) {
            keys[i] = key_of(x);
            masses[i] = keys[i] != 0;
        });
        t = search(keys, masses, num, 32);
        each_listed([&](u32 i, u32 id, float) {
            above += keys[i] > t;
            masses[i] = keys[i] == t;
            keys[i] = max_id - id; // beyond the list its mass is 0
        });
        above = sum(above);
        if (t > 0) r = search(keys, masses, num - above, id_bits);
        __syncthreads();
        each_listed([&](u32, u32 id, float x) { take(id, x); });
    } else {
        t = search_row(raw, num, {Entries::LOGITS});
        u64 above = 0;
        each(raw, [&](u32, float x) { above += key_of(x) > t; });
        above = sum(above);
        if (t > 0) r = search_row(raw, num - above, {Entries::TIES, t, {}, max_id});
        __syncthreads();
        each(raw, take);
    }
    __syncthreads();
}

// Where the running sum of kept masses over the row reaches `u` of its total. Kept are keys from `last_key` and weights from
// `lowest` on.
__device__ __noinline__ u32 draw_from_row(const Values values, double u, const Softmax softmax, u32 last_key, float lowest) {
    Shared& shared = shared_memory();
    const auto mass_at = [&](float x) {
        const float w = key_of(x) >= last_key ? softmax.weight(x) : 0.f;
        return w >= lowest ? mass_of(w) : 0;
    };
    u64 mass = 0;
    each(values, [&](u32, float x) { mass += mass_at(x); });
    mass = warp_sum(mass);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.bins[threadIdx.x / 32] = mass;
    __syncthreads();
    u64 total = 0;
    for (u32 i = 0; i < WARPS; i++) total += shared.bins[i];
    u64 wanted = min(u64(u * double(total)) + 1, total);
    u32 warp = 0;
    while (warp < WARPS - 1 && shared.bins[warp] < wanted) wanted -= shared.bins[warp++];
    u32 first, last;
    run_of(values, warp, first, last);
    if (threadIdx.x == 0) shared.found = 0;
    __syncthreads();
    for (u32 base = first; base < last; base += THREADS) {
        const u32 q = base + threadIdx.x;
        const Vec<float, 4> x = values.quad(q < last ? q : values.num_quads());
        u64 masses[4], sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) sum += masses[i] = mass_at(x.at[i]);
        const u64 until = scan(sum, total);
        u64 before = until - sum;
        if (before < wanted && until >= wanted) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (before < wanted && before + masses[i] >= wanted) shared.found = 4 * q + i;
                before += masses[i];
            }
        }
        if (total >= wanted) break;
        wanted -= total;
    }
    __syncthreads();
    return shared.found;
}

// `src/sample/draw.rs`. `mine`: the thread's largest key, `best`: the row's.
__device__ __noinline__ u32 draw(const Values values, const Row& row, u32 mine, u32 best, u32 max_id, int id_bits) {
    Shared& shared = shared_memory();
    const Softmax softmax = softmax_of(best, row.inverse_temperature);
    const u32 top_k = row.top_k <= max_id ? row.top_k : 0;
    const bool nucleus = row.top_p < 1.0;
    const auto wanted_of = [&](u64 total) {
        const double wanted = ceil(row.top_p * double(total));
        return wanted >= 1.0 ? min(u64(wanted), total) : 1;
    };
    float lowest = row.lowest_weight;
    u32 last_key = 1; // of top-k
    if (top_k != 0 ? top_k <= THREADS : nucleus) {
        const u32 bound = max(nth_largest(mine, top_k != 0 ? top_k : NUCLEUS_RANK), 1u);
        clear_list();
        u64 total = 0;
        if (top_k != 0) {
            each(values, [&](u32 id, float x) {
                if (key_of(x) >= bound) list(id, x);
            });
            __syncthreads();
        } else {
            each(values, [&](u32 id, float x) {
                if (key_of(x) >= bound) list(id, x);
                total += mass_of(softmax.weight(x));
            });
            total = sum(total);
        }
        if (shared.num_listed <= MAX_LISTED) {
            u32 keys[PER_THREAD];
            u64 masses[PER_THREAD], mass = 0;
            if (top_k != 0) {
                each_listed([&](u32 i, u32, float x) {
                    keys[i] = key_of(x);
                    masses[i] = keys[i] != 0;
                });
                last_key = max(search(keys, masses, top_k, 32), 1u);
            }
            each_listed([&](u32 i, u32, float x) {
                const float w = key_of(x) >= last_key ? softmax.weight(x) : 0.f;
                keys[i] = __float_as_uint(w);
                masses[i] = mass_of(w);
                mass += masses[i];
            });
            mass = sum(mass);
            bool enough = true;
            if (nucleus) {
                const u64 wanted = wanted_of(top_k != 0 ? mass : total);
                enough = mass >= wanted;
                if (enough) lowest = fmaxf(lowest, __uint_as_float(search(keys, masses, wanted, 30)));
            }
            if (enough) {
                mass = 0;
                each_listed([&](u32 i, u32 id, float) {
                    if (!(__uint_as_float(keys[i]) >= lowest)) masses[i] = 0;
                    mass += masses[i];
                    keys[i] = max_id - id;
                });
                mass = sum(mass);
                const u64 wanted = min(u64(row.u * double(mass)) + 1, mass);
                return max_id - search(keys, masses, wanted, id_bits);
            }
        }
    }
    // The list is no help: it lacks tokens that are kept, or there was no filter to make one for.
    if (top_k != 0 && last_key == 1) last_key = max(search_row(values, top_k, {Entries::LOGITS}), 1u);
    if (nucleus) {
        u64 total = 0;
        each(values, [&](u32, float x) { total += mass_of(key_of(x) >= last_key ? softmax.weight(x) : 0.f); });
        const u64 wanted = wanted_of(sum(total));
        lowest = fmaxf(lowest, __uint_as_float(search_row(values, wanted, {Entries::WEIGHTS, last_key, softmax})));
    }
    return draw_from_row(values, row.u, softmax, last_key, lowest);
}

// What a launch gives back, in memory of the host. `top_*`: [R, MAX_TOP].
struct Results {
    u32* ids;
    float* logprobs;
    u32* num_top;
    u32* top_ids;
    float* top_logprobs;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(sample)(float* logits, u64 stride, u32 vocab, const Row* rows, const u32* lists, const u32* carried_ids, u32* tables,
               float* copies, u64 copy_stride, u32* ids, Results results) {
    let_next_start();
    wait_for_inputs();
    const Row& row = rows[blockIdx.x];
    const u32 max_id = vocab == 0 ? 0 : vocab - 1, index = row.index;
    const int id_bits = 32 - __clz(max_id);
    Shared& shared = shared_memory();

    float* const raw = logits + row.logits_row * stride;
    u64 mine = 0, most = 0; // entries: the thread's and the row's
    if (row.flags & LOGPROBS) {
        const Values values(raw, vocab);
        mine = largest_of(values);
        most = best(mine);
        const Softmax model = softmax_of(u32(most >> 32), 1.f);
        const u32 num_top = min(row.num_top, MAX_TOP);
        const u32 bound = num_top > 0 ? max(nth_largest(u32(mine >> 32), num_top), 1u) : NONE;
        clear_list();
        u64 total = 0;
        each(values, [&](u32 id, float x) {
            if (key_of(x) >= bound) list(id, x);
            total += mass_of(model.weight(x));
        });
        total = sum(total);
        if (threadIdx.x == 0) {
            shared.model = model;
            shared.log_sum = log(double(total) * MASS_UNIT);
            shared.num_top = 0;
        }
        if (num_top > 0) find_top(values, num_top, max_id, id_bits);
        __syncthreads();
        const u32 found = shared.num_top;
        if (threadIdx.x < found) {
            const u32 id = shared.top_ids[threadIdx.x];
            const float x = shared.top_logits[threadIdx.x];
            const u64 entry = entry_of(key_of(x), id);
            u32 place = 0;
            for (u32 i = 0; i < found; i++) place += entry_of(key_of(shared.top_logits[i]), shared.top_ids[i]) > entry;
            results.top_ids[index * MAX_TOP + place] = id;
            results.top_logprobs[index * MAX_TOP + place] = shared.model.logprob(x, shared.log_sum);
        }
        if (threadIdx.x == 0) results.num_top[index] = found;
    }

    float* changed = raw;
    if (row.flags & EDITED) {
        if (row.copy != NONE) {
            changed = copies + row.copy * copy_stride;
            const Values values(raw, vocab);
            each(values, [&](u32 id, float x) {
                if (id < vocab) changed[id] = x;
            });
            __syncthreads();
        }
        edit(changed, vocab, row, lists, carried_ids, tables);
    }
    const Values values(changed, vocab);
    if ((row.flags & (EDITED | LOGPROBS)) != LOGPROBS) {
        mine = largest_of(values);
        most = best(mine);
    }

    u32 id;
    if (most == 0) id = first_allowed(vocab, row, lists);
    else if (row.flags & GREEDY) id = ~u32(most);
    else id = draw(values, row, u32(mine >> 32), u32(most >> 32), max_id, id_bits);

    if (threadIdx.x == 0) {
        ids[index] = id;
        results.ids[index] = id;
        if (row.flags & LOGPROBS) {
            const float x = id < vocab ? raw[id] : __uint_as_float(0x7fffffffu);
            results.logprobs[index] = shared.model.logprob(x, shared.log_sum);
        }
    }
}

// Block (c, r) looks at `chunk` values of the r-th pair (logits row, index of its result); without pairs both are r.
// `best`, `arrived`: one entry per row, 0, and 0 again afterwards.
extern "C" __global__ void __launch_bounds__(256)
KERNEL(argmax)(const float* logits, u64 stride, u32 vocab, u32 chunk, const uint2* pairs, u64* best, u32* arrived, u32* ids,
               u32* host_ids) {
    __shared__ u64 of_warp[8];
    let_next_start();
    wait_for_inputs();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint2 pair = make_uint2(blockIdx.y, blockIdx.y);
    if (pairs != nullptr) pair = pairs[blockIdx.y];
    const Values values(logits + pair.x * stride, vocab);
    const u32 first = blockIdx.x * (chunk / 4), last = min(first + chunk / 4, values.num_quads());
    u32 most = 0, at = 0;
    each_of(values, first + threadIdx.x, last, 256, [&](u32 id, float x) {
        const u32 key = key_of(x);
        if (key > most) {
            most = key;
            at = id;
        }
    });
    const u64 of_this_warp = warp_best(entry_of(most, at));
    if (lane == 0) of_warp[warp] = of_this_warp;
    __syncthreads();
    if (warp > 0) return;
    const u64 of_block = warp_best(lane < 8 ? of_warp[lane] : 0);
    if (lane > 0) return;
    u64 entry = of_block;
    if (gridDim.x > 1) {
        atomicMax(best + blockIdx.y, of_block);
        __threadfence(); // before this block is seen to have arrived
        if (atomicInc(arrived + blockIdx.y, gridDim.x - 1) != gridDim.x - 1) return;
        __threadfence();
        entry = atomicExch(best + blockIdx.y, 0ull);
    }
    const u32 id = entry == 0 ? 0 : ~u32(entry);
    ids[pair.y] = id;
    host_ids[pair.y] = id;
}
