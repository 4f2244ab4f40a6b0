/* Max pooling: y = the largest number of each window; its place in the window is kept, one byte, for the gradient.
 * The first of equal numbers counts. Bound by memory.
 */
#include "cpu.h"

typedef struct {
    int64_t n, h, w, c, p, q, rows, cols, down, right, above, left;
} Window;

/* `places` (N, P, Q, C) may be NULL. */
KERNEL void dpnn_maxpool(const Window *s, const float *x, float *y, uint8_t *places) {
#pragma omp parallel for collapse(2) schedule(static) if (s->n * s->h * s->w * s->c > WORTH)
    for (long n = 0; n < s->n; n++)
        for (long p = 0; p < s->p; p++)
            for (long q = 0; q < s->q; q++) {
                long out = ((n * s->p + p) * s->q + q) * s->c;
                long r0 = p * s->down - s->above, c0 = q * s->right - s->left;
                int first = 1;
                for (long r = r0 < 0 ? -r0 : 0; r < s->rows && r0 + r < s->h; r++)
                    for (long t = c0 < 0 ? -c0 : 0; t < s->cols && c0 + t < s->w; t++) {
                        const float *from = x + ((n * s->h + r0 + r) * s->w + c0 + t) * s->c;
                        float *to = y + out;
                        uint8_t place = r * s->cols + t;
                        if (first) {
                            memcpy(to, from, s->c * sizeof *to);
                            if (places) memset(places + out, place, s->c);
                        } else if (places) {
                            uint8_t *kept = places + out;
                            for (long c = 0; c < s->c; c++) {
                                int better = from[c] > to[c] || from[c] != from[c]; /* not a number is passed on */
                                to[c] = better ? from[c] : to[c];
                                kept[c] = better ? place : kept[c];
                            }
                        } else {
                            for (long c = 0; c < s->c; c++) to[c] = from[c] > to[c] || from[c] != from[c] ? from[c] : to[c];
                        }
                        first = 0;
                    }
            }
}

KERNEL void dpnn_maxpool_gradient(const Window *s, const float *dy, const uint8_t *places, float *dx) {
#pragma omp parallel for collapse(2) schedule(static) if (s->n * s->h * s->w * s->c > WORTH)
    for (long n = 0; n < s->n; n++)
        for (long h = 0; h < s->h; h++)
            for (long w = 0; w < s->w; w++) {
                float *to = dx + ((n * s->h + h) * s->w + w) * s->c;
                memset(to, 0, s->c * sizeof *to);
                /* Window p sees row h at place h + above - p down, if that is in [0, rows). */
                long last_p = (h + s->above) / s->down, last_q = (w + s->left) / s->right;
                for (long p = last_p < s->p ? last_p : s->p - 1; p >= 0 && h + s->above - p * s->down < s->rows; p--)
                    for (long q = last_q < s->q ? last_q : s->q - 1; q >= 0 && w + s->left - q * s->right < s->cols; q--) {
                        long from = ((n * s->p + p) * s->q + q) * s->c;
                        uint8_t place = (h + s->above - p * s->down) * s->cols + w + s->left - q * s->right;
                        for (long c = 0; c < s->c; c++) to[c] += places[from + c] == place ? dy[from + c] : 0;
                    }
            }
}
