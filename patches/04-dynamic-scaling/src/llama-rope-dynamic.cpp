#include "llama-rope-dynamic.h"

#include "llama-arch.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

static const float LLAMA_ROPE_DYNAMIC_FACTOR_MAX = 1024.0f;

//
// levels
//

// n/n_train, n being the longest sequence of a level
static double llama_rope_ratio(const llama_rope_dynamic & dynamic, int32_t level) {
    return std::exp2((double) level/dynamic.n_per_octave);
}

int32_t llama_rope_dynamic::level_of(llama_pos pos) const {
    int32_t result = 0;
    while (pos + 1.0 > n_train*llama_rope_ratio(*this, result)) {
        result++;
    }
    return result;
}

llama_rope_params llama_rope_dynamic::params(int32_t level) const {
    if (level <= 0) {
        return stock;
    }

    llama_rope_params result = stock;

    const double ratio = llama_rope_ratio(*this, level);

    if (yarn) {
        const float f = factor > 1.0f ? std::min((float) ratio, factor) : (float) ratio;

        result.freq_scale  = 1.0f/f;
        result.ext_factor  = ext_factor;
        result.attn_factor = attn_factor;
    } else {
        result.freq_base = (float) (stock.freq_base*std::pow(factor*ratio - (factor - 1.0), n_rot/(n_rot - 2.0)));
    }

    return result;
}

void llama_rope_params_set(llama_cparams & cparams, const llama_rope_params & params) {
    cparams.rope_freq_base   = params.freq_base;
    cparams.rope_freq_scale  = params.freq_scale;
    cparams.yarn_ext_factor  = params.ext_factor;
    cparams.yarn_attn_factor = params.attn_factor;
}

void llama_rope_dynamic_shift(const llama_cparams & cparams, float freq_scale, float ext_factor, float & attn_factor) {
    if (cparams.rope_dynamic.enabled) {
        attn_factor = ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale)) : 1.0f;
    }
}

//
// set up
//

void llama_rope_dynamic_load(llama_model_loader & ml, llama_hparams & hparams) {
    float & factor = hparams.rope_dynamic_factor;
    if (!ml.get_key(LLM_KV_ROPE_SCALING_DYNAMIC_FACTOR, factor, false)) {
        return;
    }

    // note: NaN compares false
    if (!(factor >= 1.0f && factor <= LLAMA_ROPE_DYNAMIC_FACTOR_MAX)) {
        throw std::runtime_error(format("key %s is %g (must be from 1 to %g)",
                    ml.llm_kv(LLM_KV_ROPE_SCALING_DYNAMIC_FACTOR).c_str(), factor, LLAMA_ROPE_DYNAMIC_FACTOR_MAX));
    }

    // what the file has beside it is for libraries that know nothing of the key
    hparams.rope_freq_scale_train = 1.0f;
}

