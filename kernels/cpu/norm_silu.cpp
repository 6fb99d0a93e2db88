// Norms with SiLU over pixels in channels-last order: see kernels/rms_norm_silu.py and kernels/group_norm_silu.py.
#include <algorithm>

#include "rows.hpp"

// --- RMS over the channels of a pixel ---------------------------------------------------------------------------------

template <class T>
static void rms_norm_silu(
    const T* x, const float* scale, T* y, int64_t rows, int64_t dim, float least, int64_t activate) {
    share_rows(rows, dim, [&](int64_t first, int64_t last) {
        int64_t whole = dim / WIDTH * WIDTH, rest = dim - whole;
        for (int64_t row = first; row < last; row++) {
            const T* from = x + row * dim;
            T* to = y + row * dim;
            f32x16 squares{}, end = load_some(from + whole, rest);
            for (int64_t i = 0; i < whole; i += WIDTH) {
                f32x16 a = load(from + i);
                squares += a * a;
            }
            float inverse = 1.0f / std::max(std::sqrt(sum(squares + end * end)), least);
            auto change = [&](f32x16 a, f32x16 by) {
                a = a * inverse * by;
                return activate ? silu(a) : a;
            };
            for (int64_t i = 0; i < whole; i += WIDTH) store(to + i, change(load(from + i), load(scale + i)));
            if (rest) store_some(to + whole, change(end, load_some(scale + whole, rest)), rest);
        }
    });
}

// --- mean and variance over the channels of a group and all pixels ----------------------------------------------------

constexpr int64_t TOGETHER = 64;  // pixels whose sums are gathered in float32

// Sums and squares of each channel, less `pivot`, which keeps what is subtracted later small, over some pixels.
template <class T>
static void gather(const T* x, const float* pivot, double* sums, double* squares, int64_t first, int64_t last, int64_t dim) {
    std::fill(sums, sums + dim, 0.0);
    std::fill(squares, squares + dim, 0.0);
    for (int64_t start = first; start < last; start += TOGETHER) {
        int64_t end = std::min(last, start + TOGETHER);
        for (int64_t c = 0; c < dim; c += WIDTH) {
            int64_t some = std::min(WIDTH, dim - c);
            f32x16 base = some == WIDTH ? load(pivot + c) : load_some(pivot + c, some), total{}, square{};
            for (int64_t p = start; p < end; p++) {
                const T* from = x + p * dim + c;
                f32x16 a = (some == WIDTH ? load(from) : load_some(from, some)) - base;
                total += a;
                square += a * a;
            }
            for (int64_t i = 0; i < some; i++) {
                sums[c + i] += total[i];
                squares[c + i] += square[i];
            }
        }
    }
}

// One picture [pixels, dim]. `room`: float32 [3, dim] and float64 [slices, 2, dim]; slices do not depend on the threads.
template <class T>
static void group_norm_silu(
    const T* x, const float* weight, const float* bias, T* y, float* factors, double* room, int64_t pixels, int64_t dim,
    int64_t groups, int64_t slices, float eps, int64_t activate) {
    float *by = factors, *add = factors + dim, *pivot = factors + 2 * dim;
    for (int64_t c = 0; c < dim; c++) pivot[c] = widen(x[c]);
    share_rows(slices, pixels / slices * dim + 1, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; s++)
            gather(
                x, pivot, room + 2 * s * dim, room + (2 * s + 1) * dim, pixels * s / slices, pixels * (s + 1) / slices,
                dim);
    });
    int64_t own = dim / groups;
    for (int64_t g = 0; g < groups; g++) {
        double total = 0, square = 0;
        for (int64_t c = g * own; c < (g + 1) * own; c++) {
            double sum_c = 0, square_c = 0, base = pivot[c];
            for (int64_t s = 0; s < slices; s++) {
                sum_c += room[2 * s * dim + c];
                square_c += room[(2 * s + 1) * dim + c];
            }
            // Around the pivot of the group's first channel, for all of its channels.
            double shift = base - pivot[g * own];
            total += sum_c + shift * pixels;
            square += square_c + 2 * shift * sum_c + shift * shift * pixels;
        }
        double count = double(own) * pixels, mean = total / count;
        double variance = std::max(0.0, square / count - mean * mean);
        mean += pivot[g * own];
        double inverse = 1.0 / std::sqrt(variance + eps);
        for (int64_t c = g * own; c < (g + 1) * own; c++) {
            by[c] = float(inverse * weight[c]);
            add[c] = float(bias[c] - mean * inverse * weight[c]);
        }
    }
    share_rows(pixels, dim, [&](int64_t first, int64_t last) {
        int64_t whole = dim / WIDTH * WIDTH, rest = dim - whole;
        for (int64_t p = first; p < last; p++) {
            const T* from = x + p * dim;
            T* to = y + p * dim;
            for (int64_t i = 0; i < whole; i += WIDTH) {
                f32x16 a = load(from + i) * load(by + i) + load(add + i);
                store(to + i, activate ? silu(a) : a);
            }
            if (rest) {
                f32x16 a = load_some(from + whole, rest) * load_some(by + whole, rest) + load_some(add + whole, rest);
                store_some(to + whole, activate ? silu(a) : a, rest);
            }
        }
    });
}

#define NORM_SILU(SUFFIX, T)                                                                                           \
    EXPORT void rms_norm_silu_##SUFFIX(                                                                                \
        const T* x, const float* scale, T* y, int64_t rows, int64_t dim, float least, int64_t activate) {              \
        rms_norm_silu(x, scale, y, rows, dim, least, activate);                                                        \
    }                                                                                                                  \
    EXPORT void group_norm_silu_##SUFFIX(                                                                              \
        const T* x, const float* weight, const float* bias, T* y, float* factors, double* room, int64_t pixels,        \
        int64_t dim, int64_t groups, int64_t slices, float eps, int64_t activate) {                                    \
        group_norm_silu(x, weight, bias, y, factors, room, pixels, dim, groups, slices, eps, activate);                \
    }

NORM_SILU(f32, float)
NORM_SILU(bf16, bf16)
