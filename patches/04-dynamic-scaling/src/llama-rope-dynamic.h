#pragma once

#include "llama.h"

#include "llama-rope-layer.h"

#include <cstdint>
#include <vector>

// dynamic RoPE scaling: a context of n tokens has the scaling that n tokens need, and none up to the length the model was trained for
//   NTK:  freq_base' = freq_base*(f*n/n_train - (f - 1))^(d/(d - 2)), f the RoPE factor of the user, d the rotated dimensions
//   YaRN: the factor is n/n_train, at most that of the user
// n moves in levels, and the level is that of the longest sequence. When it changes, the cached keys are rotated by the difference of
// the angles, so that they are always those of the level. A batch is split where the level changes: the results do not depend on batches
// ref: https://arxiv.org/abs/2309.00071 (NTK-aware, YaRN)

struct llama_cparams;
struct llama_hparams;
struct llama_memory_i;
struct llama_model;
struct llama_model_loader;

// part of llama_cparams, which has the parameters of the current level
struct llama_rope_dynamic {
    bool enabled = false;
    bool yarn    = false;

    int32_t level        = 0;
    int32_t level_min    = 0; // what the sequences in the memory need
    int32_t n_level      = 1; // levels that the context can reach
    int32_t n_per_octave = 2; // levels while the length doubles

    uint32_t n_train = 0;
    uint32_t n_ctx   = 0;    // the longest sequence that the scaling is for
    uint32_t n_rot   = 0;    // rotated dimensions of the layers that are scaled

    float factor      = 1.0f;
    float attn_factor = 1.0f;
    float ext_factor  = 1.0f;

    llama_rope_params stock; // level 0

    // where the heads of a layer rotate at positions of their own: those at each of pos, one a head; empty for other layers
    std::vector<int32_t> (*head_positions)(const llama_cparams & cparams, uint32_t il, const std::vector<int32_t> & pos) = nullptr;

    // the level that a token at this position needs
    int32_t level_of(llama_pos pos) const;

    llama_rope_params params(int32_t level) const;
};

// read {arch}.rope.scaling.dynamic_factor into the hparams, throws if it is not usable
void llama_rope_dynamic_load(llama_model_loader & ml, llama_hparams & hparams);

// set up dynamic scaling if the parameters or the model ask for it, throws if the model cannot use it
void llama_rope_dynamic_init(const llama_model & model, const llama_context_params & params, llama_cparams & cparams);

void llama_rope_params_set(llama_cparams & cparams, const llama_rope_params & params);

// a shift turns keys that have the magnitude of their level already
void llama_rope_dynamic_shift(const llama_cparams & cparams, float freq_scale, float ext_factor, float & attn_factor);