void llama_rope_dynamic_init(const llama_model & model, const llama_context_params & params, llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    const bool of_model = hparams.rope_dynamic_factor > 0.0f;

    // what the file would have said without the key, for a static type or for ours
    if (of_model && params.rope_freq_scale == 0.0f && params.rope_scaling_type != LLAMA_ROPE_SCALING_TYPE_NONE) {
        cparams.rope_freq_scale = 1.0f/hparams.rope_dynamic_factor;
    }

    auto type = params.rope_scaling_type;
    if (type == LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED && of_model) {
        type = hparams.rope_scaling_type_train == LLAMA_ROPE_SCALING_TYPE_YARN
            ? LLAMA_ROPE_SCALING_TYPE_DYNAMIC_YARN
            : LLAMA_ROPE_SCALING_TYPE_DYNAMIC;
    }

    if (type != LLAMA_ROPE_SCALING_TYPE_DYNAMIC && type != LLAMA_ROPE_SCALING_TYPE_DYNAMIC_YARN) {
        return;
    }

    auto & dynamic = cparams.rope_dynamic;

    dynamic.enabled = true;
    dynamic.yarn    = type == LLAMA_ROPE_SCALING_TYPE_DYNAMIC_YARN;
    dynamic.factor  = 1.0f/cparams.rope_freq_scale;
    dynamic.n_train = cparams.n_ctx_orig_yarn;
    dynamic.n_rot   = hparams.n_rot_full;

    const auto require = [](bool ok, const std::string & what) {
        if (!ok) {
            throw std::runtime_error("dynamic RoPE scaling: " + what);
        }
    };

    require(dynamic.factor >= 1.0f && dynamic.factor <= LLAMA_ROPE_DYNAMIC_FACTOR_MAX,
            format("the factor is %g (must be from 1 to %g, see --rope-scale)", dynamic.factor, LLAMA_ROPE_DYNAMIC_FACTOR_MAX));
    require(dynamic.n_train > 0, "the model does not say for which context it was trained (see --yarn-orig-ctx)");
    require(params.rope_freq_base == 0.0f, "it sets the frequency base itself (remove --rope-freq-base)");
    require(params.yarn_ext_factor < 0.0f && params.yarn_attn_factor < 0.0f,
            "it sets the YaRN factors itself (remove --yarn-ext-factor and --yarn-attn-factor)");
    require(hparams.rope_type != LLAMA_ROPE_TYPE_NONE && !hparams.use_alibi, "this model has no RoPE");
    require(hparams.n_pos_per_embd() == 1, "not for models with M-RoPE");
    require(dynamic.n_rot > 2, "too few dimensions are rotated");
    require(hparams.rope_yarn_log_mul == 0.0f || !dynamic.yarn,
            "not YaRN for models with a YaRN multiplier of their own (yarn_log_multiplier)");
    require(model.arch != LLM_ARCH_DEEPSEEK2OCR || dynamic.yarn,
            "not NTK for this architecture, which has a fixed frequency base");
    require(model.arch != LLM_ARCH_GEMMA4_ASSISTANT || !cparams.ctx_other->get_cparams().rope_dynamic.enabled,
            "not for this model, which uses the keys of another one");

    for (const auto & layer : model.layers) {
        require(layer.rope_long == nullptr && layer.rope_short == nullptr, "not for models with LongRoPE");
    }

    // every level rounds the keys of a quantized cache once more
    dynamic.n_per_octave = ggml_is_quantized(params.type_k) ? 1 : 2;
    dynamic.n_level      = dynamic.level_of(GGML_PAD(cparams.n_ctx, 256) - 1) + 1;

    // the tools allow no longer sequence, see llama_rope_n_ctx()
    dynamic.n_ctx = cparams.n_ctx;
    if (dynamic.yarn && dynamic.factor > 1.0f) {
        dynamic.n_ctx = std::min<uint32_t>(dynamic.n_ctx, dynamic.n_train*dynamic.factor);
    }

    dynamic.ext_factor  = hparams.yarn_ext_factor > 0.0f ? hparams.yarn_ext_factor : 1.0f;
    dynamic.attn_factor = hparams.rope_attn_factor;

    // level 0 is what a model without scaling has
    dynamic.stock = { cparams.rope_freq_base, 1.0f, 0.0f, hparams.yarn_attn_factor*hparams.rope_attn_factor };
    llama_rope_params_set(cparams, dynamic.stock);

    for (int32_t level = 0; level < dynamic.n_level; ++level) {
        cparams.rope_levels.push_back(dynamic.params(level));
    }

    if (dynamic.n_level > 1) {
        LLAMA_LOG_INFO("%s: RoPE is not scaled up to %u tokens, then by dynamic %s in %d levels\n", __func__,
                dynamic.n_train, dynamic.yarn ? "YaRN" : "NTK", dynamic.n_level - 1);
    }
}

//
// the rotations of a graph
//

// a rotation, same parameters as in ggml.c
struct llama_rope_op {
    int32_t n_dims;
    int32_t mode;
    int32_t n_ctx_orig;
    int32_t n_offs;

    float freq_base;
    float freq_scale;
    float ext_factor;
    float attn_factor;
    float beta_fast;
    float beta_slow;

