// Convolution as a matrix product whose left or right side is gathered from an image while it is copied (implicit GEMM).
//
// gather_*   out[m][n] = sum over (r, s, c) of image[pixel(m) + (r, s)][c] b[(r, s, c)][n]   forward, backward to inputs
//     m runs over the pixels of a grid (images, P, Q); its tap (r, s) is the image's pixel (down P + r - above, right Q +
//     s - before), zeros outside of the image. Gradients of inputs are a gather of dy with mirrored filters; with a
//     stride, one for each residue of rows and columns, which writes every stride-th pixel only.
// weights_*  out[k][(r, s, c)] = sum over pixels of dy[pixel][k] image[pixel + (r, s)][c]     backward to filters
//
// Shapes: images (N, H, W, G, C); b (G, R S C, ldb); dy (N P Q, G, K). C, one group's channels, ldb, and K of dy are
// multiples of 4; all have fewer than 2^31 - 2^24 numbers. The grid is (tiles down, tiles across, parts x G): the sum is
// cut into parts of `part` summands, and given `partial` (parts, G, M, N rounded up to 4), each writes its own there;
// conv_layout.cu adds them up. Without `partial` there is one part, and the results go where `Output` says.
// Bound by arithmetic: 2 M N R S C operations a group, at 256 a clock and multiprocessor; from 16 or so operations a byte.
#include "tile.cuh"

namespace dpnn {

// x = x % n, and what is carried, for x < 2 n.
__device__ __forceinline__ int wrap(int& x, int n) {
    const int carry = x >= n;
    x -= carry ? n : 0;
    return carry;
}

struct Image {
    const float* at;
    int h, w, channels, group_channels, taps_down, taps_across;
    int p, q, down, right, above, before;  // the grid of pixels, its stride and padding
    // STEP as a number of three digits: of gathers (r, s, c), of gradients of filters (image, p, q).
    int step_outer, step_middle, step_inner;
};

constexpr int NOWHERE = -(1 << 30);  // a row outside of all images, and so is the sum of two

__device__ __forceinline__ bool inside(int row, int column, const Image& image) {
    return static_cast<unsigned>(row) < static_cast<unsigned>(image.h) &&
           static_cast<unsigned>(column) < static_cast<unsigned>(image.w);
}

// A row of a gather: the pixel that its tap (0, 0) falls on.
struct alignas(16) Row {
    int start;  // where the pixel's numbers stand, behind the image's first
    int row, column;
    int pixel;  // of the output
};

// Rows [first, first + ROWS) of `n`. All threads of the block call it.
template <int ROWS, int THREADS>
__device__ __forceinline__ void find_rows(Row* rows, const Image& image, const Output& out, int group, int first,
                                          int n) {
    for (int i = threadIdx.x; i < ROWS; i += THREADS) {
        const int m = first + i, number = m / (image.p * image.q);
        const int row = m / image.q % image.p * image.down - image.above;
        const int column = m % image.q * image.right - image.before;
        const int start = ((number * image.h + row) * image.w + column) * image.channels;
        rows[i] = {start + group * image.group_channels, m < n ? row : NOWHERE, column, output_pixel(out, m)};
    }
    __syncthreads();
}

// Copies the left side of a gather: a row for each pixel of the grid, k inside.
template <int ROWS, int THREADS, bool IN_QUADS>
struct Pixels {
    static constexpr int PASS = THREADS / 4, PASSES = ROWS / PASS;
    static_assert(PASS % 8 == 0, "rows of a thread are swizzled alike");
    const Image& image;
    const Row* rows;
    int r, s, c;  // of the thread's four numbers

    // From the sum's place `begin` on.
    __device__ __forceinline__ Pixels(const Image& image, const Row* rows, int begin)
        : image(image), rows(rows + threadIdx.x / 4) {
        const int k = begin + threadIdx.x % 4 * 4, tap = k / image.group_channels;
        c = k % image.group_channels;
        s = tap % image.taps_across;
        r = tap / image.taps_across;
    }

    __device__ __forceinline__ void copy(float* to) const {
        const int from = (r * image.w + s) * image.channels + c;
        const int down = r < image.taps_down ? r : NOWHERE;
        to += swizzled(threadIdx.x / 4, threadIdx.x % 4);
        Row row[PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; ++i) row[i] = rows[i * PASS];
#pragma unroll
        for (int i = 0; i < PASSES; ++i)
            copy_quad<IN_QUADS>(to + i * PASS * STEP, image.at + static_cast<unsigned>(row[i].start + from),
                                inside(row[i].row + down, row[i].column + s, image));
    }

