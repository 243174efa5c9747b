// Picks a token from each row of logits [R, V], as `sample_row` of the CPU does: src/sample/mod.rs says what, this file how.
//
// argmax   rows that are greedy and nothing else. Several blocks per row; each gives its best to an atomic maximum, the last
//          to arrive writes the id. Limit: memory, 4·V bytes per row.
//
// All other rows are jobs, and a row whose log-probabilities are wanted is two: one for those and one for the token. Several
// blocks share a job; the last of them to arrive decides, the next kernel goes on from there (`State`).
//
// fetch    the parameters, from the host's memory
// prepare  copies of rows, masks                    only if there are any
// edit     bias, penalties, bans                    only if there are any; one block per row
// maxima   the row's largest logit, and that of every 16. Last: a bound that enough logits reach for top-k; greedy: the id
// weigh    weights relative to the largest: their mass in every 512, for top-p by size too; with top-k instead a list of the
//          logits that reach the bound. Last: for top-p the bin of its threshold, else the token
// narrow   top-p alone: the mass of what is above the bin in every 512, and a list of what is in it. Last: the token
//
// Limit: memory, 4·V bytes per row and pass. Top-k and `narrow` pass over what the maxima rule out. A list that is too short
// for what it should hold (thousands of ties) leaves its job to the one last block, with passes over all of the row.
//
// Masses are integers: a weight w <= 1 counts floor(w · 2^44). Integer sums do not depend on their order, so the result is
// the same however the row is split, and atomics are allowed. Every choice is a search for one threshold: the largest key t
// for which the entries with keys >= t have a mass of at least `wanted`.
//
//   top-k  keys are logits, each entry counts 1, wanted = k           ties with the last one kept are kept
//   top-p  keys are weights, entries count their mass, wanted = p · total
//   draw   keys fall as ids rise, entries count their mass, wanted = floor(u · total) + 1
#include "common.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32;
constexpr u32 EDIT_THREADS = 1024; // most of `edit` is waiting for memory
// A warp reads runs of 512 values, a lane 16 of each: the quads lane, lane + 32, ..
constexpr u32 QUADS = 4, PER_LANE = 4 * QUADS, RUN_QUADS = 32 * QUADS, RUN = 4 * RUN_QUADS;
constexpr u32 MAX_RUNS = 2048; // of the largest vocabulary, 2^20 - 1
constexpr u32 MAX_LISTED = 4096;
constexpr u32 MAX_TOP = 64;
// Bins of weights by size: 1, then 32 for each power of two down to 2^-32. What is smaller has none.
constexpr u32 NUM_BINS = 1024, BIN_BITS = 18, FIRST_BIN = 0x3f800000u >> BIN_BITS;
constexpr u32 NUM_FINE_BINS = 2048; // of `search`
// Blocks of a pass that a multiprocessor has at least: 64 registers for a thread, or what it takes to spill none.
#if __CUDA_ARCH__ >= 900
constexpr u32 PASS_BLOCKS = 4;
#elif __CUDA_ARCH__ >= 750
constexpr u32 PASS_BLOCKS = 3;
#else
constexpr u32 PASS_BLOCKS = 2;
#endif
constexpr u32 MAX_TABLE = 4096;     // entries of a table in shared memory
constexpr float MAX_FLOAT = 3.402823466e38f;
constexpr u32 NONE = 0xffffffffu;

// What is to be done with one row; mirrored by `Job` in src/cuda/ops/sample/plan.rs. `x_first` counts words of `lists`.
struct Job {
    double u;     // in 0..1, picks the token
    double top_p; // 1 and more: off
    u32 logits_row, index;
    u32 flags;
    u32 rank; // how many of the largest are wanted: top-k, or the log-probabilities; 0: off
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
    u32 pad;
};
enum : u32 {
    GREEDY = 1,
    EDITED = 2, // has work for `edit`
    REPETITION = 4,
    OUTPUT_PENALTIES = 8,
    MASK = 16,
    LOGPROBS = 32, // is for the log-probabilities, and picks no token
    NUCLEUS = 64,  // top-p without top-k
    LISTED = 128,  // `rank` is not 0
};

// What the kernels tell each other about a job.
struct State {
    u64 best;          // the entry of its largest logit (the id only for greedy ones), 0: none; or the token is picked
    u64 above, wanted; // NUCLEUS: the mass of larger bins, and what is to be reached
    u32 bin;
    u32 bound;         // LISTED: as many logits as are wanted reach this key
    u32 num_listed;
    u32 pad;
};

// Mirrored by `Call` in src/cuda/ops/sample.rs. [J]: one for each job.
struct Call {
    float* logits;
    u64 stride;
    float* copies;
    u64 copy_stride;
    const Job* jobs;
    const u32* lists;
    const u32* carried_ids;
    u32* tables;
    u64* best;     // [J], all 0, and 0 again afterwards
    u32* arrived;  // [J], likewise
    State* states; // [J]
    u32* maxima;   // [J, num_runs, 32] keys
    u64* masses;   // [J, num_runs]
    u64* bins;     // [J, NUM_BINS]
    uint2* listed; // [J, MAX_LISTED]: id, and bits of the logit or, in `narrow`, of the weight
    u32* ids;      // for the next step
    // What the host gets, in its memory.
    u64* totals; // LOGPROBS: the mass at temperature 1
    u32* host_ids;
    float* picked; // the picked token's logit, before edits if LOGPROBS is wanted
    float* largest;
    u32* num_top;
    u32* top_ids; // [R, MAX_TOP]
    float* top_logits;
    u32 vocab, num_runs;
};

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
};
// `best`: the key of the largest logit.
__device__ __forceinline__ Softmax softmax_of(u32 best, float inverse_temperature) {
    const float max = of_key(best);
    return {max > MAX_FLOAT ? MAX_FLOAT : max, inverse_temperature};
}

