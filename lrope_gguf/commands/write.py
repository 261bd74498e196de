"""`lrope-gguf write`: store factors, query scales and a RoPE scaling in a model's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from lrope_gguf import presets
from lrope_gguf.commands.options import FILE, Numbers, exactly_one, model_argument, output_options
from lrope_gguf.commands.progress import CopyProgress
from lrope_gguf.curve import CurveFile, Rows, resolved, source_name
from lrope_gguf.errors import LropeError
from lrope_gguf.files import check_output
from lrope_gguf.layout import CURVE_KEY, array_keys
from lrope_gguf.metadata import (
    WritePlan,
    WriteResult,
    plan_scaling,
    plan_write,
    storable_factors,
    storable_rows,
    write_factors,
)
from lrope_gguf.model_info import ModelInfo, read_model
from lrope_gguf.presets import CONTEXT, FACTORS, MODEL, SCALING, plan_preset, write_preset
from lrope_gguf.rescale import KeyChange
from lrope_gguf.rope_scaling import KINDS, Recipe, RopeScaling, Scaling, differences, shortest, shortest_rows
from lrope_gguf.stores import model_name, reference
from lrope_gguf.text import command_line, printable, say

_TYPE = re.compile(r"[a-z0-9_]{1,16}")


@click.command("write")
@model_argument
@click.option("--curve", type=FILE, metavar="FILE",
              help="curve file (a search's best.json), or the name of a curve that comes with lrope-gguf")  # fmt: skip
@click.option("--factors", type=Numbers(), metavar="F0,F1,...", help="one factor per layer")
@click.option("--uniform", type=float, metavar="S", help="this factor for the layers that see the whole context, 1 for "
              "those with a sliding window")  # fmt: skip
@click.option("--rope-scaling", type=click.Choice(KINDS), help="store this RoPE scaling in MODEL, so that a server "
              "needs no option for it; none removes it")  # fmt: skip
@click.option("--rope-scale", type=float, metavar="F", help="how many times longer contexts become, 1 to 1024; with "
              "dynamic-yarn, at most; with dynamic, the factor of the NTK formula (default 1)")  # fmt: skip
@click.option("--context-length", type=int, metavar="N", help="tokens of the scaled context (default: F times the "
              "model's own; with dynamic, the model's own)")  # fmt: skip
@click.option("--yarn-orig-ctx", type=int, metavar="N",
              help="tokens that MODEL was trained on (default: what its file says)")  # fmt: skip
@output_options
@click.option("--mapped-ok", is_flag=True, help="change MODEL in place even while a running program has it mapped")
@click.option("--preset", type=FILE, metavar="INI", help="leave MODEL unchanged; write an entry with its factors and "
              "scaling to this file, for llama-server --models-preset")  # fmt: skip
@click.option("--preset-name", metavar="NAME", help="name of that entry (default: MODEL's name with -lrope)")
def command(
    model: str,
    curve: str | None,
    factors: tuple[float, ...] | None,
    uniform: float | None,
    rope_scaling: str | None,
    rope_scale: float | None,
    context_length: int | None,
    yarn_orig_ctx: int | None,
    output: str | None,
    dry_run: bool,
    quiet: bool,
    mapped_ok: bool,
    preset: str | None,
    preset_name: str | None,
) -> None:
    """Store factors of layers or heads, query scales, a RoPE scaling or all of them in MODEL."""
    exactly_one(required=rope_scaling is None, curve=curve, factors=factors, uniform=uniform)
    given = {"--rope-scale": rope_scale, "--context-length": context_length, "--yarn-orig-ctx": yarn_orig_ctx}
    for option, value in given.items():
        if value is not None and rope_scaling is None:
            raise click.UsageError(f"argument {option}: needs --rope-scaling")
    scaling = None if rope_scaling is None else Scaling(rope_scaling, rope_scale, context_length, yarn_orig_ctx)
    if preset is not None and output is not None:
        raise click.UsageError("argument --preset: not allowed with argument --output")
    if preset_name is not None and preset is None:
        raise click.UsageError("argument --preset-name: needs --preset INI")
    info = read_model(model)
    rope, recipe = (info.rope, None) if scaling is None else plan_scaling(model, scaling)
    if preset is not None and scaling is not None and recipe is None:
        rope = replace(rope, scaling="none")  # as an option it goes before what the file says
    curve_json = None
    served = _Served()
    rows: dict[str, Rows] = {}
    if curve is not None:
        if output is not None:
            check_output("--output", output, {"--curve": curve})
        document, factors = curve_for(curve, info)
        rows = document.rows
        curve_json = document.dumps(compact=True)
        served = _served(document, info, rope, scaling is not None)
    elif uniform is not None:
        factors = info.uniform(uniform)
    if preset is not None:
        check_output("--preset", preset, {"MODEL": model, "--curve": curve})
        asked = _Asked(model, info, factors, rows, curve, scaling, recipe, rope)
        report(*_preset(preset, preset_name or _preset_name(model, info), asked, served, dry_run, quiet))
        return
    notes = list(served.notes)
    if rope_scaling == "none" and (own := rope.words()) != "none":  # it is the model's own
        kept = f"keeps its own RoPE scaling ({own}); --rope-scaling none removes only what write has added"
        notes.append(f"{info.path}: {kept}")
    how: dict[str, Any] = {"curve_json": curve_json, "scaling": scaling, "output": output, "mapped_ok": mapped_ok}
    how |= rows
    keeps = factors is None and not rows
    if dry_run:
        plan = plan_write(model, factors, **how)
        report((*notes, *plan.notes), [] if quiet else _plan_lines(plan, info, rows, keeps, uniform))
        return
    with CopyProgress(quiet=quiet) as progress:
        result = write_factors(model, factors, progress=progress, **how)
    done = {
        "in place": f"written in place ({result.bytes_written} bytes)",
        "rewritten": f"written ({result.bytes_written} bytes, {whole_file(result)})",
        "unchanged": f"unchanged, {'it already has these factors' if scaling is None else 'nothing had to change'}",
    }[result.how]
    said = [f"{result.path}: {done}"]
    said += _arrays(result.factors, info.rows if keeps else rows, info, uniform).values()
    if scaling is not None:
        said.append(f"RoPE scaling {rope.words().replace('; ', ', ')}")
    said.append(f"next: {command_line(['llama-server', '-m', str(result.path), *served.options])}")
    report((*notes, *result.notes), [] if quiet else ["; ".join(said)])


@dataclass(frozen=True)
class _Asked:
    """What to write into a preset's entry: the model, its factors, and a scaling, with that in numbers."""

    model: str
    info: ModelInfo
    factors: Iterable[float] | None
    rows: Mapping[str, Rows]
    curve: str | None
    scaling: Scaling | None
    recipe: Recipe | None
    rope: RopeScaling

    @property
    def keeps(self) -> bool:
        """Whether the factors and query scales stay those of the file."""
        return self.factors is None and not self.rows

    def options(self, served: _Served) -> dict[str, str]:
        """The options of the entry."""
        name = reference(self.model)
        said = {"model": str(Path(self.model).absolute())} if name is None else {"hf": name}
        factors = self.info.factors if self.keeps else self.factors
        if factors is not None:
            stored = storable_factors(self.info, factors, self.rope)
            if self.factors is not None:
                said["rope-layer-factors"] = ",".join(f"{shortest(factor):.9g}" for factor in stored)
        elif not self.keeps and self.info.factors is not None:
            said["rope-layer-factors"] = "off"
        for name, of_heads in (self.info.rows if self.keeps else self.rows).items():
            storable_rows(self.info, name, of_heads, self.rope)
        for name, option in presets.ROWS.items():
            if name in self.rows:
                if self.curve is None or self.curve == "-":
                    raise LropeError(f"--curve {self.curve}: an entry names the file of its {name}; give a file")
                said[option] = str(Path(resolved(self.curve)).absolute())
            elif not self.keeps and getattr(self.info, name) is not None:
                said[option] = "off"
        if self.scaling is not None:
            said |= {"rope-scaling": "none"} if self.recipe is None else self.recipe.options()
        options = zip(served.options[::2], served.options[1::2], strict=True)
        return said | {option.removeprefix("--"): value for option, value in options}

    @property
    def replaced(self) -> frozenset[str]:
        """The options of an existing entry that the new ones replace."""
        names = MODEL if self.keeps else MODEL | FACTORS
        if self.scaling is None:
            return names
        ends = self.recipe is None or self.recipe.context_length is not None
        return names | SCALING | (CONTEXT if ends else frozenset())


