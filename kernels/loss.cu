// Losses of scores x (N, K): each row's into scratch, then the sum of all in a fixed order.
//
// softmax            labels int (N,): -sum over k of target[k] log softmax(x)[k], where target is 1 - smoothing for the
//                    label, and smoothing / K for every class beside that; kept (N, 2) = the largest score of the row,
//                    1 / the sum of exp(x - largest); kept may be NULL
// softmax_gradient   dx = scale (softmax(x) - target)
// sigmoid            labels t, a byte (N, K): the sum of max(x, 0) - x t + log(1 + exp(-|x|)), which never overflows
// sigmoid_gradient   dx = scale (sigmoid(x) - t)
// sum_losses         y () = scale (sum of the rows' losses), float64
//
// Bound by memory: the losses read 4 N K bytes (softmax twice, of which once out of a cache) and sigmoid's labels N K
// more; gradients write 4 N K beside that. A block takes a row: 32 threads of few classes, else 256 (the ends of the
// kernels' names); of a gradient 4 numbers a thread, the second dimension of the grid going on. Numbers are float32,
// their sums and the losses float64.
#include "device.cuh"

namespace {

// The largest of a block's values, to all its threads.
template <int THREADS>
__device__ __forceinline__ float block_max(float value) {
    __shared__ float most[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; ++i) value = fmaxf(value, most[i]);
    return value;
}

template <int THREADS>
__device__ __forceinline__ void softmax_row(const float* __restrict__ x, const int* __restrict__ labels, int classes,
                                            double smoothing, float* __restrict__ kept, double* __restrict__ losses) {
    const long long n = blockIdx.x;
    const float* row = x + n * classes;
    float most = row[0];
    for (int k = threadIdx.x; k < classes; k += THREADS) most = fmaxf(most, row[k]);
    most = block_max<THREADS>(most);
    double sum = 0., below = 0.;
    for (int k = threadIdx.x; k < classes; k += THREADS) {
        const double score = static_cast<double>(row[k]) - most;
        sum += expf(static_cast<float>(score));
        below += score;
    }
    sum = dpnn::block_sum<THREADS>(sum);
    below = dpnn::block_sum<THREADS>(below);
    if (threadIdx.x > 0) return;
    losses[n] = log(sum) - (1. - smoothing) * (static_cast<double>(row[labels[n]]) - most) - smoothing / classes * below;
    if (!kept) return;
    kept[2 * n] = most;
    kept[2 * n + 1] = static_cast<float>(1. / sum);
}

template <int THREADS>
__device__ __forceinline__ void softmax_gradient_row(const float* __restrict__ x, const int* __restrict__ labels,
                                                     int classes, double smoothing, const float* __restrict__ kept,
                                                     float scale, float* __restrict__ dx) {
    const long long n = blockIdx.x;
    const int label = labels[n];
    const float most = kept[2 * n], factor = kept[2 * n + 1];
    const float target = static_cast<float>(1. - smoothing), others = static_cast<float>(smoothing / classes);
    for (int k = blockIdx.y * THREADS + threadIdx.x; k < classes; k += gridDim.y * THREADS) {
        const long long i = n * classes + k;
        dx[i] = scale * (expf(x[i] - most) * factor - others - (k == label ? target : 0.f));
    }
}

template <int THREADS>
__device__ __forceinline__ void sigmoid_row(const float* __restrict__ x, const unsigned char* __restrict__ labels,
                                            int classes, double* __restrict__ losses) {
    const long long n = blockIdx.x;
    double sum = 0.;
    for (int k = threadIdx.x; k < classes; k += THREADS) {
        const float score = x[n * classes + k];
        sum += fmaxf(score, 0.f) - score * labels[n * classes + k] + log1pf(expf(-fabsf(score)));
    }
    sum = dpnn::block_sum<THREADS>(sum);
    if (threadIdx.x == 0) losses[n] = sum;
}

template <int THREADS>
__device__ __forceinline__ void sigmoid_gradient_row(const float* __restrict__ x,
                                                     const unsigned char* __restrict__ labels, int classes,
                                                     float scale, float* __restrict__ dx) {
    const long long n = blockIdx.x;
    for (int k = blockIdx.y * THREADS + threadIdx.x; k < classes; k += gridDim.y * THREADS) {
        const long long i = n * classes + k;
        const float score = x[i], small = expf(-fabsf(score));
        dx[i] = scale * ((score >= 0.f ? 1.f : small) / (1.f + small) - labels[i]);
    }
}

}  // namespace

KERNEL(32) softmax_32(const float* x, const int* labels, int classes, double smoothing, float* kept, double* losses) {
    softmax_row<32>(x, labels, classes, smoothing, kept, losses);
}

KERNEL(256) softmax_256(const float* x, const int* labels, int classes, double smoothing, float* kept, double* losses) {
    softmax_row<256>(x, labels, classes, smoothing, kept, losses);
}

KERNEL(32) softmax_gradient_32(const float* x, const int* labels, int classes, double smoothing, const float* kept,
                               float scale, float* dx) {
    softmax_gradient_row<32>(x, labels, classes, smoothing, kept, scale, dx);
}

KERNEL(256) softmax_gradient_256(const float* x, const int* labels, int classes, double smoothing, const float* kept,
                                 float scale, float* dx) {
    softmax_gradient_row<256>(x, labels, classes, smoothing, kept, scale, dx);
}

KERNEL(32) sigmoid_32(const float* x, const unsigned char* labels, int classes, double* losses) {
    sigmoid_row<32>(x, labels, classes, losses);
}

KERNEL(256) sigmoid_256(const float* x, const unsigned char* labels, int classes, double* losses) {
    sigmoid_row<256>(x, labels, classes, losses);
}

KERNEL(32) sigmoid_gradient_32(const float* x, const unsigned char* labels, int classes, float scale, float* dx) {
    sigmoid_gradient_row<32>(x, labels, classes, scale, dx);
}

KERNEL(256) sigmoid_gradient_256(const float* x, const unsigned char* labels, int classes, float scale, float* dx) {
    sigmoid_gradient_row<256>(x, labels, classes, scale, dx);
}

// One block.
KERNEL(256) sum_losses(const double* losses, int rows, double scale, double* y) {
    double sum = 0.;
    for (int n = threadIdx.x; n < rows; n += 256) sum += losses[n];
    sum = dpnn::block_sum<256>(sum);
    if (threadIdx.x == 0) *y = scale * sum;
}
