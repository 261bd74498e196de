"""The test vectors of docs/metadata-format.md, from the tests' float64 reference.

Prints them; `--check FILE` compares a file with them instead, and says where it differs. Takes a second. Usage:
python proofs/format_vectors.py > docs/metadata-format-vectors.json
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.commands import CommandError, script
from support.dynamic_rope import Scaling
from support.rope_reference import Rope

Json = dict[str, Any]

# libraries differ in the last digits of a power or logarithm
CLOSE = 1e-12
MAX_GAIN = 32.0

# all exact in float32, as the numbers of a file are
LLAMA3 = [1.0, 1.0, 1.25, 2.0, 3.5, 6.0, 8.0, 8.0]
LONG = [1.0, 1.25, 2.0, 4.0, 7.5, 12.0, 20.0, 32.0]
SECTIONS = [0, 0, 1, 1, 1, 2, 2, 2]
INTERLEAVED = [0, 1, 2, 0, 1, 2, 0, 1]
LINE = [[1], [1000], [30000]]
SPACE = [[2000, 100, 4000, 0], [30000, 29000, 3, 0]]
FACTORS = [1.0, 1.3125, 0.625]


def rope(
    kind: str = "none", factor: float = 1.0, original: int = 1024, *, n_dims: int = 16, base: float = 10000.0,
    attn_factor: float = 1.0, ext_factor: float = 1.0, betas: tuple[float, float] = (32.0, 1.0),
    log_multiplier: float = 0.0, frequency_factors: list[float] | None = None, components: list[int] | None = None,
    levels_per_doubling: int = 2,
) -> Json:  # fmt: skip
    """How a model rotates, as the document names it; what its type does not know is left out."""
    said: Json = {"type": kind, "n_dims": n_dims, "base": base, "factor": factor, "original": original}
    said |= {"attn_factor": attn_factor, "frequency_factors": frequency_factors, "components": components}
    if kind.endswith("yarn"):
        said |= {"ext_factor": ext_factor, "beta_fast": betas[0], "beta_slow": betas[1]}
        said |= {"log_multiplier": log_multiplier}
    if kind.startswith("dynamic"):
        said |= {"levels_per_doubling": levels_per_doubling}
    return said


ROTATIONS: list[tuple[str, str, Json, list[list[int]], list[float]]] = [
    ("none", "llama", rope(), LINE, FACTORS),
    ("linear", "llama", rope("linear", 2.5, base=500000.0), LINE, FACTORS),
    ("yarn", "llama", rope("yarn", 4.0), LINE, [1.0, 1.3125, 0.3125]),
    ("yarn-1", "llama", rope("yarn", 1.0, attn_factor=0.75), LINE, FACTORS),
    ("yarn-attn", "qwen2", rope("yarn", 8.0, 32768, base=1e6, attn_factor=0.75), LINE, FACTORS),
    ("yarn-ramp", "llama", rope("yarn", 2.0, betas=(16.0, 2.0), ext_factor=0.5), LINE, FACTORS),
    ("yarn-log-multiplier", "mistral3", rope("yarn", 8.0, log_multiplier=0.5), LINE, FACTORS),
    ("yarn-128", "qwen2", rope("yarn", 4.0, 32768, n_dims=128, base=1e6), [[30000]], [1.09375]),
    ("longrope", "phi3", rope("longrope", 1.0, 512, attn_factor=1.1875, frequency_factors=LONG), LINE, FACTORS),
    ("longrope-partial", "phi3", rope("longrope", 1.0, 512, n_dims=8, frequency_factors=LONG[:4]), LINE, FACTORS),
    ("llama3", "llama", rope(base=500000.0, frequency_factors=LLAMA3), LINE, FACTORS),
    ("llama3-yarn", "llama", rope("yarn", 4.0, frequency_factors=LLAMA3), LINE, FACTORS),
    ("mrope", "qwen2vl", rope(base=1e6, components=SECTIONS), SPACE, FACTORS),
    ("mrope-yarn", "qwen2vl", rope("yarn", 4.0, base=1e6, components=SECTIONS), SPACE, FACTORS),
    ("mrope-interleaved", "qwen3vl", rope(base=1e6, components=INTERLEAVED), SPACE, FACTORS),
]
DYNAMIC: list[tuple[str, Json, list[int]]] = [
    ("dynamic", rope("dynamic"), [1, 1024, 1025, 1448, 1449, 2048, 2049, 30000]),
    ("dynamic-factor", rope("dynamic", 2.5, base=500000.0), [1024, 1449, 4096]),
    ("dynamic-llama3", rope("dynamic", base=500000.0, frequency_factors=LLAMA3), [1024, 2000]),
    ("dynamic-yarn", rope("dynamic-yarn", 3.0), [1024, 1025, 2048, 2049, 2897, 30000]),
    ("dynamic-yarn-unbounded", rope("dynamic-yarn", attn_factor=0.75), [1024, 1449, 30000]),
    ("dynamic-quantized", rope("dynamic", levels_per_doubling=1), [1024, 1025, 2049]),
    ("dynamic-yarn-quantized", rope("dynamic-yarn", 16.0, levels_per_doubling=1), [1025, 2049]),
]
FOLDS = [
    *[(0.25, s) for s in (0.25, 0.2421875, 0.2578125, 0.2734375, 0.28125, 0.21875, 1.0, 1024.0, 0.0009765625)],
    *[(1.0, s) for s in (1.0, 1.0078125, 0.9921875)],
    *[(0.5, s) for s in (0.5, 0.515625, 0.53125, 0.484375, 0.46875)],
]
CURVES = [
    ([[0.0, 0.8125], [1.0, 1.5]], [1, 2, 4, 6]),
    ([[0.0, 1.0], [0.3, 1.0], [0.62, 1.18], [1.0, 1.04]], [4, 24]),
    ([[0.0, 1.0], [0.5, 2.0], [0.5, 0.75], [1.0, 1.5]], [4, 12]),
    ([[0.0, 1.0], [0.0, 3.0], [0.2, 0.5], [0.9, 2.5], [1.0, 0.75], [1.0, 1.25]], [6, 12]),
]
# name, rotation, heads and KV heads of the layers, both arrays, soft cap of the logits
HEADS: list[tuple[str, Json, list[int], list[int], list[float], list[float], float | None]] = [
    ("grouped", rope(n_dims=8), [4, 4, 0, 2], [2, 1, 0, 2], [1.0, 1.3125, 0.625, 1.5, 1.0], [
        *(1.0, 0.75, 1.25, 16.0), *(0.0625, 1.0, 1.0, 1.375), *(0.875, 1.5)], None),
    ("yarn-capped", rope("yarn", 4.0, n_dims=8), [3], [3], [1.0, 1.3125, 0.3125], [1.25, 2.0, 0.75], 30.0),
]  # fmt: skip
QUERY = [2.0, -1.0, 0.5, 3.0, -1.5, 1.0, 0.25, -2.0]
KEYS = [[1.0, 2.0, -0.5, 1.5, 0.5, -1.0, 2.0, 1.0], [-1.0, 0.5, 3.0, 0.25, -2.0, 1.5, 1.0, -0.75]]
KEY_POSITIONS = [0, 700]
ENTRIES: list[tuple[str, list[float] | float]] = [
    ("llama.rope.scaling.layer_factors", [1.0, 1.25, 0.75]),
    ("llama.rope.scaling.dynamic_factor", 4.0),
    ("llama.rope.scaling.head_factors", [1.0, 1.5, 0.75]),
    ("llama.attention.query_scales", [1.0, 0.75, 1.25, 1.5, 1.0, 0.875]),
]


def stock(said: Json) -> Rope:
    divisors, components = said["frequency_factors"], said["components"]
    plain = Rope(
        said["n_dims"], said["base"], attn_factor=said["attn_factor"],
        divisors=None if divisors is None else tuple(divisors),
        component=None if components is None else tuple(components),
    )  # fmt: skip
    if said["type"] not in ("linear", "yarn"):
        return plain
    scaled = {**vars(plain), "freq_scale": 1.0 / said["factor"]}
    if said["type"] == "yarn":
        divisor = 1.0 + 0.1 * said["log_multiplier"] * math.log(said["factor"])
        scaled |= {"attn_factor": said["attn_factor"] / divisor, "n_ctx_orig": said["original"]}
        scaled |= {name: said[name] for name in ("ext_factor", "beta_fast", "beta_slow")}
    return Rope(**scaled)


def folded(rotation: Rope, s: float) -> Json:
    """Parameters of ggml's operation that rotate a layer with factor `s`."""
    fs, extrapolated = rotation.freq_scale, rotation.ext_factor
    if s == 1.0 or not extrapolated:
        return {"freq_scale": fs / s, "ext_factor": extrapolated, "attn_factor": rotation.attn_factor}
    extrapolated *= (1.0 - fs) / (s - fs)
    own = 1.0 + 0.1 * math.log(s / fs) if extrapolated else 1.0
    return {"freq_scale": fs / s, "ext_factor": extrapolated, "attn_factor": rotation.magnitude / own}


