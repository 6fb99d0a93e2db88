// 3x3 convolutions of frames by Winograd's minimal filtering, F(4x4, 3x3): see kernels/conv3x3.py.
//
// Tiles of 6x6 numbers become 36 numbers in another basis, in which a filter is one product for each of them; 36 matrix
// products later the way back gives 4x4 pixels. The points of the basis are 0, ±5/8, ±3/2 and infinity: the usual ±1 and
// ±2 lose half a digit more. Frames before one another are further terms of the same products.
#include <algorithm>

#include "common.hpp"

constexpr float A = 0.625f, B = 1.5f, AA = A * A, BB = B * B, AABB = AA * BB, SUM = AA + BB;
constexpr int64_t POINTS = 36;
constexpr int64_t SLACK = 12;  // rows of scratch beyond the last one, which products of whole blocks of rows touch

struct Shape {
    int64_t frames, history, taps, height, width, in, out, up;  // height and width of what comes out

    int64_t in_wide() const { return (in + WIDTH - 1) / WIDTH * WIDTH; }
    int64_t out_wide() const { return (out + WIDTH - 1) / WIDTH * WIDTH; }
    int64_t columns() const { return (width + 3) / 4; }
    int64_t tiles() const { return columns() * ((height + 3) / 4); }
};

// Vectors in a panel of filters: as wide as the registers allow, and a divisor of the whole.
static int64_t vectors(int64_t wide) {
    int64_t all = wide / WIDTH;
    return all % 3 == 0 ? 3 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
}

template <class T> static inline f32x16 load_at_most(const T* p, int64_t count) {
    return count >= WIDTH ? load(p) : load_some(p, count);
}

template <class T> static inline void store_at_most(T* p, f32x16 v, int64_t count) {
    count >= WIDTH ? store(p, v) : store_some(p, v, count);
}

// --- to the basis and back --------------------------------------------------------------------------------------------

static inline void pixels_1d(const f32x16* x, f32x16* y, int step) {
    y[0] = x[0] * AABB - x[2] * SUM + x[4];
    f32x16 even = x[4] - x[2] * BB, odd = (x[3] - x[1] * BB) * A;
    y[step] = even + odd;
    y[2 * step] = even - odd;
    even = x[4] - x[2] * AA, odd = (x[3] - x[1] * AA) * B;
    y[3 * step] = even + odd;
    y[4 * step] = even - odd;
    y[5 * step] = x[1] * AABB - x[3] * SUM + x[5];
}

static inline void filter_1d(const f32x16* k, f32x16* y, int step) {
    constexpr float none = 1 / AABB, a = 1 / (2 * AA * (AA - BB)), b = 1 / (2 * BB * (BB - AA));
    f32x16 even = (k[0] + k[2] * AA) * a, odd = k[1] * (A * a);
    y[0] = k[0] * none;
    y[step] = even + odd;
    y[2 * step] = even - odd;
    even = (k[0] + k[2] * BB) * b, odd = k[1] * (B * b);
    y[3 * step] = even + odd;
    y[4 * step] = even - odd;
    y[5 * step] = k[2];
}

static inline void back_1d(const f32x16* m, f32x16* y, int step) {
    f32x16 a = m[1] + m[2], b = m[3] + m[4], odd_a = (m[1] - m[2]) * A, odd_b = (m[3] - m[4]) * B;
    y[0] = m[0] + a + b;
    y[step] = odd_a + odd_b;
    y[2 * step] = a * AA + b * BB;
    y[3 * step] = odd_a * AA + odd_b * BB + m[5];
}

// --- products ---------------------------------------------------------------------------------------------------------

// to [R, N·16] = Σ over taps of from[tap · shift + row] · filters
template <int R, int N>
static void product(
    const float* from, int64_t row, int64_t shift, int64_t taps, int64_t depth, const float* filters, float* to,
    int64_t to_row) {
    f32x16 found[R][N] = {};
    for (int64_t tap = 0; tap < taps; tap++, from += shift)
        for (int64_t k = 0; k < depth; k++, filters += N * WIDTH) {
            f32x16 by[N];
            for (int n = 0; n < N; n++) by[n] = load(filters + n * WIDTH);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) found[r][n] += by[n] * from[r * row + k];
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(to + r * to_row + n * WIDTH, found[r][n]);
}

template <int R, int N>
static void panel_of(
    const float* from, int64_t row, int64_t shift, int64_t taps, int64_t depth, const float* filters, float* to,
    int64_t to_row, int64_t rows) {
    for (int64_t r = 0; r < rows; r += R)
        product<R, N>(from + r * row, row, shift, taps, depth, filters, to + r * to_row, to_row);
}

