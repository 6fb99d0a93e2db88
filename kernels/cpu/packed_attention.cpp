// softmax(q kᵀ / √D) v over packed sequences, for processors with AVX-512 (bf16: with AVX512-BF16). Heads of segments are
// shared out among threads; each copies keys and values of a head into the order of attention_tiles.hpp, once.
//
// What a query computes depends on its own segment alone, in order and in rounding.

#include "replay.hpp"

namespace {

struct Strides {
    int64_t token, head;  // numbers from one to the next
};

// The arguments, as `_Call` of kernels/packed_attention.py has them.
struct Call {
    const void *q, *k, *v;
    void* out;
    float* lse;               // [T, H], or null
    const int64_t* segments;  // [count][3]: queries, keys, how often the last key counts
    int64_t count, heads, kv_heads, dim;
    Strides of_q, of_k, of_v, of_out;
    double scale;    // of scores, times log2(e)
    int64_t causal;  // 1: the last query of a segment sees all keys, the one before it all but the last, and so on
    int64_t status;  // 0 before and after; filled here: 1 no memory for what threads work with, 2 not on this processor
};

}  // namespace

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "attention_tiles.hpp"

#include <atomic>
#include <cstdlib>

namespace {

constexpr int GROUP = 4;                 // tiles of queries that see a block while it is in the second-level cache
constexpr int64_t LEAST = GROUP * TILE;  // queries that are worth packing keys and values for
constexpr int64_t QUICK = 1 << 18;       // products that one thread has done sooner than it would wake another
constexpr double LOG2E = 1.4426950408889634;

// Queries of one head of one segment.
struct Task {
    int64_t query, queries;  // the segment's first row of q, and how many it has
    int64_t key, keys;
    float last;  // what is added to the scores of the last key, in units of `scale`
    int64_t head, from, to;  // vectors of 16 queries
};

template <class Kind>
void finish(const Call& call, const Task& task, const Tile& tile) {
    typedef typename Kind::Number Number;
    for (int n = 0; n < tile.vectors; n++) {
        const int64_t first = tile.first + n * 16, rows = std::min<int64_t>(16, task.queries - first);
        Number* out = (Number*)call.out + (task.query + first) * call.of_out.token + task.head * call.of_out.head;
        const __m512 share = _mm512_div_ps(_mm512_set1_ps(1), _mm512_load_ps(tile.total + n * 16));
        for (int64_t d = 0; d < call.dim; d += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const float* column = tile.mixed + ((d + i) * tile.vectors + n) * 16;
                r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(column), share));
            }
            transpose(r);
            const __mmask16 columns = call.dim - d >= 16 ? 0xffff : (1 << (call.dim - d)) - 1;
            for (int64_t i = 0; i < rows; i++)
                Kind::store(out + i * call.of_out.token + d, _mm512_castsi512_ps(r[i]), columns);
        }
        if (call.lse)
            for (int64_t i = 0; i < rows; i++)
                call.lse[(task.query + first + i) * call.heads + task.head] =
                    float((tile.top[n * 16 + i] * call.scale + std::log2(tile.total[n * 16 + i])) / LOG2E);
    }
}

// What one thread works with.
template <class Kind>
struct Scratch {
    typedef typename Kind::Number Number;
    char* memory = nullptr;
    uint32_t *k, *v;
    float* scores;
    Tile tiles[GROUP];
    int64_t words, panel, packed_key = -1, packed_head = -1;

    bool allocate(const Call& call, int64_t longest) {
        words = (call.dim + Kind::PER_WORD - 1) / Kind::PER_WORD;
        const int64_t keys = (longest + 15) / 16 * 16, columns = (call.dim + 15) / 16 * 16;
        panel = keys / Kind::PER_WORD * 8;
        const int64_t of_k = keys * words * 4, of_v = columns / 8 * panel * 4, of_q = words * TILE * 4;
        const int64_t of_scores = BLOCK * TILE * 4, of_mixed = columns * TILE * 4;
        memory = (char*)std::aligned_alloc(64, of_k + of_v + of_scores + GROUP * (of_q + of_mixed));
        if (!memory) return false;
        char* at = memory;
        k = (uint32_t*)at, at += of_k;
        v = (uint32_t*)at, at += of_v;
        scores = (float*)at, at += of_scores;
        for (Tile& tile : tiles) {
            tile.q = (__m512i*)at, at += of_q;
            tile.mixed = (float*)at, at += of_mixed;
        }
        return true;
    }
    ~Scratch() { std::free(memory); }

    void pack(const Call& call, const Task& task) {
        const int64_t head = task.head / (call.heads / call.kv_heads);
        if (task.key == packed_key && head == packed_head) return;
        packed_key = task.key, packed_head = head;
        const Number* from_k = (const Number*)call.k + task.key * call.of_k.token + head * call.of_k.head;
        const Number* from_v = (const Number*)call.v + task.key * call.of_v.token + head * call.of_v.head;
        pack_keys(from_k, call.of_k.token, task.keys, call.dim, words, k);
        pack_values(from_v, call.of_v.token, task.keys, call.dim, panel, v);
    }

