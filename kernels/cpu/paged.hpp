// Causal attention of new tokens straight over the pages of their sequences, with a running maximum (Milakov and
// Gimelshein, 2018). Queries that read the same keys are computed together: neighbouring heads (GQA) of a few tokens.
#pragma once

#include "words.hpp"

namespace decoding {

constexpr int64_t PART = 256;    // tokens whose scores are held at a time
constexpr int64_t QUERIES = 16;  // that read the same keys together
constexpr int64_t MOST_DIM = 256;
constexpr int64_t LEAD = 128;  // tokens between those that are fetched and those that are read

// One layer's keys and values: [2, pages, heads, size, dim].
template <class T> struct Pool {
    T* numbers;
    int64_t pages, heads, size, dim;
    T* at(int64_t side, int64_t page, int64_t head, int64_t offset) const {
        return numbers + (((side * pages + page) * heads + head) * size + offset) * dim;
    }
};

// New tokens of one sequence (kernels/paged_attention.py, `Spans`).
struct Span {
    int32_t row;    // of its first token in the batch
    int32_t start;  // tokens before it
    int32_t count;  // new ones
    int32_t table;  // where its pages begin in the list of pages
};

// What one thread needs for one group of queries.
struct Desk {
    alignas(64) float scores[QUERIES][PART];
    alignas(64) float sums[QUERIES][MOST_DIM];
    alignas(64) word keys[MOST_DIM * 16];  // of sixteen tokens, in columns
    const void* values[PART];
    const word* q[QUERIES];
    int64_t row[QUERIES], head[QUERIES], end[QUERIES];  // end: tokens that the query sees
    float top[QUERIES], total[QUERIES];
    int64_t queries;
};

// scores of R queries from `i` with the sixteen keys on the desk; `length` words of a key.
template <class T, int R> static void score(Desk& desk, int64_t i, int64_t t, int64_t length, float scale) {
    f32x16 even[R]{}, odd[R]{};
    for (int64_t k = 0; k < length; k += 2) {
        u32x16 a = words(desk.keys + k * 16), b = words(desk.keys + k * 16 + 16);
        for (int r = 0; r < R; r++) {
            even[r] = Dot<T>::add(even[r], spread(desk.q[i + r][k]), a);
            odd[r] = Dot<T>::add(odd[r], spread(desk.q[i + r][k + 1]), b);
        }
    }
    for (int r = 0; r < R; r++) store(desk.scores[i + r] + t, (even[r] + odd[r]) * scale);
}

// Adds weights · values of `tokens` to the sums of R queries from `i`, C · 16 dimensions from `d`.
template <class T, int R, int C> static void mix(Desk& desk, int64_t i, int64_t d, int64_t tokens) {
    f32x16 found[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) found[r][c] = load(desk.sums[i + r] + d + c * WIDTH);
    for (int64_t t = 0; t < tokens; t++) {
        const T* from = (const T*)desk.values[t] + d;
        f32x16 v[C];
        for (int c = 0; c < C; c++) v[c] = load(from + c * WIDTH);
        for (int r = 0; r < R; r++) {
            word weight;
            memcpy(&weight, &desk.scores[i + r][t], 4);
            for (int c = 0; c < C; c++) found[r][c] += (f32x16)spread(weight) * v[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(desk.sums[i + r] + d + c * WIDTH, found[r][c]);
}

template <class T, int R> static void mix_all(Desk& desk, int64_t i, int64_t dim, int64_t tokens) {
    int64_t d = 0;
    for (; d + 64 <= dim; d += 64) mix<T, R, 4>(desk, i, d, tokens);
    for (; d < dim; d += 32) mix<T, R, 2>(desk, i, d, tokens);
}

// Scores of `tokens` from `begin` → weights beside the running maximum, sums shrunk to it.
static inline void soften(Desk& desk, int64_t i, int64_t begin, int64_t tokens, int64_t dim) {
    float* scores = desk.scores[i];
    int64_t padded = (tokens + WIDTH - 1) / WIDTH * WIDTH, seen = desk.end[i] - begin;
    for (int64_t t = seen < 0 ? 0 : seen; t < padded; t++) scores[t] = -INFINITY;
    f32x16 most = load(scores);
    for (int64_t t = WIDTH; t < padded; t += WIDTH) {
        f32x16 v = load(scores + t);
        most = v > most ? v : most;
    }
    float top = desk.top[i];
    for (int j = 0; j < WIDTH; j++) top = most[j] > top ? most[j] : top;
    f32x16 total{};
    for (int64_t t = 0; t < padded; t += WIDTH) {
        f32x16 weights = exp16(load(scores + t) - top);
        store(scores + t, weights);
        total += weights;
    }
    float shrink = begin ? std::exp(desk.top[i] - top) : 0.0f;
    if (begin && shrink != 1.0f)
        for (int64_t d = 0; d < dim; d += WIDTH) store(desk.sums[i] + d, load(desk.sums[i] + d) * shrink);
    desk.total[i] = desk.total[i] * shrink + sum(total);
    desk.top[i] = top;
}

// Queries that read the same keys: tokens [first, last) of a span, heads [low, high) of those that share `kv_head`.
struct Group {
    const Span* span;
    int64_t kv_head, low, high, first, last;
    int64_t seen() const { return span->start + last; }
};

// One layer's attention.
template <class T> struct Attend {
    Pool<T> pool;
    const int32_t* pages;  // of all sequences
    const Span* spans;
    int64_t span_count;
    const T* q;        // [rows, q_stride]: heads lie side by side
    int64_t q_stride;  // numbers
    T* out;            // [rows, heads · dim]
    int64_t heads;     // of queries
    float scale;

    // Every thread takes the next group until none is left, and the one after it, to fetch what it reads; `taken` is 0
    // at first.
    void work(int64_t* taken) const {
        Desk desk;
        Line line{*this, taken};
        Group now, then;
        bool more = line.next(now);
        Reader reader{*this, now, 0};
        if (more)
            for (int64_t t = 0; t < LEAD; t += WIDTH) reader.fetch(nullptr);
        while (more) {
            bool another = line.next(then);
            compute(desk, now, reader, another ? &then : nullptr);
            now = then, more = another;
        }
    }

    // Groups in their order, each for one thread.
    struct Line {
        const Attend& of;
        int64_t* taken;
        int64_t at = 0, passed = 0;  // span, groups of the spans before it

        bool next(Group& found) {
            int64_t own = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED), group = of.heads / of.pool.heads;
            int64_t pieces = (group + QUERIES - 1) / QUERIES, each = of.pool.heads * pieces;
            int64_t tall = group >= QUERIES ? 1 : QUERIES / group;  // tokens whose queries go together
            for (; at < of.span_count; at++) {
                const Span& span = of.spans[at];
                int64_t count = (span.count + tall - 1) / tall * each, i = own - passed, piece = i % pieces;
                if (i < count) {
                    int64_t first = i / each * tall, last = first + tall < span.count ? first + tall : span.count;
                    found = {&span, i % each / pieces, group * piece / pieces, group * (piece + 1) / pieces, first, last};
                    return true;
                }
                passed += count;
            }
            return false;
        }
    };

    // Where a token's key and value are; those of one page lie side by side, `left` of them from here on.
    struct Place {
        const Attend& of;
        const int32_t* page;
        int64_t kv_head, left;
        const T *key, *value;

        Place(const Attend& of, const Group& group, int64_t token)
            : of(of), page(of.pages + group.span->table + token / of.pool.size), kv_head(group.kv_head) {
            find(token % of.pool.size);
        }
        void find(int64_t offset) {
            left = of.pool.size - offset;
            key = of.pool.at(0, *page, kv_head, offset), value = of.pool.at(1, *page, kv_head, offset);
        }
        void step() {
            key += of.pool.dim, value += of.pool.dim;
            if (--left == 0) page++, find(0);
        }
    };

    // Fetches keys and values into the second cache, LEAD tokens before they are read: they lie in pages, and no
    // processor guesses which is the next.
    struct Reader {
        const Attend& of;
        Group group;
        int64_t token;

        void fetch(const Group* then) {
            if (token >= group.seen()) {
                if (!then || (then->span == group.span && then->kv_head == group.kv_head)) return;
                group = *then, token = 0;
            }
            int64_t last = token + WIDTH < group.seen() ? token + WIDTH : group.seen();
            for (Place at(of, group, token); token < last;) {
                int64_t count = at.left < last - token ? at.left : last - token;
                const char *key = (const char*)at.key, *value = (const char*)at.value;
                for (int64_t i = 0; i < count * of.pool.dim * int64_t(sizeof(T)); i += 64)
                    __builtin_prefetch(key + i, 0, 2), __builtin_prefetch(value + i, 0, 2);
                token += count;
                if (token < last) at.page++, at.find(0);
            }
        }
    };

    void compute(Desk& desk, const Group& group, Reader& reader, const Group* then) const {
        begin(desk, group);
        for (int64_t first = 0; first < group.seen(); first += PART) {
            int64_t tokens = group.seen() - first < PART ? group.seen() - first : PART;
            for (int64_t t = 0; t < tokens; t += WIDTH) {
                reader.fetch(then);
                look(desk, group, first, t, tokens);
            }
            for (int64_t i = 0; i < desk.queries; i++) soften(desk, i, first, tokens, pool.dim);
            for (int64_t i = 0; i < desk.queries; i += 4) switch (desk.queries - i) {
                    case 1: mix_all<T, 1>(desk, i, pool.dim, tokens); break;
                    case 2: mix_all<T, 2>(desk, i, pool.dim, tokens); break;
                    case 3: mix_all<T, 3>(desk, i, pool.dim, tokens); break;
                    default: mix_all<T, 4>(desk, i, pool.dim, tokens);
                }
        }
        for (int64_t i = 0; i < desk.queries; i++) {
            T* to = out + (desk.row[i] * heads + desk.head[i]) * pool.dim;
            for (int64_t d = 0; d < pool.dim; d += WIDTH) store(to + d, load(desk.sums[i] + d) / desk.total[i]);
        }
    }

    void begin(Desk& desk, const Group& group) const {
        desk.queries = 0;
        for (int64_t token = group.first; token < group.last; token++)
            for (int64_t head = group.low; head < group.high; head++) {
                int64_t i = desk.queries++;
                desk.row[i] = group.span->row + token, desk.head[i] = group.kv_head * (heads / pool.heads) + head;
                desk.end[i] = group.span->start + token + 1;
                desk.q[i] = (const word*)(q + desk.row[i] * q_stride + desk.head[i] * pool.dim);
                desk.top[i] = -INFINITY, desk.total[i] = 0;
                memset(desk.sums[i], 0, pool.dim * sizeof(float));
            }
    }

    // Scores of sixteen tokens from `first + t`; behind the last one it is read again.
    void look(Desk& desk, const Group& group, int64_t first, int64_t t, int64_t tokens) const {
        const word* rows[WIDTH];
        int64_t length = pool.dim * sizeof(T) / 4;
        Place at(*this, group, first + t);
        for (int64_t i = 0; i < WIDTH; i++) {
            rows[i] = (const word*)at.key, desk.values[t + i] = at.value;
            if (t + i + 1 < tokens) at.step();
        }
        for (int64_t k = 0; k < length; k += WIDTH) turn16(rows, k, desk.keys + k * 16);
        for (int64_t i = 0; i < desk.queries; i += 4) switch (desk.queries - i) {
                case 1: score<T, 1>(desk, i, t, length, scale); break;
                case 2: score<T, 2>(desk, i, t, length, scale); break;
                case 3: score<T, 3>(desk, i, t, length, scale); break;
                default: score<T, 4>(desk, i, t, length, scale);
            }
    }
};

}  // namespace decoding