// floor(w · 2^44) for a weight in 0..=1: the mantissa of 24 bits, shifted.
__device__ __forceinline__ u64 mass_of(float w) {
    const u32 bits = __float_as_uint(w), shift = 127u - (bits >> 23);
    return (u64((bits & 0x7fffffu) | 0x800000u) << 21) >> (shift < 63u ? shift : 63u);
}

// Which logits are kept: by key (top-k) and by weight (top-p, min-p).
struct Kept {
    Softmax softmax;
    u32 last_key;
    float lowest;
    __device__ __forceinline__ u64 mass(float x) const {
        const float w = softmax.weight(x);
        return key_of(x) >= last_key && w >= lowest ? mass_of(w) : 0;
    }
};
__device__ __forceinline__ u64 wanted_of(double top_p, u64 total) {
    const double wanted = ceil(top_p * double(total));
    return wanted >= 1.0 ? min(u64(wanted), total) : 1;
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

// The values of a lane in a run.
struct Lane {
    Vec<float, 4> quads[QUADS];
};
__device__ __forceinline__ u32 id_at(u32 run, u32 i) { return 4 * (run * RUN_QUADS + threadIdx.x % 32 + 32 * (i / 4)) + i % 4; }
__device__ __forceinline__ Lane load_run(const Values& values, u32 run) {
    Lane x;
    const u32 first = run * RUN_QUADS + threadIdx.x % 32;
    if (values.aligned && (run + 1) * RUN <= values.num) {
#pragma unroll
        for (u32 j = 0; j < QUADS; j++) x.quads[j] = load<4>(values.from + 4 * (first + 32 * j));
    } else {
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) x.quads[i / 4].at[i % 4] = values.at(id_at(run, i));
    }
    return x;
}
// Calls f(i, x) for the 16 values, in code for N: a row alone is over so soon that fetching the code is a part of its time.
template <u32 N, typename F>
__device__ __forceinline__ void each_value(Lane x, F f) {
#pragma unroll 1
    for (u32 first = 0; first < PER_LANE; first += N) {
#pragma unroll
        for (u32 i = 0; i < N; i++) f(first + i, x.quads[i / 4].at[i % 4]);
#pragma unroll
        for (u32 i = N; i < PER_LANE; i++) x.quads[(i - N) / 4].at[(i - N) % 4] = x.quads[i / 4].at[i % 4];
    }
}

// Calls f(run) for each run of this warp, of those that the blocks of a job share; all lanes do.
template <typename F>
__device__ __forceinline__ void each_run(u32 num_runs, F f) {
#pragma unroll 1
    for (u32 run = blockIdx.x * WARPS + threadIdx.x / 32; run < num_runs; run += gridDim.x * WARPS) f(run);
}

// What `search` goes through. f(id, x) comes for all values, from all threads of one block.
struct WholeRow {
    Values values;
    template <typename F>
    __device__ __forceinline__ void each(F f) const {
        const u32 num_runs = (values.num + RUN - 1) / RUN;
#pragma unroll 1
        for (u32 run = threadIdx.x / 32; run < num_runs; run += WARPS) {
            each_value<1>(load_run(values, run), [&](u32 i, float x) { f(id_at(run, i), x); });
        }
    }
};
struct List {
    const uint2* from;
    u32 num;
    template <typename F>
    __device__ __forceinline__ void each(F f) const {
        for (u32 i = threadIdx.x; i < num; i += THREADS) f(from[i].x, __uint_as_float(from[i].y));
    }
};

// --- the block ---------------------------------------------------------------------------------------------------------

struct Shared {
    union {
        // Sums of mantissas, of 24 bits: the lower 12 and the upper 12, since atomics of 64 bits are slow here.
        struct {
            u32 low[NUM_BINS], high[NUM_BINS];
        } bins;
        u64 fine_bins[NUM_FINE_BINS];
        // A short list, one entry for each thread.
        struct {
            u64 masses[THREADS];
            u32 keys[THREADS], ids[THREADS];
        } few;
    };
    u64 of_warp[WARPS];
    u64 before;
    u32 found, num_found;
    u32 is_last;
};
__device__ __forceinline__ Shared& shared_memory() {
    __shared__ Shared shared;
    return shared;
}

__device__ __forceinline__ u64 warp_best(u64 x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) {
        const u64 other = __shfl_xor_sync(ALL_LANES, x, lane);
        x = other > x ? other : x;
    }
    return x;
}

// All threads of a block call the functions below.

