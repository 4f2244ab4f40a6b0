// Local response normalisation across channels (Krizhevsky et al. 2012, 3.3), at each of the M pixels of all images.
//
// lrn            y = x d^-beta,  d = k + scale (sum of x² over the channels c - before ... c + after)
// lrn_gradient   dx = dy d^-beta + factor x (sum of dy x d^(-beta - 1) over the channels whose window sees c),
//                factor = -2 scale beta; those are c - after ... c + before
//
// x, y, dy, dx (M, C). Bound by memory: lrn reads 4 M C bytes and writes as many, lrn_gradient reads 8 M C and writes
// 4 M C; the neighbours come out of the first-level cache.
//
// The kernels `_5` are for windows of 5 and C % 4 == 0, those of AlexNet and GoogLeNet: a thread takes four channels of
// a pixel, in registers with four on either side, and computes again what its neighbours do. The others take any window
// and a number a thread. Blocks are (channels, pixels), grids (pixels, channels). lrn_gradient keeps a line for each of
// its pixels in shared memory: its channels, and before + after more where another block has the rest; 48 KiB hold
// windows of 12,000 channels.
#include "channels.cuh"
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

// d^-beta. The fast logarithm is off by 2^-22 or two units of its last place at most. With a beta up to 1, that makes
// the power off by some 1e-6 of itself where d < 2^16, and by less than 2e-5 anywhere.
__device__ __forceinline__ float power(float d, const Norm& s) { return __powf(d, -s.beta); }

// Channels c - 4 ... c + 7 of a pixel; zeros beyond its ends.
__device__ __forceinline__ void load_12(const float* __restrict__ pixel, int c, int channels, float (&to)[12]) {
#pragma unroll
    for (int part = 0; part < 3; ++part) {
        const int from = c - 4 + 4 * part;
        dpnn::Lanes<4> some = {};
        if (from >= 0 && from < channels) some = dpnn::load<4>(pixel + from);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[4 * part + i] = some.v[i];
    }
}

// The sum of the five numbers around `at`.
__device__ __forceinline__ float five(const float* at) { return at[-2] + at[-1] + at[0] + at[1] + at[2]; }

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

KERNEL(256) lrn_5(const float* __restrict__ x, float* __restrict__ y, long long pixels, int channels, int before,
                  int after, float scale, float beta, float k) {
    const long long pixel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int c = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (pixel >= pixels || c >= channels) return;
    const Norm s = {channels, before, after, scale, beta, k};
    float here[12], squares[12];
    load_12(x + pixel * channels, c, channels, here);
#pragma unroll
    for (int i = 0; i < 12; ++i) squares[i] = here[i] * here[i];
    dpnn::Lanes<4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.v[i] = here[4 + i] * power(k + scale * five(squares + 4 + i), s);
    dpnn::store<4>(y + pixel * channels + c, out);
}

KERNEL(256, 4) lrn_gradient_5(const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ dx,
                           long long pixels, int channels, int before, int after, float scale, float beta, float k) {
    const long long pixel = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int c = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (pixel >= pixels || c >= channels) return;
    const Norm s = {channels, before, after, scale, beta, k};
    float here[12], back[12], squares[12];
    load_12(x + pixel * channels, c, channels, here);
    load_12(dy + pixel * channels, c, channels, back);
#pragma unroll
    for (int i = 0; i < 12; ++i) squares[i] = here[i] * here[i];
    float direct[12], ratios[12];  // of channels c - 2 ... c + 5: dy d^-beta, and that times x / d; 0 beyond the ends
#pragma unroll
    for (int i = 2; i < 10; ++i) {
        const float d = k + scale * five(squares + i);
        direct[i] = back[i] * power(d, s);
        ratios[i] = __fdividef(direct[i] * here[i], d);
    }
    dpnn::Lanes<4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out.v[i] = direct[4 + i] - 2.f * scale * beta * here[4 + i] * five(ratios + 4 + i);
    dpnn::store<4>(dx + pixel * channels + c, out);
}
