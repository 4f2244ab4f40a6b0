// Where the results of a matrix product [m][n] go: rows are pixels of images, or of a plain matrix.
//
// m counts the pixels of a grid (images, p, q), which are every `down`-th row and `right`-th column of images (h, w) from
// (first_row, first_column) on. Pixels lie `apart` numbers apart, groups `group_apart`.
#pragma once

namespace dpnn {

struct Output {
    float* at;
    const float* bias;  // (G, n) or NULL
    int relu, add;      // max(value, 0); add the value to what stands there
    int apart, group_apart;
    int p, q, h, w, down, right, first_row, first_column;
};

#define OUTPUT                                                                                                        \
    float *out, const float *bias, int relu, int add, int out_apart, int out_group_apart, int out_p, int out_q,       \
        int out_h, int out_w, int out_down, int out_right, int first_row, int first_column
#define THE_OUTPUT                                                                                                    \
    {                                                                                                                 \
        out, bias, relu, add, out_apart, out_group_apart, out_p, out_q, out_h, out_w, out_down, out_right, first_row, \
            first_column                                                                                              \
    }

__device__ __forceinline__ void copy_four(float* to, const float* from) {
    *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
}

// Whether 16 bytes from there on are aligned: parameters lie in a flat array, wherever they come to lie.
__device__ __forceinline__ bool in_quads(const float* from) { return reinterpret_cast<size_t>(from) % 16 == 0; }

// Whether rows of n numbers can be written in quads.
__device__ __forceinline__ bool takes_quads(const Output& out, int n) {
    return in_quads(out.at) && n % 4 == 0 && out.apart % 4 == 0 && out.group_apart % 4 == 0;
}

// The number of a row's pixel among all of the images.
__device__ __forceinline__ int output_pixel(const Output& out, int m) {
    if (out.down * out.right == 1) return m;
    const int row = m / out.q % out.p * out.down + out.first_row, column = m % out.q * out.right + out.first_column;
    return (m / (out.p * out.q) * out.h + row) * out.w + column;
}

// Where a row's numbers start.
__device__ __forceinline__ float* output_row(const Output& out, int group, int m) {
    return out.at + static_cast<long long>(output_pixel(out, m)) * out.apart +
           static_cast<long long>(group) * out.group_apart;
}

// Writes four numbers of a row, from `column` of n on, or as many as there are.
__device__ __forceinline__ void put_four(const Output& out, float* row, int group, int column, int n, bool quads,
                                         float (&value)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (column + j >= n) continue;
        if (out.bias) value[j] += out.bias[group * n + column + j];
        if (out.relu) value[j] = value[j] > 0.f ? value[j] : 0.f;
        if (out.add) value[j] += row[column + j];
        if (!quads) row[column + j] = value[j];
    }
    if (quads) copy_four(row + column, value);
}

}  // namespace dpnn
