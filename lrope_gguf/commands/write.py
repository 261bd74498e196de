"""`lrope-gguf write`: store layer factors in a model's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from lrope_gguf.commands.options import FILE, Command, Numbers, exactly_one, model_argument, output_options
from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.curve import CurveFile, source_name
from lrope_gguf.errors import LropeError
from lrope_gguf.files import check_output
from lrope_gguf.layout import CURVE_KEY, factors_key
from lrope_gguf.metadata import WritePlan, WriteResult, plan_write, storable_factors, write_factors
from lrope_gguf.model_info import ModelInfo, read_model, shortest
from lrope_gguf.presets import plan_preset, write_preset
from lrope_gguf.rope_scaling import differences
from lrope_gguf.stores import model_name, reference
from lrope_gguf.text import command_line, printable, say

_TYPE = re.compile(r"[a-z0-9_]{1,16}")


@click.command("write", cls=Command)
@model_argument
@click.option("--curve", type=FILE, metavar="FILE", help="curve file, such as a search's best.json")
@click.option("--factors", type=Numbers(), metavar="F0,F1,...", help="one factor a layer")
@click.option("--uniform", type=float, metavar="S", help="the same factor for all layers")
@output_options
@click.option("--mapped-ok", is_flag=True, help="change MODEL in place even while a running program maps it")
@click.option(
    "--preset", type=FILE, metavar="INI",
    help="leave MODEL as it is, and write an entry for it and the factors into this file, for llama-server "
         "--models-preset",
)  # fmt: skip
@click.option("--preset-name", metavar="NAME", help="that entry's name (MODEL's, with -lrope)")
def command(
    model: str,
    curve: str | None,
    factors: tuple[float, ...] | None,
    uniform: float | None,
    output: str | None,
    dry_run: bool,
    quiet: bool,
    mapped_ok: bool,
    preset: str | None,
    preset_name: str | None,
) -> None:
    """Store layer factors in MODEL."""
    exactly_one(curve=curve, factors=factors, uniform=uniform)
    if preset is not None and output is not None:
        raise click.UsageError("argument --preset: not allowed with argument --output")
    if preset_name is not None and preset is None:
        raise click.UsageError("argument --preset-name: needs --preset INI")
    info = read_model(model)
    curve_json = None
    served = _Served()
    if curve is not None:
        if output is not None:
            check_output("--output", output, {"--curve": curve})
        document, factors = curve_for(curve, info)
        curve_json = document.dumps(compact=True)
        served = _served(document, info)
    elif uniform is not None:
        factors = (uniform,) * (info.n_layer or 1)
    if preset is not None:
        check_output("--preset", preset, {"MODEL": model, "--curve": curve})
        entry = _preset_options(model, info, factors or (), served)
        report(*_preset(preset, preset_name or _preset_name(model, info), entry, served, dry_run, quiet))
        return
    if dry_run:
        plan = plan_write(model, factors or (), curve_json=curve_json, output=output, mapped_ok=mapped_ok)
        report((*served.notes, *plan.notes), [] if quiet else _plan_lines(plan, info))
        return
    with CopyProgress(quiet=quiet) as progress:
        result = write_factors(
            model, factors or (), curve_json=curve_json, output=output, progress=progress, mapped_ok=mapped_ok
        )
    done = {
        "in place": f"written in place ({result.bytes_written} bytes)",
        "rewritten": f"written ({result.bytes_written} bytes, {whole_file(result)})",
        "unchanged": "unchanged, it held them already",
    }[result.how]
    server = command_line(["llama-server", "-m", str(result.path), *served.options])
    lines = [f"{result.path}: {done}; {_factors(result.factors)}; next: {server}"]
    report((*served.notes, *result.notes), [] if quiet else lines)


def _preset_options(model: str, info: ModelInfo, factors: Iterable[float], served: _Served) -> dict[str, str]:
    """The entry of a model that keeps its file: which model, which factors, and what else the server must be told."""
    stored = storable_factors(info, factors)
    name = reference(model)
    which = {"model": str(Path(model).absolute())} if name is None else {"hf": name}
    listed = ",".join(f"{shortest(factor):.9g}" for factor in stored)
    options = zip(served.options[::2], served.options[1::2], strict=True)
    return which | {"rope-layer-factors": listed} | {option.removeprefix("--"): value for option, value in options}


def _preset_name(model: str, info: ModelInfo) -> str:
    """A name for an entry: the file's, or the model's own where the file is called after a hash."""
    name = model_name(model)
    if re.search("[0-9a-f]{40}", name):
        name = info.name or "model"
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'model'}-lrope"


def _preset(
    path: str, name: str, options: dict[str, str], served: _Served, dry_run: bool, quiet: bool
) -> tuple[list[str], list[str]]:
    """Write the entry, unless told not to; notes, and what to say."""
    kept = (plan_preset if dry_run else write_preset)(path, name, options)
    notes = [note for note in served.notes if "longrope" in note]  # which no option turns on; the entry has the rest
    if kept:
        listed = ", ".join(f"{option} = {value}" for option, value in kept.items())
        notes.append(f"{path}: [{name}] keeps {listed}; the factors are good for what they were searched with")
    if quiet:
        return notes, []
    if dry_run:
        return notes, [
            f"{path}: would hold",
            f"[{name}]",
            *(f"{option} = {value}" for option, value in options.items()),
        ]
    server = command_line(["llama-server", "--models-preset", path])
    return notes, [f"{path}: [{name}] written, the name to ask for; next: {server}"]


@dataclass(frozen=True)
class _Served:
    """What a server must be told for the factors to be those that were found: options, and notes that say why."""

    options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _served(document: CurveFile, info: ModelInfo) -> _Served:
    """Hold what a curve was found under, as far as its provenance tells, against the file that it goes into."""
    provenance = document.provenance if isinstance(document.provenance, dict) else {}
    said: list[str] = []
    options: list[str] = []

    def add(name: str, value: Any, where: str) -> None:
        option = f"--{name.replace('_', '-')}"
        text = value if isinstance(value, str) else f"{value:.9g}"
        said.append(f"{option} {text} ({where})")
        if value != "longrope":  # which no option turns on
            options.extend((option, text))

    for name, (wanted, own) in differences(provenance.get("rope"), info.rope).items():
        add(name, wanted, f"the file says {own if isinstance(own, str) else f'{own:.9g}'}")
    config = provenance.get("config")
    given = config.get("llama_options") if isinstance(config, dict) else None
    for name in ("cache_type_k", "cache_type_v"):
        kind = given.get(name) if isinstance(given, dict) else None
        if isinstance(kind, str) and _TYPE.fullmatch(kind):
            add(name, kind, "no file says that")
    if not said:
        return _Served()
    note = f"{info.path}: the curve was found with {', '.join(said)}; give llama-server the same, or search again"
    return _Served(tuple(options), (note,))


def whole_file(result: WriteResult) -> str:
    """What the bytes of a rewritten file are."""
    if not result.bytes_shared:
        return "the whole file"
    return f"{result.bytes_shared} of them shared with the old file"


def report(notes: Iterable[str], lines: Iterable[str]) -> None:
    """Print lines, and on the standard error what the user should know besides."""
    for note in notes:
        say(printable(f"lrope-gguf: note: {note}"), err=True)  # one line, whatever a name holds
    for line in lines:
        say(printable(line))


def plan_line(plan: WritePlan) -> str:
    """What a write or removal would do to the file as a whole."""
    if plan.how == "unchanged":
        return f"{plan.path}: would stay unchanged"
    if plan.how == "in place":
        return f"{plan.path}: would be changed in place, {plan.bytes_written} bytes of it"
    data = {
        True: "the tensor data shared with the old file on the disk",
        False: "all of them copied",
        None: "the tensor data shared with the old file where the file system can, else copied",
    }[plan.shares]
    return f"{plan.path}: would be a new file of {plan.bytes_written} bytes, {data}"


def _plan_lines(plan: WritePlan, info: ModelInfo) -> list[str]:
    lines = [plan_line(plan)]
    key = factors_key(info.architecture or "")
    had_array = info.factors is not None or info.factors_error is not None
    for name, had, what in (
        (key, had_array, _factors(plan.factors)),
        (CURVE_KEY, info.curve_json is not None, "where the factors come from"),
    ):
        kept = plan.how == "unchanged" or (name == key and info.factors == plan.factors)
        lines.append(f"  {'keep' if kept else 'replace' if had else 'add'} {name}: {what}")
    return lines


def _factors(factors: tuple[float, ...]) -> str:
    return f"{len(factors)} layer factors from {shortest(min(factors))} to {shortest(max(factors))}"


def curve_for(path: str | Path, info: ModelInfo) -> tuple[CurveFile, tuple[float, ...]]:
    """The document of a curve file with its factors for a model listed, and these factors.

    Raises:
        LropeError: where the file is not valid or made for another architecture or number of layers.
    """
    document, where = CurveFile.load(path), source_name(path)
    for name in ("architecture", "block_count"):
        wanted, found = getattr(document, name), getattr(info, name)
        if None not in (wanted, found) and wanted != found:
            raise LropeError(f"{where}: is for {name} {wanted}, but {info.path} has {found}; give a curve made for it")
    listed = document.layer_factors or ()
    try:
        if document.control_points is None and len(listed) == info.block_count:
            factors = info.shaped(listed)
        else:
            factors = document.factors_for(info.n_layer or 1)
    except LropeError as error:
        raise LropeError(f"{where}: {error}; give a curve made for {info.path}") from None
    return replace(document, layer_factors=tuple(map(shortest, factors))), factors
