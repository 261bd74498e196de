"""Subcommands that need a model, on click: options in, a call of the engine, text out; imports wait for the call."""