def _preset_name(model: str, info: ModelInfo) -> str:
    """A name for an entry: the file's, or the model's own where the file is called after a hash."""
    name = model_name(model)
    if re.search("[0-9a-f]{40}", name):
        name = info.name or "model"
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'model'}-lrope"


def _preset(
    path: str, name: str, asked: _Asked, served: _Served, dry_run: bool, quiet: bool
) -> tuple[list[str], list[str]]:
    """Write the entry, unless told not to; notes, and what to say."""
    options = asked.options(served)
    kept = (plan_preset if dry_run else write_preset)(path, name, options, asked.replaced)
    notes = list(served.notes) if served.beyond else []  # the entry has the rest
    if kept:
        has = ", ".join(f"{option} = {value}" for option, value in kept.items())
        notes.append(f"{path}: [{name}] keeps {has}; check that the factors were found with the same")
    if quiet:
        return notes, []
    if dry_run:
        listed = [f"{option} = {value}" for option, value in options.items()]
        return notes, [f"{path}: would contain", f"[{name}]", *listed]
    server = command_line(["llama-server", "--models-preset", path])
    return notes, [f"{path}: entry [{name}] written; ask the server for the model by this name; next: {server}"]


@dataclass(frozen=True)
class _Served:
    """Options with which a server rotates as the factors want it, notes on them, and if these say more (`beyond`)."""

    options: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beyond: bool = False


