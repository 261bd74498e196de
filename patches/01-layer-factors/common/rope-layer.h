#pragma once

#include "common.h"

#include <nlohmann/json.hpp>

// what options that take a curve file share

// throws the message if not ok
void common_require(bool ok, const std::string & message);

// the content of a curve file, throws if it is none or was made for another model
nlohmann::json common_curve_load(const std::string & fname, const llama_model * model, size_t n_block);
