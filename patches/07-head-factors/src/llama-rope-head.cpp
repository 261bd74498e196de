#include "llama-rope-head.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

// no memory begins with such a number of streams or cells
static const uint32_t LLAMA_ROPE_HEAD_STATE_MAGIC = 0x686f726c; // 'lroh'

static const int LLAMA_ROPE_HEAD_SCALE_LOG2_MAX = 20;

// of the positions of a layer: where a view may begin in every backend
static const int64_t LLAMA_ROPE_HEAD_ALIGN = 64;

//
// the factors
//

int64_t llama_rope_heads::offset(size_t il, int64_t n) const {
    int64_t result = 0;
    for (size_t i = 0; i < il; ++i) {
        result += GGML_PAD((int64_t) rows[i].size()*n, LLAMA_ROPE_HEAD_ALIGN);
    }
    return result;
}

float llama_rope_heads::scale(int64_t n_pos) const {
    return std::ldexp(1.0f, std::clamp(30 - std::ilogb((double) n_pos/s_min), 0, LLAMA_ROPE_HEAD_SCALE_LOG2_MAX));
}

void llama_rope_heads::positions(size_t il, const int32_t * pos, int64_t n, float scale, int32_t * out) const {
    static const double limit = std::numeric_limits<int32_t>::max();

    const auto & row = rows[il];
    for (int64_t i = 0; i < n; ++i) {
        for (const float s : row) {
            *out++ = (int32_t) std::lrint(std::clamp(pos[i]*((double) scale/s), -limit, limit));
        }
    }
}

const std::vector<float> * llama_rope_head_row(const llama_cparams & cparams, int il) {
    const auto & heads = cparams.rope_head_factors;
    if (!heads || heads->layers != cparams.rope_layer_factors || heads->rows.at(il).empty()) {
        return nullptr;
    }
    return &heads->rows[il];
}

// the positions that R is chosen for. The keys of dynamic scaling turn together, with some room for those that were moved
static int64_t llama_rope_head_n_pos(const llama_cparams & cparams) {
    return (int64_t) cparams.n_ctx_seq*(cparams.rope_dynamic.enabled ? 8 : 1);
}

// see llama_rope_dynamic
static std::vector<int32_t> llama_rope_head_positions(const llama_cparams & cparams, uint32_t il, const std::vector<int32_t> & pos) {
    const auto * row = llama_rope_head_row(cparams, il);

    std::vector<int32_t> result(row ? row->size()*pos.size() : 0);
    if (row) {
        const auto & heads = *cparams.rope_head_factors;
        heads.positions(il, pos.data(), pos.size(), heads.scale(llama_rope_head_n_pos(cparams)), result.data());
    }
    return result;
}

// the KV heads of the layers of the file
static size_t llama_rope_head_count(const llama_hparams & hparams) {
    size_t n = 0;
    for (uint32_t il = 0; il < hparams.n_rope_layer_factors; ++il) {
        n += hparams.n_head_kv(il);
    }
    return n;
}

// throws if the factors do not fit the model
static void llama_rope_head_check(const char * name, const float * factors, size_t n, const llama_hparams & hparams) {
    const size_t n_head = llama_rope_head_count(hparams);
    if (n != n_head) {
        throw std::runtime_error(format("%s has %zu factors, but the model has %zu KV heads in all layers", name, n, n_head));
    }

    for (uint32_t il = 0; il < hparams.n_rope_layer_factors; ++il) {
        for (uint32_t k = 0; k < hparams.n_head_kv(il); ++k, ++factors) {
            // note: NaN compares false
            if (!(*factors >= LLAMA_ROPE_LAYER_FACTOR_MIN && *factors <= LLAMA_ROPE_LAYER_FACTOR_MAX)) {
                throw std::runtime_error(format("%s has a bad factor for KV head %u of layer %u: %g (must be a number from %g to %g)",
                            name, k, il, *factors, LLAMA_ROPE_LAYER_FACTOR_MIN, LLAMA_ROPE_LAYER_FACTOR_MAX));
            }
        }
    }
}

