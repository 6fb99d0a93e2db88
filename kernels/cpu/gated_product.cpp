// Activations between two products: see kernels/gated_product.py.
#include "replay.hpp"
#include "rows.hpp"

constexpr int64_t AHEAD_OF_ROW = 512;  // numbers: rows are longer than what the processor fetches by itself

// x / 2 · (1 + tanh(u)) = x / (1 + e^-2u)
static inline f32x16 gelu(f32x16 x) {
    return x / (exp16(x * (x * x * 0.044715f + 1.0f) * -1.5957691216f) + 1.0f);
}

template <class T>
static void gated_product(
    const T* gates, int64_t gate_stride, const T* ups, int64_t up_stride, T* y, int64_t rows, int64_t dim,
    bool is_gelu) {
    share_rows(rows, 3 * dim, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T *gate = gates + row * gate_stride, *up = ups + row * up_stride;
            T* to = y + row * dim;
            if (is_gelu)
                each(dim, [&](int64_t i, auto n) { store(to + i, gelu(load(gate + i, n)) * load(up + i, n), n); });
            else
                each(dim, [&](int64_t i, auto n) {
                    __builtin_prefetch(gate + i + AHEAD_OF_ROW);
                    __builtin_prefetch(up + i + AHEAD_OF_ROW);
                    store(to + i, silu(load(gate + i, n)) * load(up + i, n), n);
                });
        }
    });
}

template <class T> static void gelu_tanh(T* x, const T* bias, int64_t rows, int64_t dim) {
    share_rows(rows, 2 * dim, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            T* p = x + row * dim;
            if (bias)
                each(dim, [&](int64_t i, auto n) { store(p + i, gelu(load(p + i, n) + load(bias + i, n)), n); });
            else
                each(dim, [&](int64_t i, auto n) { store(p + i, gelu(load(p + i, n)), n); });
        }
    });
}

#define GATED_PRODUCT(SUFFIX, T)                                                                                       \
    EXPORT void gated_product_##SUFFIX(                                                                                \
        const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y, int64_t rows, int64_t dim,          \
        int64_t is_gelu) {                                                                                             \
        gated_product(gate, gate_stride, up, up_stride, y, rows, dim, is_gelu != 0);                                   \
    }                                                                                                                  \
    EXPORT void gelu_tanh_##SUFFIX(T* x, const T* bias, int64_t rows, int64_t dim) { gelu_tanh(x, bias, rows, dim); }

GATED_PRODUCT(f32, float)
GATED_PRODUCT(bf16, bf16)
REPLAYED(gated_product_f32)
REPLAYED(gated_product_bf16)
REPLAYED(gelu_tanh_f32)
REPLAYED(gelu_tanh_bf16)
