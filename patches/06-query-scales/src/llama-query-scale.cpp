#include "llama-query-scale.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

static const float LLAMA_QUERY_SCALE_MIN = 1.0f/16.0f;
static const float LLAMA_QUERY_SCALE_MAX = 16.0f;

// no memory begins with such a number of streams or cells
static const uint32_t LLAMA_QUERY_SCALES_STATE_MAGIC = 0x6363716c; // 'lqcc'

// the heads of the layers of the file
static size_t llama_query_scales_count(const llama_hparams & hparams) {
    size_t n = 0;
    for (uint32_t il = 0; il < hparams.n_rope_layer_factors; ++il) {
        n += hparams.n_head(il);
    }
    return n;
}

// throws if the scales do not fit the model
static void llama_query_scales_check(const char * name, const float * scales, size_t n, const llama_hparams & hparams) {
    const size_t n_head = llama_query_scales_count(hparams);
    if (n != n_head) {
        throw std::runtime_error(format("%s has %zu query scales, but the model has %zu heads in all layers", name, n, n_head));
    }

    for (uint32_t il = 0; il < hparams.n_rope_layer_factors; ++il) {
        for (uint32_t h = 0; h < hparams.n_head(il); ++h, ++scales) {
            // note: NaN compares false
            if (!(*scales >= LLAMA_QUERY_SCALE_MIN && *scales <= LLAMA_QUERY_SCALE_MAX)) {
                throw std::runtime_error(format("%s has a bad query scale for head %u of layer %u: %g (must be a number from %g to %g)",
                            name, h, il, *scales, LLAMA_QUERY_SCALE_MIN, LLAMA_QUERY_SCALE_MAX));
            }
        }
    }
}

void llama_query_scales_load(llama_model_loader & ml, llama_model & model) {
    const std::string key = ml.llm_kv(LLM_KV_ATTENTION_QUERY_SCALES);

    const int64_t kid = gguf_find_key(ml.metadata, key.c_str());
    if (kid < 0) {
        return;
    }

    if (gguf_get_kv_type(ml.metadata, kid) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ml.metadata, kid) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error(format("key %s must be an array of float32", key.c_str()));
    }

    const size_t  n    = gguf_get_arr_n(ml.metadata, kid);
    const float * data = (const float *) gguf_get_arr_data(ml.metadata, kid);

    llama_query_scales_check(("key " + key).c_str(), data, n, model.hparams);

    model.query_scales.assign(data, data + n);
}

// throws if there is attention that build_attn_mha() does not compute, or that belongs to two layers of one number
static void llama_query_scales_check_arch(const llama_model & model) {
    // by name, older versions do not have them all
    for (const char * arch : { "minimax-m3", "glm5-next", "wavtokenizer-dec" }) {
        if (strcmp(llm_arch_name(model.arch), arch) == 0) {
            throw std::runtime_error(format("%s computes attention in a way of its own, so it cannot use query scales", arch));
        }
    }
    if (model.arch == LLM_ARCH_T5) {
        throw std::runtime_error("this model has an encoder and a decoder with layers of the same numbers, so it cannot use query scales");
    }
    if (llm_arch_is_recurrent(model.arch)) {
        throw std::runtime_error("this model has no attention, so it cannot use query scales");
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("query scales cannot be used with split mode tensor");
    }
}

llama_query_scales_ptr llama_query_scales_init(const llama_model & model, const float * scales) {
    const auto & hparams = model.hparams;

    const uint32_t n_layer = hparams.n_rope_layer_factors;

    auto result = std::make_shared<llama_query_scales>();

    auto & data = result->data;
    if (scales != nullptr) {
        data.assign(scales, scales + llama_query_scales_count(hparams));
    } else {
        data = model.query_scales;
    }
    if (std::count(data.begin(), data.end(), 1.0f) == (ptrdiff_t) data.size()) {
        return nullptr;
    }

    llama_query_scales_check_arch(model);

    // the layers of the file, and a context for each type of buffer
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;
    size_t first = 0;
    for (uint32_t il = 0; il < n_layer; first += hparams.n_head(il++)) {
        const auto begin = data.begin() + first;
        result->tensors.push_back(nullptr);
        if (std::count(begin, begin + hparams.n_head(il), 1.0f) == hparams.n_head(il)) {
            continue;
        }

        ggml_context *& ctx = ctx_map[model.select_buft(il)];
        if (ctx == nullptr) {
            ctx = ggml_init({ n_layer*ggml_tensor_overhead(), nullptr, true });
            result->ctxs.emplace_back(ctx);
        }
        result->tensors[il] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hparams.n_embd_head_k(il), hparams.n_head(il));
        ggml_format_name(result->tensors[il], "query_scales-%u", il);
    }

    for (const auto & it : ctx_map) {
        result->bufs.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(it.second, it.first));
        if (!result->bufs.back()) {
            throw std::runtime_error("failed to allocate the query scales");
        }
    }

    const float * head = data.data();
    for (uint32_t il = 0; il < n_layer; head += hparams.n_head(il++)) {
        if (ggml_tensor * t = result->tensors[il]) {
            std::vector<float> rows;
            for (int64_t h = 0; h < t->ne[1]; ++h) {
                rows.insert(rows.end(), t->ne[0], head[h]);
            }
            ggml_backend_tensor_set(t, rows.data(), 0, ggml_nbytes(t));
        }
    }

    // some architectures run the layers of the file several times; graniteswitch appends one of its own
    for (uint32_t il = n_layer; il < hparams.n_layer_all && strcmp(llm_arch_name(model.arch), "graniteswitch") != 0; ++il) {
        result->tensors.push_back(result->tensors[il % n_layer]);
    }

    return result;
}