void llama_rope_head_load(llama_model_loader & ml, llama_model & model) {
    const std::string key = ml.llm_kv(LLM_KV_ROPE_SCALING_HEAD_FACTORS);

    const int64_t kid = gguf_find_key(ml.metadata, key.c_str());
    if (kid < 0) {
        return;
    }

    if (gguf_get_kv_type(ml.metadata, kid) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ml.metadata, kid) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error(format("key %s must be an array of float32", key.c_str()));
    }

    const size_t  n    = gguf_get_arr_n(ml.metadata, kid);
    const float * data = (const float *) gguf_get_arr_data(ml.metadata, kid);

    llama_rope_head_check(("key " + key).c_str(), data, n, model.hparams);

    model.rope_head_factors.assign(data, data + n);
}

static void llama_rope_head_require(bool ok, const char * what) {
    if (!ok) {
        throw std::runtime_error(format("RoPE factors of KV heads cannot be used: %s", what));
    }
}

// throws if a model cannot have factors other than 1, or none that differ within a layer
static void llama_rope_head_check_model(const llama_model & model, bool differ) {
    const auto & hparams = model.hparams;

    llama_rope_head_require(llama_rope_layer_has_rope(model), "this model has no RoPE");
    llama_rope_head_require(hparams.n_lora_kv == 0,           "not for models with MLA, whose heads share rotated keys");
    llama_rope_head_require(hparams.n_pos_per_embd() == 1,    "not for models with M-RoPE");

    llama_rope_head_require(!differ || hparams.indexer_n_head == 0, "not for models whose attention has an indexer");
    llama_rope_head_require(!differ || model.split_mode() != LLAMA_SPLIT_MODE_TENSOR, "not with split mode tensor");
}

void llama_rope_head_init(const llama_model & model, llama_cparams & cparams, const float * factors) {
    const auto & hparams = model.hparams;

    const size_t n_layer = hparams.n_rope_layer_factors;

    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT) {
        // this model attends to keys that its target has rotated
        llama_rope_head_require(factors == nullptr, "this model uses those of its target");
        if (!model.rope_head_factors.empty()) {
            LLAMA_LOG_WARN("%s: ignoring the RoPE factors of this model, it uses those of its target\n", __func__);
        }
        const auto & other = cparams.ctx_other->get_cparams();
        llama_rope_head_require(!other.rope_head_factors || other.rope_head_factors->layers != other.rope_layer_factors,
                "not for the target of this model, which attends to its keys");
        return;
    }

    if (factors == nullptr) {
        if (model.rope_head_factors.empty()) {
            return;
        }
        factors = model.rope_head_factors.data();
        llama_rope_head_check("the model", factors, model.rope_head_factors.size(), hparams);
    }

    auto heads = std::make_shared<llama_rope_heads>();

    auto & rows = heads->rows;
    for (size_t il = 0; il < model.layers.size(); ++il) {
        // some architectures run the layers of the file several times
        if (il < n_layer) {
            rows.emplace_back(factors, factors + hparams.n_head_kv(il));
            factors += hparams.n_head_kv(il);
        } else {
            rows.push_back(rows[il % n_layer]);
        }
    }

    // layers without keys attend to those of another one, see llama_model::create_memory()
    for (size_t il = 0; il < rows.size(); ++il) {
        const int64_t owner = hparams.has_kv(il) ? il : hparams.n_layer_kv_from_start - (hparams.is_swa(il) ? 2 : 1);
        llama_rope_head_require(owner >= 0 && rows.at(owner).size() == rows[il].size(), "a layer shares the keys of one with another number of heads");
        rows[il] = rows[owner];
    }

    std::vector<float> layers(n_layer, 1.0f);

    bool differ = false;
    bool any    = false;
    for (size_t il = 0; il < rows.size(); ++il) {
        auto & row = rows[il];
        any = any || std::count(row.begin(), row.end(), 1.0f) < (ptrdiff_t) row.size();
        if (std::adjacent_find(row.begin(), row.end(), std::not_equal_to<float>()) != row.end()) {
            differ = true;
            heads->s_min = std::min(heads->s_min, *std::min_element(row.begin(), row.end()));
            continue;
        }
        if (!row.empty() && il < n_layer) {
            layers[il] = row[0];
        }
        row.clear();
    }

    if (any) {
        llama_rope_head_check_model(model, differ);
    }

    const auto all = llama_rope_layer_init(model, cparams, layers.data());
    if (!differ) {
        cparams.rope_layer_factors = all;
        cparams.rope_head_factors  = nullptr;
        return;
    }

    // a list of their own, by which it is known that they are in use
    heads->layers = std::make_shared<std::vector<float>>(all ? *all : std::vector<float>(rows.size(), 1.0f));

    cparams.rope_layer_factors = heads->layers;
    cparams.rope_head_factors  = heads;

    cparams.rope_dynamic.head_positions = llama_rope_head_positions;
}

