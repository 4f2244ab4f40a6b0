/* Stochastic gradient descent over flat arrays, as dpnn/optim.py says, in one pass: with g = scale g + decay p
 *     momentum:  m = momentum m + g;  p -= rate m   (Nesterov: p -= rate (g + momentum m));   else p -= rate g
 *     Adagrad:   s = s + g^2;         p -= rate g / (sqrt(s) + epsilon)
 * and, of running statistics, p = (1 - share) p + share g.
 * Bound by memory: 20 bytes a number with momentum or squares, 12 without.
 *
 * Other ranks have read p (workers fetch it, replicas share it): a line of it is in their caches too, and one that is
 * stored to has to be got back from there. Stores wait for that one after the other; asked for ahead, many come at once.
 *
 * Those that end in _streamed store p past the caches: it isn't got back then, but has to be read from memory next. Which
 * is faster depends on where the other ranks' cores are (dpnn/strategies/downpour/copies.py).
 *
 * Those that end in _kept keep what they change (dpnn/comm/undo.py): the old p, m and s, each `distance` numbers further.
 * They are stored past the caches, which spares the reading of what they take the place of: of AlexNet an update takes a
 * third longer (benchmarks/faults.py), with a copy made before it nearly twice as long.
 */
#include "cpu.h"
#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

#define AHEAD 512 /* numbers */
#define TURN 256  /* numbers that are kept, and then changed: few enough to be in the first cache still */

/* Store past the caches, if that may be. */
static inline void stream(float *p, vec v, long left, int may) {
#ifdef __SSE2__
    if (may && left >= LANES) {
#if defined(__AVX512F__)
        _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
        _mm256_stream_ps(p, (__m256)v);
#else
        union { vec all; __m128 half[2]; } both = {v};
        _mm_stream_ps(p, both.half[0]);
        _mm_stream_ps(p + 4, both.half[1]);
#endif
        return;
    }
#endif
    store_some(p, v, left);
}

static inline int is_aligned(const float *p) { return (uintptr_t)p % (4 * LANES) == 0; }

/* Keep the old numbers of [lo, hi). */
static inline void keep(float *p, long lo, long hi, int64_t distance, int aligned) {
    for (long i = lo; i < hi; i += LANES) {
        __builtin_prefetch(p + i + AHEAD, 1);
        stream(p + i + distance, load_some(p + i, hi - i), hi - i, aligned);
    }
}