ggml_tensor * llama_query_scales_apply(const llama_query_scales_ptr & scales, ggml_context * ctx, ggml_tensor * q, int il) {
    ggml_tensor * t = scales && il < (int) scales->tensors.size() ? scales->tensors[il] : nullptr;
    if (t == nullptr) {
        return q;
    }

    GGML_ASSERT(q->ne[1] == t->ne[1]);

    // whole rows are what backends multiply fastest; heads of another width (MLA) take one column
    return ggml_format_name(ggml_mul(ctx, q, q->ne[0] == t->ne[0] ? t : ggml_view_2d(ctx, t, 1, t->ne[1], t->nb[1], 0)), "q_scaled-%d", il);
}

//
// saved states
//

void llama_query_scales_state_write(const llama_context & ctx, llama_io_write_i & io) {
    const auto & scales = ctx.get_cparams().query_scales;
    if (!scales) {
        return;
    }

    const uint32_t n = scales->data.size();

    io.write(&LLAMA_QUERY_SCALES_STATE_MAGIC, sizeof(LLAMA_QUERY_SCALES_STATE_MAGIC));
    io.write(&n,                              sizeof(n));
    io.write(scales->data.data(),             n*sizeof(float));
}

llama_query_scales_state_reader::llama_query_scales_state_reader(const llama_context & ctx, llama_io_read_i & io) : llama_io_peek(io) {
    const auto & hparams = ctx.get_model().hparams;
    const auto & scales  = ctx.get_cparams().query_scales;

    if (is_empty()) {
        return;
    }

    std::vector<float> saved(llama_query_scales_count(hparams), 1.0f);
    if (take(LLAMA_QUERY_SCALES_STATE_MAGIC)) {
        uint32_t n;
        read(&n, sizeof(n));
        if (n != saved.size()) {
            throw std::runtime_error(format("the state has query scales for %u heads, the model has %zu", n, saved.size()));
        }
        read(saved.data(), n*sizeof(float));
    }

    size_t i = 0;
    for (uint32_t il = 0; il < hparams.n_rope_layer_factors; ++il) {
        for (uint32_t h = 0; h < hparams.n_head(il); ++h, ++i) {
            const float own = scales ? scales->data[i] : 1.0f;
            if (saved[i] != own) {
                throw std::runtime_error(format("the state was computed with a query scale of %g for head %u of layer %u, this context has %g",
                            saved[i], h, il, own));
            }
        }
    }
}

//
// interface implementation
//

int32_t llama_context::set_query_scales(const float * scales, size_t n) {
    // what is cached depends on the scales
    for (uint32_t s = 0; memory && s < cparams.n_seq_max; ++s) {
        if (memory->seq_pos_max(s) >= 0) {
            LLAMA_LOG_ERROR("%s: the memory is not empty\n", __func__);
            return -3;
        }
    }

    try {
        if (scales != nullptr) {
            llama_query_scales_check("the list", scales, n, model.hparams);
        }
        cparams.query_scales = llama_query_scales_init(model, scales);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return scales != nullptr && n != llama_query_scales_count(model.hparams) ? -1 : -2;
    }

    sched_need_reserve = true;

    return 0;
}

int32_t llama_set_query_scales(llama_context * ctx, const float * scales, size_t n) {
    return ctx->set_query_scales(scales, n);
}

int32_t llama_get_query_scales(const llama_context * ctx, float * out, size_t n) {
    const auto & scales = ctx->get_cparams().query_scales;

    const size_t n_head = llama_query_scales_count(ctx->get_model().hparams);

    if (n >= n_head && scales) {
        std::copy(scales->data.begin(), scales->data.end(), out);
    } else if (n >= n_head) {
        std::fill_n(out, n_head, 1.0f);
    }

    return (int32_t) n_head;
}

bool llama_model_query_scales(const llama_model * model, float * out, size_t n) {
    if (model->query_scales.empty() || n != model->query_scales.size()) {
        return false;
    }

    std::copy(model->query_scales.begin(), model->query_scales.end(), out);

    return true;
}

int32_t llama_model_n_head_layer(const llama_model * model, int32_t il) {
    const auto & hparams = model->hparams;

    return il >= 0 && il < (int32_t) hparams.n_rope_layer_factors ? hparams.n_head(il) : 0;
}
