#include "llama-rope-layer.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

// largest gain of the YaRN ramp, bounds the cancellation when s is close to freq_scale
static const float LLAMA_ROPE_LAYER_EXT_GAIN_MAX = 32.0f;

llama_rope_params llama_rope_params_get(const llama_cparams & cparams) {
    return { cparams.rope_freq_base, cparams.rope_freq_scale, cparams.yarn_ext_factor, cparams.yarn_attn_factor };
}

std::vector<llama_rope_params> llama_rope_params_all(const llama_cparams & cparams) {
    return cparams.rope_levels.empty() ? std::vector<llama_rope_params>{ llama_rope_params_get(cparams) } : cparams.rope_levels;
}

// throws if the factors do not fit the model
static void llama_rope_layer_check(const char * name, const float * factors, size_t n, size_t n_layer) {
    if (n != n_layer) {
        throw std::runtime_error(format("%s has %zu factors, but the model has %zu layers", name, n, n_layer));
    }

    for (size_t i = 0; i < n; ++i) {
        // note: NaN compares false
        if (!(factors[i] >= LLAMA_ROPE_LAYER_FACTOR_MIN && factors[i] <= LLAMA_ROPE_LAYER_FACTOR_MAX)) {
            throw std::runtime_error(format("%s has a bad factor for layer %zu: %g (must be a number from %g to %g)",
                        name, i, factors[i], LLAMA_ROPE_LAYER_FACTOR_MIN, LLAMA_ROPE_LAYER_FACTOR_MAX));
        }
    }
}

void llama_rope_layer_load(llama_model_loader & ml, llama_hparams & hparams) {
    ml.get_key(LLM_KV_BLOCK_COUNT, hparams.n_rope_layer_factors, false);

    const std::string key = ml.llm_kv(LLM_KV_ROPE_SCALING_LAYER_FACTORS);

    const int64_t kid = gguf_find_key(ml.metadata, key.c_str());
    if (kid < 0) {
        return;
    }

    if (gguf_get_kv_type(ml.metadata, kid) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ml.metadata, kid) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error(format("key %s must be an array of float32", key.c_str()));
    }

    const size_t  n    = gguf_get_arr_n(ml.metadata, kid);
    const float * data = (const float *) gguf_get_arr_data(ml.metadata, kid);

    llama_rope_layer_check(("key " + key).c_str(), data, n, hparams.n_rope_layer_factors);

    std::copy(data, data + n, hparams.rope_layer_factors.begin());

    hparams.has_rope_layer_factors = true;
}

std::vector<float> llama_rope_layer_expand(const llama_model & model, const float * factors) {
    const auto & hparams = model.hparams;

    const uint32_t n = hparams.n_rope_layer_factors;
    if (n == 0 || (factors == nullptr && !hparams.has_rope_layer_factors)) {
        return {};
    }

    factors = factors ? factors : hparams.rope_layer_factors.data();

    std::vector<float> result(factors, factors + n);

    // some architectures run the layers of the file several times
    for (size_t il = n; il < model.layers.size(); ++il) {
        result.push_back(factors[il % n]);
    }

    return result;
}

bool llama_rope_layer_has_rope(const llama_model & model) {
    if (model.arch == LLM_ARCH_BERT || model.arch == LLM_ARCH_STARCODER) {
        return false; // learned positions
    }

    // these use the key as a switch - by name, older versions do not have them all
    for (const char * arch : { "granite", "granitehybrid", "graniteswitch" }) {
        if (strcmp(llm_arch_name(model.arch), arch) == 0) {
            return model.hparams.rope_finetuned;
        }
    }

    return model.hparams.rope_type != LLAMA_ROPE_TYPE_NONE && !model.hparams.use_alibi;
}

// the factor of the layer whose keys a layer without keys attends to, see llama_model::create_memory()
static float llama_rope_layer_shared(const std::vector<float> & factors, int64_t n_layer_kv, bool is_swa) {
    const int64_t il = n_layer_kv - (is_swa ? 2 : 1);
    if (il < 0 || il >= (int64_t) factors.size()) {
        throw std::runtime_error("RoPE factors cannot be used: there is no layer to share keys with");
    }

    return factors[il];
}

