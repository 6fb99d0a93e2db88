// Rows of numbers: loops over them, sums, norms. T is what tokens are stored as; scales, shifts and gates are T or float.
#pragma once

#include "common.hpp"

struct Full {};  // sixteen numbers

struct Some {  // fewer, at the end of a row
    int64_t count;
};

template <class T> inline f32x16 load(const T* p, Full) { return load(p); }
template <class T> inline f32x16 load(const T* p, Some s) { return load_some(p, s.count); }
template <class T> inline void store(T* p, f32x16 v, Full) { store(p, v); }
template <class T> inline void store(T* p, f32x16 v, Some s) { store_some(p, v, s.count); }

inline f32x16 only(f32x16 v, Full) { return v; }

inline f32x16 only(f32x16 v, Some s) {
    for (int64_t i = s.count; i < WIDTH; i++) v[i] = 0;
    return v;
}

// body(i, Full or Some) for all of `dim` numbers.
template <class Body> inline void each(int64_t dim, Body body) {
    int64_t i = 0;
    for (; i + WIDTH <= dim; i += WIDTH) body(i, Full{});
    if (i < dim) body(i, Some{dim - i});
}

// The sum of term(i, Full or Some), which is zero behind the end of the row.
template <class Term> inline float total(int64_t dim, Term term) {
    f32x16 a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= dim; i += 4 * WIDTH) {
        a += term(i, Full{});
        b += term(i + WIDTH, Full{});
        c += term(i + 2 * WIDTH, Full{});
        d += term(i + 3 * WIDTH, Full{});
    }
    for (; i + WIDTH <= dim; i += WIDTH) a += term(i, Full{});
    if (i < dim) b += term(i, Some{dim - i});
    return sum((a + b) + (c + d));
}

template <class T> inline float squares(const T* x, int64_t dim) {
    return total(dim, [&](int64_t i, auto n) {
        f32x16 v = load(x + i, n);
        return v * v;
    });
}

inline float inverse_root(float squares, int64_t dim, float eps) { return 1.0f / std::sqrt(squares / dim + eps); }

struct Moments {
    float mean, inverse;  // of the standard deviation, or of the root mean square where the mean is not taken off
};

template <class T> inline Moments moments(const T* x, int64_t dim, bool centred, float eps) {
    if (!centred) return {0.0f, inverse_root(squares(x, dim), dim, eps)};
    float mean = total(dim, [&](int64_t i, auto n) { return load(x + i, n); }) / dim;
    float spread = total(dim, [&](int64_t i, auto n) {
        f32x16 v = only(load(x + i, n) - mean, n);
        return v * v;
    });
    return {mean, inverse_root(spread, dim, eps)};
}

// Ask for numbers that are read soon, while others are computed with: beyond the end is no error.
template <class T> inline void fetch(const T* p, int64_t count) {
    for (const char *at = (const char*)p, *end = (const char*)(p + count); at < end; at += 64) __builtin_prefetch(at);
}

// Divided: on Zen 5 that is faster than a reciprocal of 14 bits and a step of Newton's.
inline f32x16 silu(f32x16 x) { return x / (exp16(-x) + 1.0f); }

// One row of several for each token: data [S, D] of T or, where `wide`, of float; without an index all have the first.
struct Table {
    const void* data;  // may be null
    const int32_t* index;
    bool wide;

    template <class S> const S* row(int64_t token, int64_t dim) const {
        return data ? (const S*)data + (index ? index[token] : 0) * dim : nullptr;
    }
};

template <class T, class S>
inline void modulate(const T* x, T* y, Moments m, const S* scale, const S* shift, int64_t dim) {
    if (shift)
        each(dim, [&](int64_t i, auto n) {
            store(y + i, (load(x + i, n) - m.mean) * m.inverse * load(scale + i, n) + load(shift + i, n), n);
        });
    else
        each(dim, [&](int64_t i, auto n) {
            store(y + i, (load(x + i, n) - m.mean) * m.inverse * load(scale + i, n), n);
        });
}

// y = norm(x) · scale + shift, of one token.
template <class T>
inline void norm_row(
    const T* x, T* y, const Table& scale, const Table& shift, int64_t token, int64_t dim, bool centred, float eps) {
    Moments m = moments(x, dim, centred, eps);
    if (scale.wide)
        modulate(x, y, m, scale.row<float>(token, dim), shift.row<float>(token, dim), dim);
    else
        modulate(x, y, m, scale.row<T>(token, dim), shift.row<T>(token, dim), dim);
}
