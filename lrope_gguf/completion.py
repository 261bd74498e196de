"""Scripts that complete the command line in bash, zsh and fish, made from its argparse definitions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from shlex import quote

_FILES = frozenset(("FILE", "OUT", "DIR", "STUDY"))  # metavars
_MODEL = "MODEL"


@dataclass(frozen=True)
class Argument:
    """An option, or where `flags` is empty a positional argument.

    `value` says what follows: None (nothing), `"model"` (a GGUF file), `"file"`, `"other"`, or the choices.
    """

    flags: tuple[str, ...]
    value: str | tuple[str, ...] | None
    summary: str


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    name: str
    summary: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> list[Argument]:
        """The arguments with flags."""
        return [argument for argument in self.arguments if argument.flags]

    @property
    def positionals(self) -> list[Argument]:
        """The arguments without."""
        return [argument for argument in self.arguments if not argument.flags]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser with subcommands, for `"bash"`, `"zsh"` or `"fish"`."""
    commands, general = _commands(parser)
    writers: dict[str, Callable[[str, list[Command], list[Argument]], str]] = {
        "bash": _bash,
        "zsh": _zsh,
        "fish": _fish,
    }
    return writers[shell](parser.prog, commands, general)


def _commands(parser: argparse.ArgumentParser) -> tuple[list[Command], list[Argument]]:
    commands, general = [], []
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [
                Command(name, summaries[name], tuple(_argument(inner, part) for inner in part._actions))
                for name, part in action.choices.items()
            ]
        else:
            general.append(_argument(action, parser))
    return commands, general


def _argument(action: argparse.Action, parser: argparse.ArgumentParser) -> Argument:
    value: str | tuple[str, ...] | None = "other"
    if action.nargs == 0:
        value = None
    elif action.choices is not None:
        value = tuple(map(str, action.choices))
    elif action.metavar == _MODEL:
        value = "model"
    elif action.metavar in _FILES:
        value = "file"
    summary = (action.help or "") % {**vars(action), "prog": parser.prog}
    return Argument(tuple(action.option_strings), value, summary)


def _function(program: str) -> str:
    return "_" + re.sub(r"\W", "_", program)


def _bash(program: str, commands: list[Command], general: list[Argument]) -> str:
    def words(argument: Argument) -> str:
        if argument.value in ("model", "file"):
            return f"{name}_{argument.value}s"
        return f"{name}_words {quote(' '.join(argument.value))}" if isinstance(argument.value, tuple) else ":"

    def flags(arguments: list[Argument]) -> str:
        return quote(" ".join(flag for argument in arguments for flag in argument.flags))

    name = _function(program)
    cases = []
    for command in commands:
        lines = [f"        {command.name})", '            case "$previous" in']
        lines += [
            f"                {'|'.join(option.flags)}) {words(option)}; return ;;"
            for option in command.options
            if option.value is not None
        ]
        lines += [
            "            esac",
            f'            if [[ "$current" == -* ]]; then {name}_words {flags(command.options)}',
        ]
        lines += [f"            else {words(command.positionals[0])}"] if command.positionals else []
        cases.append("\n".join([*lines, "            fi ;;"]))
    return f"""\
# bash completion for {program}
{name}_words() {{
    COMPREPLY=($(compgen -W "$1" -- "$current"))
}}
{name}_reply() {{
    compopt -o filenames 2>/dev/null
    local line
    while IFS= read -r line; do COMPREPLY+=("$line"); done
}}
{name}_files() {{
    {name}_reply < <(compgen -f -- "$current")
}}
{name}_models() {{
    {name}_reply < <(compgen -d -- "$current"; compgen -f -X '!*.[gG][gG][uU][fF]' -- "$current")
}}
{name}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}" command="" i
    COMPREPLY=()
    # bash breaks --option=value into three words
    if [[ "$current" == = ]]; then
        current=""
    elif [[ "$previous" == = && $COMP_CWORD -gt 1 ]]; then
        previous="${{COMP_WORDS[COMP_CWORD - 2]}}"
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ "${{COMP_WORDS[i]}}" != -* ]]; then
            command="${{COMP_WORDS[i]}}"
            break
        fi
    done
    case "$command" in
        "")
            if [[ "$current" == -* ]]; then {name}_words {flags(general)}
            else {name}_words {quote(" ".join(command.name for command in commands))}
            fi ;;
{chr(10).join(cases)}
    esac
}}
complete -F {name} {program}
"""


def _zsh(program: str, commands: list[Command], general: list[Argument]) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([\\:\[\]])", r"\\\1", text)

    def value(argument: Argument) -> str:
        if argument.value == "model":
            return ":model:_files -g '*.(#i)gguf(-.)'"
        if argument.value == "file":
            return ":file:_files"
        if isinstance(argument.value, tuple):
            return f":value:({' '.join(argument.value)})"
        return "" if argument.value is None else ":value: "

    def specification(argument: Argument, position: int = 0) -> str:
        if not argument.flags:
            return quote(f"{position}{value(argument)}")
        others = f"({' '.join(argument.flags)})" if len(argument.flags) > 1 else ""
        # --option=value and --option value
        return " ".join(
            quote(f"{others}{flag}{'=' if argument.value is not None and flag.startswith('--') else ''}"
                  f"[{escaped(argument.summary)}]{value(argument)}")
            for flag in argument.flags
        )  # fmt: skip

    name = _function(program)
    cases = []
    for command in commands:
        specifications = [specification(option) for option in command.options]
        specifications += [specification(item, i + 1) for i, item in enumerate(command.positionals)]
        cases.append(
            " \\\n                ".join([f"        {command.name})\n            _arguments", *specifications]) + " ;;"
        )
    described = "\n".join(f"        {quote(f'{command.name}:{escaped(command.summary)}')}" for command in commands)
    first = " ".join(specification(argument) for argument in general)
    return f"""\
#compdef {program}
{name}() {{
    local context state state_descr line
    typeset -A opt_args
    local -a commands=(
{described}
    )
    _arguments -C {first} '1: :->command' '*:: :->arguments'
    case "$state" in
        command) _describe command commands ;;
        arguments) case "$line[1]" in
{chr(10).join(cases)}
        esac ;;
    esac
}}
if [[ "$funcstack[1]" == {name} ]]; then {name} "$@"; else compdef {name} {program}; fi
"""


def _fish(program: str, commands: list[Command], general: list[Argument]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def value(argument: Argument) -> str:
        if argument.value == "model":
            return "-k -a '(__fish_complete_suffix .gguf)'"
        return f"-a {quoted(' '.join(argument.value))}" if isinstance(argument.value, tuple) else ""

    def flags(argument: Argument) -> str:
        parts = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in argument.flags]
        if argument.value is not None:
            parts.append("-r -F" if argument.value == "file" else "-x")
        return " ".join(parts)

    lines = [f"# fish completion for {program}", f"complete -c {program} -f"]
    lines += [
        f"complete -c {program} -n __fish_use_subcommand {flags(argument)} -d {quoted(argument.summary)}"
        for argument in general
    ]
    for command in commands:
        lines.append(f"complete -c {program} -n __fish_use_subcommand -a {command.name} -d {quoted(command.summary)}")
        condition = quoted(f"__fish_seen_subcommand_from {command.name}")
        for argument in command.arguments:
            parts = ["complete", f"-c {program}", f"-n {condition}", flags(argument) if argument.flags else ""]
            parts += [value(argument), f"-d {quoted(argument.summary)}" if argument.flags else ""]
            lines.append(" ".join(part for part in parts if part))
    return "\n".join(lines) + "\n"
