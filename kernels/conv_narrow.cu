// Convolution of images of few channels, a network's first layer: what matters is to move the outputs just once.
//
// narrow_C_T          y[pixel][k] = sum over (r, s, c) of x[pixel + (r, s)][c] w[k][c][r][s] + bias[k], then ReLU
// narrow_weights_C_T  partial[block][k][(r, s, c)] = sum over the block's pixels of dy[pixel][k] x[pixel + (r, s)][c]
//
// Shapes: x (N, H, W, C); y, dy (N, P, Q, K), K a multiple of 4 and 16-byte aligned; w (K, C, R, S).
// Bound by memory: 4 N P Q K bytes, and 2 N P Q K R S C operations at 256 a clock and multiprocessor.
//
// A block goes from tile to tile of DOWN x ACROSS pixels; the part of the image under one lies in shared memory, its
// columns sorted by their residue of the stride. So the numbers under neighbouring outputs, for the taps of one residue,
// are C apart: a thread that has 8 pixels in a row reads a window of (7 + T) C numbers, and has all factors of T taps.
// A row of a filter is so cut into `chunks` of T taps a residue; taps that it doesn't have are zeros.
#include "device.cuh"
#include "output.cuh"

namespace dpnn {

constexpr int DOWN = 8, ACROSS = 16, FILTERS = 64;  // of a tile
constexpr int FILTERS_APART = FILTERS + 4;          // so that filters come there from memory on different banks

struct Picture {
    const float* x;
    int images, h, w, taps_down, taps_across, p, q, down, right, above, before;
    int chunks, residue_apart, row_apart;  // of a residue; numbers from residue to residue and from row to row of a patch

    __device__ __forceinline__ int units() const { return taps_down * right * chunks; }
    __device__ __forceinline__ int across() const { return (q + ACROSS - 1) / ACROSS; }
    __device__ __forceinline__ int tiles() const { return images * ((p + DOWN - 1) / DOWN) * across(); }
};

// Where a tile of outputs begins.
struct Corner {
    int image, p, q;

    __device__ __forceinline__ Corner(const Picture& picture, int tile) {
        const int across = picture.across(), down = (picture.p + DOWN - 1) / DOWN;
        image = tile / across / down;
        p = tile / across % down * DOWN;
        q = tile % across * ACROSS;
    }

    // The output `row` rows further down, as a number of pixels behind the first.
    __device__ __forceinline__ long long pixel(const Picture& picture, int row) const {
        return (static_cast<long long>(image) * picture.p + p + row) * picture.q + q;
    }
};

// The part of an image under a tile.
template <int C, int TAPS>
struct Patch {
    static constexpr int SUMMANDS = TAPS * C, QUADS = ((7 + TAPS) * C + 3) / 4;
    const Picture& picture;
    float* at;
    int rows, width;
    int* places;  // of each number of a row

    __device__ __forceinline__ Patch(const Picture& picture, float* at) : picture(picture), at(at) {
        rows = (DOWN - 1) * picture.down + picture.taps_down;
        width = ((ACROSS - 1) * picture.right + picture.taps_across) * C;
        places = reinterpret_cast<int*>(at + rows * picture.row_apart);
    }

    // What stands between the rows is read, times zero.
    __device__ __forceinline__ void prepare() const {
        for (int i = threadIdx.x; i < rows * picture.row_apart; i += blockDim.x) at[i] = 0.f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const int column = i / C;
            places[i] = column % picture.right * picture.residue_apart + column / picture.right * C + i % C;
        }
    }

    __device__ __forceinline__ void copy(const Corner& corner) const {
        const int top = corner.p * picture.down - picture.above, first = (corner.q * picture.right - picture.before) * C;
        for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
            const bool real = static_cast<unsigned>(top + row) < static_cast<unsigned>(picture.h);
            const unsigned end = real ? picture.w * C : 0;
            const float* from =
                picture.x + (static_cast<long long>(corner.image) * picture.h + top + row) * picture.w * C + first;
            float* to = at + row * picture.row_apart;
            for (int i = threadIdx.x % 32; i < width; i += 32)
                copy_async<4>(to + places[i], from + i, static_cast<unsigned>(first + i) < end);
        }
    }

    __device__ __forceinline__ void read(const float* from, float (&window)[4 * QUADS]) const {
#pragma unroll
        for (int i = 0; i < QUADS; ++i) copy_four(window + 4 * i, from + 4 * i);
    }
};

