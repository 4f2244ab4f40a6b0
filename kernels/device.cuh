// What all CUDA kernels share: how they are declared, asynchronous copies, maxima, sums over a block.
//
// Kernels are plain `extern "C"` functions of pointers and scalars; dpnn/backends/cuda/source.py puts their includes in
// place, so that NVRTC, nvcc and a C++ compiler (the tests' stand-in for a device) read one and the same text.
// Activations are channels-last: (N, H, W, C) in memory, or (N, C); parameters are canonical.
#pragma once

// KERNEL(threads a block) or KERNEL(threads a block, blocks a multiprocessor holds at least).
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

#ifdef __CUDACC__
// Shared memory whose size the launch says, 16-byte aligned.
#define DYNAMIC_SHARED(T, name)                                        \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* name = reinterpret_cast<T*>(name##_bytes)
#endif

namespace dpnn {

// target = source, BYTES (4, 8 or 16) from global to shared memory, aligned to BYTES; zeros where not `inside`. It may
// arrive as late as at `copies_arrived`, and others see it after a barrier behind that.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* target, const void* source, bool inside) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(target));
    const int n = inside ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(n) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(source), "n"(BYTES), "r"(n)
                     : "memory");
#else
    device_copy(target, source, inside ? BYTES : 0, BYTES);
#endif
}

// Ends a group of asynchronous copies.
__device__ __forceinline__ void close_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    device_close_copies();
#endif
}

// Returns when all groups but the LAST ones have arrived: of this thread's copies.
template <int LAST>
__device__ __forceinline__ void copies_arrived() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(LAST) : "memory");
#else
    device_copies_arrived(LAST);
#endif
}

// The larger of two numbers; what is no number where one of them isn't.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDACC__
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
#else
    return a > b || a != a ? a : b;
#endif
}

// The sum over a block of THREADS threads (a multiple of 32), to all of them; in a fixed order.
template <int THREADS, class T>
__device__ __forceinline__ T block_sum(T value) {
    __shared__ T sums[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    __syncthreads();  // `sums` may still be read by the last call
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    T total = sums[0];
    for (int i = 1; i < THREADS / 32; ++i) total += sums[i];
    return total;
}

}  // namespace dpnn