def layers(rotation: Rope, factors: Sequence[float], positions: Sequence[Sequence[int]]) -> list[Json]:
    """Each layer's angles, a row a position, and what its operation would be given."""
    rows = np.array([list(position) + [0] * (4 - len(position)) for position in positions], float)
    return [{"s": s, "angles": rotation.angles(rows / s).tolist(), "folded": folded(rotation, s)} for s in factors]


def length(said: Json, n: int) -> Json:
    """The scaling that a sequence of `n` tokens has, and the rotations of its last one."""
    yarn = said["type"] == "dynamic-yarn"
    scaling = Scaling(said["original"], yarn, said["factor"], said["levels_per_doubling"])
    level = scaling.level(n - 1)
    rotation = scaling.rope(stock(said), level)
    return {
        "n": n, "level": level, "base": rotation.base, "freq_scale": rotation.freq_scale,
        "magnitude": float(rotation.magnitude), "layers": layers(rotation, FACTORS, [[n - 1]]),
    }  # fmt: skip


def turned(vector: Sequence[float], rotation: Rope, position: float) -> NDArray[np.complex128]:
    """The head `vector`, of whose numbers neighbours are pairs, at a real-valued position; complex."""
    pairs = np.array(vector[::2]) + 1j * np.array(vector[1::2])
    row = np.array([[position, 0.0, 0.0, 0.0]])
    result: NDArray[np.complex128] = pairs * rotation.magnitude * np.exp(1j * rotation.angles(row)[0])
    return result


