#include "common.h"
#include "log.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <set>
#include <stdexcept>

// per-layer RoPE factors on the command line, ref: src/llama-rope-layer.h
// a document or a list is taken here exactly if lrope_gguf/curve.py takes it, tests/support/readers.py has the cases

using json = nlohmann::json;

static void require(bool ok, const char * message) {
    if (!ok) {
        throw std::runtime_error(message);
    }
}

// JSON of bounded size, with no key twice in an object
static json parse_document(std::istream & file) {
    std::string text((1 << 20) + 1, '\0');
    file.read(&text[0], text.size());
    text.resize(file.gcount());

    require(text.size() <= 1 << 20, "the file is above 1 MiB");
    require(text.find('\0') == std::string::npos, "not JSON"); // the parser would stop there

    std::vector<std::set<std::string>> keys; // of the lists and objects that are open
    size_t n_opened = 0;

    return json::parse(text, [&](int /*depth*/, json::parse_event_t event, json & parsed) {
        if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
            keys.emplace_back();
            require(keys.size() <= 32 && ++n_opened <= 1 << 16, "nested too deeply, or too many lists and objects");
        } else if (event == json::parse_event_t::object_end || event == json::parse_event_t::array_end) {
            keys.pop_back();
        } else if (event == json::parse_event_t::key) {
            require(keys.back().insert(parsed.get<std::string>()).second, "a key is there twice");
        }
        return true;
    });
}

static std::vector<double> get_positive(const json & list, const char * what) {
    std::vector<double> result;
    for (const auto & value : list) {
        require(list.is_array() && value.is_number() && value.get<double>() > 0.0, what);
        result.push_back(value.get<double>());
    }
    require(!result.empty(), what);
    return result;
}

// y of the Bezier curve at x: the same steps as in lrope_gguf/bezier.py
static double curve_eval(const std::vector<std::array<double, 2>> & curve, double x) {
    double t = 0.5;

    for (int i = 0; ; ++i) {
        // de Casteljau's algorithm
        auto cur = curve;
        for (; cur.size() > 1; cur.pop_back()) {
            for (size_t k = 0; k + 1 < cur.size(); ++k) {
                cur[k] = { cur[k][0] + t*(cur[k + 1][0] - cur[k][0]), cur[k][1] + t*(cur[k + 1][1] - cur[k][1]) };
            }
        }
        if (i == 54) {
            return x <= 0.0 ? curve.front()[1] : x >= 1.0 ? curve.back()[1] : cur[0][1];
        }
        t += std::ldexp(cur[0][0] < x ? 0.25 : -0.25, -i);
    }
}

// the factors are those that the file lists, a curve beside them is only checked
static std::vector<double> factors_from_file(const std::string & fname, const llama_model * model, size_t n_block, size_t n_layer) {
    std::ifstream file(fname, std::ios::binary);
    require(file.good(), "neither a list of numbers such as 1,1.05,0.98 nor a file that can be read");

    const json data = parse_document(file);

    const auto get = [&](const char * key) { return data.contains(key) ? data.at(key) : json(); };

    require(get("format") == "lrope-curve" && get("version") == 1, "not a curve file (format lrope-curve, version 1)");

    char arch[256] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
    const json name = get("architecture"), count = get("block_count");
    if (!(name.is_null() || name == std::string(arch)) || !(count.is_null() || (count.is_number_integer() && count == n_block))) {
        throw std::runtime_error(string_format("made for another model than this one (%s, %zu layers)", arch, n_block));
    }

    const json list = get("layer_factors"), points = get("control_points"), bounds = get("bounds");

    std::vector<double> factors, limits = { 0.5, 4.0 };
    if (!list.is_null()) {
        factors = get_positive(list, "layer_factors must be a list of numbers above 0");
    }
    if (!bounds.is_null()) {
        limits = get_positive(bounds, "bounds must be numbers above 0");
    }
    require(limits.size() == 2 && limits[0] <= limits[1], "bounds must be [lowest, highest]");

    if (points.is_null()) {
        return factors;
    }

    require(points.is_array() && points.size() >= 2 && points.size() <= 64, "control_points must be 2 to 64 points");

    std::vector<std::array<double, 2>> curve;
    for (const auto & point : points) {
        require(point.is_array() && point.size() == 2 && point[0].is_number() && point[1].is_number(), "a control point must be [x, y]");
        curve.push_back({ point[0].get<double>(), point[1].get<double>() });
        require(limits[0] <= curve.back()[1] && curve.back()[1] <= limits[1], "a control point is outside the bounds");
    }

    require(curve.front()[0] == 0.0 && curve.back()[0] == 1.0 &&
            std::is_sorted(curve.begin(), curve.end(), [](const auto & a, const auto & b) { return a[0] < b[0]; }),
            "x of the control points must go from 0 to 1 without a step back");

    if (factors.size() != n_layer) {
        throw std::runtime_error(string_format("lists no factors for %zu layers, only a curve; lrope-gguf write MODEL --curve %s "
                    "puts the factors of a curve into the model", n_layer, fname.c_str()));
    }
    for (size_t i = 0; i < n_layer; ++i) {
        require(std::fabs(factors[i] - curve_eval(curve, n_layer > 1 ? i/(n_layer - 1.0) : 0.0)) <= 1e-5,
                "layer_factors are not those of control_points; remove one of the two");
    }

    return factors;
}

static std::vector<float> factors_from_option(const std::string & value, const llama_model * model, size_t n_block) {
    // layers of a multi-token-prediction head keep 1
    const size_t n_layer = std::min<size_t>(n_block, llama_model_n_layer(model));

    require(n_layer > 0, "this is a multi-token-prediction head alone, whose layers keep factor 1");

    const bool is_list = value.find_first_not_of("0123456789.,+-eE ") == std::string::npos;

    auto factors = is_list ? json::parse("[" + value + "]").get<std::vector<double>>() : factors_from_file(value, model, n_block, n_layer);

    if (factors.empty() || (factors.size() != n_layer && factors.size() != n_block)) {
        throw std::runtime_error(string_format("has %zu factors, but the model has %zu layers", factors.size(), n_layer));
    }
    factors.resize(n_block, 1.0);

    require(std::count(factors.begin() + n_layer, factors.end(), 1.0) == (ptrdiff_t) (n_block - n_layer),
            "layers of a multi-token-prediction head keep factor 1");

    return std::vector<float>(factors.begin(), factors.end());
}

bool common_rope_layer_init(common_params & params, llama_context * ctx) {
    const std::string & value = params.rope_layer_factors;

    auto & factors = params.rope_layer_factors_used;
    factors.assign(llama_get_rope_layer_factors(ctx, nullptr, 0), 1.0f);

    try {
        if (!value.empty()) {
            if (value != "off") {
                factors = factors_from_option(value, llama_get_model(ctx), factors.size());
            }
            if (llama_set_rope_layer_factors(ctx, factors.data(), factors.size()) != 0) {
                throw std::runtime_error("the model cannot use these factors");
            }
        }
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

    if (llama_rope_dynamic_level(ctx) >= 0) {
        LOG_INF("%s: RoPE scaling is dynamic, there is none up to the trained length\n", __func__);
    }

    return true;
}
