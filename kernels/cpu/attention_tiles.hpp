// A tile of queries looks at a block of keys, for packed_attention.cpp; the products, the softmax between them.
//
// FlashAttention (Dao et al., 2022) turned on its side: scores are made transposed, [keys, queries], 16 queries in a
// vector. So maximum and sum of a softmax are operations between vectors, and the weights come in the order in which the
// second product wants them. A tile of either product is 8 rows (keys, or columns of v) by up to 48 queries: 24 sums in
// registers. The scores of a block of keys stay in the first-level cache.

#pragma once

#include <cmath>

#include "attention_packing.hpp"

namespace {

constexpr int BLOCK = 128;  // keys whose scores are made before their softmax
constexpr int WIDE = 3;     // vectors of queries in a tile, at most
constexpr int TILE = WIDE * 16;

struct Float {
    typedef float Number;
    static constexpr int PER_WORD = 1;
    static INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static INLINE __m512i words(const __m512 w[1]) { return _mm512_castps_si512(w[0]); }
    static INLINE void store(float* to, __m512 x, __mmask16 columns) { _mm512_mask_storeu_ps(to, columns, x); }
};

#ifdef __AVX512BF16__
alignas(64) constexpr uint16_t BESIDE[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct Bfloat16 {
    typedef uint16_t Number;
    static constexpr int PER_WORD = 2;
    static INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static INLINE __m512i words(const __m512 w[2]) {
        return _mm512_permutexvar_epi16(_mm512_load_si512(BESIDE), (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
    }
    static INLINE void store(uint16_t* to, __m512 x, __mmask16 columns) {
        _mm256_mask_storeu_epi16(to, columns, (__m256i)_mm512_cvtneps_pbh(x));
    }
};
#endif

// 2^x. The polynomial is for the fraction of x, in [0, 1): relative error 7.5e-8.
INLINE __m512 power_of_two(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 0x09), p = _mm512_set1_ps(0.00187757667f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00898934009f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0558263181f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240153617f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693153073f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999999925f));
    return _mm512_scalef_ps(p, x);
}

// A tile of queries: what it is and what it has seen so far.
struct Tile {
    alignas(64) float top[TILE];    // the largest score
    alignas(64) float total[TILE];  // of the weights
    __m512i* q;                     // [words][vectors][16]
    float* mixed;                   // [dim][vectors][16]: weighted sum of values
    int64_t first;                  // of its queries, within the segment
    int vectors;
};

// Packed keys and values, `count` of them real.
struct Block {
    const uint32_t *k, *v;
    int64_t panel;
    int count;
    float last;
};

// sums[r][n] += Σ over steps of a[step][r] · b[step][n].
template <class Kind, int N>
INLINE void multiply(const uint32_t* a, const __m512i* b, int64_t steps, __m512 sums[8][N]) {
    for (int64_t step = 0; step < steps; step++) {
        __m512i vectors[N];
        for (int n = 0; n < N; n++) vectors[n] = _mm512_load_si512(b + step * N + n);
        for (int r = 0; r < 8; r++) {
            __m512i one = _mm512_set1_epi32(a[step * 8 + r]);
            for (int n = 0; n < N; n++) sums[r][n] = Kind::dot(sums[r][n], one, vectors[n]);
        }
    }
}

// Scores of the keys, and the largest.
template <class Kind, int N>
INLINE void score(const Block& block, const __m512i* q, int64_t words, float* scores, __m512 top[N]) {
    for (int k = 0; k < block.count; k += 8) {
        __m512 sums[8][N] = {};
        multiply<Kind, N>(block.k + k * words, q, words, sums);
        for (int r = 0; r < 8; r++)
            for (int n = 0; n < N; n++) {
                top[n] = _mm512_max_ps(top[n], sums[r][n]);
                _mm512_store_ps(scores + ((k + r) * N + n) * 16, sums[r][n]);
            }
    }
}

// The same for a block whose keys do not all count once: lane i of the tile sees the first `visible` + i of them.
template <int N>
INLINE void trim(const Block& block, int padded, int64_t visible, float* scores, __m512 top[N]) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int k = 0; k < padded; k++)
        for (int n = 0; n < N; n++) {
            float* at = scores + (k * N + n) * 16;
            const int least = k - int(std::min<int64_t>(visible + n * 16, BLOCK));  // lanes above this see the key
            const __mmask16 seen = k < block.count ? _mm512_cmpgt_epi32_mask(lane, _mm512_set1_epi32(least)) : 0;
            const __m512 more = _mm512_set1_ps(k + 1 == block.count ? block.last : 0);
            const __m512 x = _mm512_mask_add_ps(_mm512_set1_ps(-INFINITY), seen, _mm512_load_ps(at), more);
            top[n] = _mm512_max_ps(top[n], x);
            _mm512_store_ps(at, x);
        }
}

