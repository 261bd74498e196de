#include "llama-rope-state.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

// no memory begins with such a number of streams or cells
static const uint32_t LLAMA_ROPE_STATE_MAGIC   = 0x706f726c; // 'lrop'
static const uint32_t LLAMA_ROPE_STATE_VERSION = 1;

// the ramp of YaRN
struct llama_rope_state_yarn {
    uint32_t n_ctx_orig;
    float    beta_fast;
    float    beta_slow;

    explicit llama_rope_state_yarn(const llama_cparams & cparams) :
        n_ctx_orig(cparams.n_ctx_orig_yarn), beta_fast(cparams.yarn_beta_fast), beta_slow(cparams.yarn_beta_slow) {}

    bool operator==(const llama_rope_state_yarn & other) const {
        return n_ctx_orig == other.n_ctx_orig && beta_fast == other.beta_fast && beta_slow == other.beta_slow;
    }
};

void llama_rope_state_write(const llama_context & ctx, llama_io_write_i & io) {
    const auto & cparams = ctx.get_cparams();
    const auto & factors = cparams.rope_layer_factors;

    if (!factors && cparams.rope_dynamic.level == 0) {
        return;
    }

    const auto     params    = llama_rope_params_get(cparams);
    const auto     yarn      = llama_rope_state_yarn(cparams);
    const uint32_t n_factors = factors ? factors->size() : 0;

    io.write(&LLAMA_ROPE_STATE_MAGIC,   sizeof(LLAMA_ROPE_STATE_MAGIC));
    io.write(&LLAMA_ROPE_STATE_VERSION, sizeof(LLAMA_ROPE_STATE_VERSION));
    io.write(&params,                   sizeof(params));
    io.write(&yarn,                     sizeof(yarn));
    io.write(&n_factors,                sizeof(n_factors));
    if (factors) {
        io.write(factors->data(), n_factors*sizeof(float));
    }
}

static void llama_rope_state_adopt(
        llama_context & ctx, const llama_rope_params & params, const llama_rope_state_yarn & yarn, const std::vector<float> & factors) {
    const auto & cparams = ctx.get_cparams();

    const std::vector<float> ones(factors.size(), 1.0f);
    const std::vector<float> own = cparams.rope_layer_factors ? *cparams.rope_layer_factors : ones;

    if (own.size() != factors.size() && !factors.empty()) {
        throw std::runtime_error(format("the state has RoPE factors for %zu layers, the model has %zu", factors.size(), own.size()));
    }

    for (size_t il = 0; il < own.size(); ++il) {
        const float factor = factors.empty() ? 1.0f : factors[il];
        if (factor != own[il]) {
            throw std::runtime_error(format("the keys of the state were rotated with a RoPE factor of %g in layer %zu, those of this context with %g",
                        factor, il, own[il]));
        }
    }

    const auto levels = llama_rope_params_all(cparams);
    const auto it     = std::find(levels.begin(), levels.end(), params);

    if (it == levels.end() || (params.ext_factor != 0.0f && !(yarn == llama_rope_state_yarn(cparams)))) {
        throw std::runtime_error(format("the keys of the state were rotated with another RoPE scaling (freq_base = %g, freq_scale = %g) "
                    "than this context has", params.freq_base, params.freq_scale));
    }

    if (cparams.rope_dynamic.enabled) {
        const int32_t level = it - levels.begin();

        // shifts belong to the level at which they were asked for
        if (level != cparams.rope_dynamic.level) {
            ctx.memory_update(false);
        }
        if (!ctx.rope_dynamic_set(level)) {
            throw std::runtime_error("the keys in the memory cannot be brought to the RoPE scaling of the state");
        }
    }
}

llama_io_peek::llama_io_peek(llama_io_read_i & io) : io(io) {
    try {
        io.read(head, sizeof(head));
        n_head = sizeof(head);
    } catch (const std::exception &) {
        // an empty state
    }
}

bool llama_io_peek::take(uint32_t magic) {
    if (n_head < sizeof(magic) || memcmp(head, &magic, sizeof(magic)) != 0) {
        return false;
    }
    n_head = 0;
    return true;
}

void llama_io_peek::read(void * dst, size_t size) {
    const size_t n = std::min(size, n_head);

    memcpy(dst, head, n);
    memmove(head, head + n, n_head - n);
    n_head -= n;

    if (size > n) {
        io.read((char *) dst + n, size - n);
    }
}

void llama_io_peek::read_tensor(ggml_tensor * tensor, size_t offset, size_t size) {
    io.read_tensor(tensor, offset, size);
}

void llama_io_peek::discard() {
    io.discard();
}

size_t llama_io_peek::n_bytes() {
    return io.n_bytes() - n_head;
}

llama_rope_state_reader::llama_rope_state_reader(llama_context & ctx, llama_io_read_i & io) : llama_io_peek(io) {
    const auto & cparams = ctx.get_cparams();

    llama_rope_state_yarn yarn(cparams);
    llama_rope_params     params = cparams.rope_dynamic.enabled ? cparams.rope_dynamic.params(0) : llama_rope_params_get(cparams);
    std::vector<float>    factors;

    if (is_empty()) {
        return;
    }

    if (take(LLAMA_ROPE_STATE_MAGIC)) {
        uint32_t version;
        read(&version, sizeof(version));
        if (version != LLAMA_ROPE_STATE_VERSION) {
            throw std::runtime_error(format("unknown version %u of the RoPE mark in the state", version));
        }

        read(&params, sizeof(params));
        read(&yarn,   sizeof(yarn));

        uint32_t n_factors;
        read(&n_factors, sizeof(n_factors));
        if (n_factors != 0 && n_factors != ctx.get_model().layers.size()) {
            throw std::runtime_error(format("the state has RoPE factors for %u layers, the model has %zu", n_factors, ctx.get_model().layers.size()));
        }
        factors.resize(n_factors);
        read(factors.data(), n_factors*sizeof(float));
    }

    llama_rope_state_adopt(ctx, params, yarn, factors);
}
