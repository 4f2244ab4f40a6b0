// Batch normalisation of channels-last activations (M, C): M = N H W pixels of images, or N vectors.
//
// With mean and var of a channel over the batch, r = 1 / sqrt(var + eps), and g = dy, or 0 where a ReLU gave 0:
//     y  = weight r (x - mean) + bias
//     dx = weight r (g - (sum of g) / M - (x - mean) r² (sum of g (x - mean)) / M)
// Where the ReLU let y pass is computed anew from x, by the same operations as in forward: backward needn't read y.
//
// batch_sums                partial (chunks, 2, C): sums of x and x²                 reads 4 M C bytes
// batch_moments             mean and var (C,), gradients of running statistics
// batch_normalize           y                                                        reads 4 M C, writes 4 M C
// batch_gradient_sums       partial (chunks, 2, C): sums of g and g (x - mean)       reads 8 M C
// batch_gradients           gradients of parameters (C,), and what dx needs of sums
// batch_normalize_gradient  dx                                                       reads 8 M C, writes 4 M C
// batch_total               (2, C), the sums of x and x² of all chunks
// batch_sums_gradient       dx = ((x - mean) 2 d_var + d_mean) / M                   reads 4 M C, writes 4 M C
//
// All are bound by memory: 12 M C bytes forward, 20 M C backward. A 4 behind a name: four channels are moved at a time.
// Sums are float64, since in float32 a large mean would leave little of the variance. Their order is always the same:
// a thread's pixels one by one, the threads of a block as a tree, the blocks (chunks of pixels) likewise.
#include "device.cuh"
#include "channels.cuh"

namespace dpnn {

constexpr int THREADS = 256;

// Of one channel.
struct Pair {
    double first, second;
};

// Each block's sums, over its threads of one channel: sums[0..V) are the first ones of V channels, then come the second.
template <int V>
__device__ __forceinline__ void write_partial(const double* sums, int channels, double* partial) {
    __shared__ double shared[2 * V][THREADS];
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = 0; i < 2 * V; ++i) shared[i][thread] = sums[i];
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half)
            for (int i = 0; i < 2 * V; ++i) shared[i][thread] += shared[i][thread + half * blockDim.x];
    }
    const int channel = first_channel<V>();
    if (threadIdx.y == 0 && channel < channels)
        for (int i = 0; i < 2 * V; ++i)
            partial[(2 * blockIdx.y + i / V) * channels + channel + i % V] = shared[i][thread];
}

// The sums over chunks of eight channels a block of (8, 32) threads; those with threadIdx.y == 0 get them.
__device__ __forceinline__ Pair over_chunks(const double* partial, int chunks, int channels, int channel) {
    __shared__ Pair shared[THREADS];
    Pair sum = {0., 0.};
    for (int chunk = threadIdx.y; chunk < chunks && channel < channels; chunk += 32) {
        const double* from = partial + 2 * chunk * channels + channel;
        sum.first += from[0];
        sum.second += from[channels];
    }
    const int thread = threadIdx.y * 8 + threadIdx.x;
    shared[thread] = sum;
    for (int half = 16; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) {
            shared[thread].first += shared[thread + half * 8].first;
            shared[thread].second += shared[thread + half * 8].second;
        }
    }
    return shared[thread];
}

// A gradient of a parameter: assigned by the first micro-batch of a step, added to by the others.
__device__ __forceinline__ void put(float* gradient, double value, int add) {
    *gradient = static_cast<float>(add ? *gradient + value : value);
}

template <int V>
__device__ void sums(const float* x, double* partial, long long pixels, int channels) {
    const int channel = first_channel<V>();
    double sum[2 * V] = {};
    if (channel < channels) {
#pragma unroll 4
        for (long long pixel = first_pixel(); pixel < pixels; pixel += pixel_step()) {
            const Lanes<V> here = load<V>(x + pixel * channels + channel);
            for (int i = 0; i < V; ++i) {
                const double value = here.v[i];
                sum[i] += value;
                sum[V + i] += value * value;
            }
        }
    }
    write_partial<V>(sum, channels, partial);
}

// What makes y of x, of V channels: the same operations wherever it is asked whether a ReLU let y pass.
template <int V>
struct Affine {
    float mean[V], r[V], scale[V], bias[V];

    __device__ __forceinline__ Affine(const float* mean_, const float* var, const float* weight, const float* bias_,
                                      float eps, int channel) {
        for (int i = 0; i < V; ++i) {
            mean[i] = mean_[channel + i];
            r[i] = 1.f / sqrtf(var[channel + i] + eps);
            scale[i] = weight[channel + i] * r[i];
            bias[i] = bias_[channel + i];
        }
    }

    __device__ __forceinline__ float y(int i, float offset) const { return fmaf(offset, scale[i], bias[i]); }
};

