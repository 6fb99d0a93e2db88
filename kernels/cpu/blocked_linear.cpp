// y = x · Wᵀ + bias with W in blocks, and silu(gate) · up of two halves of it: see kernels/blocked_linear.py.
#include "blocked.hpp"
#include "replay.hpp"
#include "rows.hpp"

using namespace decoding;

// put(row, where, low sixteen, high sixteen) for all of y.
template <class W, class T, class Put>
static void multiply(const T* x, const Weight& w, void* numbers, float* scales, int64_t rows, int64_t width, Put put) {
    auto work = [&](Team team) {
        const void* from = x;
        if constexpr (sizeof(W) == 1) {
            uint8_t* to = (uint8_t*)numbers;
            for (int64_t row = team.first(rows); row < team.last(rows); row++)
                scales[row] = quantise(x + row * width, to + row * width, w.length);
            from = numbers;
#pragma omp barrier
        }
        product<W, T>(team, rows, from, scales, w, put);
    };
    together(work);
}

template <class W, class T>
static void blocked_linear(const T* x, T* y, const Weight& w, void* numbers, float* scales, int64_t rows, int64_t width) {
    multiply<W>(x, w, numbers, scales, rows, width, [&](int64_t row, Places at, f32x16 low, f32x16 high) {
        store(y + row * w.outputs + at.low, low);
        store(y + row * w.outputs + at.high, high);
    });
}

template <class W, class T>
static void blocked_swiglu(const T* x, T* y, const Weight& w, void* numbers, float* scales, int64_t rows, int64_t width) {
    multiply<W>(x, w, numbers, scales, rows, width, [&](int64_t row, Places at, f32x16 gate, f32x16 up) {
        store(y + row * (w.outputs / 2) + at.low, silu(gate) * up);
    });
}

// The dtype of rows is T, W that of the weight; `numbers` [rows, width] bytes and `scales` [rows] are for int8 only.
#define BLOCKED(KIND, SUFFIX, W, T)                                                                                    \
    EXPORT void KIND##SUFFIX(                                                                                          \
        const T* x, T* y, const Weight* w, void* numbers, float* scales, int64_t rows, int64_t width) {                \
        KIND<W, T>(x, y, *w, numbers, scales, rows, width);                                                            \
    }                                                                                                                  \
    REPLAYED(KIND##SUFFIX)

BLOCKED(blocked_linear, _f32, float, float)
BLOCKED(blocked_linear, _bf16, bf16, bf16)
BLOCKED(blocked_linear, _int8_f32, int8_t, float)
BLOCKED(blocked_linear, _int8_bf16, int8_t, bf16)
BLOCKED(blocked_swiglu, _f32, float, float)
BLOCKED(blocked_swiglu, _bf16, bf16, bf16)
BLOCKED(blocked_swiglu, _int8_f32, int8_t, float)
BLOCKED(blocked_swiglu, _int8_bf16, int8_t, bf16)

// Which weights this processor has instructions for: 1 float32, 2 bfloat16, 4 int8. Others are faster by torch.
EXPORT void blocked_linear_has(int64_t* kinds) {
    *kinds = 0;
#if defined(__AVX512F__)
    *kinds |= 1;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    *kinds |= 2;
#endif
#if defined(__AVX512VNNI__)
    *kinds |= 4;
#endif
}
