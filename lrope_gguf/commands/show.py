"""`lrope-gguf show`: a model's RoPE settings, its factors and query scales, and where they come from."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import click

from lrope_gguf.commands.options import FILE, model_argument
from lrope_gguf.curve import AGREEMENT, CurveFile, Rows
from lrope_gguf.errors import LropeError
from lrope_gguf.files import check_output
from lrope_gguf.layout import factors_key
from lrope_gguf.model_info import ModelInfo, read_model
from lrope_gguf.rope_scaling import shortest, shortest_rows
from lrope_gguf.text import printable, shown_in, sparkline

_LABEL = 16
_BRIEF = 100
_MOST_PARTS = 50
_LEAST = 40
_CELL = 20
_OF_HEADS = {"head_factors": "head factors", "query_scales": "query scales"}
_PROVENANCE_LINES = 40
_ROUNDING = 2.0**-23


@click.command("show")
@model_argument
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--plot", type=FILE, metavar="FILE", help="draw the factors over the layers, into a .png or .svg file")
def command(model: str, as_json: bool, plot: str | None) -> None:
    """Show RoPE settings, factors and query scales of MODEL."""
    info = read_model(model)
    document = curve_error = None
    try:
        if info.curve_json is not None:
            document = CurveFile.loads(info.curve_json, "lrope.curve", check_agreement=False)
    except LropeError as error:
        curve_error = str(error)
    agreement = None if document is None else _agreement(document, info)
    if plot is not None:
        check_output("--plot", plot, {"MODEL": model})
        _plot(plot, info, document, agreement)
    if as_json:
        # in pieces: a hostile document's text would take many times its size in memory
        json.dump(_json(info, document, curve_error, agreement), sys.stdout, indent=2)
        print()
        return
    width = None  # a file or a program gets whole lines
    if sys.stdout.isatty():
        import shutil  # and with it four compressors

        width = shutil.get_terminal_size((100, 24)).columns
    print(shown_in("\n".join(_lines(info, document, curve_error, agreement, width)), sys.stdout.encoding))


def _agreement(document: CurveFile, info: ModelInfo) -> bool | None:
    """Whether the document gives all that the file has of layers and heads; None where that is nothing."""
    if info.factors is None and not info.rows:
        return None
    if info.factors is None:
        same = document.layer_factors is None and document.control_points is None
    else:
        same = agrees(document, info.factors, info.n_layer)
    wanted = document.rows
    return same and wanted.keys() == info.rows.keys() and all(_same_rows(wanted[n], r) for n, r in info.rows.items())


def _same_rows(wanted: Rows, rows: Rows) -> bool:
    """Whether the numbers of the heads are the wanted ones within float32's rounding, and 1 in layers after these."""
    wanted = (*wanted, *((1.0,) * len(row) for row in rows[len(wanted) :]))
    alike = [len(a) for a in wanted] == [len(b) for b in rows]
    return alike and all(_close(a, b, 0.0) for a, b in zip(wanted, rows, strict=True))


def agrees(document: CurveFile, factors: Sequence[float], n_layer: int | None = None) -> bool:
    """Whether the document gives these factors: its list within float32's rounding, its curve within 1e-5.

    The curve spans `n_layer` layers, by default all; layers after those of the list or the curve have factor 1.
    """
    n_layer = len(factors) if n_layer is None else n_layer
    listed, curve = document.layer_factors, document.curve
    if listed is not None and len(listed) in (n_layer, len(factors)):
        if not _close(listed, factors, 0.0):
            return False
    elif curve is None:
        return False
    return curve is None or (n_layer > 0 and _close(curve.factor_list(n_layer), factors, AGREEMENT))


def _close(wanted: Sequence[float], factors: Sequence[float], tolerance: float) -> bool:
    padded = [*wanted, *[1.0] * (len(factors) - len(wanted))]
    return all(abs(a - b) <= tolerance + _ROUNDING * b for a, b in zip(factors, padded, strict=True))


