/* Stored samples become what the network sees: gathered, cut, mirrored, coloured and normalised in one pass.
 *
 *     y[i] = (x[slots[i]] - mean) scale        x uint8 (0), float16 (1) or float32 (2), y float; n samples of `numbers`
 *
 * Bound by the memory that is written. These kernels are not parallel inside: several threads call them, each for
 * samples of its own. `mean` and `scale` hold one number for each channel, repeated to `period` and 16 more, so that a
 * vector may begin at any channel. y is written through the caches: past them it took as long, and the network reads it
 * next. Xeon with AVX-512, one thread: 15 GB/s written from uint8, 12 from float32.
 */
#include "cpu.h"

typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t bvec __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec from_u8(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const bvec *)p, ivec), vec);
#endif
}

/* In whole numbers, so that the smallest halves count where denormal floats are flushed. */
static inline vec from_f16(const uint16_t *p) {
    uvec h = __builtin_convertvector(*(const hvec *)p, uvec);
    uvec sign = (h & 0x8000) << 16, exponent = h & 0x7c00, bits = (h & 0x7fff) << 13;
    uvec normal = bits + (112u << 23) + ((uvec)(exponent == 0x7c00) & (112u << 23));
    uvec small = (uvec)((vec)(bits + (113u << 23)) - 0x1p-14f);
    uvec is_small = (uvec)(exponent == 0);
    return (vec)(((small & is_small) | (normal & ~is_small)) | sign);
}

static const long WIDTHS[] = {1, 2, 4};

static inline vec load_as(int type, const void *x, long i) {
    return type == 0 ? from_u8((const uint8_t *)x + i)
        : type == 1 ? from_f16((const uint16_t *)x + i) : load((const float *)x + i);
}

/* The n numbers from i on, fewer than a vector. */
static void edge(int type, const void *x, long i, long n, const float *mean, const float *scale, float *y) {
    char some[4 * LANES] = {0};
    memcpy(some, (const char *)x + i * WIDTHS[type], n * WIDTHS[type]);
    store_some(y + i, (load_as(type, some, 0) - load(mean)) * load(scale), n);
}

static inline __attribute__((always_inline)) void pass_as(int type, long n, const void *x, long period,
                                                          const float *mean, const float *scale, float *y) {
    long i = 0, phase = 0;
    for (; i + LANES <= n; i += LANES) {
        store(y + i, (load_as(type, x, i) - load(mean + phase)) * load(scale + phase));
        phase += LANES;
        if (phase >= period) phase -= period;
    }
    if (i < n) edge(type, x, i, n - i, mean + phase, scale + phase, y);
}

static void pass(int64_t type, long n, const void *x, long period, const float *mean, const float *scale, float *y) {
    if (type == 0) pass_as(0, n, x, period, mean, scale, y);
    else if (type == 1) pass_as(1, n, x, period, mean, scale, y);
    else pass_as(2, n, x, period, mean, scale, y);
}

KERNEL void dpnn_normalise(int64_t n, int64_t numbers, int64_t type, const char *x, const int64_t *slots,
                           int64_t period, const float *mean, const float *scale, float *y) {
    for (long i = 0; i < n; i++)
        pass(type, numbers, x + slots[i] * numbers * WIDTHS[type], period, mean, scale, y + i * numbers);
}

static inline __attribute__((always_inline)) void mirror_as(long nbytes, long pixels, const char *x, char *y) {
    for (long p = 0; p < pixels; p++) memcpy(y + p * nbytes, x + (pixels - 1 - p) * nbytes, nbytes);
}

static void mirror(long nbytes, long pixels, const char *x, char *y) {
    if (nbytes == 1) mirror_as(1, pixels, x, y);
    else if (nbytes == 3) mirror_as(3, pixels, x, y);
    else mirror_as(nbytes, pixels, x, y);
}

/* Images (h, w, c) with `padding` zero pixels around; choices (n, 3): first row, first column, whether to mirror.
 * `room`: bytes for one image as stored. */
