// Pooling: one number for each window of each channel.
//
// max_pool           y = the largest number of the window; places = where it lies in the window, the first of equal ones
// max_pool_gradient  dx = the sum of dy over the windows whose largest number lies here
// avg_pool           y = the sum of the window / how many of its numbers lie in the image or its padding
// avg_pool_gradient  dx = the sum of dy / that number over the windows that see this number
// global_avg_pool    y (N, C) = the mean over H and W
// global_avg_pool_gradient  dx = dy / (H W)
//
// x, dx (N, H, W, C); y, dy, places (N, P, Q, C); places may be NULL. A place is r * cols + t, a byte where a window has
// at most 255 of them, else an int (the kernels `_wide`); a window with what isn't a number has none (NOWHERE), and
// passes it on. Padding is nothing to a maximum, and zeros to a mean. Every window has a number in the image.
//
// All are bound by memory: each reads and writes every array once, 4 bytes a number and 1 a place. Gradients gather, so
// nothing is added to from two sides. A thread takes V channels of a pixel of y (or dx), V = 4 where C is a multiple of
// 4 (the kernels `_4`), of IMAGES images at a time: their loads don't wait for one another, and share what is computed
// of places. Blocks are (channels, pixels): 128 bytes of channels and as many pixels as there is room for, whose windows
// overlap, so that most of a window comes out of the first-level cache. Grids are (channels, pixels, images).
#include "device.cuh"

namespace {

constexpr int IMAGES = 2;

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
    const int n = counted(p, s.down, s.rows, s.h, s.above) * counted(q, s.right, s.cols, s.w, s.left);
    return __fdividef(1.f, static_cast<float>(n));
}

// Calls work(pixel, c, numbers) for this thread's pixels, its first channel, and the numbers of IMAGES images; the last
// image stands in for those beyond it.
template <int V, class Work>
__device__ __forceinline__ void walk(int pixels, int channels, int images, Work work) {
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (c >= channels) return;
    for (int pixel = blockIdx.y * blockDim.y + threadIdx.y; pixel < pixels; pixel += gridDim.y * blockDim.y)
        for (int n = blockIdx.z * IMAGES; n < images; n += gridDim.z * IMAGES) {
            long long numbers[IMAGES];
            for (int k = 0; k < IMAGES; ++k) numbers[k] = min(n + k, images - 1);
            work(pixel, c, numbers);
        }
}

template <int V, class Place>
__device__ __forceinline__ void max_of(const float* __restrict__ x, float* __restrict__ y, Place* __restrict__ places,
                                       int images, const Windows s) {
    const Place NOWHERE = static_cast<Place>(-1);
    walk<V>(s.p * s.q, s.c, images, [=](int pixel, int c, const long long (&n)[IMAGES]) {
        const int top = pixel / s.q * s.down - s.above, first = pixel % s.q * s.right - s.left;
        const Span rows = inside(top, s.rows, s.h), cols = inside(first, s.cols, s.w);
        const int corner = ((top + rows.begin) * s.w + first + cols.begin) * s.c + c;
        const float* from[IMAGES];
        Pack<float, V> best[IMAGES];
        int place[IMAGES][V];
        for (int k = 0; k < IMAGES; ++k) {
            from[k] = x + n[k] * s.h * s.w * s.c + corner;
            best[k] = load<V>(from[k]);
            for (int i = 0; i < V; ++i) place[k][i] = rows.begin * s.cols + cols.begin;
        }
        for (int r = rows.begin; r < rows.end; ++r)
#pragma unroll 2
            for (int t = cols.begin; t < cols.end; ++t)
                for (int k = 0; k < IMAGES; ++k) {
                    const Pack<float, V> here = load<V>(from[k] + ((r - rows.begin) * s.w + t - cols.begin) * s.c);
                    for (int i = 0; i < V; ++i) {
                        if (here.v[i] > best[k].v[i]) place[k][i] = r * s.cols + t;
                        best[k].v[i] = dpnn::larger(here.v[i], best[k].v[i]);
                    }
                }
        for (int k = 0; k < IMAGES; ++k) {
            const long long out = (n[k] * s.p * s.q + pixel) * s.c + c;
            store<V>(y + out, best[k]);
            if (!places) continue;
            Pack<Place, V> kept;
            for (int i = 0; i < V; ++i)
                kept.v[i] = best[k].v[i] == best[k].v[i] ? static_cast<Place>(place[k][i]) : NOWHERE;
            store<V>(places + out, kept);
        }
    });
}

template <int V>
__device__ __forceinline__ void mean_of(const float* __restrict__ x, float* __restrict__ y, int images,
                                        const Windows s) {
    walk<V>(s.p * s.q, s.c, images, [=](int pixel, int c, const long long (&n)[IMAGES]) {
        const int p = pixel / s.q, q = pixel % s.q, top = p * s.down - s.above, first = q * s.right - s.left;
        const Span rows = inside(top, s.rows, s.h), cols = inside(first, s.cols, s.w);
        Pack<float, V> sum[IMAGES] = {};
        for (int r = top + rows.begin; r < top + rows.end; ++r)
            for (int t = first + cols.begin; t < first + cols.end; ++t)
                for (int k = 0; k < IMAGES; ++k) {
                    const Pack<float, V> here = load<V>(x + n[k] * s.h * s.w * s.c + (r * s.w + t) * s.c + c);
                    for (int i = 0; i < V; ++i) sum[k].v[i] += here.v[i];
                }
        const float factor = share(s, p, q);
        for (int k = 0; k < IMAGES; ++k) {
            for (int i = 0; i < V; ++i) sum[k].v[i] *= factor;
            store<V>(y + (n[k] * s.p * s.q + pixel) * s.c + c, sum[k]);
        }
    });
}

