// out[t, :] = table[id(t), :]        out: [T, E]   table: [V, E]   id(t): ids[t], or (*last_ids)[carried[t]] where carried[t] is given
// A decode that follows a step whose samples the host has not seen yet takes its token from the device: `carried` names the
// row of `*last_ids` that the sampler wrote. It writes to two places in turn, and a recorded step reads which.
// One block per row. Limit: memory, 2 * T * E elements; for one row the launch.
#include "common.cuh"

constexpr u32 NOT_CARRIED = 0xffffffffu;

extern "C" __global__ void __launch_bounds__(512) KERNEL(embed)(T* out, const T* __restrict__ table,
                                                                 const u32* ids, const u32* carried,
                                                                 const u32* const* last_ids, u32 hidden, u32 num_rows) {
    let_next_start();
    wait_for_inputs();
    const u32 row = blockIdx.x;
    if (row >= num_rows) return;
    const u32 from = carried[row];
    const u32 id = from == NOT_CARRIED ? ids[row] : (*last_ids)[from];
    copy_row(out + size_t(row) * hidden, table + size_t(id) * hidden, hidden);
}
