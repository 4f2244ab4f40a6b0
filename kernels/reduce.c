/* Sums over the arrays of the ranks of a node, which lie in memory that all of them see, and the counters by which the
 * ranks tell one another how far they are. Bound by memory: 4 (k + 1) bytes a number, for k arrays.
 */
#include "cpu.h"

/* to = the sum of k arrays of n numbers, added in their order; `to` may be one of them. */
KERNEL void dpnn_add(int64_t n, int64_t k, const float **from, float *to) {
#pragma omp parallel for schedule(static) if (n > WORTH)
    for (long i = 0; i < n; i += LANES) {
        vec sum = load_some(from[0] + i, n - i);
        for (long j = 1; j < k; j++) sum += load_some(from[j] + i, n - i);
        store_some(to + i, sum, n - i);
    }
}

/* The sum of the squares of n numbers: each thread's in double, added in the order of threads. */
KERNEL double dpnn_squares(int64_t n, const float *x) {
    double parts[256] = {0}, total = 0;
#pragma omp parallel num_threads(omp_get_max_threads() < 256 ? omp_get_max_threads() : 256) if (n > WORTH)
    {
        long lo, hi;
        my_rows(n, &lo, &hi);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = lo; i < hi; i++) sum += (double)x[i] * x[i];
        parts[omp_get_thread_num()] = sum;
    }
    for (int t = 0; t < 256; t++) total += parts[t];
    return total;
}

/* What was written before is seen by whoever sees the counter's new value. */
KERNEL void dpnn_publish(int64_t *counter, int64_t value) { __atomic_store_n(counter, value, __ATOMIC_RELEASE); }

/* The least of n counters, `stride` numbers apart. */
KERNEL int64_t dpnn_least(const int64_t *counters, int64_t n, int64_t stride) {
    int64_t least = INT64_MAX;
    for (long i = 0; i < n; i++) {
        int64_t value = __atomic_load_n(counters + i * stride, __ATOMIC_ACQUIRE);
        least = value < least ? value : least;
    }
    return least;
}

/* bfloat16 for the wire: out = x + error rounded to the nearest, ties to even; error = what that left out. What is not a
 * number stays so, and leaves nothing. */
KERNEL void dpnn_to_bfloat16(int64_t n, const float *x, float *error, uint16_t *out) {
#pragma omp parallel for simd schedule(static) if (n > WORTH)
    for (long i = 0; i < n; i++) {
        float value = x[i] + error[i], rounded;
        uint32_t bits, kept;
        memcpy(&bits, &value, 4);
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        kept = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : kept;
        out[i] = (uint16_t)kept;
        kept <<= 16;
        memcpy(&rounded, &kept, 4);
        float left = value - rounded;
        error[i] = left - left == 0 ? left : 0;
    }
}

/* to = the sum of k arrays of bfloat16 that lie `stride` numbers apart, added in float32 in their order. */
KERNEL void dpnn_add_bfloat16(int64_t n, int64_t k, int64_t stride, const uint16_t *from, float *to) {
#pragma omp parallel for simd schedule(static) if (n > WORTH)
    for (long i = 0; i < n; i++) {
        float sum = 0;
        for (long j = 0; j < k; j++) {
            uint32_t bits = (uint32_t)from[j * stride + i] << 16;
            float value;
            memcpy(&value, &bits, 4);
            sum += value;
        }
        to[i] = sum;
    }
}
