// One tile of a matrix product c[m][n] = sum over k of a[m][k] b[k][n] in float32, on the plain arithmetic units.
//
// A block makes 64 WARPS_M rows by 32 WARPS_N columns; a warp 64 by 32, a thread 8 by 8. STEP summands are in shared
// memory while the next STEP are copied there. `a` lies there in one of two ways, `b` in the second:
//   k inside   [m][STEP], as where k is the fastest dimension in memory. The four quads of a row are swapped by the row
//              (`swizzled`), so that neither copies nor reads of 8 rows fall on the same banks.
//   k outside  [STEP][m]
// A thread reads 16 bytes at a time either way: 4 reads for 64 multiply-adds. Its place in the warp makes neighbours
// read the same address: lanes l and l ^ 1 the same rows, lanes l and l ^ 2 the same columns.
#pragma once
#include "device.cuh"
#include "output.cuh"

namespace dpnn {

constexpr int STEP = 16;

template <int WARPS_M, int WARPS_N>
struct Tile {
    static constexpr int M = 64 * WARPS_M, N = 32 * WARPS_N, THREADS = 32 * WARPS_M * WARPS_N;
};

// Where a thread's results stand in the block's tile.
template <class T, bool K_INSIDE>
struct Place {
    int warp_row, row_lane, warp_column, column_lane;

    __device__ __forceinline__ Place() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        warp_row = warp % (T::M / 64) * 64;
        warp_column = warp / (T::M / 64) * 32;
        row_lane = lane / 2 % 8;
        column_lane = lane % 2 + lane / 16 * 2;
    }

    // The row of its results [i][*].
    __device__ __forceinline__ int row(int i) const {
        return warp_row + (K_INSIDE ? row_lane + 8 * i : row_lane * 4 + i % 4 + i / 4 * 32);
    }

    // The column of its results [*][4 half]; three more follow.
    __device__ __forceinline__ int column(int half) const { return warp_column + column_lane * 4 + half * 16; }
};

// Where the quad q of a row of STEP numbers lies, k inside.
__device__ __forceinline__ int swizzled(int row, int q) { return row * STEP + 4 * (q ^ (row / 2 % 4)); }

// Two steps' numbers of both sides.
template <class T>
struct Stages {
    alignas(16) float a[2][T::M * STEP], b[2][T::N * STEP];
};

// sum[i][j] += the STEP products of the thread's rows of a and columns of b, of one of two stages.
template <class T, bool K_INSIDE>
__device__ __forceinline__ void multiply(const Stages<T>& stages, int stage, const Place<T, K_INSIDE>& place,
                                         float (&sum)[8][8]) {
    const float *a = stages.a[stage], *b = stages.b[stage];
    // Where the quad 0 of the thread's first row lies; quad q lies at this ^ 4 q, one instruction instead of a register.
    const int quad = stage * T::M * STEP + swizzled(place.row(0), 0);
#pragma unroll
    for (int q = 0; q < STEP / 4; ++q) {
        alignas(16) float inside[8][4];
        if (K_INSIDE) {
            // Rows 8 apart are swizzled alike.
            const float* rows = stages.a[0] + (quad ^ 4 * q);
#pragma unroll
            for (int i = 0; i < 8; ++i) copy_four(inside[i], rows + i * 8 * STEP);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int k = 4 * q + e;
            alignas(16) float left[8], right[8];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                copy_four(right + 4 * half, b + k * T::N + place.column(half));
                if (!K_INSIDE) copy_four(left + 4 * half, a + k * T::M + place.row(4 * half));
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float factor = K_INSIDE ? inside[i][e] : left[i];
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i][j] += factor * right[j];
            }
        }
    }
}

// Four numbers into shared memory, QUADS at a time or one by one; zeros where not `inside`.
template <bool QUADS>
__device__ __forceinline__ void copy_quad(float* to, const float* from, bool inside) {
    if (QUADS) {
        copy_async<16>(to, from, inside);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) copy_async<4>(to + i, from + i, inside);
    }
}

// Copies a matrix [depth][apart] step by step, k outside; zeros beyond it. It lies `offset` numbers behind `base`, and
// ends before 2^31 of them.
template <int WIDTH, int THREADS, bool IN_QUADS>
struct Columns {
    static constexpr int QUADS = WIDTH / 4, PASS = THREADS / QUADS, PASSES = STEP / PASS;
    static_assert(THREADS % QUADS == 0 && STEP % PASS == 0, "each pass copies whole rows");
    const float* base;
    unsigned place, end, apart;  // `place` of a column outside of the matrix lies behind its end for ever

    // Columns [first, first + WIDTH) of `columns`, from row `begin` on.
    __device__ __forceinline__ Columns(const float* base, unsigned offset, int begin, int depth, int apart, int first,
                                       int columns)
        : base(base), end(offset + static_cast<unsigned>(depth) * apart), apart(apart) {
        const int column = first + threadIdx.x % QUADS * 4;
        place = offset + (begin + threadIdx.x / QUADS) * apart + column + (column < columns ? 0u : 1u << 31);
    }

    __device__ __forceinline__ void copy(float* to) const {
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            const unsigned from = place + i * PASS * apart;
            copy_quad<IN_QUADS>(to + (i * THREADS + threadIdx.x) * 4, base + from, from < end);
        }
    }

    __device__ __forceinline__ void advance() { place += STEP * apart; }
};

// sum = the products of `steps` steps of what the two loaders copy. All threads of the block call it.
template <class T, bool K_INSIDE, class Left, class Right>
__device__ __forceinline__ void multiply_steps(Left& left, Right& right, int steps, Stages<T>& stages,
                                               const Place<T, K_INSIDE>& place, float (&sum)[8][8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = 0.f;
    if (steps > 0) {
        left.copy(stages.a[steps % 2]);
        right.copy(stages.b[steps % 2]);
        close_copies();
    }
    for (; steps > 0; --steps) {  // what is left is all that is counted: registers are few
        copies_arrived<0>();
        __syncthreads();  // all see this step's numbers; nobody reads the last step's any more
        if (steps > 1) {
            left.advance();
            right.advance();
            left.copy(stages.a[(steps - 1) % 2]);
            right.copy(stages.b[(steps - 1) % 2]);
            close_copies();
        }
        multiply<T, K_INSIDE>(stages, steps % 2, place, sum);
    }
}

}  // namespace dpnn
