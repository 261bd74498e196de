"""`lrope-gguf show`: a model's RoPE settings, layer factors and where they come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lrope_gguf.curve import AGREEMENT, CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.metadata import ModelInfo, read_model, shortest

_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file; of a split model the first shard")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what the model's header says."""
    info = read_model(args.model)
    document, curve_error = stored_curve(info)
    agreement = None if document is None or info.factors is None else agrees(document, info.factors)
    if args.json:
        print(json.dumps(_json(info, document, curve_error, agreement), indent=2))
    else:
        print("\n".join(_lines(info, document, curve_error, agreement)))
    return 0


def stored_curve(info: ModelInfo) -> tuple[CurveFile | None, str | None]:
    """The stored curve's document, or None and why it cannot be read; None and None where there is none."""
    if info.curve_json is None:
        return None, None
    try:
        return CurveFile.loads(info.curve_json, "lrope.curve", check_agreement=False), None
    except LropeError as error:
        return None, str(error)


def agrees(document: CurveFile, factors: Sequence[float]) -> bool:
    """Whether the document gives these factors within 1e-5, beyond float32's rounding; after its own layers 1."""
    listed = document.layer_factors
    if listed is None or len(listed) > len(factors):
        try:
            listed = document.factors_for(len(factors))
        except LropeError:
            return False
    wanted = [*listed, *[1.0] * (len(factors) - len(listed))]
    return all(abs(a - b) <= AGREEMENT * max(1.0, b) for a, b in zip(factors, wanted, strict=True))


def sparkline(values: Sequence[float]) -> str:
    """One block character a value, from the lowest to the highest."""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low)) if high > low else 3] for value in values)


def _lines(info: ModelInfo, document: CurveFile | None, curve_error: str | None, agreement: bool | None) -> list[str]:
    scaling = info.rope_scaling_type or "none"
    if info.rope_scaling_factor is not None:
        scaling += f", factor {info.rope_scaling_factor:g}"
    head = f" ({info.nextn_predict_layers} of them multi-token prediction)" if info.nextn_predict_layers else ""
    rows = {
        "file": f"{info.path} ({info.file_size} bytes, GGUF version {info.version}, {info.n_tensors} tensors)",
        "shards": str(info.shards) if info.shards > 1 else None,
        "type": info.kind if info.kind != "model" else None,
        "name": info.name,
        "architecture": info.architecture or "not named",
        "layers": "not given" if info.block_count is None else f"{info.block_count}{head}",
        "context length": None if info.context_length is None else f"{info.context_length} tokens",
        "RoPE base": None if info.rope_freq_base is None else f"{info.rope_freq_base:.10g}",
        "RoPE scaling": scaling if info.has_rope else "the model uses no RoPE",
        "layer factors": _factors_line(info),
        "curve": _curve_line(document, curve_error, agreement),
    }
    if document is not None and isinstance(document.provenance, dict):
        rows |= {f"  {key}": _brief(value) for key, value in document.provenance.items()}
    elif document is not None and document.provenance is not None:
        rows["  provenance"] = _brief(document.provenance)
    lines = [f"{_printable(name):<15} {_printable(text)}" for name, text in rows.items() if text is not None]
    if info.factors is not None:
        lines += ["", "layer  factor", *(f"{layer:5}  {shortest(s)}" for layer, s in enumerate(info.factors))]
    return lines


def _factors_line(info: ModelInfo) -> str:
    if info.factors_error:
        return f"not usable: {info.factors_error}"
    if info.factors is None:
        return "none (1 in every layer)"
    low, high = min(info.factors), max(info.factors)
    return f"{sparkline(info.factors)}  {shortest(low)} to {shortest(high)}"


def _curve_line(document: CurveFile | None, error: str | None, agreement: bool | None) -> str | None:
    if error is not None:
        return f"not readable: {error}"
    if document is None:
        return None
    points = document.control_points
    what = "a list of factors" if points is None else f"Bézier of degree {len(points) - 1}"
    verdict = {True: "agrees with the factors", False: "DOES NOT AGREE with the factors", None: "without factors"}
    return f"{what}, {verdict[agreement]}"


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _printable(text: str) -> str:
    """`text` without control characters: a file must not steer the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _json(
    info: ModelInfo, document: CurveFile | None, curve_error: str | None, agreement: bool | None
) -> dict[str, Any]:
    fields = asdict(info)
    del fields["curve_json"], fields["rope_switched_off"]
    return fields | {
        "path": str(info.path),
        "has_rope": info.has_rope,
        "factors": None if info.factors is None else [shortest(s) for s in info.factors],
        "curve": None if document is None else json.loads(document.dumps(compact=True)),
        "curve_error": curve_error,
        "curve_agrees": agreement,
    }