//
// the rotations of a graph
//

class llm_graph_input_rope_head : public llm_graph_input_i {
public:
    llm_graph_input_rope_head(llama_rope_head_factors heads, const llama_cparams & cparams, const llama_ubatch & ubatch) :
        heads(std::move(heads)), n_tokens(ubatch.n_tokens), scale(get_scale(cparams, ubatch)) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (!ubatch->pos) {
            return;
        }
        data.resize(ggml_nelements(pos));
        for (size_t il = 0; il < heads->rows.size(); ++il) {
            heads->positions(il, ubatch->pos, n_tokens, scale, data.data() + heads->offset(il, n_tokens));
        }
        ggml_backend_tensor_set(pos, data.data(), 0, ggml_nbytes(pos));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return n_tokens == params.ubatch.n_tokens && scale == get_scale(params.cparams, params.ubatch);
    }

    // positions beyond the context get a scale that they fit into
    float get_scale(const llama_cparams & cparams, const llama_ubatch & ubatch) const {
        int64_t n_pos = llama_rope_head_n_pos(cparams);
        for (uint32_t i = 0; ubatch.pos && i < ubatch.n_tokens; ++i) {
            n_pos = std::max<int64_t>(n_pos, ubatch.pos[i] + 1ll);
        }
        return heads->scale(n_pos);
    }

    const llama_rope_head_factors heads;

    const uint32_t n_tokens;
    const float    scale;

    ggml_tensor * pos    = nullptr; // I32 [heads->offset(n_layer, n_tokens)]
    ggml_tensor * copied = nullptr; // the same on the device: layers view it, and a copy for each of them would be slow

    std::vector<int32_t> data;
};

// note: if all heads of the layer are the same, the base class knows its factor
bool llm_graph_rope_head::rope_heads_differ() const {
    return llama_rope_head_row(static_cast<const llm_graph_context *>(this)->cparams, il_rope) != nullptr;
}

void llm_graph_rope_head::rope_heads_refuse(const char * what) const {
    if (rope_heads_differ()) {
        throw std::runtime_error(format("RoPE factors of KV heads cannot be used: layer %d is rotated %s", il_rope, what));
    }
}

// view heads as tokens: [d, n_group, n_head_kv*n_tokens] of [d, n_group*n_head_kv, n_tokens]
static ggml_tensor * llama_rope_head_view(ggml_context * ctx, ggml_tensor * cur, int64_t n_head_kv) {
    const int64_t n_group = cur->ne[1]/n_head_kv;

    // one part of a fused projection
    if (cur->ne[2] > 1 && cur->nb[2] != cur->ne[1]*cur->nb[1]) {
        cur = ggml_cont(ctx, cur);
    }

    return ggml_view_3d(ctx, cur, cur->ne[0], n_group, n_head_kv*cur->ne[2], cur->nb[1], n_group*cur->nb[1], 0);
}

