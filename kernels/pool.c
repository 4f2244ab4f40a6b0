/* Max pooling: y = the largest number of each window; its place in the window is kept, one byte, for the gradient.
 * The first of equal numbers counts. Bound by memory.
 */
#include "cpu.h"

typedef struct {
    int64_t n, h, w, c, p, q, rows, cols, down, right, above, left;
} Window;

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* The first n places (1 or more), as numbers; zeros beyond. */
static inline ivec load_places(const uint8_t *p, long n) {
    bytes places = {0};
    if (n >= LANES)
        places = *(const bytes *)p;
    else
        memcpy(&places, p, n);
    return __builtin_convertvector(places, ivec);
}

/* `places` (N, P, Q, C) may be NULL. */
KERNEL void dpnn_maxpool(const Window *s, const float *x, float *y, uint8_t *places) {
#pragma omp parallel for collapse(2) schedule(static) if (s->n * s->h * s->w * s->c > WORTH)
    for (long n = 0; n < s->n; n++)
        for (long p = 0; p < s->p; p++)
            for (long q = 0; q < s->q; q++) {
                long top = p * s->down - s->above, first = q * s->right - s->left;
                long r_end = s->h - top < s->rows ? s->h - top : s->rows, t_end = s->w - first < s->cols ? s->w - first : s->cols;
                long r_begin = top < 0 ? -top : 0, t_begin = first < 0 ? -first : 0;
                const float *window = x + ((n * s->h + top) * s->w + first) * s->c;
                long out = ((n * s->p + p) * s->q + q) * s->c;
                for (long c = 0; c < s->c; c += LANES) {
                    vec best = load_some(window + (r_begin * s->w + t_begin) * s->c + c, s->c - c);
                    ivec place = zeros_int() + (int32_t)(r_begin * s->cols + t_begin);
                    for (long r = r_begin; r < r_end; r++)
                        for (long t = t_begin; t < t_end; t++) {
                            vec v = load_some(window + (r * s->w + t) * s->c + c, s->c - c);
                            ivec better = (v > best) | (v != v); /* what is not a number is passed on */
                            best = (vec)(((ivec)v & better) | ((ivec)best & ~better));
                            place = ((zeros_int() + (int32_t)(r * s->cols + t)) & better) | (place & ~better);
                        }
                    store_some(y + out + c, best, s->c - c);
                    if (!places) continue;
                    bytes kept = __builtin_convertvector(place, bytes);
                    if (s->c - c >= LANES)
                        *(bytes *)(places + out + c) = kept;
                    else
                        for (long i = 0; i < s->c - c; i++) places[out + c + i] = kept[i];
                }
            }
}

KERNEL void dpnn_maxpool_gradient(const Window *s, const float *dy, const uint8_t *places, float *dx) {
#pragma omp parallel for collapse(2) schedule(static) if (s->n * s->h * s->w * s->c > WORTH)
    for (long n = 0; n < s->n; n++)
        for (long h = 0; h < s->h; h++)
            for (long w = 0; w < s->w; w++) {
                float *to = dx + ((n * s->h + h) * s->w + w) * s->c;
                /* Window p sees row h at place h + above - p down, if that is in [0, rows). */
                long last_p = (h + s->above) / s->down, last_q = (w + s->left) / s->right;
                for (long c = 0; c < s->c; c += LANES) {
                    vec sum = zeros();
                    for (long p = last_p < s->p ? last_p : s->p - 1; p >= 0 && h + s->above - p * s->down < s->rows; p--)
                        for (long q = last_q < s->q ? last_q : s->q - 1; q >= 0 && w + s->left - q * s->right < s->cols; q--) {
                            long from = ((n * s->p + p) * s->q + q) * s->c + c;
                            int32_t place = (h + s->above - p * s->down) * s->cols + w + s->left - q * s->right;
                            ivec mine = load_places(places + from, s->c - c) == place;
                            sum += (vec)((ivec)load_some(dy + from, s->c - c) & mine);
                        }
                    store_some(to + c, sum, s->c - c);
                }
            }
}
