// What SM90 adds (sm_90a only): tensor copies into shared memory, barriers that count their bytes, products of a warpgroup.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ == 900

// A CUtensorMap, made by the host; passed as `const __grid_constant__`.
struct alignas(64) TensorMap {
    u8 opaque[128];
};

// --- barriers in shared memory -----------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, before the __syncthreads which shows them to the block: makes them seen by the copy engine too.
__device__ __forceinline__ void mbarrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival, which also promises `bytes` of copies.
__device__ __forceinline__ void mbarrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity; a fresh barrier is in phase 0, and "phase 1" before it is over.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\n"
        "bra.uni again;\n"
        "over:\n"
        "}\n" ::"r"(barrier), "r"(parity)
        : "memory");
}

// Named barriers of the block (1..15; 0 is __syncthreads): `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- tensor copies -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void copy_tensor_4d(u32 smem, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}
// Makes this thread's plain writes to shared memory seen by later tensor copies and products (after a barrier, the block's).
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- registers ---------------------------------------------------------------------------------------------------------

// Executed by all warps of a warpgroup.
template <int N>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// --- products of a warpgroup -------------------------------------------------------------------------------------------
//
// Operands in shared memory lie in column chunks of SWIZZLE = 128, 64 or 32 bytes: chunk c of a matrix of R rows is
// R * SWIZZLE bytes, row after row, and within each chunk address bits 4.. are xored with bits 7.. (3, 2 or 1 of them), as
// the copy engine writes them under the swizzle of that width. A chunk starts at a multiple of 8 * SWIZZLE bytes.
template <int SWIZZLE>
__device__ __forceinline__ u32 swizzled(u32 offset) { return offset ^ ((offset >> 3) & (SWIZZLE - 16)); }

