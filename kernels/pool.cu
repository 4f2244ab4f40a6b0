// Pooling: one number for each window of each channel.
//
// max_pool           y = the largest number of the window; places = where it lies in the window, the first of equal ones
// max_pool_gradient  dx = the sum of dy over the windows whose largest number lies here
// avg_pool           y = the sum of the window / how many of its numbers lie in the image or its padding
// avg_pool_gradient  dx = the sum of dy / that number over the windows that see this number
// global_avg_pool    y (N, C) = the mean over H and W; avg_pool_gradient with one window makes its gradient
//
// x, dx (N, H, W, C); y, dy, places (N, P, Q, C); places may be NULL. A place is r * cols + t, a byte where a window has
// at most 255 of them, else an int (the kernels `_wide`); a window with what isn't a number has none (NOWHERE), and
// passes it on. Padding is nothing to a maximum, and zeros to a mean. Every window has a number in the image.
//
// All are bound by memory: each reads and writes every array once, 4 bytes a number and 1 a place. Gradients gather, so
// nothing is added to from two sides. A thread takes V channels of a pixel of y (or dx), V = 4 where C is a multiple of
// 4 (the kernels `_4`), so that neighbours read neighbouring channels; blocks are (channels, pixels), grids (pixels,
// images).
#include "device.cuh"

namespace {

struct Windows {
    int h, w, c, p, q, rows, cols, down, right, above, left;
};

#define WINDOWS int h, int w, int c, int p, int q, int rows, int cols, int down, int right, int above, int left
#define THE_WINDOWS \
    Windows { h, w, c, p, q, rows, cols, down, right, above, left }

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// The rows (or columns) of a window that lie inside the image, counted from the window's first.
struct Span {
    int begin, end;
};

__device__ __forceinline__ Span inside(int first, int size, int n) {
    return Span{max(0, -first), min(size, n - first)};
}

// How many rows (or columns) of window number i lie in the image of n or its padding.
__device__ __forceinline__ int counted(int i, int stride, int size, int n, int padding) {
    return min(size, n + 2 * padding - i * stride);
}

// 1 / the number that the mean of window (p, q) is divided by.
__device__ __forceinline__ float share(const Windows& s, int p, int q) {
    return 1.f / static_cast<float>(counted(p, s.down, s.rows, s.h, s.above) * counted(q, s.right, s.cols, s.w, s.left));
}

template <int V, class Place>
__device__ __forceinline__ void max_of(const float* __restrict__ x, float* __restrict__ y, Place* __restrict__ places,
                                       int images, const Windows s) {
    const Place NOWHERE = static_cast<Place>(-1);
    const int pixel = blockIdx.x * blockDim.y + threadIdx.y;
    if (pixel >= s.p * s.q) return;
    const int top = pixel / s.q * s.down - s.above, first = pixel % s.q * s.right - s.left;
    const Span rows = inside(top, s.rows, s.h), cols = inside(first, s.cols, s.w);
    const int corner = top * s.w + first;  // pixel of the window's first number, may be before the image
    for (long long n = blockIdx.y; n < images; n += gridDim.y)
        for (int c = threadIdx.x * V; c < s.c; c += blockDim.x * V) {
            const float* from = x + (n * s.h * s.w + corner) * s.c + c;
            Pack<float, V> best = load<V>(from + (rows.begin * s.w + cols.begin) * s.c);
            int place[V];
            for (int i = 0; i < V; ++i) place[i] = rows.begin * s.cols + cols.begin;
            for (int r = rows.begin; r < rows.end; ++r)
                for (int t = cols.begin; t < cols.end; ++t) {
                    const Pack<float, V> here = load<V>(from + (r * s.w + t) * s.c);
                    for (int i = 0; i < V; ++i)
                        if (here.v[i] > best.v[i] || here.v[i] != here.v[i]) {
                            best.v[i] = here.v[i];
                            place[i] = r * s.cols + t;
                        }
                }
            const long long out = (n * s.p * s.q + pixel) * s.c + c;
            store<V>(y + out, best);
            if (!places) continue;
            Pack<Place, V> kept;
            for (int i = 0; i < V; ++i)
                kept.v[i] = best.v[i] == best.v[i] ? static_cast<Place>(place[i]) : NOWHERE;
            store<V>(places + out, kept);
        }
}

template <int V>
__device__ __forceinline__ void mean_of(const float* __restrict__ x, float* __restrict__ y, int images,
                                        const Windows s) {
    const int pixel = blockIdx.x * blockDim.y + threadIdx.y;
    if (pixel >= s.p * s.q) return;
    const int p = pixel / s.q, q = pixel % s.q, top = p * s.down - s.above, first = q * s.right - s.left;
    const Span rows = inside(top, s.rows, s.h), cols = inside(first, s.cols, s.w);
    const int corner = top * s.w + first;  // pixel of the window's first number, may be before the image
    const float factor = share(s, p, q);
    for (long long n = blockIdx.y; n < images; n += gridDim.y)
        for (int c = threadIdx.x * V; c < s.c; c += blockDim.x * V) {
            const float* from = x + (n * s.h * s.w + corner) * s.c + c;
            Pack<float, V> sum = {};
            for (int r = rows.begin; r < rows.end; ++r)
                for (int t = cols.begin; t < cols.end; ++t) {
                    const Pack<float, V> here = load<V>(from + (r * s.w + t) * s.c);
                    for (int i = 0; i < V; ++i) sum.v[i] += here.v[i];
                }
            for (int i = 0; i < V; ++i) sum.v[i] *= factor;
            store<V>(y + (n * s.p * s.q + pixel) * s.c + c, sum);
        }
}

// dx = the sum of part(window, place, p, q) over the windows (p, q) that see a number, at `place` in them; `window` is
// where V channels of the window lie in y.
template <int V, class Part>
__device__ __forceinline__ void gather(float* __restrict__ dx, int images, const Windows s, Part part) {
    const int pixel = blockIdx.x * blockDim.y + threadIdx.y;
    if (pixel >= s.h * s.w) return;
    const int row = pixel / s.w + s.above, col = pixel % s.w + s.left;  // in the padded image
    const int last_p = min(row / s.down, s.p - 1), last_q = min(col / s.right, s.q - 1);
    for (long long n = blockIdx.y; n < images; n += gridDim.y)
        for (int c = threadIdx.x * V; c < s.c; c += blockDim.x * V) {
            const long long image = n * s.p * s.q * s.c + c;
            Pack<float, V> sum = {};
            for (int p = last_p; p >= 0 && row - p * s.down < s.rows; --p)
                for (int q = last_q; q >= 0 && col - q * s.right < s.cols; --q) {
                    const long long window = image + (p * s.q + q) * s.c;
                    const int place = (row - p * s.down) * s.cols + col - q * s.right;
                    const Pack<float, V> more = part(window, place, p, q);
                    for (int i = 0; i < V; ++i) sum.v[i] += more.v[i];
                }
            store<V>(dx + (n * s.h * s.w + pixel) * s.c + c, sum);
        }
}

template <int V, class Place>
__device__ __forceinline__ void max_gradient(const float* __restrict__ dy, const Place* __restrict__ places,
                                             float* __restrict__ dx, int images, const Windows s) {
    gather<V>(dx, images, s, [=](long long window, int place, int, int) {
        Pack<float, V> d = load<V>(dy + window);
        const Pack<Place, V> kept = load<V>(places + window);
        for (int i = 0; i < V; ++i)
            if (kept.v[i] != static_cast<Place>(place)) d.v[i] = 0.f;
        return d;
    });
}

template <int V>
__device__ __forceinline__ void mean_gradient(const float* __restrict__ dy, float* __restrict__ dx, int images,
                                              const Windows s) {
    gather<V>(dx, images, s, [=](long long window, int, int p, int q) {
        Pack<float, V> d = load<V>(dy + window);
        const float factor = share(s, p, q);
        for (int i = 0; i < V; ++i) d.v[i] *= factor;
        return d;
    });
}

// Blocks (channels / V, lanes): each lane sums every blockDim.y-th pixel, the first adds up the lanes. Grid (channels,
// images).
template <int V>
__device__ __forceinline__ void mean_of_image(const float* __restrict__ x, float* __restrict__ y, int images,
                                              int pixels, int channels) {
    __shared__ Pack<float, V> sums[256];
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    for (long long n = blockIdx.y; n < images; n += gridDim.y) {
        Pack<float, V> sum = {};
        for (int pixel = threadIdx.y; pixel < pixels && c < channels; pixel += blockDim.y) {
            const Pack<float, V> here = load<V>(x + (n * pixels + pixel) * channels + c);
            for (int i = 0; i < V; ++i) sum.v[i] += here.v[i];
        }
        __syncthreads();  // the last image's sums may still be read
        sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y > 0 || c >= channels) continue;
        for (int lane = 1; lane < static_cast<int>(blockDim.y); ++lane)
            for (int i = 0; i < V; ++i) sum.v[i] += sums[lane * blockDim.x + threadIdx.x].v[i];
        for (int i = 0; i < V; ++i) sum.v[i] /= static_cast<float>(pixels);
        store<V>(y + n * channels + c, sum);
    }
}

}  // namespace