ggml_tensor * llm_graph_rope_head::rope_heads(
        ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims, int mode, int n_ctx_orig,
        float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
    const auto * graph = static_cast<const llm_graph_context *>(this);

    const auto &  heads     = graph->cparams.rope_head_factors;
    const int64_t n_head_kv = heads->rows[il_rope].size();
    const int64_t n_tokens  = graph->n_tokens;

    const bool is_key   = a->ne[1] == n_head_kv;
    const bool is_query = a->ne[1] == graph->hparams.n_head(il_rope) && a->ne[1] % n_head_kv == 0;

    if (strcmp(b->name, "inp_pos") != 0 || !(is_key || is_query) || a->ne[2] != n_tokens) {
        rope_heads_refuse("in a way of its own");
    }

    auto *& inp = inp_rope_head;
    if (!inp) {
        inp = static_cast<llm_graph_input_rope_head *>(graph->res->add_input(
                    std::make_unique<llm_graph_input_rope_head>(heads, graph->cparams, graph->ubatch)));

        inp->pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, heads->offset(heads->rows.size(), n_tokens));
        ggml_set_input(inp->pos);
        ggml_set_name(inp->pos, "inp_pos_heads");
        inp->copied = ggml_cont(ctx, inp->pos);

        ggml_build_forward_expand(graph->gf, b); // is filled, needed or not
    }

    ggml_tensor * pos = ggml_view_1d(ctx, inp->copied, n_head_kv*n_tokens, heads->offset(il_rope, n_tokens)*sizeof(int32_t));

    llama_rope_layer_fold(inp->scale, freq_scale, ext_factor, attn_factor);

    ggml_tensor * cur = ::ggml_rope_ext(ctx, llama_rope_head_view(ctx, a, n_head_kv), pos, c, n_dims, mode, n_ctx_orig,
            freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
    ggml_format_name(cur, "%s (heads)", a->name);

    return ggml_reshape_3d(ctx, cur, a->ne[0], a->ne[1], a->ne[2]);
}

//
// context shift
//

// of each cell
static std::vector<int32_t> llama_rope_head_shifts(const llama_kv_cache * kv) {
    const uint32_t n_cells = kv->get_size();

    std::vector<int32_t> result((size_t) n_cells*kv->get_n_stream(), 0);
    for (uint32_t s = 0; s < kv->get_n_stream(); ++s) {
        const auto & cells = kv->get_cells(s);
        for (uint32_t i = 0; i < n_cells; ++i) {
            result[(size_t) kv->get_stream(s)*n_cells + i] = cells.is_empty(i) ? 0 : cells.get_shift(i);
        }
    }
    return result;
}

static float llama_rope_head_shift_scale(const llama_cparams & cparams, const std::vector<int32_t> & shifts) {
    int64_t n_pos = llama_rope_head_n_pos(cparams);
    for (const int32_t shift : shifts) {
        n_pos = std::max<int64_t>(n_pos, std::llabs(shift));
    }
    return cparams.rope_head_factors->scale(n_pos);
}

class llm_graph_input_rope_head_shift : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        ggml_backend_tensor_set(pos, data.data(), 0, ggml_nbytes(pos));
    }

    ggml_tensor * pos = nullptr; // I32 [n_head_kv*n_cells]

    std::vector<int32_t> data;
};

ggml_tensor * llama_rope_head_shift(
        const llama_cparams & cparams, llm_graph_result * res, const llama_kv_cache * kv, int il, ggml_tensor *& k, ggml_tensor * shift) {
    const auto * row = llama_rope_head_row(cparams, il);
    if (!row) {
        return shift;
    }

    auto * ctx = res->get_ctx();

    ggml_build_forward_expand(res->get_gf(), shift); // is filled, needed or not

    const int64_t n_head_kv = row->size();
    const auto    shifts    = llama_rope_head_shifts(kv);

    auto inp = std::make_unique<llm_graph_input_rope_head_shift>();

    inp->data.resize(n_head_kv*shifts.size());
    cparams.rope_head_factors->positions(il, shifts.data(), shifts.size(), llama_rope_head_shift_scale(cparams, shifts), inp->data.data());

    inp->pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, inp->data.size());
    ggml_set_input(inp->pos);

    k = ggml_view_3d(ctx, k, k->ne[0], 1, k->ne[1]*k->ne[2], k->nb[1], k->nb[1], 0);

    return static_cast<llm_graph_input_rope_head_shift *>(res->add_input(std::move(inp)))->pos;
}

void llama_rope_head_shift_apply(
        const llama_cparams & cparams, const llama_kv_cache * kv, int il, float & freq_scale, float & ext_factor, float & attn_factor) {
    if (llama_rope_head_row(cparams, il)) {
        llama_rope_layer_fold(llama_rope_head_shift_scale(cparams, llama_rope_head_shifts(kv)), freq_scale, ext_factor, attn_factor);
    }
}

//
// saved states
//

