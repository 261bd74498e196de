#include "rope-layer.h"

#include "log.h"

#include <algorithm>

// query scales on the command line, ref: src/llama-query-scale.h

using json = nlohmann::json;

// the query_scales of a curve file, layer after layer
static std::vector<float> scales_from_file(const std::string & fname, const llama_context * ctx) {
    const llama_model * model = llama_get_model(ctx);

    const size_t n_block = llama_get_rope_layer_factors(ctx, nullptr, 0);
    const size_t n_layer = std::min<size_t>(n_block, llama_model_n_layer(model));

    const json rows = common_curve_load(fname, model, n_block).value("query_scales", json());
    common_require(!rows.is_null(), "has no query_scales");
    common_require(rows.is_array() && (rows.size() == n_layer || rows.size() == n_block),
            string_format("query_scales must be a list of %zu lists, one for each layer", n_layer));

    std::vector<float> scales;
    for (size_t il = 0; il < rows.size(); ++il) {
        const json & row = rows[il];
        const size_t n_head = llama_model_n_head_layer(model, il);
        common_require(row.is_array() && row.size() == n_head && std::all_of(row.begin(), row.end(), [](const json & item) { return item.is_number(); }),
                string_format("layer %zu of query_scales must be a list of %zu numbers, one for each head", il, n_head));
        for (const json & item : row) {
            scales.push_back((float) item.get<double>());
        }
    }

    // layers of a multi-token-prediction head may be left out
    scales.resize(llama_get_query_scales(ctx, nullptr, 0), 1.0f);

    return scales;
}

bool common_query_scales_init(common_params & params, llama_context * ctx) {
    const std::string & value = params.query_scales;

    auto & scales = params.query_scales_used;
    scales.assign(llama_get_query_scales(ctx, nullptr, 0), 1.0f);

    try {
        if (!value.empty() && value != "off") {
            scales = scales_from_file(value, ctx);
        }
        common_require(value.empty() || llama_set_query_scales(ctx, scales.data(), scales.size()) == 0, "the model cannot use these scales");
    } catch (const std::exception & err) {
        LOG_ERR("%s: --query-scales %s: %s\n", __func__, value.c_str(), err.what());
        common_log_flush(common_log_main()); // the tool is about to end
        return false;
    }

    llama_get_query_scales(ctx, scales.data(), scales.size());

    const size_t n_one = std::count(scales.begin(), scales.end(), 1.0f);

    if (n_one < scales.size()) {
        const auto range = std::minmax_element(scales.begin(), scales.end());
        LOG_INF("%s: query scales from %g to %g, %zu of %zu heads differ from 1\n", __func__,
                *range.first, *range.second, scales.size() - n_one, scales.size());
    } else {
        scales.clear();
    }

    return true;
}
