/* The processor: which of the compiled variants it runs, and how it treats the smallest numbers. */
#include "cpu.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* 0 the baseline, 1 AVX2 with FMA, 2 AVX-512. */
KERNEL int dpnn_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512bw") ? 2 : 1;
#else
    return 0;
#endif
}

/* Whether this thread takes denormal numbers (below 1.2e-38) for 0, from here on; returns what held before. Threads that
 * it starts inherit it. A processor needs a hundred times as long for an operation on such a number. */
KERNEL int dpnn_flush(int on) {
#if defined(__SSE__)
    enum { BOTH = 0x8040 }; /* results, and operands */
    unsigned old = _mm_getcsr();
    _mm_setcsr(on ? old | BOTH : old & ~BOTH);
    return (old & BOTH) == BOTH;
#elif defined(__aarch64__)
    enum { FLUSH = 1 << 24 };
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"(on ? old | FLUSH : old & ~(uint64_t)FLUSH));
    return (old & FLUSH) != 0;
#else
    return on;
#endif
}

/* How many threads OpenMP works with; but for the calling one they flush denormal numbers. */
KERNEL void dpnn_set_threads(int n) {
    omp_set_num_threads(n);
#pragma omp parallel
    if (omp_get_thread_num() > 0) dpnn_flush(1);
}