template <int V>
__device__ void normalize(const float* __restrict__ x, const float* mean, const float* var, const float* weight,
                          const float* bias, float* __restrict__ y, float eps, int relu, long long pixels,
                          int channels) {
    const int channel = first_channel<V>();
    if (channel >= channels) return;
    const Affine<V> affine(mean, var, weight, bias, eps, channel);
#pragma unroll 2
    for (long long pixel = first_pixel(); pixel < pixels; pixel += pixel_step()) {
        const long long at = pixel * channels + channel;
        Lanes<V> here = load<V>(x + at);
        for (int i = 0; i < V; ++i) {
            const float value = affine.y(i, here.v[i] - affine.mean[i]);
            here.v[i] = relu && value < 0.f ? 0.f : value;
        }
        store<V>(y + at, here);
    }
}

template <int V>
__device__ void gradient_sums(const float* x, const float* dy, const float* mean, const float* var, const float* weight,
                              const float* bias, double* partial, float eps, int relu, long long pixels, int channels) {
    const int channel = first_channel<V>();
    double sum[2 * V] = {};
    if (channel < channels) {
        const Affine<V> affine(mean, var, weight, bias, eps, channel);
#pragma unroll 2
        for (long long pixel = first_pixel(); pixel < pixels; pixel += pixel_step()) {
            const long long at = pixel * channels + channel;
            const Lanes<V> here = load<V>(x + at), above = load<V>(dy + at);
            for (int i = 0; i < V; ++i) {
                const float offset = here.v[i] - affine.mean[i];
                const float g = relu && !(affine.y(i, offset) > 0.f) ? 0.f : above.v[i];
                sum[i] += g;
                sum[V + i] += g * offset;
            }
        }
    }
    write_partial<V>(sum, channels, partial);
}

// dx may be dy. `centre` (2, C): what the mean and the variance of the batch take away; NULL where they aren't x's.
template <int V>
__device__ void normalize_gradient(const float* x, const float* dy, const float* mean, const float* var,
                                   const float* weight, const float* bias, const float* centre, float* dx, float eps,
                                   int relu, long long pixels, int channels) {
    const int channel = first_channel<V>();
    if (channel >= channels) return;
    const Affine<V> affine(mean, var, weight, bias, eps, channel);
    float level[V], slope[V];
    for (int i = 0; i < V; ++i) {
        level[i] = centre ? centre[channel + i] : 0.f;
        slope[i] = centre ? centre[channels + channel + i] : 0.f;
    }
    for (long long pixel = first_pixel(); pixel < pixels; pixel += pixel_step()) {
        const long long at = pixel * channels + channel;
        const Lanes<V> here = load<V>(x + at);
        Lanes<V> above = load<V>(dy + at);
        for (int i = 0; i < V; ++i) {
            const float offset = here.v[i] - affine.mean[i];
            const float g = relu && !(affine.y(i, offset) > 0.f) ? 0.f : above.v[i];
            above.v[i] = affine.scale[i] * (g - level[i] - offset * slope[i]);
        }
        store<V>(dx + at, above);
    }
}

template <int V>
__device__ void sums_gradient(const float* __restrict__ x, const double* y, const double* dy, float* __restrict__ dx,
                              long long n, long long pixels, int channels) {
    const int channel = first_channel<V>();
    if (channel >= channels) return;
    float mean[V], level[V], slope[V];
    for (int i = 0; i < V; ++i) {
        mean[i] = static_cast<float>(y[channel + i] / n);
        level[i] = static_cast<float>(dy[channel + i] / n);
        slope[i] = static_cast<float>(2. * dy[channels + channel + i] / n);
    }
#pragma unroll 2
    for (long long pixel = first_pixel(); pixel < pixels; pixel += pixel_step()) {
        const long long at = pixel * channels + channel;
        Lanes<V> here = load<V>(x + at);
        for (int i = 0; i < V; ++i) here.v[i] = fmaf(here.v[i] - mean[i], slope[i], level[i]);
        store<V>(dx + at, here);
    }
}

}  // namespace dpnn

KERNEL(256) batch_sums(const float* x, double* partial, long long pixels, int channels) {
    dpnn::sums<1>(x, partial, pixels, channels);
}

KERNEL(256) batch_sums4(const float* x, double* partial, long long pixels, int channels) {
    dpnn::sums<4>(x, partial, pixels, channels);
}

KERNEL(256) batch_total(const double* partial, int chunks, double* total, int channels) {
    const int channel = blockIdx.x * 8 + threadIdx.x;
    const dpnn::Pair sum = dpnn::over_chunks(partial, chunks, channels, channel);
    if (threadIdx.y > 0 || channel >= channels) return;
    total[channel] = sum.first;
    total[channels + channel] = sum.second;
}