    __device__ __forceinline__ void advance() {
        c += image.step_inner;
        s += image.step_middle + wrap(c, image.group_channels);
        r += image.step_outer + wrap(s, image.taps_across);
    }
};

// Copies the right side of a gradient of filters: a column for each (r, s, c), k (the pixel) outside.
template <int WIDTH, int THREADS>
struct Windows {
    static constexpr int QUADS = WIDTH / 4, PASS = THREADS / QUADS, PASSES = STEP / PASS;
    static_assert(THREADS % QUADS == 0 && STEP % PASS == 0, "each pass copies whole rows");
    const Image& image;
    int number[PASSES], row[PASSES], column[PASSES];  // the image and the pixel that the column's tap falls on
    int images, end_row, end_column;
    int step_row, step_column;
    int channel;
    bool real;

    // Columns [first, first + WIDTH), from pixel `begin` of all `images` on.
    __device__ __forceinline__ Windows(const Image& image, int group, int begin, int images, int first)
        : image(image), images(images) {
        const int n = first + threadIdx.x % QUADS * 4, tap = n / image.group_channels;
        const int r = tap / image.taps_across, s = tap % image.taps_across;
        real = r < image.taps_down;
        channel = group * image.group_channels + n % image.group_channels;
        end_row = r - image.above + image.p * image.down;
        end_column = s - image.before + image.q * image.right;
        step_column = image.step_inner * image.right;
        step_row = image.step_middle * image.down;
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            const int k = begin + threadIdx.x / QUADS + i * PASS;
            number[i] = k / (image.p * image.q);
            row[i] = k / image.q % image.p * image.down + r - image.above;
            column[i] = k % image.q * image.right + s - image.before;
        }
    }

    __device__ __forceinline__ void copy(float* to) const {
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            const bool here = real && number[i] < images && inside(row[i], column[i], image);
            const int pixel = (number[i] * image.h + row[i]) * image.w + column[i];
            copy_async<16>(to + (i * THREADS + threadIdx.x) * 4,
                           image.at + static_cast<unsigned>(pixel * image.channels + channel), here);
        }
    }

    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            column[i] += step_column;
            row[i] += step_row;
            if (column[i] >= end_column) {
                column[i] -= image.q * image.right;
                row[i] += image.down;
            }
            number[i] += image.step_outer;
            if (row[i] >= end_row) {
                row[i] -= image.p * image.down;
                ++number[i];
            }
        }
    }
};

// Writes a tile's sums, whose first is (m0, n0) of (m, n), to the output or to the block's part of `partial`. pixel(row):
// where a row of the tile goes in the output.
template <class T, bool K_INSIDE, class Pixel>
__device__ __forceinline__ void put(const Output& out, float* partial, const Place<T, K_INSIDE>& place, int m0, int n0,
                                    int m, int n, int group, const float (&sum)[8][8], Pixel pixel) {
    const int apart = partial ? (n + 3) / 4 * 4 : out.apart;
    float* to = partial ? partial + static_cast<long long>(blockIdx.z) * m * apart
                        : out.at + static_cast<long long>(group) * out.group_apart;
    const bool quads = partial || takes_quads(out, n), relu = !partial && out.relu, add = !partial && out.add;
    float bias[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int column = n0 + place.column(j / 4) + j % 4;
        bias[j] = !partial && out.bias && column < n ? out.bias[group * n + column] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = place.row(i);
        if (m0 + row >= m) continue;
        float* line = to + static_cast<long long>(partial ? m0 + row : pixel(row)) * apart;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = n0 + place.column(half);
            alignas(16) float value[4], old[4] = {0.f, 0.f, 0.f, 0.f};
            if (add && quads && column < n) copy_four(old, line + column);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                value[j] = sum[i][4 * half + j] + bias[4 * half + j];
                if (relu) value[j] = value[j] > 0.f ? value[j] : 0.f;
                value[j] += old[j];
                if (!quads && column + j < n) line[column + j] = add ? line[column + j] + value[j] : value[j];
            }
            if (quads && column < n) copy_four(line + column, value);
        }
    }
}

