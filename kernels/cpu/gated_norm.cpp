// norm(x · silu(gate)), or norm(x) · silu(gate), in groups: see kernels/gated_norm.py.
#include "rows.hpp"

struct Options {
    int64_t groups;
    bool centred, gate_first;
    float eps;
};

// One group. What the gate lets through is computed anew in each pass: the row is in the first cache, and a buffer for it
// would have to be as long as any row.
template <class T>
static inline void group(const T* x, const T* gate, const float* weight, const float* bias, T* y, int64_t dim, Options o) {
    auto seen = [&](int64_t i, auto n) {
        f32x16 v = load(x + i, n);
        if (!gate || !o.gate_first) return v;
        return v * silu(load(gate + i, n));
    };
    float mean = o.centred ? total(dim, seen) / dim : 0.0f;
    float spread = total(dim, [&](int64_t i, auto n) {
        f32x16 v = only(seen(i, n) - mean, n);
        return v * v;
    });
    float inverse = 1.0f / std::sqrt(spread / dim + o.eps);
    each(dim, [&](int64_t i, auto n) {
        f32x16 v = (seen(i, n) - mean) * inverse * load(weight + i, n);
        if (bias) v += load(bias + i, n);
        if (gate && !o.gate_first) v *= silu(load(gate + i, n));
        store(y + i, v, n);
    });
}

template <class T>
static void gated_norm(
    const T* x, const T* gate, const float* weight, const float* bias, T* y, int64_t rows, int64_t dim, Options o) {
    int64_t part = dim / o.groups;
    share_rows(rows, 4 * dim, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            for (int64_t i = 0; i < dim; i += part) {
                int64_t at = row * dim + i;
                group(x + at, gate ? gate + at : nullptr, weight + i, bias ? bias + i : nullptr, y + at, part, o);
            }
    });
}

#define GATED_NORM(SUFFIX, T)                                                                                          \
    EXPORT void gated_norm_##SUFFIX(                                                                                   \
        const T* x, const T* gate, const float* weight, const float* bias, T* y, int64_t rows, int64_t dim,           \
        int64_t groups, int64_t centred, int64_t gate_first, float eps) {                                              \
        gated_norm(x, gate, weight, bias, y, rows, dim, {groups, centred != 0, gate_first != 0, eps});                 \
    }

GATED_NORM(f32, float)
GATED_NORM(bf16, bf16)
