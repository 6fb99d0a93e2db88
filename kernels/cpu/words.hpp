// Dot products over words of 32 bits: one float32, two bfloat16 or four int8 numbers. A word of a row meets sixteen words
// of a weight or of keys, one from each of sixteen outputs, so loops over words are the same for all three.
#pragma once

#include "common.hpp"
#include "transpose.hpp"

namespace decoding {

typedef uint32_t word;

inline u32x16 spread(word x) { return u32x16{} + x; }

inline u32x16 words(const void* p) {
    u32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

// sum + x · w in each lane. Sums are float32, for int8 they are int32.
template <class T> struct Dot;

template <> struct Dot<float> {
    typedef f32x16 Sum;
    static Sum add(Sum sum, u32x16 x, u32x16 w) { return sum + (f32x16)x * (f32x16)w; }
};

template <> struct Dot<bf16> {
    typedef f32x16 Sum;
    static Sum add(Sum sum, u32x16 x, u32x16 w) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
        const u32x16 high = spread(0xffff0000);
        return sum + (f32x16)(x << 16) * (f32x16)(w << 16) + (f32x16)(x & high) * (f32x16)(w & high);
#endif
    }
};

// x holds numbers + 128, which the instruction takes as unsigned; w is signed.
template <> struct Dot<int8_t> {
    typedef i32x16 Sum;
    static Sum add(Sum sum, u32x16 x, u32x16 w) {
#if defined(__AVX512VNNI__)
        return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
        for (int byte = 0; byte < 4; byte++)
            sum += (i32x16)((x >> (8 * byte)) & 0xff) * ((i32x16)(w << (24 - 8 * byte)) >> 24);
        return sum;
#endif
    }
};

// to[column · 16 + row] = from[row][column]: sixteen rows of sixteen words.
inline void turn16(const word* const* from, int64_t column, word* to) {
#if defined(__AVX512F__)
    __m512i rows[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(from[i] + column);
    transpose(rows);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 16, rows[i]);
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j * 16 + i] = from[i][column + j];
#endif
}

}  // namespace decoding
