// How packed_attention.cpp has queries, keys and values lie. Rows are read as words of 32 bits: a float, or two
// neighbouring bf16. `load` of numbers that are not there gives zeros.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "transpose.hpp"

#define INLINE inline __attribute__((always_inline))

namespace {

// The first `count` numbers at x, zeros behind them.
INLINE __m512i load(const float* x, int count) {
    return _mm512_maskz_loadu_epi32(count >= 16 ? 0xffff : (1u << std::max(count, 0)) - 1, x);
}
INLINE __m512i load(const uint16_t* x, int count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << std::max(count, 0)) - 1, x);
}

// Words `word` … `word + 15` of 16 rows, as columns; rows from `rows` on are zeros.
template <typename Number>
INLINE void columns(const Number* x, int64_t stride, int64_t rows, int word, int dim, __m512i r[16]) {
    constexpr int per_word = 4 / sizeof(Number);
    for (int i = 0; i < 16; i++)
        r[i] = i < rows ? load(x + i * stride + word * per_word, dim - word * per_word) : _mm512_setzero_si512();
    transpose(r);
}

// Queries → [words][vectors][16].
template <typename Number>
void pack_queries(const Number* q, int64_t stride, int64_t rows, int vectors, int dim, int words, __m512i* out) {
    __m512i r[16];
    for (int n = 0; n < vectors; n++)
        for (int word = 0; word < words; word += 16) {
            columns(q + n * 16 * stride, stride, rows - n * 16, word, dim, r);
            for (int i = 0; i < 16 && word + i < words; i++) out[(word + i) * vectors + n] = r[i];
        }
}

// Keys → [keys / 8][words][8].
template <typename Number>
void pack_keys(const Number* k, int64_t stride, int64_t rows, int dim, int words, uint32_t* out) {
    __m512i r[16];
    for (int64_t row = 0; row < rows; row += 16)
        for (int word = 0; word < words; word += 16) {
            columns(k + row * stride, stride, rows - row, word, dim, r);
            uint32_t* to = out + row * words + word * 8;
            for (int i = 0; i < 16 && word + i < words; i++) {
                _mm256_store_si256((__m256i*)(to + i * 8), _mm512_castsi512_si256(r[i]));
                _mm256_store_si256((__m256i*)(to + (words + i) * 8), _mm512_extracti64x4_epi64(r[i], 1));
            }
        }
}

// Values → [dim / 8][keys][8]; of bf16, [dim / 8][keys / 2][8] pairs of neighbouring keys. `panel`: words of one of them.
void pack_values(const float* v, int64_t stride, int64_t rows, int dim, int64_t panel, uint32_t* out) {
    const int64_t padded = (rows + 7) / 8 * 8;
    for (int64_t row = 0; row < padded; row++)
        for (int d = 0; d < dim; d += 8) {
            __m512i x = row < rows ? load(v + row * stride + d, std::min(8, dim - d)) : _mm512_setzero_si512();
            _mm256_store_si256((__m256i*)(out + d / 8 * panel + row * 8), _mm512_castsi512_si256(x));
        }
}

alignas(64) constexpr uint16_t PAIRS[2][32] = {
    {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
};

void pack_values(const uint16_t* v, int64_t stride, int64_t rows, int dim, int64_t panel, uint32_t* out) {
    const int64_t padded = (rows + 7) / 8 * 8;
    const __m512i order[2] = {_mm512_load_si512(PAIRS[0]), _mm512_load_si512(PAIRS[1])};
    for (int64_t row = 0; row < padded; row += 2)
        for (int first = 0; first < dim; first += 32) {
            __m512i x = row < rows ? load(v + row * stride + first, dim - first) : _mm512_setzero_si512();
            __m512i y = row + 1 < rows ? load(v + (row + 1) * stride + first, dim - first) : _mm512_setzero_si512();
            for (int half = 0; half < 2; half++) {
                __m512i pairs = _mm512_permutex2var_epi16(x, order[half], y);
                int d = first + 16 * half;
                uint32_t* to = out + d / 8 * panel + row / 2 * 8;
                if (d < dim) _mm256_store_si256((__m256i*)to, _mm512_castsi512_si256(pairs));
                if (d + 8 < dim) _mm256_store_si256((__m256i*)(to + panel), _mm512_extracti64x4_epi64(pairs, 1));
            }
        }
}

}  // namespace
