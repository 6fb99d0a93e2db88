// Which functions can be replayed: see kernels/replay.py and replay.cpp. Their work is `share_rows` or `together`, and
// nothing that the threads of a team would do twice stands outside of it.
#pragma once

#include <type_traits>
#include <utility>

#include "common.hpp"

// One argument, as `_Slot` of kernels/replay.py has it.
union Slot {
    void* pointer;
    int64_t whole;
    double real;

    template <class A> A as() const {
        if constexpr (std::is_pointer_v<A>) return (A)pointer;
        else if constexpr (std::is_floating_point_v<A>) return (A)real;
        else return (A)whole;
    }
};

template <class... A, size_t... I>
inline void call_with(void (*function)(A...), const Slot* slots, std::index_sequence<I...>) {
    function(slots[I].as<A>()...);
}

template <class... A> inline void call_with(void (*function)(A...), const Slot* slots) {
    call_with(function, slots, std::index_sequence_for<A...>{});
}

#define REPLAYED(NAME)                                                                                                 \
    EXPORT void NAME##_slots(const Slot* slots) { call_with(NAME, slots); }
