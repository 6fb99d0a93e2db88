// All layers of a decoder in one call, threads staying together from first to last: see kernels/decoder_layers.py.
#include "blocked.hpp"
#include "paged.hpp"

namespace decoding {

struct Layer {
    Weight qkv, out, gate_up, down;
    const void *attention_norm, *q_norm, *k_norm, *mlp_norm;  // scales in the rows' dtype; q_norm, k_norm may be null
    void* cache;                                              // [2, pages, kv_heads, page_size, dim]
};

struct Model {
    const Layer* layers;
    int64_t count, width, heads, kv_heads, dim, hidden, pages, page_size;
    double eps;
};

// One forward. All pointers but those to integers are in the rows' dtype.
struct Forward {
    void* x;               // [rows, width]: embeddings, overwritten by what the layers make of them
    const void *cos, *sin;  // [rows, dim]; sin is negative in the first half
    const int64_t* slots;  // [rows]: page · page_size + offset, where each row's keys and values go
    const Span* spans;
    const int32_t* pages;
    void *normed, *states, *mixed, *gated;  // [rows, width], [rows, heads of q, k and v · dim], [rows, heads · dim], …
    uint8_t* numbers;      // int8 only: [rows, the widest input]
    float* scales;         // int8 only: [rows]
    int64_t* taken;        // [layers], zeros
    int64_t rows, span_count;
};

inline void wait() {
#pragma omp barrier
}

template <class T> static float inverse_rms(const T* x, int64_t width, double eps) {
    f32x16 squares{};
    for (int64_t i = 0; i < width; i += WIDTH) {
        f32x16 v = load(x + i);
        squares += v * v;
    }
    return 1.0f / std::sqrt(sum(squares) / width + float(eps));
}

// Turns a head by its position, scaled before; `scale` may be null.
template <class T>
static void turn(const T* x, T* to, const T* scale, const T* cos, const T* sin, int64_t dim, float inverse) {
    int64_t half = dim / 2;
    for (int64_t d = 0; d < half; d += WIDTH) {
        f32x16 low = load(x + d) * inverse, high = load(x + half + d) * inverse;
        if (scale) low *= load(scale + d), high *= load(scale + half + d);
        store(to + d, low * load(cos + d) + high * load(sin + d));
        store(to + half + d, high * load(cos + half + d) + low * load(sin + half + d));
    }
}

// T: numbers of rows, W: of weights.
template <class T, class W> struct Pass {
    const Model& m;
    const Forward& f;
    const Team team;
    T* const x = (T*)f.x;
    T *const normed = (T*)f.normed, *const states = (T*)f.states, *const mixed = (T*)f.mixed, *const gated = (T*)f.gated;

    void run() const {
        for (int64_t at = 0; at < m.count; at++) {
            const Layer& layer = m.layers[at];
            normalise((const T*)layer.attention_norm);
            multiply(layer.qkv, normed, m.width, [&](int64_t row, Places to, f32x16 low, f32x16 high) {
                store(states + row * layer.qkv.outputs + to.low, low);
                store(states + row * layer.qkv.outputs + to.high, high);
            });
            place(layer);
            attend(layer, f.taken + at);
            multiply(layer.out, ready(mixed, m.heads * m.dim), m.heads * m.dim, add());
            normalise((const T*)layer.mlp_norm);
            multiply(layer.gate_up, normed, m.width, [&](int64_t row, Places to, f32x16 gate, f32x16 up) {
                store(gated + row * m.hidden + to.low, gate / (exp16(-gate) + 1.0f) * up);
            });
            multiply(layer.down, ready(gated, m.hidden), m.hidden, add());
        }
    }

    auto add() const {
        return [this](int64_t row, Places to, f32x16 low, f32x16 high) {
            T *a = x + row * m.width + to.low, *b = x + row * m.width + to.high;
            store(a, load(a) + low);
            store(b, load(b) + high);
        };
    }

    void normalise(const T* scale) const {
        for (int64_t row = team.first(f.rows); row < team.last(f.rows); row++) {
            const T* from = x + row * m.width;
            T* to = normed + row * m.width;
            float inverse = inverse_rms(from, m.width, m.eps);
            for (int64_t i = 0; i < m.width; i += WIDTH) store(to + i, load(from + i) * inverse * load(scale + i));
            if constexpr (sizeof(W) == 1) f.scales[row] = quantise(to, f.numbers + row * m.width, m.width / 4);
        }
        wait();
    }

    // In the form that products take.
    const T* ready(const T* from, int64_t width) const {
        if constexpr (sizeof(W) == 1) {
            for (int64_t row = team.first(f.rows); row < team.last(f.rows); row++)
                f.scales[row] = quantise(from + row * width, f.numbers + row * width, width / 4);
            wait();
        }
        return from;
    }

    template <class Put> void multiply(const Weight& w, const T* from, int64_t width, Put put) const {
        product<W, T>(team, f.rows, sizeof(W) == 1 ? (const void*)f.numbers : from, f.scales, w, put);
        wait();
    }

    // Queries are turned where they are, keys on their way into the pages.
    void place(const Layer& layer) const {
        Pool<T> pool{(T*)layer.cache, m.pages, m.kv_heads, m.page_size, m.dim};
        int64_t all = m.heads + 2 * m.kv_heads;
        for (int64_t row = team.first(f.rows); row < team.last(f.rows); row++) {
            const T *cos = (const T*)f.cos + row * m.dim, *sin = (const T*)f.sin + row * m.dim;
            int64_t page = f.slots[row] / m.page_size, offset = f.slots[row] % m.page_size;
            for (int64_t head = 0; head < all; head++) {
                T* from = states + (row * all + head) * m.dim;
                int64_t key = head - m.heads, value = key - m.kv_heads;
                if (value >= 0) {
                    memcpy(pool.at(1, page, value, offset), from, m.dim * sizeof(T));
                    continue;
                }
                const T* scale = (const T*)(key < 0 ? layer.q_norm : layer.k_norm);
                T* to = key < 0 ? from : pool.at(0, page, key, offset);
                turn(from, to, scale, cos, sin, m.dim, scale ? inverse_rms(from, m.dim, m.eps) : 1.0f);
            }
        }
        wait();
    }

    void attend(const Layer& layer, int64_t* taken) const {
        Pool<T> pool{(T*)layer.cache, m.pages, m.kv_heads, m.page_size, m.dim};
        int64_t stride = (m.heads + 2 * m.kv_heads) * m.dim;
        float scale = 1.0f / std::sqrt(float(m.dim));
        Attend<T>{pool, f.pages, f.spans, f.span_count, states, stride, mixed, m.heads, scale}.work(taken);
        wait();
    }
};

}  // namespace decoding

using namespace decoding;

#define DECODER_LAYERS(NAME, T, W)                                                                                     \
    EXPORT void NAME(const Model* model, const Forward* forward) {                                                     \
        together([&](Team team) { Pass<T, W>{*model, *forward, team}.run(); });                                        \
    }

DECODER_LAYERS(decoder_layers_f32, float, float)
DECODER_LAYERS(decoder_layers_bf16, bf16, bf16)
DECODER_LAYERS(decoder_layers_int8_f32, float, int8_t)
DECODER_LAYERS(decoder_layers_int8_bf16, bf16, int8_t)