def _served(document: CurveFile, info: ModelInfo, rope: RopeScaling, asked: bool) -> _Served:
    """Compare how a curve's layers rotated with how the file's will; no option undoes a scaling that is `asked` for."""
    provenance = document.provenance if isinstance(document.provenance, dict) else {}
    said: list[str] = []
    options: list[str] = []

    def add(name: str, value: Any, where: str, optional: bool = True) -> None:
        option = f"--{name.replace('_', '-')}"
        text = value if isinstance(value, str) else f"{value:.9g}"
        said.append(f"{option} {text} ({where})")
        if optional and value != "longrope":  # which no option turns on
            options.extend((option, text))

    for name, (wanted, own) in differences(provenance.get("rope"), rope).items():
        where = f"the file says {own if isinstance(own, str) else f'{own:.9g}'}"
        add(name, wanted, where, not asked or name == "rope_freq_base")
    config = provenance.get("config")
    given = config.get("llama_options") if isinstance(config, dict) else None
    for name in ("cache_type_k", "cache_type_v"):
        kind = given.get(name) if isinstance(given, dict) else None
        if isinstance(kind, str) and _TYPE.fullmatch(kind):
            add(name, kind, "no model file stores it")
    if not said:
        return _Served()
    beyond = len(options) < 2 * len(said)
    advice = "write the same scaling" if beyond and asked else "give llama-server the same"
    note = f"{info.path}: the curve was found with {', '.join(said)}; {advice}, or search again"
    return _Served(tuple(options), (note,), beyond)


def whole_file(result: WriteResult) -> str:
    """Which bytes of a rewritten file are new, in words."""
    if not result.bytes_shared:
        return "the whole file"
    return f"{result.bytes_shared} of them shared with the old file"


def report(notes: Iterable[str], lines: Iterable[str]) -> None:
    """Print lines to the standard output, and notes to the standard error."""
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