    void begin(const Call& call, const Task& task, Tile& tile, int64_t vector, int vectors) {
        tile.first = vector * 16, tile.vectors = vectors;
        std::fill(tile.top, tile.top + TILE, -INFINITY);
        std::fill(tile.total, tile.total + TILE, 0.0f);
        const Number* from = (const Number*)call.q + (task.query + tile.first) * call.of_q.token;
        from += task.head * call.of_q.head;
        pack_queries(from, call.of_q.token, task.queries - tile.first, vectors, call.dim, words, tile.q);
    }

    void look(const Call& call, const Task& task, Tile& tile, int64_t key) {
        const int count = (int)std::min<int64_t>(BLOCK, task.keys - key);
        const float last = key + count == task.keys ? task.last : 0;
        const Block block = {k + key * words, v + key / Kind::PER_WORD * 8, panel, count, last};
        const int64_t visible = call.causal ? task.keys - task.queries + tile.first + 1 - key : BLOCK;
        const float scale = float(call.scale);
        if (visible + tile.vectors * 16 <= 1) return;  // the last query sees nothing of it
        if (tile.vectors == 3) attend<Kind, 3>(block, tile, call.dim, scale, visible, key == 0, scores);
        else if (tile.vectors == 2) attend<Kind, 2>(block, tile, call.dim, scale, visible, key == 0, scores);
        else attend<Kind, 1>(block, tile, call.dim, scale, visible, key == 0, scores);
    }

    void run(const Call& call, const Task& task) {
        pack(call, task);
        for (int64_t vector = task.from; vector < task.to;) {
            int count = 0;
            for (; count < GROUP && vector < task.to; count++) {
                const int64_t left = task.to - vector, tiles_left = (left + WIDE - 1) / WIDE;
                const int vectors = (int)((left + tiles_left - 1) / tiles_left);  // 4 are 2 + 2, not 3 + 1
                begin(call, task, tiles[count], vector, vectors);
                vector += vectors;
            }
            for (int64_t key = 0; key < task.keys; key += BLOCK)
                for (int i = 0; i < count; i++) look(call, task, tiles[i], key);
            for (int i = 0; i < count; i++) finish<Kind>(call, task, tiles[i]);
        }
    }
};

// Heads of segments, cut further where there are too few for the threads; found by their number.
struct Tasks {
    const Call& call;
    int64_t most;                    // vectors of a task
    int64_t total = 0, longest = 0;  // how many there are; keys of the longest segment
    int64_t threads = 1;

    explicit Tasks(const Call& call) : call(call) {
        int64_t queries = 0, products = 0;
        for (int64_t i = 0; i < call.count; i++) {
            queries += call.segments[3 * i];
            products += call.segments[3 * i] * call.segments[3 * i + 1] * call.heads * call.dim;
        }
#ifdef _OPENMP
        if (products > QUICK) threads = omp_get_max_threads();
        if (joined) threads = joined->count;
#endif
        const int64_t share = queries * call.heads / (4 * threads);
        most = (std::max(LEAST, share) + TILE - 1) / TILE * WIDE;
        for (int64_t i = 0; i < call.count; i++) {
            total += parts(i) * call.heads;
            longest = std::max(longest, call.segments[3 * i + 1]);
        }
        if (!joined) threads = std::min(threads, total);
    }
    int64_t vectors(int64_t segment) const { return (call.segments[3 * segment] + 15) / 16; }
    // Of each head; none where there are no keys.
    int64_t parts(int64_t segment) const {
        return call.segments[3 * segment + 1] ? (vectors(segment) + most - 1) / most : 0;
    }

    Task at(int64_t number) const {
        Task task = {};
        int64_t i = 0;
        for (; number >= parts(i) * call.heads; i++) {
            number -= parts(i) * call.heads;
            task.query += call.segments[3 * i];
            task.key += call.segments[3 * i + 1];
        }
        task.queries = call.segments[3 * i], task.keys = call.segments[3 * i + 1];
        const int64_t times = call.segments[3 * i + 2];
        task.last = times > 1 ? float(std::log2(double(times)) / call.scale) : 0;
        task.head = number / parts(i);
        task.from = number % parts(i) * most;
        task.to = std::min(vectors(i), task.from + most);
        return task;
    }
};

template <class Kind>
bool compute(const Call& call, const Tasks& tasks) {
    std::atomic<bool> failed{false};
    auto work = [&] {
        Scratch<Kind> scratch;
        if (!scratch.allocate(call, tasks.longest)) failed = true;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks.total; i++)
            if (!failed) scratch.run(call, tasks.at(i));
    };
    if (joined) {
        work();
    } else {
#pragma omp parallel num_threads(int(tasks.threads))
        work();
    }
    return !failed;
}

}  // namespace

template <class Kind>
static void run(Call* call) {
    const Tasks tasks(*call);
    if (tasks.total && !compute<Kind>(*call, tasks)) call->status = 1;  // of several threads any
}

EXPORT void packed_attention_f32(Call* call) { run<Float>(call); }
#ifdef __AVX512BF16__
EXPORT void packed_attention_bf16(Call* call) { run<Bfloat16>(call); }
#else
EXPORT void packed_attention_bf16(Call* call) { call->status = 2; }
#endif

#else
EXPORT void packed_attention_f32(Call* call) { call->status = 2; }
EXPORT void packed_attention_bf16(Call* call) { call->status = 2; }
#endif
REPLAYED(packed_attention_f32)
REPLAYED(packed_attention_bf16)
