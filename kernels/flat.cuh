// Walks over flat arrays: four numbers at a time where the arrays lie alike, one at a time elsewhere.
//
// A slice of a flat array begins at any number. Two arrays lie alike where both are as many numbers behind a multiple of
// four: slices [lo, hi) of arrays that are aligned themselves always do.
#pragma once
#include "device.cuh"

namespace dpnn {

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Numbers {
    T at[WIDTH];
};

template <int WIDTH, class T>
__device__ __forceinline__ Numbers<T, WIDTH> load(const T* from) {
    return *reinterpret_cast<const Numbers<T, WIDTH>*>(from);
}

template <class T>
__device__ __forceinline__ void store(T* to, Numbers<T, 1> number) {
    *to = number.at[0];
}

// By instruction, since the compiler takes an assignment of four numbers apart within a loop.
__device__ __forceinline__ void store(float* to, Numbers<float, 4> numbers) {
    const auto& [a, b, c, d] = numbers.at;
    __stwb(reinterpret_cast<float4*>(to), make_float4(a, b, c, d));
}

__device__ __forceinline__ void store(unsigned short* to, Numbers<unsigned short, 4> numbers) {
    const auto& [a, b, c, d] = numbers.at;
    const unsigned low = a | static_cast<unsigned>(b) << 16, high = c | static_cast<unsigned>(d) << 16;
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(low, high));
}

template <int WIDTH>
struct Width {
    static constexpr int value = WIDTH;
};

// How many numbers an array begins behind a multiple of four.
template <class T>
__device__ __forceinline__ int phase(const T* array) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(array) / sizeof(T) % 4);
}

// Calls step(Width<4>, i) for numbers [i, i + 4) and step(Width<1>, i) for number i, so that all of [0, n) are met once.
// `behind`: the phase of the arrays where they lie alike, else -1. The grid's threads share the numbers, 256 a block.
template <class Step>
__device__ __forceinline__ void walk(long long n, int behind, Step step) {
    const long long thread = blockIdx.x * 256ll + threadIdx.x, threads = gridDim.x * 256ll;
    if (behind < 0) {
        for (long long i = thread; i < n; i += threads) step(Width<1>(), i);
        return;
    }
    const long long before = (4 - behind) % 4, head = before < n ? before : n, tail = head + (n - head) / 4 * 4;
    for (long long i = head + 4 * thread; i < tail; i += 4 * threads) step(Width<4>(), i);
    if (thread < head) step(Width<1>(), thread);
    if (thread < n - tail) step(Width<1>(), tail + thread);
}

}  // namespace dpnn
