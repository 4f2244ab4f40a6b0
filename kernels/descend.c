/* Stochastic gradient descent over flat arrays, as dpnn/optim.py says, in one pass: with g = scale g + decay p
 *     momentum:  m = momentum m + g;  p -= rate m   (Nesterov: p -= rate (g + momentum m));   else p -= rate g
 *     Adagrad:   s = s + g^2;         p -= rate g / (sqrt(s) + epsilon)
 * and, of running statistics, p = (1 - share) p + share g.
 * Bound by memory: 20 bytes a number with momentum or squares, 12 without.
 *
 * Other ranks have read p (workers fetch it, replicas share it): a line of it is in their caches too, and one that is
 * stored to has to be got back from there. Stores wait for that one after the other; asked for ahead, many come at once.
 */
#include "cpu.h"

#define AHEAD 512 /* numbers */

KERNEL void dpnn_descend(int64_t n, float *p, const float *g, float *m, float rate, float scale, float decay, float momentum,
                         int64_t nesterov) {
#pragma omp parallel for schedule(static) if (n > WORTH)
    for (long i = 0; i < n; i += LANES) {
        long left = n - i;
        __builtin_prefetch(p + i + AHEAD, 1);
        vec old = load_some(p + i, left), step = scale * load_some(g + i, left) + decay * old;
        if (m) {
            vec velocity = momentum * load_some(m + i, left) + step;
            store_some(m + i, velocity, left);
            if (nesterov)
                step += momentum * velocity;
            else
                step = velocity;
        }
        store_some(p + i, old - rate * step, left);
    }
}

KERNEL void dpnn_adagrad(int64_t n, float *p, const float *g, float *s, float rate, float scale, float decay, float epsilon) {
#pragma omp parallel for schedule(static) if (n > WORTH)
    for (long i = 0; i < n; i += LANES) {
        long left = n - i;
        __builtin_prefetch(p + i + AHEAD, 1);
        vec old = load_some(p + i, left), step = scale * load_some(g + i, left) + decay * old;
        vec squares = load_some(s + i, left) + step * step;
        store_some(s + i, squares, left);
        store_some(p + i, old - rate * (step / (root(squares) + epsilon)), left);
    }
}

KERNEL void dpnn_blend(int64_t n, float *p, const float *g, float share) {
    float keep = 1 - share;
#pragma omp parallel for schedule(static) if (n > WORTH)
    for (long i = 0; i < n; i += LANES) {
        long left = n - i;
        store_some(p + i, keep * load_some(p + i, left) + share * load_some(g + i, left), left);
    }
}