def _lines(
    info: ModelInfo, document: CurveFile | None, curve_error: str | None, agreement: bool | None, width: int | None
) -> list[str]:
    rows: list[tuple[str, str | None]] = [
        ("file", f"{info.path} ({info.file_size} bytes, GGUF version {info.version}, {info.n_tensors} tensors)"),
        ("shards", f"{info.shards}; this is the first, which holds the metadata" if info.shards > 1 else None),
        ("type", _kind(info)),
        ("name", info.name),
        ("architecture", info.architecture or "not named"),
        ("layers", _layers(info)),
        ("context length", _context(info)),
        ("RoPE base", None if info.rope_freq_base is None else f"{info.rope_freq_base:.10g}"),
        ("RoPE scaling", _scaling(info)),
        ("layer factors", _factors_line(info, width)),
        *((said, _rows_line(info, name)) for name, said in _OF_HEADS.items()),
        ("curve", _curve_line(document, curve_error, agreement)),
    ]
    if document is not None and document.provenance is not None:
        provenance = _provenance(document.provenance, 1)
        rows += islice(provenance, _PROVENANCE_LINES)
        if more := sum(1 for _ in provenance):
            rows.append(("  …", f"{more} more lines, see --json"))
    lines = [line for name, text in rows if text is not None for line in _row(printable(name), printable(text), width)]
    if info.factors is not None:
        lines += ["", *_table([f"{layer:5}  {shortest(s)}" for layer, s in enumerate(info.factors)], "factor", width)]
    for name, of_heads in info.rows.items():
        lines += ["", *_table(_picture(of_heads), _OF_HEADS[name], width)]
    return lines


def _row(name: str, text: str, width: int | None) -> list[str]:
    """A row, its text broken between words to a terminal's width."""
    first = f"{name:<{_LABEL - 1}} "
    if width is None:
        return [f"{first}{text}".rstrip()]
    whole: Any = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, max(width, _LEAST), initial_indent=first, subsequent_indent=" " * _LABEL, **whole)
    return lines or [first.rstrip()]


