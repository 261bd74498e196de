#include "rope-layer.h"

#include "log.h"

#include <algorithm>

// RoPE factors of KV heads on the command line, ref: src/llama-rope-head.h

using json = nlohmann::json;

// the head_factors of a curve file, layer after layer
static std::vector<float> factors_from_file(const std::string & fname, const llama_context * ctx) {
    const llama_model * model = llama_get_model(ctx);

    const size_t n_block = llama_get_rope_layer_factors(ctx, nullptr, 0);
    const size_t n_layer = std::min<size_t>(n_block, llama_model_n_layer(model));

    const json rows = common_curve_load(fname, model, n_block).value("head_factors", json());
    common_require(!rows.is_null(), "has no head_factors");
    common_require(rows.is_array() && (rows.size() == n_layer || rows.size() == n_block),
            string_format("head_factors must be a list of %zu lists, one for each layer", n_layer));

    std::vector<float> factors;
    for (size_t il = 0; il < rows.size(); ++il) {
        const json & row = rows[il];
        const size_t n_head = llama_model_n_head_kv_layer(model, il);
        common_require(row.is_array() && row.size() == n_head && std::all_of(row.begin(), row.end(), [](const json & item) { return item.is_number(); }),
                string_format("layer %zu of head_factors must be a list of %zu numbers, one for each KV head", il, n_head));
        for (const json & item : row) {
            factors.push_back((float) item.get<double>());
        }
    }

    // layers of a multi-token-prediction head may be left out
    factors.resize(llama_get_rope_head_factors(ctx, nullptr, 0), 1.0f);

    return factors;
}

bool common_rope_head_init(common_params & params, llama_context * ctx) {
    const std::string & value = params.rope_head_factors;

    const size_t n_head = llama_get_rope_head_factors(ctx, nullptr, 0);

    auto & factors = params.rope_head_factors_used;
    factors.assign(n_head, 1.0f);

    // layer factors that were asked for take the place of what the model has
    bool used = params.rope_layer_factors.empty() && llama_model_rope_head_factors(llama_get_model(ctx), factors.data(), n_head);

    try {
        if (value == "off" && used) {
            common_require(llama_set_rope_layer_factors(ctx, nullptr, 0) == 0, "the model cannot go without them");
            used = false;
        } else if (!value.empty() && value != "off") {
            factors = factors_from_file(value, ctx);
            common_require(llama_set_rope_head_factors(ctx, factors.data(), factors.size()) == 0, "the model cannot use these factors");
            used = true;
        }
    } catch (const std::exception & err) {
        LOG_ERR("%s: --rope-head-factors %s: %s\n", __func__, value.c_str(), err.what());
        common_log_flush(common_log_main()); // the tool is about to end
        return false;
    }

    auto & of_layers = params.rope_layer_factors_used;
    llama_get_rope_layer_factors(ctx, of_layers.data(), of_layers.size());

    if (!used) {
        factors.clear();
        return true;
    }
    llama_get_rope_head_factors(ctx, factors.data(), n_head);

    const auto range = std::minmax_element(factors.begin(), factors.end());
    const auto n_one = std::count(factors.begin(), factors.end(), 1.0f);
    LOG_INF("%s: RoPE factors of KV heads from %g to %g, %zu of %zu KV heads differ from 1\n", __func__,
            *range.first, *range.second, n_head - n_one, n_head);

    return true;
}