    const ggml_tensor * factors;

    explicit llama_rope_op(const ggml_tensor * rope) : factors(rope->src[2]) {
        const int32_t * params = rope->op_params;

        n_dims     = params[1];
        mode       = params[2];
        n_ctx_orig = params[4];
        n_offs     = params[15];

        memcpy(&freq_base,   params +  5, sizeof(float));
        memcpy(&freq_scale,  params +  6, sizeof(float));
        memcpy(&ext_factor,  params +  7, sizeof(float));
        memcpy(&attn_factor, params +  8, sizeof(float));
        memcpy(&beta_fast,   params +  9, sizeof(float));
        memcpy(&beta_slow,   params + 10, sizeof(float));
    }

    // angles at position 1: all of rope_yarn() is linear in the position
    std::vector<double> freqs() const {
        std::vector<float> ff(n_dims/2, 1.0f);
        if (factors && factors->buffer) {
            ggml_backend_tensor_get(factors, ff.data(), 0, ff.size()*sizeof(float));
        }

        float corr_dims[2];
        ggml_rope_yarn_corr_dims(n_dims, n_ctx_orig, freq_base, beta_fast, beta_slow, corr_dims);

        const double theta_scale = powf(freq_base, -2.0f/n_dims);

        std::vector<double> result;
        for (int32_t i = 0; i < n_dims/2; ++i) {
            const double extrap = std::pow(theta_scale, i)/ff[i];
            const double y      = (i - corr_dims[0])/std::max(0.001f, corr_dims[1] - corr_dims[0]);
            const double ramp   = ext_factor != 0.0f ? ext_factor*(1.0 - std::min(1.0, std::max(0.0, y))) : 0.0;

            result.push_back(extrap*(freq_scale*(1.0 - ramp) + ramp));
        }
        return result;
    }

    double magnitude() const {
        return attn_factor*(ext_factor != 0.0f ? 1.0 + 0.1*std::log(1.0/freq_scale) : 1.0);
    }
};

// how a graph rotates the keys of a layer
struct llama_rope_key {
    const llama_kv_cache * kv;

    ggml_tensor * k; // [n_embd_k_gqa, kv_size, n_stream]

    int64_t  n_embd_head;
    uint32_t il;

    std::vector<llama_rope_op> ops = {}; // one, or none

    int64_t offset = 0;     // of the rotated part in a head
    bool    normed = false; // by a norm without weights, after the rotation: the magnitude is lost

    const char * unsupported = nullptr; // what happens to the key between the rotation and the cache
};

// the rotation among the operations that made a tensor - elementwise ones and views are followed, products with weights are not
static void llama_rope_key_find(llama_rope_key & key, const ggml_tensor * cur, int64_t offset, bool normed, const char * unsupported) {
    const auto follow = [&](const ggml_tensor * src, const char * reason) {
        llama_rope_key_find(key, src, offset, normed, unsupported ? unsupported : reason);
    };

    const ggml_tensor * src = cur->src[0];

    switch (cur->op) {
        case GGML_OP_ROPE:
            {
                if (!key.ops.empty()) {
                    unsupported = "is rotated twice";
                } else if (cur->op_params[2] & GGML_ROPE_TYPE_MROPE) {
                    unsupported = "is rotated by M-RoPE";
                } else if (cur->src[2] && cur->src[2]->op != GGML_OP_NONE) {
                    unsupported = "has computed frequency factors";
                }
                key.ops.emplace_back(cur);
                key.offset      = offset;
                key.normed      = normed;
                key.unsupported = key.unsupported ? key.unsupported : unsupported;
            } break;
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_REPEAT:
            {
                follow(src, cur->ne[0] == src->ne[0] ? nullptr : "is cut after its rotation");
            } break;
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            {
                follow(src, cur->ne[0] == src->ne[0] ? nullptr : "is transposed after its rotation");
            } break;
        case GGML_OP_CONCAT:
            {
                const bool in_head = cur->op_params[0] == 0;
                follow(src, nullptr);
                offset += in_head ? src->ne[0] : 0;
                follow(cur->src[1], nullptr);
            } break;
        case GGML_OP_SCALE:
            {
                follow(src, cur->op_params[1] == 0 ? nullptr : "is shifted after its rotation");
            } break;
        case GGML_OP_NORM:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_ADD:
        case GGML_OP_SUB:
            {
                follow(src, "is weighted after its rotation");
            } break;
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
            {
                normed = true;
                follow(src, nullptr);
            } break;
        case GGML_OP_MUL_MAT:
            {
                // the Hadamard rotation of quantized caches
                if (src->flags & GGML_TENSOR_FLAG_INPUT) {
                    follow(cur->src[1], nullptr);
                }
            } break;
        default:
            break;
    }
}