// Whether all other blocks of the job were here before; what they wrote can be read then.
__device__ __forceinline__ bool is_last(u32* arrived) {
    Shared& shared = shared_memory();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence(); // what the block wrote comes before, what it reads from here on after
        shared.is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return shared.is_last;
}
__device__ __forceinline__ u64 sum(u64 x) {
    Shared& shared = shared_memory();
    x = warp_sum(x);
    __syncthreads(); // of an earlier use
    if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < WARPS ? shared.of_warp[threadIdx.x % 32] : 0);
}
// The sum over this thread and those before it.
__device__ __forceinline__ u64 scan(u64 x) {
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
    return x + warp_sum(lane < threadIdx.x / 32 ? shared.of_warp[lane] : 0);
}

// Each thread has N masses, mass_at(0), .., which follow those of the thread before it. The place at which their running sum
// reaches `wanted` (at least 1), and the sum in front of it; NONE if it does not.
template <u32 N, typename F>
__device__ __forceinline__ u32 find(u64 wanted, u64& before, F mass_at) {
    Shared& shared = shared_memory();
    u64 mine = 0;
#pragma unroll
    for (u32 i = 0; i < N; i++) mine += mass_at(i);
    if (threadIdx.x == 0) shared.found = NONE;
    const u64 until = scan(mine);
    u64 sum = until - mine;
    if (sum < wanted && until >= wanted) {
        u32 i = 0;
#pragma unroll 1
        for (u64 next; (next = sum + mass_at(i)) < wanted; i++) sum = next;
        shared.found = threadIdx.x * N + i;
        shared.before = sum;
    }
    __syncthreads();
    const u32 found = shared.found;
    before = shared.before;
    __syncthreads();
    return found;
}

__device__ __forceinline__ void clear_bins() {
    Shared& shared = shared_memory();
    __syncthreads();
    for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS) shared.bins.low[i] = shared.bins.high[i] = 0;
    __syncthreads();
}
// `mantissas`: below 2^32.
__device__ __forceinline__ void add_to_bin(u32 bin, u32 mantissas) {
    Shared& shared = shared_memory();
    atomicAdd(&shared.bins.low[bin], mantissas & 0xfffu);
    atomicAdd(&shared.bins.high[bin], mantissas >> 12);
}
// The mantissa of a weight, without the bits that its mass lacks; `shift`: as in `mass_of`.
__device__ __forceinline__ u32 mantissa_of(u32 bits, u32 shift) {
    return ((bits & 0x7fffffu) | 0x800000u) & NONE << (shift > 21 ? shift - 21 : 0);
}
// The mass of a bin, whose weights have one exponent.
__device__ __forceinline__ u64 bin_mass(u32 bin, u32 shift) {
    const Shared& shared = shared_memory();
    const u64 mantissas = (u64(shared.bins.high[bin]) << 12) + shared.bins.low[bin];
    return shift <= 21 ? mantissas << (21 - shift) : mantissas >> (shift - 21);
}
__device__ __forceinline__ u32 shift_of_bin(u32 bin) { return (bin + 31) / 32; }

// What `search` looks for: keys and masses as at the head of this file.
struct Entries {
    enum : u32 { LOGITS, WEIGHTS, TIES, IDS } by;
    Kept kept;  // WEIGHTS: with logits whose keys are too small it has no mass; TIES: `last_key` is the key that they share
    u32 max_id; // TIES, IDS: keys are max_id - id
    __device__ __forceinline__ u64 at(u32 id, float x, u32& key) const {
        const u32 of_logit = key_of(x);
        if (by == LOGITS) {
            key = of_logit;
            return key != 0;
        }
        if (by == WEIGHTS) {
            key = __float_as_uint(kept.softmax.weight(x));
            return of_logit >= kept.last_key ? mass_of(__uint_as_float(key)) : 0;
        }
        key = max_id - id;
        return by == TIES ? of_logit == kept.last_key : kept.mass(x);
    }
};

// The largest t for which the entries with keys >= t have a mass of at least `wanted` (at least 1); 0 if there is none.
// Three passes.
template <typename From>
__device__ __noinline__ u32 search(const From from, u64 wanted, const Entries entries) {
    Shared& shared = shared_memory();
    u32 prefix = 0;
    u64 above = 0; // the mass of larger prefixes
#pragma unroll 1
    for (int level = 0; level < 3; level++) {
        const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, width = level == 2 ? 10 : 11;
        __syncthreads();
        for (u32 i = threadIdx.x; i < NUM_FINE_BINS; i += THREADS) shared.fine_bins[i] = 0;
        __syncthreads();
        // A thread adds what falls into one bin in succession at once: often all values share a few bins.
        u32 bin = NONE;
        u64 pending = 0;
        from.each([&](u32 id, float x) {
            u32 key = 0;
            const u64 mass = entries.at(id, x, key);
            if (mass == 0 || (level > 0 && key >> (shift + width) != prefix)) return;
            const u32 into = key >> shift & ((1u << width) - 1);
            if (into != bin) {
                if (pending != 0) atomicAdd(&shared.fine_bins[bin], pending);
                bin = into;
                pending = 0;
            }
            pending += mass;
        });
        if (pending != 0) atomicAdd(&shared.fine_bins[bin], pending);
        __syncthreads();
        // From the largest bin down.
        constexpr u32 N = NUM_FINE_BINS / THREADS;
        u64 before;
        const u32 found = find<N>(wanted - above, before,
                                  [&](u32 i) { return shared.fine_bins[NUM_FINE_BINS - 1 - threadIdx.x * N - i]; });
        if (found == NONE) return 0;
        prefix = prefix << width | (NUM_FINE_BINS - 1 - found);
        above += before;
    }
    return prefix;
}