// of the heads of all layers that differ, layer after layer
static std::vector<float> llama_rope_head_flat(const llama_cparams & cparams) {
    std::vector<float> result;
    for (int il = 0; cparams.rope_head_factors && il < (int) cparams.rope_head_factors->rows.size(); ++il) {
        if (const auto * row = llama_rope_head_row(cparams, il)) {
            result.push_back((float) il);
            result.insert(result.end(), row->begin(), row->end());
        }
    }
    return result;
}

void llama_rope_head_state_write(const llama_context & ctx, llama_io_write_i & io) {
    const auto flat = llama_rope_head_flat(ctx.get_cparams());
    if (flat.empty()) {
        return;
    }

    const uint32_t n = flat.size();
    io.write(&LLAMA_ROPE_HEAD_STATE_MAGIC, sizeof(LLAMA_ROPE_HEAD_STATE_MAGIC));
    io.write(&n,                           sizeof(n));
    io.write(flat.data(),                  n*sizeof(float));
}

llama_rope_head_state_reader::llama_rope_head_state_reader(const llama_context & ctx, llama_io_read_i & io) : llama_io_peek(io) {
    if (is_empty()) {
        return;
    }

    const auto own = llama_rope_head_flat(ctx.get_cparams());

    bool same = own.empty();
    if (take(LLAMA_ROPE_HEAD_STATE_MAGIC)) {
        uint32_t n;
        read(&n, sizeof(n));

        std::vector<float> flat(own.size());
        same = n == own.size();
        if (same) {
            read(flat.data(), n*sizeof(float));
            same = flat == own;
        }
    }

    if (!same) {
        throw std::runtime_error("the keys of the state were rotated with other RoPE factors of KV heads than those of this context");
    }
}

//
// interface implementation
//

int32_t llama_context::set_rope_head_factors(const float * factors, size_t n) {
    const auto layers = cparams.rope_layer_factors;
    const auto heads  = cparams.rope_head_factors;

    // those of the file, if the memory is empty
    if (const int32_t code = set_rope_layer_factors(nullptr, 0)) {
        return code;
    }

    int32_t code = -2;
    try {
        if (factors != nullptr) {
            code = n == llama_rope_head_count(model.hparams) ? -2 : -1;
            llama_rope_head_check("the list", factors, n, model.hparams);
        }

        llama_rope_head_init(model, cparams, factors);

        // only its graph says how an architecture rotates
        if (cparams.rope_head_factors && cparams.rope_head_factors->layers == cparams.rope_layer_factors) {
            const auto mctx = memory ? memory->init_full() : nullptr;
            graph_reserve(cparams.n_seq_max, cparams.n_seq_max, cparams.n_seq_max, mctx.get(), true);
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        cparams.rope_layer_factors = layers;
        cparams.rope_head_factors  = heads;
        return code;
    }

    sched_need_reserve = true;

    return 0;
}

int32_t llama_set_rope_head_factors(llama_context * ctx, const float * factors, size_t n) {
    return ctx->set_rope_head_factors(factors, n);
}

int32_t llama_get_rope_head_factors(const llama_context * ctx, float * out, size_t n) {
    const auto & cparams = ctx->get_cparams();
    const auto & hparams = ctx->get_model().hparams;

    const size_t n_head = llama_rope_head_count(hparams);

    for (uint32_t il = 0; n >= n_head && il < hparams.n_rope_layer_factors; ++il) {
        if (const auto * row = llama_rope_head_row(cparams, il)) {
            out = std::copy(row->begin(), row->end(), out);
        } else {
            out = std::fill_n(out, hparams.n_head_kv(il), cparams.rope_layer_factors ? cparams.rope_layer_factors->at(il) : 1.0f);
        }
    }

    return (int32_t) n_head;
}

bool llama_model_rope_head_factors(const llama_model * model, float * out, size_t n) {
    const auto & factors = model->rope_head_factors;

    if (factors.empty() || n != factors.size()) {
        return false;
    }

    std::copy(factors.begin(), factors.end(), out);

    return true;
}

int32_t llama_model_n_head_kv_layer(const llama_model * model, int32_t il) {
    return il >= 0 && il < (int32_t) model->hparams.n_rope_layer_factors ? model->hparams.n_head_kv(il) : 0;
}
