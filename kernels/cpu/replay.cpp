// Many calls in one: see kernels/replay.py. Threads stay together from the first to the last.
#include "replay.hpp"

// `Call` of kernels/replay.py.
struct Recorded {
    void (*function)(const Slot*);
    const Slot* slots;
};

EXPORT void replay(const Recorded* calls, int64_t count) {
    auto work = [&](Team team) {
        joined = &team;
        for (int64_t i = 0; i < count; i++) {
            calls[i].function(calls[i].slots);
#ifdef _OPENMP
#pragma omp barrier
#endif
        }
        joined = nullptr;
    };
    together(work);
}
