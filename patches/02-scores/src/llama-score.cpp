#include "llama-score.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-vocab.h"

#include <algorithm>
#include <cmath>
#include <numeric>

static const char * const LLAMA_SCORE_NODES[] = { "score_logit", "score_logit_max", "score_prob_max" };

class llm_graph_input_score : public llm_graph_input_i {
public:
    llm_graph_input_score(const llama_scores & scores) : scores(scores) {}
    virtual ~llm_graph_input_score() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        std::vector<llama_token> data(targets->ne[1]);
        for (size_t i = 0; i < data.size(); ++i) {
            data[i] = scores.targets.at(scores.out_ids.at(scores.n_done + i));
        }

        ggml_backend_tensor_set(targets, data.data(), 0, ggml_nbytes(targets));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return !scores.targets.empty() && targets->ne[1] == params.n_outputs;
    }

    ggml_tensor * targets = nullptr; // I32 [1, n_outputs]

    const llama_scores & scores;
};

bool llama_scores::begin(const std::vector<int32_t> & out_ids, size_t n_tokens) {
    if (targets.empty()) {
        return true;
    }

    this->out_ids = out_ids;

    n_done = 0;

    return targets.size() >= n_tokens;
}

void llama_scores::build(llm_graph_result & res, int64_t n_outputs) {
    ggml_tensor * logits = res.t_logits;

    if (targets.empty() || logits == nullptr || n_outputs == 0 || logits->ne[1] != n_outputs) {
        return;
    }

    ggml_context * ctx = res.get_ctx();

    auto inp = std::make_unique<llm_graph_input_score>(*this);

    inp->targets = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_outputs);
    ggml_set_input(inp->targets);

    // note: NaN to 0, some backends find no index of the largest among NaNs
    ggml_tensor * probs = ggml_relu(ctx, ggml_soft_max(ctx, logits));
    ggml_tensor * best  = ggml_reshape_2d(ctx, ggml_argmax(ctx, probs), 1, n_outputs);

    const std::pair<ggml_tensor *, ggml_tensor *> gather[] = { { logits, inp->targets }, { logits, best }, { probs, best } };

    for (int i = 0; i < 3; ++i) {
        const auto & [rows, ids] = gather[i];

        ggml_tensor * cur = ggml_get_rows(ctx, ggml_reshape_3d(ctx, rows, 1, rows->ne[0], n_outputs), ids); // [1, 1, n_outputs]

        ggml_set_name(cur, LLAMA_SCORE_NODES[i]);
        ggml_set_output(cur);
        ggml_build_forward_expand(res.get_gf(), cur);
    }

    res.add_input(std::move(inp));
    res.t_logits = nullptr;
}

void llama_scores::extract(ggml_backend_sched_t sched, ggml_cgraph * gf, size_t n_outputs) {
    if (targets.empty() || n_outputs == 0) {
        return;
    }

    for (int i = 0; i < 3; ++i) {
        float * out = values.data() + i*(values.size()/3) + n_done;

        ggml_tensor * cur = ggml_graph_get_tensor(gf, LLAMA_SCORE_NODES[i]);
        if (cur == nullptr) {
            std::fill_n(out, n_outputs, NAN); // a model without logits
            continue;
        }

        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(sched, cur), cur, out, 0, n_outputs*sizeof(float));
    }

    n_done += n_outputs;
}

//
// interface implementation
//

int32_t llama_context::set_score_targets(const llama_token * targets, size_t n) {
    n = targets ? n : 0;

    for (size_t i = 0; i < n; ++i) {
        if (targets[i] < 0 || targets[i] >= (llama_token) model.vocab.n_tokens()) {
            LLAMA_LOG_ERROR("%s: target %zu is not a token: %d\n", __func__, i, targets[i]);
            return -1;
        }
    }

    synchronize();

    // other graphs
    sched_need_reserve |= scores.targets.empty() != (n == 0);

    scores.targets.assign(targets, targets + n);
    scores.values.resize(3*(size_t) cparams.n_batch);
    scores.n_done = 0;

    return 0;
}

int32_t llama_context::get_scores(float * logprobs, bool * top, size_t n) {
    synchronize();

    const size_t n_scores = scores.n_done;
    if (n < n_scores) {
        return (int32_t) n_scores;
    }

    // in the order of the batch
    std::vector<size_t> order(n_scores);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores.out_ids[a] < scores.out_ids[b]; });

    for (size_t i = 0; i < n_scores; ++i) {
        const float * value = scores.values.data() + order[i];

        const size_t stride = scores.values.size()/3;
        const double logit  = value[0];
        const double max    = value[stride];
        const double prob   = value[2*stride];

        logprobs[i] = prob > 0.0 ? (float) (logit - max + std::log(prob)) : NAN;
        top[i]      = prob > 0.0 && logit >= max;
    }

    return (int32_t) n_scores;
}

int32_t llama_set_score_targets(llama_context * ctx, const llama_token * targets, size_t n) {
    return ctx->set_score_targets(targets, n);
}

int32_t llama_get_scores(llama_context * ctx, float * logprobs, bool * top, size_t n) {
    return ctx->get_scores(logprobs, top, n);
}
