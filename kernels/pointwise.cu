// What works on each number by itself.
//
// relu           y = max(x, 0)                        n numbers   bound by memory: reads 4 n bytes, writes 4 n
// relu_gradient  dx = dy where y > 0, else 0          n numbers   bound by memory: reads 8 n bytes, writes 4 n
//
// A thread takes every (gridDim.x * blockDim.x)-th number.
#include "device.cuh"

KERNEL(256) relu(const float* x, float* y, long long n) {
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) y[i] = x[i] > 0.f ? x[i] : 0.f;
}

// dx may be dy.
KERNEL(256) relu_gradient(const float* y, const float* dy, float* dx, long long n) {
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) dx[i] = y[i] > 0.f ? dy[i] : 0.f;
}
