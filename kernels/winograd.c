/* Convolution of stride 1 by Winograd's minimal filtering (Lavin and Gray 2015): F(4x4, 3x3) and F(2x2, 5x5).
 *
 * A tile of 6 x 6 inputs d and a filter g give m x m outputs (m = 4 for 3 x 3, 2 for 5 x 5) as
 *     Y = A^T [ (G g G^T) . (B^T d B) ] A,   points 0, 1, -1, 2, -2, infinity:
 * 36 products in place of 144 or 100. Summed over input channels each of the 36 places is a matrix product over tiles.
 * Filters' gradient: dg = G^T [ sum over tiles (A dY A^T) . (B^T d B) ] G. Input's gradient: the same convolution of dY
 * with the filters turned around.
 *
 * T tiles are taken at a time; channels lie in panels of 16, so that both operands of the products are read in order:
 *     V [36][C/16][T][16] inputs   Z [36][K/16][T][16] outputs   U [36][K/16][C][16] filters   dU [36][K/16][C/16][16][16]
 * with the 36 an odd number of cache lines apart: the transforms write to all of them at once, and addresses a multiple
 * of 4096 bytes apart would push each other out of the first cache.
 * Bound by the matrix products, 2 x 36 T C K operations; the transforms pass over the images once.
 */
#include "cpu.h"

enum { PLACES = 36, PANEL = 16, PARTS = PANEL / LANES };
#if LANES == 16
enum { ROWS = 12, GRADIENT_ROWS = 8 };
#else
enum { ROWS = 6, GRADIENT_ROWS = 4 };
#endif
enum { BLOCK = 16 }; /* panels of input channels whose filters stay in the first cache */

typedef struct {
    int64_t n, h, w, c;    /* images read, all channels */
    int64_t p, q, k;       /* images written, all channels */
    int64_t above, left;   /* padding */
    int64_t r;             /* rows and columns of a filter: 3 or 5 */
    int64_t groups;
    int64_t tiles;         /* T: tiles at a time, a multiple of 12 */
} Shape;

typedef struct {
    long m, rows, cols, count, c, k, cp, kp; /* tiles an image has; channels and panels of one group */
} Tiling;

static Tiling tiling(const Shape *s) {
    Tiling t = {.m = 7 - s->r, .c = s->c / s->groups, .k = s->k / s->groups};
    t.rows = (s->p + t.m - 1) / t.m;
    t.cols = (s->q + t.m - 1) / t.m;
    t.count = s->n * t.rows * t.cols;
    t.cp = (t.c + PANEL - 1) / PANEL;
    t.kp = (t.k + PANEL - 1) / PANEL;
    return t;
}

/* Numbers from one of the 36 to the next, where each has so many lines of 16 numbers. */
static inline long apart(long lines) { return (lines | 1) * PANEL; }

static const float SCALE[5] = {1.f / 4, -1.f / 6, -1.f / 6, 1.f / 24, 1.f / 24};
static const float POINT[5] = {0, 1, -1, 2, -2};

/* G (6, r) */
static void make_g(long r, float g[6][5]) {
    for (int i = 0; i < 5; i++) {
        float power = SCALE[i];
        for (int j = 0; j < r; j++, power *= POINT[i]) g[i][j] = power;
    }
    for (int j = 0; j < r; j++) g[5][j] = j == r - 1;
}

/* B^T d */
static inline void input_line(const vec *d, vec *o, int step) {
    vec a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], e = d[4] - d[2], f = 2 * (d[3] - d[1]);
    o[0] = 4 * (d[0] - d[2]) + e;
    o[step] = a + b;
    o[2 * step] = a - b;
    o[3 * step] = e + f;
    o[4 * step] = e - f;
    o[5 * step] = d[5] - d[3] - 2 * f;
}

/* A^T z */
static inline void output_line(const vec *z, vec *y, long m) {
    vec a = z[1] + z[2], b = z[3] + z[4], e = z[1] - z[2], f = z[3] - z[4];
    y[0] = z[0] + a + b;
    if (m == 2) {
        y[1] = e + 2 * f + z[5];
    } else {
        y[1] = e + 2 * f;
        y[2] = a + 4 * b;
        y[3] = e + 8 * f + z[5];
    }
}

/* A dy */
static inline void gradient_line(const vec *y, vec *z, long m) {
    vec a = y[0], b = y[1], e = y[0], f = 2 * y[1];
    if (m == 4) {
        a += y[2], b += y[3], e += 4 * y[2], f += 8 * y[3];
    }
    z[0] = y[0];
    z[1] = a + b;
    z[2] = a - b;
    z[3] = e + f;
    z[4] = e - f;
    z[5] = y[m - 1];
}