// Descriptors, https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout
//   bits 0..13 address / 16, 16..29 leading offset / 16, 32..45 stride offset / 16, 62..63 swizzle (1: 128, 2: 64, 3: 32 bytes)
// Both kinds have 8 rows (of memory) after 8 * SWIZZLE bytes: the stride offset.
//   K-major (a row of memory runs along the summed dimension): 16 values are 32 bytes of a row; the leading offset is unused.
//     The next 16 values: + 32 bytes, and the next chunk after SWIZZLE / 32 of them.
//   MN-major (a row of memory runs along M or N): the leading offset leads from a chunk to the next.
//     The next 16 values of the summed dimension are 16 rows: + 16 * SWIZZLE bytes.
template <int SWIZZLE>
__device__ __forceinline__ u64 matrix_descriptor(u32 smem, u32 chunk_bytes) {
    constexpr u64 mode = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
    return u64((smem & 0x3ffff) >> 4) | u64(chunk_bytes >> 4) << 16 | u64((8 * SWIZZLE) >> 4) << 32 | mode << 62;
}
__device__ __forceinline__ u64 descriptor_after(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// Before the first product after registers (accumulators, or A) were written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the groups committed last are still running.
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// The compiler does not know that products run on: it must not move uses of these registers past this point.
template <int N>
__device__ __forceinline__ void hold(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(u32 (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// d[64, N] = a[64, 16] · b[16, N] (+ d if ADD). Lane l of warp w of the group holds, with g = l / 4 and t = l % 4:
//   d[4i], d[4i + 1]: row 16w + g, columns 8i + 2t, 8i + 2t + 1   d[4i + 2], d[4i + 3]: row 16w + g + 8
//   a[0]: row 16w + g, columns 2t, 2t + 1   a[1]: row 16w + g + 8   a[2], a[3]: the same with columns 2t + 8, 2t + 9
// MN_MAJOR says how b lies in shared memory; an `a` there is K-major.
template <typename V, int N>
struct Wgmma;

#define DASH_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DASH_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define DASH_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define DASH_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define DASH_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define DASH_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define DASH_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define DASH_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define DASH_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define DASH_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define DASH_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define DASH_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define DASH_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define DASH_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define DASH_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define DASH_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define DASH_LIST8 DASH_D0
#define DASH_LIST16 DASH_D0 ", " DASH_D1
#define DASH_LIST32 DASH_D0 ", " DASH_D1 ", " DASH_D2 ", " DASH_D3
#define DASH_LIST40 DASH_D0 ", " DASH_D1 ", " DASH_D2 ", " DASH_D3 ", " DASH_D4
#define DASH_LIST48 DASH_D0 ", " DASH_D1 ", " DASH_D2 ", " DASH_D3 ", " DASH_D4 ", " DASH_D5
#define DASH_LIST64 DASH_D0 ", " DASH_D1 ", " DASH_D2 ", " DASH_D3 ", " DASH_D4 ", " DASH_D5 ", " DASH_D6 ", " DASH_D7
#define DASH_LIST96 DASH_D0 ", " DASH_D1 ", " DASH_D2 ", " DASH_D3 ", " DASH_D4 ", " DASH_D5 ", " DASH_D6 ", " DASH_D7 ", " DASH_D8 ", " DASH_D9 ", " DASH_D10 ", " DASH_D11
#define DASH_LIST128 DASH_D0 ", " DASH_D1 ", " DASH_D2 ", " DASH_D3 ", " DASH_D4 ", " DASH_D5 ", " DASH_D6 ", " DASH_D7 ", " DASH_D8 ", " DASH_D9 ", " DASH_D10 ", " DASH_D11 ", " DASH_D12 ", " DASH_D13 ", " DASH_D14 ", " DASH_D15
#define DASH_EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DASH_OUT8 DASH_EIGHT(0)
#define DASH_OUT16 DASH_EIGHT(0), DASH_EIGHT(8)
#define DASH_OUT32 DASH_EIGHT(0), DASH_EIGHT(8), DASH_EIGHT(16), DASH_EIGHT(24)
#define DASH_OUT40 DASH_EIGHT(0), DASH_EIGHT(8), DASH_EIGHT(16), DASH_EIGHT(24), DASH_EIGHT(32)
#define DASH_OUT48 DASH_EIGHT(0), DASH_EIGHT(8), DASH_EIGHT(16), DASH_EIGHT(24), DASH_EIGHT(32), DASH_EIGHT(40)
#define DASH_OUT64 DASH_EIGHT(0), DASH_EIGHT(8), DASH_EIGHT(16), DASH_EIGHT(24), DASH_EIGHT(32), DASH_EIGHT(40), DASH_EIGHT(48), DASH_EIGHT(56)
#define DASH_OUT96 DASH_EIGHT(0), DASH_EIGHT(8), DASH_EIGHT(16), DASH_EIGHT(24), DASH_EIGHT(32), DASH_EIGHT(40), DASH_EIGHT(48), DASH_EIGHT(56), DASH_EIGHT(64), DASH_EIGHT(72), DASH_EIGHT(80), DASH_EIGHT(88)
#define DASH_OUT128 DASH_EIGHT(0), DASH_EIGHT(8), DASH_EIGHT(16), DASH_EIGHT(24), DASH_EIGHT(32), DASH_EIGHT(40), DASH_EIGHT(48), DASH_EIGHT(56), DASH_EIGHT(64), DASH_EIGHT(72), DASH_EIGHT(80), DASH_EIGHT(88), DASH_EIGHT(96), DASH_EIGHT(104), DASH_EIGHT(112), DASH_EIGHT(120)

// R: registers of d, N / 2; I0, .. I6: the numbers of the operands after them.
#define DASH_WGMMA(V, N, R, I0, I1, I2, I3, I4, I5, I6)                                                                     \
    template <>                                                                                                             \
    struct Wgmma<V, N> {                                                                                                    \
        template <bool ADD, bool MN_MAJOR>                                                                                  \
        static __device__ __forceinline__ void smem(float (&d)[R], u64 a, u64 b) {                                          \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #I2 ", 0;\n"                                              \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #V "." #V " {" DASH_LIST##R "}, %" #I0 ", %" #I1  \
                         ", add, 1, 1, 0, %" #I3 ";\n}\n"                                                                   \
                         : DASH_OUT##R                                                                                      \
                         : "l"(a), "l"(b), "n"(int(ADD)), "n"(int(MN_MAJOR)));                                              \
        }                                                                                                                   \
        template <bool ADD, bool MN_MAJOR>                                                                                  \
        static __device__ __forceinline__ void registers(float (&d)[R], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {            \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #I5 ", 0;\n"                                              \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #V "." #V " {" DASH_LIST##R "}, {%" #I0 ", %" #I1 \
                         ", %" #I2 ", %" #I3 "}, %" #I4 ", add, 1, 1, %" #I6 ";\n}\n"                                       \
                         : DASH_OUT##R                                                                                      \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(int(ADD)), "n"(int(MN_MAJOR)));                  \
        }                                                                                                                   \
    };
DASH_WGMMA(bf16, 16, 8, 8, 9, 10, 11, 12, 13, 14)
DASH_WGMMA(f16, 16, 8, 8, 9, 10, 11, 12, 13, 14)
DASH_WGMMA(bf16, 32, 16, 16, 17, 18, 19, 20, 21, 22)
DASH_WGMMA(f16, 32, 16, 16, 17, 18, 19, 20, 21, 22)
DASH_WGMMA(bf16, 64, 32, 32, 33, 34, 35, 36, 37, 38)
DASH_WGMMA(f16, 64, 32, 32, 33, 34, 35, 36, 37, 38)
DASH_WGMMA(bf16, 80, 40, 40, 41, 42, 43, 44, 45, 46)
DASH_WGMMA(f16, 80, 40, 40, 41, 42, 43, 44, 45, 46)
DASH_WGMMA(bf16, 96, 48, 48, 49, 50, 51, 52, 53, 54)
DASH_WGMMA(f16, 96, 48, 48, 49, 50, 51, 52, 53, 54)
DASH_WGMMA(bf16, 128, 64, 64, 65, 66, 67, 68, 69, 70)
DASH_WGMMA(f16, 128, 64, 64, 65, 66, 67, 68, 69, 70)
DASH_WGMMA(bf16, 192, 96, 96, 97, 98, 99, 100, 101, 102)
DASH_WGMMA(f16, 192, 96, 96, 97, 98, 99, 100, 101, 102)
DASH_WGMMA(bf16, 256, 128, 128, 129, 130, 131, 132, 133, 134)
DASH_WGMMA(f16, 256, 128, 128, 129, 130, 131, 132, 133, 134)
#endif
