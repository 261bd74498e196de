"""The subcommands that need a model: each module has `add_arguments` and `run`."""