/* `size` x `size` pixels from (row, column) on, `left` channels, zeros outside of an image (h, w) of c channels. */
static inline void load_tile(const float *x, long h, long w, long c, long row, long col, long size, long left, vec d[6][6]) {
    if (row >= 0 && col >= 0 && row + size <= h && col + size <= w && left >= LANES) {
        for (long j = 0; j < size; j++)
            for (long i = 0; i < size; i++) d[j][i] = load(x + ((row + i) * w + col + j) * c);
        return;
    }
    for (long j = 0; j < size; j++)
        for (long i = 0; i < size; i++) {
            long y = row + i, z = col + j;
            int inside = y >= 0 && y < h && z >= 0 && z < w && left > 0;
            d[j][i] = inside ? load_some(x + (y * w + z) * c, left) : zeros();
        }
}

/* V or Z of tiles [first, first + count) of one group: `x` at its first channel; as inputs, or as gradients of outputs. */
static void transform(const Shape *s, const Tiling *t, const float *x, long first, long count, float *v, int gradient) {
    long panels = gradient ? t->kp : t->cp, channels = gradient ? t->k : t->c, stride = gradient ? s->k : s->c;
    long h = gradient ? s->p : s->h, w = gradient ? s->q : s->w, size = gradient ? t->m : 6;
    long above = gradient ? 0 : s->above, before = gradient ? 0 : s->left;
#pragma omp for collapse(2) schedule(static)
    for (long tile = 0; tile < count; tile++)
        for (long panel = 0; panel < panels; panel++) {
            long number = first + tile, n = number / (t->rows * t->cols), rest = number % (t->rows * t->cols);
            long row = rest / t->cols * t->m - above, col = rest % t->cols * t->m - before;
            for (int part = 0; part < PARTS; part++) {
                long channel = panel * PANEL + part * LANES;
                vec d[6][6], half[6][6], out[6];
                load_tile(x + n * h * w * stride + channel, h, w, stride, row, col, size, channels - channel, d);
                float *to = v + (panel * s->tiles + tile) * PANEL + part * LANES;
                long place = apart(panels * s->tiles);
                for (long j = 0; j < size; j++) {
                    if (gradient) {
                        gradient_line(d[j], out, t->m);
                        for (int i = 0; i < 6; i++) half[i][j] = out[i];
                    } else {
                        input_line(d[j], &half[0][j], 6);
                    }
                }
                for (int i = 0; i < 6; i++) {
                    if (gradient)
                        gradient_line(half[i], out, t->m);
                    else
                        input_line(half[i], out, 1);
                    for (int j = 0; j < 6; j++) store(to + (i * 6 + j) * place, out[j]);
                }
            }
        }
}

/* y = A^T z A scale + bias, ReLU, of tiles [first, first + count) of one group. */
static void transform_output(const Shape *s, const Tiling *t, const float *z, long first, long count, const float *scale,
                             const float *bias, int relu, float *y) {
    long place = apart(t->kp * s->tiles);
#pragma omp for collapse(2) schedule(static)
    for (long tile = 0; tile < count; tile++)
        for (long panel = 0; panel < t->kp; panel++) {
            long number = first + tile, n = number / (t->rows * t->cols), rest = number % (t->rows * t->cols);
            long row = rest / t->cols * t->m, col = rest % t->cols * t->m;
            for (int part = 0; part < PARTS; part++) {
                long channel = panel * PANEL + part * LANES, left = t->k - channel;
                if (left <= 0) break;
                const float *from = z + (panel * s->tiles + tile) * PANEL + part * LANES;
                vec column[6], half[4][6], out[4];
                for (int j = 0; j < 6; j++) {
                    for (int i = 0; i < 6; i++) column[i] = load(from + (i * 6 + j) * place);
                    output_line(column, out, t->m);
                    for (long i = 0; i < t->m; i++) half[i][j] = out[i];
                }
                vec factor = scale ? load_some(scale + channel, left) : zeros();
                vec summand = bias ? load_some(bias + channel, left) : zeros();
                for (long i = 0; i < t->m && row + i < s->p; i++) {
                    output_line(half[i], out, t->m);
                    for (long j = 0; j < t->m && col + j < s->q; j++) {
                        vec value = scale ? out[j] * factor + summand : out[j] + summand;
                        store_some(y + ((n * s->p + row + i) * s->q + col + j) * s->k + channel,
                                   relu ? positive(value) : value, left);
                    }
                }
            }
        }
}