def _table(cells: Sequence[str], title: str, width: int | None) -> list[str]:
    """Layers and what they have, in columns on a wide terminal where they are many."""
    cell = max(_CELL, *map(len, cells))
    columns = 1 if width is None or len(cells) <= 16 else max(1, min(4, (width + 3) // (cell + 3)))
    height = -(-len(cells) // columns)
    columns = -(-len(cells) // height)
    rows = [[f"layer  {title}"] * columns, *(cells[row::height] for row in range(height))]
    return ["   ".join(f"{text:<{cell}}" for text in row).rstrip() for row in rows]


def _picture(rows: Rows) -> list[str]:
    """Of each layer a block a head, from the lowest to the highest number of all, and its own lowest and highest."""
    values = list(chain(*rows))
    low, high, most = min(values), max(values), max(map(len, rows))
    lines = []
    for layer, row in enumerate(rows):
        ends = " to ".join(f"{value:.4g}" for value in sorted({min(row), max(row)})) if row else "no heads"
        lines.append(f"{layer:5}  {sparkline(row, low, high):<{most}}  {ends}")
    return lines


def _kind(info: ModelInfo) -> str | None:
    if info.kind == "adapter":
        return "adapter (LoRA): a base model's RoPE settings and layer factors apply"
    if info.kind not in (None, "model"):
        return info.kind
    return "vocabulary only, no tensors" if info.n_tensors == 0 and info.shards == 1 else None


def _layers(info: ModelInfo) -> str:
    if info.block_count is None:
        return "not given"
    head = f" ({info.nextn_predict_layers} of them multi-token prediction)" if info.nextn_predict_layers else ""
    said, layers = f"{info.block_count}{head}", info.whole_context_layers
    if info.windows_error is not None:
        return f"{said}; {info.windows_error}"
    if not info.has_rope or len(layers) == info.n_layer:
        return said
    listed = f": {', '.join(map(str, layers))}" if layers else ""
    return f"{said}; {len(layers) or 'none'} of them see the whole context{listed}"


def _scaling(info: ModelInfo) -> str | None:
    if info.kind == "adapter" and info.rope_scaling_type is None:
        return None
    if not info.has_rope:
        return "the model uses no RoPE"
    if info.scaling_error is not None:
        return f"{info.rope.words()} (written by lrope-gguf; what was there before is unknown: {info.scaling_error})"
    if info.rope_before is not None:
        return f"{info.rope.words()} (written by lrope-gguf; was: {info.rope_before.words()})"
    if info.rope_dynamic_factor is not None:
        return info.rope.words()
    factor = "" if info.rope_scaling_factor is None else f", factor {info.rope_scaling_factor:g}"
    return f"{info.rope_scaling_type or 'none'}{factor}"


def _context(info: ModelInfo) -> str | None:
    if info.context_length is None:
        return None
    before = info.context_length_before
    was = f" (written by lrope-gguf; was: {before})" if before not in (None, info.context_length) else ""
    return f"{info.context_length} tokens{was}"


def _factors_line(info: ModelInfo, width: int | None) -> str | None:
    if info.factors_error:
        return f"not usable: {info.factors_error}; write them again or remove them"
    if info.factors is None:
        if info.kind == "adapter":
            return None
        if info.head_factors is not None:
            return "none"
        return "none (1 in every layer)" if info.has_rope else "none, and they would have no effect"
    low, high = min(info.factors), max(info.factors)
    line = sparkline(info.factors)
    if width is not None:  # break it where it is longer than the terminal is wide
        room = max(width, _LEAST) - _LABEL
        line = " ".join(line[i : i + room] for i in range(0, len(line), room))
    moved = sum(factor != 1 for factor in info.factors)
    others = "" if moved == len(info.factors) else f", in {moved} of {len(info.factors)} layers other than 1"
    passed_over = "" if info.head_factors is None else "; the head factors go before them"
    return f"{line}  {shortest(low)} to {shortest(high)}{others}{passed_over}"


def _rows_line(info: ModelInfo, name: str) -> str | None:
    if error := info.error_of(name):
        return f"not usable: {error}; write them again or remove them"
    values = list(chain(*info.rows.get(name, ())))
    if not values:
        return None
    moved, heads = sum(value != 1 for value in values), "heads" if name == "query_scales" else "KV heads"
    return f"{shortest(min(values))} to {shortest(max(values))}, in {moved} of {len(values)} {heads} other than 1"


def _curve_line(document: CurveFile | None, error: str | None, agreement: bool | None) -> str | None:
    if error is not None:
        return f"not readable: {error}"
    if document is None:
        return None
    points = document.control_points
    what = "" if document.layer_factors is None else "a list of factors"
    if points is not None:
        what = f"Bézier of degree {len(points) - 1}"
    if points is not None:
        what += f" through {points[0][1]:.4g} and {points[-1][1]:.4g}" if len(points) > 8 else " with control points "
        what += "" if len(points) > 8 else " ".join(f"({x:.3g},{y:.4g})" for x, y in points)
    what = " and ".join(filter(None, (what, *(_OF_HEADS[name] for name in document.rows))))
    verdict = {True: "agrees with the factors", False: "DOES NOT AGREE with the factors", None: "without factors"}
    return f"{what}; {verdict[agreement]}"


def _provenance(value: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Rows of nested JSON: an object of plain values on one line, other objects by key, long lists by length."""
    indent = "  " * depth
    if not isinstance(value, dict):
        yield f"{indent}provenance", _brief(value)
        return
    for key, item in value.items():
        if isinstance(item, dict) and any(isinstance(v, dict) for v in item.values()):
            yield f"{indent}{key[:_BRIEF]}", ""
            yield from _provenance(item, depth + 1)
        else:
            yield f"{indent}{key[:_BRIEF]}", _brief(item)


def _brief(value: Any) -> str:
    """A JSON value in words, shortened."""
    if isinstance(value, dict):
        # its parts are short already, and a terminal breaks it between words
        parts = (f"{key[:_BRIEF]} {_brief(item)}" for key, item in value.items() if item not in (None, ""))
        return ", ".join([*islice(parts, _MOST_PARTS), *(["…"] if any(True for _ in parts) else [])])
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return f"({len(value)} in all)"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        text = f"[{', '.join(map(_brief, value[:_BRIEF]))}]"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"


def _plot(path: str, info: ModelInfo, document: CurveFile | None, agreement: bool | None) -> None:
    if info.factors is None:
        why = info.factors_error or "it has no layer factors"
        raise LropeError(f"{info.path}: there is nothing to plot, because {why}; write factors first")
    from lrope_gguf.plot import plot_factors

    points = None if document is None else document.control_points
    title = f"Layer factors of {info.name or info.path.name} ({info.architecture}, {info.block_count} layers)"
    label = "curve" if agreement else "curve (does not agree)"
    plot_factors(path, info.factors, control_points=points, n_layer=info.n_layer, title=title, curve_label=label)


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields for JSON, which has no infinities and no NaN."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}


def _json(
    info: ModelInfo, document: CurveFile | None, curve_error: str | None, agreement: bool | None
) -> dict[str, Any]:
    fields = asdict(info)
    del fields["curve_json"], fields["has_rope"], fields["rope"], fields["without_head_factors"]
    return _numbers(fields) | {
        "path": str(info.path),
        "n_layer": info.n_layer,
        "has_rope": info.has_rope,
        "rope": _numbers(info.rope.json()),
        "rope_before": None if info.rope_before is None else _numbers(info.rope_before.json()),
        "factors_key": None if info.architecture is None else factors_key(info.architecture),
        "factors": None if info.factors is None else [shortest(s) for s in info.factors],
        **{name: shortest_rows(rows) for name, rows in info.rows.items()},
        "curve": None if document is None else document.document(),
        "curve_error": curve_error,
        "curve_agrees": agreement,
    }
