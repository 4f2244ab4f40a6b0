// Forks and joins, and the copies that they are made of.
//
// sum           y = a + b + c + d, those that aren't NULL; max(y, 0) with a ReLU   reads 4 n bytes each, writes 4 n
// sum_gradient  g = dy where y > 0, or dy where y is NULL; both dy and dx become g  reads 8 n bytes, writes 8 n
// concat[4]     y (rows, pitch) = (a, b, c, d) beside each other, widths w*; back: y's columns to them   8 n
// transpose     y (N, cols, rows) = x (N, rows, cols), each sample by itself        reads 4 n bytes, writes 4 n
//
// All are bound by memory. `concat4` moves four numbers at a time: widths and pitch are multiples of 4.
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
__device__ __forceinline__ void copy(const float* __restrict__ x, int x_pitch, float* __restrict__ y, int y_pitch,
                                     long long rows) {
    const long long step = pixel_step();
    for (long long row = first_pixel(); row < rows; row += 4 * step) {
        Lanes<V> some[4];  // all are asked for before one is waited for
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (row + i * step < rows) some[i] = load<V>(x + (row + i * step) * x_pitch);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (row + i * step < rows) store<V>(y + (row + i * step) * y_pitch, some[i]);
    }
}

template <int V>
__device__ __forceinline__ void concat(float* a, float* b, float* c, float* d, int wa, int wb, int wc, int wd, float* y,
                                       int pitch, long long rows, int back) {
    const int column = first_channel<V>();
    float* x = a;
    int width = wa, at = column;  // this thread's column of x
    if (at >= width) at -= width, x = b, width = wb;
    if (at >= width) at -= width, x = c, width = wc;
    if (at >= width) at -= width, x = d, width = wd;
    if (at >= width || !x) return;
    x += at, y += column;
    copy<V>(back ? y : x, back ? pitch : width, back ? x : y, back ? width : pitch, rows);
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

// Of a, b, c and d those that are NULL are left out.
KERNEL(256) concat(float* a, float* b, float* c, float* d, int wa, int wb, int wc, int wd, float* y, int pitch,
                   long long rows, int back) {
    dpnn::concat<1>(a, b, c, d, wa, wb, wc, wd, y, pitch, rows, back);
}

KERNEL(256) concat4(float* a, float* b, float* c, float* d, int wa, int wb, int wc, int wd, float* y, int pitch,
                    long long rows, int back) {
    dpnn::concat<4>(a, b, c, d, wa, wb, wc, wd, y, pitch, rows, back);
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
