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

// Rows of words → [rows / 32][words][32]: see `to_blocks`. Sixteen words of sixteen rows at a time.
EXPORT void blocked_pack(const word* from, word* to, int64_t rows, int64_t length, int64_t halves) {
    together([&](Team team) {
        const int64_t blocks = rows / decoding::BLOCK;
        for (int64_t block = team.first(blocks); block < team.last(blocks); block++)
            for (int64_t half = 0; half < 2; half++) {
                const int64_t first = halves ? half * (rows / 2) + block * 16 : block * decoding::BLOCK + half * 16;
                const word* lines[16];
                for (int64_t i = 0; i < 16; i++) lines[i] = from + (first + i) * length;
                word* out = to + block * length * decoding::BLOCK + half * 16;
                alignas(64) word turned[16 * 16];
                int64_t k = 0;
                for (; k + 16 <= length; k += 16) {
                    turn16(lines, k, turned);
                    for (int64_t i = 0; i < 16; i++) memcpy(out + (k + i) * decoding::BLOCK, turned + i * 16, 64);
                }
                for (; k < length; k++)
                    for (int64_t i = 0; i < 16; i++) out[k * decoding::BLOCK + i] = lines[i][k];
            }
    });
}

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
