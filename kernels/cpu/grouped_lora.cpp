// y += x · A · B with each token's own A and B, which stand side by side: see kernels/grouped_lora.py.
#include "common.hpp"

constexpr int64_t MOST_RANKS = 1024;

// hidden[0 … ranks) = x [inputs] · A; A is [inputs, stride], its numbers end at `end`.
template <class T>
static void shrink(
    const T* x, const T* a, const T* end, float* hidden, int64_t inputs, int64_t ranks, int64_t stride) {
    for (int64_t r = 0; r < ranks; r += WIDTH) {
        f32x16 sums[4] = {};
        int64_t k = 0;
        // Lanes beyond the ranks read what lies beside A, and are not used.
        for (; k + 4 <= inputs && a + (k + 3) * stride + r + WIDTH <= end; k += 4)
            for (int i = 0; i < 4; i++) sums[i] += widen(x[k + i]) * load(a + (k + i) * stride + r);
        int64_t own = ranks - r < WIDTH ? ranks - r : WIDTH;
        for (; k < inputs; k++) sums[0] += widen(x[k]) * load_some(a + k * stride + r, own);
        f32x16 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        store_some(hidden + r, sum, own);
    }
}

template <class T>
static void expand(const float* hidden, const T* b, T* y, int64_t ranks, int64_t outputs) {
    int64_t o = 0;
    for (; o + 4 * WIDTH <= outputs; o += 4 * WIDTH) {
        f32x16 sums[4];
        for (int i = 0; i < 4; i++) sums[i] = load(y + o + i * WIDTH);
        for (int64_t r = 0; r < ranks; r++)
            for (int i = 0; i < 4; i++) sums[i] += hidden[r] * load(b + r * outputs + o + i * WIDTH);
        for (int i = 0; i < 4; i++) store(y + o + i * WIDTH, sums[i]);
    }
    for (; o < outputs; o++) {
        float sum = widen(y[o]);
        for (int64_t r = 0; r < ranks; r++) sum += hidden[r] * widen(b[r * outputs + o]);
        y[o] = narrow<T>(sum);
    }
}

template <class T>
static void grouped_lora(
    T* y, const T* x, const T* down, const T* up, const int32_t* starts, const int32_t* owners, int64_t tokens,
    int64_t inputs, int64_t outputs, int64_t total, int64_t x_row, int64_t y_row) {
    share_rows(tokens, (inputs + outputs) * WIDTH, [&](int64_t first, int64_t last) {
        float hidden[MOST_RANKS];
        for (int64_t token = first; token < last; token++) {
            int32_t owner = owners[token];
            if (owner < 0) continue;
            int64_t start = starts[owner], ranks = starts[owner + 1] - start;
            shrink(x + token * x_row, down + start, down + inputs * total, hidden, inputs, ranks, total);
            expand(hidden, up + start * outputs, y + token * y_row, ranks, outputs);
        }
    });
}

#define GROUPED_LORA(NAME, T)                                                                                          \
    EXPORT void NAME(                                                                                                  \
        T* y, const T* x, const T* down, const T* up, const int32_t* starts, const int32_t* owners, int64_t tokens,    \
        int64_t inputs, int64_t outputs, int64_t total, int64_t x_row, int64_t y_row) {                                \
        grouped_lora(y, x, down, up, starts, owners, tokens, inputs, outputs, total, x_row, y_row);                    \
    }

GROUPED_LORA(grouped_lora_f32, float)
GROUPED_LORA(grouped_lora_bf16, bf16)