/* One panel of outputs of one place: z [T][16] = v [C/16][T][16] u [C][16], for count tiles. */
static void multiply(const float *v, const float *u, float *z, long panels, long tiles, long count) {
    for (long block = 0; block < panels; block += BLOCK) {
        long end = block + BLOCK < panels ? block + BLOCK : panels;
        for (long tile = 0; tile < count; tile += ROWS) {
            vec sum[ROWS][PARTS];
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < PARTS; j++) sum[i][j] = block ? load(z + (tile + i) * PANEL + j * LANES) : zeros();
            for (long panel = block; panel < end; panel++) {
                const float *a = v + (panel * tiles + tile) * PANEL, *b = u + panel * PANEL * PANEL;
                for (int c = 0; c < PANEL; c++) {
                    vec filters[PARTS];
                    for (int j = 0; j < PARTS; j++) filters[j] = load(b + c * PANEL + j * LANES);
#pragma GCC unroll 12
                    for (int i = 0; i < ROWS; i++)
                        for (int j = 0; j < PARTS; j++) sum[i][j] += a[i * PANEL + c] * filters[j];
                }
            }
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < PARTS; j++) store(z + (tile + i) * PANEL + j * LANES, sum[i][j]);
        }
    }
}

/* One pair of panels of one place: du [16][16] = (or +=) the sum over tiles of z [T][16] times v [T][16]. */
static void multiply_gradient(const float *z, const float *v, float *du, long count, int add) {
    for (int k = 0; k < PANEL; k += GRADIENT_ROWS) {
        vec sum[GRADIENT_ROWS][PARTS];
        for (int i = 0; i < GRADIENT_ROWS; i++)
            for (int j = 0; j < PARTS; j++) sum[i][j] = add ? load(du + (k + i) * PANEL + j * LANES) : zeros();
        for (long tile = 0; tile < count; tile++) {
            vec inputs[PARTS];
            for (int j = 0; j < PARTS; j++) inputs[j] = load(v + tile * PANEL + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < GRADIENT_ROWS; i++)
                for (int j = 0; j < PARTS; j++) sum[i][j] += z[tile * PANEL + k + i] * inputs[j];
        }
        for (int i = 0; i < GRADIENT_ROWS; i++)
            for (int j = 0; j < PARTS; j++) store(du + (k + i) * PANEL + j * LANES, sum[i][j]);
    }
}

/* U of one group: out x in filters w, which lie `by_out` and `by_in` numbers apart; `turn`: taps from the last to the first. */
static void transform_filters(const float *w, long r, long in, long out, long by_in, long by_out, int turn, float *u) {
    long in_panels = (in + PANEL - 1) / PANEL, out_panels = (out + PANEL - 1) / PANEL;
    float g[6][5];
    make_g(r, g);
#pragma omp for collapse(2) schedule(static)
    for (long panel = 0; panel < out_panels; panel++)
        for (long i = 0; i < in_panels * PANEL; i++) {
            float taps[25][PANEL];
            memset(taps, 0, sizeof taps);
            for (long lane = 0; i < in && lane < PANEL && panel * PANEL + lane < out; lane++) {
                const float *from = w + (panel * PANEL + lane) * by_out + i * by_in;
                for (long tap = 0; tap < r * r; tap++) taps[tap][lane] = from[turn ? r * r - 1 - tap : tap];
            }
            float *to = u + (panel * in_panels * PANEL + i) * PANEL;
            for (int part = 0; part < PARTS; part++) {
                vec half[6][5];
                for (int a = 0; a < 6; a++)
                    for (long s = 0; s < r; s++) {
                        vec sum = zeros();
                        for (long t = 0; t < r; t++) sum += g[a][t] * load(&taps[t * r + s][part * LANES]);
                        half[a][s] = sum;
                    }
                for (int a = 0; a < 6; a++)
                    for (int b = 0; b < 6; b++) {
                        vec sum = zeros();
                        for (long s = 0; s < r; s++) sum += g[b][s] * half[a][s];
                        store(to + (a * 6 + b) * apart(out_panels * in_panels * PANEL) + part * LANES, sum);
                    }
            }
        }
}

