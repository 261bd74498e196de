#include "llama-context.h"
#include <algorithm>

void llama_get_memory_size(llama_context * ctx, size_t * sizes) {
    ctx->sched_reserve(); // only if something has changed since

    std::fill_n(sizes, 4, 0);

    for (const auto & [buft, size] : ctx->memory_breakdown()) {
        sizes[buft == ggml_backend_cpu_buffer_type() ? 0 : 1] += size.model;

        sizes[2] += size.context;
        sizes[3] += size.compute;
    }
}