// --- before the passes -------------------------------------------------------------------------------------------------

// The parameters are read from the host's memory while earlier kernels run. `num`: of 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(fetch)(uint4* to, const uint4* from, u32 num) {
    let_next_start();
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    uint4 x = {};
    if (i < num) x = __ldcv(from + i);
    wait_for_inputs();
    if (i < num) to[i] = x;
}

__device__ __forceinline__ float* raw_of(const Call& call, const Job& job) { return call.logits + job.logits_row * call.stride; }
__device__ __forceinline__ float* row_of(const Call& call, const Job& job) {
    return job.copy == NONE ? raw_of(call, job) : call.copies + job.copy * call.copy_stride;
}
__device__ __forceinline__ bool is_allowed(const u32* mask, u32 num_words, u32 id) {
    return id / 32 < num_words && (mask[id / 32] >> (id % 32) & 1);
}

// Copies a row, or bans what its mask does not allow, or both. `edit` comes later, and leaves banned what is.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(prepare)(const Call call) {
    let_next_start();
    wait_for_inputs();
    const Job& job = call.jobs[blockIdx.y];
    if (job.copy == NONE && !(job.flags & MASK)) return;
    const Values values(raw_of(call, job), call.vocab);
    float* const to = row_of(call, job);
    const u32* mask = call.lists + job.mask_first;
    each_run(call.num_runs, [&](u32 run) {
        each_value<4>(load_run(values, run), [&](u32 i, float x) {
            const u32 id = id_at(run, i);
            const bool banned = job.flags & MASK && !is_allowed(mask, job.num_mask, id);
            if (id < call.vocab && (banned || job.copy != NONE)) to[id] = banned ? -INF : x;
        });
    });
}