// depth: rows of b; part: summands of one part, a multiple of STEP. IN_QUADS: the image and b are 16-byte aligned.
template <int WARPS_M, int WARPS_N, bool IN_QUADS>
__device__ __forceinline__ void gather(const Image& image, const float* b, const Output& out, float* partial, int m,
                                       int n, int depth, int ldb, int b_group, int groups, int part) {
    using T = Tile<WARPS_M, WARPS_N>;
    const int m0 = blockIdx.x * T::M, n0 = blockIdx.y * T::N, group = blockIdx.z % groups;
    const int begin = blockIdx.z / groups * part, all = image.taps_down * image.taps_across * image.group_channels;
    const int steps = (min(part, all - begin) + STEP - 1) / STEP;
    __shared__ Stages<T> stages;
    __shared__ Row rows[T::M];
    find_rows<T::M, T::THREADS>(rows, image, out, group, m0, m);
    const Place<T, true> place;
    float sum[8][8];
    Pixels<T::M, T::THREADS, IN_QUADS> left(image, rows, begin);
    Columns<T::N, T::THREADS, IN_QUADS> right(b, group * b_group, begin, depth, ldb, n0, ldb);
    multiply_steps<T>(left, right, steps, stages, place, sum);
    put(out, partial, place, m0, n0, m, n, group, sum, [&](int row) { return rows[row].pixel; });
}

// k: filters of a group; ldk: of a group in dy; part: pixels of one part, a multiple of STEP.
template <int WARPS_M, int WARPS_N>
__device__ __forceinline__ void weights(const Image& image, const float* dy, const Output& out, float* partial,
                                        int images, int k, int ldk, int groups, int part) {
    using T = Tile<WARPS_M, WARPS_N>;
    const int n = image.taps_down * image.taps_across * image.group_channels;
    const int m0 = blockIdx.x * T::M, n0 = blockIdx.y * T::N, group = blockIdx.z % groups;
    const int begin = blockIdx.z / groups * part, all = images * image.p * image.q;
    const int steps = (min(part, all - begin) + STEP - 1) / STEP;
    __shared__ Stages<T> stages;
    const Place<T, false> place;
    Columns<T::M, T::THREADS, true> left(dy, group * ldk, begin, all, ldk * groups, m0, ldk);
    Windows<T::N, T::THREADS> right(image, group, begin, images, n0);
    float sum[8][8];
    multiply_steps<T>(left, right, steps, stages, place, sum);
    put(out, partial, place, m0, n0, k, n, group, sum, [&](int row) { return m0 + row; });
}

}  // namespace dpnn

#define IMAGE                                                                                                          \
    const float *image, int h, int w, int channels, int group_channels, int taps_down, int taps_across, int p, int q,  \
        int down, int right, int above, int before, int step_outer, int step_middle, int step_inner
#define THE_IMAGE                                                                                                      \
    {                                                                                                                  \
        image, h, w, channels, group_channels, taps_down, taps_across, p, q, down, right, above, before, step_outer,   \
            step_middle, step_inner                                                                                    \
    }

#define GATHER \
    IMAGE, const float *b, int m, int n, int depth, int ldb, int b_group, int groups, int part, float *partial, OUTPUT
#define GATHER_ON(WARPS_M, WARPS_N, IN_QUADS) \
    dpnn::gather<WARPS_M, WARPS_N, IN_QUADS>(THE_IMAGE, b, THE_OUTPUT, partial, m, n, depth, ldb, b_group, groups, part)

KERNEL(256, 2) gather_128x128(GATHER) { GATHER_ON(2, 4, true); }
KERNEL(128, 4) gather_128x64(GATHER) { GATHER_ON(2, 2, true); }
KERNEL(64, 6) gather_128x32(GATHER) { GATHER_ON(2, 1, true); }
KERNEL(128, 4) gather_64x128(GATHER) { GATHER_ON(1, 4, true); }
KERNEL(64, 8) gather_64x64(GATHER) { GATHER_ON(1, 2, true); }

// For operands that lie anywhere, as parameters may.
KERNEL(128, 3) gather_any_64x128(GATHER) { GATHER_ON(1, 4, false); }

#define WEIGHTS IMAGE, const float *dy, int images, int k, int ldk, int groups, int part, float *partial, OUTPUT
#define WEIGHTS_ON(WARPS_M, WARPS_N) \
    dpnn::weights<WARPS_M, WARPS_N>(THE_IMAGE, dy, THE_OUTPUT, partial, images, k, ldk, groups, part)

KERNEL(256, 2) weights_128x128(WEIGHTS) { WEIGHTS_ON(2, 4); }
KERNEL(128, 4) weights_128x64(WEIGHTS) { WEIGHTS_ON(2, 2); }
KERNEL(128, 4) weights_64x128(WEIGHTS) { WEIGHTS_ON(1, 4); }
KERNEL(64, 8) weights_64x64(WEIGHTS) { WEIGHTS_ON(1, 2); }