static std::vector<llama_rope_key> llama_rope_keys(ggml_cgraph * gf, const std::vector<const llama_kv_cache *> & caches) {
    std::vector<llama_rope_key> result;

    for (const auto * kv : caches) {
        for (const uint32_t il : kv->get_layer_ids()) {
            ggml_tensor * k = kv->get_k_storage(il);

            for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
                const ggml_tensor * node = ggml_graph_node(gf, i);

                if (node->op != GGML_OP_SET_ROWS || node->view_src != k) {
                    continue;
                }

                // without the view that merges the heads, see llama_kv_cache::cpy_k()
                const ggml_tensor * cur = node->src[0];
                if (cur->op == GGML_OP_VIEW || cur->op == GGML_OP_RESHAPE) {
                    cur = cur->src[0];
                }

                llama_rope_key key = { kv, k, cur->ne[0], il };
                llama_rope_key_find(key, cur, 0, false, nullptr);

                if (key.unsupported) {
                    throw std::runtime_error(format("dynamic RoPE scaling: not for this model, the key of layer %u %s", il, key.unsupported));
                }
                if (!key.ops.empty()) {
                    result.push_back(key);
                }
            }
        }
    }

    return result;
}

static std::vector<const llama_kv_cache *> llama_rope_caches(llama_memory_i * memory) {
    const auto iswa = [](const llama_kv_cache_iswa * kv) -> std::vector<const llama_kv_cache *> {
        return { kv->get_base(), kv->get_swa() };
    };

    if (const auto * kv = dynamic_cast<const llama_kv_cache *>(memory)) {
        return { kv };
    }
    if (const auto * kv = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return iswa(kv);
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        return { hybrid->get_mem_attn() };
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        return iswa(hybrid->get_mem_attn());
    }

    throw std::runtime_error("dynamic RoPE scaling: not for the memory of this model");
}

//
// the rotation of cached keys from one level to another
//

// the difference of two angles at position p is p*g, with g the difference of their frequencies.
// with a base of 1 the frequency factors are all that an angle depends on besides p, so 1/g gives that difference
struct llama_rope_turn {
    llama_rope_key key;

    std::vector<float> factors; // [n_dims/2]
    float              magnitude;

    llama_rope_turn(const llama_rope_key & src, const llama_rope_key & dst) : key(src) {
        const auto freqs_src = src.ops[0].freqs();
        const auto freqs_dst = dst.ops[0].freqs();

        for (size_t i = 0; i < freqs_src.size(); ++i) {
            const double g = freqs_dst[i] - freqs_src[i];
            // no angle is the limit of a large factor, infinities are not for every backend
            factors.push_back(std::fabs(g) > 1e-30 ? (float) (1.0/g) : 1e30f);
        }

        magnitude = src.normed ? 1.0f : (float) (dst.ops[0].magnitude()/src.ops[0].magnitude());
    }

    bool empty() const {
        return magnitude == 1.0f && std::count(factors.begin(), factors.end(), 1e30f) == (ptrdiff_t) factors.size();
    }
};

