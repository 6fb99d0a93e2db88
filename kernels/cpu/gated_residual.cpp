// x += gate · y (or y / rms(y)), and the norm of the sum: see kernels/gated_residual.py.
#include "replay.hpp"
#include "rows.hpp"

template <class T, class G> static inline void add(T* x, const T* y, const G* gate, float inverse, int64_t dim) {
    if (gate)
        each(dim, [&](int64_t i, auto n) {
            store(x + i, load(x + i, n) + load(y + i, n) * inverse * load(gate + i, n), n);
        });
    else
        each(dim, [&](int64_t i, auto n) { store(x + i, load(x + i, n) + load(y + i, n) * inverse, n); });
}

// eps < 0: y is taken as it is.
template <class T>
static inline void add_row(T* x, const T* y, const Table& gate, int64_t token, int64_t dim, float eps) {
    float inverse = eps < 0 ? 1.0f : inverse_root(squares(y, dim), dim, eps);
    if (gate.wide)
        add(x, y, gate.row<float>(token, dim), inverse, dim);
    else
        add(x, y, gate.row<T>(token, dim), inverse, dim);
}

template <class T>
static void gated_residual(T* x, const T* y, Table gate, int64_t rows, int64_t dim, float eps) {
    share_rows(rows, 2 * dim, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) add_row(x + row * dim, y + row * dim, gate, row, dim, eps);
    });
}

template <class T>
static void gated_residual_norm(
    T* x, const T* y, Table gate, float eps, Table scale, Table shift, bool centred, float norm_eps, T* out,
    int64_t rows, int64_t dim) {
    share_rows(rows, 3 * dim, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            add_row(x + row * dim, y + row * dim, gate, row, dim, eps);
            norm_row(x + row * dim, out + row * dim, scale, shift, row, dim, centred, norm_eps);
        }
    });
}

#define GATED_RESIDUAL(SUFFIX, T)                                                                                      \
    EXPORT void gated_residual_##SUFFIX(                                                                               \
        T* x, const T* y, const void* gate, const int32_t* index, int64_t wide, int64_t rows, int64_t dim,            \
        float eps) {                                                                                                   \
        gated_residual(x, y, {gate, index, wide != 0}, rows, dim, eps);                                                \
    }                                                                                                                  \
    EXPORT void gated_residual_norm_##SUFFIX(                                                                          \
        T* x, const T* y, const void* gate, const int32_t* index, int64_t wide, float eps, const void* scale,         \
        const void* shift, const int32_t* scale_index, int64_t scale_wide, int64_t centred, float norm_eps, T* out,   \
        int64_t rows, int64_t dim) {                                                                                   \
        Table by{scale, scale_index, scale_wide != 0}, plus{shift, scale_index, scale_wide != 0};                      \
        gated_residual_norm(                                                                                           \
            x, y, {gate, index, wide != 0}, eps, by, plus, centred != 0, norm_eps, out, rows, dim);                    \
    }

GATED_RESIDUAL(f32, float)
GATED_RESIDUAL(bf16, bf16)
REPLAYED(gated_residual_f32)
REPLAYED(gated_residual_bf16)
REPLAYED(gated_residual_norm_f32)
REPLAYED(gated_residual_norm_bf16)
