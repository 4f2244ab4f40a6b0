// Updates of flat arrays, as dpnn/optim.py and kernels/descend.c say; n numbers each, that begin anywhere.
//
// descend   g' = scale g + decay p;  m = momentum m + g';  p -= rate m   (Nesterov: p -= rate (g' + momentum m))
//           m NULL: p -= rate g'                                     20 n bytes with m, else 12 n
// adagrad   g' likewise;  s = s + g'^2;  p -= rate g' / (sqrt(s) + epsilon)    20 n bytes
// blend     p = (1 - share) p + share g                              12 n bytes
// add       to = a0 + ... of k arrays, in their order                4 (k + 1) n bytes
// squares   partials[block] += the squares of its x, in float64      4 n bytes
// total     sum = the sum of n partials, in float64                  8 n bytes, one block
//
// All are bound by memory. A thread takes four numbers at a time; what each thread and block adds up is fixed by n and
// by where x lies, so that a sum of squares is always the same.
#include "flat.cuh"

KERNEL(256)
descend(long long n, float* p, const float* g, float* m, float rate, float scale, float decay, float momentum,
        long long nesterov) {
    using namespace dpnn;
    const bool alike = phase(g) == phase(p) && (!m || phase(m) == phase(p));
    walk(n, alike ? phase(p) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        auto old = load<W>(p + i), step = load<W>(g + i);
        for (int j = 0; j < W; ++j) step.at[j] = scale * step.at[j] + decay * old.at[j];
        if (m) {
            auto velocity = load<W>(m + i);
            for (int j = 0; j < W; ++j) {
                velocity.at[j] = momentum * velocity.at[j] + step.at[j];
                step.at[j] = nesterov ? step.at[j] + momentum * velocity.at[j] : velocity.at[j];
            }
            store(m + i, velocity);
        }
        for (int j = 0; j < W; ++j) old.at[j] -= rate * step.at[j];
        store(p + i, old);
    });
}

KERNEL(256)
adagrad(long long n, float* p, const float* g, float* s, float rate, float scale, float decay, float epsilon) {
    using namespace dpnn;
    const bool alike = phase(g) == phase(p) && phase(s) == phase(p);
    walk(n, alike ? phase(p) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        auto old = load<W>(p + i), step = load<W>(g + i), squares = load<W>(s + i);
        for (int j = 0; j < W; ++j) {
            step.at[j] = scale * step.at[j] + decay * old.at[j];
            squares.at[j] += step.at[j] * step.at[j];
            old.at[j] -= rate * (step.at[j] / (sqrtf(squares.at[j]) + epsilon));
        }
        store(s + i, squares);
        store(p + i, old);
    });
}

KERNEL(256) blend(long long n, float* p, const float* g, float share) {
    using namespace dpnn;
    const float keep = 1.f - share;
    walk(n, phase(g) == phase(p) ? phase(p) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        auto old = load<W>(p + i), fresh = load<W>(g + i);
        for (int j = 0; j < W; ++j) old.at[j] = keep * old.at[j] + share * fresh.at[j];
        store(p + i, old);
    });
}

// k is 1 to 8; `to` may be one of the arrays.
KERNEL(256)
add(long long n, int k, float* to, const float* a0, const float* a1, const float* a2, const float* a3, const float* a4,
    const float* a5, const float* a6, const float* a7) {
    using namespace dpnn;
    const float* arrays[8] = {a0, a1, a2, a3, a4, a5, a6, a7};
    bool alike = true;
#pragma unroll
    for (int a = 0; a < 8; ++a) alike = alike && (a >= k || phase(arrays[a]) == phase(to));
    walk(n, alike ? phase(to) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        auto sum = load<W>(arrays[0] + i);
#pragma unroll
        for (int a = 1; a < 8; ++a) {
            if (a < k) {
                const auto more = load<W>(arrays[a] + i);
                for (int j = 0; j < W; ++j) sum.at[j] += more.at[j];
            }
        }
        store(to + i, sum);
    });
}

KERNEL(256) squares(long long n, const float* x, double* partials) {
    using namespace dpnn;
    double sum = 0;
    walk(n, phase(x), [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        const auto some = load<W>(x + i);
        for (int j = 0; j < W; ++j) sum += static_cast<double>(some.at[j]) * some.at[j];
    });
    sum = block_sum<256>(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] += sum;
}

KERNEL(256) total(int n, const double* partials, double* sum) {
    double mine = 0;
    for (int i = threadIdx.x; i < n; i += 256) mine += partials[i];
    mine = dpnn::block_sum<256>(mine);
    if (threadIdx.x == 0) *sum = mine;
}