KERNEL(256) max_pool(const float* x, float* y, unsigned char* places, int images, WINDOWS) {
    max_of<1>(x, y, places, images, THE_WINDOWS);
}

KERNEL(256) max_pool_4(const float* x, float* y, unsigned char* places, int images, WINDOWS) {
    max_of<4>(x, y, places, images, THE_WINDOWS);
}

KERNEL(256) max_pool_wide(const float* x, float* y, int* places, int images, WINDOWS) {
    max_of<1>(x, y, places, images, THE_WINDOWS);
}

KERNEL(256) max_pool_gradient(const float* dy, const unsigned char* places, float* dx, int images, WINDOWS) {
    max_gradient<1>(dy, places, dx, images, THE_WINDOWS);
}

KERNEL(256) max_pool_gradient_4(const float* dy, const unsigned char* places, float* dx, int images, WINDOWS) {
    max_gradient<4>(dy, places, dx, images, THE_WINDOWS);
}

KERNEL(256) max_pool_gradient_wide(const float* dy, const int* places, float* dx, int images, WINDOWS) {
    max_gradient<1>(dy, places, dx, images, THE_WINDOWS);
}

KERNEL(256) avg_pool(const float* x, float* y, int images, WINDOWS) { mean_of<1>(x, y, images, THE_WINDOWS); }

KERNEL(256) avg_pool_4(const float* x, float* y, int images, WINDOWS) { mean_of<4>(x, y, images, THE_WINDOWS); }

KERNEL(256) avg_pool_gradient(const float* dy, float* dx, int images, WINDOWS) {
    mean_gradient<1>(dy, dx, images, THE_WINDOWS);
}

KERNEL(256) avg_pool_gradient_4(const float* dy, float* dx, int images, WINDOWS) {
    mean_gradient<4>(dy, dx, images, THE_WINDOWS);
}

KERNEL(256) global_avg_pool(const float* x, float* y, int images, int pixels, int channels) {
    mean_of_image<1>(x, y, images, pixels, channels);
}

KERNEL(256) global_avg_pool_4(const float* x, float* y, int images, int pixels, int channels) {
    mean_of_image<4>(x, y, images, pixels, channels);
}
