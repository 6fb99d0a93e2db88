// y = norm(x) · scale + shift of the token's segment: see kernels/norm_modulate.py.
#include "replay.hpp"
#include "rows.hpp"

template <class T>
static void norm_modulate(
    const T* x, Table scale, Table shift, T* y, int64_t rows, int64_t dim, bool centred, float eps) {
    share_rows(rows, dim, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            norm_row(x + row * dim, y + row * dim, scale, shift, row, dim, centred, eps);
    });
}

#define NORM_MODULATE(SUFFIX, T)                                                                                       \
    EXPORT void rms_norm_scale_##SUFFIX(                                                                               \
        const T* x, const void* scale, const int32_t* index, int64_t wide, T* y, int64_t rows, int64_t dim,           \
        float eps) {                                                                                                   \
        norm_modulate(x, {scale, index, wide != 0}, {}, y, rows, dim, false, eps);                                     \
    }                                                                                                                  \
    EXPORT void layer_norm_scale_shift_##SUFFIX(                                                                       \
        const T* x, const void* scale, const void* shift, const int32_t* index, int64_t wide, T* y, int64_t rows,     \
        int64_t dim, float eps) {                                                                                      \
        norm_modulate(x, {scale, index, wide != 0}, {shift, index, wide != 0}, y, rows, dim, true, eps);               \
    }

NORM_MODULATE(f32, float)
NORM_MODULATE(bf16, bf16)
REPLAYED(rms_norm_scale_f32)
REPLAYED(rms_norm_scale_bf16)
REPLAYED(layer_norm_scale_shift_f32)
REPLAYED(layer_norm_scale_shift_bf16)
