"""Curve documents and lists of factors, and what becomes of them in each of the two programs that read them.

`lrope-gguf write` (lrope_gguf/curve.py, commands/options.py) and `--rope-layer-factors` of llama.cpp's tools
(patches/01-layer-factors/common/rope-layer.cpp) must both refuse, or take the same float32 factors. The tools have the
JSON parser of llama.cpp, and read of a document `layer_factors` and what it says of its model: what else `write`
refuses is `UNCHECKED`. A new line in a table here is tried on both by tests/test_readers.py. `--rope-head-factors` and
`--query-scales` read `head_factors` and `query_scales` of the same document, and nothing else of it: `HEADS`.
"""

from __future__ import annotations

import json
from typing import Any, Final

from lrope_gguf.curve import Curve

N_LAYER = 6
FACTORS = (1.0, 1.3, 0.8, 2.5, 1.07, 3.1)
ONES = (1.0,) * N_LAYER
POINTS = [[0, 1], [0.5, 2], [1, 1.5]]
CURVED = tuple(round(s, 9) for s in Curve(((0, 1), (0.5, 2), (1, 1.5))).factor_list(N_LAYER))

REFUSED: Final = "refused"
UNCHECKED: Final = "unchecked"
"""Refused by `write`; the tools do not look there and take `FACTORS`, which the document lists."""
CURVE: Final = "curve"
"""Taken by `write`, which evaluates curves; the tools, which do not, say that it is `write` that does."""

Verdict = tuple[float, ...] | str
"""The factors, or one of the words above."""
Table = dict[str, tuple[str | bytes, Verdict]]


def document(**fields: Any) -> str:
    whole = {"format": "lrope-curve", "version": 1, "layer_factors": FACTORS} | fields
    return json.dumps({key: value for key, value in whole.items() if value is not ...})


def with_text(number: str) -> str:
    """A curve file with `number` as it stands for the fourth of six factors."""
    return document(layer_factors=[1, 1, 1, 7, 1, 1]).replace("7", number)


# of a model whose layers have 4 heads and 2 KV heads
HEAD_COUNTS = {"head_factors": 2, "query_scales": 4}
MOST = {"head_factors": 1024, "query_scales": 16}


def of_heads(name: str) -> Table:
    """Documents with rows of `head_factors` or `query_scales`, and the flat numbers that they come to."""
    n, most = HEAD_COUNTS[name], MOST[name]
    rows = [[1 + 0.125 * (layer + head) for head in range(n)] for layer in range(N_LAYER)]
    flat = tuple(value for row in rows for value in row)

    def document_of(value: Any, **fields: Any) -> str:
        return document(**{"layer_factors": ..., name: value} | fields)

    def first(number: str) -> str:
        """Rows with `number` as it stands for the first head."""
        return document_of([[7777, *rows[0][1:]], *rows[1:]]).replace("7777", number)

    return {
        "rows": (document_of(rows), flat),
        "beside factors of layers": (document_of(rows, layer_factors=FACTORS), flat),
        "of this model": (document_of(rows, architecture="llama", block_count=N_LAYER, bounds=None), flat),
        "byte order mark": (b"\xef\xbb\xbf" + document_of(rows).encode(), flat),
        "largest": (first(str(most)), (most, *flat[1:])),
        "smallest": (first(repr(1 / most)), (1 / most, *flat[1:])),
        "exponent": (first("25E-1"), (2.5, *flat[1:])),
        **{
            number: (first(number), REFUSED)
            for number in (str(most + 1), repr(0.99 / most), "0", "-1", "NaN", "1e999", "true", '"1"', "null", "[1]")
        },
        "five rows": (document_of(rows[:5]), REFUSED),
        "seven rows": (document_of([*rows, rows[0]]), REFUSED),
        "a short row": (document_of([rows[0][:-1], *rows[1:]]), REFUSED),
        "a long row": (document_of([*rows[:-1], [*rows[-1], 1]]), REFUSED),
        "an empty row": (document_of([*rows[:-1], []]), REFUSED),
        "rows of other lengths, as many numbers": (
            document_of([rows[0][:-1], [*rows[1], 1], *rows[2:]]),
            REFUSED,
        ),
        "a flat list": (document_of(list(flat)), REFUSED),
        "an object": (document_of({"0": rows[0]}), REFUSED),
        "a number": (document_of(1), REFUSED),
        "no rows": (document_of([]), REFUSED),
        "block_count 7": (document_of(rows, block_count=7), REFUSED),
        "other architecture": (document_of(rows, architecture="gemma3"), REFUSED),
        "cut": (document_of(rows)[:-1], REFUSED),
        "version 2": (document_of(rows, version=2), REFUSED),
    }


HEADS = {name: of_heads(name) for name in HEAD_COUNTS}


