// bfloat16 for what crosses between machines, bit for bit as kernels/reduce.c has it.
//
// to_bfloat16    out = x + error, to the nearest, ties to even;  error = what that left out       14 n bytes
// add_bfloat16   to = the sum of k arrays of n that lie `stride` numbers apart, in float32,       (2 k + 4) n bytes
//                in their order; with k = 1 the numbers themselves
//
// Both are bound by memory. A thread takes four numbers at a time where the arrays lie alike.
#include "flat.cuh"

// What is not a number stays so, and leaves nothing; what is infinite leaves nothing either.
KERNEL(256) to_bfloat16(long long n, const float* x, float* error, unsigned short* out) {
    using namespace dpnn;
    const bool alike = phase(error) == phase(x) && phase(out) == phase(x);
    walk(n, alike ? phase(x) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        const auto given = load<W>(x + i);
        auto rest = load<W>(error + i);
        Numbers<unsigned short, W> upper;
        for (int j = 0; j < W; ++j) {
            const float value = given.at[j] + rest.at[j];
            const unsigned bits = __float_as_uint(value);
            unsigned kept = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
            if ((bits & 0x7FFFFFFFu) > 0x7F800000u) kept = bits >> 16 | 0x40u;
            const float left = value - __uint_as_float(kept << 16);
            upper.at[j] = static_cast<unsigned short>(kept);
            rest.at[j] = left - left == 0.f ? left : 0.f;
        }
        store(out + i, upper);
        store(error + i, rest);
    });
}

KERNEL(256) add_bfloat16(long long n, long long k, long long stride, const unsigned short* from, float* to) {
    using namespace dpnn;
    const bool alike = phase(from) == phase(to) && (k == 1 || stride % 4 == 0);
    walk(n, alike ? phase(to) : -1, [&](auto width, long long i) {
        constexpr int W = decltype(width)::value;
        Numbers<float, W> sum = {};
        for (long long a = 0; a < k; ++a) {
            const auto upper = load<W>(from + a * stride + i);
            for (int j = 0; j < W; ++j) sum.at[j] += __uint_as_float(static_cast<unsigned>(upper.at[j]) << 16);
        }
        store(to + i, sum);
    });
}
