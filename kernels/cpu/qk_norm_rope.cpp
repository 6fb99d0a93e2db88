// Norms of queries and keys and their turn by position, in place: see kernels/qk_norm_rope.py.
#include "replay.hpp"
#include "rows.hpp"

constexpr int64_t MAX_DIM = 1024;

// Of one token. For neighbours both tables are as wide as a head, cos twice and sin with the sign that it is used with.
struct Turns {
    const float *cos, *sin;  // null: nothing is turned
    bool halves;
};

static inline f32x16 swapped(f32x16 v) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
    return __builtin_shuffle(v, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#endif
}

static void widen_turns(const float* from, int64_t half, bool halves, float* cos, float* sin) {
    if (halves) {
        memcpy(cos, from, half * sizeof(float));
        memcpy(sin, from + half, half * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < half; i++) {
        cos[2 * i] = cos[2 * i + 1] = from[i];
        sin[2 * i] = -from[half + i];
        sin[2 * i + 1] = from[half + i];
    }
}

// One head: x · inverse · weight, turned.
template <class T>
static inline void head(T* x, float inverse, const T* weight, const Turns& turns, int64_t dim) {
    int64_t half = dim / 2;
    if (!turns.cos) {
        each(dim, [&](int64_t i, auto n) { store(x + i, load(x + i, n) * inverse * load(weight + i, n), n); });
    } else if (!turns.halves) {
        each(dim, [&](int64_t i, auto n) {  // dim is even: no pair is cut
            f32x16 v = load(x + i, n) * inverse * load(weight + i, n);
            store(x + i, v * load(turns.cos + i, n) + swapped(v) * load(turns.sin + i, n), n);
        });
    } else {
        each(half, [&](int64_t i, auto n) {
            f32x16 a = load(x + i, n) * inverse * load(weight + i, n);
            f32x16 b = load(x + half + i, n) * inverse * load(weight + half + i, n);
            f32x16 cos = load(turns.cos + i, n), sin = load(turns.sin + i, n);
            store(x + i, a * cos - b * sin, n);
            store(x + half + i, b * cos + a * sin, n);
        });
    }
}

// Heads with norms of their own, sixteen at a time: a root takes as long as a head, and so they do not wait for each other.
template <class T>
static inline void each_head(T* x, const T* weight, const Turns& turns, int64_t heads, int64_t dim, float eps) {
    float inverses[WIDTH];
    for (int64_t start = 0; start < heads; start += WIDTH) {
        int64_t count = heads - start < WIDTH ? heads - start : WIDTH;
        for (int64_t h = 0; h < count; h++) inverses[h] = squares(x + (start + h) * dim, dim);
        for (int64_t h = 0; h < count; h++) inverses[h] = inverse_root(inverses[h], dim, eps);
        for (int64_t h = 0; h < count; h++) head(x + (start + h) * dim, inverses[h], weight, turns, dim);
    }
}

struct Parts {
    int64_t stride, tokens, parts, heads, dim;
    bool across;
};

template <class T>
static void qk_norm_rope(
    T* x, const T* weight, const float* turns, const float* mean_square, Parts s, bool halves, float eps) {
    int64_t width = s.heads * s.dim;
    share_rows(s.tokens, s.parts * width, [&](int64_t first, int64_t last) {
        alignas(64) float cos[MAX_DIM], sin[MAX_DIM];
        Turns own{turns ? cos : nullptr, sin, halves};
        for (int64_t token = first; token < last; token++) {
            fetch(x + (token + 1) * s.stride, s.parts * width);
            if (turns) widen_turns(turns + token * s.dim, s.dim / 2, halves, cos, sin);
            for (int64_t part = 0; part < s.parts; part++) {
                T* p = x + token * s.stride + part * width;
                const T* w = weight + part * (s.across ? width : s.dim);
                if (s.across) {
                    float all = mean_square ? mean_square[token * s.parts + part] * width : squares(p, width);
                    float inverse = inverse_root(all, width, eps);
                    for (int64_t h = 0; h < s.heads; h++) head(p + h * s.dim, inverse, w + h * s.dim, own, s.dim);
                } else {
                    each_head(p, w, own, s.heads, s.dim, eps);
                }
            }
        }
    });
}

#define QK_NORM_ROPE(SUFFIX, T)                                                                                        \
    EXPORT void qk_norm_rope_##SUFFIX(                                                                                 \
        T* x, const T* weight, const float* turns, const float* mean_square, int64_t stride, int64_t tokens,          \
        int64_t parts, int64_t heads, int64_t dim, int64_t across, int64_t halves, float eps) {                        \
        Parts shape{stride, tokens, parts, heads, dim, across != 0};                                                   \
        qk_norm_rope(x, weight, turns, mean_square, shape, halves != 0, eps);                                          \
    }

QK_NORM_ROPE(f32, float)
QK_NORM_ROPE(bf16, bf16)
REPLAYED(qk_norm_rope_f32)
REPLAYED(qk_norm_rope_bf16)