// `src/sample/edit.rs`: bias, repetition, frequency, presence, bans. Block j has the j-th job.
//
// Tokens of the history are counted in a table with open addressing, of a size that the history gives; each of its entries
// is then one token. Counts are integers, so the order of the atomics does not matter.
extern "C" __global__ void __launch_bounds__(EDIT_THREADS) KERNEL(edit)(const Call call) {
    __shared__ u32 small_table[2 * MAX_TABLE];
    let_next_start();
    wait_for_inputs();
    const Job& job = call.jobs[blockIdx.x];
    if (!(job.flags & EDITED)) return;
    const u32 vocab = call.vocab;
    const u32* const lists = call.lists;
    float* const values = row_of(call, job);
    const auto put = [&](u32 id, float x) {
        values[id] = job.flags & MASK && !is_allowed(lists + job.mask_first, job.num_mask, id) ? -INF : x;
    };
    const u32* bias_ids = lists + job.bias_first;
    for (u32 i = threadIdx.x; i < job.num_bias; i += EDIT_THREADS) {
        const u32 id = bias_ids[i];
        if (id >= vocab || (i > 0 && bias_ids[i - 1] == id)) continue;
        // The first of its id adds all, in their order.
        float x = values[id];
        for (u32 j = i; j < job.num_bias && bias_ids[j] == id; j++)
            x = __fadd_rn(x, __uint_as_float(bias_ids[job.num_bias + j]));
        put(id, x);
    }
    if (job.flags & (REPETITION | OUTPUT_PENALTIES)) {
        u32* const ids = job.table_size <= MAX_TABLE ? small_table : call.tables + job.table_first;
        u32* const counts = ids + job.table_size;
        for (u32 i = threadIdx.x; i < job.table_size; i += EDIT_THREADS) {
            ids[i] = NONE;
            counts[i] = 0;
        }
        __syncthreads(); // the table, and the bias
        const u32 wrap = job.table_size - 1;
        const u32 num_seen = job.num_prompt + job.num_generated + (job.carried != NONE);
        for (u32 i = threadIdx.x; i < num_seen; i += EDIT_THREADS) {
            const u32 j = i - job.num_prompt;
            const bool in_prompt = i < job.num_prompt;
            const u32 id = in_prompt ? lists[job.prompt_first + i]
                : j < job.num_generated ? lists[job.generated_first + j] : call.carried_ids[job.carried];
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
        for (u32 i = threadIdx.x; i < job.table_size; i += EDIT_THREADS) {
            // Atomics on a table in memory work in the second-level cache; so the first must not answer.
            const volatile u32* const at = ids + i;
            const u32 id = *at, count = at[job.table_size];
            if (id == NONE) continue;
            float x = values[id];
            if (job.flags & REPETITION) x = x > 0.f ? __fdiv_rn(x, job.repetition) : __fmul_rn(x, job.repetition);
            if ((job.flags & OUTPUT_PENALTIES) && count > 0) {
                x = __fsub_rn(x, __fmul_rn(job.frequency, float(count)));
                x = __fsub_rn(x, job.presence);
            }
            put(id, x);
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < job.num_banned; i += EDIT_THREADS) {
        const u32 id = lists[job.banned_first + i];
        if (id < vocab) values[id] = -INF;
    }
}

// --- maxima ------------------------------------------------------------------------------------------------------------

// The lowest id that may be picked, of a row without a usable logit; 0 if there is none.
__device__ __noinline__ u32 first_allowed(u32 vocab, const Job& job, const u32* lists) {
    Shared& shared = shared_memory();
    for (u32 base = 0; base < vocab; base += THREADS) {
        const u32 id = base + threadIdx.x;
        bool is = id < vocab && (!(job.flags & MASK) || is_allowed(lists + job.mask_first, job.num_mask, id));
        for (u32 i = 0; is && i < job.num_banned; i++) is = lists[job.banned_first + i] != id;
        if (threadIdx.x == 0) shared.found = NONE;
        if (__syncthreads_or(is)) {
            if (is) atomicMin(&shared.found, id);
            __syncthreads();
            return shared.found;
        }
    }
    return 0;
}

// A key, at least 1, that n of the values reach whose maxima these are (all values do, if so few are above -∞), and not many
// more: the n-th largest maximum, or little below it.
__device__ __noinline__ u32 bound_of(const u32* maxima, u32 num, u32 n) {
    u32 mine = 0;
    for (u32 i = threadIdx.x; i < num; i += THREADS) mine = max(mine, maxima[i]);
    const bool few = n <= THREADS * 3 / 4; // the largest of each thread are enough to tell
    u32 t = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 0; bit--) {
        const u32 next = t | 1u << bit;
        u32 count;
        if (few) {
            count = __syncthreads_count(mine >= next);
        } else {
            u32 own = 0;
            for (u32 i = threadIdx.x; i < num; i += THREADS) own += maxima[i] >= next;
            count = u32(sum(own));
        }
        if (count < n) continue;
        t = next;
        if (count <= n + n / 8) break;
    }
    return max(t, 1u);
}

// One thread: the token of a job.
__device__ __forceinline__ void put_token(const Call& call, const Job& job, u32 id) {
    call.ids[job.index] = id;
    call.host_ids[job.index] = id;
    call.picked[job.index] = id < call.vocab ? raw_of(call, job)[id] : __uint_as_float(0x7fffffffu);
}

extern "C" __global__ void __launch_bounds__(THREADS, PASS_BLOCKS) KERNEL(maxima)(const Call call) {
    Shared& shared = shared_memory();
    let_next_start();
    wait_for_inputs();
    const Job& job = call.jobs[blockIdx.y];
    const u32 flags = job.flags, num_maxima = call.num_runs * 32;
    const Values values(row_of(call, job), call.vocab);
    u32* const maxima = call.maxima + size_t(blockIdx.y) * num_maxima;
    if (flags & NUCLEUS && blockIdx.x == 0)
        for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS) call.bins[size_t(blockIdx.y) * NUM_BINS + i] = 0;
    u64 most = 0;
    each_run(call.num_runs, [&](u32 run) {
        const Lane x = load_run(values, run);
        float largest = -INF;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) largest = fmaxf(largest, x.quads[i / 4].at[i % 4]); // a NaN loses
        const u32 key = key_of(largest);
        u32 id = 0;
        if (flags & GREEDY) {
#pragma unroll
            for (u32 i = PER_LANE; i-- > 0;)
                if (x.quads[i / 4].at[i % 4] == largest) id = id_at(run, i);
        }
        if (flags & (LISTED | NUCLEUS)) maxima[run * 32 + threadIdx.x % 32] = key;
        const u64 entry = entry_of(key, id);
        most = entry > most ? entry : most;
    });
    most = warp_best(most);
    if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 i = 1; i < WARPS; i++) most = shared.of_warp[i] > most ? shared.of_warp[i] : most;
        atomicMax(call.best + blockIdx.y, most);
    }
    if (!is_last(call.arrived + blockIdx.y)) return;
    if (threadIdx.x == 0) shared.before = atomicExch(call.best + blockIdx.y, 0ull);
    __syncthreads();
    most = shared.before;
    u32 bound = NONE, id = ~u32(most);
    if (flags & LISTED) bound = bound_of(maxima, num_maxima, job.rank);
    if (most == 0 && !(flags & LOGPROBS)) id = first_allowed(call.vocab, job, call.lists);
    if (threadIdx.x > 0) return;
    State& state = call.states[blockIdx.y];
    state.best = most;
    state.bound = bound;
    state.num_listed = 0;
    if (!(flags & LOGPROBS) && (most == 0 || flags & GREEDY)) put_token(call, job, id);
}

// --- weigh -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void list(uint2* listed, State& state, u32 id, u32 bits) {
    const u32 i = atomicAdd(&state.num_listed, 1u);
    if (i < MAX_LISTED) listed[i] = make_uint2(id, bits);
}

// Where the running sum of kept masses over the row reaches `u` of its total. `masses`: those of the runs.
__device__ __noinline__ u32 pick(const Values values, const Kept kept, double u, const u64* masses, u32 num_runs) {
    constexpr u32 OF_RUNS = MAX_RUNS / THREADS, OF_RUN = RUN / THREADS;
    const auto mass_of_run = [&](u32 i) {
        const u32 run = threadIdx.x * OF_RUNS + i;
        return run < num_runs ? __ldcg(masses + run) : 0;
    };
    u64 mine = 0, before;
#pragma unroll
    for (u32 i = 0; i < OF_RUNS; i++) mine += mass_of_run(i);
    const u64 total = sum(mine), wanted = min(u64(u * double(total)) + 1, total);
    const u32 first = find<OF_RUNS>(wanted, before, mass_of_run) * RUN;
    return first + find<OF_RUN>(wanted - before, before,
                                [&](u32 i) { return kept.mass(values.at(first + threadIdx.x * OF_RUN + i)); });
}

