// What works on each number by itself.
//
// relu           y = max(x, 0)                        n numbers   bound by memory: reads 4 n bytes, writes 4 n
// relu_gradient  dx = dy where y > 0, else 0          n numbers   bound by memory: reads 8 n bytes, writes 4 n
// dropout        y = scale x where kept, else 0       n numbers   bound by memory: reads 4 n bytes, writes 4 n
//
// Of relu and relu_gradient a thread takes four numbers at a time.
#include "flat.cuh"
#include "philox.cuh"

KERNEL(256) relu(const float* x, float* y, long long n) {
    using namespace dpnn;
    walk(n, phase(x) == phase(y) ? phase(y) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        auto some = load<W>(x + i);
        for (int j = 0; j < W; ++j) some.at[j] = some.at[j] < 0.f ? 0.f : some.at[j];
        store(y + i, some);
    });
}

// dx may be dy.
KERNEL(256) relu_gradient(const float* y, const float* dy, float* dx, long long n) {
    using namespace dpnn;
    const bool alike = phase(y) == phase(dx) && phase(dy) == phase(dx);
    walk(n, alike ? phase(dx) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        const auto kept = load<W>(y + i);
        auto some = load<W>(dy + i);
        for (int j = 0; j < W; ++j) some.at[j] = kept.at[j] > 0.f ? some.at[j] : 0.f;
        store(dx + i, some);
    });
}

// Activations (rows, pixels, channels). A number is kept where its word is at least `threshold`: words are numbered in
// the canonical order (channels, pixels). A thread has four neighbouring pixels of one channel, which share a call of
// the generator, or two where their words don't begin at a multiple of 4; neighbouring threads have neighbouring
// channels. Backward draws the words again: dx is made of dy as y of x.
KERNEL(256) dropout(const float* x, const unsigned long long* ids, float* y, unsigned int seed, unsigned int epoch,
                    unsigned int purpose, unsigned int threshold, float scale, int rows, int pixels, int channels) {
    const int thread = blockIdx.x * 256 + threadIdx.x, channel = thread % channels, first = thread / channels * 4;
    if (first >= pixels) return;
    const int count = min(4, pixels - first), number = channel * pixels + first, shift = number % 4;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const long long at = (static_cast<long long>(row) * pixels + first) * channels + channel;
        float some[4];  // all are read before one is written, which might be the next to read
        for (int i = 0; i < 4; ++i) some[i] = i < count ? x[at + i * channels] : 0.f;
        unsigned int words[8];
        const dpnn::Words low = dpnn::by_sample(seed, epoch, purpose, ids[row], number / 4);
        for (int i = 0; i < 4; ++i) words[i] = words[4 + i] = low.w[i];
        if (shift + count > 4) {
            const dpnn::Words high = dpnn::by_sample(seed, epoch, purpose, ids[row], number / 4 + 1);
            for (int i = 0; i < 4; ++i) words[4 + i] = high.w[i];
        }
        // words[i] = words[i + shift], by fixed indices: an array with others would lie in memory
        if (shift & 1)
            for (int i = 0; i < 6; ++i) words[i] = words[i + 1];
        if (shift & 2)
            for (int i = 0; i < 4; ++i) words[i] = words[i + 2];
        for (int i = 0; i < 4; ++i)
            if (i < count) y[at + i * channels] = some[i] * (words[i] >= threshold ? scale : 0.f);
    }
}
