// Forks and joins, and the copies that they are made of.
//
// sum           y = a + b + c + d, those that aren't NULL; max(y, 0) with a ReLU   reads 4 n bytes each, writes 4 n
// sum_gradient  g = dy where y > 0, or dy where y is NULL; both dy and dx become g  reads 8 n bytes, writes 8 n
// copy[4]       (rows, width) out of rows of x_pitch numbers into rows of y_pitch   reads 4 n bytes, writes 4 n
// transpose     y (N, cols, rows) = x (N, rows, cols), each sample by itself        reads 4 n bytes, writes 4 n
//
// All are bound by memory. `copy4` moves four numbers at a time: width and pitches are multiples of 4.
#include "device.cuh"
#include "channels.cuh"

namespace dpnn {

template <int V>
__device__ __forceinline__ void add(Lanes<V>& sum, const float* x, long long at) {
    if (!x) return;
    const Lanes<V> here = load<V>(x + at);
    for (int i = 0; i < V; ++i) sum.v[i] += here.v[i];
}

template <int V>
__device__ __forceinline__ void sum(const float* a, const float* b, const float* c, const float* d, float* y, int relu,
                                    long long at) {
    Lanes<V> total = load<V>(a + at);
    add<V>(total, b, at);
    add<V>(total, c, at);
    add<V>(total, d, at);
    for (int i = 0; i < V; ++i) total.v[i] = relu && total.v[i] < 0.f ? 0.f : total.v[i];
    store<V>(y + at, total);
}

template <int V>
__device__ __forceinline__ void sum_gradient(const float* y, float* dy, float* dx, long long at) {
    Lanes<V> g = load<V>(dy + at);
    if (y) {
        const Lanes<V> here = load<V>(y + at);
        for (int i = 0; i < V; ++i) g.v[i] = here.v[i] > 0.f ? g.v[i] : 0.f;
        store<V>(dy + at, g);
    }
    if (dx) store<V>(dx + at, g);
}

template <int V>
__device__ void copy(const float* __restrict__ x, int x_pitch, float* __restrict__ y, int y_pitch, long long rows,
                     int width) {
    const int at = first_channel<V>();
    if (at >= width) return;
#pragma unroll 2
    for (long long row = first_pixel(); row < rows; row += pixel_step())
        store<V>(y + row * y_pitch + at, load<V>(x + row * x_pitch + at));
}

}  // namespace dpnn

// y may be a.
KERNEL(256) sum(const float* a, const float* b, const float* c, const float* d, float* y, int relu, long long n) {
    const long long first = blockIdx.x * 256ll + threadIdx.x, step = gridDim.x * 256ll, even = n / 4 * 4;
    for (long long i = 4 * first; i < even; i += 4 * step) dpnn::sum<4>(a, b, c, d, y, relu, i);
    for (long long i = even + first; i < n; i += step) dpnn::sum<1>(a, b, c, d, y, relu, i);
}

// dx may be NULL.
KERNEL(256) sum_gradient(const float* y, float* dy, float* dx, long long n) {
    const long long first = blockIdx.x * 256ll + threadIdx.x, step = gridDim.x * 256ll, even = n / 4 * 4;
    for (long long i = 4 * first; i < even; i += 4 * step) dpnn::sum_gradient<4>(y, dy, dx, i);
    for (long long i = even + first; i < n; i += step) dpnn::sum_gradient<1>(y, dy, dx, i);
}

KERNEL(256) copy(const float* x, int x_pitch, float* y, int y_pitch, long long rows, int width) {
    dpnn::copy<1>(x, x_pitch, y, y_pitch, rows, width);
}

KERNEL(256) copy4(const float* x, int x_pitch, float* y, int y_pitch, long long rows, int width) {
    dpnn::copy<4>(x, x_pitch, y, y_pitch, rows, width);
}

// A block of (32, 8) threads turns one tile of one sample; tiles of a sample follow each other in the grid.
KERNEL(256) transpose(const float* x, float* y, int rows, int cols) {
    __shared__ float tile[32][33];  // one more, so that a column lies in 32 banks
    const int across = (cols + 31) / 32, tiles = across * ((rows + 31) / 32), here = blockIdx.x % tiles;
    const int top = here / across * 32, left = here % across * 32;
    const long long sample = static_cast<long long>(blockIdx.x / tiles) * rows * cols;
    float some[4];  // all are asked for before one is waited for
    for (int i = 0; i < 4; ++i) {
        const int row = top + threadIdx.y + 8 * i, col = left + threadIdx.x;
        some[i] = row < rows && col < cols ? x[sample + row * cols + col] : 0.f;
    }
    for (int i = 0; i < 4; ++i) tile[threadIdx.y + 8 * i][threadIdx.x] = some[i];
    __syncthreads();
    for (int i = threadIdx.y; i < 32 && left + i < cols; i += 8)
        if (top + threadIdx.x < rows) y[sample + (left + i) * rows + top + threadIdx.x] = tile[threadIdx.x][i];
}