def _plan_lines(
    plan: WritePlan, info: ModelInfo, rows: Mapping[str, Rows], keeps: bool, uniform: float | None
) -> list[str]:
    changes = [f"  {change_line(change)}" for change in plan.changes]
    rows, keeps = (info.rows, True) if keeps else (rows, plan.how == "unchanged")
    said = _arrays(plan.factors, rows, info, uniform)
    if keeps and not said:
        return [plan_line(plan), *(changes or ["  nothing: it has no scaling that write has added"])]
    lines = [plan_line(plan)]
    for name, key in array_keys(info.architecture or "").items():
        had: Any = info.factors if name == "layer_factors" else shortest_rows(info.rows.get(name, ())) or None
        then: Any = plan.factors if name == "layer_factors" else rows.get(name)
        there = had is not None or info.error_of(name) is not None
        if name in said:
            lines.append(f"  {_action(keeps or had == then, there)} {key}: {said[name]}")
        elif there:
            lines.append(f"  remove {key}")
    lines.append(f"  {_action(keeps, info.curve_json is not None)} {CURVE_KEY}: where the factors come from")
    return lines + changes


def _action(keeps: bool, replaces: bool) -> str:
    return "keep" if keeps else "replace" if replaces else "add"


def change_line(change: KeyChange) -> str:
    """What happens to a key, in words."""
    value = f": {change.value}" if change.value else ""
    return f"{change.action} {change.key}{value}" + (f" (was {change.was})" if change.was is not None else "")


def _arrays(
    factors: tuple[float, ...], rows: Mapping[str, Rows], info: ModelInfo, uniform: float | None
) -> dict[str, str]:
    """What a file has of layers and heads then, in words, by its names in a curve file."""
    said = {"layer_factors": _factors(factors, info, uniform)} if factors else {}
    words = {"head_factors": "factors of KV heads", "query_scales": "query scales"}
    for name, of_heads in rows.items():
        values = sorted(value for row in of_heads for value in row)
        said[name] = f"{len(values)} {words[name]} from {shortest(values[0])} to {shortest(values[-1])}"
    return said


def _factors(factors: tuple[float, ...], info: ModelInfo, uniform: float | None) -> str:
    if uniform is None:
        return f"{len(factors)} layer factors from {shortest(min(factors))} to {shortest(max(factors))}"
    moved, all_layers = len(info.whole_context_layers), len(factors)
    if moved == all_layers:
        return f"layer factor {uniform:g} in all {moved} layers"
    return f"layer factor {uniform:g} in {moved} of {all_layers} layers, those that see the whole context"


def curve_for(path: str | Path, info: ModelInfo) -> tuple[CurveFile, tuple[float, ...] | None]:
    """The document of a curve file with its factors for a model listed, and those of the layers, if it has any.

    Raises `LropeError`: where the file is not valid or made for another architecture or number of layers.
    """
    path = resolved(path)
    document, where = CurveFile.load(path), source_name(path)
    for name in ("architecture", "block_count"):
        wanted, found = getattr(document, name), getattr(info, name)
        if None not in (wanted, found) and wanted != found:
            raise LropeError(f"{where}: is for {name} {wanted}, but {info.path} has {found}; give a curve made for it")
    listed, factors = document.layer_factors or (), None
    try:
        if document.control_points is None and len(listed) == info.block_count:
            factors = info.shaped(listed)
        elif document.control_points is not None or listed:
            factors = document.factors_for(info.n_layer or 1)
    except LropeError as error:
        raise LropeError(f"{where}: {error}; give a curve made for {info.path}") from None
    known = document.rows if info.block_count is not None else {}  # of what is no model, whoever writes says it
    try:
        rows: Any = {name: shortest_rows(info.shaped_rows(name, rows)) for name, rows in known.items()}
    except LropeError as error:
        raise LropeError(f"{where}: {error}") from None
    return replace(document, layer_factors=None if factors is None else tuple(map(shortest, factors)), **rows), factors