// n numbers a channel went into the sums. `share`: what this micro-batch's statistics count for in the whole step.
KERNEL(256) batch_moments(const double* partial, int chunks, long long n, double share, float* mean, float* var,
                          float* d_running_mean, float* d_running_var, int add, int channels) {
    const int channel = blockIdx.x * 8 + threadIdx.x;
    const dpnn::Pair sum = dpnn::over_chunks(partial, chunks, channels, channel);
    if (threadIdx.y > 0 || channel >= channels) return;
    const double centre = sum.first / n, difference = sum.second / n - centre * centre;
    const double variance = difference < 0. ? 0. : difference;
    mean[channel] = static_cast<float>(centre);
    var[channel] = static_cast<float>(variance);
    dpnn::put(d_running_mean + channel, centre * share, add);
    dpnn::put(d_running_var + channel, variance * n / (n > 1 ? n - 1 : 1) * share, add);
}

KERNEL(256) batch_normalize(const float* x, const float* mean, const float* var, const float* weight, const float* bias,
                            float* y, float eps, int relu, long long pixels, int channels) {
    dpnn::normalize<1>(x, mean, var, weight, bias, y, eps, relu, pixels, channels);
}

KERNEL(256) batch_normalize4(const float* x, const float* mean, const float* var, const float* weight,
                             const float* bias, float* y, float eps, int relu, long long pixels, int channels) {
    dpnn::normalize<4>(x, mean, var, weight, bias, y, eps, relu, pixels, channels);
}

KERNEL(256) batch_gradient_sums(const float* x, const float* dy, const float* mean, const float* var,
                                const float* weight, const float* bias, double* partial, float eps, int relu,
                                long long pixels, int channels) {
    dpnn::gradient_sums<1>(x, dy, mean, var, weight, bias, partial, eps, relu, pixels, channels);
}

KERNEL(256) batch_gradient_sums4(const float* x, const float* dy, const float* mean, const float* var,
                                 const float* weight, const float* bias, double* partial, float eps, int relu,
                                 long long pixels, int channels) {
    dpnn::gradient_sums<4>(x, dy, mean, var, weight, bias, partial, eps, relu, pixels, channels);
}

// `centre` (2, C) = (sum of g) / n, r² (sum of g (x - mean)) / n; `d_moments` (2, C): the derivatives by mean and
// variance. Either may be NULL.
KERNEL(256) batch_gradients(const double* partial, int chunks, long long n, const float* var, const float* weight,
                            float eps, float* d_weight, float* d_bias, int add, float* centre, double* d_moments,
                            int channels) {
    const int channel = blockIdx.x * 8 + threadIdx.x;
    const dpnn::Pair sum = dpnn::over_chunks(partial, chunks, channels, channel);
    if (threadIdx.y > 0 || channel >= channels) return;
    const double r = 1. / sqrt(static_cast<double>(var[channel]) + eps), scale = weight[channel] * r;
    dpnn::put(d_weight + channel, r * sum.second, add);
    dpnn::put(d_bias + channel, sum.first, add);
    if (centre) {
        centre[channel] = static_cast<float>(sum.first / n);
        centre[channels + channel] = static_cast<float>(r * r * sum.second / n);
    }
    if (d_moments) {
        d_moments[channel] = -scale * sum.first;
        d_moments[channels + channel] = -scale * r * r * sum.second / 2.;
    }
}

// dx may be dy.
KERNEL(256) batch_normalize_gradient(const float* x, const float* dy, const float* mean, const float* var,
                                     const float* weight, const float* bias, const float* centre, float* dx, float eps,
                                     int relu, long long pixels, int channels) {
    dpnn::normalize_gradient<1>(x, dy, mean, var, weight, bias, centre, dx, eps, relu, pixels, channels);
}

// dx may be dy.
KERNEL(256) batch_normalize_gradient4(const float* x, const float* dy, const float* mean, const float* var,
                                      const float* weight, const float* bias, const float* centre, float* dx, float eps,
                                      int relu, long long pixels, int channels) {
    dpnn::normalize_gradient<4>(x, dy, mean, var, weight, bias, centre, dx, eps, relu, pixels, channels);
}

// y (2, C): the sums over all replicas, of n numbers a channel; dy (2, C): the derivatives by mean and variance.
KERNEL(256) batch_sums_gradient(const float* x, const double* y, const double* dy, float* dx, long long n,
                                long long pixels, int channels) {
    dpnn::sums_gradient<1>(x, y, dy, dx, n, pixels, channels);
}

KERNEL(256) batch_sums_gradient4(const float* x, const double* y, const double* dy, float* dx, long long n,
                                 long long pixels, int channels) {
    dpnn::sums_gradient<4>(x, y, dy, dx, n, pixels, channels);
}
