#pragma once

#include "llama-io.h"

struct llama_context;

// a reader that looks at the first number, so that a state may begin with a mark or not
class llama_io_peek : public llama_io_read_i {
public:
    explicit llama_io_peek(llama_io_read_i & io);

    void read(void * dst, size_t size) override;
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override;

    void discard() override;

    size_t n_bytes() override;

protected:
    bool is_empty() const { return n_head == 0; }

    // whether the number is this one, which has been read then
    bool take(uint32_t magic);

private:
    llama_io_read_i & io;

    char   head[4];
    size_t n_head = 0;
};

// a saved state says what its keys were rotated with, if that is not what the model alone would say:
// per-layer factors or a level of dynamic scaling. A state without this mark is one of a context without these

// writes the mark, or nothing
void llama_rope_state_write(const llama_context & ctx, llama_io_write_i & io);

// reads the mark if there is one, and brings the context to its level
// throws if the context rotates keys otherwise - nothing of the state has been used then
class llama_rope_state_reader : public llama_io_peek {
public:
    llama_rope_state_reader(llama_context & ctx, llama_io_read_i & io);
};