class llm_graph_input_rope_turn : public llm_graph_input_i {
public:
    explicit llm_graph_input_rope_turn(const llama_kv_cache * kv) : kv(kv) {}

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        for (size_t i = 0; i < pos.size(); ++i) {
            ggml_backend_tensor_set(pos[i], pos_data[i].data(), 0, ggml_nbytes(pos[i]));
        }
        for (size_t i = 0; i < factors.size(); ++i) {
            ggml_backend_tensor_set(factors[i], factors_data[i].data(), 0, ggml_nbytes(factors[i]));
        }
        if (k_rot && k_rot->buffer) {
            kv->set_input_k_rot(k_rot);
        }
    }

    // most layers have the same
    template <typename T>
    static ggml_tensor * get(ggml_context * ctx, std::vector<ggml_tensor *> & tensors, std::vector<std::vector<T>> & all, const std::vector<T> & data) {
        const size_t i = std::find(all.begin(), all.end(), data) - all.begin();
        if (i == all.size()) {
            all.push_back(data);
            tensors.push_back(ggml_new_tensor_1d(ctx, std::is_same<T, float>::value ? GGML_TYPE_F32 : GGML_TYPE_I32, data.size()));
            ggml_set_input(tensors[i]);
        }
        return tensors[i];
    }

    const llama_kv_cache * kv;

    ggml_tensor * k_rot = nullptr; // F32 [n, n], see llama_kv_cache::build_input_k_rot()

    std::vector<ggml_tensor *>        pos; // I32 [n_cells], or [n_head_kv*n_cells]
    std::vector<std::vector<int32_t>> pos_data;

    std::vector<ggml_tensor *>      factors; // F32 [n_dims/2]
    std::vector<std::vector<float>> factors_data;
};

// cells [i0, i1) of a stream
static void llama_rope_turn_build(
        llm_graph_result * res, const llama_kv_cache * kv, const llama_kv_cells & cells, uint32_t stream,
        uint32_t i0, uint32_t i1, const std::vector<llama_rope_turn> & turns, const llama_cparams & cparams) {
    auto * ctx = res->get_ctx();

    auto inp = std::make_unique<llm_graph_input_rope_turn>(kv);

    inp->k_rot = kv->build_input_k_rot(ctx);

    std::vector<int32_t> pos;
    for (uint32_t i = i0; i < i1; ++i) {
        pos.push_back(cells.is_empty(i) ? 0 : cells.pos_get(i));
    }

    for (const auto & turn : turns) {
        const auto & key = turn.key;
        const auto & op  = key.ops[0];

        if (key.kv != kv) {
            continue;
        }

        ggml_tensor * k = key.k;

        const int64_t offset = key.offset + op.n_offs;
        const bool    quant  = ggml_is_quantized(k->type);

        // a quantized head is taken whole: the rotated part may not begin or end where a block does
        // heads with positions of their own are taken one by one
        const auto    get_pos  = cparams.rope_dynamic.head_positions;
        const auto    of_heads = get_pos ? get_pos(cparams, key.il, pos) : std::vector<int32_t>();
        const int64_t n_head   = of_heads.empty() ? k->ne[0]/key.n_embd_head : 1;
        const auto &  of_rows  = of_heads.empty() ? pos : of_heads;

        ggml_tensor * dst = ggml_view_3d(ctx, k, quant ? key.n_embd_head : op.n_dims, n_head, of_rows.size(),
                ggml_row_size(k->type, key.n_embd_head), n_head*ggml_row_size(k->type, key.n_embd_head),
                stream*k->nb[2] + i0*k->nb[1] + (quant ? 0 : ggml_row_size(k->type, offset)));

        ggml_tensor * cur = k->type == GGML_TYPE_F32 ? dst : ggml_cast(ctx, dst, GGML_TYPE_F32);

        const bool hadamard = quant && inp->k_rot;

        if (hadamard) {
            cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot); // its own inverse
        }

        ggml_tensor * head = cur;
        if (quant && offset > 0) {
            cur = ggml_cont(ctx, ggml_view_3d(ctx, head, op.n_dims, head->ne[1], head->ne[2], head->nb[1], head->nb[2], offset*head->nb[0]));
        }

        cur = ggml_rope_ext(ctx, cur, inp->get(ctx, inp->pos, inp->pos_data, of_rows),
                inp->get(ctx, inp->factors, inp->factors_data, turn.factors), op.n_dims, op.mode,
                0, 1.0f, 1.0f, 0.0f, turn.magnitude, 0.0f, 0.0f);

        if (quant && offset > 0) {
            cur = ggml_set(ctx, head, cur, head->nb[1], head->nb[2], head->nb[3], offset*head->nb[0]);
        }

        if (hadamard) {
            cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
        }

        ggml_build_forward_expand(res->get_gf(), ggml_cpy(ctx, cur, dst));
    }

    res->add_input(std::move(inp));
}

