#pragma once

#include "llama.h"

#include "ggml-backend.h"

#include <vector>

// new API, not yet in llama.h
extern "C" {
    // Score given tokens instead of returning logits: targets[i] is scored with token i of each following llama_decode()
    // Targets of tokens without an output do not count, NULL turns it off
    // Returns 0 on success, -1 if a target is not in the vocabulary
    LLAMA_API int32_t llama_set_score_targets(struct llama_context * ctx, const llama_token * targets, size_t n);

    // Get the scores of the last llama_decode(), in the order of the logits: the log-probability of each target (NAN if the
    // logits are not numbers), and whether no token is more likely
    // Returns the number of outputs, writes them if n is not less
    LLAMA_API int32_t llama_get_scores(struct llama_context * ctx, float * logprobs, bool * top, size_t n);
}

class llm_graph_result;

// the log-probabilities of given tokens, computed in the graph: for each output, a few numbers leave the device instead of
// the logits of the whole vocabulary
// note: not for LLAMA_SPLIT_MODE_TENSOR, which spreads a row of logits over devices
struct llama_scores {
    std::vector<llama_token> targets; // the target of each token of a batch, empty if the logits are wanted
    std::vector<int32_t>     out_ids; // [n_outputs] the tokens of the batch that have outputs, in the order of computation
    std::vector<float>       values;  // [3][n_batch] of each output: logit of the target, largest logit, largest probability

    size_t n_done = 0; // outputs of the batch that are computed

    // start a batch, returns false if there are targets for fewer tokens
    bool begin(const std::vector<int32_t> & out_ids, size_t n_tokens);

    // add the nodes to a graph and withhold its logits
    void build(llm_graph_result & res, int64_t n_outputs);

    // copy the results of a ubatch to the host (async)
    void extract(ggml_backend_sched_t sched, ggml_cgraph * gf, size_t n_outputs);
};
