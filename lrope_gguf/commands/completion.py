"""`lrope-gguf completion`: a shell script that completes the commands, their options and files."""

from __future__ import annotations

import argparse
from contextlib import suppress
from importlib import import_module
from types import ModuleType

from lrope_gguf.completion import script

_INSTALL = """\
bash: source <(lrope-gguf completion bash)   in ~/.bashrc
zsh:  source <(lrope-gguf completion zsh)    in ~/.zshrc, after compinit
fish: lrope-gguf completion fish | source    in ~/.config/fish/config.fish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _INSTALL
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that is to read it")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from lrope_gguf.cli import COMMANDS, build_parser

    modules: dict[str, ModuleType] = {}
    for name, (module, _) in COMMANDS.items():
        with suppress(ModuleNotFoundError):  # of an extra that is not installed: its name alone is completed
            modules[name] = import_module(module)
    print(script(build_parser(modules), args.shell), end="")
    return 0
