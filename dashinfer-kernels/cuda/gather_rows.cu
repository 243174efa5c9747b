// out[i, :] = x[rows[i], :]          out: [num_rows, cols]   x: [T, cols]
// One block per row. Limit: memory, 2 * num_rows * cols elements; for few rows the launch.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512) KERNEL(gather_rows)(T* out, const T* x,
                                                                      const u32* rows, u32 num_rows, u32 cols) {
    let_next_start();
    wait_for_inputs();
    const u32 row = blockIdx.x;
    if (row >= num_rows) return;
    copy_row(out + size_t(row) * cols, x + size_t(rows[row]) * cols, cols);
}
