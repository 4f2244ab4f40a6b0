// The first pass of a convolution's or dense layer's backward over dy, bound by memory.
//
// mask_gradient  dy[m][k] = 0 where y[m][k] <= 0, in place, and partial[chunk][k] = the sum over the chunk's rows of dy
//                reads 8 m k bytes, writes 4 m k; without y it writes nothing of dy and reads 4 m k
// bias_gradient  d_bias[k] = or += the sum over chunks of partial[chunk][k], in float64
//
// Shapes: y and dy (m, k). A thread adds up every LANES-th row of a chunk, in float32.
#include "device.cuh"
#include "output.cuh"

namespace dpnn {

// A block of LANES rows by 256 / LANES threads, each of WIDTH columns. `y` or `partial` may be NULL.
template <int WIDTH, int LANES>
__device__ __forceinline__ void mask_gradient(const float* y, float* dy, float* partial, int m, int k, int rows) {
    constexpr int ACROSS = 256 / LANES;
    __shared__ float sums[LANES][ACROSS * WIDTH];
    const int lane = threadIdx.x / ACROSS, place = threadIdx.x % ACROSS * WIDTH;
    const int column = blockIdx.y * ACROSS * WIDTH + place, end = min(m, static_cast<int>(blockIdx.x + 1) * rows);
    float sum[WIDTH] = {};
    if (column < k) {
#pragma unroll 4
        for (int row = blockIdx.x * rows + lane; row < end; row += LANES) {
            const long long at = static_cast<long long>(row) * k + column;
            alignas(16) float value[WIDTH], result[WIDTH];
            if (WIDTH == 4) {
                copy_four(value, dy + at);
                if (y) copy_four(result, y + at);
            } else {
                value[0] = dy[at];
                if (y) result[0] = y[at];
            }
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                if (y && !(result[j] > 0.f)) value[j] = 0.f;
                sum[j] += value[j];
            }
            if (!y) continue;
            if (WIDTH == 4)
                copy_four(dy + at, value);
            else
                dy[at] = value[0];
        }
    }
    if (!partial) return;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) sums[lane][place + j] = sum[j];
    __syncthreads();
    for (int i = threadIdx.x; i < ACROSS * WIDTH && blockIdx.y * ACROSS * WIDTH + i < k; i += 256) {
        float total = 0.f;
        for (int other = 0; other < LANES; ++other) total += sums[other][i];
        partial[static_cast<long long>(blockIdx.x) * k + blockIdx.y * ACROSS * WIDTH + i] = total;
    }
}

}  // namespace dpnn

// For k a multiple of 4: 64 columns and 16 rows at a time. `rows` of a chunk; chunks are the grid's x.
KERNEL(256) mask_gradient_4(const float* y, float* dy, float* partial, int m, int k, int rows) {
    dpnn::mask_gradient<4, 16>(y, dy, partial, m, k, rows);
}

// For any k: 32 columns and 8 rows at a time.
KERNEL(256) mask_gradient_1(const float* y, float* dy, float* partial, int m, int k, int rows) {
    dpnn::mask_gradient<1, 8>(y, dy, partial, m, k, rows);
}

// A warp for each column.
KERNEL(256) bias_gradient(const float* partial, int chunks, int k, float* d_bias, int add) {
    const int column = blockIdx.x * 8 + threadIdx.x / 32;
    double sum = 0.;
    if (column < k)
        for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32)
            sum += partial[static_cast<long long>(chunk) * k + column];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (column < k && threadIdx.x % 32 == 0) d_bias[column] = static_cast<float>(add ? d_bias[column] + sum : sum);
}
