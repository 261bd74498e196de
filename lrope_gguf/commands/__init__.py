"""The subcommands of `lrope-gguf` that need no llama.cpp."""
