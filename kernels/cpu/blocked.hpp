// Products of rows with a weight in blocks of 32 outputs: [outputs / 32][words of a row][32] words (words.hpp).
// A block's words are read in the order in which they lie, once for up to TALL rows whose sums stay in registers, and a
// block stays in the first cache for the rows after them.
#pragma once

#include "words.hpp"

namespace decoding {

constexpr int64_t BLOCK = 32;
constexpr int64_t TALL = 12;  // rows at a time: 24 registers of sums
constexpr int64_t FEW = 36;   // rows up to which TALL at a time are best; beyond it LOW, which leave more of the cache
constexpr int64_t LOW = 8;
constexpr int64_t MANY = 64;  // rows from which blocks are handed out one by one
constexpr int64_t AHEAD = 2048;  // bytes between what is read and what is fetched, where rows are too few to hide it

// One weight as kernels/blocked_linear.py holds it (class `_Weight`).
struct Weight {
    const word* words;
    const float* scales;  // float32 [outputs]; null but for int8
    const int32_t* sums;  // int32 [outputs]: 128 · the sum of an output's numbers; null but for int8
    const void* bias;     // [outputs] in the dtype of the rows, or null
    int64_t outputs;      // a multiple of BLOCK
    int64_t length;       // words of a row
    int64_t halves;       // whether a block holds sixteen outputs of the first half, then their mates of the second
};

// sums[r · 32 …] of R rows with one block.
template <class W, int R>
static void strip(const word* x, int64_t stride, const word* w, int64_t length, const char* next, void* sums) {
    typedef typename Dot<W>::Sum Sum;
    Sum low[R]{}, high[R]{};
    if constexpr (R <= 2) {  // one sum's latency would be longer than the load
        Sum more_low[3][R]{}, more_high[3][R]{};
        int64_t k = 0;
        for (; k + 4 <= length; k += 4) {
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                const word* at = w + (k + part) * BLOCK;
                __builtin_prefetch((const char*)at + AHEAD);
                __builtin_prefetch((const char*)at + AHEAD + 64);
                u32x16 a = words(at), b = words(at + 16);
                for (int r = 0; r < R; r++) {
                    u32x16 one = spread(x[r * stride + k + part]);
                    Sum& to_low = part ? more_low[part - 1][r] : low[r];
                    Sum& to_high = part ? more_high[part - 1][r] : high[r];
                    to_low = Dot<W>::add(to_low, one, a);
                    to_high = Dot<W>::add(to_high, one, b);
                }
            }
        }
        for (; k < length; k++)
            for (int r = 0; r < R; r++) {
                u32x16 one = spread(x[r * stride + k]);
                low[r] = Dot<W>::add(low[r], one, words(w + k * BLOCK));
                high[r] = Dot<W>::add(high[r], one, words(w + k * BLOCK + 16));
            }
        for (int part = 0; part < 3; part++)
            for (int r = 0; r < R; r++) low[r] += more_low[part][r], high[r] += more_high[part][r];
    } else {
        for (int64_t k = 0; k < length; k++) {
            u32x16 a = words(w + k * BLOCK), b = words(w + k * BLOCK + 16);
            __builtin_prefetch(next + k * 64);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                u32x16 one = spread(x[r * stride + k]);
                low[r] = Dot<W>::add(low[r], one, a);
                high[r] = Dot<W>::add(high[r], one, b);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        memcpy((word*)sums + r * BLOCK, &low[r], 64);
        memcpy((word*)sums + r * BLOCK + 16, &high[r], 64);
    }
}

template <class W>
static void strip_of(
    int64_t rows, const word* x, int64_t stride, const word* w, int64_t length, const char* next, void* sums) {
    static void (*const table[TALL])(const word*, int64_t, const word*, int64_t, const char*, void*) = {
        strip<W, 1>, strip<W, 2>, strip<W, 3>, strip<W, 4>,  strip<W, 5>,  strip<W, 6>,
        strip<W, 7>, strip<W, 8>, strip<W, 9>, strip<W, 10>, strip<W, 11>, strip<W, 12>};
    table[rows - 1](x, stride, w, length, next, sums);
}

// Where a block's sixteen low and sixteen high outputs stand.
struct Places {
    int64_t low, high;
    Places(const Weight& w, int64_t block)
        : low(w.halves ? 16 * block : BLOCK * block), high(w.halves ? w.outputs / 2 + 16 * block : BLOCK * block + 16) {}
};

// Sums of sixteen outputs → what they stand for.
template <class W, class T> static inline f32x16 finish(const Weight& w, const word* sums, int64_t at, float row_scale) {
    f32x16 found;
    if constexpr (sizeof(W) == 1) {
        i32x16 whole, offset;
        memcpy(&whole, sums, 64);
        memcpy(&offset, w.sums + at, 64);
        found = __builtin_convertvector(whole - offset, f32x16) * load(w.scales + at) * row_scale;
    } else {
        memcpy(&found, sums, 64);
    }
    return w.bias ? found + load((const T*)w.bias + at) : found;
}

// put(row, where, low sixteen, high sixteen) of some strips of rows with one block; `most`: rows of a strip.
template <class W, class T, class Put>
static void block_with(
    int64_t block, Team lines, int64_t most, int64_t rows, const void* x, const float* row_scales, const Weight& w, Put put) {
    alignas(64) word sums[TALL * BLOCK];
    const int64_t strips = (rows + most - 1) / most;
    const word* here = w.words + block * w.length * BLOCK;
    Places where(w, block);
    for (int64_t s = lines.first(strips); s < lines.last(strips); s++) {
        int64_t first = rows * s / strips, last = rows * (s + 1) / strips;
        // Two strips fetch half of the next block each; one alone fetches its first half.
        const char* next = (const char*)(here + w.length * BLOCK) + (s & 1) * w.length * 64;
        strip_of<W>(last - first, (const word*)x + first * w.length, w.length, here, w.length, next, sums);
        for (int64_t row = first; row < last; row++) {
            const word* found = sums + (row - first) * BLOCK;
            float scale = sizeof(W) == 1 ? row_scales[row] : 1.0f;
            put(row, where, finish<W, T>(w, found, where.low, scale), finish<W, T>(w, found + 16, where.high, scale));
        }
    }
}

// put(row, where, low sixteen, high sixteen) for every row, by all threads of a team. W: numbers of the weight, T: of rows.
// x: `length` words per row. row_scales: float32 [rows], for int8 only.
template <class W, class T, class Put>
static void product(Team team, int64_t rows, const void* x, const float* row_scales, const Weight& w, Put put) {
    const int64_t blocks = w.outputs / BLOCK;
    if (rows > MANY && blocks >= 2 * team.count) {  // whoever is free: a thread may have lost its core for a while
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t block = 0; block < blocks; block++) block_with<W, T>(block, {0, 1}, LOW, rows, x, row_scales, w, put);
        return;
    }
    // Blocks in the order in which they lie. Threads that are more than the blocks share out rows.
    int64_t across = team.count < blocks ? team.count : blocks, down = team.count / across;
    if (team.own >= across * down) return;
    Team columns{team.own % across, across}, lines{team.own / across, down};
    for (int64_t block = columns.first(blocks); block < columns.last(blocks); block++)
        block_with<W, T>(block, lines, rows <= FEW ? TALL : LOW, rows, x, row_scales, w, put);
}

// One row in int8, offset by 128, four to a word; returns its scale, which is NaN where a number is not finite. `length`: words.
template <class T> static inline float quantise(const T* x, uint8_t* to, int64_t length) {
    f32x16 most{}, odd{};  // odd: NaN where a number is not finite, which a maximum would hide
    for (int64_t i = 0; i < 4 * length; i += WIDTH) {
        f32x16 v = load(x + i), positive = v < 0 ? -v : v;
        most = positive > most ? positive : most;
        odd += v - v;
    }
    float largest = 0;
    for (int i = 0; i < WIDTH; i++) largest = most[i] > largest ? most[i] : largest;
    float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    for (int64_t i = 0; i < 4 * length; i += WIDTH) {
        f32x16 v = load(x + i) * inverse + 12582912.0f;  // 1.5 · 2^23: rounds to an integer
        i32x16 whole = (i32x16)v - 0x4b400000 + 128;
        typedef uint8_t u8x16 __attribute__((vector_size(16)));
        u8x16 bytes = __builtin_convertvector(whole, u8x16);
        memcpy(to + i, &bytes, sizeof bytes);
    }
    return scale + sum(odd);
}

}  // namespace decoding