std::vector<llama_rope_key> llama_context::rope_dynamic_keys(int32_t level, const llama_memory_context_i * mctx) {
    const auto caches = llama_rope_caches(memory.get());

    const auto params = llama_rope_params_get(cparams);

    llama_rope_params_set(cparams, cparams.rope_dynamic.params(level));
    auto * gf = graph_reserve(cparams.n_seq_max, cparams.n_seq_max, cparams.n_seq_max, mctx, true);
    llama_rope_params_set(cparams, params);

    if (!gf) {
        throw std::runtime_error("failed to build a graph");
    }

    return llama_rope_keys(gf, caches);
}

void llama_context::rope_dynamic_check() {
    if (!cparams.rope_dynamic.enabled || model.hparams.no_alloc) {
        return;
    }

    const auto mctx = memory ? memory->init_full() : nullptr;

    const auto stock  = memory ? rope_dynamic_keys(0, mctx.get()) : std::vector<llama_rope_key>();
    const auto scaled = memory ? rope_dynamic_keys(1, mctx.get()) : stock;

    if (stock.empty()) {
        throw std::runtime_error("dynamic RoPE scaling: this model has no KV cache with rotated keys");
    }

    for (size_t i = 0; i < stock.size(); ++i) {
        if (!llama_rope_turn(stock[i], scaled[i]).empty()) {
            return;
        }
    }

    throw std::runtime_error("dynamic RoPE scaling: the layers of this model that have RoPE are never scaled");
}

bool llama_context::rope_dynamic_turn(const llama_kv_cache * kv, const std::vector<llama_rope_turn> & turns) {
    // parts of such a size need no more memory than the model does
    const uint32_t n_part = std::max(256u, cparams.n_ubatch);

    std::vector<bool> done(kv->get_n_stream());

    for (uint32_t s = 0; s < cparams.n_seq_max; ++s) {
        const uint32_t stream = kv->get_stream(s);
        if (done[stream]) {
            continue;
        }
        done[stream] = true;

        const auto & cells = kv->get_cells(s);

        const uint32_t n_cells = cells.used_max_p1();

        for (uint32_t i0 = 0; i0 < n_cells; i0 += n_part) {
            auto * res = gf_res_reserve.get();

            res->reset();
            ggml_backend_sched_reset(sched.get());

            llama_rope_turn_build(res, kv, cells, stream, i0, std::min(n_cells, i0 + n_part), turns, cparams);

            if (ggml_graph_n_nodes(res->get_gf()) == 0) {
                return true; // no layer of this cache is scaled
            }
            if (!ggml_backend_sched_alloc_graph(sched.get(), res->get_gf())) {
                return false;
            }

            res->set_inputs(nullptr);

            if (graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
                return false;
            }

            synchronize();
        }
    }

    return true;
}