/* dw (K, C, R, S) of one group = (or +=) G^T dU G. */
static void put_filters(const float *du, const Tiling *t, long r, float *dw, int add) {
    float g[6][5];
    make_g(r, g);
    long place = apart(t->kp * t->cp * PANEL);
#pragma omp for collapse(2) schedule(static)
    for (long k = 0; k < t->k; k++)
        for (long panel = 0; panel < t->cp; panel++) {
            const float *from = du + ((k / PANEL * t->cp + panel) * PANEL + k % PANEL) * PANEL;
            float taps[25][PANEL];
            for (int part = 0; part < PARTS; part++) {
                vec half[5][6];
                for (long s = 0; s < r; s++)
                    for (int b = 0; b < 6; b++) {
                        vec sum = zeros();
                        for (int a = 0; a < 6; a++) sum += g[a][s] * load(from + (a * 6 + b) * place + part * LANES);
                        half[s][b] = sum;
                    }
                for (long s = 0; s < r; s++)
                    for (long i = 0; i < r; i++) {
                        vec sum = zeros();
                        for (int b = 0; b < 6; b++) sum += g[b][i] * half[s][b];
                        store(&taps[s * r + i][part * LANES], sum);
                    }
            }
            for (long lane = 0; lane < PANEL && panel * PANEL + lane < t->c; lane++) {
                float *to = dw + (k * t->c + panel * PANEL + lane) * r * r;
                for (long tap = 0; tap < r * r; tap++) to[tap] = add ? to[tap] + taps[tap][lane] : taps[tap][lane];
            }
        }
}

/* y = x * w. With `turn` the convolution that makes dx (y here) of dy (x here): w is then (C of the shape, K, R, S).
 * `scale`, `bias`: (K,) or NULL. Scratch: u, v, z as above, for one group. */
KERNEL void dpnn_winograd(const Shape *s, const float *x, const float *w, const float *scale, const float *bias,
                          int64_t relu, int64_t turn, float *y, float *u, float *v, float *z) {
    Tiling t = tiling(s);
    long taps = s->r * s->r;
#pragma omp parallel
    for (long group = 0; group < s->groups; group++) {
        const float *filters = w + group * t.k * t.c * taps;
        if (turn)
            transform_filters(filters, s->r, t.c, t.k, t.k * taps, taps, 1, u);
        else
            transform_filters(filters, s->r, t.c, t.k, taps, t.c * taps, 0, u);
        for (long first = 0; first < t.count; first += s->tiles) {
            long count = t.count - first < s->tiles ? t.count - first : s->tiles;
            transform(s, &t, x + group * t.c, first, count, v, 0);
#pragma omp for collapse(2) schedule(static)
            for (long place = 0; place < PLACES; place++)
                for (long panel = 0; panel < t.kp; panel++)
                    multiply(v + place * apart(t.cp * s->tiles),
                             u + place * apart(t.kp * t.cp * PANEL) + panel * t.cp * PANEL * PANEL,
                             z + place * apart(t.kp * s->tiles) + panel * s->tiles * PANEL, t.cp, s->tiles, count);
            transform_output(s, &t, z, first, count, scale ? scale + group * t.k : 0, bias ? bias + group * t.k : 0, relu,
                             y + group * t.k);
        }
    }
}

/* dw = (or +=) the gradient of the filters, of x (the shape's input) and dy (its output). Scratch: v, z, du. */
KERNEL void dpnn_winograd_gradient(const Shape *s, const float *x, const float *dy, float *dw, int64_t add, float *du,
                                   float *v, float *z) {
    Tiling t = tiling(s);
#pragma omp parallel
    for (long group = 0; group < s->groups; group++) {
        for (long first = 0; first < t.count; first += s->tiles) {
            long count = t.count - first < s->tiles ? t.count - first : s->tiles;
            transform(s, &t, x + group * t.c, first, count, v, 0);
            transform(s, &t, dy + group * t.k, first, count, z, 1);
#pragma omp for collapse(2) schedule(static)
            for (long place = 0; place < PLACES; place++)
                for (long panel = 0; panel < t.kp; panel++)
                    for (long other = 0; other < t.cp; other++)
                        multiply_gradient(z + place * apart(t.kp * s->tiles) + panel * s->tiles * PANEL,
                                          v + place * apart(t.cp * s->tiles) + other * s->tiles * PANEL,
                                          du + place * apart(t.kp * t.cp * PANEL) + (panel * t.cp + other) * PANEL * PANEL,
                                          count, first > 0);
        }
        put_filters(du, &t, s->r, dw + group * t.k * t.c * s->r * s->r, add);
    }
}
