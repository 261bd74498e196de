#pragma once

#include "ggml.h"

#include <memory>
#include <vector>

// per-layer RoPE factors: layer il rotates as if a token at position p stood at p/s, with s the factor of the layer
//   s = 1 is the stock rotation, s > 1 interpolates the positions of that layer alone
// ref: https://arxiv.org/abs/2503.04355

struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_model_loader;

// far outside of anything useful, but inside of what float32 angles can represent
static const float LLAMA_ROPE_LAYER_FACTOR_MIN = 1.0f/1024.0f;
static const float LLAMA_ROPE_LAYER_FACTOR_MAX = 1024.0f;

// what a rotation is computed with, besides the position and the dimension
struct llama_rope_params {
    float freq_base;
    float freq_scale;
    float ext_factor;
    float attn_factor;

    bool operator==(const llama_rope_params & other) const {
        return freq_base   == other.freq_base   &&
               freq_scale  == other.freq_scale  &&
               ext_factor  == other.ext_factor  &&
               attn_factor == other.attn_factor;
    }
};

llama_rope_params llama_rope_params_get(const llama_cparams & cparams);

// all that the rotations of a context can have in turn
std::vector<llama_rope_params> llama_rope_params_all(const llama_cparams & cparams);

// [n_layer_all] the factor of each layer, nullptr if every layer uses the stock rotation
// note: shared so that a graph that was built with older factors can be recognized by comparing the pointers
using llama_rope_layer_factors = std::shared_ptr<const std::vector<float>>;

// read {arch}.rope.scaling.layer_factors into the hparams, throws if the array is not usable
void llama_rope_layer_load(llama_model_loader & ml, llama_hparams & hparams);

// the factors for all layers that the model runs (some architectures repeat or append layers), empty if there are none
// nullptr stands for the factors of the file
std::vector<float> llama_rope_layer_expand(const llama_model & model, const float * factors);

// the factors that the layers of a context have to use, throws if the model cannot use them
llama_rope_layer_factors llama_rope_layer_init(const llama_model & model, const llama_cparams & cparams, const float * factors);

bool llama_rope_layer_has_rope(const llama_model & model);

// adjust the parameters of a RoPE operation to positions divided by s
void llama_rope_layer_fold(float s, float & freq_scale, float & ext_factor, float & attn_factor);

// adjust the parameters of a RoPE operation in layer il - exact for every scaling type, see the comment in the source
void llama_rope_layer_apply(const llama_cparams & cparams, int il, float & freq_scale, float & ext_factor, float & attn_factor);

// base of llm_graph_context: the members hide the ggml functions of the same name, so that every rotation of a graph uses
// the factor of its layer, the one that was last passed to cb() or build_norm()
struct llm_graph_rope {
    mutable int il_rope = 0;

    void rope_layer_apply(float & freq_scale, float & ext_factor, float & attn_factor) const;

    ggml_tensor * ggml_rope(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int n_dims, int mode) const {
        // same parameters as in ggml.c
        return ggml_rope_ext(ctx, a, b, nullptr, n_dims, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    }

    ggml_tensor * ggml_rope_ext(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims, int mode, int n_ctx_orig,
            float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
        rope_layer_apply(freq_scale, ext_factor, attn_factor);
        return ::ggml_rope_ext(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
    }

    ggml_tensor * ggml_rope_multi(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims, int * sections, int mode, int n_ctx_orig,
            float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
        rope_layer_apply(freq_scale, ext_factor, attn_factor);
        return ::ggml_rope_multi(ctx, a, b, c, n_dims, sections, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
    }

    ggml_tensor * ggml_rope_ext_back(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int n_dims, int mode, int n_ctx_orig,
            float freq_base, float freq_scale, float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
        rope_layer_apply(freq_scale, ext_factor, attn_factor);
        return ::ggml_rope_ext_back(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
    }

    // not used by any graph so far
    void ggml_rope_inplace       () const = delete;
    void ggml_rope_ext_inplace   () const = delete;
    void ggml_rope_multi_inplace () const = delete;
    void ggml_rope_multi_back    () const = delete;
    void ggml_rope_custom        () const = delete;
    void ggml_rope_custom_inplace() const = delete;
};