bool llama_context::rope_dynamic_set(int32_t level) {
    auto & dynamic = cparams.rope_dynamic;

    const auto params = dynamic.params(level);

    if (llama_rope_params_get(cparams) == params) {
        dynamic.level = level;
        return true;
    }

    LLAMA_LOG_DEBUG("%s: level %d -> %d, freq_base = %g, freq_scale = %g\n", __func__, dynamic.level, level, params.freq_base, params.freq_scale);

    // an abort would leave some keys of one level and some of the other
    const auto callback      = abort_callback;
    const auto callback_data = abort_callback_data;
    set_abort_callback(nullptr, nullptr);

    synchronize();

    const auto mctx = memory->init_full();

    const auto src = rope_dynamic_keys(dynamic.level, mctx.get());
    const auto dst = rope_dynamic_keys(level,         mctx.get());

    std::vector<llama_rope_turn> turns;
    for (size_t i = 0; i < src.size(); ++i) {
        const llama_rope_turn turn(src[i], dst[i]);
        if (!turn.empty()) {
            turns.push_back(turn);
        }
    }

    bool ok = true;
    for (const auto * kv : llama_rope_caches(memory.get())) {
        ok = ok && rope_dynamic_turn(kv, turns);
    }

    set_abort_callback(callback, callback_data);

    if (!ok) {
        LLAMA_LOG_ERROR("%s: the cached keys cannot be rotated, clearing the memory\n", __func__);
        memory->clear(true);
    }

    llama_rope_params_set(cparams, params);
    dynamic.level = level;

    // as after other updates of the memory, see memory_update()
    const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);
    if (!graph_reserve(n_tokens, cparams.n_seq_max, std::min(n_tokens, cparams.n_outputs_max), mctx.get())) {
        LLAMA_LOG_ERROR("%s: failed to reserve a graph\n", __func__);
    }

    return ok;
}

// of the longest sequence
static llama_pos llama_rope_pos_max(const llama_memory_i & memory, uint32_t n_seq_max) {
    llama_pos result = -1;
    for (uint32_t s = 0; s < n_seq_max; ++s) {
        result = std::max(result, memory.seq_pos_max(s));
    }
    return result;
}

const llama_rope_dynamic * llama_context::rope_dynamic_begin() {
    auto & dynamic = cparams.rope_dynamic;

    if (!dynamic.enabled) {
        return nullptr;
    }

    dynamic.level_min = dynamic.level_of(llama_rope_pos_max(*memory, cparams.n_seq_max));

    return &dynamic;
}

bool llama_context::rope_dynamic_update(const llama_ubatch & ubatch) {
    if (!cparams.rope_dynamic.enabled) {
        return true;
    }

    llama_pos pos = llama_rope_pos_max(*memory, cparams.n_seq_max);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        pos = std::max(pos, ubatch.pos[i]);
    }

    return rope_dynamic_set(cparams.rope_dynamic.level_of(pos));
}

// n lists of tokens, one after the other or side by side: what needs a higher level than the first ones is left for later
void llama_batch_allocr::rope_dynamic_cut(std::vector<int32_t> * idxs, size_t n) {
    if (!rope_dynamic) {
        return;
    }

    int32_t level = rope_dynamic->level_min;
    size_t  n_max = 0;
    for (size_t s = 0; s < n; ++s) {
        level = std::max(level, rope_dynamic->level_of(batch.pos[idxs[s].front()]));
        n_max = std::max(n_max, idxs[s].size());
    }

    const double n_tokens = rope_dynamic->n_train*llama_rope_ratio(*rope_dynamic, level);

    for (size_t s = 0; s < n; ++s) {
        for (size_t i = 0; i < std::min(n_max, idxs[s].size()); ++i) {
            if (batch.pos[idxs[s][i]] + 1.0 > n_tokens) {
                n_max = i;
            }
        }
    }

    for (size_t s = 0; s < n; ++s) {
        for (; idxs[s].size() > n_max; idxs[s].pop_back()) {
            used[idxs[s].back()] = false;
            --n_used;
        }
    }
}

//
// interface implementation
//

int32_t llama_rope_dynamic_level(const llama_context * ctx) {
    const auto & dynamic = ctx->get_cparams().rope_dynamic;

    return dynamic.enabled ? dynamic.level : -1;
}

int32_t llama_rope_n_ctx(const llama_context * ctx) {
    return std::max(ctx->get_model().hparams.n_ctx_train, ctx->get_cparams().rope_dynamic.n_ctx);
}