// One block picks a token with passes over all of the row.
__device__ __noinline__ u32 pick_alone(const Values values, const Job& job, const Softmax softmax, u64* masses, u32 num_runs) {
    const WholeRow row{values};
    Kept kept{softmax, 1, job.lowest_weight};
    if (job.rank != 0) kept.last_key = max(search(row, job.rank, {Entries::LOGITS}), 1u);
    if (job.top_p < 1.0) {
        u64 total = 0;
        row.each([&](u32, float x) { total += Kept{softmax, kept.last_key, 0.f}.mass(x); });
        const u64 wanted = wanted_of(job.top_p, sum(total));
        kept.lowest = fmaxf(kept.lowest, __uint_as_float(search(row, wanted, {Entries::WEIGHTS, kept})));
    }
#pragma unroll 1
    for (u32 run = threadIdx.x / 32; run < num_runs; run += WARPS) {
        u64 mass = 0;
        each_value<1>(load_run(values, run), [&](u32, float x) { mass += kept.mass(x); });
        mass = warp_sum(mass);
        if (threadIdx.x % 32 == 0) masses[run] = mass;
    }
    __threadfence_block();
    __syncthreads();
    return pick(values, kept, job.u, masses, num_runs);
}

// Picks from a list that holds what top-k keeps, and more.
__device__ __noinline__ u32 pick_listed(const List list, const Job& job, const Softmax softmax, u32 max_id) {
    Kept kept{softmax, max(search(list, job.rank, {Entries::LOGITS}), 1u), 0.f};
    const auto total = [&] {
        u64 mass = 0;
        list.each([&](u32, float x) { mass += kept.mass(x); });
        return sum(mass);
    };
    float lowest = job.lowest_weight;
    if (job.top_p < 1.0) {
        const u64 wanted = wanted_of(job.top_p, total());
        lowest = fmaxf(lowest, __uint_as_float(search(list, wanted, {Entries::WEIGHTS, kept})));
    }
    kept.lowest = lowest;
    const u64 mass = total(), wanted = min(u64(job.u * double(mass)) + 1, mass);
    return max_id - search(list, wanted, {Entries::IDS, kept, max_id});
}

// The same, if each thread can have an entry: it looks at all others.
__device__ __noinline__ u32 pick_few(const List list, const Job& job, const Softmax softmax) {
    Shared& shared = shared_memory();
    auto& few = shared.few;
    const u32 n = list.num, i = threadIdx.x;
    const bool is = i < n;
    const u32 id = is ? list.from[i].x : NONE;
    const float x = is ? __uint_as_float(list.from[i].y) : -INF, w = softmax.weight(x);
    const u32 key = key_of(x), weight = __float_as_uint(w);
    u64 mass = mass_of(w);
    __syncthreads(); // of an earlier use
    few.keys[i] = key;
    few.ids[i] = id;
    __syncthreads();
    u32 num_larger = 0;
    if (is)
        for (u32 j = 0; j < n; j++) num_larger += few.keys[j] > key;
    if (!is || num_larger >= job.rank) mass = 0;
    if (job.top_p < 1.0) {
        const u64 wanted = wanted_of(job.top_p, sum(mass)); // waits for the keys
        few.keys[i] = weight;
        few.masses[i] = mass;
        __syncthreads();
        u64 above = 0;
        if (is)
            for (u32 j = 0; j < n; j++) above += few.keys[j] > weight ? few.masses[j] : 0;
        if (above >= wanted) mass = 0;
    }
    if (!(w >= job.lowest_weight)) mass = 0;
    const u64 total = sum(mass), wanted = min(u64(job.u * double(total)) + 1, total);
    few.masses[i] = mass;
    __syncthreads();
    if (mass > 0) {
        u64 before = 0;
        for (u32 j = 0; j < n; j++) before += few.ids[j] < id ? few.masses[j] : 0;
        if (before < wanted && before + mass >= wanted) shared.found = id;
    }
    __syncthreads();
    return shared.found;
}

// The most likely tokens of a row into `few`, unordered: `num` of them, the lowest ids of those that tie with the last.
// Returns how many there are.
__device__ __noinline__ u32 top_of_row(const Values values, u32 num) {
    Shared& shared = shared_memory();
    const WholeRow row{values};
    // Taken are keys above t, and those of t with a rank of at least r.
    const u32 max_id = values.num - 1, t = search(row, num, {Entries::LOGITS});
    u64 above = 0;
    row.each([&](u32, float x) { above += key_of(x) > t; });
    above = sum(above);
    const u32 r = t > 0 ? search(row, num - above, {Entries::TIES, {{}, t, 0.f}, max_id}) : 0;
    __syncthreads();
    if (threadIdx.x == 0) shared.num_found = 0;
    __syncthreads();
    row.each([&](u32 id, float x) {
        const u32 key = key_of(x);
        if (key == 0 || key < t || (key == t && max_id - id < r)) return;
        const u32 i = atomicAdd(&shared.num_found, 1u);
        if (i < MAX_TOP) {
            shared.few.ids[i] = id;
            shared.few.keys[i] = __float_as_uint(x);
        }
    });
    __syncthreads();
    return shared.num_found;
}

