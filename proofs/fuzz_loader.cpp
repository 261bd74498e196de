// loads and uses GGUF files that may be hostile, each in a process of its own, so that no file can hide another
//
// usage: fuzz_loader < LIST_OF_PATHS
//
// prints for each file one line "@file PATH", then what the file did:
//
//   @ok                   loaded, decoded, freed
//   @refused MESSAGES     an error of the library, and its messages
//   @died STATUS          a signal or a sanitizer's exit status, after the report of the sanitizer
//
// LROPE_STOCK: for a library without the series

#include "llama.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

static const unsigned TIME_LIMIT_S = 60;

static std::string messages;

static void log_error(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        messages += text;
    }
}

// the messages of a hostile file may hold anything: one line of printable text
static std::string one_line(const std::string & text) {
    std::string result;
    for (const char c : text) {
        if (c == '\n') {
            result += "; ";
        } else {
            result += c >= ' ' && c <= '~' ? c : '?';
        }
    }
    return result;
}

struct deleter {
    void operator()(llama_model   * model) const { llama_model_free(model); }
    void operator()(llama_context * ctx)   const { llama_free(ctx); }
};

#ifndef LROPE_STOCK

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "check failed: %s\n", what);
        abort();
    }
}

static std::vector<float> get_factors(const llama_context * ctx) {
    const int32_t n = llama_get_rope_layer_factors(ctx, nullptr, 0);
    check(n > 0, "a model has layers");

    std::vector<float> factors(n);
    check(llama_get_rope_layer_factors(ctx, factors.data(), factors.size()) == n, "the number of factors stays");

    return factors;
}

// what was loaded is in range, can be set again, and cannot be replaced by something bad
static void check_factors(const llama_model * model, llama_context * ctx) {
    const std::vector<float> factors = get_factors(ctx);

    for (const float s : factors) {
        check(s >= 1.0f/1024.0f && s <= 1024.0f, "factors are in range");
    }

    std::vector<float> own(factors.size());
    if (llama_model_rope_layer_factors(model, own.data(), own.size())) {
        // not layer by layer: some share the keys, and so the factor, of another one
        for (const float s : factors) {
            check(std::count(own.begin(), own.end(), s) > 0, "the context uses the factors of the file");
        }
    }
    check(!llama_model_rope_layer_factors(model, own.data(), own.size() + 1), "a wrong length is refused");

    check(llama_set_rope_layer_factors(ctx, factors.data(), factors.size()) == 0, "factors can be set again");
    check(llama_set_rope_layer_factors(ctx, factors.data(), factors.size() - 1) < 0, "a missing factor is refused");

    std::vector<float> bad = factors;
    bad.back() = NAN;
    check(llama_set_rope_layer_factors(ctx, bad.data(), bad.size()) < 0, "NaN is refused");
    check(get_factors(ctx) == factors, "refused factors change nothing");

    check(llama_set_rope_layer_factors(ctx, nullptr, 0) == 0, "the factors of the file come back");
    check(get_factors(ctx) == factors, "the factors of the file are the same as before");
}

#endif

static bool use(const char * path, llama_load_mode load_mode) {
    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.load_mode    = load_mode;

    std::unique_ptr<llama_model, deleter> model { llama_model_load_from_file(path, mparams) };
    if (!model) {
        return false;
    }

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 64;
    cparams.n_batch         = 64;
    cparams.n_ubatch        = 64;
    cparams.n_threads       = 1;
    cparams.n_threads_batch = 1;

    std::unique_ptr<llama_context, deleter> ctx { llama_init_from_model(model.get(), cparams) };
    if (!ctx) {
        return false;
    }

#ifndef LROPE_STOCK
    check_factors(model.get(), ctx.get());
#endif

    std::vector<llama_token> tokens = { 1, 2, 3 };
    if (llama_decode(ctx.get(), llama_batch_get_one(tokens.data(), tokens.size())) != 0) {
        return false;
    }

    const float * logits  = llama_get_logits_ith(ctx.get(), -1);
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));

    // every value is read, whatever it is
    volatile float sum = 0.0f;
    for (int32_t i = 0; logits && i < n_vocab; ++i) {
        sum = sum + logits[i];
    }

    return true;
}

int main() {
    llama_log_set(log_error, nullptr);
    llama_backend_init();

    // all of them before the first process: at its end, a process moves the shared position of a file on the standard input
    std::vector<std::string> paths;
    for (std::string path; std::getline(std::cin, path);) {
        paths.push_back(path);
    }

    for (size_t i = 0; i < paths.size(); ++i) {
        printf("@file %s\n", paths[i].c_str());
        fflush(stdout);

        const pid_t pid = fork();
        if (pid < 0) {
            perror("fork");
            return 1;
        }

        if (pid == 0) {
            alarm(TIME_LIMIT_S);
            if (use(paths[i].c_str(), i % 2 ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE)) {
                printf("@ok\n");
            } else {
                printf("@refused %s\n", one_line(messages).c_str());
            }
            fflush(stdout);
            exit(0); // a sanitizer looks for leaks now
        }

        int status = 0;
        waitpid(pid, &status, 0);
        if (WIFSIGNALED(status)) {
            printf("@died signal %d\n", WTERMSIG(status));
        } else if (WEXITSTATUS(status) != 0) {
            printf("@died exit status %d\n", WEXITSTATUS(status));
        }
        fflush(stdout);
    }

    llama_backend_free();

    return 0;
}