// Weights in place of the scores that they are made of, and their sum. Nothing is written before it is read.
template <class Kind, int N>
INLINE void weigh(float* scores, int padded, float scale, const __m512 top[N], __m512 total[N]) {
    __m512i* weights = (__m512i*)scores;
    const __m512 factor = _mm512_set1_ps(scale);
    for (int k = 0; k < padded; k += Kind::PER_WORD)
        for (int n = 0; n < N; n++) {
            __m512 w[Kind::PER_WORD];
            for (int i = 0; i < Kind::PER_WORD; i++) {
                w[i] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + ((k + i) * N + n) * 16), factor, top[n]));
                total[n] = _mm512_add_ps(total[n], w[i]);
            }
            _mm512_store_si512(weights + k / Kind::PER_WORD * N + n, Kind::words(w));
        }
}

// A tile looks at a block: `visible` of its keys from the first lane, one more from each lane that follows. `begins`: it
// has seen none before. `scale` is that of scores, times log2(e).
template <class Kind, int N>
__attribute__((noinline)) void attend(
    const Block& block, Tile& tile, int64_t dim, float scale, int64_t visible, bool begins, float* scores) {
    const int64_t words = (dim + Kind::PER_WORD - 1) / Kind::PER_WORD;
    const int padded = (block.count + 7) / 8 * 8;
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 before[N], top[N], total[N], shrink[N];
    for (int n = 0; n < N; n++) top[n] = before[n] = _mm512_load_ps(tile.top + n * 16);
    score<Kind, N>(block, tile.q, words, scores, top);
    if (padded != block.count || block.last != 0 || visible < block.count) {
        for (int n = 0; n < N; n++) top[n] = before[n];
        trim<N>(block, padded, visible, scores, top);
    }
    for (int n = 0; n < N; n++) {
        _mm512_store_ps(tile.top + n * 16, top[n]);
        top[n] = _mm512_mul_ps(top[n], factor);
        shrink[n] = power_of_two(_mm512_fmsub_ps(before[n], factor, top[n]));  // 0 in the first block: before is -inf
        total[n] = _mm512_mul_ps(_mm512_load_ps(tile.total + n * 16), shrink[n]);
    }
    weigh<Kind, N>(scores, padded, scale, top, total);
    for (int n = 0; n < N; n++) _mm512_store_ps(tile.total + n * 16, total[n]);
    for (int64_t d = 0; d < dim; d += 8) {
        __m512 sums[8][N] = {};
        float* mixed = tile.mixed + d * N * 16;
        if (!begins)
            for (int r = 0; r < 8; r++)
                for (int n = 0; n < N; n++)
                    sums[r][n] = _mm512_mul_ps(_mm512_load_ps(mixed + (r * N + n) * 16), shrink[n]);
        multiply<Kind, N>(block.v + d / 8 * block.panel, (const __m512i*)scores, padded / Kind::PER_WORD, sums);
        for (int r = 0; r < 8; r++)
            for (int n = 0; n < N; n++) _mm512_store_ps(mixed + (r * N + n) * 16, sums[r][n]);
    }
}

}  // namespace
