// How threads lie over activations, seen as (pixels, channels): each pixel of an image, and each vector, is a row.
//
// A block is (across, down) threads. A thread has V neighbouring channels, four where channels % 4 == 0, which move as
// 16 bytes, of every (gridDim.y * down)-th pixel. gridDim.x blocks lie side by side over the channels. The launch is
// made by dpnn/backends/cuda/tiling.py.
#pragma once

namespace dpnn {

template <int V>
struct alignas(4 * V) Lanes {
    float v[V];
};

template <int V>
__device__ __forceinline__ Lanes<V> load(const float* from) {
    return *reinterpret_cast<const Lanes<V>*>(from);
}

template <int V>
__device__ __forceinline__ void store(float* to, const Lanes<V>& values) {
    *reinterpret_cast<Lanes<V>*>(to) = values;
}

// The first of this thread's channels; those of the last threads may lie beyond the end.
template <int V>
__device__ __forceinline__ int first_channel() {
    return (blockIdx.x * blockDim.x + threadIdx.x) * V;
}

__device__ __forceinline__ long long first_pixel() { return blockIdx.y * blockDim.y + threadIdx.y; }

__device__ __forceinline__ long long pixel_step() { return gridDim.y * blockDim.y; }

}  // namespace dpnn
