#include "rope-layer.h"

#include "log.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>

// per-layer RoPE factors on the command line, ref: src/llama-rope-layer.h

using json = nlohmann::json;

void common_require(bool ok, const std::string & message) {
    if (!ok) {
        throw std::runtime_error(message);
    }
}

json common_curve_load(const std::string & fname, const llama_model * model, size_t n_block) {
    std::ifstream file(fname, std::ios::binary);
    common_require(file.good(), "not a file that can be read");

    const json data = json::parse(file);
    common_require(data.is_object() && data.value("format", json()) == "lrope-curve" && data.value("version", json()) == 1,
            "not a curve file (format lrope-curve, version 1)");

    char arch[256] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));

    const json name  = data.value("architecture", json());
    const json count = data.value("block_count",  json());
    common_require((name.is_null() || name == std::string(arch)) && (count.is_null() || (count.is_number_integer() && count == n_block)),
            string_format("made for another model than this one (%s, %zu layers)", arch, n_block));

    return data;
}

// the layer_factors of a curve file
static json factors_from_file(const std::string & fname, const llama_model * model, size_t n_block) {
    common_require(std::ifstream(fname).good(), "neither a list of numbers such as 1,1.05,0.98 nor a file that can be read");

    const json list = common_curve_load(fname, model, n_block).value("layer_factors", json());
    common_require(!list.is_null(), string_format("has no layer_factors; lrope-gguf write MODEL --curve %s puts the factors of its curve into the "
                "model", fname.c_str()));
    return list;
}

static std::vector<float> factors_from_option(const std::string & value, const llama_model * model, size_t n_block) {
    const bool is_list = value.find_first_not_of("0123456789.,+-eE ") == std::string::npos;

    const json list = is_list ? json::parse("[" + value + "]") : factors_from_file(value, model, n_block);
    common_require(list.is_array() && std::all_of(list.begin(), list.end(), [](const json & item) { return item.is_number(); }),
            "layer_factors must be a list of numbers");

    auto factors = list.get<std::vector<double>>();

    // layers of a multi-token-prediction head keep 1
    const size_t n_layer = std::min<size_t>(n_block, llama_model_n_layer(model));

    common_require(n_layer > 0 && (factors.size() == n_layer || factors.size() == n_block),
            string_format("has %zu factors, but the model has %zu layers", factors.size(), n_layer));
    factors.resize(n_block, 1.0);
    common_require(std::count(factors.begin() + n_layer, factors.end(), 1.0) == (ptrdiff_t) (n_block - n_layer),
            "layers of a multi-token-prediction head keep factor 1");

    return std::vector<float>(factors.begin(), factors.end());
}

bool common_rope_layer_init(common_params & params, llama_context * ctx) {
    const std::string & value = params.rope_layer_factors;

    auto & factors = params.rope_layer_factors_used;
    factors.assign(llama_get_rope_layer_factors(ctx, nullptr, 0), 1.0f);

    try {
        if (!value.empty() && value != "off") {
            factors = factors_from_option(value, llama_get_model(ctx), factors.size());
        }
        common_require(value.empty() || llama_set_rope_layer_factors(ctx, factors.data(), factors.size()) == 0, "the model cannot use these factors");
    } catch (const std::exception & err) {
        LOG_ERR("%s: --rope-layer-factors %s: %s\n", __func__, value.c_str(), err.what());
        common_log_flush(common_log_main()); // the tool is about to end
        return false;
    }

    llama_get_rope_layer_factors(ctx, factors.data(), factors.size());

    const auto range = std::minmax_element(factors.begin(), factors.end());
    const auto n_one = std::count(factors.begin(), factors.end(), 1.0f);

    if (n_one < (ptrdiff_t) factors.size()) {
        LOG_INF("%s: RoPE factors from %g to %g, %zu of %zu layers differ from 1\n", __func__,
                *range.first, *range.second, factors.size() - n_one, factors.size());
    } else {
        LOG_INF("%s: RoPE factors are 1 in all %zu layers\n", __func__, factors.size()); // a stock library would not say so
    }

    return true;
}
