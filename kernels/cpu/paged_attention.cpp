// Attention of new tokens over pages: see kernels/paged_attention.py.
#include "paged.hpp"

using namespace decoding;

#define PAGED_ATTENTION(NAME, T)                                                                                       \
    EXPORT void NAME(                                                                                                  \
        T* cache, const T* q, T* out, const Span* spans, const int32_t* pages, int64_t span_count, int64_t q_stride,   \
        int64_t heads, int64_t page_count, int64_t kv_heads, int64_t size, int64_t dim, float scale) {                 \
        Pool<T> pool{cache, page_count, kv_heads, size, dim};                                                          \
        Attend<T> attend{pool, pages, spans, span_count, q, q_stride, out, heads, scale};                              \
        int64_t taken = 0;                                                                                             \
        together([&](Team) { attend.work(&taken); });                                                                  \
    }

PAGED_ATTENTION(paged_attention_f32, float)
PAGED_ATTENTION(paged_attention_bf16, bf16)
