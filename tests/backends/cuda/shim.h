// What CUDA gives a kernel, for a C++ compiler: kernels/*.cu are compiled behind this file, and run by shim.cc.
//
// A float atomicAdd is missing on purpose (sums are to be deterministic), and so is all that no kernel uses.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // the linker gathers all static memory of the kernels (shim.py); shim.cc poisons it
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(shim::dynamic)

#define VECTOR(T, name)                                                          \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                           \
    struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };                     \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                   \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(float, float)
VECTOR(double, double)
VECTOR(int, int)
VECTOR(unsigned, uint)
VECTOR(unsigned char, uchar)

struct Index { unsigned x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace shim {

extern unsigned char dynamic[];  // the block's dynamic shared memory
enum Wait { RUNS, AT_BLOCK, AT_WARP, ENDED };

void meet(Wait where, int line);  // returns when all threads of the block or of the warp are here
void sync_warp(unsigned mask, int line);
unsigned enter_shuffle(unsigned mask, uint64_t mine, int line);
uint64_t from_lane(unsigned which, unsigned lane, int line);  // `which` is what enter_shuffle returned

// An argument's kind and size in bytes, as shim.py packs them.
template <class T>
constexpr unsigned kind() {
    const char c = std::is_pointer_v<T> ? 'P' : std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : 'V';
    return unsigned(c) << 16 | unsigned(sizeof(T));
}

struct Kernel {
    void (*call)(void** arguments);
    unsigned threads, n_arguments;  // threads: those of its launch bounds
    const unsigned* kinds;
};

template <auto F>
struct Signature;
template <class... A, void (*F)(A...)>
struct Signature<F> {
    static constexpr unsigned n = sizeof...(A), kinds[] = {kind<A>()..., 0};
    template <size_t... I>
    __attribute__((no_sanitize("thread"))) static void pass(void** arguments, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
    }
    static void call(void** arguments) { pass(arguments, std::index_sequence_for<A...>()); }
};
#define SHIM_EXPORT(name, threads)                                                             \
    extern "C" __attribute__((visibility("default"))) const shim::Kernel shim_##name = {       \
        shim::Signature<&name>::call, threads, shim::Signature<&name>::n, shim::Signature<&name>::kinds};

template <class T>
T shuffle(unsigned mask, T value, unsigned lane, int line) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const unsigned which = enter_shuffle(mask, bits, line);
    bits = from_lane(which, lane, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline unsigned own_lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace shim

// Whoever calls a barrier is named by its line.
#define LINE int line = __builtin_LINE()
inline void __syncthreads(LINE) { shim::meet(shim::AT_BLOCK, line); }
inline void __syncwarp(unsigned mask = ~0u, LINE) { shim::sync_warp(mask, line); }
template <class T> T __shfl_sync(unsigned mask, T v, int from, LINE) {
    return shim::shuffle(mask, v, from % 32u, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by, LINE) {
    return shim::shuffle(mask, v, shim::own_lane() ^ by, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by, LINE) {
    return shim::shuffle(mask, v, shim::own_lane() + by < 32 ? shim::own_lane() + by : shim::own_lane(), line);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, LINE) {
    return shim::shuffle(mask, v, shim::own_lane() >= by ? shim::own_lane() - by : shim::own_lane(), line);
}
unsigned __ballot_sync(unsigned mask, int predicate, LINE);
inline int __any_sync(unsigned mask, int predicate, LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, LINE) { return __ballot_sync(mask, !predicate, line) == 0; }
#undef LINE

void device_copy(void* target, const void* source, int bytes, int room);
void device_close_copies();
void device_copies_arrived(int last);

int atomicAdd(int* target, int value);
unsigned atomicAdd(unsigned* target, unsigned value);
unsigned long long atomicAdd(unsigned long long* target, unsigned long long value);
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

// Reads and writes with a hint to the caches.
#define READ(name) template <class T> T name(const T* source) { return *source; }
#define WRITE(name) template <class T> void name(T* target, T value) { *target = value; }
READ(__ldg) READ(__ldca) READ(__ldcg) READ(__ldcs)
WRITE(__stwb) WRITE(__stcg) WRITE(__stcs) WRITE(__stwt)
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
// The bits of one type taken for another.
#define AS(name, From, To) inline To name(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
AS(__int_as_float, int, float) AS(__float_as_int, float, int)
AS(__uint_as_float, unsigned, float) AS(__float_as_uint, float, unsigned)
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
