#pragma once

#include "ggml-cpp.h"
#include "llama-rope-state.h"

#include <memory>
#include <vector>

// query scales: the attention logits of head h in layer il are multiplied by s[il][h], before soft cap, mask, bias and sinks,
// by a multiplication of the queries

struct llama_context;
struct llama_model;
struct llama_model_loader;

struct llama_query_scales {
    std::vector<float> data; // of all heads, layer after layer of the file

    // [n_embd_head, n_head] of each layer that the model runs, nullptr if all scales of the layer are 1
    std::vector<ggml_tensor *> tensors;

    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
};

// what a context uses, nullptr if all scales are 1
// note: shared so that a graph that was built with older scales keeps them, and can be recognized by comparing the pointers
using llama_query_scales_ptr = std::shared_ptr<const llama_query_scales>;

// read {arch}.attention.query_scales into the model, throws if the array is not usable
void llama_query_scales_load(llama_model_loader & ml, llama_model & model);

// the scales that a context has to use, throws if the model cannot use them
// nullptr stands for those of the file
llama_query_scales_ptr llama_query_scales_init(const llama_model & model, const float * scales);

// the scaled queries of layer il, or q itself; q: [n_embd_head, n_head, n_tokens]
ggml_tensor * llama_query_scales_apply(const llama_query_scales_ptr & scales, ggml_context * ctx, ggml_tensor * q, int il);

// what is cached in a layer depends on the scales of those before it: a saved state says which it had, if any
void llama_query_scales_state_write(const llama_context & ctx, llama_io_write_i & io);

// reads that if it is there, throws if the context has other scales - nothing of the state has been used then
class llama_query_scales_state_reader : public llama_io_peek {
public:
    llama_query_scales_state_reader(const llama_context & ctx, llama_io_read_i & io);
};
