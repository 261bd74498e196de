#include "common.h"
#include "log.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <fstream>
#include <stdexcept>

// per-layer RoPE factors on the command line, ref: src/llama-rope-layer.h

using curve_points = std::vector<std::array<double, 2>>;

// y of the Bezier curve at x, with x of the control points going from 0 to 1 without a step back
static double curve_eval(const curve_points & curve, double x) {
    double t_min = 0.0;
    double t_max = 1.0;

    curve_points cur;

    for (int i = 0; i < 64; ++i) {
        const double t = 0.5*(t_min + t_max);

        // de Casteljau's algorithm
        for (cur = curve; cur.size() > 1; cur.pop_back()) {
            for (size_t k = 0; k + 1 < cur.size(); ++k) {
                cur[k] = { cur[k][0] + t*(cur[k + 1][0] - cur[k][0]), cur[k][1] + t*(cur[k + 1][1] - cur[k][1]) };
            }
        }

        (cur[0][0] < x ? t_min : t_max) = t;
    }

    return x <= 0.0 ? curve.front()[1] : x >= 1.0 ? curve.back()[1] : cur[0][1];
}

// layer il of n stands at x = il/(n - 1)
static std::vector<float> factors_from_file(const std::string & fname, const llama_model * model, size_t n) {
    std::ifstream file(fname);
    if (!file) {
        throw std::runtime_error("cannot open the file");
    }

    const auto data = nlohmann::json::parse(file);
    if (!data.is_object() || data.value("format", "") != "lrope-curve" || data.value("version", 0) != 1) {
        throw std::runtime_error("not a curve file (format lrope-curve, version 1)");
    }

    char arch[256] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
    if (data.value("architecture", arch) != arch || data.value("block_count", n) != n) {
        throw std::runtime_error(string_format("made for another model than this one (%s, %zu layers)", arch, n));
    }

    if (data.contains("layer_factors") && (data.at("layer_factors").size() == n || !data.contains("control_points"))) {
        return data.at("layer_factors").get<std::vector<float>>();
    }

    const auto curve = data.at("control_points").get<curve_points>();
    if (curve.size() < 2 || curve.front()[0] != 0.0 || curve.back()[0] != 1.0 ||
        !std::is_sorted(curve.begin(), curve.end(), [](const auto & a, const auto & b) { return a[0] < b[0]; })) {
        throw std::runtime_error("x of the control points must go from 0 to 1 without a step back");
    }

    std::vector<float> result;
    for (size_t il = 0; il < n; ++il) {
        result.push_back((float) curve_eval(curve, n > 1 ? il/(n - 1.0) : 0.0));
    }

    return result;
}

bool common_rope_layer_init(common_params & params, llama_context * ctx) {
    const std::string & value = params.rope_layer_factors;

    auto & factors = params.rope_layer_factors_used;
    factors.assign(llama_get_rope_layer_factors(ctx, nullptr, 0), 1.0f);

    try {
        if (!value.empty()) {
            if (value.find_first_not_of("0123456789.,+-eE ") == std::string::npos) {
                factors = nlohmann::json::parse("[" + value + "]").get<std::vector<float>>();
            } else if (value != "off") {
                factors = factors_from_file(value, llama_get_model(ctx), factors.size());
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
    }

    return true;
}