KERNEL void dpnn_crop(int64_t n, int64_t h, int64_t w, int64_t c, int64_t padding, int64_t type, const char *x,
                      const int64_t *slots, const int8_t *choices, int64_t period, const float *mean,
                      const float *scale, char *room, float *y) {
    long pixel = c * WIDTHS[type], row = w * pixel, image = h * row;
    for (long i = 0; i < n; i++, choices += 3) {
        const char *from = x + slots[i] * image;
        long left = choices[1] - padding;                       /* column of the image where the crop begins */
        long lo = left > 0 ? left : 0, hi = left < 0 ? w + left : w; /* the image's columns that the crop has */
        long into = choices[2] ? w - (hi - left) : lo - left;
        for (long r = 0; r < h; r++) {
            long at = r + choices[0] - padding;
            char *to = room + r * row;
            memset(to, 0, row);
            if (at < 0 || at >= h || lo >= hi) continue;
            const char *some = from + at * row + lo * pixel;
            if (choices[2]) mirror(pixel, hi - lo, some, to + into * pixel);
            else memcpy(to + into * pixel, some, (hi - lo) * pixel);
        }
        pass(type, h * w * c, room, period, mean, scale, y + i * h * w * c);
    }
}

static const float GREY[3] = {0.299f, 0.587f, 0.114f};

/* The mean over the picture of 0.299 r + 0.587 g + 0.114 b. */
static double mean_grey(long n, const uint8_t *x) {
    uint32_t sums[48] = {0};
    long i = 0;
    for (; i + 48 <= n; i += 48)
        for (int j = 0; j < 48; j++) sums[j] += x[i + j];
    for (; i < n; i++) sums[i % 3] += x[i];
    double total = 0;
    for (int j = 0; j < 48; j++) total += (double)sums[j] * GREY[j % 3];
    return n ? total * 3 / n : 0;
}

/* One picture, n = 3 h w numbers; choice: brightness b, contrast c, saturation s, and light (3), as colour.py says:
 *     y = (b (c (s x + (1 - s) g) + (1 - c) G) + light - mean) scale     g, G: the grey of a pixel, of the picture
 * An output is a sum over its pixel's three inputs, which lie at most 2 to the left or right of it: five vectors of
 * inputs times vectors of weights that are zero beyond the pixel. So nothing is shuffled. */
KERNEL void dpnn_colour(int64_t n, const uint8_t *x, const float *choice, const float *mean, const float *scale,
                        float *y) {
    float b = choice[0], c = choice[1], s = choice[2], weights[3][3], offset[3];
    float grey = b * (1 - c) * (float)mean_grey(n, x);
    for (int k = 0; k < 3; k++) {
        for (int j = 0; j < 3; j++) weights[k][j] = b * c * (s * (k == j) + (1 - s) * GREY[j]) * scale[k];
        offset[k] = (grey + choice[3 + k] - mean[k]) * scale[k];
    }
    long i = n < 3 ? n : 3; /* vectors of inputs begin 2 before and end 2 behind those of outputs */
    enum { VECTORS = 48 / LANES };
    vec w[VECTORS][5], o[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        for (int lane = 0; lane < LANES; lane++) {
            int k = (v * LANES + lane) % 3;
            o[v][lane] = offset[k];
            for (int d = -2; d <= 2; d++) w[v][d + 2][lane] = k + d >= 0 && k + d < 3 ? weights[k][k + d] : 0;
        }
#define ONE(i)                                                                                                         \
    do {                                                                                                               \
        const uint8_t *p = x + (i) / 3 * 3;                                                                            \
        const float *m = weights[(i) % 3];                                                                             \
        y[i] = m[0] * p[0] + m[1] * p[1] + m[2] * p[2] + offset[(i) % 3];                                              \
    } while (0)
    for (long j = 0; j < i; j++) ONE(j);
    for (; i + 48 + 2 <= n; i += 48)
        for (int v = 0; v < VECTORS; v++) {
            const uint8_t *p = x + i + v * LANES;
            vec sum = o[v];
            for (int d = 0; d < 5; d++) sum += w[v][d] * from_u8(p + d - 2);
            store(y + i + v * LANES, sum);
        }
    for (; i < n; i++) ONE(i);
#undef ONE
}