// dx = what add(sum, window, place, factor) makes of 0 for the windows (p, q) that see a number, at `place` in them;
// `window` is where V channels of the window lie in y, `factor` its share.
template <int V, class Add>
__device__ __forceinline__ void gather(float* __restrict__ dx, int images, const Windows s, Add add) {
    walk<V>(s.h * s.w, s.c, images, [=](int pixel, int c, const long long (&n)[IMAGES]) {
        const int row = pixel / s.w + s.above, col = pixel % s.w + s.left;  // in the padded image
        const int last_p = min(row / s.down, s.p - 1), last_q = min(col / s.right, s.q - 1);
        Pack<float, V> sum[IMAGES] = {};
        for (int p = last_p; p >= 0 && row - p * s.down < s.rows; --p)
            for (int q = last_q; q >= 0 && col - q * s.right < s.cols; --q) {
                const int place = (row - p * s.down) * s.cols + col - q * s.right;
                const float factor = share(s, p, q);
                for (int k = 0; k < IMAGES; ++k)
                    add(sum[k], n[k] * s.p * s.q * s.c + (p * s.q + q) * s.c + c, place, factor);
            }
        for (int k = 0; k < IMAGES; ++k) store<V>(dx + (n[k] * s.h * s.w + pixel) * s.c + c, sum[k]);
    });
}

template <int V, class Place>
__device__ __forceinline__ void max_gradient(const float* __restrict__ dy, const Place* __restrict__ places,
                                             float* __restrict__ dx, int images, const Windows s) {
    gather<V>(dx, images, s, [=](Pack<float, V>& sum, long long window, int place, float) {
        const Pack<float, V> d = load<V>(dy + window);
        const Pack<Place, V> kept = load<V>(places + window);
        for (int i = 0; i < V; ++i)
            if (kept.v[i] == static_cast<Place>(place)) sum.v[i] += d.v[i];
    });
}

template <int V>
__device__ __forceinline__ void mean_gradient(const float* __restrict__ dy, float* __restrict__ dx, int images,
                                              const Windows s) {
    gather<V>(dx, images, s, [=](Pack<float, V>& sum, long long window, int, float factor) {
        const Pack<float, V> d = load<V>(dy + window);
        for (int i = 0; i < V; ++i) sum.v[i] += factor * d.v[i];
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

// Blocks and grid likewise: a thread writes every blockDim.y-th pixel.
template <int V>
__device__ __forceinline__ void spread(const float* __restrict__ dy, float* __restrict__ dx, int images, int pixels,
                                       int channels) {
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (c >= channels) return;
    const float factor = 1.f / static_cast<float>(pixels);
    for (long long n = blockIdx.y; n < images; n += gridDim.y) {
        Pack<float, V> d = load<V>(dy + n * channels + c);
        for (int i = 0; i < V; ++i) d.v[i] *= factor;
        for (int pixel = threadIdx.y; pixel < pixels; pixel += blockDim.y)
            store<V>(dx + (n * pixels + pixel) * channels + c, d);
    }
}

}  // namespace

KERNEL(256, 4) max_pool(const float* x, float* y, unsigned char* places, int images, WINDOWS) {
    max_of<1>(x, y, places, images, THE_WINDOWS);
}

KERNEL(256, 4) max_pool_4(const float* x, float* y, unsigned char* places, int images, WINDOWS) {
    max_of<4>(x, y, places, images, THE_WINDOWS);
}

KERNEL(256, 4) max_pool_wide(const float* x, float* y, int* places, int images, WINDOWS) {
    max_of<1>(x, y, places, images, THE_WINDOWS);
}

KERNEL(256, 4) max_pool_gradient(const float* dy, const unsigned char* places, float* dx, int images, WINDOWS) {
    max_gradient<1>(dy, places, dx, images, THE_WINDOWS);
}

KERNEL(256, 4) max_pool_gradient_4(const float* dy, const unsigned char* places, float* dx, int images, WINDOWS) {
    max_gradient<4>(dy, places, dx, images, THE_WINDOWS);
}

KERNEL(256, 4) max_pool_gradient_wide(const float* dy, const int* places, float* dx, int images, WINDOWS) {
    max_gradient<1>(dy, places, dx, images, THE_WINDOWS);
}

KERNEL(256, 4) avg_pool(const float* x, float* y, int images, WINDOWS) { mean_of<1>(x, y, images, THE_WINDOWS); }

KERNEL(256, 4) avg_pool_4(const float* x, float* y, int images, WINDOWS) { mean_of<4>(x, y, images, THE_WINDOWS); }

KERNEL(256, 4) avg_pool_gradient(const float* dy, float* dx, int images, WINDOWS) {
    mean_gradient<1>(dy, dx, images, THE_WINDOWS);
}

KERNEL(256, 4) avg_pool_gradient_4(const float* dy, float* dx, int images, WINDOWS) {
    mean_gradient<4>(dy, dx, images, THE_WINDOWS);
}

KERNEL(256) global_avg_pool(const float* x, float* y, int images, int pixels, int channels) {
    mean_of_image<1>(x, y, images, pixels, channels);
}

KERNEL(256) global_avg_pool_4(const float* x, float* y, int images, int pixels, int channels) {
    mean_of_image<4>(x, y, images, pixels, channels);
}

KERNEL(256) global_avg_pool_gradient(const float* dy, float* dx, int images, int pixels, int channels) {
    spread<1>(dy, dx, images, pixels, channels);
}

KERNEL(256) global_avg_pool_gradient_4(const float* dy, float* dx, int images, int pixels, int channels) {
    spread<4>(dy, dx, images, pixels, channels);
}
