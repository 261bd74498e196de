#include "llama-context.h"

#include <algorithm>

void llama_get_memory_size(llama_context * ctx, size_t * sizes) {
    ctx->sched_reserve(); // only if something has changed since

    std::fill_n(sizes, 4, 0);

    for (const auto & [buft, size] : ctx->memory_breakdown()) {
        sizes[ggml_backend_buft_is_host(buft) ? 0 : 1] += size.model;

        sizes[2] += size.context;
        sizes[3] += size.compute;
    }
}