// The most likely tokens, most likely first, to the host.
__device__ __noinline__ void put_top(const Values values, const List list, const Job& job, u32* num_top, u32* ids, float* logits) {
    auto& few = shared_memory().few;
    u32 n = list.num;
    if (job.rank == 0) {
        n = 0;
    } else if (n > THREADS) {
        n = top_of_row(values, job.rank);
    } else if (threadIdx.x < n) {
        few.ids[threadIdx.x] = list.from[threadIdx.x].x;
        few.keys[threadIdx.x] = list.from[threadIdx.x].y;
    }
    __syncthreads();
    if (threadIdx.x == 0) num_top[job.index] = min(n, job.rank);
    if (threadIdx.x >= n) return;
    const auto entry = [&](u32 i) { return entry_of(key_of(__uint_as_float(few.keys[i])), few.ids[i]); };
    const u64 mine = entry(threadIdx.x);
    u32 place = 0;
    for (u32 i = 0; i < n; i++) place += entry(i) > mine;
    if (place >= job.rank) return;
    ids[job.index * MAX_TOP + place] = few.ids[threadIdx.x];
    logits[job.index * MAX_TOP + place] = __uint_as_float(few.keys[threadIdx.x]);
}

extern "C" __global__ void __launch_bounds__(THREADS, PASS_BLOCKS) KERNEL(weigh)(const Call call) {
    let_next_start();
    wait_for_inputs();
    const Job& job = call.jobs[blockIdx.y];
    State& state = call.states[blockIdx.y];
    const u32 flags = job.flags, num_runs = call.num_runs, lane = threadIdx.x % 32;
    if (state.best == 0 && !(flags & LOGPROBS)) return;
    const Values values(row_of(call, job), call.vocab);
    const Softmax softmax = softmax_of(u32(state.best >> 32), job.inverse_temperature);
    const u32* const maxima = call.maxima + size_t(blockIdx.y) * num_runs * 32;
    u64* const masses = call.masses + size_t(blockIdx.y) * num_runs;
    u64* const bins = call.bins + size_t(blockIdx.y) * NUM_BINS;
    uint2* const listed = call.listed + size_t(blockIdx.y) * MAX_LISTED;

    if (flags & LISTED) {
        const u32 bound = state.bound;
        each_run(num_runs, [&](u32 run) {
            if (maxima[run * 32 + lane] < bound) return;
            each_value<4>(load_run(values, run), [&](u32 i, float x) {
                if (key_of(x) >= bound) list(listed, state, id_at(run, i), __float_as_uint(x));
            });
        });
    }
    if (flags & NUCLEUS) {
        clear_bins();
        each_run(num_runs, [&](u32 run) {
            u64 mass = 0;
            // What falls into one bin in succession is added at once: in a flat row all values share a few bins.
            u32 bin = 0, pending = 0;
            each_value<4>(load_run(values, run), [&](u32, float x) {
                const u32 bits = __float_as_uint(softmax.weight(x));
                mass += mass_of(__uint_as_float(bits));
                const u32 into = FIRST_BIN - (bits >> BIN_BITS);
                if (into >= NUM_BINS) return;
                if (into != bin) {
                    if (pending != 0) add_to_bin(bin, pending);
                    bin = into;
                    pending = 0;
                }
                pending += mantissa_of(bits, 127u - (bits >> 23));
            });
            if (pending != 0) add_to_bin(bin, pending);
            mass = warp_sum(mass);
            if (lane == 0) masses[run] = mass;
        });
        __syncthreads();
        for (u32 i = threadIdx.x; i < NUM_BINS; i += THREADS) {
            const u64 mass = bin_mass(i, shift_of_bin(i));
            if (mass != 0) atomicAdd(bins + i, mass);
        }
    } else if (job.rank == 0 || flags & LOGPROBS) {
        const float lowest = job.lowest_weight;
        each_run(num_runs, [&](u32 run) {
            u64 mass = 0;
            each_value<4>(load_run(values, run), [&](u32, float x) {
                const float w = softmax.weight(x);
                mass += w >= lowest ? mass_of(w) : 0;
            });
            mass = warp_sum(mass);
            if (lane == 0) masses[run] = mass;
        });
    }
    if (!is_last(call.arrived + blockIdx.y)) return;

    u64 total = 0;
    if (flags & (NUCLEUS | LOGPROBS)) {
        for (u32 run = threadIdx.x; run < num_runs; run += THREADS) total += masses[run];
        total = sum(total);
    }
    const u32 num_listed = flags & LISTED ? __ldcg(&state.num_listed) : 0;
    const List all{listed, num_listed};
    if (flags & LOGPROBS) {
        if (threadIdx.x == 0) {
            call.totals[job.index] = total;
            call.largest[job.index] = softmax.max;
        }
        put_top(values, all, job, call.num_top, call.top_ids, call.top_logits);
        return;
    }
    u32 id;
    if (flags & NUCLEUS) {
        constexpr u32 N = NUM_BINS / THREADS;
        u64 above;
        const u64 wanted = wanted_of(job.top_p, total);
        const u32 bin = find<N>(wanted, above, [&](u32 i) { return __ldcg(bins + threadIdx.x * N + i); });
        if (bin != NONE) {
            if (threadIdx.x == 0) {
                state.above = above;
                state.wanted = wanted;
                state.bin = bin;
            }
            return;
        }
        id = pick_alone(values, job, softmax, masses, num_runs);
        if (threadIdx.x == 0) state.best = 0;
    } else if (job.rank == 0) {
        id = pick(values, {softmax, 1, job.lowest_weight}, job.u, masses, num_runs);
    } else if (num_listed <= THREADS) {
        id = pick_few(all, job, softmax);
    } else if (num_listed <= MAX_LISTED) {
        id = pick_listed(all, job, softmax, call.vocab - 1);
    } else {
        id = pick_alone(values, job, softmax, masses, num_runs);
    }
    if (threadIdx.x == 0) put_token(call, job, id);
}

