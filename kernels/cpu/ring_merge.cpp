// Two results of attention over different keys become one, in place: see kernels/ring_merge.py.
#include "common.hpp"

#include <algorithm>

template <class T>
static void ring_merge(float* out, float* lse, const T* more, const float* more_lse, int64_t rows, int64_t dim) {
    share_rows(rows, dim, [&](int64_t first, int64_t last) {
        const int64_t whole = dim / WIDTH * WIDTH, rest = dim - whole;
        for (int64_t row = first; row < last; row++) {
            const float top = std::max(lse[row], more_lse[row]);
            if (top == -INFINITY) continue;  // neither has seen a key
            const float ours = std::exp(lse[row] - top), theirs = std::exp(more_lse[row] - top), total = ours + theirs;
            const float a = ours / total, b = theirs / total;
            float* to = out + row * dim;
            const T* from = more + row * dim;
            for (int64_t i = 0; i < whole; i += WIDTH) store(to + i, load(to + i) * a + load(from + i) * b);
            store_some(to + whole, load_some(to + whole, rest) * a + load_some(from + whole, rest) * b, rest);
            lse[row] = top + std::log(total);
        }
    });
}

EXPORT void ring_merge_f32(float* out, float* lse, const float* more, const float* more_lse, int64_t rows, int64_t dim) {
    ring_merge(out, lse, more, more_lse, rows, dim);
}

EXPORT void ring_merge_bf16(float* out, float* lse, const bf16* more, const float* more_lse, int64_t rows, int64_t dim) {
    ring_merge(out, lse, more, more_lse, rows, dim);
}