// Filters [first, first + FILTERS) as [unit][summand][FILTERS_APART], zeros elsewhere. It has a barrier.
template <int C, int TAPS>
__device__ __forceinline__ void arrange(const Picture& picture, const float* w, int k, int first, float* to) {
    const int size = picture.units() * TAPS * C * FILTERS_APART, taps = picture.taps_down * picture.taps_across;
    for (int i = threadIdx.x; i < size; i += blockDim.x) to[i] = 0.f;
    __syncthreads();
    for (int i = threadIdx.x; i < min(FILTERS, k - first) * C * taps; i += blockDim.x) {
        const int filter = i / (C * taps), c = i / taps % C, tap = i % taps;
        const int s = tap % picture.taps_across, nth = s / picture.right;  // the nth of its residue
        const int residue = tap / picture.taps_across * picture.right + s % picture.right;
        const int row = (residue * picture.chunks * TAPS + nth) * C + c;
        to[row * FILTERS_APART + filter] = w[static_cast<long long>(first) * C * taps + i];
    }
}

// Of 4 warps each makes 4 rows of outputs by 32 filters; a thread 8 pixels of a row by 8 filters.
template <int C, int TAPS>
__device__ __forceinline__ void narrow(const Picture& picture, const float* w, const float* bias, float* y, int k,
                                       int relu) {
    using P = Patch<C, TAPS>;
    DYNAMIC_SHARED(float, shared);
    const P patch(picture, shared + picture.units() * P::SUMMANDS * FILTERS_APART);
    const int first = blockIdx.y * FILTERS, lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = picture.tiles();
    // Neighbours read the same numbers: lanes l and l ^ 1 of the image, lanes l and l ^ 2 of the filters.
    const int row = warp % 2 * 4 + lane / 8, column = lane / 2 % 2 * 8;
    const int filter = warp / 2 * 32 + (lane % 2 + lane / 4 % 2 * 2) * 4;
    patch.prepare();
    arrange<C, TAPS>(picture, w, k, first, shared);
    patch.copy(Corner(picture, blockIdx.x));
    close_copies();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sum[8][8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int n = first + filter + j / 4 * 16 + j % 4;
            sum[0][j] = bias && n < k ? bias[n] : 0.f;
#pragma unroll
            for (int i = 1; i < 8; ++i) sum[i][j] = sum[0][j];
        }
        copies_arrived<0>();
        __syncthreads();
        const float *factors = shared + filter, *under = patch.at + row * picture.down * picture.row_apart + column * C;
        for (int r = 0; r < picture.taps_down; ++r, under += picture.row_apart)
            for (int residue = 0; residue < picture.right; ++residue)
#pragma unroll 1
                for (int chunk = 0; chunk < picture.chunks; ++chunk) {
                    alignas(16) float window[4 * P::QUADS];
                    patch.read(under + residue * picture.residue_apart + chunk * P::SUMMANDS, window);
#pragma unroll
                    for (int summand = 0; summand < P::SUMMANDS; ++summand, factors += FILTERS_APART) {
                        alignas(16) float factor[8];
                        copy_four(factor, factors);
                        copy_four(factor + 4, factors + 16);
#pragma unroll
                        for (int i = 0; i < 8; ++i)
#pragma unroll
                            for (int j = 0; j < 8; ++j) sum[i][j] += window[i * C + summand] * factor[j];
                    }
                }
        __syncthreads();
        if (tile + static_cast<int>(gridDim.x) < tiles) patch.copy(Corner(picture, tile + gridDim.x));
        close_copies();
        const Corner corner(picture, tile);
        float* to = y + (corner.pixel(picture, row) + column) * k + first + filter;
        const int pixels = corner.p + row < picture.p ? picture.q - corner.q - column : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                alignas(16) float value[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    value[j] = sum[i][4 * half + j];
                    if (relu) value[j] = value[j] > 0.f ? value[j] : 0.f;
                }
                if (i < pixels && first + filter + half * 16 < k)
                    copy_four(to + static_cast<long long>(i) * k + half * 16, value);
            }
    }
}

