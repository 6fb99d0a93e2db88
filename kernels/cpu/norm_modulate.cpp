// y = x / rms(x) · scale of the row's segment, read once where a row fits the first cache: see kernels/norm_modulate.py.
#include "common.hpp"

template <class T>
static void rms_norm_scale(
    const T* x, const T* scale, const int32_t* index, T* y, int64_t rows, int64_t dim, float eps) {
    share_rows(rows, dim, [&](int64_t first, int64_t last) {
        int64_t whole = dim / WIDTH * WIDTH, rest = dim - whole;
        for (int64_t row = first; row < last; row++) {
            const T *from = x + row * dim, *by = scale + int64_t(index[row]) * dim;
            T* to = y + row * dim;
            f32x16 squares{}, more{};
            int64_t i = 0;
            for (; i + 2 * WIDTH <= whole; i += 2 * WIDTH) {
                f32x16 a = load(from + i), b = load(from + i + WIDTH);
                squares += a * a;
                more += b * b;
            }
            for (; i < whole; i += WIDTH) {
                f32x16 a = load(from + i);
                squares += a * a;
            }
            f32x16 end = load_some(from + whole, rest);
            float inverse = 1.0f / std::sqrt(sum(squares + more + end * end) / dim + eps);
            for (i = 0; i < whole; i += WIDTH) store(to + i, load(from + i) * inverse * load(by + i));
            store_some(to + whole, end * inverse * load_some(by + whole, rest), rest);
        }
    });
}

#define RMS_NORM_SCALE(NAME, T)                                                                                        \
    EXPORT void NAME(                                                                                                  \
        const T* x, const T* scale, const int32_t* index, T* y, int64_t rows, int64_t dim, float eps) {                \
        rms_norm_scale(x, scale, index, y, rows, dim, eps);                                                            \
    }

RMS_NORM_SCALE(rms_norm_scale_f32, float)
RMS_NORM_SCALE(rms_norm_scale_bf16, bf16)