def curved(points: Any = POINTS, factors: Any = CURVED, **fields: Any) -> str:
    """A curve file with both points and factors."""
    return document(control_points=points, layer_factors=factors, **fields)


DOCUMENTS: Table = {
    # what is taken
    "list": (document(), FACTORS),
    "integers and exponents": (document(layer_factors=[1, 2, 1, 1, 1, 7]).replace("7", "25E-1"), (1, 2, 1, 1, 1, 2.5)),
    "half a float32 step": (with_text("1.000000059604644775390625"), ONES),
    "a bit more": (with_text("1.00000005960464499743523"), (1, 1, 1, 1 + 2**-23, 1, 1)),
    "largest": (with_text("1024"), (1, 1, 1, 1024, 1, 1)),
    "byte order mark": (b"\xef\xbb\xbf" + document().encode(), FACTORS),
    "own model": (document(architecture="llama", block_count=N_LAYER), FACTORS),
    "nothing said of the model": (document(architecture=None, block_count=None, bounds=None), FACTORS),
    "unknown keys": (document(new={"a": [1, None, True]}, provenance="\u0000"), FACTORS),
    "curve and factors": (curved(), CURVED),
    # curves without factors for this model
    "curve": (curved(factors=...), CURVE),
    "curve, null factors": (curved(factors=None), CURVE),
    # what is no document
    "empty": ("", REFUSED),
    "cut": (document()[:-1], REFUSED),
    "a list alone": ("[1, 1, 1, 1, 1, 1]", REFUSED),
    "more after it": (document() + "{}", REFUSED),
    "comment": (document() + "// so", REFUSED),
    "UTF-16": (document().encode("utf-16"), REFUSED),
    "Latin 1": (document(provenance=0).replace(": 0", ': "é"').encode("latin-1"), REFUSED),
    # numbers
    **{
        number: (with_text(number), REFUSED)
        for number in (".5", "NaN", "1e999", "1e39", "1e-400", "1024.1", "0", "-1", "true", '"1"', "null")
    },
    # fields
    "no format": (document(format=...), REFUSED),
    "version 2": (document(version=2), REFUSED),
    "version true": (document(version=True), REFUSED),
    "no factors": (document(layer_factors=[]), REFUSED),
    "factors of an object": (document(layer_factors={"a": 1}), REFUSED),
    "a number of factors": (document(layer_factors=1), REFUSED),
    "five factors": (document(layer_factors=FACTORS[:5]), REFUSED),
    "seven factors": (document(layer_factors=(*FACTORS, 1)), REFUSED),
    "other architecture": (document(architecture="gemma3"), REFUSED),
    "block_count 7": (document(block_count=7), REFUSED),
    "block_count '6'": (document(block_count="6"), REFUSED),
    # what the tools do not look at
    "a key twice": (document()[:-1] + ', "version": 1}', UNCHECKED),
    "another list before": ('{"layer_factors": [1], ' + document()[1:], UNCHECKED),
    "above 1 MiB": (document().ljust((1 << 20) + 1), UNCHECKED),
    "points of another curve": (curved(factors=FACTORS), UNCHECKED),
    "bounds reversed": (document(bounds=[2, 1]), UNCHECKED),
}

LISTS: Table = {
    "list": ("1,1.3,0.8,2.5,1.07,3.1", FACTORS),
    "blanks and exponents": (" 1e0, 13E-1 ,0.8e+0,2.5,1.07,3.1 ", FACTORS),
    **{
        number: (f"1,1,1,{number},1,1", REFUSED)
        for number in (".5", "+1", "01", "0x1", "1 1", "", "nan", "true", "[1]", "1e400", "0", "-1", "١")
    },
    "too few": ("1,1.2", REFUSED),
    "decimal commas": ("1,05,1,1,0,98,1,1", REFUSED),
    "comma at the end": ("1,1,1,1,1,1,", REFUSED),
    "a blank": (" ", REFUSED),
    "no file": ("missing.json", REFUSED),
}

# for a model of as many layers, of which the last is a multi-token-prediction head
_FIVE = (*FACTORS[:5], 1.0)
HEAD_DOCUMENTS: Table = {
    "five": (document(layer_factors=FACTORS[:5], block_count=N_LAYER), _FIVE),
    "six, and nearly 1 for the head": (document(layer_factors=(*FACTORS[:5], 1 + 1e-9)), REFUSED),
    "four": (document(layer_factors=FACTORS[:4]), REFUSED),
}
HEAD_LISTS: Table = {
    "six": ("1,1.3,0.8,2.5,1.07,1", _FIVE),
    "six, and not 1 for the head": ("1,1.3,0.8,2.5,1.07,3.1", REFUSED),
    "seven": ("1,1,1,1,1,1,1", REFUSED),
}
