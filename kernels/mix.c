/* Passes over activations (m pixels, c channels): normalisation, sums of inputs, ReLU, and their gradients, in one go.
 *
 *     y  = ReLU( sum over normalised inputs a x  +  b  +  sum over plain inputs x )
 *     dz = the sum over readers of dy where y > 0;   sums of dz and of dz (x - mean) over the pixels
 *     dx = a dz + b x + d
 *
 * Bound by the memory that they pass over. Sums over pixels are taken in float for 64 pixels, then in double.
 */
#include "cpu.h"

enum { RUN = 64 };

/* `most`: for so many threads there is scratch. */

/* Scratch of one thread, 3 * count lines of c doubles: totals, and the sums of a run as floats. */
static void clear(double *total, long numbers) { memset(total, 0, numbers * sizeof *total); }

static void flush(double *total, float *run, long numbers) {
    for (long i = 0; i < numbers; i++) total[i] += run[i];
    memset(run, 0, numbers * sizeof *run);
}

static void add_threads(double *sums, const double *work, long numbers, long stride, int threads) {
    for (long i = 0; i < numbers; i++) {
        double total = 0;
        for (int t = 0; t < threads; t++) total += work[t * stride + i];
        sums[i] = total;
    }
}

/* sums (2, c) = the sums of x - centre and of its square. `work`: 4 c doubles for each thread. */
KERNEL void dpnn_moments(int64_t m, int64_t c, const float *x, const float *centre, double *sums, int64_t most,
                         double *work) {
    int threads = 1;
#pragma omp parallel num_threads(most) if (m * c > WORTH)
    {
        long lo, hi;
        my_rows(m, &lo, &hi);
        double *total = work + omp_get_thread_num() * 4 * c;
        float *sum = (float *)(total + 2 * c), *square = sum + c;
        clear(total, 4 * c);
#pragma omp master
        threads = omp_get_num_threads();
        for (long i = lo; i < hi; i++) {
            const float *row = x + i * c;
            for (long j = 0; j < c; j++) {
                float d = row[j] - centre[j];
                sum[j] += d;
                square[j] += d * d;
            }
            if ((i - lo) % RUN == RUN - 1) flush(total, sum, 2 * c);
        }
        flush(total, sum, 2 * c);
    }
    add_threads(sums, work, 2 * c, 4 * c, threads);
}

/* sums (2, c) = the sums of x and of its square, each number in double. `work`: 2 c doubles for each thread. */
KERNEL void dpnn_sums(int64_t m, int64_t c, const float *x, double *sums, int64_t most, double *work) {
    int threads = 1;
#pragma omp parallel num_threads(most) if (m * c > WORTH)
    {
        long lo, hi;
        my_rows(m, &lo, &hi);
        double *total = work + omp_get_thread_num() * 2 * c, *squares = total + c;
        clear(total, 2 * c);
#pragma omp master
        threads = omp_get_num_threads();
        for (long i = lo; i < hi; i++)
            for (long j = 0; j < c; j++) {
                double value = x[i * c + j];
                total[j] += value;
                squares[j] += value * value;
            }
    }
    add_threads(sums, work, 2 * c, 2 * c, threads);
}

/* y = ReLU?( sum of xs[i] as[i] + b + sum of plains[i] ); b may be NULL. */
KERNEL void dpnn_combine(int64_t m, int64_t c, int64_t n_norms, const float **xs, const float **as, const float *b,
                         int64_t n_plains, const float **plains, int64_t relu, float *y) {
#pragma omp parallel for schedule(static) if (m * c > WORTH)
    for (long i = 0; i < m; i++) {
        float *to = y + i * c;
        for (long j = 0; j < c; j += LANES) {
            long left = c - j;
            vec sum = b ? load_some(b + j, left) : zeros();
            for (long n = 0; n < n_norms; n++) sum += load_some(xs[n] + i * c + j, left) * load_some(as[n] + j, left);
            for (long n = 0; n < n_plains; n++) sum += load_some(plains[n] + i * c + j, left);
            store_some(to + j, relu ? positive(sum) : sum, left);
        }
    }
}

/* dz (in place of the first reader's gradient) = (dz + sum of others) where y > 0 (y NULL: everywhere), also written to
 * copies; sums (1 + n_norms, c) = the sums of dz, and of dz (xs[n] - centres[n]); NULL: none.
 * `work`: 2 (1 + n_norms) c doubles for each thread. */
KERNEL void dpnn_gather(int64_t m, int64_t c, float *dz, int64_t n_others, const float **others, const float *y,
                        int64_t n_copies, float **copies, int64_t n_norms, const float **xs, const float **centres,
                        double *sums, int64_t most, double *work) {
    int threads = 1;
    long lines = 1 + n_norms;
#pragma omp parallel num_threads(most) if (m * c > WORTH)
    {
        long lo, hi;
        my_rows(m, &lo, &hi);
        double *total = work + omp_get_thread_num() * 2 * lines * c;
        float *run = (float *)(total + lines * c);
        if (sums) clear(total, 2 * lines * c);
#pragma omp master
        threads = omp_get_num_threads();
        for (long i = lo; i < hi; i++) {
            for (long j = 0; j < c; j += LANES) {
                long at = i * c + j, left = c - j;
                vec d = load_some(dz + at, left);
                for (long n = 0; n < n_others; n++) d += load_some(others[n] + at, left);
                if (y) d = (vec)((ivec)d & (load_some(y + at, left) > 0));
                if (y || n_others) store_some(dz + at, d, left);
                for (long n = 0; n < n_copies; n++) store_some(copies[n] + at, d, left);
                if (!sums) continue;
                store_some(run + j, load_some(run + j, left) + d, left);
                for (long n = 0; n < n_norms; n++) {
                    float *line = run + (1 + n) * c + j;
                    vec x = load_some(xs[n] + at, left) - load_some(centres[n] + j, left);
                    store_some(line, load_some(line, left) + d * x, left);
                }
            }
            if (sums && (i - lo) % RUN == RUN - 1) flush(total, run, lines * c);
        }
        if (sums) flush(total, run, lines * c);
    }
    if (sums) add_threads(sums, work, lines * c, 2 * lines * c, threads);
}

/* dx = a dz + b x + d; dx may be dz. */
KERNEL void dpnn_normalize_gradient(int64_t m, int64_t c, const float *dz, const float *x, const float *a, const float *b,
                                    const float *d, float *dx) {
#pragma omp parallel for schedule(static) if (m * c > WORTH)
    for (long i = 0; i < m; i++)
        for (long j = 0; j < c; j += LANES) {
            long at = i * c + j, left = c - j;
            vec sum = load_some(d + j, left) + load_some(x + at, left) * load_some(b + j, left);
            store_some(dx + at, sum + load_some(dz + at, left) * load_some(a + j, left), left);
        }
}