// A warp makes all FILTERS of its own unit, of those that begin with blockIdx.y blockDim.x / 32; a thread 4 filters, of
// 8 columns of the tile. The grid is (blocks beside each other, groups of units, groups of filters).
template <int C, int TAPS>
__device__ __forceinline__ void narrow_weights(const Picture& picture, const float* dy, float* partial, int k) {
    using P = Patch<C, TAPS>;
    DYNAMIC_SHARED(float, shared);
    const P patch(picture, shared + DOWN * ACROSS * FILTERS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, tiles = picture.tiles();
    const int quad = lane % 16 * 4, first = blockIdx.z * FILTERS + quad, column = lane / 16 * 8;
    // The unit (r, residue, chunk), and what lies under its columns of the tile's first row.
    const int unit = blockIdx.y * warps + warp, chunk = unit % picture.chunks;
    const int residue = unit / picture.chunks % picture.right, r = unit / picture.chunks / picture.right;
    const bool real = r < picture.taps_down;
    const float* under = patch.at + r * picture.row_apart + residue * picture.residue_apart + chunk * P::SUMMANDS + column * C;
    const auto copy = [&](const Corner& corner) {
        patch.copy(corner);
        for (int row = warp; row < DOWN; row += warps) {
            const float* from = dy + corner.pixel(picture, row) * k + first;
            const int pixels = corner.p + row < picture.p && first < k ? picture.q - corner.q : 0;
#pragma unroll
            for (int i = 0; i < ACROSS; i += 2) {
                const int pixel = i + lane / 16;
                copy_async<16>(shared + (row * ACROSS + pixel) * FILTERS + quad,
                               from + static_cast<long long>(pixel) * k, pixel < pixels);
            }
        }
    };
    patch.prepare();
    __syncthreads();
    copy(Corner(picture, blockIdx.x));
    close_copies();
    float sum[P::SUMMANDS][4] = {};
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        copies_arrived<0>();
        __syncthreads();
#pragma unroll 1
        for (int row = 0; real && row < DOWN; ++row) {
            alignas(16) float window[4 * P::QUADS];
            patch.read(under + row * picture.down * picture.row_apart, window);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                alignas(16) float value[4];
                copy_four(value, shared + (row * ACROSS + column + i) * FILTERS + quad);
#pragma unroll
                for (int summand = 0; summand < P::SUMMANDS; ++summand)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[summand][j] += window[i * C + summand] * value[j];
            }
        }
        __syncthreads();
        if (tile + static_cast<int>(gridDim.x) < tiles) copy(Corner(picture, tile + gridDim.x));
        close_copies();
    }
    const int size = picture.taps_down * picture.taps_across * C;
#pragma unroll
    for (int summand = 0; summand < P::SUMMANDS; ++summand) {
        const int s = (chunk * TAPS + summand / C) * picture.right + residue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = sum[summand][j] + __shfl_xor_sync(0xffffffffu, sum[summand][j], 16);
            if (real && s < picture.taps_across && column == 0 && first < k)
                partial[(static_cast<long long>(blockIdx.x) * k + first + j) * size +
                        (r * picture.taps_across + s) * C + summand % C] = value;
        }
    }
}

}  // namespace dpnn

#define PICTURE                                                                                                       \
    const float *x, int images, int h, int w, int taps_down, int taps_across, int p, int q, int down, int right,      \
        int above, int before, int chunks, int residue_apart, int row_apart
#define THE_PICTURE                                                                                                   \
    {                                                                                                                 \
        x, images, h, w, taps_down, taps_across, p, q, down, right, above, before, chunks, residue_apart, row_apart   \
    }

#define NARROW(C, TAPS)                                                                                               \
    KERNEL(128, 4) narrow_##C##_##TAPS(PICTURE, const float* filters, const float* bias, float* y, int k, int relu) { \
        dpnn::narrow<C, TAPS>(THE_PICTURE, filters, bias, y, k, relu);                                                \
    }                                                                                                                 \
    KERNEL(256, 2) narrow_weights_##C##_##TAPS(PICTURE, const float* dy, float* partial, int k) {                     \
        dpnn::narrow_weights<C, TAPS>(THE_PICTURE, dy, partial, k);                                                   \
    }

NARROW(1, 4)
NARROW(3, 3)
NARROW(3, 4)
