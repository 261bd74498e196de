#pragma once

#include "llama-rope-layer.h"
#include "llama-rope-state.h"

#include <cstdint>

// position factors of KV heads: the keys of KV head k of layer il, and the queries of its group, rotate as if a token at position p
// stood at p/s[il][k]. Where the heads of a layer agree, that is the factor of the layer. Where they differ, the heads are viewed as
// tokens, and ROPE gets a position for each (token, KV head): round(p/s*R), with R as the factor of the operation
//
// R is a power of two, the largest up to 2^20 with which p/s*R fits into an int32. The angle of the first dimension is off by
//   0.5/R, at most p_max/s/2^31, by the rounding to integers, and
//   p/s*2^-24 when ROPE makes a float32 of it, which stock has too: it multiplies by a scale that is rounded to float32
// 4.8e-4 at 8000 in the worst case, 2e-3 at 32000

struct llama_context;
class  llama_kv_cache;
class  llm_graph_input_rope_head;
class  llm_graph_result;

struct llama_rope_heads {
    std::vector<std::vector<float>> rows; // [n_layer_all][n_head_kv], empty where the heads agree

    float s_min = 1.0f;

    // the factors of the layers whose heads agree, 1 for the others
    // note: the heads are in use as long as a context has this very list, so setting layer factors ends that
    llama_rope_layer_factors layers;

    // where the positions of a layer begin, for n of them each head. With all layers: how many there are
    int64_t offset(size_t il, int64_t n) const;

    // R, for positions below n_pos
    float scale(int64_t n_pos) const;

    // the positions of a layer, token after token
    void positions(size_t il, const int32_t * pos, int64_t n, float scale, int32_t * out) const;
};

using llama_rope_head_factors = std::shared_ptr<const llama_rope_heads>;

// of a layer whose heads differ, else nullptr
const std::vector<float> * llama_rope_head_row(const llama_cparams & cparams, int il);

// read {arch}.rope.scaling.head_factors, throws if the array is not usable
void llama_rope_head_load(llama_model_loader & ml, llama_model & model);

// set what a context uses: factors of KV heads (nullptr: those of the file, if it has any), throws if the model cannot use them
void llama_rope_head_init(const llama_model & model, llama_cparams & cparams, const float * factors);

// a context shift: if the heads of the layer differ, views the keys k head by head and returns the shifts for these
ggml_tensor * llama_rope_head_shift(
        const llama_cparams & cparams, llm_graph_result * res, const llama_kv_cache * kv, int il, ggml_tensor *& k, ggml_tensor * shift);

void llama_rope_head_shift_apply(
        const llama_cparams & cparams, const llama_kv_cache * kv, int il, float & freq_scale, float & ext_factor, float & attn_factor);

// a state begins with a mark that has the factors, where heads differ
void llama_rope_head_state_write(const llama_context & ctx, llama_io_write_i & io);

// reads the mark if there is one, throws if the context has other factors
class llama_rope_head_state_reader : public llama_io_peek {
public:
    llama_rope_head_state_reader(const llama_context & ctx, llama_io_read_i & io);
};

// base of llm_graph_context, between it and llm_graph_rope
struct llm_graph_rope_head : llm_graph_rope {
    mutable llm_graph_input_rope_head * inp_rope_head = nullptr;

    bool rope_heads_differ() const;
    void rope_heads_refuse(const char * what) const; // throws if the heads of the layer differ

    ggml_tensor * rope_heads(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims, int mode, int n_ctx_orig,
            float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow) const;

    ggml_tensor * ggml_rope(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int n_dims, int mode) const {
        // same parameters as in ggml.c
        return ggml_rope_ext(ctx, a, b, nullptr, n_dims, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    }

    ggml_tensor * ggml_rope_ext(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims, int mode, int n_ctx_orig,
            float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
        if (rope_heads_differ()) {
            return rope_heads(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
        }
        return llm_graph_rope::ggml_rope_ext(
                ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
    }

    template <typename... Args>
    ggml_tensor * ggml_rope_multi(Args... args) const {
        rope_heads_refuse("by M-RoPE");
        return llm_graph_rope::ggml_rope_multi(args...);
    }

    template <typename... Args>
    ggml_tensor * ggml_rope_ext_back(Args... args) const {
        rope_heads_refuse("backwards");
        return llm_graph_rope::ggml_rope_ext_back(args...);
    }
};
