/* What the CPU kernels have in common: vectors, and how rows are shared among threads.
 *
 * Each .c file is compiled once for each instruction set (setup.py); the one that fits is loaded at run time. Images lie
 * as (N, H, W, C); letters as in dpnn/backends/base.py. Every kernel is parallel by OpenMP inside, and adds in an order
 * that depends on the number of threads only: static schedules, partial sums added in the order of threads.
 */
#ifndef DPNN_CPU_H
#define DPNN_CPU_H

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define KERNEL __attribute__((visibility("default")))

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec zeros(void) { return (vec){0}; }
static inline ivec zeros_int(void) { return (ivec){0}; }
/* ReLU; what is not a number stays so. */
static inline vec positive(vec v) { return (vec)((ivec)v & ~(v <= 0)); }

#if defined(__AVX2__) && !defined(__AVX512F__)
static inline __m256i first_lanes(long n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

/* The first n numbers (1 or more), zeros beyond. */
static inline vec load_some(const float *p, long n) {
    if (n >= LANES) return load(p);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (vec)_mm256_maskload_ps(p, first_lanes(n));
#else
    vec v = zeros();
    for (long i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

static inline void store_some(float *p, vec v, long n) {
    if (n >= LANES) {
        store(p, v);
        return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#else
    for (long i = 0; i < n; i++) p[i] = v[i];
#endif
}

static inline vec root(vec v) {
    vec r;
    for (int i = 0; i < LANES; i++) r[i] = sqrtf(v[i]);
    return r;
}

/* The run [*lo, *hi) of n rows that is this thread's. */
static inline void my_rows(long n, long *lo, long *hi) {
    long size = omp_get_num_threads(), rank = omp_get_thread_num();
    *lo = n * rank / size;
    *hi = n * (rank + 1) / size;
}

/* Below this many numbers a second thread costs more than it brings. */
enum { WORTH = 1 << 14 };

#endif