// Sums stay in registers: 24 of the 32 of AVX-512; elsewhere a vector of ours takes two or four.
#ifdef __AVX512F__
constexpr int BY_FOUR = 6, BY_THREE = 8, BY_TWO = 12, BY_ONE = 12;
#else
constexpr int BY_FOUR = 1, BY_THREE = 2, BY_TWO = 3, BY_ONE = 4;
#endif

static void panel(
    int64_t wide, const float* from, int64_t row, int64_t shift, int64_t taps, int64_t depth, const float* filters,
    float* to, int64_t to_row, int64_t rows) {
    auto work = wide == 4   ? panel_of<BY_FOUR, 4>
                : wide == 3 ? panel_of<BY_THREE, 3>
                : wide == 2 ? panel_of<BY_TWO, 2>
                            : panel_of<BY_ONE, 1>;
    work(from, row, shift, taps, depth, filters, to, to_row, rows);
}

// --- a block of tiles -------------------------------------------------------------------------------------------------

// `count` tiles from `start` on, of all frames: pixels → basis [36, frame · tile, in] → [36, frame · tile, out] → pixels.
template <class T> struct TileBlock {
    const Shape& s;
    const T* x;
    const float *filters, *bias;
    const T* residual;
    T* y;
    float *basis, *found;
    int64_t basis_step, found_step, start, count;

    void enter(int64_t i) const {
        int64_t tile = start + i % count, top = tile / s.columns() * 4 - 1, left = tile % s.columns() * 4 - 1;
        int64_t width = s.width >> s.up;
        const T *frame = x + i / count * (s.height >> s.up) * width * s.in, *at[6][6];
        bool inside = top >= 0 && left >= 0 && top + 6 <= s.height && left + 6 <= s.width && s.in % WIDTH == 0;
        for (int64_t r = 0; r < 6; r++)
            for (int64_t c = 0; c < 6; c++) {
                int64_t row = top + r, column = left + c;
                bool there = row >= 0 && row < s.height && column >= 0 && column < s.width;
                at[r][c] = there ? frame + ((row >> s.up) * width + (column >> s.up)) * s.in : nullptr;
            }
        float* to = basis + i * s.in_wide();
        for (int64_t channel = 0; channel < s.in; channel += WIDTH)
            inside ? enter_vector<true>(at, channel, to) : enter_vector<false>(at, channel, to);
    }

    template <bool inside> void enter_vector(const T* const (&at)[6][6], int64_t channel, float* to) const {
        f32x16 half[6][6], line[6];
        for (int c = 0; c < 6; c++) {
            for (int r = 0; r < 6; r++)
                line[r] = inside      ? load(at[r][c] + channel)
                          : at[r][c] ? load_at_most(at[r][c] + channel, s.in - channel)
                                     : f32x16{};
            pixels_1d(line, &half[0][c], 6);
        }
        for (int r = 0; r < 6; r++) {
            pixels_1d(half[r], line, 1);
            for (int c = 0; c < 6; c++) store(to + (r * 6 + c) * basis_step + channel, line[c]);
        }
    }

    int64_t products() const { return POINTS * (s.out_wide() / WIDTH / vectors(s.out_wide())); }

    // Frame f reads frames f - taps + 1 … f; those before the first one that is there count as zero.
    void multiply(int64_t i) const {
        int64_t depth = s.in_wide(), wide = vectors(s.out_wide()), panels = products() / POINTS, point = i / panels;
        int64_t missing = s.taps - 1 - s.history, shift = count * depth;
        const float *by = filters + i * s.taps * depth * wide * WIDTH, *from = basis + point * basis_step;
        float* to = found + point * found_step + i % panels * wide * WIDTH;
        if (missing <= 0) return panel(wide, from, depth, shift, s.taps, depth, by, to, s.out_wide(), s.frames * count);
        for (int64_t f = 0; f < s.frames; f++) {
            int64_t skipped = std::max(int64_t(0), missing - f);
            panel(
                wide, from + std::max(int64_t(0), f - missing) * shift, depth, shift, s.taps - skipped, depth,
                by + skipped * depth * wide * WIDTH, to + f * count * s.out_wide(), s.out_wide(), count);
        }
    }

    void leave(int64_t i) const {
        int64_t tile = start + i % count, top = tile / s.columns() * 4, left = tile % s.columns() * 4;
        int64_t rows = std::min(int64_t(4), s.height - top), columns = std::min(int64_t(4), s.width - left);
        int64_t first = i / count * s.height * s.width * s.out + (top * s.width + left) * s.out;
        bool inside = rows == 4 && columns == 4 && s.out % WIDTH == 0;
        const float* from = found + i * s.out_wide();
        for (int64_t channel = 0; channel < s.out; channel += WIDTH)
            inside ? leave_vector<true>(from, first, channel, 4, 4)
                   : leave_vector<false>(from, first, channel, rows, columns);
    }

    template <bool inside>
    void leave_vector(const float* from, int64_t first, int64_t channel, int64_t rows, int64_t columns) const {
        int64_t some = inside ? WIDTH : s.out - channel;
        f32x16 half[4][6], line[6], add = load_at_most(bias + channel, some);
        for (int c = 0; c < 6; c++) {
            for (int r = 0; r < 6; r++) line[r] = load(from + (r * 6 + c) * found_step + channel);
            back_1d(line, &half[0][c], 6);
        }
        for (int64_t r = 0; r < (inside ? 4 : rows); r++) {
            back_1d(half[r], line, 1);
            for (int64_t c = 0; c < (inside ? 4 : columns); c++) {
                int64_t at = first + (r * s.width + c) * s.out + channel;
                f32x16 pixel = line[c] + add;
                if (residual) pixel += load_at_most(residual + at, some);
                store_at_most(y + at, pixel, some);
            }
        }
    }
};