def heads(said: Json, n_head: list[int], n_head_kv: list[int], factors: list[float], scales: list[float],
          cap: float | None) -> list[Json]:  # fmt: skip
    """Of each layer and head: its KV head, factor and scale, and the logits and weights of the query for the keys."""
    result, first, first_kv = [], 0, 0
    for n, n_kv in zip(n_head, n_head_kv, strict=True):
        row = []
        for head in range(n):
            kv_head = head // (n // n_kv)
            s, scale = factors[first_kv + kv_head], scales[first + head]
            query = turned(QUERY, stock(said), KEY_POSITIONS[-1] / s)
            keys = [turned(key, stock(said), p / s) for key, p in zip(KEYS, KEY_POSITIONS, strict=True)]
            logits = np.array([scale * (query * key.conj()).real.sum() / math.sqrt(len(QUERY)) for key in keys])
            capped = logits if cap is None else cap * np.tanh(logits / cap)
            weights = np.exp(capped - capped.max())
            row.append({"kv_head": kv_head, "s": s, "scale": scale, "logits": logits.tolist(),
                        "weights": (weights / weights.sum()).tolist()})  # fmt: skip
        result.append({"heads": row})
        first, first_kv = first + n, first_kv + n_kv
    return result


def refused(freq_scale: float, s: float) -> bool:
    """Whether a layer factor has no usable parameters under YaRN."""
    near = abs(1.0 - freq_scale) > MAX_GAIN * abs(s - freq_scale)
    return s != 1.0 and (near or 1.0 + 0.1 * math.log(s / freq_scale) <= 0.0)


def _casteljau(row: list[Fraction], t: Fraction) -> Fraction:
    while len(row) > 1:
        row = [a + t * (b - a) for a, b in pairwise(row)]
    return row[0]


