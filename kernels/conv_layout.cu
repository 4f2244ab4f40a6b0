// What stands before and after the products of conv.cu: operands in the order that they want, sums of parts.
//
// pad_channels      (pixels, c) -> (pixels, c rounded up to 4), zeros behind
// arrange_filters   w -> b (G, (r, s, i), n): one tap's numbers together, i padded with zeros, columns n padded to ldb;
//                   the taps (first_r + step_r r, first_s + step_s s), from the last to the first for gradients of inputs
// add_parts         out[m][n] = the sum over parts of partial[part][group][m][n], then bias and ReLU as in conv.cu
// add_parts_turned  out[n][m] likewise, of one group; bias by m
// add_filter_parts  dw (K, C, R, S) = or += the sum over parts of partial[part][group][k][(r, s, c)]
//
// All are bound by memory: each number is read once and written once. Parts are added in their order.
#include "device.cuh"
#include "output.cuh"

// A thread for each quad of the result.
KERNEL(256) pad_channels(const float* x, float* out, long long pixels, int c) {
    const int quads = (c + 3) / 4;
    const long long i = blockIdx.x * 256ll + threadIdx.x, pixel = i / quads;
    if (pixel >= pixels) return;
    const int first = static_cast<int>(i % quads) * 4;
    alignas(16) float value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = first + j < c ? x[pixel * c + first + j] : 0.f;
    dpnn::copy_four(out + i * 4, value);
}

// w[group w_group + n w_n + i w_inner + r across + s]. A block takes 32 columns and 8 of i (`inner`, padded to `rows` a
// tap), with all their taps: what is together in w is read by threads of one block.
KERNEL(256)
arrange_filters(const float* w, float* b, int n, int inner, int rows, int ldb, int taps_down, int taps_across, int across,
                int first_r, int step_r, int first_s, int step_s, int w_group, int w_n, int w_inner) {
    const int i = blockIdx.x * 8 + threadIdx.x / 32, column = blockIdx.y * 32 + threadIdx.x % 32, group = blockIdx.z;
    if (i >= rows || column >= ldb) return;
    const float* from = w + static_cast<long long>(group) * w_group + static_cast<long long>(column) * w_n +
                        static_cast<long long>(i) * w_inner;
    const bool real = i < inner && column < n;
    for (int r = 0; r < taps_down; ++r)
        for (int s = 0; s < taps_across; ++s) {
            const long long row = (static_cast<long long>(group) * taps_down * taps_across + r * taps_across + s) * rows + i;
            b[row * ldb + column] = real ? from[(first_r + r * step_r) * across + first_s + s * step_s] : 0.f;
        }
}

// A thread for each quad of a row; groups are the grid's y.
KERNEL(256) add_parts(const float* partial, int parts, int m, int n, OUTPUT) {
    const dpnn::Output output = THE_OUTPUT;
    const int quads = (n + 3) / 4;
    const long long i = blockIdx.x * 256ll + threadIdx.x, size = 4ll * m * quads;
    if (i >= size / 4) return;
    alignas(16) float value[4] = {0.f, 0.f, 0.f, 0.f};
    const float* from = partial + blockIdx.y * size + i * 4;
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
        alignas(16) float more[4];
        dpnn::copy_four(more, from + part * size * gridDim.y);
#pragma unroll
        for (int j = 0; j < 4; ++j) value[j] += more[j];
    }
    float* row = dpnn::output_row(output, blockIdx.y, static_cast<int>(i / quads));
    dpnn::put_four(output, row, blockIdx.y, static_cast<int>(i % quads) * 4, n, dpnn::takes_quads(output, n), value);
}

// A block turns 32 x 32 numbers.
KERNEL(256)
add_parts_turned(const float* partial, int parts, int m, int n, const float* bias, int relu, float* out) {
    __shared__ float tile[32][33];
    const int lane = threadIdx.x % 32, m0 = blockIdx.x * 32, n0 = blockIdx.y * 32;
    const long long width = (n + 3) / 4 * 4;
    for (int i = threadIdx.x / 32; i < 32 && m0 + i < m && n0 + lane < n; i += 8) {
        float value = 0.f;
#pragma unroll 4
        for (int part = 0; part < parts; ++part)
            value += partial[(static_cast<long long>(part) * m + m0 + i) * width + n0 + lane];
        tile[i][lane] = value;
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < 32 && n0 + i < n && m0 + lane < m; i += 8) {
        float value = tile[lane][i] + (bias ? bias[m0 + lane] : 0.f);
        if (relu && value < 0.f) value = 0.f;
        out[static_cast<long long>(n0 + i) * m + m0 + lane] = value;
    }
}

// `filters` of all groups, `rows` numbers a tap, of which c are real. A block has 32 numbers of a part; a thread adds up
// every 8th part, eight threads' sums are added in their order.
KERNEL(256)
add_filter_parts(const float* partial, int parts, int filters, int taps, int rows, int c, float* dw, int add) {
    __shared__ float sums[8][32];
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32;
    const long long i = blockIdx.x * 32ll + lane, size = static_cast<long long>(filters) * taps * rows;
    float value = 0.f;
    if (i < size) {
#pragma unroll 8
        for (int part = first; part < parts; part += 8) value += partial[part * size + i];
    }
    sums[first][lane] = value;
    __syncthreads();
    const int channel = static_cast<int>(i % rows);
    if (first > 0 || i >= size || channel >= c) return;
    for (int other = 1; other < 8; ++other) value += sums[other][lane];
    const long long place = (i / (static_cast<long long>(taps) * rows) * c + channel) * taps + i / rows % taps;
    dw[place] = add ? dw[place] + value : value;
}