llama_rope_layer_factors llama_rope_layer_init(const llama_model & model, const llama_cparams & cparams, const float * factors) {
    const auto & hparams = model.hparams;

    std::vector<float> result;

    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT) {
        // this model attends to keys that its target has rotated
        if (factors != nullptr) {
            throw std::runtime_error("this model uses the RoPE factors of its target");
        }

        if (hparams.has_rope_layer_factors) {
            LLAMA_LOG_WARN("%s: ignoring the RoPE factors of this model, it uses those of its target\n", __func__);
        }

        const auto & other = cparams.ctx_other->get_cparams().rope_layer_factors;

        for (uint32_t il = 0; other && il < model.layers.size(); ++il) {
            result.push_back(llama_rope_layer_shared(*other, llama_model_n_layer(llama_get_model(cparams.ctx_other)), hparams.is_swa(il)));
        }
    } else {
        const auto all = llama_rope_layer_expand(model, factors);

        for (uint32_t il = 0; il < all.size(); ++il) {
            result.push_back(hparams.has_kv(il) ? all[il] : llama_rope_layer_shared(all, hparams.n_layer_kv_from_start, hparams.is_swa(il)));
        }
    }

    if (std::count(result.begin(), result.end(), 1.0f) == (ptrdiff_t) result.size()) {
        return nullptr;
    }

    if (!llama_rope_layer_has_rope(model)) {
        throw std::runtime_error("this model has no RoPE, so it cannot use RoPE factors");
    }

    for (const auto & params : llama_rope_params_all(cparams)) {
        for (uint32_t il = 0; params.ext_factor != 0.0f && il < model.layers.size(); ++il) {
            const float s = result[il];

            // note: layers with a sliding window use either one, depending on the architecture
            for (const float fs : { params.freq_scale, hparams.is_swa(il) ? hparams.rope_freq_scale_train_swa : params.freq_scale }) {
                if (s != 1.0f && (std::fabs(1.0f - fs) > LLAMA_ROPE_LAYER_EXT_GAIN_MAX*std::fabs(s - fs) || 1.0f + 0.1f*logf(s/fs) <= 0.0f)) {
                    throw std::runtime_error(format("RoPE factor %g of layer %u is too close to the YaRN frequency scale of %g", s, il, fs));
                }
            }
        }
    }

    return std::make_shared<std::vector<float>>(std::move(result));
}

// rope_yarn() computes, for the angle te = p*base^(-2i/d)/ff of a dimension and its ramp r
//
//   theta  = te*(freq_scale*(1 - r*ext_factor) + r*ext_factor)
//   mscale = attn_factor*(1 + 0.1*ln(1/freq_scale))    if ext_factor != 0, else attn_factor
//
// solving for the parameters that give theta(p/s) and an unchanged mscale:
//
//   freq_scale'  = freq_scale/s
//   ext_factor'  = ext_factor*(1 - freq_scale)/(s - freq_scale)
//   attn_factor' = attn_factor*(1 + 0.1*ln(1/freq_scale))/(1 + 0.1*ln(s/freq_scale))
//
// without YaRN only the first one remains
void llama_rope_layer_fold(float s, float & freq_scale, float & ext_factor, float & attn_factor) {
    if (s == 1.0f) {
        return;
    }

    if (ext_factor != 0.0f) {
        const double fs = freq_scale;

        ext_factor   = (float) (ext_factor*(1.0 - fs)/(s - fs));
        attn_factor *= (float) (1.0 + 0.1*std::log(1.0/fs));

        if (ext_factor != 0.0f) {
            attn_factor /= (float) (1.0 + 0.1*std::log(s/fs));
        }
    }

    freq_scale /= s;
}

void llama_rope_layer_apply(const llama_cparams & cparams, int il, float & freq_scale, float & ext_factor, float & attn_factor) {
    if (cparams.rope_layer_factors) {
        llama_rope_layer_fold(cparams.rope_layer_factors->at(il), freq_scale, ext_factor, attn_factor);
    }
}

