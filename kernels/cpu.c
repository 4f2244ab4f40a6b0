/* Which of the compiled variants this processor runs: 0 the baseline, 1 AVX2 with FMA, 2 AVX-512. */
#include "cpu.h"

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

KERNEL void dpnn_set_threads(int n) { omp_set_num_threads(n); }