/* What went past the caches is seen by all. */
static inline void drain(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* Until here stores are as they stand in the code: who is killed has done all before, and nothing beyond. */
#define IN_THIS_ORDER __asm__ volatile("" ::: "memory")

/* STEP changes the numbers from i on, of which there are `left`; where it `streams`, those of p past the caches. */
#define CHANGE(STEP)                                                            \
    const int streams = 0;                                                      \
    _Pragma("omp parallel for schedule(static) if (n > WORTH)")                 \
    for (long i = 0; i < n; i += LANES) {                                       \
        long left = n - i;                                                      \
        __builtin_prefetch(p + i + AHEAD, 1);                                   \
        STEP;                                                                   \
    }

/* The same past the caches, but for the first few, up to where p is aligned. */
#define CHANGE_STREAMED(STEP)                                                   \
    long first = -((uintptr_t)p / 4) % LANES;                                   \
    if (first > n) first = n;                                                   \
    if (first) {                                                                \
        const int streams = 0;                                                  \
        const long i = 0, left = first;                                         \
        STEP;                                                                   \
    }                                                                           \
    const int streams = 1;                                                      \
    _Pragma("omp parallel if (n > WORTH)")                                      \
    {                                                                           \
        _Pragma("omp for schedule(static) nowait")                              \
        for (long i = first; i < n; i += LANES) {                               \
            long left = n - i;                                                  \
            STEP;                                                               \
        }                                                                       \
        drain();                                                                \
    }

/* The same, of p and m (which may be NULL) in turns. Each thread says in its front, two numbers, what it has kept. */
#define KEEP_AND_CHANGE(STEP)                                                   \
    const int streams = 0;                                                      \
    int threads = n > WORTH ? omp_get_max_threads() : 1;                        \
    int aligned = is_aligned(p + distance) && (!m || is_aligned(m + distance)); \
    _Pragma("omp parallel num_threads(threads < fronts ? threads : fronts)")    \
    {                                                                           \
        long lo, hi;                                                            \
        my_rows((n + LANES - 1) / LANES, &lo, &hi);                             \
        lo *= LANES, hi = hi * LANES < n ? hi * LANES : n;                      \
        int64_t *mine = front + 2 * omp_get_thread_num();                       \
        mine[1] = mine[0] = lo;                                                 \
        for (long turn = lo; turn < hi; turn += TURN) {                         \
            long end = turn + TURN < hi ? turn + TURN : hi;                     \
            keep(p, turn, end, distance, aligned);                              \
            if (m) keep(m, turn, end, distance, aligned);                       \
            IN_THIS_ORDER;                                                      \
            mine[1] = end;                                                      \
            IN_THIS_ORDER;                                                      \
            for (long i = turn; i < end; i += LANES) {                          \
                long left = end - i;                                            \
                STEP;                                                           \
            }                                                                   \
        }                                                                       \
        drain();                                                                \
    }

static inline void descend(float *p, const float *g, float *m, long left, float rate, float scale, float decay, float momentum,
                           int64_t nesterov, int streams) {
    vec old = load_some(p, left), step = scale * load_some(g, left) + decay * old;
    if (m) {
        vec velocity = momentum * load_some(m, left) + step;
        store_some(m, velocity, left);
        if (nesterov)
            step += momentum * velocity;
        else
            step = velocity;
    }
    stream(p, old - rate * step, left, streams);
}

KERNEL void dpnn_descend(int64_t n, float *p, const float *g, float *m, float rate, float scale, float decay, float momentum,
                         int64_t nesterov) {
    CHANGE(descend(p + i, g + i, m ? m + i : 0, left, rate, scale, decay, momentum, nesterov, streams))
}

KERNEL void dpnn_descend_streamed(int64_t n, float *p, const float *g, float *m, float rate, float scale, float decay,
                                  float momentum, int64_t nesterov) {
    CHANGE_STREAMED(descend(p + i, g + i, m ? m + i : 0, left, rate, scale, decay, momentum, nesterov, streams))
}

KERNEL void dpnn_descend_kept(int64_t n, float *p, const float *g, float *m, float rate, float scale, float decay,
                              float momentum, int64_t nesterov, int64_t distance, int64_t *front, int64_t fronts) {
    KEEP_AND_CHANGE(descend(p + i, g + i, m ? m + i : 0, left, rate, scale, decay, momentum, nesterov, streams))
}

static inline void adagrad(float *p, const float *g, float *s, long left, float rate, float scale, float decay, float epsilon,
                           int streams) {
    vec old = load_some(p, left), step = scale * load_some(g, left) + decay * old;
    vec squares = load_some(s, left) + step * step;
    store_some(s, squares, left);
    stream(p, old - rate * (step / (root(squares) + epsilon)), left, streams);
}

KERNEL void dpnn_adagrad(int64_t n, float *p, const float *g, float *s, float rate, float scale, float decay, float epsilon) {
    CHANGE(adagrad(p + i, g + i, s + i, left, rate, scale, decay, epsilon, streams))
}

KERNEL void dpnn_adagrad_streamed(int64_t n, float *p, const float *g, float *s, float rate, float scale, float decay,
                                  float epsilon) {
    CHANGE_STREAMED(adagrad(p + i, g + i, s + i, left, rate, scale, decay, epsilon, streams))
}

KERNEL void dpnn_adagrad_kept(int64_t n, float *p, const float *g, float *m, float rate, float scale, float decay,
                              float epsilon, int64_t distance, int64_t *front, int64_t fronts) {
    KEEP_AND_CHANGE(adagrad(p + i, g + i, m + i, left, rate, scale, decay, epsilon, streams))
}

static inline void blend(float *p, const float *g, long left, float share, int streams) {
    stream(p, (1 - share) * load_some(p, left) + share * load_some(g, left), left, streams);
}

KERNEL void dpnn_blend(int64_t n, float *p, const float *g, float share) { CHANGE(blend(p + i, g + i, left, share, streams)) }

KERNEL void dpnn_blend_streamed(int64_t n, float *p, const float *g, float share) {
    CHANGE_STREAMED(blend(p + i, g + i, left, share, streams))
}

KERNEL void dpnn_blend_kept(int64_t n, float *p, const float *g, float share, int64_t distance, int64_t *front,
                            int64_t fronts) {
    float *m = 0;
    KEEP_AND_CHANGE(blend(p + i, g + i, left, share, streams))
}