void llm_graph_rope::rope_layer_apply(float & freq_scale, float & ext_factor, float & attn_factor) const {
    llama_rope_layer_apply(static_cast<const llm_graph_context *>(this)->cparams, il_rope, freq_scale, ext_factor, attn_factor);
}

//
// interface implementation
//

int32_t llama_context::set_rope_layer_factors(const float * factors, size_t n) {
    const size_t n_layer = model.hparams.n_rope_layer_factors;

    // the keys in the memory have already been rotated
    for (uint32_t s = 0; memory && s < cparams.n_seq_max; ++s) {
        if (memory->seq_pos_max(s) >= 0) {
            LLAMA_LOG_ERROR("%s: the memory is not empty\n", __func__);
            return -3;
        }
    }

    try {
        if (factors != nullptr) {
            llama_rope_layer_check("the list", factors, n, n_layer);
        }
        cparams.rope_layer_factors = llama_rope_layer_init(model, cparams, factors);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return factors != nullptr && n != n_layer ? -1 : -2;
    }

    return 0;
}

// the parameters of the rotations of a graph
static std::vector<int32_t> llama_rope_layer_ops(ggml_cgraph * gf) {
    std::vector<int32_t> result;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_ROPE || node->op == GGML_OP_ROPE_BACK) {
            result.insert(result.end(), std::begin(node->op_params), std::end(node->op_params));
        }
    }
    return result;
}

// a layer counts if its factor changes the graph
int32_t llama_context::rope_layers(uint32_t n_tokens, bool * out, size_t n) {
    const auto & hparams = model.hparams;

    const size_t n_layer = hparams.n_rope_layer_factors;
    if (n < n_layer) {
        return (int32_t) n_layer;
    }

    const auto active = cparams.rope_layer_factors;
    const auto mctx   = memory ? memory->init_full() : nullptr;

    const auto ops_with = [&](llama_rope_layer_factors factors) {
        cparams.rope_layer_factors = std::move(factors);
        return llama_rope_layer_ops(graph_reserve(cparams.n_seq_max, cparams.n_seq_max, cparams.n_seq_max, mctx.get(), true));
    };

    // its windowed layers attend to compressed keys of the whole context too - by name, older versions do not have it
    const bool has_windows = hparams.swa_type != LLAMA_SWA_TYPE_NONE && strcmp(llm_arch_name(model.arch), "deepseek4") != 0;

    try {
        const auto stock = ops_with(nullptr);

        std::vector<float> factors(n_layer, 1.0f);
        for (size_t il = 0; il < n_layer; ++il) {
            const bool is_short = has_windows && hparams.is_swa(il) && hparams.n_swa < n_tokens;

            factors[il] = 2.0f;
            out[il] = !is_short && ops_with(llama_rope_layer_init(model, cparams, factors.data())) != stock;
            factors[il] = 1.0f;
        }
    } catch (const std::exception &) {
        std::fill_n(out, n_layer, false); // the model has no factors of its own
    }

    cparams.rope_layer_factors = active;

    return (int32_t) n_layer;
}

int32_t llama_rope_layers(llama_context * ctx, uint32_t n_tokens, bool * out, size_t n) {
    return ctx->rope_layers(n_tokens, out, n);
}

int32_t llama_set_rope_layer_factors(llama_context * ctx, const float * factors, size_t n) {
    return ctx->set_rope_layer_factors(factors, n);
}

int32_t llama_get_rope_layer_factors(const llama_context * ctx, float * out, size_t n) {
    const auto & factors = ctx->get_cparams().rope_layer_factors;

    const size_t n_layer = ctx->get_model().hparams.n_rope_layer_factors;

    for (size_t i = 0; i < n_layer && n >= n_layer; ++i) {
        out[i] = factors ? factors->at(i) : 1.0f;
    }

    return (int32_t) n_layer;
}

bool llama_model_rope_layer_factors(const llama_model * model, float * out, size_t n) {
    const auto & hparams = model->hparams;

    if (!hparams.has_rope_layer_factors || n != hparams.n_rope_layer_factors) {
        return false;
    }

    std::copy_n(hparams.rope_layer_factors.begin(), n, out);

    return true;
}
