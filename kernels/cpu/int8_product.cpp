// What stands before and after a product of 8-bit numbers: see kernels/int8_product.py.
#include "common.hpp"

typedef int8_t i8x16 __attribute__((vector_size(16)));

static inline f32x16 absolute(f32x16 v) { return (f32x16)((i32x16)v & 0x7fffffff); }

static inline f32x16 widen_sums(const int32_t* p) {
    i32x16 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, f32x16);
}

// Numbers of a row in units of its scale, which is that of its largest.
template <class T>
static void quantize_rows(const T* x, int8_t* numbers, float* scales, int64_t rows, int64_t width) {
    share_rows(rows, width, [&](int64_t first, int64_t last) {
        int64_t whole = width / WIDTH * WIDTH, rest = width - whole;
        for (int64_t row = first; row < last; row++) {
            const T* from = x + row * width;
            int8_t* to = numbers + row * width;
            f32x16 end = load_some(from + whole, rest), most = absolute(end);
            i32x16 wrong = end != end;
            for (int64_t i = 0; i < whole; i += WIDTH) {
                f32x16 v = load(from + i), size = absolute(v);
                wrong |= v != v;
                most = size > most ? size : most;
            }
            float largest = 0;
            int32_t nan = 0;
            for (int i = 0; i < WIDTH; i++) {
                largest = most[i] > largest ? most[i] : largest;
                nan |= wrong[i];
            }
            float scale = nan ? NAN : largest / 127.0f;
            scales[row] = scale;
            float divisor = scale > 0 ? scale : 1.0f;
            // 1.5 · 2^23 rounds to an integer, ties to even.
            auto in_units = [&](f32x16 v) {
                return __builtin_convertvector((i32x16)(v / divisor + 12582912.0f) - 0x4b400000, i8x16);
            };
            for (int64_t i = 0; i < whole; i += WIDTH) {
                i8x16 n = in_units(load(from + i));
                memcpy(to + i, &n, sizeof n);
            }
            i8x16 n = in_units(end);
            for (int64_t i = 0; i < rest; i++) to[whole + i] = n[i];
        }
    });
}

// y = sums · scale of the row · scale of the output + bias; bias may be null.
template <class T>
static void finish(
    const int32_t* sums, const float* tokens, const float* outputs, const T* bias, T* y, int64_t rows, int64_t width) {
    share_rows(rows, width, [&](int64_t first, int64_t last) {
        int64_t whole = width / WIDTH * WIDTH;
        for (int64_t row = first; row < last; row++) {
            const int32_t* from = sums + row * width;
            T* to = y + row * width;
            float scale = tokens[row];
            for (int64_t i = 0; i < whole; i += WIDTH) {
                f32x16 v = widen_sums(from + i) * (load(outputs + i) * scale);
                store(to + i, bias ? v + load(bias + i) : v);
            }
            for (int64_t i = whole; i < width; i++) {
                float v = float(from[i]) * (outputs[i] * scale);
                to[i] = narrow<T>(bias ? v + widen(bias[i]) : v);
            }
        }
    });
}

#define INT8_PRODUCT(SUFFIX, T)                                                                                        \
    EXPORT void int8_quantize_rows_##SUFFIX(                                                                           \
        const T* x, int8_t* numbers, float* scales, int64_t rows, int64_t width) {                                     \
        quantize_rows(x, numbers, scales, rows, width);                                                                \
    }                                                                                                                  \
    EXPORT void int8_finish_##SUFFIX(const int32_t* sums, const float* tokens, const float* outputs, const T* bias,    \
                                     T* y, int64_t rows, int64_t width) {                                              \
        finish(sums, tokens, outputs, bias, y, rows, width);                                                           \
    }

INT8_PRODUCT(f32, float)
INT8_PRODUCT(bf16, bf16)