def curve_factors(points: list[list[float]], n_layer: int) -> list[float]:
    """A Bézier curve's heights, in exact arithmetic but for the last bits of its parameter."""
    xs, ys = ([Fraction(point[axis]) for point in points] for axis in (0, 1))
    result = []
    for layer in range(n_layer):
        x = Fraction(layer, max(n_layer - 1, 1))
        low, high = Fraction(0), Fraction(1)
        for _ in range(70):
            middle = (low + high) / 2
            low, high = (middle, high) if _casteljau(xs, middle) < x else (low, middle)
        result.append(float(ys[0] if x == 0 else ys[-1] if x == 1 else _casteljau(ys, low)))
    return result


def entry(key: str, value: list[float] | float, order: str) -> str:
    """All bytes of a key of float32 in a file, in hexadecimal."""
    name = key.encode()
    head = struct.pack(f"{order}Q{len(name)}s", len(name), name)
    if isinstance(value, list):
        return (head + struct.pack(f"{order}IIQ{len(value)}f", 9, 6, len(value), *value)).hex()
    return (head + struct.pack(f"{order}If", 6, value)).hex()


def vectors() -> Json:
    return {
        "format": "lrope-vectors",
        "version": 1,
        "rotations": [
            {
                "name": name, "architecture": architecture, "rope": said, "positions": positions,
                "magnitude": float(stock(said).magnitude), "layers": layers(stock(said), factors, positions),
            }
            for name, architecture, said, positions, factors in ROTATIONS
        ],
        "dynamic": [
            {"name": name, "architecture": "llama", "rope": said, "lengths": [length(said, n) for n in lengths]}
            for name, said, lengths in DYNAMIC
        ],
        "folds": [{"freq_scale": fs, "s": s, "refused": refused(fs, s)} for fs, s in FOLDS],
        "curves": [
            {"control_points": points, "factors": [curve_factors(points, n) for n in counts]}
            for points, counts in CURVES
        ],
        "heads": [
            {
                "name": name, "rope": said, "n_head": n_head, "n_head_kv": n_head_kv, "head_factors": factors,
                "query_scales": scales, "soft_cap": cap, "query": QUERY, "keys": KEYS, "positions": KEY_POSITIONS,
                "layers": heads(said, n_head, n_head_kv, factors, scales, cap),
            }
            for name, said, n_head, n_head_kv, factors, scales, cap in HEADS
        ],
        "entries": [
            {"key": key, "value": value, "little": entry(key, value, "<"), "big": entry(key, value, ">")}
            for key, value in ENTRIES
        ],
    }  # fmt: skip


def dumps(document: Json) -> str:

    def text(value: object) -> str:
        if not isinstance(value, list) or not value or not isinstance(value[0], dict):
            return json.dumps(value)
        return "[\n  " + ",\n  ".join(json.dumps(item, separators=(",", ":")) for item in value) + "\n ]"

    return "{\n " + ",\n ".join(f'"{key}": {text(value)}' for key, value in document.items()) + "\n}\n"


def difference(found: object, wanted: object, where: str = "") -> str | None:
    """Where two documents differ, in words; numbers may in their last digits."""
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        pairs = [(found[key], wanted[key], f"{where}.{key}".lstrip(".")) for key in wanted]
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(found, wanted, strict=True))]
    else:
        same = found == wanted and type(found) is type(wanted)
        if not same and isinstance(wanted, float) and isinstance(found, (int, float)):
            same = math.isclose(found, wanted, rel_tol=CLOSE)
        short = [value if len(value) < 60 else value[:60] + "..." for value in (repr(found), repr(wanted))]
        return None if same else f"{where or 'it'} is {short[0]}, the reference gives {short[1]}"
    return next((said for pair in pairs if (said := difference(*pair)) is not None), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare this file with the reference")
    path = parser.parse_args().check
    if path is None:
        print(dumps(vectors()), end="")
        return 0
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from None
    said = difference(found, vectors())
    if said is not None:
        raise CommandError(f"{path}: {said}")
    print(f"{path}: what the reference gives")
    return 0


if __name__ == "__main__":
    script(main)
