// What the kernels for processors share: vectors of sixteen floats, bfloat16 in memory, rows shared out among threads.
// Vector extensions of GCC and Clang: sixteen floats are one AVX-512 register, two of AVX2 or four of NEON.
// Functions are called by ctypes with raw pointers (kernels/native.py); they do not throw, and allocate
// nothing where they do not say so.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

constexpr int64_t WIDTH = 16;

// --- one number -------------------------------------------------------------------------------------------------------

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

template <class T> inline T narrow(float x);

template <> inline float narrow<float>(float x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return bf16{0x7fc0};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// --- sixteen numbers --------------------------------------------------------------------------------------------------

inline f32x16 fill(float x) { return f32x16{} + x; }

inline f32x16 load(const float* p) {
    f32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline f32x16 load(const bf16* p) {
#ifdef __AVX512F__  // one instruction, where GCC 12 makes five of the general form
    u32x16 wide = (u32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
    u16x16 bits;
    memcpy(&bits, p, sizeof bits);
    u32x16 wide = __builtin_convertvector(bits, u32x16);
#endif
    return (f32x16)(wide << 16);
}

inline void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }

inline void store(bf16* p, f32x16 v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    __m256bh narrowed = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &narrowed, sizeof narrowed);
#else
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    i32x16 nan = v != v;
    rounded = (u32x16)((nan & 0x7fc0) | (~nan & (i32x16)rounded));
    u16x16 narrowed = __builtin_convertvector(rounded, u16x16);
    memcpy(p, &narrowed, sizeof narrowed);
#endif
}

// The first `count` < 16 numbers; the others are zero. Ends of rows are rare, and inlined everywhere they would be half of
// the time of the compiler.
template <class T> __attribute__((noinline)) static f32x16 load_some(const T* p, int64_t count) {
    f32x16 v{};
    for (int64_t i = 0; i < count; i++) v[i] = widen(p[i]);
    return v;
}

template <class T> __attribute__((noinline)) static void store_some(T* p, f32x16 v, int64_t count) {
    for (int64_t i = 0; i < count; i++) p[i] = narrow<T>(v[i]);
}

inline float sum(f32x16 v) {
    float total = 0;
    for (int i = 0; i < 8; i++) v[i] += v[i + 8];
    for (int i = 0; i < 4; i++) v[i] += v[i + 4];
    for (int i = 0; i < 4; i++) total += v[i];
    return total;
}

// e^x / 2^n, n the integer next to x / ln 2 (Cephes' polynomial).
inline f32x16 exp_rest(f32x16 x, f32x16 n) {
    f32x16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    f32x16 p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

// e^x to 2 units in the last place of float32; 0 below -87.3, e^88.3 above.
inline f32x16 exp16(f32x16 x) {
    const f32x16 low = fill(-87.3f), high = fill(88.3f);
#ifdef __AVX512F__  // the same in two thirds of the instructions
    __mmask16 within = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
    x = (f32x16)_mm512_min_ps((__m512)high, (__m512)x);  // of NaN, the second
    f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (f32x16)_mm512_maskz_scalef_ps(within, (__m512)exp_rest(x, n), (__m512)n);
#else
    i32x16 below = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    f32x16 scaled = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer
    i32x16 power = (i32x16)scaled - 0x4b400000;
    f32x16 n = scaled - 12582912.0f;
    f32x16 found = exp_rest(x, n) * (f32x16)((power + 127) << 23);
    return (f32x16)((i32x16)found & ~below);
#endif
}

// --- threads ----------------------------------------------------------------------------------------------------------

constexpr int64_t ALONE = 1 << 15;  // numbers that one thread handles sooner than it would wake another

// A thread's part of what all threads of a team do together.
struct Team {
    int64_t own, count;
    int64_t first(int64_t whole) const { return whole * own / count; }
    int64_t last(int64_t whole) const { return whole * (own + 1) / count; }
};

// The team in which this thread replays calls (replay.cpp): all of its threads make the same call, and wait for one another
// after it. Null outside of that.
inline thread_local const Team* joined = nullptr;

// work(team) on every thread; inside, `#pragma omp barrier` waits for all of them.
template <class Work> inline void together(Work work) {
    if (joined) return work(*joined);
#ifdef _OPENMP
#pragma omp parallel
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
    work(Team{0, 1});
#endif
}

// body(first, last) on equal shares of `rows` rows of `width` numbers each.
template <class Body> inline void share_rows(int64_t rows, int64_t width, Body body) {
    if (joined) return body(joined->first(rows), joined->last(rows));
#ifdef _OPENMP
    if (rows > 1 && rows * width > ALONE && omp_get_max_threads() > 1) {
#pragma omp parallel
        {
            Team team{omp_get_thread_num(), omp_get_num_threads()};
            body(team.first(rows), team.last(rows));
        }
        return;
    }
#endif
    body(int64_t(0), rows);
}
