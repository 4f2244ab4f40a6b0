/* Local response normalisation across channels (Krizhevsky et al. 2012, 3.3), m pixels of c channels:
 *     y = x d^-beta,  d = k + alpha / size (sum of x² over `size` channels, size / 2 of them before)
 *     dx = dy d^-beta - 2 alpha beta / size x (sum of dy x d^(-beta - 1) over the windows that see x)
 * Bound by memory for beta = 3/4 (two roots in place of a power).
 */
#include "cpu.h"

static inline vec power(vec d, float beta) {
    if (beta == 0.75f) {
        vec half = root(d);
        return half * root(half);
    }
    vec r;
    for (int i = 0; i < LANES; i++) r[i] = powf(d[i], beta);
    return r;
}

/* The sum of line[j] ... line[j + size - 1]. */
static inline vec window(const float *line, long size) {
    vec sum = load(line);
    for (long i = 1; i < size; i++) sum += load(line + i);
    return sum;
}

/* Scratch of a thread, of `most` threads: a line of c + size - 1 numbers and room behind it, and a line of c. */
static inline float *line_of(float *work, long c, long size) { return work + omp_get_thread_num() * (2 * (c + size + LANES)); }

KERNEL void dpnn_lrn(int64_t m, int64_t c, const float *x, int64_t size, float alpha, float beta, float k, float *y,
                     int64_t most, float *work) {
#pragma omp parallel num_threads(most) if (m * c > WORTH)
    {
        float *line = line_of(work, c, size);
        memset(line, 0, (c + size + LANES) * sizeof *line);
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            const float *from = x + i * c;
            for (long j = 0; j < c; j++) line[size / 2 + j] = from[j] * from[j];
            for (long j = 0; j < c; j += LANES) {
                vec d = k + alpha / size * window(line + j, size);
                store_some(y + i * c + j, load_some(from + j, c - j) / power(d, beta), c - j);
            }
        }
    }
}

KERNEL void dpnn_lrn_gradient(int64_t m, int64_t c, const float *x, const float *dy, int64_t size, float alpha, float beta,
                              float k, float *dx, int64_t most, float *work) {
    float factor = -2 * alpha * beta / size;
    long before = (size - 1) / 2; /* the windows that see a channel lie mirrored to those that it sees */
#pragma omp parallel num_threads(most) if (m * c > WORTH)
    {
        float *line = line_of(work, c, size), *seen = line + c + size + LANES;
        memset(line, 0, 2 * (c + size + LANES) * sizeof *line);
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            const float *from = x + i * c, *back = dy + i * c;
            float *to = dx + i * c;
            for (long j = 0; j < c; j++) line[size / 2 + j] = from[j] * from[j];
            for (long j = 0; j < c; j += LANES) {
                vec d = k + alpha / size * window(line + j, size);
                vec direct = load_some(back + j, c - j) / power(d, beta);
                store_some(to + j, direct, c - j);
                store_some(seen + before + j, direct * load_some(from + j, c - j) / d, c - j);
            }
            for (long j = 0; j < c; j += LANES) {
                vec sum = factor * load_some(from + j, c - j) * window(seen + j, size);
                store_some(to + j, load_some(to + j, c - j) + sum, c - j);
            }
        }
    }
}
