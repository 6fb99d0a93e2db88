// Two results of attention over different keys become one, in place: see kernels/ring_merge.py.
#include "common.hpp"

// Of numbers in [1, 2], to 1e-7: the series of 2 · artanh((x - 1) / (x + 1)).
static f32x16 logarithm(f32x16 x) {
    const f32x16 s = (x - 1.0f) / (x + 1.0f), square = s * s;
    f32x16 sum = fill(1.0f / 13);
    for (int i = 11; i > 0; i -= 2) sum = sum * square + 1.0f / i;
    return 2.0f * s * sum;
}

template <class T>
static void ring_merge(float* out, float* lse, const T* more, const float* more_lse, int64_t rows, int64_t dim) {
    share_rows(rows, dim, [&](int64_t first, int64_t last) {
        const int64_t whole = dim / WIDTH * WIDTH, rest = dim - whole;
        for (int64_t row = first; row < last; row += WIDTH) {
            const int64_t count = last - row < WIDTH ? last - row : WIDTH;
            const f32x16 before = load_some(lse + row, count), other = load_some(more_lse + row, count);
            const f32x16 top = before > other ? before : other, finite = top == -INFINITY ? fill(0) : top;
            f32x16 ours = exp16(before - finite), theirs = exp16(other - finite), total = ours + theirs;
            total = total == 0.0f ? fill(1) : total;  // neither has seen a key
            ours /= total, theirs /= total;
            store_some(lse + row, top + logarithm(total), count);
            for (int64_t i = 0; i < count; i++) {
                float* to = out + (row + i) * dim;
                const T* from = more + (row + i) * dim;
                const float a = ours[i], b = theirs[i];
                for (int64_t d = 0; d < whole; d += WIDTH) store(to + d, load(to + d) * a + load(from + d) * b);
                store_some(to + whole, load_some(to + whole, rest) * a + load_some(from + whole, rest) * b, rest);
            }
        }
    });
}

EXPORT void ring_merge_f32(float* out, float* lse, const float* more, const float* more_lse, int64_t rows, int64_t dim) {
    ring_merge(out, lse, more, more_lse, rows, dim);
}

EXPORT void ring_merge_bf16(float* out, float* lse, const bf16* more, const float* more_lse, int64_t rows, int64_t dim) {
    ring_merge(out, lse, more, more_lse, rows, dim);
}