static inline int64_t own() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Each thread has blocks of its own, so that none waits for another, unless `block` is all there is: then they share it.
template <class T>
static void conv3x3(
    const T* x, const float* filters, const float* bias, const T* residual, T* y, float* scratch, const Shape& s,
    int64_t block, int64_t threads) {
    int64_t frames = s.history + s.frames, tiles = s.tiles();
    int64_t basis = (frames * block + SLACK) * s.in_wide() + WIDTH, found = (s.frames * block + SLACK) * s.out_wide() + WIDTH;
    bool together = block >= tiles;
#pragma omp parallel num_threads(threads)
    {
        float* mine = scratch + (together ? 0 : own() * POINTS * (basis + found));
        TileBlock<T> b{s, x, filters, bias, residual, y, mine, mine + POINTS * basis, basis, found, 0, tiles};
        if (together) {
#pragma omp for
            for (int64_t i = 0; i < frames * tiles; i++) b.enter(i);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < b.products(); i++) b.multiply(i);
#pragma omp for
            for (int64_t i = 0; i < s.frames * tiles; i++) b.leave(i);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t start = 0; start < tiles; start += block) {
                b.start = start;
                b.count = std::min(block, tiles - start);
                for (int64_t i = 0; i < frames * b.count; i++) b.enter(i);
                for (int64_t i = 0; i < b.products(); i++) b.multiply(i);
                for (int64_t i = 0; i < s.frames * b.count; i++) b.leave(i);
            }
        }
    }
}

// weight [out, in, taps, 3, 3] → filters [36, panel, taps, in, panel's width]
template <class T> static void conv3x3_filters(const T* weight, float* filters, int64_t out, int64_t in, int64_t taps) {
    Shape s{1, 0, taps, 1, 1, in, out, 0};
    int64_t wide = vectors(s.out_wide()) * WIDTH, size = taps * s.in_wide() * wide, step = s.out_wide() / wide * size;
    share_rows(s.in_wide(), s.out_wide() * taps * POINTS, [&](int64_t first, int64_t last) {
        for (int64_t o = 0; o < s.out_wide(); o += WIDTH)
            for (int64_t channel = first; channel < last; channel++)
                for (int64_t tap = 0; tap < taps; tap++) {
                    float k[9][WIDTH] = {};
                    for (int64_t i = 0; channel < in && i < std::min(WIDTH, out - o); i++)
                        for (int j = 0; j < 9; j++)
                            k[j][i] = widen(weight[(((o + i) * in + channel) * taps + tap) * 9 + j]);
                    f32x16 half[6][3], line[6];
                    for (int c = 0; c < 3; c++) {
                        for (int r = 0; r < 3; r++) line[r] = load(k[3 * r + c]);
                        filter_1d(line, &half[0][c], 3);
                    }
                    float* to = filters + o / wide * size + (tap * s.in_wide() + channel) * wide + o % wide;
                    for (int r = 0; r < 6; r++) {
                        filter_1d(half[r], line, 1);
                        for (int c = 0; c < 6; c++) store(to + (r * 6 + c) * step, line[c]);
                    }
                }
    });
}

#define CONV3X3(SUFFIX, T)                                                                                             \
    EXPORT void conv3x3_##SUFFIX(                                                                                      \
        const T* x, const float* filters, const float* bias, const T* residual, T* y, float* scratch, int64_t frames,  \
        int64_t history, int64_t taps, int64_t height, int64_t width, int64_t in, int64_t out, int64_t up,             \
        int64_t block, int64_t threads) {                                                                              \
        Shape s{frames, history, taps, height, width, in, out, up};                                                    \
        conv3x3(x, filters, bias, residual, y, scratch, s, block, threads);                                            \
    }                                                                                                                  \
    EXPORT void conv3x3_filters_##SUFFIX(const T* weight, float* filters, int64_t out, int64_t in, int64_t taps) {     \
        conv3x3_filters(weight, filters, out, in, taps);                                                               \
    }

CONV3X3(f32, float)
CONV3X3(bf16, bf16)
