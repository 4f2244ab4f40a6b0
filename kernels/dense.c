/* The fully connected layer forward: y (N, K) = ReLU?( x (N, C) w (K, C)^T + bias ).
 *
 * Both operands lie along C, so y is made of dot products: ROWS x FILTERS of them at a time stay in registers, and nothing
 * is packed. C is taken in runs of LENGTH, so that the images' part stays in the second cache while the weights, which are
 * read once, pass by. Bound by the multiplications, 2 N C K operations, or for few images by reading the weights, 4 C K
 * bytes.
 */
#include "cpu.h"

#if LANES == 16
enum { ROWS = 6, FILTERS = 4 };
#else
enum { ROWS = 3, FILTERS = 4 };
#endif
enum { LENGTH = 2048, IMAGES = 96 }; /* of C, and of N: 768 KiB */

/* The sum of a vector's numbers, halves first. */
static inline float total(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    store(part, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
#endif
}

/* One step of `dots`: LANES numbers along C, of which `left` are there. */
static inline __attribute__((always_inline)) void step(const float *x, const float *w, long c, int rows, int filters, long left,
                                                       vec sum[ROWS][FILTERS]) {
    vec filter[FILTERS];
#pragma GCC unroll 4
    for (int j = 0; j < filters; j++) filter[j] = load_some(w + j * c, left);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        vec image = load_some(x + i * c, left);
#pragma GCC unroll 4
        for (int j = 0; j < filters; j++) sum[i][j] += image * filter[j];
    }
}

/* Dot products of `rows` images and `filters` filters over `length` numbers, added to y, or with `first` in its place. */
static inline __attribute__((always_inline)) void dots(const float *x, const float *w, float *y, long c, long k, long length,
                                                       int rows, int filters, int first) {
    vec sum[ROWS][FILTERS];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < filters; j++) sum[i][j] = zeros();
    long at = 0;
    for (; at + LANES <= length; at += LANES) step(x + at, w + at, c, rows, filters, LANES, sum);
    if (at < length) step(x + at, w + at, c, rows, filters, length - at, sum);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < filters; j++) {
            float *to = y + i * k + j;
            *to = total(sum[i][j]) + (first ? 0 : *to);
        }
}

/* All images of a block by one filter after the other. */
static void by_filter(const float *x, const float *w, float *y, long n, long c, long k, long length, long filters, int first) {
    for (long j = 0; j < filters; j++)
        for (long i = 0; i < n; i++) dots(x + i * c, w + j * c, y + i * k + j, c, k, length, 1, 1, first);
}

KERNEL void dpnn_dense(int64_t n, int64_t c, int64_t k, const float *x, const float *w, const float *bias, int64_t relu,
                       float *y) {
#pragma omp parallel if (n * c * k > 16 * WORTH)
    {
        long lo, hi;
        my_rows((k + FILTERS - 1) / FILTERS, &lo, &hi);
        lo *= FILTERS;
        hi = hi * FILTERS < k ? hi * FILTERS : k;
        for (long image = 0; image < n; image += IMAGES) {
            long end = image + IMAGES < n ? image + IMAGES : n;
            for (long at = 0; at < c; at += LENGTH) {
                long length = c - at < LENGTH ? c - at : LENGTH;
                for (long filter = lo; filter < hi; filter += FILTERS) {
                    const float *images = x + image * c + at, *weights = w + filter * c + at;
                    float *to = y + image * k + filter;
                    long filters = hi - filter < FILTERS ? hi - filter : FILTERS, i = 0;
                    if (filters == FILTERS) {
                        for (; i + ROWS <= end - image; i += ROWS)
                            dots(images + i * c, weights, to + i * k, c, k, length, ROWS, FILTERS, at == 0);
                        for (; i < end - image; i++)
                            dots(images + i * c, weights, to + i * k, c, k, length, 1, FILTERS, at == 0);
                    } else {
                        by_filter(images, weights, to, end - image, c, k, length, filters, at == 0);
                    }
                }
            }
        }
        for (long i = 0; i < n; i++)
            for (long j = lo; j < hi; j++) {
                float value = y[i * k + j] + (bias ? bias[j] : 0);
                y[i * k + j] = relu && value <= 0 ? 0 : value;
            }
    }
}
