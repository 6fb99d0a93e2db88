// y = x · Wᵀ + bias with W in blocks: see kernels/blocked_linear.py.
#include "blocked.hpp"
#include "replay.hpp"

using namespace decoding;

template <class W, class T>
static void blocked_linear(const T* x, T* y, const Weight& w, void* numbers, float* scales, int64_t rows, int64_t width) {
    auto work = [&](Team team) {
        const void* from = x;
        if constexpr (sizeof(W) == 1) {
            uint8_t* to = (uint8_t*)numbers;
            for (int64_t row = team.first(rows); row < team.last(rows); row++)
                scales[row] = quantise(x + row * width, to + row * width, w.length);
            from = numbers;
#pragma omp barrier
        }
        product<W, T>(team, rows, from, scales, w, [&](int64_t row, Places at, f32x16 low, f32x16 high) {
            store(y + row * w.outputs + at.low, low);
            store(y + row * w.outputs + at.high, high);
        });
    };
    together(work);
}

// The dtype of rows is T, W that of the weight; `numbers` [rows, width] bytes and `scales` [rows] are for int8 only.
#define BLOCKED_LINEAR(NAME, W, T)                                                                                     \
    EXPORT void NAME(                                                                                                  \
        const T* x, T* y, const Weight* w, void* numbers, float* scales, int64_t rows, int64_t width) {                \
        blocked_linear<W, T>(x, y, *w, numbers, scales, rows, width);                                                  \
    }

BLOCKED_LINEAR(blocked_linear_f32, float, float)
BLOCKED_LINEAR(blocked_linear_bf16, bf16, bf16)
BLOCKED_LINEAR(blocked_linear_int8_f32, int8_t, float)
BLOCKED_LINEAR(blocked_linear_int8_bf16, int8_t, bf16)

REPLAYED(blocked_linear_f32)
REPLAYED(blocked_linear_bf16)
REPLAYED(blocked_linear_int8_f32)
REPLAYED(blocked_linear_int8_bf16)

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
