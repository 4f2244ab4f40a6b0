// Local response normalisation across channels (Krizhevsky et al. 2012, 3.3), at each of the M pixels of all images.
//
// lrn            y = x d^-beta,  d = k + scale (sum of x² over the channels c - before ... c + after)
// lrn_gradient   dx = dy d^-beta + factor x (sum of dy x d^(-beta - 1) over the channels whose window sees c),
//                factor = -2 scale beta; those are c - after ... c + before
//
// x, y, dy, dx (M, C). Bound by memory: lrn reads 4 M C bytes and writes as many, lrn_gradient reads 8 M C and writes
// 4 M C; the neighbours come out of the first-level cache.
//
// Blocks are (channels, pixels), a thread for each number; grids (pixels, channels). lrn_gradient keeps a line for each
// of its pixels in shared memory: its channels, and before + after more where another block has the rest; 48 KiB hold
// windows of 12,000 channels.
#include "device.cuh"

namespace {

struct Norm {
    int channels, before, after;
    float scale, beta, k;
};

// d of channel c of a pixel.
__device__ __forceinline__ float denominator(const float* __restrict__ pixel, int c, const Norm& s) {
    const int end = min(c + s.after + 1, s.channels);
    float sum = 0.f;
    for (int i = max(c - s.before, 0); i < end; ++i) sum += pixel[i] * pixel[i];
    return s.k + s.scale * sum;
}

// d^-beta.
__device__ __forceinline__ float power(float d, const Norm& s) { return exp2f(-s.beta * log2f(d)); }

}  // namespace

KERNEL(256) lrn(const float* __restrict__ x, float* __restrict__ y, long long pixels, int channels, int before,
                int after, float scale, float beta, float k) {
    const long long pixel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (pixel >= pixels || c >= channels) return;
    const float* from = x + pixel * channels;
    const Norm s = {channels, before, after, scale, beta, k};
    y[pixel * channels + c] = from[c] * power(denominator(from, c, s), s);
}

KERNEL(256) lrn_gradient(const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ dx,
                         long long pixels, int channels, int before, int after, float scale, float beta, float k) {
    DYNAMIC_SHARED(float, lines);
    const long long pixel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int first = blockIdx.y * blockDim.x, last = min(first + static_cast<int>(blockDim.x), channels);
    const int begin = max(first - after, 0), end = min(last + before, channels);
    const int c = first + threadIdx.x;
    const bool inside = pixel < pixels && c < channels;
    const float *from = x + pixel * channels, *back = dy + pixel * channels;
    const Norm s = {channels, before, after, scale, beta, k};
    float* line = lines + threadIdx.y * min(static_cast<int>(blockDim.x) + before + after, channels) - begin;
    float direct = 0.f;
    if (inside) {
        const float d = denominator(from, c, s);
        direct = back[c] * power(d, s);
        line[c] = direct * from[c] / d;
    }
    if (pixel < pixels) {
        const int beyond = end - last;  // neighbours of other blocks: first ... begin, last ... end
        for (int i = threadIdx.x; i < first - begin + beyond; i += blockDim.x) {
            const int other = i < beyond ? last + i : begin + i - beyond;
            const float d = denominator(from, other, s);
            line[other] = back[other] * power(d, s) * from[other] / d;
        }
    }
    __syncthreads();
    if (!inside) return;
    const int until = min(c + before + 1, channels);
    float sum = 0.f;
    for (int i = max(c - after, 0); i < until; ++i) sum += line[i];
    dx[pixel * channels + c] = direct - 2.f * scale * beta * from[c] * sum;
}