// --- narrow ------------------------------------------------------------------------------------------------------------

// The bits of the weight in a bin at which the mass from the largest down reaches `wanted`. `listed`: all weights of the bin.
__device__ __noinline__ u32 search_bin(const List list, u32 bin, u64 wanted) {
    constexpr u32 N = NUM_BINS / THREADS, LOWER = BIN_BITS - 10;
    const u32 shift = shift_of_bin(bin);
    u32 prefix = FIRST_BIN - bin;
#pragma unroll 1
    for (int level = 0; level < 2; level++) {
        const u32 at = level == 0 ? LOWER : 0, width = level == 0 ? 10 : LOWER;
        clear_bins();
        list.each([&](u32, float w) {
            const u32 bits = __float_as_uint(w);
            const u32 digit = bits >> at & ((1u << width) - 1);
            if (bits >> (at + width) == prefix) add_to_bin(NUM_BINS - 1 - digit, mantissa_of(bits, shift));
        });
        __syncthreads();
        u64 before;
        const u32 found = find<N>(wanted, before, [&](u32 i) { return bin_mass(threadIdx.x * N + i, shift); });
        prefix = prefix << width | (NUM_BINS - 1 - found);
        wanted -= before;
    }
    return prefix;
}

extern "C" __global__ void __launch_bounds__(THREADS, PASS_BLOCKS) KERNEL(narrow)(const Call call) {
    let_next_start();
    wait_for_inputs();
    const Job& job = call.jobs[blockIdx.y];
    State& state = call.states[blockIdx.y];
    if (state.best == 0) return;
    const u32 num_runs = call.num_runs, lane = threadIdx.x % 32;
    const Values values(row_of(call, job), call.vocab);
    const Softmax softmax = softmax_of(u32(state.best >> 32), job.inverse_temperature);
    const u32* const maxima = call.maxima + size_t(blockIdx.y) * num_runs * 32;
    u64* const masses = call.masses + size_t(blockIdx.y) * num_runs;
    uint2* const listed = call.listed + size_t(blockIdx.y) * MAX_LISTED;
    const u32 bin = state.bin, first = (FIRST_BIN - bin) << BIN_BITS, beyond = first + (1u << BIN_BITS);
    const float lowest = job.lowest_weight;
    // Smaller exponents have weights below the bin; the margin is far above the errors of both functions.
    const float least = logf(__uint_as_float(first)) - 1e-3f;

    each_run(num_runs, [&](u32 run) {
        u64 mass = 0;
        if (softmax.exponent(of_key(maxima[run * 32 + lane])) >= least) {
            u32 some = 0;
            each_value<4>(load_run(values, run), [&](u32 i, float x) { some |= u32(softmax.exponent(x) >= least) << i; });
            // Few lanes have many: so one at a time, read once more.
            while (some != 0) {
                const u32 id = id_at(run, __ffs(some) - 1);
                some &= some - 1;
                const float w = softmax.weight(values.at(id));
                const u32 bits = __float_as_uint(w);
                if (bits >= beyond) mass += w >= lowest ? mass_of(w) : 0;
                else if (bits >= first) list(listed, state, id, bits);
            }
        }
        mass = warp_sum(mass);
        if (lane == 0) masses[run] = mass;
    });
    if (!is_last(call.arrived + blockIdx.y)) return;

    const u32 num_listed = __ldcg(&state.num_listed);
    u32 id;
    if (num_listed <= MAX_LISTED) {
        const List in_bin{listed, num_listed};
        const float last = fmaxf(lowest, __uint_as_float(search_bin(in_bin, bin, state.wanted - state.above)));
        in_bin.each([&](u32 id, float w) {
            if (w >= last) atomicAdd(masses + id / RUN, mass_of(w));
        });
        __threadfence_block();
        __syncthreads();
        id = pick(values, {softmax, 1, last}, job.u, masses, num_runs);
    } else {
        id = pick_alone(values, job, softmax, masses, num_runs);
    }
    if (threadIdx.x == 0) put_token(call, job, id);
}

// --- argmax ------------------------------------------------------------------------------------------------------------

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
