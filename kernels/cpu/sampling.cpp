// Tokens out of logits: see kernels/sampling.py. A row belongs to one thread, so what is chosen for it does not depend on
// the others.
#include <algorithm>

#include "words.hpp"

using namespace decoding;

constexpr int64_t CHUNK = 128;  // weights whose sum is held in float32; sums of these are float64

// One row's wishes.
struct Wish {
    float temperature, min_p;
    int32_t top_k;  // 0: all
    double top_p, uniform;
};

// weights[i] = e^((logits[i] - largest) / temperature), zeros behind the end. `padded` is a multiple of CHUNK.
static void soften(const float* logits, float* weights, int64_t count, int64_t padded, float temperature) {
    int64_t whole = count / WIDTH * WIDTH;
    f32x16 most = fill(-INFINITY);
    for (int64_t i = 0; i < whole; i += WIDTH) {
        f32x16 v = load(logits + i);
        most = v > most ? v : most;
    }
    float top = -INFINITY;
    for (int j = 0; j < WIDTH; j++) top = most[j] > top ? most[j] : top;
    for (int64_t i = whole; i < count; i++) top = logits[i] > top ? logits[i] : top;
    for (int64_t i = 0; i < whole; i += WIDTH) store(weights + i, exp16((load(logits + i) - top) / temperature));
    memset(weights + whole, 0, (padded - whole) * sizeof(float));
    if (whole < count) {
        f32x16 rest = exp16((load_some(logits + whole, count - whole) - top) / temperature);
        store_some(weights + whole, rest, count - whole);
    }
}

static float chunk_sum(const float* weights) {
    f32x16 found{};
    for (int64_t i = 0; i < CHUNK; i += WIDTH) found += load(weights + i);
    return sum(found);
}

static double sum_of(const float* weights, int64_t padded) {
    double total = 0;
    for (int64_t i = 0; i < padded; i += CHUNK) total += chunk_sum(weights + i);
    return total;
}

// What a weight must reach. The largest ones are sorted: those above a floor, which falls until they are enough.
static float limit(const float* weights, float* sorted, int64_t count, int64_t padded, const Wish& wish) {
    int64_t k = wish.top_k > 0 && wish.top_k < count ? wish.top_k : 0;
    if (k == 0 && wish.top_p >= 1.0) return wish.min_p;
    double total = sum_of(weights, padded), held = 0;
    int64_t found = 0;
    for (float floor : {0.02f, 1e-4f, 1e-7f, 0.0f}) {
        found = 0, held = 0;
        for (int64_t i = 0; i < count; i++) {
            sorted[found] = weights[i];
            found += weights[i] >= floor;
        }
        for (int64_t i = 0; i < found; i++) held += sorted[i];
        if (k ? found >= k : held >= wish.top_p * total) break;
    }
    std::sort(sorted, sorted + found, [](float a, float b) { return a > b; });
    float least = k ? sorted[k - 1] : 0.0f;
    if (wish.top_p < 1.0) {
        if (k) {  // of what top-k leaves, those as likely as the last one included
            total = 0;
            for (int64_t i = 0; i < found && sorted[i] >= least; i++) total += sorted[i];
        }
        double passed = 0;
        int64_t last = 0;
        while (last < found && (passed += sorted[last]) < wish.top_p * total) last++;
        float at = sorted[last < found ? last : found - 1];
        least = at > least ? at : least;
    }
    return least > wish.min_p ? least : wish.min_p;
}

// The token at which the running sum of weights passes `uniform` of the whole.
static int64_t pick(float* weights, int64_t padded, float least, double uniform) {
    for (int64_t i = 0; i < padded; i += WIDTH) {
        f32x16 v = load(weights + i);
        store(weights + i, v < least ? f32x16{} : v);
    }
    const double below = 1 - 0x1p-50;  // sums over chunks and within one may differ in their last bits
    double total = sum_of(weights, padded), target = std::min(uniform * total, total * below), passed = 0;
    int64_t first = 0;
    for (; first + CHUNK < padded; first += CHUNK) {
        double next = passed + chunk_sum(weights + first);
        if (next > target) break;
        passed = next;
    }
    double inside = 0;
    for (int64_t i = 0; i < CHUNK; i++) inside += weights[first + i];
    target = std::min(target - passed, inside * below), passed = 0;
    int64_t token = first;
    for (int64_t i = 0; i < CHUNK; i++)
        if ((passed += weights[first + i]) > target) return first + i;
    return token;
}

// logits [rows, count]; `memory` [threads, 2, padded]: no more threads than it has room for.
EXPORT void sampling_f32(
    const float* logits, const float* temperature, const int32_t* top_k, const double* top_p, const float* min_p,
    const double* uniform, int64_t* ids, float* memory, int64_t threads, int64_t rows, int64_t count, int64_t padded) {
    together([&](Team team) {
        if (team.own >= threads) return;
        team.count = std::min(team.count, threads);
        float *weights = memory + team.own * 2 * padded, *sorted = weights + padded;
        for (int64_t row = team.first(rows); row < team.last(rows); row++) {
            Wish wish{temperature[row], min_p[row], top_k[row], top_p[row], uniform[row]};
            soften(logits + row * count, weights, count, padded, wish.temperature);
            ids[row] = pick(weights, padded, limit(weights, sorted, count, padded, wish), wish.uniform);
        }
    });
}

// The largest logit of each row and the first place that has it; NaN where one is no number.
EXPORT void best_logits_f32(const float* logits, float* values, int64_t* ids, int64_t rows, int64_t count) {
    together([&](Team team) {
        for (int64_t row = team.first(rows); row < team.last(rows); row++) {
            const float* from = logits + row * count;
            float top = -INFINITY, odd = 0;
            int64_t place = 0;  // of the first chunk that has the largest one, then of the number itself
            for (int64_t first = 0; first < count; first += CHUNK) {
                int64_t last = std::min(first + CHUNK, count), i = first;
                f32x16 most = fill(-INFINITY), broken{};
                for (; i + WIDTH <= last; i += WIDTH) {
                    f32x16 v = load(from + i);
                    most = v > most ? v : most;
                    broken += v != v ? v : f32x16{};
                }
                float here = -INFINITY;
                for (int j = 0; j < WIDTH; j++) here = most[j] > here ? most[j] : here;
                for (; i < last; i++) {
                    here = from[i] > here ? from[i] : here;
                    odd += from[i] != from[i] ? from[i] : 0;
                }
                odd += sum(broken);
                if (here > top) top = here, place = first;
            }
            while (place + 1 < count && from[place] != top) place++;
            values[row] = odd != odd ? odd : top, ids[row] = place;
        }
    });
}
